"""How a test says that ours isn't right yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def wrong_on_ours(
    reason: str, sides: tuple[str, ...] = ("ours", "stock producer")
) -> Callable[[F], F]:
    """Passes on stock Celery and fails, strictly, on our side: a bug that is known."""

    def mark(test: F) -> F:
        test.wrong_on_ours = (reason, sides)  # type: ignore[attr-defined]
        return test

    return mark
