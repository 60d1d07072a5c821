"""The tables of the RSNA Pneumonia Detection Challenge: who is labelled how, where the boxes are, and what is unsound.

A data folder holds `stage_2_train_images/<patientId>.dcm`, `stage_2_train_labels.csv` (a row for each box) and
`stage_2_detailed_class_info.csv` (a class for each of those rows, so patients with several boxes are repeated). A
patient whose rows cannot be trusted is set aside under one of REASONS and never guessed at.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pneumo.errors import Refused

REASONS: Final = (
    "corrupt",
    "missing_image",
    "no_label",
    "duplicate",
    "wrong_modality",
    "label_without_box",
    "box_outside",
    "empty_box",
    "not_a_number",
)
CLASSES: Final = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")

IMAGES: Final = "stage_2_train_images"
LABELS: Final = "stage_2_train_labels.csv"
DETAILS: Final = "stage_2_detailed_class_info.csv"
COORDINATES: Final = ("x", "y", "width", "height")

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Patient:
    """A labelled image: `label` 1 with a lung opacity, else 0; boxes are x, y, width, height in its pixels.

    `detailed` is one of CLASSES, None where no table tells it.
    """

    patient_id: str
    label: int
    detailed: str | None
    boxes: tuple[Box, ...]
    path: Path


@dataclass(frozen=True, slots=True)
class Quarantined:
    """What is left out and why: `file` is relative to the data folder, `reason` one of REASONS, `detail` a clause."""

    patient: str
    file: str
    reason: str
    detail: str


class _Unsound(Exception):  # noqa: N818 -- not an error: the answer of a check
    """A patient's rows cannot be used: (reason, detail)."""


def read_tables(root: Path) -> tuple[list[Patient], list[Quarantined]]:
    """Return the patients of a data folder whose rows are sound, in the label table's order, and the others.

    Looks at tables and file names only: missing_image, no_label, label_without_box, not_a_number and empty_box are
    found here, what is inside a file by `inspect`. The table of classes may be missing, or lack patients, as RSNA's own
    lacks 79 (`detailed` is None then); where it contradicts the labels or itself, that is no_label.
    Raises Refused if the folder, its images or the label table are missing, or a table cannot be read.
    """
    files = _images(root)
    rows = _grouped(root / LABELS, ("patientId", *COORDINATES, "Target"))
    if not rows:
        raise Refused(f"{root / LABELS} holds no row: give a folder with labelled patients")
    classes = _grouped(root / DETAILS, ("patientId", "class")) if (root / DETAILS).is_file() else {}
    patients, quarantine = [], []
    for patient_id, found in rows.items():
        file = files.get(patient_id)
        name = f"{IMAGES}/{file.name if file else patient_id + '.dcm'}" if patient_id else ""
        try:
            label, boxes = _label(patient_id, found)
            detailed = _detailed(classes.get(patient_id, ()), label)
            if file is None:
                raise _Unsound("missing_image", "no such file")
            patients.append(Patient(patient_id, label, detailed, boxes, file))
        except _Unsound as why:
            quarantine.append(Quarantined(patient_id, name, *why.args))
    for patient_id in sorted(files.keys() - rows.keys()):
        name = f"{IMAGES}/{_text(files[patient_id].name)}"
        quarantine.append(Quarantined(patient_id, name, "no_label", f"no row in {LABELS}"))
    return patients, quarantine


