"""Stretches of an update, worked out once for all models and settings that share their sizes (no torch)."""

from __future__ import annotations

from functools import lru_cache

from sltrain_dist.memory.block import RESIDUAL, Block, BlockTape
from sltrain_dist.memory.gradients import Arrivals, Parameter, Step
from sltrain_dist.memory.head import Ends, EndsTape
from sltrain_dist.memory.operands import OUTPUT_GRADIENTS
from sltrain_dist.memory.tape import Buffer, Stretch, Tape

Waiting = tuple[Parameter, ...]
"""Gradients that are being summed over the ranks, the oldest first."""
_MANY = 4096


@lru_cache(_MANY)
def block_forward(block: Block) -> Stretch:
    """A block's forward pass. Its input stays: autograd, or the recomputation, needs it."""
    tape = Tape()
    BlockTape(tape, block).forward(Buffer(RESIDUAL, block.residual_bytes), saves=block.recompute == "nothing")
    return tape.stretch()


@lru_cache(_MANY)
def block_evaluation(block: Block) -> Stretch:
    """A block's forward pass without gradients. Its input goes."""
    tape = Tape()
    x = Buffer(RESIDUAL, block.residual_bytes)
    BlockTape(tape, block).forward(x, saves=False)
    tape.drop(x)
    return tape.stretch()


@lru_cache(_MANY)
def block_backward(
    block: Block, arrivals: Arrivals, waiting: Waiting = (), of_gains: Arrivals | None = None
) -> tuple[Stretch, Waiting]:
    """A block's backward pass, with its recomputation before.

    Args:
        block: The block.
        arrivals: How gradients are taken.
        waiting: What is on its way at the beginning.
        of_gains: How those of norms are taken, where that is otherwise. Then only these are on their way.

    Returns:
        The stretch, and what is on its way at the end.
    """
    x = Buffer(RESIDUAL, block.residual_bytes)
    before = BlockTape(Tape(), block).forward(x, saves=block.recompute == "nothing")[1]
    tape = Tape()
    sink = arrivals.sink(() if of_gains else waiting)
    gains = of_gains.sink(waiting) if of_gains else sink
    on_tape = BlockTape(tape, block)
    kept = before
    if block.recompute != "nothing":
        tape.at("recomputation")
        kept = on_tape.forward(x, saves=True, known=before.attention, again=True)[1]
        tape.drop(*before.attention)
    on_tape.backward(Buffer(OUTPUT_GRADIENTS, block.residual_bytes), kept, sink, gains)
    tape.drop(x)
    return tape.stretch(), gains.waiting if isinstance(gains, Step) else ()


@lru_cache(_MANY)
def ends_forward(ends: Ends) -> Stretch:
    """Last norm, head and loss."""
    tape = Tape()
    EndsTape(tape, ends).forward(_residual(ends))
    return tape.stretch()


@lru_cache(_MANY)
def ends_backward(ends: Ends, arrivals: Arrivals) -> tuple[Stretch, Waiting]:
    """From the loss to the last block's output."""
    x = _residual(ends)
    kept = EndsTape(Tape(), ends).forward(x)
    tape, sink = Tape(), arrivals.sink()
    EndsTape(tape, ends).backward(x, kept, sink)
    return tape.stretch(), sink.waiting if isinstance(sink, Step) else ()


@lru_cache(_MANY)
def embedding_backward(ends: Ends, arrivals: Arrivals, waiting: Waiting = ()) -> tuple[Stretch, Waiting]:
    """From the first block's input to the embedding's gradient."""
    tape, sink = Tape(), arrivals.sink(waiting)
    EndsTape(tape, ends).embedding_backward(Buffer(OUTPUT_GRADIENTS, _residual(ends).size), sink)
    return tape.stretch(), sink.waiting if isinstance(sink, Step) else ()


@lru_cache(_MANY)
def received(arrivals: Arrivals, waiting: Waiting) -> Stretch:
    """After the backward pass, what was on its way comes back and is used."""
    tape, sink = Tape(), arrivals.sink(waiting)
    if isinstance(sink, Step):
        sink.receive(tape, 0)
    return tape.stretch()


def _residual(ends: Ends) -> Buffer:
    return Buffer(RESIDUAL, ends.tokens * ends.hidden * ends.widths.residual)
