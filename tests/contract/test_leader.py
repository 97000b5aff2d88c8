"""One leader for a duty, and none that believes it for longer than its lease."""

from __future__ import annotations

from typing import Any

import pytest
import redis

import broker.leader
from broker import keys
from broker.leader import Leadership
from tests.broker_kit import Broker
from tests.redis_server import RedisServer


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        """What `time.monotonic` would say."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The candidates' clock."""
    moved = Clock()
    monkeypatch.setattr(broker.leader, "time", moved)
    return moved


def test_who_comes_first_leads_and_goes_on_leading(broker: Broker) -> None:
    first, second = (Leadership(broker.scripts, "reap", 60) for _ in range(2))
    assert not first.leads
    assert first.campaign()
    assert not second.campaign()
    assert first.campaign()
    assert (first.leads, second.leads) == (True, False)


def test_duties_have_leaders_of_their_own(broker: Broker) -> None:
    assert Leadership(broker.scripts, "reap", 60).campaign()
    assert Leadership(broker.scripts, "scale", 60).campaign()


def test_campaigning_keeps_the_lease(broker: Broker) -> None:
    leader = Leadership(broker.scripts, "reap", 60)
    leader.campaign()
    broker.client.pexpire(keys.leader("reap"), 5000)
    leader.campaign()
    assert 55_000 < broker.client.pttl(keys.leader("reap")) <= 60_000


def test_a_silent_leader_is_followed_by_another(broker: Broker) -> None:
    first, second = (Leadership(broker.scripts, "reap", 60) for _ in range(2))
    first.campaign()
    broker.client.delete(keys.leader("reap"))  # Its time to live has passed.
    assert second.campaign()
    assert not first.campaign()
    assert not first.leads


def test_a_leader_stops_when_its_lease_does(broker: Broker, clock: Clock) -> None:
    leader = Leadership(broker.scripts, "reap", 60)
    leader.campaign()
    clock.now += 59
    assert leader.leads
    clock.now += 1
    assert not leader.leads


def test_a_slow_reply_extends_nothing(
    broker: Broker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lead = broker.scripts.lead

    def slow(*arguments: Any) -> bool:
        word = lead(*arguments)
        clock.now += 61
        return word

    monkeypatch.setattr(broker.scripts, "lead", slow)
    assert not Leadership(broker.scripts, "reap", 60).campaign()


def test_a_leader_without_a_server_leads_until_its_lease_ends(
    broker: Broker, clock: Clock, redis_server: RedisServer
) -> None:
    leader = Leadership(broker.scripts, "reap", 60)
    leader.campaign()
    redis_server.kill()
    try:
        with pytest.raises(redis.RedisError):
            leader.campaign()
        assert leader.leads
        clock.now += 60
        assert not leader.leads
    finally:
        redis_server.start()
