"""Ours."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.queues.ran import mark
from tasks import Run, app, job


@app.task(name="bench.noop")  # type: ignore[untyped-decorator]
def noop(number: int = 0) -> int:
    return mark()


@app.task(name="bench.total")  # type: ignore[untyped-decorator]
def total(numbers: list[int]) -> int:
    return sum(numbers)


@job(key="bench-{lane}", directory=False)
def keyed(run: Run, lane: int) -> int:
    return mark()


@job(key="bench-nap", directory=False, timeout="10m")
def nap(run: Run, seconds: float, starts: str) -> None:
    """Says when it starts, and goes back when its node is asked to leave."""
    with Path(starts).open("a") as file:
        file.write(f"{time.time()} {os.getpid()} {run.node}\n")
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if run.leaving:
            run.hand_over()
        time.sleep(0.05)


def fill(count: int, results: bool = True) -> None:
    """Queue so many."""
    noop.submit_many((((n,), {}) for n in range(count)), ignore_result=not results)


def fill_delayed(count: int, results: bool = True) -> None:
    """Hand in so many that are due tomorrow."""
    noop.submit_many((((n,), {}) for n in range(count)), countdown=86400)


def fill_keyed(count: int, results: bool = True) -> None:
    """Queue so many over 1,000 keys."""
    keyed.submit_many(((n % 1000,), {}) for n in range(count))
