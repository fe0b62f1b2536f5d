"""The LLaMA decoder: parity with Hugging Face's, parameter counts, initialisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sltrain_dist.config.load import build_config
from sltrain_dist.config.schema import Config
from sltrain_dist.models.build import (
    build_meta_model,
    build_model,
    initial_values,
    sparse_layers,
    supports_fingerprint,
)
from sltrain_dist.models.count import block_linears, count_parameters, model_flops_per_token
from sltrain_dist.models.loss import IGNORE

PAPER = {  # REFERENCE.md: base, LR and SP in millions where it prints them, full-rank totals where it prints them
    "llama_60m": {"base": 32.78, "factors": 9.99, "sparse": 0.76, "total": 43.5, "full": 58.07},
    "llama_130m": {},
    "llama_350m": {},
    "llama_1b": {},
    "llama_7b": {"base": 262.41, "factors": 2558.53, "sparse": 323.80},
}


def small(**sections: dict[str, object]) -> Config:
    model = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_layers": 3,
        "num_heads": 4,
        **sections.pop("model", {}),
    }
    reparam = {"rank": 8, "density": 0.1, "alpha": 16.0, **sections.pop("reparam", {})}
    train = {"steps": 1, "dtype": "fp32", **sections.pop("train", {})}
    return build_config({"model": model, "reparam": reparam, "train": train, "data": {"seq_len": 24}, **sections})


def tokens(config: Config, batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(config.model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def warmed(config: Config) -> nn.Module:
    """A model whose B is not 0, so that every parameter matters."""
    model = build_model(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("preset", list(PAPER))
def test_parameter_counts_are_the_papers(preset: str) -> None:
    config = build_config({"preset": preset})
    counted = count_parameters(config.model, config.reparam)
    built = build_meta_model(config)
    m, h, f = config.model, config.model.hidden_size, config.model.intermediate_size
    shapes = [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]
    assert counted.remainder == 2 * m.vocab_size * h + (2 * m.num_layers + 1) * h
    assert counted.factors == m.num_layers * sum(config.reparam.rank * (a + b) for a, b in shapes)
    assert counted.sparse == m.num_layers * sum(int(config.reparam.density * a * b) for a, b in shapes)
    assert counted.total == sum(p.numel() for p in built.parameters())
    printed = PAPER[preset]
    for key, value in (("base", counted.remainder), ("factors", counted.factors), ("sparse", counted.sparse)):
        if key in printed:
            assert round(value / 1e6, 2) == printed[key]
    full = build_config({"preset": preset, "reparam": {"method": "full"}})
    counted_full = count_parameters(full.model, full.reparam)
    assert counted_full.total == sum(p.numel() for p in build_meta_model(full).parameters())
    if "full" in printed:
        assert round(counted_full.total / 1e6, 2) == printed["full"]


@pytest.mark.parametrize(
    "reparam",
    [{"method": "sltrain"}, {"method": "full"}, {"method": "lowrank"}, {"dense_layers": [0]}],
    ids=["sltrain", "full", "lowrank", "dense layer"],
)
@pytest.mark.parametrize("shape", [{}, {"num_kv_heads": 2}, {"tie_head": True}], ids=["plain", "grouped", "tied"])
def test_logits_and_loss_equal_hugging_face(reparam: dict[str, object], shape: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    config = small(model=shape, reparam=reparam)
    model = warmed(config)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.model.vocab_size,
            hidden_size=config.model.hidden_size,
            intermediate_size=config.model.intermediate_size,
            num_hidden_layers=config.model.num_layers,
            num_attention_heads=config.model.num_heads,
            num_key_value_heads=config.model.kv_heads,
            rms_norm_eps=config.model.norm_eps,
            tie_word_embeddings=config.model.tie_head,
            attn_implementation="eager",
        )
    )
    replaced = ("A", "B", "V", "_extra_state")
    state = {n: p for n, p in model.state_dict().items() if n.rpartition(".")[2] not in replaced}
    for name, module in model.named_modules():
        if hasattr(module, "dense_weight"):
            state[f"{name}.weight"] = module.dense_weight()
    reference.load_state_dict(state, strict=True)
    ids = tokens(config)
    with torch.no_grad():
        ours, theirs = model(ids), reference(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    labels = torch.cat((ids[:, 1:], torch.full((2, 1), IGNORE)), dim=1)
    labels[0, 10:] = IGNORE
    with torch.no_grad():
        loss = model(ids, labels) / int((labels != IGNORE).sum())
        unshifted = ids.clone()
        unshifted[0, 11:] = IGNORE
        torch.testing.assert_close(loss, reference(ids, labels=unshifted).loss, rtol=1e-5, atol=1e-5)


def test_causal() -> None:
    config = small()
    model = warmed(config)
    ids = tokens(config)
    other = ids.clone()
    other[:, 12:] = (other[:, 12:] + 1) % config.model.vocab_size
    with torch.no_grad():
        a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :12], b[:, :12])
    assert (a[:, 12:] - b[:, 12:]).abs().max() > 1e-3


def test_initial_weights_do_not_depend_on_what_else_is_built() -> None:
    two, three = build_model(small(model={"num_layers": 2})), build_model(small())
    three_state = three.state_dict()
    for name, value in two.state_dict().items():
        assert torch.equal(value, three_state[name])


@pytest.mark.parametrize("method", ["sltrain", "lowrank", "full"])
def test_initial_values_can_be_read_by_range(method: str) -> None:
    config = small(reparam={"method": method}, train={"dtype": "bf16"})
    read = initial_values(build_meta_model(config))
    for name, parameter in build_model(config).named_parameters():
        last = parameter.numel() - 1
        got = torch.cat([read(f"model.{name}", 0, last), read(f"model.{name}", last, 1)])
        assert torch.equal(got.bfloat16(), parameter.detach().view(-1)), name


def test_initial_weights_follow_the_seed() -> None:
    one, other = build_model(small()).state_dict(), build_model(small(seed=1)).state_dict()
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.A", "lm_head.weight"):
        assert not torch.equal(one[name], other[name])


def test_initial_loss_knows_nothing() -> None:
    config = small()
    ids = tokens(config, 8)
    with torch.no_grad():
        loss = build_model(config)(ids, ids) / ids.numel()
    assert float(loss) == pytest.approx(math.log(97), abs=0.1)


def test_bf16_model_keeps_the_rotary_table_in_float32() -> None:
    model = build_model(small(train={"dtype": "bf16"}))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.cos.dtype == torch.float32


def test_tied_head_is_one_parameter() -> None:
    model = build_model(small(model={"tie_head": True}))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    counted = count_parameters(small(model={"tie_head": True}).model, small().reparam)
    assert counted.total == sum(p.numel() for p in model.parameters())


def test_every_linear_of_a_block_is_replaced_and_named() -> None:
    config = small()
    names = [name for name, _ in sparse_layers(build_meta_model(config))]
    want = [f"model.layers.{i}.{s.name}" for i in range(3) for s in block_linears(config.model)]
    assert sorted(names) == sorted(want)


@pytest.mark.parametrize("method", ["sltrain", "lowrank"])
def test_dense_layers_are_those_of_a_dense_model(method: str) -> None:
    """The others, and their initial values, are those of a model without dense layers."""
    mixed, dense, none = (
        build_model(small(reparam=reparam)).state_dict()
        for reparam in ({"method": method, "dense_layers": [0, -1]}, {"method": "full"}, {"method": method})
    )
    for layer, expected in enumerate((dense, none, dense)):
        prefix = f"model.layers.{layer}."
        here, there = ({n: v for n, v in state.items() if n.startswith(prefix)} for state in (mixed, expected))
        assert here.keys() == there.keys()
        assert all(torch.equal(value, there[name]) for name, value in here.items())


def test_meta_model_allocates_nothing() -> None:
    model = build_meta_model(build_config({"preset": "llama_7b"}))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_supports_fingerprint_follows_seed_and_density() -> None:
    one = supports_fingerprint(build_model(small()))
    assert one == supports_fingerprint(build_model(small()))
    assert one != supports_fingerprint(build_model(small(seed=1)))
    assert one != supports_fingerprint(build_model(small(reparam={"density": 0.11})))


def test_too_long_a_sequence_is_refused() -> None:
    config = small()
    with pytest.raises(ValueError, match="longer than the model was built for"):
        build_model(config)(tokens(config, 1, 25))


def test_flops_of_7b() -> None:
    config = build_config({"preset": "llama_7b"})
    weights = 6_738_415_616 - 32_000 * 4096 - 65 * 4096  # all but the embedding and the norms
    assert model_flops_per_token(config.model, 256) == 6 * weights + 12 * 32 * 4096 * 256
