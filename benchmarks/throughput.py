"""How many small tasks a second, beside stock Celery on the same Redis, in alternating rounds.

    .venv/bin/python -m benchmarks.throughput [--tasks 1000] [--rounds 5]

One worker of two prefork processes each; results on; rates from the first `.delay()` to the last
result. `keyed` runs write a file and commit it, eight keys at a time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.fleet import Fleet


@contextmanager
def stock_worker(environ: dict[str, str]) -> Iterator[None]:
    """Stock Celery's worker, ended at the end."""
    command = ["-m", "celery", "-A", "benchmarks.bench_jobs:stock", "worker", "-c", "2", "-E"]
    worker = subprocess.Popen(
        [sys.executable, *command],
        env={**environ, "BENCH": "stock"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        worker.terminate()
        worker.wait(30)


def rate_of(submit: Callable[[int], Any], count: int) -> float:
    """Tasks a second from the first submission to the last result."""
    begun = time.perf_counter()
    results = [submit(number) for number in range(count)]
    for result in results:
        result.get(timeout=300)
    return count / (time.perf_counter() - begun)


def main() -> None:
    """Measure and print medians with their ranges, and the ratios to stock."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        settings = {"COHORT_JOBS": "benchmarks.bench_jobs"}
        with Fleet(Path(home), nodes=1, cpus=(2,), environ=settings) as fleet:
            os.environ.update(fleet.environ)
            with stock_worker(fleet.environ):
                measure(options.tasks, options.rounds)


def measure(tasks: int, rounds: int) -> None:
    """Alternate, so that a machine that slows down slows all of them."""
    from benchmarks import bench_jobs as jobs

    ways: dict[str, tuple[Callable[[int], Any], int]] = {
        "stock": (jobs.stock_noop.delay, tasks),
        "cohort": (jobs.noop.delay, tasks),
        "keyed": (lambda number: jobs.keyed.delay(number % 8, number), tasks // 5),
    }
    for submit, _ in ways.values():
        rate_of(submit, 20)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (submit, count) in ways.items():
            rates[name].append(rate_of(submit, count))
    for name, found in rates.items():
        ratios = [mine / stock for mine, stock in zip(found, rates["stock"], strict=True)]
        print(
            f"{name:7} {statistics.median(found):7.0f}/s ({min(found):.0f} to {max(found):.0f})"
            f"   x stock {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
