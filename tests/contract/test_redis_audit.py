"""The audit itself: it finds what nobody knows, and knows all that `broker/keys.py` names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis

from broker import keys
from tests.redis_audit import strangers
from tests.redis_server import RedisServer

MAKERS: tuple[Callable[[Any], object], ...] = (
    lambda client: client.set("{cohort}forgotten", 1),
    lambda client: client.lpush("stranger", 1),
    lambda client: client.set(keys.leader("reaper"), 1),
    lambda client: client.set("celery-task-meta-1", 1),
    lambda client: client.hset(keys.submitted(7), "m", 1),
    lambda client: client.set(keys.LOCKS, 1),
    lambda client: client.hset("celery", "a", 1),
    lambda client: client.set(keys.SEQUENCE, 1, ex=60),
    lambda client: (client.lpush("celery", 1), client.expire("celery", 60)),
    lambda client: client.set("_kombu.binding.q", 1),
)


@pytest.mark.parametrize("make", MAKERS)
def test_a_key_that_should_not_be_there_is_named(
    redis_server: RedisServer, make: Callable[[Any], object]
) -> None:
    with redis_server.connect() as client:
        make(client)
        assert len(strangers(client)) == 1
        client.flushall()  # or the audit after this test finds it, too
        assert strangers(client) == []


def test_what_is_known_passes(redis_server: RedisServer) -> None:
    with redis_server.connect() as client:
        untyped: Any = client
        untyped.hset(keys.LOCKS, "k", "claim-1")
        untyped.set(keys.leader("reaper"), 1, ex=60)
        untyped.hset(keys.submitted(7), "m", 1)
        untyped.expire(keys.submitted(7), 60)
        untyped.hset(keys.outcomes(7), "f", "e")
        untyped.set("celery-task-meta-1", 1, ex=60)
        untyped.sadd("_kombu.binding.others", "others\x06\x16\x06\x16others")
        for name in ("celery", "celery\x06\x163", "others", "others\x06\x169"):
            untyped.lpush(name, "m")
        assert strangers(client) == []
        client.flushall()


def test_every_name_in_keys_is_in_the_table() -> None:
    """Who adds a key adds its line: said here, not by whichever test happens to leave one."""
    made: dict[str, str] = {
        "outcomes": keys.outcomes(1),
        "submitted": keys.submitted(1),
        "own_bell": keys.own_bell("n:1"),
        "claims": keys.claims("n:1"),
        "delayed": keys.delayed("q"),
        "leader": keys.leader("duty"),
    }
    channels = {keys.REFILLED}
    names = {name: value for name, value in vars(keys).items() if name.isupper() and name != "TAG"}
    fixed = {n: v for n, v in names.items() if isinstance(v, str) and v not in channels}
    for name, key in {**fixed, **made}.items():
        kind = keys.kind_of(key)
        assert kind is not None and kind.owner == "cohort", f"keys.{name}: no line in keys.TABLE"
    public = {
        name
        for name, value in vars(keys).items()
        if getattr(value, "__module__", "") == keys.__name__
        and callable(value)
        and not isinstance(value, type)
        and not name.startswith("_")
    }
    assert public - {"kind_of"} == made.keys(), "give this test a key of each function"


def test_a_server_that_is_gone_says_nothing() -> None:
    from tests.redis_audit import audit

    audit("redis://127.0.0.1:1/0")
    with pytest.raises(redis.ConnectionError):
        redis.Redis(port=1).ping()
