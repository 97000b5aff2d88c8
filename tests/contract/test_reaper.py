"""The reaper: it returns what the dead held, and never takes an outage of Redis for deaths."""

from __future__ import annotations

import pytest
import redis

import scheduler.reaper
from broker import keys
from scheduler.reaper import Reaper
from tests.broker_kit import Broker
from tests.redis_server import RedisServer

LEASE = 15.0
PACE = 1.0
DEAD = "dead:aaaa"
ALIVE = "alive:bbbb"


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        """What `time.monotonic` would say."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The reaper's clock."""
    moved = Clock()
    monkeypatch.setattr(scheduler.reaper, "time", moved)
    return moved


@pytest.fixture
def reaper(broker: Broker) -> Reaper:
    """A reaper, a node that is dead with a claim, and one that lives with another."""
    description = '{"cpus": 1, "memory": 1, "host": "h", "pid": 1, "nonce": "n"}'
    for member in (DEAD, ALIVE):
        broker.scripts.register(member, 3600, description)
        broker.put(f"of {member}", f"key of {member}")
        broker.take(member)
    broker.expire(DEAD)
    return Reaper(broker.scripts, LEASE, PACE)


def watch(reaper: Reaper, clock: Clock, seconds: float) -> None:
    """Passes at its pace, all of which return nothing."""
    for _ in range(int(seconds / PACE)):
        assert reaper.run_once() == 0
        clock.now += PACE


def test_it_returns_the_claims_of_the_dead(broker: Broker, reaper: Reaper, clock: Clock) -> None:
    watch(reaper, clock, LEASE)
    assert reaper.run_once() == 1
    assert reaper.run_once() == 0
    assert broker.lost(f"of {DEAD}") == 1
    picture = broker.audit()
    assert picture.leases == {ALIVE}
    assert [claim["task"] for claim in picture.ready] == [f"of {DEAD}"]


def test_it_returns_more_than_one_script_may(broker: Broker, clock: Clock) -> None:
    broker.scripts.register(DEAD, 3600, '{"cpus":1,"memory":1,"host":"h","pid":1,"nonce":"n"}')
    for number in range(250):
        broker.put(f"t{number}")
        broker.take(DEAD)
    broker.expire(DEAD)
    reaper = Reaper(broker.scripts, LEASE, PACE)
    watch(reaper, clock, LEASE)
    assert reaper.run_once() == 250


def test_a_standby_that_has_watched_may_begin_at_once(
    broker: Broker, reaper: Reaper, clock: Clock
) -> None:
    for _ in range(16):
        reaper.watch()
        clock.now += PACE
    assert reaper.run_once() == 1


def test_a_server_that_came_anew_is_watched_for_a_whole_lease(
    broker: Broker, reaper: Reaper, clock: Clock, redis_server: RedisServer
) -> None:
    # Right after an outage every lease looks as if it had ended.
    watch(reaper, clock, LEASE - PACE)
    redis_server.restart()
    watch(reaper, clock, LEASE)
    assert reaper.run_once() == 1


def test_after_a_gap_it_watches_for_a_whole_lease(
    broker: Broker, reaper: Reaper, clock: Clock
) -> None:
    # It was stopped itself, or the network was away: the nodes couldn't renew either.
    watch(reaper, clock, LEASE - PACE)
    clock.now += 10 * PACE
    watch(reaper, clock, LEASE)
    assert reaper.run_once() == 1


def test_after_an_error_it_watches_for_a_whole_lease(
    broker: Broker, reaper: Reaper, clock: Clock, redis_server: RedisServer
) -> None:
    watch(reaper, clock, LEASE - PACE)
    redis_server.kill()
    try:
        with pytest.raises(redis.RedisError):
            reaper.run_once()
    finally:
        redis_server.start()
    watch(reaper, clock, LEASE)
    assert reaper.run_once() == 1


def test_a_node_that_renewed_in_time_is_spared(
    broker: Broker, reaper: Reaper, clock: Clock
) -> None:
    watch(reaper, clock, LEASE)
    broker.scripts.renew(DEAD, 3600, 0, [])
    assert reaper.run_once() == 0
    assert broker.client.zcard(keys.LEASES) == 2
