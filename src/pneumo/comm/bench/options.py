"""The benchmark's flags, parsed once and frozen."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from pneumo.comm.bench.cases import DEFAULT_SIZES, ITEM_BYTES, OPS, parse_size
from pneumo.errors import Refused
from pneumo.flags import nearest, one_sentence, split
from pneumo.places import require_file

# All libraries in the order of the tables.
LIBRARIES = ("memcpy", "pneumo", "gloo", "horovod", "mpi", "mpi_plain", "deepspeed")
PLOTS = (".svg", ".png")


def _sizes(_type: Any, tokens: Sequence[Any]) -> tuple[int, ...]:
    return tuple(parse_size(word) for word in split(_type, tokens))


def _list(converter: Any) -> Parameter:
    return Parameter(converter=converter, n_tokens=1, accepts_keys=False, negative_iterable="", show_default=False)


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for."""

    op: Annotated[tuple[str, ...], _list(split)] = ("allreduce",)
    "Operations with commas between, or all (allreduce)."
    dtype: Annotated[tuple[str, ...], _list(split)] = ("float32",)
    "Element types by their torch names, with commas between (float32)."
    bytes: Annotated[tuple[int, ...], _list(_sizes)] = DEFAULT_SIZES
    "Bytes of a rank's tensor, as in 4,64K,16M, in powers of 1024 (4 to 256M)."
    libraries: Annotated[tuple[str, ...], _list(split)] = LIBRARIES
    "What to compare (all that are installed)."
    shared: Annotated[bool, Parameter(negative="")] = False
    "Lay all tensors into memory that pneumo allocates for its group, as DDP and FSDP2 can have it."
    repeats: int = 25
    "Samples of each library at each size, at most."
    seconds: float = 120.0
    "Time for each operation and type; samples become fewer to keep to it, but not fewer than 3."
    json: Path | None = None
    "Write the medians and intervals to this file."
    plot: Path | None = None
    "Draw them to this file, .svg or .png."
    verbose: Annotated[bool, Parameter(negative="")] = False
    "Print every interval too."


def parse(argv: Sequence[str]) -> Options | None:
    """Read the flags; None where --help was asked for, which is printed. Raises Refused with one sentence."""
    found: list[Options] = []
    app = App(
        name="mpirun -n 2 python -m pneumo.comm.bench",
        help="Time collectives of several libraries on the same buffers, in turns, with memcpy as the limit.",
        version_flags=[],
    )

    @app.default
    def command(*, options: Annotated[Options, Parameter(name="*")] = Options()) -> None:
        found.append(options)

    with one_sentence([*(f"--{f.name}" for f in fields(Options)), "--help"]):
        function, bound, _ = app.parse_args(list(argv), print_error=False, exit_on_error=False)
        function(*bound.args, **bound.kwargs)
    return _checked(found[0]) if found else None


def _checked(options: Options) -> Options:
    """Refuse what can be refused without knowing the world, and put `all` in full."""
    ops = tuple(OPS) if "all" in options.op else options.op
    for flag, names, known in (
        ("--op", ops, [*OPS, "all"]),
        ("--dtype", options.dtype, ITEM_BYTES),
        ("--libraries", options.libraries, LIBRARIES),
    ):
        for name in names:
            if name not in known:
                raise Refused(f"{flag} {name}: unknown; {nearest(name, known)}.")
        if not names:
            raise Refused(f"{flag} needs at least one name: {nearest('', known)}.")
    if options.shared and "pneumo" not in options.libraries:
        raise Refused("--shared needs pneumo among the --libraries: the memory is its.")
    if not options.bytes:
        raise Refused("--bytes needs at least one size, as in 4,64K,16M.")
    if options.repeats < 3:
        raise Refused(f"--repeats {options.repeats}: fewer than 3 samples say nothing of how they scatter.")
    if not 0 < options.seconds < float("inf"):
        raise Refused(f"--seconds {options.seconds:g}: the time for an operation is above 0.")
    changes = {"op": ops, "libraries": tuple(name for name in LIBRARIES if name in options.libraries)}
    return Options(**{**{f.name: getattr(options, f.name) for f in fields(Options)}, **changes})


def check_places(options: Options) -> None:
    """Refuse a file that cannot be written in the end; on the rank that writes."""
    for flag, place in (("--json", options.json), ("--plot", options.plot)):
        if place is not None:
            require_file(place, flag)
    if options.plot is None:
        return
    if options.plot.suffix.lower() not in PLOTS:
        raise Refused(f"--plot {options.plot}: a plot is a file that ends in .svg or .png.")
    if importlib.util.find_spec("matplotlib") is None:
        raise Refused("--plot needs matplotlib, which is not installed; leave --plot out, or pip install matplotlib.")
