"""mpirun -n 2 python -m pneumo.comm.bench: collectives of Gloo, pneumo, MPI and Horovod, and memcpy as the limit."""

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from pneumo import command, process
from pneumo.comm.bench.cases import ITEM_BYTES, Case, cases
from pneumo.comm.bench.options import Options, check_places, parse
from pneumo.errors import Refused
from pneumo.world import Together, World, in_world

if TYPE_CHECKING:
    from pneumo.comm.bench.libraries import Library
    from pneumo.comm.bench.measure import Bench

PROGRESS_EVERY_S = 30.0
STUCK_S = 120.0  # in one sample of one library: far beyond any that works


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 0 done, 1 a library is wrong or failed, 2 refused."""
    options, refused = command.read(parse, argv)
    if options is None and refused is None:
        return 0
    process.keep_memory()
    process.stay_offline()
    process.limit_threads(1)
    return in_world(lambda world: _run(cast(Options, options), world), refused)


def _run(options: Options, world: World) -> int:
    """The spine: libraries, header, each operation and type, tables and files."""
    if world.size < 2:
        raise Together(Refused("The benchmark needs 2 ranks or more: mpirun -n 2 python -m pneumo.comm.bench."))
    world.run_on_first(lambda: check_places(options))
    world.bind(world.size, 1)
    world.watchdog.limit_s = STUCK_S
    from pneumo.comm.bench import memory
    from pneumo.comm.bench.about import facts
    from pneumo.comm.bench.buffers import group_memory, own_memory
    from pneumo.comm.bench.measure import Bench
    from pneumo.comm.bench.present import load

    if options.shared:
        limit = memory.shared_bytes(max(options.bytes), world.local_size)
        os.environ.setdefault("PNEUMO_COMM_BYTES", str(limit))
    present = load(options.libraries, world)
    if options.shared and "pneumo" in present.absent:
        raise Together(Refused(f"--shared needs pneumo, which is not available: {present.absent['pneumo']}."))
    names = {library.name for library in present.libraries}
    content: dict[str, Any] = {**facts(world, horovod="horovod" in names), "shared": options.shared}
    content |= {"rows": [], "skipped": []}
    content["absent"] = [{"library": k, "op": None, "dtype": None, "why": why} for k, why in present.absent.items()]
    if world.rank == 0:
        _say_header(content, f"{', '.join(options.op)} of {', '.join(options.dtype)}")
    pairs = [(op, dtype) for op in options.op for dtype in options.dtype[: 1 if op == "barrier" else None]]
    say = _progress(world.rank == 0, len(pairs) * options.seconds)
    allocate = group_memory(present.groups.get("pneumo", world.size)) if options.shared else own_memory
    bench = Bench(world, options.repeats, say, allocate)
    try:
        for op, dtype in pairs:
            wanted = cases(op, dtype, options.bytes, world.size)
            _measure(wanted, bench, present.libraries, options.seconds, content)
    except Together:
        present.groups.close()
        raise
    present.groups.close()
    world.run_on_first(lambda: _finish(content, options))
    return 0


def _measure(
    wanted: Sequence[Case], bench: "Bench", libraries: "Sequence[Library]", seconds: float, content: dict[str, Any]
) -> None:
    """Measure the cases of one operation and type, smallest first; what one leaves of its time goes to the others."""
    from pneumo.comm.bench.report import rows

    op, dtype, ranks = wanted[0].op, wanted[0].dtype, wanted[0].ranks
    tiny = Case(op, dtype, ITEM_BYTES[dtype] * ranks if wanted[0].bytes else 0, ranks)
    able, unable = bench.able(tiny, libraries)
    content["absent"] += [{"library": k, "op": op.name, "dtype": dtype, "why": why} for k, why in unable.items()]
    deadline = time.monotonic() + seconds
    for i, case in enumerate(wanted):
        buffers = bench.buffers(case)
        if isinstance(buffers, str):
            content["skipped"].append({"op": op.name, "dtype": dtype, "bytes": case.bytes, "why": buffers})
        elif able:
            share_s = max(0.0, deadline - time.monotonic()) / (len(wanted) - i)
            content["rows"] += rows(case, bench.run(case, able, buffers, share_s))


def _say_header(content: dict[str, Any], what: str) -> None:
    from pneumo.comm.bench.about import header
    from pneumo.study.cells import legend, put
    from pneumo.study.tables import make_console

    console = make_console()
    put(console, legend(header(content, what)))
    console.print()


def _finish(content: dict[str, Any], options: Options) -> None:
    """Write the files, then print the tables; on rank 0."""
    from pneumo.comm.bench.report import show
    from pneumo.study.results import write_atomic
    from pneumo.study.tables import make_console

    if options.json is not None:
        write_atomic(options.json, json.dumps(content, indent=1).encode() + b"\n")
    if options.plot is not None:
        from pneumo.comm.bench.plot import draw

        draw(content, options.plot)
    show(content, make_console(), verbose=options.verbose)


def _progress(speaks: bool, total_s: float) -> Callable[[str], None]:
    """What prints a line on the rank that speaks, at most one in PROGRESS_EVERY_S seconds, with what is left."""
    begin = last = time.monotonic()

    def say(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if speaks and now - last >= PROGRESS_EVERY_S:
            last = now
            left_s = max(0.0, begin + total_s - now)
            print(f"[{now - begin:4.0f} s] {text}; about {left_s:.0f} s left", flush=True)

    return say


if __name__ == "__main__":
    command.leave(main)
