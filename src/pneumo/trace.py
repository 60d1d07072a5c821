"""python -m pneumo.trace RESULT: make trace.json.gz of a result, as --trace does at the end of a study."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pneumo.errors import PneumoError
from pneumo.flags import one_sentence
from pneumo.study.trace import write_trace

app = App(name="python -m pneumo.trace", version_flags=[], help_format="markdown")


@app.default
def command(result: Annotated[Path, Parameter(help="The folder of a result, as in results/main/latest.")], /) -> None:
    """Write trace.json.gz into a result: its sampled steps as a timeline for ui.perfetto.dev or chrome://tracing."""
    print(write_trace(result))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 refused."""
    try:
        with one_sentence(["--help"]):
            app(
                sys.argv[1:] if argv is None else argv,
                exit_on_error=False,
                print_error=False,
                result_action="return_value",
            )
    except PneumoError as error:
        print(f"pneumo: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
