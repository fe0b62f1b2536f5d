"""When the Triton kernels are used; otherwise torch's operators are."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch
from torch import Tensor

from sltrain_dist.numerics.device import device_type, is_emulated

HAVE_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed (it comes with torch's CUDA builds on Linux)."""

DEVICES = ["cuda"]
"""Types of the devices where the kernels are used; tests add the CPU, for Triton's interpreter."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def use_kernels(x: Tensor) -> bool:
    """Returns whether the kernels are used for tensors of x's device and type.

    Warns, once per process, if CUDA is used and Triton is not installed.
    """
    if device_type(x) not in DEVICES or x.dtype not in _DTYPES:
        return False
    if is_emulated("cuda"):
        return True  # Triton comes with torch's CUDA builds, whether or not it is installed here
    if not HAVE_TRITON and not torch.compiler.is_compiling():
        _warn_without_triton()
    return HAVE_TRITON


@cache
def _warn_without_triton() -> None:
    warnings.warn(
        "Triton is not installed: sparse products and low-bit optimizer states on CUDA use torch's slower operators; "
        "install it with: pip install 'sltrain_dist[triton]'",
        RuntimeWarning,
        stacklevel=3,
    )
