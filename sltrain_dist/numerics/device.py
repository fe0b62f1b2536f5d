"""Which device's operators the code chooses: those of a tensor's own device, or those of an emulated GPU.

Torch's CPU builds cannot differentiate fake CUDA tensors, and planning must not need a GPU. So memory is recorded on
fake tensors of the CPU, while all code that chooses by device asks :func:`device_type` and takes the GPU's way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # what plans without torch imports the type of devices
    from torch import Tensor

DeviceType = Literal["cuda", "cpu"]
"""A kind of device, as in `torch.device.type`."""

_emulated: DeviceType | None = None


@contextmanager
def emulate(device: DeviceType) -> Iterator[None]:
    """Makes the code in the block choose operators as on `device`. For fake tensors only: real results would be wrong.

    Args:
        device: The kind of device to emulate.
    """
    global _emulated  # not a ContextVar, which torch.compile cannot trace
    before, _emulated = _emulated, device
    try:
        yield
    finally:
        _emulated = before


def device_type(tensor: Tensor) -> str:
    """The device type whose operators are to be used for a tensor: the emulated one, or the tensor's own."""
    return _emulated or tensor.device.type


def is_emulated(device: DeviceType) -> bool:
    """Whether the code runs on fake tensors that stand for those of `device`."""
    return _emulated == device
