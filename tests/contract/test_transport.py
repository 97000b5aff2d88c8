"""Kombu's own producers and consumers through the transport, on a real server."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from queue import Empty
from typing import Any

import pytest
import redis
from kombu import Consumer, Exchange, Producer, Queue

from broker import keys, transport
from broker.claimant import CLAIM_PREFIX, Claimant
from broker.transport import Qualities, consume_as, qualify_with
from broker.turns import MOST_AT_ONCE
from errors import BrokerFull, Refused
from tests.broker_kit import QUEUE, Broker, list_of, message
from tests.redis_server import RedisServer
from tests.transport_kit import PATIENCE, Client, task_of


@pytest.fixture
def claimant(broker: Broker) -> Iterator[Claimant]:
    """This process is a worker."""
    claimant = broker.claimant("n")
    consume_as(claimant)
    yield claimant
    consume_as(None)


@pytest.fixture(autouse=True)
def keyless() -> Iterator[None]:
    """No test's way to find keys outlives it."""
    yield
    qualify_with(lambda message: Qualities())


@pytest.fixture
def open_client(redis_server: RedisServer) -> Iterator[Callable[..., Client]]:
    """Opens clients that are closed after the test."""
    opened: list[Client] = []

    def open_(**options: Any) -> Client:
        opened.append(Client(redis_server, **options))
        return opened[-1]

    yield open_
    for client in opened:
        client.close()


@pytest.fixture
def producer(open_client: Callable[..., Client]) -> Client:
    """A producer."""
    return open_client()


@pytest.fixture
def worker(claimant: Claimant, open_client: Callable[..., Client]) -> Client:
    """A consuming worker."""
    client = open_client()
    client.consume()
    return client


