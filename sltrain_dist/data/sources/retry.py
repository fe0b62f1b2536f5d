"""Which failures to wait for, how long, and how often: what is done about a network that fails now and then."""

from __future__ import annotations

import http.client
import random
import ssl
import time
import urllib.error
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from sltrain_dist.errors import DataError

if TYPE_CHECKING:  # half of a data worker's start, and 10 MB of it, would be pydantic
    from sltrain_dist.config.schema import DataConfig

_LONGEST_WAIT_S = 60.0
"""Waits double up to here."""
_LONGEST_RETRY_AFTER_S = 3600.0
"""A server that wants a longer pause than this is not waited for."""
_LASTING = (FileNotFoundError, PermissionError, ImportError, NotImplementedError, TypeError, ValueError)
"""Errors that no second attempt will mend."""
_T = TypeVar("_T")


class Cause(Enum):
    """Why a read was tried again."""

    TIMEOUT = "timeout"
    """No answer in time, or status 408."""
    CONNECTION = "connection"
    """Refused, reset or otherwise failed."""
    RATE_LIMIT = "rate_limit"
    """Status 429."""
    SERVER_ERROR = "server_error"
    """Status 5xx."""
    TRUNCATED = "truncated"
    """The answer ended before the length that it announced."""


class TruncatedError(OSError):
    """An answer that ended too soon."""


@dataclass(frozen=True)
class RetryPolicy:
    """How patient to be with the network; the fields are the configuration's `data.retry…`."""

    retries: int = 8
    """Attempts after the first without any progress between them, before giving up."""
    wait_s: float = 1.0
    """Mean wait before the first of them; it doubles each time, up to a minute."""
    timeout_s: float = 60.0
    """Longest silence of an HTTP server."""

    @classmethod
    def of(cls, data: DataConfig) -> RetryPolicy:
        """The policy of a configuration."""
        return cls(data.retries, data.retry_wait_s, data.timeout_s)


class Fetcher:
    """Decides whether and when to try again, and counts.

    Args:
        policy: How often and after what waits.
        sleep: Waits for some seconds.
        jitter: A random number in [0, 1), so that the ranks of a job do not all come back at once. Has no
            influence on what is read.
        report: Told in a line of every wait before it begins.
    """

    def __init__(
        self,
        policy: RetryPolicy | None = None,
        *,
        sleep: Callable[[float], object] = time.sleep,
        jitter: Callable[[], float] = random.random,
        report: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.policy = policy or RetryPolicy()
        self.retries: Counter[Cause] = Counter()
        """Attempts after the first, by cause."""
        self._sleep = sleep
        self._jitter = jitter
        self._report = report

    def pause(self, url: str, failures: int, error: Exception) -> None:
        """Waits before the next attempt after `failures` (at least 1) failed ones.

        Raises:
            DataError: There have been too many.
            Exception: `error`, if it is not one that passes.
        """
        cause = cause_of(error)
        if cause is None:
            raise error
        wanted_s = _retry_after_s(error)
        if failures > self.policy.retries or wanted_s > _LONGEST_RETRY_AFTER_S:
            given_up = (
                f"after {failures} attempts" if failures > self.policy.retries else f"(asked for {wanted_s:.0f} s)"
            )
            raise DataError(
                f"cannot read {url}: gave up {given_up}, at last because of {cause.value}: "
                f"{type(error).__name__}: {error}. Start again when the server answers, or raise data.retries"
            ) from error
        self.retries[cause] += 1
        wait_s = min(self.policy.wait_s * 2.0 ** (failures - 1), _LONGEST_WAIT_S) * (0.5 + self._jitter())
        wait_s = max(wait_s, wanted_s)
        what = f"{url}: {cause.value}, {type(error).__name__}"
        self._report(f"{what}; again in {wait_s:.0f} s ({failures} of {self.policy.retries})")
        self._sleep(wait_s)

    def call(self, url: str, function: Callable[[], _T]) -> _T:
        """The result of a function that asks a server about `url`. Raises as :meth:`pause` does."""
        failures = 0
        while True:
            try:
                return function()
            # Any file system's plug-in may be at work here, each with exceptions of its own.
            except Exception as error:
                failures += 1
                self.pause(url, failures, error)


def cause_of(error: Exception) -> Cause | None:
    """Why to try again after an error; None if that would be useless."""
    status = status_of(error)
    if status is not None:
        if status == http.client.REQUEST_TIMEOUT:
            return Cause.TIMEOUT
        if status == http.client.TOO_MANY_REQUESTS:
            return Cause.RATE_LIMIT
        return Cause.SERVER_ERROR if status >= http.client.INTERNAL_SERVER_ERROR else None
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return cause_of(error.reason)
    if isinstance(error, (TruncatedError, http.client.IncompleteRead)):
        return Cause.TRUNCATED
    if isinstance(error, (DataError, *_LASTING, ssl.SSLCertVerificationError, http.client.InvalidURL)):
        return None
    if isinstance(error, TimeoutError) or "timeout" in type(error).__name__.lower():
        return Cause.TIMEOUT
    return Cause.CONNECTION


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error of any of the usual libraries carries."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 400 <= value < 600:
                return value
    return None


def _retry_after_s(error: Exception) -> float:
    """The pause that the server asks for (RFC 9110, section 10.2.3: seconds or a date); 0 if none."""
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None)
    value = headers.get("Retry-After") if headers is not None else None
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - datetime.now(UTC)).total_seconds())
