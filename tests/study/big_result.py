"""A result of many ranks, written and accounted for: seconds and peak memory. By hand: python tests/study/big_result.py

python tests/study/big_result.py [RANKS STEPS COLLECTIVES [HOSTS]]    by default 1024 ranks, 1000 steps of 10, one clock
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simulated
from synthetic import START_NS, entry, run_file

from pneumo.study.results import ResultFolder, table_schema, write_json
from pneumo.study.schema import PHASES, Clock, ClockHost, ClockSample

US = 1000
BLOCKS = 10


def write(out: Path, ranks: int, steps: int, collectives: int, hosts: int = 1, blocks: int = BLOCKS) -> Path:
    """Write a result of a serial run and one of `ranks`, whose ranks are late at random; a part of it at a time.

    With several `hosts` each has a clock that was measured 100 times, and found to be rank 0's.
    """
    runs = [simulated.SERIAL, ("ddp", "gloo", ranks, 1)]
    folder = ResultFolder.create(out, "big")
    write_json(folder.path / "run.json", run_file(runs, cores=ranks, clock=_clock(ranks, hosts)))
    each = steps // blocks
    serial = simulated.serial_rows(entry(0, *runs[0]), {1: 10 * US}, blocks=blocks, steps=each)
    names = ("steps", "collectives")
    files = [pq.ParquetWriter(folder.path / f"{n}.parquet", table_schema(n), compression="zstd") for n in names]
    files[0].write_table(pa.Table.from_pylist(serial, schema=table_schema("steps")))
    rng = np.random.default_rng(0)
    for block in range(1, blocks + 1):
        for file, name, columns in zip(files, names, _block(rng, block, ranks, each, collectives), strict=True):
            file.write_table(pa.table(columns, schema=table_schema(name)))
    for file in files:
        file.close()
    folder.flush()  # the other tables, without rows
    return folder.path


def _clock(ranks: int, hosts: int) -> Clock:
    found = [ClockHost(name=str(i), ranks=part.tolist()) for i, part in enumerate(np.array_split(range(ranks), hosts))]
    moments = [START_NS + i * 10**12 for i in range(100)]
    samples = [
        ClockSample(rank=host.ranks[0], at_ns=at, offset_ns=0, bound_ns=20 * US) for host in found[1:] for at in moments
    ]
    return Clock(resolution_ns=1, source="tsc", hosts=found, samples=samples)


def _block(
    rng: np.random.Generator, block: int, ranks: int, steps: int, collectives: int
) -> tuple[dict[str, pa.Array], dict[str, pa.Array]]:
    """Columns of the steps and records of one block, of ranks that block on each collective of each step."""
    shape = (steps * collectives, ranks)
    work = rng.integers(100 * US, 200 * US, shape)
    # The arrival of a rank is the previous end and its own work; the end is the last arrival and 50 us of transfer.
    finish = np.cumsum(work.max(1) + 50 * US) + START_NS + block * 10**13
    begin = np.concatenate([[START_NS + block * 10**13], finish[:-1]])
    arrival = begin[:, None] + work
    step = np.repeat(np.arange(steps) + (block - 1) * steps, collectives)
    flat = {"step": np.repeat(step, ranks), "rank": np.tile(np.arange(ranks), shape[0]).astype(np.int32)}
    flat |= {"run": np.full(work.size, 1, np.int32), "block": np.full(work.size, block, np.int32)}
    flat |= {
        "seq": np.repeat(np.arange(shape[0]) + (block - 1) * shape[0], ranks),
        "bytes": np.full(work.size, 1 << 20),
    }
    flat |= {"enqueued_ns": arrival.ravel(), "wait_begin_ns": arrival.ravel()}
    ends = np.repeat(finish, ranks)
    flat |= {"started_ns": ends - 50 * US, "finished_ns": ends, "wait_end_ns": ends}
    text = {"group": f"{ranks} ranks", "op": "allreduce", "dtype": "float32", "backend": "gloo", "bound": "exact"}
    records = {n: pa.array(v) for n, v in flat.items()} | {n: pa.repeat(t, work.size) for n, t in text.items()}
    names = table_schema("collectives").names
    return _steps(rng, block, work, finish, begin, collectives), {name: records[name] for name in names}


def _steps(
    rng: np.random.Generator,
    block: int,
    work: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    finish: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    begin: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    collectives: int,
) -> dict[str, pa.Array]:
    ranks, steps = work.shape[1], finish.size // collectives
    compute = work.reshape(steps, collectives, ranks).sum(1).ravel()
    wall = np.repeat(finish[collectives - 1 :: collectives] - begin[::collectives], ranks)
    share = {"data": 0.1, "forward": 0.3, "backward": 0.5, "optimizer": 0.1}
    values = {p: (compute * share.get(p, 0.0)).astype(np.int64) for p in PHASES}
    values["comm"] = wall - compute
    values["other"] = compute - sum(values[p] for p in share)
    n = wall.size
    columns: dict[str, Any] = {"run": np.full(n, 1, np.int32), "block": np.full(n, block, np.int32)}
    columns |= {"rank": np.tile(np.arange(ranks), steps).astype(np.int32)}
    columns |= {"step": np.repeat(np.arange(steps) + (block - 1) * steps, ranks)}
    columns |= {"images": np.ones(n, np.int64), "begin_ns": np.repeat(begin[::collectives], ranks), "wall_ns": wall}
    for p in PHASES:
        columns |= {f"{p}_ns": values[p], f"{p}_cpu_ns": values[p] * 9 // 10, f"{p}_delay_ns": values[p] // 50}
    columns |= {"helpers_cpu_ns": rng.integers(0, 1000, n), "loss": np.full(n, 0.5), "warmup": np.zeros(n, bool)}
    made = {name: pa.array(v) for name, v in columns.items()} | {"kind": pa.repeat("train", n)}
    return {name: made[name] for name in table_schema("steps").names}


SUMMARIZE = """
import sys, time
from pathlib import Path
from pneumo.study.summary import summarize
start = time.perf_counter()
row = summarize(Path(sys.argv[1])).rows[1]
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(f"{time.perf_counter() - start:.1f} {int(status['VmHWM'].split()[0]) / 2**20:.2f}")
print(f"peer wait {row.loss['peer_wait']:.1f}, transfer {row.loss['transfer']:.1f}, late {len(row.late)}",
      f"residual {row.residual_fraction:+.5f}", file=sys.stderr)
"""


def measure(path: Path) -> tuple[float, float]:
    """Summarize a result in a process of its own; returns its seconds, without imports, and its peak memory in GiB.

    The peak is the kernel's VmHWM: getrusage's ru_maxrss survives execve(), and would be that of who starts it.
    """
    done = subprocess.run([sys.executable, "-c", SUMMARIZE, str(path)], check=True, stdout=subprocess.PIPE, text=True)
    seconds, gib = map(float, done.stdout.split())
    return seconds, gib


def main() -> None:
    """Write, measure, print."""
    shape = [int(number) for number in sys.argv[1:] or (1024, 1000, 10)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = write(Path(folder), *shape)
        size = sum(f.stat().st_size for f in path.iterdir()) / 2**20
        print(f"{' x '.join(map(str, shape))} written in {time.perf_counter() - start:.0f} s, {size:.0f} MiB")
        print("account: {:.1f} s, peak {:.2f} GiB".format(*measure(path)))
    print(f"(the writer's own peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB)")


if __name__ == "__main__":
    main()
