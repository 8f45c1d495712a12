#!/usr/bin/env bash
# Makes (or completes) a virtual environment for engine.kind=colossal, and prints its python.
#   bash scripts/colossal.sh [run|dev]
# ColossalAI 0.5.0 pins a torch (2.5.1), transformers and others that nothing else here works with, so
# it is installed without its dependencies, in an environment of its own; what it imports is named.
# OPENSORA_COLOSSAL_VENV names another place for it; PYTHON another interpreter (3.11 or later).
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${OPENSORA_COLOSSAL_VENV:-$root/.venv-colossal}
packages=(colossalai==0.5.0 galore_torch==1.0 bitsandbytes==0.49.2)
imported=(transformers diffusers peft==0.21.2 accelerate==1.15.0 psutil==7.2.2)

python=$(OPENSORA_VENV=$venv bash "$root/scripts/setup.sh" "${1:-run}")
stamp=$venv/opensora-colossal.stamp
if [[ ! -f $stamp || $(cat "$stamp") != "${packages[*]} ${imported[*]}" ]]; then
    "$python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" torch "${imported[@]}" >&2
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps "${packages[@]}" >&2
    "$python" -c 'import colossalai.booster.plugin' >&2
    echo "${packages[*]} ${imported[*]}" >"$stamp"
fi
echo "$python"
