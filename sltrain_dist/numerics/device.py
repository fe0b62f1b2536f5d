"""The device whose operators the code chooses: a tensor's own device, or an emulated GPU.

Torch's CPU builds cannot differentiate fake CUDA tensors, and planning must not need a GPU. So memory is recorded on
fake CPU tensors, while all code that depends on the device calls :func:`device_type` and takes the GPU's branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:  # planner modules without torch import DeviceType
    from torch import Tensor

DeviceType = Literal["cuda", "cpu"]
"""A kind of device, as in `torch.device.type`."""

T = TypeVar("T")

_emulated: DeviceType | None = None
_repetitions = 1


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


def in_turn(chunks: Sequence[T]) -> Iterable[T]:
    """Returns chunks of work that are done one after another: all of them, or three under :func:`emulate`.

    These are the first, the second and the last. Fake tensors have no values, all chunks in between allocate the same
    bytes as the second, and :func:`repetitions` counts their operations.
    """
    return chunks if _emulated is None or len(chunks) <= 3 else _first_second_last(chunks)


def _first_second_last(chunks: Sequence[T]) -> Iterator[T]:
    global _repetitions
    yield chunks[0]
    before = _repetitions
    _repetitions *= len(chunks) - 2
    try:
        yield chunks[1]
    finally:
        _repetitions = before
    yield chunks[-1]


def repetitions() -> int:
    """Returns how many times an operator that is called now would run; see :func:`in_turn`."""
    return _repetitions
