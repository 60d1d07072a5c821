"""A synthetic result folder: what a run of the main job would have written, with figures that are known beforehand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pneumo.study.results import ResultFolder
from pneumo.study.schema import PHASES, Absent, DataFacts, Part, RunEntry, RunFile

START_NS = 90_000_000_000_000_003  # above 2**53, and odd: lost by any detour through floats
SHARES = {"data": 0.02, "forward": 0.3, "backward": 0.5, "comm": 0.1, "optimizer": 0.06, "other": 0.02}
DEFAULT_RUNS = (
    ("serial", "none", 1, 1),
    ("serial", "none", 1, 2),
    *((backend, comm, ranks, 1) for backend, comm in (("ddp", "gloo"), ("fsdp", "gloo")) for ranks in (2, 4, 8)),
)


def entry(run: int, backend: str, comm: str, ranks: int, threads: int) -> RunEntry:
    """A run's entry in run.json."""
    return RunEntry(
        run=run,
        model="cnn",
        backend=backend,
        comm=comm,
        ranks=ranks,
        threads=threads,
        binding="core" if ranks * threads <= 2 else "none",
        device="cpu",
        global_batch=32,
        parameters=8_400_000,
        gradient_bytes=33_600_000,
        state_bytes=134_400_000,
        step_peak_bytes=220_000_000 // ranks,
        note="HOROVOD_CYCLE_TIME is 1 ms" if backend == "horovod" else None,
    )


def run_file(runs: Sequence[tuple[str, str, int, int]] = DEFAULT_RUNS, **changes: Any) -> RunFile:
    """A complete run.json."""
    fields: dict[str, Any] = {
        "study": "main",
        "started": "2026-01-02T03:04:05Z",
        "ended": "2026-01-02T03:08:05Z",
        "state": "done",
        "command": ["python", "-m", "pneumo.launch"],
        "config": {"seed": 0, "blocks": 6},
        "runs": [entry(i, *run) for i, run in enumerate(runs)],
        "cores": 2,
        "hosts": ["node"],
        "warmup_steps": 3,
        "data": DataFacts(
            images=800,
            patients=800,
            classes={"Normal": 260, "No Lung Opacity / Not Normal": 140, "Lung Opacity": 400},
            parts={"train": Part(images=300, positives=150), "validate": Part(images=400, positives=200)},
            quarantine={"corrupt": 1},
            fingerprint="f00d",
            natural_prevalence=0.225,
            split_by="image",
        ),
        "provenance": {"commit": None, "torch": "2.14.1"},
    }
    return RunFile(**(fields | changes))


def step_rows(
    run: RunEntry, block_ns: Mapping[int, int], *, steps: int = 4, warmup: int = 3, skew_ns: int = 0
) -> list[dict[str, Any]]:
    """Rows of steps.parquet whose block b lasts exactly block_ns[b] from first begin to last end.

    Rank r begins r * skew_ns late in the first step and makes it up in the last.
    """
    rows = []
    for rank in range(run.ranks):
        for step in range(warmup):
            rows.append(_step(run, 0, rank, step, True, START_NS + step * 10**9, 10**9))
        for block, length in block_ns.items():
            edges = np.linspace(0, length, steps + 1).astype(np.int64)
            begin = START_NS + (block + 10) * 10**11
            for i in range(steps):
                first = int(edges[i]) + (rank * skew_ns if i == 0 else 0)
                number = warmup + block * steps + i
                rows.append(_step(run, block, rank, number, False, begin + first, int(edges[i + 1]) - first))
    return rows


def _step(run: RunEntry, block: int, rank: int, step: int, warmup: bool, begin_ns: int, wall_ns: int) -> dict[str, Any]:
    shares = SHARES if run.ranks > 1 else SHARES | {"comm": 0.0, "backward": 0.6}
    parts = {phase: int(share * wall_ns) for phase, share in shares.items()}
    parts["other"] += wall_ns - sum(parts.values())
    share = 32 // run.ranks + (1 if rank < 32 % run.ranks else 0)
    row: dict[str, Any] = {"run": run.run, "block": block, "rank": rank, "step": step, "kind": "train"}
    row |= {"warmup": warmup, "images": share, "loss": 0.5, "begin_ns": begin_ns, "wall_ns": wall_ns}
    for phase in PHASES:
        row |= {f"{phase}_ns": parts[phase], f"{phase}_cpu_ns": parts[phase] // 2, f"{phase}_delay_ns": None}
    return row | {"helpers_cpu_ns": 1000}


def prediction_rows(run: RunEntry, *, seed: int = 0, noise: float = 1e-5, patients: int = 400) -> list[dict[str, Any]]:
    """Rows of predictions.parquet: a classifier right about nine times in ten, the same for all runs but for noise."""
    rng, own = np.random.default_rng(seed), np.random.default_rng(1000 + run.run)
    rows = []
    for part, count in (("calibrate", patients // 4), ("validate", patients)):
        label = rng.permutation(np.arange(count) % 2)
        logit = rng.normal(size=count) * 1.6 + 4 * (label - 0.5)
        score = 1 / (1 + np.exp(-logit)) + noise * own.uniform(-1, 1, size=count)
        view, sex, age = rng.integers(2, size=count), rng.integers(2, size=count), rng.integers(5, 95, size=count)
        for i in range(count):
            row = {"run": run.run, "patient": f"{part}-{i:04}", "part": part, "label": int(label[i])}
            row |= {"score": float(np.clip(score[i], 0, 1)), "view": ("PA", "AP")[view[i]]}
            rows.append(row | {"sex": "FM"[sex[i]] if i else None, "age": int(age[i]) if i else None})
    return rows


def block_lengths(run: RunEntry, blocks: int, seed: int = 0) -> dict[int, int]:
    """Lengths of blocks in ns: about 1 s serially, a speedup of ranks**0.5 up to two cores, with a common drift."""
    drift = np.random.default_rng(seed).uniform(0.9, 1.1, size=blocks)
    own = np.random.default_rng(seed + 1 + run.run).uniform(0.98, 1.02, size=blocks)
    ideal = 1e9 / min(run.ranks * run.threads, 2) ** 0.7 * (1 + 0.05 * run.ranks)
    return {i: int(ideal * drift[i] * own[i]) for i in range(blocks)}


def write_result(
    out: Path,
    runs: Sequence[tuple[str, str, int, int]] = DEFAULT_RUNS,
    *,
    blocks: int = 6,
    lengths: Mapping[int, Mapping[int, int]] | None = None,
    predictions: bool = True,
    absent: Sequence[tuple[str, str, int, str]] = (),
    images_of_a_person: int | None = None,
    **changes: Any,
) -> Path:
    """Write a whole result and return its folder; `lengths` gives {run: {block: ns}} in place of the default ones.

    `images_of_a_person`: so many images in a row are of one person, None where nothing tells.
    """
    missing = [Absent(backend=b, comm=c, ranks=n, why=why) for b, c, n, why in absent]
    run = run_file(runs, absent=missing, **changes)
    folder = ResultFolder.create(out, run.study)
    folder.write_run(run)
    for one in run.runs:
        folder.add_steps(step_rows(one, (lengths or {}).get(one.run) or block_lengths(one, blocks), skew_ns=1000))
        if predictions:
            rows = prediction_rows(one)
            for i, row in enumerate(rows):
                row["person"] = None if images_of_a_person is None else i // images_of_a_person
            folder.add_predictions(rows)
    folder.flush()
    return folder.path
