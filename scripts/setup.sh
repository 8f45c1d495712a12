#!/usr/bin/env bash
# Makes (or completes) the virtual environment that the other scripts use, and prints its python.
#   bash scripts/setup.sh [run|dev]
# `run` is what training and sampling need; `dev` adds what the tests need.
# OPENSORA_VENV names another place for it; PYTHON another interpreter (3.11 or later).
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
kind=${1:-run}
venv=${OPENSORA_VENV:-$root/.venv}
python=${PYTHON:-python3}

case $kind in
run) extra="" ;;
dev) extra="[dev]" ;;
*)
    echo "setup.sh: '$kind' is not run or dev" >&2
    exit 64
    ;;
esac

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup.sh: $("$python" --version) is too old; set PYTHON to a Python 3.11 or later" >&2
    exit 64
fi

# The stamp says which set is installed: the same inputs need no second look.
wanted=$(cat "$root/constraints.txt" "$root/pyproject.toml" | sha256sum | cut -d' ' -f1)
stamp=$venv/opensora-$kind.stamp
if [[ ! -f $stamp || $(cat "$stamp") != "$wanted" || ! -x $venv/bin/python ]]; then
    [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
    # torch is named in the same command, or pip may choose a build for another machine.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" torch --editable "$root$extra" >&2
    echo "$wanted" >"$stamp"
fi
echo "$venv/bin/python"
