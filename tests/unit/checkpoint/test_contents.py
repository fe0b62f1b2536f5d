"""Whatever is wrong with a checkpoint is found and named: in its manifest, in its files, and in what they hold."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sltrain_dist.checkpoint.contents import damage
from sltrain_dist.checkpoint.manifest import MANIFEST, changed_file, checkpoint_name, file_entry, write_manifest
from sltrain_dist.checkpoint.reader import CheckpointReader
from sltrain_dist.checkpoint.store import CheckpointStore
from sltrain_dist.config.load import load_config
from sltrain_dist.errors import CheckpointError
from sltrain_dist.models.count import parameter_shapes
from sltrain_dist.numerics.tensor_range import TensorRange
from tests.support.ranks import SINGLE

TENSORS = "tensors-00000-of-00001.safetensors"
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ranges = [
        (TensorRange.whole("model.w", (2, 3)), torch.arange(6.0)),
        (TensorRange.whole("model.b", (2,)), torch.ones(2)),
    ]
    return CheckpointStore(tmp_path / "checkpoints", SINGLE, 9).save(3, ranges, {"counters": {}}, "seed: 1\n")


def edited(path: Path, edit: Edit) -> None:
    """Edits a manifest, which is then as of a version that knew no checksums: only its sense can give it away."""
    values = json.loads((path / MANIFEST).read_text())
    del values["checksum"]
    edit(values)
    (path / MANIFEST).write_text(json.dumps(values))


def listed_anew(path: Path) -> None:
    """Makes the manifest say what the files are."""
    files = {file.name: file_entry(file) for file in path.iterdir() if file.name != MANIFEST}
    write_manifest(path, 3, files)


def assert_damaged(path: Path, said: str) -> None:
    """It is found in a moment, named, and passed over; and nothing is read of it."""
    problem = damage(path)
    assert problem is not None
    assert said in problem
    assert str(path) in problem
    assert "\n" not in problem
    reported: list[str] = []
    with pytest.raises(CheckpointError, match="every checkpoint"):
        CheckpointStore(path.parent, SINGLE, 9).newest(reported.append)
    assert reported == [f"checkpoint skipped: {problem}"]


def test_every_flipped_bit_of_the_manifest_is_found(saved: Path) -> None:
    """In keys, too: a misspelt one is damage, and no reason to crash."""
    content = (saved / MANIFEST).read_bytes()
    for place in range(0, len(content), 3):  # every one in memory: test_files.py
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (saved / MANIFEST).write_bytes(flipped)
        assert changed_file(saved) is not None, (place, flipped)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: m.update(files={}), "does not list state.json"),
        (lambda m: m["files"].pop(TENSORS), f"does not list {TENSORS}"),
        (lambda m: m["files"].pop("config.yaml"), "does not list config.yaml"),
        (lambda m: m["files"].update({"tensors-00001-of-00002.safetensors": m["files"][TENSORS]}), "does not list"),
        (lambda m: m["files"].update({"tensors-x": m["files"][TENSORS]}), "does not list"),
        (lambda m: m.update(step=4), "it is of step 4"),
        (lambda m: m.update(step=-1), "step: "),
        (lambda m: m.update(step=1e400), "step: "),
        (lambda m: m.update(step=10**30), "step: "),
        (lambda m: m.update(files=[]), "files: "),
        (lambda m: m["files"].update({TENSORS: None}), f"files.{TENSORS}: "),
        (lambda m: m["files"].update({TENSORS: []}), f"files.{TENSORS}: "),
        (lambda m: m["files"][TENSORS].update(bytes=None), f"files.{TENSORS}.bytes: "),
        (lambda m: m["files"][TENSORS].update(sha256="x"), f"files.{TENSORS}.sha256: "),
        (lambda m: m["files"].update({"a\0b": m["files"][TENSORS]}), "files."),
        (lambda m: m["files"].update({"../../x": m["files"][TENSORS]}), "files.../../x"),
        (lambda m: m["files"].update({"/dev/zero": m["files"][TENSORS]}), "files./dev/zero"),
    ],
)
def test_manifests_that_make_no_sense(saved: Path, edit: Edit, said: str) -> None:
    edited(saved, edit)
    assert_damaged(saved, said)


def test_a_manifest_that_is_nested_deeply(saved: Path) -> None:
    (saved / MANIFEST).write_text('{"format": 1, "step": 3, "files": ' + '{"a": ' * 100_000)
    assert_damaged(saved, "is damaged: ")


def test_a_manifest_of_before_checksums_is_read(saved: Path) -> None:
    edited(saved, lambda m: None)
    assert damage(saved) is None
    assert CheckpointReader(saved).step == 3


def test_a_copy_under_another_name_is_whole(saved: Path) -> None:
    assert damage(saved.rename(saved.parent / "best")) is None
    assert_damaged((saved.parent / "best").rename(saved.with_name(checkpoint_name(4))), "it is of step 3")


@pytest.mark.parametrize("name", [TENSORS, "state.json", MANIFEST])
@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_only_regular_files_are_read(saved: Path, name: str, kind: str) -> None:
    (saved / name).unlink()
    if kind == "device":
        (saved / name).symlink_to("/dev/zero")
    else:
        os.mkfifo(saved / name)
    if name != MANIFEST:
        edited(saved, lambda m: m["files"][name].update(bytes=0))
        assert_damaged(saved, "is not a regular file")
    else:
        assert str(saved / name) in str(damage(saved))


def test_a_file_that_is_not_listed_is_not_read(saved: Path) -> None:
    """It would sort before the others, and win."""
    save_file(
        {"model.w@0": torch.full((6,), 7.0)},
        saved / "tensors-00000-of-00000.safetensors",
        metadata={"shapes": json.dumps({"model.w": [2, 3]})},
    )
    assert damage(saved) is None
    assert CheckpointReader(saved).read("model.w", 0, 6).tolist() == [0, 1, 2, 3, 4, 5]


SHAPES = {"shapes": json.dumps({"model.w": [2, 3]})}


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({"model.w@0": 4, "model.w@2": 2}, SHAPES, "two ranges cover elements 2 to 3 of model.w"),
        ({"model.w@0": 2, "model.w@4": 2}, SHAPES, "no range covers elements 2 to 3 of model.w"),
        ({"model.w@1": 5}, SHAPES, "no range covers elements 0 to 0 of model.w"),
        ({"model.w@0": 5}, SHAPES, "5 elements are saved instead of 6, of model.w"),
        ({"model.w@0": 7}, SHAPES, "7 elements are saved instead of 6, of model.w"),
        ({}, SHAPES, "0 elements are saved instead of 6, of model.w"),
        ({"model.w": 6}, SHAPES, "'model.w' is not a range"),
        ({"model.w@-1": 6}, SHAPES, "'model.w@-1' is not a range"),
        ({"model.v@0": 6}, SHAPES, "'model.v@0' is not a range"),
        ({"model.w@0": 6}, None, "cannot be read: "),
        ({"model.w@0": 6}, {"shape": "{}"}, "cannot be read: "),
        ({"model.w@0": 6}, {"shapes": "[]"}, "cannot be read: "),
        ({"model.w@0": 6}, {"shapes": '{"model.w": null}'}, "cannot be read: model.w: "),
        ({"model.w@0": 6}, {"shapes": '{"model.w": [2, Infinity]}'}, "cannot be read: model.w.1: "),
        ({"model.w@0": 6}, {"shapes": "[" * 100_000}, "cannot be read: "),
    ],
)
def test_tensors_that_make_no_sense(
    saved: Path, tensors: dict[str, int], metadata: dict[str, str] | None, said: str
) -> None:
    save_file({key: torch.zeros(length) for key, length in tensors.items()}, saved / TENSORS, metadata=metadata)
    listed_anew(saved)
    assert_damaged(saved, said)


def test_ranks_that_disagree(saved: Path) -> None:
    (saved / TENSORS).unlink()
    for rank, shape in enumerate(([2, 3], [3, 2])):
        path = saved / f"tensors-{rank:05d}-of-00002.safetensors"
        save_file({f"model.w@{3 * rank}": torch.zeros(3)}, path, metadata={"shapes": json.dumps({"model.w": shape})})
    listed_anew(saved)
    assert_damaged(saved, "model.w has the shape [3, 2] here and [2, 3] in another file")
    save_file({"model.w@3": torch.zeros(3, dtype=torch.bfloat16)}, path, metadata=SHAPES)
    listed_anew(saved)
    assert_damaged(saved, "model.w has the type BF16 here and F32 elsewhere")


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000, '{"a": ' * 100_000])
def test_a_state_that_is_none(saved: Path, content: str) -> None:
    (saved / "state.json").write_text(content)
    listed_anew(saved)
    assert_damaged(saved, "state.json cannot be read: ")


def test_a_parameter_that_no_file_holds(saved: Path) -> None:
    """Every file is whole and every tensor in it, but the configuration's model has more."""
    (saved / "config.yaml").write_text("train: {steps: 1}\n")
    listed_anew(saved)
    assert_damaged(saved, "model.model.embed_tokens.weight of shape (32000, 512) is missing")


