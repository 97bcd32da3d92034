#!/usr/bin/env bash
# Trains on several nodes of a Slurm cluster, across as many jobs as it takes:
#
#   sbatch --nodes 2 scripts/slurm.sh configs/gpt2_124m.yaml --micro_batch_size auto
#
# The words behind the script's name are those of scripts/train_gpt2.py; --resume auto is added.
# Five minutes before the time limit Slurm sends SIGUSR1 to this script alone (the B: below). It
# passes it on through srun and torchrun to every rank; they save after the step at hand and end,
# and the job is put back into the queue, where it goes on. torchrun ends with status 1 then,
# whatever its workers return, so what decides is whether this script was signalled: a run that
# fails by itself is not put back. A job that is preempted is put back by Slurm itself (--requeue).
# A rank that dies ends all; torchrun starts them again, three times at most.
# Adapt the lines of resources, and the one that activates the environment.

#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: sbatch scripts/slurm.sh CONFIG.yaml [--option value ...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?this script is for sbatch}"
if [[ -f .venv/bin/activate ]]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000))

# Longer than a step and a checkpoint, shorter than what is left when the signal comes.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${GPUS_PER_NODE:-gpu}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${hosts[0]}:$port" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --max-restarts 3 \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 \
    --shutdown-timeout 240 \
    scripts/train_gpt2.py "$@" --resume auto &
step=$!

signalled=""
trap 'signalled=yes; kill -USR1 "$step"' USR1
trap 'kill -TERM "$step"' TERM

# A trapped signal ends `wait`, not what it waits for.
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

if [[ $status -ne 0 && -n $signalled ]]; then
    echo "slurm.sh: saved before the time limit, back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
