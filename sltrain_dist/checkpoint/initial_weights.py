"""The weights of a run that starts from the checkpoint of another run (`checkpoint.init_from`).

If the two runs have the same method, every parameter is read from the checkpoint. Otherwise the linear layers are
converted before the model is built. Each layer is converted by one rank, because singular value decompositions on two
machines can differ in more than the last bits. It is written to a file, so that a rank has one layer in memory at a
time, and then reads only the ranges that it keeps.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from sltrain_dist.checkpoint.manifest import TOKENIZER, read_manifest
from sltrain_dist.checkpoint.reader import CheckpointReader, TensorReader
from sltrain_dist.checkpoint.store import Report, save_ranges
from sltrain_dist.config.schema import PROJECTED_METHODS, Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.files import make_directory, sha256_of, writing
from sltrain_dist.models.build import build_meta_model, join_fingerprints
from sltrain_dist.models.count import block_linears
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.parallel.pieces import ReadRange
from sltrain_dist.runtime.environment import Environment
from sltrain_dist.sparse_lowrank.baselines import ReloraLinear
from sltrain_dist.sparse_lowrank.convert import fit, low_rank
from sltrain_dist.sparse_lowrank.layer import LowRankLinear, SLLinear


@dataclass(frozen=True)
class _Converted:
    """A layer that one rank has converted, as it is reported to all ranks."""

    name: str
    file: str
    error: float
    """‖W' − W‖ / ‖W‖ in the Frobenius norm, where W is the weight in the checkpoint and W' the converted one."""
    support: str | None
    """Fingerprint of the support in the checkpoint; None without one."""


def check_tokenizer(checkpoint: Path, tokenizer: Path) -> None:
    """Checks that the rows of a checkpoint's embedding and head stand for the pieces of a run's tokenizer.

    Raises:
        ConfigError: The checkpoint was trained with another tokenizer.
    """
    saved = read_manifest(checkpoint).files.get(TOKENIZER)
    if saved is not None and saved.sha256 != sha256_of(tokenizer):
        raise ConfigError(
            f"checkpoint.init_from = {checkpoint}: it was trained with another tokenizer than {tokenizer}; set "
            f"data.tokenizer={checkpoint / TOKENIZER}"
        )


@contextmanager
def weights_for(
    config: Config, reader: CheckpointReader, env: Environment, directory: Path, report: Report
) -> Iterator[ReadRange]:
    """Yields a function that reads ranges of a checkpoint's tensors, as those of the method of `config`.

    All ranks must call this together.

    Args:
        config: The configuration of the run.
        reader: The checkpoint, whose weights fit the configuration.
        env: The distributed environment.
        directory: Directory that all ranks share, for converted layers. It is deleted when the block ends.
        report: Called with a line for every layer whose conversion is approximate, and one for all.

    Raises:
        CheckpointError: This version draws other supports from the checkpoint's seed.
        StorageError: A converted layer cannot be written.
    """
    if config.reparam.method == reader.config().reparam.method:
        yield reader.read
        return

    def clear() -> None:
        with writing(f"the directory {directory}"):
            shutil.rmtree(directory, ignore_errors=True)  # of a start that was killed
            make_directory(directory)

    env.on_main(clear)
    try:
        converted = _convert_layers(reader, config, env, directory, report)

        def read(name: str, start: int, count: int) -> Tensor:
            return (converted if name in converted.shapes else reader).read(name, start, count)

        yield read
        env.gather(None)  # until all ranks have read their parts
    finally:
        if env.is_main:
            shutil.rmtree(directory, ignore_errors=True)


def _convert_layers(
    reader: CheckpointReader, config: Config, env: Environment, directory: Path, report: Report
) -> TensorReader:
    """Converts the linear layers, one on each rank at a time, and returns a reader of the converted parameters."""
    before = reader.config()
    old, new = build_meta_model(before), build_meta_model(config)
    model = config.model
    names = [f"model.layers.{i}.{linear.name}" for i in range(model.num_layers) for linear in block_linears(model)]

    def convert(dealt: list[str]) -> list[_Converted]:
        return [_convert(reader, name, old, new, directory) for name in dealt]

    done: list[_Converted] = []
    for first in range(0, len(names), env.world_size):
        mine = names[first + env.rank : first + env.rank + 1]
        for layer in chain.from_iterable(env.together(partial(convert, mine))):
            done.append(layer)
            if config.reparam.method not in ("full", "relora", *PROJECTED_METHODS):  # whose dense weights are exact
                report(f"{layer.name}: converted with a relative error of {layer.error:.4f}")
    reader.check_supports(join_fingerprints((each.name, each.support) for each in done if each.support is not None))
    report(f"converted {len(done)} linear layers from {before.reparam.method} to {config.reparam.method}")
    return TensorReader(directory, [layer.file for layer in done])


def _convert(reader: CheckpointReader, name: str, old: nn.Module, new: nn.Module, directory: Path) -> _Converted:
    """Converts a layer and writes its new parameters to a file.

    Args:
        reader: The checkpoint.
        name: Name of the layer.
        old: The model of the checkpoint, on the meta device.
        new: The new model, on the meta device.
        directory: Directory of the file.
    """
    source, target = old.get_submodule(name), new.get_submodule(name)
    reader.fill(source, name)
    W = _dense(source)
    support = source.support.fingerprint() if isinstance(source, SLLinear) else None
    source.to("meta")
    target.to_empty(device="cpu").float()
    _approximate(target, W)
    error = float((_dense(target) - W).norm() / W.norm().clamp(min=torch.finfo(W.dtype).tiny))
    file = f"{name}.safetensors"
    with writing(f"the converted layer {directory / file}"):
        save_ranges(
            directory / file,
            (
                (TensorRange.whole(f"model.{name}.{key}", tuple(parameter.shape)), parameter.detach().view(-1))
                for key, parameter in target.named_parameters()
            ),
        )
    target.to("meta")
    return _Converted(name, file, error, support)


def _dense(layer: nn.Module) -> Tensor:
    """Returns the weight W, (m, n), of a linear layer of any method."""
    if isinstance(layer, SLLinear | LowRankLinear | ReloraLinear):
        return layer.dense_weight()
    return layer.get_parameter("weight").detach()


@torch.no_grad()
def _approximate(layer: nn.Module, W: Tensor) -> None:
    """Sets the parameters of a linear layer of any method, so that its weight is close to W, (m, n).

    S takes a single sweep. A second one takes as long again, and lowered the error by 1 % or less for made-up weights
    whose singular values decay as a power (by 5 % for random ones, whose error is 85 %).
    """
    if isinstance(layer, SLLinear):
        values = dict(zip("BAV", fit(W, layer.rank, layer.scale, layer.support), strict=True))
    elif isinstance(layer, LowRankLinear):
        values = dict(zip("BA", low_rank(W, layer.rank, layer.scale), strict=True))
    else:
        values = {"weight": W}
    if isinstance(layer, ReloraLinear):  # W keeps all of it, and the factors start as in any other run
        layer.reset_parameters()
    for key, value in values.items():
        layer.get_parameter(key).copy_(value)