def read_mapping(path: Path) -> dict[str, str]:
    """Return {patientId: person} from RSNA's mapping file, in which one person may have many images.

    It is a JSON list with `subset_img_id` (the patientId) and `img_id` (the NIH picture `<person>_<number>.png`); a
    CSV file with the columns patientId and person is taken too. Raises Refused if it is neither.
    """
    if not path.is_file():
        raise Refused(f"there is no mapping file {path}")
    if path.suffix.lower() == ".csv":
        return {row["patientId"]: row["person"] for row in _rows(path, ("patientId", "person")) if row["patientId"]}
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        return {str(entry["subset_img_id"]): str(entry["img_id"]).split("_")[0] for entry in entries}
    except OSError as error:
        raise Refused(f"the mapping file {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Refused(f"{path} is not RSNA's mapping: a JSON list with subset_img_id and img_id was expected") from None


def refuse_if_any(quarantine: Sequence[Quarantined]) -> None:
    """Raise Refused with the counts by reason unless the quarantine is empty: what --strict asks for."""
    if quarantine:
        counts = ", ".join(f"{count} {reason}" for reason, count in count_reasons(quarantine).items())
        what = "1 entry of the data is" if len(quarantine) == 1 else f"{len(quarantine)} entries of the data are"
        raise Refused(f"{what} unsound ({counts}): `python -m pneumo.data` lists them, to be repaired or removed")


def count_reasons(quarantine: Sequence[Quarantined]) -> dict[str, int]:
    """Return how often each reason occurs, in the order of REASONS, without those that do not."""
    counts = Counter(entry.reason for entry in quarantine)
    return {reason: counts[reason] for reason in REASONS if counts[reason]}


def _images(root: Path) -> dict[str, Path]:
    """Return {patientId: file}; names are listed, never built from a table, so that no id leads out of the folder."""
    if not root.is_dir():
        raise Refused(f"there is no data folder {root}")
    folder = root / IMAGES
    if not (root / LABELS).is_file():
        raise Refused(f"{root} holds no {LABELS}: give a folder in the layout of RSNA's challenge")
    if not folder.is_dir():
        raise Refused(f"{root} holds no {IMAGES}: give a folder in the layout of RSNA's challenge")
    found = (file for file in folder.iterdir() if file.suffix.lower() == ".dcm" and not file.name.startswith("."))
    files = {_text(file.stem): file for file in sorted(found)}
    if not files:
        raise Refused(f"{folder} holds no .dcm file")
    return files


def _text(name: str) -> str:
    """Return a file's name with a question mark for each byte that is no text, so that it can be printed and stored."""
    return name.encode("utf-8", "replace").decode()


def _rows(path: Path, columns: Collection[str]) -> Iterator[dict[str, str]]:
    """Yield a CSV file's rows with these columns, stripped; BOM, CRLF and quotes are as good as none."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, restval="", skipinitialspace=True)
            names = {(name or "").strip(): name for name in table.fieldnames or ()}
            missing = [name for name in columns if name not in names]
            if missing:
                raise Refused(f"{path} lacks the column {missing[0]} (its first line must name {', '.join(columns)})")
            for row in table:
                yield {name: row[names[name]].strip() for name in columns}
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error):
        raise Refused(f"{path} is not a CSV file in UTF-8") from None


def _grouped(path: Path, columns: Collection[str]) -> dict[str, list[dict[str, str]]]:
    """Return a table's rows by patient, patients in order of their first row."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in _rows(path, columns):
        groups.setdefault(row["patientId"], []).append(row)
    return groups


def _label(patient_id: str, rows: Sequence[dict[str, str]]) -> tuple[int, tuple[Box, ...]]:
    """Return a patient's label and boxes from all of its rows, or raise _Unsound."""
    if not patient_id:
        raise _Unsound("no_label", f"rows without a patientId: {len(rows)}")
    targets = {_target(row["Target"]) for row in rows}
    if len(targets) > 1:
        raise _Unsound("no_label", "its rows contradict each other: Target 0 and 1")
    label = targets.pop()
    filled = [row for row in rows if any(row[name] for name in COORDINATES)]
    if label == 0:
        if filled:
            raise _Unsound("no_label", "Target 0, but with a box")
        return 0, ()
    if len(filled) < len(rows):
        raise _Unsound("label_without_box", "Target 1 without a box")
    return 1, tuple(dict.fromkeys(_box(row) for row in rows))  # a row that was written twice is one box


def _target(text: str) -> int:
    """Return 0 or 1 of a Target, which some tools write as 1.0."""
    if not text:
        raise _Unsound("no_label", "Target is empty")
    value = _finite(text)
    if value is None:
        raise _Unsound("not_a_number", "Target is not a number")
    if value not in (0, 1):
        raise _Unsound("no_label", "Target is neither 0 nor 1")
    return int(value)


def _box(row: dict[str, str]) -> Box:
    """Return a row's box; only its form is judged here, since the picture's size is in the image file."""
    numbers = [_finite(row[name]) for name in COORDINATES]
    for name, number in zip(COORDINATES, numbers, strict=True):
        if number is None:
            raise _Unsound("not_a_number", f"the box's {name} is not a number")
    x, y, width, height = (number or 0.0 for number in numbers)
    if width <= 0 or height <= 0:
        raise _Unsound("empty_box", f"a box of width {width:g} and height {height:g}")
    return x, y, width, height


def _detailed(rows: Sequence[dict[str, str]], label: int) -> str | None:
    """Return the one class that a patient's rows give, None without rows; raise _Unsound unless it fits the label."""
    names = {row["class"] for row in rows}
    if not names:
        return None
    if len(names) > 1:
        raise _Unsound("no_label", f"several classes in {DETAILS}")
    name = names.pop()
    if name not in CLASSES:
        raise _Unsound("no_label", f"an unknown class in {DETAILS}")
    if (name == "Lung Opacity") != bool(label):
        raise _Unsound("no_label", f"Target {label} contradicts the class {name!r}")
    return name


def _finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
