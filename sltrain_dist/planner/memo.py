"""Hashes that are worked out once (no torch)."""

from __future__ import annotations

from typing import TypeVar

_T = TypeVar("_T")


def hashed_once(cls: type[_T]) -> type[_T]:
    """Decorates a frozen dataclass whose instances are keys of caches again and again.

    A dataclass hashes all its fields anew each time, and those of what they hold: most of a search's time.
    """
    hash_of_fields = cls.__hash__

    def remembered(self: _T) -> int:
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = self.__dict__["_hash"] = hash_of_fields(self)
        return known

    cls.__hash__ = remembered  # type: ignore[method-assign, assignment]
    return cls
