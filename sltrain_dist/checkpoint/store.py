"""Saving of checkpoints, with ranges of named tensors in safetensors files, one file per rank.

A range of a flattened tensor is contiguous, so that ZeRO's flat partitions and whole replicas are saved without
gathering or reordering, and any number of ranks can read any range.
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

from sltrain_dist.checkpoint.contents import content_problem
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
    tensor_file,
    write_manifest,
)
from sltrain_dist.config.run_files import CHECKPOINTS
from sltrain_dist.errors import CheckpointError, DivergedError, StorageError
from sltrain_dist.files import make_directory, rename_synced, storage_message, sync_path, write_synced
from sltrain_dist.parallel.pieces import SavedRange
from sltrain_dist.runtime.environment import Environment

T = TypeVar("T")

Report = Callable[[str], None]
"""Shows a line of text to the user."""

_HIDDEN = re.compile(r"\.(incomplete|replaced|deleted)-(step_\d{8,18})(.*)", re.ASCII)
"""Matches temporary directories: (purpose, name of the checkpoint, unique suffix)."""


class CheckpointStore:
    """The checkpoints of one run. All ranks call the same methods in the same order.

    Args:
        directory: `<run_dir>/checkpoints`.
        env: The distributed environment.
        keep: Number of newest checkpoints to keep.
        keep_every: Checkpoints at multiples of this number of updates are never deleted; 0: none are protected.
    """

    def __init__(self, directory: Path, env: Environment, keep: int, keep_every: int = 0) -> None:
        self._directory, self._env, self._keep, self._keep_every = directory, env, keep, keep_every

    def save(
        self,
        step: int,
        ranges: Iterable[SavedRange],
        state: Mapping[str, Any],
        config_yaml: str,
        tokenizer: Path | None = None,
        *,
        warn: Report = print,
    ) -> Path:
        """Writes a checkpoint into a temporary directory, with the manifest last, and renames it to its final name.

        Args:
            step: Number of updates made.
            ranges: Ranges of tensors that this rank saves.
            state: State of the run, which JSON can represent; the main rank's is written.
            config_yaml: The resolved configuration.
            tokenizer: The SentencePiece model, which is copied into the checkpoint.
            warn: Called on the main rank for everything that could not be deleted after the checkpoint was complete.

        Raises:
            StorageError: A rank could not write. Earlier checkpoints are unchanged, and this one is removed.
            DivergedError: A weight or an optimizer state is not finite. Likewise.
        """
        final = self._directory / checkpoint_name(step)
        token = uuid.uuid4().hex[:8]
        try:
            temporary = Path(self._together(lambda: self._prepare(final, token))[0])
            self._together(lambda: self._write_rest(temporary, state, config_yaml, tokenizer))
            entries = self._together(lambda: self._write_tensors(temporary, ranges))
            files = {name: entry for part in entries for name, entry in part.items()}
            self._together(lambda: self._finish(temporary, final, step, files))
        except Exception:
            if self._env.is_main:
                self._clear()  # what cannot be deleted now is deleted at the next start
            raise
        if self._env.is_main:
            for problem in self._delete_old(final):
                warn(problem)
        return final

    def recover(self, report: Report) -> None:
        """Cleans up after a save that was killed. Must be called first, and only by the process that owns the run.

        Args:
            report: Called for everything that could not be deleted.
        """
        problems = self._env.gather(self._clear() if self._env.is_main else [])[0]
        for problem in problems:
            report(problem)

    def newest(self, report: Report, counts: Callable[[int], bool] = lambda step: True) -> Path | None:
        """Returns the newest undamaged checkpoint, or None if there are none; damaged ones are reported and skipped.

        Args:
            report: Shows which are damaged.
            counts: Whether a checkpoint counts, by its number of updates.

        Raises:
            CheckpointError: All existing checkpoints are damaged.
        """
        listed = self._together(lambda: list_directories(self._directory) if self._env.is_main else [])[0]
        listed = [(step, path) for step, path in listed if counts(step)]
        for _, path in reversed(listed):
            problem = self.check(path)
            if problem is None:
                return path
            report(f"checkpoint skipped: {problem}")
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
        """Renames checkpoints of later updates, so that a run that goes back does not resume from them by mistake.

        Returns:
            Their new paths. They are kept, and never read or deleted again.
        """

        def abandon() -> list[Path]:
            later = [path for other, path in list_directories(self._directory) if other > step]
            stamp = time.strftime("%Y%m%dT%H%M%S")
            return [rename_synced(path, _unused(path.with_name(f"abandoned-{path.name}-{stamp}"))) for path in later]

        return self._together(lambda: abandon() if self._env.is_main else [])[0]

    def check(self, path: Path) -> str | None:
        """Says what is wrong with a checkpoint, or returns None. The ranks divide the reading; all return the same."""
        problems = self._env.gather(changed_file(path, part=self._env.rank, parts=self._env.world_size))
        changed = next((problem for problem in problems if problem is not None), None)
        return changed if changed is not None else self._env.on_main(lambda: content_problem(path))

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Runs `action` on every rank; if one cannot write, all raise the same StorageError."""

        def guarded() -> T:
            try:
                return action()
            except OSError as error:
                rank = f"rank {self._env.rank}: " if self._env.world_size > 1 else ""
                message = storage_message(f"{rank}the checkpoint in {self._directory}", error)
                raise StorageError(f"{message}. Earlier checkpoints are unchanged") from None

        return self._env.together(guarded)

    def _prepare(self, final: Path, token: str) -> Path:
        temporary = final.with_name(f".incomplete-{final.name}-{token}")
        if self._env.is_main:
            make_directory(self._directory)
            temporary.mkdir()
        return temporary

    def _write_tensors(self, temporary: Path, ranges: Iterable[SavedRange]) -> dict[str, FileEntry]:
        path = temporary / tensor_file(self._env.rank, self._env.world_size)
        save_ranges(path, ranges)
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
        if final.exists():  # a run that went back to an older checkpoint reaches this step again
            rename_synced(final, temporary.with_name(temporary.name.replace(".incomplete-", ".replaced-", 1)))
        rename_synced(temporary, final)

    def _delete_old(self, newest: Path) -> list[str]:
        """Deletes checkpoints that need not be kept after a newer one; returns what could not be deleted."""
        old = [(step, path) for step, path in list_checkpoints(self._directory)[: -self._keep] if path != newest]
        try:
            for step, path in old:
                if not (self._keep_every and step % self._keep_every == 0):
                    # Rename before deleting, so that a kill in between leaves no partial checkpoint.
                    rename_synced(path, _unused(path.with_name(f".deleted-{path.name}")))
        except OSError as error:
            return [f"an old checkpoint cannot be deleted: {error}"]
        return self._clear()

    def _clear(self) -> list[str]:
        """Completes the replacement of a checkpoint that was interrupted, and deletes temporary directories.

        Returns:
            Descriptions of what could not be deleted.
        """
        problems = []
        temporary = [(path, match) for path in self._directory.glob(".*") if (match := _HIDDEN.fullmatch(path.name))]
        try:
            for path, (purpose, name, token) in ((path, match.groups()) for path, match in temporary):
                final = path.with_name(name)
                if purpose == "replaced" and not final.exists():
                    new = path.with_name(f".incomplete-{name}{token}")
                    rename_synced(new if (new / MANIFEST).is_file() else path, final)
        except OSError as error:
            return [f"the interrupted replacement of a checkpoint cannot be completed: {error}"]
        for path, _ in temporary:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            if path.exists():
                problems.append(f"{path} is left over from a checkpoint and cannot be deleted; delete it by hand")
        return problems


