"""RSNA's tables as they are, and in every way in which they can be wrong."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumo.data.rsna import (
    CLASSES,
    DETAILS,
    IMAGES,
    LABELS,
    REASONS,
    Quarantined,
    count_reasons,
    read_mapping,
    read_tables,
    refuse_if_any,
)
from pneumo.errors import Refused

NORMAL, OTHER, OPACITY = CLASSES


def make(root: Path, labels: str, details: str | None = None, images: str = "abc") -> Path:
    """Write a folder with these rows (without the tables' first lines) and an empty file for each letter."""
    (root / IMAGES).mkdir(parents=True)
    for name in images:
        (root / IMAGES / f"{name}.dcm").touch()
    (root / LABELS).write_text("patientId,x,y,width,height,Target\n" + labels)
    if details is not None:
        (root / DETAILS).write_text("patientId,class\n" + details)
    return root


def reasons(root: Path) -> dict[str, str]:
    return {entry.patient: entry.reason for entry in read_tables(root)[1]}


def test_boxes_are_gathered_and_repeated_classes_are_one(tmp_path: Path) -> None:
    labels = "b,251.0,187.0,204.0,366.0,1\nb,589.0,203.0,241.0,418.0,1\na,,,,,0\nc,,,,,0\n"
    details = f"b,{OPACITY}\nb,{OPACITY}\na,{OTHER}\nc,{NORMAL}\n"
    patients, quarantine = read_tables(make(tmp_path / "d", labels, details))
    assert [patient.patient_id for patient in patients] == ["b", "a", "c"]
    assert [patient.label for patient in patients] == [1, 0, 0]
    assert [patient.detailed for patient in patients] == [OPACITY, OTHER, NORMAL]
    assert patients[0].boxes == ((251, 187, 204, 366), (589, 203, 241, 418))
    assert patients[0].path == tmp_path / "d" / IMAGES / "b.dcm"
    assert (patients[1].boxes, quarantine) == ((), [])


def test_rows_of_a_patient_need_not_be_adjacent_and_a_row_written_twice_is_one_box(tmp_path: Path) -> None:
    labels = "a,1,2,3,4,1\nb,,,,,0\na,5,6,7,8,1\na,1,2,3,4,1\nc,,,,,0.0\n"
    patients, quarantine = read_tables(make(tmp_path / "d", labels))
    assert patients[0].boxes == ((1, 2, 3, 4), (5, 6, 7, 8))
    assert [patient.detailed for patient in patients] == [None] * 3
    assert not quarantine


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a,,,,,1", "label_without_box"),
        ("a,1,2,3,4,1\na,,,,,1", "label_without_box"),
        ("a,nan,2,3,4,1", "not_a_number"),
        ("a,,2,3,4,1", "not_a_number"),
        ("a,1,2,inf,4,1", "not_a_number"),
        ("a,1,2,3,four,1", "not_a_number"),
        ("a,,,,,yes", "not_a_number"),
        ("a,,,,,nan", "not_a_number"),
        ("a,1,2,0,4,1", "empty_box"),
        ("a,1,2,3,-4,1", "empty_box"),
        ("a,,,,,", "no_label"),
        ("a", "no_label"),
        ("a,,,,,2", "no_label"),
        ("a,,,,,0.5", "no_label"),
        ("a,1,2,3,4,1\na,,,,,0", "no_label"),
        ("a,1,2,3,4,0", "no_label"),
    ],
)
def test_rows_that_cannot_be_trusted(row: str, reason: str, tmp_path: Path) -> None:
    patients, quarantine = read_tables(make(tmp_path / "d", f"b,,,,,0\n{row}\nc,,,,,0\n"))
    assert [patient.patient_id for patient in patients] == ["b", "c"]
    assert [(entry.patient, entry.file, entry.reason) for entry in quarantine] == [("a", f"{IMAGES}/a.dcm", reason)]
    assert reason in REASONS
    assert quarantine[0].detail


def test_missing_images_and_images_without_a_row(tmp_path: Path) -> None:
    root = make(tmp_path / "d", "b,,,,,0\nz,,,,,0\n,,,,,0\n../secret,,,,,0\n")
    (tmp_path / "d" / "secret.dcm").touch()
    for name in ("._b.dcm", "notes.txt"):
        (root / IMAGES / name).touch()
    assert reasons(root) == {
        "z": "missing_image",
        "../secret": "missing_image",
        "": "no_label",
        "a": "no_label",
        "c": "no_label",
    }


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        (f"a,{OPACITY}\na,{OPACITY}\nb,{OTHER}\nc,{NORMAL}\n", {}),
        (f"a,{OPACITY}\na,{NORMAL}\nb,{OTHER}\nc,{NORMAL}\n", {"a": "no_label"}),
        (f"a,{NORMAL}\nb,{OPACITY}\nc,{NORMAL}\n", {"a": "no_label", "b": "no_label"}),
        (f"a,{OPACITY}\nb,Measles\nc,{NORMAL}\n", {"b": "no_label"}),
        (f"a,{OPACITY}\nb,\nc,{NORMAL}\n", {"b": "no_label"}),
    ],
)
def test_classes_must_fit_the_labels(details: str, expected: dict[str, str], tmp_path: Path) -> None:
    assert reasons(make(tmp_path / "d", "a,1,2,3,4,1\nb,,,,,0\nc,,,,,0\n", details)) == expected


def test_a_patient_that_the_class_table_lacks_is_sound(tmp_path: Path) -> None:
    """RSNA's own table lacks 79 patients: a genuine copy of the data has to pass --strict."""
    root = make(tmp_path / "d", "a,1,2,3,4,1\nb,,,,,0\nc,,,,,0\n", f"a,{OPACITY}\nb,{OTHER}\n")
    patients, quarantine = read_tables(root)
    refuse_if_any(quarantine)
    assert [(p.patient_id, p.label, p.detailed) for p in patients] == [
        ("a", 1, OPACITY),
        ("b", 0, OTHER),
        ("c", 0, None),
    ]


