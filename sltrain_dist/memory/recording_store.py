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
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

import sltrain_dist
from sltrain_dist.config.paths import default_cache_dir
from sltrain_dist.config.schema import MEMORY, Config, DataConfig, OptimConfig, ReparamConfig, Section, TrainConfig
from sltrain_dist.files import write_whole
from sltrain_dist.memory.recording import Recording, dumps, loads
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.optim.state_layout import Place, decays
from sltrain_dist.parallel.placement import Shard

S = TypeVar("S", bound=Section)

_SOURCES = (
    "config/rules.py",
    "config/schema.py",
    "numerics",
    "sparse_lowrank",
    "optim",
    "models",
    "runtime",
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

problems: list[str] = []
"""Why recordings cannot be kept on disk; empty where they can."""


@dataclass(frozen=True)
class Request:
    """A recording that is wanted.

    Attributes:
        make: Module and function of this package that makes it, such as "memory.record:record_layer".
        key: All that it depends on, as JSON.
        device: Whose operators. Those of this machine's CPU depend on its number of threads, and are not kept on disk.
        arguments: For the function: a run in which only what it depends on is set, and more.
    """

    make: str
    key: str
    device: DeviceType
    arguments: tuple[Any, ...] = field(compare=False, repr=False)

    def get(self) -> Recording:
        """The recording."""
        if not self.is_known():
            with _recording:
                _found[self] = resolve_name(f"sltrain_dist.{self.make}")(*self.arguments)  # imports torch
            _write(self, _found[self])
        return _found[self]

    def is_known(self) -> bool:
        """Whether it need not be recorded."""
        if self not in _found and (read := _read(self)) is not None:
            _found[self] = read
        return self in _found


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
        for done, (request, recording) in enumerate(zip(missing, pool.map(Request.get, missing), strict=True), start=1):
            _found[request] = recording
            if done * 10 // len(missing) > (done - 1) * 10 // len(missing):
                report(done, len(missing))


# What each recording depends on


def layer_requests(config: Config, device: DeviceType) -> tuple[list[Request], tuple[int, ...]]:
    """Asks for the distinct decoder layers of a run; and which of them each layer is, the first layer first."""
    micro_batch, gathered = config.train.micro_batch, _gathered(config)
    recomputed = [config.train.is_recomputed(index) for index in range(config.model.num_layers)]
    distinct = list(dict.fromkeys(recomputed))
    settings = (_of_layer(config, micro_batch, again=again) for again in distinct)
    requests = [request("memory.record:record_layer", device, gathered, **sections) for sections in settings]
    return requests, tuple(map(distinct.index, recomputed))


def ends_request(config: Config, device: DeviceType) -> Request:
    """Asks for what is before and after the layers."""
    return request(
        "memory.record:record_ends",
        device,
        model=only_memory(config.model, num_layers=1, intermediate_size=1),
        reparam=ReparamConfig(method="full", weight_bits=config.reparam.weight_bits),
        data=_of_data(config),
        train=_of_loss(config, config.train.micro_batch),
    )


def evaluation_request(config: Config, device: DeviceType) -> Request | None:
    """Asks for a forward pass of an evaluation; None where a run has none."""
    if config.eval.source is None:
        return None
    sections = _of_layer(config, config.eval_micro_batch, again=False)
    sections |= {"model": only_memory(config.model, num_layers=1), "train": _of_loss(config, config.eval_micro_batch)}
    return request("memory.record:record_evaluation", device, _gathered(config), **sections)


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
    return request("memory.record:record_step", device, dtype, part, int8, low_bit, optim=only_memory(optim))


@lru_cache(1 << 14)
def request(make: str, device: DeviceType, *more: Any, **sections: Section) -> Request:
    """Asks for any recording.

    Args:
        make: Module and function that makes it, from a configuration, `more` and the device.
        device: Whose operators.
        more: What else it depends on; dataclasses, and what JSON has.
        sections: Sections of the configuration. What is not set in them, it does not depend on.
    """
    settings = {name: section.model_dump(exclude_unset=True) for name, section in sections.items()}
    key = json.dumps([settings, *more], sort_keys=True, default=asdict)
    return Request(make, key, device, (Config.model_validate(sections), *more, device))


def _of_layer(config: Config, micro_batch: int, *, again: bool) -> dict[str, Section]:
    """Settings that a decoder layer depends on; `again`: its activations are computed again."""
    train, checkpointing = config.train, {}
    if again and (train.activation_checkpointing == "full" or train.checkpoint_policy == "blocks"):
        checkpointing = {"activation_checkpointing": "full"}
    elif again:
        checkpointing = {"activation_checkpointing": "selective", "checkpoint_policy": train.checkpoint_policy}
    return {
        "model": only_memory(config.model, num_layers=1, vocab_size=1, tie_head=False),
        "reparam": only_memory(config.reparam),
        "data": _of_data(config),
        "train": TrainConfig.model_validate({"dtype": train.dtype, "micro_batch": micro_batch, **checkpointing}),
    }


def _gathered(config: Config) -> Shard | None:
    """What mixed precision under FSDP2 gathers in the type of matrix products."""
    gathers = config.parallel.engine == "fsdp" and config.train.precision.is_mixed
    return config.parallel.shard if gathers else None


def _of_data(config: Config) -> DataConfig:
    return DataConfig(seq_len=config.data.seq_len, reset_attention=config.data.reset_attention)


def _of_loss(config: Config, micro_batch: int) -> TrainConfig:
    chunk = config.train.chunk_tokens(config.model.vocab_size)
    return TrainConfig(dtype=config.train.dtype, micro_batch=micro_batch, loss_chunk_tokens=chunk)


@lru_cache(4096)
def only_memory(section: S, **changed: Any) -> S:
    """A section in which only those fields are set that memory depends on, some of them to other values."""
    fields = type(section).model_fields
    kept = {name: getattr(section, name) for name in fields if MEMORY in fields[name].metadata}
    return type(section)(**{**kept, **changed})


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
    return directory() / f"{hashlib.sha256(f'{request.make} {request.key}'.encode()).hexdigest()[:40]}.json"


def _read(request: Request) -> Recording | None:
    """A recording from disk; None where there is no whole one."""
    if request.device == "cpu":
        return None
    try:
        digest, key, text = _path(request).read_bytes().split(b"\n", 2)
        if digest.decode() == _digest(key, text) and key.decode() == request.key:
            return loads(text)
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
