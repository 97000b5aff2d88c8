"""Waiting for an outcome on a network whose connections aren't equally fast."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from deploy.chaos.proxy import Proxy
from tasks.application import configuration
from tasks.settings import Settings
from tests.redis_server import RedisServer

SLOW = 0.6


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    with Proxy(redis_server.port) as running:
        yield running
        gc.collect()  # results unsubscribe as they go, which needs their Redis


def app_at(port: int) -> Any:
    app = Celery("tests", set_as_current=False)
    app.conf.update(configuration(Settings.read({"COHORT_REDIS": f"redis://127.0.0.1:{port}/0"})))
    return app


def end_task(server: RedisServer, task_id: str) -> None:
    app_at(server.port).backend.store_result(task_id, "told", "SUCCESS")


@pytest.mark.timeout(60)
def test_what_ends_between_the_look_and_a_late_subscription_is_seen(
    redis_server: RedisServer, proxy: Proxy
) -> None:
    """The subscription goes out first and arrives last: on another connection we look too early."""
    app = app_at(proxy.port)
    waited_for = app.AsyncResult("t")
    assert waited_for.state == "PENDING"
    # The one connection that there is will be that of the subscriptions.
    proxy.slow_down_these(SLOW)
    # It looks once on the slow one, then subscribes; the second look is on a fast one, at once.
    ending = threading.Timer(1.5 * SLOW, end_task, (redis_server, "t"))
    ending.start()
    try:
        assert waited_for.get(timeout=10) == "told"
    finally:
        ending.join()


@pytest.mark.timeout(60)
def test_who_waits_is_pushed_the_outcome_at_once(redis_server: RedisServer, proxy: Proxy) -> None:
    waited_for = app_at(proxy.port).AsyncResult("t")
    begun: list[float] = []

    def end() -> None:
        begun.append(time.monotonic())
        end_task(redis_server, "t")

    ending = threading.Timer(0.5, end)
    ending.start()
    try:
        assert waited_for.get(timeout=10) == "told"
        assert time.monotonic() - begun[0] < 0.5
    finally:
        ending.join()


@pytest.mark.timeout(60)
def test_a_server_that_says_nothing_is_waited_for_as_long_as_was_asked(
    redis_server: RedisServer, proxy: Proxy
) -> None:
    from celery.exceptions import TimeoutError

    app = app_at(proxy.port)
    waited_for = app.AsyncResult("t")
    assert waited_for.state == "PENDING"
    with pytest.raises(TimeoutError):
        waited_for.get(timeout=0.3)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        waited_for.get(timeout=0.3)
    assert time.monotonic() - began < 2
