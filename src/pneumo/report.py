"""python -m pneumo.report RESULT: the tables of a result again, from its files alone; needs neither torch nor MPI."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pneumo.flags import run_app
from pneumo.study.results import write_json
from pneumo.study.summary import derive
from pneumo.study.tables import show

app = App(name="python -m pneumo.report", version_flags=[], help_format="markdown")


@app.default
def command(
    result: Annotated[Path, Parameter(help="The folder of a result, as in results/main/latest.")],
    /,
    *,
    json: Annotated[Path | None, Parameter(help="Also write the summary to this file, as in summary.json.")] = None,
) -> None:
    """Derive a result's summary from its other files, and print the comparison, the account and the quality.

    Nothing in the result is changed, so it may be an archived copy on any machine.
    """
    derived = derive(result)
    show(result, derived=derived)
    if json is not None:
        write_json(json, derived.summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 refused."""
    return run_app(app, ["--help", "--json"], argv)


if __name__ == "__main__":
    sys.exit(main())
