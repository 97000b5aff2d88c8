"""Submitting: straight to the queue or Celery's way, it is the same job. On a real server."""

from __future__ import annotations

import base64
import json
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import chord, group, signals
from celery._state import _task_stack
from celery.utils.saferepr import saferepr
from hypothesis import given
from hypothesis import strategies as st
from kombu.exceptions import OperationalError
from kombu.transport.virtual import Message

from broker import keys
from broker.retry import kept_retry
from errors import BrokerFull
from tasks.application import configuration
from tasks.batches import App, Batch
from tasks.composing import shown
from tasks.job import JobTask
from tasks.settings import Settings
from tasks.submitting import Submitter
from tests.broker_kit import list_of
from tests.fleets import wait_for
from tests.redis_server import RedisServer

UNLIKE = ("delivery_tag", "correlation_id", "reply_to", "body_encoding", "delivery_mode")


@pytest.fixture
def app(redis_server: RedisServer) -> Iterator[App]:
    """An app of this test's own."""
    app = App("tests", task_cls="tasks.job:JobTask", set_as_current=False)
    app.conf.update(configuration(Settings.read({"COHORT_REDIS": redis_server.url})))
    yield app
    app.close()


@pytest.fixture
def add(app: App) -> JobTask:
    @app.task(name="tests.add")  # type: ignore[untyped-decorator]
    def add(a: Any = 0, b: Any = 0) -> Any:
        return a

    task: JobTask = add
    return task


@pytest.fixture
def total(app: App) -> JobTask:
    @app.task(name="tests.total")  # type: ignore[untyped-decorator]
    def total(numbers: Any) -> Any:
        return sum(numbers)

    task: JobTask = total
    return task


class Queues:
    """What is in Redis, decoded."""

    def __init__(self, server: RedisServer) -> None:
        self.client: Any = server.connect()

    def messages(self, name: str = "celery") -> list[dict[str, Any]]:
        """In the order in which they are served."""
        return [json.loads(text) for text in reversed(self.client.lrange(name, 0, -1))]

    def ids(self, name: str = "celery") -> list[str]:
        return [message["headers"]["id"] for message in self.messages(name)]


@pytest.fixture
def queues(redis_server: RedisServer) -> Iterator[Queues]:
    queues = Queues(redis_server)
    yield queues
    for name in ("large", "plain", "own", "other", "routed", "many"):
        queues.client.delete(*(list_of(name, priority) for priority in (0, 3, 6)))


