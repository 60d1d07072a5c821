"""The account against causes of loss that were put in, against a recomputation in plain Python, and its invariants."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import simulated
from accounts import account_of, closes, row_of
from simulated import AFTER_WORK, MS, STYLES, Network, asleep
from synthetic import entry

from pneumo.study.account import TERMS, Account, Reference, share_cost
from pneumo.study.breakdown import select
from pneumo.study.explain import injected
from pneumo.study.ledger import Ledger, ledger
from pneumo.study.results import load_table
from pneumo.study.schema import PHASES, Row
from pneumo.study.summary import summarize

STEPS = 8  # of the simulated runs: 2 blocks of 4


def item(account: Account, term: str, name: str) -> float:
    return float(account.items[term][name].sum())


def seconds(ns: float) -> Any:
    return pytest.approx(ns / 1e9, abs=1e-9)


def blocked(row: Row) -> float:
    return sum(row.loss[term] or 0 for term in ("peer_wait", "queue", "transfer"))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_without_a_cause_only_the_network_is_lost(tmp_path: Path, style: str, ranks: int) -> None:
    row = row_of(simulated.study(tmp_path, ranks, style=style))
    assert closes(row)
    for term in TERMS:
        if term != "transfer":
            assert row.loss[term] == seconds(0), term
    assert row.residual_rank_s == seconds(0)
    assert row.lost_rank_s == pytest.approx(row.loss["transfer"])
    assert row.late == []
    blocked = 2 if style == "fsdp" else 1 if ranks == 2 else 2  # DDP's first transfer is hidden by the second bucket
    assert row.loss["transfer"] == pytest.approx(ranks * STEPS * blocked * 3e-3, rel=0.8)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_sleeps_before_its_backward_pass(tmp_path: Path, style: str, ranks: int) -> None:
    d = 100 * MS

    def sleepy(rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return asleep(d) if (rank, phase) == (1, "backward") else None

    plain = row_of(simulated.study(tmp_path / "plain", ranks, style=style))
    row = row_of(simulated.study(tmp_path / "late", ranks, extra=sleepy, style=style))
    assert closes(row)
    # While the late rank computes between its buckets, the first one is on its way: 3 ms of transfer.
    assert row.loss["peer_wait"] == pytest.approx((ranks - 1) * 0.1 * STEPS, rel=0.05)
    assert blocked(row) - blocked(plain) == seconds((ranks - 1) * d * STEPS)
    assert row.residual_rank_s == seconds(d * STEPS)  # the sleeper's own: nobody gave it a name
    assert {(late.rank, late.phase, late.cause) for late in row.late} == {(1, "backward", "sleep")}
    assert row.late[0].rank_s == pytest.approx(row.loss["peer_wait"])


def test_a_sleep_that_the_study_put_in_has_a_name(tmp_path: Path) -> None:
    d = 100 * MS

    def sleepy(rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return asleep(d) if (rank, phase) == (1, "backward") else None

    config = {"inject": "rank=1,phase=backward,delay=100ms"}
    path = simulated.study(tmp_path, 2, extra=sleepy, config=config)
    account = account_of(path)
    assert item(account, "other", "injected sleep") == seconds(d * STEPS)
    assert account.total("residual") == seconds(0)


def test_sleep_beyond_what_the_study_put_in_stays_without_a_name(tmp_path: Path) -> None:
    """30 ms of rank 1's 50 ms in backward are injected: 10 into all ranks, which rank 0 did not sleep, and 20 into it.

    In forward it slept 5 ms of the 10 that are said to be injected.
    """

    def sleepy(rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return asleep({"backward": 50 * MS, "forward": 5 * MS}.get(phase, 0)) if rank == 1 else None

    texts = [
        "rank=all,phase=backward,delay=10ms",
        "rank=1,phase=backward,delay=20ms",
        "rank=1,phase=forward,delay=10ms",
    ]
    account = account_of(simulated.study(tmp_path, 2, extra=sleepy, config={"inject": texts}))
    assert account.items["other"]["injected sleep"].sum(0).tolist() == [seconds(0), seconds(35 * MS * STEPS)]
    assert account.total("residual") == seconds(20 * MS * STEPS)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"inject": None}, {}),
        ({"inject": "rank=all,phase=forward,delay=1ms"}, {(None, "forward"): 0.001}),
        ({"inject": ["rank=1,phase=data,delay=1ms"]}, {(1, "data"): 0.001}),
        ({"inject": [{"rank": 2, "phase": "optimizer", "delay": 0.1}]}, {(2, "optimizer"): 0.1}),
        ({"inject": [{"rank": 2, "phase": "forward", "delay_s": 0.1, "cause": "sleep"}]}, {(2, "forward"): 0.1}),
        ({"inject": ["rank=1,phase=forward,delay=2s", "rank=1,phase=forward,delay=50us"]}, {(1, "forward"): 2.00005}),
        ({"inject": "rank=1,phase=backward,cause=busy,delay=1ms"}, {}),
        ({"inject": "rank=1,phase=validate,delay=1ms"}, {}),
    ],
)
def test_names_of_injected_sleeps(given: dict[str, Any], expected: dict[tuple[int | None, str], float]) -> None:
    assert injected(given) == pytest.approx(expected)


def test_names_of_what_is_injected_into_a_validation() -> None:
    config = {"inject": ["rank=1,phase=validate,delay=1ms,cause=sleep", "rank=1,phase=forward,delay=1ms"]}
    assert injected(config, "validate") == {(1, "forward"): 0.001}
    assert injected(config, "checkpoint") == {}


@pytest.mark.parametrize("style", AFTER_WORK)
def test_a_slow_transport_is_transfer(tmp_path: Path, style: str) -> None:
    path = [simulated.study(tmp_path / str(ms), 4, style=style, network=Network(0, ms * MS)) for ms in (20, 40)]
    before, after = (row_of(p) for p in path)
    grown = (after.loss["transfer"] or 0) - (before.loss["transfer"] or 0)
    # Both buckets are late by 20 ms; DDP and Horovod send the second after the first.
    assert grown == seconds(4 * STEPS * 2 * 20 * MS)
    assert [row.loss["peer_wait"] for row in (before, after)] == [0, 0]


def test_negotiation_is_queue_where_the_start_is_known(tmp_path: Path) -> None:
    known = row_of(simulated.study(tmp_path / "a", 2, style="fsdp", network=Network(5 * MS, 3 * MS)))
    unknown = row_of(simulated.study(tmp_path / "b", 2, style="fsdp", network=Network(5 * MS, 3 * MS, False)))
    assert (known.loss["queue"], known.loss["transfer"]) == (seconds(2 * STEPS * 2 * 5 * MS), seconds(2 * STEPS * 6e6))
    assert (unknown.loss["queue"], unknown.loss["transfer"]) == (0, seconds(2 * STEPS * 2 * 8 * MS))


def test_a_slow_loader_is_data_stall(tmp_path: Path) -> None:
    def slow(_rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return asleep(30 * MS) if phase == "data" else None

    row = row_of(simulated.study(tmp_path, 4, extra=slow))
    assert row.loss["data_stall"] == seconds(4 * STEPS * 30 * MS)
    assert (row.loss["peer_wait"], row.residual_rank_s, row.late) == (0, seconds(0), [])


def test_one_slow_loader_makes_the_others_wait_for_its_data(tmp_path: Path) -> None:
    def slow(rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return asleep(30 * MS) if (rank, phase) == (2, "data") else None

    row = row_of(simulated.study(tmp_path, 4, style="fsdp", extra=slow))
    assert row.loss["data_stall"] == seconds(STEPS * 30 * MS)
    assert row.loss["peer_wait"] == seconds(3 * STEPS * 30 * MS)
    assert [(x.rank, x.phase, x.cause) for x in row.late] == [(2, "data", "data")]


def test_a_busy_neighbour_is_off_cpu_there_and_peer_wait_elsewhere(tmp_path: Path) -> None:
    def busy(rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return (40 * MS, 0, 40 * MS) if (rank, phase) == (3, "forward") else None

    path = simulated.study(tmp_path, 4, style="fsdp", extra=busy)
    row, account = row_of(path), account_of(path)
    assert row.loss["off_cpu"] == seconds(STEPS * 40 * MS)
    assert row.loss["peer_wait"] == seconds(3 * STEPS * 40 * MS)
    assert [(x.rank, x.phase, x.cause) for x in row.late] == [(3, "forward", "off_cpu")]
    assert item(account, "off_cpu", "others") == row.loss["off_cpu"]
    assert row.residual_rank_s == seconds(0)


def test_replicated_work_and_slower_cores_are_told_apart(tmp_path: Path) -> None:
    def longer(_rank: int, _step: int, phase: str) -> simulated.Cost | None:
        more = {"optimizer": 7 * MS, "forward": 2 * MS}.get(phase, 0)
        return more, more, 0

    row = row_of(simulated.study(tmp_path, 4, extra=longer, share=7 * MS))
    assert row.loss["replicated"] == seconds(4 * STEPS * 7 * MS)
    assert row.loss["slower_on_cpu"] == seconds(4 * STEPS * 2 * MS)
    assert closes(row)


def test_without_share_rows_they_stay_in_the_residual(tmp_path: Path) -> None:
    def longer(_rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return (7 * MS, 7 * MS, 0) if phase == "optimizer" else None

    row = row_of(simulated.study(tmp_path, 4, extra=longer, share=None))
    assert (row.loss["replicated"], row.loss["slower_on_cpu"]) == (None, None)
    assert row.residual_rank_s == seconds(4 * STEPS * 7 * MS)
    assert closes(row)


def test_a_rank_that_validates_alone_is_named(tmp_path: Path) -> None:
    path = simulated.study(tmp_path, 4, style="fsdp", validates={(0, 2): 300 * MS, (0, 6): 300 * MS})
    row, account = row_of(path), account_of(path)
    assert [(x.rank, x.phase, x.cause, x.count) for x in row.late] == [(0, "validate", "alone", 2)]
    assert row.late[0].rank_s == seconds(3 * 600 * MS)
    assert item(account, "other", "validate") == seconds(600 * MS)
    assert row.residual_rank_s == seconds(0)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("phase", "cost", "cause"),
    [
        ("data", asleep(30 * MS), "data"),
        ("data", (30 * MS, 0, 30 * MS), "off_cpu"),
        ("forward", (30 * MS, 30 * MS, 0), "compute"),
        ("forward", asleep(30 * MS), "sleep"),
        ("backward", (30 * MS, 0, 30 * MS), "off_cpu"),
        ("optimizer", asleep(30 * MS), "sleep"),
        ("other", asleep(30 * MS), "sleep"),
    ],
)
def test_every_cause_in_every_phase_is_named(
    tmp_path: Path, style: str, ranks: int, phase: str, cost: simulated.Cost, cause: str
) -> None:
    path = simulated.study(tmp_path, ranks, extra=lambda r, _s, p: cost if (r, p) == (1, phase) else None, style=style)
    row = row_of(path)
    assert {(x.rank, x.phase, x.cause) for x in row.late} == {(1, phase, cause)}
    # What follows a block's last collective delays nobody.
    times = STEPS - (2 if phase in ("optimizer", "other") else 0)
    assert row.loss["peer_wait"] == pytest.approx((ranks - 1) * times * 0.03, rel=0.11)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_rank_that_comes_late_out_of_a_wait_is_late_in_comm(tmp_path: Path, ranks: int, recorded: bool) -> None:
    """40 ms more on rank 1 than the transfer took for the others, as a part of the record of its wait or beside it."""
    rank = entry(1, "fsdp", "gloo", ranks, 1)

    def slow(r: int, _step: int, phase: str) -> simulated.Cost | None:
        return asleep(40 * MS) if (r, phase) == (1, "optimizer" if recorded else "forward") else None

    rows, records = simulated.train(rank, simulated.plus(simulated.even(ranks), slow), style="fsdp")
    for row in (r for r in rows if r["rank"] == 1):
        row["comm_ns"] += 40 * MS
        row["optimizer_ns" if recorded else "forward_ns"] -= 40 * MS
    for record in (r for r in records if r["rank"] == 1 and r["seq"] % 2 and recorded):
        record["wait_end_ns"] += 40 * MS  # the last of the step's two
    runs = [simulated.SERIAL, ("fsdp", "gloo", ranks, 1)]
    serial = simulated.serial_rows(entry(0, *runs[0]), {32 // ranks: simulated.share_ns(ranks)})
    row = row_of(simulated.write(tmp_path, [(serial, []), (rows, records)], runs))
    assert {(x.rank, x.phase, x.cause) for x in row.late} == {(1, "comm", "sleep")}
    assert row.loss["peer_wait"] == seconds((ranks - 1) * (STEPS - 2 * recorded) * 40 * MS)
    # Nobody waits in a collective for what is after a block's last one: the others end early.
    assert row.loss["other"] == seconds((2 * (ranks - 1) if recorded else STEPS) * 40 * MS)
    assert closes(row)


def test_two_causes_at_once_are_told_apart(tmp_path: Path) -> None:
    def two(rank: int, step: int, phase: str) -> simulated.Cost | None:
        if (rank, step % 2, phase) == (1, 0, "backward"):
            return asleep(50 * MS)
        return asleep(20 * MS) if (rank, step % 2, phase) == (2, 1, "data") else None

    row = row_of(simulated.study(tmp_path, 4, style="fsdp", extra=two))
    found = {(x.rank, x.phase, x.cause): x.rank_s for x in row.late}
    assert found == {
        (1, "backward", "sleep"): seconds(3 * STEPS / 2 * 50 * MS),
        (2, "data", "data"): seconds(3 * STEPS / 2 * 20 * MS),
    }
    assert [x.rank for x in row.late] == [1, 2]


def test_a_rank_that_begins_late_is_a_block_edge(tmp_path: Path) -> None:
    path = simulated.study(tmp_path, 2, style="fsdp", begins=(0, 25 * MS))
    row, account = row_of(path), account_of(path)
    assert item(account, "other", "begins late") == seconds(2 * 25 * MS)
    assert row.loss["other"] == seconds(2 * 25 * MS)
    assert row.loss["peer_wait"] == seconds(2 * 25 * MS)
    assert [(x.rank, x.phase, x.cause) for x in row.late] == [(1, "between steps", "unknown")]


def test_delay_in_data_and_other_is_counted_once(tmp_path: Path) -> None:
    def delayed(_rank: int, _step: int, phase: str) -> simulated.Cost | None:
        return (5 * MS, 0, 5 * MS) if phase in ("data", "other") else None

    row = row_of(simulated.study(tmp_path, 2, extra=delayed))
    assert row.loss["off_cpu"] == seconds(2 * STEPS * 10 * MS)
    assert (row.loss["data_stall"], row.loss["other"]) == (seconds(0), seconds(0))
    assert closes(row)


def test_the_same_by_plain_python(tmp_path: Path) -> None:
    """Every term recomputed from the rows with dictionaries, for uneven ranks and causes all over."""

    def uneven(rank: int, step: int, phase: str) -> simulated.Cost | None:
        wall = (rank * 7 + step * 3 + len(phase)) % 11 * MS
        return wall, wall // 3, wall // 4

    path = simulated.study(
        tmp_path, 4, extra=uneven, style="horovod", network=Network(MS, 4 * MS), begins=(0, 3 * MS, MS, 2 * MS)
    )
    row, expected = row_of(path), recomputed(path)
    for term, value in expected.items():
        assert row.loss[term] == pytest.approx(value, abs=1e-9), term
    assert closes(row)


def recomputed(path: Path) -> dict[str, float]:
    """The terms in seconds, from the files and nothing else of this package."""
    steps = load_table(path, "steps").to_pylist()
    found: dict[str, float] = defaultdict(float)
    train = [r for r in steps if r["kind"] == "train"]
    serial, ours = ([r for r in train if r["run"] == run] for run in (0, 1))
    weight = sum(r["images"] for r in ours) / sum(r["images"] for r in serial)
    share = sorted(
        sum(r[f"{p}_cpu_ns"] for p in ("forward", "backward", "optimizer")) for r in steps if r["kind"] == "share"
    )
    for sign, rows in ((1, ours), (-weight, serial)):
        for r in rows:
            found["data_stall"] += sign * (r["data_ns"] - r["data_delay_ns"])
            found["off_cpu"] += sign * sum(r[f"{p}_delay_ns"] for p in PHASES if p != "comm")
            found["other"] += sign * (r["other_ns"] - r["other_delay_ns"])
        for block in {r["block"] for r in rows}:
            here = [r for r in rows if r["block"] == block]
            length = max(r["begin_ns"] + r["wall_ns"] for r in here) - min(r["begin_ns"] for r in here)
            found["other"] += sign * (len({r["rank"] for r in here}) * length - sum(r["wall_ns"] for r in here))
    c = share[len(share) // 2]
    cpu = {id(r): sum(r[f"{p}_cpu_ns"] for p in ("forward", "backward", "optimizer")) for r in ours + serial}
    found["replicated"] = len(ours) * c - weight * sum(cpu[id(r)] for r in serial)
    found["slower_on_cpu"] = sum(cpu[id(r)] for r in ours) - len(ours) * c
    calls = defaultdict(list)
    for r in load_table(path, "collectives").to_pylist():
        calls[r["step"], r["seq"]].append(r)
    for records in calls.values():
        arrived = max(r["enqueued_ns"] for r in records)
        for r in records:
            ready = min(max(arrived, r["wait_begin_ns"]), r["wait_end_ns"])
            started = min(max(ready, r["started_ns"]), r["wait_end_ns"])
            found["peer_wait"] += ready - r["wait_begin_ns"]
            found["queue"] += started - ready
            found["transfer"] += r["wait_end_ns"] - started
    return {term: value / 1e9 for term, value in found.items()}


def test_hidden_communication_is_what_ran_beside_the_computing(tmp_path: Path) -> None:
    """DDP's first bucket is on its way while the second is computed: 15 ms of it at most, at 4 ranks 7.5 ms."""
    account = account_of(simulated.study(tmp_path, 4, network=Network(0, 5 * MS)))
    assert float(account.aside["hidden"].sum()) == seconds(4 * STEPS * 5 * MS)
    account = account_of(simulated.study(tmp_path / "slow", 4, network=Network(0, 50 * MS)))
    assert float(account.aside["hidden"].sum()) == seconds(4 * STEPS * 7.5 * MS)
    blocking = account_of(simulated.study(tmp_path / "fsdp", 4, style="fsdp"))
    assert float(blocking.aside["hidden"].sum()) == 0


