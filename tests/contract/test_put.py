"""Putting: in order, each submission once, as many at a time as there are."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from kombu import Connection, Producer
from redis.exceptions import ConnectionError as LostConnection

from broker import keys, producing
from broker.journal import note_of, put_before, put_once
from broker.producing import Put, Putter, identity_of, mark_of, remember_for, without_defaults
from broker.transport import Transport
from errors import BrokerFull
from tests.broker_kit import QUEUE, Broker, list_of, message
from tests.fleets import wait_for
from tests.redis_server import RedisServer


@pytest.fixture
def putter(broker: Broker) -> Putter:
    return Putter(broker.client)


def put_of(task: str, *, retries: int = 0, priority: int = 0, **options: Any) -> Put:
    text = message(task, priority=priority, retries=retries, tag=uuid.uuid4().hex)
    return Put(list_of(QUEUE, priority), QUEUE, text, f"{task}:{retries}", **options)


def queued(broker: Broker, priority: int = 0) -> list[str]:
    """The task ids in the order in which they are served."""
    found = broker.client.lrange(list_of(QUEUE, priority), 0, -1)
    return [json.loads(payload)["headers"]["id"] for payload in reversed(found)]


class TestMany:
    def test_they_keep_their_order_over_several_scripts(
        self, broker: Broker, putter: Putter
    ) -> None:
        names = [f"t{number}" for number in range(450)]
        assert putter.put([put_of(name) for name in names]) == ["queued"] * 450
        assert queued(broker) == names
        assert broker.client.llen(keys.BELL) == 100

    def test_each_goes_to_its_own_place(self, broker: Broker, putter: Putter) -> None:
        later = broker.now_ms() + 60_000
        puts = [put_of("a"), put_of("b", priority=6), put_of("c", due_ms=later), put_of("d")]
        other = Put("other", "other", message("e"), "e:0", later)
        assert putter.put([*puts, other]) == [*["queued"] * 2, "delayed", "queued", "delayed"]
        assert (queued(broker), queued(broker, 6)) == (["a", "d"], ["b"])
        assert broker.client.zcard(keys.delayed(QUEUE)) == 1
        ((member, due),) = broker.client.zrange(keys.delayed("other"), 0, -1, withscores=True)
        assert (member.partition(b"\0")[0], due) == (b"other", later)
        broker.client.delete(keys.delayed("other"))

    def test_large_ones_go_a_few_at_a_time(
        self, putter: Putter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes: list[int] = []
        run = Putter._put

        def counted(self: Putter, some: Any, *rest: Any) -> Any:
            sizes.append(len(some))
            return run(self, some, *rest)

        monkeypatch.setattr(Putter, "_put", counted)
        text = "x" * (400 << 10)
        putter.put([Put("large", "large", text, "") for _ in range(5)])
        assert sizes == [2, 2, 1]
        putter.client.delete("large")

    def test_nothing_is_nothing(self, putter: Putter) -> None:
        assert putter.put([]) == []

    def test_a_server_that_was_emptied_learns_the_script_again(
        self, broker: Broker, putter: Putter
    ) -> None:
        putter.put([put_of("a")])
        broker.client.script_flush()
        putter.put([put_of("b")])
        assert queued(broker) == ["a", "b"]

    def test_at_the_limit_it_says_how_many_are_accepted(
        self, broker: Broker, putter: Putter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        puts = [put_of(f"t{number}") for number in range(250)]
        run = Putter._put

        def full_after_one(self: Putter, *arguments: Any) -> Any:
            reply = run(self, *arguments)
            broker.client.config_set("maxmemory", 1)
            return reply

        monkeypatch.setattr(Putter, "_put", full_after_one)
        with pytest.raises(BrokerFull, match=r"queue celery: .*Of 250 200 are accepted"):
            putter.put(puts)
        with pytest.raises(BrokerFull, match=r"those accepted go on\. Try again"):
            putter.put([put_of("another")])
        monkeypatch.undo()
        broker.client.config_set("maxmemory", 0)
        assert len(queued(broker)) == 200
        # Doing it again puts what was missing.
        assert putter.put(puts[:220])[199:201] == ["there", "queued"]


class TestOnce:
    def test_the_same_submission_is_one_job(self, broker: Broker, putter: Putter) -> None:
        assert putter.put([put_of("a"), put_of("b"), put_of("a")]) == ["queued", "queued", "there"]
        assert putter.put([put_of("a"), put_of("c")]) == ["there", "queued"]
        assert queued(broker) == ["a", "b", "c"]

    def test_a_retry_is_another(self, putter: Putter) -> None:
        assert putter.put([put_of("a"), put_of("a", retries=1)]) == ["queued", "queued"]
        assert putter.put([put_of("a", retries=1)]) == ["there"]

    def test_a_task_that_replaces_itself_is_another(self) -> None:
        headers = {"id": "a", "retries": 0}
        assert identity_of(headers) == identity_of({"id": "a"}) == "a:0"
        assert identity_of({}) == ""
        assert identity_of({**headers, "replaced_task_nesting": 1}) not in ("a:0", "a:1")

    def test_also_one_that_is_delayed(self, broker: Broker, putter: Putter) -> None:
        due = broker.now_ms() + 60_000
        assert putter.put([put_of("a", due_ms=due)]) == ["delayed"]
        assert putter.put([put_of("a", due_ms=due), put_of("a")]) == ["there", "there"]

    def test_only_for_as_long_as_it_is_remembered(self, broker: Broker, putter: Putter) -> None:
        assert putter.put([put_of("a")], keep=0.5) == ["queued"]
        assert putter.put([put_of("a")], keep=0.5) == ["there"]
        assert putter.known(["a:0", "b:0"]) == [True, False]
        wait_for(lambda: not putter.known(["a:0"])[0], "it to be forgotten", 5)
        assert putter.put([put_of("a")], keep=0.5) == ["queued"]

    def test_as_long_as_this_process_was_told(
        self, broker: Broker, putter: Putter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(producing, "_remembered", 600.0)
        remember_for(3600)
        putter.put([put_of("a")])
        bucket, mark = mark_of("a:0")
        (until,) = struct.unpack("<I", broker.client.hget(bucket, mark))
        assert 3590 < until - broker.now_ms() / 1000 <= 3601

    def test_a_message_without_a_mark_is_put_each_time(
        self, broker: Broker, putter: Putter
    ) -> None:
        again = put_of("a")._replace(identity="")
        assert putter.put([again, put_of("b"), again]) == ["queued"] * 3
        assert not putter.known(["a:0"])[0]
        assert putter.known(["b:0"])[0]
        broker.client.delete(QUEUE)

    def test_a_lost_reply_makes_no_second_job(
        self, broker: Broker, putter: Putter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connection = putter.client.connection_pool.connection_class
        read = connection.read_response
        lost: list[Any] = []

        def lose_one(self: Any, *arguments: Any, **options: Any) -> Any:
            reply = read(self, *arguments, **options)
            if reply == [b"queued"] * 3 and not lost:
                lost.append(reply)
                self.disconnect()
                raise LostConnection("the reply is lost")
            return reply

        monkeypatch.setattr(connection, "read_response", lose_one)
        assert putter.put([put_of(name) for name in "abc"]) == ["there"] * 3
        assert lost
        assert queued(broker) == ["a", "b", "c"]


class TestMarks:
    def test_they_take_little_and_go_by_themselves(self, broker: Broker, putter: Putter) -> None:
        putter.put([put_of(f"t{number}") for number in range(200)])
        for name in broker.client.scan_iter(match=keys.submitted(0)[:-4] + "*"):
            assert 600_000 <= broker.client.pttl(name) <= 660_000
            assert broker.client.object("encoding", name) == b"listpack"

    def test_what_is_forgotten_is_dropped_when_a_hash_has_doubled(
        self, broker: Broker, putter: Putter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = keys.submitted(7)
        monkeypatch.setattr(producing, "mark_of", lambda text: (one, mark_of(text)[1]))
        old = [mark_of(f"old {number}")[1] for number in range(30)]
        broker.client.hset(one, mapping={mark: struct.pack("<I", 1) for mark in old})
        putter.put([put_of("a")])
        assert broker.client.hlen(one) == 31
        putter.put([put_of("b")])
        assert broker.client.hlen(one) == 2
        assert putter.put([put_of("a"), put_of("b")]) == ["there", "there"]

    def test_a_long_life_is_not_cut_short_by_a_short_one(
        self, broker: Broker, putter: Putter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = keys.submitted(7)
        monkeypatch.setattr(producing, "mark_of", lambda text: (one, mark_of(text)[1]))
        putter.put([put_of("durable")], keep=7 * 86400)
        putter.put([put_of("other")], keep=60)
        assert broker.client.pttl(one) > 6 * 86400_000

    def test_any_two_submissions_differ(self) -> None:
        marks = {mark_of(f"t{number}:{retries}") for number in range(5000) for retries in (0, 1)}
        assert len(marks) == 10_000
        assert len({bucket for bucket, _ in marks}) > 9_000


class TestNotes:
    def test_a_durable_job_is_put_by_its_producer_or_from_its_note(
        self, broker: Broker, putter: Putter
    ) -> None:
        text = json.loads(message("a"))
        text["headers"]["cohort"]["durable"] = True
        note = note_of(QUEUE, QUEUE, json.dumps(text))
        assert put_before(broker.client, [note]) == [False]
        assert putter.put([put_of("a")], keep=3600) == ["queued"]
        assert put_before(broker.client, [note]) == [True]
        assert put_once(broker.scripts, note, 3600) == "there"

    def test_one_that_was_claimed_is_put_again_from_its_note(
        self, broker: Broker, putter: Putter
    ) -> None:
        # Redis has lost its claim and still knows that it was put.
        assert putter.put([put_of("a")]) == ["queued"]
        broker.client.delete(QUEUE)
        note = note_of(QUEUE, QUEUE, message("a"))
        assert put_before(broker.client, [note]) == [False]
        assert put_once(broker.scripts, note, 3600) == "queued"
        assert put_once(broker.scripts, note, 3600) == "there"

    @pytest.mark.parametrize("odd", [{"cohort": "x"}, {"cohort": [1]}, {"retries": "many"}])
    def test_a_message_of_anybody_can_be_noted(self, odd: dict[str, Any]) -> None:
        note = note_of(QUEUE, QUEUE, message("a", **odd))
        assert (note.task_id, note.retries, note.durable) == ("a", 0, False)


class TestHeaders:
    def test_what_celery_takes_for_said_is_left_out(self) -> None:
        said = {"id": "a", "task": "t", "mine": None, "argsrepr": "()", "retries": 2}
        unsaid: dict[str, Any] = {
            "eta": None,
            "group": None,
            "stamps": {},
            "timelimit": [None, None],
        }
        assert without_defaults({**said, **unsaid}) == said
        assert without_defaults({"timelimit": [None, 5], "retries": 0}) == {"timelimit": [None, 5]}


class TestBatchesOfKombu:
    @pytest.fixture
    def publish(self, redis_server: RedisServer) -> Callable[..., None]:
        def publish(tasks: list[str], fails: bool = False, **headers: Any) -> None:
            with Connection(redis_server.url, transport=Transport) as connection:
                producer = Producer(connection.channel())
                with producer.batch():
                    for task in tasks:
                        about = {"id": task, "task": "tests.job", "cohort": {}, **headers}
                        producer.publish([[], {}, {}], headers=about, routing_key=QUEUE)
                    if fails:
                        raise ValueError("no")

        return publish

    def test_they_are_put_in_order_and_once(
        self, broker: Broker, publish: Callable[..., None]
    ) -> None:
        names = [f"t{number}" for number in range(250)]
        publish(names)
        publish(names[:10])
        assert queued(broker) == names
        assert broker.client.llen(keys.BELL) == 100

    def test_one_that_is_due_later_waits(
        self, broker: Broker, publish: Callable[..., None]
    ) -> None:
        publish(["t"], eta="2999-01-01T00:00:00+00:00")
        assert broker.client.zcard(keys.delayed(QUEUE)) == 1

    def test_a_batch_that_fails_puts_nothing(
        self, broker: Broker, publish: Callable[..., None]
    ) -> None:
        with pytest.raises(ValueError, match="no"):
            publish(["a", "b"], fails=True)
        assert queued(broker) == []
