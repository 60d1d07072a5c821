"""What is said and printed of the account: figures of the rows, in words and tables that fit."""

import io
import re
from pathlib import Path

import pytest
import simulated
from accounts import account_of, row_of
from rich.console import Console
from simulated import MS, Network, asleep
from synthetic import entry

from pneumo.study.losses import explain
from pneumo.study.results import load_run
from pneumo.study.sentences import Sentence, paragraphs, sentences
from pneumo.study.summary import summarize
from pneumo.study.tables import show


def sleepy(rank: int, _step: int, phase: str) -> simulated.Cost | None:
    return asleep(40 * MS) if (rank, phase) == (1, "backward") else None


def crowded(_rank: int, _step: int, phase: str) -> simulated.Cost | None:
    return (40 * MS, 0, 40 * MS) if phase == "forward" else None


def said(path: Path, cores: int = 2) -> list[Sentence]:
    summary, run = summarize(path, write=False), load_run(path)
    accounts = explain(path, run, summary)["train"]
    return sentences(summary.rows[1], accounts[1], cores)


def printed(screen: Console, path: Path) -> str:
    show(path, screen)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_more_ranks_than_cores_are_named_where_off_cpu_is_the_most(tmp_path: Path) -> None:
    path = simulated.study(tmp_path, 4, extra=crowded)
    row, text = row_of(path), said(path)[0].text
    share = 100 * (row.loss["off_cpu"] or 0) / (row.lost_rank_s or 1)
    assert f"Of {row.lost_rank_s:.1f} rank-seconds lost" in text
    assert f"{share:.0f} % is off-CPU: there are more ranks than cores (4 x 1 on 2)." in text
    assert "more ranks than cores" not in said(path, cores=8)[0].text


def test_every_sentence_is_made_of_figures_of_its_row(tmp_path: Path) -> None:
    path = simulated.study(tmp_path, 4, extra=sleepy, share=None)
    row = row_of(path)
    known = {term: value for term, value in row.loss.items() if value is not None}
    known |= {"lost_rank_s": row.lost_rank_s or 0, "residual_rank_s": row.residual_rank_s or 0}
    known |= {"residual": row.residual_rank_s or 0, "rank_s": row.late[0].rank_s, "count": row.late[0].count}
    for one in said(path):
        assert one.run == row.run
        assert one.figures, one.text
        for name, value in one.figures.items():
            if not name.endswith(("replayed_s", "no_transfer_s")):
                assert value == pytest.approx(known[name]), (name, one.text)


def test_the_late_rank_is_named_with_phase_and_cause(tmp_path: Path) -> None:
    text = " ".join(one.text for one in said(simulated.study(tmp_path, 4, extra=sleepy, style="fsdp")))
    assert (
        "Rank 1 was the last at 8 collectives and cost the others 1.0 rank-seconds (40 ms a step each), 100 %" in text
    )
    assert "by what it did in backward: it was blocked, neither computing nor ready to run." in text


def test_what_one_rank_does_alone_is_named(tmp_path: Path) -> None:
    text = " ".join(
        one.text for one in said(simulated.study(tmp_path, 4, validates={(0, i): 80 * MS for i in range(8)}))
    )
    assert "Rank 0 was the last at" in text
    assert "by what it did in validate: it did alone what the others did not do." in text
    assert "(above 5 %): validate +" in text


def test_a_faster_network_by_the_replay(tmp_path: Path) -> None:
    path = simulated.study(tmp_path, 2, style="fsdp", network=Network(0, 10 * MS))
    text = " ".join(one.text for one in said(path))
    compute = sum(simulated.WHOLE.values()) / 2 / MS
    assert f"at most {100 * (1 - compute / (compute + 20)):.1f} points" in text


