"""What the ranks of test_preprocess do: `preprocess_job.py MODE CACHE [DATA]`; each rank prints one JSON line."""

import copy
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from mpi4py import MPI
from msgspec.structs import asdict

from pneumo import collective
from pneumo.data import cache, cluster, effort, inspect
from pneumo.data import preprocess as module
from pneumo.data.patients import SampleConfig
from pneumo.data.preprocess import DataConfig, preprocess
from pneumo.data.store import Store
from pneumo.errors import PneumoError

COMM = MPI.COMM_WORLD
CACHE = Path(sys.argv[2])
DATA = Path(sys.argv[3]) if len(sys.argv) > 3 else None
SIZES = (48, 128)


def make(interface: str = "lo", **options: Any) -> Store:
    """Preprocess as the main job does."""
    config = DataConfig(DATA, CACHE, sizes=SIZES, sample=SampleConfig(patients=12, size=256), **options)
    return preprocess(config, COMM, interface=interface, report=print)


def listeners() -> set[tuple[str, int]]:
    """The (address, port) on which this process listens, from the kernel's tables."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{name}").removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    found = set()
    for table, family in (("/proc/self/net/tcp", socket.AF_INET), ("/proc/self/net/tcp6", socket.AF_INET6)):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


@contextmanager
def watched() -> Iterator[set[tuple[str, int]]]:
    """Collect what this process comes to listen on meanwhile."""
    before, seen, stop = listeners(), set[tuple[str, int]](), threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            seen.update(listeners() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def state() -> dict[str, Any]:
    """What a library could change in a process for good."""
    import dask

    names = ("", "distributed", "distributed.worker", "distributed.scheduler", "tornado", "asyncio")
    return {
        "config": copy.deepcopy(dask.config.config),
        "levels": [logging.getLogger(name).level for name in names],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "listeners": sorted(listeners()),
    }


def failure(work: Callable[[], Any]) -> list[str]:
    """The kind and the text of the error that every rank must get."""
    try:
        work()
    except PneumoError as error:
        return [type(error).__name__, str(error)]
    return ["no error", ""]


def plain() -> dict[str, Any]:
    """Preprocess, and see that the process listens on loopback only and is as before."""
    import distributed  # noqa: F401 -- its import sets what `state` reads

    before = state()
    with watched() as seen:
        store = make()
    left = {thread.name for thread in threading.enumerate()} - {"MainThread"}
    return {
        "store": store.path.name,
        "fingerprint": store.fingerprint,
        "patients": store.index["patient"].tolist(),
        "listened": sorted(seen),
        "changed": [name for name, value in state().items() if value != before[name]],
        "threads": sorted(name for name in left if not name.startswith("Dask-Offload")),
        "sum": COMM.allreduce(COMM.rank + 1),
    }


def cached() -> dict[str, Any]:
    """Open what is there; nothing of Dask is needed for it."""
    store = make()
    return {"store": store.path.name, "dask": "distributed" in sys.modules}


def efforts() -> dict[str, Any]:
    """Preprocess twice, with images that take their time and then a rank that comes late; what the ranks' time went to.

    `apart` is by how much the parts of this rank miss the time that it measured itself.
    """
    real = inspect.inspect

    def slow(*args: Any) -> Any:
        time.sleep(0.05)
        return real(*args)

    def late() -> Store:
        if COMM.rank == 0:
            time.sleep(0.6)
        return make()

    result: dict[str, Any] = {"apart": []}
    with mock.patch.object(inspect, "inspect", slow):
        for name, work in (("made", make), ("opened", late)):
            begin = time.monotonic()
            _, found = effort.measured(COMM, work)
            result[name] = [asdict(one) for one in found]
            result["apart"].append(time.monotonic() - begin - sum(result[name][COMM.rank].values()))
    return result


def killed_worker() -> dict[str, Any]:
    """Die as by kill -9 on the last rank, with some pictures written."""
    real, calls = inspect.inspect, []

    def fatal(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3 and COMM.rank == COMM.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    with mock.patch.object(inspect, "inspect", fatal):
        make()
    return {}


def killed_last() -> dict[str, Any]:
    """Die as by kill -9 on rank 0 when all that is missing is the rename."""

    def fatal(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(cache, "publish", fatal):
        make()
    return {}


def damaged() -> dict[str, Any]:
    """Spoil the store in several ways; each time it has to be made again, the same."""
    folder = make().path
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    COMM.Barrier()

    def cut(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    def flip(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    outcomes = []
    for name, spoil in (
        ("pictures-128.npy", cut),
        ("pictures-128.npy", flip),
        ("index.parquet", flip),
        ("quarantine.csv", Path.unlink),
        ("store.json", cut),
        ("store.json", Path.unlink),
    ):
        if COMM.rank == 0:
            spoil(folder / name)
        COMM.Barrier()
        make()
        outcomes.append({path.name: path.read_bytes() for path in folder.iterdir()} == whole)
        COMM.Barrier()
    return {"repaired": outcomes}


def broken() -> dict[str, Any]:
    """Fail on one rank in several ways; all ranks must get the same sentence, and MPI must work afterwards."""
    last = COMM.rank == COMM.size - 1

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("not today")

    import distributed

    outcomes = {
        "interface": failure(lambda: make(interface="nonesuch0")),
        "strict": failure(lambda: make(strict=True)),
    }
    shutil.rmtree(CACHE, ignore_errors=True)
    COMM.Barrier()
    # In a world where ranks take what comes, whoever inspects must fail: rank 0 alone, and the last one alone.
    for name, guilty in (("full_first", COMM.rank == 0), ("full_last", last)):
        with mock.patch.object(inspect, "inspect", full) if guilty else mock.MagicMock():
            outcomes[name] = failure(make)
    with mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=1000)):
        outcomes["space"] = failure(make)
    with mock.patch.object(module, "_write_tables", refuse):
        outcomes["tables"] = failure(make)
    with mock.patch.multiple(cluster, _START_TIMEOUT_S=3, _CLOSE_TIMEOUT_S=3):
        with mock.patch.object(distributed.Scheduler, "start_unsafe", refuse):
            outcomes["scheduler"] = failure(make)
        for name, guilty in (("worker_first", COMM.rank == 0), ("worker_last", last)):
            with mock.patch.object(distributed.Worker, "start_unsafe", refuse) if guilty else mock.MagicMock():
                outcomes[name] = failure(make)
    collective.wait_for_all(COMM)  # rank 0 has removed its staging folder
    left = sorted(path.name for path in CACHE.iterdir() if path.name != ".lock")
    collective.wait_for_all(COMM)
    return {"outcomes": outcomes, "left": left, "good": len(make().index)}


def encrypted() -> dict[str, Any]:
    """Look at a running cluster from outside: whoever has no certificate of this run gets nowhere."""

    def probe(address: str) -> list[Any]:
        host, port = address.removeprefix("tls://").split(":")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection((host, int(port)), timeout=10) as bare:
            try:
                with context.wrap_socket(bare) as wrapped:
                    named = b"dask-internal" in (wrapped.getpeercert(binary_form=True) or b"")
                    return [address, named, len(wrapped.recv(1))]
            except (ssl.SSLError, ConnectionError):
                return [address, True, 0]

    def work(client: Any) -> list[Any]:
        addresses = [client.scheduler.address, *client.scheduler_info(n_workers=-1)["workers"]]
        return [probe(address) for address in addresses]

    found = cluster.run(COMM, work, interface="lo", scratch=CACHE)
    return {"found": found}


def asleep() -> dict[str, Any]:
    """Wait a second for rank 0, and measure which share of a core that takes."""
    collective.wait_for_all(COMM)
    begin_s, begin_cpu_s = time.monotonic(), time.process_time()
    collective.from_first(COMM, lambda: time.sleep(1.0))
    return {"cores": (time.process_time() - begin_cpu_s) / (time.monotonic() - begin_s)}


def held() -> dict[str, Any]:
    """Have another process prune the cache, as if everything in it were old, while this one uses its store."""
    abandoned = CACHE / "store-abandoned"
    store = make()
    if COMM.rank == 0:
        abandoned.mkdir()
        for folder in (abandoned, store.path):
            os.utime(folder, (1, 1))
        code = (
            "import sys, pathlib; from pneumo.data import cache; cache.KEPT = 0; cache.prune(pathlib.Path(sys.argv[1]))"
        )
        subprocess.run([sys.executable, "-c", code, str(CACHE)], check=True)
    COMM.Barrier()
    return {"mine": store.path.exists(), "abandoned": abandoned.exists()}


def abort(*error: Any) -> None:
    """End all ranks when one fails, instead of leaving them to wait for it."""
    sys.__excepthook__(*error)
    COMM.Abort(1)


if __name__ == "__main__":
    sys.excepthook = abort
    result = globals()[sys.argv[1]]()
    for rank in range(COMM.size):
        collective.wait_for_all(COMM)
        if rank == COMM.rank:
            print(json.dumps({"rank": rank, **result}), flush=True)
