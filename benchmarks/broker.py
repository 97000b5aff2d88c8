"""How a job travels, beside stock Celery, Huey, Dramatiq and taskiq, in alternating rounds.

    .venv/bin/python -m benchmarks.broker [ROWS] [--rounds 3] [--jobs 6000] [--backlog 100000]

`drain`     no-ops queued beforehand, prefork of two: with outcomes, and ignoring them
`best`      the same with the best pool of each, and every other queue
`keyed`     prefork with a key on every job (1,000 keys, no directory), beside prefork without
`submit`    `.delay()` one by one, a `group`, `submit_many`; nobody consumes
`idle`      from `.delay()` to the end of `.get()`, one at a time
`many`      a group and a chord of 10,000 from submit to `.get()`, and their producer's memory
`backlog`   the rate with 6,000 jobs queued, with --backlog, and with as many that wait for their
            time; Redis's bytes a job
`killed`    kill -9 of a node in a long job, lease 10 s; a notice (SIGTERM); --slow: stock as well
`healthy`   a job of ten leases under dropped connections, a restarted Redis and reapers
`claimers`  64 light claimers on one Redis at 5,000 messages a second

A no-op writes one byte to a file of its process: what has run is counted, and no queue is believed.
A rate is taken between the first twentieth and the last, so that nobody's start counts. All share
one Redis (append-only file, fsync every second), each in a database of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import BEST, KEYED, OTHERS, PREFORK, STOCK, Arena, Contender
from deploy.fleet import Fleet

PATIENCE = 240.0


@dataclass
class Options:
    """What the command line says."""

    rounds: int
    jobs: int
    backlog: int
    slow: bool


def summary(values: Sequence[float], digits: int = 0) -> str:
    """The median, and the range in brackets."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def compare(found: dict[str, list[float]], beside: str, unit: str = "/s", digits: int = 0) -> None:
    """Each one's median and range, and its ratio to one of them in the same rounds."""
    for name, values in found.items():
        ratios = [mine / other for mine, other in zip(values, found[beside], strict=True)]
        ratio = summary(ratios, 2)
        print(f"  {name:28} {summary(values, digits)}{unit}   x {beside}: {ratio}", flush=True)


