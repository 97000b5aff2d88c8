"""Huey: a list, popped without acknowledgement."""

from __future__ import annotations

import os

from huey import RedisHuey

from benchmarks.queues.ran import mark

huey = RedisHuey(
    "bench", url=os.environ["BENCH_HUEY"], results=os.environ.get("BENCH_RESULTS") == "1"
)


@huey.task()  # type: ignore[untyped-decorator]
def noop(number: int = 0) -> int:
    return mark()


def fill(count: int, results: bool = True) -> None:
    """Queue so many."""
    for number in range(count):
        noop(number)
