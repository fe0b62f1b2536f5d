#!/usr/bin/env bash
# Creates .venv and installs the project with its pinned dependencies. Safe to run again: does only what is missing.
#   tools/setup.sh [extra …]      extras of setup.cfg, such as dev
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
    echo "setup: needs Python 3.11 or 3.12, but $python is $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
    exit 1
fi
extras=$(IFS=,; echo "$*")
stamp=.venv/.installed
wanted="$(cat setup.cfg constraints.txt pyproject.toml | cksum) [$extras]"
if [ -f "$stamp" ] && grep -qxF "$wanted" "$stamp"; then
    exit 0
fi
echo "setup: installing into .venv what is missing; the first time minutes, because PyTorch's CUDA build is gigabytes" >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
# Torch by its exact version and first: DeepSpeed's installation looks at it, and an open range would bring
# in another build. DS_BUILD_OPS=0: none of DeepSpeed's extensions is needed here.
"${pip[@]}" torch==2.13.0 numpy
DS_BUILD_OPS=0 "${pip[@]}" --editable ".${extras:+[$extras]}"
# The stamp holds one line for every set of extras that the present versions were installed with.
{ grep -F "${wanted% \[*} " "$stamp" 2>/dev/null || true; echo "$wanted"; } >"$stamp.new"
mv "$stamp.new" "$stamp"
