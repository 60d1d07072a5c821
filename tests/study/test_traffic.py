"""What collectives move and for how long, against closed forms and a count in plain Python."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated
from accounts import account_of
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import MS, Network

from pneumo.study.collectives import UNKNOWN, Group, StepKeys
from pneumo.study.traffic import SMALL, traffic

BYTES = 1 << 20


def group(
    enqueued: list[list[int | None]],
    finished: list[list[int | None]],
    sizes: list[int],
    *,
    name: str = "all",
    blocks: list[int] | None = None,
) -> Group:
    stamps = [np.array([[UNKNOWN if x is None else x for x in row] for row in m]) for m in (enqueued, finished)]
    k, n = stamps[0].shape
    block = np.array(blocks or [0] * k)
    unknown = np.full((k, n), UNKNOWN)
    columns = (stamps[0], unknown, stamps[1], unknown, unknown, np.array(sizes))
    return Group(name, np.arange(n), np.zeros(k, np.int64), block, np.arange(k), *columns)


def keys(*steps_of_blocks: int) -> StepKeys:
    block = np.repeat(np.arange(len(steps_of_blocks)), steps_of_blocks)
    return StepKeys(block, np.arange(block.size), np.arange(len(steps_of_blocks)), np.zeros(0, np.int64))


def test_a_simulated_training(tmp_path: Path) -> None:
    """Two buckets of 1 MiB a step on 4 ranks, each 1 ms in the queue and 3 ms under way."""
    found = account_of(simulated.study(tmp_path, 4, network=Network(MS, 3 * MS), blocks=3)).traffic
    assert found.steps.tolist() == [4] * 3
    assert found.calls.tolist() == [4 * 4 * 2] * 3
    assert found.bytes.tolist() == found.moved_bytes.tolist() == [4 * 4 * 2 * BYTES] * 3
    assert found.busy_s == pytest.approx([4 * 4 * 2 * 0.004] * 3)
    assert (found.tells_start, found.tells_finish) == (True, True)


def test_what_a_library_does_not_tell(tmp_path: Path) -> None:
    network = Network(MS, 3 * MS, tells_start=False, tells_finish=False)
    found = account_of(simulated.study(tmp_path, 2, style="horovod", network=network)).traffic
    assert (found.tells_start, found.tells_finish) == (False, False)
    assert found.busy_s.tolist() == found.moved_bytes.tolist() == [0, 0]
    assert found.calls.tolist() == [16, 16]


def test_shared_time_counts_once_on_each_rank() -> None:
    """The second collective arrives while the first is under way on rank 0, and after its end on rank 1."""
    one = group([[0, 5], [6, 8]], [[20, 7], [30, 12]], [100, 10])
    found = traffic([one], keys(1))
    assert found.busy_s[0] * 1e9 == pytest.approx((30 - 5) + (7 - 5) + (12 - 8))
    assert found.moved_bytes.tolist() == [220]


def test_lost_records_and_unknown_ends_move_nothing_that_can_be_timed() -> None:
    found = traffic([group([[0, None], [10, 12]], [[9, None], [None, 15]], [100, 10])], keys(1))
    assert (found.calls.tolist(), found.bytes.tolist()) == ([4], [220])
    assert (found.moved_bytes.tolist(), (found.busy_s * 1e9).round().tolist()) == ([10], [3])


def test_small_sums_are_counted_and_no_measure_of_bandwidth() -> None:
    large, small = (group([[0, 1]], [[9, 9]], [100], name=name) for name in ("2 ranks", SMALL))
    found = traffic([large, small], keys(1))
    assert (found.calls.tolist(), found.bytes.tolist()) == ([4], [400])
    assert (found.moved_bytes.tolist(), (found.busy_s * 1e9).round().tolist()) == ([200], [16])


def test_no_records() -> None:
    found = traffic([], keys(2, 3))
    assert (found.steps.tolist(), found.calls.tolist(), found.busy_s.tolist()) == ([2, 3], [0, 0], [0, 0])


maybe = st.one_of(st.none(), st.integers(0, 60))


@given(
    st.integers(1, 3).flatmap(
        lambda n: st.lists(
            st.tuples(*[st.lists(values, min_size=n, max_size=n) for values in (st.integers(0, 60), maybe)]),
            min_size=1,
            max_size=6,
        )
    ),
    st.randoms(use_true_random=False),
)
@settings(deadline=None)
def test_busy_is_the_union_of_the_intervals_in_any_order_and_piece(rows: list[tuple[Any, Any]], random: Any) -> None:
    n = len(rows[0][0])
    expected = 0
    for rank in range(n):
        told = [(max(enqueued), finished[rank]) for enqueued, finished in rows if finished[rank] is not None]
        expected += len(set(itertools.chain.from_iterable(range(a, b) for a, b in told)))
    random.shuffle(rows)
    one = group([list(row[0]) for row in rows], [list(row[1]) for row in rows], [1] * len(rows))
    with pytest.MonkeyPatch.context() as patch:
        for chunk in (1, 1 << 20):
            patch.setattr("pneumo.study.traffic.CHUNK", chunk)
            assert traffic([one], keys(1)).busy_s[0] * 1e9 == pytest.approx(expected)
            turned = replace(one, enqueued_ns=one.enqueued_ns[:, ::-1], finished_ns=one.finished_ns[:, ::-1])
            assert traffic([turned], keys(1)).busy_s[0] * 1e9 == pytest.approx(expected)
