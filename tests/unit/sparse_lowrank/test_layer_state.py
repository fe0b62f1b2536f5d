"""What a layer's positions go through: drawing, state dicts, the meta device, moves, copies."""

from __future__ import annotations

import copy
import itertools
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from sltrain_dist.config.schema import SupportKind
from sltrain_dist.sparse_lowrank import RandomSupport, SLLinear, sl_linear
from sltrain_dist.sparse_lowrank.layer import apply_shared

KINDS: tuple[SupportKind, ...] = ("random", "stratified", "blocks")
STATE = "support._extra_state"
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: SupportKind, **kwargs: Any) -> SLLinear:
    layer = SLLinear(60, 40, 4, 0.1, 8.0, support=kind, **kwargs)
    if not layer.B.is_meta:
        torch.nn.init.normal_(layer.B)  # it starts at 0, which hides errors
    return layer


def on_meta(kind: SupportKind, **kwargs: Any) -> SLLinear:
    with torch.device("meta"):
        return make(kind, **kwargs)


def same(one: SLLinear, other: SLLinear) -> bool:
    x = torch.linspace(-1, 1, 180).view(3, 60)
    return torch.equal(one.support.indices(), other.support.indices()) and torch.equal(one(x), other(x))


def positions(layer: SLLinear) -> Tensor:
    return layer.support.indices().clone()


@each_kind
def test_layers_differ_unless_they_are_seeded(kind: SupportKind) -> None:
    torch.manual_seed(1)
    one, other = make(kind), make(kind)
    assert not torch.equal(one.support.indices(), other.support.indices())
    assert not torch.equal(one.A, other.A)
    assert not torch.equal(one.V, other.V)
    torch.manual_seed(1)
    assert same(make(kind), one)
    assert same(make(kind), other)


@each_kind
def test_a_reset_draws_anew_or_repeats_the_seed(kind: SupportKind) -> None:
    layer, seeded = make(kind), make(kind, seed=3, name="a.q")
    before, before_seeded = positions(layer), copy.deepcopy(seeded)
    layer.reset_parameters()
    assert not torch.equal(positions(layer), before)
    torch.nn.init.zeros_(seeded.A)
    seeded.reset_parameters()
    assert torch.equal(positions(seeded), positions(before_seeded))
    assert torch.equal(seeded.A, before_seeded.A)


@each_kind
@pytest.mark.parametrize("saved_with", [{}, {"seed": 3, "name": "a.q_proj"}], ids=["drawn", "seeded"])
def test_the_key_travels_in_the_state_dict(kind: SupportKind, saved_with: dict[str, Any]) -> None:
    saved = make(kind, **saved_with)
    state = saved.state_dict()
    assert set(state) == {"B", "A", "V", STATE}
    assert state[STATE].nbytes == 24
    layer = make(kind)
    layer.load_state_dict(state)
    assert same(layer, saved)
    assert torch.equal(layer.state_dict()[STATE], state[STATE])
    narrow = make(kind, dtype=torch.bfloat16)
    narrow.load_state_dict({name: value.bfloat16() for name, value in state.items()})
    assert torch.equal(positions(narrow), positions(saved))


@each_kind
@pytest.mark.parametrize("seed_and_name", [(4, "a.q_proj"), (3, "b.q_proj")], ids=["seed", "name"])
def test_a_seeded_layer_takes_its_own_positions_only(kind: SupportKind, seed_and_name: tuple[int, str]) -> None:
    saved = make(kind, seed=3, name="a.q_proj")
    seed, name = seed_and_name
    layer = make(kind, seed=seed, name=name)
    before = positions(layer)
    model = torch.nn.Sequential(layer)
    state = {f"0.{key}": value for key, value in saved.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=rf"0\.support: .*not those of this layer .*seed={seed}, name='{name}'.*seed=None"
    ):
        model.load_state_dict(state, strict=False)
    assert torch.equal(positions(layer), before)
    twin = make(kind, seed=3, name="a.q_proj")
    twin.load_state_dict(saved.state_dict())
    assert same(twin, saved)


def test_another_kind_or_size_is_refused_and_changes_no_positions() -> None:
    of_random = RandomSupport(4, 6, 0.5)
    for kind, key in itertools.product(KINDS, (5, (1 << 64) - 5)):  # keys of random have 64 bits
        of_random.keys = key, 0
        of_random._fill()
        saved = of_random.get_extra_state()
        layer = make(kind)
        before, state = positions(layer), layer.support.get_extra_state()
        with pytest.raises(ValueError, match="not those of this layer"):
            layer.support.set_extra_state(saved)
        assert torch.equal(positions(layer), before)
        assert torch.equal(layer.support.get_extra_state(), state)
    wide, narrow = (SLLinear(60, 40, 4, density, 8.0, support="blocks", name="a.q") for density in (0.02, 0.5))
    with pytest.raises(ValueError, match="not those of this layer"):
        narrow.support.set_extra_state(wide.support.get_extra_state())


