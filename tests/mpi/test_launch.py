"""The launcher: refusals, and a small study from DICOM files to the summary, whose figures are recomputed here."""

import json
import re
import time
from pathlib import Path

import pandas as pd
import pytest
from harness import Launcher
from small_study import small_data

from pneumo.models.weights import described

PHASES = ("data", "forward", "backward", "comm", "optimizer", "other")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ranks", "1,64"], ["64", "2"]),
        (["--global-batch", "31", "--ranks", "1,2"], ["31", "2"]),
        (["--data", "/nonexistent-dir"], ["/nonexistent-dir"]),
        (["--out", "/proc/nowhere"], ["/proc/nowhere"]),
        (["--bakends", "ddp"], ["--bakends", "--backends"]),
        (["--ranks", "1", "2"], ["2", "--ranks 1,2"]),
        (["--json", "/nowhere/x.json"], ["--json", "/nowhere/x.json"]),
        (["--mapping", "/etc/hostname"], ["/etc/hostname"]),
    ],
)
def test_refusals_are_said_once(mpirun: Launcher, flags: list[str], words: list[str]) -> None:
    done = mpirun(2, module="pneumo.launch", args=flags, timeout=60, check=False)
    assert done.returncode == 2, done.text
    said = [line for line in done.text.splitlines() if line.startswith("pneumo: ")]
    assert len(said) == 1, done.text
    assert all(word in said[0] for word in words)
    assert "Traceback" not in done.text


def test_a_study_adds_up(mpirun: Launcher, tmp_path: Path) -> None:
    places = small_data(tmp_path)
    flags = ["--size", "32", "--epochs", "3", "--ranks", "1,2", "--global-batch", "8", "--blocks", "6", "--save"]
    done = mpirun(2, module="pneumo.launch", args=[*places, *flags], timeout=200)
    folder = (tmp_path / "out" / "main" / "latest").resolve()
    summary = json.loads((folder / "summary.json").read_text())
    run = json.loads((folder / "run.json").read_text())
    assert run["state"] == "done"
    assert [min(parts.values()) >= -1e-3 for parts in run["preprocessing"]] == [True, True]
    assert sum(parts["data_s"] for parts in run["preprocessing"]) > 0
    assert re.search(r"preprocessing took [0-9.]+ rank-seconds on 2 rank\(s\): .*\d+ % images, ", done.stdout)
    rows = {(r["backend"], r["ranks"]): r for r in summary["rows"]}
    assert {("serial", 1), ("ddp", 2), ("fsdp", 2), ("horovod", 2)} <= set(rows)
    quarantine = next((tmp_path / "cache").glob("store-*")) / "quarantine.csv"
    assert f"59 images, 1 left out (1 corrupt): {quarantine}" in done.stdout
    steps = pd.read_parquet(folder / "steps.parquet")
    assert (steps[[f"{p}_ns" for p in PHASES]].sum(axis=1) == steps["wall_ns"]).all()
    timed = steps[(steps["kind"] == "train") & ~steps["warmup"]]
    check_spans(pd.read_parquet(folder / "spans.parquet"), timed, run["sampling"]["steps_per_block"])
    for entry in run["runs"]:
        mine = timed[timed["run"] == entry["run"]]
        assert set(mine["rank"]) == set(range(entry["ranks"]))
        counts = mine[mine["rank"] == 0].groupby("block")["step"].nunique()
        assert set(counts) == {1}
        assert len(counts) == 6
        trained = steps[(steps["run"] == entry["run"]) & (steps["kind"] == "train")]
        assert trained["step"].nunique() == 3 * 3  # three epochs of 23 images in batches of 8, not one step more
        assert (mine["comm_ns"].sum() > 0) == (entry["ranks"] > 1)
        ends = (mine["begin_ns"] + mine["wall_ns"]).groupby(mine["block"]).max()
        total_s = (ends - mine["begin_ns"].groupby(mine["block"]).min()).sum() / 1e9
        key = ("backend", "comm", "ranks")
        row = next(r for r in summary["rows"] if all(r[k] == entry[k] for k in key))
        if row["threads"] == entry["threads"]:
            assert row["total_s"] == pytest.approx(total_s, rel=1e-9)
    for entry in run["runs"]:
        check_checkpoint(steps[steps["run"] == entry["run"]], entry["ranks"])
    records = pd.read_parquet(folder / "collectives.parquet")
    assert (records["wait_end_ns"].notna() | records["bound"].notna()).all()
    check_counted(steps[steps["kind"] == "validate"], records)
    said = " ".join(done.stdout.split())
    assert re.search(r"ddp \S+ 2 checkpoint: (Of|Nothing) .{0,250}ank 0 .{0,250}in checkpoint", said)
    first = rows["serial", 1]["metrics"]
    for row in rows.values():
        assert row["metrics"]["auc"] == pytest.approx(first["auc"], abs=0.01)
    predictions = pd.read_parquet(folder / "predictions.parquet")
    assert not predictions.duplicated(["run", "patient", "part"]).any()
    saved = list((folder / "checkpoints").glob("*.safetensors"))
    assert len(saved) == len(run["runs"])
    assert {described(path) for path in saved} == {("cnn", 32)}
    assert "Results: " in done.stdout
    assert not (folder / "trace.json.gz").exists()


