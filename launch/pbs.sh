#!/bin/bash
# Run the main job under PBS (OpenPBS, PBS Pro): `qsub launch/pbs.sh` from the project's root, after ./launch/setup.sh was
# run once on a login node (PNEUMO_MPI=system for the cluster's own MPI). qsub hands on no arguments: write them into
# `arguments` below, or give them by `qsub -v PNEUMO_ARGUMENTS="--model cnn" launch/pbs.sh`.
#PBS -N pneumo
#PBS -l select=2:ncpus=4:mpiprocs=4
#PBS -l walltime=00:30:00
#PBS -j oe
set -euo pipefail
cd "${PBS_O_WORKDIR:?start this script with qsub}"

# With PNEUMO_MPI=system, load here the modules that the set-up was run with:
# module load openmpi
source .venv/bin/activate

read -ra arguments <<<"${PNEUMO_ARGUMENTS:-}"
ranks=$(wc -l <"$PBS_NODEFILE")

# Each line of the node file is the place of one rank.
mpirun -n "$ranks" --hostfile "$PBS_NODEFILE" python -m pneumo.launch ${arguments[@]+"${arguments[@]}"}
