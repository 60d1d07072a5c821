"""mpirun -n 2 python -m pneumo.bench NAME: what the README claims, measured on this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pneumo import command, places, process
from pneumo.bench.options import Options, load, parse
from pneumo.world import World, in_world

if TYPE_CHECKING:
    from pneumo.bench.findings import Findings


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns the exit code: 0 done, 1 it failed, 2 refused."""
    asked, refused = command.read(parse, argv)
    if asked is None and refused is None:
        return 0
    process.keep_memory()
    process.share_cores()
    process.stay_offline()
    process.limit_threads(1)
    return in_world(lambda world: _run(*cast(tuple[str, Options], asked), world), refused)


def _run(name: str, options: Options, world: World) -> int:
    if (json := options.json) is not None:
        world.run_on_first(lambda: places.require_file(json, "--json"))
    findings = load(name)(options, world)
    world.run_on_first(lambda: _finish(findings, json))
    return 0


def _finish(findings: "Findings", json: Path | None) -> None:
    """Write the file, then print the tables; on rank 0."""
    from pneumo.study.results import write_atomic
    from pneumo.study.tables import make_console

    if json is not None:
        write_atomic(json, findings.encode())
    findings.show(make_console())


if __name__ == "__main__":
    command.leave(main)