def test_transfer_by_the_clock_and_without_agree_on_one_clock(tmp_path: Path) -> None:
    plain = account_of(simulated.study(tmp_path / "a", 4, network=Network(MS, 5 * MS), style="fsdp")).durations
    assert plain.collectives == 2 * STEPS
    assert plain.clocked_s == plain.clock_free_s == seconds(4 * 2 * STEPS * 6 * MS)
    assert plain.disagreement == 0

    def ahead(records: simulated.Rows) -> simulated.Rows:
        names = ("enqueued_ns", "started_ns", "finished_ns", "wait_begin_ns", "wait_end_ns")
        return [r | {n: r[n] + 2 * MS for n in names} if r["rank"] == 1 else r for r in records]

    wrong = account_of(simulated.study(tmp_path / "b", 4, network=Network(MS, 5 * MS), style="fsdp", edit=ahead))
    assert wrong.durations.disagreement is not None
    assert wrong.durations.disagreement < -0.2


def test_validation_has_an_account_of_its_own(tmp_path: Path) -> None:
    rows, records = simulated.train(entry(1, "ddp", "gloo", 2, 1), simulated.even(2))
    serial = simulated.serial_rows(entry(0, *simulated.SERIAL), {16: simulated.share_ns(2)})
    for found, work in ((rows, 60 * MS), (serial, 100 * MS)):
        for last in [r for r in found if r["step"] == 7]:
            more = {"step": 100, "begin_ns": last["begin_ns"] + 10**10, "kind": "validate", "comm_ns": 0}
            blank = {f"{p}_{what}": 0 for p in PHASES for what in ("ns", "cpu_ns", "delay_ns")}
            found.append(last | blank | more | {"wall_ns": work, "forward_ns": work, "forward_cpu_ns": work})
    path = simulated.write(tmp_path, [(serial, []), (rows, records)], [simulated.SERIAL, ("ddp", "gloo", 2, 1)])
    account = account_of(path, kind="validate")
    assert account.total("lost") == seconds(2 * 60 * MS - 100 * MS)
    assert account.terms["replicated"] is None
    assert account.total("residual") == seconds(20 * MS)
    assert account_of(path).total("residual") == seconds(0)