def drained(arena: Arena, contender: Contender, jobs: int, results: bool) -> float:
    """The rate at which a worker that finds so many jobs runs them."""
    arena.empty(contender)
    arena.fill(contender, jobs, results)
    with arena.running(contender, results):
        return arena.ran.rate(jobs // 20, jobs, PATIENCE)


def in_rounds(
    options: Options, contenders: Iterable[Contender], measure: Callable[[Contender], float]
) -> dict[str, list[float]]:
    """Alternate, so that a machine that slows down slows all of them."""
    found: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for contender in contenders:
            found.setdefault(contender.name, []).append(measure(contender))
    return found


def bench_drain(arena: Arena, options: Options) -> None:
    for results in (True, False):
        print(f" {'with outcomes' if results else 'ignoring them'}")
        found = in_rounds(
            options,
            (STOCK, PREFORK),
            lambda contender, with_results=results: drained(  # type: ignore[misc]
                arena, contender, options.jobs, with_results
            ),
        )
        compare(found, STOCK.name)


def bench_best(arena: Arena, options: Options) -> None:
    for results in (True, False):
        print(f" {'with outcomes' if results else 'ignoring them'}")
        found = in_rounds(
            options,
            (STOCK, *BEST, *OTHERS),
            lambda contender, with_results=results: drained(  # type: ignore[misc]
                arena, contender, options.jobs * (1 if contender is STOCK else 2), with_results
            ),
        )
        compare(found, STOCK.name)


def bench_keyed(arena: Arena, options: Options) -> None:
    found = in_rounds(
        options, (PREFORK, KEYED), lambda contender: drained(arena, contender, options.jobs, True)
    )
    compare(found, PREFORK.name)


def bench_submit(arena: Arena, options: Options) -> None:
    from celery import group

    from benchmarks.queues import of_celery, of_cohort

    ways: dict[str, tuple[Contender, int, Callable[[int], Any]]] = {
        "stock .delay()": (STOCK, 1000, lambda n: [of_celery.noop.delay() for _ in range(n)]),
        ".delay()": (PREFORK, 2000, lambda n: [of_cohort.noop.delay() for _ in range(n)]),
        "group": (
            PREFORK,
            5000,
            lambda n: group([of_cohort.noop.s() for _ in range(n)]).apply_async(),
        ),
        "submit_many": (
            PREFORK,
            20_000,
            lambda n: of_cohort.noop.submit_many(((), {}) for _ in range(n)),
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for at in range(options.rounds + 1):
        for name, (contender, count, submit) in ways.items():
            arena.empty(contender)
            begun = time.perf_counter()
            submit(count)
            if at:  # The first round warms up.
                found[name].append(count / (time.perf_counter() - begun))
    compare(found, "stock .delay()")


def bench_idle(arena: Arena, options: Options) -> None:
    from benchmarks.queues import of_celery, of_cohort

    ways = {STOCK.name: of_celery.noop, PREFORK.name: of_cohort.noop}
    p50: dict[str, list[float]] = {name: [] for name in ways}
    p99: dict[str, list[float]] = {name: [] for name in ways}
    arena.empty(STOCK)
    arena.empty(PREFORK)
    with arena.running(STOCK), arena.running(PREFORK):
        for _ in range(options.rounds):
            times: dict[str, list[float]] = {name: [] for name in ways}
            # By turns within a round as well: what disturbs the machine lasts for less than that.
            for _ in range(8):
                for name, task in ways.items():
                    times[name] += [_round_trip(task) for _ in range(60)][10:]
            for name, values in times.items():
                cuts = statistics.quantiles(values, n=100)
                p50[name].append(cuts[49])
                p99[name].append(cuts[98])
    for title, found in (("p50", p50), ("p99", p99)):
        print(f" {title} of a round of 400")
        compare(found, STOCK.name, " ms", digits=2)


def _round_trip(task: Any) -> float:
    """Milliseconds."""
    begun = time.perf_counter()
    task.delay().get(timeout=60)
    return (time.perf_counter() - begun) * 1000


_PRODUCER = """
import json, resource, sys, time
from celery import chord, group
from benchmarks.queues import {module} as queue
begun = time.perf_counter()
tasks = [queue.noop.s(n) for n in range({count})]
if {chord}:
    result = chord(tasks)(queue.total.s())
else:
    result = group(tasks).apply_async()
submitted = time.perf_counter() - begun
got = result.get(timeout=400)
assert (got if {chord} else sum(got)) == {count}, got
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
print(json.dumps([submitted, time.perf_counter() - begun, memory]))
"""


def bench_many(arena: Arena, options: Options) -> None:
    count = 10_000
    contenders = (STOCK, PREFORK) if options.slow else (PREFORK,)
    for is_chord in (False, True):
        for contender in contenders:
            found = []
            for _ in range(1 if contender is STOCK else options.rounds):
                arena.empty(contender)
                with arena.running(contender):
                    code = _PRODUCER.format(module=contender.module, count=count, chord=is_chord)
                    found.append(json.loads(arena.python(["-c", code])))
            submitted, seconds, memory = zip(*found, strict=True)
            print(
                f"  {'chord' if is_chord else 'group'} of {count:,}, {contender.name}: "
                f"{summary(seconds, 1)} s, of which to submit {summary(submitted, 1)} s; "
                f"the producer's memory {summary(memory)} MB",
                flush=True,
            )


def bench_backlog(arena: Arena, options: Options) -> None:
    few, many = 6000, options.backlog
    # (queued, waiting for their time)
    rows = {
        f"{few:,} queued": (few, 0),
        f"{many:,} queued": (many, 0),
        f"{few:,} queued, {many:,} not due": (few, many),
    }
    found: dict[str, list[float]] = {name: [] for name in rows}
    bytes_each: dict[str, float] = {}
    arena.empty(PREFORK)
    with arena.client() as client:
        before = client.info("memory")["used_memory"]
    for _ in range(options.rounds):
        for name, (queued, later) in rows.items():
            arena.empty(PREFORK)
            arena.fill(PREFORK, queued)
            if later:
                arena.fill(PREFORK, later, delayed=True)
            with arena.client() as client:
                now = client.info("memory")["used_memory"]
            bytes_each[name] = (now - before) / (queued + later)
            with arena.running(PREFORK):
                found[name].append(arena.ran.rate(few // 20, few * 9 // 10, PATIENCE))
    compare(found, f"{few:,} queued")
    for name, each in bytes_each.items():
        print(f"  {name}: Redis holds {each:,.0f} bytes each")


def main() -> None:
    """Run what was asked for; everything by default."""
    from benchmarks import broker_faults as faults
    from benchmarks.claimers import bench_claimers

    rows: dict[str, Callable[[Arena, Options], None]] = {
        "drain": bench_drain,
        "best": bench_best,
        "keyed": bench_keyed,
        "submit": bench_submit,
        "idle": bench_idle,
        "many": bench_many,
        "backlog": bench_backlog,
        "killed": faults.bench_killed,
        "healthy": faults.bench_healthy,
        "claimers": lambda arena, options: bench_claimers(arena, options.rounds),
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROWS", help=f"{', '.join(rows)} (all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=6000)
    parser.add_argument("--backlog", type=int, default=100_000)
    parser.add_argument("--slow", action="store_true", help="stock also where it takes minutes")
    given = parser.parse_args()
    for row in given.rows:
        if row not in rows:
            parser.error(f"there is no row {row}; there are {', '.join(rows)}")
    options = Options(given.rounds, given.jobs, given.backlog, given.slow)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        settings = {"COHORT_JOBS": "benchmarks.queues.of_cohort"}
        with Fleet(Path(home), nodes=0, environ=settings) as fleet:
            arena = Arena(Path(home), fleet.redis_url, fleet.environ)
            arena.fleet = fleet
            os.environ.update(arena.environ)
            for row in given.rows or rows:
                print(f"{row}", flush=True)
                rows[row](arena, options)


if __name__ == "__main__":
    main()
