"""Ultralytics' own trainer in a process of its own, which trains a block of steps whenever it is told to.

Started by itself this module is that process: it answers a line on its standard input that is a number of steps with
the times of so many, and ends with its input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import IO, Any, Self

from pneumo.bench.turns import Times, since, stamp
from pneumo.errors import PneumoError

PATIENCE_S = 600.0
_OF_A_LAUNCHER = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE")


class Rival:
    """The trainer, as long as the `with` block: yolov8n on the images of a data set in Ultralytics' format."""

    def __init__(self, data: Path, *, size: int, batch: int) -> None:
        self._data, self._size, self._batch = data, size, batch

    def __enter__(self) -> Self:
        from pneumo.models.isolation import QUIET  # not for the other process, which is Ultralytics' alone

        self._folder = tempfile.TemporaryDirectory(prefix="pneumo-")
        folder = Path(self._folder.name)
        self._log = folder / "log"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_LAUNCHER)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(self._data), str(self._size), str(self._batch)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env={**kept, **QUIET, "YOLO_CONFIG_DIR": str(folder)},
                text=True,
            )
        return self

    def block(self, steps: int) -> Times:
        """Train so many steps; returns the milliseconds of a step. Raises PneumoError where the trainer has failed."""
        limit = Timer(PATIENCE_S, self._process.kill)
        limit.start()
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            limit.cancel()
        if not answer:
            said = self._log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise PneumoError(f"Ultralytics' trainer gave no answer, its last words: {said[-1][:300]}.")
        return Times(*json.loads(answer))

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()  # its input ends, and so does it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


class _End(Exception):  # noqa: N818 -- no error
    """Nobody wants further steps."""


class _Turns:
    """Stops the trainer before a batch until so many are asked for, and says how long they took: with their data."""

    def __init__(self, asked: IO[str], answers: IO[str]) -> None:
        self._asked, self._answers = asked, answers
        self._left = self._steps = 0
        self._begin = (0, 0)

    def before_batch(self, _trainer: Any) -> None:
        """Called by the trainer when it has a batch."""
        if self._left == 0:
            if self._steps:
                self._answers.write(f"{json.dumps(since(self._begin, self._steps))}\n")
                self._answers.flush()
            line = self._asked.readline()
            if not line:
                raise _End
            self._left = self._steps = int(line)
            self._begin = stamp()
        self._left -= 1


def _train(data: str, size: int, batch: int, before_batch: Callable[[Any], None]) -> None:
    """Train as Ultralytics does, but for mosaic, which we do not have either, and with an update for each batch.

    It would take as many threads as the machine has cores; it gets one, as ours has.
    """
    import torch
    from ultralytics.models.yolo.detect import DetectionTrainer

    settings = {
        **{"model": "yolov8n.yaml", "data": data, "imgsz": size, "batch": batch, "nbs": batch, "epochs": 10_000},
        **{"device": "cpu", "workers": 0, "cache": "ram", "amp": False, "mosaic": 0.0, "optimizer": "AdamW"},
        **{"lr0": 2e-3, "deterministic": False, "val": False, "save": False, "plots": False, "verbose": False},
    }
    trainer = DetectionTrainer(overrides={**settings, "project": str(Path.cwd())})
    trainer.add_callback("on_train_start", lambda _: torch.set_num_threads(1))
    trainer.add_callback("on_train_batch_start", before_batch)
    try:
        trainer.train()
    except _End:
        return
    raise PneumoError("Ultralytics' trainer ended of itself")


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log
    _train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), _Turns(sys.stdin, answers).before_batch)
