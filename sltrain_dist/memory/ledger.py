"""The player of recordings (no torch): adds up what they allocate and free, for a given handling of gradients."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from sltrain_dist.memory.recording import Bytes, Parameter, Recording, Step

_CACHE_SIZE = 4096


@dataclass(frozen=True)
class Played:
    """Changes that a pass makes to the live bytes, by component and relative to its start.

    Attributes:
        peak: Bytes added at the peak; some may be negative.
        where: Description of the peak; empty if the start is the peak.
        end: Bytes added at the end.
        in_flight: Parameters whose gradients are being all-reduced at the end, the oldest first.
    """

    peak: Bytes
    where: str
    end: Bytes
    in_flight: tuple[Parameter, ...] = ()


@dataclass(frozen=True)
class Gradients:
    """How gradients are handled when they are complete.

    Attributes:
        use: "keep": gradients are kept until the update. "add": they are added to earlier gradients or copied into a
            bucket, and freed. "step": a per-layer update uses and frees them.
        width: Bytes of a value.
        step_bytes: With "step", transient bytes of the optimizer step of each parameter.
        in_flight_bytes: With "step", limit of the bytes that are being all-reduced at a time; None on one rank.
        frees_earlier: Whether accumulated gradients are freed as these arrive.
        message_bytes: With "add", bytes of the copy in which a full bucket is sent.
    """

    use: Literal["keep", "add", "step"]
    width: int
    step_bytes: tuple[tuple[Parameter, int], ...] = ()
    in_flight_bytes: int | None = None
    frees_earlier: bool = False
    message_bytes: int = 0

    def sink(self, in_flight: Sequence[Parameter]) -> _Sink:
        """Returns a sink for the gradients of one pass; those of some parameters are in flight at its start."""
        return _UpdateSink(self, in_flight) if self.use == "step" else _Sink(self)


@lru_cache(_CACHE_SIZE)
def play(
    recording: Recording,
    name: str,
    gradients: Gradients | None = None,
    in_flight: tuple[Parameter, ...] = (),
    remainder_gradients: Gradients | None = None,
    *,
    last: bool = False,
) -> Played:
    """Plays a pass of a recording.

    Args:
        recording: The recording.
        name: Name of the pass.
        gradients: How gradients are handled; None if the pass has none.
        in_flight: Parameters whose gradients are in flight at the start.
        remainder_gradients: How gradients of the dense remainder are handled, if differently. In this case only these
            are ever in flight.
        last: Whether this is the last pass that uses the storages shared by all layers, and frees them.
    """
    played, balance = recording.passes[name], _Balance()
    remainder = remainder_gradients and remainder_gradients.sink(in_flight)
    sink = (gradients or _NO_GRADIENTS).sink(() if remainder else in_flight)
    sinks: dict[int, _Sink] = {}  # by storage
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
            sinks[storage] = remainder if remainder and not parameter.replaced else sink
            if sinks[storage].adds and following == Step(following.where, {}, {}, released=storage):
                # Autograd adds it to an earlier gradient and frees it before the hook is called.
                sinks[storage].released(balance, storage, played.gradient_bytes[storage])
                freed.add(storage)
            sinks[storage].arrives(balance, parameter, storage)
        if step.released is not None and step.released not in freed:
            sinks[step.released].released(balance, step.released, played.gradient_bytes[step.released])
    return Played(balance.peak, balance.peak_where, balance.live, (remainder or sink).in_flight)


@lru_cache(_CACHE_SIZE)
def use_in_flight(gradients: Gradients, in_flight: tuple[Parameter, ...]) -> Played:
    """Plays the end of a backward pass, where the gradients still in flight arrive and are used."""
    balance = _Balance()
    sink = gradients.sink(in_flight)
    sink.use_in_flight(balance, 0)
    return Played(balance.peak, balance.peak_where, balance.live)


_NO_GRADIENTS = Gradients("keep", 0)
_NO_STEP = Step("", {}, {})


class _Balance:
    """Live bytes by component relative to the start of a pass, and their peak."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self.where = self.peak_where = ""
        self._total = self._peak_total = 0

    def add(self, more: Bytes) -> None:
        """Counts bytes by component that stay allocated, or are freed if negative."""
        for component, size in more.items():
            self.count(component, size)

    def count(self, component: str, size: int) -> None:
        """Counts bytes of one component that stay allocated, or are freed if negative."""
        self.live[component] = self.live.get(component, 0) + size
        self._total += size

    def rise(self, more: Bytes, where: str) -> None:
        """Raises the peak to a moment at which `more` bytes are live, if that is larger."""
        total = self._total + sum(more.values())
        if total > self._peak_total:
            self._peak_total, self.peak_where, self.peak = total, where, dict(self.live)
            for component, size in more.items():
                self.peak[component] = self.peak.get(component, 0) + size


