"""Taskiq: a list, popped without acknowledgement."""

from __future__ import annotations

import asyncio
import os

from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend

from benchmarks.queues.ran import mark

URL = os.environ["BENCH_TASKIQ"]
broker = ListQueueBroker(URL)
if os.environ.get("BENCH_RESULTS") == "1":
    broker = broker.with_result_backend(RedisAsyncResultBackend(URL))


@broker.task
async def noop(number: int = 0) -> int:
    return mark()


def fill(count: int, results: bool = True) -> None:
    """Queue so many."""

    async def fill() -> None:
        await broker.startup()
        for number in range(count):
            await noop.kiq(number)
        await broker.shutdown()

    asyncio.run(fill())
