"""The recordings that a model of some depth is put together from (no torch unless one is missing)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from sltrain_dist.config.schema import Config
from sltrain_dist.memory.recording import Parameter, Recording
from sltrain_dist.memory.recording_store import Request, ends_request, layer_requests
from sltrain_dist.numerics.device import DeviceType


@dataclass(frozen=True, eq=False)  # looked up by identity, as recordings are
class RecordedModel:
    """A model and a micro-batch.

    Attributes:
        layers: The distinct decoder layers: one, or two where some are computed again.
        order: Which of them each layer is, the first layer first.
        ends: What is before and after.
    """

    layers: tuple[Recording, ...]
    order: tuple[int, ...]
    ends: Recording

    @property
    def layer_parameters(self) -> tuple[Parameter, ...]:
        """Parameters of one layer."""
        return self.layers[0].parameters

    @property
    def index_bytes(self) -> int:
        """Bytes of the indices of all supports."""
        return len(self.order) * self.layers[0].sizes["buffers"]

    @property
    def flops(self) -> int:
        """Floating-point operations of a forward and a backward pass."""
        return self.ends.flops + sum(self.layers[kind].flops for kind in self.order)


def recorded_model(config: Config, device: DeviceType) -> RecordedModel:
    """The recordings of a run, made where they are missing."""
    layers, order = layer_requests(config, device)
    return model_of(tuple(layers), order, ends_request(config, device))


@lru_cache(4096)
def model_of(layers: tuple[Request, ...], order: tuple[int, ...], ends: Request) -> RecordedModel:
    """The same, from what is asked for."""
    return RecordedModel(tuple(layer.get() for layer in layers), order, ends.get())
