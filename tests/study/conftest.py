"""Synthetic results, and a console whose output a test can read."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))

from pneumo.study.tables import make_console


@pytest.fixture
def screen() -> Console:
    """A console off a terminal; what was printed is in `screen.file.getvalue()`."""
    return make_console(io.StringIO())
