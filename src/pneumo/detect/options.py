"""The command line of python -m pneumo.detect."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pneumo.errors import Refused
from pneumo.flags import one_sentence


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for beside the answers, and how pictures are shown to the model."""

    json: Annotated[Path | None, Parameter(help="Write the answers to this JSON file.")] = None
    pictures: Annotated[
        Path | None, Parameter(help="Write a PNG of each file, with its boxes and scores drawn, to this folder.")
    ] = None
    submission: Annotated[
        Path | None, Parameter(help="Write the boxes in the RSNA challenge's format to this CSV file.")
    ] = None
    threshold: Annotated[
        float | None,
        Parameter(
            help="Boxes of a lower score are left out everywhere. By default what the calibration part gave, where "
            "WEIGHTS lie in a result, else 0.5."
        ),
    ] = None
    size: Annotated[
        int | None, Parameter(help="Edge of the model's pictures in pixels; by default what it was trained with.")
    ] = None
    sheet: Annotated[
        Path | None,
        Parameter(
            help="Of a result's folder in place of WEIGHTS: write validation images with their answers, and the curves "
            "of all runs, to this PNG file, or where none is named to RESULT/sheet.png."
        ),
    ] = None
    run: Annotated[
        int | None,
        Parameter(help="The run whose answers the sheet shows, by its number in run.json; by default the serial one."),
    ] = None


# What --sheet is where it names no file.
IN_RESULT = Path()


@dataclass(frozen=True, slots=True)
class Request:
    """Weights, the files and folders to answer, and the options; for a sheet a result's folder, and no files."""

    weights: Path
    paths: tuple[Path, ...]
    options: Options


def parse(argv: Sequence[str]) -> Request | None:
    """Read the command line; None where --help was asked for, which is printed. Raises Refused."""
    found: list[Request] = []
    app = App(
        name="python -m pneumo.detect",
        usage="Usage: python -m pneumo.detect WEIGHTS FILES... [OPTIONS]\n"
        "       python -m pneumo.detect RESULT --sheet [FILE.png] [--run N]",
        help="Say of radiographs how probable pneumonia is, and where: DICOM, PNG or JPEG files, and folders of them. "
        "WEIGHTS is a model of a result's checkpoints (.safetensors), or a YOLOv8n checkpoint of Ultralytics (.pt). "
        "Exit codes: 0 done, 1 no file could be answered, 2 refused.",
        version_flags=[],
    )

    @app.default
    def command(
        *paths: Annotated[Path, Parameter(help="The weights, then files and folders.")],
        options: Annotated[Options, Parameter(name="*")] = Options(),
    ) -> None:
        if options.sheet is not None and len(paths) != 1:
            what = "no files beside it" if paths else "none is named"
            raise Refused(f"--sheet is of one result, and {what}: python -m pneumo.detect RESULT --sheet [FILE.png]")
        if options.sheet is None and len(paths) < 2:
            raise Refused("Name the weights and at least one file: python -m pneumo.detect WEIGHTS FILES...")
        found.append(Request(paths[0], paths[1:], options))

    with one_sentence([*(f"--{one.name}" for one in fields(Options)), "--help"]):
        function, bound, _ = app.parse_args(_with_place(argv), print_error=False, exit_on_error=False)
        function(*bound.args, **bound.kwargs)
    return _checked(found[0]) if found else None


def _with_place(argv: Sequence[str]) -> list[str]:
    """The command line with a value for --sheet in any case: the PNG file that follows it, else nothing.

    Anything else after it is no value, so that no file that is to be answered is ever written over.
    """
    tokens = list(argv)
    if "--sheet" in tokens:
        at = tokens.index("--sheet")
        named = [token for token in tokens[at + 1 : at + 2] if token.lower().endswith(".png")]
        tokens[at : at + 1 + len(named)] = [f"--sheet={named[0] if named else IN_RESULT}"]
    return tokens


def _checked(request: Request) -> Request:
    """Refuse what can be refused without looking at any file."""
    threshold, options = request.options.threshold, request.options
    if options.sheet is None and options.run is not None:
        raise Refused("--run chooses among the runs of a result for --sheet; name that too, or leave out --run.")
    if options.sheet is not None:
        others = [one.name for one in fields(options) if one.name not in ("sheet", "run")]
        if given := [f"--{name}" for name in others if getattr(options, name) is not None]:
            raise Refused(f"--sheet shows what a result has answered already; leave out {', '.join(given)}.")
        if options.sheet != IN_RESULT and options.sheet.suffix.lower() != ".png":
            raise Refused(f"--sheet {options.sheet}: a sheet is a PNG file; name one that ends in .png.")
    if threshold is not None and not 0 <= threshold <= 1:
        raise Refused(f"--threshold {threshold:g}: a score is from 0 to 1.")
    return request
