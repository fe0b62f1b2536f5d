#!/usr/bin/env bash
# Sets up, then pretrains a small SLTrain LLaMA on this machine: two processes, DeepSpeed ZeRO, embedded corpus.
#   tools/quickstart.sh [section.key=value …]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
. .venv/bin/activate
: "${DS_ACCELERATOR:=cpu}"   # two processes; DS_ACCELERATOR=cuda where there are two GPUs
export DS_ACCELERATOR
deepspeed --num_accelerators 2 launch/pretrain.py --config configs/quickstart.yaml "$@"
