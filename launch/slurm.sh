#!/usr/bin/env bash
# A Slurm job: one task a machine, each of which starts a process on every card of its machine.
# usage: sbatch [--nodes=2] launch/slurm.sh FILE.yaml [setting=value ...]
# Partition, account and time limit are your cluster's: give them to sbatch. The job can be put in the queue again as it is: it goes on from its last checkpoint.
#SBATCH --job-name=ernie-tune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@300
# --signal: 300 s before the time limit every rank is told to finish its step and save.
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,3p' "$0" >&2
  exit 2
fi
# Slurm runs a copy of this file; the checkout is where sbatch was called, or ERNIE_TUNE_ROOT.
root="${ERNIE_TUNE_ROOT:-$SLURM_SUBMIT_DIR}"
NNODES="$SLURM_NNODES"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# Jobs that share a machine must not share a port.
MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export NNODES MASTER_ADDR MASTER_PORT
# One folder of lines a machine: processes of the same number on two machines would otherwise share a file.
export ERNIEKIT_DIST_LOG="${ERNIEKIT_DIST_LOG:-output/dist_log}"
# The quoted variables are those of the task, not of this script.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c \
  'RANK="$SLURM_NODEID" ERNIEKIT_DIST_LOG="$ERNIEKIT_DIST_LOG/$SLURMD_NODENAME" exec bash "$0/launch/node.sh" "$@"' "$root" "$@"
