"""What one rank holds of every parameter, and sums over them (no torch), remembered by model and way of dealing."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Literal

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.memory.recorded_model import RecordedModel
from sltrain_dist.memory.recording import Parameter
from sltrain_dist.optim.state_layout import MASTER, Place, stored_states, whole
from sltrain_dist.parallel.placement import fsdp_place

Deal = Literal["nothing", "factors", "all"]
"""Which parameters are dealt out to the ranks."""


@dataclass(frozen=True)
class Holding:
    """What the rank that needs most holds of parameters that are alike.

    Attributes:
        parameter: One of them.
        count: How many there are in the model.
        in_layer: Whether they are in decoder layers.
        dealt: Whether they are dealt out.
        place: What it holds of one, by rows; the whole where it is not dealt out.
        values: The same in values, with the padding of rows.
    """

    parameter: Parameter
    count: int
    in_layer: bool
    dealt: bool
    place: Place
    values: int


class Holdings:
    """All parameters of a model.

    Args:
        model: The model.
        deal: What is dealt out.
        ranks: To how many.
    """

    def __init__(self, model: RecordedModel, deal: Deal, ranks: int) -> None:
        self.layers = len(model.order)
        self.items = tuple(
            _holding(parameter, count, in_layer, deal, ranks)
            for in_layer, count, parameters in (
                (True, self.layers, model.layer_parameters),
                (False, 1, model.ends.parameters),
            )
            for parameter in parameters
        )
        self.dealt = tuple(item for item in self.items if item.dealt)
        self.ranks = ranks
        self._states: dict[tuple[OptimConfig, int, bool], tuple[int, int]] = {}

    @cached_property
    def total_values(self) -> int:
        """Of the whole model."""
        return sum(item.count * item.parameter.values for item in self.items)

    @cached_property
    def dealt_values(self) -> int:
        """Of what is dealt out, on all ranks together, without padding."""
        return sum(item.count * item.parameter.values for item in self.dealt)

    @cached_property
    def whole_values(self) -> int:
        """Of what every rank holds whole."""
        return self.total_values - self.dealt_values

    @cached_property
    def largest_dealt(self) -> int:
        """Values of the largest parameter that is dealt out."""
        return max((item.parameter.values for item in self.dealt), default=0)

    def dealt_in(self, *, layer: bool) -> int:
        """Values dealt out of one layer, or of what is outside of them."""
        return self._dealt_in[layer]

    def gathered_in(self, *, layer: bool) -> int:
        """The same with the padding of rows."""
        return self._gathered_in[layer]

    @cached_property
    def _dealt_in(self) -> dict[bool, int]:
        return {
            layer: sum(item.parameter.values for item in self.dealt if item.in_layer is layer)
            for layer in (False, True)
        }

    @cached_property
    def _gathered_in(self) -> dict[bool, int]:
        return {
            layer: self.ranks * sum(item.values for item in self.dealt if item.in_layer is layer)
            for layer in (False, True)
        }

    def on_device(self, *, with_dealt: bool) -> tuple[Holding, ...]:
        """What the rank holds on the device; `with_dealt`: also of what is dealt out."""
        return tuple(item for item in self.items if with_dealt or not item.dealt)

    def stored_bytes(self, width: int, *, with_dealt: bool) -> dict[str, int]:
        """Bytes of parameters that the rank holds, by component, with padding; `width`: of a value."""
        sums: dict[str, int] = defaultdict(int)
        for item in self.on_device(with_dealt=with_dealt):
            each = item.parameter.stored_bytes(width) if item.parameter.int8 else width * item.values
            sums[item.parameter.component] += item.count * each
        return sums

    def waiting_values(self, *, whole: bool, with_dealt: bool) -> int:
        """Values of gradients between two micro-batches; `whole` where all but the last leave them unreduced."""
        items = self.on_device(with_dealt=with_dealt)
        return sum(item.count * (item.parameter.values if whole else item.values) for item in items)

    def states(self, optim: OptimConfig, width: int, *, with_dealt: bool) -> tuple[int, int]:
        """Bytes of (optimizer states, fp32 copies) that the rank holds; `width`: of a parameter's value."""
        key = (optim, width, with_dealt)
        if key not in self._states:
            states = masters = 0
            for item in self.on_device(with_dealt=with_dealt):
                for stored in stored_states(item.place, optim, width):
                    if stored.key == MASTER:
                        masters += item.count * stored.nbytes
                    else:
                        states += item.count * stored.nbytes
            self._states[key] = states, masters
        return self._states[key]


@lru_cache(4096)
def holdings(model: RecordedModel, deal: Deal, ranks: int) -> Holdings:
    """Of a model dealt to so many ranks."""
    return Holdings(model, deal, ranks)


def _holding(parameter: Parameter, count: int, in_layer: bool, deal: Deal, ranks: int) -> Holding:
    if deal == "nothing" or (deal == "factors" and not parameter.replaced):
        return Holding(parameter, count, in_layer, False, whole(parameter.name, parameter.shape), parameter.values)
    padded = -(-parameter.shape[0] // ranks) * prod(parameter.shape[1:])
    return Holding(parameter, count, in_layer, True, fsdp_place(parameter.name, parameter.shape, 0, ranks), padded)