TINY = "{vocab_size: 8, hidden_size: 4, intermediate_size: 4, num_layers: 1, num_heads: 1}"


@pytest.mark.parametrize(
    ("optimizer", "dtype", "state", "said"),
    [
        ("sgd", torch.float32, {}, "state.json: data: Field required"),
        ("sgd", torch.float32, {"counters": {"step": 2}}, "state.json: data: Field required"),
        ("sgd", torch.float32, {"counters": {"step": 2}, "data": {}, "rng": [], "supports": ""}, "is of step 2"),
        ("sgd", torch.int32, {}, "model.model.embed_tokens.weight has the type I32"),
        ("adamw", torch.float32, {}, "optim.model.embed_tokens.weight.exp_avg of shape (8, 4) is missing"),
    ],
)
def test_what_a_run_could_not_go_on_from(
    saved: Path, optimizer: str, dtype: torch.dtype, state: dict[str, Any], said: str
) -> None:
    text = f"model: {TINY}\nreparam: {{method: full}}\noptim: {{name: {optimizer}}}\ntrain: {{steps: 1}}\n"
    (saved / "config.yaml").write_text(text)
    config = load_config(saved / "config.yaml")
    shapes = {f"model.{name}": shape for name, shape in parameter_shapes(config.model, config.reparam)}
    tensors = {f"{name}@0": torch.zeros(math.prod(shape), dtype=dtype) for name, shape in shapes.items()}
    save_file(tensors, saved / TENSORS, metadata={"shapes": json.dumps(shapes)})
    (saved / "state.json").write_text(json.dumps({"counters": {}} | state))
    listed_anew(saved)
    assert_damaged(saved, said)
