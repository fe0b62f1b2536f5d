"""One update under the engine `ddp`, or on a single device, from its start to its end (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from sltrain_dist.config.schema import Config
from sltrain_dist.memory.holdings import Holding, Holdings, holdings
from sltrain_dist.memory.ledger import Gradients, Played, play, receive_all
from sltrain_dist.memory.recorded_model import RecordedModel
from sltrain_dist.memory.recording_store import evaluation_request, step_request
from sltrain_dist.memory.result import Phase, Point
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.optim.state_layout import GROUP_SIZES, is_quantized, needs_low_bit

_IN_FLIGHT_BYTES = 1 << 25
"""As parallel/per_layer.py."""
_LEVELS_BYTES = 1 << 16
"""Bytes of a quantizer's table (numerics/blockwise.py), of which there are two; beside it are levels and borders."""


class Timeline:
    """Goes through an update of the engine `ddp`.

    Args:
        config: The run.
        model: Its recordings.
        ranks: World size.
        passes: Micro-batches of an update.
        device: What it runs on.
    """

    def __init__(self, config: Config, model: RecordedModel, ranks: int, passes: int, device: DeviceType) -> None:
        self.config, self.model, self.ranks, self.passes, self.device = config, model, ranks, passes, device
        self.width = config.train.precision.parameter_bytes
        self.tokens = config.train.micro_batch * config.data.seq_len
        self.base: dict[str, int] = {}
        self.timeline: list[Point] = []

    def points(self) -> list[Point]:
        """The moments, in their order."""
        self.hold_parameters()
        self.init()
        self.hold_more()
        self.add("batch", self.batch_bytes(self.tokens) + self.rows_bytes())
        self.forward()
        self.backward()
        self.update()
        self.save()
        self.evaluate()
        return self.timeline

    # What lives all the time

    @cached_property
    def held(self) -> Holdings:
        """What this rank holds."""
        return holdings(self.model, "nothing", 1)

    @property
    def dealt_on_device(self) -> bool:
        """Whether what is dealt out lives there between its uses, with gradients and states."""
        return True

    @property
    def waits_whole(self) -> bool:
        """Whether gradients of what is dealt out wait whole between micro-batches."""
        return False

    @property
    def buckets(self) -> bool:
        """Whether DDP's buckets hold the gradients, all the time."""
        return self.config.parallel.engine == "ddp" and self.ranks > 1 and self.config.optim.update == "whole"

    def hold_parameters(self) -> None:
        """Parameters, index and the rotary table, and DDP's buckets."""
        self.add_all(self.held.stored_bytes(self.width, with_dealt=self.dealt_on_device))
        if self.buckets:
            self.add("gradients", self.held.total_values * self.width)
        self.add("index", self.model.index_bytes)
        self.add("dense.rotary", self.model.ends.sizes["buffers"])

    def batch_bytes(self, tokens: int) -> int:
        """Bytes of ids and labels, int64, and of positions where documents are told apart."""
        return (24 if self.config.data.reset_attention else 16) * tokens

    def rows_bytes(self) -> int:
        """Bytes of the update's rows, int32, and on a GPU of the next update's (train/device_rows.py)."""
        rows = self.passes * self.config.train.micro_batch
        return (2 if self.device == "cuda" else 1) * 4 * rows * (self.config.data.seq_len + 1)

    def init(self) -> None:
        """Building the model and its engine."""
        self.point("init", "model and engine")

    def hold_more(self) -> None:
        """States, and gradients that wait for the last micro-batch."""
        optim, on_device = self.config.optim, self.dealt_on_device
        states, masters = self.held.states(optim, self.width, with_dealt=on_device)
        self.add("states", states)
        self.add("master_weights", masters)
        if self.passes > 1:
            # Where they wait whole, they have not been on their way to the host yet.
            waiting = self.held.waiting_values(whole=self.waits_whole, with_dealt=on_device or self.waits_whole)
            self.add("gradients", waiting * self.width)
        self.add("temporaries.scalars", self.scalar_bytes())
        if optim.state_bits in GROUP_SIZES:
            self.add("temporaries.levels", 2 * (_LEVELS_BYTES + 8 * 2**optim.state_bits))

    def scalar_bytes(self) -> int:
        """Bytes of the sum of losses, float64, and of the counters of updates that torch's fused Adam keeps."""
        optim = self.config.optim
        ours = self.config.reparam.weight_bits == 8 or needs_low_bit(optim, self.width)
        counted = 0 if ours or optim.name not in ("adam", "adamw") else sum(item.count for item in self.held.items)
        return 8 + 4 * counted

    @property
    def gradients(self) -> Gradients:
        """What becomes of the last micro-batch's gradients of parameters that are whole on every rank."""
        several = self.passes > 1
        if self.config.optim.update == "per_layer":
            steps = {item.parameter: self.step_bytes(item) for item in self.held.items if not item.dealt}
            in_flight = _IN_FLIGHT_BYTES if self.ranks > 1 else None
            return Gradients("step", self.width, tuple(steps.items()), in_flight, frees_earlier=several)
        return Gradients(
            "add" if self.buckets or several else "keep", self.width, frees_earlier=self.buckets and several
        )

    def step_bytes(self, item: Holding) -> int:
        """Transient bytes of the optimizer's step of what the rank holds of a parameter."""
        if not item.place.count:
            return 0
        dtype, int8 = self.config.train.precision.parameter, item.parameter.int8
        # One int8 weight makes LowBitAdam the optimizer of all (optim/factory.py).
        low_bit = int8 or (self.config.optim.update == "whole" and self.config.reparam.weight_bits == 8)
        request = step_request(self.config.optim, dtype, item.place, self.device, int8=int8, low_bit=low_bit)
        return request.get().sizes["step"]

    # An update

    def forward(self) -> None:
        """Forward pass of the last micro-batch."""
        self.apply("forward", "", play(self.model.ends, "embedding"))
        for layer, kind in enumerate(self.model.order):
            self.apply("forward", f"layer {layer}", play(self.model.layers[kind], "forward"))
        self.apply("forward", "", play(self.model.ends, "loss"))
        self.leave_autocast()

    def leave_autocast(self) -> None:
        """Its cache of cast weights is cleared at the end of the forward pass."""
        for kind in self.model.order:
            self.add_all(play(self.model.layers[kind], "leave autocast").end)

    def backward(self) -> None:
        """Its backward pass."""
        gradients = self.gradients
        played = play(self.model.ends, "loss backward", gradients)
        self.apply("backward", "", played)
        for layer, kind in reversed(list(enumerate(self.model.order))):
            played = play(self.model.layers[kind], "backward", gradients, played.in_flight, last=layer == 0)
            self.apply("backward", f"layer {layer}", played)
        played = play(self.model.ends, "embedding backward", gradients, played.in_flight)
        self.apply("backward", "", played)
        self.apply("backward", "last updates", receive_all(gradients, played.in_flight))

    def update(self) -> None:
        """The optimizer's step, where it has not been made."""
        self.add("batch", -self.batch_bytes(self.tokens))
        if self.config.optim.update == "per_layer":
            self.point("update", "made in the backward pass")
            return
        items = self.held.on_device(with_dealt=self.dealt_on_device)
        if self.config.optim.name == "sgd":  # torch's multi-tensor step takes all parameters of an optimizer together
            taken = max(
                sum(item.count * self.step_bytes(item) for item in items if item.dealt is dealt)
                for dealt in (False, True)
            )
        else:
            taken = max(map(self.step_bytes, items), default=0)
        self.point("update", "step of the optimizer", {"temporaries.update": taken})

    def save(self) -> None:
        """A checkpoint, which takes one tensor after the other to the host; quantized states as one code a byte."""
        if not self.buckets:
            self.clear("gradients")
        bits = self.config.optim.state_bits
        places = (item.place for item in self.held.on_device(with_dealt=self.dealt_on_device))
        codes = (place.count for place in places if is_quantized(place.shape, bits))
        self.point("save", "checkpoint", {"temporaries.codes": max(codes, default=0) * (2 if bits == 4 else 1)})

    @property
    def gathered_in_evaluation(self) -> int:
        """Most bytes of sharded parameters that are gathered at a time in an evaluation."""
        return 0

    def evaluate(self) -> None:
        """Forward pass of an evaluation, of which nothing is kept."""
        request = evaluation_request(self.config, self.device)
        if request is None:
            return
        recording = request.get()
        before = dict(self.base)
        self.add("buffers.gathered", self.gathered_in_evaluation)
        self.add("batch", self.batch_bytes(self.config.eval_micro_batch * self.config.data.seq_len))
        for name in ("embedding", *("layer" for _ in self.model.order), "loss"):
            self.apply("forward", "evaluation", play(recording, name))
        self.base = before

    # Bookkeeping

    def add(self, component: str, size: int) -> None:
        """Counts bytes that stay, or, negative, go."""
        size += self.base.pop(component, 0)
        if size:
            self.base[component] = size

    def add_all(self, sizes: Mapping[str, int]) -> None:
        """The same by component."""
        for component, size in sizes.items():
            self.add(component, size)

    def clear(self, component: str) -> None:
        """Uncounts all bytes of a component."""
        self.base.pop(component, None)

    def apply(self, phase: Phase, where: str, played: Played) -> None:
        """Adds what a pass does."""
        self.point(phase, ", ".join(part for part in (where, played.where) if part), played.peak)
        self.add_all(played.end)

    def point(self, phase: Phase, where: str, more: Mapping[str, int] | None = None) -> None:
        """Records a moment at which more lives than what stays."""
        components = self.base.copy()
        if more:
            for component, size in more.items():
                components[component] = components.get(component, 0) + size
        self.timeline.append(Point(phase, where, components))
