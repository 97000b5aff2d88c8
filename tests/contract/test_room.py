"""What fits a node, what waits for one, what is claimed ahead, and what never runs: the scripts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from broker import keys
from broker.claims import Claims
from broker.needs import NONE, Needs
from broker.producing import Put
from tests.broker_kit import QUEUE, Broker, list_of, message, node_json, task_of

NODE, OTHER = "n:1", "n:2"
SMALL = (2, 10, 1)


@pytest.fixture(autouse=True)
def nodes(broker: Broker) -> None:
    broker.join(NODE)
    broker.join(OTHER)


def put(broker: Broker, task: str, needs: Needs = NONE, **about: Any) -> None:
    """A job with needs."""
    priority = about.pop("priority", 0)
    queue = about.pop("queue", QUEUE)
    name = about.pop("name", "tests.job")
    cohort = {"needs": needs.text, **about}
    broker.put(task, about.get("key"), priority=priority, queue=queue, cohort=cohort, name=name)


def tasks_of(claims: Claims) -> list[str]:
    return [task_of(claimed) for claimed in claims.claimed]


def ask(broker: Broker, node: str, most: int = 10, member: str = NODE) -> list[str]:
    return tasks_of(broker.ask_for(most, member, node=node))


def free(*spare: int, **options: Any) -> str:
    """A small node with so much to spare."""
    return node_json(SMALL, spare or SMALL, **options)


class TestBatches:
    def test_several_in_one_step_in_order(self, broker: Broker) -> None:
        for number in range(5):
            broker.put(f"t{number}")
        claims = broker.ask_for(3, NODE)
        assert (claims.word, tasks_of(claims)) == ("again", ["t0", "t1", "t2"])
        assert len({claimed.claim_id for claimed in claims.claimed}) == 3
        claims = broker.ask_for(3, NODE)
        assert (claims.word, tasks_of(claims)) == ("all", ["t3", "t4"])

    def test_they_end_in_one_step(self, broker: Broker) -> None:
        for number in range(3):
            broker.put(f"t{number}", f"k{number}")
        ids = [claimed.claim_id for claimed in broker.ask_for(3, NODE).claimed]
        words = broker.scripts.finish(NODE, [*ids, ids[0], "claim-of-nobody"])
        assert words == ["finished"] * 3 + ["superseded"] * 2
        assert not broker.audit().places()

    @pytest.mark.parametrize("something_waits", [True, False])
    def test_what_ends_wakes_its_node_if_something_waits_for_room(
        self, broker: Broker, something_waits: bool
    ) -> None:
        broker.put("t")
        claim_id, _ = broker.take(NODE)
        if something_waits:
            put(broker, "big", Needs(3))
            assert ask(broker, free()) == []
        broker.finish(NODE, claim_id)
        assert broker.client.llen(keys.own_bell(NODE)) == something_waits

    def test_two_of_one_key_in_one_batch(self, broker: Broker) -> None:
        broker.put("first", "k")
        broker.put("second", "k")
        assert ask(broker, node_json()) == ["first"]
        assert [claim["task"] for _, claim in broker.audit().parked] == ["second"]


class TestWhatFits:
    @pytest.mark.parametrize(
        "needs",
        [Needs(3), Needs(0, 11), Needs(0, 0, 2), Needs(1, 1, 1, frozenset({"ssd"}))],
        ids=["cpus", "memory", "gpus", "label"],
    )
    def test_what_does_not_fit_blocks_nobody(self, broker: Broker, needs: Needs) -> None:
        put(broker, "big", needs)
        put(broker, "small", Needs(1, 1))
        assert ask(broker, free()) == ["small"]
        assert [shape for shape, _ in broker.audit().waiting] == [f"{QUEUE}\1{needs.text}"]
        assert ask(broker, node_json(labels=("ssd",)), member=OTHER) == ["big"]
        assert not broker.audit().waiting

    def test_no_more_than_is_spare(self, broker: Broker) -> None:
        for number in range(4):
            put(broker, f"t{number}", Needs(1, 4))
        assert ask(broker, free()) == ["t0", "t1"]
        assert broker.client.hget(keys.SPARE, NODE) == b"0 2 1"
        assert ask(broker, free(0, 2, 1)) == []
        assert ask(broker, free(1, 6, 1)) == ["t2"]

    def test_no_more_than_has_a_process(self, broker: Broker) -> None:
        for number in range(3):
            broker.put(f"t{number}")
        claims = broker.ask_for(5, NODE, node=node_json(slots=2))
        assert (claims.word, tasks_of(claims)) == ("busy", ["t0", "t1"])
        assert not broker.audit().waiting  # It stays in its queue, for all to count.

    def test_arrival_and_priority_decide_among_those_that_waited(self, broker: Broker) -> None:
        put(broker, "late but urgent", Needs(2, 2), priority=0)
        put(broker, "a", Needs(1, 9), priority=3)
        put(broker, "b", Needs(2, 9), priority=3)
        assert ask(broker, free(0, 10, 1)) == []
        put(broker, "newest", Needs(2, 1), priority=3)
        assert ask(broker, free(), most=1) == ["late but urgent"]
        assert ask(broker, free(), most=1) == ["a"]
        assert ask(broker, free(), most=1) == ["b"]
        assert ask(broker, free(), most=1) == ["newest"]

    def test_one_that_waits_for_a_node_takes_no_lock(self, broker: Broker) -> None:
        put(broker, "big", Needs(2, 2), key="k")
        assert ask(broker, free(1, 10, 1)) == []
        assert broker.lock_of("k") is None
        put(broker, "small", Needs(1, 1), key="k")
        assert ask(broker, free(1, 10, 1)) == ["small"]
        assert ask(broker, free(), member=OTHER) == []
        assert [claim["task"] for _, claim in broker.audit().parked] == ["big"]

    def test_a_lock_is_owed_to_one_that_fits_no_node_now(self, broker: Broker) -> None:
        put(broker, "first", Needs(1, 1), key="k")
        put(broker, "second", Needs(2, 2), key="k")
        (first,) = broker.ask_for(5, NODE, node=free()).claimed
        broker.finish(NODE, first.claim_id)
        assert ask(broker, free(1, 10, 1)) == []
        assert broker.lock_of("k") == "owed:second"
        put(broker, "third", Needs(1, 1), key="k")
        assert ask(broker, free(1, 10, 1)) == []
        assert ask(broker, free()) == ["second"]

    def test_what_came_back_is_first_among_those_that_wait(self, broker: Broker) -> None:
        for number in range(2):
            put(broker, f"t{number}", Needs(2, 2))
        (claimed,) = broker.ask_for(1, NODE, node=free()).claimed
        assert ask(broker, free(0, 10, 1)) == []
        broker.scripts.give_back(NODE, claimed.claim_id)
        assert ask(broker, free(0, 10, 1)) == []
        assert ask(broker, free(), most=1) == ["t0"]

    def test_what_a_stock_producer_wrote_waits_too(self, broker: Broker) -> None:
        broker.client.lpush(QUEUE, message("t", stock=True))
        (claimed,) = broker.ask_for(1, NODE, node=free()).claimed
        needs = Needs(9, 9)
        word = broker.scripts.requalify(
            NODE, claimed.claim_id, QUEUE, "k", None, needs=needs.text, fits=False
        )
        assert word == "waiting"
        assert ask(broker, free()) == []
        (again,) = broker.ask_for(1, OTHER).claimed
        assert (again.needs, again.key, again.qualified) == (needs.text, "k", True)
        assert broker.lock_of("k") == again.claim_id

    def test_one_that_has_its_lock_and_turns_out_not_to_fit_lets_it_go(
        self, broker: Broker
    ) -> None:
        put(broker, "first", Needs(1, 1), key="k")
        put(broker, "second", Needs(1, 1), key="k")
        claims = broker.ask_for(2, NODE, node=free())
        (first,) = claims.claimed
        needs = Needs(1, 1, labels=frozenset({"other"}))
        word = broker.scripts.requalify(
            NODE, first.claim_id, QUEUE, "k", None, needs=needs.text, fits=False
        )
        assert word == "waiting"
        assert ask(broker, free()) == ["second"]


class TestAhead:
    def test_short_ones_up_to_so_much_work(self, broker: Broker) -> None:
        for number in range(10):
            put(broker, f"t{number}", Needs(1, 1))
        node = free(1, 10, 1, slots=1, ahead=1000, takes={"tests.job": 400})
        claims = broker.ask_for(10, NODE, node=node)
        assert (claims.word, tasks_of(claims)) == ("busy", ["t0", "t1", "t2"])

    def test_not_what_the_node_could_never_run(self, broker: Broker) -> None:
        put(broker, "big", Needs(9, 9))
        node = free(0, 0, 0, ahead=1000, takes={"tests.job": 1})
        assert ask(broker, node) == []

    def test_not_what_takes_long_or_is_unknown(self, broker: Broker) -> None:
        put(broker, "unknown", Needs(1, 1), name="tests.unknown")
        put(broker, "short", Needs(1, 1))
        node = free(0, 0, 0, ahead=1000, takes={"tests.job": 400, "tests.long": 9000})
        assert ask(broker, node) == ["short"]


class TestKeepingRoom:
    def test_who_has_waited_too_long_gets_a_node(self, broker: Broker) -> None:
        put(broker, "big", Needs(2, 2))
        put(broker, "small", Needs(1, 1))
        busy = free(1, 10, 1, patience=0)
        assert ask(broker, busy, most=1) == ["small"]
        put(broker, "small again", Needs(1, 1))
        assert ask(broker, busy) == []
        assert broker.client.hget(keys.RESERVED, NODE).startswith(f"{QUEUE}\1".encode())
        # Another node goes on, and keeps no room for the same job.
        assert ask(broker, busy, member=OTHER) == ["small again"]
        assert broker.client.hlen(keys.RESERVED) == 1
        assert ask(broker, free(patience=0)) == ["big"]
        assert not broker.client.exists(keys.RESERVED)

    def test_it_may_run_elsewhere_and_the_room_is_free_again(self, broker: Broker) -> None:
        put(broker, "big", Needs(2, 2))
        assert ask(broker, free(1, 10, 1, patience=0)) == []
        assert ask(broker, free(1, 10, 1, patience=0)) == []
        put(broker, "small", Needs(1, 1))
        assert ask(broker, free(1, 10, 1, patience=0)) == []
        assert ask(broker, free(patience=0), member=OTHER, most=1) == ["big"]
        assert ask(broker, free(1, 10, 1, patience=0)) == ["small"]

    def test_it_ran_elsewhere_and_nothing_else_waits(self, broker: Broker) -> None:
        put(broker, "big", Needs(2, 2))
        for _ in range(2):
            assert ask(broker, free(1, 10, 1, patience=0)) == []
        assert broker.client.hexists(keys.RESERVED, NODE)
        assert ask(broker, free(patience=0), member=OTHER) == ["big"]
        assert ask(broker, free(1, 10, 1, patience=0)) == []
        assert not broker.client.exists(keys.RESERVED)

    def test_before_its_time_nobody_keeps_room(self, broker: Broker) -> None:
        put(broker, "big", Needs(2, 2))
        assert ask(broker, free(1, 10, 1, patience=60_000)) == []
        put(broker, "small", Needs(1, 1))
        assert ask(broker, free(1, 10, 1, patience=60_000)) == ["small"]

    def test_a_node_that_dies_keeps_nothing(self, broker: Broker) -> None:
        put(broker, "big", Needs(2, 2))
        assert ask(broker, free(1, 10, 1, patience=0)) == []
        assert ask(broker, free(1, 10, 1, patience=0)) == []
        broker.expire(NODE)
        broker.scripts.reap(NODE)
        assert not broker.client.exists(keys.RESERVED)
        assert not broker.client.hexists(keys.SPARE, NODE)


class TestConflict:
    def test_skip(self, broker: Broker) -> None:
        broker.put("holder", "k")
        broker.take(NODE)
        put(broker, "skipped", key="k", conflict="skip")
        (claimed,) = broker.ask_for(5, OTHER).claimed
        assert claimed.settled == "skipped: its key was locked"
        assert broker.finish(OTHER, claimed.claim_id) == "finished"
        assert broker.lock_of("k") == "claim-1"

    def test_skip_stays_skipped_when_its_node_dies(self, broker: Broker) -> None:
        broker.put("holder", "k")
        held, _ = broker.take(NODE)
        put(broker, "skipped", key="k", conflict="skip")
        broker.ask_for(5, OTHER)
        broker.finish(NODE, held)
        broker.expire(OTHER)
        broker.scripts.reap(OTHER)
        (claimed,) = broker.ask_for(5, NODE).claimed
        assert claimed.settled == "skipped: its key was locked"
        assert broker.lock_of("k") is None

    def test_a_free_key_is_no_conflict(self, broker: Broker) -> None:
        put(broker, "runs", key="k", conflict="skip")
        (claimed,) = broker.ask_for(5, NODE).claimed
        assert claimed.settled == ""

    def test_replace_the_one_that_waits(self, broker: Broker) -> None:
        broker.put("holder", "k")
        held, _ = broker.take(NODE)
        for number in range(3):
            put(broker, f"t{number}", key="k", conflict="replace")
        put(broker, "another", key="k", name="tests.other")
        claims = broker.ask_for(5, OTHER)
        assert [claim["task"] for _, claim in broker.audit().parked] == ["t2", "another"]
        replaced = [*claims.claimed, *broker.ask_for(5, OTHER).claimed]
        assert {task_of(c): c.settled for c in replaced} == {
            "t0": "replaced by t1",
            "t1": "replaced by t2",
        }
        for claimed in replaced:
            broker.finish(OTHER, claimed.claim_id)
        broker.finish(NODE, held)
        assert broker.drain(NODE) == ["t2", "another"]


class TestSettling:
    @pytest.mark.parametrize("where", ["queued", "parked", "delayed", "waiting"])
    def test_what_waits_is_never_run(self, broker: Broker, where: str) -> None:
        due = broker.now_ms() + 3_600_000 if where == "delayed" else None
        if where == "parked":
            broker.put("holder", "k")
            broker.take(NODE)
        needs = Needs(9, 9) if where == "waiting" else Needs()
        cohort = {"key": "k", "needs": needs.text}
        broker.put("t", "k", due_ms=due, cohort=cohort)
        if where in ("parked", "waiting"):
            broker.ask_for(5, NODE, node=free())
        assert broker.scripts.settle("t", "revoked") == "settled"
        if where == "parked":
            broker.finish(NODE, "claim-1")
        if due is not None:
            (waiting,) = broker.client.zrange(keys.delayed(QUEUE), 0, -1)
            broker.client.zadd(keys.delayed(QUEUE), {waiting: 1})
        (claimed,) = broker.ask_for(5, OTHER).claimed
        assert (task_of(claimed), claimed.settled) == ("t", "revoked")
        broker.finish(OTHER, claimed.claim_id)
        assert broker.lock_of("k") is None
        assert not broker.client.exists(keys.SETTLED)
        assert not broker.audit().places()

    def test_what_a_node_has_is_that_nodes(self, broker: Broker) -> None:
        broker.put("t", "k")
        claim_id, _ = broker.take(NODE)
        assert broker.scripts.settle("t", "revoked") == "running"
        assert not broker.client.exists(keys.SETTLED)
        # It came back: it may have committed, and only a node that reads the log can know.
        broker.scripts.give_back(NODE, claim_id)
        assert broker.scripts.settle("t", "revoked") == "running"
        assert not broker.client.exists(keys.SETTLED)
        broker.drain(OTHER)
        assert broker.scripts.settle("t", "revoked") == "settled"


class TestEnds:
    @pytest.mark.parametrize("later", [False, True])
    def test_a_retry_is_put_with_the_end(self, broker: Broker, later: bool) -> None:
        broker.put("t", "k")
        broker.put("heir", "k")
        claim_id, _ = broker.take(NODE)
        broker.ask(OTHER)
        due = broker.now_ms() + 3_600_000 if later else None
        again = Put(list_of(QUEUE), QUEUE, message("t", "k", tag="again"), "", due)
        assert broker.scripts.requeue(NODE, claim_id, again) == "finished"
        assert broker.scripts.requeue(NODE, claim_id, again) == "superseded"
        assert broker.lock_of("k") == "owed:heir"
        assert broker.drain(OTHER) == (["heir"] if later else ["heir", "t"])
        assert broker.audit().places() == ({"again": 1} if later else {})

    def test_one_that_was_reaped_puts_nothing(self, broker: Broker) -> None:
        broker.put("t")
        claim_id, _ = broker.take(NODE)
        broker.expire(NODE)
        broker.scripts.reap(NODE)
        again = Put(list_of(QUEUE), QUEUE, message("t", tag="again"), "")
        assert broker.scripts.requeue(NODE, claim_id, again) == "superseded"
        assert broker.drain(OTHER) == ["t"]

    def test_a_dead_letter_is_kept(self, broker: Broker) -> None:
        broker.put("t", "k")
        claim_id, _ = broker.take(NODE)
        assert broker.scripts.bury(NODE, claim_id, "it kills its node") == "finished"
        assert broker.scripts.bury(NODE, claim_id, "again") == "superseded"
        about, _, payload = broker.client.hget(keys.DEAD, "t").partition(b"\0")
        told = json.loads(about)
        assert (told["reason"], told["queue"], told["list"]) == ("it kills its node", QUEUE, QUEUE)
        assert payload.decode() == message("t", "k")
        assert broker.lock_of("k") is None
        assert not broker.audit().places()
