"""The memory of one update under the engine `ddp`, or on a single device (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from sltrain_dist.config.schema import Config
from sltrain_dist.memory.holdings import Holding, Holdings, holdings_of
from sltrain_dist.memory.ledger import Gradients, Played, play, use_in_flight
from sltrain_dist.memory.recorded_model import RecordedModel
from sltrain_dist.memory.recording_store import (
    Request,
    evaluation_requests,
    matrix_job_request,
    restart_requests,
    step_request,
)
from sltrain_dist.memory.result import Phase, Point
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.optim.projected.settings import optimizer_settings, projects
from sltrain_dist.optim.state_layout import (
    GROUP_SIZES,
    is_orthogonalized,
    needs_low_bit,
    stored_states,
)

_IN_FLIGHT_BYTES = 1 << 25
"""Limit of the gradient bytes being all-reduced at a time, as in parallel/per_layer.py."""
_LEVELS_BYTES = 1 << 16
"""Bytes of a quantizer's table (numerics/blockwise.py). Two quantizers have one each, beside levels and borders."""


class Timeline:
    """The live bytes over one update of the engine `ddp`, followed by a checkpoint and an evaluation.

    Args:
        config: The run.
        model: The recorded model.
        ranks: World size.
        passes: Number of micro-batches in an update.
        device: Device that the run uses.
    """

    def __init__(self, config: Config, model: RecordedModel, ranks: int, passes: int, device: DeviceType) -> None:
        self.config, self.model, self.ranks, self.passes, self.device = config, model, ranks, passes, device
        self.optim = optimizer_settings(config)
        self.width = config.train.precision.parameter_bytes
        self.tokens = config.train.micro_batch * config.data.seq_len
        self.base: dict[str, int] = {}
        self.timeline: list[Point] = []

    def points(self) -> list[Point]:
        """Plays the update and returns its moments in order."""
        self.allocate_parameters()
        self.init()
        self.allocate_states_and_gradients()
        self.add("batch", self.batch_bytes(self.tokens) + self.rows_bytes())
        self.forward()
        self.backward()
        self.update()
        self.restart()
        self.save()
        self.evaluate()
        return self.timeline

    # Memory between updates

    @cached_property
    def holdings(self) -> Holdings:
        """The parameters that this rank stores."""
        return holdings_of(self.model, "nothing", 1)

    @property
    def shards_on_device(self) -> bool:
        """Whether sharded parameters, their gradients and states are on the device, not offloaded to the host."""
        return True

    @property
    def accumulates_whole(self) -> bool:
        """Whether gradients of sharded parameters are accumulated unsharded over the micro-batches."""
        return False

    @property
    def buckets(self) -> bool:
        """Whether DDP's buckets store the gradients, and stay allocated between updates."""
        return self.config.parallel.engine == "ddp" and self.ranks > 1 and self.config.optim.update == "whole"

    def allocate_parameters(self) -> None:
        """Counts parameters, support indices, the rotary table and DDP's buckets."""
        self.add_all(self.holdings.stored_bytes(self.width, with_sharded=self.shards_on_device))
        if self.buckets:
            self.add("gradients", self.holdings.trained_values * self.width)
        self.add("index", self.model.index_bytes)
        self.add("dense.rotary", self.model.ends.sizes["buffers"])

    def batch_bytes(self, tokens: int) -> int:
        """Returns the bytes of token ids and labels, and of positions for resetting attention; all in int64."""
        return (24 if self.config.data.reset_attention else 16) * tokens

    def rows_bytes(self) -> int:
        """Returns the bytes of the update's rows in int32; on a GPU also the next update's (train/device_rows.py)."""
        rows = self.passes * self.config.train.micro_batch
        return (2 if self.device == "cuda" else 1) * 4 * rows * (self.config.data.seq_len + 1)

    def init(self) -> None:
        """Plays the construction of the model and its engine."""
        self.point("init", "model and engine")

    def allocate_states_and_gradients(self) -> None:
        """Counts optimizer states, and the gradients accumulated before the last micro-batch."""
        optim, on_device = self.optim, self.shards_on_device
        states, masters = self.holdings.states(optim, self.width, with_sharded=on_device)
        self.add("states", states)
        self.add("master_weights", masters)
        if self.passes > 1:
            # Gradients accumulated unsharded are on the device, even if their shards will be offloaded.
            whole = self.accumulates_whole
            accumulated = self.holdings.accumulated_values(whole=whole, with_sharded=on_device or whole)
            self.add("gradients", accumulated * self.width)
        self.add("temporaries.scalars", self.scalar_bytes())
        if optim.state_bits in GROUP_SIZES:
            self.add("temporaries.levels", 2 * (_LEVELS_BYTES + 8 * 2**optim.state_bits))

    def scalar_bytes(self) -> int:
        """Returns the bytes of the sum of losses in float64, and of the step counters of torch's fused Adam."""
        optim = self.optim
        is_low_bit = self.config.reparam.weight_bits == 8 or needs_low_bit(optim, self.width)
        if is_low_bit or optim.name not in ("adam", "adamw"):
            return 8
        trained = (item for item in self.holdings.items if not item.parameter.frozen)
        counters = sum(
            item.count
            for item in trained
            if not projects(optim, item.parameter.name) and not is_orthogonalized(item.parameter.name, optim)
        )
        return 8 + 4 * counters

    @property
    def gradients(self) -> Gradients:
        """How the last micro-batch's gradients of unsharded parameters are handled."""
        several = self.passes > 1
        if self.config.optim.update == "per_layer":
            steps = {item.parameter: self.step_bytes(item) for item in self.holdings.items if not item.sharded}
            in_flight = _IN_FLIGHT_BYTES if self.ranks > 1 else None
            return Gradients("step", self.width, tuple(steps.items()), in_flight, frees_earlier=several)
        return Gradients(
            "add" if self.buckets or several else "keep", self.width, frees_earlier=self.buckets and several
        )

    def step_bytes(self, item: Holding) -> int:
        """Returns the transient bytes of the optimizer step of the rank's part of a parameter."""
        if not item.range.count or item.parameter.frozen:
            return 0
        dtype, int8 = self.config.train.precision.parameter, item.parameter.int8
        # With any int8 weight, LowBitAdam steps all parameters (optim/factory.py).
        low_bit = int8 or (self.config.optim.update == "whole" and self.config.reparam.weight_bits == 8)
        request = step_request(self.optim, dtype, item.range, self.device, int8=int8, low_bit=low_bit)
        return request.get().sizes["step"]

    # An update

    def forward(self) -> None:
        """Plays the forward pass of the last micro-batch."""
        self.apply("forward", "", play(self.model.ends, "embedding"))
        for layer, index in enumerate(self.model.order):
            self.apply("forward", f"layer {layer}", play(self.model.layers[index], "forward"))
        self.apply("forward", "", play(self.model.ends, "loss"))
        self.leave_autocast()

    def leave_autocast(self) -> None:
        """Frees autocast's cache of cast weights at the end of the forward pass."""
        for index in self.model.order:
            self.add_all(play(self.model.layers[index], "leave autocast").end)

    def backward(self) -> None:
        """Plays the backward pass of the last micro-batch."""
        gradients = self.gradients
        played = play(self.model.ends, "loss backward", gradients)
        self.apply("backward", "", played)
        for layer, index in reversed(list(enumerate(self.model.order))):
            played = play(self.model.layers[index], "backward", gradients, played.in_flight, last=layer == 0)
            self.apply("backward", f"layer {layer}", played)
        played = play(self.model.ends, "embedding backward", gradients, played.in_flight)
        self.apply("backward", "", played)
        self.apply("backward", "last updates", use_in_flight(gradients, played.in_flight))

    def update(self) -> None:
        """Plays the optimizer step, unless per-layer updates made it in the backward pass."""
        self.add("batch", -self.batch_bytes(self.tokens))
        if self.config.optim.update == "per_layer":
            self.point("update", "made in the backward pass")
            return
        if self.config.optim.factors != "adam":
            self.orthogonalize()
            self.free_matrix_gradients()
        items = self.other_items
        projected = [item for item in items if projects(self.optim, item.parameter.name)]
        others = [item for item in items if item not in projected]
        if self.config.optim.name == "sgd":  # torch's multi-tensor step takes all parameters of an optimizer together
            transient = max(
                sum(item.count * self.step_bytes(item) for item in items if item.sharded is sharded)
                for sharded in (False, True)
            )
        else:
            transient = max(map(self.step_bytes, others), default=0)
        self.point("update", "optimizer step", {"temporaries.update": transient})
        if projected:  # they have an optimizer of their own, before which the gradients of the others are freed
            if not self.buckets:
                self.add("gradients", -self.width * sum(item.count * item.values for item in others))
            self.point("update", "projected step", {"temporaries.update": max(map(self.step_bytes, projected))})

    @property
    def other_items(self) -> tuple[Holding, ...]:
        """The parts on the device of parameters that `optim.name` updates, not `optim.factors`."""
        items, optim = self.holdings.on_device(with_sharded=self.shards_on_device), self.config.optim
        return tuple(item for item in items if not is_orthogonalized(item.parameter.name, optim))

    def orthogonalize(self, beside: int = 0) -> None:
        """Plays the update of `optim.factors`, while `beside` more bytes are live.

        Jobs are dealt out to the ranks in turn (parallel/whole_layers.py: deal). A rank holds the tensors of the job
        that it owns while it sends and receives those of the others.
        """
        jobs = self.matrix_jobs()
        held = 0
        for first in range(0, len(jobs), self.ranks):
            own, *others = (job.get().sizes for job in jobs[first : first + self.ranks])  # of rank 0
            held = max(held, own["inputs"] + max(own[part] for part in ("collect", "compute", "deliver")))
            for other in others:
                received = max(other["inputs"] + other["collect"], other["results"] + other["deliver"])
                held = max(held, own["inputs"] + received)
        self.point("update", "momentum orthogonalized", {"temporaries.update": beside + held})

    def matrix_jobs(self) -> list[Request]:
        """Returns the jobs of `optim.factors` in the order in which they are dealt out."""
        optim, dtype = self.config.optim, self.config.train.precision.parameter
        of_kind = []
        for kind in range(len(self.model.layer_parameters)):
            parts = [
                item.range
                for item in self.holdings.items
                if item.kind == kind and is_orthogonalized(item.parameter.name, optim)
            ]
            size = 2 if optim.factors == "spectron" else 1
            jobs = [parts[first : first + size] for first in range(0, len(parts), size)]
            of_kind.append([matrix_job_request(optim, dtype, job, self.device) for job in jobs])
        return [job for kind in self.model.kinds for job in of_kind[kind]]

    def free_matrix_gradients(self) -> None:
        """Frees the gradients of matrices, before the other parameters are updated."""
        if not self.buckets:
            items, optim = self.holdings.items, self.config.optim
            freed = (item for item in items if is_orthogonalized(item.parameter.name, optim))
            self.add("gradients", -self.width * sum(item.count * item.values for item in freed))

    def free_gradients(self) -> None:
        """Frees the gradients after the update."""
        if not self.buckets:
            self.clear("gradients")

    def restart(self) -> None:
        """Plays a restart, if the run makes any: a rank factors or merges the products that it owns one at a time.

        Before and after that, ranks send each other the factors of one more layer, which takes less (with relora also
        its frozen weight, which takes 4·r·n bytes more).
        """
        self.free_gradients()
        requests = restart_requests(self.config, self.device)
        if requests:
            largest = max(request.get().sizes["restart"] for request in requests)
            what = "merged" if self.config.reparam.method == "relora" else "factored anew"
            self.point("restart", f"a low-rank product {what}", {"temporaries.restart": largest})

    def save(self) -> None:
        """Plays a checkpoint, which copies one tensor at a time to the host, quantized states with a byte per code."""
        self.free_gradients()
        bits = self.optim.state_bits
        items = self.holdings.on_device(with_sharded=self.shards_on_device)
        parts = [item.range for item in items if bits in GROUP_SIZES and not item.parameter.frozen]
        states = (stored.range for part in parts for stored in stored_states(part, self.optim, self.width))
        codes = (state.count for state in states if state.name.endswith(".codes"))
        self.point("save", "checkpoint", {"temporaries.codes": max(codes, default=0) * (2 if bits == 4 else 1)})

    @property
    def gathered_in_evaluation(self) -> int:
        """Largest bytes of sharded parameters that are gathered at a time in an evaluation."""
        return 0

    def evaluate(self) -> None:
        """Plays the forward pass of an evaluation, after which everything is freed."""
        requests, order = evaluation_requests(self.config, self.device)
        if not requests:
            return
        recordings = [request.get() for request in requests]
        before = dict(self.base)
        self.add("buffers.gathered", self.gathered_in_evaluation)
        self.add("batch", self.batch_bytes(self.config.eval_micro_batch * self.config.data.seq_len))
        self.apply("forward", "evaluation", play(recordings[0], "embedding"))
        for index in order:
            self.apply("forward", "evaluation", play(recordings[index], "layer"))
        self.apply("forward", "evaluation", play(recordings[0], "loss"))
        self.base = before

    # Bookkeeping

    def add(self, component: str, size: int) -> None:
        """Counts bytes that stay allocated, or are freed if negative."""
        size += self.base.pop(component, 0)
        if size:
            self.base[component] = size

    def add_all(self, sizes: Mapping[str, int]) -> None:
        """Counts bytes by component as :meth:`add` does."""
        for component, size in sizes.items():
            self.add(component, size)

    def clear(self, component: str) -> None:
        """Counts all bytes of a component as freed."""
        self.base.pop(component, None)

    def apply(self, phase: Phase, where: str, played: Played) -> None:
        """Adds the peak of a pass to the timeline, and counts the bytes at its end."""
        self.point(phase, ", ".join(part for part in (where, played.where) if part), played.peak)
        self.add_all(played.end)

    def point(self, phase: Phase, where: str, more: Mapping[str, int] | None = None) -> None:
        """Adds a moment to the timeline, at which `more` bytes are live beyond the counted ones."""
        components = self.base.copy()
        if more:
            for component, size in more.items():
                components[component] = components.get(component, 0) + size
        self.timeline.append(Point(phase, where, components))
