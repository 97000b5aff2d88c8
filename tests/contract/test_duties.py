"""A duty goes on, whatever comes of it once."""

from __future__ import annotations

import threading

import pytest
import redis

from errors import TryLater
from scheduler.duties import DutiesStep


@pytest.mark.parametrize("error", [redis.ConnectionError("away"), TryLater("full"), KeyError("x")])
def test_a_duty_that_fails_is_done_again(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    duties = DutiesStep.__new__(DutiesStep)
    duties._stopped = threading.Event()
    done: list[int] = []

    def act() -> None:
        done.append(len(done))
        if len(done) == 1:
            raise error
        duties._stopped.set()

    duties._every(0.001, act, "reaping")
    assert done == [0, 1]
    assert "reaping" in caplog.text
