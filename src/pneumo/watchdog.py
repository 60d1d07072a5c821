"""A limit for waits that have none of their own: MPI's blocking calls, and Horovod's."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Thread

LIMIT_S = 600.0


class Watchdog:
    """Calls `give_up` with the place, in a thread of its own, where this rank stays in one place for `limit_s` seconds.

    It watches from each `at` to the next, and not from `rest` on: whoever waits for others leaves it to theirs.
    """

    def __init__(self, give_up: Callable[[str], None], limit_s: float = LIMIT_S) -> None:
        self._give_up, self.limit_s = give_up, limit_s
        self._place: tuple[float, tuple[object, ...]] | None = None
        self._closed = Event()
        Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, *place: object) -> None:
        """This rank goes on, to a place whose parts are put together with spaces if it has to be named."""
        self._place = time.monotonic(), place

    def rest(self) -> None:
        """This rank may now stay where it is for any time."""
        self._place = None

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(10.0, self.limit_s / 10)):
            place = self._place
            if place is not None and time.monotonic() - place[0] > self.limit_s:
                self._give_up(" ".join(map(str, place[1])))
                return
