#!/usr/bin/env bash
# Sets up, then runs lint, type checks and all tests.
#   tools/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh dev
. .venv/bin/activate
ruff check .
ruff format --check .
mypy
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
# Unit tests two at a time, by file; the others make several processes themselves.
status=0
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile tests/unit || status=$?
python -m pytest tests/distributed tests/run tests/gpu || status=$?
exit "$status"
