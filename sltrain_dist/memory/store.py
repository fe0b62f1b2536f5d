"""Finds recordings (no torch unless one is missing): in this process, on disk, or by making them.

A recording is kept on disk under the hash of the sources that were recorded, torch's version, and what it depends on.
A file that is damaged, or cannot be read, is recorded anew; where nothing can be written, recordings live in this
process alone, and :data:`problems` says why.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

import sltrain_dist
from sltrain_dist.config.paths import default_cache_dir
from sltrain_dist.config.rules import is_recomputed, loss_chunk_tokens
from sltrain_dist.config.schema import MEMORY, Config, OptimConfig
from sltrain_dist.files import write_whole
from sltrain_dist.memory.recording import (
    EndsRecording,
    EvaluationRecording,
    LayerRecording,
    PublishedRecording,
    Recording,
    StepRecording,
    dumps,
    loads,
)
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.optim.state_layout import Place, decays

_SOURCES = (
    "config/rules.py",
    "numerics",
    "sparse_lowrank",
    "optim",
    "models",
    "parallel",
    "tracking/live_bytes.py",
    "memory",
    "plan/paper",
)
"""What a recording may depend on. More than what it does: recording anew takes little, a stale recording is wrong."""
_WORTH_PROCESSES = 8
"""Missing recordings from which on processes are started, which takes seconds."""
_KEPT_S = 30 * 24 * 3600
"""Seconds for which another version's recordings are kept after the last of them was made."""

_KINDS: dict[str, type[Recording]] = {
    "layer": LayerRecording,
    "ends": EndsRecording,
    "evaluation": EvaluationRecording,
    "step": StepRecording,
    "published": PublishedRecording,
}

problems: list[str] = []
"""Why recordings cannot be kept on disk; empty where they can."""


@dataclass(frozen=True)
class Request:
    """A recording that is wanted.

    Attributes:
        kind: What of.
        key: All that it depends on, as JSON.
        arguments: For what makes it.
        device: Whose operators. Those of this machine's CPU depend on its number of threads, and are not kept on disk.
        make: Makes it; None: :mod:`sltrain_dist.memory.record`.
    """

    kind: Literal["layer", "ends", "evaluation", "step", "published"]
    key: str
    arguments: tuple[Any, ...] = field(compare=False, repr=False)
    device: DeviceType = "cuda"
    make: Callable[..., Recording] | None = field(default=None, compare=False, repr=False)

    def get(self) -> Any:
        """The recording."""
        if self not in _found:
            _found[self] = _read(self) or self._record()
        return _found[self]

    def is_known(self) -> bool:
        """Whether it need not be recorded."""
        if self not in _found:
            read = _read(self)
            if read is None:
                return False
            _found[self] = read
        return True

    def _record(self) -> Recording:
        with _recording:
            recording = (self.make or self._make())(*self.arguments)
        _write(self, recording)
        return recording

    def _make(self) -> Callable[..., Recording]:
        from sltrain_dist.memory import record  # not at the top: torch takes seconds to import

        make: dict[str, Callable[..., Recording]] = {
            "layer": record.record_layer,
            "ends": record.record_ends,
            "evaluation": record.record_evaluation,
            "step": record.record_step,
        }
        return make[self.kind]


_found: dict[Request, Recording] = {}
_recording = threading.Lock()
"""One thread records at a time: a GPU is emulated in the whole process."""


def record_missing(wanted: Iterable[Request], workers: int, report: Callable[[int, int], None]) -> None:
    """Makes recordings that are missing, in several processes where there are many.

    Args:
        wanted: Recordings that will be asked for.
        workers: Processes.
        report: Called now and then with (recordings made, recordings to make).
    """
    missing = [request for request in dict.fromkeys(wanted) if not request.is_known()]
    if workers == 1 or len(missing) < _WORTH_PROCESSES:
        return  # each is made when it is asked for
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    report(0, len(missing))
    # Not forked: the caller may have threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done, (request, recording) in enumerate(zip(missing, pool.map(_get, missing), strict=True), start=1):
            _found[request] = recording
            if done * 10 // len(missing) > (done - 1) * 10 // len(missing):
                report(done, len(missing))


def _get(request: Request) -> Any:
    return request.get()


def layer_requests(config: Config, device: DeviceType) -> tuple[list[Request], tuple[int, ...]]:
    """Asks for the distinct decoder layers of a run; and which of them each layer is, the first layer first."""
    policies = [_checkpointing(config, index) for index in range(config.model.num_layers)]
    distinct = list(dict.fromkeys(policies))
    requests = [
        Request("layer", *_of_layer(config, policy, config.train.micro_batch, device), device) for policy in distinct
    ]
    return requests, tuple(map(distinct.index, policies))


def evaluation_request(config: Config, micro_batch: int, device: DeviceType) -> Request:
    """Asks for a forward pass of an evaluation."""
    layer, arguments = _of_layer(config, _NO_CHECKPOINTING, micro_batch, device)
    return Request("evaluation", _key(layer=layer, ends=_of_ends(config, micro_batch, device)), arguments, device)


def ends_request(config: Config, micro_batch: int, device: DeviceType) -> Request:
    """Asks for what is before and after the layers."""
    key = _of_ends(config, micro_batch, device)
    return Request("ends", key, (_of_one_layer(config, _NO_CHECKPOINTING), micro_batch, device), device)


