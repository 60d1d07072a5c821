"""Every operation of torch.distributed on the backend `pneumo`, against Gloo, NumPy and MPI.

The checks are functions of comm_checks. One world runs them all, since starting torch takes seconds; it runs when the
first test asks for its outcome. To run some by hand: `mpirun -n 2 python comm_collectives_job.py works.check_...`.
"""

import ast
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import Launcher

from pneumo import comm

HERE = Path(__file__).parent
JOB = HERE / "comm_collectives_job.py"
ALONE = "unwritable"  # a module whose failure is a crash, which would take the other checks' world with it
BITS = "tensors.check_bits_are_the_same_on_every_rank_and_every_time"

# The number of ranks of each world, and what differs from the defaults in it: how ranks find the memory, fill it and
# wait, and chunks so small that whatever does not fit into one line has many of them.
WORLDS = {
    1: {},
    2: {},
    3: {"PNEUMO_COMM_SHM": "posix", "PNEUMO_COMM_SPIN_US": "100"},
    4: {"PNEUMO_COMM_STORES": "streamed"},
    7: {"PNEUMO_COMM_CHUNK": "16K", "PNEUMO_COMM_ONE_SHOT": "1K"},
}
TIMEOUT_S = 900


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a world said of each check (empty: it passed), of its bits, and at its end."""

    errors: dict[str, str]
    digests: tuple[str, ...]
    end: str


def names() -> list[str]:
    """The checks, as `module.check_name`, found without importing them, which would import torch."""
    found = []
    for path in sorted((HERE / "comm_checks").glob("*.py")):
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        found += [f"{path.stem}.{name}" for name in functions if name.startswith("check_") and path.stem != ALONE]
    return found


OUTCOMES: dict[int, Outcome] = {}


def outcome(mpirun: Launcher, n: int) -> Outcome:
    """What the world of n ranks has found; it runs once."""
    if n not in OUTCOMES:
        OUTCOMES[n] = run(mpirun, n, WORLDS[n])
    return OUTCOMES[n]


def run(mpirun: Launcher, n: int, env: dict[str, str], *wanted: str) -> Outcome:
    """Run checks in a world; without `wanted` all of them."""
    try:
        done = mpirun(n, file=JOB, args=wanted, timeout=TIMEOUT_S, env=env, check=False)
    except pytest.fail.Exception as failure:
        return Outcome({}, (), str(failure))
    lines = done.stdout.splitlines()
    reports = [json.loads(line.removeprefix("CHECK ")) for line in lines if line.startswith("CHECK ")]
    begun = [line for line in lines if line.startswith("BEGIN ")][-1:]
    return Outcome(
        {report["name"]: report["error"] for report in reports},
        tuple(line for line in lines if line.startswith("DIGEST ")),
        f"exit {done.returncode}, last {begun}\n{done.stderr[-4000:]}",
    )


pytestmark = [
    pytest.mark.timeout(TIMEOUT_S + 60),
    pytest.mark.skipif(comm.missing() is not None, reason="the native layer is not built"),
]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("n", WORLDS)
def test_check(mpirun: Launcher, n: int, name: str) -> None:
    found = outcome(mpirun, n)
    assert name in found.errors, f"the world ended before: {found.end}"
    if found.errors[name]:
        pytest.fail(found.errors[name], pytrace=False)


@pytest.mark.parametrize("n", WORLDS)
def test_world_ends_in_order(mpirun: Launcher, n: int) -> None:
    assert outcome(mpirun, n).end.startswith("exit 0,"), outcome(mpirun, n).end


@pytest.mark.parametrize("n", [3])
def test_bits_are_the_same_in_every_run(mpirun: Launcher, n: int) -> None:
    """Also in one that waits, and computes, in other ways."""
    first, second = outcome(mpirun, n), run(mpirun, n, {"PNEUMO_SIMD": "scalar", "PNEUMO_COMM_SPIN_US": "0"}, BITS)
    assert len(second.digests) == 4, second.end
    assert first.digests == second.digests


def test_nothing_is_left_in_dev_shm(mpirun: Launcher) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(mpirun, 2, {"PNEUMO_COMM_SHM": "posix"}, "groups.check_every_subset")
    assert found.errors == {"groups.check_every_subset": ""}, found
    names = [str(warning.message).split()[-1] for warning in caught if "left in" in str(warning.message)]
    assert not [name for name in names if Path("/dev/shm", name).exists()]  # another job's are gone by now


def test_outputs_without_memory_of_their_own_are_refused(mpirun: Launcher) -> None:
    found = run(mpirun, 2, {}, ALONE)
    assert found.errors == {f"{ALONE}.check_outputs_without_memory_of_their_own": ""}, found
