#!/usr/bin/env bash
# GPU tests and benchmarks, with the torch and the packages that the image has (nothing is installed).
#   tools/gpu_check.sh --out DIR      writes tests.txt, environment.json and one JSON file per benchmark to DIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?"--out needs a directory"}; shift 2 ;;
        *) echo "usage: tools/gpu_check.sh --out DIR" >&2; exit 2 ;;
    esac
done
[ -n "$out" ] || { echo "usage: tools/gpu_check.sh --out DIR" >&2; exit 2; }
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: $python has no torch with a CUDA device; nothing was checked" >&2
    exit 1
fi
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$python" tools/gpu_environment.py >"$out/environment.json"
cat "$out/environment.json"
failed=0
"$python" -m pytest -m gpu -p no:cacheprovider tests/gpu 2>&1 | tee "$out/tests.txt" || failed=1
for bench in tools/bench_*.py; do
    [ -e "$bench" ] || continue
    name=$(basename "$bench" .py)
    "$python" "$bench" --device cuda --json >"$out/$name.json" || { echo "gpu_check: $name failed" >&2; failed=1; }
done
exit $failed
