"""The join of records and the split of blocked time, on records of any kind: whole, lost, doubled, out of order."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated
from accounts import account_of, closes, row_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from simulated import MS
from synthetic import START_NS, entry

from pneumo.study.account import TERMS
from pneumo.study.collectives import UNKNOWN, Group, durations, split
from pneumo.study.late import _excess
from pneumo.study.schema import PHASES
from pneumo.study.timeline import Waits

few = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
ns = st.integers(0, 50)


def group(enqueued: Any, started: Any, finished: Any, begin: Any, end: Any) -> Group:
    """A group in one step; None in a stamp is unknown."""
    stamps = [np.array([[UNKNOWN if x is None else x for x in row] for row in rows]) for rows in
              (enqueued, started, finished, begin, end)]  # fmt: skip
    k, n = stamps[0].shape
    zero = np.zeros(k, np.int64)
    return Group("all", np.arange(n), zero, zero, np.arange(k), *stamps, zero)


def test_the_three_parts_of_a_wait() -> None:
    parts = split(group([[0, 30]], [[35, 36]], [[50, 51]], [[10, 30]], [[60, 55]]))
    assert parts.peer_wait.tolist() == [[20, 0]]
    assert parts.queue.tolist() == [[5, 6]]
    assert parts.transfer.tolist() == [[25, 19]]
    assert parts.woken.tolist() == [[10, 4]]
    assert (parts.last.tolist(), parts.arrived_ns.tolist()) == ([1], [30])


def test_what_a_library_does_not_tell_is_transfer() -> None:
    parts = split(group([[0, 30]], [[None, None]], [[None, None]], [[10, None]], [[60, None]]))
    assert (parts.peer_wait.tolist(), parts.queue.tolist()) == ([[20, 0]], [[0, 0]])
    assert (parts.transfer.tolist(), parts.woken.tolist()) == ([[30, 0]], [[0, 0]])


stamp_rows = st.integers(2, 5).flatmap(
    lambda n: st.lists(
        st.lists(st.tuples(ns, ns, ns, ns, ns, st.booleans()), min_size=n, max_size=n), min_size=1, max_size=6
    )
)


@given(stamp_rows)
@settings(deadline=None)
def test_the_parts_are_never_negative_and_sum_to_the_wait(rows: list[list[tuple[Any, ...]]]) -> None:
    enqueued, started, finished, begin, length = ([[x[i] for x in row] for row in rows] for i in range(5))
    told = [[x[5] for x in row] for row in rows]

    def where_told(values: list[list[int]]) -> list[list[int | None]]:
        return [[v if t else None for v, t in zip(x, y, strict=True)] for x, y in zip(values, told, strict=True)]

    end = (np.array(begin) + np.array(length)).tolist()
    parts = split(group(enqueued, where_told(started), where_told(finished), begin, end))
    assert min(x.min() for x in (parts.peer_wait, parts.queue, parts.transfer, parts.woken)) >= 0
    assert (parts.peer_wait + parts.queue + parts.transfer).tolist() == length
    assert (parts.woken <= parts.transfer).all()
    for k, row in enumerate(begin):
        for r, b in enumerate(row):
            assert parts.peer_wait[k, r] == max(0, min(end[k][r], max(enqueued[k])) - b)


@given(st.lists(st.tuples(ns, ns), max_size=8), st.lists(st.integers(-5, 450), min_size=1, max_size=8))
def test_time_in_waits(pieces: list[tuple[int, int]], moments: list[int]) -> None:
    at, begin, end = 0, [], []
    for gap, length in pieces:
        begin.append(at + gap)
        at += gap + length
        end.append(at)
    first, last = np.array(begin, np.int64), np.array(end, np.int64)
    waits = Waits(first, last, last - first)
    expected = [sum(max(0, min(m, e) - b) for b, e in zip(begin, end, strict=True)) for m in moments]
    assert waits.until(np.array(moments)).tolist() == expected


def test_the_clock_free_duration_is_the_least_over_the_ranks() -> None:
    found = durations(
        [group([[0, 30], [60, 60]], [[None] * 2] * 2, [[50, 51], [70, None]], [[0] * 2] * 2, [[0] * 2] * 2)]
    )
    assert (found.collectives, found.clocked_s, found.clock_free_s) == (1, 41e-9, 42e-9)
    assert found.disagreement == pytest.approx(-1 / 42)
    assert durations([]).disagreement is None


costs = st.dictionaries(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from(["data", "forward", "backward", "optimizer"])),
    st.tuples(st.integers(0, 40), st.floats(0, 1), st.floats(0, 1)),
    max_size=8,
)


def extra_of(found: dict[Any, Any], order: list[int] | None = None) -> Any:
    def extra(rank: int, step: int, phase: str) -> simulated.Cost | None:
        who = order[rank] if order else rank
        one = found.get((who, step, phase))
        if one is None:
            return None
        # No two ranks arrive in the same nanosecond, however many costs each has: then either could be called late.
        wall = one[0] * MS + 13 * 10**who
        cpu = int(wall * one[1])
        return wall, cpu, int((wall - cpu) * one[2])

    return extra


@given(costs, st.sampled_from(simulated.STYLES), st.integers(0, 6), st.booleans(), st.booleans(), st.integers(2, 4))
@few
def test_any_interleaving_closes(
    tmp_path_factory: pytest.TempPathFactory,
    found: dict[Any, Any],
    style: str,
    transfer: int,
    start: bool,
    finish: bool,
    ranks: int,
) -> None:
    network = simulated.Network(MS, transfer * MS, start, finish)
    path = simulated.study(
        tmp_path_factory.mktemp("r"), ranks, extra=extra_of(found), style=style, network=network, blocks=1
    )
    row, account = row_of(path), account_of(path)
    assert closes(row)
    for term in ("peer_wait", "queue", "transfer"):
        values = account.terms[term]
        assert values is not None
        assert values.min() >= 0
    assert account.aside["hidden"].min() >= -1e-12
    assert float(account.items["other"]["waits without a record"].sum()) == pytest.approx(0, abs=1e-9)
    for term in ("off_cpu", "other", "transfer"):
        assert sum(float(v.sum()) for v in account.items[term].values()) == pytest.approx(account.total(term), abs=1e-9)
    slept = sum(float(account.aside[f"sleep in {p}"].sum()) for p in ("forward", "backward", "optimizer"))
    assert account.total("residual") == pytest.approx(slept, abs=1e-9)
    blamed = sum(late.rank_s for late in row.late)
    assert blamed == pytest.approx(row.loss["peer_wait"], abs=1e-9)


@given(costs, st.permutations(range(4)), st.sampled_from(simulated.STYLES))
@few
def test_swapping_ranks_permutes_the_answer(
    tmp_path_factory: pytest.TempPathFactory, found: dict[Any, Any], order: list[int], style: str
) -> None:
    own = {(r, s, "forward"): (r + 1, 1.0, 0.0) for r in range(4) for s in range(4)} | found
    paths = [
        simulated.study(tmp_path_factory.mktemp("r"), 4, extra=extra_of(own, o), style=style, blocks=1)
        for o in (None, order)
    ]
    plain, swapped = (account_of(path) for path in paths)
    for term in (*TERMS, "lost", "residual"):
        ours, theirs = plain.by_rank(term), swapped.by_rank(term)
        assert ours is not None
        assert theirs is not None
        assert theirs == pytest.approx(ours[order], abs=1e-9), term
    expected = {(x.rank, x.phase, x.cause, x.count): round(x.rank_s, 9) for x in plain.late}
    renamed = {(order[x.rank], x.phase, x.cause, x.count): round(x.rank_s, 9) for x in swapped.late}
    assert renamed == expected


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    serial = simulated.serial_rows(entry(0, *simulated.SERIAL), {8: 20 * MS})
    extra = extra_of({(1, 2, "data"): (9, 0.5, 0.5), (3, 1, "backward"): (20, 0.1, 0.1)})
    trained = simulated.train(entry(1, "ddp", "gloo", 4, 1), simulated.plus(simulated.even(4), extra))
    runs = [simulated.SERIAL, ("ddp", "gloo", 4, 1)]
    rows = [
        row_of(simulated.write(tmp_path / str(seed), [(serial, []), trained], runs, shuffle=seed))
        for seed in (None, 1, 2)
    ]
    assert rows[0] == rows[1] == rows[2]


@given(st.lists(st.integers(0, 63), min_size=1, max_size=5, unique=True))
@few
def test_a_lost_record_is_reported(tmp_path_factory: pytest.TempPathFactory, gone: list[int]) -> None:
    """Records 4k to 4k + 3 are one collective's: where all are lost, nothing says that there was one."""
    assume(not any(set(range(4 * k, 4 * k + 4)) <= set(gone) for k in range(16)))

    def lose(records: simulated.Rows) -> simulated.Rows:
        return [record for i, record in enumerate(records) if i not in gone]

    path = simulated.study(tmp_path_factory.mktemp("r"), 4, edit=lose)
    account = account_of(path)
    assert account.faults.lost == len(gone)
    assert account.faults
    assert any("has no record of step" in text for text in account.faults.examples)
    assert closes(row_of(path))


