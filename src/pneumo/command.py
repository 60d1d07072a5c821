"""What the commands that run in an MPI world begin and end with."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from pneumo.errors import Refused
from pneumo.world import speaks

Asked = TypeVar("Asked")


def read(parse: Callable[[list[str]], Asked | None], argv: Sequence[str] | None) -> tuple[Asked | None, Refused | None]:
    """Parse a command line, None being the process's own: what is asked, or why it is refused.

    Neither where --help was asked for, which has been shown by then, of several ranks by the first.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h"} & set(arguments) and not speaks():
        return None, None
    try:
        return parse(arguments), None
    except Refused as error:
        return None, error


def leave(main: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = main()
    if code:
        time.sleep(0.2)  # the first rank that leaves with an error makes the launcher kill those still leaving
    sys.exit(code)
