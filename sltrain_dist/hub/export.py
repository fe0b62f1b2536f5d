"""Export of a checkpoint, tensor by tensor, to a dense Hugging Face LLaMA (safetensors and config.json)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sltrain_dist.checkpoint.manifest import TOKENIZER
from sltrain_dist.checkpoint.reader import CheckpointReader, open_newest
from sltrain_dist.checkpoint.store import save_tensors
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import CheckpointError, ConfigError, DataError
from sltrain_dist.files import writing, writing_directory
from sltrain_dist.hub.tokenizer_json import write_tokenizer
from sltrain_dist.models.build import build_meta_model, join_fingerprints
from sltrain_dist.numerics.int8_weight import plain
from sltrain_dist.parallel.pieces import load_values
from sltrain_dist.sparse_lowrank.baselines import ReloraLinear
from sltrain_dist.sparse_lowrank.layer import LowRankLinear, SLLinear

_SHARD_BYTES = 5_000_000_000
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export_dense(path: Path, output: Path, *, dtype: str = "bf16", shard_bytes: int = _SHARD_BYTES) -> int:
    """Merges every sparse plus low-rank layer into a dense weight and writes a Hugging Face model.

    Layers are merged in float32, one at a time, so that the peak memory is about one output file.

    Args:
        path: A checkpoint, or a run directory (its newest checkpoint).
        output: Directory to create.
        dtype: Type of the exported weights, "bf16" or "fp32".
        shard_bytes: Maximum size of one safetensors file.

    Returns:
        Number of parameters of the exported model.

    Raises:
        CheckpointError: The checkpoint is damaged, or this version draws other supports from its seed.
        ConfigError: The output already exists, or the model is no dense LLaMA (reparam.method=cola).
        StorageError: The output cannot be written; partial output has been removed.
    """
    if output.exists():
        raise ConfigError(f"{output} already exists; choose another --output, or remove it")
    reader = open_newest(path)
    config = reader.config()
    if config.reparam.method == "cola":
        raise ConfigError(
            f"{reader.path} has reparam.method=cola, whose layers have an activation between two factors and cannot be "
            "merged into dense weights; export a run of another method"
        )
    with writing(f"the model {output}"), writing_directory(output) as temporary:
        special_ids = _write_tokenizer(reader.tokenizer(), temporary, config)
        parameters = _write_tensors(temporary, reader, config, _DTYPES[dtype], shard_bytes)
        hugging_face = _hugging_face_config(config, dtype) | special_ids
        (temporary / "config.json").write_text(json.dumps(hugging_face, indent=2) + "\n")
    return parameters


def _write_tensors(
    directory: Path, reader: CheckpointReader, config: Config, dtype: torch.dtype, shard_bytes: int
) -> int:
    files: list[list[str]] = []
    sizes: list[int] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_tensors(directory / f"part-{len(files)}", pending, {"format": "pt"})
        files.append(list(pending))
        sizes.append(sum(t.nbytes for t in pending.values()))
        pending.clear()

    for name, tensor in _dense_tensors(reader, config):
        if pending and sum(t.nbytes for t in pending.values()) + tensor.numel() * dtype.itemsize > shard_bytes:
            flush()
        pending[name] = tensor.to(dtype)
    flush()
    if len(files) == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
    else:
        weight_map = {}
        for index, names in enumerate(files):
            file_name = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
            (directory / f"part-{index}").rename(directory / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index_json = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2) + "\n")
    return sum(sizes) // dtype.itemsize


def _dense_tensors(reader: CheckpointReader, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, dense float32 tensor) of every parameter."""
    supports: list[tuple[str, str]] = []
    model = build_meta_model(config)
    replaced: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, SLLinear | LowRankLinear | ReloraLinear):
            continue
        replaced |= {f"{name}.{key}" for key, _ in module.named_parameters()}
        reader.fill(module, name)
        if isinstance(module, SLLinear):
            supports.append((module.name, module.support.fingerprint()))
        yield f"{name}.weight", module.dense_weight()
        module.to("meta")
    reader.check_supports(join_fingerprints(supports))
    for name, parameter in model.named_parameters():
        if name not in replaced:
            whole = torch.empty_like(parameter, device="cpu")
            load_values(reader.read, name, whole)
            yield name, plain(whole.detach(), torch.float32).float()


def _write_tokenizer(model: Path, directory: Path, config: Config) -> dict[str, int | None]:
    """Writes the tokenizer's files and returns its special token ids. Missing ones are None, so that Hugging Face does
    not use LLaMA's defaults."""
    shutil.copyfile(model, directory / TOKENIZER)
    try:
        return write_tokenizer(model, directory, max_length=config.data.seq_len)
    except DataError as error:
        raise CheckpointError(str(error)) from None


def _hugging_face_config(config: Config, dtype: str) -> dict[str, Any]:
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": config.data.seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_head,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
    }
