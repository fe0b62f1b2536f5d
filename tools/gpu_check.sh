#!/usr/bin/env bash
# What there is to check and to measure on a GPU, most valuable first, each part with a time limit of its own, so that
# none eats the time of those behind it. Needs torch with CUDA and the project's packages; installs nothing.
#   tools/gpu_check.sh --out DIR [--parts "tests runs …"]      without --parts all of them, about 25 minutes
#
# Each part writes to DIR as it goes: tests-*.txt, runs.jsonl, linear.json, model.json, memory.json, planner.json.
# The exit status is 1 if a part failed or was cut off. Parts that check run side by side; parts that time run alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() { echo "usage: tools/gpu_check.sh --out DIR [--parts \"tests runs linear models memory planner\"]" >&2; exit 2; }
out=
parts="tests runs linear models memory planner"
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?"--out needs a directory"}; shift 2 ;;
        --parts) parts=${2?"--parts needs names"}; shift 2 ;;
        *) usage ;;
    esac
done
[ -n "$out" ] || usage
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: $python has no torch with a CUDA device; nothing was checked" >&2
    exit 1
fi
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" tools/gpu_environment.py | tee "$out/environment.json"

# part FILE SECONDS COMMAND …: what it prints goes to DIR/FILE, its errors to DIR/FILE.err.
part() {
    local file=$1 limit=$2 status=0
    shift 2
    timeout "$limit" "$@" >"$out/$file" 2>"$out/$file.err" || status=$?
    echo "$file: exit status $status after $SECONDS s in all"
    if [ "$status" != 0 ]; then touch "$out/.failed"; fi
}
tests() { part "$1" 300 "$python" -m pytest -v --tb=short -m gpu -p no:cacheprovider "${@:2}"; }
runs() { part "runs-$1.log" "$2" "$python" tools/gpu_runs.py --set "$1" --out "$out/runs.jsonl"; }
bench() { part "$1.json" "$2" "$python" "tools/bench_$1.py" --device cuda --dtype bf16 --json "${@:3}"; }

rm -f "$out/.failed"
for name in $parts; do
    case $name in
        tests)
            tests tests-operator.txt tests/gpu/test_cuda.py tests/gpu/test_feed_gpu.py &
            tests tests-kernels.txt tests/gpu/test_triton_gpu.py -k products_of_blocks &
            tests tests-triton.txt tests/gpu/test_triton_gpu.py -k "not products_of_blocks" &
            wait
            ;;
        runs)
            for set in ddp compiled fsdp zero; do runs "$set" 300 & done
            wait
            ;;
        linear) bench linear 120 --shapes 1b,7b --tokens 8192 --methods "published,random materialize,stratified materialize,blocks materialize,blocks factored,blocks auto" ;;
        models)
            runs 1b 180
            runs 7b 240
            ;;
        memory) bench memory 120 --preset 1b ;;
        planner) part planner.json 240 "$python" tools/bench_planner.py --cuda --sample 40 --max-layers 4 --json ;;
        *) usage ;;
    esac
done
[ ! -e "$out/.failed" ]
