#!/usr/bin/env bash
# Sets up, then pretrains a small SLTrain LLaMA on this machine: two processes, DeepSpeed ZeRO, embedded corpus.
#   tools/quickstart.sh [section.key=value …]      MASTER_PORT=N for a port of your choice
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
. .venv/bin/activate
: "${DS_ACCELERATOR:=cpu}"   # two processes; DS_ACCELERATOR=cuda where there are two GPUs
export DS_ACCELERATOR
: "${MASTER_PORT:=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}"
echo "quickstart: starting two processes, which meet at port $MASTER_PORT; imports take half a minute, minutes on a busy machine"
exec deepspeed --num_accelerators 2 --master_port "$MASTER_PORT" launch/pretrain.py --config configs/quickstart.yaml "$@"
