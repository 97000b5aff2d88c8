"""Dramatiq on Redis."""

from __future__ import annotations

import os
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.queues.ran import mark

URL = os.environ["BENCH_DRAMATIQ"]
broker = RedisBroker(url=URL)
WITH_RESULTS = os.environ.get("BENCH_RESULTS") == "1"
if WITH_RESULTS:
    broker.add_middleware(Results(backend=RedisBackend(url=URL)))
dramatiq.set_broker(broker)


def noop(number: int = 0) -> int:
    return mark()


actor: Any = dramatiq.actor(noop, **({"store_results": True} if WITH_RESULTS else {}))


def fill(count: int, results: bool = True) -> None:
    """Queue so many."""
    for number in range(count):
        actor.send(number)