class TestDelivery:
    def test_the_claim_is_the_delivery_tag(
        self, broker: Broker, claimant: Claimant, producer: Client, worker: Client
    ) -> None:
        producer.publish("t", "k")
        delivered = worker.next()
        assert delivered.delivery_tag.startswith(CLAIM_PREFIX)
        assert delivered.headers["cohort_claim"] == delivered.delivery_tag
        assert delivered.headers["cohort"] == {"key": "k"}
        assert delivered.headers["cohort_lost"] == 0
        assert delivered.decode() == [["t"], {}, {}]
        assert broker.lock_of("k") == delivered.delivery_tag
        assert claimant.knows(delivered.delivery_tag)

    def test_acknowledging_ends_the_claim(
        self, broker: Broker, claimant: Claimant, producer: Client, worker: Client
    ) -> None:
        producer.publish("t", "k")
        delivered = worker.next()
        delivered.ack()
        assert not broker.audit().places()
        assert not claimant.knows(delivered.delivery_tag)
        assert worker.nothing_comes()

    def test_rejecting_ends_it_as_well(
        self, broker: Broker, producer: Client, worker: Client
    ) -> None:
        producer.publish("t", "k")
        worker.next().reject()
        assert not broker.audit().places()

    def test_what_is_requeued_is_served_first(
        self, broker: Broker, producer: Client, open_client: Callable[..., Client]
    ) -> None:
        consume_as(broker.claimant("n"))
        worker = open_client(prefetch=1)
        worker.consume()
        for task in ("a", "b"):
            producer.publish(task, "k")
        worker.next().requeue()
        again = worker.next()
        assert task_of(again) == "a"
        assert again.headers["cohort_lost"] == 0
        again.ack()
        worker.next().ack()
        consume_as(None)

    def test_credit_limits_what_is_claimed(
        self, broker: Broker, producer: Client, open_client: Callable[..., Client]
    ) -> None:
        consume_as(broker.claimant("n"))
        worker = open_client(prefetch=1)
        worker.consume()
        for task in ("a", "b", "c"):
            producer.publish(task)
        first = worker.next()
        assert worker.nothing_comes()
        assert len(broker.audit().all_claims()) == 1
        assert broker.client.llen(QUEUE) == 2
        first.ack()
        assert task_of(worker.next()) == "b"
        consume_as(None)

    def test_lost_deliveries_are_told(
        self, broker: Broker, claimant: Claimant, producer: Client, worker: Client
    ) -> None:
        producer.publish("t")
        claimant.give_back(worker.next().delivery_tag, lost=True)
        assert worker.next().headers["cohort_lost"] == 1

    def test_priorities(self, producer: Client, worker: Client) -> None:
        for priority in (9, 0, 6, 3):
            producer.publish(f"p{priority}", priority=priority)
        assert [task_of(worker.next()) for _ in range(4)] == ["p0", "p3", "p6", "p9"]

    def test_an_idle_worker_is_woken(self, producer: Client, worker: Client) -> None:
        for number in range(3):
            assert worker.nothing_comes()
            producer.publish(f"t{number}")
            assert task_of(worker.next()) == f"t{number}"

    def test_what_nobody_rang_for_is_found(self, broker: Broker, worker: Client) -> None:
        assert worker.nothing_comes()
        broker.client.lpush(QUEUE, message("t"))
        assert task_of(worker.next()) == "t"

    def test_looks_that_brought_nothing_are_forgotten(
        self,
        broker: Broker,
        claimant: Claimant,
        worker: Client,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # Each renewal names what is known: an idle worker would say more and more.
        named: list[int] = []
        renew = broker.scripts.renew

        def count(member: str, lease: float, asked: int, known: list[str]) -> Any:
            named.append(len(known))
            return renew(member, lease, asked, known)

        monkeypatch.setattr(claimant.scripts, "renew", count)
        assert worker.nothing_comes()
        assert worker.nothing_comes()
        assert claimant.renew() == "renewed"
        assert named[0] <= MOST_AT_ONCE  # The one that waits behind the bell.

    def test_one_run_of_a_key_at_a_time(
        self, broker: Broker, producer: Client, worker: Client
    ) -> None:
        for task in ("a", "b"):
            producer.publish(task, "k")
        first = worker.next()
        assert worker.nothing_comes()
        assert broker.client.zcard(keys.PARKED) == 1
        first.ack()
        assert task_of(worker.next()) == "b"


class TestDueTimes:
    def eta(self, seconds: float) -> dict[str, str]:
        return {"eta": (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()}

    def test_a_producer_puts_it_aside(self, broker: Broker, producer: Client) -> None:
        producer.publish("t", priority=6, headers=self.eta(60))
        assert broker.client.exists(list_of(QUEUE, 6)) == 0
        assert broker.client.zcard(keys.delayed(QUEUE)) == 1

    @pytest.mark.parametrize("stock", [False, True])
    def test_redis_waits(
        self, broker: Broker, producer: Client, worker: Client, stock: bool
    ) -> None:
        due = time.time() + 0.7
        producer.publish("t", stock=stock, headers=self.eta(0.7))
        assert worker.nothing_comes()
        assert broker.client.zcard(keys.delayed(QUEUE)) == 1
        assert broker.audit().claims == {}
        delivered = worker.next()
        assert time.time() >= due
        # The worker's own clock has nothing more to say.
        assert delivered.headers["eta"] is None

    def test_what_is_past_comes_at_once(self, producer: Client, worker: Client) -> None:
        producer.publish("t", headers=self.eta(-60))
        assert task_of(worker.next()) == "t"

    @pytest.mark.parametrize("eta", ["tomorrow", 7, None, ""])
    def test_what_is_no_time_is_left_to_celery(
        self, producer: Client, worker: Client, eta: Any
    ) -> None:
        producer.publish("t", headers={"eta": eta})
        assert task_of(worker.next()) == "t"


class TestStock:
    def test_a_stock_producer_feeds_it(
        self, broker: Broker, open_client: Callable[..., Client], worker: Client
    ) -> None:
        open_client(transport="redis").publish("t", stock=True)
        delivered = worker.next()
        assert task_of(delivered) == "t"
        assert delivered.headers["cohort"] == {"key": ""}
        delivered.ack()
        assert not broker.audit().places()

    def test_its_keyed_jobs_get_their_lock(
        self, broker: Broker, open_client: Callable[..., Client], worker: Client
    ) -> None:
        qualify_with(lambda message: Qualities("key of " + message["headers"]["task"]))
        stock = open_client(transport="redis")
        stock.publish("a", stock=True)
        stock.publish("b", stock=True)
        first = worker.next()
        assert first.headers["cohort"] == {"key": "key of tests.job"}
        assert broker.lock_of("key of tests.job") == first.delivery_tag
        assert worker.nothing_comes()
        first.ack()
        second = worker.next()
        assert second.headers["cohort"] == {"key": "key of tests.job"}
        second.ack()
        assert broker.lock_of("key of tests.job") is None

    @pytest.mark.parametrize("header", [None, 7, "k"])
    def test_a_header_of_ours_that_is_none_of_ours(
        self, broker: Broker, worker: Client, header: Any
    ) -> None:
        qualify_with(lambda message: Qualities("k"))
        broker.client.lpush(QUEUE, message("t", stock=True, cohort=header))
        delivered = worker.next()
        # Its lock is taken, so the worker must know it.
        assert delivered.headers["cohort"] == {"key": "k"}
        assert broker.lock_of("k") == delivered.delivery_tag

    def test_without_our_header_putting_is_stock(self, broker: Broker, producer: Client) -> None:
        producer.publish("t", stock=True, priority=6)
        assert broker.client.llen(list_of(QUEUE, 6)) == 1
        assert not broker.client.exists(keys.BELL)

    def test_who_is_no_worker_consumes_as_stock_does(
        self, broker: Broker, producer: Client, open_client: Callable[..., Client]
    ) -> None:
        reader = open_client()
        reader.consume()
        producer.publish("t")
        delivered = reader.next()
        assert not delivered.delivery_tag.startswith(CLAIM_PREFIX)
        assert broker.client.hlen("unacked") == 1
        delivered.ack()
        assert not broker.client.exists("unacked")

    def test_replies_stay_stock_in_a_worker(
        self, broker: Broker, claimant: Claimant, open_client: Callable[..., Client]
    ) -> None:
        client = open_client()
        name = uuid.uuid4().hex
        broker.queues = (QUEUE, name)
        got: list[Any] = []
        queue = Queue(name, Exchange(name), routing_key=name, auto_delete=True)
        with Consumer(client.channel, [queue], on_message=got.append, no_ack=True):
            Producer(client.channel).publish("reply", exchange=name, routing_key=name)
            client.drain(lambda: bool(got))
        assert got[0].decode() == "reply"
        assert broker.audit().claims == {}

    def test_a_worker_that_leaves_reads_no_message_for_a_bell(
        self, broker: Broker, claimant: Claimant, producer: Client, worker: Client
    ) -> None:
        broker.scripts.load_claim()
        worker.connection.transport.cycle.on_poll_start()
        with pytest.raises(Empty):
            worker.channel._brpop_read()
        # There was nothing: it would wait for the bell now, but it is no worker any more.
        consume_as(None)
        producer.publish("t")
        worker.next().ack()


class TestTroubles:
    def ask(self, broker: Broker, claimant: Claimant, worker: Client) -> None:
        """Let the worker ask, and the server answer; the reply isn't read."""
        broker.scripts.load_claim()
        worker.consume()
        worker.connection.transport.cycle.on_poll_start()
        deadline = time.monotonic() + PATIENCE
        while not broker.client.exists(keys.claims(claimant.member)):
            assert time.monotonic() < deadline, "the server made no claim"

    def test_a_reply_that_was_lost(
        self,
        broker: Broker,
        claimant: Claimant,
        producer: Client,
        open_client: Callable[..., Client],
    ) -> None:
        producer.publish("t", "k")
        worker = open_client()
        self.ask(broker, claimant, worker)
        worker.channel.client.connection.disconnect()
        worker.turn(0.2)
        assert worker.got == []
        claimant.renew()
        delivered = worker.next()
        assert task_of(delivered) == "t"
        assert delivered.headers["cohort_lost"] == 0
        delivered.ack()
        assert worker.nothing_comes()

    def lose_the_connection(self, broker: Broker, worker: Client) -> None:
        """It is cut, and the worker connects anew."""
        broker.client.client_kill_filter(_type="normal", skipme=True)
        with pytest.raises(redis.ConnectionError):
            worker.drain(lambda: False)
        worker.come_back()

    def test_what_was_delivered_but_not_begun_goes_back(
        self, broker: Broker, claimant: Claimant, producer: Client, worker: Client
    ) -> None:
        producer.publish("t", "k")
        first = worker.next()
        self.lose_the_connection(broker, worker)
        claimant.renew()
        second = worker.next()
        assert task_of(second) == "t"
        assert second.delivery_tag != first.delivery_tag
        # The first delivery ends late: it changes nothing.
        first.ack()
        assert broker.lock_of("k") == second.delivery_tag
        second.ack()
        assert worker.nothing_comes()

    def test_what_has_begun_goes_on_and_is_not_doubled(
        self, broker: Broker, claimant: Claimant, producer: Client, worker: Client
    ) -> None:
        producer.publish("t", "k")
        producer.publish("keyless")
        begun = [worker.next(), worker.next()]
        for delivered in begun:
            claimant.begin(delivered.delivery_tag)
        self.lose_the_connection(broker, worker)
        claimant.renew()
        assert worker.nothing_comes()
        # Its acknowledgement comes from the closed channel.
        for delivered in begun:
            delivered.ack()
        assert not broker.audit().places()

    def test_what_has_ended_and_waits_for_its_acknowledgement_is_not_doubled(
        self, broker: Broker, claimant: Claimant, producer: Client, worker: Client
    ) -> None:
        """Its outcome is on its way to the disk when the channel closes, and a renewal is sent."""
        claimant.on_finish = lambda claim_id, end: None
        producer.publish("keyless")
        delivered = worker.next()
        claimant.begin(delivered.delivery_tag)
        delivered.ack()
        self.lose_the_connection(broker, worker)
        claimant.renew()
        assert worker.nothing_comes()
        assert claimant.finish_now([delivered.delivery_tag]) == ["finished"]

    def test_closing_loses_no_claim_that_is_on_its_way(
        self,
        broker: Broker,
        claimant: Claimant,
        producer: Client,
        open_client: Callable[..., Client],
    ) -> None:
        producer.publish("t", "k")
        worker = open_client()
        self.ask(broker, claimant, worker)
        worker.close()
        claimant.renew()
        assert [claim["task"] for claim in broker.audit().ready] == ["t"]

    def test_a_restart_of_the_server(
        self,
        broker: Broker,
        claimant: Claimant,
        worker: Client,
        producer: Client,
        redis_server: RedisServer,
    ) -> None:
        for task in ("a", "b"):
            producer.publish(task, "k")
        first = worker.next()
        claimant.begin(first.delivery_tag)
        redis_server.restart()
        with pytest.raises(redis.ConnectionError):
            worker.drain(lambda: False)
        worker.come_back()
        claimant.renew()
        assert worker.nothing_comes()
        first.ack()
        assert task_of(worker.next()) == "b"

    def test_a_server_that_forgot_the_scripts(
        self, broker: Broker, producer: Client, worker: Client
    ) -> None:
        producer.publish("a")
        worker.next().ack()
        for task in ("b", "c"):
            broker.client.script_flush()
            producer.publish(task)
            broker.client.script_flush()
            assert task_of(worker.next()) == task

    def test_a_refusing_server_ends_no_worker_and_is_not_flooded(
        self, broker: Broker, producer: Client, worker: Client
    ) -> None:
        assert worker.nothing_comes()
        producer.publish("t", "k")
        broker.client.replicaof("127.0.0.1", "1")
        broker.client.config_resetstat()
        before = time.monotonic()
        for _ in range(6):
            worker.turn(0.1)
        asked = broker.client.info("errorstats")["errorstat_READONLY"]["count"]
        assert asked > 0
        assert asked <= 10 * (time.monotonic() - before) + 3
        broker.client.replicaof("NO", "ONE")
        worker.drain(lambda: bool(worker.got))
        worker.got[0].ack()
        assert not broker.audit().places()

    def test_at_the_memory_limit(self, broker: Broker, producer: Client, worker: Client) -> None:
        producer.publish("accepted", "k")
        broker.client.config_set("maxmemory", 1)
        with pytest.raises(BrokerFull):
            producer.publish("refused", "k")
        worker.next().ack()
        assert not broker.audit().places()

    @pytest.mark.parametrize(
        "payload",
        [
            message("t").replace('"t"', '"\udcff"').encode(errors="surrogateescape"),
            message("t").replace('"id"', '"number": 0x10, "id"').encode(),
            message("t", stock=True).replace('"body_encoding": null', '"body_encoding": "rot13"'),
        ],
        ids=["not UTF-8", "hexadecimal", "unknown encoding"],
    )
    def test_a_message_that_only_the_server_can_read_is_put_aside(
        self, broker: Broker, producer: Client, worker: Client, payload: Any
    ) -> None:
        broker.client.lpush(QUEUE, payload)
        producer.publish("good")
        assert task_of(worker.next()) == "good"
        assert broker.client.hlen(keys.DEAD) == 1
        assert len(broker.audit().all_claims()) == 1

    @pytest.mark.parametrize(
        "error", [redis.ConnectionError("gone"), redis.ReadOnlyError("READONLY")]
    )
    def test_a_message_that_could_not_be_qualified_goes_back(
        self,
        broker: Broker,
        claimant: Claimant,
        worker: Client,
        monkeypatch: pytest.MonkeyPatch,
        error: redis.RedisError,
    ) -> None:
        qualify_with(lambda message: Qualities("k"))
        failed: list[str] = []

        def fail(member: str, claim_id: str, *rest: Any, **options: Any) -> str:
            failed.append(claim_id)
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(worker.channel._scripts, "requalify", fail)
            broker.client.lpush(QUEUE, message("t", stock=True))
            worker.drain(lambda: bool(failed))
        assert worker.got == []
        claimant.renew()
        assert worker.next().headers["cohort"] == {"key": "k"}

    def test_a_key_prefix_is_refused(self, redis_server: RedisServer) -> None:
        with pytest.raises(Refused, match="global_keyprefix"):
            Client(redis_server, transport_options={"global_keyprefix": "p"})


def test_the_message_on_the_wire_is_stock(broker: Broker, producer: Client) -> None:
    """Flower counts it, and a stock consumer could read it."""
    producer.publish("t", "k")
    (raw,) = broker.client.lrange(QUEUE, 0, -1)
    wire = json.loads(raw)
    assert wire.keys() == {"body", "content-encoding", "content-type", "headers", "properties"}
    assert transport.current_claimant() is None


def test_a_channel_that_was_closed_meanwhile_is_a_lost_connection(
    redis_server: RedisServer,
) -> None:
    """Whoever publishes tries again over another one."""
    client = Client(redis_server)
    channel = client.channel
    channel.close()
    channel.connection = None
    with pytest.raises(redis.ConnectionError, match="closed"):
        _ = channel.putter
