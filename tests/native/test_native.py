"""The programs tests/native/test_*.cpp: built without torch, plainly and under each sanitizer, and run."""

import contextlib
import fcntl
import functools
import os
import platform
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from harness import BIN

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(Path(__file__).parent.glob("test_*.cpp"))
# What is looked for in a program's text says whether there is something for the sanitizer to see.
SANITIZERS = {"none": "", "address": "", "thread": "#include <thread>"}
PROGRAMS = {name: [file.stem for file in SOURCES if text in file.read_text()] for name, text in SANITIZERS.items()}
PATH = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
COMPILER = os.environ.get("CXX", "c++")
BUILD_S = 600  # not an expectation: on two free cores all three take about a minute together, the first time

pytestmark = pytest.mark.timeout(BUILD_S + 300)


def run(*command: str | Path, timeout: float = 100) -> str:
    """The output of a command that must succeed; whatever it has started ends with it when its time is up."""
    process = subprocess.Popen(
        command,
        env=os.environ | {"PATH": PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{command[0]}: not done in {timeout:.0f} s\n{process.communicate()[0]}", pytrace=False)
    if process.returncode:
        pytest.fail(f"{' '.join(map(str, command))}: exit {process.returncode}\n{output}", pytrace=False)
    return output


@functools.cache
def why_not(sanitizer: str, scratch: Path) -> str:
    """The reason why nothing can be built, or run, with this sanitizer here; empty when it can."""
    missing = [tool for tool in ("cmake", COMPILER) if shutil.which(tool, path=PATH) is None]
    if missing:
        return f"no {' and no '.join(missing)} here"
    program = scratch / f"empty-{sanitizer}"
    flags = [] if sanitizer == "none" else [f"-fsanitize={sanitizer}"]
    compile_it = [COMPILER, *flags, "-x", "c++", "-", "-o", str(program)]
    for command in (compile_it, [str(program)]):
        done = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
            return f"no {sanitizer} sanitizer here: {said[-1]}" if flags else f"{COMPILER} does not work: {said[-1]}"
    return ""


@functools.cache
def build(sanitizer: str) -> Path:
    """The folder of the built programs, below build/: kept, so that only what has changed is compiled again."""
    folder = ROOT / "build" / f"native-tests-{sanitizer}"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = "" if sanitizer == "none" else sanitizer
    options = ["-DPNEUMO_MODULE=OFF", "-DPNEUMO_TESTS=ON", f"-DPNEUMO_SANITIZE={chosen}"]
    if shutil.which("ninja", path=PATH):
        options += ["-G", "Ninja"]
    with (folder.parent / "native-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of pytest in one tree
        if f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache(folder):
            shutil.rmtree(folder)  # copied here with the tree
        run("cmake", "-S", ROOT, "-B", folder, *options)
        jobs = str(len(os.sched_getaffinity(0)))
        run("cmake", "--build", folder, "-j", jobs, "--target", *PROGRAMS[sanitizer], timeout=BUILD_S)
    return folder


def cache(folder: Path) -> str:
    """The text of a build folder's CMakeCache.txt."""
    file = folder / "CMakeCache.txt"
    return file.read_text() if file.exists() else ""


@pytest.fixture
def built(sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs built with the test's sanitizer."""
    if reason := why_not(sanitizer, tmp_path_factory.getbasetemp()):
        pytest.skip(reason)
    return build(sanitizer)


@pytest.mark.parametrize(("sanitizer", "program"), [(name, p) for name, some in PROGRAMS.items() for p in some])
def test_program(built: Path, program: str) -> None:
    """Each program checks itself, and a sanitizer's complaint is an exit code other than 0 as well."""
    run(built / program)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX is of x86-64")
@pytest.mark.parametrize("sanitizer", ["none"])
def test_kernels_define_nothing_that_other_files_share(built: Path) -> None:
    """The linker keeps one of all equal inline functions: one compiled for AVX-512 would end other CPUs' processes."""
    objects = sorted(built.glob("**/kernels_avx*.o"))
    assert len(objects) == 4, "of reduce and of layers"
    for file in objects:
        symbols = [line.split(maxsplit=2) for line in run("nm", "-C", "--defined-only", file).splitlines()]
        assert symbols
        assert not [name for _, kind, name in symbols if kind in "WVu"], f"{file.name} defines weak symbols"