def test_waking_up_late_in_collectives_is_said(tmp_path: Path) -> None:
    runs = [simulated.SERIAL, ("fsdp", "gloo", 2, 1)]
    serial = simulated.serial_rows(entry(0, *runs[0]), {16: simulated.share_ns(2)})
    rows, records = simulated.train(entry(1, *runs[1]), simulated.even(2), style="fsdp")
    rows = [row | {"comm_delay_ns": row["comm_ns"] // 2} for row in rows]
    text = " ".join(one.text for one in said(simulated.write(tmp_path, [(serial, []), (rows, records)], runs)))
    assert "50 % of the time in collectives a rank was ready to go on and had no core" in text


def test_defects_are_said(tmp_path: Path) -> None:
    text = " ".join(one.text for one in said(simulated.study(tmp_path / "a", 2, extra=sleepy, share=None)))
    assert "no serial steps of the share's size were timed" in text.lower()
    assert re.search(r"\+\d+\.\d % of N\*T_N is explained by no measurement \(above 1 %\)", text)
    lost = simulated.study(tmp_path / "b", 2, edit=lambda rows: rows[1:])
    text = " ".join(one.text for one in said(lost))
    assert "1 records of collectives are lost" in text
    assert "rank 0 has no record of step 0, seq 0, group all" in text


def test_nothing_is_said_of_a_serial_run(tmp_path: Path) -> None:
    summary = summarize(simulated.study(tmp_path, 2), write=False)
    assert sentences(summary.rows[0], None, 2) == []
    assert [text.split(":")[0] for text in paragraphs(summary.rows, {}, 2)] == ["ddp gloo 2"]


def test_the_printed_account_adds_up(screen: Console, tmp_path: Path) -> None:
    path = simulated.study(tmp_path, 4, extra=sleepy, blocks=6, share=MS)
    text = printed(screen, path)
    assert max(len(line) for line in text.splitlines() if not line.startswith("Results")) <= 120
    part = text[text.index("Where the efficiency went") :]
    line = next(line for line in part.splitlines() if line.startswith("ddp gloo 4"))
    _, lost, *terms = map(float, re.findall(r"-?\d+\.\d+", line))
    assert len(terms) == 9
    assert sum(terms) == pytest.approx(lost, abs=0.5)
    assert "95 % interval over the blocks" in part
    assert re.search(r"ddp gloo 4 +1  backward  sleep ", part)
    assert not re.search(r"-0\.0+\b", part)


def test_validation_is_printed_beside_the_training(screen: Console, tmp_path: Path) -> None:
    runs = [simulated.SERIAL, ("ddp", "gloo", 2, 1)]
    serial = simulated.serial_rows(entry(0, *runs[0]), {16: simulated.share_ns(2)})
    rows, records = simulated.train(entry(1, *runs[1]), simulated.even(2))
    for found in (serial, rows):
        found += [
            r | {"kind": "validate", "step": 99, "begin_ns": r["begin_ns"] + 10**10} for r in found if r["step"] == 7
        ]
    path = simulated.write(tmp_path, [(serial, []), (rows, records)], runs)
    assert account_of(path, kind="validate").reference == 0
    assert re.search(r"^ddp gloo 2 validate +-?\d", printed(screen, path), re.M)


def test_the_account_of_validation_is_said_in_words(screen: Console, tmp_path: Path) -> None:
    text = " ".join(printed(screen, simulated.validated(tmp_path, asleep(50 * MS), {})).split())
    said = text[text.index("ddp gloo 2 validate: Of 0.") :]
    assert "ank 1 was the last at" in said[:300]
    assert "forward" in said[:500]
    assert re.search(r"ddp gloo 2 validate -?\d", text)


def test_ten_times_the_steps_take_at_most_ten_times_as_long(tmp_path: Path) -> None:
    """64 ranks, 10 collectives a step; tests/study/big_result.py makes it a thousand ranks and a thousand steps."""
    import big_result

    few, many = (big_result.measure(big_result.write(tmp_path / str(n), 64, n, 10)) for n in (100, 1000))
    assert many[0] < 10 * few[0]
    assert many[1] < 1
