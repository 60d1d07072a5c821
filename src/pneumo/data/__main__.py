"""python -m pneumo.data: what is in a data folder, what is unsound in it, and what the metadata give away."""

import json as json_format
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from pneumo.errors import PneumoError, Refused

USAGE = "Usage: python -m pneumo.data DIR [OPTIONS]\n       python -m pneumo.data FILES... --png OUT [OPTIONS]"

app = App(name="python -m pneumo.data", usage=USAGE, version_flags=[], help_format="markdown")


@app.default
def command(
    *paths: Annotated[Path, Parameter(help="A data folder in RSNA's layout, or DICOM files (with --png).")],
    json: Annotated[Path | None, Parameter(help="Write what was found to this JSON file.")] = None,
    strict: Annotated[bool, Parameter(help="Refuse (exit 2) if anything is unsound.", negative="")] = False,
    mapping: Annotated[Path | None, Parameter(help="RSNA's mapping file: which images show the same person.")] = None,
    png: Annotated[Path | None, Parameter(help="Write what models see of each file to this folder.")] = None,
    size: Annotated[int, Parameter(help="Side of those pictures, in pixels.")] = 128,
    threads: Annotated[int | None, Parameter(help="Threads that read files; by default one a core.")] = None,
) -> int:
    """Check a data folder: images by class, what would be quarantined and why, and what the metadata give away.

    With files instead of a folder, --png OUT writes what the models would see of each. Exit codes: 0 done, 1 some
    files gave no picture (the others were written), 2 the arguments or the data were refused.
    """
    if not paths:
        raise Refused("no data folder was given: python -m pneumo.data DIR (--help shows more)")
    if threads is not None and threads < 1:
        raise Refused(f"--threads is {threads}: it must be at least 1")
    if json is not None and not json.absolute().parent.is_dir():
        raise Refused(f"--json {json} cannot be written: there is no folder {json.parent}")
    if png is not None:
        if strict or mapping:
            raise Refused(
                f"--{'strict' if strict else 'mapping'} is for a data folder, --png for files: use one of them"
            )
        return write_pictures(paths, png, size, json)
    if len(paths) > 1 or paths[0].is_file():
        raise Refused(f"{paths[0 if paths[0].is_file() else 1]} is not the one data folder: add --png OUT for files")
    check_folder(paths[0], json, strict, mapping, threads or len(os.sched_getaffinity(0)))
    return 0


def check_folder(root: Path, json: Path | None, strict: bool, mapping: Path | None, threads: int) -> None:
    """Print a data folder's report and write it as JSON; Refused where it is unreadable, or unsound and `strict`."""
    from pneumo.data.check import check, show
    from pneumo.data.rsna import refuse_if_any

    found = check(root, mapping, threads)
    show(found)
    if json:
        write_json(json, found.as_json())
    if strict:
        refuse_if_any(found.quarantine)


def write_pictures(paths: Sequence[Path], folder: Path, size: int, json: Path | None) -> int:
    """Write each file as (size, size) grey PNG named after it; return 1 if one of them gave no picture, else 0."""
    if not 1 <= size <= 8192:
        raise Refused(f"--size is {size}: it must be from 1 to 8192")
    names = [path.stem for path in paths]
    for i, path in enumerate(paths):
        if not path.is_file():
            raise Refused(f"{path} is {'a folder: --png takes files' if path.is_dir() else 'no file'}")
        if names.index(path.stem) < i:
            raise Refused(
                f"{paths[names.index(path.stem)]} and {path} would both become {path.stem}.png: give one of them"
            )
    from pneumo.data.dicom import RADIOGRAPHS, Undecodable, quiet_decoders, read_grey, resize
    from pneumo.data.opencv import cv2

    outcomes = []
    with _writing(folder), quiet_decoders():
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            reason, detail, target = None, "", folder / f"{path.stem}.png"
            try:
                encoded = cv2.imencode(".png", resize(read_grey(path, RADIOGRAPHS)[0], size))[1]
                target.write_bytes(encoded.tobytes())
            except Undecodable as why:
                reason, detail = why.reason, why.detail
                print(f"{path.name}: {reason} ({detail})")
            outcomes.append(
                {"file": path.name, "png": None if reason else target.name, "reason": reason, "detail": detail}
            )
    failed = sum(outcome["reason"] is not None for outcome in outcomes)
    print(f"{len(paths) - failed} of {len(paths)} written to {folder} as {size} x {size} PNG")
    if json:
        write_json(json, {"size": size, "files": outcomes})
    return 1 if failed else 0


def write_json(path: Path, what: dict[str, Any]) -> None:
    """Write a JSON file; Refused where that is impossible."""
    with _writing(path):
        path.write_text(json_format.dumps(what, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing to `path` into one sentence."""
    try:
        yield
    except OSError as error:
        raise Refused(f"{path} cannot be written: {(error.strerror or 'unknown reason').lower()}") from None


def main() -> int:
    """Run the command line; return its exit code, having said in one sentence what went wrong."""
    try:
        return int(app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value") or 0)
    except CycloptsError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return Refused.exit_code
    except PneumoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
