"""The recordings that a model of some depth is put together from (no torch unless one is missing)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from sltrain_dist.config.schema import Config
from sltrain_dist.memory.ledger import Recorded
from sltrain_dist.memory.recording import EndsRecording, EvaluationRecording, LayerRecording, Parameter
from sltrain_dist.memory.store import Request, ends_request, layer_requests
from sltrain_dist.numerics.device import DeviceType


@dataclass(frozen=True, eq=False)  # looked up by identity, which is faster: equal ones are made once
class RecordedLayer:
    """A decoder layer, ready to be played."""

    recording: LayerRecording

    @cached_property
    def forward(self) -> Recorded:
        """The forward pass."""
        return Recorded(self.recording.forward)

    @cached_property
    def backward(self) -> Recorded:
        """The backward pass, with its recomputation."""
        return Recorded(self.recording.backward, self.recording.parameters)


@dataclass(frozen=True, eq=False)
class RecordedModel:
    """A model and a micro-batch.

    Attributes:
        layers: The distinct decoder layers: one, or two where some are computed again.
        order: Which of them each layer is, the first layer first.
        ends: What is before and after.
    """

    layers: tuple[RecordedLayer, ...]
    order: tuple[int, ...]
    ends: EndsRecording

    @property
    def layer_parameters(self) -> tuple[Parameter, ...]:
        """Parameters of one layer, in the order of `named_parameters()`."""
        return self.layers[0].recording.parameters

    @property
    def index_bytes(self) -> int:
        """Bytes of the indices of all supports."""
        return len(self.order) * self.layers[0].recording.index_bytes

    @property
    def flops(self) -> int:
        """Floating-point operations of a forward and a backward pass."""
        return self.ends.flops + sum(self.layers[kind].recording.flops for kind in self.order)

    @cached_property
    def embedding(self) -> Recorded:
        """Forward pass to the first layer."""
        return Recorded(self.ends.embedding)

    @cached_property
    def loss(self) -> Recorded:
        """Forward pass from the last layer."""
        return Recorded(self.ends.loss)

    @cached_property
    def loss_backward(self) -> Recorded:
        """Backward pass to the last layer."""
        return Recorded(self.ends.loss_backward, self.ends.parameters)

    @cached_property
    def embedding_backward(self) -> Recorded:
        """Backward pass from the first layer."""
        return Recorded(self.ends.embedding_backward, self.ends.parameters)


def recorded_model(config: Config, device: DeviceType) -> RecordedModel:
    """The recordings of a run, made where they are missing."""
    layers, order = layer_requests(config, device)
    return _model(tuple(layers), order, ends_request(config, config.train.micro_batch, device))


@lru_cache(4096)
def _model(layers: tuple[Request, ...], order: tuple[int, ...], ends: Request) -> RecordedModel:
    return RecordedModel(tuple(map(_layer, layers)), order, ends.get())


@lru_cache(4096)
def _layer(request: Request) -> RecordedLayer:
    return RecordedLayer(request.get())


@lru_cache(4096)
def evaluation_passes(request: Request) -> tuple[Recorded, Recorded, Recorded]:
    """Embedding, a layer and the loss of an evaluation."""
    recording: EvaluationRecording = request.get()
    return Recorded(recording.embedding), Recorded(recording.layer), Recorded(recording.loss)
