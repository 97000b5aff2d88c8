"""Every script on a real server: what it moves, in which order, and the word that it returns."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
import redis

from broker import keys
from broker.claims import Claimed, Claims
from broker.index import Announcement, Index
from broker.sources import sha_of, source
from errors import BrokerFull
from tests.broker_kit import QUEUE, Broker, message, node_json
from tests.redis_server import RedisServer

NODE = "node-1:aaaa"
OTHER = "node-2:bbbb"


@pytest.fixture(autouse=True)
def two_nodes(broker: Broker) -> None:
    """Each test has two registered nodes."""
    broker.join(NODE)
    broker.join(OTHER)


class TestClaim:
    def test_arrival_decides_within_a_priority(self, broker: Broker) -> None:
        for number in range(5):
            broker.put(f"t{number}")
        assert broker.drain(NODE) == ["t0", "t1", "t2", "t3", "t4"]

    def test_priority_comes_before_arrival(self, broker: Broker) -> None:
        for priority in (9, 3, 0, 6):
            broker.put(f"p{priority}", priority=priority)
        assert broker.drain(NODE) == ["p0", "p3", "p6", "p9"]

    def test_priority_comes_before_the_order_of_queues(self, broker: Broker) -> None:
        broker.queues = ("a", "b")
        broker.put("late", queue="a", priority=9)
        broker.put("early", queue="b")
        assert broker.drain(NODE) == ["early", "late"]

    def test_only_served_queues(self, broker: Broker) -> None:
        broker.queues = ("a", "b")
        broker.put("theirs", queue="a")
        assert broker.ask(NODE, "b")[1] == "nothing"
        assert broker.take(NODE, "a")[1] == "theirs"

    def test_what_came_back_is_served_before_the_queues(self, broker: Broker) -> None:
        broker.put("first", priority=9)
        claim_id, _ = broker.take(NODE)
        broker.put("second")
        broker.scripts.give_back(NODE, claim_id)
        assert broker.drain(OTHER) == ["first", "second"]

    def test_what_came_back_waits_for_a_node_that_serves_its_queue(self, broker: Broker) -> None:
        broker.queues = ("a", "b")
        broker.put("theirs", queue="a")
        claim_id, _ = broker.take(NODE, "a")
        broker.scripts.give_back(NODE, claim_id)
        broker.put("ours", queue="b")
        assert broker.drain(OTHER, "b") == ["ours"]
        assert broker.drain(OTHER, "a") == ["theirs"]

    def test_what_nobody_serves_holds_nobody_up(self, broker: Broker) -> None:
        broker.queues = ("a", "b")
        claims = []
        for queue, count in (("b", 1), ("a", 120)):
            for number in range(count):
                broker.put(f"{queue}{number}", queue=queue)
                claims.append(broker.take(NODE)[0])
        for claim_id in claims:
            broker.scripts.give_back(NODE, claim_id)
        assert broker.client.lindex(keys.READY, -1).count(b'"task":"b0"') == 1
        assert any(broker.drain(OTHER, "b") == ["b0"] for _ in range(3))
        assert len(broker.drain(NODE, "a")) == 120

    def test_a_reply_tells_what_was_claimed(self, broker: Broker) -> None:
        broker.put("t", "k")
        claim_id, claimed = broker.claim(NODE)
        payload = message("t", "k").encode()
        assert claimed == Claimed(claim_id, QUEUE, payload, 0, "k", True, "", "", QUEUE)

    def test_a_keyed_job_comes_with_its_lock(self, broker: Broker) -> None:
        broker.put("t", "k")
        claim_id, _ = broker.claim(NODE)
        assert broker.lock_of("k") == claim_id

    def test_a_keyless_job_has_no_lock(self, broker: Broker) -> None:
        broker.put("t")
        broker.claim(NODE)
        assert not broker.client.exists(keys.LOCKS)

    def test_a_job_whose_key_is_locked_parks_and_costs_no_slot(self, broker: Broker) -> None:
        broker.put("holder", "k")
        broker.take(NODE)
        broker.put("waits", "k")
        broker.put("free", "other")
        assert broker.take(OTHER)[1] == "free"
        assert broker.ask(OTHER)[1] == "nothing"
        assert [claim["task"] for _, claim in broker.audit().parked] == ["waits"]

    def test_keys_that_begin_alike_are_different_keys(self, broker: Broker) -> None:
        for key in ("a", "ab", "a b", "a-1", "a.b", "ä"):
            broker.put(f"holder of {key}", key)
            broker.put(f"heir of {key}", key)
        held = [broker.take(NODE) for _ in range(6)]
        assert broker.ask(NODE)[1] == "nothing"
        for claim_id, task in held:
            assert broker.finish(NODE, claim_id) == "finished"
            assert broker.take(OTHER)[1] == task.replace("holder", "heir")

    @pytest.mark.parametrize(
        "garbage",
        [
            "not JSON",
            "",
            "7",
            '"text"',
            "[]",
            "{}",
            "null",
            '{"headers": null, "properties": {"delivery_tag": "x"}}',
            '{"headers": {}, "properties": {"delivery_tag": "x"}}',
            '{"headers": {"id": 7}, "properties": {"delivery_tag": "x"}}',
            '{"headers": {"id": "t"}}',
            '{"headers": {"id": "t"}, "properties": {}}',
            '{"headers": {"id": "t"}, "properties": {"delivery_tag": "x"}',
            b"\xff\xfe\x00",
            message("t", "k\0k"),
            "[" * 2000,
        ],
    )
    def test_what_is_no_message_is_put_aside(self, broker: Broker, garbage: Any) -> None:
        broker.client.lpush(QUEUE, garbage)
        broker.put("good")
        assert broker.take(NODE)[1] == "good"
        expected = garbage if isinstance(garbage, bytes) else garbage.encode()
        ((name, kept),) = broker.client.hgetall(keys.DEAD).items()
        about, _, element = kept.partition(b"\0")
        assert (name[:8], element) == (b"element-", expected)
        assert json.loads(about)["reason"] == "it is no task message"

    def test_it_stops_after_200_messages_and_says_so(self, broker: Broker) -> None:
        broker.client.lpush(QUEUE, *["garbage"] * 199)
        broker.put("holder", "k")
        broker.put("waits", "k")
        broker.put("after")
        assert broker.take(NODE)[1] == "holder"
        broker.client.rpush(QUEUE, *["garbage"] * 199)
        # 199 put aside and one parked: the limit.
        assert broker.ask(OTHER)[1] == "again"
        assert broker.take(OTHER)[1] == "after"

    @pytest.mark.parametrize("priority", ["nan", "inf", "-inf", -5, 99, 3.7, None, "x", {}, []])
    def test_a_strange_priority_is_a_priority_of_its_list(
        self, broker: Broker, priority: Any
    ) -> None:
        broker.put("holder", "k")
        claim_id, _ = broker.take(NODE)
        strange = json.loads(message("strange", "k"))
        strange["properties"]["priority"] = priority
        broker.client.lpush(QUEUE, json.dumps(strange))
        assert broker.ask(NODE)[1] == "nothing"
        broker.finish(NODE, claim_id)
        assert broker.drain(NODE) == ["strange"]

    def test_no_lease_no_claim(self, broker: Broker) -> None:
        broker.put("t")
        assert broker.ask("node-3:cccc")[1] == "expelled"
        broker.expire(NODE)
        assert broker.ask(NODE)[1] == "expelled"
        assert broker.take(OTHER)[1] == "t"

    def test_what_is_due_joins_its_queue(self, broker: Broker) -> None:
        now = broker.now_ms()
        assert broker.put("later", due_ms=now + 60_000) == "delayed"
        assert broker.put("soon", priority=3, due_ms=now + 60_000) == "delayed"
        assert broker.ask(NODE)[1] == "nothing"
        name = keys.delayed(QUEUE)
        (due,) = [m for m in broker.client.zrange(name, 0, -1) if b'"soon"' in m]
        broker.client.zadd(name, {due: now - 1})
        broker.put("there", priority=6)
        assert broker.drain(NODE) == ["soon", "there"]
        assert broker.client.zcard(name) == 1

    @pytest.mark.parametrize("held", [0, 1, 60])
    def test_asked_twice_it_answers_the_same(self, broker: Broker, held: int) -> None:
        # As when the reply of the first was lost, and the client has tried again.
        for number in range(held):
            broker.put(f"held-{number}")
        assert len(broker.ask_for(held or 1, NODE).claimed) == held
        asked, brought = [], []
        for first, keys_of in ((100, ["k", *[None] * 19]), (150, [None])):
            for number, key in enumerate(keys_of):
                broker.put(f"t{first + number}", key)
            asked.append(broker.asking(NODE, first=first, most=50))
            brought.append(broker.scripts.claim(asked[-1]))
            assert len(brought[-1].claimed) == len(keys_of)
        broker.put("another")
        for asking, claims in zip(asked, brought, strict=True):
            assert broker.scripts.claim(asking) == Claims("again", claims.claimed)
        assert broker.take(OTHER)[1] == "another"

    def test_an_idle_node_that_looks_writes_nothing(self, broker: Broker) -> None:
        assert broker.ask(NODE)[1] == "nothing"
        before = broker.client.info("persistence")["rdb_changes_since_last_save"]
        assert broker.ask(NODE)[1] == "nothing"
        assert broker.client.info("persistence")["rdb_changes_since_last_save"] == before

    def test_a_busy_node_that_looks_says_so_and_what_it_has_left(self, broker: Broker) -> None:
        words: list[Literal["all", "busy"]] = ["all", "busy"]
        for slots, spare, word in zip((1, 0), (3, 2), words, strict=True):
            node = node_json((3, 10, 0), (spare, 10, 0), slots=slots)
            assert broker.ask_for(1, NODE, node=node) == Claims(word, [])
            assert broker.client.hget(keys.SPARE, NODE) == f"{spare} 10 0".encode()

    def test_an_owed_lock_that_somebody_took_is_waited_for(self, broker: Broker) -> None:
        broker.queues = ("a", "b")
        broker.put("first", "k", queue="a")
        claim_id, _ = broker.take(NODE, "a")
        broker.scripts.give_back(NODE, claim_id)
        broker.steal_lock("k")
        broker.put("thief", "k", queue="b")
        claim_id, _ = broker.take(OTHER, "b")
        assert broker.ask(NODE, "a")[1] == "nothing"
        broker.finish(OTHER, claim_id)
        assert broker.drain(NODE) == ["first"]

    def test_a_stock_message_is_claimed_bare(self, broker: Broker) -> None:
        broker.client.lpush(QUEUE, message("t", stock=True))
        _, claimed = broker.claim(NODE)
        assert (claimed.key, claimed.qualified) == ("", False)

    @pytest.mark.parametrize("ends", ["given back", "lost reply", "reaped", "left"])
    def test_a_bare_message_that_came_back_is_still_bare(self, broker: Broker, ends: str) -> None:
        # Taken for one of ours it would run without the lock of its key.
        broker.client.lpush(QUEUE, message("t", stock=True))
        claim_id, _ = broker.claim(NODE)
        if ends == "given back":
            broker.scripts.give_back(NODE, claim_id)
        elif ends == "lost reply":
            broker.scripts.renew(NODE, 60, 1, [])
        elif ends == "reaped":
            broker.expire(NODE)
            broker.scripts.reap(NODE)
        else:
            broker.scripts.leave(NODE)
        _, claimed = broker.claim(OTHER)
        assert not claimed.qualified

    def test_a_server_that_forgot_the_script_is_taught_again(self, broker: Broker) -> None:
        broker.put("t")
        broker.client.script_flush()
        assert broker.take(NODE)[1] == "t"


class TestPut:
    def test_words(self, broker: Broker) -> None:
        now = broker.now_ms()
        assert broker.put("now") == "queued"
        assert broker.put("past", due_ms=now - 1) == "queued"
        assert broker.put("future", due_ms=now + 60_000) == "delayed"
        assert broker.drain(NODE) == ["now", "past"]

    def test_it_rings_but_not_without_end(self, broker: Broker) -> None:
        for number in range(150):
            broker.put(f"t{number}")
        assert broker.client.llen(keys.BELL) == 100

    def test_at_the_memory_limit_jobs_are_refused_and_accepted_ones_end(
        self, broker: Broker
    ) -> None:
        for task, key in (("a", "k"), ("b", "k"), ("c", None), ("d", None)):
            broker.put(task, key)
        full_claims = [broker.take(NODE), broker.take(NODE)]
        broker.client.config_set("maxmemory", 1)
        with pytest.raises(BrokerFull, match=f"queue {QUEUE}"):
            broker.put("refused")
        with pytest.raises(BrokerFull):
            broker.put("refused", due_ms=broker.now_ms() + 60_000)
        broker.client.script_flush()
        assert broker.scripts.renew(NODE, 60, 99, [claim_id for claim_id, _ in full_claims])
        assert broker.scripts.give_back(NODE, full_claims[0][0], lost=True) == "given back"
        assert broker.finish(NODE, full_claims[1][0]) == "finished"
        assert broker.take(NODE)[1] == "a"
        broker.join(NODE, lease=-1)
        assert broker.scripts.reap(NODE) == 1
        broker.join(NODE)
        assert broker.scripts.lead("duty", "token", 5)
        state = Announcement("a", "celery-task-meta-a", b"{}", None)
        assert [told.word for told in Index(broker.client).announce([state], 60)] == ["announced"]
        assert broker.drain(OTHER) == ["a", "b", "d"]
        broker.client.config_set("maxmemory", 0)
        assert broker.put("taken") == "queued"


class TestRequalify:
    def bare(self, broker: Broker, task: str = "t") -> str:
        broker.client.lpush(QUEUE, message(task, stock=True))
        claim_id, claimed = broker.claim(NODE)
        assert not claimed.qualified
        return claim_id

    def test_a_free_key_is_locked(self, broker: Broker) -> None:
        claim_id = self.bare(broker)
        assert broker.scripts.requalify(NODE, claim_id, QUEUE, "k", None) == "locked"
        assert broker.lock_of("k") == claim_id
        broker.put("ours", "k")
        assert broker.ask(OTHER)[1] == "nothing"
        broker.finish(NODE, claim_id)
        assert broker.drain(OTHER) == ["ours"]

    def test_a_key_that_this_claim_has_stays_its(self, broker: Broker) -> None:
        claim_id = self.bare(broker)
        for _ in range(2):
            assert broker.scripts.requalify(NODE, claim_id, QUEUE, "k", None) == "locked"
        assert broker.lock_of("k") == claim_id

    def test_a_locked_key_is_waited_for(self, broker: Broker) -> None:
        broker.put("ours", "k")
        ours, _ = broker.take(OTHER)
        claim_id = self.bare(broker)
        assert broker.scripts.requalify(NODE, claim_id, QUEUE, "k", None) == "parked"
        assert broker.finish(NODE, claim_id) == "superseded"
        broker.finish(OTHER, ours)
        _, claimed = broker.claim(NODE)
        assert (claimed.key, claimed.qualified) == ("k", True)

    def test_no_key_is_an_answer(self, broker: Broker) -> None:
        claim_id = self.bare(broker)
        assert broker.scripts.requalify(NODE, claim_id, QUEUE, "", None) == "locked"
        broker.scripts.give_back(NODE, claim_id)
        assert broker.claim(OTHER)[1].qualified

    def test_what_is_not_due_is_put_aside_bare(self, broker: Broker) -> None:
        claim_id = self.bare(broker)
        due = broker.now_ms() + 60_000
        assert broker.scripts.requalify(NODE, claim_id, QUEUE, "k", due) == "delayed"
        assert broker.lock_of("k") is None
        assert broker.ask(NODE)[1] == "nothing"
        name = keys.delayed(QUEUE)
        (waiting,) = broker.client.zrange(name, 0, -1)
        broker.client.zadd(name, {waiting: 1})
        assert not broker.claim(OTHER)[1].qualified

    def test_what_is_not_due_lets_its_lock_go(self, broker: Broker) -> None:
        broker.put("early", "k")
        broker.put("heir", "k")
        claim_id, _ = broker.take(NODE)
        assert broker.ask(OTHER)[1] == "nothing"
        due = broker.now_ms() + 60_000
        assert broker.scripts.requalify(NODE, claim_id, QUEUE, "k", due) == "delayed"
        assert broker.drain(OTHER) == ["heir"]

    def test_a_due_time_that_has_passed_is_none(self, broker: Broker) -> None:
        claim_id = self.bare(broker)
        past = broker.now_ms() - 1
        assert broker.scripts.requalify(NODE, claim_id, QUEUE, "k", past) == "locked"

    def test_a_claim_that_is_gone(self, broker: Broker) -> None:
        claim_id = self.bare(broker)
        broker.finish(NODE, claim_id)
        assert broker.scripts.requalify(NODE, claim_id, QUEUE, "k", None) == "superseded"
        assert broker.lock_of("k") is None


class TestFinish:
    def test_nothing_is_left(self, broker: Broker) -> None:
        broker.put("t", "k")
        claim_id, _ = broker.take(NODE)
        broker.scripts.give_back(NODE, claim_id, lost=True)
        claim_id, _ = broker.take(NODE)
        assert broker.finish(NODE, claim_id) == "finished"
        picture = broker.audit()
        assert not picture.places()
        assert not picture.locks
        assert not picture.deliveries

    def test_the_lock_goes_to_who_parked_first(self, broker: Broker) -> None:
        broker.put("holder", "k")
        claim_id, _ = broker.take(NODE)
        for number in range(12):
            broker.put(f"t{number}", "k")
        assert broker.ask(NODE)[1] == "nothing"
        broker.finish(NODE, claim_id)
        assert broker.lock_of("k") == "owed:t0"
        assert broker.drain(NODE) == [f"t{number}" for number in range(12)]

    def test_parked_jobs_are_served_by_priority_then_arrival(self, broker: Broker) -> None:
        broker.put("holder", "k")
        claim_id, _ = broker.take(NODE)
        for task, priority in (("c1", 9), ("b1", 4), ("c2", 9), ("a", 0), ("b2", 5), ("b0", 3)):
            broker.put(task, "k", priority=priority)
            assert broker.ask(NODE)[1] == "nothing"
        broker.finish(NODE, claim_id)
        assert broker.drain(NODE) == ["a", "b0", "b1", "b2", "c1", "c2"]

    def test_an_heir_is_served_before_the_queues(self, broker: Broker) -> None:
        broker.put("holder", "k")
        claim_id, _ = broker.take(NODE)
        broker.put("heir", "k", priority=9)
        assert broker.ask(NODE)[1] == "nothing"
        broker.put("late", "k")
        broker.put("other")
        broker.finish(NODE, claim_id)
        assert broker.drain(NODE) == ["heir", "late", "other"]

    def test_an_heir_rings(self, broker: Broker) -> None:
        broker.put("holder", "k")
        claim_id, _ = broker.take(NODE)
        broker.put("heir", "k")
        assert broker.ask(NODE)[1] == "nothing"
        broker.client.delete(keys.BELL)
        broker.finish(NODE, claim_id)
        assert broker.client.llen(keys.BELL) == 1

    def test_twice(self, broker: Broker) -> None:
        broker.put("t")
        claim_id, _ = broker.take(NODE)
        assert broker.finish(NODE, claim_id) == "finished"
        assert broker.finish(NODE, claim_id) == "superseded"

    def test_a_claim_that_was_reaped(self, broker: Broker) -> None:
        broker.put("t", "k")
        claim_id, _ = broker.take(NODE)
        broker.expire(NODE)
        broker.scripts.reap(NODE)
        second, _ = broker.take(OTHER)
        assert broker.finish(NODE, claim_id) == "superseded"
        assert broker.lock_of("k") == second

    def test_a_run_whose_lock_was_taken_away_frees_not_its_successors(self, broker: Broker) -> None:
        broker.put("first", "k")
        first, _ = broker.take(NODE)
        broker.steal_lock("k")
        broker.put("second", "k")
        second, _ = broker.take(OTHER)
        broker.put("third", "k")
        assert broker.finish(NODE, first) == "finished"
        assert broker.lock_of("k") == second
        assert broker.ask(NODE)[1] == "nothing"
        broker.finish(OTHER, second)
        assert broker.drain(NODE) == ["third"]

    def test_those_parked_behind_a_lock_that_was_taken_away_are_served(
        self, broker: Broker
    ) -> None:
        broker.put("first", "k")
        first, _ = broker.take(NODE)
        broker.put("waits", "k")
        assert broker.ask(OTHER)[1] == "nothing"
        broker.steal_lock("k")
        assert broker.finish(NODE, first) == "finished"
        assert broker.drain(OTHER) == ["waits"]


class TestGiveBack:
    def test_to_the_front_with_its_lock(self, broker: Broker) -> None:
        broker.put("t", "k")
        broker.put("behind")
        claim_id, _ = broker.take(NODE)
        assert broker.scripts.give_back(NODE, claim_id) == "given back"
        assert broker.lock_of("k") == "owed:t"
        assert broker.drain(OTHER) == ["t", "behind"]

    def test_before_those_that_are_owed_a_lock(self, broker: Broker) -> None:
        for task, key in (("holder", "k"), ("came back", None), ("heir", "k")):
            broker.put(task, key)
        holder, _ = broker.take(NODE)
        claim_id, _ = broker.take(NODE)
        assert broker.ask(NODE)[1] == "nothing"
        broker.finish(NODE, holder)
        broker.scripts.give_back(NODE, claim_id)
        assert broker.drain(OTHER) == ["came back", "heir"]

    def test_before_those_that_wait_for_its_lock(self, broker: Broker) -> None:
        broker.put("t", "k")
        claim_id, _ = broker.take(NODE)
        broker.put("waits", "k")
        assert broker.ask(NODE)[1] == "nothing"
        broker.scripts.give_back(NODE, claim_id)
        assert broker.drain(OTHER) == ["t", "waits"]

    def test_only_lost_ones_count(self, broker: Broker) -> None:
        broker.put("t")
        lost = []
        for is_lost in (False, True, False, True):
            claim_id, claimed = broker.claim(NODE)
            lost.append(claimed.lost_deliveries)
            broker.scripts.give_back(NODE, claim_id, lost=is_lost)
        assert lost == [0, 0, 1, 1]
        assert broker.lost("t") == 2

    def test_twice_counts_once(self, broker: Broker) -> None:
        broker.put("t")
        claim_id, _ = broker.take(NODE)
        assert broker.scripts.give_back(NODE, claim_id, lost=True) == "given back"
        assert broker.scripts.give_back(NODE, claim_id, lost=True) == "superseded"
        assert broker.lost("t") == 1

    def test_without_its_lock_it_waits_for_it(self, broker: Broker) -> None:
        broker.put("first", "k")
        first, _ = broker.take(NODE)
        broker.steal_lock("k")
        broker.put("second", "k")
        second, _ = broker.take(OTHER)
        assert broker.scripts.give_back(NODE, first) == "given back"
        assert broker.lock_of("k") == second
        assert broker.ask(NODE)[1] == "nothing"
        broker.finish(OTHER, second)
        assert broker.drain(NODE) == ["first"]

    def test_a_lock_that_nobody_took_is_its_again(self, broker: Broker) -> None:
        broker.put("t", "k")
        claim_id, _ = broker.take(NODE)
        broker.steal_lock("k")
        broker.scripts.give_back(NODE, claim_id)
        assert broker.lock_of("k") == "owed:t"
        assert broker.drain(OTHER) == ["t"]

    def test_anothers_claim_is_not_mine_to_give(self, broker: Broker) -> None:
        broker.put("t")
        claim_id, _ = broker.take(NODE)
        assert broker.scripts.give_back(OTHER, claim_id) == "superseded"
        assert broker.finish(OTHER, claim_id) == "superseded"
        assert broker.finish(NODE, claim_id) == "finished"


class TestRenew:
    def test_it_moves_the_end_of_the_lease(self, broker: Broker) -> None:
        broker.client.zadd(keys.LEASES, {NODE: broker.now_ms() + 1000})
        assert broker.scripts.renew(NODE, 60, 0, []) == "renewed"
        left = (broker.client.zscore(keys.LEASES, NODE) or 0) - broker.now_ms()
        assert 55_000 < left <= 60_000

    def test_what_the_worker_does_not_know_goes_back(self, broker: Broker) -> None:
        for task in ("known", "unknown"):
            broker.put(task, f"key of {task}")
        known, _ = broker.take(NODE)
        broker.take(NODE)
        assert broker.scripts.renew(NODE, 60, 99, [known]) == "renewed"
        assert broker.take(OTHER)[1] == "unknown"
        assert broker.lost("unknown") == 0
        assert broker.finish(NODE, known) == "finished"

    def test_what_was_asked_for_since_stays(self, broker: Broker) -> None:
        # The renewal was on its way while the claim was: it can't have known of it.
        broker.put("t", "k")
        claim_id, _ = broker.take(NODE)
        assert claim_id == "claim-1"
        assert broker.scripts.renew(NODE, 60, 0, []) == "renewed"
        assert broker.lock_of("k") == claim_id
        assert broker.scripts.renew(NODE, 60, 1, []) == "renewed"
        assert broker.lock_of("k") == "owed:t"

    def test_a_lease_that_has_ended_but_was_not_reaped_goes_on(self, broker: Broker) -> None:
        broker.put("t")
        claim_id, _ = broker.take(NODE)
        broker.expire(NODE)
        assert broker.scripts.renew(NODE, 60, 99, [claim_id]) == "renewed"
        assert broker.scripts.reap(NODE) is None
        assert broker.finish(NODE, claim_id) == "finished"

    @pytest.mark.parametrize("how", ["never joined", "reaped", "left"])
    def test_a_lease_that_is_gone(self, broker: Broker, how: str) -> None:
        if how == "reaped":
            broker.expire(NODE)
            assert broker.scripts.reap(NODE) == 0
        elif how == "left":
            assert broker.scripts.leave(NODE) == 0
        member = "node-3:cccc" if how == "never joined" else NODE
        assert broker.scripts.renew(member, 60, 0, []) == "expelled"
        assert not broker.client.zscore(keys.LEASES, member)


class TestReap:
    def test_a_living_node_keeps_its_claims(self, broker: Broker) -> None:
        broker.put("t")
        claim_id, _ = broker.take(NODE)
        assert broker.scripts.reap(NODE) is None
        assert broker.finish(NODE, claim_id) == "finished"

    def test_a_dead_nodes_claims_go_back_with_their_locks(self, broker: Broker) -> None:
        for task, key in (("a", "k"), ("b", None)):
            broker.put(task, key)
            broker.take(NODE)
        broker.put("waits", "k")
        assert broker.ask(OTHER)[1] == "nothing"
        broker.expire(NODE)
        assert broker.scripts.reap(NODE) == 2
        assert broker.lock_of("k") == "owed:a"
        assert (broker.lost("a"), broker.lost("b")) == (1, 1)
        assert sorted(broker.drain(OTHER)) == ["a", "b", "waits"]
        assert NODE not in broker.audit().leases

    def test_more_than_one_script_may_touch(self, broker: Broker) -> None:
        for number in range(450):
            broker.put(f"t{number}", f"k{number}")
            broker.take(NODE)
        broker.expire(NODE)
        assert broker.scripts.reap(NODE) == 450
        assert broker.client.hlen(keys.DELIVERIES) == 450
        broker.audit()
        assert sorted(broker.drain(OTHER)) == sorted(f"t{number}" for number in range(450))

    def test_leaving_is_no_loss(self, broker: Broker) -> None:
        broker.put("t", "k")
        broker.take(NODE)
        assert broker.scripts.leave(NODE) == 1
        assert broker.lost("t") == 0
        assert NODE not in broker.audit().leases
        assert broker.claim(OTHER)[1].lost_deliveries == 0

    def test_one_whose_lock_was_taken_away_waits_for_it(self, broker: Broker) -> None:
        broker.put("first", "k")
        broker.take(NODE)
        broker.steal_lock("k")
        broker.put("second", "k")
        second, _ = broker.take(OTHER)
        broker.expire(NODE)
        assert broker.scripts.reap(NODE) == 1
        assert broker.lock_of("k") == second
        broker.finish(OTHER, second)
        assert broker.drain(OTHER) == ["first"]

    def test_twice(self, broker: Broker) -> None:
        broker.put("t")
        broker.take(NODE)
        broker.expire(NODE)
        assert broker.scripts.reap(NODE) == 1
        assert broker.scripts.reap(NODE) == 0
        assert broker.lost("t") == 1


class TestEveryScript:
    NAMES = (
        *("announce", "claim", "finish", "give_back", "lead", "put", "reap", "register"),
        *("renew", "requalify"),
    )

    @pytest.mark.parametrize("name", NAMES)
    def test_it_has_the_name_that_the_server_gives_it(self, broker: Broker, name: str) -> None:
        assert broker.client.script_load(source(name)) == sha_of(source(name))

    def test_they_survive_a_restart_of_the_server(
        self, broker: Broker, redis_server: RedisServer
    ) -> None:
        broker.put("parked-1", "k")
        claim_id, _ = broker.take(NODE)
        broker.put("parked-2", "k")
        broker.put("delayed", due_ms=broker.now_ms() + 60_000)
        assert broker.ask(OTHER)[1] == "nothing"
        before = broker.audit()
        redis_server.restart()
        assert broker.audit() == before
        assert broker.scripts.renew(NODE, 60, 99, [claim_id]) == "renewed"
        assert broker.finish(NODE, claim_id) == "finished"
        assert broker.drain(OTHER) == ["parked-2"]

    def test_a_server_that_lost_everything_says_expelled(
        self, broker: Broker, redis_server: RedisServer
    ) -> None:
        broker.put("t", "k")
        claim_id, _ = broker.take(NODE)
        redis_server.wipe()
        assert broker.finish(NODE, claim_id) == "superseded"
        assert broker.scripts.give_back(NODE, claim_id) == "superseded"
        assert broker.scripts.renew(NODE, 60, 9, [claim_id]) == "expelled"
        assert broker.ask(NODE)[1] == "expelled"

    def test_an_unknown_lock_type_is_refused_by_the_server_not_overwritten(
        self, broker: Broker
    ) -> None:
        broker.client.set(keys.LOCKS, "an operator's slip")
        broker.put("t", "k")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            broker.ask(NODE)
        broker.client.delete(keys.LOCKS)
