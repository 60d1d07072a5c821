"""Hidden communication: closed forms of simulated trainings, and a count of every nanosecond in plain Python."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated
from accounts import account_of
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import MS, Network

from pneumo.study.collectives import UNKNOWN, Group
from pneumo.study.ledger import blocked

Moments = st.lists(st.integers(0, 60), min_size=2, max_size=2)
Stamps = st.tuples(Moments, *[st.lists(st.one_of(st.none(), st.integers(0, 60)), min_size=2, max_size=2)] * 2)


@pytest.mark.parametrize("tells_start", [True, False])
def test_queued_buckets_hide_no_more_than_there_was_time_for(tmp_path: Path, tells_start: bool) -> None:
    """Six buckets of 20 ms, enqueued every 5 ms: the first is under way from 5 to 25 ms, the others queue behind it.

    Of the 30 ms of the backward pass 25 are left after the first bucket is ready; then the rank waits.
    """
    network = Network(transfer_ns=20 * MS, tells_start=tells_start)
    account = account_of(simulated.study(tmp_path, 2, network=network, buckets=6))
    assert account.aside["hidden"] == pytest.approx(np.full((2, 2), 4 * 0.025))


def group(name: str, rows: list[Any], block: list[int]) -> Group:
    """Collectives of two ranks: rows of (enqueued, started, finished)."""
    stamps = [np.array([[UNKNOWN if x is None else x for x in row[i]] for row in rows]) for i in range(3)]
    unknown, order = np.full((len(rows), 2), UNKNOWN), np.arange(len(rows))
    return Group(name, np.arange(2), order * 0, np.array(block), order, *stamps, unknown, unknown.copy(), order)


@given(st.lists(Stamps, min_size=1, max_size=5), st.lists(Stamps, min_size=1, max_size=5), st.integers(0, 60))
@settings(deadline=None)
def test_hidden_is_the_union_less_the_waits(first: list[Any], second: list[Any], wait: int) -> None:
    """Of two groups; block 1 is block 0 again, 1000 ns later; each rank waits for 20 ns on the first collective."""
    groups = []
    for name, rows in (("a", first), ("b", second)):
        later = [tuple([None if x is None else x + 1000 for x in part] for part in row) for row in rows]
        one = group(name, rows + later, [0] * len(rows) + [1] * len(rows))
        if name == "a":
            one.wait_begin_ns[0], one.wait_end_ns[0] = wait, wait + 20
        groups.append(one)
    for rank in range(2):
        under_way: set[int] = set()
        for enqueued, started, finished in first + second:
            if finished[rank] is not None:
                under_way |= set(range(max(*enqueued, started[rank] or 0), finished[rank]))
        found = 1e9 * blocked(groups, (2, 2)).hidden[:, rank]
        expected = [len(under_way - set(range(wait, wait + 20))), len(under_way)]
        assert found == pytest.approx(expected, abs=1e-6)
