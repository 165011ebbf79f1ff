#!/bin/bash
# sbatch recipes/slurm.sh RECIPE [--section.key=value ...], from the checkout, on a file system that all nodes share.
# One torchrun a node; they meet on the first one. A rank that dies restarts all of them from the newest checkpoint.
# Fifteen minutes before its time is over the job saves a checkpoint and goes back to the queue, as after a preemption.
#SBATCH --job-name=flashgrpo
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@900
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=900 # seconds for a last checkpoint after a signal; torch before 2.13 gives 30
# The network that the nodes meet over, where it is not the one that a host's name leads to: a start that hangs.
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
source .venv/bin/activate
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
goes_on=
trap 'goes_on=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1 # to the steps alone
trap : TERM # this script stays until the ranks have saved
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$first_node:${MASTER_PORT:-29500}" \
    --rdzv_id "$SLURM_JOB_ID" \
    --max-restarts 3 \
    -m flashgrpo.grpo.cli train "$@" --resume &
code=0
while kill -0 $! 2>/dev/null; do # a trap ends a wait
    wait $! || true
done
wait $! || code=$? # once more: the last one may have been ended by a trap
[ -z "$goes_on" ] || [ "$code" = 0 ] || scontrol requeue "$SLURM_JOB_ID" # a run that was finished stays so
exit "$code"
