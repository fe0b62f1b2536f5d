"""Weights from another run's checkpoint: the same method's to the bit, another method's as close as it can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sltrain_dist.checkpoint import initial_weights
from sltrain_dist.checkpoint.initial_weights import check_tokenizer, weights_for
from sltrain_dist.checkpoint.manifest import MANIFEST, file_entry, write_manifest
from sltrain_dist.checkpoint.reader import CheckpointReader
from sltrain_dist.checkpoint.store import CheckpointStore
from sltrain_dist.config.load import to_yaml
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import CheckpointError, ConfigError, StorageError
from sltrain_dist.models.build import build_model, supports_fingerprint
from sltrain_dist.models.count import parameter_shapes
from sltrain_dist.models.llama import LlamaForCausalLM
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.parallel.pieces import load_values
from sltrain_dist.runtime.environment import Environment
from tests.support.ranks import SINGLE, on_ranks
from tests.unit.models.test_model import small, tokens, warmed

METHODS = ("sltrain", "full", "lowrank")


def configured(method: str, **reparam: object) -> Config:
    return small(reparam={"method": method, **reparam}, optim={"name": "sgd"})


def saved(directory: Path, config: Config) -> tuple[torch.nn.Module, CheckpointReader]:
    """A model whose B is not 0, and a checkpoint of it."""
    model = warmed(config)
    state = {"counters": {"step": 3}, "data": {}, "rng": [], "supports": supports_fingerprint(model)}
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_text("the tokenizer")
    path = CheckpointStore(directory / "checkpoints", SINGLE, keep=1).save(
        3,
        DDPEngine(model, config.optim, SINGLE).saved_ranges(),
        state,
        to_yaml(config),
        directory / "tokenizer.model",
    )
    return model, CheckpointReader(path)


def started(
    config: Config, reader: CheckpointReader, directory: Path, env: Environment = SINGLE
) -> tuple[LlamaForCausalLM, list[str]]:
    """The model that a run starts with, and what it reports."""
    lines: list[str] = []
    model = build_model(config)
    with weights_for(config, reader, env, directory / "initial_weights", lines.append) as read:
        for name, parameter in model.named_parameters():
            load_values(read, name, parameter)
    assert not (directory / "initial_weights").exists()
    return model, lines


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weight W of every linear layer, and all other parameters, by the names of a dense model."""
    found = {n: p.detach() for n, p in model.named_parameters() if n.rpartition(".")[2] not in ("B", "A", "V")}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "dense_weight")}
    return found | {f"{name}.weight": layer.dense_weight() for name, layer in layers.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_method_reads_every_parameter(tmp_path: Path, method: str) -> None:
    model, reader = saved(tmp_path, configured(method))
    start, lines = started(configured(method).model_copy(update={"seed": 0}), reader, tmp_path)
    assert lines == []
    for (name, parameter), (other, expected) in zip(start.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("method", ["sltrain", "lowrank"])
def test_a_dense_run_starts_as_the_same_function(tmp_path: Path, method: str) -> None:
    model, reader = saved(tmp_path, configured(method, support="blocks"))
    start, lines = started(configured("full"), reader, tmp_path)
    assert lines == [f"converted 21 linear layers from {method} to full"]
    for name, weight in weights(model).items():
        assert torch.equal(weights(start)[name], weight), name
    ids = tokens(small())
    torch.testing.assert_close(start(ids), model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["sltrain", "lowrank"])
def test_dense_layers_start_as_they_are(tmp_path: Path, method: str) -> None:
    """To and from a dense run, and between runs with the same dense layers."""
    model, reader = saved(tmp_path / "dense", configured("full"))
    mixed = configured(method, dense_layers=[0, -1])
    there, _ = started(mixed, reader, tmp_path)
    for name, weight in weights(model).items():
        assert torch.equal(weights(there)[name], weight) is (".layers.1." not in name or "norm" in name), name
    model, reader = saved(tmp_path / "mixed", mixed)
    for config in (configured("full"), mixed):
        back, _ = started(config, reader, tmp_path)
        for name, weight in weights(model).items():
            assert torch.equal(weights(back)[name], weight), name


@pytest.mark.parametrize("support", ["random", "stratified", "blocks"])
@pytest.mark.parametrize(
    ("before", "after"), [("full", "sltrain"), ("full", "lowrank"), ("lowrank", "sltrain"), ("sltrain", "lowrank")]
)
def test_a_factored_run_starts_close_to_the_weights(tmp_path: Path, before: str, after: str, support: str) -> None:
    """As close as the best approximation of its rank, or closer with S; and reports how close."""
    model, reader = saved(tmp_path, configured(before))
    config = configured(after, rank=5, alpha=3.0, support=support)
    start, lines = started(config, reader, tmp_path)
    reported = {line.partition(":")[0]: float(line.rpartition(" ")[2]) for line in lines[:-1]}
    assert len(reported) == 21
    assert lines[-1] == f"converted 21 linear layers from {before} to {after}"
    was, now = weights(model), weights(start)
    assert was.keys() == now.keys()
    for name, weight in was.items():
        layer = name.removesuffix(".weight")
        if layer not in reported:
            assert torch.equal(now[name], weight), name
            continue
        error = float((now[name] - weight).norm())
        best = float(torch.linalg.svdvals(weight)[5:].norm())
        assert error / float(weight.norm()) == pytest.approx(reported[layer], abs=6e-5)
        assert error == pytest.approx(best, rel=1e-4) if after == "lowrank" else error < 0.97 * best
        B, A = (start.get_submodule(layer).get_parameter(key).detach() for key in "BA")
        torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-4, atol=1e-5)  # balanced


def test_what_fits_exactly_is_kept_exactly(tmp_path: Path) -> None:
    """A low-rank weight, as the B and A of a run with S that has nothing left to do."""
    model, reader = saved(tmp_path, configured("lowrank"))
    start, lines = started(configured("sltrain"), reader, tmp_path)
    assert all(line.endswith(" 0.0000") for line in lines[:-1])
    ids = tokens(small())
    torch.testing.assert_close(start(ids), model(ids), rtol=0, atol=1e-5)


def test_ranks_that_share_the_work_start_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and each layer is converted once: 21 by 4 ranks, so that in the last turn some have none."""
    _, reader = saved(tmp_path, configured("full"))
    config = configured("sltrain")
    expected, lines = started(config, reader, tmp_path)
    converted: list[str] = []
    convert = initial_weights._convert

    def counted(reader: CheckpointReader, name: str, *others: object) -> object:
        converted.append(name)
        return convert(reader, name, *others)

    def on_rank(env: Environment) -> list[str]:
        said: list[str] = []
        with weights_for(config, CheckpointReader(reader.path), env, tmp_path / "shared", said.append) as read:
            for name, shape in parameter_shapes(config.model, config.reparam):
                part = expected.get_parameter(name).detach().view(-1)[env.rank :: env.world_size]
                found = read(f"model.{name}", 0, int(torch.tensor(shape).prod()))[env.rank :: env.world_size]
                assert torch.equal(found, part), name
        return said

    monkeypatch.setattr(initial_weights, "_convert", counted)
    assert on_ranks(4, on_rank) == [lines] * 4
    assert len(converted) == len(set(converted)) == 21
    assert not (tmp_path / "shared").exists()


def test_what_a_killed_start_has_left_is_not_read(tmp_path: Path) -> None:
    _, reader = saved(tmp_path, configured("full"))
    (tmp_path / "initial_weights").mkdir()
    (tmp_path / "initial_weights" / "model.layers.0.mlp.up_proj.safetensors").write_text("half a fi")
    started(configured("sltrain"), reader, tmp_path)


def test_other_supports_are_refused(tmp_path: Path) -> None:
    _, reader = saved(tmp_path, configured("sltrain"))
    state = json.loads((reader.path / "state.json").read_text())
    (reader.path / "state.json").write_text(json.dumps({**state, "supports": "0" * 16, "code": "0.1.0, ab12"}))
    write_manifest(reader.path, 3, {p.name: file_entry(p) for p in reader.path.iterdir() if p.name != MANIFEST})
    with pytest.raises(CheckpointError, match=r"other supports .* use the version that saved it \(0\.1\.0, ab12\)"):
        started(configured("full"), CheckpointReader(reader.path), tmp_path)
    assert not (tmp_path / "initial_weights").exists()


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, reader = saved(tmp_path, configured("sltrain"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(initial_weights, "save_ranges", full)
    with pytest.raises(StorageError, match=r"q_proj\.safetensors cannot be written \(No space left on device"):
        started(configured("full"), reader, tmp_path)
    assert not (tmp_path / "initial_weights").exists()


def test_tokenizers(tmp_path: Path) -> None:
    _, reader = saved(tmp_path, configured("full"))
    check_tokenizer(reader.path, tmp_path / "tokenizer.model")
    (tmp_path / "other.model").write_text("another")
    with pytest.raises(ConfigError, match=r"set data\.tokenizer=.*step_00000003/tokenizer\.model"):
        check_tokenizer(reader.path, tmp_path / "other.model")
