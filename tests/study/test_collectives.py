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
from pneumo.study.faults import Fault
from pneumo.study.late import _excess
from pneumo.study.schema import PHASES
from pneumo.study.sentences import FAULTS, sentences
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
    assert account.faults["lost"].count == len(gone)
    assert account.faults["lost"].examples[0] == f"rank {min(gone) % 4}, block {min(gone) // 32 + 1}, " + (
        f"step {min(gone) // 8}, seq {min(gone) // 4}, group 4 ranks"
    )
    assert closes(row_of(path))


def test_a_doubled_record_counts_once(tmp_path: Path) -> None:
    paths = [simulated.study(tmp_path / str(n), 2, edit=lambda r, n=n: r + r[:n]) for n in (0, 3)]
    plain, doubled = (account_of(path) for path in paths)
    assert (plain.faults, doubled.faults["doubled"].count) == ({}, 3)
    assert plain.total("transfer") == doubled.total("transfer")


def test_a_record_of_no_step_or_rank_is_reported(tmp_path: Path) -> None:
    def wrong(records: simulated.Rows) -> simulated.Rows:
        return [*records, records[0] | {"step": 999}, records[0] | {"rank": 7, "seq": 50}]

    account = account_of(simulated.study(tmp_path, 2, edit=wrong))
    assert account.faults == {
        "stray": Fault(
            2, ("rank 0, block 1, step 999: no step of the run", "rank 7, block 1, step 0: no rank of the run")
        )
    }


def at(record: dict[str, Any], **which: int) -> bool:
    return all(record[name] == value for name, value in which.items())


def test_a_rank_without_any_record_is_reported(tmp_path: Path) -> None:
    plain = account_of(simulated.study(tmp_path / "a", 4, extra=LATE))
    account = account_of(
        simulated.study(tmp_path / "b", 4, extra=LATE, edit=lambda rows: [r for r in rows if r["rank"] != 2])
    )
    assert account.faults == {"silent": Fault(1, ("rank 2",))}
    without, of_lost = (account.items["other"][name].sum(0) for name in (WITHOUT, OF_LOST))
    waited = sum(plain.by_rank(term) for term in WAITS)  # type: ignore[misc]
    assert without == pytest.approx(np.where(np.arange(4) == 2, waited, 0), abs=1e-9)
    # Nobody knows when rank 2 came: after the last of the others all is untold.
    assert of_lost == pytest.approx(np.where(np.arange(4) == 2, 0, waited), abs=1e-9)
    assert [account.total(term) for term in WAITS] == [0, 0, 0]
    assert account.late == []


LATE = extra_of({(2, s, "forward"): (40, 1.0, 0.0) for s in range(8)})
WAITS = ("peer_wait", "queue", "transfer")
WITHOUT, OF_LOST = "waits without a record", "waits on collectives with lost records"


def impossible(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"enqueued_ns": record["enqueued_ns"] + 10**12}


def backwards(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"wait_end_ns": record["wait_begin_ns"] - MS}


@pytest.mark.parametrize("change", [None, impossible, backwards])
def test_waits_for_a_rank_of_which_nothing_is_known_are_no_transfer(tmp_path: Path, change: Any) -> None:
    """Rank 2, the late one, has lost its record of step 3's first bucket, or has one that cannot be."""

    def edit(records: simulated.Rows) -> simulated.Rows:
        here = [i for i, record in enumerate(records) if at(record, rank=2, step=3, seq=6)]
        assert len(here) == 1
        return [*records[: here[0]], *([change(records[here[0]])] if change else []), *records[here[0] + 1 :]]

    plain = simulated.study(tmp_path / "a", 4, extra=LATE, style="fsdp")
    damaged = simulated.study(tmp_path / "b", 4, extra=LATE, style="fsdp", edit=edit)
    before, after = account_of(plain), account_of(damaged)
    where = "rank 2, block 1, step 3, seq 6, group 4 ranks"
    assert after.faults == {"impossible" if change else "lost": Fault(1, (where,))}
    lost = {term: (before.total(term) or 0.0) - (after.total(term) or 0.0) for term in WAITS}
    # Three ranks waited for the fourth's 40 ms and its few ns beyond, then each of the four 3 ms for the transfer.
    assert lost["peer_wait"] == pytest.approx(3 * 0.0400013, abs=1e-9)
    assert (lost["queue"], lost["transfer"]) == pytest.approx((0, 4 * 0.003), abs=1e-9)
    items = after.items["other"]
    assert float(items[WITHOUT].sum()) == pytest.approx(0.003, abs=1e-9)
    assert float(items[OF_LOST].sum()) == pytest.approx(3 * 0.0430013, abs=1e-9)
    assert items[OF_LOST][:, 2].tolist() == [0, 0]
    assert closes(row_of(damaged))
    assert (before.late[0].count, after.late[0].count) == (8, 7)


