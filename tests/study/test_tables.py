"""What is printed: complete, aligned, never cut short, and honest about cores, ranges and what is absent."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import synthetic
from msgspec import structs
from rich.console import Console

from pneumo.study.cells import decimals
from pneumo.study.schema import EarlyStopping
from pneumo.study.summary import summarize
from pneumo.study.tables import show

WHY = "Horovod is not built here: no C++ compiler found"


def printed(screen: Console, path: Path) -> str:
    show(path, screen)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def lines_of(text: str, title: str) -> list[str]:
    """The lines from a title to the next empty line."""
    return text[text.index(title) :].split("\n\n")[0].splitlines()


def test_everything_is_there_in_120_columns(screen: Console, tmp_path: Path) -> None:
    path = synthetic.write_result(tmp_path, absent=[("horovod", "mpi", n, WHY) for n in (2, 4)])
    text = printed(screen, path)
    for word in ("Comparison: main", "Where each rank's time went", "Quality on validation", "by view, sex and age"):
        assert word in text
    assert f"Results: {path}" in text
    assert "…" not in text
    assert "\x1b" not in text
    assert "\r" not in text
    table = [line for line in text.splitlines() if not line.startswith("Results:")]
    assert max(map(len, table)) <= 120


def test_times_and_ratios_have_their_limits(screen: Console, tmp_path: Path) -> None:
    lengths = {0: dict.fromkeys(range(6), 10**9), 1: {i: (5 + i) * 10**8 for i in range(6)}}
    runs = [("serial", "none", 1, 1), ("ddp", "gloo", 2, 1)]
    lines = lines_of(printed(screen, synthetic.write_result(tmp_path, runs, lengths=lengths)), "Comparison")
    row = next(line for line in lines if line.startswith("ddp"))
    assert re.search(r"0\.750 0\.500-1\.000 .* 1\.\d\d 1\.00-2\.00 .* 0\.\d\d 0\.50-1\.00 ", row), row


@pytest.mark.parametrize(
    ("data", "said"), [(None, "22.5 % of RSNA's patients"), ("rsna", "31.0 % of all the data's images")]
)
def test_the_natural_prevalence_is_not_the_samples(
    screen: Console, tmp_path: Path, data: str | None, said: str
) -> None:
    facts = structs.replace(synthetic.run_file().data, natural_prevalence=0.31)
    path = synthetic.write_result(tmp_path, [("serial", "none", 1, 1)], config={"data": data}, data=facts)
    text = " ".join("\n".join(lines_of(printed(screen, path), "Quality on validation")).split())
    assert said in text
    assert ("images, not persons" in text) == (data is not None)


@pytest.mark.parametrize("stopped", [None, 9])
def test_a_study_that_stopped_early_says_so(screen: Console, tmp_path: Path, stopped: int | None) -> None:
    found = EarlyStopping(
        patience=3, blocks=20, figure="mAP@0.5", figures={0: [0.5] * 9}, stopped_after=stopped, unimproved=3
    )
    path = synthetic.write_result(tmp_path, [("serial", "none", 1, 1)], early_stopping=found)
    text = " ".join("\n".join(lines_of(printed(screen, path), "Comparison")).split())
    said = "stopped early after block 9 of 20: no run's mAP@0.5 on the calibration patients has improved for 3 blocks"
    assert (said in text) == (stopped is not None)
    assert ("stopped early" in text) == (stopped is not None)


def test_more_ranks_than_cores_is_said(screen: Console, tmp_path: Path) -> None:
    text = printed(screen, synthetic.write_result(tmp_path))
    assert "4 ranks on 2 cores, 8 ranks on 2 cores" in text
    assert "2 ranks on 2 cores" not in text


def test_enough_cores_are_not_complained_about(screen: Console, tmp_path: Path) -> None:
    assert "ranks on 16 cores" not in printed(screen, synthetic.write_result(tmp_path, cores=16))


def test_absent_rows_carry_their_reason_once(screen: Console, tmp_path: Path) -> None:
    text = printed(screen, synthetic.write_result(tmp_path, absent=[("horovod", "mpi", n, WHY) for n in (2, 4)]))
    assert len(re.findall(r"^horovod +mpi +[24] x -.*absent \(a\)", text, re.M)) == 2
    assert text.count(WHY) == 1


def test_the_majority_rate_stands_beside_the_accuracy(screen: Console, tmp_path: Path) -> None:
    assert "50.0 % (majority rate)" in "\n".join(
        lines_of(printed(screen, synthetic.write_result(tmp_path)), "Comparison")
    )


@pytest.mark.parametrize(("blocks", "said"), [(3, "only the range of the blocks"), (6, "95 % interval (of the median")])
def test_a_range_is_called_a_range(screen: Console, tmp_path: Path, blocks: int, said: str) -> None:
    text = "\n".join(lines_of(printed(screen, synthetic.write_result(tmp_path, blocks=blocks)), "Comparison"))
    assert said in text
    assert ("Hodges-Lehmann" in text) == (blocks >= 6)
    assert ("about 3 more blocks would decide" in " ".join(text.split())) == (blocks == 3)


def test_printed_phases_sum_to_the_printed_wall_time(screen: Console, tmp_path: Path) -> None:
    text = printed(screen, synthetic.write_result(tmp_path))
    found = 0
    for line in lines_of(text, "Where each rank's time went"):
        figures = re.findall(r"\d+\.\d+", line)
        if len(figures) == 9:
            *phases, wall, compute, comm = map(float, figures)
            assert sum(phases) == pytest.approx(wall, abs=0.035)
            assert 0 < compute + comm <= 100
            found += 1
    assert found == 2 + 2 * (2 + 4 + 8) + 2 * 3


def test_columns_are_aligned(screen: Console, tmp_path: Path) -> None:
    text = printed(screen, synthetic.write_result(tmp_path))
    rows = [line for line in lines_of(text, "Comparison") if re.match(r"(serial|ddp|fsdp) ", line)]
    assert len(rows) == 8
    assert len({len(row.rstrip()) for row in rows}) == 1
    assert len({line.index(re.findall(r"\d+\.\d+", line)[0]) for line in rows}) == 1


def test_a_narrow_terminal_gets_whole_tables(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    text = printed(console, synthetic.write_result(tmp_path))
    assert "…" not in text
    assert "8 x 1" in text
    assert re.search(r"^ddp +gloo +8 x 1 .* \d\.\d{3}\s*$", text, re.M)


def test_a_thousand_ranks_do_not_fill_the_screen(screen: Console, tmp_path: Path) -> None:
    runs = [("serial", "none", 1, 1), ("ddp", "gloo", 200, 1)]
    text = printed(screen, synthetic.write_result(tmp_path, runs, blocks=1, cores=200))
    assert "+192" in text
    assert len(text.splitlines()) < 140


@pytest.mark.parametrize(
    "case",
    [
        {"runs": [("ddp", "gloo", 2, 1)]},
        {"predictions": False},
        {"runs": [], "absent": [("horovod", "mpi", 2, WHY)]},
        {"blocks": 1},
        {"state": "failed"},
        {"runs": [("serial", "none", 1, 1), ("horovod", "mpi", 2, 2)]},
    ],
)
def test_incomplete_results_are_shown_too(screen: Console, tmp_path: Path, case: dict[str, Any]) -> None:
    text = printed(screen, synthetic.write_result(tmp_path, **case))
    assert "Results: " in text
    assert ("state: failed" in text) == (case.get("state") == "failed")
    assert "nan" not in text.lower()
    if any(run[0] == "horovod" for run in case.get("runs", [])):
        assert "HOROVOD_CYCLE_TIME is 1 ms" in text
        assert "serial run of other threads: horovod mpi 2x2" in text


def test_text_from_files_is_never_taken_for_markup(screen: Console, tmp_path: Path) -> None:
    why = "no [bold]compiler[/bold] in [/usr]"
    assert why in printed(screen, synthetic.write_result(tmp_path, absent=[("horovod", "mpi", 2, why)]))


def test_decimals_keep_three_digits() -> None:
    assert [decimals([x]) for x in (0.05, 0.5, 5, 50, 500)] == [4, 3, 2, 1, 0]
    assert decimals([]) == 0


def test_intervals_are_over_persons_where_the_answers_tell_them(screen: Console, tmp_path: Path) -> None:
    runs = [("serial", "none", 1, 1)]
    known = synthetic.write_result(tmp_path / "known", runs, images_of_a_person=4)
    unknown = synthetic.write_result(tmp_path / "unknown", runs)
    ours, theirs = (summarize(path).rows[0] for path in (known, unknown))
    assert ours.metrics == theirs.metrics | {"persons": 100}
    assert ours.intervals.keys() == theirs.intervals.keys()
    assert all(ours.intervals[name] != theirs.intervals[name] for name in ours.intervals)
    assert "bootstrap over 100 persons" in " ".join(printed(screen, known).split())
    assert "accuracy Wilson, AUC DeLong" in " ".join(printed(screen, unknown).split())
