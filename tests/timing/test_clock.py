"""Stamps grow, phases are spans, and CPU time is told from sleep."""

import time

from pneumo.timing.clock import StepClock, ThreadStamps


def test_sleep_has_wall_time_and_no_cpu_time_and_work_has_both() -> None:
    now = ThreadStamps()
    clock = StepClock(now)
    clock.begin()
    with clock.phase("data"):
        time.sleep(0.05)
    with clock.phase("forward"):
        until = time.thread_time_ns() + 20_000_000
        while time.thread_time_ns() < until:
            pass
    step, (slept, worked), helpers = clock.end()
    now.close()
    assert slept.phase == "data"
    assert slept.end.wall_ns - slept.begin.wall_ns >= 50_000_000
    assert slept.end.cpu_ns - slept.begin.cpu_ns < 20_000_000
    assert worked.end.cpu_ns - worked.begin.cpu_ns >= 20_000_000
    assert step.begin.wall_ns <= slept.begin.wall_ns
    assert worked.end.wall_ns <= step.end.wall_ns
    assert helpers >= 0
