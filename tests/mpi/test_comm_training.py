"""Trainings over the backend `pneumo` equal those over Gloo: DDP with all its options, FSDP2, checkpoints, DTensor."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import BIN, MARK, Launcher, Result, run

JOB = Path(__file__).with_name("comm_training_job.py")
LOOPBACK = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# The cases that train, and how far their parameters may be from Gloo's, in proportion to the largest of each tensor:
# single precision adds in another order, and with 16 bits an ulp is as large as it is.
SINGLE, HALF, BRAIN = 3e-6, 2e-3, 2e-2
DDP: dict[str, float] = {
    "plain_mlp": SINGLE,
    "plain_cnn": SINGLE,
    "many_buckets": SINGLE,
    "no_sync": SINGLE,
    "no_sync_with_bucket_view": SINGLE,
    "unused_parameters": SINGLE,
    "static_graph": SINGLE,
    "bucket_view": SINGLE,
    "own_buffers": SINGLE,
    "uneven": SINGLE,
    "uneven_cnn": SINGLE,
    "uneven_zero": SINGLE,
    "zero": SINGLE,
    "zero_with_bucket_view": SINGLE,
    "allreduce_hook": SINGLE,
    "bf16_hook": BRAIN,
    "fp16_hook": HALF,
    "fp16_wrapped_power_sgd": HALF,
    "power_sgd": 1e-4,
    "local_sgd": SINGLE,
    "python_hook": SINGLE,
    "waiting_hook": SINGLE,
    "sparse": SINGLE,
    "mixed_precision": BRAIN,
    "in_bf16": BRAIN,
}
FSDP: dict[str, float] = {
    "fsdp": SINGLE,
    "fsdp_kept_whole_after_forward": SINGLE,
    "fsdp_accumulating": SINGLE,
    "fsdp_in_the_groups_memory": SINGLE,
    "fsdp_with_a_divisor": SINGLE,
    "fsdp_in_bf16": 5e-2,
    "fsdp_reducing_in_fp16": HALF,
}
CHECKPOINTS = ("checkpoint", "checkpoint_in_the_background", "checkpoint_in_safetensors")
OTHERS = (
    "divided_by_the_ranks_that_are_left",
    "early_end_is_told",
    "logging_data",
    "consolidated_state",
    "profiled",
    "fsdp_state",
    *CHECKPOINTS,
    "distributed_tensors",
    "tensor_parallel",
    "pipeline",
)
GRID = ("hsdp", "tensors_on_a_grid")  # need 4 ranks
STILL = {
    "unused_parameters": ["never.weight", "never.bias"],
    "static_graph": ["right.weight", "right.bias", "never.weight", "never.bias"],
}
SIZES = (2, 3, 4)
Found = list[dict[str, Any]]  # what each rank found in a case


@dataclass(slots=True)
class Trainings:
    """Runs all cases on a number of ranks, once it is asked for one of them."""

    folder: Path
    found: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    broken: dict[int, str] = field(default_factory=dict)

    def __call__(self, ranks: int, case: str) -> Found:
        """What the ranks found in a case."""
        if ranks not in self.found and ranks not in self.broken:
            try:
                names = [*DDP, *FSDP, *OTHERS, *(GRID if ranks == 4 else ())]
                self.found[ranks] = results(self.folder / str(ranks), ranks, names)
            except pytest.fail.Exception as error:
                self.broken[ranks] = str(error)
        if ranks in self.broken:
            pytest.fail(f"the job of all cases: {self.broken[ranks]}", pytrace=False)
        return of_case(self.found[ranks], case)


def results(folder: Path, ranks: int, names: Sequence[str], env: Mapping[str, str] | None = None) -> Found:
    """Run cases on a number of ranks; returns what each rank found, by the case."""
    folder.mkdir()
    Launcher(folder)(ranks, file=JOB, args=[folder, *names], timeout=280, env={**LOOPBACK, **(env or {})})
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def of_case(found: Sequence[Mapping[str, Any]], case: str) -> Found:
    """What the ranks found in one case, none of which may have failed."""
    for rank, cases in enumerate(found):
        assert "failed" not in cases[case], f"rank {rank}: {cases[case]['failed']}"
    return [cases[case] for cases in found]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    """What was found in the trainings."""
    if shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}") is None:
        pytest.skip("no mpirun in this environment or on PATH")
    return Trainings(tmp_path_factory.mktemp("trainings"))


def assert_equal(found: Found, tolerance: float, still: Sequence[str] = ()) -> None:
    """Losses and parameters are Gloo's, every tensor has moved, and all ranks have the same bits."""
    for rank, seen in enumerate(found):
        losses = seen["losses"]
        assert len(losses["gloo"]) >= 5
        np.testing.assert_allclose(losses["pneumo"], losses["gloo"], rtol=max(tolerance, 3e-6), err_msg=f"rank {rank}")
        assert seen["difference"] < tolerance, f"rank {rank}: the parameters differ by {seen['difference']}"
        assert seen["still"] == list(still), "equality of what does not move says nothing"
    assert len({seen["digest"] for seen in found}) == 1, "the ranks' parameters differ"


