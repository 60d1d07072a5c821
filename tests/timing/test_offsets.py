"""Round trips bound an offset from both sides, and who shares a clock is told by the kernel and not by host names."""

import os
from pathlib import Path

import pytest

from pneumo import machine
from pneumo.study.common_clock import MOST_DRIFT
from pneumo.timing.offsets import RESOLUTION_NS, Trip, identity, interval


def test_the_narrowest_of_both_sides_counts() -> None:
    """An offset of 1000: 5 there and 900 back in one trip, 800 there and 7 back in another."""
    made = [Trip(10_000, 11_005, 10_905), Trip(11_000, 12_800, 11_807)]
    at, low, high = interval(made)
    slack = 1 + RESOLUTION_NS  # a drift of 1000 ppm for the 1.8 us between, rounded up to whole ns
    assert at == 12_800, "the faster of the two trips"
    assert low == 12_800 - 11_807 - RESOLUTION_NS
    assert high == 11_005 - 10_000 + slack + 1


def test_a_trip_long_ago_says_little() -> None:
    near, far = Trip(0, 100_000, 200_000), Trip(10**9, 10**9 + 1, 10**9 + 300_000)
    _, low, high = interval([near, far])
    assert (low, high) == (-100_000 - RESOLUTION_NS, 100_000 + RESOLUTION_NS)
    assert MOST_DRIFT * 10**9 > 300_000


def test_trips_that_contradict_each_other_leave_the_fastest() -> None:
    """As where a virtual machine is stopped in between and its clock is not."""
    _, low, high = interval([Trip(0, 1_000, 10), Trip(100, 9_000, 120)])
    assert (low, high) == (1_000 - 10 - RESOLUTION_NS, 1_000 + RESOLUTION_NS)


def test_a_clock_is_that_of_a_kernel_and_a_time_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert identity(0) == identity(1) == (boot, os.readlink("/proc/self/ns/time"))
    monkeypatch.setattr(os, "readlink", lambda _path: (_ for _ in ()).throw(FileNotFoundError()))
    assert identity(0) == identity(1) == (boot,)
    monkeypatch.setattr(machine, "read", lambda _path: None)
    assert identity(0) != identity(1)
