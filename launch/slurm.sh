#!/bin/bash
# Run the main job under Slurm: `sbatch launch/slurm.sh [arguments of python -m pneumo.launch]`, from the project's root,
# after ./launch/setup.sh was run once on a login node (PNEUMO_MPI=system for the cluster's own MPI). Each rank is a task;
# change the next lines to what the cluster has.
#SBATCH --job-name=pneumo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=1
#SBATCH --time=00:30:00
#SBATCH --output=pneumo-%j.out
##SBATCH --gpus-per-node=4
##SBATCH --partition=NAME
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"

# With PNEUMO_MPI=system, load here the modules that the set-up was run with:
# module load openmpi
source .venv/bin/activate

# Slurm tells Open MPI's mpirun which nodes it has and how many ranks go on each.
mpirun -n "$SLURM_NTASKS" python -m pneumo.launch "$@"

# Where Slurm starts MPI jobs itself (`srun --mpi=list` names pmix, and the MPI is the cluster's own), this is the same:
# srun --mpi=pmix --cpu-bind=none python -m pneumo.launch "$@"
