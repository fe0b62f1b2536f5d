#!/usr/bin/env python
"""Pretrains a model as a YAML file says.

    deepspeed launch/pretrain.py --config FILE [section.key=value …]
    torchrun --nproc-per-node N launch/pretrain.py --config FILE [section.key=value …]
    srun --ntasks-per-node N python launch/pretrain.py --config FILE [section.key=value …]
    python launch/pretrain.py --config FILE [section.key=value …]

Exit codes: 0 done, 1 a crash or another process lost, 2 configuration, 3 data, 4 diverged, 5 checkpoint, 6 storage
(nothing can be written), 75 stopped early with everything saved. Launchers lose them; `run_dir/exit.json` does not.
"""

import argparse
import sys
from pathlib import Path

# Runs from a checkout too, where the package need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    """Parses the command line and trains."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the help has characters that ASCII and Latin-1 lack
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that override the file's")
    parser.add_argument("--print-run-dir", action="store_true", help="only print where exit.json will be")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    arguments = parser.parse_intermixed_args()

    # Here, so that --help is quick.
    from sltrain_dist.train import run

    start = run.print_run_dir if arguments.print_run_dir else run.pretrain
    return int(start(arguments.config, arguments.overrides))


if __name__ == "__main__":
    sys.exit(main())