@pytest.mark.parametrize("key", [torch.zeros(5, dtype=torch.uint8), torch.zeros(()), torch.ones(24, 1)])
def test_a_key_of_another_shape_is_refused(key: torch.Tensor) -> None:
    state = {**make("random").state_dict(), STATE: key}
    with pytest.raises(RuntimeError, match=r"the state dict does not fit: its key has the shape"):
        make("random").load_state_dict(state)


@each_kind
def test_values_without_their_key_are_refused(kind: SupportKind) -> None:
    state = make(kind, seed=3).state_dict()
    del state[STATE]
    layer = make(kind)
    before = layer.V.detach().clone()
    with pytest.raises(RuntimeError, match=r"not the key of their positions, support\._extra_state"):
        layer.load_state_dict(state, strict=False)
    assert torch.equal(layer.V, before)
    seeded = make(kind, seed=3)
    seeded.load_state_dict(state, strict=False)  # whose positions are known without the key
    layer.load_state_dict({"A": state["A"]}, strict=False)  # nor does a part without values need it
    assert torch.equal(layer.A, state["A"])


@each_kind
@pytest.mark.parametrize("kwargs", [{}, {"seed": 3, "name": "a.q"}], ids=["drawn", "seeded"])
def test_a_meta_layer_takes_a_state_dict(kind: SupportKind, kwargs: dict[str, Any]) -> None:
    saved = make(kind, **kwargs)
    assigned = on_meta(kind, **kwargs)
    assigned.load_state_dict(saved.state_dict(), assign=True)
    assert same(assigned, saved)
    copied = on_meta(kind, **kwargs).to_empty(device="cpu")
    copied.load_state_dict(saved.state_dict())
    assert same(copied, saved)


def test_a_meta_layer_without_its_key_in_the_state_dict_computes_the_positions_of_its_seed() -> None:
    saved = make("random", seed=3)
    state = {key: value for key, value in saved.state_dict().items() if key != STATE}
    layer = on_meta("random", seed=3)
    layer.load_state_dict(state, assign=True, strict=False)
    assert same(layer, saved)


@each_kind
def test_memory_without_positions_is_not_used(kind: SupportKind) -> None:
    seeded = on_meta(kind, seed=3, name="a.q").to_empty(device="cpu")
    assert torch.equal(positions(seeded), positions(make(kind, seed=3, name="a.q")))
    layer = on_meta(kind).to_empty(device="cpu")
    x = torch.ones(2, 60)
    uses = [
        lambda: layer(x),
        layer.dense_weight,
        layer.support.indices,
        layer.support.fingerprint,
        lambda: sl_linear(x, layer.B, layer.A, layer.V, layer.support, 1.0),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="no positions yet"):
            use()
    with pytest.raises(RuntimeError, match="saved before the layer had positions"):
        make(kind).load_state_dict(layer.state_dict())
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    assert same(layer, SLLinear(60, 40, 4, 0.1, 8.0, support=kind))


@each_kind
def test_moves_keep_the_positions(kind: SupportKind) -> None:
    layer = make(kind)
    before = positions(layer)
    assert torch.equal(positions(layer.to_empty(device="cpu")), before)
    assert torch.equal(positions(layer.type(torch.bfloat16)), before)  # nn.Module.type casts integer buffers, too
    assert torch.equal(positions(layer.to(torch.float16).double()), before)
    assert torch.equal(positions(layer.share_memory()), before)
    layer.to("meta")
    assert layer.state_dict()[STATE].is_meta
    assert torch.equal(positions(layer.to_empty(device="cpu")), before)


@each_kind
def test_copies_and_files(kind: SupportKind, tmp_path: Path) -> None:
    layer = make(kind)
    file = BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert same(other, layer)
        assert torch.equal(other.state_dict()[STATE], layer.state_dict()[STATE])
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    loaded = make(kind)
    loaded.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert same(loaded, layer)
    # torch.distributed.checkpoint writes into the tensors of the state dict that it is given.
    dcp.save(layer.state_dict(), checkpoint_id=tmp_path / "dcp")
    state = make(kind).state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    loaded = make(kind)
    loaded.load_state_dict(state)
    assert same(loaded, layer)


@each_kind
def test_layers_without_a_seed_compile_to_one_trace(kind: SupportKind) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(apply_shared, fullgraph=True, backend="eager")
    x = torch.ones(2, 60)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in range(4):
            layers = [make(kind, path="factored") for _ in range(2)]
            for got, layer in zip(compiled(layers, x), layers, strict=True):
                torch.testing.assert_close(got, layer(x))
