"""Under mpirun: cases of failure of the backend `pneumo`, each of them in a process of its own on every rank.

Arguments: a folder for the results, and the names of cases. The rank that mpirun started imports torch once and forks a
process for each case: that one may hang, die or be killed, which mpirun would otherwise answer by ending the whole job.
Written for each case and rank, as CASE.RANK.json: what the case noted, how its process ended and after how long.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from comm_faults import again, calls, deaths, forks, late, signals, start, teardown
from comm_faults.case import CASES, LIMIT_S, Rank

import pneumo.comm

MODULES = again, calls, deaths, forks, late, signals, start, teardown  # which make their cases known


def run_case(folder: Path, name: str, rank: int, size: int) -> None:
    """In the forked process: run a case, and write what it noted and how it ended."""
    me = Rank(folder, name, rank, size)
    with (folder / f"{name}.{rank}.stack").open("w") as stack:
        faulthandler.dump_traceback_later(LIMIT_S - 5, file=stack)
        failure = None
        try:
            CASES[name](me)
        except Exception:
            failure = traceback.format_exc()
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            me.write({"failure": failure})


def ended(pid: int, limit_s: float) -> int | None:
    """The wait status of a process that ends within the limit, else None: it is killed."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def cases(folder: Path, names: Sequence[str], rank: int, size: int) -> Iterator[str]:
    """Fork for each case, and write how its process ended; in a forked process: yield the case, and end."""
    for name in names:
        begin = time.monotonic()
        pid = os.fork()
        if pid == 0:
            yield name
            return
        status = ended(pid, LIMIT_S)
        seconds = time.monotonic() - begin
        code = None if status is None else os.waitstatus_to_exitcode(status)
        (folder / f"{name}.{rank}.end").write_text(
            json.dumps({"code": code, "seconds": seconds, "pid": pid, "at": time.time()})
        )


def main() -> None:
    """Run all cases one after the other."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    rank, size = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    torch.set_num_threads(1)
    pneumo.comm.register()
    gc.freeze()  # else every process ends by looking through all of torch
    for name in cases(folder, names, rank, size):
        run_case(folder, name, rank, size)


if __name__ == "__main__":
    main()
