#!/usr/bin/env bash
#SBATCH --job-name=opensora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@180
# A training job under Slurm. Three minutes before its time is over, or when it is pre-empted, the
# run saves and ends with 75, and the job goes back into the queue to go on.
#   sbatch --nodes 4 --time 12:00:00 scripts/slurm.sh CONFIG [KEY=VALUE]...
# sbatch's own options come before the script and take the place of the lines above. Submit it from
# the project's root: Slurm runs a copy of this file from elsewhere.
set -euo pipefail

root=${OPENSORA_ROOT:-${SLURM_SUBMIT_DIR:?slurm.sh: start it with sbatch}}
NNODES=${SLURM_JOB_NUM_NODES:?slurm.sh: start it with sbatch}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NNODES MASTER_ADDR MASTER_PORT
command=(srun --kill-on-bad-exit=0 --wait=300
    bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' bash "$root/scripts/train.sh" "$@")
printf '%q ' "${command[@]}" && echo

"${command[@]}" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' TERM
trap 'kill -USR1 "$child" 2>/dev/null || true' USR1 # srun hands it on: save and go on
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` early
    wait "$child" || true
done
code=0
wait "$child" || code=$?
if [[ $code -eq 75 ]]; then
    echo "stopped and resumable: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
