"""The memory of the published code, which predicts the paper's *measured* Figure 3 (no torch if all is recorded).

The code that the authors published with arXiv 2406.02214 builds on that of GaLore (arXiv 2403.03507). Its algorithm is
in plan/paper/published.py; it is recorded and played like our own, on one GPU in bf16. Two things cannot be recorded
and are assumed: the 8-bit Adam of bitsandbytes allocates nothing in a step, and cuSOLVER's undocumented workspace is
left out.
"""

from __future__ import annotations

from sltrain_dist.config.schema import Config, DataConfig, TrainConfig
from sltrain_dist.errors import ConfigError
from sltrain_dist.memory.holdings import Holding
from sltrain_dist.memory.recorded_model import model_of
from sltrain_dist.memory.recording import Recording
from sltrain_dist.memory.recording_store import only_memory, request
from sltrain_dist.memory.result import Estimate, Point
from sltrain_dist.memory.schedules.ddp import Timeline

RELATIVE_ERROR = 0.1
"""Expected relative error; the four 7B bars of Figure 3 are within it (docs/planner_search.md)."""


def reference_estimate(config: Config) -> Estimate:
    """Estimates the memory of the published code for a configuration, on one GPU.

    Supported methods: full and galore (with or without 8-bit states, per layer or not) and sltrain.
    `train.micro_batch`, `data.seq_len` and full activation checkpointing have an effect; engine and paths, which are
    settings of this code only, do not. Gradients are accumulated only with whole updates, because per-layer updates of
    the published code step at every micro-batch.

    Raises:
        ConfigError: The published code has no such setting.
    """
    _check(config)
    update = _Update(config)
    return Estimate(
        timeline=tuple(update.points()),
        reserved_bytes=0,  # the paper's figures are of allocated tensors
        parameters=update.holdings.total_values,
        flops_per_token=update.flops_per_token,
        comm_bytes_per_update=0,
        relative_error=RELATIVE_ERROR,
        method="reference emulation",
    )


def _check(config: Config) -> None:
    reparam, train, optim, model = config.reparam, config.train, config.optim, config.model
    refused = (
        ("reparam.method", reparam.method not in ("full", "galore", "sltrain"), "full, galore or sltrain"),
        ("reparam.dense_layers", bool(reparam.dense_layers), "[]"),
        ("reparam.support", reparam.method == "sltrain" and reparam.support != "random", "random"),
        ("reparam.weight_bits", reparam.weight_bits != 16, "16"),
        ("reparam.restart_every", reparam.restart_every > 0, "0"),
        ("data.reset_attention", config.data.reset_attention, "false"),
        ("train.dtype", train.dtype != "bf16", "bf16"),
        ("train.activation_checkpointing", train.activation_checkpointing == "selective", "none or full"),
        ("optim.name", optim.name not in ("adam", "adamw"), "adam or adamw"),
        ("optim.state_bits", optim.state_bits not in (16, 8), "16 (torch's Adam) or 8 (bitsandbytes)"),
        ("optim.master_weights", optim.master_weights, "false"),
        ("optim.update", optim.update == "per_layer" and optim.state_bits != 8, "whole, or state_bits=8"),
        ("model.num_kv_heads", model.kv_heads != model.num_heads, "null"),
        ("model.tie_head", model.tie_head, "false"),
    )
    wrong = [f"{key}: the published code has no such setting; set {remedy}" for key, bad, remedy in refused if bad]
    if wrong:
        raise ConfigError("\n".join(f"--implementation reference: {line}" for line in wrong))


class _Update(Timeline):
    """One update of the published code."""

    def __init__(self, config: Config) -> None:
        train, recompute = config.train, config.train.activation_checkpointing
        sections = {
            "model": only_memory(config.model, num_layers=1),
            "reparam": only_memory(config.reparam),
            "data": DataConfig(seq_len=config.data.seq_len),
            "train": TrainConfig(micro_batch=train.micro_batch, activation_checkpointing=recompute),
        }
        layer, ends = (request(f"plan.paper.published:record_{of}", "cuda", **sections) for of in ("layer", "ends"))
        passes = 1 if config.optim.update == "per_layer" else train.global_batch // train.micro_batch
        super().__init__(config, model_of((layer,), (0,) * config.model.num_layers, ends), 1, passes, "cuda")

    def points(self) -> list[Point]:
        """Plays an update and returns its moments in order; there is no checkpoint and no evaluation."""
        self.allocate_parameters()
        self.allocate_states_and_gradients()
        self.init()
        self.add("batch", self.batch_bytes(self.tokens))
        self.forward()
        self.backward()
        self.update()
        return self.timeline

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations per token, without those of GaLore's SVD."""
        update = sum(item.count * self._recorded_step(item).flops for item in self.holdings.items)
        return (self.passes * self.model.flops + update) // (self.passes * self.tokens)

    def allocate_states_and_gradients(self) -> None:
        """Counts optimizer states, and the gradients accumulated before the last micro-batch."""
        for item in self.holdings.items:
            for component in ("states", "states.projectors"):
                self.add(component, item.count * self._recorded_step(item).sizes[component])
        if self.passes > 1:
            self.add("gradients", self.holdings.total_values * self.width)

    def batch_bytes(self, tokens: int) -> int:
        """Returns the bytes of token ids, labels and padding mask, in int64."""
        return 24 * tokens

    def step_bytes(self, item: Holding) -> int:
        """Returns the transient bytes of the optimizer step of a parameter."""
        return self._recorded_step(item).sizes["step"]

    def update(self) -> None:
        """Plays the optimizer step of a whole update."""
        if self.config.optim.update == "per_layer":
            return
        if self.config.optim.state_bits == 16 and self.config.reparam.method != "galore":  # torch's multi-tensor step
            transient = sum(item.count * self.step_bytes(item) for item in self.holdings.items)
        else:
            transient = max(map(self.step_bytes, self.holdings.items))
        self.point("update", "optimizer step", {"temporaries.update": transient})

    def _recorded_step(self, item: Holding) -> Recording:
        sections = {"reparam": only_memory(self.config.reparam), "optim": only_memory(self.config.optim)}
        make, parameter = "plan.paper.published_optimizers:record_update", item.parameter
        return request(make, "cuda", parameter.shape, parameter.replaced, **sections).get()
