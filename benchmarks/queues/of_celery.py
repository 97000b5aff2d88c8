"""Stock Celery: its Redis transport and its Redis results, with its defaults."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

from benchmarks.queues.ran import mark

URL = os.environ["BENCH_STOCK"]
app = Celery("stock", broker=URL, backend=URL, set_as_current=False)


@app.task(name="bench.noop")  # type: ignore[untyped-decorator]
def noop(number: int = 0) -> int:
    return mark()


@app.task(name="bench.total")  # type: ignore[untyped-decorator]
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task(name="bench.nap", acks_late=True)  # type: ignore[untyped-decorator]
def nap(seconds: float, starts: str) -> None:
    with Path(starts).open("a") as file:
        file.write(f"{time.time()} {os.getpid()}\n")
    time.sleep(seconds)


def fill(count: int, results: bool = True) -> None:
    """Queue so many."""
    for number in range(count):
        noop.apply_async((number,), ignore_result=not results)
