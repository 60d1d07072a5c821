"""The common clock: the truth lies within the bound, order is kept, and a result of two clocks is that of one."""

import io
import math
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import simulated
import test_rivals
from accounts import account_of, closes, row_of
from clocks import Ahead, measured, restamp, sample, trips, two_hosts
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from synthetic import START_NS, run_file, step_rows

from pneumo.study import common_clock as cc
from pneumo.study.common_clock import MOST_DRIFT, CommonClock, Track, bound_ns, common_clock, describe, duration
from pneumo.study.results import STAMPS, ResultFolder, load_run, load_table, on_common_clock, table_schema
from pneumo.study.schema import ClockHost, ClockSample
from pneumo.study.summary import summarize
from pneumo.study.tables import show

S, US = 10**9, 1000
DELAYS = st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), min_size=1, max_size=12)
CLOCKS = st.builds(Ahead, st.just(START_NS), st.integers(-(10**15), 10**15), st.floats(-MOST_DRIFT / 2, MOST_DRIFT / 2))


@given(CLOCKS, DELAYS)
def test_the_offset_is_within_the_bound_whatever_the_delays(clock: Ahead, delays: list[tuple[int, int]]) -> None:
    found = sample(1, trips(clock, START_NS, delays))
    truth = [clock.shows(t) - t for t in _moments(clock, found.at_ns)]
    assert min(abs(found.offset_ns - offset) for offset in truth) <= found.bound_ns
    assert found.bound_ns <= min(there + back for there, back in delays) / 2 + 2


def _moments(clock: Ahead, shown: int) -> list[int]:
    """The moments of rank 0's clock at which the other one showed this, as integers around the exact one."""
    exact = shown - clock.base_ns - round(clock.drift * (shown - clock.base_ns - START_NS) / (1 + clock.drift))
    return [exact - 1, exact, exact + 1]


@given(CLOCKS, st.lists(DELAYS, min_size=1, max_size=6), st.lists(st.integers(0, 100 * S), min_size=1, max_size=20))
def test_every_stamp_is_moved_to_its_moment_within_the_bound(
    clock: Ahead, delays: list[list[tuple[int, int]]], after: list[int]
) -> None:
    found = [sample(1, trips(clock, START_NS + i * 20 * S, part)) for i, part in enumerate(delays)]
    track, moments = Track.of(found), sorted(START_NS + ns for ns in after)
    stamps = np.array([clock.shows(t) for t in moments], np.int64)
    moved = track.move(stamps)
    assert (np.abs(moved - np.array(moments)) <= track.error(stamps) + 1).all()
    assert (np.diff(moved) >= 0).all(), "the order of a rank's stamps is kept"


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(-(10**9), 10**9), st.integers(0, 10**6)), min_size=2),
    st.lists(st.integers(-(10**7), 10**8), min_size=2),
)
def test_order_is_kept_whatever_the_samples_say(samples: list[tuple[int, int, int]], at: list[int]) -> None:
    """Also where they contradict each other: then the bound contains them all."""
    when, found = START_NS, []
    for gap, offset, bound in samples:
        when += gap
        found.append(ClockSample(rank=1, at_ns=when, offset_ns=offset, bound_ns=bound))
    track = Track.of(found)
    assert (np.diff(track.move(np.array(sorted(START_NS + t for t in at)))) >= 0).all()
    for one, own, error in zip(found, track.offset + track.base_ns, track.bound, strict=True):
        assert error >= 0
        apart = max(abs(own - one.offset_ns) - one.bound_ns, 0)
        assert apart <= error + 1e-3


def test_drift_is_found_and_bounded() -> None:
    clock = Ahead(START_NS, 7 * S, 4e-6)
    track = Track.of(measured(clock, [START_NS + i * S for i in range(30)]))
    assert abs(track.drift - 4e-6) <= track.drift_bound < 1e-6
    assert 5 * US <= track.worst <= 8 * US
    assert track.wander == 0


def test_one_sample_leaves_the_drift_open() -> None:
    track = Track.of(measured(Ahead(START_NS, S), [START_NS]))
    errors = track.error(track.origin_ns + np.array([S, 2 * S]))
    assert errors[1] - errors[0] == pytest.approx(MOST_DRIFT * S)