# ---- DDP


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("case", DDP)
def test_ddp_equals_ddp_over_gloo(trainings: Trainings, case: str, n: int) -> None:
    assert_equal(trainings(n, case), DDP[case], STILL.get(case, ()))


@pytest.mark.parametrize("n", SIZES)
def test_uneven_inputs_are_uneven(trainings: Trainings, n: int) -> None:
    for case in ("uneven", "uneven_cnn", "uneven_zero"):
        assert [len(seen["losses"]["pneumo"]) for seen in trainings(n, case)] == [5 + rank for rank in range(n)]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("case", ["bf16_hook", "fp16_hook", "power_sgd", "mixed_precision", "in_bf16"])
def test_what_should_be_coarser_is(trainings: Trainings, case: str, n: int) -> None:
    """A hook that were left out would equal Gloo's training as well."""
    coarse, plain = trainings(n, case)[0]["losses"]["pneumo"], trainings(n, "plain_mlp")[0]["losses"]["pneumo"]
    assert coarse[-1] != plain[-1]
    np.testing.assert_allclose(coarse, plain, rtol=0.1)


@pytest.mark.parametrize("n", SIZES)
def test_join_divides_by_the_ranks_that_are_left(trainings: Trainings, n: int) -> None:
    found = trainings(n, "divided_by_the_ranks_that_are_left")
    assert max(seen["difference"] for seen in found) < SINGLE
    assert len({seen["digest"] for seen in found}) == 1


@pytest.mark.parametrize("n", SIZES)
def test_an_early_end_is_told_to_all(trainings: Trainings, n: int) -> None:
    for seen in trainings(n, "early_end_is_told"):
        assert "exhausted" in seen["gloo"]
        assert seen["pneumo"] == seen["gloo"]


@pytest.mark.parametrize("n", SIZES)
def test_ddp_logs_what_it_logs_over_gloo(trainings: Trainings, n: int) -> None:
    for seen in trainings(n, "logging_data"):
        ours, gloos = seen["pneumo"], seen["gloo"]
        assert ours.keys() == {name for name in gloos if not name.startswith("gloo_")}
        differ = {name for name in ours if ours[name] != gloos[name] and "_time" not in name}
        assert differ <= {"backend_name"}, {name: (ours[name], gloos[name]) for name in differ}
        assert ours["world_size"] == str(n)
        assert int(ours["avg_backward_comm_time"]) > 0
        assert int(ours["num_iterations" if "num_iterations" in ours else "iteration"]) >= 3


@pytest.mark.parametrize("n", SIZES)
def test_a_divided_optimizer_is_collected(trainings: Trainings, n: int) -> None:
    found = trainings(n, "consolidated_state")
    assert [seen["entries"] for seen in found] == [0] * (n - 1) + [12]
    assert found[-1]["difference"] < SINGLE


