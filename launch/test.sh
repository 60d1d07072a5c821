#!/usr/bin/env bash
# Set up what is missing, then check everything that a machine can check. With arguments: only pytest, with them.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/launch/setup.sh"
source "$root/.venv/bin/activate"
cd "$root"

second_mpi() { # another MPI than the environment's, for tests alone; without it they say so, and skip
    local place=$root/.venv/mpich lock=$root/launch/mpich.lock
    ! cmp -s "$lock" "$place/lock" || return 0
    rm -rf "$place"
    python -m pip --no-input --disable-pip-version-check install --quiet --require-hashes --no-deps --ignore-installed \
        --no-warn-script-location --prefix "$place" --requirement "$lock" && cp "$lock" "$place/lock" ||
        printf 'test.sh: MPICH could not be installed: its tests are skipped\n' >&2
}
second_mpi
(($# == 0)) || exec python -m pytest "$@"

failed=()
check() {
    printf -- '--- %s\n' "$*"
    "$@" || failed+=("$1")
}
clang_format() { clang-format --dry-run -Werror src/native/**/*.[ch]pp tests/native/*.cpp; }
shopt -s globstar
check ruff check
check ruff format --check
check clang_format
check mypy
check lint-imports
check python -m pytest
((${#failed[@]} == 0)) || { printf 'failed: %s\n' "${failed[*]}" >&2 && exit 1; }
