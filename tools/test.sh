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
exec python -m pytest "$@"
