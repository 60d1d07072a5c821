#!/usr/bin/env bash
# Set up what is missing, then run the main job on 8 ranks; arguments go on to `python -m pneumo.launch` (see its --help).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
"$root/launch/setup.sh"
source "$root/.venv/bin/activate"
exec mpirun -n 8 python -m pneumo.launch "$@"
