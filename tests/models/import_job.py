"""Import and build the detector's network under watch, in a process of its own; prints what happened as JSON.

An audit hook sees every file, socket and program of Python's; the state of the process is compared before and after.
"""

import atexit
import json
import locale
import logging
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from pneumo.data.opencv import cv2
from pneumo.models import isolation

ASKED = ("socket.", "subprocess.", "os.system", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "urllib.", "http.")
CHANGED = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

asked: list[str] = []
written: list[str] = []
barriers: list[object] = []
watching = False


def watch(event: str, arguments: tuple[object, ...]) -> None:
    """Note what is asked of the network or another program, and what is written where."""
    if not watching:
        return
    if event.startswith(ASKED) and event != "socket.gethostname":
        asked.append(f"{event} {arguments}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        written.append(str(arguments[0]))
    elif event.startswith(CHANGED):
        folder = arguments[-1]
        known = isinstance(folder, int) and folder >= 0 and event in ("os.remove", "os.rmdir", "os.mkdir")
        written.append(f"{os.readlink(f'/proc/self/fd/{folder}')}/{arguments[0]}" if known else str(arguments[0]))


def state() -> dict[str, str]:
    """Everything global that a library might change, as text."""
    loggers = {"": logging.getLogger()} | {
        name: logger for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)
    }
    heard = {
        name: (logger.level, logger.propagate, logger.disabled, [h for h in logger.handlers if not silent(h)])
        for name, logger in loggers.items()
    }
    numbers = range(1, signal.NSIG)
    legacy = np.random.get_state()  # noqa: NPY002 -- the one that a library would disturb
    return {
        "environment": str(sorted(os.environ.items())),
        "torch functions": str([id(getattr(torch, name)) for name in ("save", "load", "arange", "compile")]),
        "torch.load in place": str(id(torch.serialization.load)),
        "opencv functions": str([id(getattr(cv2, name)) for name in ("imread", "imwrite", "imshow", "imdecode")]),
        "pillow": str((id(Image.open), Image.MAX_IMAGE_PIXELS)),
        "threads": str((torch.get_num_threads(), torch.get_num_interop_threads(), cv2.getNumThreads())),
        "running threads": str(sorted(thread.name for thread in threading.enumerate())),
        "printing": str((np.get_printoptions(), torch._tensor_str.get_printoptions())),
        "warnings": str((warnings.filters, id(warnings.showwarning))),
        "loggers": str({name: found for name, found in heard.items() if found != (0, True, False, [])}),
        "logging": str((logging.root.manager.disable, id(logging.getLoggerClass()), logging.raiseExceptions)),
        "signals": str([signal.getsignal(number) for number in numbers if number in signal.valid_signals()]),
        "locale": locale.setlocale(locale.LC_ALL),
        "hooks": str([id(getattr(sys, name)) for name in ("excepthook", "unraisablehook", "displayhook", "stdout")]),
        "thread hook": str(id(threading.excepthook)),
        "streams": str((id(sys.stdin), id(sys.stderr), sys.stdout.encoding)),
        "paths": str((sys.path, [str(finder) for finder in sys.meta_path])),
        "limits": str((sys.getrecursionlimit(), sys.getswitchinterval(), socket.getdefaulttimeout())),
        "folder": os.getcwd(),
        "numpy": str(np.geterr()),
        "types": str((torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())),
        "determinism": str((torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision())),
        "backends": str(
            (
                torch.backends.cudnn.benchmark,
                torch.backends.cudnn.deterministic,
                torch.backends.mkldnn.enabled,
                torch.backends.cuda.matmul.allow_tf32,
            )
        ),
        "random": str((hash(random.getstate()), legacy[1].sum(), torch.get_rng_state().sum())),
        "matplotlib": os.environ.get("MPLBACKEND", "") + str("matplotlib.pyplot" in sys.modules),
        "safe globals": str(torch.serialization.get_safe_globals()),
        "at exit": str(atexit._ncallbacks()),
        "files": str(len(os.listdir("/proc/self/fd"))),
    }


def silent(handler: logging.Handler) -> bool:
    """A handler that every library may add to its own logger."""
    return isinstance(handler, logging.NullHandler)


def differences(before: dict[str, str], after: dict[str, str]) -> dict[str, list[str]]:
    """What is not as it was."""
    return {name: [before[name], after[name]] for name in before if before[name] != after[name]}


def observed(isolated: Callable[[], Any], seen: list[dict[str, str]]) -> Callable[[], Any]:
    """The same context; what the state is inside, after the import and before anything is undone, is seen."""

    @contextmanager
    def inside() -> Iterator[None]:
        with isolated():
            yield
            seen.append(state())

    return inside


def pretend_to_be_a_rank() -> None:
    """As if a process group of two were there: whoever asks it to wait is noted."""
    dist.is_initialized = lambda: True
    dist.get_backend = lambda *_: "gloo"
    dist.barrier = lambda *_, **__: barriers.append(None)


def main() -> None:
    """Import and build; print the report as the last line."""
    global watching
    torch.nn.functional.conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 1, 1))  # starts what torch starts once
    cv2.setNumThreads(2)
    pretend_to_be_a_rank()
    scratch = f"{tempfile.gettempdir()}/pneumo-"
    sys.addaudithook(watch)
    before = state()
    seen: list[dict[str, str]] = []
    isolation.isolated_import = observed(isolation.isolated_import, seen)
    watching = True
    from pneumo.models import yolov8

    middle = state()
    random_state = torch.get_rng_state()
    yolov8.build()
    torch.set_rng_state(random_state)  # drawing the parameters is what `build` is for
    watching = False
    outside = [name for name in written if not str(Path(name).absolute()).startswith(scratch) and name != "/dev/null"]
    report = {
        "asked": asked,
        "written": written,
        "outside": outside,
        "changed": {**differences(before, middle), **differences(before, state())},
        "unguarded": sorted(differences(before, seen[0])),
        "barriers": len(barriers),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
