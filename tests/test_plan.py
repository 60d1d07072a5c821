"""Which runs a study makes in a world."""

import subprocess
import sys

import pytest

from pneumo import plan
from pneumo.config import Study
from pneumo.errors import Refused
from pneumo.study.schema import Sampling


@pytest.fixture(autouse=True)
def _with_horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "horovod_missing", lambda _device: None)


@pytest.fixture(autouse=True)
def native_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native layer is built, whether it is on this machine or not."""
    monkeypatch.setattr(plan, "native_missing", lambda: None)


def make(study: Study, size: int = 8, cores: int = 2, gpus: int = 0) -> plan.Plan:
    return plan.make_plan(study, world_size=size, cores=cores, local_size=size, gpus=gpus)


def test_the_main_job() -> None:
    found = [(r.backend, r.comm, r.ranks, r.threads) for r in make(Study()).runs]
    comms = [("gloo", (2, 4, 8)), ("pneumo", (2, 8))]  # the second comm at both ends only
    parallel = [(b, c, k, 1) for b in ("ddp", "fsdp") for c, ranks in comms for k in ranks]
    horovod = [("horovod", "mpi", k, 1) for k in (2, 4, 8)]
    assert found == [("serial", "none", 1, 1), ("serial", "none", 1, 2), *parallel, *horovod]


def test_a_comm_that_was_asked_for_runs_at_every_number_of_ranks() -> None:
    runs = make(Study(comm=("gloo", "pneumo"), backends=("ddp",))).runs
    assert [(r.comm, r.ranks) for r in runs] == [(c, k) for c in ("gloo", "pneumo") for k in (2, 4, 8)]


def test_without_the_native_layer_the_main_job_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "native_missing", lambda: "not built")
    assert {r.comm for r in make(Study()).runs if r.backend in ("ddp", "fsdp")} == {"gloo"}
    with pytest.raises(Refused, match=r"--comm pneumo is not available here: not built; available: gloo\."):
        make(Study(comm=("pneumo",)))


def test_every_run_has_the_same_global_batch() -> None:
    assert {r.global_batch for r in make(Study()).runs} == {32}
    assert {r.global_batch for r in make(Study(ranks=(1, 2, 3, 4)), size=4).runs} == {24}


@pytest.mark.parametrize(
    ("size", "ranks", "batch"),
    [
        (3, (1, 2, 3), 24),
        (5, (1, 2, 4, 5), 40),
        (28, (1, 2, 4, 8, 16), 32),
        (100, (1, 2, 4, 8, 16, 32, 64), 64),
    ],
)
def test_an_odd_world_does_not_blow_up_the_batch(size: int, ranks: tuple[int, ...], batch: int) -> None:
    assert plan.default_ranks(Study(), size) == ranks
    assert {r.global_batch for r in make(Study(), size=size).runs} == {batch}


def test_the_default_batch_is_bounded_and_divided_by_all_ranks_of_any_world() -> None:
    for size in range(1, 300):
        ranks = plan.default_ranks(Study(), size)
        (batch,) = {r.global_batch for r in make(Study(backends=("serial", "ddp")), size=size).runs}
        assert batch <= 64
        assert not any(batch % k for k in ranks)
        assert ranks[0] == 1
        assert 2 * ranks[-1] > size or ranks[-1] == 64


def test_a_batch_that_was_given_leaves_out_no_power_of_two() -> None:
    assert plan.default_ranks(Study(global_batch=24), 6) == (1, 2, 4, 6)
    assert plan.default_ranks(Study(global_batch=32), 6) == (1, 2, 4)
    with pytest.raises(Refused, match=r"--global-batch 31.*2 ranks"):
        make(Study(global_batch=31), size=2)
    assert plan.default_ranks(Study(rank_batch=5), 28) == (1, 2, 4, 8, 16, 28)


def plan_for(batch: int, study: Study) -> plan.Plan:
    run = plan.Run(0, "cnn", "serial", "none", 1, 1, batch, "cpu")
    return plan.Plan((run,), (), 1)


def test_a_schedule_has_equal_blocks_and_keeps_the_epochs() -> None:
    """For every number of steps and blocks; the remainder is in the warm-up, with a budget it is left out."""
    for images, blocks in ((i, b) for i in range(2, 120) for b in range(1, 13)):
        study = Study(epochs=1, blocks=blocks)
        made = plan.make_schedule(study, plan_for(1, study), images)
        assert made.warmup + made.blocks * made.steps == made.total == made.asked == images
        assert made.warmup >= 1
        assert made.blocks == min(blocks, images - 1)
        hurried = Study(epochs=1, blocks=blocks, budget="10s")
        bounded = plan.make_schedule(hurried, plan_for(1, hurried), images)
        assert (bounded.blocks, bounded.steps) == (made.blocks, made.steps)
        assert 1 <= bounded.warmup <= plan.WARMUP_STEPS
        assert images - blocks < bounded.total <= images


def test_the_epochs_of_a_schedule_are_those_of_the_smallest_batch() -> None:
    study = Study(rank_batch=8, epochs=2)
    made = plan.make_schedule(study, make(study, size=4), 80)
    assert made.asked == 2 * 10


def test_a_single_step_is_refused_because_nothing_would_be_left_to_time() -> None:
    study = Study(epochs=1)
    with pytest.raises(Refused, match=r"30 training images in batches of 32 .*--epochs"):
        plan.make_schedule(study, plan_for(32, study), 30)


def test_a_comm_of_the_table_that_is_not_here_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plan.COMM_MISSING, "gloo", lambda _ranks, _gpus: "its library was not built")
    with pytest.raises(Refused) as caught:
        make(Study(comm=("gloo",)), size=2, gpus=2)
    assert str(caught.value) == "--comm gloo is not available here: its library was not built; available: pneumo, nccl."


def test_no_gpu_is_said_in_a_sentence() -> None:
    with pytest.raises(Refused) as caught:
        make(Study(comm=("nccl",)))
    assert str(caught.value) == "--comm nccl is not available here: no CUDA GPU was found; available: gloo, pneumo."


def test_weak_scaling_keeps_the_share_of_a_rank() -> None:
    runs = make(Study(rank_batch=4)).runs
    assert all(r.global_batch == 4 * r.ranks for r in runs)


@pytest.mark.parametrize(
    ("ranks", "asked", "groups"), [((1,), None, 2), ((1, 2), None, 2), ((1, 4), None, 4), ((1,), 4, 4), ((1, 4), 4, 4)]
)
def test_all_runs_have_the_same_virtual_groups(ranks: tuple[int, ...], asked: int | None, groups: int) -> None:
    """Of about 8 images, as far as the ranks divide their number; the asked ones make studies of other ranks agree."""
    runs = make(Study(model="yolo", ranks=ranks, global_batch=16, groups=asked)).runs
    assert {run.groups for run in runs} == {groups}


@pytest.mark.parametrize(
    ("ranks", "batch"),
    [((1, 2), 8), ((1, 2, 4), 8), ((1, 2, 3), 12), ((1, 8), 16), ((5,), 10), ((1, 16), 32), ((3, 8), 48)],
)
def test_no_group_of_a_usual_batch_of_the_detector_is_a_single_image(ranks: tuple[int, ...], batch: int) -> None:
    """Batch norm over one image is so badly conditioned that rounding decides the training."""
    runs = make(Study(model="yolo", ranks=ranks), size=16).runs
    assert {run.global_batch for run in runs} == {batch}
    assert all(batch % rank == 0 for rank in ranks)
    assert all(batch >= 2 * run.groups for run in runs)


def test_missing_horovod_is_said_and_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "horovod_missing", lambda _device: "not built")
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
        (Study(model="yolo", ranks=(1, 4), groups=2), ["--groups 2", "--ranks 1,4", "multiple of 4, at most 8"]),
        (Study(model="yolo", ranks=(1, 4), global_batch=16, groups=20), ["--groups 20", "at most 16"]),
    ],
)
def test_refusals(study: Study, words: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        make(study)
    assert all(word in str(caught.value) for word in words)


def test_ranks_share_a_gpu_where_nccl_may(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="4 ranks share 2 GPU"):
        make(Study(comm=("nccl",)), size=4, gpus=2)
    monkeypatch.setenv(plan.SHARED_GPUS, "1")
    assert {r.device for r in make(Study(comm=("nccl",)), size=4, gpus=2).runs} == {"cuda"}


def test_gpus_choose_nccl() -> None:
    assert {r.comm for r in make(Study(), size=2, gpus=2).runs if r.backend == "ddp"} == {"nccl"}
    assert {r.comm for r in make(Study(), size=4, gpus=2).runs if r.backend == "ddp"} == {"gloo", "pneumo"}


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


@pytest.mark.parametrize(("steps", "most", "expected"), [(3, 8, [0, 1, 2]), (9, 4, [0, 3, 6]), (5, 1, [0]), (0, 4, [])])
def test_the_first_step_of_a_block_and_every_kth_is_sampled(steps: int, most: int, expected: list[int]) -> None:
    assert list(Sampling(steps_per_block=most).of_block(steps)) == expected


@pytest.mark.parametrize("size", [1, 8, 64, 4096])
def test_the_rows_of_spans_are_bounded(size: int) -> None:
    study = Study(backends=("serial", "ddp"), ranks=(1, size), rank_batch=4, blocks=6)
    made = make(study, size)
    schedule = plan.make_schedule(study, made, 100 * 4 * size)
    most = plan.make_sampling(made, schedule).steps_per_block
    rows = plan.ROWS_A_STEP * schedule.blocks * sum(run.ranks for run in made.runs)
    assert most == 1 or most * rows <= plan.SPAN_ROWS < (most + 1) * rows
