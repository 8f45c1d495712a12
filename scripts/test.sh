#!/usr/bin/env bash
# What CI runs: the environment, lint, format, types, tests. Arguments go to pytest.
#   bash scripts/test.sh [--slow] [PYTEST ARGUMENTS]
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=$(bash "$root/scripts/setup.sh" dev)
cd "$root"
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
marks="not slow and not gpu"
if [[ ${1:-} == --slow ]]; then
    marks="not gpu"
    shift
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
# Named, or pyright looks for packages in whatever python comes first on the PATH.
"$python" -m pyright --pythonpath "$python" opensora
exec "$python" -m pytest -m "$marks" -n "${OPENSORA_TEST_PROCESSES:-2}" --dist loadgroup "$@"
