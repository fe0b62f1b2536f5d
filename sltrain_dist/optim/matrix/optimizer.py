"""Muon and Spectron for matrices of which this rank holds ranges (`optim.factors`).

An update has three parts. Each rank updates the momentum of the values that it holds. One rank orthogonalizes the
momentum of a whole matrix. Each rank then changes the values that it holds. The first and the last part are elementwise
and give the same bits however a matrix is sharded. The second is computed on one rank, so that all ranks get the same
bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltrain_dist.config.schema import OptimConfig
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.low_bit_states import CLEARED_AT, LowBitOptimizer
from sltrain_dist.optim.matrix.jobs import MatrixJob, WholeMatrices
from sltrain_dist.optim.matrix.spectrum import matched_scale, orthogonalize, spectral_norm
from sltrain_dist.optim.state_layout import MOMENTUM, UpdateChunk

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class MatrixOptimizer(LowBitOptimizer):
    """Muon or Spectron, by `optim.factors`, with one momentum and decoupled weight decay.

    Both average the gradients: M ← µM + (1 − µ)·gradient, and orthogonalize the average (:func:`orthogonalize`).

    muon: Every matrix changes by −lr·c·O(µM + (1 − µ)·gradient), Nesterov's form of the average, as torch.optim.Muon
    does. `optim.factors_scale` sets c.

    spectron: B and A of a layer change by −ρ·O(M). With W = s·BA + S, σ the spectral norm and η = lr·c,

        ρ = η / (s·(σ(B) + σ(A)) + √s)

    so that the change of s·BA in an update has a spectral norm of at most about η, however large the factors are. This
    is the step η / (σ(B) + σ(A) + 1) of Spectron (arXiv 2602.12429, algorithm 1, where s = 1) for the factors √s·B and
    √s·A. Differences: the paper estimates the norms by a power iteration that it goes on with in every update, and here
    they are computed from the factors alone (:func:`spectral_norm`). With `optim.factors_scale: match_rms_adamw`, η
    depends on the shape (m, n) of W as muon's step of W does.

    Args:
        groups: Parameter groups with "weight_decay", as for torch's optimizers.
        optim: Optimizer settings.
        ranges: Which range of which parameter each tensor in `groups` is; it may be empty. All ranks pass the same
            parameters in the same order.
        whole: How whole matrices are reached.

    Raises:
        ValueError: A parameter is not a matrix, or has no partner with spectron.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        optim: OptimConfig,
        ranges: Mapping[nn.Parameter, TensorRange],
        whole: WholeMatrices,
    ) -> None:
        super().__init__(groups, optim, ranges)
        self._whole, self._dtype = whole, _DTYPES[optim.newton_schulz]
        self._group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        for part in self._ranges.values():
            if len(part.shape) != 2:
                raise ValueError(f"{part.name} of shape {part.shape} is not a matrix, and cannot be orthogonalized")
        self.jobs = list(self._pairs() if optim.factors == "spectron" else self._single_matrices())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter. All ranks that hold ranges of the same parameters call it."""
        self._whole.deal(self.jobs)

    def _single_matrices(self) -> Iterator[MatrixJob]:
        matched = self._optim.factors_scale == "match_rms_adamw"
        for parameter, part in self._ranges.items():
            m, n = part.shape
            rate = matched_scale(m, n) if matched else math.sqrt(max(1.0, m / n))
            yield MatrixJob(
                shapes=(part.shape,),
                outputs=1,
                collect=partial(self._collect, (parameter,)),
                compute=self._orthogonalize,
                deliver=partial(self._deliver, (parameter,), rate),
            )

    def _pairs(self) -> Iterator[MatrixJob]:
        by_name = {part.name: parameter for parameter, part in self._ranges.items()}
        layers = dict.fromkeys(name.removesuffix(".B").removesuffix(".A") for name in by_name)
        matched = self._optim.factors_scale == "match_rms_adamw"
        for layer in layers:
            names = f"{layer}.B", f"{layer}.A"
            if not by_name.keys() >= set(names):
                raise ValueError(f"{layer} does not have both B and A, which spectron updates together")
            pair = tuple(by_name[name] for name in names)
            B, A = (self._ranges[parameter].shape for parameter in pair)
            yield MatrixJob(
                shapes=(B, A, B, A),
                outputs=2,
                collect=partial(self._collect, pair),
                compute=self._couple,
                deliver=partial(self._deliver, pair, matched_scale(B[0], A[1]) if matched else 1.0),
            )

    def _collect(self, parameters: Sequence[nn.Parameter], flat: Sequence[Tensor]) -> None:
        """Updates the momentum, and writes what is orthogonalized; for spectron, then also the values."""
        directions, values = flat[: len(parameters)], flat[len(parameters) :]
        for parameter, direction in zip(parameters, directions, strict=True):
            if parameter.grad is not None:
                start, state = self._ranges[parameter].start, self._state_of(parameter)
                state["step"] += 1
                for chunk in self._chunks(parameter):
                    direction[start + chunk.start : start + chunk.stop] = self._direction(parameter, chunk)
        for parameter, value in zip(parameters, values, strict=False):  # muon has none
            start, state = self._ranges[parameter].start, self._state_of(parameter)
            for chunk in self._chunks(parameter):
                value[start + chunk.start : start + chunk.stop] = self._values(parameter, state, chunk)

    def _direction(self, parameter: nn.Parameter, chunk: UpdateChunk) -> Tensor:
        """Updates the momentum of a chunk, and returns what is orthogonalized of it, before it is quantized."""
        momentum, state, gradient = self._optim.momentum, self.state[parameter], parameter.grad
        assert gradient is not None  # callers skip parameters without a gradient
        new = gradient.reshape(-1)[chunk.start : chunk.stop].to(torch.float32, copy=True).mul_(1 - momentum)
        average = self._read(parameter, state, MOMENTUM, chunk).mul_(momentum).add_(new)
        self._write(parameter, state, MOMENTUM, chunk, average, {})
        return average.mul_(momentum).add_(new) if self._optim.factors == "muon" else average

    def _orthogonalize(self, whole: Sequence[Tensor]) -> None:
        for matrix in whole:
            matrix.copy_(orthogonalize(matrix, self._dtype))

    def _couple(self, whole: Sequence[Tensor]) -> None:
        """Replaces the averages of B and A, the first two, by their changes for η = 1; the others are B and A."""
        scale = self._whole.low_rank_scale
        norms = spectral_norm(whole[2]) + spectral_norm(whole[3])
        step = 1 / (scale * norms + math.sqrt(scale))
        for matrix in whole[:2]:
            matrix.copy_(orthogonalize(matrix, self._dtype)).mul_(step)

    def _deliver(self, parameters: Sequence[nn.Parameter], rate: float, changes: Sequence[Tensor]) -> None:
        """Applies weight decay, and −lr·`rate` times the whole changes (overwritten), to this rank's values."""
        for parameter, change in zip(parameters, changes, strict=True):
            if parameter.grad is None:
                continue
            start, state, group = self._ranges[parameter].start, self.state[parameter], self._group_of[parameter]
            lr = float(group["lr"]) * self._optim.factors_lr_ratio
            for chunk in self._chunks(parameter):
                mine = change[start + chunk.start : start + chunk.stop].mul_(lr * rate).to(parameter.device)
                values = self._values(parameter, state, chunk) * (1 - lr * float(group["weight_decay"]))
                self._store_values(parameter, state, chunk, values.sub_(mine), state["step"] + state[CLEARED_AT])
