"""A ledger of live bytes (no torch): the operators of a stretch of training are gone through in order, and what each
of them allocates and frees is written down.

The closed form of :mod:`sltrain_dist.memory.estimate` is made of such stretches. One is worked out once for all
blocks of a model, and for all configurations that share its sizes; what it says is relative to what lives at its start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


class Buffer:
    """A storage, with the number of its owners."""

    __slots__ = ("component", "owners", "size")

    def __init__(self, component: str, size: int) -> None:
        self.component, self.size, self.owners = component, size, 1


@dataclass(frozen=True)
class Stretch:
    """What a stretch of training does to the bytes that live at its start, by component.

    Attributes:
        peak: Added at its largest moment (some may be negative).
        peak_total: Sum of these; at least 0, which the start itself has.
        where: The largest moment in words.
        end: Added at its end.
    """

    peak: Mapping[str, int]
    peak_total: int
    where: str
    end: Mapping[str, int]


class Tape:
    """Bytes that live, by component, and the most that did since the start."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.total = 0
        self._most = 0
        self._peak: dict[str, int] = {}
        self._where = self._peak_where = ""

    def at(self, where: str) -> None:
        """Names what comes now."""
        self._where = where

    def new(self, component: str, size: int) -> Buffer:
        """A storage with one owner."""
        self.add(component, size)
        return Buffer(component, size)

    def add(self, component: str, size: int) -> None:
        """Counts bytes (or, negative, uncounts them) that are nobody's storage here."""
        self.live[component] = self.live.get(component, 0) + size
        self.total += size
        if self.total > self._most:
            self._most, self._peak, self._peak_where = self.total, dict(self.live), self._where

    def keep(self, buffer: Buffer) -> Buffer:
        """Gives a storage one more owner."""
        buffer.owners += 1
        return buffer

    def drop(self, *buffers: Buffer | None) -> None:
        """Takes an owner from each storage; those without any are freed."""
        for buffer in buffers:
            if buffer is None:
                continue
            buffer.owners -= 1
            if buffer.owners == 0:
                self.live[buffer.component] = self.live.get(buffer.component, 0) - buffer.size
                self.total -= buffer.size

    def rename(self, buffer: Buffer, component: str) -> Buffer:
        """Puts a storage to another component."""
        self.live[buffer.component] = self.live.get(buffer.component, 0) - buffer.size
        self.live[component] = self.live.get(component, 0) + buffer.size
        buffer.component = component
        return buffer

    def brief(self, component: str, size: int) -> None:
        """A storage that is gone again before anything else comes."""
        self.drop(self.new(component, size))

    def stretch(self) -> Stretch:
        """What has been gone through."""
        return Stretch(self._peak, self._most, self._peak_where, {k: v for k, v in self.live.items() if v})
