"""An import that leaves the process as it was, nothing on disk, and asks nothing of the network.

Ultralytics settles at import what is not its own: thread counts, print options, warning filters, the environment,
`torch.save`, `PIL.Image.open`. It writes a settings file (8 ranks would race for it), looks whether the network is
there, hashes the machine's hardware address, and under WORLD_SIZE > 1 it waits at a barrier of the process group.
"""

import logging
import os
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from pneumo.data.opencv import cv2

# Read by Ultralytics at its import, and only then.
QUIET = {
    "YOLO_OFFLINE": "1",
    "YOLO_AUTOINSTALL": "0",
    "YOLO_VERBOSE": "0",
    "ULTRALYTICS_SAFE_LOAD": "1",
}
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # what it takes for a reason to wait for other ranks
_REPLACED = (
    *((torch, name) for name in ("save", "load")),
    *((cv2, name) for name in ("imread", "imwrite", "imshow")),
    (Image, "open"),
)
_LOGGERS = ("ultralytics", "coremltools", "sentry_sdk")


@contextmanager
def isolated_import() -> Iterator[None]:
    """Inside, import what should leave no trace; what was there before is there again afterwards.

    The library's own folder of settings is one that nobody else has, and it is removed at the end.
    """
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="pneumo-"))
        stack.enter_context(_environment({**QUIET, "YOLO_CONFIG_DIR": scratch}))
        stack.enter_context(_no_hardware_address())
        for module, name in _REPLACED:
            stack.callback(setattr, module, name, getattr(module, name))
        for read, write in ((cv2.getNumThreads, cv2.setNumThreads), (torch.get_num_threads, torch.set_num_threads)):
            stack.callback(_set_back, read, write, read())
        for name in _LOGGERS:
            stack.enter_context(_logger(logging.getLogger(name)))
        stack.enter_context(np.printoptions())
        stack.enter_context(torch._tensor_str.printoptions())
        stack.enter_context(warnings.catch_warnings())
        yield


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Set these variables and remove a rank's; afterwards the environment is as it was, whoever changed it."""
    before = dict(os.environ)
    for name in _OF_A_RANK:
        os.environ.pop(name, None)
    os.environ.update(settings)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@contextmanager
def _no_hardware_address() -> Iterator[None]:
    """Its settings hold a hash of this address; to find it, Python may start programs, which MPI forbids."""
    before, uuid.getnode = uuid.getnode, lambda: 0
    try:
        yield
    finally:
        uuid.getnode = before


@contextmanager
def _logger(logger: logging.Logger) -> Iterator[None]:
    """Keep a logger's level, handlers and parent: a handler on stdout would write into what our commands print."""
    level, handlers, propagate = logger.level, list(logger.handlers), logger.propagate
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.handlers[:], logger.propagate = handlers, propagate


def _set_back(read: Callable[[], int], write: Callable[[int], Any], before: int) -> None:
    """Only where it changed: setting a number of threads is not free of effects even where it stays the same."""
    if read() != before:
        write(before)