def test_a_doubled_record_counts_once(tmp_path: Path) -> None:
    paths = [simulated.study(tmp_path / str(n), 2, edit=lambda r, n=n: r + r[:n]) for n in (0, 3)]
    plain, doubled = (account_of(path) for path in paths)
    assert (plain.faults.doubled, doubled.faults.doubled) == (0, 3)
    assert plain.total("transfer") == doubled.total("transfer")


def test_a_record_of_no_step_or_rank_is_reported(tmp_path: Path) -> None:
    def wrong(records: simulated.Rows) -> simulated.Rows:
        return [*records, records[0] | {"step": 999}, records[0] | {"rank": 7, "seq": 50}]

    account = account_of(simulated.study(tmp_path, 2, edit=wrong))
    assert (account.faults.stray, account.faults.lost) == (2, 0)
    assert "a record of no step: block 1, step 999" in account.faults.examples


def test_a_rank_without_any_record_is_reported(tmp_path: Path) -> None:
    account = account_of(simulated.study(tmp_path, 4, edit=lambda rows: [r for r in rows if r["rank"] != 2]))
    assert account.faults.silent_ranks == (2,)
    assert float(account.items["other"]["waits without a record"][:, 2].sum()) > 0


def test_records_of_warm_up_and_of_other_groups_stay_apart(tmp_path: Path) -> None:
    def small(records: simulated.Rows) -> simulated.Rows:
        pairs = [r | {"group": f"pair {r['rank'] // 2}", "wait_begin_ns": None, "wait_end_ns": None} for r in records]
        return records + pairs

    plain = account_of(simulated.study(tmp_path / "a", 4))
    grouped = account_of(simulated.study(tmp_path / "b", 4, edit=small))
    assert not grouped.faults
    assert grouped.total("peer_wait") == plain.total("peer_wait")