def test_a_drift_that_changes_widens_the_bound_by_what_contradicts_a_line() -> None:
    """1 ms to and fro at 100 ppm: no line fits within 1 us, and every sample still holds."""
    found = [ClockSample(rank=1, at_ns=START_NS + i * 10 * S, offset_ns=i % 2 * 10**6, bound_ns=1000) for i in range(5)]
    track = Track.of(found)
    assert track.wander == pytest.approx(10**6 - 2 * 1000)
    assert track.bound.max() == 1000
    assert track.move(np.array([found[1].at_ns])) == [found[1].at_ns - 10**6]


def test_ranks_are_moved_by_their_hosts_clock_and_unknown_ones_stay() -> None:
    clocks = {1: Ahead(START_NS, 1000 * S), 2: Ahead(START_NS, -5 * S, 1e-5)}
    hosts = [ClockHost(name=f"h{i}", ranks=[i, i + 3]) for i in range(3)]
    samples = [one for r, c in clocks.items() for one in measured(c, [START_NS, START_NS + 60 * S], rank=r)]
    common = CommonClock(msgspec.structs.replace(two_hosts([1], samples, 2), hosts=hosts))
    rng = np.random.default_rng(0)
    ranks = rng.integers(-1, 7, 1000).astype(np.int32)
    truth = START_NS + rng.integers(0, 60 * S, 1000)
    shown = [clocks[r % 3].shows(t) if 0 <= r < 6 and r % 3 else t for r, t in zip(ranks, truth.tolist(), strict=True)]
    moved = common.move(np.array(shown), ranks)
    still = (ranks < 0) | (ranks == 6) | (ranks % 3 == 0)
    assert (moved[still] == truth[still]).all()
    assert np.abs(moved - truth).max() <= common.bound_ns(6)
    assert common.bound_ns(1) == 0
    assert common.bound_ns(2) == common.tracks[1].worst if common.tracks[1] else False
    assert common.bound_ns(3) == pytest.approx(sum(t.worst for t in common.tracks if t))


def result(tmp_path: Path, least_ns: int = 5_000) -> tuple[Path, Path]:
    """The same study twice: on one clock, and with ranks 2 and 3 on a host whose clock is ahead and fast."""
    lateness = simulated.asleep(20 * simulated.MS)
    paths = []
    for name in ("one", "two"):
        out = tmp_path / name
        paths.append(
            simulated.study(out, 4, extra=lambda r, _s, p: lateness if (r, p) == (3, "backward") else None, blocks=6)
        )
    clock = Ahead(START_NS, 1000 * S, 3e-6)
    samples = measured(clock, [START_NS + b * 10**12 - S for b in range(1, 8)], rank=2, least_ns=least_ns)
    restamp(paths[1], clock, [2, 3], two_hosts([2, 3], samples, 4))
    return paths[0], paths[1]


def test_the_account_of_two_clocks_is_that_of_one(tmp_path: Path) -> None:
    one, two = map(row_of, result(tmp_path))
    account = account_of(tmp_path / "two" / "main" / "latest")
    assert closes(two)
    error_s = account.clock_ns * account.num_waits / 1e9
    assert 0 < error_s < 0.01 * (one.loss["peer_wait"] or 0)
    for term, value in one.loss.items():
        assert two.loss[term] == pytest.approx(value, abs=error_s + 1e-5), term
    assert two.residual_rank_s == pytest.approx(one.residual_rank_s, abs=1e-5)
    assert two.total_s == pytest.approx(one.total_s, abs=12 * account.clock_ns / 1e9)
    assert (two.late[0].rank, two.late[0].phase) == (one.late[0].rank, one.late[0].phase) == (3, "backward")


def test_stamps_are_moved_whatever_columns_are_asked_for(tmp_path: Path) -> None:
    one, two = result(tmp_path)
    for name in ("steps", "collectives"):
        expected, found = load_table(one, name), load_table(two, name)
        assert found.schema == expected.schema == table_schema(name)
        for column in expected.column_names:
            alone = load_table(two, name, columns=[column])
            assert alone.column_names == [column]
            assert alone.column(column).equals(found.column(column))
            if column in STAMPS:
                apart = found.column(column).to_numpy() - expected.column(column).to_numpy()
                assert 0 < np.abs(apart).max() < 10 * US
            else:
                assert found.column(column).equals(expected.column(column))


