"""Where a task is, and how many are before it: found without changing anything."""

from __future__ import annotations

from typing import Any

import pytest

from broker import keys
from broker.needs import Needs
from broker.producing import Put
from broker.whereabouts import Found, Holder, find, holder_of
from tests.broker_kit import QUEUE, Broker, message, node_json

NODE = "n:1"
SMALL = node_json((2, 10, 1), patience=0)


@pytest.fixture(autouse=True)
def node(broker: Broker) -> None:
    broker.queues = (QUEUE, "other")
    broker.join(NODE)


def found(broker: Broker, task: str) -> Found:
    before = everything(broker)
    found = find(broker.client, task)
    assert everything(broker) == before
    assert found is not None
    return found


def everything(broker: Broker) -> dict[bytes, Any]:
    return {name: broker.client.dump(name) for name in broker.client.scan_iter()}


def test_in_its_queue_behind_others_and_other_priorities(broker: Broker) -> None:
    for number in range(3):
        broker.put(f"same-{number}", priority=3)
    broker.put("t", "k", priority=3, cohort={"key": "k", "needs": "2 5 0 ssd"})
    broker.put("after", priority=3)
    broker.put("less urgent", priority=6)
    broker.put("more urgent", priority=0)
    broker.put("of another queue", queue="other")
    at = found(broker, "t")
    assert (at.where, at.queue, at.priority, at.before, at.of) == ("queued", QUEUE, 3, 4, 6)
    assert (at.task, at.key, at.needs) == ("tests.job", "k", Needs(2, 5, 0, frozenset({"ssd"})))
    assert found(broker, "less urgent").before == 6
    assert found(broker, "of another queue").queue == "other"
    broker.client.delete("other")


def test_delayed(broker: Broker) -> None:
    due = broker.now_ms() + 60_000
    broker.put("t", due_ms=due, queue="other")
    at = found(broker, "t")
    assert (at.where, at.queue, at.due_ms) == ("delayed", "other", due)


def test_parked_by_priority_then_arrival(broker: Broker) -> None:
    broker.put("holder", "k")
    held, _ = broker.take(NODE)
    for task, priority in (("first", 3), ("t", 3), ("urgent", 0), ("late", 3)):
        broker.put(task, "k", priority=priority)
    broker.put("other holder", "k2")
    broker.put("of another key", "k2")
    broker.ask_for(10, NODE)
    at = found(broker, "t")
    assert (at.where, at.key, at.before, at.of) == ("parked", "k", 2, 4)
    assert holder_of(broker.client, "k") == Holder("holder", held, NODE)
    broker.finish(NODE, held)
    at = found(broker, "urgent")
    assert (at.where, at.key, at.before, at.of) == ("ready", "k", 0, 1)
    assert holder_of(broker.client, "k") == Holder("urgent")
    assert holder_of(broker.client, "of nobody") is None


def test_waiting_for_a_node_and_who_keeps_room(broker: Broker) -> None:
    for task in ("first", "t"):
        broker.put(task, cohort={"needs": "2 2 0"})
    broker.put("of another shape", cohort={"needs": "9 9 0"})
    busy = node_json((2, 10, 1), (1, 10, 1), patience=0)
    for _ in range(2):
        assert not broker.ask_for(5, NODE, node=busy).claimed
    at = found(broker, "t")
    assert (at.where, at.needs, at.before, at.of, at.kept_by) == ("waiting", Needs(2, 2), 1, 2, "")
    assert found(broker, "first").kept_by == NODE
    assert found(broker, "of another shape").of == 1


def test_claimed(broker: Broker) -> None:
    broker.put("t", "k")
    claim_id, _ = broker.take(NODE)
    at = found(broker, "t")
    assert (at.where, at.claim_id, at.member, at.key) == ("claimed", claim_id, NODE, "k")


def test_nowhere_also_when_its_name_is_in_another_message(broker: Broker) -> None:
    broker.put("child", parent_id="t")
    broker.put("delayed child", parent_id="t", due_ms=broker.now_ms() + 60_000)
    broker.client.lpush(QUEUE, '"t", which is no message')
    assert find(broker.client, "t") is None


@pytest.mark.parametrize("task", ["é-ü", 'with "quotes"', "back\\slash", '{"task":'])
def test_whatever_it_is_called(broker: Broker, task: str) -> None:
    broker.put("holder", '{"k')
    broker.put(task, '{"k')
    assert found(broker, task).where == "queued"
    held, _ = broker.take(NODE)
    broker.ask(NODE)
    assert found(broker, task).where == "parked"
    broker.finish(NODE, held)
    assert found(broker, task).where == "ready"
    assert broker.take(NODE)[1] == task
    assert found(broker, task).where == "claimed"


def test_among_many_it_tells_how_far_it_is(broker: Broker) -> None:
    for number in range(2500):
        broker.client.lpush(QUEUE, f'{{"headers": {{"id": "t{number}"}}}}')
    broker.put("t")
    looked: list[int] = []
    at = find(broker.client, "t", looked.append)
    assert at is not None
    assert at.before == 2500
    assert looked == [1000, 2000]


def test_ready_in_the_order_in_which_they_are_served(broker: Broker) -> None:
    ids = []
    for task in ("last", "t", "first"):
        broker.put(task)
        ids.append(broker.take(NODE)[0])
    for claim_id in ids:
        broker.scripts.give_back(NODE, claim_id)
    assert [found(broker, task).before for task in ("first", "t", "last")] == [0, 1, 2]
    assert broker.drain(NODE) == ["first", "t", "last"]


def test_one_that_is_put_again_where_was_looked_already(broker: Broker) -> None:
    broker.put("t")
    for number in range(1000):
        broker.put(f"delayed-{number}", due_ms=broker.now_ms() + 60_000)
    claim_id, _ = broker.take(NODE)
    broker.client.hdel(keys.CLAIMED, "t")  # As if it had been taken a moment later.

    def retry(count: int) -> None:
        again = Put(QUEUE, QUEUE, message("t", tag="again"), "")
        broker.scripts.requeue(NODE, claim_id, again)

    at = find(broker.client, "t", retry)
    assert at is not None
    assert at.where == "queued"


def test_one_that_moves_on_while_it_is_looked_for(broker: Broker) -> None:
    """Its queue has been looked through when a node that dies puts it back to the front."""
    broker.put("t")
    for number in range(1000):
        broker.put(f"delayed-{number}", due_ms=broker.now_ms() + 60_000)
    claim_id, _ = broker.take(NODE)
    broker.client.hdel(keys.CLAIMED, "t")  # As if it had been taken a moment later.

    def give_back(count: int) -> None:
        broker.client.hset(keys.CLAIMED, "t", claim_id)
        broker.scripts.give_back(NODE, claim_id)

    at = find(broker.client, "t", give_back)
    assert at is not None
    assert at.where == "ready"