def check_checkpoint(steps: pd.DataFrame, ranks: int) -> None:
    """Each rank has a row of gathering the model and one of its writing, in which the others wait for rank 0."""
    saved, others = steps[steps["kind"] == "checkpoint"], steps[steps["kind"] != "checkpoint"]
    assert saved.groupby("rank")["step"].nunique().to_dict() == dict.fromkeys(range(ranks), 2)
    assert saved["begin_ns"].min() >= (others["begin_ns"] + others["wall_ns"]).max()
    assert not set(saved["step"]) & set(others["step"])
    assert saved["images"].sum() == 0
    written = saved[saved["step"] == saved["step"].max()].set_index("rank")
    for rank in range(1, ranks):
        assert written["comm_ns"][rank] > 0.5 * written["other_ns"][0]
        assert written["other_ns"][rank] < 0.5 * written["other_ns"][0]


def check_counted(validated: pd.DataFrame, records: pd.DataFrame) -> None:
    """The sum that counts the answers is a row, and what is blocked in it is recorded once and in that row."""
    key = ["run", "rank", "step"]
    assert set(validated[validated["images"] == 0].groupby(["run", "rank"]).size()) == {2}, "one for each part"
    small = records[records["group"] == "small"].merge(validated[[*key, "images", "begin_ns", "wall_ns"]], on=key)
    assert (small["images"] == 0).all()
    assert (small["wait_begin_ns"] >= small["begin_ns"]).all()
    assert (small["wait_end_ns"] <= small["begin_ns"] + small["wall_ns"]).all()
    alone = validated[validated["run"] == 0]
    assert alone["comm_ns"].sum() == 0, "serial waits for nobody"


def check_spans(spans: pd.DataFrame, timed: pd.DataFrame, most: int) -> None:
    """The intervals of the sampled steps, which here are all timed ones, cover them and sum to their phases."""
    assert timed.groupby(["run", "block", "rank"]).size().max() <= most
    key = ["run", "rank", "step"]
    sums = (spans["end_ns"] - spans["begin_ns"]).groupby([spans[name] for name in (*key, "phase")]).sum().unstack()
    found = sums.reindex(columns=list(PHASES)).fillna(0).astype("int64").sort_index()
    rows = timed.set_index(key).sort_index()
    assert found.index.equals(rows.index)
    assert (found.to_numpy() == rows[[f"{p}_ns" for p in PHASES]].to_numpy()).all()
    ends = spans.groupby(key)
    assert (ends["begin_ns"].min() == rows["begin_ns"]).all()
    assert (ends["end_ns"].max() == rows["begin_ns"] + rows["wall_ns"]).all()
    ordered = spans.sort_values([*key, "begin_ns"])
    follows = (ordered[key] == ordered[key].shift()).all(axis=1)
    assert (ordered["begin_ns"] == ordered["end_ns"].shift())[follows].all()