@pytest.mark.parametrize("n", SIZES)
def test_the_profiler_sees_collectives(trainings: Trainings, n: int) -> None:
    for seen in trainings(n, "profiled"):
        assert {"pneumo:all_reduce", "pneumo:barrier"} <= set(seen["events"])


# ---- FSDP2, checkpoints, tensors on a mesh


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("case", FSDP)
def test_fsdp_equals_ddp_over_gloo(trainings: Trainings, case: str, n: int) -> None:
    assert_equal(trainings(n, case), FSDP[case])


def test_hybrid_sharding_equals_ddp_over_gloo(trainings: Trainings) -> None:
    assert_equal(trainings(4, "hsdp"), SINGLE)


@pytest.mark.parametrize("n", SIZES)
def test_the_state_of_fsdp_is_given_on(trainings: Trainings, n: int) -> None:
    found = trainings(n, "fsdp_state")
    assert [seen["keys"] for seen in found] == [10] + [0] * (n - 1)
    for seen in found:
        assert seen["apart"] > 0.01, "they were equal before"
        assert seen["difference"] == 0


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_is_saved_and_loaded(trainings: Trainings, case: str, n: int) -> None:
    for seen in trainings(n, case):
        assert seen["files"] >= n
        assert seen["apart"] > 0.01, "they were equal before"
        assert seen["difference"] == 0
        assert seen["moments"] == (None if case == "checkpoint_in_safetensors" else 0)


@pytest.mark.parametrize(
    ("case", "n"),
    [
        *((c, n) for c in ("distributed_tensors", "tensor_parallel", "pipeline") for n in SIZES),
        ("tensors_on_a_grid", 4),
    ],
)
def test_tensors_on_a_mesh_are_what_they_are_on_one_rank(trainings: Trainings, case: str, n: int) -> None:
    found = trainings(n, case)
    assert [seen["wrong"] for seen in found] == [[]] * n
    if case == "pipeline":
        assert [seen["losses"] for seen in found] == [0] * (n - 1) + [4], "the last stage has the losses of all parts"
    if case == "distributed_tensors":
        assert found[0]["sharded"] == ["Partial"], "the product was made of what lies on the ranks"


def test_trainings_pass_the_checks_of_torchs_debug_mode(trainings: Trainings) -> None:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL wraps the backend, and has Gloo compare every call first."""
    names = ["plain_mlp", "uneven", "many_buckets", "fsdp", "fsdp_state", "distributed_tensors"]
    found = results(trainings.folder / "detail", 2, names, {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"})
    for name in names[:4]:
        checked, plain = of_case(found, name), trainings(2, name)
        assert [seen["digest"] for seen in checked] == [seen["digest"] for seen in plain]
        assert [seen["losses"]["pneumo"] for seen in checked] == [seen["losses"]["pneumo"] for seen in plain]
    assert of_case(found, "fsdp_state")[0]["difference"] == 0
    assert of_case(found, "distributed_tensors")[0]["wrong"] == []


# ---- somebody else's script

SCRIPT = """
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
IMPORT

