"""Opens one patient's file: its pictures at the wanted sizes, its statistics, or the reason to leave it out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from pneumo.data.dicom import RADIOGRAPHS, Picture, Undecodable, read_grey, resize
from pneumo.data.rsna import IMAGES, Patient, Quarantined


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file turned out to be; `reason` is None where it is sound, else one of `rsna.REASONS`.

    `digest` (hexadecimal, 128 bits) is of the decoded picture at its full size of `rows` x `columns` pixels; equal
    digests mean equal pictures, however they were compressed.
    """

    patient_id: str
    reason: str | None
    detail: str
    sex: str | None
    age: int | None
    view: str | None
    rows: int
    columns: int
    digest: str


def inspect(patient: Patient, sizes: Sequence[int]) -> tuple[Inspection, dict[int, Picture]]:
    """Return what a patient's file is, and its pictures: uint8 (size, size) for each size, none if it is refused.

    Finds corrupt, wrong_modality and box_outside. Never raises on a bad file.
    """
    try:
        picture, header = read_grey(patient.path, RADIOGRAPHS)
    except Undecodable as why:
        return Inspection(patient.patient_id, why.reason, why.detail, None, None, None, 0, 0, ""), {}
    rows, columns = picture.shape
    detail = _box_outside(patient, rows, columns)
    seen = Inspection(
        patient_id=patient.patient_id,
        reason="box_outside" if detail else None,
        detail=detail,
        sex=header.sex,
        age=header.age,
        view=header.view,
        rows=rows,
        columns=columns,
        digest=_digest(picture),
    )
    return seen, {} if detail else {size: resize(picture, size) for size in sizes}


def find_duplicates(inspections: Sequence[Inspection]) -> dict[str, str]:
    """Return {patient: the patient whose picture it repeats}; of equal pictures the first sound one is kept."""
    kept: dict[str, str] = {}
    return {
        one.patient_id: kept[one.digest]
        for one in inspections
        if one.reason is None and kept.setdefault(one.digest, one.patient_id) != one.patient_id
    }


def quarantine_of(patients: Sequence[Patient], inspections: Sequence[Inspection]) -> list[Quarantined]:
    """Return what is left out for what is in the files: those that `inspect` refused, and repeated pictures."""
    repeats = find_duplicates(inspections)
    found = []
    for patient, seen in zip(patients, inspections, strict=True):
        reason, detail = seen.reason, seen.detail
        if patient.patient_id in repeats:
            reason, detail = "duplicate", f"the same picture as {repeats[patient.patient_id]}, which is kept"
        if reason is not None:
            found.append(Quarantined(patient.patient_id, f"{IMAGES}/{patient.path.name}", reason, detail))
    return found


def _box_outside(patient: Patient, rows: int, columns: int) -> str:
    for x, y, width, height in patient.boxes:
        if x < 0 or y < 0 or x + width > columns or y + height > rows:
            return f"the box {x:g} {y:g} {width:g} {height:g} leaves the picture of {columns} x {rows}"
    return ""


def _digest(picture: Picture) -> str:
    rows, columns = picture.shape
    digest = hashlib.blake2b(b"%d %d " % (rows, columns), digest_size=16)
    digest.update(picture.data)
    return digest.hexdigest()
