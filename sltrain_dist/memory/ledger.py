"""Plays recordings (no torch): adds up what they allocate and free, under what becomes of the gradients."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from sltrain_dist.memory.recording import Bytes, Parameter, Recording, Step

_MANY = 4096


@dataclass(frozen=True)
class Played:
    """What a pass does to the bytes that are live at its start, by component.

    Attributes:
        peak: Added at its largest moment; some may be negative.
        where: That moment in words; empty if nothing is larger than the start.
        end: Added at its end.
        in_flight: Parameters whose gradients are being summed over the ranks at the end, the oldest first.
    """

    peak: Bytes
    where: str
    end: Bytes
    in_flight: tuple[Parameter, ...] = ()


@dataclass(frozen=True)
class Gradients:
    """What becomes of gradients when they are complete.

    Attributes:
        use: "keep": they wait for the update. "add": they are added to what is there, an earlier micro-batch's or
            a bucket, and freed. "step": a per-layer update uses them up.
        width: Bytes of a value.
        step_bytes: With "step", transient bytes of the step of each parameter.
        in_flight_bytes: With "step", most bytes that are being summed over the ranks meanwhile; None on one rank.
        frees_earlier: Whether gradients of earlier micro-batches are freed as these come.
        message_bytes: With "add", bytes of a copy in which a full bucket is sent.
    """

    use: Literal["keep", "add", "step"]
    width: int
    step_bytes: tuple[tuple[Parameter, int], ...] = ()
    in_flight_bytes: int | None = None
    frees_earlier: bool = False
    message_bytes: int = 0

    def sink(self, in_flight: Sequence[Parameter]) -> _Sink:
        """Takes the gradients of one pass, at whose start those of some parameters are in flight."""
        return _UpdateSink(self, in_flight) if self.use == "step" else _Sink(self)


@lru_cache(_MANY)
def play(
    recording: Recording,
    name: str,
    gradients: Gradients | None = None,
    in_flight: tuple[Parameter, ...] = (),
    of_remainder: Gradients | None = None,
    *,
    last: bool = False,
) -> Played:
    """Plays a pass.

    Args:
        recording: What the pass is of.
        name: Of the pass.
        gradients: What becomes of them; None if there are none.
        in_flight: Parameters whose gradients are in flight at its start.
        of_remainder: What becomes of the gradients of the dense remainder, where that is something else. Then only
            these are ever in flight.
        last: Whether it is the last pass to use what all layers share.
    """
    played, balance = recording.passes[name], _Balance()
    remainder = of_remainder and of_remainder.sink(in_flight)
    sink = (gradients or _NO_GRADIENTS).sink(() if remainder else in_flight)
    taken_by: dict[int, _Sink] = {}
    freed: set[int] = set()
    for step, following in pairwise((*played.steps, _NO_STEP)):
        if step.shared and not last:
            continue
        balance.rise(step.peak, step.where)
        balance.add(step.end)
        balance.where = step.where
        if step.arrives is not None:
            index, storage = step.arrives
            parameter = recording.parameters[index]
            takes = remainder if remainder and not parameter.replaced else sink
            taken_by[storage] = takes
            if takes.adds and following == Step(following.where, {}, {}, released=storage):
                # Autograd adds it to an earlier gradient, and frees it before anybody is told.
                takes.released(balance, storage, played.gradient_bytes[storage])
                freed.add(storage)
            takes.arrives(balance, parameter, storage)
        if step.released is not None and step.released not in freed:
            taken_by[step.released].released(balance, step.released, played.gradient_bytes[step.released])
    return Played(balance.peak, balance.peak_where, balance.live, (remainder or sink).in_flight)


@lru_cache(_MANY)
def receive_all(gradients: Gradients, in_flight: tuple[Parameter, ...]) -> Played:
    """Plays the end of a backward pass, where gradients that are still in flight come back and are used."""
    balance = _Balance()
    sink = gradients.sink(in_flight)
    sink.receive(balance, 0)
    return Played(balance.peak, balance.peak_where, balance.live)


_NO_GRADIENTS = Gradients("keep", 0)
_NO_STEP = Step("", {}, {})


class _Balance:
    """Live bytes by component relative to a start, and their largest moment."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.where = self.peak_where = ""
        self._total = self._most = 0

    def add(self, more: Bytes) -> None:
        """Counts bytes that stay."""
        for component, size in more.items():
            self.count(component, size)

    def count(self, component: str, size: int) -> None:
        """Counts bytes of one component that stay."""
        self.live[component] = self.live.get(component, 0) + size
        self._total += size

    def rise(self, more: Bytes, where: str) -> None:
        """Notes a moment at which more bytes are live."""
        total = self._total + sum(more.values())
        if total > self._most:
            self._most, self.peak_where, self.peak = total, where, dict(self.live)
            for component, size in more.items():
                self.peak[component] = self.peak.get(component, 0) + size


