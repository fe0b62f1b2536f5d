"""Saving and reading checkpoints: pieces of named tensors in safetensors files, one file per rank.

A piece is a contiguous range of a flattened tensor, so that ZeRO's flat partitions and whole replicas are
saved as they lie, without gathering, and any number of ranks can read any range back.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sltrain_dist.checkpoint.manifest import (
    MANIFEST,
    checkpoint_name,
    damage,
    file_entry,
    list_checkpoints,
    list_directories,
    sync_path,
    write_manifest,
    write_synced,
)
from sltrain_dist.errors import CheckpointError
from sltrain_dist.parallel.environment import Environment
from sltrain_dist.parallel.held import Chunk

T = TypeVar("T")

TOKENIZER = "tokenizer.model"
REST = ("state.json", "config.yaml", TOKENIZER)
"""Files beside the tensors."""


class CheckpointStore:
    """The checkpoints of one run. All ranks call the same methods in the same order.

    Args:
        directory: `<run_dir>/checkpoints`.
        env: This process among all.
        keep: Newest checkpoints to keep.
    """

    def __init__(self, directory: Path, env: Environment, keep: int) -> None:
        self._directory, self._env, self._keep = directory, env, keep

    def save(
        self, step: int, chunks: Iterable[Chunk], state: dict[str, Any], config_yaml: str, tokenizer: Path | None = None
    ) -> Path:
        """Writes a checkpoint: everything into a temporary directory, the manifest last, then one rename.

        Args:
            step: Updates made.
            chunks: This rank's pieces.
            state: JSON-able state of the run; the main rank's is written.
            config_yaml: The resolved configuration.
            tokenizer: The SentencePiece model, of which a copy is kept with the weights.

        Raises:
            CheckpointError: A rank could not write; earlier checkpoints are untouched.
        """
        final = self._directory / checkpoint_name(step)
        temporary = self._directory / f".incomplete-{checkpoint_name(step)}"
        self._together(lambda: self._prepare(temporary) if self._env.is_main else None)
        self._together(lambda: self._write_rest(temporary, state, config_yaml, tokenizer))
        entries = self._together(lambda: self._write_tensors(temporary, chunks))
        files = {name: entry for part in entries for name, entry in part.items()}
        self._together(lambda: self._finish(temporary, final, step, files))
        return final

    def newest(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint that is undamaged; damaged ones are named through `report` and passed over.

        Raises:
            CheckpointError: There are checkpoints, and all of them are damaged.
        """
        self._together(lambda: self._complete_replacement() if self._env.is_main else None)
        candidates = self._env.gather([str(path) for _, path in list_directories(self._directory)])[0]
        for path in reversed(candidates):
            problem = self.check(Path(path))
            if problem is None:
                return Path(path)
            report(f"checkpoint passed over: {problem}")
        if candidates:
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
            new_names = [path.with_name(f"abandoned-{path.name}-{time.strftime('%Y%m%dT%H%M%S')}") for path in later]
            return [path.rename(new_name) for path, new_name in zip(later, new_names, strict=True)]

        return self._together(lambda: abandon() if self._env.is_main else [])[0]

    def check(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, or None. The ranks share the reading, and agree on the answer."""
        problems = self._env.gather(damage(path, part=self._env.rank, parts=self._env.world_size))
        return next((problem for problem in problems if problem is not None), None)

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Runs `action` on every rank; a file that cannot be written is the same error on all of them."""

        def guarded() -> T:
            try:
                return action()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"rank {self._env.rank} could not write the checkpoint ({error}); earlier ones are untouched"
                ) from None

        return self._env.together(guarded)

    def _prepare(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def _complete_replacement(self) -> None:
        """Makes the second rename of a replacement (see :meth:`_finish`) that a kill has left half done."""
        for replaced in self._directory.glob(".replaced-step_*"):
            final = replaced.with_name(replaced.name.removeprefix(".replaced-"))
            new = replaced.with_name(f".incomplete-{final.name}")
            if not final.exists():
                (new if (new / MANIFEST).is_file() else replaced).rename(final)

    def _write_tensors(self, temporary: Path, chunks: Iterable[Chunk]) -> dict[str, dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for chunk in chunks:
            tensors[f"{chunk.name}@{chunk.start}"] = chunk.data.cpu().contiguous()
            shapes[chunk.name] = chunk.shape
        path = temporary / f"tensors-{self._env.rank:05d}-of-{self._env.world_size:05d}.safetensors"
        # Slices of one flat partition share storage, which safetensors refuses to guess about.
        unshared = {key: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for key, t in tensors.items()}
        save_file(unshared, path, metadata={"shapes": json.dumps(shapes)})
        sync_path(path)
        return {path.name: file_entry(path)}

    def _write_rest(self, temporary: Path, state: dict[str, Any], config_yaml: str, tokenizer: Path | None) -> None:
        if not self._env.is_main:
            return
        write_synced(temporary / "state.json", json.dumps(state))
        write_synced(temporary / "config.yaml", config_yaml)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)
            sync_path(temporary / TOKENIZER)

    def _finish(self, temporary: Path, final: Path, step: int, files: dict[str, Any]) -> None:
        if not self._env.is_main:
            return
        for name in REST:
            if (temporary / name).exists():
                files[name] = file_entry(temporary / name)
        write_manifest(temporary, step, files)
        sync_path(temporary)
        if final.exists():  # a rerun from an older checkpoint comes by the same step again
            replaced = final.with_name(f".replaced-{final.name}")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        for _, old in list_checkpoints(self._directory)[: -self._keep]:
            if old != final:
                # First it stops being a checkpoint, then it goes: a kill in between leaves no half of one.
                old.rename(old.with_name(f".deleted-{old.name}"))
        sync_path(self._directory)
        for leftover in self._directory.glob(".*-step_*"):  # of earlier, killed processes too
            shutil.rmtree(leftover, ignore_errors=True)


class CheckpointReader:
    """Reads ranges of named tensors, and the run's state, from a checkpoint.

    Args:
        path: The checkpoint's directory.

    Raises:
        CheckpointError: A file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[Any] = []
        self._pieces: dict[str, list[tuple[int, int, int, str]]] = {}  # name → (start, end, file, key)
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            self.state: dict[str, Any] = json.loads((path / "state.json").read_text())
            self.config_yaml = (path / "config.yaml").read_text(encoding="utf-8")
            for file_path in sorted(path.glob("tensors-*.safetensors")):
                self._open(file_path)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Elements start … start + length − 1 of a flattened tensor, in the type that was saved.

        Raises:
            CheckpointError: The checkpoint does not hold them.
        """
        result: Tensor | None = None
        filled = 0
        for first, end, file, key in self._pieces.get(name, ()):
            low, high = max(first, start), min(end, start + length)
            if low >= high:
                continue
            piece = self._files[file].get_slice(key)[low - first : high - first]
            if high - low == length:
                return piece
            if result is None:
                result = torch.empty(length, dtype=piece.dtype)
            result[low - start : high - start] = piece
            filled += high - low
        if result is None or filled != length:
            raise CheckpointError(f"{self.path} does not hold {name}[{start}:{start + length}]")
        return result

    def _open(self, file_path: Path) -> None:
        file = safe_open(file_path, framework="pt")
        for name, shape in json.loads(file.metadata()["shapes"]).items():
            self.shapes[name] = tuple(shape)
        for key in file.keys():  # noqa: SIM118 (not a dict)
            name, _, start = key.rpartition("@")
            (length,) = file.get_slice(key).get_shape()
            self._pieces.setdefault(name, []).append((int(start), int(start) + length, len(self._files), key))
        self._files.append(file)
