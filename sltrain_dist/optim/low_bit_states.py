"""The states of an optimizer that are float32, of the parameter's type or block-quantized, for ranges of parameters.

Whatever updates parameters keeps its states here, a bounded chunk of values at a time. Parameters of bf16 are rounded
to the nearest or stochastically, or have fp32 master weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.numerics.blockwise import Quantizer, pack, quantizer, unpack
from sltrain_dist.numerics.device import device_type, in_turn
from sltrain_dist.numerics.int8_weight import Int8Weight
from sltrain_dist.numerics.rounding import rounding_key, stochastic_round
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.state_layout import (
    GROUP_SIZES,
    MASTER,
    UNSIGNED,
    UpdateChunk,
    code_bytes,
    stored_states,
    update_chunks,
)

CLEARED_AT = "cleared_at"
"""Key of the number of updates that were made before the states were last cleared (a restart)."""

State = dict[str, Any]
"""Flat tensors by name, and two integers, so that no device is waited for: under "step" the number of updates since the
states were cleared, and under :data:`CLEARED_AT` the number before."""

_CHUNK, _CHUNK_CPU = 1 << 21, 1 << 16
"""Values updated at a time: on the CPU as many as stay in the cache, on a GPU as many as keep it busy. Each needs 22
bytes of transient memory, 32 with stochastic rounding, 36 in int8 weights: at most 76 MB on a GPU."""


class LowBitOptimizer(torch.optim.Optimizer):
    """The base of optimizers whose states :func:`~sltrain_dist.optim.state_layout.stored_states` describes.

    Args:
        groups: Parameter groups with "weight_decay", as for torch's optimizers.
        optim: Optimizer settings.
        ranges: Which range of which parameter each tensor in `groups` is.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], optim: OptimConfig, ranges: Mapping[nn.Parameter, TensorRange]
    ) -> None:
        super().__init__(groups, {"lr": optim.lr, "weight_decay": 0.0})
        self._optim = optim
        self._ranges = {parameter: ranges[parameter] for group in self.param_groups for parameter in group["params"]}
        self._quantizers: dict[tuple[str, torch.device], Quantizer] = {}

    def make_state(self, parameter: Tensor) -> State:
        """Returns a parameter's state before the first update: zeros, and the parameter's values as master weights."""
        part, bits, device = self._ranges[parameter], self._optim.state_bits, parameter.device
        state: State = {"step": 0, CLEARED_AT: 0}
        for stored in stored_states(part, self._optim, parameter.element_size()):
            if stored.range.name == MASTER:
                state[stored.range.name] = parameter.detach().float().reshape(-1)
            elif stored.range.name.endswith(".codes"):
                state[stored.range.name] = torch.zeros(code_bytes(part, bits), dtype=torch.uint8, device=device)
            else:
                dtype = parameter.dtype if bits == 16 else torch.float32
                state[stored.range.name] = torch.zeros(stored.range.count, dtype=dtype, device=device)
        return state

    def codes(self, parameter: Tensor, key: str) -> Tensor:
        """Returns the codes of the quantized state `key`, (count,) uint8, one code per byte."""
        part = self._ranges[parameter]
        read = (self._read_codes(self.state[parameter], key, part, chunk) for chunk in self._chunks(parameter))
        return torch.cat([some.reshape(-1) for some in read])

    def set_codes(self, parameter: Tensor, key: str, codes: Tensor) -> None:
        """Stores codes in the form that :meth:`codes` returns."""
        part = self._ranges[parameter]
        for chunk in self._chunks(parameter):
            some = codes[chunk.start : chunk.stop].view(chunk.rows, -1)
            self._write_codes(self.state[parameter], key, part, chunk, some)

    def _state_of(self, parameter: Tensor) -> State:
        if not self.state[parameter]:
            self.state[parameter] = self.make_state(parameter)
        return self.state[parameter]

    def _chunks(self, parameter: Tensor) -> Iterable[UpdateChunk]:
        group_size = GROUP_SIZES.get(self._optim.state_bits, 1)
        size = _CHUNK_CPU if device_type(parameter) == "cpu" else _CHUNK
        return in_turn(list(update_chunks(self._ranges[parameter], group_size, size)))

    def _values(self, parameter: Tensor, state: State, chunk: UpdateChunk) -> Tensor:
        """Returns the parameter's values in float32, possibly a view of them."""
        if isinstance(parameter, Int8Weight):
            return parameter.read(chunk.start, chunk.stop, torch.float32)
        source = state.get(MASTER, parameter.detach().view(-1))
        return source[chunk.start : chunk.stop].float()

    def _store_values(self, parameter: Tensor, state: State, chunk: UpdateChunk, values: Tensor, step: int) -> None:
        part = self._ranges[parameter]
        if isinstance(parameter, Int8Weight):
            parameter.write_stochastic(chunk.start, values, rounding_key(step, part.name))
            return
        target = parameter.detach().view(-1)[chunk.start : chunk.stop]
        if MASTER in state:
            state[MASTER][chunk.start : chunk.stop] = values
        if self._optim.stochastic_rounding and parameter.dtype == torch.bfloat16:
            values = stochastic_round(values, rounding_key(step, part.name), part.start + chunk.start)
        target.copy_(values)

    def _read(self, parameter: Tensor, state: State, key: str, chunk: UpdateChunk) -> Tensor:
        """Returns a state's values as a new float32 tensor."""
        if key in state:
            return state[key][chunk.start : chunk.stop].to(torch.float32, copy=True)
        codes = self._read_codes(state, key, self._ranges[parameter], chunk)
        scales = state[f"{key}.scales"][chunk.first_group : chunk.last_group].view(chunk.rows, -1)
        return self._quantizer(parameter, key).decode(codes, scales, chunk.left).view(-1)

    def _write(
        self,
        parameter: Tensor,
        state: State,
        key: str,
        chunk: UpdateChunk,
        values: Tensor,
        shared_scales: Mapping[int, Tensor],
    ) -> None:
        """Stores a state's values; groups whose number is in `shared_scales` use that scale, the others their own."""
        if key in state:
            state[key][chunk.start : chunk.stop] = values
            return
        by_row, quantizer = values.view(chunk.rows, -1), self._quantizer(parameter, key)
        scales = quantizer.largest(by_row, chunk.left)
        for number, scale in shared_scales.items():
            if chunk.first_group <= number < chunk.last_group:
                scales.view(-1)[number - chunk.first_group] = scale
        state[f"{key}.scales"][chunk.first_group : chunk.last_group] = scales.view(-1)
        codes = quantizer.encode(by_row, scales, chunk.left)
        self._write_codes(state, key, self._ranges[parameter], chunk, codes)

    def _quantizer(self, parameter: Tensor, key: str) -> Quantizer:
        kind = (key, parameter.device)
        if kind not in self._quantizers:
            bits = self._optim.state_bits
            self._quantizers[kind] = quantizer(bits, GROUP_SIZES[bits], parameter.device, signed=key not in UNSIGNED)
        return self._quantizers[kind]

    def _read_codes(self, state: State, key: str, part: TensorRange, chunk: UpdateChunk) -> Tensor:
        """Returns a chunk's codes, (rows, width) uint8."""
        stored, width = state[f"{key}.codes"], (chunk.stop - chunk.start) // chunk.rows
        if self._optim.state_bits == 8:
            return stored[chunk.start : chunk.stop].view(chunk.rows, width)
        first, last, odd = _bytes_of(part, chunk)
        return unpack(stored[first:last].view(chunk.rows, -1), width, odd=odd)

    def _write_codes(self, state: State, key: str, part: TensorRange, chunk: UpdateChunk, codes: Tensor) -> None:
        stored = state[f"{key}.codes"]
        if self._optim.state_bits == 8:
            stored[chunk.start : chunk.stop] = codes.reshape(-1)
            return
        first, last, odd = _bytes_of(part, chunk)
        stored[first:last] = pack(codes, odd=odd).view(-1)


def _bytes_of(part: TensorRange, chunk: UpdateChunk) -> tuple[int, int, bool]:
    """Returns the bytes of a chunk's 4-bit codes: (first, last + 1, whether the first's low half is another rank's)."""
    if part.is_matrix:
        per_row = -(-part.row // 2)
        first = chunk.start // part.row * per_row
        return first, first + chunk.rows * per_row, False
    start, stop = part.start + chunk.start, part.start + chunk.stop
    return start // 2 - part.start // 2, -(-stop // 2) - part.start // 2, start % 2 == 1
