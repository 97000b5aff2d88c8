"""What expires: put once, kept through retries, settled when due; and marks nobody came by."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from broker import keys, settled
from broker.journal import note_of, put_once
from broker.producing import Put, Putter, expires_of, identity_of
from scheduler.expiry import Expiry
from tests.broker_kit import QUEUE, Broker, message

NODE = "n:1"


@pytest.fixture(autouse=True)
def node(broker: Broker) -> None:
    broker.join(NODE)


def put(broker: Broker, task: str, expires_ms: int, *, due_ms: int | None = None) -> str:
    """A job that expires."""
    headers = {"id": task}
    one = Put(QUEUE, QUEUE, message(task), identity_of(headers), due_ms, "", (task, expires_ms))
    return Putter(broker.client).put([one])[0]


def expiring(broker: Broker) -> dict[str, int]:
    """What expires when."""
    found = broker.client.zrange(keys.EXPIRING, 0, -1, withscores=True)
    return {name.decode(): int(ends) for name, ends in found}


class Settling:
    """A backend that settles by the script, and keeps a list."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.told: list[tuple[str, str, str]] = []

    def __call__(self, task_id: str, reason: str) -> None:
        self.told.append((task_id, reason, self._broker.scripts.settle(task_id, reason)))


class TestPutting:
    def test_several_of_which_some_expire(self, broker: Broker) -> None:
        puts = [
            Put(
                QUEUE, QUEUE, message(f"t{n}"), f"t{n}:0", None, "", (f"t{n}", n) if n % 2 else None
            )
            for n in range(1, 5)
        ]
        assert Putter(broker.client).put(puts) == ["queued"] * 4
        assert expiring(broker) == {"t1": 1, "t3": 3}
        assert broker.drain(NODE) == ["t1", "t2", "t3", "t4"]

    def test_put_again_it_expires_as_it_did(self, broker: Broker) -> None:
        assert put(broker, "t", 1000) == "queued"
        broker.client.delete(keys.EXPIRING)
        assert put(broker, "t", 2000) == "there"
        assert expiring(broker) == {}

    def test_put_back_from_its_note(self, broker: Broker) -> None:
        told = "2100-01-01T00:00:00+00:00"
        put_once(broker.scripts, note_of(QUEUE, QUEUE, message("t", expires=told)), 60)
        at = int(datetime(2100, 1, 1, tzinfo=UTC).timestamp() * 1000)
        assert expiring(broker) == {"t": at}

    @pytest.mark.parametrize("told", [None, 5, "soon", ""])
    def test_what_is_no_time_is_none(self, told: object) -> None:
        assert expires_of({"id": "t", "expires": told}) is None


class TestEnding:
    def test_what_has_ended_expires_no_more(self, broker: Broker) -> None:
        for task in ("done", "dead"):
            put(broker, task, broker.now_ms() + 60_000)
        broker.finish(NODE, broker.take(NODE)[0])
        assert list(expiring(broker)) == ["dead"]
        broker.scripts.bury(NODE, broker.take(NODE)[0], "why")
        assert expiring(broker) == {}

    def test_a_retry_keeps_its_time_or_gets_a_new_one(self, broker: Broker) -> None:
        put(broker, "t", 1000)
        again = Put(QUEUE, QUEUE, message("t", tag="again"), "")
        assert broker.scripts.requeue(NODE, broker.take(NODE)[0], again) == "finished"
        assert expiring(broker) == {"t": 1000}
        later = Put(QUEUE, QUEUE, message("t", tag="later"), "", expires=("t", 2000))
        assert broker.scripts.requeue(NODE, broker.take(NODE)[0], later) == "finished"
        assert expiring(broker) == {"t": 2000}


