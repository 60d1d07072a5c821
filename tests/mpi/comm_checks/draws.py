"""Collectives at random: hypothesis draws one after the other, and a long program has many in flight at once."""

import time
from collections import deque
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from comm_checks.cases import KINDS, SAME_PATTERN, Case, begin
from comm_checks.reference import DTYPES, OPS, allows
from comm_checks.world import Ranks, rng

COUNTS = (0, 1, 2, 3, 7, 16, 63, 64, 65, 100, 1000, 4097)
LARGE = (8191, 8192, 8193, 20_000, 70_000)


@st.composite
def cases(draw: st.DrawFn, size: int) -> tuple[tuple[int, ...], Case, bool]:
    """The ranks of a group, a collective for them, and whether it is asynchronous."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    dtype = draw(st.sampled_from(DTYPES))
    ops = [op for op in OPS if allows(op, dtype) and not (dtype.is_complex and op == "AVG")]
    group = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))
    shape = draw(st.lists(st.integers(0, 9), max_size=3) | st.sampled_from([[count] for count in COUNTS + LARGE]))
    case = Case(
        kind,
        dtype,
        tuple(shape),
        draw(st.sampled_from(ops)),
        draw(st.integers(0, len(group) - 1)),
        draw(st.integers(0, 2**20)),
        draw(st.booleans()),
    )
    return tuple(group), case, draw(st.booleans())


def check_whatever_hypothesis_draws(ranks: Ranks) -> None:
    """All ranks draw the same, for the draws are derandomized and every example ends alike on all of them.

    So they also shrink together when one fails. No limit of time may end an example on one rank only.
    """

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=200 if ranks.size < 7 else 40,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(ranks.size))
    def holds(drawn: tuple[tuple[int, ...], Case, bool]) -> None:
        members, case, asynchronous = drawn

        def run() -> None:
            if ranks.rank in members:
                work, verify = begin(case, group, asynchronous)
                if work is not None:
                    work.wait()
                verify()

        assert len(set(ranks.share(repr(drawn)))) == 1, "the ranks drew different examples"
        group = ranks.group(members)
        ranks.together(run)

    holds()


def random_case(random: np.random.Generator, size: int, key: int) -> Case:
    """A collective for a group of some ranks, mostly small."""
    kind = str(random.choice(sorted(KINDS)))
    dtype = DTYPES[random.integers(len(DTYPES))]
    ops = [op for op in OPS if allows(op, dtype) and not (dtype.is_complex and op == "AVG")]
    counts = LARGE if random.random() < 0.08 else COUNTS
    shape = (int(random.choice(counts)),)
    return Case(kind, dtype, shape, str(random.choice(ops)), int(random.integers(size)), key)


def merged(random: np.random.Generator, batch: list[tuple[int, Case]]) -> list[tuple[int, Case]]:
    """The batch in another order, but the collectives of each group in theirs."""
    queues: dict[int, deque[Case]] = {}
    for group, case in batch:
        queues.setdefault(group, deque()).append(case)
    order = []
    while queues:
        group = int(random.choice(sorted(queues)))
        order.append((group, queues[group].popleft()))
        if not queues[group]:
            del queues[group]
    return order


def settle(future: Any) -> None:
    """Wait without taking part in what the future waits for; where nobody else does either, say so."""
    deadline = time.monotonic() + 30
    while not future.done():
        assert time.monotonic() < deadline, "a future is not completed after 30 s"
        time.sleep(0.0002)
    future.wait()


def check_thousands_in_overlapping_groups(ranks: Ranks) -> None:
    """Rounds of asynchronous calls, which every rank issues and awaits in an order of its own, and synchronous ones."""
    everywhere = rng("program", ranks.size)
    own = rng("own order", ranks.size, ranks.rank)
    members = [tuple(ranks.everybody)] * 2
    for _ in range(6):
        size = everywhere.integers(1, ranks.size + 1)
        members.append(tuple(sorted(everywhere.choice(ranks.size, size, replace=False).tolist())))
    groups = [ranks.fresh(some) for some in members]
    key = done = 0
    for _ in range(400 if ranks.size < 7 else 120):
        batches: list[list[tuple[int, Case]]] = []
        for count in (everywhere.integers(1, 14), everywhere.integers(0, 4)):
            chosen = everywhere.integers(len(groups), size=count).tolist()
            batches.append([(k, random_case(everywhere, len(members[k]), key + i)) for i, k in enumerate(chosen)])
            key += len(chosen)
        mine = [[(k, case) for k, case in batch if ranks.rank in members[k]] for batch in batches]
        under_way: list[Any] = [begin(case, groups[k], True) for k, case in merged(own, mine[0])]
        for k, case in mine[1]:
            _, verify = begin(case, groups[k], False)
            verify()
        for index in own.permutation(len(under_way)):
            work, verify = under_way[index]
            if own.random() < 0.3 and isinstance(work, dist.Work):
                settle(work.get_future())
            else:
                work.wait()
            verify()
        done += sum(len(part) for part in mine)
    assert sum(ranks.share(done)) > 1000 * min(ranks.size, 2), "the program is worth its name"
    for group in groups:
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def check_cases_can_fail(ranks: Ranks) -> None:
    """Says of the checks before that they can fail: the last rank brings other values, and somebody finds that out."""
    if ranks.size == 1:
        return
    last = ranks.size - 1
    for kind in sorted(KINDS):
        key = SAME_PATTERN if ranks.rank == last else 0
        _, verify = begin(Case(kind, torch.float32, (3,), "SUM", 0, key), ranks.pneumo, False)
        try:
            verify()
        except AssertionError:
            found = True
        else:
            found = False
        assert any(ranks.share(found)), kind
