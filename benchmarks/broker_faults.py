"""Rows of `benchmarks/broker.py` in which something goes wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from benchmarks.contenders import PREFORK, STOCK, Arena

if TYPE_CHECKING:
    from benchmarks.broker import Options


def _wait(fact: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := fact():
            return found
        time.sleep(0.02)
    return None


def _starts(path: Path) -> list[tuple[float, int]]:
    if not path.exists():
        return []
    lines = [line.split() for line in path.read_text().splitlines()]
    return [(float(words[0]), int(words[1])) for words in lines]


def bench_killed(arena: Arena, options: Options) -> None:
    for name, number in (("kill -9", signal.SIGKILL), ("a notice", signal.SIGTERM)):
        found = [_restarted(arena, PREFORK, number, 60.0) for _ in range(options.rounds)]
        print(f"  {name}: starts elsewhere after {_shown(found)}", flush=True)
    if options.slow:
        after = _restarted(arena, STOCK, signal.SIGKILL, 120.0)
        print(f"  stock, kill -9: {_shown([after])}")


def _shown(found: list[float | None]) -> str:
    from benchmarks.broker import summary

    seconds = [one for one in found if one is not None]
    never = f", never in {len(found) - len(seconds)} of {len(found)}"
    return (f"{summary(seconds, 2)} s" if seconds else "no time") + (
        never if len(seconds) < len(found) else ""
    )


def _restarted(arena: Arena, contender: Any, number: int, seconds: float) -> float | None:
    from benchmarks.queues import of_celery, of_cohort

    arena.empty(contender)
    starts = arena.home / f"starts-{time.monotonic_ns()}"
    nap = of_celery.nap if contender is STOCK else of_cohort.nap
    with (
        arena.running(contender, lease="10s") as first,
        arena.running(contender, lease="10s") as second,
    ):
        nap.delay(30.0, str(starts))
        if _wait(lambda: _starts(starts), 60) is None:
            raise TimeoutError("the job didn't start")
        ((_, pid),) = _starts(starts)
        runs = next(p for p in (*first, *second) if p.pid in (pid, _parent(pid), os.getpgid(pid)))
        at = time.time()
        if number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            arena.end(runs)
        else:
            runs.send_signal(number)
        again = _wait(lambda: _starts(starts)[1:], seconds)
        return None if again is None else again[0][0] - at


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def bench_healthy(arena: Arena, options: Options) -> None:
    from benchmarks.queues import of_cohort

    arena.empty(PREFORK)
    starts = arena.home / "healthy"
    with arena.running(PREFORK, lease="2s"), arena.running(PREFORK, lease="2s"):
        result = of_cohort.nap.delay(20.0, str(starts))
        if _wait(lambda: _starts(starts), 60) is None:
            raise TimeoutError("the job didn't start")
        for second in range(18):
            time.sleep(1)
            if second == 9:
                assert arena.fleet is not None
                assert arena.fleet.redis is not None
                arena.fleet.redis.kill()
                arena.fleet.start_redis()
            with contextlib.suppress(redis.RedisError), arena.client() as client:
                client.client_kill_filter(_type="normal", skipme=True)
                client.client_kill_filter(_type="pubsub", skipme=True)
        result.get(timeout=60)
        print(
            "  a job of ten leases, 18 times every connection dropped, Redis killed once: started "
            f"{len(_starts(starts))} times, {result.state}"
        )