@pytest.mark.parametrize("cause", ["sleep", "compute", "off_cpu"])
def test_the_rank_that_ends_a_validation_late_is_named(tmp_path: Path, cause: str) -> None:
    """Two batches of 30 ms without a collective, then the sum that counts them; rank 1 takes 50 ms more for each."""
    more = (50 * MS, 50 * MS * (cause == "compute"), 50 * MS * (cause == "off_cpu"))
    config = {"inject": "rank=1,phase=validate,delay=50ms,cause=sleep"}
    account = account_of(simulated.validated(tmp_path, more, config), kind="validate")
    assert [(x.rank, x.phase, x.cause, x.count) for x in account.late] == [(1, "forward", cause, 1)]
    assert account.total("peer_wait") == account.late[0].rank_s == seconds(2 * 50 * MS)
    assert account.total("residual") == seconds(0)
    if cause == "sleep":
        assert item(account, "other", "injected sleep") == seconds(2 * 50 * MS)


def test_the_account_of_a_checkpoint_names_who_wrote_it(tmp_path: Path) -> None:
    """Both runs take 40 ms to write it; of two ranks the other waits, and half of serial's work is nobody's loss."""
    serial, _ = simulated.train(entry(0, *simulated.SERIAL), simulated.even(1))
    rows, records = simulated.train(entry(1, "ddp", "gloo", 2, 1), simulated.even(2))
    blank = {f"{p}_{what}": 0 for p in PHASES for what in ("ns", "cpu_ns", "delay_ns")}
    for found, ranks in ((serial, 1), (rows, 2)):
        last = next(r for r in found if r["step"] == 7)
        begin = last["begin_ns"] + 10**10
        new = last | blank | {"kind": "checkpoint", "step": 100, "begin_ns": begin, "wall_ns": 40 * MS, "images": 0}
        found += [new | {"other_ns": 40 * MS}, new | {"rank": 1, "comm_ns": 40 * MS}][:ranks]
        for rank, came in enumerate((begin + 40 * MS, begin)[: ranks if ranks > 1 else 0]):
            stamps = dict.fromkeys(("started_ns", "finished_ns", "wait_end_ns"), begin + 40 * MS)
            record = next(r for r in records if r["rank"] == rank) | {"block": 2, "step": 100, "seq": 0}
            records.append(record | stamps | {"enqueued_ns": came, "wait_begin_ns": came, "group": "small"})
    path = simulated.write(tmp_path, [(serial, []), (rows, records)], [simulated.SERIAL, ("ddp", "gloo", 2, 1)])
    account = account_of(path, kind="checkpoint")
    assert account.total("lost") == account.total("peer_wait") == seconds(40 * MS)
    assert account.total("residual") == account.total("other") == seconds(0)
    assert [(x.rank, x.phase, x.cause, x.count) for x in account.late] == [(0, "checkpoint", "alone", 1)]
    assert account_of(path).blocks == (1, 2), "the training's account is what it was"
    assert item(account_of(path), "other", "checkpoint") == 0