@pytest.fixture
def went(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way each submission went: 'straight' or "Celery's"."""
    ways: list[str] = []
    submit = Submitter.submit

    def noted(self: Any, *arguments: Any) -> Any:
        result = submit(self, *arguments)
        ways.append("Celery's" if result is None else "straight")
        return result

    monkeypatch.setattr(Submitter, "submit", noted)
    return ways


def receive(**_: Any) -> None:
    """A receiver of a signal: with it, everything goes Celery's way."""


class Decoder:
    """What a message needs of kombu's channel."""

    def decode_body(self, body: Any, encoding: str | None = None) -> Any:
        return base64.b64decode(body).decode() if encoding == "base64" else body


def said(message: dict[str, Any]) -> dict[str, Any]:
    """What a message says to Celery's worker, however it says it."""
    read = Message(message, channel=Decoder(), accept=["application/json"])
    args, kwargs, embedded = read.decode()
    headers = {k: v for k, v in read.headers.items() if v not in (None, 0, [None, None], {})}
    headers["cohort"] = read.headers["cohort"]
    properties = {k: v for k, v in read.properties.items() if k not in UNLIKE}
    embedded = {k: v for k, v in embedded.items() if v is not None}
    return {"body": (args, kwargs, embedded), "headers": headers, "properties": properties}


class TestItIsTheSameJob:
    ETA = datetime(2999, 1, 2, 3, 4, 5, tzinfo=UTC)

    @pytest.mark.parametrize(
        ("args", "kwargs", "options"),
        [
            ((), {}, {}),
            ((1, "größe"), {}, {}),
            ((), {"a": {"x": [1, None, True]}, "b": "it's"}, {}),
            (([1] * 600, "x" * 2000), {}, {}),
            ((datetime(2026, 1, 2),), {}, {}),
            ((1,), {}, {"queue": "large"}),
            ((1,), {}, {"priority": 6}),
            ((1,), {}, {"priority": 99}),
            ((1,), {}, {"countdown": 0}),
            ((1,), {}, {"shadow": "another name"}),
            ((1,), {}, {"time_limit": 60, "soft_time_limit": 30}),
            ((1,), {}, {"ignore_result": True}),
            ((1,), {}, {"headers": {"mine": 1, "stamp": None}}),
            ((1,), {}, {"group_id": "g", "group_index": 7, "root_id": "r", "parent_id": "p"}),
            ((1,), {}, {"retries": 3, "replaced_task_nesting": 2}),
            ((1,), {}, {"chain": [], "chord": None, "link": None}),
            ((1,), {}, {"serializer": "json", "expires": None, "compression": None}),
        ],
    )
    def test_whatever_it_is_told(
        self, add: JobTask, queues: Queues, went: list[str], args: Any, kwargs: Any, options: Any
    ) -> None:
        name = list_of(options.get("queue", "celery"), min(options.get("priority", 0), 9))
        add.apply_async(args, kwargs, task_id="t", **options)
        (straight,) = queues.messages(name)
        queues.client.flushall()
        with_receiver(lambda: add.apply_async(args, kwargs, task_id="t", **options))
        (celerys,) = queues.messages(name)
        assert went == ["straight", "Celery's"]
        assert said(straight) == said(celerys)

    def test_links_and_chords(
        self, add: JobTask, total: JobTask, queues: Queues, went: list[str]
    ) -> None:
        options = {"link": add.s(5), "link_error": [add.si(6)], "chord": total.s()}
        add.apply_async((1,), task_id="t", **options)
        queues.client.delete(keys.submitted(0))
        with_receiver(lambda: add.apply_async((1,), task_id="t", retries=0, **options))
        queues.client.flushall()
        add.apply_async((1,), task_id="t", **options)
        (straight,) = queues.messages()
        queues.client.flushall()
        with_receiver(lambda: add.apply_async((1,), task_id="t", **options))
        (celerys,) = queues.messages()
        assert said(straight) == said(celerys)
        assert set(said(straight)["body"][2]) == {"callbacks", "errbacks", "chord"}

    def test_a_delayed_one(self, add: JobTask, queues: Queues, went: list[str]) -> None:
        found = []
        for submit in (lambda f: f(), with_receiver):
            submit(lambda: add.apply_async((1,), eta=self.ETA, task_id="t", queue="later"))
            ((member, due),) = queues.client.zrange(keys.delayed("later"), 0, -1, withscores=True)
            name, _, text = member.partition(b"\0")
            found.append((name, due, said(json.loads(text))))
            queues.client.flushall()
        assert went == ["straight", "Celery's"]
        assert found[0] == found[1]
        assert found[0][1] == self.ETA.timestamp() * 1000

    def test_the_tasks_own_options(self, app: App, queues: Queues, went: list[str]) -> None:
        @app.task(name="tests.own", queue="own", priority=3, time_limit=9, ignore_result=True)  # type: ignore[untyped-decorator]
        def own() -> None: ...

        own.delay()
        (message,) = queues.messages(list_of("own", 3))
        assert message["headers"]["timelimit"] == [9, None]
        assert message["headers"]["ignore_result"] is True
        assert went == ["straight"]
        assert own.apply_async(queue="other", ignore_result=False).ignored is False
        assert len(queues.messages(list_of("other", 3))) == 1

    def test_a_group_and_a_chord_say_what_celerys_say(
        self, add: JobTask, total: JobTask, queues: Queues, went: list[str]
    ) -> None:
        def header(begins: str) -> group:
            tasks = [add.s(n, b="x").set(task_id=f"{begins}-{n}") for n in range(6)]
            tasks[4].link(total.s())
            tasks[5] = total.s([1]).set(task_id=f"{begins}-5")
            return group(tasks, task_id=begins)

        def submit() -> None:
            header("one").apply_async()
            header("two").apply_async(parent_id="p", root_id="r")
            first, second = total.s(), total.s([2])
            for n, (group_id, body) in enumerate((("g", first), ("g", second), ("h", second))):
                told: Any = {"group_id": group_id, "group_index": 2 + n, "chord": body}
                add.apply_async((n,), task_id=f"{group_id}-{n}", **told)
            for body in ("body", "another"):
                chord(header(body))(total.s().set(task_id=f"{body}-of-it"))

        def of_each() -> list[dict[str, Any]]:
            """A chord's header has an id by chance."""
            found = []
            for message in map(said, queues.messages()):
                text, group_id = json.dumps(message), message["headers"]["group"]
                if len(group_id) == 36:
                    text = text.replace(group_id, "by chance")
                found.append(json.loads(text))
            return found

        submit()
        straight = of_each()
        queues.client.flushall()
        with_receiver(submit)
        assert went == ["straight"] * 27 + ["Celery's"] * 27
        assert straight == of_each()
        chords = [message["body"][2]["chord"] for message in straight[15:]]
        bodies = [one["options"]["task_id"] for one in chords]
        assert bodies == ["body-of-it"] * 6 + ["another-of-it"] * 6

    def test_many_say_what_one_says(self, add: JobTask, queues: Queues, went: list[str]) -> None:
        calls: list[tuple[Any, Any]] = [((), {}), ((1, '"x"\\'), {}), ([datetime.now()], {"b": 2})]
        options = {"queue": "many", "priority": 3, "headers": {"mine": "id"}, "time_limit": 5}
        add.submit_many(calls, task_ids=["a", '"b"', "c"], **options)
        many = queues.messages(list_of("many", 3))
        queues.client.flushall()
        for task_id, (args, kwargs) in zip(["a", '"b"', "c"], calls, strict=True):
            with_receiver(
                lambda a=args, k=kwargs, i=task_id: add.apply_async(a, k, task_id=i, **options)  # type: ignore[misc]
            )
        one_by_one = queues.messages(list_of("many", 3))
        assert [said(message) for message in many] == [said(message) for message in one_by_one]
        assert len({message["properties"]["delivery_tag"] for message in many}) == 3

    @given(st.lists(st.one_of(st.integers(), st.floats(), st.booleans(), st.none()), max_size=12))
    def test_what_is_shown_of_arguments(self, arguments: list[Any]) -> None:
        for one in (arguments, tuple(arguments)):
            assert shown(one) == saferepr(one, 1024)

    def test_within_a_task_it_is_that_tasks_child(
        self, app: App, add: JobTask, queues: Queues
    ) -> None:
        add.push_request(id="parent", root_id="root", called_directly=False, children=[])
        _task_stack.push(add)
        try:
            result = add.delay(1)
            many = add.submit_many([((2,), {})])
            assert add.request.children == [result, many]
        finally:
            _task_stack.pop()
            add.pop_request()
        for message in queues.messages():
            assert message["headers"]["root_id"] == "root"
            assert message["headers"]["parent_id"] == "parent"


def with_receiver(act: Callable[[], object]) -> None:
    """Do it Celery's way."""
    signals.after_task_publish.connect(receive)
    try:
        act()
    finally:
        signals.after_task_publish.disconnect(receive)


class TestCelerysWay:
    """What isn't handled keeps working, because it goes there."""

    def test_signals_are_sent_to_who_receives_them(self, add: JobTask, went: list[str]) -> None:
        heard = []

        def hear(sender: Any, **options: Any) -> None:
            heard.append((sender, options["headers"]["id"]))

        for signal in (signals.before_task_publish, signals.after_task_publish):
            signal.connect(hear)
            try:
                result = add.delay(1)
                add.submit_many([((2,), {})], task_ids=[f"of {signal.name}"])
            finally:
                signal.disconnect(hear)
            assert heard[-2:] == [("tests.add", result.id), ("tests.add", f"of {signal.name}")]
        assert "straight" not in went

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("expires", 60),
            ("serializer", "yaml"),
            ("compression", "zlib"),
            ("exchange", "another"),
            ("retry", False),
            ("retry_policy", {"max_retries": 1}),
            ("stamped_headers", []),
            ("expiration", 3),
        ],
    )
    def test_an_option_that_is_not_handled(
        self, add: JobTask, queues: Queues, went: list[str], option: str, value: Any
    ) -> None:
        if option == "serializer":
            value = "pickle"
        if option == "exchange":
            add.apply_async((1,), exchange=value, routing_key="r", queue=None)
        else:
            add.apply_async((1,), **{option: value})
            assert len(queues.messages()) == 1
        assert went == ["Celery's"]

    @pytest.mark.parametrize(
        "changed",
        [
            {"task_routes": {"tests.add": {"queue": "routed"}}},
            {"task_compression": "zlib"},
            {"task_serializer": "pickle"},
            {"task_protocol": 1},
        ],
    )
    def test_configuration_that_is_not_handled(
        self, app: App, add: JobTask, queues: Queues, went: list[str], changed: dict[str, Any]
    ) -> None:
        add.delay(1)
        app.conf.update(changed)
        add.delay(1)
        add.submit_many([((1,), {})])
        assert went == ["straight", "Celery's", "Celery's"]
        assert len(queues.messages()) + len(queues.messages("routed")) == 3
        assert len(queues.messages("routed")) == (2 if "task_routes" in changed else 0)

    def test_eagerly(self, app: App, add: JobTask, queues: Queues) -> None:
        add.delay(1)
        app.conf.task_always_eager = True
        assert add.delay(7).get() == 7
        assert len(queues.messages()) == 1

    def test_arguments_that_do_not_fit_are_refused(self, add: JobTask, queues: Queues) -> None:
        with pytest.raises(TypeError, match="add"):
            add.delay(1, 2, 3)
        add.time_limit, add.soft_time_limit = 1, 2
        with pytest.raises(ValueError, match="soft_time_limit must be less"):
            add.delay(1)
        assert queues.messages() == []

    def test_the_queue_is_known_to_whoever_asks(self, add: JobTask, queues: Queues) -> None:
        add.apply_async(queue="fresh")
        assert queues.client.exists("_kombu.binding.fresh")

    def test_a_server_that_is_away(
        self, app: App, add: JobTask, queues: Queues, redis_server: RedisServer
    ) -> None:
        add.delay(1)
        app.conf.task_publish_retry_policy = {"max_retries": 1, "interval_start": 0}
        redis_server.kill()
        try:
            with pytest.raises(OperationalError):
                add.delay(2)
            with pytest.raises(OperationalError):
                add.submit_many([((3,), {})])
        finally:
            redis_server.start()
        add.delay(4)
        assert [said(message)["body"][0] for message in queues.messages()] == [[1], [4]]

    def test_a_server_at_its_limit(self, add: JobTask, queues: Queues) -> None:
        add.delay(1)
        queues.client.config_set("maxmemory", 1)
        with pytest.raises(BrokerFull, match="queue celery"):
            add.delay(2)
        queues.client.config_set("maxmemory", 0)


