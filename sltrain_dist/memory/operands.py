"""What the modules that go through the replaced linear layers share: sizes, and what a call keeps (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.memory.device import Device
from sltrain_dist.memory.gradients import Parameter
from sltrain_dist.memory.tape import Buffer, Tape
from sltrain_dist.sparse_lowrank.cost import Plan
from sltrain_dist.sparse_lowrank.layout import position_bytes

WEIGHT, WEIGHT_GRADIENT = "temporaries.weight", "temporaries.weight_gradient"
LOW_RANK, SPARSE, CASTS = "temporaries.low_rank", "temporaries.sparse", "temporaries.casts"
OUTPUT_GRADIENTS = "temporaries.activation_gradients"
CAST_WEIGHTS = "activations.cast_weights"


@dataclass(frozen=True)
class Widths:
    """Bytes of a value.

    Attributes:
        parameter: Of parameters, as they are at hand in a forward pass (under fsdp: gathered).
        gradient: Of their gradients.
        compute: Of matrix products.
        residual: Of the residual stream.
    """

    parameter: int
    gradient: int
    compute: int
    residual: int

    @property
    def casts(self) -> bool:
        """Whether parameters are cast for matrix products (autocast)."""
        return self.parameter != self.compute


@dataclass(frozen=True)
class Linear:
    """One linear layer.

    Attributes:
        m, n: out_features, in_features.
        rank: r; 0 for a dense weight.
        nnz: Sparse values; 0 without S.
        support: Their arrangement.
        k: Values of a row, where all have as many.
        plan: How it is applied.
        rows: Rows of W that are built at a time.
        parameters: B, A and V, or B and A, or the weight, in this order.
    """

    m: int
    n: int
    rank: int
    nnz: int
    support: SupportKind
    k: int
    plan: Plan
    rows: int
    parameters: tuple[Parameter, ...]

    @property
    def together(self) -> bool:
        """Whether it is applied by `Factored`, with others that share its input."""
        return self.nnz > 0 and self.plan.path == "factored"

    def share(self, rows: int) -> int:
        """Sparse values in so many rows; of the random support, what is expected, rounded up."""
        return -(-self.nnz * rows // self.m)


@dataclass
class Call:
    """What a call of several layers on one input keeps for the backward pass.

    `arranged` says whether among `hidden` is the input as `Factored` has arranged it, in its place.
    """

    layers: Sequence[Linear]
    inputs: list[Buffer]
    hidden: list[Buffer]
    casts: list[Buffer]
    arranged: bool = False


class OperatorTape:
    """What goes through layers on a tape.

    Args:
        tape: Takes what is allocated and freed.
        tokens: T.
        widths: Bytes of a value.
        device: Where it runs.
    """

    def __init__(self, tape: Tape, tokens: int, widths: Widths, device: Device) -> None:
        self.tape, self.tokens, self.widths, self.device = tape, tokens, widths, device

    def dequantized(self, layers: Sequence[Linear]) -> list[Buffer]:
        """The values of int8 weights, which a call of an autograd function computes with."""
        w = self.widths.compute
        return [self.tape.new(CASTS, w * p.values) for layer in layers for p in layer.parameters if p.int8]

    def positions(self, layer: Linear, rows: int) -> Buffer:
        """`Support.row_positions` of some rows: made anew at every use."""
        tape, share = self.tape, layer.share(rows)
        if layer.support == "random":  # each row's start, and for every value its row, int32
            width = position_bytes(layer.m, layer.n)
            starts, of_values = tape.new(SPARSE, width * rows), tape.new(SPARSE, 4 * share)
            flat = tape.new(SPARSE, width * share)
            tape.drop(starts, of_values)
            return flat
        if layer.support == "blocks":
            columns = tape.new(SPARSE, 4 * share)
        else:  # words, slots and their products, all int64
            words = tape.new(SPARSE, 8 * share)
            tape.brief(SPARSE, 8 * share)
            columns = words
        flat = tape.new(SPARSE, 8 * share)
        tape.drop(columns)
        return flat
