"""Rows of `benchmarks/broker.py` in which something goes wrong, and of the scripts alone."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from benchmarks.contenders import PREFORK, STOCK, Arena
from broker import keys
from broker.claims import Asking
from broker.producing import Put, Putter
from broker.scripts import Scripts

if TYPE_CHECKING:
    from benchmarks.broker import Options

_CLAIMERS = 64
_RATE = 5000
_SECONDS = 6.0


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


def bench_claimers(arena: Arena, options: Options) -> None:
    """In four processes: 64 of them on two cores would measure the machine's scheduler."""
    arena.empty(PREFORK)
    context = multiprocessing.get_context("spawn")
    times: Any = context.Queue()
    over = context.Event()
    url = f"{arena.url}/0"
    processes = [
        context.Process(target=_claim_in_threads, args=(url, at, over, times)) for at in range(4)
    ]
    for process in processes:
        process.start()
    headers = {"id": "t", "task": "bench.noop", "cohort": {}}
    text = json.dumps({"headers": headers, "body": "x" * 300})
    with arena.client() as client:
        _wait(lambda: client.zcard(keys.LEASES) == _CLAIMERS, 30)
        client.config_resetstat()
        putter = Putter(client)
        begun, put = time.monotonic(), 0
        while (passed := time.monotonic() - begun) < _SECONDS:
            due = int(passed * _RATE) - put
            if due >= 50:
                putter.put([Put("celery", "celery", text, "")] * due)
                put += due
            time.sleep(0.005)
        over.set()
        taken = [took for _ in processes for took in times.get(timeout=30)]
        for process in processes:
            process.join()
        left: Any = client.llen("celery")
        scripts: Any = client.info("commandstats")["cmdstat_evalsha"]
    cuts = statistics.quantiles(taken, n=1000)
    print(
        f"  {put / _SECONDS:,.0f} messages/s, {left} left, {len(taken) / _SECONDS:,.0f} claims/s: "
        f"p50 {cuts[499] * 1000:.2f} ms, p99 {cuts[989] * 1000:.2f} ms; "
        f"in Redis {scripts['usec_per_call']:.0f} us a script"
    )


def _claim_in_threads(url: str, at: int, over: Any, times: Any) -> None:
    taken: list[float] = []
    threads = [
        threading.Thread(target=_claim_on, args=(url, f"bench-{at}-{number}", over, taken))
        for number in range(_CLAIMERS // 4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times.put(taken)


def _claim_on(url: str, name: str, over: Any, taken: list[float]) -> None:
    """One node's claims, each of a few messages, finished as soon as they are there."""
    scripts = Scripts(redis.Redis.from_url(url))
    member = f"{name}:life"
    scripts.register(member, 60.0, json.dumps({"cpus": 8}))
    room = [8, 1 << 33, 0]
    node = json.dumps(
        {"total": room, "spare": room, "labels": [], "slots": 8, "ahead": 0, "takes": {}}
        | {"patience": 10_000}
    )
    first = 1
    while not over.is_set():
        asking = Asking(member, f"{name}-", first, 8, node, ["celery"], [("celery", "celery")], "9")
        begun = time.perf_counter()
        claims = scripts.claim(asking)
        taken.append(time.perf_counter() - begun)
        first += 8
        if claims.claimed:
            scripts.finish(member, [claimed.claim_id for claimed in claims.claimed])
        else:
            # An idle node waits for the bell.
            scripts.client.brpop([keys.BELL], 0.1)
    scripts.leave(member)
