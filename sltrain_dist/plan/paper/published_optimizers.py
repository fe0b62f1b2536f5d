"""The optimizers that the published code calls (with torch): torch's Adam, bitsandbytes' 8-bit Adam, and GaLore's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Adam, Optimizer

from sltrain_dist.config.schema import Config
from sltrain_dist.memory.events import EventLog
from sltrain_dist.memory.record import by_itself, transient_bytes
from sltrain_dist.memory.recording import Recording
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.optim.state_layout import QUANTIZED_FROM

ADAM8BIT_BLOCK = 2048
"""Number of values that share a float32 scale in the block-wise optimizers of bitsandbytes before 0.45 (2024)."""


def record_update(config: Config, shape: tuple[int, ...], replaced: bool, device: DeviceType) -> Recording:
    """Records the update of a parameter: its transient bytes as "step", and the bytes of its states by component.

    Args:
        config: The run.
        shape: Shape of the parameter.
        replaced: Whether it belongs to a linear layer of attention or MLP, whose gradients GaLore projects.
        device: Device whose operators are recorded.
    """
    with by_itself(), FakeTensorMode():
        parameter = nn.Parameter(torch.empty(shape, dtype=torch.bfloat16))
        gradient = parameter.grad = torch.empty_like(parameter)
        optimizer, log = make_optimizer([parameter], replaced, config), EventLog(device)
        log.leave_out([parameter, gradient])
        with log:
            optimizer.step()  # makes the states
            flops = log.flops
            log.begin_part("step")
            if config.optim.update == "whole":
                gradient.clone()  # copied to the CPU, where the script computes the gradient's norm
            optimizer.step()
        states = {key: value.nbytes for state in optimizer.state.values() for key, value in state.items()}
    projector = states.pop("projector", 0)
    states.pop("step", None)  # on the CPU
    sizes = {"step": transient_bytes(log, "step"), "states": sum(states.values()), "states.projectors": projector}
    return Recording(flops=log.flops - flops, sizes=sizes)


def make_optimizer(parameters: list[nn.Parameter], replaced: bool, config: Config) -> Optimizer:
    """Makes the optimizer of some parameters, or GaLore's for a single parameter of a `replaced` linear layer."""
    if config.reparam.method == "galore" and replaced:
        return GaLore(parameters[0], config.reparam.rank, config.optim.state_bits)
    return Adam8bit(parameters) if config.optim.state_bits == 8 else Adam(parameters, foreach=True)


class Adam8bit(Optimizer):
    """The block-wise 8-bit Adam of bitsandbytes. Its kernel works in place and allocates nothing."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self) -> None:  # type: ignore[override]
        """Allocates the states in the first step. The update itself allocates nothing and is left out."""
        for parameter in self.param_groups[0]["params"]:
            small = parameter.numel() < QUANTIZED_FROM  # then its states stay float32, as in our optimizers
            for moment in () if self.state[parameter] else ("exp_avg", "exp_avg_sq"):
                dtype = torch.float32 if small else torch.uint8
                self.state[parameter][moment] = torch.zeros_like(parameter, dtype=dtype)
                if not small:
                    scales = -(-parameter.numel() // ADAM8BIT_BLOCK)
                    self.state[parameter][f"{moment}_scales"] = torch.zeros(scales)


class GaLore(Optimizer):
    """GaLore: Adam on a gradient that is projected to a low rank. Every step computes the projector anew.

    Args:
        parameter: The parameter (m, n).
        rank: Rank of the projected gradient (m, rank) or (rank, n), which keeps the longer side.
        bits: Bits of Adam's states.
    """

    def __init__(self, parameter: nn.Parameter, rank: int, bits: int) -> None:
        super().__init__([parameter], {})
        self._parameter, self._rank = parameter, rank
        self._low = nn.Parameter(torch.empty(0, dtype=torch.bfloat16))  # stands for the parameter in Adam's step
        self._adam = Adam8bit([self._low]) if bits == 8 else Adam([self._low], foreach=False)

    def step(self) -> None:  # type: ignore[override]
        """Projects the gradient, makes Adam's step, and projects the update back."""
        gradient = self._parameter.grad
        assert gradient is not None
        m, n = gradient.shape
        right = m >= n
        projector = self.state[self._parameter]["projector"] = self._projector(gradient, right)
        projected = gradient @ projector.t() if right else projector.t() @ gradient
        self._low.data, self._low.grad = torch.zeros_like(projected), projected
        self._adam.step()
        self._parameter.data.add_(self._low.data @ projector if right else projector @ self._low.data)
        self.state[self._low] = self._adam.state[self._low]
        self._low.data, self._low.grad = torch.empty(0, dtype=torch.bfloat16), None

    def _projector(self, gradient: Tensor, right: bool) -> Tensor:
        u, _, vh = torch.linalg.svd(gradient.to(torch.float32), full_matrices=False)
        return (vh[: self._rank] if right else u[:, : self._rank]).to(torch.bfloat16)
