# What the batch jobs share: the environment and what to train. Edit here, or set on submission
# (sbatch --export=ALL,TAG=second jobs/pretrain.slurm; qsub -v TAG=second jobs/pretrain.pbs).
# shellcheck shell=bash

# module load cuda  # what your cluster asks for
if [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

: "${CFG:=configs/synco_swin_tiny.yaml}"
: "${DATA:=data/imagenet}"
: "${OUTPUT:=output}"
: "${TAG:=default}"
: "${LOCAL_DISK:=}"     # a folder on each node's own disk: the data are copied there first
: "${PROCESSES:=4}"     # a node, one for each GPU
: "${MASTER_PORT:=29500}"
: "${MAX_RESTARTS:=3}"  # after a process has died, or (SLURM) a launcher
: "${FLAGS:=}"          # more flags of main_pretrain.py
export CFG DATA OUTPUT TAG LOCAL_DISK PROCESSES MASTER_PORT MAX_RESTARTS FLAGS
# a restart must come before the scheduler's patience ends
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