def undamaged_checkpoint(key: str, path: Path, env: Environment, report: Report) -> Path:
    """Returns a checkpoint that a key of the configuration names, by itself or by its run directory (the newest one).

    Raises:
        CheckpointError: There is none, or only damaged ones.
    """
    store = CheckpointStore(path / CHECKPOINTS, env, keep=1)
    if (path / CHECKPOINTS).is_dir():
        newest = store.newest(report)
        if newest is not None:
            return newest
    problem = store.check(path)
    if problem is not None:
        raise CheckpointError(f"{key} = {path}: {problem}")
    return path


def save_ranges(path: Path, ranges: Iterable[SavedRange]) -> None:
    """Writes ranges of tensors to a file that :class:`TensorReader` reads.

    Raises:
        OSError: The file cannot be written.
        DivergedError: A value is not finite, or close to overflow.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part, values in ranges:
        _check_finite(part.name, values)
        tensors[f"{part.name}@{part.start}"] = values.cpu().contiguous()
        shapes[part.name] = part.shape
    # Slices of one flat partition share storage, which safetensors refuses.
    unshared = {key: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for key, t in tensors.items()}
    save_tensors(path, unshared, {"shapes": json.dumps(shapes)})


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file with the usual permissions of new files, and syncs it to disk.

    Raises:
        OSError: The file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777  # by the umask; safetensors creates files for their owner only
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    path.chmod(mode)
    sync_path(path)


def _check_finite(name: str, values: Tensor) -> None:
    """Refuses values that no run could resume from. Unlike isfinite(), takes no additional memory."""
    if not values.numel() or not values.is_floating_point():
        return
    if name.startswith("model."):
        # If the sum of squares overflows float32, so do products in the forward or backward pass.
        bounds = [torch.linalg.vector_norm(values, dtype=torch.float32)]
    else:
        bounds = list(torch.aminmax(values))
    if not all(math.isfinite(float(bound)) for bound in bounds):
        raise DivergedError(
            f"{name} is not finite or close to overflow, and no checkpoint of it was saved; lower optim.lr, "
            "lengthen optim.warmup_steps, or set optim.clip"
        )


def _unused(path: Path) -> Path:
    """Returns `path`, with a number appended if it already exists."""
    candidates = chain([path], (path.with_name(f"{path.name}.{number}") for number in count(2)))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))