def test_an_unknown_stamp_stays_unknown_and_pieces_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pneumo.study.results.CHUNK", 7)
    clock = Ahead(START_NS, 50 * S)
    common = common_clock(two_hosts([1], measured(clock, [START_NS]), 2))
    stamps = [None if i % 5 == 0 else clock.shows(START_NS + i) if i % 2 else START_NS + i for i in range(30)]
    table = pa.table({"rank": pa.array([i % 2 for i in range(30)], pa.int32()), "started_ns": pa.array(stamps)})
    moved = on_common_clock(common, table).column("started_ns").to_pylist()
    assert [m is None for m in moved] == [s is None for s in stamps]
    assert all(abs(m - START_NS - i) < 10 * US for i, m in enumerate(moved) if m is not None)
    assert on_common_clock(None, table) is table


def test_a_result_that_goes_on_keeps_each_ranks_own_stamps(tmp_path: Path) -> None:
    _, two = result(tmp_path)
    before = load_table(two, "steps").to_pylist()
    folder = ResultFolder.open(two)
    folder.add_steps(step_rows(load_run(two).runs[0], {9: S}, warmup=0))
    folder.flush()
    assert load_table(two, "steps").to_pylist()[: len(before)] == before


def test_the_bound_is_said_in_words(tmp_path: Path) -> None:
    one, two = result(tmp_path)
    assert describe(load_run(one)) == "ranks of one host share one clock (which this result does not say was checked)"
    said = describe(load_run(two))
    assert said.startswith("2 hosts, offsets within ")
    assert "drift up to 4 ppm" in said
    assert said.endswith(
        "ranks of one host share one clock (error below 1 us; round trips, a rougher check, exclude more than 0.6 us)"
    )
    assert cc.UNKNOWN in describe(run_file(hosts=["a", "b"]))
    alone = two_hosts([], [], 2)
    shared = msgspec.structs.replace(alone, hosts=alone.hosts[:1])
    assert describe(run_file(clock=shared)).startswith("ranks of one host share one clock (error below 1 us;")
    assert (common_clock(shared), bound_ns(shared, 2), bound_ns(None, 2)) == (None, 0.0, 0.0)
    assert cc.UNKNOWN in describe(run_file(clock=two_hosts([1], [], 2)))


@pytest.mark.parametrize(("least_ns", "uncertain"), [(5_000, False), (2_000_000, True)])
def test_tables_that_compare_ranks_print_the_bound(
    screen: Console, tmp_path: Path, least_ns: int, uncertain: bool
) -> None:
    """And words say which parts of blocked time it makes uncertain by more than a hundredth."""
    show(result(tmp_path, least_ns)[1], screen)
    assert isinstance(screen.file, io.StringIO)
    parts = screen.file.getvalue().split("\n\n")
    titles = ("Comparison", "Where each rank's time", "Where the efficiency", "The same for each rank", "Who was late")
    for title in (*titles, "Efficiencies after POP"):
        text = " ".join(next(part for part in parts if part.startswith(title)).split())
        assert "clock 2 hosts, offsets within " in text, title
    text = " ".join(screen.file.getvalue().split())
    assert ("The ranks' clocks agree within 2.1 ms, over" in text) == uncertain
    assert ("uncertain of waiting for late ranks" in text) == uncertain


def test_comparisons_of_backends_print_the_bound(screen: Console, tmp_path: Path) -> None:
    path = test_rivals.write(tmp_path, (test_rivals.DDP, test_rivals.FAST), (test_rivals.FSDP, test_rivals.FAST))
    clock = Ahead(START_NS, 1000 * S, 3e-6)
    samples = measured(clock, [START_NS + b * 10**12 - S for b in range(1, 8)], rank=2)
    restamp(path, clock, [2, 3], two_hosts([2, 3], samples, 4))
    show(path, screen)
    assert isinstance(screen.file, io.StringIO)
    parts = screen.file.getvalue().split("\n\n")
    for title in ("Backends side by side", "Each against the first"):
        text = " ".join(next(part for part in parts if part.startswith(title)).split())
        assert "clock 2 hosts, offsets within " in text, title


@pytest.mark.parametrize(
    ("ns", "text"), [(80, "0.1 us"), (623, "0.7 us"), (8_500, "8.5 us"), (22_100, "23 us"), (1.21e6, "1.3 ms")]
)
def test_a_bound_is_never_told_smaller_than_it_is(ns: float, text: str) -> None:
    assert duration(ns) == text


def test_one_clock_costs_nothing_and_old_results_read(tmp_path: Path) -> None:
    path, _ = result(tmp_path)
    assert '"clock": null' in (path / "run.json").read_text()
    text = (path / "run.json").read_text().replace('"clock": null,\n', "")
    (path / "run.json").write_text(text)
    assert load_run(path).clock is None
    assert math.isfinite(summarize(path, write=False).rows[0].total_s)
