"""Tensors are found again in the responses in which they travelled, by their bytes and by when they were enqueued."""

import itertools
import time
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pneumo.timing.responses import MOST_TRIES, assign

Case = tuple[list[int], list[list[int]]]  # the tensors' sizes, and the tensors of each response


def totals(sizes: Sequence[int], parts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(sizes[i] for i in part) for part in parts]


def ready(parts: Sequence[Sequence[int]]) -> list[int]:
    """How many tensors had been enqueued when each response began, if it began as soon as all of its own had."""
    return list(itertools.accumulate((1 + max(part) for part in parts), max))


@st.composite
def partitions(draw: st.DrawFn, most: int = 9, largest: int = 12) -> Case:
    """Any partition, responses in any order; few sizes, so that many are equal and most cases have many solutions."""
    sizes = draw(st.lists(st.integers(1, largest), min_size=1, max_size=most))
    owner = draw(st.lists(st.integers(0, len(sizes) - 1), min_size=len(sizes), max_size=len(sizes)))
    parts = [[i for i, of in enumerate(owner) if of == response] for response in sorted(set(owner))]
    return sizes, draw(st.permutations(parts))


@given(partitions())
def test_a_partition_is_found_again_as_one_with_equal_sums(case: Case) -> None:
    sizes, parts = case
    found = assign(sizes, totals(sizes, parts))
    assert found is not None
    assert sorted(i for part in found for i in part) == list(range(len(sizes))), "each tensor travels once"
    assert totals(sizes, found) == totals(sizes, parts)
    assert all(part == sorted(part) for part in found)


@given(partitions())
def test_no_response_holds_a_tensor_that_was_enqueued_later(case: Case) -> None:
    sizes, parts = case
    found = assign(sizes, totals(sizes, parts), ready(parts))
    assert found is not None, "the truth is a solution"
    assert totals(sizes, found) == totals(sizes, parts)
    assert all(max(part) < limit for part, limit in zip(found, ready(parts), strict=True))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.lists(st.integers(1, 9), min_size=1, max_size=3))
def test_what_a_search_of_all_possibilities_finds_is_found_and_nothing_else(sizes: list[int], sums: list[int]) -> None:
    """Of all solutions the first by which tensors are in the first response, then in the second, and so on."""
    solutions = []
    for owner in itertools.product(range(len(sums)), repeat=len(sizes)):
        parts = [[i for i, of in enumerate(owner) if of == response] for response in range(len(sums))]
        if totals(sizes, parts) == sums:
            solutions.append(parts)
    assert assign(sizes, sums) == min(solutions, default=None)


@given(st.lists(st.integers(0, 60).map(lambda power: 1 << power), min_size=1, max_size=9, unique=True), st.data())
def test_where_the_sums_tell_all_it_is_the_truth(sizes: list[int], data: st.DataObject) -> None:
    """No two sets of different powers of two have the same sum."""
    owner = data.draw(st.lists(st.integers(0, 4), min_size=len(sizes), max_size=len(sizes)))
    parts = [[i for i, of in enumerate(owner) if of == response] for response in sorted(set(owner))]
    parts = sorted(parts, key=max)  # a response cannot travel before it is complete
    assert assign(sizes, totals(sizes, parts), ready(parts)) == parts


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.data())
def test_tensors_that_are_fused_in_order_are_found_without_a_search(sizes: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sizes) - 1), max_size=20))) if len(sizes) > 1 else []
    parts = [list(range(a, b)) for a, b in itertools.pairwise([0, *cuts, len(sizes)])]
    assert assign(sizes, totals(sizes, parts)) == parts


def test_of_two_solutions_that_one_is_taken_which_had_been_enqueued() -> None:
    """By its bytes alone the first response might hold the third tensor, which came when it was on its way."""
    assert assign([1, 2, 1], [2, 2]) == [[0, 2], [1]]
    assert assign([1, 2, 1], [2, 2], [2, 3]) == [[1], [0, 2]]
    assert assign([1, 2, 1], [2, 2], [1, 3]) is None


def test_nothing_is_in_nothing_and_other_bytes_are_no_solution() -> None:
    assert assign([], []) == []
    assert assign([], [4]) is None
    assert assign([4], []) is None
    assert assign([4, 4], [4]) is None
    assert assign([4], [4, 4]) is None
    assert assign([2, 4], [3, 3]) is None


def test_a_thousand_tensors_are_no_deep_recursion() -> None:
    found = assign([64] * 1000, [64 * 4] * 250)
    assert found == [list(range(i, i + 4)) for i in range(0, 1000, 4)]


def test_a_search_without_an_end_is_given_up_in_time() -> None:
    """Even numbers never add up to odd ones, which a search only sees when it has tried all."""
    sizes = [2 * i for i in range(101, 131)]
    half = sum(sizes) // 2
    begin = time.process_time()
    assert assign(sizes, [half - half % 2 + 1, sum(sizes) - half + half % 2 - 1]) is None
    assert time.process_time() - begin < MOST_TRIES * 100e-6
