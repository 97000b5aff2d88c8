"""How a test says on which side a promise of the manual isn't kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def wrong_on(*sides: str, reason: str) -> Callable[[F], F]:
    """It fails there, strictly: once it is put right, the mark must go."""

    def mark(test: F) -> F:
        test.wrong_on = (sides, reason)  # type: ignore[attr-defined]
        return test

    return mark