class TestDuty:
    def test_what_is_due_is_settled_and_the_rest_waits(self, broker: Broker) -> None:
        now = broker.now_ms()
        put(broker, "queued", now - 1)
        put(broker, "delayed", now - 1, due_ms=now + 60_000)
        put(broker, "later", now + 60_000)
        settling = Settling(broker)
        assert Expiry(broker.scripts, settling, lambda task_ids: None).run_once() == 2
        assert sorted(settling.told) == [
            ("delayed", "expired", "settled"),
            ("queued", "expired", "settled"),
        ]
        assert list(expiring(broker)) == ["later"]
        claims = broker.ask_for(5, NODE).claimed
        assert [claimed.settled for claimed in claims] == ["expired", ""]

    def test_what_runs_is_taken_out(self, broker: Broker) -> None:
        put(broker, "t", broker.now_ms() - 1)
        broker.take(NODE)
        settling = Settling(broker)
        Expiry(broker.scripts, settling, lambda task_ids: None).run_once()
        assert settling.told == [("t", "expired", "running")]
        assert expiring(broker) == {}
        assert not broker.client.exists(keys.SETTLED)

    def test_many_are_settled_in_steps(self, broker: Broker) -> None:
        for number in range(450):
            put(broker, f"t{number}", number + 1)
        settling = Settling(broker)
        assert Expiry(broker.scripts, settling, lambda task_ids: None).run_once() == 450
        assert [task for task, *_ in settling.told] == [f"t{number}" for number in range(450)]
        assert expiring(broker) == {}

    def test_who_dies_on_the_way_leaves_the_rest(self, broker: Broker) -> None:
        for number in range(3):
            put(broker, f"t{number}", number + 1)
        settling = Settling(broker)

        def die_at_the_second(task_id: str, reason: str) -> None:
            if task_id == "t1":
                raise ConnectionError
            settling(task_id, reason)

        duty = Expiry(broker.scripts, die_at_the_second, lambda task_ids: None)
        with pytest.raises(ConnectionError):
            duty.run_once()
        duty._settle = settling
        duty.run_once()
        assert {task for task, *_ in settling.told} == {"t0", "t1", "t2"}
        assert expiring(broker) == {}

    def test_more_time_that_was_given_meanwhile_counts(self, broker: Broker) -> None:
        put(broker, "t", 1000)
        due = settled.due(broker.client)
        broker.client.zadd(keys.EXPIRING, {"t": 2000})
        assert settled.seen_to(broker.scripts, due) == 0
        assert expiring(broker) == {"t": 2000}

    def test_one_of_several_does_it(self, broker: Broker) -> None:
        first, second = (
            Expiry(broker.scripts, Settling(broker), lambda task_ids: None) for _ in range(2)
        )
        first.run_once()
        put(broker, "t", 1)
        assert second.run_once() == 0
        assert first.run_once() == 1


class TestMarks:
    def mark(self, broker: Broker, task: str, age: float) -> None:
        ms = int((time.time() - age) * 1000)
        broker.client.hset(keys.SETTLED, task, f"{ms} revoked")

    def marked(self, broker: Broker) -> set[str]:
        return {name.decode() for name in broker.client.hkeys(keys.SETTLED)}

    def test_old_marks_of_what_is_nowhere_go(self, broker: Broker) -> None:
        for number in range(300):
            self.mark(broker, f"old-{number}", 100)
        self.mark(broker, "young", 10)
        assert sum(settled.sweep(broker.client, 60)) == 300
        assert self.marked(broker) == {"young"}

    @pytest.mark.parametrize("where", ["queued", "delayed", "parked", "waiting", "ready"])
    def test_not_while_its_message_waits(self, broker: Broker, where: str) -> None:
        if where == "parked":
            broker.put("holder", "k")
            broker.take(NODE)
        cohort = {"key": "k", "needs": "9 9 0 nowhere" if where == "waiting" else ""}
        due = broker.now_ms() + 3_600_000 if where == "delayed" else None
        broker.put("t", "k", due_ms=due, cohort=cohort)
        if where in ("parked", "waiting"):
            assert broker.ask(NODE)[1] == "nothing"
        if where == "ready":
            broker.scripts.give_back(NODE, broker.take(NODE)[0])
        self.mark(broker, "t", 100)
        assert sum(settled.sweep(broker.client, 60)) == 0
        assert broker.client.hget(keys.SETTLED, "t").endswith(b" revoked")
        # It isn't looked for again until as much time has passed once more.
        broker.client.delete(QUEUE, keys.delayed(QUEUE))
        assert sum(settled.sweep(broker.client, 60)) == 0
        assert self.marked(broker) == {"t"}


def test_what_was_settled_elsewhere_is_written_down(broker: Broker) -> None:
    asked: list[str] = []
    for number in range(3):
        broker.scripts.settle(f"t{number}", "revoked")
    duty = Expiry(broker.scripts, Settling(broker), asked.extend)
    duty.run_once()
    assert sorted(asked) == ["t0", "t1", "t2"]
