"""Saving and reading checkpoints: pieces of named tensors in safetensors files, one file per rank.

A piece is a contiguous range of a flattened tensor, so that ZeRO's flat partitions and whole replicas are
saved as they lie, without gathering, and any number of ranks can read any range back.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sltrain_dist.checkpoint.contents import TensorFiles, read_state, senseless
from sltrain_dist.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    STATE,
    TOKENIZER,
    FileEntry,
    changed_file,
    checkpoint_name,
    file_entry,
    list_checkpoints,
    list_directories,
    read_manifest,
    tensor_file,
    write_manifest,
)
from sltrain_dist.config.load import load_config
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import CheckpointError, ConfigError, DivergedError, StorageError
from sltrain_dist.files import make_directory, storage_message, sync_path, write_synced
from sltrain_dist.parallel.pieces import Chunk
from sltrain_dist.runtime.environment import Environment

T = TypeVar("T")

Report = Callable[[str], None]
"""Takes a line of text for the user."""

_HIDDEN = re.compile(r"\.(incomplete|replaced|deleted)-(step_\d{8,18})(.*)", re.ASCII)
"""Directories that are on their way in or out: what for, the checkpoint's name, and what sets them apart."""


class CheckpointStore:
    """The checkpoints of one run. All ranks call the same methods in the same order.

    Args:
        directory: `<run_dir>/checkpoints`.
        env: This process among all.
        keep: Newest checkpoints to keep.
        keep_every: Checkpoints of multiples of so many updates are never deleted; 0: no such ones.
    """

    def __init__(self, directory: Path, env: Environment, keep: int, keep_every: int = 0) -> None:
        self._directory, self._env, self._keep, self._keep_every = directory, env, keep, keep_every

    def save(
        self,
        step: int,
        chunks: Iterable[Chunk],
        state: Mapping[str, Any],
        config_yaml: str,
        tokenizer: Path | None = None,
        *,
        warn: Report = print,
    ) -> Path:
        """Writes a checkpoint: everything into a temporary directory, the manifest last, then one rename.

        Args:
            step: Updates made.
            chunks: This rank's pieces.
            state: JSON-able state of the run; the main rank's is written.
            config_yaml: The resolved configuration.
            tokenizer: The SentencePiece model, of which a copy is kept with the weights.
            warn: Called on the main rank with what could not be cleared away after the checkpoint was complete.

        Raises:
            StorageError: A rank could not write. Earlier checkpoints are untouched, and nothing of this one is left.
            DivergedError: A weight or an optimizer state is not finite; likewise.
        """
        final = self._directory / checkpoint_name(step)
        token = uuid.uuid4().hex[:8]
        try:
            temporary = Path(self._together(lambda: self._prepare(final, token))[0])
            self._together(lambda: self._write_rest(temporary, state, config_yaml, tokenizer))
            entries = self._together(lambda: self._write_tensors(temporary, chunks))
            files = {name: entry for part in entries for name, entry in part.items()}
            self._together(lambda: self._finish(temporary, final, step, files))
        except Exception:
            if self._env.is_main:
                self._clear()  # what cannot go now goes at the next start
            raise
        if self._env.is_main:
            for problem in self._delete_old(final):
                warn(problem)
        return final

    def recover(self, report: Report) -> None:
        """Clears up after a save that was killed. To be called before anything else, and by the run alone.

        Args:
            report: Takes what could not be cleared away.
        """
        problems = self._env.gather(self._clear() if self._env.is_main else [])[0]
        for problem in problems:
            report(problem)

    def newest(self, report: Report) -> Path | None:
        """The newest checkpoint that is undamaged; damaged ones are named through `report` and passed over.

        Raises:
            CheckpointError: There are checkpoints, and all of them are damaged.
        """
        listed = self._together(lambda: list_directories(self._directory) if self._env.is_main else [])[0]
        for _, path in reversed(listed):
            problem = self.check(path)
            if problem is None:
                return path
            report(f"checkpoint passed over: {problem}")
        if listed:
            raise CheckpointError(
                f"every checkpoint in {self._directory} is damaged; restore one, or start in a new run_dir"
            )
        return None

    def holds(self, path: Path) -> bool:
        """Whether `path` is one of this run's own checkpoints, or its run directory."""
        own = self._directory.resolve()
        return path.resolve() in (own.parent, own) or path.resolve().parent == own

    def abandon_after(self, step: int) -> list[Path]:
        """Renames checkpoints of later updates, from which a run that goes back must not go on by mistake.

        Returns:
            What they are called now. They are kept, and never looked at or deleted again.
        """

        def abandon() -> list[Path]:
            later = [path for other, path in list_directories(self._directory) if other > step]
            stamp = time.strftime("%Y%m%dT%H%M%S")
            renamed = [path.rename(_free(path.with_name(f"abandoned-{path.name}-{stamp}"))) for path in later]
            if renamed:
                sync_path(self._directory)
            return renamed

        return self._together(lambda: abandon() if self._env.is_main else [])[0]

    def check(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, or None. The ranks share the reading, and agree on the answer."""
        problems = self._env.gather(changed_file(path, part=self._env.rank, parts=self._env.world_size))
        found = next((problem for problem in problems if problem is not None), None)
        return found if found is not None else self._env.on_main(lambda: senseless(path))

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Runs `action` on every rank; a file that cannot be written is the same error on all of them."""

        def guarded() -> T:
            try:
                return action()
            except OSError as error:
                rank = f"rank {self._env.rank}: " if self._env.world_size > 1 else ""
                message = storage_message(f"{rank}the checkpoint in {self._directory}", error)
                raise StorageError(f"{message}. Earlier checkpoints are untouched") from None

        return self._env.together(guarded)

    def _prepare(self, final: Path, token: str) -> Path:
        temporary = final.with_name(f".incomplete-{final.name}-{token}")
        if self._env.is_main:
            make_directory(self._directory)
            temporary.mkdir()
        return temporary

    def _write_tensors(self, temporary: Path, chunks: Iterable[Chunk]) -> dict[str, FileEntry]:
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for chunk in chunks:
            _check_finite(chunk)
            tensors[f"{chunk.name}@{chunk.start}"] = chunk.data.cpu().contiguous()
            shapes[chunk.name] = chunk.shape
        path = temporary / tensor_file(self._env.rank, self._env.world_size)
        # Slices of one flat partition share storage, which safetensors refuses to guess about.
        unshared = {key: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for key, t in tensors.items()}
        save_tensors(path, unshared, {"shapes": json.dumps(shapes)})
        return {path.name: file_entry(path)}

    def _write_rest(self, temporary: Path, state: Mapping[str, Any], config_yaml: str, tokenizer: Path | None) -> None:
        if not self._env.is_main:
            return
        write_synced(temporary / STATE, json.dumps(state))
        write_synced(temporary / CONFIG, config_yaml)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)
            sync_path(temporary / TOKENIZER)

    def _finish(self, temporary: Path, final: Path, step: int, files: dict[str, FileEntry]) -> None:
        if not self._env.is_main:
            return
        for name in (STATE, CONFIG, TOKENIZER):
            if (temporary / name).exists():
                files[name] = file_entry(temporary / name)
        write_manifest(temporary, step, files)
        sync_path(temporary)
        if final.exists():  # a rerun from an older checkpoint comes by the same step again
            final.rename(temporary.with_name(temporary.name.replace(".incomplete-", ".replaced-", 1)))
        temporary.rename(final)
        sync_path(self._directory)

    def _delete_old(self, newest: Path) -> list[str]:
        """Deletes what need not be kept now that there is a newer checkpoint; returns what could not be."""
        old = [(step, path) for step, path in list_checkpoints(self._directory)[: -self._keep] if path != newest]
        try:
            for step, path in old:
                if not (self._keep_every and step % self._keep_every == 0):
                    # First it stops being a checkpoint, then it goes: a kill in between leaves no half of one.
                    path.rename(_free(path.with_name(f".deleted-{path.name}")))
            sync_path(self._directory)
        except OSError as error:
            return [f"an old checkpoint cannot be deleted: {error}"]
        return self._clear()

    def _clear(self) -> list[str]:
        """Ends what a killed or failed save has begun, and removes what is left of it.

        Returns:
            What could not be cleared away.
        """
        problems = []
        hidden = [(path, match) for path in self._directory.glob(".*") if (match := _HIDDEN.fullmatch(path.name))]
        try:
            for path, (purpose, name, token) in ((path, match.groups()) for path, match in hidden):
                final = path.with_name(name)
                if purpose == "replaced" and not final.exists():
                    new = path.with_name(f".incomplete-{name}{token}")
                    (new if (new / MANIFEST).is_file() else path).rename(final)
                    sync_path(self._directory)
        except OSError as error:
            return [f"the replacement of a checkpoint cannot be ended: {error}"]
        for path, _ in hidden:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            if path.exists():
                problems.append(f"{path} is left of a checkpoint and cannot be deleted; delete it at will")
        return problems


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file with the permissions of any new file, and waits until it is on the disk.

    Raises:
        OSError: It cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777  # as the umask wants it; safetensors' own file is for its owner alone
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    path.chmod(mode)
    sync_path(path)


