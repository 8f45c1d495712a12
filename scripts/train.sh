#!/usr/bin/env bash
# Trains under torchrun, on this node or as one node of several, and ends with the run's own exit
# code: 75 means that the same command goes on. SIGTERM to this script, to the launcher or to one
# rank saves and stops with 75; SIGUSR1 to any of them saves and goes on.
#   bash scripts/train.sh CONFIG [KEY=VALUE]...
# NPROC: ranks on this node (default: its GPUs, or 1). NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT:
# several nodes. MAX_RESTARTS: how often torchrun starts all ranks again (default 3). PYTHON: an
# interpreter that has opensora; otherwise scripts/setup.sh makes one.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $# -lt 1 ]]; then
    echo "train.sh: name a config, such as configs/quickstart/stdit.yaml" >&2
    exit 64
fi
python=${PYTHON:-python3}
if ! "$python" -c 'import opensora' 2>/dev/null; then
    python=$(bash "$root/scripts/setup.sh" run)
fi

gpus=$(command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
nproc=${NPROC:-$((${gpus:-0} > 0 ? gpus : 1))}
if [[ ${NNODES:-1} -gt 1 ]]; then
    : "${NODE_RANK:?train.sh: NNODES is set, so NODE_RANK (0 to NNODES - 1) has to be}"
    : "${MASTER_ADDR:?train.sh: NNODES is set, so MASTER_ADDR (a host of node 0) has to be}"
    nodes=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    nodes=(--standalone)
fi
command=("$python" -m opensora.cli.launch --nproc-per-node "$nproc" "${nodes[@]}"
    --max-restarts "${MAX_RESTARTS:-3}" --shutdown-timeout "${SHUTDOWN_TIMEOUT:-120}"
    -m opensora train "$@")
printf '%q ' "${command[@]}" && echo

(trap '' USR1 && exec "${command[@]}") & # ignored until the launcher listens
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
trap 'kill -USR1 "$child" 2>/dev/null || true' USR1
while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` early
    wait "$child" || true
done
code=0
wait "$child" || code=$?
exit "$code"
