"""An idle worker: its next claim waits in Redis behind the bell, and runs when that rings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from queue import Empty

import pytest
import redis

from broker import keys, transport
from broker.claimant import Claimant
from broker.transport import consume_as
from tests.broker_kit import QUEUE, Broker
from tests.redis_server import RedisServer
from tests.transport_kit import PATIENCE, Client, task_of

NEVER = 60.0


@pytest.fixture
def claimant(broker: Broker) -> Iterator[Claimant]:
    broker.scripts.load_claim()
    claimant = broker.claimant("n")
    consume_as(claimant)
    yield claimant
    consume_as(None)


@pytest.fixture
def producer(redis_server: RedisServer) -> Iterator[Client]:
    client = Client(redis_server)
    yield client
    client.close()


@pytest.fixture
def worker(
    redis_server: RedisServer, claimant: Claimant, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Client]:
    """It is idle, and looks for nothing unless the bell rings."""
    client = Client(redis_server)
    client.consume()
    assert client.nothing_comes()
    monkeypatch.setattr(transport, "_SAFETY_POLL", NEVER)
    assert client.nothing_comes()
    yield client
    monkeypatch.undo()
    # Who closes it waits for the answer of the bell.
    client.server.connect().lpush(keys.own_bell(claimant.member), "1")
    client.close()


def wait_until(fact: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < deadline, what


def claimed_in_redis(broker: Broker, claimant: Claimant) -> None:
    """The claim has been made; its worker doesn't know, its loop stands still."""
    wait_until(lambda: broker.client.exists(keys.claims(claimant.member)), "no claim was made")


def test_the_bell_and_the_claim_are_one_step(
    broker: Broker, claimant: Claimant, producer: Client, worker: Client
) -> None:
    producer.publish("t", "k")
    claimed_in_redis(broker, claimant)
    delivered = worker.next()
    assert task_of(delivered) == "t"
    assert broker.lock_of("k") == delivered.delivery_tag
    delivered.ack()
    assert worker.nothing_comes()
    assert not broker.audit().places()


def test_what_it_had_asked_for_stays_its_own_through_a_renewal(
    broker: Broker, claimant: Claimant, producer: Client, worker: Client
) -> None:
    claimant.renew()
    producer.publish("t", "k")
    claimed_in_redis(broker, claimant)
    claimant.renew()
    assert len(broker.audit().all_claims()) == 1
    assert worker.next().headers["cohort_lost"] == 0


def test_a_claim_whose_answer_was_lost_goes_back(
    broker: Broker, claimant: Claimant, producer: Client, worker: Client
) -> None:
    producer.publish("t", "k")
    claimed_in_redis(broker, claimant)
    worker.channel.client.connection.disconnect()
    worker.turn(0.2)
    assert worker.got == []
    claimant.renew()
    delivered = worker.next()
    assert (task_of(delivered), delivered.headers["cohort_lost"]) == ("t", 0)
    delivered.ack()
    assert worker.nothing_comes()
    assert not broker.audit().places()


def test_a_connection_that_is_cut_takes_the_waiting_claim_along(
    broker: Broker, claimant: Claimant, producer: Client, worker: Client
) -> None:
    broker.client.client_kill_filter(_type="normal", skipme=True)
    producer.publish("t")
    assert broker.client.llen(QUEUE) == 1
    with pytest.raises(redis.ConnectionError):
        worker.drain(lambda: False)
    worker.come_back()
    assert task_of(worker.next()) == "t"
    assert len(broker.audit().all_claims()) == 1


def test_told_to_end_it_gives_back_what_was_claimed_at_the_last_moment(
    broker: Broker, claimant: Claimant, producer: Client, worker: Client
) -> None:
    producer.publish("t", "k")
    claimed_in_redis(broker, claimant)
    # Its connection stays open until its last job has ended, and nobody reads there any more.
    worker.consumer.cancel()
    claimant.renew()
    assert [claim["task"] for claim in broker.audit().ready] == ["t"]
    worker.channel.close()
    assert worker.got == []


