"""Adam and AdamW whose states are float32 or block-quantized, and whose bf16 parameters are rounded
stochastically or kept in fp32 as well.

The arithmetic is torch's, in float32, of a bounded span of values at a time. It is made of additions,
multiplications, divisions and roots alone, one operation after the other: those are exact to the last bit
wherever a value lies, so that a parameter's update does not depend on how it is cut into spans or dealt to ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.numerics.blockwise import Quantizer, pack, quantizer, unpack
from sltrain_dist.numerics.device import device_type
from sltrain_dist.numerics.int8_weight import Int8Weight
from sltrain_dist.numerics.rounding import rounding_key, stochastic_round
from sltrain_dist.optim.state_layout import (
    BLOCKS,
    MASTER,
    STATE_NAMES,
    Place,
    Span,
    code_bytes,
    shared_blocks,
    spans,
    stored_states,
)

Agree = Callable[[Tensor], None]
"""Replaces a float32 tensor by its largest values over all ranks that hold parts of the same parameters."""

State = dict[str, Any]
"""Flat tensors by name, and under "step" the number of updates: an integer, so that no device is waited for."""

_SPAN, _SPAN_CPU = 1 << 21, 1 << 16
"""Values at a time: on the CPU what stays in the cache, on a GPU what keeps it busy. 22 bytes of transient
memory each, 32 with stochastic rounding, 36 of int8 weights: at most 76 MB on a GPU."""


@dataclass(frozen=True)
class _Moments:
    """The two moments of a span after this update, in float32, flat."""

    first: Tensor
    second: Tensor


class LowBitAdam(torch.optim.Optimizer):
    """Adam (`decoupled` false: decay is part of the gradient) or AdamW.

    The update uses the new moments before they are quantized. A block that ranks share is scaled by its largest
    magnitude on all of them: what these are is asked for once in a step, for all parameters together.

    Args:
        groups: Parameter groups with "weight_decay", as torch's.
        optim: Optimizer settings.
        places: What part of which parameter every parameter in `groups` is.
        agree: Needed where places share blocks. Then all ranks must step equally often, also those whose part is
            empty.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        optim: OptimConfig,
        places: Mapping[nn.Parameter, Place],
        agree: Agree | None = None,
    ) -> None:
        super().__init__(groups, {"lr": optim.lr, "weight_decay": 0.0})
        self._optim, self._agree = optim, agree
        self._places = {parameter: places[parameter] for group in self.param_groups for parameter in group["params"]}
        self._shared = {p: shared_blocks(place, optim.state_bits) for p, place in self._places.items()}
        self._quantizers: dict[tuple[str, torch.device], Quantizer] = {}
        if any(self._shared.values()) and agree is None:
            raise ValueError("parameters are cut within blocks: their ranks must agree on scales")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        maxima = self._agreed_maxima()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    state = self._state_of(parameter)
                    state["step"] += 1
                    for span in self._spans(parameter):
                        self._update(parameter, state, span, group, maxima.get(parameter, {}))

    def make_state(self, parameter: Tensor) -> State:
        """A parameter's state before the first update: zeros, and the parameter itself as its fp32 copy."""
        place, bits, device = self._places[parameter], self._optim.state_bits, parameter.device
        state: State = {"step": 0}
        for stored in stored_states(place, self._optim, parameter.element_size()):
            if stored.key == MASTER:
                state[stored.key] = parameter.detach().float().reshape(-1)
            elif stored.key.endswith(".codes"):
                state[stored.key] = torch.zeros(code_bytes(place, bits), dtype=torch.uint8, device=device)
            else:
                dtype = parameter.dtype if bits == 16 else torch.float32
                state[stored.key] = torch.zeros(stored.count, dtype=dtype, device=device)
        return state

    def codes(self, parameter: Tensor, key: str) -> Tensor:
        """(count,) uint8, one code a byte, of the quantized state `key`."""
        place = self._places[parameter]
        parts = [self._read_codes(self.state[parameter], key, place, span) for span in self._spans(parameter)]
        return torch.cat([part.reshape(-1) for part in parts])

    def set_codes(self, parameter: Tensor, key: str, codes: Tensor) -> None:
        """Takes what :meth:`codes` gave."""
        place = self._places[parameter]
        for span in self._spans(parameter):
            part = codes[span.start : span.stop].view(span.rows, -1)
            self._write_codes(self.state[parameter], key, place, span, part)

    def _state_of(self, parameter: Tensor) -> State:
        if not self.state[parameter]:
            self.state[parameter] = self.make_state(parameter)
        return self.state[parameter]

    def _spans(self, parameter: Tensor) -> Iterable[Span]:
        block = BLOCKS.get(self._optim.state_bits, 1)
        size = _SPAN_CPU if device_type(parameter) == "cpu" else _SPAN
        cut = spans(self._places[parameter], block, size)
        if not is_fake(parameter):
            return cut
        # Fake tensors have no values, and spans between the second and the last one allocate the same bytes.
        first, *others = cut
        return [first, *others[:1], *others[1:][-1:]]

    def _agreed_maxima(self) -> dict[Tensor, dict[int, Tensor]]:
        """Largest magnitudes of both new moments, (2,) each, of shared blocks by number; one message for all."""
        shared = [(parameter, block) for parameter, blocks in self._shared.items() for block in blocks]
        if not shared or self._agree is None:
            return {}
        device, size = shared[0][0].device, BLOCKS[self._optim.state_bits]
        largest = torch.zeros(len(shared), 2, device=device)
        for row, (parameter, block) in zip(largest, shared, strict=True):
            place = self._places[parameter]
            start, stop = max(place.start, block * size), min(place.stop, (block + 1) * size)
            if start < stop and parameter.grad is not None:
                number = block - place.start // size
                span = Span(start - place.start, stop - place.start, 1, start - block * size, number, number + 1)
                moments = self._moments(parameter, self._state_of(parameter), span, self._decay_of(parameter))
                row.copy_(torch.stack((moments.first.abs().amax(), moments.second.abs().amax())))
        self._agree(largest)
        maxima: dict[Tensor, dict[int, Tensor]] = {}
        for row, (parameter, block) in zip(largest, shared, strict=True):
            maxima.setdefault(parameter, {})[block - self._places[parameter].start // size] = row
        return maxima

    def _decay_of(self, parameter: Tensor) -> float:
        """The weight decay of a parameter's group."""
        return next(
            float(group["weight_decay"])
            for group in self.param_groups
            if any(parameter is other for other in group["params"])
        )

    def _update(
        self,
        parameter: Tensor,
        state: State,
        span: Span,
        group: dict[str, Any],
        maxima: Mapping[int, Tensor],
    ) -> None:
        optim, step, lr = self._optim, state["step"], float(group["lr"])
        decay = float(group["weight_decay"])
        moments = self._moments(parameter, state, span, decay)
        for i, (key, value) in enumerate(zip(STATE_NAMES[optim.name], (moments.first, moments.second), strict=True)):
            known = {block: maximum[i] for block, maximum in maxima.items()}
            self._write(parameter, state, key, span, value, known)
        # In place: the moments are not needed any more.
        denominator = moments.second.sqrt_().mul_((1 - optim.beta2**step) ** -0.5).add_(optim.eps)
        change = moments.first.div_(denominator).mul_(lr / (1 - optim.beta1**step))
        values = self._values(parameter, state, span)
        if decay and optim.name == "adamw":
            values = values * (1 - lr * decay)
        self._put_values(parameter, state, span, values - change, step)

    def _moments(self, parameter: Tensor, state: State, span: Span, decay: float) -> _Moments:
        optim, grad = self._optim, parameter.grad
        assert grad is not None  # callers have looked
        gradient = grad.reshape(-1)[span.start : span.stop].float()
        if decay and optim.name == "adam":
            gradient = gradient + self._values(parameter, state, span) * decay
        first, second = (self._read(parameter, state, key, span) for key in STATE_NAMES[optim.name])
        first.mul_(optim.beta1).add_(gradient * (1 - optim.beta1))
        second.mul_(optim.beta2).add_((gradient * gradient).mul_(1 - optim.beta2))
        return _Moments(first, second)

    def _values(self, parameter: Tensor, state: State, span: Span) -> Tensor:
        """The parameter's values in float32; maybe the very ones."""
        if isinstance(parameter, Int8Weight):
            return parameter.read(span.start, span.stop, torch.float32)
        source = state.get(MASTER, parameter.detach().view(-1))
        return source[span.start : span.stop].float()

    def _put_values(self, parameter: Tensor, state: State, span: Span, values: Tensor, step: int) -> None:
        place = self._places[parameter]
        if isinstance(parameter, Int8Weight):
            parameter.write_stochastic(span.start, values, rounding_key(step, place.name))
            return
        target = parameter.detach().view(-1)[span.start : span.stop]
        if MASTER in state:
            state[MASTER][span.start : span.stop] = values
        if self._optim.stochastic_rounding and parameter.dtype == torch.bfloat16:
            values = stochastic_round(values, rounding_key(step, place.name), place.start + span.start)
        target.copy_(values)

    def _read(self, parameter: Tensor, state: State, key: str, span: Span) -> Tensor:
        """A new float32 tensor with a state's values."""
        if key in state:
            return state[key][span.start : span.stop].to(torch.float32, copy=True)
        codes = self._read_codes(state, key, self._places[parameter], span)
        scales = state[f"{key}.scales"][span.first_block : span.last_block].view(span.rows, -1)
        return self._quantizer(parameter, key).decode(codes, scales, span.left).view(-1)

    def _write(
        self,
        parameter: Tensor,
        state: State,
        key: str,
        span: Span,
        values: Tensor,
        known: Mapping[int, Tensor],
    ) -> None:
        """Stores a state's values, quantized with `known` scales of some blocks, by number, and the rest's own."""
        if key in state:
            state[key][span.start : span.stop] = values
            return
        by_row, quantizer = values.view(span.rows, -1), self._quantizer(parameter, key)
        scales = quantizer.largest(by_row, span.left)
        for block, scale in known.items():
            if span.first_block <= block < span.last_block:
                scales.view(-1)[block - span.first_block] = scale
        state[f"{key}.scales"][span.first_block : span.last_block] = scales.view(-1)
        codes = quantizer.encode(by_row, scales, span.left)
        self._write_codes(state, key, self._places[parameter], span, codes)

    def _quantizer(self, parameter: Tensor, key: str) -> Quantizer:
        kind = (key, parameter.device)
        if kind not in self._quantizers:
            bits = self._optim.state_bits
            self._quantizers[kind] = quantizer(bits, BLOCKS[bits], parameter.device, signed=key == "exp_avg")
        return self._quantizers[kind]

    def _read_codes(self, state: State, key: str, place: Place, span: Span) -> Tensor:
        """(rows, width) uint8."""
        stored, width = state[f"{key}.codes"], (span.stop - span.start) // span.rows
        if self._optim.state_bits == 8:
            return stored[span.start : span.stop].view(span.rows, width)
        first, last, odd = _bytes_of(place, span)
        return unpack(stored[first:last].view(span.rows, -1), width, odd=odd)

    def _write_codes(self, state: State, key: str, place: Place, span: Span, codes: Tensor) -> None:
        stored = state[f"{key}.codes"]
        if self._optim.state_bits == 8:
            stored[span.start : span.stop] = codes.reshape(-1)
            return
        first, last, odd = _bytes_of(place, span)
        stored[first:last] = pack(codes, odd=odd).view(-1)


def _bytes_of(place: Place, span: Span) -> tuple[int, int, bool]:
    """(first byte, last + 1, whether the first byte's low half belongs to another part) of a span's 4-bit codes."""
    if place.is_matrix:
        per_row = -(-place.row // 2)
        first = span.start // place.row * per_row
        return first, first + span.rows * per_row, False
    start, stop = place.start + span.start, place.start + span.stop
    return start // 2 - place.start // 2, -(-stop // 2) - place.start // 2, start % 2 == 1
