"""Build Horovod's wheel once against the torch and the MPI of this environment, keep it in the cache, install it.

Horovod 0.28.1 is its last release and older than the torch that it is built against here, so four edits are made to
its CMake files (each must match exactly once, or the build stops): C++20 in two places, which torch's headers need
(horovod/horovod#3996, #3998); no CUDA in a build for CPUs, where an `nvcc` on PATH alone misleads it; and a run path
relative to the library itself, so that the cached wheel serves every environment and not only the one that built it.
Debugging symbols are left out, which saves a sixth of the time and nine tenths of the size.

Exit codes: 0 installed, 1 not built (one line on standard error says why).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCK = HERE / "horovod.lock"
ARCH_FLAGS = {"avx": "-mavx", "f16c": "-mf16c", "fma": "-mfma"}

# (file, what stands there, what shall stand there, does it hold for a build with CUDA too)
EDITS = (
    ("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 20)", True),
    ("horovod/torch/CMakeLists.txt", "    set(CMAKE_CXX_STANDARD 14)", "    set(CMAKE_CXX_STANDARD 20)", True),
    (
        "CMakeLists.txt",
        "project(horovod CXX)",
        "project(horovod CXX)\n"
        'set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O3 -DNDEBUG")\n'
        "set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\n"
        'set(CMAKE_INSTALL_RPATH "$ORIGIN/../../torch/lib;$ORIGIN/../../../..;$ENV{PNEUMO_MPI_LIBRARIES}")',
        True,
    ),
    (
        "cmake/Modules/FindPytorch.cmake",
        'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)',
        'set(Pytorch_CUDA "FALSE")',
        False,
    ),
)


class BuildError(Exception):
    """Horovod could not be built; the text is the reason, one line."""


def cache_folder() -> Path:
    """The folder of pneumo's Horovod builds in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pneumo" / "horovod"


def environment(cuda: bool) -> dict[str, str]:
    """The environment of the build: this Python's programs first on PATH, Horovod's switches, no stray settings."""
    scripts = sysconfig.get_path("scripts")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HOROVOD_", "CMAKE_", "OMPI_", "PIP_NO_BINARY"))}
    env |= {
        "PATH": scripts + os.pathsep + os.environ.get("PATH", ""),
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITHOUT_GLOO": "1",
        "HOROVOD_CPU_OPERATIONS": "MPI",
        "HOROVOD_BUILD_ARCH_FLAGS": " ".join(arch_flags()) or "-O3",  # an empty value would mean -march=native's own
        "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    if cuda:
        import torch

        nccl = Path(torch.__file__).parent.parent / "nvidia" / "nccl"
        env |= {"HOROVOD_GPU": "CUDA", "HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_HOME": str(nccl)}
    return env


def arch_flags() -> list[str]:
    """The compiler's flags for what Horovod's hand-written loops use, as far as this CPU has it (part of the key)."""
    match = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    have = set(match.group(1).split()) if match else set()
    return [flag for name, flag in ARCH_FLAGS.items() if name in have]


def output(*command: str, env: dict[str, str]) -> str:
    """What a command prints, or BuildError if it cannot be run."""
    try:
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not on PATH") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()
        raise BuildError(f"`{' '.join(command)}` failed: {said[-1] if said else error.returncode}") from None


def mpi(env: dict[str, str]) -> tuple[str, str]:
    """(name and version of mpicxx's MPI, its library folder or "" where that is this environment's own)."""
    compiler = shutil.which("mpicxx", path=env["PATH"])
    if compiler is None:
        raise BuildError("mpicxx is not on PATH")
    library = ""
    if Path(compiler).parent != Path(sysconfig.get_path("scripts")):
        link = output(compiler, "-show", env=env)
        library = next(iter(re.findall(r"-L\s*(\S+)", link)), "")
    version = output(shutil.which("mpirun", path=env["PATH"]) or "mpirun", "--version", env=env).splitlines()
    words = [line.strip() for line in version if re.search(r"\d+\.\d+", line)]
    return (words or version)[0], library


def key(env: dict[str, str], cuda: bool) -> dict[str, str]:
    """Everything that the wheel depends on."""
    compiler = output(env.get("CXX", "c++"), "--version", env=env).splitlines()[0]
    name, library = mpi(env)
    return {
        "horovod": hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12],
        "patch": hashlib.sha256(repr(EDITS).encode()).hexdigest()[:12],
        "python": sysconfig.get_config_var("SOABI"),
        "torch": importlib.metadata.version("torch"),
        "mpi": f"{name} {library}".strip(),
        "compiler": compiler,
        "arch": f"{platform.machine()} {env['HOROVOD_BUILD_ARCH_FLAGS']}",
        "cuda": str(cuda),
    }


def edit(tree: Path, cuda: bool) -> None:
    """Apply EDITS to Horovod's unpacked source."""
    for name, old, new, always in EDITS:
        if cuda and not always:
            continue
        path = tree / name
        text = path.read_text()
        if text.count(old) != 1:
            raise BuildError(f"{name} of this Horovod is not the one that our patch is for")
        path.write_text(text.replace(old, new))


