#!/usr/bin/env python
"""Writes the environment of a check as a line of JSON: device, versions of torch and optional packages, commit."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

OPTIONAL = ("deepspeed", "torchao", "triton", "datasets", "mlflow", "sentencepiece", "numpy")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    result = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def device(kind: str) -> dict[str, Any]:
    """Returns the name of the device, and what else is known of a GPU."""
    if kind == "cpu":
        return {"device": f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"}
    found = torch.cuda.get_device_properties(0)
    capability = f"{found.major}.{found.minor}"
    return {"device": found.name, "memory_bytes": found.total_memory, "capability": capability}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--out", required=True, type=Path, help="file of the line, to append to")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_environment: this Python has no torch with a CUDA device")
    record = {
        **device(args.device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {package: version(package) for package in OPTIONAL},
        "commit": commit(),
    }
    with args.out.open("a") as out:
        out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
