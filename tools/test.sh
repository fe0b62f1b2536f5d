#!/usr/bin/env bash
# Sets up, then runs lint, type checks and tests.
#   tools/test.sh                      all tests
#   tools/test.sh --fast               the unit tests that take no more than a moment each
#   tools/test.sh [pytest arguments]   what pytest is told to run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh dev
. .venv/bin/activate
ruff check .
ruff format --check .
mypy
# Two processes: each starts with one half of the tests, in their order, and takes over tests of the other when it has
# none left.
unit=(python -m pytest -n 2 --dist worksteal tests/unit)
if [ "${1-}" = --fast ]; then
    exec "${unit[@]}" -m "not slow" "${@:2}"
elif [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
# Whole runs and ranks wait a lot, for each other and for faults, and so run beside the unit tests. Whole runs go one
# after the other, because two torchruns that start at once may choose the same port.
status=0
beside="$(mktemp -d)"
trap 'rm -rf "$beside"' EXIT
python -m pytest tests/run >"$beside/run" 2>&1 &
runs=$!
python -m pytest tests/distributed tests/gpu >"$beside/ranks" 2>&1 &
ranks=$!
"${unit[@]}" || status=$?
wait "$ranks" || status=$?
cat "$beside/ranks"
wait "$runs" || status=$?
cat "$beside/run"
exit "$status"
