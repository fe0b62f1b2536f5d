#!/usr/bin/env bash
# Checks and measures on a GPU within a time limit: see tools/gpu_check.py --help.
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
