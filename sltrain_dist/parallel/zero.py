"""The `zero` engine: DeepSpeed ZeRO, stages 1 to 3. The only module that imports deepspeed."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sltrain_dist.config.schema import Config, OptimConfig
from sltrain_dist.errors import ConfigError
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.factory import (
    adopt_state,
    clear_states,
    count_step,
    learning_rates,
    make_optimizer,
    parameter_groups,
    set_lr,
)
from sltrain_dist.optim.matrix.jobs import WholeMatrices
from sltrain_dist.optim.state_layout import STATE_NAMES, is_orthogonalized
from sltrain_dist.parallel.engine import Kind, clip_shards
from sltrain_dist.parallel.pieces import (
    ClearedAt,
    LocalPieces,
    Piece,
    ReadRange,
    Replicated,
    SavedRange,
    load_values,
    never_cleared,
    read_into,
)
from sltrain_dist.parallel.placement import is_sharded
from sltrain_dist.parallel.whole_layers import whole_matrices
from sltrain_dist.parallel.zero_start import (
    FlatGroup,
    deepspeed_config,
    give_flat_memory,
    partition_by_layer,
    use_flat_memory,
)
from sltrain_dist.runtime.environment import Environment


@dataclass(frozen=True)
class _Fragment:
    """A range of a parameter, and where it begins in one of DeepSpeed's flat partitions on this rank."""

    range: TensorRange
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """Returns this range of a tensor that has the layout of `flat`."""
        return flat.detach()[self.offset : self.offset + self.range.count]


@dataclass(frozen=True)
class _MatrixPartition:
    """This rank's ranges of the matrices in one of DeepSpeed's flat partitions, which `optim.factors` updates.

    Attributes:
        flat: The partition.
        fragments: The ranges of matrices in it.
        pieces: The same ranges, in the same memory, with their optimizer.
    """

    flat: Tensor
    fragments: list[_Fragment]
    pieces: LocalPieces

    def update(self, lr: float) -> None:
        """Updates the matrices by the gradient of the partition."""
        gradient = self.flat.grad
        assert gradient is not None  # set by DeepSpeed
        for fragment, piece in zip(self.fragments, self.pieces.pieces, strict=True):
            piece.parameter.grad = fragment.of(gradient)
        self.pieces.update(lr)


