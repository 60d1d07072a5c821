"""The watchdog: it calls once, with the last place, and not for who goes on, rests or has closed it."""

import time
from collections.abc import Callable

import pytest

from pneumo.watchdog import Watchdog


@pytest.fixture
def called() -> list[str]:
    return []


def watch(called: list[str], behave: Callable[[Watchdog], None]) -> None:
    watchdog = Watchdog(called.append, limit_s=0.2)
    behave(watchdog)
    watchdog.close()


def test_who_stays_is_told_on_once(called: list[str]) -> None:
    def stay(watchdog: Watchdog) -> None:
        watchdog.at("step", 3, "of", "a run")
        time.sleep(1.0)

    watch(called, stay)
    assert called == ["step 3 of a run"]


def test_who_goes_on_is_not(called: list[str]) -> None:
    def go_on(watchdog: Watchdog) -> None:
        for step in range(30):
            watchdog.at("step", step)
            time.sleep(0.02)

    watch(called, go_on)
    assert called == []


def test_who_rests_is_not(called: list[str]) -> None:
    def rest(watchdog: Watchdog) -> None:
        watchdog.at("a place")
        watchdog.rest()
        time.sleep(0.6)

    watch(called, rest)
    assert called == []


def test_nobody_is_watched_before_the_first_place_or_after_the_end(called: list[str]) -> None:
    watchdog = Watchdog(called.append, limit_s=0.2)
    time.sleep(0.5)
    watchdog.at("a place")
    watchdog.close()
    time.sleep(0.5)
    assert called == []
