"""The command line: which benchmark, and its settings; parsed once, frozen, readable without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from pneumo.errors import Refused
from pneumo.flags import nearest, one_sentence

if TYPE_CHECKING:
    from collections.abc import Callable

    from pneumo.bench.findings import Findings
    from pneumo.world import World


@dataclass(frozen=True, slots=True)
class Options:
    """What every benchmark can be told."""

    seconds: float = 300.0
    "About how long to measure."
    size: int = 0
    "Edge of the square pictures, in pixels; 0 is what the benchmark usually takes."
    global_batch: int = 0
    "Images a step over all ranks; 0 is what the benchmark usually takes."
    json: Path | None = None
    "Write the figures to this file."


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a benchmark is implemented, the claim that it measures, and what it usually takes.

    The edge of its pictures has to be a multiple of `multiple`.
    """

    place: str
    claim: str
    size: int
    multiple: int
    global_batch: int


BENCHMARKS = {
    "timing": Entry(
        "pneumo.bench.timing:run",
        "Timing costs nothing: a record, a stamp, a step with it and without.",
        *(128, 4, 32),
    ),
    "yolo": Entry(
        "pneumo.bench.yolo:run",
        "The detector trains faster than by Ultralytics' own trainer, and on all ranks faster than on one.",
        *(160, 32, 16),  # the batch is Ultralytics' own default
    ),
}


def load(name: str) -> "Callable[[Options, World], Findings]":
    """Import a benchmark of the table; this imports torch."""
    module, attribute = BENCHMARKS[name].place.split(":")
    return getattr(import_module(module), attribute)  # type: ignore[no-any-return]


def parse(argv: Sequence[str]) -> tuple[str, Options] | None:
    """Read a benchmark's name and flags; None where --help was asked for, which is printed. Raises Refused."""
    found: list[tuple[str, Options]] = []
    app = App(
        name="mpirun -n 2 python -m pneumo.bench",
        usage="Usage: mpirun -n 2 python -m pneumo.bench BENCHMARK [OPTIONS]",
        help="\n\n".join(f"{name}: {entry.claim}" for name, entry in BENCHMARKS.items()),
        version_flags=[],
    )

    @app.default
    def command(
        *benchmark: Annotated[str, Parameter(help=f"What to measure: {', '.join(BENCHMARKS)}.")],
        options: Annotated[Options, Parameter(name="*")] = Options(),
    ) -> None:
        found.append((_only(benchmark), options))

    flags = [f"--{one.name.replace('_', '-')}" for one in fields(Options)]
    with one_sentence([*flags, "--help"]):
        function, bound, _ = app.parse_args(list(argv), print_error=False, exit_on_error=False)
        function(*bound.args, **bound.kwargs)
    return (found[0][0], _checked(*found[0])) if found else None


def _only(names: Sequence[Any]) -> str:
    """The one benchmark that is named."""
    for name in names:
        if name not in BENCHMARKS:
            raise Refused(f"Unknown benchmark {name}: {nearest(name, BENCHMARKS)}.")
    if len(names) != 1:
        raise Refused(f"Name one benchmark, as in python -m pneumo.bench timing {nearest('', BENCHMARKS)}.")
    return str(names[0])


def _checked(name: str, options: Options) -> Options:
    """Refuse what can be refused without knowing the world; what is not given is the usual."""
    entry = BENCHMARKS[name]
    size, batch = options.size or entry.size, options.global_batch or entry.global_batch
    if not 0 < options.seconds < math.inf:
        raise Refused(f"--seconds {options.seconds:g}: the time to measure is above 0.")
    if size % entry.multiple or not 16 <= size <= 1024:
        raise Refused(f"--size {size}: pictures have an edge of 16 to 1024 pixels, a multiple of {entry.multiple}.")
    if batch < 1:
        raise Refused(f"--global-batch {batch}: a step has at least 1 image.")
    return replace(options, size=size, global_batch=batch)
