"""What the planner's reports call things, and their colours, the same in all of them (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sltrain_dist.config.presets import PRESETS
from sltrain_dist.config.schema import Config
from sltrain_dist.memory.result import Estimate, Group, Phase, Point

GROUPS: Mapping[Group, tuple[str, str]] = {
    "factors": ("low-rank factors", "#2f6fc4"),
    "sparse_values": ("sparse values", "#58a0ee"),
    "index": ("index of the supports", "#8cc3f5"),
    "dense": ("dense weights", "#5a6f8c"),
    "states": ("optimizer states", "#8359b8"),
    "master_weights": ("master weights", "#b08ad9"),
    "gradients": ("gradients", "#d9861f"),
    "activations": ("activations", "#35995e"),
    "temporaries": ("temporaries", "#cc4b45"),
    "buffers": ("engine buffers", "#2aa19b"),
    "batch": ("batch", "#8a9199"),
}
"""Name and colour of each group, in the order in which reports stack them: what lasts, then what comes and goes. The
colours stand out from black and from white."""

PHASES: Mapping[Phase, str] = {
    "init": "start",
    "forward": "forward",
    "backward": "backward",
    "update": "update",
    "save": "save",
}
"""Short names of the phases, in their order."""


def group_of(component: str) -> Group:
    """The group that a component belongs to."""
    return component.partition(".")[0]  # type: ignore[return-value]  # a component begins with a group


def detail_of(component: str) -> str:
    """What a component says beyond its group; "other" if nothing."""
    return component.partition(".")[2].replace("_", " ") or "other"


@dataclass(frozen=True)
class Unit:
    """What a report counts bytes in: GB of 1e9 bytes, or MB of 1e6 for small runs."""

    name: str
    size: int

    @staticmethod
    def of(estimate: Estimate) -> Unit:
        """The unit in which the peak is at least 1."""
        return Unit("GB", 10**9) if estimate.peak_bytes >= 10**9 else Unit("MB", 10**6)

    def cell(self, num_bytes: int) -> str:
        """A table's cell, three decimals, which line up; empty for nothing."""
        return f"{num_bytes / self.size:,.3f}" if num_bytes else ""

    def details(self, group: Group, points: Sequence[Point]) -> list[str]:
        """Components of a group that show at any of some moments, if there are several."""
        sizes = ((key, size) for point in points for key, size in point.components.items())
        keys = sorted({key for key, size in sizes if group_of(key) == group and size >= self.size / 2000})
        return keys if len(keys) > 1 else []


def describe(config: Config, ranks: int) -> str:
    """One line on what is planned."""
    model, reparam, optim, parallel, train = config.model, config.reparam, config.optim, config.parallel, config.train
    name = f"{model.num_layers} blocks of width {model.hidden_size}"
    if config.preset and all(getattr(model, key) == value for key, value in PRESETS[config.preset]["model"].items()):
        name = config.preset
    method: str = reparam.method
    if method not in ("full", "galore"):
        method += f" r={reparam.rank}"
    if method.startswith("sltrain"):
        method += f" δ={reparam.density:g} {reparam.support}"
    engine = f"zero {parallel.zero_stage}" if parallel.engine == "zero" else parallel.engine
    where = "1 rank" if ranks == 1 else f"{ranks} ranks"
    if parallel.engine != "ddp":
        where += f", {engine}, shards {parallel.shard}"
    elif ranks > 1:
        where += ", ddp"
    update = ", per layer" if optim.update == "per_layer" else ""
    return (
        f"{name}, {method}; {optim.name} {optim.state_bits} bit{update}; {train.dtype}, "
        f"{train.micro_batch} × {config.data.seq_len} tokens, recompute {train.activation_checkpointing}; {where}"
    )


def binding(estimate: Estimate) -> tuple[Group, int]:
    """The group that takes most at the peak, and its bytes."""
    group, size = max(estimate.peak.groups().items(), key=lambda item: item[1])
    return group_of(group), size
