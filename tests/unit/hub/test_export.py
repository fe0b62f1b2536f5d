"""Exported models are Hugging Face's, with the same logits."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sltrain_dist import cli
from sltrain_dist.checkpoint import store
from sltrain_dist.checkpoint.manifest import MANIFEST, file_entry, write_manifest
from sltrain_dist.checkpoint.store import CheckpointStore
from sltrain_dist.config.load import to_yaml
from sltrain_dist.config.schema import Config
from sltrain_dist.data.tokenizer import Tokenizer, train_tokenizer
from sltrain_dist.errors import CheckpointError, ConfigError, StorageError
from sltrain_dist.hub.export import export_dense
from sltrain_dist.models.build import supports_fingerprint
from sltrain_dist.parallel.ddp import DDPEngine
from sltrain_dist.runtime.environment import Environment
from tests.unit.models.test_model import small, tokens, warmed

ENV = Environment(0, 1, 0, torch.device("cpu"))


def saved(
    tmp_path: Path, build: Callable[[Config], torch.nn.Module] = warmed, **sections: dict[str, object]
) -> tuple[torch.nn.Module, Path]:
    config = small(**{"optim": {"name": "sgd"}, **sections})  # which has no states that an update would have to make
    model = build(config)
    engine = DDPEngine(model, config.optim, ENV)
    if config.optim.name != "sgd":
        engine.begin_update(0.01, None)
        engine.micro_step(tokens(config), tokens(config), 0.1, last=True)
        engine.update()
    state = {"counters": {"step": 3}, "data": {}, "rng": [], "supports": supports_fingerprint(model)}
    checkpoints = CheckpointStore(tmp_path / "run" / "checkpoints", ENV, keep=2)
    tokenizer = tmp_path / "tokenizer.model"
    train_tokenizer((f"word {i} is here" for i in range(200)), tokenizer, vocab_size=280, model_type="bpe")
    return model, checkpoints.save(3, engine.saved_ranges(), state, to_yaml(config), tokenizer)


@pytest.mark.parametrize(
    "reparam",
    [{"method": "sltrain"}, {"method": "lowrank"}, {"method": "full"}, {"dense_layers": [0, -1]}, {"method": "relora"}],
    ids=["sltrain", "lowrank", "full", "dense layers", "relora"],
)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "many files"])
def test_logits_survive(tmp_path: Path, reparam: dict[str, object], shard_bytes: int) -> None:
    transformers = pytest.importorskip("transformers")
    model, _ = saved(tmp_path, reparam=reparam, model={"num_kv_heads": 2})
    parameters = export_dense(tmp_path / "run", tmp_path / "hf", dtype="fp32", shard_bytes=shard_bytes)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert parameters == sum(p.numel() for p in loaded.parameters())
    ids = tokens(small())
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids), rtol=0, atol=1e-5)
    assert loaded.config.eos_token_id == Tokenizer(tmp_path / "hf" / "tokenizer.model").eos_id
    assert loaded.config.bos_token_id is None
    assert loaded.config.pad_token_id == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (
        tokenizer("word 7 is here")["input_ids"]
        == Tokenizer(tmp_path / "tokenizer.model").encode(["word 7 is here"])[0].tolist()
    )
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes == 10**9 else len(files) > 3


def test_cola_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, reparam={"method": "cola"})
    with pytest.raises(ConfigError, match=r"reparam\.method=cola, whose layers have an activation"):
        export_dense(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_tied_head_is_exported_once(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, checkpoint = saved(tmp_path, model={"tie_head": True})
    export_dense(checkpoint, tmp_path / "hf", dtype="fp32")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    ids = tokens(small())
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids), rtol=0, atol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        export_dense(checkpoint, tmp_path / "there")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        export_dense(tmp_path / "there", tmp_path / "new")
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "supports": "0" * 16}))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        export_dense(checkpoint, tmp_path / "new")
    files = {p.name: file_entry(p) for p in checkpoint.iterdir() if p.name != MANIFEST}
    write_manifest(checkpoint, 3, files)
    with pytest.raises(CheckpointError, match="other supports"):
        export_dense(checkpoint, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_all_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    _, checkpoint = saved(tmp_path)
    before = os.umask(umask)
    try:
        export_dense(checkpoint, tmp_path / "hf", shard_bytes=20_000)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()}
    assert len(modes) > 5
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = saved(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(StorageError, match=r"the model .*hf cannot be written \(.*No space left on device") as caught:
        export_dense(checkpoint, tmp_path / "hf")
    assert caught.value.exit_code == 6
    assert not list(tmp_path.glob("*hf*"))


def test_a_damaged_tokenizer_is_a_damaged_checkpoint(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path)
    (checkpoint / "tokenizer.model").write_bytes(b"no model")
    files = {p.name: file_entry(p) for p in checkpoint.iterdir() if p.name != MANIFEST}
    write_manifest(checkpoint, 3, files)
    with pytest.raises(CheckpointError, match="is not a SentencePiece model"):
        export_dense(checkpoint, tmp_path / "hf")
    assert not list(tmp_path.glob("*hf*"))


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sltrain", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return int(exit_.value.code or 0)

    _, checkpoint = saved(tmp_path)
    assert run("export", str(tmp_path / "run"), "-o", str(tmp_path / "hf")) == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    capsys.readouterr()
    assert run("verify", str(tmp_path / "run")) == 0
    assert capsys.readouterr().out == "step_00000003: intact\n"
    tensors = next(checkpoint.glob("tensors-*"))
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    assert run("verify", str(tmp_path / "run")) == 5
    captured = capsys.readouterr()
    assert "damaged: step_00000003" in captured.err
    assert str(tensors) in captured.out, "in one piece, however long"
