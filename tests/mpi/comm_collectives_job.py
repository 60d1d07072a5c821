"""Under mpirun: runs the checks of comm_checks and prints, on rank 0, a line of JSON for each.

Arguments: names of checks, as `module.check_name`, or of modules; none: all modules in MODULES.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence

from comm_checks.world import Ranks, use_loopback

from pneumo.world import World

MODULES = (
    *("reductions", "movements", "messages", "memory", "groups"),
    *("works", "functional", "tensors", "draws", "mistakes", "records"),
)


def checks(wanted: Sequence[str]) -> dict[str, Callable[[Ranks], None]]:
    """The checks by name, in the order of the files."""
    found = {}
    for module in dict.fromkeys(name.split(".")[0] for name in wanted or MODULES):
        for name, function in vars(importlib.import_module(f"comm_checks.{module}")).items():
            full = f"{module}.{name}"
            if name.startswith("check_") and (not wanted or full in wanted or module in wanted):
                found[full] = function
    return found


def run(world: World, wanted: Sequence[str]) -> None:
    """Run the checks; one that fails does not keep the next from running."""
    use_loopback()
    ranks = Ranks(world)
    for name, check in checks(wanted).items():
        if world.rank == 0:
            print(f"BEGIN {name}", flush=True)
        begin, error = time.monotonic(), ""
        try:
            ranks.together(lambda check=check: check(ranks))  # type: ignore[misc]
        except AssertionError as failure:
            error = str(failure)
        if world.rank == 0:
            report = {"name": name, "error": error, "seconds": round(time.monotonic() - begin, 3)}
            print("CHECK " + json.dumps(report), flush=True)
    ranks.close()


if __name__ == "__main__":
    with World.start() as the_world:
        run(the_world, sys.argv[1:])