def step_request(
    optim: OptimConfig, dtype: str, part: Place, device: DeviceType, *, int8: bool, low_bit: bool
) -> Request:
    """Asks for the optimizer's step of a part of a parameter.

    Args:
        optim: Optimizer settings.
        dtype: Type of the parameter, as torch calls it.
        part: What is stepped. Of its name matters whether weight decay applies.
        device: Whose operators.
        int8: Whether it is an int8 weight.
        low_bit: Whether int8 weights are stepped by the same optimizer.
    """
    part = Place("weight" if decays(part.name, optim) else "norm", part.shape, part.start, part.count, part.borders)
    key = _key(
        optim=_of(optim), dtype=dtype, shape=part.shape, start=part.start, count=part.count, borders=part.borders,
        name=part.name, device=device, int8=int8, low_bit=low_bit,
    )  # fmt: skip
    return Request("step", key, (optim, dtype, part, device, int8, low_bit), device)


def published_request(config: Config, make: Callable[[Config], PublishedRecording]) -> Request:
    """Asks for the code that was published with the paper, which `make` records."""
    key = _key(
        model=_of(config.model, but=frozenset({"num_layers"})),
        reparam=_of(config.reparam),
        optim=_of(config.optim),
        checkpointing=config.train.activation_checkpointing,
        micro_batch=config.train.micro_batch,
        seq_len=config.data.seq_len,
    )
    return Request("published", key, (_of_one_layer(config, ()),), make=make)


def _of_layer(
    config: Config, checkpointing: Checkpointing, micro_batch: int, device: DeviceType
) -> tuple[str, tuple[Any, ...]]:
    """(key, arguments)."""
    gathers = config.parallel.engine == "fsdp" and config.train.dtype == "mixed"
    key = _key(
        model=_of(config.model, but=frozenset({"num_layers", "vocab_size", "tie_head"})),
        reparam=_of(config.reparam),
        dtype=config.train.dtype,
        gathered_in_bf16=config.parallel.shard if gathers else None,
        checkpointing=checkpointing,
        micro_batch=micro_batch,
        seq_len=config.data.seq_len,
        reset_attention=config.data.reset_attention,
        device=device,
    )
    return key, (_of_one_layer(config, checkpointing), micro_batch, device)


def _of_ends(config: Config, micro_batch: int, device: DeviceType) -> str:
    return _key(
        model=_of(config.model, but=frozenset({"num_layers", "intermediate_size"})),
        weight_bits=config.reparam.weight_bits,
        dtype=config.train.dtype,
        loss_chunk_tokens=loss_chunk_tokens(config),
        micro_batch=micro_batch,
        seq_len=config.data.seq_len,
        reset_attention=config.data.reset_attention,
        device=device,
    )


Checkpointing = tuple[tuple[str, str], ...]
"""Settings of activation checkpointing, (key, value) each."""
_NO_CHECKPOINTING: Checkpointing = (("activation_checkpointing", "none"),)


def _checkpointing(config: Config, index: int) -> Checkpointing:
    """Settings with which the only layer of a model is checkpointed as layer number `index` is here."""
    train = config.train
    if not is_recomputed(index, train):
        return _NO_CHECKPOINTING
    if train.activation_checkpointing == "full" or train.checkpoint_policy == "blocks":
        return (("activation_checkpointing", "full"),)
    return (("activation_checkpointing", "selective"), ("checkpoint_policy", train.checkpoint_policy))


def _of_one_layer(config: Config, checkpointing: Checkpointing) -> Config:
    """The run cut down to one layer, uncompiled."""
    model = config.model.model_copy(update={"num_layers": 1})
    train = config.train.model_copy(update={**dict(checkpointing), "compile": False})
    return config.model_copy(update={"model": model, "train": train})


@lru_cache(4096)
def _of(section: BaseModel, but: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of a section that memory depends on."""
    fields = type(section).model_fields
    return {name: getattr(section, name) for name in fields if MEMORY in fields[name].metadata and name not in but}


def _key(**values: Any) -> str:
    return json.dumps(values, sort_keys=True)


# On disk


@cache
def directory() -> Path:
    """Where recordings of this version are kept."""
    return default_cache_dir() / "recordings" / _version()


def _version() -> str:
    """Changes whenever a recording may."""
    root = Path(sltrain_dist.__file__).parent
    digest = hashlib.sha256(importlib.metadata.version("torch").encode())
    for path in sorted(_files(root)):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _files(root: Path) -> Iterator[Path]:
    for source in _SOURCES:
        path = root / source
        yield from path.rglob("*.py") if path.is_dir() else (path,)


def _path(request: Request) -> Path:
    return directory() / f"{hashlib.sha256(f'{request.kind} {request.key}'.encode()).hexdigest()[:40]}.json"


def _read(request: Request) -> Recording | None:
    """A recording from disk; None where there is no whole one."""
    if request.device == "cpu":
        return None
    try:
        digest, key, text = _path(request).read_bytes().split(b"\n", 2)
        if digest.decode() == _digest(key, text) and key.decode() == request.key:
            return loads(_KINDS[request.kind], text)
    except (OSError, ValueError):
        pass
    return None


def _write(request: Request, recording: Recording) -> None:
    if problems or request.device == "cpu":
        return
    key, text = request.key.encode(), dumps(recording)
    try:
        if not directory().exists():
            _make_directory()
        write_whole(_path(request), b"\n".join((_digest(key, text).encode(), key, text)))
    except OSError as error:
        problems.append(f"{directory()}: {error.strerror or error}")


def _digest(key: bytes, text: bytes) -> str:
    return hashlib.sha256(key + b"\n" + text).hexdigest()


def _make_directory() -> None:
    """Makes the directory, and removes those of other versions that are old."""
    directory().mkdir(parents=True, exist_ok=True)
    for other in directory().parent.iterdir():
        with suppress(OSError):
            if other != directory() and time.time() - other.stat().st_mtime > _KEPT_S:
                shutil.rmtree(other)
