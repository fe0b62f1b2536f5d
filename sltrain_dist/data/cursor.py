"""The data cursor in a checkpoint: the positions of all streams, and the data and settings they refer to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sltrain_dist.data.sources.identity import CONTENT_DIGITS, UNKNOWN
from sltrain_dist.data.sources.kinds import MAX_DOCUMENT_BYTES
from sltrain_dist.data.stream.virtual_stream import StreamSettings, StreamState
from sltrain_dist.errors import CheckpointError

_VERSION = 1
_BYTES = "bytes of data.source"
_CONTENTS = "contents of data.source"
"""For each shard of the text in order, :data:`CONTENT_DIGITS` digits that identify its content."""
_TOKENS = "contents of the token shards"
"""The same for each file of the token shards."""
_MAY_BE_UNKNOWN = {_BYTES, _CONTENTS, _TOKENS}
"""Compared only if known on both sides: data may move between the Hub, a disk and token shards."""
_DEFAULTS = {"data.truncate": "text"}
"""Values of settings that the order leaves out."""


def data_order(settings: StreamSettings, tokenizer_fingerprint: str) -> dict[str, str | int]:
    """Returns everything that must be equal for a cursor to mean the same documents, for JSON."""
    return {
        "seed": settings.seed,
        "data.source": _source_fingerprint(settings.shards),
        **_contents(settings),
        "data.text_field": settings.text_field,
        "data.tokenizer": tokenizer_fingerprint,
        "data.seq_len": settings.seq_len,
        "data.batching": settings.batching,
        "data.streams": settings.streams,
        "data.shuffle_block": settings.shuffle_block,
        # Left out if not in use: cursors of versions without these settings stay valid.
        **({"data.weights": _mixture(settings)} if settings.mixture else {}),
        **({"data.reset_attention": True} if settings.mark else {}),
        **(
            {"data.max_document_bytes": settings.max_document_bytes}
            if settings.max_document_bytes != MAX_DOCUMENT_BYTES
            else {}
        ),
        **({"data.truncate": settings.truncate} if (settings.batching, settings.truncate) == ("pad", "eos") else {}),
    }


def make_cursor(order: Mapping[str, str | int], updates: int, states: Mapping[int, StreamState]) -> dict[str, Any]:
    """Returns a cursor, for JSON.

    Args:
        order: See :func:`data_order`.
        updates: Number of updates whose rows were taken from the streams.
        states: Position of each stream.
    """
    return {
        "version": _VERSION,
        "order": dict(order),
        "updates": updates,
        "streams": {str(stream): state.to_dict() for stream, state in sorted(states.items())},
    }


def read_cursor(
    cursor: Mapping[str, Any], order: Mapping[str, str | int], streams: Sequence[int], settings: StreamSettings
) -> tuple[int, dict[int, StreamState]]:
    """Returns the number of updates, and the positions of the given streams.

    Args:
        cursor: Made by :func:`make_cursor`.
        order: The order of this run, see :func:`data_order`.
        streams: Numbers of the streams to return.
        settings: The settings that `order` was made from, for the names of files.

    Raises:
        CheckpointError: The cursor belongs to other data or another order, is damaged, or lacks a stream.
    """
    _check_form(cursor)
    saved = cursor["order"]
    differing = [key for key in {**saved, **order} if saved.get(key) != order.get(key)]
    differing = [key for key in differing if key not in _MAY_BE_UNKNOWN or (saved.get(key) and order.get(key))]
    changed = {key: _changed_files(key, saved, order, settings) for key in (_CONTENTS, _TOKENS) if key in differing}
    differing = [key for key in differing if changed.get(key) != []]
    if differing:
        changes = ", ".join(
            f"{key} (changed: {', '.join(changed[key][:3])}{' and others' if len(changed[key]) > 3 else ''})"
            if key in changed
            else f"{key} ({_show(key, saved.get(key))}, now {_show(key, order.get(key))})"
            for key in differing
        )
        raise CheckpointError(
            f"cannot resume the data from this checkpoint, because these differ: {changes}. "
            "Restore them, or start a new run"
        )
    missing = [stream for stream in streams if str(stream) not in cursor["streams"]]
    if missing:
        raise CheckpointError(f"the checkpoint's data cursor lacks the streams {missing}; it was not merged over ranks")
    return cursor["updates"], {stream: StreamState.from_dict(cursor["streams"][str(stream)]) for stream in streams}


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Merges the cursors of all ranks into one, from which any number of ranks can resume.

    Args:
        states: `TrainLoader.state_dict()` of every rank, after the same number of updates.

    Raises:
        CheckpointError: The cursors disagree, or streams are missing.
    """
    if not states:
        raise CheckpointError("no rank has saved its data cursor")
    for state in states:
        _check_form(state)
    first = states[0]
    streams: dict[str, Any] = {}
    for rank, state in enumerate(states):
        for key in ("order", "updates"):
            if state[key] != first[key]:
                raise CheckpointError(f"ranks 0 and {rank} disagree on the data's {key}: {first[key]} and {state[key]}")
        for stream, position in state["streams"].items():
            if streams.setdefault(stream, position) != position:
                raise CheckpointError(
                    f"rank {rank} disagrees with a lower rank on the position of data stream {stream}: {position} "
                    f"instead of {streams[stream]}; do all ranks see the same files?"
                )
    missing = [stream for stream in range(first["order"]["data.streams"]) if str(stream) not in streams]
    if missing:
        raise CheckpointError(f"no rank has saved the position of the data streams {missing}")
    return {**first, "streams": dict(sorted(streams.items(), key=lambda item: int(item[0])))}


