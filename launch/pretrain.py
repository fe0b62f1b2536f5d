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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that win over the file's")
    parser.add_argument("--print-run-dir", action="store_true", help="only print where exit.json will be")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    arguments = parser.parse_intermixed_args()

    if arguments.print_run_dir:
        return print_run_dir(arguments.config, arguments.overrides)
    from sltrain_dist.train.run import pretrain

    return int(pretrain(arguments.config, arguments.overrides))


def print_run_dir(config: str, overrides: list[str]) -> int:
    """For batch scripts, before they start anything."""
    from sltrain_dist.config.load import load_config
    from sltrain_dist.errors import ConfigError
    from sltrain_dist.train.exit import directory

    try:
        print(directory(load_config(config, overrides)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