def test_what_is_validated_amid_the_training_is_no_part_of_the_account_of_validation(tmp_path: Path) -> None:
    rows, records = simulated.train(entry(1, "ddp", "gloo", 2, 1), simulated.even(2), validates={(0, 6): 300 * MS})
    serial = simulated.serial_rows(entry(0, *simulated.SERIAL), {16: simulated.share_ns(2)})
    for found in (rows, serial):
        for last in [r for r in found if r["step"] == 7]:
            found.append(last | {"kind": "validate", "step": 100, "begin_ns": last["begin_ns"] + 10**10})
    path = simulated.write(tmp_path, [(serial, []), (rows, records)], [simulated.SERIAL, ("ddp", "gloo", 2, 1)])
    own = [r for r in rows if r["step"] == 100]
    whole = max(r["begin_ns"] + r["wall_ns"] for r in own) - min(r["begin_ns"] for r in own)
    assert account_of(path, kind="validate").length_s.tolist() == [seconds(whole)], "and not 10 s longer"
    assert item(account_of(path), "other", "validate") == seconds(300 * MS)


def test_ranks_that_take_no_part_in_a_validation_are_idle(tmp_path: Path) -> None:
    rows, records = simulated.train(entry(1, "ddp", "gloo", 2, 1), simulated.even(2))
    serial = simulated.serial_rows(entry(0, *simulated.SERIAL), {16: simulated.share_ns(2)})
    for found in (rows, serial):
        last = next(r for r in found if r["step"] == 7)
        blank = {f"{p}_{what}": 0 for p in PHASES for what in ("ns", "cpu_ns", "delay_ns")}
        work = {"wall_ns": 60 * MS, "forward_ns": 60 * MS, "forward_cpu_ns": 60 * MS, "images": 32}
        found.append(last | blank | work | {"kind": "validate", "step": 100, "begin_ns": last["begin_ns"] + 10**10})
    path = simulated.write(tmp_path, [(serial, []), (rows, records)], [simulated.SERIAL, ("ddp", "gloo", 2, 1)])
    account = account_of(path, kind="validate")
    assert account.items["other"]["begins late"].sum(0).tolist() == [0, seconds(60 * MS)]
    assert account.total("lost") == account.total("other") == seconds(60 * MS)


