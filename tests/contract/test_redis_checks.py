"""What a node asks of its server before it joins, and what it never shows."""

from __future__ import annotations

import pytest

from broker import server
from errors import Refused, Unavailable, WrongMount
from tests.broker_kit import Broker
from tests.redis_server import RedisServer


def test_a_server_that_keeps_what_it_accepts(broker: Broker, redis_server: RedisServer) -> None:
    server.check(broker.client, redis_server.url)


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_evicts(broker: Broker, redis_server: RedisServer, policy: str) -> None:
    broker.client.config_set("maxmemory-policy", policy)
    with pytest.raises(Refused, match=f"maxmemory-policy {policy}.*noeviction"):
        server.check(broker.client, redis_server.url)


def test_a_server_that_is_away(redis_server: RedisServer) -> None:
    url = f"redis://user:hush/@hush@127.0.0.1:{redis_server.port}/0"
    redis_server.kill()
    try:
        with redis_server.connect() as client, pytest.raises(Unavailable) as raised:
            server.check(client, url)
    finally:
        redis_server.start()
    assert f"127.0.0.1:{redis_server.port}" in str(raised.value)
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hush@host:1/0",
        "rediss://user:hush@host:1/0",
        "redis://user:hu/sh@host:1/0",
        "redis://user:hush@hush@host:1/0",
        "redis://host:1/0?password=hush",
        "redis://:hush%40@host:1/0",
        "redis+socket://:hush\n@host:1/0",
    ],
)
def test_no_password_is_shown(url: str) -> None:
    shown = server.without_password(url)
    assert "hu" not in shown
    assert "host:1" in shown


def test_without_a_password_a_url_stays() -> None:
    assert server.without_password("redis://host:1/0") == "redis://host:1/0"


def test_one_folder_for_one_server(broker: Broker) -> None:
    server.belongs_to(broker.client, "fleet-1")
    server.belongs_to(broker.client, "fleet-1")
    with pytest.raises(WrongMount, match=r"fleet-2.*fleet-1"):
        server.belongs_to(broker.client, "fleet-2")
