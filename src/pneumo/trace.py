"""python -m pneumo.trace RESULT: a result's timeline, or its collectives in the form of torch's flight recorder."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pneumo.errors import Refused
from pneumo.flags import run_app
from pneumo.study.flight_recorder import write_flight_recorder
from pneumo.study.trace import write_trace

app = App(name="python -m pneumo.trace", version_flags=[], help_format="markdown")


@app.default
def command(
    result: Annotated[Path, Parameter(help="The folder of a result, as in results/main/latest.")],
    /,
    *,
    flight_recorder: Annotated[
        Path | None,
        Parameter(help="Write dumps for `torchfrtrace` here instead, one a rank, each run's in a folder of its own."),
    ] = None,
    run: Annotated[int | None, Parameter(help="Of the flight recorder's dumps only those of this run.")] = None,
) -> None:
    """Write trace.json.gz into a result: its sampled steps as a timeline for ui.perfetto.dev or chrome://tracing."""
    if flight_recorder is not None:
        print(*write_flight_recorder(result, flight_recorder, run), sep="\n")
    elif run is not None:
        raise Refused("--run chooses among the dumps of --flight-recorder DIR; name that too, or leave out --run.")
    else:
        print(write_trace(result))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 refused."""
    return run_app(app, ["--flight-recorder", "--help", "--run"], argv)


if __name__ == "__main__":
    sys.exit(main())
