"""Which runs a study makes in a world."""

import subprocess
import sys

import pytest

from pneumo import plan
from pneumo.config import Study
from pneumo.errors import Refused


@pytest.fixture(autouse=True)
def _with_horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "horovod_missing", lambda: None)


def make(study: Study, size: int = 8, cores: int = 2, gpus: int = 0) -> plan.Plan:
    return plan.make_plan(study, world_size=size, cores=cores, local_size=size, gpus=gpus)


def test_the_main_job() -> None:
    found = [(r.backend, r.comm, r.ranks, r.threads) for r in make(Study()).runs]
    parallel = [(b, c, k, 1) for b, c in (("ddp", "gloo"), ("fsdp", "gloo"), ("horovod", "mpi")) for k in (2, 4, 8)]
    assert found == [("serial", "none", 1, 1), ("serial", "none", 1, 2), *parallel]


def test_every_run_has_the_same_global_batch() -> None:
    assert {r.global_batch for r in make(Study()).runs} == {32}
    assert {r.global_batch for r in make(Study(ranks=(1, 2, 3, 4)), size=4).runs} == {24}


def test_weak_scaling_keeps_the_share_of_a_rank() -> None:
    runs = make(Study(rank_batch=4)).runs
    assert all(r.global_batch == 4 * r.ranks for r in runs)


def test_missing_horovod_is_said_and_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "horovod_missing", lambda: "not built")
    made = make(Study())
    assert {m.ranks for m in made.missing} == {2, 4, 8}
    assert {m.why for m in made.missing} == {"not built"}
    with pytest.raises(Refused, match="not built"):
        make(Study(backends=("horovod",)))


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (Study(ranks=(1, 64)), ["64", "8"]),
        (Study(ranks=(1, 2), global_batch=31), ["31", "2"]),
        (Study(comm=("nccl",)), ["nccl", "no CUDA GPU"]),
        (Study(backends=("serial",), ranks=(2,)), ["serial", "2"]),
    ],
)
def test_refusals(study: Study, words: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        make(study)
    assert all(word in str(caught.value) for word in words)


def test_gpus_choose_nccl() -> None:
    assert {r.comm for r in make(Study(), size=2, gpus=2).runs if r.backend == "ddp"} == {"nccl"}
    assert {r.comm for r in make(Study(), size=4, gpus=2).runs if r.backend == "ddp"} == {"gloo"}


def test_planning_imports_no_torch_so_that_threads_can_be_limited_before_it() -> None:
    code = (
        "import sys\n"
        "from pneumo.config import Study\n"
        "from pneumo.plan import make_plan\n"
        "make_plan(Study(), world_size=8, cores=2, local_size=8, gpus=0)\n"
        "print(sorted({'torch', 'horovod', 'mpi4py'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
