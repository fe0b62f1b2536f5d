"""Typed errors and the process exit code of each.

Every error that a user can cause derives from :class:`SltrainError`; its message says what is wrong
and what to change. Launchers lose exit codes (torchrun returns 1 for a child's 75), so the code is
also written to ``run_dir/exit.json``.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How a run ended. The numbers are a public interface: batch scripts read them."""

    DONE = 0
    UNEXPECTED = 1
    CONFIG = 2
    DATA = 3
    DIVERGED = 4
    CHECKPOINT = 5
    STORAGE = 6
    """A file could not be written: disk full, quota, permission. Safe to requeue once that is fixed."""
    STOPPED_EARLY = 75
    """Stopped on request with everything saved (``EX_TEMPFAIL``): safe to requeue."""


class SltrainError(Exception):
    """Base class of all errors with a documented exit code."""

    exit_code: ExitCode = ExitCode.UNEXPECTED


class ConfigError(SltrainError):
    """The configuration is invalid, or this machine cannot run it."""

    exit_code = ExitCode.CONFIG


class DataError(SltrainError):
    """The data is missing, unreadable, or worse than ``data.max_bad_fraction`` allows."""

    exit_code = ExitCode.DATA


class DivergedError(SltrainError):
    """The loss or the gradient norm is not finite."""

    exit_code = ExitCode.DIVERGED


class CheckpointError(SltrainError):
    """A checkpoint cannot be written or read, or does not belong to this run."""

    exit_code = ExitCode.CHECKPOINT


class StorageError(SltrainError):
    """A file cannot be written: the disk or a quota is full, or the file system refuses the write."""

    exit_code = ExitCode.STORAGE


class SanityError(SltrainError):
    """A check of ``train.sanity_checks`` failed: a bug in this program, or a fault of the machine."""