def test_a_rank_that_fails_alone_leaves_a_result_that_says_so(mpirun: Launcher, tmp_path: Path) -> None:
    """Rank 0 only waits for it: whoever says that the job failed also marks the result."""
    code = (
        "import sys, time\n"
        "from pneumo import launch\n"
        "from pneumo.job import Job\n"
        "original = Job._advance\n"
        "def advance(self, training, block, count, *, warmup):\n"
        "    if block == 2 and self._world.rank == 1:\n"
        f"        open({str(tmp_path / 'raised')!r}, 'w').write(str(time.time()))\n"
        "        raise RuntimeError('the reason')\n"
        "    return original(self, training, block, count, warmup=warmup)\n"
        "Job._advance = advance\n"
        "sys.exit(launch.main())\n"
    )
    script = tmp_path / "job.py"
    script.write_text(code)
    flags = ["--size", "32", "--epochs", "3", "--ranks", "1,2", "--global-batch", "8", "--backends", "serial,ddp"]
    done = mpirun(2, file=script, args=[*small_data(tmp_path), *flags], timeout=200, check=False)
    assert (tmp_path / "raised").exists(), done.text
    took = time.time() - float((tmp_path / "raised").read_text())
    assert done.returncode == 1, done.text
    assert took < 10, f"the job ended {took:.1f} s after the exception"
    assert done.text.count("rank 1 on") == 1
    run = json.loads((tmp_path / "out" / "main" / "latest" / "run.json").read_text())
    assert run["state"] == "failed"
    assert run["ended"] is not None


def test_ranks_that_a_training_does_not_use_sleep(mpirun: Launcher, tmp_path: Path) -> None:
    """In a job with Gloo's and Horovod's threads: rank 2, which no run uses, and rank 1 while serial trains."""
    code = (
        "import json, os, sys, time\n"
        "from pneumo import launch\n"
        "from pneumo.job import Job\n"
        "original, idle, threads = Job._advance, [0.0, 0.0], []\n"
        "def advance(self, training, block, count, *, warmup):\n"
        "    self._world.wait()\n"
        "    wall, cpu = time.monotonic(), time.process_time()\n"
        "    took = original(self, training, block, count, warmup=warmup)\n"
        "    if not training.active and not warmup:\n"
        "        idle[0] += time.monotonic() - wall\n"
        "        idle[1] += time.process_time() - cpu\n"
        "        threads.append(len(os.listdir('/proc/self/task')))\n"
        "    return took\n"
        "Job._advance = advance\n"
        "code = launch.main()\n"
        "rank = os.environ['OMPI_COMM_WORLD_RANK']\n"
        f"open({str(tmp_path)!r} + '/idle' + rank, 'w').write(json.dumps([*idle, max(threads, default=0)]))\n"
        "sys.exit(code)\n"
    )
    script = tmp_path / "job.py"
    script.write_text(code)
    flags = [
        "--backends",
        "serial,ddp,horovod",
        "--ranks",
        "1,2",
        "--epochs",
        "6",
        "--global-batch",
        "8",
        "--size",
        "64",
    ]
    mpirun(3, file=script, args=[*small_data(tmp_path), *flags, "--blocks", "2"], timeout=250)
    for rank in (1, 2):
        wall_s, cpu_s, threads = json.loads((tmp_path / f"idle{rank}").read_text())
        assert wall_s > 0.5
        assert threads > 2, "no library's thread is alive: the measurement says nothing"
        assert cpu_s / wall_s < 0.02, f"rank {rank}, idle, used {cpu_s / wall_s:.1%} of a core in {wall_s:.1f} s"


