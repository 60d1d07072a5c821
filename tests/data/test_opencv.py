"""OpenCV starts no threads of its own, whichever module of ours comes to use it first."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pneumo.data

LARGE = "np.zeros((4096, 4096), np.uint8)"


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("dicom", f"dicom.resize({LARGE}, 1024)"),
        ("augment", f"for i in range(8): augment.augment({LARGE}, (0, 0, str(i)))"),
        ("sample", "sample.picture(sample.SampleConfig(patients=1), 0)"),
    ],
)
def test_no_thread_is_started(module: str, call: str) -> None:
    code = (
        "import os, sys\n"
        "from pneumo.process import limit_threads\n"
        "limit_threads(1)\n"  # NumPy's and SciPy's own, as the launcher does
        "import numpy as np\n"
        f"from pneumo.data import {module}\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        f"{call}\n"
        "print(len(os.listdir('/proc/self/task')) - before, sys.modules['cv2'].getNumThreads())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]


def test_it_is_imported_in_one_place() -> None:
    folder = Path(pneumo.data.__file__).parent
    importers = [
        path.name for path in sorted(folder.glob("*.py")) if re.search(r"^ *import cv2", path.read_text(), re.M)
    ]
    assert importers == ["opencv.py"]
