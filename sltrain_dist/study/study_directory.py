"""The directory of a study: one study, and one process at a time (no torch)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from sltrain_dist.config import strict_yaml
from sltrain_dist.config.differences import changed_settings
from sltrain_dist.config.load import build_config, read_mapping
from sltrain_dist.config.schema import Config
from sltrain_dist.errors import ConfigError
from sltrain_dist.files import failing_as, lock, make_directory, write_whole
from sltrain_dist.study.fairness import HARMLESS
from sltrain_dist.study.study_file import Study

RECORD = "study.yaml"
"""What the trials in the directory have in common, to recognize another study."""

_FREE = HARMLESS | {
    *("run_dir", "seed", "optim.lr", "train.tokens"),  # set for each trial
    *("checkpoint.every", "checkpoint.keep", "checkpoint.keep_every"),
    *("parallel.timeout_s", "train.sanity_checks"),
}
"""Settings that may differ between two starts of a study, as all of `tracking` may."""
_FIXED = ("budgets", "tuning_seed", "tuning_tokens")


@contextmanager
def claimed(study: Study) -> Iterator[int]:
    """Makes the study's directory and locks it for this process, after comparing what is in it with the study.

    Yields:
        The descriptor that holds the lock. Processes that inherit it keep the directory locked until they end.

    Raises:
        ConfigError: The directory cannot be written, is in use, or belongs to another study.
        StorageError: The disk is full.
    """
    path = study.directory
    with failing_as(f"study_dir = {path} cannot be written to", ConfigError):
        make_directory(path / "runs")
        descriptor = os.open(path, os.O_RDONLY)
    try:
        if not lock(descriptor):
            raise ConfigError(
                f"study_dir = {path} is in use by another `sltrain study`, or by trials that a killed one has left "
                "behind; wait for their end, or choose another"
            )
        # Arms that the file has no longer stay in the record, because their trials stay in the directory.
        arms = check_same_study(study).get("arms", {})
        arms |= {arm: study.example(arm).model_dump(mode="json") for arm in study.file.arms}
        record = {**{key: getattr(study.file, key) for key in _FIXED}, "arms": arms}
        text = yaml.dump(record, Dumper=strict_yaml.Dumper, sort_keys=False, allow_unicode=True)
        with failing_as(f"study_dir = {path} cannot be written to", ConfigError):
            write_whole(path / RECORD, text)
        yield descriptor
    finally:
        os.close(descriptor)


def check_same_study(study: Study) -> dict[str, Any]:
    """Compares a study with the one whose trials are in its directory. Arms, seeds and learning rates may be added.

    Returns:
        The record of the study in the directory; empty if there is none.

    Raises:
        ConfigError: They differ in something that would make the results incomparable.
    """
    path = study.directory / RECORD
    other = f"study_dir = {study.directory} holds the results of another study"
    remedy = "set it back, or choose another study_dir"
    if not path.exists():
        if any((study.directory / "runs").glob("*")) or any(study.directory.glob("results.csv")):
            raise ConfigError(f"{other}, without {RECORD}; choose another study_dir")
        return {}
    record = read_mapping(path)
    if not isinstance(record.get("arms"), dict):
        raise ConfigError(f"{path} is damaged: it has no arms; choose another study_dir")
    for key in _FIXED:
        if record.get(key) != (now := getattr(study.file, key)):
            raise ConfigError(f"{other}: {key} = {record.get(key)} there, {now} here; {remedy}")
    for arm, values in record["arms"].items():
        if arm not in study.file.arms:
            continue
        for key, old, new in _differences(values, study.example(arm), path):
            raise ConfigError(f"{other}: arm {arm} has {key} = {old!r} there, {new!r} here; {remedy}")
    return record


def _differences(values: dict[str, Any], now: Config, path: Any) -> Iterator[tuple[str, object, object]]:
    before = build_config(values, {"": str(path)})
    for key, old, new in changed_settings(before, now):
        if key not in _FREE and not key.startswith("tracking."):
            yield key, old, new
