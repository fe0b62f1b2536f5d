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


@dataclass(frozen=True)
class ComponentRow:
    """A row of a table of components by moment: a group, or one of the components that a group is made of.

    Attributes:
        name: What the row is called.
        colour: Colour of the group.
        is_detail: Whether this is a component of the group above it.
        sizes: Bytes at each moment.
    """

    name: str
    colour: str
    is_detail: bool
    sizes: Sequence[int]


def component_rows(points: Sequence[Point], unit: Unit) -> list[ComponentRow]:
    """Returns the rows of every group that takes bytes at any of some moments, in the order of the reports.

    A group is followed by its components if several of them are large enough to be shown in the unit.
    """
    rows = []
    for group, (name, colour) in GROUPS.items():
        sums = [point.groups().get(group, 0) for point in points]
        if not any(sums):
            continue
        rows.append(ComponentRow(name, colour, False, sums))
        components = sorted({key for point in points for key in point.components if group_of(key) == group})
        sizes = {key: [point.components.get(key, 0) for point in points] for key in components}
        shown = {key: each for key, each in sizes.items() if max(each) >= unit.size / 2000}
        if len(shown) > 1:
            rows += [ComponentRow(detail_of(key), colour, True, each) for key, each in shown.items()]
    return rows


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