def test_without_a_reference_the_blocked_time_is_still_told(tmp_path: Path) -> None:
    trained = simulated.train(entry(0, "ddp", "gloo", 2, 1), simulated.even(2), style="fsdp")
    row = summarize(simulated.write(tmp_path, [trained], [("ddp", "gloo", 2, 1)])).rows[0]
    assert row.loss["transfer"] == seconds(2 * STEPS * 2 * 3 * MS)
    assert [row.lost_rank_s, row.residual_rank_s, row.loss["off_cpu"]] == [None] * 3


def test_the_contract_of_the_summary(tmp_path: Path) -> None:
    path = simulated.study(tmp_path, 2)
    summarize(path)
    rows = json.loads((path / "summary.json").read_text())["rows"]
    assert [list(row["loss"]) for row in rows] == [list(TERMS)] * 2
    assert set(rows[0]["loss"].values()) == {0.0}
    for term, parts in rows[1]["items"].items():
        assert sum(parts.values()) == pytest.approx(rows[1]["loss"][term], abs=1e-9)
    assert rows[1]["residual_fraction"] * 2 * rows[1]["total_s"] == pytest.approx(rows[1]["residual_rank_s"], abs=1e-9)


def test_points_have_an_interval_from_six_blocks_on(tmp_path: Path) -> None:
    account = account_of(simulated.study(tmp_path, 2, style="fsdp", blocks=6))
    points = account.points("transfer")
    assert points is not None
    assert points.kind == "interval"
    assert points.value == pytest.approx(100 * (account.total("transfer") or 0) / account.whole_s)
    few = account_of(simulated.study(tmp_path, 2, blocks=3)).points("lost")
    assert few is not None
    assert few.kind == "range"