class _Sink:
    """Handles the gradients of a pass: keeps them as `.grad`, or adds them to earlier ones and frees them."""

    in_flight: tuple[Parameter, ...] = ()
    """Parameters whose gradients are being all-reduced, the oldest first."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients, self.adds = gradients, gradients.use == "add"
        self._kept: set[int] = set()

    def arrives(self, balance: _Balance, parameter: Parameter, storage: int) -> None:
        """Handles the complete gradient of a parameter."""
        if not self.adds:
            self._kept.add(storage)
        if self._gradients.frees_earlier:
            balance.count("gradients", -parameter.values * self._gradients.width)
        if self._gradients.message_bytes:
            balance.rise({"buffers.messages": self._gradients.message_bytes}, balance.where)

    def released(self, balance: _Balance, storage: int, size: int) -> None:
        """Handles that autograd releases a storage of gradients."""
        if storage not in self._kept:
            balance.count("gradients", -size)

    def use_in_flight(self, balance: _Balance, max_bytes: int) -> None:
        """Uses the oldest gradients in flight until at most `max_bytes` are in flight."""


class _UpdateSink(_Sink):
    """Handles gradients by per-layer updates, which use and free them at once or after their all-reduce."""

    def __init__(self, gradients: Gradients, in_flight: Sequence[Parameter]) -> None:
        super().__init__(gradients)
        self.adds = gradients.frees_earlier
        self._step_bytes = dict(gradients.step_bytes)
        self._queue: deque[tuple[Parameter, int | None]] = deque((parameter, None) for parameter in in_flight)
        self._values_in_flight = sum(parameter.values for parameter in in_flight)
        self._num_users: dict[int, int] = {}
        self._released: dict[int, int] = {}

    @property
    def in_flight(self) -> tuple[Parameter, ...]:  # type: ignore[override]
        return tuple(parameter for parameter, _ in self._queue)

    def arrives(self, balance: _Balance, parameter: Parameter, storage: int) -> None:
        if self._gradients.in_flight_bytes is None:
            self._use(balance, parameter)
            if self._gradients.frees_earlier:
                balance.count("gradients", -parameter.values * self._gradients.width)
            return
        self._values_in_flight += parameter.values
        if self._gradients.frees_earlier:  # it was added to the accumulated gradient, which is sent
            self._queue.append((parameter, None))
        else:
            self._queue.append((parameter, storage))
            self._num_users[storage] = self._num_users.get(storage, 0) + 1
        self.use_in_flight(balance, self._gradients.in_flight_bytes)

    def released(self, balance: _Balance, storage: int, size: int) -> None:
        self._released[storage] = size
        self._free(balance, storage)

    def use_in_flight(self, balance: _Balance, max_bytes: int) -> None:
        while self._values_in_flight * self._gradients.width > max_bytes:
            parameter, storage = self._queue.popleft()
            self._values_in_flight -= parameter.values
            self._use(balance, parameter)
            if storage is None:  # accumulated, or sent in an earlier pass
                balance.count("gradients", -parameter.values * self._gradients.width)
            else:
                self._num_users[storage] -= 1
                self._free(balance, storage)

    def _free(self, balance: _Balance, storage: int) -> None:
        if not self._num_users.get(storage) and storage in self._released:
            balance.count("gradients", -self._released.pop(storage))

    def _use(self, balance: _Balance, parameter: Parameter) -> None:
        balance.rise({"temporaries.update": self._step_bytes[parameter]}, f"{balance.where}, update")
