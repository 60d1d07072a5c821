"""The common clock of a result, rank 0's: from measured offsets to a function that moves stamps, and its error.

A sample says that at one moment a host's clock was ahead of rank 0's by an offset within [low, high]. Clocks that are
disciplined run apart by no more than MOST_DRIFT, so each sample also limits the offset at every other moment, and the
intervals are narrowed by each other first. Their middles then differ by no more than that drift either (both edges are
envelopes of lines of that slope), so the mapping, straight from middle to middle, keeps the order of stamps. Its error
is at most half the interval at a sample, and, where the drift is constant in between, at most the line between these
halves. Whether it is constant is asked of the samples: by how much one of them contradicts the line through its
neighbours beyond the bounds of all three is the *wander*, and is added.

Source of the intervals: F. Cristian, Probabilistic clock synchronization (1989); see `timing.offsets`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pneumo.study.schema import Clock, ClockSample, RunFile

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_DRIFT = 1e-3  # of two clocks against each other: the kernel slews each by at most 500 ppm (adjtimex(2))
PPM = 1e6
UNKNOWN = "and by how much their clocks differ is unknown: ranks cannot be compared between hosts"


@dataclass(frozen=True, slots=True)
class Track:
    """The offset of one host's clock from rank 0's as a function of that clock, by straight lines between K samples.

    `at` (K,) are ns after `origin_ns`, in order; `offset` (K,) is ns above `base_ns` and `bound` (K,) its error.
    Integers of both clocks stay integers: a stamp in ns can be beyond what a float holds.
    """

    origin_ns: int
    base_ns: int
    at: Floats
    offset: Floats
    bound: Floats
    wander: float

    @classmethod
    def of(cls, samples: Sequence[ClockSample]) -> Track:
        """From the samples of one host, at least one; those that contradict each other widen the bound."""
        ordered = sorted(samples, key=lambda sample: sample.at_ns)
        origin, base = ordered[0].at_ns, ordered[0].offset_ns
        at = np.array([sample.at_ns - origin for sample in ordered], np.float64)
        given = np.array([sample.offset_ns - base for sample in ordered], np.float64)
        reach = np.array([sample.bound_ns for sample in ordered], np.float64)
        low, high = _envelope(at, given - reach), -_envelope(at, -(given + reach))
        middle = (low + high) / 2
        outside = np.maximum(given + reach - middle, middle - (given - reach))
        bound = np.where(low <= high, (high - low) / 2, outside)
        return cls(origin, base, at, middle, bound, _wander(at, middle, bound))

    @property
    def drift(self) -> float:
        """How much faster this clock runs than rank 0's, from the first to the last sample; 0 where there is one."""
        return float((self.offset[-1] - self.offset[0]) / (self.at[-1] - self.at[0])) if self.at[-1] > 0 else 0.0

    @property
    def drift_bound(self) -> float:
        """The error of `drift`."""
        return float((self.bound[0] + self.bound[-1]) / self.at[-1]) if self.at[-1] > 0 else MOST_DRIFT

    def move(self, stamps: Ints) -> Ints:
        """These moments of the host's clock, (n,) ns, on rank 0's."""
        when = (stamps - self.origin_ns).astype(np.float64)
        offset = np.interp(when, self.at, self.offset) + self.drift * self._beyond(when)
        moved: Ints = stamps - self.base_ns - np.rint(offset).astype(np.int64)
        return moved

    def error(self, stamps: Ints) -> Floats:
        """How far `move` may be from the truth for these moments, (n,) ns."""
        when = (stamps - self.origin_ns).astype(np.float64)
        found: Floats = np.interp(when, self.at, self.bound) + self.wander + 1  # 1: rounding
        return found + self.drift_bound * np.abs(self._beyond(when))

    @property
    def worst(self) -> float:
        """The greatest error among the samples, in ns."""
        return float(self.bound.max()) + self.wander + 1

    def _beyond(self, when: Floats) -> Floats:
        """How long before the first sample (negative) or after the last one (positive) these moments are."""
        beyond: Floats = when - np.clip(when, 0.0, self.at[-1])
        return beyond


def _envelope(at: Floats, low: Floats) -> Floats:
    """The greatest lower limits that follow from these by MOST_DRIFT."""
    low = low.copy()
    for i in range(1, low.size):
        low[i] = max(low[i], low[i - 1] - MOST_DRIFT * (at[i] - at[i - 1]))
    for i in range(low.size - 2, -1, -1):
        low[i] = max(low[i], low[i + 1] - MOST_DRIFT * (at[i + 1] - at[i]))
    return low