def test_a_forked_process_submits_over_a_connection_of_its_own(
    add: JobTask, queues: Queues, went: list[str]
) -> None:
    add.delay(0)
    child = multiprocessing.get_context("fork").Process(target=lambda: add.delay(1))
    child.start()
    child.join(20)
    assert child.exitcode == 0
    add.delay(2)
    messages = queues.messages()
    assert [said(message)["body"][0] for message in messages] == [[0], [1], [2]]
    first, of_child, last = (message["headers"]["origin"] for message in messages)
    assert first == last != of_child
    assert str(child.pid) in of_child


class TestRetries:
    def test_a_runs_own_retry_is_kept_for_its_worker(self, add: JobTask, queues: Queues) -> None:
        add.delay(0)
        with kept_retry("t") as kept:
            add.apply_async((1,), task_id="t", retries=1, countdown=60)
            add.apply_async((2,), task_id="another")
        assert kept.put is not None
        assert said(json.loads(kept.put.payload))["headers"]["retries"] == 1
        assert [said(message)["body"][0] for message in queues.messages()] == [[0], [2]]


class TestEvents:
    @pytest.fixture
    def heard(self, app: App) -> Iterator[list[dict[str, Any]]]:
        """Everything that a receiver of events is told."""
        events: list[dict[str, Any]] = []
        app.conf.task_send_sent_event = True
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": events.append})
            ready, over = threading.Event(), threading.Event()

            def listen() -> None:
                with receiver.consumer_context() as (own, _, _):
                    ready.set()
                    while not over.is_set():
                        try:
                            own.drain_events(timeout=0.05)
                        except TimeoutError:
                            continue

            thread = threading.Thread(target=listen)
            thread.start()
            ready.wait()
            with app.connection_for_read() as other:
                client = other.default_channel.client
                wait_for(lambda: client.pubsub_numpat() > 0, "the receiver to listen", 10)
            yield events
            over.set()
            thread.join()

    def test_they_ride_along(
        self, add: JobTask, heard: list[dict[str, Any]], went: list[str], queues: Queues
    ) -> None:
        one = add.apply_async((1, "x"), {}, queue="large")
        wait_for(lambda: len(heard) == 1, "an event", 10)
        with_receiver(lambda: add.apply_async((1, "x"), {}, task_id=one.id, queue="large"))
        wait_for(lambda: len(heard) == 2, "Celery's event", 10)
        assert went == ["straight", "Celery's"]
        straight, celerys = heard
        unlike = {"timestamp", "clock", "local_received"}
        assert {k: v for k, v in straight.items() if k not in unlike} == {
            k: v for k, v in celerys.items() if k not in unlike
        }
        assert straight["clock"] < celerys["clock"]

    def test_those_of_many_come_together(self, add: JobTask, heard: list[dict[str, Any]]) -> None:
        many = add.submit_many([((number,), {}) for number in range(250)])
        wait_for(lambda: len(heard) == 250, "an event each", 10)
        assert [event["uuid"] for event in heard] == many.ids
        assert {event["type"] for event in heard} == {"task-sent"}
        assert [event["args"] for event in heard[:2]] == ["(0,)", "(1,)"]

    def test_a_job_that_is_there_is_not_told_again(
        self, add: JobTask, heard: list[dict[str, Any]]
    ) -> None:
        add.apply_async((1,), task_id="t")
        add.apply_async((1,), task_id="t")
        add.delay(2)
        wait_for(lambda: len(heard) >= 2, "two events", 10)
        assert [event["args"] for event in heard] == ["(1,)", "(2,)"]

    def test_not_if_nobody_wants_them(
        self, app: App, add: JobTask, heard: list[dict[str, Any]]
    ) -> None:
        app.conf.task_send_sent_event = False
        add.delay(1)
        app.conf.task_send_sent_event = True
        add.delay(2)
        wait_for(lambda: heard, "an event", 10)
        assert [event["args"] for event in heard] == ["(2,)"]