def test_bom_crlf_quotes_and_other_columns_make_no_difference(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", "a,1.0,2.0,3.0,4.0,1\nb,,,,,0\nc,,,,,0\n", f"a,{OPACITY}\nb,{OTHER}\nc,{NORMAL}\n")
    odd = make(tmp_path / "odd", "", "")
    rows = '\ufeff"Target", "patientId" ,extra,x,y,width,height\r\n1,"a",,"1.0",2.0,3.0,4.0\r\n'
    rows += '0,b,"x,y",,,,\r\n\r\n0,c,,,,,\r\n'
    (odd / LABELS).write_bytes(rows.encode())
    (odd / DETAILS).write_bytes(f'\ufeffpatientId,class\r\na,"{OPACITY}"\r\nb,"{OTHER}" \r\nc,{NORMAL}'.encode())
    found, expected = read_tables(odd), read_tables(plain)
    assert not found[1]
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert (ours.patient_id, ours.label, ours.detailed, ours.boxes) == (
            theirs.patient_id,
            theirs.label,
            theirs.detailed,
            theirs.boxes,
        )


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    def words(root: Path) -> str:
        with pytest.raises(Refused) as refused:
            read_tables(root)
        assert refused.value.exit_code == 2
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert str(tmp_path / "nowhere") in words(tmp_path / "nowhere")
    root = make(tmp_path / "d", "a,,,,,0\n")
    (root / LABELS).rename(root / "labels")
    assert LABELS in words(root)
    (root / LABELS).write_text("patientId,x,y,width,Target\na,,,,0\n")
    assert "height" in words(root)
    (root / LABELS).write_text("")
    assert "patientId" in words(root)
    (root / LABELS).write_text("patientId,x,y,width,height,Target\n")
    assert "no row" in words(root)
    (root / LABELS).write_bytes("patientId,x,y,width,height,Target\na,,,,,0\n".encode("utf-16"))
    assert "UTF-8" in words(root)
    (root / LABELS).write_text("patientId,x,y,width,height,Target\na,,,,,0\n")
    (root / DETAILS).write_text("patientId,clazz\na,Normal\n")
    assert "class" in words(root)
    (root / DETAILS).unlink()
    for file in (root / IMAGES).iterdir():
        file.unlink()
    assert "no .dcm" in words(root)
    (root / IMAGES).rmdir()
    assert IMAGES in words(root)


@settings(max_examples=60, deadline=None)
@given(
    table=st.dictionaries(
        st.text("0123456789abcdef-", min_size=1, max_size=12),
        st.lists(st.tuples(*[st.floats(0.5, 900).map(lambda v: round(v, 1))] * 4), max_size=4, unique=True),
        min_size=1,
        max_size=8,
    ),
    ending=st.sampled_from(["\n", "\r\n"]),
    quote_all=st.booleans(),
)
def test_any_table_is_read_back(
    table: dict[str, list[tuple[float, ...]]], ending: str, quote_all: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=ending, quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
    for name, boxes in table.items():
        writer.writerows([[name, *box, 1] for box in boxes] or [[name, "", "", "", "", 0]])
    root = make(tmp_path_factory.mktemp("table") / "d", "", images="")
    for name in table:
        (root / IMAGES / f"{name}.dcm").touch()
    with (root / LABELS).open("a", newline="") as file:
        file.write(text.getvalue())
    patients, quarantine = read_tables(root)
    assert {patient.patient_id: list(patient.boxes) for patient in patients} == table
    assert [patient.patient_id for patient in patients] == list(table)
    assert all(patient.label == bool(patient.boxes) for patient in patients)
    assert not quarantine


def test_file_names_that_are_no_text_can_still_be_reported(tmp_path: Path) -> None:
    root = make(tmp_path / "d", "a,,,,,0\n", images="a")
    (root / IMAGES / os.fsdecode(b"\xff\xfe.dcm")).touch()
    entry = read_tables(root)[1][0]
    assert (entry.reason, entry.file) == ("no_label", f"{IMAGES}/{entry.patient}.dcm")
    assert entry.patient.encode()


def test_strictness_counts_by_reason() -> None:
    refuse_if_any([])
    found = [Quarantined(str(i), "", reason, "") for i, reason in enumerate(["duplicate", "corrupt", "corrupt"])]
    assert list(count_reasons(found).items()) == [("corrupt", 2), ("duplicate", 1)]
    with pytest.raises(Refused, match=r"3 entries .*2 corrupt, 1 duplicate"):
        refuse_if_any(found)


def test_mapping_tells_persons_from_images(tmp_path: Path) -> None:
    entries = [
        {"subset_img_id": name, "img_id": image}
        for name, image in (("a", "7_000.png"), ("b", "7_012.png"), ("c", "8_1.png"))
    ]
    path = tmp_path / "mapping.json"
    path.write_text(json.dumps(entries))
    assert read_mapping(path) == {"a": "7", "b": "7", "c": "8"}
    table = tmp_path / "mapping.csv"
    table.write_text("patientId,person\na,7\nb,7\n")
    assert read_mapping(table) == {"a": "7", "b": "7"}


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', '[{"img_id": "7_0.png"}]', "[1]", "\x00"])
def test_what_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mapping.json"
    path.write_text(text)
    with pytest.raises(Refused, match="mapping"):
        read_mapping(path)
    with pytest.raises(Refused, match="mapping"):
        read_mapping(tmp_path / "none.json")
