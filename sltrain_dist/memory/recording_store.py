"""A cache of recordings in memory and on disk, which makes missing ones (no torch unless one is missing).

A file is found by a hash of the recorded sources, torch's version, and the settings that the recording depends on.
A recording whose file is damaged or unreadable is made again. If files cannot be written, recordings are cached in this
process only, and :data:`problems` says why.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

import sltrain_dist
from sltrain_dist.config.paths import default_cache_dir
from sltrain_dist.config.schema import (
    MEMORY,
    Config,
    DataConfig,
    Method,
    OptimConfig,
    ReparamConfig,
    Section,
    TrainConfig,
)
from sltrain_dist.files import write_whole
from sltrain_dist.memory.recording import Recording, dumps, loads
from sltrain_dist.models.count import factor_pairs
from sltrain_dist.numerics.device import DeviceType
from sltrain_dist.numerics.tensor_range import TensorRange
from sltrain_dist.optim.projected.settings import projects
from sltrain_dist.optim.state_layout import decays
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
"""Sources that a recording may depend on: rather too many, because a new recording is cheap and a stale one wrong."""
_MIN_FOR_PROCESSES = 8
"""Smallest number of missing recordings for which processes are started, which takes seconds."""
_MAX_AGE_S = 30 * 24 * 3600
"""Seconds for which recordings of another version are kept after the last one was made."""

problems: list[str] = []
"""Reasons why recordings cannot be written to disk; empty if they can."""


@dataclass(frozen=True)
class Request:
    """A request for a recording.

    Attributes:
        make: Module and function of this package that makes the recording, such as "memory.record:record_layer".
        key: Everything that the recording depends on, as JSON.
        device: Device whose operators are recorded. Recordings of the CPU's operators depend on the machine's number of
            threads, and are not written to disk.
        arguments: Arguments of the function: a configuration in which only the relevant fields are set, and more.
    """

    make: str
    key: str
    device: DeviceType
    arguments: tuple[Any, ...] = field(compare=False, repr=False)

    def get(self) -> Recording:
        """Returns the recording, and makes it if it is missing."""
        if not self.is_known():
            with _recording_lock:
                if self not in _found:  # another thread may have made it in the meantime
                    _found[self] = resolve_name(f"sltrain_dist.{self.make}")(*self.arguments)  # imports torch
                    _write(self, _found[self])
        return _found[self]

    def is_known(self) -> bool:
        """Returns whether the recording is in memory or on disk."""
        if self not in _found and (read := _read(self)) is not None:
            _found[self] = read
        return self in _found


_found: dict[Request, Recording] = {}
_recording_lock = threading.Lock()
"""Lock that lets one thread record at a time, because a GPU is emulated in the whole process."""


def record_missing(requests: Iterable[Request], workers: int, report: Callable[[int, int], None]) -> None:
    """Makes the missing ones of several recordings in parallel processes, if there are enough of them.

    Args:
        requests: The recordings that will be needed.
        workers: Number of processes.
        report: Called about ten times with (recordings made, recordings to make).
    """
    missing = [request for request in dict.fromkeys(requests) if not request.is_known()]
    if workers == 1 or len(missing) < _MIN_FOR_PROCESSES:
        return  # Request.get makes each of them
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    report(0, len(missing))
    # A fork would be unsafe, because the caller may have threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done, (request, recording) in enumerate(zip(missing, pool.map(Request.get, missing), strict=True), start=1):
            _found[request] = recording
            if done * 10 // len(missing) > (done - 1) * 10 // len(missing):
                report(done, len(missing))


# What each recording depends on


def layer_requests(config: Config, device: DeviceType) -> tuple[list[Request], tuple[int, ...]]:
    """Returns requests for the distinct decoder layers of a run, and the index of its request for each layer."""
    micro_batch, gathered, layers = config.train.micro_batch, _gathered(config), config.model.num_layers
    kinds = [(config.train.is_recomputed(index), config.reparam.method_of(index, layers)) for index in range(layers)]
    distinct = list(dict.fromkeys(kinds))
    settings = (_layer_sections(config, method, micro_batch, recompute=recompute) for recompute, method in distinct)
    requests = [request("memory.record:record_layer", device, gathered, **sections) for sections in settings]
    return requests, tuple(map(distinct.index, kinds))


def ends_request(config: Config, device: DeviceType) -> Request:
    """Returns the request for the parts of the model before and after the layers."""
    return request(
        "memory.record:record_ends",
        device,
        model=only_memory(config.model, num_layers=1, intermediate_size=1),
        reparam=_reparam_section(config, "full"),
        data=_data_section(config),
        train=_loss_section(config, config.train.micro_batch),
    )


def evaluation_requests(config: Config, device: DeviceType) -> tuple[list[Request], tuple[int, ...]]:
    """Returns requests for the forward pass of an evaluation, one for each distinct decoder layer, and the index of its
    request for each layer. Both are empty if the run has no evaluation."""
    if config.eval.source is None:
        return [], ()
    layers, micro_batch = config.model.num_layers, config.eval_micro_batch
    methods = [config.reparam.method_of(index, layers) for index in range(layers)]
    distinct = list(dict.fromkeys(methods))
    requests = []
    for method in distinct:
        sections = _layer_sections(config, method, micro_batch, recompute=False)
        sections["model"] = only_memory(config.model, num_layers=1)
        sections["train"] = _loss_section(config, micro_batch)
        requests.append(request("memory.record:record_evaluation", device, _gathered(config), **sections))
    return requests, tuple(map(distinct.index, methods))


def step_request(
    optim: OptimConfig, dtype: str, part: TensorRange, device: DeviceType, *, int8: bool, low_bit: bool
) -> Request:
    """Returns the request for the optimizer step of a part of a parameter.

    Args:
        optim: Optimizer settings.
        dtype: Type of the parameter, by its name in torch.
        part: The part. Its name only determines whether weight decay applies, and whether the gradient is projected.
        device: Device whose operators are recorded.
        int8: Whether the parameter is an int8 weight.
        low_bit: Whether the same optimizer also steps int8 weights.
    """
    if projects(optim, part.name):  # with a new projection, which takes the most
        part, optim = replace(part, name="mlp.up_proj.weight"), only_memory(optim, projection_every=1)
    else:
        part, optim = replace(part, name="weight" if decays(part.name, optim) else "norm"), only_memory(optim)
    return request("memory.record:record_step", device, dtype, part, int8, low_bit, optim=optim)


def matrix_job_request(optim: OptimConfig, dtype: str, parts: Sequence[TensorRange], device: DeviceType) -> Request:
    """Returns the request for a job of `optim.factors`, see :func:`sltrain_dist.memory.record_matrices`.

    Of the names of the parts, only the last components matter, such as "B" of "mlp.up_proj.B".
    """
    parts = tuple(replace(part, name=f"any_proj.{part.name.rpartition('.')[2]}") for part in parts)
    return request("memory.record_matrices:record_matrix_job", device, dtype, parts, optim=only_memory(optim))


def restart_requests(config: Config, device: DeviceType) -> Counter[Request]:
    """Returns requests for the new factorizations, or merges, of a restart, and the number of layers of each; empty
    without restarts."""
    if config.reparam.restart_every == 0:
        return Counter()
    method: Method = "relora" if config.reparam.method == "relora" else "sltrain"  # whose restarts are those of lowrank
    return Counter(
        request("memory.record:record_restart", device, m, n, rank, reparam=ReparamConfig(method=method))
        for (_, (m, rank)), (_, (_, n)) in factor_pairs(config.model, config.reparam)
    )


@lru_cache(1 << 14)
def request(make: str, device: DeviceType, *more: Any, **sections: Section) -> Request:
    """Returns the request for a recording.

    Args:
        make: Module and function that makes it from a configuration, `more` and the device.
        device: Device whose operators are recorded.
        more: Other values that it depends on: dataclasses and types of JSON.
        sections: Sections of the configuration in which only the fields are set that it depends on.
    """
    settings = {name: section.model_dump(exclude_unset=True) for name, section in sections.items()}
    key = json.dumps([settings, *more], sort_keys=True, default=asdict)
    return Request(make, key, device, (Config.model_validate(sections), *more, device))


def _layer_sections(config: Config, method: Method, micro_batch: int, *, recompute: bool) -> dict[str, Section]:
    """Returns the settings that a decoder layer of a method depends on; `recompute`: its activations are recomputed."""
    train, checkpointing = config.train, {}
    if recompute and (train.activation_checkpointing == "full" or train.checkpoint_policy == "blocks"):
        checkpointing = {"activation_checkpointing": "full"}
    elif recompute:
        checkpointing = {"activation_checkpointing": "selective", "checkpoint_policy": train.checkpoint_policy}
    return {
        "model": only_memory(config.model, num_layers=1, vocab_size=1, tie_head=False),
        "reparam": _reparam_section(config, method),
        "data": _data_section(config),
        "train": TrainConfig.model_validate({"dtype": train.dtype, "micro_batch": micro_batch, **checkpointing}),
    }


def _gathered(config: Config) -> Shard | None:
    """Returns which parameters FSDP2 gathers in the type of matrix products; None without mixed precision."""
    gathers = config.parallel.engine == "fsdp" and config.train.precision.is_mixed
    return config.parallel.shard if gathers else None


def _reparam_section(config: Config, method: Method) -> ReparamConfig:
    """Returns the settings of a model whose only decoder layer has this method."""
    if method == "full":
        return ReparamConfig(method="full", weight_bits=config.reparam.weight_bits)
    return only_memory(config.reparam, dense_layers=(), restart_every=0)


def _data_section(config: Config) -> DataConfig:
    return DataConfig(seq_len=config.data.seq_len, reset_attention=config.data.reset_attention)


def _loss_section(config: Config, micro_batch: int) -> TrainConfig:
    chunk = config.train.chunk_tokens(config.model.vocab_size)
    return TrainConfig(dtype=config.train.dtype, micro_batch=micro_batch, loss_chunk_tokens=chunk)


@lru_cache(4096)
def only_memory(section: S, **changed: Any) -> S:
    """Returns a section with only those fields set that memory depends on, some of them `changed`."""
    fields = type(section).model_fields
    kept = {name: getattr(section, name) for name in fields if MEMORY in fields[name].metadata}
    return type(section)(**{**kept, **changed})


# On disk


@cache
def directory() -> Path:
    """Returns the directory of this version's recordings."""
    return default_cache_dir() / "recordings" / _version()


def _version() -> str:
    """Returns a hash of the recorded sources and torch's version, which changes whenever a recording may change."""
    root = Path(sltrain_dist.__file__).parent
    digest = hashlib.sha256(importlib.metadata.version("torch").encode())
    for path in sorted(_source_files(root)):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _source_files(root: Path) -> Iterator[Path]:
    for source in _SOURCES:
        path = root / source
        yield from path.rglob("*.py") if path.is_dir() else (path,)


def _path(request: Request) -> Path:
    return directory() / f"{hashlib.sha256(f'{request.make} {request.key}'.encode()).hexdigest()[:40]}.json"


def _read(request: Request) -> Recording | None:
    """Returns a recording from disk; None if its file is missing or damaged."""
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
    """Creates the directory, and removes old directories of other versions."""
    directory().mkdir(parents=True, exist_ok=True)
    for other in directory().parent.iterdir():
        with suppress(OSError):
            if other != directory() and time.time() - other.stat().st_mtime > _MAX_AGE_S:
                shutil.rmtree(other)
