"""Backends against each other, on trainings whose every term is known."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import simulated
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import MS, Cost, Network, asleep
from synthetic import entry

from pneumo.study.results import load_summary
from pneumo.study.rivals import OPPOSITE, TERMS, Steps, against, compare_steps, rivals
from pneumo.study.schema import Figures, Pair, Rivals, Spread
from pneumo.study.statistics import MARGIN
from pneumo.study.summary import summarize

DDP, FSDP, HOROVOD = (("ddp", "gloo"), ("fsdp", "gloo"), ("horovod", "mpi"))
COMPUTE = sum(simulated.WHOLE.values()) / 1e9
PARTS = ("outside_s", "exposed_s", "peer_wait_s", "queue_s", "transfer_s", "hidden_s")
SLOW, FAST = Network(MS, 8 * MS), Network(MS, 3 * MS)


def nothing(_rank: int, _step: int, _phase: str) -> Cost | None:
    return None


def write(
    out: Path,
    *runs: tuple[tuple[str, str], Network],
    ranks: int = 4,
    blocks: int = 6,
    serial: bool = True,
    extra: Callable[[int, int, str], Cost | None] = nothing,
) -> Path:
    """A result of these parallel runs, with a serial one before them where wanted."""
    names = [simulated.SERIAL] * serial + [(*kind, ranks, 1) for kind, _ in runs]
    made = [(simulated.serial_rows(entry(0, *simulated.SERIAL), {}, blocks=blocks), [])] if serial else []
    for i, (kind, network) in enumerate(runs, serial):
        work = simulated.plus(simulated.even(ranks), extra)
        made.append(simulated.train(entry(i, *kind, ranks, 1), work, network, style=kind[0], blocks=blocks))
    return simulated.write(out, made, names)


def comparison(path: Path) -> Rivals:
    (found,) = summarize(path, write=False).comparisons
    return found


def terms_of(run: Figures) -> list[float | None]:
    return [getattr(run, name) for name in PARTS]


def median_of(pair: Pair, term: str) -> float:
    found = pair.seconds[term]
    assert found is not None
    return found.estimate.median


def test_every_term_of_ddp_and_of_fsdp(tmp_path: Path) -> None:
    """Of two buckets DDP waits only for the second, the first is hidden; FSDP waits for both."""
    found = comparison(write(tmp_path, (DDP, FAST), (FSDP, FAST)))
    assert (found.ranks, found.threads, [run.run for run in found.runs]) == (4, 1, [1, 2])
    outside = COMPUTE / 4
    ddp, fsdp = found.runs
    assert terms_of(ddp) == pytest.approx([outside, 0.004, 0, 0.001, 0.003, 0.003])
    assert terms_of(fsdp) == pytest.approx([outside, 0.008, 0, 0.002, 0.006, 0])
    assert (ddp.step_s.median, fsdp.step_s.median) == pytest.approx((outside + 0.004, outside + 0.008))
    for run in found.runs:
        assert (run.blocks, run.calls, run.bytes) == (6, 2, 2 << 20)
        assert run.bytes_per_s == pytest.approx((1 << 20) / 0.004)


def test_a_late_rank_is_peer_wait_in_the_mean_of_the_ranks(tmp_path: Path) -> None:
    """Rank 1 is 10 ms late at both buckets; the others wait 2.5 ms for the first and 3.5 for the second."""

    def late(rank: int, _step: int, phase: str) -> Cost | None:
        return asleep(10 * MS) if (rank, phase) == (1, "backward") else None

    run = comparison(write(tmp_path, (DDP, FAST), (HOROVOD, FAST), extra=late)).runs[0]
    assert run.peer_wait_s == pytest.approx(3 * 0.006 / 4)
    assert run.queue_s == pytest.approx((3 * 0.002 + 0.001) / 4)
    assert run.transfer_s == pytest.approx((3 * 0.006 + 0.003) / 4)
    assert run.step_s.median == pytest.approx((run.outside_s or 0) + (run.exposed_s or 0))


def test_a_rank_without_a_core_is_off_cpu_within_outside(tmp_path: Path) -> None:
    def crowded(_rank: int, _step: int, phase: str) -> Cost | None:
        return (20 * MS, 0, 20 * MS) if phase == "forward" else None

    found = comparison(write(tmp_path, (DDP, FAST), (FSDP, FAST), extra=crowded))
    for run in found.runs:
        assert (run.outside_s, run.off_cpu_s) == pytest.approx((COMPUTE / 4 + 0.020, 0.020))
    assert median_of(found.pairs[0], "off_cpu_s") == pytest.approx(0, abs=1e-12)


def test_the_parts_of_a_step_and_of_a_difference_are_the_whole(tmp_path: Path) -> None:
    def late(rank: int, step: int, phase: str) -> Cost | None:
        return asleep(step % 4 * rank * MS) if phase == "forward" else None

    found = comparison(write(tmp_path, (DDP, FAST), (FSDP, SLOW), extra=late))
    for run in found.runs:
        assert run.exposed_s == pytest.approx(sum(t or 0 for t in (run.peer_wait_s, run.queue_s, run.transfer_s)))
        assert run.step_s.median == pytest.approx((run.outside_s or 0) + (run.exposed_s or 0))
    (pair,) = found.pairs
    step = found.runs[1].step_s.median - found.runs[0].step_s.median
    assert median_of(pair, "outside_s") + median_of(pair, "exposed_s") == pytest.approx(step)
    assert median_of(pair, "peer_wait_s") + median_of(pair, "queue_and_transfer_s") == pytest.approx(
        median_of(pair, "exposed_s")
    )


def test_the_difference_of_each_term_has_its_verdict(tmp_path: Path) -> None:
    """FSDP over the slow network takes 13 ms more of transfer, far above 5 % of a step, and 1 ms more of queue."""
    (pair,) = comparison(write(tmp_path, (DDP, FAST), (FSDP, SLOW))).pairs
    fast, slow = COMPUTE / 4 + 0.004, COMPUTE / 4 + 0.018
    assert (pair.ours, pair.theirs, pair.blocks, pair.interval_kind) == (2, 1, 6, "interval")
    assert pair.speed.estimate.median == pytest.approx(fast / slow)
    assert pair.speed.verdict.verdict == "slower"
    known = {"outside_s": 0, "exposed_s": 0.014, "peer_wait_s": 0, "queue_s": 0.001, "transfer_s": 0.013}
    for term, value in known.items():
        assert median_of(pair, term) == pytest.approx(value, abs=1e-12), term
        found = pair.seconds[term]
        assert found is not None
        assert found.verdict.margin == pytest.approx(MARGIN * fast)
        assert found.verdict.verdict == ("slower" if value > MARGIN * fast else "equivalent"), term
    assert pair.bandwidth is not None
    assert pair.bandwidth.estimate.median == pytest.approx(4 / 9)


def test_a_library_that_tells_nothing_is_compared_in_what_is_known(tmp_path: Path) -> None:
    silent = Network(MS, 3 * MS, tells_start=False, tells_finish=False)
    found = comparison(write(tmp_path, (DDP, FAST), (HOROVOD, silent)))
    horovod, (pair,) = found.runs[1], found.pairs
    assert (horovod.queue_s, horovod.hidden_s, horovod.bytes_per_s) == (None, None, None)
    assert horovod.transfer_s == horovod.exposed_s == pytest.approx(0.004)
    assert [term for term in TERMS if pair.seconds[term] is None] == ["queue_s", "transfer_s", "hidden_s"]
    assert pair.bandwidth is None
    assert median_of(pair, "queue_and_transfer_s") == pytest.approx(0, abs=1e-12)
    assert pair.speed.verdict.verdict == "equivalent"


def test_two_libraries_that_tell_no_start_are_compared_in_transfer(tmp_path: Path) -> None:
    fast, slow = (Network(MS, ms * MS, tells_start=False) for ms in (3, 8))
    (pair,) = comparison(write(tmp_path, (FSDP, fast), (FSDP, slow))).pairs
    assert pair.seconds["queue_s"] is None
    assert median_of(pair, "transfer_s") == pytest.approx(0.010)


def test_one_record_for_a_fused_response_or_for_each_tensor(tmp_path: Path) -> None:
    """The calls differ, bytes and blocked time do not."""
    found = []
    for i, buckets in enumerate((2, 4)):
        run = entry(1, *HOROVOD, 2, 1)
        rows, records = simulated.train(run, simulated.even(2), FAST, style="horovod", blocks=6, buckets=2)
        if buckets == 4:
            halves = [r | {"bytes": r["bytes"] // 2, "seq": 2 * r["seq"] + j} for r in records for j in (0, 1)]
            # The wait for a tensor that came with another one is over as it begins.
            records = [r | ({"wait_begin_ns": r["wait_end_ns"]} if r["seq"] % 2 else {}) for r in halves]
        other = simulated.train(entry(0, *DDP, 2, 1), simulated.even(2), FAST, blocks=6)
        names = [(*DDP, 2, 1), (*HOROVOD, 2, 1)]
        found.append(comparison(simulated.write(tmp_path / str(i), [other, (rows, records)], names)).runs[1])
    fused, each = found
    assert (fused.calls, each.calls) == (2, 4)
    assert fused.bytes == each.bytes
    assert terms_of(fused)[:5] == pytest.approx(terms_of(each)[:5])
    assert fused.bytes_per_s == pytest.approx(each.bytes_per_s)


def test_runs_are_compared_where_ranks_and_threads_are_the_same(tmp_path: Path) -> None:
    kinds = [simulated.SERIAL, *((*kind, n, t) for kind in (DDP, FSDP, HOROVOD) for n, t in ((2, 1), (4, 1), (2, 2)))]
    found = summarize(synthetic.write_result(tmp_path, [*kinds[:6], kinds[8]], cores=4), write=False).comparisons
    assert [(c.ranks, c.threads, [r.run for r in c.runs]) for c in found] == [(2, 1, [1, 4]), (4, 1, [2, 5, 6])]
    assert [(pair.ours, pair.theirs) for pair in found[1].pairs] == [(5, 2), (6, 2), (6, 5)]


@pytest.mark.parametrize(
    "runs", [[], [simulated.SERIAL], [simulated.SERIAL, (*DDP, 2, 1)], [("ddp", "gloo", 1, 1)] * 2]
)
def test_without_two_parallel_runs_there_is_no_comparison(
    tmp_path: Path, runs: list[tuple[str, str, int, int]]
) -> None:
    assert summarize(synthetic.write_result(tmp_path, runs)).comparisons == []


def test_without_a_serial_run(tmp_path: Path) -> None:
    alone, beside = (
        comparison(write(tmp_path / str(serial), (DDP, FAST), (FSDP, SLOW), serial=serial)) for serial in (False, True)
    )
    assert alone.pairs[0].seconds == beside.pairs[0].seconds
    assert [terms_of(run) for run in alone.runs] == [terms_of(run) for run in beside.runs]


def test_few_blocks_have_a_range_and_decide_nothing(tmp_path: Path) -> None:
    (pair,) = comparison(write(tmp_path, (DDP, FAST), (FSDP, SLOW), blocks=5)).pairs
    assert (pair.blocks, pair.interval_kind, pair.speed.verdict.verdict) == (5, "range", "undecided")
    assert pair.speed.verdict.more_blocks == 1
    assert {found.verdict.verdict for found in pair.seconds.values() if found} == {"undecided"}


def test_runs_that_share_no_block_or_some(tmp_path: Path) -> None:
    lengths = {
        0: dict.fromkeys(range(6), 10**9),
        1: dict.fromkeys(range(4), 10**9),
        2: dict.fromkeys(range(4, 9), 2 * 10**9),
    }
    kinds = [(*kind, 2, 1) for kind in (DDP, FSDP, HOROVOD)]
    found = comparison(synthetic.write_result(tmp_path, kinds, lengths=lengths))
    assert [(pair.ours, pair.theirs, pair.blocks) for pair in found.pairs] == [(1, 0, 4), (2, 0, 2)]
    assert against(found, 2, 1) is None
    assert found.pairs[1].speed.estimate.median == pytest.approx(0.5)


def test_runs_without_records_are_compared_in_speed(tmp_path: Path) -> None:
    found = comparison(synthetic.write_result(tmp_path, [(*DDP, 2, 1), (*FSDP, 2, 1)]))
    assert all(value is None for run in found.runs for value in (*terms_of(run), run.calls, run.bytes_per_s))
    assert set(found.pairs[0].seconds.values()) == {None}
    assert found.pairs[0].blocks == 6


def test_the_summary_holds_the_comparison(tmp_path: Path) -> None:
    path = write(tmp_path, (DDP, FAST), (FSDP, SLOW), (HOROVOD, FAST))
    written = summarize(path)
    assert len(written.comparisons[0].pairs) == 3
    assert load_summary(path) == written == summarize(path, write=False)


@given(st.permutations(range(4)))
@settings(deadline=None, max_examples=5)
def test_ranks_can_be_renamed(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    def late(places: Mapping[int, int]) -> Callable[[int, int, str], Cost | None]:
        return lambda rank, step, phase: asleep((places[rank] + step % 3) * MS) if phase == "backward" else None

    found = []
    for places in ({r: r for r in range(4)}, dict(enumerate(order))):
        path = write(tmp_path_factory.mktemp("ranks"), (DDP, FAST), (FSDP, SLOW), extra=late(places))
        found.append(comparison(path))
    for plain, renamed in zip(found[0].runs, found[1].runs, strict=True):
        assert terms_of(plain) == pytest.approx(terms_of(renamed))
        assert plain.step_s == renamed.step_s
    for term in TERMS:
        assert median_of(found[0].pairs[0], term) == pytest.approx(median_of(found[1].pairs[0], term))


seconds = st.floats(0.01, 10)


@st.composite
def steps(draw: st.DrawFn, run: int) -> Steps:
    blocks = draw(st.sets(st.integers(0, 9), min_size=1))
    each = {term: {b: draw(st.floats(0, 1)) for b in blocks} for term in draw(st.sets(st.sampled_from(TERMS)))}
    told = {b: draw(seconds) for b in blocks if draw(st.booleans())}
    return Steps(entry(run, *DDP, 2, 1), {b: draw(seconds) for b in blocks}, each, {}, {}, told)


@given(steps(0), steps(1))
@settings(deadline=None, max_examples=60)
def test_swapping_two_runs_turns_signs_and_verdicts(one: Steps, other: Steps) -> None:
    forth, back = compare_steps(one, other), compare_steps(other, one)
    assert (forth is None) == (back is None)
    if forth is None or back is None:
        return
    assert back.speed.verdict.verdict == OPPOSITE[forth.speed.verdict.verdict]
    assert back.speed.verdict.more_blocks == forth.speed.verdict.more_blocks
    assert back.speed.estimate.median == pytest.approx(1 / forth.speed.estimate.median)
    assert back.speed.estimate.low == pytest.approx(1 / forth.speed.estimate.high)
    for term, found in forth.seconds.items():
        turned = back.seconds[term]
        assert (found is None) == (turned is None)
        if found is not None and turned is not None:
            a, b = found.estimate, turned.estimate
            assert (b.median, b.low, b.high) == pytest.approx((-a.median, -a.high, -a.low))
            assert turned.verdict.verdict == OPPOSITE[found.verdict.verdict]
            assert turned.verdict.margin == found.verdict.margin
    (listed,) = rivals([one, other])
    assert against(listed, 1, 0) == back
    seen = against(listed, 0, 1)
    assert seen is not None
    assert seen.seconds == forth.seconds
    assert (seen.ours, seen.theirs, seen.speed.verdict) == (0, 1, forth.speed.verdict)
    assert isinstance(seen.speed.estimate, Spread)
