"""A model composed of the recordings of its parts (no torch unless a recording is missing)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from sltrain_dist.config.schema import Config
from sltrain_dist.memory.recording import Parameter, Recording
from sltrain_dist.memory.recording_store import Request, ends_request, layer_requests
from sltrain_dist.numerics.device import DeviceType


@dataclass(frozen=True, eq=False)  # hashed by identity, as recordings are
class RecordedModel:
    """The recordings of a model's forward and backward pass of one micro-batch.

    Attributes:
        layers: Recordings of the distinct decoder layers: one, unless some layers are recomputed, or dense, and others
            are not.
        order: For each layer of the model, the index of its recording in `layers`.
        ends: Recording of the parts before and after the layers.
    """

    layers: tuple[Recording, ...]
    order: tuple[int, ...]
    ends: Recording

    @cached_property
    def layer_parameters(self) -> tuple[tuple[Parameter, ...], ...]:
        """The parameters of each kind of decoder layers that has other parameters than the kinds before."""
        return tuple(dict.fromkeys(layer.parameters for layer in self.layers))

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """For each layer of the model, the index of its parameters in `layer_parameters`."""
        kinds = [self.layer_parameters.index(layer.parameters) for layer in self.layers]
        return tuple(kinds[index] for index in self.order)

    @property
    def index_bytes(self) -> int:
        """Bytes of all support indices in the model."""
        return sum(self.layers[index].sizes["buffers"] for index in self.order)

    @property
    def flops(self) -> int:
        """Floating-point operations of a forward and a backward pass."""
        return self.ends.flops + sum(self.layers[index].flops for index in self.order)


def recorded_model(config: Config, device: DeviceType) -> RecordedModel:
    """Returns the recorded model of a run, and makes the recordings that are missing."""
    layers, order = layer_requests(config, device)
    return model_of(tuple(layers), order, ends_request(config, device))


@lru_cache(4096)
def model_of(layers: tuple[Request, ...], order: tuple[int, ...], ends: Request) -> RecordedModel:
    """Returns the recorded model of some requests."""
    return RecordedModel(tuple(layer.get() for layer in layers), order, ends.get())
