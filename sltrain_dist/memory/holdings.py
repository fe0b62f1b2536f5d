"""The part of every parameter that one rank stores, and sums over all parameters (no torch)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Literal

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.memory.recorded_model import RecordedModel
from sltrain_dist.memory.recording import Parameter
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.state_layout import MASTER, stored_states
from sltrain_dist.parallel.placement import fsdp_range

Sharding = Literal["nothing", "factors", "all"]
"""Which parameters are sharded over the ranks."""


@dataclass(frozen=True)
class Holding:
    """The part of equal parameters that is stored by the rank that needs the most memory.

    Attributes:
        parameter: One of the parameters.
        count: Number of equal parameters in the model.
        kind: Kind of the decoder layers that they are in, see :attr:`RecordedModel.kinds`; None outside of layers.
        sharded: Whether they are sharded.
        range: Rows of each parameter that the rank stores; all rows if it is not sharded.
        values: Number of these values, with the padding of rows.
    """

    parameter: Parameter
    count: int
    kind: int | None
    sharded: bool
    range: TensorRange
    values: int


class Holdings:
    """The parts of all parameters of a model that one rank stores.

    Args:
        model: The model.
        sharding: Which parameters are sharded.
        ranks: Number of ranks that a parameter is sharded over.
    """

    def __init__(self, model: RecordedModel, sharding: Sharding, ranks: int) -> None:
        parts = [(kind, model.kinds.count(kind), each) for kind, each in enumerate(model.layer_parameters)]
        self.items = tuple(
            _holding(parameter, count, kind, sharding, ranks)
            for kind, count, parameters in (*parts, (None, 1, model.ends.parameters))
            for parameter in parameters
        )
        self.sharded = tuple(item for item in self.items if item.sharded)
        self.ranks = ranks
        self._states: dict[tuple[OptimConfig, int, bool], tuple[int, int]] = {}

    @cached_property
    def total_values(self) -> int:
        """Number of values in the whole model."""
        return sum(item.count * item.parameter.values for item in self.items)

    @cached_property
    def trained_values(self) -> int:
        """Number of values in the whole model that have gradients."""
        return sum(item.count * item.parameter.values for item in self.items if not item.parameter.frozen)

    @cached_property
    def sharded_values(self) -> int:
        """Number of values in sharded parameters, over all ranks, without padding."""
        return sum(item.count * item.parameter.values for item in self.sharded)

    @cached_property
    def whole_values(self) -> int:
        """Number of values in parameters that every rank stores whole."""
        return self.total_values - self.sharded_values

    @cached_property
    def largest_sharded(self) -> int:
        """Number of values in the largest sharded parameter."""
        return max((item.parameter.values for item in self.sharded), default=0)

    def sharded_in(self, kind: int | None) -> int:
        """Returns the sharded values of a decoder layer of this kind, or outside all layers (None)."""
        return self._sharded_in.get(kind, 0)

    def gathered_in(self, kind: int | None) -> int:
        """Returns the same number with the padding of rows, as it is gathered."""
        return self._gathered_in.get(kind, 0)

    @cached_property
    def _sharded_in(self) -> dict[int | None, int]:
        sums: dict[int | None, int] = defaultdict(int)
        for item in self.sharded:
            sums[item.kind] += item.parameter.values
        return sums

    @cached_property
    def _gathered_in(self) -> dict[int | None, int]:
        sums: dict[int | None, int] = defaultdict(int)
        for item in self.sharded:
            sums[item.kind] += self.ranks * item.values
        return sums

    def on_device(self, *, with_sharded: bool) -> tuple[Holding, ...]:
        """Returns the parts that are on the device; sharded parameters may be offloaded, and are then left out."""
        return tuple(item for item in self.items if with_sharded or not item.sharded)

    def stored_bytes(self, width: int, *, with_sharded: bool) -> dict[str, int]:
        """Returns the bytes of the rank's parameters by component, with padding, at `width` bytes a value."""
        sums: dict[str, int] = defaultdict(int)
        for item in self.on_device(with_sharded=with_sharded):
            each = item.parameter.stored_bytes(width) if item.parameter.int8 else width * item.values
            sums[item.parameter.component] += item.count * each
        return sums

    def accumulated_values(self, *, whole: bool, with_sharded: bool) -> int:
        """Returns the number of gradient values between two micro-batches; `whole`: they are reduced after the last."""
        items = [item for item in self.on_device(with_sharded=with_sharded) if not item.parameter.frozen]
        return sum(item.count * (item.parameter.values if whole else item.values) for item in items)

    def states(self, optim: OptimConfig, width: int, *, with_sharded: bool) -> tuple[int, int]:
        """Returns the bytes of the rank's (optimizer states, master weights); a parameter has `width` bytes a value."""
        key = (optim, width, with_sharded)
        if key not in self._states:
            states = masters = 0
            for item in self.on_device(with_sharded=with_sharded):
                for stored in () if item.parameter.frozen else stored_states(item.range, optim, width):
                    if stored.range.name == MASTER:
                        masters += item.count * stored.nbytes
                    else:
                        states += item.count * stored.nbytes
            self._states[key] = states, masters
        return self._states[key]


@lru_cache(4096)
def holdings_of(model: RecordedModel, sharding: Sharding, ranks: int) -> Holdings:
    """Returns the holdings of a model that is sharded over so many ranks; cached."""
    return Holdings(model, sharding, ranks)


def _holding(parameter: Parameter, count: int, kind: int | None, sharding: Sharding, ranks: int) -> Holding:
    if sharding == "nothing" or (sharding == "factors" and not parameter.replaced):
        part = TensorRange.whole(parameter.name, parameter.shape)
        return Holding(parameter, count, kind, False, part, parameter.values)
    padded = -(-parameter.shape[0] // ranks) * prod(parameter.shape[1:])
    return Holding(parameter, count, kind, True, fsdp_range(parameter.name, parameter.shape, 0, ranks), padded)