class TestMany:
    def test_they_are_queued_in_order(self, add: JobTask, queues: Queues) -> None:
        many = add.submit_many(((n,), {"b": n}) for n in range(450))
        assert len(many) == 450
        assert queues.ids() == many.ids
        assert [result.id for result in many] == many.ids
        assert said(queues.messages()[449])["body"][:2] == ([449], {"b": 449})

    def test_all_are_checked_before_one_is_sent(self, add: JobTask, queues: Queues) -> None:
        good: Any = ((1,), {})
        wrong: list[tuple[Any, str]] = [
            ((1,), r"job 1 of submit_many is \(1,\); expected a pair"),
            (5, "job 1 of submit_many is 5"),
            (("ab", {}), "job 1 of submit_many"),
            (((1, 2, 3), {}), "add"),
        ]
        for bad, says in wrong:
            with pytest.raises(TypeError, match=says):
                add.submit_many([good, bad])
        for ids, says in ((["a"], "1 task ids for 2 jobs"), (["a", "a"], "stands there twice")):
            with pytest.raises(ValueError, match=says):
                add.submit_many([good, good], task_ids=ids)
        with pytest.raises(TypeError, match="a task id is a text"):
            add.submit_many([good], task_ids=[7])  # type: ignore[list-item]
        assert queues.messages() == []

    def test_doing_it_again_submits_what_is_missing(self, add: JobTask, queues: Queues) -> None:
        ids = [f"t{n}" for n in range(300)]
        add.submit_many([((n,), {}) for n in range(100)], task_ids=ids[:100])
        add.submit_many([((n,), {}) for n in range(300)], task_ids=ids)
        assert queues.ids() == ids

    def test_a_keyed_job_has_its_own_key_each(self, app: App, queues: Queues) -> None:
        from tests.unit.test_job import picky

        @app.task(name="tests.picky", definition=picky.definition)  # type: ignore[untyped-decorator]
        def task(n: int) -> None: ...

        task.submit_many([((1,), {}), ((), {"n": 2})])
        assert picky.definition is not None
        assert [message["headers"]["cohort"] for message in queues.messages()] == [
            {**picky.definition.about, "key": f"k-{n}"} for n in (1, 2)
        ]

    def test_the_results_are_made_when_they_are_asked_for(
        self, app: App, add: JobTask, queues: Queues
    ) -> None:
        many = add.submit_many([((n,), {}) for n in range(3)])
        assert "results" not in vars(many)
        for n, task_id in enumerate(many.ids):
            app.backend.store_result(task_id, n * 10, "SUCCESS")
        assert many.get(timeout=10) == [0, 10, 20]
        assert many.successful()
        restored = pickle.loads(pickle.dumps(many))
        assert (restored.id, restored.ids) == (many.id, many.ids)


