"""A worker's half of its claims: what it knows, what it trusts, and what it gets back."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import redis

import broker.claimant
from broker import keys, nodes
from broker.claimant import CLAIM_PREFIX, Claimant
from broker.claims import Asking
from tests.broker_kit import QUEUE, Broker, lists_of, tops_of
from tests.redis_server import RedisServer


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """What `time.monotonic` would say."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The claimant's clock."""
    moved = Clock()
    monkeypatch.setattr(broker.claimant, "time", moved)
    return moved


def claim(claimant: Claimant) -> str:
    """Claim one message, which must be there."""
    asking = ask(claimant)
    claims = claimant.scripts.claim(asking)
    claimant.answered(asking, claims)
    (claimed,) = claims.claimed
    return claimed.claim_id


def ask(claimant: Claimant, most: int = 1) -> Asking:
    """Ask for some of the usual queue."""
    return claimant.ask(most, (QUEUE,), lists_of(QUEUE), tops_of(QUEUE))


def expect(claimant: Claimant) -> str:
    """The id of a claim that is asked for."""
    asking = ask(claimant)
    return f"{asking.prefix}{asking.first}"


def during_renewal(claimant: Claimant, act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let something happen while the renewal is on its way to the server."""
    renew = claimant.scripts.renew

    def late(*arguments: Any) -> Any:
        act()
        return renew(*arguments)

    monkeypatch.setattr(claimant.scripts, "renew", late)


def test_a_claim_is_known_from_before_it_is_asked_for(broker: Broker) -> None:
    claimant = broker.claimant("n")
    claim_id = expect(claimant)
    assert claim_id.startswith(CLAIM_PREFIX)
    assert claimant.knows(claim_id)
    assert claimant.claimed(claim_id) is None


def test_claim_ids_are_never_the_same(broker: Broker) -> None:
    claimants = [broker.claimant("n"), broker.claimant("n")]
    ids = [expect(claimant) for claimant in claimants for _ in range(3)]
    claimants[0].rejoin()
    ids.append(expect(claimants[0]))
    assert len(set(ids)) == 7


def test_threads_get_claims_of_their_own(broker: Broker) -> None:
    claimant = broker.claimant("n")
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.extend(expect(claimant) for _ in range(500)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 2000


class TestRenewal:
    def test_a_lost_reply_goes_back(self, broker: Broker) -> None:
        claimant = broker.claimant("n")
        broker.put("t", "k")
        claimant.forget(claim(claimant))
        assert claimant.renew() == "renewed"
        assert broker.lock_of("k") == "owed:t"
        assert broker.lost("t") == 0

    def test_what_was_asked_for_but_not_answered_stays(self, broker: Broker) -> None:
        claimant = broker.claimant("n")
        broker.put("t", "k")
        claim_id = claim(claimant)
        assert claimant.renew() == "renewed"
        assert broker.lock_of("k") == claim_id

    def test_what_is_claimed_while_it_is_on_its_way_stays(
        self, broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claimant = broker.claimant("n")
        broker.put("t", "k")
        claimed: list[str] = []
        during_renewal(claimant, lambda: claimed.append(claim(claimant)), monkeypatch)
        assert claimant.renew() == "renewed"
        assert broker.lock_of("k") == claimed[0]
        assert claimant.finish_now([claimed[0]]) == ["finished"]

    def test_what_ends_while_it_is_on_its_way_is_gone(
        self, broker: Broker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claimant = broker.claimant("n")
        broker.put("t", "k")
        claim_id = claim(claimant)
        during_renewal(claimant, lambda: claimant.finish_now([claim_id]), monkeypatch)
        assert claimant.renew() == "renewed"
        assert not broker.audit().places()

    def test_a_late_answer_to_a_lost_connection_goes_back(self, broker: Broker) -> None:
        # Forgotten when the connection broke; the server read the command only afterwards.
        claimant = broker.claimant("n")
        broker.put("t")
        asking = ask(claimant)
        claimant.unanswered(asking)
        assert claimant.renew() == "renewed"
        claimant.scripts.claim(asking)
        assert claimant.renew() == "renewed"
        assert [c["task"] for c in broker.audit().ready] == ["t"]

    def test_what_is_not_answered_for_long_goes_back_and_stays_back(
        self, broker: Broker, clock: Clock
    ) -> None:
        # Its connection has died without a word, and the lease is renewed on another one.
        claimant = broker.claimant("n")
        broker.put("t")
        asking = ask(claimant)
        claims = claimant.scripts.claim(asking)
        clock.now += 4
        assert claimant.renew() == "renewed"
        assert len(broker.audit().all_claims()) == 1
        clock.now += 2
        assert claimant.renew() == "renewed"
        assert [c["task"] for c in broker.audit().ready] == ["t"]
        assert not claimant.answered(asking, claims)
        assert claimant.claimed(claims.claimed[0].claim_id) is None

    @pytest.mark.parametrize("joined_anew", [True, False])
    def test_an_answer_that_outlived_the_lease_begins_nothing(
        self, broker: Broker, clock: Clock, joined_anew: bool
    ) -> None:
        # The node was stopped with the answer on its way; others have what it brought.
        claimant = broker.claimant("n", lease=15)
        broker.put("t")
        asking = ask(claimant)
        claims = claimant.scripts.claim(asking)
        clock.now += 16
        if joined_anew:
            claimant.rejoin()
        assert not claimant.answered(asking, claims)
        assert claimant.claimed(claims.claimed[0].claim_id) is None

    def test_an_answer_in_time_is_held(self, broker: Broker, clock: Clock) -> None:
        claimant = broker.claimant("n", lease=15)
        broker.put("t")
        asking = ask(claimant)
        claims = claimant.scripts.claim(asking)
        clock.now += 4
        assert claimant.answered(asking, claims)
        clock.now += 10
        assert claimant.renew() == "renewed"
        assert len(broker.audit().all_claims()) == 1


class TestTrust:
    def test_it_counts_from_when_the_renewal_was_sent(
        self, broker: Broker, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claimant = broker.claimant("n", lease=15)
        assert claimant.trusted_until == 1015

        def slow() -> None:
            clock.now += 10

        clock.now = 1005
        during_renewal(claimant, slow, monkeypatch)
        assert claimant.renew() == "renewed"
        assert claimant.trusted_until == 1020

    def test_a_renewal_that_failed_extends_nothing(
        self, broker: Broker, clock: Clock, redis_server: RedisServer
    ) -> None:
        claimant = broker.claimant("n", lease=15)
        clock.now = 1005
        redis_server.kill()
        try:
            with pytest.raises(redis.RedisError):
                claimant.renew()
        finally:
            redis_server.start()
        assert claimant.trusted_until == 1015
        assert claimant.renew() == "renewed"
        assert claimant.trusted_until == 1020

    def test_expelled_extends_nothing(self, broker: Broker, clock: Clock) -> None:
        claimant = broker.claimant("n", lease=15)
        broker.scripts.leave(claimant.member)
        clock.now = 1005
        assert claimant.renew() == "expelled"
        assert claimant.trusted_until == 1015

    def test_a_node_that_could_not_rejoin_trusts_nothing(
        self, broker: Broker, redis_server: RedisServer
    ) -> None:
        claimant = broker.claimant("n")
        redis_server.kill()
        try:
            with pytest.raises(redis.RedisError):
                claimant.rejoin()
            assert claimant.trusted_until == 0
        finally:
            redis_server.start()
        assert claimant.renew() == "expelled"


class TestRejoining:
    def test_what_another_has_taken_is_not_its_own_any_more(self, broker: Broker) -> None:
        claimant, other = broker.claimant("n"), broker.claimant("other")
        broker.put("t", "k")
        claim_id = claim(claimant)
        self.run(claimant, claim_id)
        old = claimant.member
        broker.expire(old)
        broker.scripts.reap(old)
        second = claim(other)
        assert claimant.finish_now(["of that incarnation"]) == ["superseded"]
        assert claimant.renew() == "expelled"
        claimant.rejoin()
        assert claimant.member != old
        assert not broker.client.exists(keys.own_bell(old))
        assert not claimant.knows(claim_id)
        assert claimant.claimed(claim_id)  # Its room is taken until it ends.
        # The old run comes to its end while the new one goes on.
        assert claimant.finish_now([claim_id]) == ["superseded"]
        assert broker.lock_of("k") == second
        assert broker.audit().leases == {claimant.member, other.member}
        assert claimant.claimed(claim_id) is None

    def run(self, claimant: Claimant, claim_id: str) -> None:
        """The pool takes it."""
        claimant.start(claim_id, None)
        claimant.begin(claim_id)

    @pytest.mark.parametrize("key", ["k", None])
    def test_what_nobody_has_taken_is_its_own_again(self, broker: Broker, key: str | None) -> None:
        claimant, other = broker.claimant("n"), broker.claimant("other")
        broker.put("t", key)
        claim_id = claim(claimant)
        self.run(claimant, claim_id)
        broker.expire(claimant.member)
        broker.scripts.reap(claimant.member)
        assert claimant.renew() == "expelled"
        claimant.rejoin()
        assert claimant.knows(claim_id)
        asking = ask(other)
        assert broker.scripts.claim(asking).claimed == []
        other.unanswered(asking)
        broker.audit()
        assert claimant.renew() == "renewed"
        assert claimant.finish_now([claim_id]) == ["finished"]
        assert not broker.audit().places()

    def test_a_server_that_was_wiped_learns_what_runs(
        self, broker: Broker, redis_server: RedisServer
    ) -> None:
        claimant = broker.claimant("n")
        broker.put("t", "k")
        claim_id = claim(claimant)
        self.run(claimant, claim_id)
        redis_server.wipe()
        assert claimant.renew() == "expelled"
        claimant.rejoin()
        assert broker.lock_of("k") == claim_id
        broker.put("next", "k")
        other = broker.claimant("other")
        assert broker.scripts.claim(ask(other)).claimed == []
        assert claimant.finish_now([claim_id]) == ["finished"]
        assert claim(other)

    @pytest.mark.parametrize("how", ["wiped", "told too late", "not told yet"])
    def test_what_was_acknowledged_when_it_began_is_no_claim_again(
        self, broker: Broker, redis_server: RedisServer, how: str
    ) -> None:
        claimant = broker.claimant("n")
        broker.put("t")
        claim_id = claim(claimant)
        self.run(claimant, claim_id)
        claimant.acknowledged_early(claim_id)
        if how == "wiped":
            claimant.finish_now([claim_id])
            redis_server.wipe()
        else:
            broker.expire(claimant.member)
            broker.scripts.reap(claimant.member)
            if how == "told too late":
                claimant.finish_now([claim_id])
        assert claimant.renew() == "expelled"
        claimant.rejoin()
        assert not claimant.knows(claim_id)
        assert not broker.audit().places()
        assert claimant.claimed(claim_id)  # Its room is taken until it ends.
        claimant.ended(claim_id)
        assert claimant.claimed(claim_id) is None

    def test_what_had_not_begun_is_forgotten(self, broker: Broker) -> None:
        claimant = broker.claimant("n")
        broker.put("t")
        claim_id = claim(claimant)
        broker.expire(claimant.member)
        broker.scripts.reap(claimant.member)
        claimant.renew()
        claimant.rejoin()
        assert not claimant.knows(claim_id)
        assert [claim["task"] for claim in broker.audit().ready] == ["t"]

    def test_a_server_that_was_wiped(self, broker: Broker, redis_server: RedisServer) -> None:
        claimant = broker.claimant("n")
        redis_server.wipe()
        assert claimant.renew() == "expelled"
        claimant.rejoin()
        assert claimant.renew() == "renewed"
        assert [info.node for info in nodes.list_nodes(broker.client)] == ["n"]

    def test_leaving_returns_everything(self, broker: Broker) -> None:
        claimant = broker.claimant("n")
        for task in ("a", "b"):
            broker.put(task, task)
        claimant.begin(claim(claimant))
        claim(claimant)
        assert claimant.leave() == 2
        assert nodes.list_nodes(broker.client) == []
        assert not broker.client.exists(keys.DELIVERIES)


class TestEnding:
    def test_the_writer_is_asked_first(self, broker: Broker) -> None:
        claimant = broker.claimant("n")
        broker.put("t", "k")
        claim_id = claim(claimant)
        claimant.begin(claim_id)
        asked: list[str] = []
        claimant.on_finish = lambda claim_id, end: asked.append(claim_id)
        claimant.finish(claim_id)
        assert asked == [claim_id]
        assert broker.lock_of("k") == claim_id
        # Until it is acknowledged, a renewal speaks of it.
        assert claimant.renew() == "renewed"
        assert claimant.finish_now([claim_id]) == ["finished"]
        assert not claimant.knows(claim_id)
        assert claimant.claimed(claim_id) is None

    def test_without_a_writer_it_is_acknowledged_at_once(self, broker: Broker) -> None:
        claimant = broker.claimant("n")
        broker.put("t")
        claimant.finish(claim(claimant))
        assert not broker.audit().places()

    def test_an_end_that_could_not_be_told_is_still_its_own(
        self, broker: Broker, redis_server: RedisServer
    ) -> None:
        claimant = broker.claimant("n")
        broker.put("t", "k")
        claim_id = claim(claimant)
        redis_server.kill()
        try:
            with pytest.raises(redis.RedisError):
                claimant.finish_now([claim_id])
        finally:
            redis_server.start()
        assert claimant.knows(claim_id)
        assert claimant.renew() == "renewed"
        assert broker.lock_of("k") == claim_id
        assert claimant.finish_now([claim_id]) == ["finished"]

    @pytest.mark.parametrize("lost", [False, True])
    def test_giving_back(self, broker: Broker, lost: bool) -> None:
        claimant = broker.claimant("n")
        broker.put("t")
        claim_id = claim(claimant)
        claimant.begin(claim_id)
        claimant.give_back(claim_id, lost=lost)
        assert not claimant.knows(claim_id)
        assert claimant.claimed(claim_id) is None
        assert broker.lost("t") == lost


class TestNodes:
    def test_what_a_node_tells(self, broker: Broker) -> None:
        claimant = broker.claimant("n.with:strange-1", lease=30)
        broker.put("t")
        claim(claimant)
        (info,) = nodes.list_nodes(broker.client)
        assert (info.node, info.incarnation) == ("n.with:strange-1", claimant.incarnation)
        assert (info.cpus, info.memory, info.host, info.pid) == (1, 1 << 30, "here", 1)
        assert info.nonce == claimant.incarnation
        assert 25 < info.lease_left <= 30
        assert info.running == 1
        assert info.is_live

    def test_what_a_newer_one_tells_beside_it_is_passed_over(self, broker: Broker) -> None:
        told = {"cpus": 3, "memory": 1, "host": "there", "pid": 1, "nonce": "n", "disks": 2}
        broker.scripts.register("newer:1", 60, json.dumps(told))
        (info,) = nodes.list_nodes(broker.client)
        assert (info.node, info.cpus) == ("newer", 3)

    def test_one_that_has_ended_is_listed_until_it_is_reaped(self, broker: Broker) -> None:
        claimant = broker.claimant("n")
        broker.expire(claimant.member)
        (info,) = nodes.list_nodes(broker.client)
        assert not info.is_live
        broker.scripts.reap(claimant.member)
        assert nodes.list_nodes(broker.client) == []