def test_stamps_beyond_a_floats_precision_are_exact() -> None:
    base = START_NS
    parts = split(group([[base, base + 1]], [[None] * 2], [[None] * 2], [[base, base + 1]], [[base + 3, base + 3]]))
    assert parts.peer_wait.tolist() == [[1, 0]]
    assert parts.transfer.tolist() == [[2, 2]]


def test_phases_have_all_the_names(tmp_path: Path) -> None:
    rows, _ = simulated.train(entry(1, "ddp", "gloo", 2, 1), simulated.even(2))
    assert all(sum(row[f"{phase}_ns"] for phase in PHASES) == row["wall_ns"] for row in rows)


@given(st.integers(2, 6), st.integers(0, 10), st.floats(0, 0.7), st.integers(0, 2**31))
@settings(deadline=None)
def test_the_excess_over_the_median_of_the_others(ranks: int, rows: int, lost: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 9, (rows, ranks)).astype(np.float32)
    last = rng.integers(0, ranks, rows)
    gone = (rng.random((rows, ranks)) < lost) & (np.arange(ranks) != last[:, None])
    values[gone] = np.nan
    for row, r, found in zip(values.tolist(), last.tolist(), _excess(values, last).tolist(), strict=True):
        others = [x for i, x in enumerate(row) if i != r and x == x]
        assert found == (row[r] - statistics.median(others) if others else 0)