class TestGroups:
    def test_they_are_put_together(
        self, add: JobTask, queues: Queues, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes: list[int] = []
        put = Submitter.put

        def counted(self: Submitter, puts: Any) -> None:
            sizes.append(len(puts))
            put(self, puts)

        monkeypatch.setattr(Submitter, "put", counted)
        result = group(add.s(n) for n in range(450)).apply_async()
        assert sizes == [200, 200, 50]
        assert queues.ids() == [one.id for one in result]
        assert {message["headers"]["group"] for message in queues.messages()} == {result.id}

    def test_one_that_goes_celerys_way_keeps_its_place(self, add: JobTask, queues: Queues) -> None:
        tasks = [add.s(0), add.s(1).set(expires=60), add.s(2)]
        result = group(tasks).apply_async()
        assert queues.ids() == [one.id for one in result]

    def test_a_group_that_is_wrong_is_not_sent(self, add: JobTask, queues: Queues) -> None:
        with pytest.raises(TypeError):
            group([add.s(1), add.s(1, 2, 3)]).apply_async()
        assert queues.messages() == []

    def test_a_chord_says_to_each_what_follows(
        self, add: JobTask, total: JobTask, queues: Queues
    ) -> None:
        result = chord([add.s(n) for n in range(3)])(total.s())
        bodies = [said(message)["body"][2]["chord"] for message in queues.messages()]
        assert [body["options"]["task_id"] for body in bodies] == [result.id] * 3

    def test_a_batch_is_a_producer_too(self, app: App, queues: Queues) -> None:
        with app.producer_or_acquire() as producer:
            assert isinstance(producer, Batch)
            producer.publish({"plain": 1}, routing_key="plain")
        assert len(queues.messages("plain")) == 1


class TestItExpires:
    """Such a job goes Celery's way. Whoever says so: the call or the task."""

    @staticmethod
    def expiring(queues: Queues) -> dict[str, float]:
        found = queues.client.zrange(keys.EXPIRING, 0, -1, withscores=True)
        return {name.decode(): ends / 1000 for name, ends in found}

    def test_as_the_call_says(self, add: JobTask, queues: Queues) -> None:
        before = time.time()
        result = add.apply_async((1,), expires=60)
        add.apply_async((1,))
        ((task_id, ends),) = self.expiring(queues).items()
        assert task_id == result.id
        assert 59 < ends - before < 62

    def test_many(self, add: JobTask, queues: Queues) -> None:
        results = group(add.s(n).set(expires=60) for n in range(3)).apply_async()
        assert set(self.expiring(queues)) == {result.id for result in results.children}

    def test_a_tasks_own_counts_from_each_submission(self, app: App, queues: Queues) -> None:
        @app.task(name="tests.brief", expires=60)  # type: ignore[untyped-decorator]
        def brief() -> None: ...

        first, second = brief.delay(), brief.delay()
        ends = self.expiring(queues)
        assert ends[first.id] < ends[second.id]