def run(command: list[str], log: Path, env: dict[str, str], cwd: Path, note: str) -> None:
    """Run one command of the build, its output appended to the log; a line every 30 s says that it goes on."""
    begin = time.monotonic()
    with log.open("a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=cwd, start_new_session=True)
        try:
            while True:
                try:
                    code = process.wait(timeout=30)
                    break
                except subprocess.TimeoutExpired:
                    print(f"    {note}: {time.monotonic() - begin:.0f} s", flush=True)
        except BaseException:
            os.killpg(process.pid, 15)  # make, cmake and the compilers are one group of their own
            process.wait()
            raise
    if code:
        raise BuildError(reason(log.read_text(errors="replace")))


def reason(log: str) -> str:
    """The first line of a build log that is an error, not a remark about one."""
    compiler, cmake = r"^.*:\d+(?::\d+)?: (?:fatal )?error: .*$", r"^ *CMake Error at .*(?:\n.*){0,3}"
    patterns = (compiler, cmake, r"^.*(?:ld|collect2|make\b.*): .*\berror\b.*$", r"^ *ERROR\b.*$", r"^.*[Ee]rror: .*$")
    for pattern in patterns:
        if match := re.search(pattern, log, re.M):
            return " ".join(match.group(0).split())[:300]
    return "the build ended without saying why"


def build(folder: Path, versions: dict[str, str], env: dict[str, str], cuda: bool) -> Path:
    """Download, patch and build in scratch folders; renaming the finished one to `folder` is the last step."""
    log = folder.parent / f"{folder.name}.log"
    log.write_text("".join(f"{k}: {v}\n" for k, v in versions.items()))
    wheels = Path(tempfile.mkdtemp(prefix=".build-", dir=folder.parent))
    # Neither mpicxx's flags nor Horovod's own CMake files can carry a path with a space in it.
    scratch = Path(tempfile.mkdtemp(prefix="pneumo-", dir=None if " " in str(wheels) else wheels))
    try:
        if " " in sys.prefix and not env["PNEUMO_MPI_LIBRARIES"]:
            env = env | {"PATH": without_spaces(scratch / "mpi") + os.pathsep + env["PATH"]}
        pip = [sys.executable, "-m", "pip", "--no-input"]
        download = [*pip, "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
        run([*download, "-r", str(LOCK), "-d", str(scratch)], log, env, scratch, "downloading Horovod's source")
        with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
            # The archive is the one that the lock's hash names; early releases of Python 3.11 have no filters.
            if hasattr(tarfile, "data_filter"):
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(scratch)
        tree = next(path for path in scratch.glob("horovod-*") if path.is_dir())
        edit(tree, cuda)
        command = [*pip, "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(tree)]
        run(command, log, env, scratch, "building Horovod")
        shutil.rmtree(scratch)
        (wheels / "versions.json").write_text(json.dumps(versions, indent=1))
        wheels.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(wheels, ignore_errors=True)
    return next(folder.glob("*.whl"))


def without_spaces(folder: Path) -> str:
    """Make links to this environment's MPI and compilers that name them; returns the latter's folder."""
    scripts = Path(sysconfig.get_path("scripts"))
    (folder / "bin").mkdir(parents=True)
    for name in ("include", "lib"):
        (folder / name).symlink_to(Path(sys.prefix, name))
    for name in ("mpicxx", "mpic++", "mpiCC", "mpiexec"):  # CMake looks for the first three where the last one is
        script = folder / "bin" / name
        script.write_text(f"#!/bin/sh\n'{scripts / name}' \"$@\" | sed 's|{sys.prefix}|{folder}|g'\n")
        script.chmod(0o755)
    return str(folder / "bin")


def clean(cache: Path) -> None:
    """Remove what interrupted builds left; only called under the lock, when no other build runs."""
    for left in cache.glob(".build-*"):
        shutil.rmtree(left, ignore_errors=True)


def complain_early(env: dict[str, str]) -> None:
    """Say in our own words what the build would end with after a minute."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise BuildError("Python's own headers are missing (Python.h; on Debian: python3-dev)")
    if shutil.which("make", path=env["PATH"]) is None:
        raise BuildError("make is not on PATH")


def gpu() -> bool:
    """Whether this machine has an NVIDIA GPU and the compiler for it."""
    return shutil.which("nvcc") is not None and any(Path("/proc/driver/nvidia/gpus").glob("*"))


def wheel(cuda: bool) -> Path:
    """The path of the cached wheel, built first if need be; two set-ups at once wait for each other."""
    env = environment(cuda)
    versions = key(env, cuda)
    env["PNEUMO_MPI_LIBRARIES"] = mpi(env)[1]
    digest = hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:16]
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / digest
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("    waiting for another set-up that builds Horovod", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if found := next(iter(folder.glob("*.whl")), None):
            return found
        complain_early(env)
        clean(cache)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            return build(folder, versions, env, cuda)
        except BuildError as error:
            raise BuildError(f"{error} (log: {cache / (digest + '.log')})") from None


def best_wheel() -> Path:
    """The wheel with NCCL where there are GPUs and it can be built, else the one for CPUs."""
    if gpu():
        try:
            return wheel(cuda=True)
        except BuildError as error:
            print(f"    Horovod for GPUs was not built, the one for CPUs follows: {error}", flush=True)
    return wheel(cuda=False)


def main() -> int:
    """Build or find the wheel, and install it here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--no-install", action="store_true", help="only fill the cache, and print the wheel's path")
    arguments = parser.parse_args()
    # An interrupted set-up ends this by an exception, so that the compilers, in a session of their own, end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        path = best_wheel()
        if arguments.no_install:
            print(path)
            return 0
        install = [sys.executable, "-m", "pip", "--no-input", "install", "-q", "--no-deps", "--no-index"]
        output(*install, "--force-reinstall", str(path), env=environment(cuda=False))
    except (BuildError, OSError) as error:
        print(f"Horovod was not built: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Horovod's build was interrupted; start again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