def main():
    dist.init_process_group(BACKEND)
    rank = dist.get_rank()
    torch.manual_seed(0)
    inputs = torch.randn(64, 20)
    dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    sampler = DistributedSampler(dataset, shuffle=True)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler)
    model = DDP(torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        total = torch.zeros(1)
        for x, y in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            print("LOSS", epoch, round(total.item(), 3), flush=True)
    objects = [None] * dist.get_world_size()
    dist.all_gather_object(objects, {"rank": rank})
    if rank == 0:
        print("OBJECTS", objects, "MPI" if "mpi4py" in sys.modules else "no MPI", flush=True)
    dist.destroy_process_group()
"""
SPAWN = """
def start(local_rank, world_size):
    os.environ.update(RANK=str(local_rank), WORLD_SIZE=str(world_size))
    main()

if __name__ == "__main__":
    import torch.multiprocessing as mp
    mp.spawn(start, args=(2,), nprocs=2)
"""
MAIN = """
if __name__ == "__main__":
    main()
"""
# Found by Python before anything else: there is no mpi4py in this environment.
BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mpi4py":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_alone(folder: Path, command: Sequence[str], port: int | None = None) -> Result:
    """Run a command with an environment that knows nothing of MPI, nor of much else."""
    (folder / "absent").mkdir(exist_ok=True)
    (folder / "absent" / "sitecustomize.py").write_text(BLOCK)
    env = {
        "PATH": f"{BIN}:/usr/bin:/bin",
        "HOME": str(folder),
        "PYTHONPATH": str(folder / "absent"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        **({} if port is None else {"MASTER_PORT": str(port)}),
    }
    settings = [f"{name}={value}" for name, value in env.items()]
    # The mark by which the harness finds what is left of a job is the one thing that stays.
    shell = ["sh", "-c", f'exec env -i {MARK}="${MARK}" "$@"', "sh", *settings]
    return run([*shell, *command], timeout=240, env=None, cwd=folder, folder=folder)


def losses(done: Result, *, ends_well: bool = True) -> list[str]:
    """The losses that the script printed, which has to have gathered its objects.

    Over Gloo it may yet die as it exits, after it has destroyed its group: one of its threads aborted the process in 2
    of 12 runs ("terminate called without an active exception").
    """
    assert done.returncode == 0 or not ends_well, done.text
    assert "OBJECTS [{'rank': 0}, {'rank': 1}] no MPI" in done.stdout
    found = [line.split("LOSS ")[1] for line in done.stdout.splitlines() if "LOSS " in line]
    assert len(found) == 2, done.text
    return found


TORCHRUN = {
    "standalone": ["--standalone"],
    "c10d": ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"],
}


def test_a_script_under_torchrun_without_mpi(tmp_path: Path) -> None:
    """Two lines of it are changed, and its losses are what they are over Gloo."""
    ours, gloos = tmp_path / "ours.py", tmp_path / "gloos.py"
    ours.write_text(SCRIPT.replace("IMPORT", "import pneumo.comm").replace("BACKEND", '"pneumo"') + MAIN)
    gloos.write_text(SCRIPT.replace("IMPORT", "").replace("BACKEND", '"gloo"') + MAIN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    expected = losses(run_alone(tmp_path, [*torchrun, *TORCHRUN["c10d"], str(gloos)]), ends_well=False)
    assert expected[0] != expected[1], "it learns"
    for options in TORCHRUN.values():
        assert losses(run_alone(tmp_path, [*torchrun, *options, str(ours)])) == expected


def test_a_script_that_spawns_its_ranks_without_mpi(tmp_path: Path) -> None:
    ours, gloos = tmp_path / "ours.py", tmp_path / "gloos.py"
    ours.write_text(SCRIPT.replace("IMPORT", "import pneumo.comm").replace("BACKEND", '"pneumo"') + SPAWN)
    gloos.write_text(SCRIPT.replace("IMPORT", "").replace("BACKEND", '"gloo"') + SPAWN)
    expected = losses(run_alone(tmp_path, [sys.executable, str(gloos)], free_port()), ends_well=False)
    assert losses(run_alone(tmp_path, [sys.executable, str(ours)], free_port())) == expected


def test_the_environment_of_these_scripts_has_no_mpi(tmp_path: Path) -> None:
    code = "import os; print(sorted(n for n in os.environ if n.startswith(('OMPI', 'PMIX', 'PRTE')))); import mpi4py"
    done = run_alone(tmp_path, [sys.executable, "-c", code])
    assert done.returncode == 1
    assert "[]" in done.stdout
    assert "No module named 'mpi4py'" in done.stderr
