"""The server of the broker tests, one for all of them, wiped before and audited after each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.broker_kit import Broker
from tests.redis_server import RedisServer, running_redis


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that lives as long as the session."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """The server, empty."""
    shared_redis.wipe()
    return shared_redis


@pytest.fixture
def broker(redis_server: RedisServer) -> Iterator[Broker]:
    """The scripts on it. What the test leaves in Redis must be in order."""
    with redis_server.connect() as client:
        broker = Broker(client)
        yield broker
        broker.audit()
