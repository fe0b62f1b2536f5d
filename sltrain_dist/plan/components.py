"""Names, colours and order of memory components and phases, the same in all reports (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from sltrain_dist.memory.result import Estimate, Group, Phase


class GroupStyle(NamedTuple):
    """How reports show a group of components: its name, and its colour in CSS notation."""

    name: str
    colour: str


GROUPS: Mapping[Group, GroupStyle] = {
    "factors": GroupStyle("low-rank factors", "#2f6fc4"),
    "sparse_values": GroupStyle("sparse values", "#58a0ee"),
    "index": GroupStyle("index of the supports", "#8cc3f5"),
    "dense": GroupStyle("dense weights", "#5a6f8c"),
    "states": GroupStyle("optimizer states", "#8359b8"),
    "master_weights": GroupStyle("master weights", "#b08ad9"),
    "gradients": GroupStyle("gradients", "#d9861f"),
    "activations": GroupStyle("activations", "#35995e"),
    "temporaries": GroupStyle("temporaries", "#cc4b45"),
    "buffers": GroupStyle("engine buffers", "#2aa19b"),
    "batch": GroupStyle("batch", "#8a9199"),
}
"""The groups in the order in which reports stack them: long-lived ones first. The colours can be told from black and
from white."""

PHASES: Mapping[Phase, str] = {
    "init": "start",
    "forward": "forward",
    "backward": "backward",
    "update": "update",
    "save": "save",
}
"""Names of the phases, in the order in which a run goes through them."""


def group_of(component: str) -> Group:
    """Returns the group of a component: "activations" for "activations.attention"."""
    return component.partition(".")[0]  # type: ignore[return-value]  # a component's name begins with its group


def detail_of(component: str) -> str:
    """Returns a component's name within its group: "attention" for "activations.attention", "other" if it has none."""
    return component.partition(".")[2].replace("_", " ") or "other"


def largest_group(estimate: Estimate) -> tuple[Group, int]:
    """Returns the group that takes most bytes at the peak, and these bytes."""
    group, num_bytes = max(estimate.peak.groups().items(), key=lambda item: item[1])
    return group_of(group), num_bytes
