#!/usr/bin/env bash
# Checks and measures on a GPU within a time limit: see tools/gpu_check.sh --help.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" "$root/tools/gpu_check.py" "$@"