def _wander(at: Floats, offset: Floats, bound: Floats) -> float:
    if at.size < 3:
        return 0.0
    before, after = at[1:-1] - at[:-2], at[2:] - at[1:-1]
    part = before / np.maximum(before + after, 1)
    expected, error = (v[:-2] + part * (v[2:] - v[:-2]) for v in (offset, bound))
    return float(np.maximum(np.abs(offset[1:-1] - expected) - bound[1:-1] - error, 0).max())


class CommonClock:
    """Moves the stamps of every rank of a result whose ranks have several clocks."""

    def __init__(self, clock: Clock) -> None:
        self._host = np.zeros(1 + max(rank for host in clock.hosts for rank in host.ranks), np.int16)
        for i, host in enumerate(clock.hosts):
            self._host[host.ranks] = i
        samples: list[list[ClockSample]] = [[] for _ in clock.hosts]
        for sample in clock.samples:
            samples[self._host[sample.rank]].append(sample)
        self.tracks = [Track.of(found) if found else None for found in samples]

    def move(self, stamps: Ints, ranks: Ints) -> Ints:
        """The stamps (n,) in ns of these ranks (n,) on rank 0's clock; those of unknown ranks stay."""
        known = (ranks >= 0) & (ranks < self._host.size)
        host = self._host[np.where(known, ranks, 0)]
        order = np.argsort(host, kind="stable")
        edges = np.searchsorted(host[order], np.arange(len(self.tracks) + 1))
        moved = stamps.copy()
        for track, first, end in zip(self.tracks, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if track is not None and end > first:
                moved[order[first:end]] = track.move(stamps[order[first:end]])
        return moved

    def bound_ns(self, ranks: int) -> float:
        """By how much stamps of two of the first `ranks` ranks may be misplaced against each other, in ns."""
        here = np.unique(self._host[:ranks]).tolist()
        errors = sorted(track.worst for i in here for track in [self.tracks[i]] if track is not None)
        return math.fsum(errors[-2:])


def common_clock(clock: Clock | None) -> CommonClock | None:
    """What moves a result's stamps; None where they stay: its ranks share one clock, or offsets were not measured."""
    return CommonClock(clock) if clock is not None and clock.samples else None


def bound_ns(clock: Clock | None, ranks: int) -> float:
    """As `CommonClock.bound_ns`; 0 where the ranks share one clock, or nothing is known."""
    common = common_clock(clock)
    return 0.0 if common is None else common.bound_ns(ranks)


def describe(run: RunFile) -> str:
    """How well the clocks of a result's ranks agree, for the legend of every table that compares ranks."""
    if run.clock is not None:
        return agreement(run.clock)
    if len(run.hosts) == 1:
        return "ranks of one host share one clock (which this result does not say was checked)"
    return f"{len(run.hosts)} hosts, {UNKNOWN}"


def agreement(clock: Clock) -> str:
    """How well clocks agree, in words."""
    checks = [host.check_ns for host in clock.hosts if host.check_ns is not None]
    checked = f"; round trips, a rougher check, exclude more than {duration(max(checks))}" if checks else ""
    shared = f"ranks of one host share one clock (error below 1 us{checked})"
    if len(clock.hosts) == 1:
        return shared
    tracks = [track for track in CommonClock(clock).tracks if track is not None]
    if len(tracks) < len(clock.hosts) - 1:
        return f"{len(clock.hosts)} hosts, {UNKNOWN}"
    bound = duration(bound_ns(clock, 1 + max(rank for host in clock.hosts for rank in host.ranks)))
    drift = math.ceil(PPM * max(abs(track.drift) + track.drift_bound for track in tracks))
    drifts = "measured once" if any(track.at.size == 1 for track in tracks) else f"drift up to {drift} ppm"
    return f"{len(clock.hosts)} hosts, offsets within {bound}, {drifts}; {shared}"


def duration(ns: float) -> str:
    """A short time with two or three digits, rounded up: a bound is never told smaller than it is."""
    size, unit = (1e3, "us") if ns < 1e6 else (1e6, "ms")
    digits = 1 if ns < 10 * size else 0
    return f"{math.ceil(ns / size * 10**digits) / 10**digits:.{digits}f} {unit}"