class _Sink:
    """Takes the gradients of a pass: they become `.grad` and wait, or are added to what is there, and freed."""

    in_flight: tuple[Parameter, ...] = ()
    """Parameters whose gradients are being summed over the ranks, the oldest first."""

    def __init__(self, how: Gradients) -> None:
        self._how, self.adds = how, how.use == "add"
        self._kept: set[int] = set()

    def arrives(self, balance: _Balance, parameter: Parameter, storage: int) -> None:
        """A parameter's gradient is complete."""
        if not self.adds:
            self._kept.add(storage)
        if self._how.frees_earlier:
            balance.count("gradients", -parameter.values * self._how.width)
        if self._how.message_bytes:
            balance.rise({"buffers.messages": self._how.message_bytes}, balance.where)

    def released(self, balance: _Balance, storage: int, size: int) -> None:
        """Autograd lets go of a storage of gradients."""
        if storage not in self._kept:
            balance.count("gradients", -size)

    def receive(self, balance: _Balance, at_most: int) -> None:
        """Uses gradients that are in flight until at most so many bytes are."""


class _UpdateSink(_Sink):
    """Per-layer updates use gradients up, at once or when they come back from the other ranks."""

    def __init__(self, how: Gradients, in_flight: Sequence[Parameter]) -> None:
        super().__init__(how)
        self.adds = how.frees_earlier
        self._step_bytes = dict(how.step_bytes)
        self._sent: deque[tuple[Parameter, int | None]] = deque((parameter, None) for parameter in in_flight)
        self._values_in_flight = sum(parameter.values for parameter in in_flight)
        self._users: dict[int, int] = {}
        self._released: dict[int, int] = {}

    @property
    def in_flight(self) -> tuple[Parameter, ...]:  # type: ignore[override]
        return tuple(parameter for parameter, _ in self._sent)

    def arrives(self, balance: _Balance, parameter: Parameter, storage: int) -> None:
        if self._how.in_flight_bytes is None:
            self._use(balance, parameter)
            if self._how.frees_earlier:
                balance.count("gradients", -parameter.values * self._how.width)
            return
        self._values_in_flight += parameter.values
        if self._how.frees_earlier:  # added to that of earlier micro-batches, which is what is sent
            self._sent.append((parameter, None))
        else:
            self._sent.append((parameter, storage))
            self._users[storage] = self._users.get(storage, 0) + 1
        self.receive(balance, self._how.in_flight_bytes)

    def released(self, balance: _Balance, storage: int, size: int) -> None:
        self._released[storage] = size
        self._free(balance, storage)

    def receive(self, balance: _Balance, at_most: int) -> None:
        while self._values_in_flight * self._how.width > at_most:
            parameter, storage = self._sent.popleft()
            self._values_in_flight -= parameter.values
            self._use(balance, parameter)
            if storage is None:  # of an earlier pass
                balance.count("gradients", -parameter.values * self._how.width)
            else:
                self._users[storage] -= 1
                self._free(balance, storage)

    def _free(self, balance: _Balance, storage: int) -> None:
        if not self._users.get(storage) and storage in self._released:
            balance.count("gradients", -self._released.pop(storage))

    def _use(self, balance: _Balance, parameter: Parameter) -> None:
        balance.rise({"temporaries.update": self._step_bytes[parameter]}, f"{balance.where}, update")