@pytest.mark.parametrize(
    ("about", "reported"), [({"op": "broadcast"}, 1), ({"dtype": "int64"}, 1), ({"bytes": 4}, 1), ({"bound": "x"}, 0)]
)
def test_ranks_that_do_not_do_the_same_are_reported(tmp_path: Path, about: dict[str, Any], reported: int) -> None:
    def edit(records: simulated.Rows) -> simulated.Rows:
        return [record | about if at(record, rank=1, seq=5) else record for record in records]

    faults = account_of(simulated.study(tmp_path, 4, edit=edit)).faults
    told = {"mismatched": Fault(1, ("block 1, step 2, seq 5, group 4 ranks",))}
    assert faults == (told if reported else {})


def test_what_differs_by_nature_is_not_reported(tmp_path: Path) -> None:
    """The root of a gather has more bytes than the others; of a message one side sends and the other receives."""

    def edit(records: simulated.Rows) -> simulated.Rows:
        gathers = [r | {"op": "gather", "bytes": 4 if r["rank"] else 16} for r in records]
        messages = [
            r | {"group": "4 ranks, 0 to 1", "op": "recv" if r["rank"] else "send"} for r in records if r["rank"] < 2
        ]
        return gathers + messages

    assert account_of(simulated.study(tmp_path, 4, edit=edit)).faults == {}


@pytest.mark.parametrize("seq", [2, 3, 15])
def test_a_collective_missing_on_all_ranks_leaves_a_gap_in_the_numbers(tmp_path: Path, seq: int) -> None:
    """Numbers 2 to 7 are those of steps 1 to 3; after 15, the last one, nothing tells that it is missing."""
    account = account_of(simulated.study(tmp_path, 4, edit=lambda rows: [r for r in rows if r["seq"] != seq]))
    where = f"after block 1, step {(seq - 1) // 2}, seq {seq - 1}, group 4 ranks"
    assert account.faults == ({"gaps": Fault(1, (where,))} if seq < 15 else {})


def test_a_number_of_a_record_elsewhere_is_no_gap(tmp_path: Path) -> None:
    """A collective that ends after its step is recorded with the next one; small sums between steps are not."""

    def later(records: simulated.Rows) -> simulated.Rows:
        small = [r | {"group": "small", "seq": 10 * r["seq"]} for r in records if r["seq"] % 2]
        return [r | {"step": 2} if r["seq"] == 2 else r for r in records] + small

    assert account_of(simulated.study(tmp_path, 4, edit=later)).faults == {}


def test_all_that_is_wrong_is_said_once(tmp_path: Path) -> None:
    def wrong(records: simulated.Rows) -> simulated.Rows:
        kept = [r for r in records if not at(r, rank=1, seq=3) and r["seq"] != 5]
        return [*kept, kept[0], records[0] | {"step": 999}]

    path = simulated.study(tmp_path, 2, edit=wrong)
    account = account_of(path)
    said = [one.text for one in sentences(row_of(path), account, 2)]
    assert set(account.faults) == {"lost", "gaps", "doubled", "stray"}
    for kind, fault in account.faults.items():
        words = f"{FAULTS[kind][0]}: {fault.count} ({fault.examples[0]})"
        assert sum(words.lower() in text.lower() for text in said) == 1, said


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
