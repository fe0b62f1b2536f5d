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
# Whole runs wait a lot, and so run beside the unit tests, which run two at a time, by file.
status=0
runs="$(mktemp)"
trap 'rm -f "$runs"' EXIT
python -m pytest tests/run >"$runs" 2>&1 &
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile tests/unit || status=$?
wait $! || status=$?
cat "$runs"
python -m pytest tests/distributed tests/gpu || status=$?
exit "$status"
