"""Preprocessing by all ranks of a real MPI world: the same bytes for any number of them, whatever breaks."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Launcher, Result

from pneumo.data import sample
from pneumo.data.inspect import inspect
from pneumo.data.patients import SampleConfig
from pneumo.data.rsna import IMAGES, LABELS, read_tables
from pneumo.data.store import Store, is_sound

JOB = Path(__file__).with_name("preprocess_job.py")
CONFIG = SampleConfig(patients=12, size=256)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 generated patients, of which two are spoiled, and a 13th whose picture is another's."""
    root = tmp_path_factory.mktemp("rsna")
    sample.write_tables(root, CONFIG)
    sample.write_patients(root, CONFIG, 0, CONFIG.patients)
    ids, folder = sample.plan(CONFIG), root / IMAGES
    (folder / f"{ids[3]}.dcm").write_bytes(b"no image")
    (folder / f"{ids[7]}.dcm").unlink()
    shutil.copyfile(folder / f"{ids[5]}.dcm", folder / "twin.dcm")
    label = next(line for line in (root / LABELS).read_text().splitlines() if line.startswith(ids[5]))
    with (root / LABELS).open("a") as table:
        table.write("twin" + label.removeprefix(ids[5]) + "\n")
    detail = next(line for line in (root / sample.DETAILED).read_text().splitlines() if line.startswith(ids[5]))
    with (root / sample.DETAILED).open("a") as table:
        table.write("twin" + detail.removeprefix(ids[5]) + "\n")
    return root


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the store that one rank makes."""
    folder = tmp_path_factory.mktemp("reference")
    Launcher(folder)(1, file=JOB, args=["plain", folder / "cache", data])
    return contents(only_store(folder / "cache"))


def lines(result: Result) -> list[dict[str, Any]]:
    """What the ranks printed, in their order."""
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"rank"')]
    return sorted(found, key=lambda line: line["rank"])


def only_store(cache: Path) -> Path:
    """The one store of a cache."""
    (folder,) = cache.glob("store-*")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of a folder's files by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def staging(cache: Path) -> list[Path]:
    """The staging folders in a cache."""
    return list(cache.glob(".staging-*"))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_makes_the_same_bytes_and_leaves_no_trace(
    mpirun: Launcher, tmp_path: Path, data: Path, reference: dict[str, bytes], ranks: int
) -> None:
    moved = shutil.copytree(data, tmp_path / "elsewhere")  # the folder's place must not matter
    result = mpirun(ranks, file=JOB, args=["plain", tmp_path / "cache", moved])
    assert contents(only_store(tmp_path / "cache")) == reference
    assert staging(tmp_path / "cache") == []
    for line in lines(result):
        assert line["changed"] == []
        assert line["threads"] == []
        assert line["sum"] == ranks * (ranks + 1) // 2
        assert line["listened"], "Dask was not seen to listen at all"
        assert {address for address, _ in line["listened"]} == {"127.0.0.1"}
    assert len(lines(result)) == ranks
    assert len({json.dumps([line["store"], line["patients"]]) for line in lines(result)}) == 1
    assert result.stderr == "", "closing is not quiet"


def test_store_holds_what_the_readers_say(tmp_path: Path, data: Path, reference: dict[str, bytes]) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    for name, content in reference.items():
        (folder / name).write_bytes(content)
    assert is_sound(folder)
    store, (patients, _) = Store.open(folder), read_tables(data)
    ids = sample.plan(CONFIG)
    assert {(q.patient, q.reason) for q in store.quarantine} == {
        (ids[3], "corrupt"),
        (ids[7], "missing_image"),
        ("twin", "duplicate"),
    }
    assert store.index["patient"].tolist() == [ids[i] for i in range(12) if i not in (3, 7)]
    by_id = {patient.patient_id: patient for patient in patients}
    for size in (48, 128):
        pictures = store.images(size)
        assert pictures.shape == (len(patients), size, size)
        for entry in store.index.itertuples():
            _, expected = inspect(by_id[entry.patient], (size,))
            assert np.array_equal(pictures[entry.row], expected[size])
            assert tuple(map(tuple, entry.boxes)) == by_id[entry.patient].boxes
        refused = np.setdiff1d(np.arange(len(patients)), store.index["row"])
        assert len(refused) == 2
        assert not pictures[refused].any()


def test_complete_store_is_opened_without_dask(mpirun: Launcher, tmp_path: Path, data: Path) -> None:
    first = lines(mpirun(2, file=JOB, args=["plain", tmp_path / "cache", data]))
    second = lines(mpirun(3, file=JOB, args=["cached", tmp_path / "cache", data]))
    assert [line["store"] for line in second] == [first[0]["store"]] * 3
    assert not any(line["dask"] for line in second)


@pytest.mark.parametrize("n", [1, 3])
def test_the_time_of_every_rank_is_accounted_for(mpirun: Launcher, tmp_path: Path, data: Path, n: int) -> None:
    """12 of the 13 patients have a file to inspect; of the store that is there, nobody inspects anything."""
    found = lines(mpirun(n, file=JOB, args=["efforts", tmp_path / "cache", data]))
    for line in found:
        made, opened = line["made"], line["opened"]
        assert len(made) == len(opened) == n
        assert min(value for one in made + opened for value in one.values()) > -1e-3
        assert sum(one["data_s"] for one in made) >= 12 * 0.05
        assert min(one["dask_s"] for one in made) > 0
        assert [(one["data_s"], one["dask_s"]) for one in opened] == [(0, 0)] * n
        assert all(one["comm_s"] > 0.5 for one in opened[1:])
        assert opened[0]["other_s"] > 0.5 > opened[0]["comm_s"]
    # What it takes to gather the answers comes on top, and on rank 0 nobody is waited for.
    assert all(0 <= apart < 0.5 for line in found for apart in line["apart"])


@pytest.mark.parametrize("how", ["killed_worker", "killed_last"])
def test_killed_run_leaves_nothing_that_is_trusted(
    mpirun: Launcher, tmp_path: Path, data: Path, reference: dict[str, bytes], how: str
) -> None:
    killed = mpirun(2, file=JOB, args=[how, tmp_path / "cache", data], check=False)
    assert killed.returncode != 0
    assert list((tmp_path / "cache").glob("store-*")) == []
    assert len(staging(tmp_path / "cache")) == 1
    mpirun(3, file=JOB, args=["plain", tmp_path / "cache", data])
    assert contents(only_store(tmp_path / "cache")) == reference
    assert staging(tmp_path / "cache") == []


def test_concurrent_runs_share_a_cache(
    mpirun: Launcher, tmp_path: Path, data: Path, reference: dict[str, bytes]
) -> None:
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(mpirun, 2, file=JOB, args=["plain", tmp_path / "cache", data]) for _ in range(2)]
    assert len({lines(one.result())[0]["store"] for one in both}) == 1
    assert contents(only_store(tmp_path / "cache")) == reference
    assert staging(tmp_path / "cache") == []


def test_damaged_store_is_made_again(mpirun: Launcher, tmp_path: Path, data: Path) -> None:
    for line in lines(mpirun(2, file=JOB, args=["damaged", tmp_path / "cache", data])):
        assert line["repaired"] == [True] * 6


def test_error_of_one_rank_is_one_sentence_on_all(mpirun: Launcher, tmp_path: Path, data: Path) -> None:
    found = lines(mpirun(3, file=JOB, args=["broken", tmp_path / "cache", data]))
    assert len(found) == 3
    for line in found:
        outcomes = line["outcomes"]
        assert outcomes == found[0]["outcomes"]
        assert {name: kind for name, (kind, _) in outcomes.items()} == {
            "interface": "PneumoError",
            "strict": "Refused",
            "full_first": "PneumoError",
            "full_last": "PneumoError",
            "space": "Refused",
            "tables": "PneumoError",
            "scheduler": "PneumoError",
            "worker_first": "PneumoError",
            "worker_last": "PneumoError",
        }
        assert "nonesuch0" in outcomes["interface"][1]
        assert "3 entries" in outcomes["strict"][1]
        assert "No space left" in outcomes["full_first"][1]
        assert "0 MB free" in outcomes["space"][1]
        assert "not today" in outcomes["tables"][1]
        assert line["left"] == []
        assert line["good"] == 10


def test_a_store_in_use_outlives_the_pruning_of_another_run(mpirun: Launcher, tmp_path: Path, data: Path) -> None:
    for line in lines(mpirun(2, file=JOB, args=["held", tmp_path / "cache", data])):
        assert (line["mine"], line["abandoned"]) == (True, False)


def test_cluster_talks_to_nobody_without_its_certificate(mpirun: Launcher, tmp_path: Path) -> None:
    found = lines(mpirun(2, file=JOB, args=["encrypted", tmp_path]))[0]["found"]
    assert len(found) == 3
    for address, named, received in found:
        assert address.startswith("tls://127.0.0.1:")
        assert named
        assert received == 0


def test_waiting_ranks_sleep(mpirun: Launcher, tmp_path: Path) -> None:
    for line in lines(mpirun(3, file=JOB, args=["asleep", tmp_path])):
        assert line["cores"] < 0.2, "a rank that spins takes a whole core, or its turn of one"


def test_sample_is_generated_once_and_again_where_it_was_changed(mpirun: Launcher, tmp_path: Path) -> None:
    mpirun(3, file=JOB, args=["plain", tmp_path / "cache"])
    (root,) = (tmp_path / "cache").glob("sample-*")
    expected = tmp_path / "expected"
    sample.write_tables(expected, CONFIG)
    sample.write_patients(expected, CONFIG, 0, CONFIG.patients)
    assert contents(root / IMAGES) == contents(expected / IMAGES)
    assert (root / LABELS).read_bytes() == (expected / LABELS).read_bytes()
    file = next((root / IMAGES).iterdir())
    before = file.stat().st_ino, contents(only_store(tmp_path / "cache"))
    mpirun(1, file=JOB, args=["cached", tmp_path / "cache"])
    assert file.stat().st_ino == before[0]
    file.write_bytes(b"changed")
    mpirun(2, file=JOB, args=["cached", tmp_path / "cache"])
    assert contents(root / IMAGES) == contents(expected / IMAGES)
    assert contents(only_store(tmp_path / "cache")) == before[1]
    assert staging(tmp_path / "cache") == []