def _check_finite(chunk: Chunk) -> None:
    """Refuses values from which no run could go on. Takes no memory, other than isfinite()."""
    if not chunk.data.numel() or not chunk.data.is_floating_point():
        return
    if chunk.name.startswith("model."):
        # Where the sum of squares is too large for float32, so is what a forward or backward pass multiplies.
        bounds = [torch.linalg.vector_norm(chunk.data, dtype=torch.float32)]
    else:
        bounds = list(torch.aminmax(chunk.data))
    if not all(math.isfinite(float(bound)) for bound in bounds):
        raise DivergedError(
            f"{chunk.name} is not finite, or close to it, and no checkpoint of it was saved; lower optim.lr, lengthen "
            "optim.warmup_steps, or set optim.clip"
        )


def _free(path: Path) -> Path:
    """`path`, or where there is something already, the same with a number."""
    candidates = chain([path], (path.with_name(f"{path.name}.{number}") for number in count(2)))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))


class CheckpointReader:
    """Reads ranges of named tensors, and the run's state, from a checkpoint.

    Args:
        path: The checkpoint's directory.

    Attributes:
        step: Updates made.
        state: What :meth:`CheckpointStore.save` was given.
        shapes: Of all tensors, by name.

    Raises:
        CheckpointError: A file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        manifest = read_manifest(path)
        opened = TensorFiles(path, manifest.tensor_files, "pt")
        self.path, self.step, self.state = path, manifest.step, read_state(path)
        self._files, self._tensors = opened.files, opened.tensors
        self.shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}

    def config(self) -> Config:
        """The configuration that the checkpoint was saved with.

        Raises:
            CheckpointError: It cannot be read, or this version knows no such configuration.
        """
        try:
            return load_config(self.path / CONFIG)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / CONFIG} cannot be read: {error}") from None

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Elements start … start + length − 1 of a flattened tensor, in the type that was saved.

        Raises:
            CheckpointError: The checkpoint does not hold them.
        """
        tensor = self._tensors.get(name)
        pieces = []
        for first, stop, file, key in tensor.ranges if tensor else ():
            low, high = max(first, start), min(stop, start + length)
            if low < high:
                pieces.append(self._files[file].get_slice(key)[low - first : high - first])
        if not pieces or sum(map(len, pieces)) != length:
            raise CheckpointError(f"{self.path} does not hold {name}[{start}:{start + length}]")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
