"""The device whose operators the code chooses: a tensor's own device, or an emulated GPU.

Torch's CPU builds cannot differentiate fake CUDA tensors, and planning must not need a GPU. So memory is recorded on
fake CPU tensors, while all code that depends on the device calls :func:`device_type` and takes the GPU's branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # planner modules without torch import DeviceType
    from torch import Tensor

DeviceType = Literal["cuda", "cpu"]
"""A kind of device, as in `torch.device.type`."""

_emulated: DeviceType | None = None


@contextmanager
def emulate(device: DeviceType) -> Iterator[None]:
    """Makes the code in the `with` block choose operators as on `device`. Real tensors would get wrong results.

    Args:
        device: The kind of device to emulate, for fake tensors only.
    """
    global _emulated  # not a ContextVar, which torch.compile cannot trace
    previous, _emulated = _emulated, device
    try:
        yield
    finally:
        _emulated = previous


def device_type(tensor: Tensor) -> str:
    """Returns the device type whose operators a tensor uses: the emulated one, or the tensor's own."""
    return _emulated or tensor.device.type


def is_emulated(device: DeviceType) -> bool:
    """Returns whether fake tensors currently stand for tensors of `device`."""
    return _emulated == device