class ZeroEngine:
    """The `zero` engine: DeepSpeed shards the optimizer states (stage 1), the gradients (2) and the parameters (3).

    With `parallel.shard: factors`, DeepSpeed manages only the factors. The gradients of the dense remainder are
    accumulated locally and all-reduced once per update, and its optimizer states are replicated on every rank.

    With `optim.factors`, the matrices have partitions of their own. When DeepSpeed steps one of these, the matrices'
    optimizer updates its values, in place of the optimizer of the others.

    Args:
        model: The model, identical on every rank. For a model on the meta device, each rank allocates only what it
            keeps (in stage 3 also one whole decoder layer at a time), and :meth:`load` sets the values.
        config: The configuration.
        env: The distributed environment.

    Raises:
        ConfigError: deepspeed is not installed, or refuses `parallel.deepspeed`.
    """

    def __init__(self, model: LlamaForCausalLM, config: Config, env: Environment) -> None:
        deepspeed = _import_deepspeed()
        deepspeed.init_distributed(dist_init_required=False)  # use the existing process group; zero.Init needs it
        self._env, self._stage, self._offload = env, config.parallel.zero_stage, config.parallel.cpu_offload
        self._lr, self._clip = config.optim.lr, config.optim.clip
        self._state_names = STATE_NAMES[config.optim.name]
        shard = config.parallel.shard
        named = list(model.named_parameters())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in named if is_sharded(name, shard)}
        settings = deepspeed_config(config, env.world_size, sum(map(math.prod, self._shapes.values())))
        try:
            if self._stage == 3:
                named = partition_by_layer(deepspeed, model, self._shapes, settings, env.device)
                flat: list[FlatGroup] = []
            else:
                flat = give_flat_memory(model, self._shapes, config.optim, env)
                named = list(model.named_parameters())
            self._sharded = [(n, p) for n, p in named if n in self._shapes]
            self._remainder = Replicated(
                [(n, p) for n, p in named if n not in self._shapes], config.optim, env.rank, env.world_size
            )
            self._optimizer = make_optimizer(self._sharded, config.optim.model_copy(update={"factors": "adam"}))
            self._optimizer.param_groups.clear()
            for group in parameter_groups(self._sharded, config.optim):
                self._optimizer.add_param_group(group)
            with use_flat_memory(deepspeed, flat):
                self._engine, self._zero, _, _ = deepspeed.initialize(
                    model=model,
                    model_parameters=[p for _, p in self._sharded],
                    optimizer=self._optimizer,
                    config=settings,
                    dist_init_required=False,
                )
        except (ValueError, KeyError, AssertionError) as error:
            if not config.parallel.deepspeed:
                raise
            raise ConfigError(
                f"parallel.deepspeed = {config.parallel.deepspeed}: refused by DeepSpeed: {error}"
            ) from error
        whole = whole_matrices(model, env, copies=1)
        self._matrices = list(self._matrix_partitions(config.optim, whole))
        self._matrix_names = {name for name in self._shapes if is_orthogonalized(name, config.optim)}
        self._set_step()

    @property
    def module(self) -> nn.Module:
        """The model; in stage 3 its sharded parameters are empty between calls."""
        return self._engine.module

    def begin_update(self, lr: float, previous_norm: float | None) -> None:
        """Sets the learning rate."""
        self._lr = lr

    def micro_step(
        self, input_ids: Tensor, labels: Tensor, weight: float, *, last: bool, positions: Tensor | None = None
    ) -> Tensor:
        """Runs forward and backward; gradients of the remainder are all-reduced after the last micro-batch."""
        # Stage 3 always averages over ranks.
        undo = float(self._env.world_size) if self._stage == 3 else 1.0
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._engine(input_ids, labels, positions)
        self._engine.backward(loss * (weight * undo), scale_wrt_gas=False)
        if last:
            self._remainder.all_reduce(1 / undo)
        return loss.detach()

    def clip_gradients(self) -> float:
        """Clips by the norm over the shards of all ranks and, counted once, the remainder; returns the norm before."""
        return clip_shards(self._shard_gradients(), self._remainder.gradients(), self._clip, self._env)

    def update(self) -> None:
        """Runs the optimizer steps of shards and remainder, and frees the gradients."""
        set_lr(self._optimizer, self._lr)
        self._engine.step()
        self._remainder.update(self._lr)

    def discard(self) -> None:
        """Runs DeepSpeed's step, which frees the gradients, with an optimizer that only counts it."""
        set_lr(self._optimizer, self._lr)
        vars(self._optimizer)["step"] = partial(count_step, self._optimizer)
        try:
            self._engine.step()
        finally:
            self._set_step()
        for pieces in self._local_pieces:
            pieces.discard(self._lr)

    def _set_step(self) -> None:
        """Makes DeepSpeed call :meth:`_step_partition` if there are matrices, and else torch's own step."""
        vars(self._optimizer).pop("step", None)
        if self._matrices:
            vars(self._optimizer)["step"] = self._step_partition

    def _step_partition(self) -> None:
        """Steps the partition whose turn it is: DeepSpeed shows its optimizer one at a time."""
        (flat,) = (parameter for group in self._optimizer.param_groups for parameter in group["params"])
        for matrices in self._matrices:
            if matrices.flat is flat:
                matrices.update(self._lr)
                return
        type(self._optimizer).step(self._optimizer)

    @torch.no_grad()
    def evaluate(self, input_ids: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns the summed loss of a batch."""
        return self._engine.module(input_ids, labels, positions)

    @torch.no_grad()
    def next_logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """Returns the logits of one token in each row."""
        return self._engine.module(input_ids, at=last)

    def saved_ranges(self) -> Iterator[SavedRange]:
        """Yields the partitions of this rank with their optimizer states, and its share of the remainder."""
        for fragment in self._other_fragments():
            part, states = fragment.range, self._optimizer.state.get(fragment.flat, {})
            yield replace(part, name=f"model.{part.name}"), fragment.of(fragment.flat)
            for key in self._state_names:
                if key in states:
                    yield replace(part, name=f"optim.{part.name}.{key}"), fragment.of(states[key])
        for pieces in self._local_pieces:
            yield from pieces.saved_ranges()

    def load(self, read: ReadRange, step: int, cleared_at: ClearedAt = never_cleared) -> None:
        """Loads weights, and this rank's partitions of master weights and states; also used for initial values."""
        if self._stage < 3:  # every rank has all weights, also those that others update
            for name, parameter in self._sharded:
                load_values(read, name, parameter)
        flats = [flat for flat in self._flats() if all(flat is not matrices.flat for matrices in self._matrices)]
        kept = self._state_names if step else ()
        states = [{key: torch.zeros_like(flat.detach()) for key in kept} for flat in flats]
        by_flat = {id(flat): state for flat, state in zip(flats, states, strict=True)}
        for fragment in self._other_fragments():
            part, state = fragment.range, by_flat[id(fragment.flat)]
            read_into(fragment.of(fragment.flat), read, f"model.{part.name}", part.start)
            for key in kept:
                read_into(fragment.of(state[key]), read, f"optim.{part.name}.{key}", part.start)
        for pieces in self._local_pieces:
            pieces.load(read, step, cleared_at)
        if self._stage == 3:
            for shards, flat in zip(self._zero.fp16_partitioned_groups_flat, self._flats(), strict=True):
                shards.data.copy_(flat.data)
        if step:
            (all_cleared_at,) = {cleared_at(name) for name in self._shapes}  # they share a count of updates
            for flat, state in zip(flats, states, strict=True):
                adopt_state(self._optimizer, flat, state, step, all_cleared_at)

    def free_gathered(self) -> None:
        """Frees layers that stage 3 has gathered, or is gathering ahead."""
        if self._stage == 3:
            self._zero.parameter_offload.partition_all_parameters()

    def held_ranges(self, name: str) -> Iterator[SavedRange]:
        """Yields what is in this rank's partitions."""
        for fragment in self._fragments_of(name):
            yield fragment.range, fragment.of(fragment.flat)
        yield from self._remainder.held_ranges(name)

    @torch.no_grad()
    def set_values(self, name: str, values: Tensor) -> None:
        """Sets what is in this rank's partitions, and in stages 1 and 2 the whole weight, which every rank has."""
        for fragment in self._fragments_of(name):
            mine = values[fragment.range.start : fragment.range.stop]
            fragment.of(fragment.flat).copy_(mine)
            if self._stage == 3:
                fragment.of(self._shards_beside(fragment.flat)).copy_(mine)
        if self._stage < 3:
            for parameter in (parameter for known, parameter in self._sharded if known == name):
                parameter.copy_(values.view(parameter.shape))
        self._remainder.set_values(name, values)

    def clear_states(self, chosen: Callable[[str], bool]) -> None:
        """Clears the states of the chosen parameters: of all sharded ones or none, which share a count of updates."""
        sharded = {chosen(name) for name in self._shapes}
        if len(sharded) > 1:
            raise AssertionError("DeepSpeed counts the updates of all sharded parameters together")
        for flat in self._flats() if True in sharded else ():
            clear_states(self._optimizer, flat)
        for pieces in self._local_pieces:
            pieces.clear_states(chosen)

    def tensors(self) -> dict[Kind, list[Tensor]]:
        """Returns weights, master weights and partitions, without DeepSpeed's communication buckets."""
        flats = self._flats()
        parameters = [p.detach() for _, p in self._sharded]
        gradients = [p.grad for _, p in self._sharded] + [flat.grad for flat in flats]
        if self._stage == 3:
            parameters += self._zero.fp16_partitioned_groups_flat
            gradients.append(self._zero.grad_partitions_flat_buffer)
        gradients += self._shard_gradients()
        states = [self._optimizer.state.get(flat, {}) for flat in flats]
        return {
            "parameters": [*parameters, *flats, *(piece.parameter for piece in self._remainder.pieces)],
            "gradients": [g for g in (*gradients, *self._remainder.gradients()) if g is not None],
            "states": [
                *(s[k] for s in states for k in self._state_names if k in s),
                *(state for pieces in self._local_pieces for state in pieces.states()),
            ],
        }

    def learning_rates(self) -> list[float]:
        """Returns the learning rates of the optimizers of shards and remainder."""
        return [
            *learning_rates(self._optimizer),
            *(rate for pieces in self._local_pieces for rate in pieces.learning_rates()),
        ]

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the parameters of the remainder, and in stages 1 and 2 all other weights."""
        yield from ((piece.name, piece.parameter.detach()) for piece in self._remainder.pieces)
        if self._stage < 3:
            yield from ((name, parameter.detach()) for name, parameter in self._sharded)

    @property
    def _local_pieces(self) -> list[LocalPieces]:
        """What optimizers of ours update: matrices, and the remainder."""
        return [*(matrices.pieces for matrices in self._matrices), self._remainder]

    def _matrix_partitions(self, optim: OptimConfig, whole: WholeMatrices) -> Iterator[_MatrixPartition]:
        """Yields the partitions of matrices that `optim.factors` updates, with the optimizer of each."""
        names = {id(parameter): name for name, parameter in self._sharded}
        held = {fragment.range.name: fragment for fragment in self._fragments()}
        groups = self._zero.fp16_groups if self._stage == 3 else self._zero.bit16_groups
        for group, flat in zip(groups, self._flats(), strict=True):
            in_group = [names[id(parameter)] for parameter in group]
            if not is_orthogonalized(in_group[0], optim):
                continue
            if optim.factors == "spectron" and len(in_group) % 2:
                raise ConfigError(
                    f"parallel.deepspeed: zero_optimization.sub_group_size separates {in_group[-1]} from its partner, "
                    "but optim.factors=spectron updates B and A together; increase it, or use muon"
                )
            pieces = []
            for name in in_group:  # empty ones too: every rank takes part in every update
                part = held[name].range if name in held else TensorRange(name, self._shapes[name], 0, 0)
                values = held[name].of(flat) if name in held else flat.detach()[:0]
                pieces.append(Piece(part, nn.Parameter(values), saved=True))
            fragments = [held[name] for name in in_group if name in held]
            yield _MatrixPartition(flat, fragments, LocalPieces(pieces, optim, whole_matrices=whole))

    def _other_fragments(self) -> Iterator[_Fragment]:
        """Yields the ranges of the sharded parameters that DeepSpeed's optimizer updates."""
        return (fragment for fragment in self._fragments() if fragment.range.name not in self._matrix_names)

    def _flats(self) -> list[Tensor]:
        """Returns this rank's flat partitions, which the optimizer updates."""
        zero = self._zero
        return list(zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups)

    def _shards_beside(self, flat: Tensor) -> Tensor:
        """Returns the shards of stage 3 that a flat partition is the optimizer's copy of."""
        pairs = zip(self._flats(), self._zero.fp16_partitioned_groups_flat, strict=True)
        shards: Tensor = next(shards for other, shards in pairs if other is flat)
        return shards

    def _shard_gradients(self) -> list[Tensor]:
        if self._offload:
            return [flat.grad for flat in self._flats() if flat.grad is not None]
        return [g for group in self._zero.averaged_gradients.values() if group is not None for g in group]

    def _fragments_of(self, name: str) -> list[_Fragment]:
        return [fragment for fragment in self._fragments() if fragment.range.name == name]

    def _fragments(self) -> Iterator[_Fragment]:
        """Yields the range of every sharded parameter that is in this rank's partitions."""
        if self._stage < 3:
            for name, parameter in self._sharded:
                mapping = vars(parameter)["_hp_mapping"]  # set by DeepSpeed; None if this rank has no part of it
                if mapping is not None:
                    flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
                    in_parameter, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                    part = TensorRange(name, self._shapes[name], in_parameter.start, in_parameter.numel)
                    yield _Fragment(part, flat, in_flat.start)
            return
        names = {id(parameter): name for name, parameter in self._sharded}
        for group, flat in zip(self._zero.fp16_groups, self._flats(), strict=True):
            offset = 0
            for parameter in group:
                each = parameter.partition_numel()
                start = self._env.rank * each
                count = min(each, parameter.ds_numel - start)  # partitions of the last ranks end in padding
                name = names[id(parameter)]
                if count > 0:
                    yield _Fragment(TensorRange(name, self._shapes[name], start, count), flat, offset)
                offset += each


def _import_deepspeed() -> Any:
    """Imports DeepSpeed and silences its routine output.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(f"parallel.engine=zero needs deepspeed ({error}); install it, or use fsdp") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On the CPU DeepSpeed would compile an extension that only inference uses. That takes minutes without output, and
    # its lock survives a killed process and blocks every later start. Only operators listed here are built.
    deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    return deepspeed
