"""What a job says while it runs: plain lines on rank 0, kept for the result's log."""

import time
from pathlib import Path

from pneumo.world import World

PROGRESS_EVERY_S = 30.0


class Progress:
    """Says lines on rank 0, with the seconds since the start, and keeps them in the result's log."""

    def __init__(self, world: World) -> None:
        self._speaks, self._begin = world.rank == 0, time.monotonic()
        self._lines: list[str] = []
        self._file: Path | None = None
        self._last = 0.0

    def __call__(self, text: str) -> None:
        """Print a line, on rank 0 only."""
        if not self._speaks:
            return
        self._last = time.monotonic()
        line = f"[{self._last - self._begin:4.0f} s] {text}"
        print(line, flush=True)
        self.log(line)

    def now_and_then(self, text: str) -> None:
        """Print a line if none was printed for a while."""
        if time.monotonic() - self._last >= PROGRESS_EVERY_S:
            self(text)

    def log_to(self, path: Path) -> None:
        """Write the lines so far, and all later ones, to a file."""
        if self._speaks:
            self._file = path
            path.write_text("".join(f"{line}\n" for line in self._lines))

    def log(self, line: str) -> None:
        """Keep a line without printing it."""
        self._lines.append(line)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(f"{line}\n")
