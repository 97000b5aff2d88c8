"""What has an outcome without having run: whose time is up, and marks that no message came by.

A job that expires is in a sorted set from when it is put until it ends. A settled task's message
is dropped by the node that meets it, and its mark with it. A mark that met none for a long time is
swept, but not while its message still waits: it would run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import redis

from broker import journal, keys
from broker.scripts import Scripts

A_STEP = 200


def due(client: redis.Redis) -> list[tuple[str, int]]:
    """Some tasks whose time is up, and when it was, in ms; the first of them first."""
    seconds, micros = client.time()
    now = seconds * 1000 + micros // 1000
    found: Any = client.zrangebyscore(keys.EXPIRING, "-inf", now, 0, A_STEP, withscores=True)
    return [(name.decode("utf-8", "surrogateescape"), int(ends)) for name, ends in found]


def seen_to(scripts: Scripts, tasks: list[tuple[str, int]]) -> int:
    """Take out what `due` brought, unless it was given more time since. How many went."""
    return scripts.expired(tasks)


def some(client: Any, cursor: int) -> tuple[int, list[str]]:
    """Some settled tasks, and where to go on; 0 is the beginning and the end."""
    cursor, marks = client.hscan(keys.SETTLED, cursor, count=A_STEP)
    return cursor, [name.decode("utf-8", "surrogateescape") for name in marks]


def sweep(client: Any, keep: float) -> Iterator[int]:
    """Take out marks older than `keep` seconds of what waits nowhere, in bounded steps: how many
    went with each. The others are looked at again after the same time.
    """
    seconds, micros = client.time()
    now = seconds * 1000 + micros // 1000
    old: dict[bytes, bytes] = {}
    for at, (name, mark) in enumerate(client.hscan_iter(keys.SETTLED, count=1000)):
        if now - int(mark.partition(b" ")[0]) > keep * 1000:
            old[name] = mark
        if at % 1000 == 999:
            yield 0
    if not old:
        return
    waiting: dict[bytes, bytes] = {}
    for at, task_id in enumerate(journal.ids_in_redis(client)):
        name = task_id.encode("utf-8", "surrogateescape")
        if name in old:
            waiting[name] = b"%d %s" % (now, old.pop(name).partition(b" ")[2])
        if at % 1000 == 999:
            yield 0
    for some in _steps(list(waiting)):
        client.hset(keys.SETTLED, mapping={name: waiting[name] for name in some})
        yield 0
    for some in _steps(list(old)):
        yield client.hdel(keys.SETTLED, *some)


def _steps(names: list[bytes]) -> Iterator[list[bytes]]:
    for at in range(0, len(names), A_STEP):
        yield names[at : at + A_STEP]