def test_told_to_end_it_claims_nothing_more(
    broker: Broker, claimant: Claimant, producer: Client, worker: Client
) -> None:
    worker.consumer.cancel()
    producer.publish("t")
    claimant.renew()
    assert broker.client.llen(QUEUE) == 1
    assert not broker.audit().all_claims()


def test_told_to_end_it_hands_over_nothing_more(
    broker: Broker, claimant: Claimant, producer: Client, worker: Client
) -> None:
    # It is woken by what it claims; that it is to end it would see at its loop's next turn.
    handed: list[str] = []
    asked: list[bool] = []

    def is_ending() -> bool:
        asked.append(True)
        return True

    consume_as(claimant, lambda: handed.append("over"), is_ending)
    producer.publish("t", "k")
    worker.drain(lambda: bool(asked))
    assert (worker.got, handed) == ([], [])
    worker.consumer.cancel()
    claimant.renew()
    assert [claim["task"] for claim in broker.audit().ready] == ["t"]


def test_an_answer_that_was_there_when_it_hung_up_is_not_waited_for(
    claimant: Claimant, producer: Client, worker: Client
) -> None:
    # The loop heard of both in one turn: that it is to stop, and that the socket has something.
    cycle = worker.connection.transport.cycle
    fileno = worker.channel.client.connection._sock.fileno()
    worker.consumer.cancel()
    began = time.monotonic()
    with pytest.raises(Empty):
        cycle.on_readable(fileno)
    assert time.monotonic() < began + PATIENCE
    worker.consume()
    producer.publish("t")
    assert task_of(worker.next()) == "t"


def test_told_to_take_work_again_it_does(producer: Client, worker: Client) -> None:
    worker.consumer.cancel()
    worker.consume()
    producer.publish("t")
    assert task_of(worker.next()) == "t"


def test_room_that_grew_while_it_waited_is_worth_another_look(
    broker: Broker, claimant: Claimant, producer: Client, worker: Client
) -> None:
    # A node of one CPU, by `broker_kit`. What it says behind the bell, it says before the end.
    everything = {"cohort": {"needs": "1 0 0"}}
    producer.publish("first", headers=everything)
    first = worker.next()
    assert worker.nothing_comes()
    claimant.end(first.delivery_tag)
    producer.publish("second", headers=everything)
    assert task_of(worker.next()) == "second"


def test_what_waits_for_room_is_taken_when_some_has_ended(
    broker: Broker, claimant: Claimant, producer: Client, worker: Client
) -> None:
    everything = {"cohort": {"needs": "1 0 0"}}
    producer.publish("first", headers=everything)
    first = worker.next()
    producer.publish("second", headers=everything)
    assert worker.nothing_comes()
    assert len(broker.audit().waiting) == 1
    first.ack()
    assert task_of(worker.next()) == "second"


def test_a_server_that_has_forgotten_the_script_is_asked_again_at_once(
    broker: Broker, producer: Client, worker: Client
) -> None:
    broker.client.script_flush()
    producer.publish("t")
    assert task_of(worker.next()) == "t"


def test_an_answer_that_comes_in_two_parts_holds_up_nothing(
    broker: Broker, producer: Client, worker: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bell's is there, and the claim's isn't yet.
    connection = worker.channel.client.connection
    can_read, looks = connection.can_read, list[int]()

    def not_yet(timeout: float = 0) -> bool:
        looks.append(1)
        return len(looks) > 2 and can_read(timeout)

    monkeypatch.setattr(connection, "can_read", not_yet)
    producer.publish("t")
    worker.drain(lambda: len(looks) == 1)
    assert worker.got == []
    assert worker.channel._in_poll is connection
    # Both have been read from the socket here, so that the loop wouldn't hear of the other.
    assert worker.channel._brpop_read()
    assert task_of(worker.next()) == "t"
