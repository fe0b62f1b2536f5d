"""Prints the environment of a GPU check as JSON: device, versions of torch and optional packages, commit."""

import importlib.metadata
import json
import subprocess
import sys

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


def main() -> None:
    device = torch.cuda.get_device_properties(0)
    print(
        json.dumps(
            {
                "device": device.name,
                "memory_bytes": device.total_memory,
                "capability": f"{device.major}.{device.minor}",
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "python": sys.version.split()[0],
                "packages": {package: version(package) for package in OPTIONAL},
                "commit": commit(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