def test_unequal_nodes_are_planned_for_together(mpirun: Launcher, tmp_path: Path) -> None:
    """Two ranks that take themselves for nodes of 8 and 2 cores, and so would plan for 8 and for 2 threads."""
    script = tmp_path / "job.py"
    script.write_text(
        "from pneumo import launch\n"
        "from pneumo.config import Study\n"
        "from pneumo.world import World\n"
        "with World.start() as w:\n"
        "    w.cores, w.local_size = tuple(range(2 if w.rank else 8)), 1\n"
        "    plans = w.comm.gather(launch._plan(Study(), w))\n"
        "    if w.rank == 0: print('PLANS', plans[0] == plans[1], {p.threads for p in plans})\n"
    )
    assert "PLANS True {2}" in mpirun(2, file=script, timeout=60).stdout


def test_weak_scaling_says_what_it_compares(mpirun: Launcher, tmp_path: Path) -> None:
    flags = ["--size", "32", "--epochs", "2", "--ranks", "1,2", "--rank-batch", "4", "--backends", "serial,ddp"]
    done = mpirun(2, module="pneumo.launch", args=[*small_data(tmp_path), *flags], timeout=200)
    log = (tmp_path / "out" / "main" / "latest" / "log.txt").read_text()
    for text in (done.stdout, log):
        assert text.count("accuracy and AUC compare unequal trainings") == 1
        assert text.index("Comparison") < text.index("weak scaling")


def test_a_budget_decides_how_many_steps_all_runs_make(mpirun: Launcher, tmp_path: Path) -> None:
    """Of 900,000 steps as many are made as the budget allows, by what two looks have measured."""
    flags = ["--model", "sleep", "--backends", "serial,ddp", "--comm", "gloo", "--ranks", "1,2", "--threads", "1"]
    flags += ["--global-batch", "8", "--epochs", "300000", "--budget", "20s"]
    done = mpirun(2, module="pneumo.launch", args=[*small_data(tmp_path), *flags], timeout=120)
    folder = tmp_path / "out" / "main" / "latest"
    pattern = r"2 runs in turns, (\d+) steps to warm up, 6 blocks of (\d+); \d+ of the 900000 steps"
    warmup, steps = map(int, re.search(pattern, done.stdout).groups())  # type: ignore[union-attr]
    assert warmup > 2, "the second look warms up too"
    assert steps > 5, "a step sleeps for 24 ms"
    rows = pd.read_parquet(folder / "steps.parquet").query("kind == 'train'")
    counts = rows.groupby(["run", "rank", "block"])["step"].nunique().unstack().to_numpy()
    assert (counts == [warmup] + 6 * [steps]).all()
    assert (rows["warmup"] == (rows["block"] == 0)).all()
    summary = json.loads((folder / "summary.json").read_text())
    assert {row["warmup_steps"] for row in summary["rows"]} == {warmup}


def test_a_dry_run_needs_no_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from pneumo.launch import main

    assert main(["--dry-run", "--ranks", "1,2", "--json", str(tmp_path / "plan.json")]) == 0
    text = capfd.readouterr().out
    assert "ddp/gloo on 2 ranks" in text
    assert "33.6 MB of gradient" in text
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert {r["global_batch"] for r in plan["runs"]} == {32}


def test_a_dry_run_counts_the_images_that_the_subset_leaves(tmp_path: Path) -> None:
    from pneumo.launch import main

    images = tmp_path / "stage_2_train_images"
    images.mkdir()
    rows = ["patientId,x,y,width,height,Target"]
    for i in range(40):
        (images / f"p{i}.dcm").touch()
        rows.append(f"p{i},10.0,10.0,20.0,20.0,1" if i < 10 else f"p{i},,,,,0")
    (tmp_path / "stage_2_train_labels.csv").write_text("\n".join(rows) + "\n")
    for subset, expected in (("balanced", 8), ("all", 16)):
        out = tmp_path / f"{subset}.json"
        flags = ["--dry-run", "--ranks", "1,2", "--data", str(tmp_path), "--subset", subset, "--json", str(out)]
        assert main(flags) == 0
        assert {run["train_images"] for run in json.loads(out.read_text())["runs"]} == {expected}