@pytest.mark.parametrize("blocks", [5, 6, 12])
def test_points_lie_within_their_own_interval(tmp_path: Path, blocks: int) -> None:
    """In one step of one block rank 1 sleeps 3 s, which is most of what all the blocks take."""

    def once(rank: int, step: int, phase: str) -> simulated.Cost | None:
        return asleep(3000 * MS) if (rank, step, phase) == (1, 5, "backward") else None

    account = account_of(simulated.study(tmp_path, 2, blocks=blocks, extra=once))
    assert account.whole_s == pytest.approx(2 * (3 + blocks * 4 * (0.0505 + 0.003)))
    for term in ("lost", "residual", *TERMS):
        points = account.points(term)
        assert points is not None
        assert points.value == pytest.approx(100 * (account.total(term) or 0) / account.whole_s)
        assert points.low <= points.value <= points.high, term
        assert points.low >= 0 or term not in ("peer_wait", "queue", "transfer")
        assert points.high <= 100 or term not in ("lost", "peer_wait", "queue", "transfer")
    lost = account.points("lost")
    assert lost is not None
    assert lost.high > 70, "one block of several says little of the others"


def test_a_reference_has_lost_nothing_against_itself() -> None:
    """Batches of 50 and 30 images and the count of them, as a validation has: each size costs what it cost."""
    sizes, cost = np.array([50, 50, 30, 0]), np.array([51, 55, 31, 1]) * MS
    steps = {"block": np.ones(4, int), "rank": np.zeros(4, int), "images": sizes, "step": np.arange(4)}
    steps |= {f"{phase}_{what}": np.zeros(4, int) for phase in PHASES for what in ("ns", "cpu_ns", "delay_ns")}
    steps |= {"forward_cpu_ns": cost, "forward_ns": cost, "wall_ns": cost, "helpers_cpu_ns": np.zeros(4, int)}
    steps |= {"begin_ns": np.cumsum(cost), "kind": np.full(4, "validate")}
    none = select(steps, np.zeros(4, bool))
    reference = Reference.of(entry(0, *simulated.SERIAL), steps, none, ledger(steps, 1, none))
    found = share_cost(steps, (1,), 1, reference)
    assert found is not None
    assert found.sum() == pytest.approx(cost.sum() / 1e9, abs=1e-12)
    assert reference.cost(1, np.array([50.0, 40.0, 50.0])) == pytest.approx([0.053, 0.042, 0.053])
    assert reference.cost(1, np.array([50.0, 10.0])) == pytest.approx([0.053, 0.011]), "most of the images were"
    assert reference.cost(1, np.array([40.0, 10.0, 50.0, 0.0])) == pytest.approx([0.042, 0.011, 0.053, 0.001])
    assert reference.cost(1, np.array([40.0, 11.0, 50.0])) is None, "most images are in sizes that were not timed"
    assert reference.cost(1, np.array([40.0, 0.0, 0.0])) is None, "that size was not timed"
    assert reference.cost(1, np.array([0.0])) == pytest.approx([0.001])
    assert reference.cost(1, np.zeros(0)) is None


def test_of_one_size_a_smaller_batch_costs_its_part() -> None:
    reference = Reference(entry(0, *simulated.SERIAL), cast(Ledger, None), {1: {50: 0.05}})
    assert reference.cost(1, np.array([50.0, 30.0, 0.0, 50.0])) == pytest.approx([0.05, 0.03, 0, 0.05])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize("cause", ["sleep", "compute"])
def test_a_rank_that_is_always_last_and_never_waits_is_named_with_its_phase_and_cause(
    tmp_path: Path, style: str, ranks: int, phase: str, cause: str
) -> None:
    """Its collectives are done when it turns to them, if they take no time: what it did has no wait to begin with."""
    cost = asleep(10 * MS) if cause == "sleep" else (10 * MS, 10 * MS, 0)
    study = simulated.study(
        tmp_path,
        ranks,
        extra=lambda rank, _step, here: cost if (rank, here) == (1, phase) else None,
        style=style,
        network=Network(transfer_ns=0),
        steps=8,
    )
    late = row_of(study).late
    assert sum(one.rank_s for one in late) > 0.1
    assert {(one.rank, one.phase, one.cause) for one in late} == {(1, phase, cause)}
