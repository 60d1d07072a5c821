"""What is said and printed of the account: figures of the rows, in words and tables that fit."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import simulated
from accounts import account_of, row_of
from rich.console import Console
from simulated import MS, Network, asleep
from synthetic import entry

from pneumo.study.replay import WhatIf
from pneumo.study.sentences import Sentence, paragraphs, sentences
from pneumo.study.summary import derive, summarize
from pneumo.study.tables import show


def sleepy(rank: int, _step: int, phase: str) -> simulated.Cost | None:
    return asleep(40 * MS) if (rank, phase) == (1, "backward") else None


def crowded(_rank: int, _step: int, phase: str) -> simulated.Cost | None:
    return (40 * MS, 0, 40 * MS) if phase == "forward" else None


def said(path: Path, cores: int = 2) -> list[Sentence]:
    derived = derive(path)
    return sentences(derived.summary.rows[1], derived.accounts["train"][1], cores)


def printed(screen: Console, path: Path) -> str:
    show(path, screen)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_more_ranks_than_cores_are_named_where_off_cpu_is_the_most(tmp_path: Path) -> None:
    path = simulated.study(tmp_path, 4, extra=crowded)
    row, text = row_of(path), said(path)[0].text
    share = 100 * (row.loss["off_cpu"] or 0) / (row.lost_rank_s or 1)
    assert f"Of {row.lost_rank_s:.2g} rank-seconds lost" in text
    assert f"{share:.0f} % is off-CPU: there are more ranks than cores (4 x 1 on 2)." in text
    assert "more ranks than cores" not in said(path, cores=8)[0].text


def test_every_sentence_is_made_of_figures_of_its_row(tmp_path: Path) -> None:
    path = simulated.study(tmp_path, 4, extra=sleepy, share=None)
    row = row_of(path)
    known = {term: value for term, value in row.loss.items() if value is not None}
    known |= {"lost_rank_s": row.lost_rank_s or 0, "residual_rank_s": row.residual_rank_s or 0}
    known |= {"residual": row.residual_rank_s or 0, "main_rank_s": row.late[0].rank_s}
    known |= {"late_rank_s": sum(one.rank_s for one in row.late), "late_count": sum(one.count for one in row.late)}
    for one in said(path):
        assert one.run == row.run
        assert one.figures, one.text
        for name, value in one.figures.items():
            if not name.endswith(("replayed_s", "no_transfer_s")):
                assert value == pytest.approx(known[name]), (name, one.text)


def test_the_late_rank_is_named_with_phase_and_cause(tmp_path: Path) -> None:
    text = " ".join(one.text for one in said(simulated.study(tmp_path, 4, extra=sleepy, style="fsdp")))
    assert (
        "Rank 1 was the last at 8 collectives and cost the others 0.96 rank-seconds (40 ms a step each), 100 %" in text
    )
    assert "by what it did in backward: it was blocked, neither computing nor ready to run." in text


def late_for_two_reasons(rank: int, step: int, phase: str) -> simulated.Cost | None:
    """Rank 1 sleeps 30 ms or computes 25 ms in turns, rank 0 sleeps 35 ms every fourth step."""
    if rank == 1 and phase == "backward" and step % 4 != 3:
        return asleep(30 * MS) if step % 2 else (25 * MS, 25 * MS, 0)
    return asleep(35 * MS) if (rank, phase, step % 4) == (0, "forward", 3) else None


def test_the_late_rank_is_the_one_that_cost_most_in_all(screen: Console, tmp_path: Path) -> None:
    """Over 8 steps: rank 1 cost 4 x 25 + 2 x 30 = 160 ms in two ways, rank 0 2 x 35 = 70 ms in one."""
    path = simulated.study(tmp_path, 2, extra=late_for_two_reasons, style="fsdp")
    text, row = " ".join(one.text for one in said(path)), row_of(path)
    assert (row.late[0].rank, row.late[0].cause, row.late[0].count) == (1, "compute", 4)
    assert [round(1e3 * one.rank_s) for one in row.late] == [100, 70, 60]
    assert (
        "Rank 1 was the last at 6 collectives and cost the others 0.16 rank-seconds (20 ms a step each), 70 %" in text
    )
    assert "62 % of that by what it did in backward: it had more to compute" in text
    assert re.search(r"fsdp gloo 2 +1 +0\.160 +70 +6  backward  compute ", printed(screen, path))


def test_late_begins_with_the_rank_that_cost_most(tmp_path: Path) -> None:
    """Rank 0 cost more at once (2 x 35) than rank 1 in any of its ways (2 x 30, 2 x 25), and less in all."""

    def extra(rank: int, step: int, phase: str) -> simulated.Cost | None:
        return None if (rank, step % 4) == (1, 0) else late_for_two_reasons(rank, step, phase)

    row = row_of(simulated.study(tmp_path, 2, extra=extra, style="fsdp"))
    assert [(one.rank, round(1e3 * one.rank_s)) for one in row.late] == [(1, 60), (0, 70), (1, 50)]


def test_what_was_injected_is_no_defect_of_the_account(tmp_path: Path) -> None:
    def sleepy(rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return simulated.asleep(100 * MS) if (rank, phase) == (1, "backward") else None

    config = {"inject": "rank=1,phase=backward,delay=100ms"}
    text = " ".join(one.text for one in said(simulated.study(tmp_path, 2, extra=sleepy, config=config)))
    assert re.search(r"Of other, \d+\.\d % of N\*T_N was injected\.", text)
    assert "above 5 %" not in text


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


@pytest.mark.parametrize(("replayed_s", "said_so"), [(0.979, False), (0.981, True), (1.019, True), (1.021, False)])
def test_a_replay_that_misses_the_time_says_nothing_of_a_faster_network(
    tmp_path: Path, replayed_s: float, said_so: bool
) -> None:
    derived = derive(simulated.study(tmp_path, 2, style="fsdp", network=Network(0, 10 * MS)))
    account = replace(derived.accounts["train"][1], what_if=WhatIf(1.0, replayed_s, {"no transfer": 0.7}))
    text = " ".join(one.text for one in sentences(derived.summary.rows[1], account, 2))
    assert ("a faster network" in text.lower()) == said_so


def test_a_share_of_more_than_all_that_is_lost_is_explained(tmp_path: Path) -> None:
    """Each of two ranks waits 20 ms a step, and computes 10 ms less than its half: 200 % of what is lost."""

    def less(_rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return (-10 * MS, -10 * MS, 0) if phase == "backward" else None

    path = simulated.study(tmp_path / "a", 2, extra=less, style="fsdp", buckets=1, network=Network(0, 20 * MS))
    assert "200 % is transfer (other parts took less than serially)." in said(path)[0].text
    path = simulated.study(tmp_path / "b", 2, style="fsdp", buckets=1, network=Network(0, 20 * MS))
    assert "100 % is transfer." in said(path)[0].text


def test_each_column_of_what_would_have_been_is_explained(screen: Console, tmp_path: Path) -> None:
    text = printed(screen, simulated.study(tmp_path, 2))
    legend = text[text.index("Efficiencies after POP") :]
    for name in ("no transfer", "no late peers", "cores for all"):
        assert re.search(rf"^{name} +(as it|if|cores)", legend, re.M), name


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
    assert "Records of collectives that are lost: 1 (rank 0, block 1, step 0, seq 0, group 2 ranks);" in text


def test_all_figures_are_about_the_blocks_that_serial_has_too(screen: Console, tmp_path: Path) -> None:
    """In block 2 of 3, which serial lacks, a step takes 200 ms more: it must be in no term, share or word."""

    def extra(_rank: int, step: int, phase: str) -> simulated.Cost | None:
        return asleep(200 * MS) if phase == "forward" and 4 <= step < 8 else None

    runs = [simulated.SERIAL, ("fsdp", "gloo", 2, 1)]
    serial = simulated.serial_rows(entry(0, *runs[0]), {16: simulated.share_ns(2)}, blocks=3)
    rows, records = simulated.train(
        entry(1, *runs[1]), simulated.plus(simulated.even(2), extra), Network(0, 10 * MS), style="fsdp", blocks=3
    )
    found = [r for r in serial if r["block"] != 2]
    path = simulated.write(tmp_path, [(found, []), (rows, records)], runs)
    row, step_s = row_of(path), (101 / 2 + 20) / 1e3
    assert row.compared is not None
    assert (row.compared.blocks, row.compared.steps, row.blocks, row.steps) == ([1, 3], 8, 3, 12)
    assert row.compared.whole_rank_s == pytest.approx(2 * 8 * step_s)
    assert row.lost_rank_s == pytest.approx(2 * 8 * 20e-3)
    assert row.residual_fraction == pytest.approx(0)
    assert f"({100 * 20e-3 / step_s:.0f} points of efficiency)" in said(path)[0].text
    text = printed(screen, path)
    assert text.count("fsdp gloo 2: only blocks 1, 3 of its 3, since serial lacks the others") == 2


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
    assert re.search(r"ddp gloo 4 +1 .*  backward  sleep ", part)
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
    text = printed(screen, path)
    assert re.search(r"^ddp gloo 2 validate +-?\d", text, re.M)
    assert re.search(r"^clock +ranks of one host", text[text.index("Validation and checkpoints") :], re.M)


def test_what_costs_is_said_where_nothing_is_lost_on_balance(tmp_path: Path) -> None:
    """Each of two ranks computes 30 ms less than its half of 101 ms and waits 20 ms: steps of 40.5 ms."""

    def extra(_rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return (-30 * MS, -30 * MS, 0) if phase == "backward" else None

    path = simulated.study(tmp_path, 2, extra=extra, style="fsdp", buckets=1, network=Network(0, 20 * MS))
    text = said(path)[0].text
    assert "Nothing is lost on balance (0.16 rank-seconds less than serially): transfer costs 49 points" in text


def test_the_check_of_clocks_names_its_run_and_amount(screen: Console, tmp_path: Path) -> None:
    """8 collectives of 10 ms on 2 ranks take 0.16 rank-seconds in blocks of 2 x 8 x 60.5 ms, by either way."""
    path = simulated.study(tmp_path, 2, style="fsdp", buckets=1, network=Network(0, 10 * MS))
    text = " ".join(printed(screen, path).split())
    assert "0.160 rank-seconds by the clocks and 0.160 by their least duration over the ranks" in text
    assert "(fsdp gloo 2, where they differ most: by +0.0 points)" in text


def test_printing_makes_no_account_again(screen: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = simulated.study(tmp_path, 2)
    derived = derive(path)

    def again(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("pneumo.study.explain.Explainer.account", again)
    show(path, screen, derived)
    assert isinstance(screen.file, io.StringIO)
    assert "Efficiencies after POP" in screen.file.getvalue()


def test_the_parts_of_off_cpu_and_other_are_printed_for_each_run(screen: Console, tmp_path: Path) -> None:
    """40 ms without a core in steps of 101 / 4 + 40 and 3 ms; rank 0 begins every block 20 ms late."""
    path = simulated.study(tmp_path, 4, extra=crowded, begins=[20 * MS, 0, 0, 0])
    row = row_of(path)
    assert row.compared is not None
    points = {
        term: {name: 100 * value / row.compared.whole_rank_s for name, value in parts.items()}
        for term, parts in row.items.items()
    }
    assert points["off_cpu"]["others"] > 50
    assert points["other"]["begins late"] > 1
    text = " ".join(printed(screen, path).split())
    off_cpu = f"parts ddp gloo 4: off-CPU = others {points['off_cpu']['others']:.1f}"
    assert f"{off_cpu}; other = begins late {points['other']['begins late']:.1f} " in text
    even = printed(Console(file=io.StringIO(), width=100), simulated.study(tmp_path / "even", 4))
    assert "\nparts" not in even


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


def test_what_the_laws_cannot_tell_names_each_kind_of_run_once(tmp_path: Path) -> None:
    """Of 2 and 4 ranks on 2 cores both laws say the same; it is said once, without names where it is said of all."""

    def trained(styles: tuple[str, ...]) -> str:
        runs = [simulated.SERIAL, *((style, "gloo", ranks, 1) for style in styles for ranks in (2, 4))]
        runs += [("fsdp", "gloo", 2, 1)] if "horovod" in styles else []
        serial = simulated.serial_rows(entry(0, *runs[0]), {16: simulated.share_ns(2), 8: simulated.share_ns(4)})
        parallel = [
            simulated.train(entry(i, *run), simulated.even(run[2]), style=run[0])
            for i, run in enumerate(runs)
            if i  # without serial
        ]
        path = simulated.write(tmp_path / "-".join(styles), [(serial, []), *parallel], runs)
        return " ".join(printed(Console(file=io.StringIO(), width=120), path).split())

    crowded = "At 4 ranks on 2 cores the lack of cores is taken for a property of the program."
    assert f"but {crowded}" in trained(("ddp", "fsdp"))
    assert f"but ddp gloo, horovod gloo: {crowded}" in trained(("ddp", "horovod"))
