"""Reading of checkpoints, range by range."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sltrain_dist.checkpoint.contents import TensorFiles, damage, read_state
from sltrain_dist.checkpoint.manifest import CONFIG, TOKENIZER, list_checkpoints, read_manifest
from sltrain_dist.config.load import load_config
from sltrain_dist.config.run_files import CHECKPOINTS
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import CheckpointError, ConfigError
from sltrain_dist.parallel.pieces import load_values


class TensorReader:
    """A reader for ranges of named tensors in the files of a directory.

    Args:
        path: The directory.
        names: Its tensor files.

    Attributes:
        shapes: Shapes of all tensors, by name.

    Raises:
        CheckpointError: A file cannot be read.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        opened = TensorFiles(path, names, "pt")
        self.path, self._files, self._tensors = path, opened.files, opened.tensors
        self.shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Returns elements start … start + length − 1 of a flattened tensor, in the type that was saved.

        Raises:
            CheckpointError: The files do not have them.
        """
        tensor = self._tensors.get(name)
        pieces = []
        for first, stop, file, key in tensor.ranges if tensor else ():
            low, high = max(first, start), min(stop, start + length)
            if low < high:
                pieces.append(self._files[file].get_slice(key)[low - first : high - first])
        if not pieces or sum(map(len, pieces)) != length:
            raise CheckpointError(f"{self.path} does not contain {name}[{start}:{start + length}]")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class CheckpointReader(TensorReader):
    """A reader for the tensors, the run's state and the configuration in a checkpoint.

    Args:
        path: The checkpoint's directory.

    Attributes:
        step: Number of updates made.
        state: The `state` that :meth:`CheckpointStore.save` was called with.

    Raises:
        CheckpointError: A file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        manifest = read_manifest(path)
        super().__init__(path, manifest.tensor_files)
        self.step, self.state = manifest.step, read_state(path)

    def config(self) -> Config:
        """Returns the configuration that the checkpoint was saved with.

        Raises:
            CheckpointError: It cannot be read, or is not valid in this version.
        """
        try:
            return load_config(self.path / CONFIG)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / CONFIG} cannot be read: {error}") from None

    def tokenizer(self) -> Path:
        """Returns the path of the tokenizer that was saved with the weights.

        Raises:
            CheckpointError: The checkpoint has none.
        """
        if not (self.path / TOKENIZER).is_file():
            raise CheckpointError(f"{self.path} was saved without its tokenizer")
        return self.path / TOKENIZER

    def check_supports(self, fingerprint: str) -> None:
        """Checks that a model has the supports that the values of S in the checkpoint belong to.

        Args:
            fingerprint: The fingerprint of all supports of the model.

        Raises:
            CheckpointError: They are other ones.
        """
        saved = self.state.get("supports")
        if saved != fingerprint:
            raise CheckpointError(
                f"{self.path} was made with other supports (fingerprint {saved}, here {fingerprint}), although seed "
                "and model are the same: this version draws them differently; use the version that saved it "
                f"({self.state.get('code', 'one before 27 November 2026')})"
            )

    def fill(self, layer: nn.Module, name: str) -> None:
        """Allocates a layer of a model on the meta device on the CPU, in float32, and loads its parameters.

        Raises:
            CheckpointError: The checkpoint does not have them.
        """
        layer.to_empty(device="cpu").float()
        for key, parameter in layer.named_parameters():
            load_values(self.read, f"{name}.{key}", parameter)


def open_newest(path: Path) -> CheckpointReader:
    """Opens a checkpoint after comparing its files with their hashes.

    Args:
        path: The checkpoint, or a run directory (its newest checkpoint).

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
    """
    kept = list_checkpoints(path / CHECKPOINTS)
    checkpoint = kept[-1][1] if kept else path
    problem = damage(checkpoint)
    if problem is not None:
        raise CheckpointError(problem)
    return CheckpointReader(checkpoint)
