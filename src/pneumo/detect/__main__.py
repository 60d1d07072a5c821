"""python -m pneumo.detect WEIGHTS FILES...: a trained model on DICOM, PNG or JPEG files, alone or under mpirun.

python -m pneumo.detect RESULT --sheet: what the models of a result have answered, on one sheet.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pneumo import collective, command, machine, places, process
from pneumo.detect.options import IN_RESULT, Request, parse
from pneumo.errors import PneumoError, Refused
from pneumo.world import Together, World, in_world, launched

if TYPE_CHECKING:
    from pneumo.detect.answer import Row
    from pneumo.detect.model import About


def main(argv: Sequence[str] | None = None) -> int:
    """Answer files; returns the exit code: 0 done, 1 failed or no file could be answered, 2 refused."""
    request, refused = command.read(parse, argv)
    if request is None and refused is None:
        return 0
    process.keep_memory()
    process.stay_offline()
    process.limit_threads(1)  # batches go side by side; and more threads within one would change the last digits
    if launched() is None:
        return _alone(request, refused)
    return in_world(lambda world: _together(cast(Request, request), world), refused)


def _alone(request: Request | None, refused: Refused | None) -> int:
    """Answer without MPI, which need not be there."""
    try:
        if refused is not None:
            raise refused
        asked = cast(Request, request)
        if asked.options.sheet is not None:
            return _write_sheet(asked)
        files, known, threshold = _prepare(asked)
        return _finish(asked, known, threshold, _answer(asked, files, known, threshold, 0, 1, machine.usable_cores()))
    except PneumoError as error:
        print(f"pneumo: {error}", file=sys.stderr)
        return error.exit_code


def _together(request: Request, world: World) -> int:
    """Share the batches among the ranks; the first one puts the rows in the files' order again.

    A sheet is the first one's alone.
    """
    if request.options.sheet is not None:
        done: int = world.run_on_first(lambda: _write_sheet(request))
        return done
    files, known, threshold = world.run_on_first(lambda: _prepare(request))
    threads = max(1, len(world.cores) // world.local_size)
    world.bind(world.size, threads)
    try:
        found = collective.gather(
            world.comm, lambda: _answer(request, files, known, threshold, world.rank, world.size, threads)
        )
    except PneumoError as error:
        raise Together(error) from None
    code: int = world.run_on_first(lambda: _finish(request, known, threshold, _in_order(found, files)))
    return code


def _write_sheet(request: Request) -> int:
    """Write a result's sheet and print where it is; what it lacks is said beside it."""
    from pneumo.detect.sheet.write import write

    asked = request.options.sheet
    path, notes = write(request.weights, None if asked == IN_RESULT else asked, request.options.run)
    print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    print(path)
    return 0


def _prepare(request: Request) -> "tuple[list[Path], About, float]":
    """Find the files and say what the weights are; what can be refused without reading either is refused here."""
    from pneumo.detect import files, model
    from pneumo.models import MODELS

    options = request.options
    if not request.weights.is_file():
        what = (
            "is a folder"
            if request.weights.is_dir()
            else "is no file"
            if request.weights.exists()
            else "does not exist"
        )
        raise Refused(f"{request.weights} {what}; name the weights of a trained model, then the files.")
    known = model.about(request.weights, options.size)
    if options.submission and MODELS[known.model].answers != "boxes":
        raise Refused(f"--submission is for boxes, and {known.model} finds none; name a detector's weights.")
    found = files.find(request.paths)
    for flag, path in (("--json", options.json), ("--submission", options.submission)):
        if path is not None:
            places.require_file(path, flag)
    if options.pictures is not None:
        from pneumo.detect.outputs import Pictures

        drawn = Pictures.of(found, options.pictures).paths.values()
        places.require_folder(options.pictures, "--pictures", len(found) * (1 << 16))
        for folder in {path.parent for path in drawn}:
            places.require_folder(folder, "--pictures", 0)
    threshold = model.threshold(request.weights, known) if options.threshold is None else options.threshold
    return found, known, threshold


def _answer(
    request: Request, files: list[Path], known: "About", threshold: float, rank: int, ranks: int, threads: int
) -> "list[Row]":
    """Answer every batch whose turn is this rank's; its rows, in the files' order."""
    from pneumo.data.dicom import quiet_decoders
    from pneumo.detect import answer, model, outputs

    draw = outputs.Pictures.of(files, request.options.pictures) if request.options.pictures else None
    work = answer.Work(model.load(request.weights, known), threshold, draw)
    todo = answer.batches(files)[rank::ranks]
    rows: list[Row] = []
    say = _progress(rank, sum(map(len, todo)))
    with quiet_decoders():
        for found in answer.answer_all(work, todo, min(threads, max(1, len(todo)))):
            rows += found
            say(len(rows))
    return rows


def _progress(rank: int, total: int) -> Callable[[int], None]:
    """What says, on the first rank, how far it is with its own files."""
    from pneumo.data.source import Progress

    report = (lambda text: print(text, file=sys.stderr, flush=True)) if rank == 0 else None
    return Progress("answered", total, report).show


def _in_order(found: "Sequence[list[Row]]", files: list[Path]) -> "list[Row]":
    """From each rank's rows to those of all files: batches were dealt out in turn."""
    from pneumo.detect.answer import batches

    rows, ranks = [iter(each) for each in found], len(found)
    return [next(rows[turn % ranks]) for turn, batch in enumerate(batches(files)) for _ in batch]


def _finish(request: Request, known: "About", threshold: float, rows: "list[Row]") -> int:
    """Write the files that were asked for and print the table; 0 where at least one file was answered."""
    from pneumo.detect import outputs
    from pneumo.models import MODELS

    if request.options.submission is not None:
        rows = outputs.with_distinct_patients(rows)
        lacking, patients = outputs.write_submission(rows, request.options.submission)
        if lacking:
            text = f"no line for {lacking} of {patients} patients, and the challenge wants one for each"
            print(f"pneumo: --submission {request.options.submission}: {text}.", file=sys.stderr)
    if request.options.json is not None:
        outputs.write_json(rows, request.options.json)
    if known.assumed:
        silent = f"{request.weights} does not say with which size it was trained"
        print(f"pneumo: {silent}; pictures of {known.size} pixels are assumed (--size).", file=sys.stderr)
    outputs.show(rows, threshold if MODELS[known.model].answers == "boxes" else None)
    return 0 if any(row.error is None for row in rows) else 1


if __name__ == "__main__":
    command.leave(main)
