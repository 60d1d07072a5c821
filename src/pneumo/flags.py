"""What the command lines have in common: values with commas, and what is wrong with a flag, in one sentence."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cyclopts import App, CycloptsError, UnknownOptionError

from pneumo.errors import PneumoError, Refused


def split(_type: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    """Read values with commas between, each once, in their order; a converter of cyclopts."""
    parts = [part.strip() for token in tokens for part in token.value.split(",")]
    return tuple(dict.fromkeys(part for part in parts if part))


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that a mistyped one is nearest to, as the end of a sentence, with all known names."""
    names = sorted(known)
    found = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean {found[0]}? " if found else ""
    return f"{hint}(known: {', '.join(names)})"


@contextmanager
def one_sentence(flags: Iterable[str]) -> Iterator[None]:
    """Turn what cyclopts finds wrong inside into Refused with one sentence; `flags` are the known ones."""
    try:
        yield
    except UnknownOptionError as error:
        keyword = error.token.keyword or error.token.value if error.token else "?"
        raise Refused(f"Unknown flag {keyword}: {nearest(keyword, flags)}.") from None
    except CycloptsError as error:
        if isinstance(error.__cause__, Refused):
            raise error.__cause__ from None
        raise Refused(" ".join(str(error).split())) from None


def run_app(app: App, flags: Iterable[str], argv: Sequence[str] | None) -> int:
    """Run the one command of an app that needs no MPI world; returns the exit code: 0 done, 1 failed, 2 refused."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with one_sentence(flags):
            app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except PneumoError as error:
        print(f"pneumo: {error}", file=sys.stderr)
        return error.exit_code
    return 0
