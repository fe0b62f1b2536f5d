"""Retries after network failures: which failures, how often, and after what waits."""

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

if TYPE_CHECKING:  # pydantic would take half of a data worker's start-up time, and 10 MB
    from sltrain_dist.config.schema import DataConfig

_LONGEST_WAIT_S = 60.0
"""Limit of the doubling waits."""
_LONGEST_RETRY_AFTER_S = 3600.0
"""Longest pause requested by a server that is respected; beyond it, reading gives up."""
_PERMANENT = (FileNotFoundError, PermissionError, ImportError, NotImplementedError, TypeError, ValueError)
"""Errors that a retry cannot fix."""
_T = TypeVar("_T")


class Cause(Enum):
    """Cause of a retry."""

    TIMEOUT = "timeout"
    """No response in time, or status 408."""
    CONNECTION = "connection"
    """The connection was refused or reset, or failed otherwise."""
    RATE_LIMIT = "rate_limit"
    """Status 429."""
    SERVER_ERROR = "server_error"
    """Status 5xx."""
    TRUNCATED = "truncated"
    """The response ended before its announced length."""


class TruncatedError(OSError):
    """A response ended before its announced length."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long to retry; the fields correspond to the configuration's `data.retry…`."""

    retries: int = 8
    """Number of retries without any progress between them before giving up."""
    wait_s: float = 1.0
    """Mean wait before the first retry; it doubles each time, up to a minute."""
    timeout_s: float = 60.0
    """Seconds without data from an HTTP server after which a read fails."""

    @classmethod
    def of(cls, data: DataConfig) -> RetryPolicy:
        """Returns the policy of a configuration."""
        return cls(data.retries, data.retry_wait_s, data.timeout_s)


class Fetcher:
    """Retries failed reads by a policy, and counts the retries.

    Args:
        policy: How often to retry and after what waits.
        sleep: Waits for a number of seconds.
        jitter: Returns a random number in [0, 1), so that the ranks of a job do not all retry at once. Does not
            influence what is read.
        report: Receives one line before every wait.
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
        """Number of retries by cause."""
        self._sleep = sleep
        self._jitter = jitter
        self._report = report

    def pause(self, url: str, failures: int, error: Exception) -> None:
        """Waits before the next attempt after `failures` (at least 1) failed ones.

        Raises:
            DataError: There were too many failures, or the server asks for too long a pause.
            Exception: `error` itself, if a retry cannot fix it.
        """
        cause = cause_of(error)
        if cause is None:
            raise error
        requested_s = _retry_after_s(error)
        if failures > self.policy.retries or requested_s > _LONGEST_RETRY_AFTER_S:
            too_many = failures > self.policy.retries
            why = f"after {failures} attempts" if too_many else f"(the server asked for {requested_s:.0f} s)"
            raise DataError(
                f"cannot read {url}: gave up {why}; last error: {cause.value}, "
                f"{type(error).__name__}: {error}. Start again when the server responds, or raise data.retries"
            ) from error
        self.retries[cause] += 1
        wait_s = min(self.policy.wait_s * 2.0 ** (failures - 1), _LONGEST_WAIT_S) * (0.5 + self._jitter())
        wait_s = max(wait_s, requested_s)
        what = f"{url}: {cause.value}, {type(error).__name__}"
        self._report(f"{what}; retry {failures} of {self.policy.retries} in {wait_s:.0f} s")
        self._sleep(wait_s)

    def call(self, url: str, function: Callable[[], _T]) -> _T:
        """Returns the result of a function that makes requests to `url`, with retries. Raises as :meth:`pause` does."""
        failures = 0
        while True:
            try:
                return function()
            # Plug-ins of file systems raise exceptions of any type.
            except Exception as error:
                failures += 1
                self.pause(url, failures, error)


def cause_of(error: Exception) -> Cause | None:
    """Returns the cause of a retry after an error; None if a retry cannot help."""
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
    if isinstance(error, (DataError, *_PERMANENT, ssl.SSLCertVerificationError, http.client.InvalidURL)):
        return None
    if isinstance(error, TimeoutError) or "timeout" in type(error).__name__.lower():
        return Cause.TIMEOUT
    return Cause.CONNECTION


def status_of(error: Exception) -> int | None:
    """Returns the HTTP status in an error of the usual libraries, or None."""
    for source in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(source, name, None)
            if isinstance(value, int) and 400 <= value < 600:
                return value
    return None


def _retry_after_s(error: Exception) -> float:
    """Returns the pause that the server asks for (RFC 9110, section 10.2.3: seconds or a date); 0 if none."""
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
