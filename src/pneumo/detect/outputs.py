"""What becomes of the answers: a table, a JSON file, pictures, and the challenge's submission file."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.text import Text

from pneumo.data.opencv import cv2
from pneumo.detect.answer import Box, Row
from pneumo.detect.files import Picture
from pneumo.detect.labels import label_places
from pneumo.errors import Refused
from pneumo.study.cells import NOTHING, add_columns, new_table, number, put
from pneumo.study.results import write_atomic
from pneumo.study.tables import make_console

COLOUR: Final = (0, 200, 255)  # amber, in the order blue, green, red: nothing in a radiograph has a colour
_SMALL_FONT = 0.35


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as {"files": [{"file", "probability", "boxes", "error"}]}."""
    write_atomic(path, (json.dumps({"files": [asdict(row) for row in rows]}, indent=1) + "\n").encode())


def write_submission(rows: Sequence[Row], path: Path) -> tuple[int, int]:
    """Write the RSNA challenge's format: a line a patient, with confidence x y width height of each box.

    Returns how many patients have no line, and how many there are.

    Files that could not be answered have no line: an empty one would say that they show nothing. Those of the others
    have to differ in their names without suffix, which are the patients'.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("patientId", "PredictionString"))
    for row in rows:
        if row.error is None:
            writer.writerow((Path(row.file).stem, " ".join(map(_predicted, row.boxes))))
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))
    patients = {Path(row.file).stem for row in rows}
    return len(patients - {Path(row.file).stem for row in rows if row.error is None}), len(patients)


def with_distinct_patients(rows: Sequence[Row]) -> list[Row]:
    """The rows, with an error in place of the answer to a file whose patient an earlier one has answered already."""
    seen: dict[str, Row] = {}
    distinct = []
    for row in rows:
        path = Path(row.file)
        first = row if row.error is not None else seen.setdefault(path.stem, row)
        taken = f"{path.name}: the submission has a line for this patient from an earlier file."
        distinct.append(row if row is first else Row(row.file, error=taken))
    return distinct


def _predicted(box: Box) -> str:
    return f"{box.score:.4f} {box.x:.1f} {box.y:.1f} {box.width:.1f} {box.height:.1f}"


def show(rows: Sequence[Row], threshold: float | None) -> None:
    """Print the table, and how many files were answered; `threshold` is None where the model finds no boxes."""
    console = make_console()
    table = new_table("Answers")
    add_columns(table, "file<", "probability", "boxes: x y width height (score)<")
    for row in rows:
        boxes = "; ".join(_shown_box(box) for box in row.boxes) or NOTHING
        table.add_row(Text(_shown(row.file)), number(row.probability, 3), Text(_shown(row.error or boxes)))
    put(console, table)
    answered = sum(row.error is None for row in rows)
    kept = "" if threshold is None else f"; boxes with a score of at least {threshold:.3f}"
    console.print(Text(f"{answered} of {len(rows)} files answered{kept}"), soft_wrap=True)


def _shown_box(box: Box) -> str:
    return f"{box.x:.0f} {box.y:.0f} {box.width:.0f} {box.height:.0f} ({box.score:.2f})"


def _shown(text: str) -> str:
    """A name as any terminal can print it, without what would steer one."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


@dataclass(frozen=True, slots=True)
class Pictures:
    """Writes a PNG for each of some files, `paths` says where."""

    paths: Mapping[Path, Path]

    @classmethod
    def of(cls, files: Sequence[Path], folder: Path) -> "Pictures":
        """Into a folder, named after the files without suffix; where two would have one name, all keep more of theirs.

        That is the suffix, and the folders below the one that has all files. Raises Refused where a file is named
        twice, or a picture would be written over one of the files that are answered.
        """
        whole = [Path(os.path.abspath(file)) for file in files]
        if twice := [file for file, times in Counter(whole).items() if times > 1]:
            raise Refused(f"{twice[0]} is named twice, and would have the same name in --pictures; name it once.")
        names = [file.stem for file in whole]
        if len(set(names)) < len(names):
            common = os.path.commonpath([file.parent for file in whole])
            names = [str(file.relative_to(common)) for file in whole]
        paths = {file: folder / f"{name}.png" for file, name in zip(files, names, strict=True)}
        inputs = {file.resolve() for file in files}
        for path in paths.values():
            if path.resolve() in inputs:
                raise Refused(f"--pictures would write over {path}; choose another folder.")
        return cls(paths)

    def __call__(self, file: Path, picture: Picture, row: Row) -> None:
        """Write the picture with the boxes and scores drawn; raises PneumoError where that is impossible."""
        encoded = cv2.imencode(".png", draw(picture, row))[1]
        write_atomic(self.paths[file], encoded.tobytes())


def draw(picture: Picture, row: Row) -> Picture:
    """Return the picture, uint8 (rows, columns), in colour: with its boxes and scores, headed by the probability."""
    shown = np.asarray(cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR), np.uint8)
    rows, columns = picture.shape
    side = max(rows, columns)
    thick, font = max(1, side // 300), max(_SMALL_FONT, side / 1000)
    for box in row.boxes:
        x, y = round(box.x), round(box.y)
        right, bottom = round(box.x + box.width) - 1, round(box.y + box.height) - 1
        cv2.rectangle(shown, (x, y), (max(x, right), max(y, bottom)), COLOUR, thick)
    width, height = _label_size("0.000", font, thick)
    _write(shown, f"{row.probability or 0.0:.3f}", (0, height), font, thick)
    boxes = [(box.x, box.y, box.width, box.height) for box in row.boxes]
    for i, left, below in label_places(boxes, (width, height), (columns, rows), [(0, height)]):
        _write(shown, f"{row.boxes[i].score:.2f}", (round(left), round(below)), font, thick)
    return shown


def _label_size(text: str, font: float, thick: int) -> tuple[int, int]:
    """Width and height in pixels of a text with its background, which is wider by a rim of 2 lines."""
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, font, thick)
    return width + 4 * thick, height + 4 * thick


def _write(picture: Picture, text: str, corner: tuple[int, int], font: float, thick: int) -> None:
    """Write upon black, so that it is read whatever is below; `corner` is the lower left one."""
    (left, below), (width, height) = corner, _label_size(text, font, thick)
    picture[max(0, below - height) : below, left : left + width] = 0
    start = (left + 2 * thick, below - 2 * thick)
    cv2.putText(picture, text, start, cv2.FONT_HERSHEY_SIMPLEX, font, COLOUR, thick, cv2.LINE_AA)