def _check_form(cursor: Mapping[str, Any]) -> None:
    if cursor.get("version") != _VERSION:
        raise CheckpointError(
            f"the checkpoint's data cursor has version {cursor.get('version')}; this program reads version {_VERSION}"
        )
    form = {"order": dict, "updates": int, "streams": dict}
    for key, kind in form.items():
        if not isinstance(cursor.get(key), kind):
            raise CheckpointError(f"the checkpoint's data cursor is damaged: no {key}")


def _source_fingerprint(shards: Sequence[str]) -> str:
    """Returns number and hash of the shards' names below their common directory: data may move between runs."""
    parts = [shard.split("/") for shard in shards]
    common = 0
    while all(len(names) > common + 1 for names in parts) and len({names[common] for names in parts}) == 1:
        common += 1
    names = "\n".join("/".join(names[common:]) for names in parts)
    # File names are not always UTF-8: Python keeps such bytes as surrogates.
    digest = hashlib.sha256(names.encode("utf-8", "surrogateescape"))
    return f"{len(shards)} files, {digest.hexdigest()[:16]}"


def _mixture(settings: StreamSettings) -> str:
    total = sum(source.weight for source in settings.mixture)
    return ", ".join(f"{source.weight / total:.6g} of {source.shards} files" for source in settings.mixture)


def _contents(settings: StreamSettings) -> dict[str, str | int]:
    """Returns what identifies the content of the text and of token shards, to notice rebuilt files of the same name.

    The content of a file that is not local is unknown, and then the size of the text is 0.
    """
    files, prepared = settings.files, settings.prepared
    if prepared is None:
        local = [files[shard] for shard in settings.shards if shard in files]
        return {
            _BYTES: sum(file.size for file in local) if len(local) == len(settings.shards) else 0,
            _CONTENTS: "".join(files[shard].content if shard in files else UNKNOWN for shard in settings.shards),
        }
    digests = {
        str(Path(prepared.directory) / name): digest
        for shard in prepared.shards
        for name, (_, digest) in shard.files.items()
    }
    tokens = (
        hashlib.sha256(f"{digests[path]} {files[path].content}".encode()).hexdigest()[:CONTENT_DIGITS]
        if path in files
        else UNKNOWN
        for path in prepared.all_files()
    )
    return {_BYTES: prepared.source_bytes, _CONTENTS: "".join(prepared.job.contents), _TOKENS: "".join(tokens)}


def _changed_files(
    key: str, saved: Mapping[str, Any], order: Mapping[str, str | int], settings: StreamSettings
) -> list[str]:
    """Returns the files whose contents are known on both sides and differ."""
    names = list(settings.shards)
    if key == _TOKENS and settings.prepared is not None:
        names = settings.prepared.all_files()
    before, now = str(saved[key]), str(order[key])
    if not len(before) == len(now) == CONTENT_DIGITS * len(names):
        return ["the number of files"]
    spans = [slice(start, start + CONTENT_DIGITS) for start in range(0, len(now), CONTENT_DIGITS)]
    pairs = [(before[span], now[span]) for span in spans]
    return [name for name, (a, b) in zip(names, pairs, strict=True) if a != b and UNKNOWN not in (a, b)]


def _show(key: str, value: Any) -> str:
    value = _DEFAULTS.get(key) if value is None else value
    return f"{value}" if key in ("data.source", "data.tokenizer") else f"{value!r}"
