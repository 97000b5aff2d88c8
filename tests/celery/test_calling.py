"""Chapter *Calling Tasks*: what a call and its options promise."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from kombu import Exchange
from kombu.exceptions import EncodeError, OperationalError
from kombu.serialization import disable_insecure_serializers, enable_insecure_serializers

from deploy.fleet import free_port
from tests.celery import tasks_of_tests as tasks
from tests.celery.sides import Gate, Side, lines_of, remains, wait_for
from tests.celery.tasks_of_tests import add

PATIENCE = 10


def in_seconds(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


class TestBasics:
    def test_delay(self, caller: Side) -> None:
        assert add.delay(2, y=2).get(timeout=PATIENCE) == 4

    def test_apply_async_takes_args_and_kwargs(self, caller: Side) -> None:
        called = tasks.echo.apply_async((1, "two"), {"x": [3]})
        assert called.get(timeout=PATIENCE) == [[1, "two"], {"x": [3]}]

    def test_calling_runs_it_here(self, caller: Side) -> None:
        request = tasks.request_of()
        assert add(2, 2) == 4
        assert request["called_directly"]

    def test_apply_runs_it_here_and_gives_a_result(self, caller: Side) -> None:
        result = add.apply((2, 2))
        assert (result.get(), result.state) == (4, "SUCCESS")
        assert tasks.fail.apply().state == "FAILURE"

    def test_send_task_by_name(self, caller: Side) -> None:
        sent = caller.app.send_task("tests.celery.tasks_of_tests.add", (2, 2))
        assert sent.get(timeout=PATIENCE) == 4

    def test_signatures_are_called_the_same_way(self, caller: Side) -> None:
        assert add.s(2, 2).delay().get(timeout=PATIENCE) == 4
        assert add.s(2).apply_async((40,), countdown=0).get(timeout=PATIENCE) == 42

    def test_task_id_given(self, caller: Side) -> None:
        own = f"my-own-{uuid.uuid4().hex}"
        result = tasks.request_of.apply_async(task_id=own)
        assert result.id == own
        assert result.get(timeout=PATIENCE)["id"] == own

    def test_wrong_arguments_are_refused_before_anything_is_sent(self, caller: Side) -> None:
        with pytest.raises(TypeError):
            add.delay(1)

    def test_without_typing_the_worker_finds_out(self, caller: Side) -> None:
        with pytest.raises(TypeError):
            tasks.untyped.delay(1).get(timeout=PATIENCE)

    def test_an_unknown_task_fails(self, caller: Side) -> None:
        sent = caller.app.send_task("no.such.task")
        with pytest.raises(Exception, match=r"no\.such\.task"):
            sent.get(timeout=PATIENCE)


class TestLinks:
    def test_link(self, caller: Side) -> None:
        result = add.apply_async((2, 2), link=add.s(16))
        assert result.get(timeout=PATIENCE) == 4
        (child,) = wait_for(lambda: result.children, "a child")
        assert child.get(timeout=PATIENCE) == 20

    def test_several_links_are_all_called(self, caller: Side, tmp_path: Path) -> None:
        path = tmp_path / "called"
        links = [tasks.note.s(path=str(path), word=str(number)) for number in range(3)]
        add.apply_async((2, 2), link=links)
        wait_for(lambda: len(lines_of(path)) == 3, "three callbacks")
        assert sorted(lines_of(path)) == [f'["{number}", 4]' for number in range(3)]

    def test_no_link_is_called_after_a_failure(self, caller: Side, tmp_path: Path) -> None:
        path = tmp_path / "called"
        result = tasks.fail.apply_async(link=tasks.note.s(path=str(path)))
        with pytest.raises(ValueError, match="as told"):
            result.get(timeout=PATIENCE)
        assert remains(lambda: not path.exists())

    def test_link_error_is_called_with_the_request(self, caller: Side, tmp_path: Path) -> None:
        path = tmp_path / "errors"
        result = tasks.fail.apply_async(link_error=tasks.note_error.s(path=str(path)))
        wait_for(lambda: lines_of(path), "an errback")
        assert lines_of(path) == [f"{result.id} ValueError as told"]

    def test_link_error_of_the_old_style_gets_the_id(self, caller: Side, tmp_path: Path) -> None:
        path = tmp_path / "errors"
        result = tasks.fail.apply_async(link_error=tasks.note_failed_id.s(path=str(path)))
        wait_for(lambda: lines_of(path), "an errback")
        assert lines_of(path) == [result.id]

    def test_several_errbacks_of_both_styles(self, caller: Side, tmp_path: Path) -> None:
        new, old = tmp_path / "new", tmp_path / "old"
        result = tasks.fail.apply_async(
            link_error=[tasks.note_error.s(path=str(new)), tasks.note_failed_id.s(path=str(old))]
        )
        wait_for(lambda: lines_of(new) and lines_of(old), "both errbacks")
        assert lines_of(new) == [f"{result.id} ValueError as told"]
        assert lines_of(old) == [result.id]

    def test_no_errback_is_called_after_a_success(self, caller: Side, tmp_path: Path) -> None:
        path = tmp_path / "errors"
        add.apply_async((2, 2), link_error=tasks.note_error.s(path=str(path))).get(timeout=PATIENCE)
        assert remains(lambda: not path.exists())

    def test_on_message_sees_every_state(self, caller: Side) -> None:
        seen: list[tuple[str, object]] = []

        def told(body: dict[str, object]) -> None:
            if body["task_id"] == result.id:  # It hears of others as well.
                seen.append((str(body["status"]), body["result"]))

        result = tasks.report_progress.apply_async(([50, 90],), countdown=0.3)
        value = result.get(
            on_message=told,
            propagate=False,
            timeout=PATIENCE,
        )
        assert value == "hello world"
        assert [state for state, _ in seen] == ["STARTED", "PROGRESS", "PROGRESS", "SUCCESS"]
        assert [found for _, found in seen[1:]] == [
            {"progress": 50},
            {"progress": 90},
            "hello world",
        ]


class TestEta:
    @pytest.mark.parametrize("option", ["countdown", "eta", "naive eta"])
    def test_it_runs_when_it_is_due(self, caller: Side, option: str) -> None:
        due = in_seconds(0.7)
        ways: dict[str, dict[str, object]] = {
            "countdown": {"countdown": 0.7},
            "eta": {"eta": due},
            # Without a zone it is the app's: UTC here.
            "naive eta": {"eta": due.replace(tzinfo=None)},
        }
        result = add.apply_async((2, 2), **ways[option])
        assert result.get(timeout=PATIENCE) == 4
        assert datetime.now(UTC) >= due
        assert datetime.now(UTC) <= due + timedelta(seconds=3)

    def test_another_time_zone(self, caller: Side) -> None:
        from zoneinfo import ZoneInfo

        due = in_seconds(0.7)
        result = add.apply_async((2, 2), eta=due.astimezone(ZoneInfo("Asia/Tokyo")))
        assert result.get(timeout=PATIENCE) == 4
        assert datetime.now(UTC) >= due

    def test_what_is_past_runs_at_once(self, caller: Side) -> None:
        assert add.apply_async((2, 2), eta=in_seconds(-60)).get(timeout=PATIENCE) == 4

    def test_others_overtake_what_is_not_due(self, caller: Side) -> None:
        later = add.apply_async((1, 1), countdown=3)
        assert [add.delay(2, 2).get(timeout=PATIENCE) for _ in range(8)] == [4] * 8
        assert not later.ready()
        assert later.get(timeout=PATIENCE) == 2


class TestExpires:
    @pytest.mark.parametrize("kind", ["seconds", "datetime", "text"])
    def test_expired(self, caller: Side, kind: str) -> None:
        past = in_seconds(-1)
        expires = {"seconds": -1, "datetime": past, "text": past.isoformat()}[kind]
        result = add.apply_async((2, 2), expires=expires)
        with pytest.raises(TaskRevokedError, match="expired"):
            result.get(timeout=PATIENCE)
        assert result.state == "REVOKED"

    @pytest.mark.parametrize("kind", ["seconds", "datetime"])
    def test_not_expired_yet(self, caller: Side, kind: str) -> None:
        expires = {"seconds": 60, "datetime": in_seconds(60)}[kind]
        assert add.apply_async((2, 2), expires=expires).get(timeout=PATIENCE) == 4

    def test_it_expires_while_it_waits(self, caller: Side) -> None:
        result = add.apply_async((2, 2), countdown=1, expires=0.3)
        with pytest.raises(TaskRevokedError, match="expired"):
            result.get(timeout=PATIENCE)


class TestConnection:
    @pytest.fixture
    def lost(self, caller: Side) -> Iterator[None]:
        """The same app, with a broker that isn't there."""
        conf, there = caller.app.conf, caller.app.conf.broker_url
        conf.broker_url = f"redis://127.0.0.1:{free_port()}/0"
        # Or each connection tries for six seconds by itself, stock or not.
        conf.broker_transport_options = {"max_retries": 1, "interval_start": 0, "interval_step": 0}
        caller.app._pool = caller.app.amqp._producer_pool = None
        yield
        conf.broker_url, conf.broker_transport_options = there, {}
        caller.app._pool = caller.app.amqp._producer_pool = None

    def test_without_retry_the_error_comes_at_once(self, caller: Side, lost: None) -> None:
        begun = time.monotonic()
        with pytest.raises(OperationalError):
            add.apply_async((2, 2), retry=False)
        assert time.monotonic() - begun < 2

    def test_it_is_the_tasks_operational_error(self, caller: Side, lost: None) -> None:
        with pytest.raises(add.OperationalError):
            add.apply_async((2, 2), retry=False)

    def test_with_retry_it_comes_after_the_last_try(self, caller: Side, lost: None) -> None:
        begun = time.monotonic()
        policy = {"max_retries": 2, "interval_start": 0.3, "interval_step": 0, "interval_max": 1}
        with pytest.raises(OperationalError):
            add.apply_async((2, 2), retry=True, retry_policy=policy)
        assert 0.3 <= time.monotonic() - begun < 5

    def test_a_producer_of_ones_own(self, caller: Side) -> None:
        # The manual's `add.get_publisher` is gone from Celery.
        with caller.app.producer_pool.acquire(block=True) as producer:
            results = [add.apply_async((i, i), producer=producer) for i in (2, 4)]
        assert [result.get(timeout=PATIENCE) for result in results] == [4, 8]

    def test_a_connection_of_ones_own(self, caller: Side) -> None:
        with caller.app.connection_for_write() as connection:
            result = add.apply_async((2, 2), connection=connection)
        assert result.get(timeout=PATIENCE) == 4

    def test_a_producer_whose_connection_was_dropped_connects_anew(self, caller: Side) -> None:
        assert add.delay(2, 2).get(timeout=PATIENCE) == 4
        with caller.app.pool.acquire(block=True) as connection:
            client = connection.default_channel.client
            mine = client.client_id()
            # The server drops it, as a firewall or a failover would.
            caller.client.client_kill_filter(_id=mine)
        try:
            assert add.delay(2, 2).get(timeout=PATIENCE) == 4
            # Whoever finds the connection broken may be told so, and closes it.
            with contextlib.suppress(redis.ConnectionError):
                caller.inspect().ping()
            assert add.delay(2, 2).get(timeout=PATIENCE) == 4
        finally:
            caller.app.__dict__.pop("submitter", None)


class TestSerializers:
    def test_json_takes_dates_uuids_and_decimals(self, caller: Side) -> None:
        when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        value = {"when": when, "id": uuid.UUID(int=7)}
        assert tasks.same.apply_async((value,)).get(timeout=PATIENCE) == value

    def test_what_cannot_be_serialized_is_refused_here(self, caller: Side) -> None:
        with pytest.raises(EncodeError):
            tasks.same.delay(object())

    def test_pickle_is_refused_by_default(self, caller: Side, gate: Gate) -> None:
        enable_insecure_serializers(["pickle"])
        try:
            result = tasks.hold.apply_async(gate.args("pickled"), serializer="pickle")
        finally:
            disable_insecure_serializers(["json"])
            enable_insecure_serializers(["yaml"])
        assert add.delay(2, 2).get(timeout=PATIENCE) == 4
        assert remains(lambda: not gate.runs("pickled"))
        assert result.state == "PENDING"
        assert caller.client.llen("celery") == 0

    @pytest.mark.parametrize("compression", ["gzip", "bzip2", "lzma", "zlib"])
    def test_compression(self, caller: Side, compression: str) -> None:
        text = "long " * 10_000
        result = tasks.same.apply_async((text,), compression=compression)
        assert result.get(timeout=PATIENCE) == text

    def test_compression_makes_the_message_small(self, caller: Side) -> None:
        result = tasks.same.apply_async(("long " * 10_000,), compression="gzip", queue="nobody's")
        assert len(caller.client.lindex("nobody's", 0)) < 5_000
        caller.client.delete("nobody's")
        result.forget()


class TestRouting:
    def test_queue(self, caller: Side) -> None:
        queue = f"queue-{uuid.uuid4().hex[:6]}"
        result = tasks.request_of.apply_async(queue=queue)
        assert caller.client.llen(queue) == 1
        with caller.consuming(queue):
            found = result.get(timeout=PATIENCE)
        assert found["delivery"]["routing_key"] == queue

    def test_exchange_and_routing_key(self, caller: Side) -> None:
        name = f"routed-{uuid.uuid4().hex[:6]}"
        with caller.consuming(name, exchange="ex", exchange_type="direct", routing_key=name):
            result = tasks.request_of.apply_async(exchange="ex", routing_key=name)
            found = result.get(timeout=PATIENCE)
        assert found["delivery"] == {"exchange": "ex", "routing_key": name}

    def test_a_topic_exchange(self, caller: Side) -> None:
        name, topics = f"topic-{uuid.uuid4().hex[:6]}", Exchange("topics", "topic")
        with caller.consuming(
            name, exchange="topics", exchange_type="topic", routing_key=f"{name}.*"
        ):
            result = tasks.request_of.apply_async(
                exchange=topics, routing_key=f"{name}.video", declare=[topics]
            )
            assert result.get(timeout=PATIENCE)["delivery"]["routing_key"] == f"{name}.video"

    def read_routes(self, caller: Side) -> None:
        caller.app.amqp.flush_routes()
        caller.app.amqp.router = caller.app.amqp.Router()

    def test_task_routes(self, caller: Side) -> None:
        queue = f"by-route-{uuid.uuid4().hex[:6]}"
        caller.app.conf.task_routes = {"tests.celery.tasks_of_tests.sub*": {"queue": queue}}
        self.read_routes(caller)
        try:
            tasks.subtract.delay(1, 1)
        finally:
            caller.app.conf.task_routes = None
            self.read_routes(caller)
        assert caller.client.llen(queue) == 1
        caller.client.delete(queue)

    def test_priority_zero_is_served_first(self, caller: Side, gate: Gate, tmp_path: Path) -> None:
        path = tmp_path / "order"
        held = [tasks.hold.delay(*gate.args(f"all-{n}")) for n in range(4)]
        for number in range(4):
            gate.wait(f"all-{number}")
        # All are there before anything is fetched: what a worker has fetched stays in order.
        queue = f"urgent-{uuid.uuid4().hex[:6]}"
        noted = [
            tasks.note.apply_async(
                kwargs={"path": str(path), "word": str(p)}, priority=p, queue=queue
            )
            for p in (9, 6, 3, 0)
        ]
        with caller.consuming(queue):
            # One process goes through all of it: the others stay held.
            gate.open("all-0")
            for result in noted:
                result.get(timeout=PATIENCE)
        gate.open(*(f"all-{n}" for n in range(4)))
        for result in held:
            result.get(timeout=PATIENCE)
        assert lines_of(path) == ['["0"]', '["3"]', '["6"]', '["9"]']

    def test_the_task_is_told_its_priority(self, caller: Side) -> None:
        found = tasks.request_of.apply_async(priority=6).get(timeout=PATIENCE)
        assert found["priority"] == 6


class TestOptions:
    def test_ignore_result_for_one_call(self, caller: Side, tmp_path: Path) -> None:
        path = tmp_path / "ran"
        result = tasks.note.apply_async((1,), {"path": str(path)}, ignore_result=True)
        wait_for(lambda: lines_of(path), "it to run")
        assert result.get(timeout=PATIENCE) is None
        assert remains(lambda: result.state == "PENDING", 0.3)

    def test_ignore_result_of_the_task_may_be_overridden(self, caller: Side) -> None:
        assert tasks.silent.delay().get(timeout=PATIENCE) is None
        assert tasks.silent.apply_async(ignore_result=False).get(timeout=PATIENCE) == 7

    def test_headers(self, caller: Side) -> None:
        sent = tasks.request_of.apply_async(headers={"periodic_task_name": "nightly", "x-mine": 1})
        found = sent.get(timeout=PATIENCE)
        assert found["periodic_task_name"] == "nightly"
        assert found["headers"]["x-mine"] == 1

    def test_shadow_is_the_name_in_logs_and_events(self, caller: Side) -> None:
        result = tasks.request_of.apply_async(shadow="another.name")
        found = result.get(timeout=PATIENCE)
        assert found["shadow"] == "another.name"
        log = caller.workers.parts["main"].log
        wait_for(lambda: f"another.name[{result.id}] succeeded" in log.read_text(), "the log")

    def test_argsrepr_hides_arguments(self, caller: Side) -> None:
        sent = tasks.request_of.apply_async(
            ("secret",), {"word": "secret"}, argsrepr="(...)", kwargsrepr="{...}"
        )
        found = sent.get(timeout=PATIENCE)
        assert (found["argsrepr"], found["kwargsrepr"]) == ("(...)", "{...}")
        assert found["args"] == ["secret"]

    def test_time_limit_for_one_call(self, caller: Side) -> None:
        result = tasks.sleep.apply_async((20,), time_limit=1)
        with pytest.raises(Exception, match="TimeLimitExceeded"):
            result.get(timeout=PATIENCE)
        assert result.state == "FAILURE"

    def test_soft_time_limit_for_one_call(self, caller: Side, tmp_path: Path) -> None:
        path = tmp_path / "cleaned"
        result = tasks.until_soft_limit.apply_async((str(path),), soft_time_limit=1)
        assert result.get(timeout=PATIENCE) == "cleaned up"
        assert path.exists()

    def test_children_of_a_task(self, caller: Side) -> None:
        result = tasks.spawn.delay(2)
        ids = result.get(timeout=PATIENCE)
        assert [child.id for child in result.children] == ids
        assert [child.get(timeout=PATIENCE) for child in result.children] == [0, 2]

    def test_add_to_parent_off(self, caller: Side) -> None:
        result = tasks.spawn.delay(2, add_to_parent=False)
        for child in result.get(timeout=PATIENCE):
            assert AsyncResult(child, app=caller.app).get(timeout=PATIENCE) in (0, 2)
        assert not result.children

    def test_parent_and_root_of_a_child(self, caller: Side) -> None:
        result = tasks.same.apply_async((1,), link=tasks.request_of.s())
        result.get(timeout=PATIENCE)
        (child,) = wait_for(lambda: result.children, "a child")
        found = child.get(timeout=PATIENCE)
        assert (found["parent_id"], found["root_id"]) == (result.id, result.id)

    def test_what_a_task_knows_of_its_call(self, caller: Side) -> None:
        result = tasks.request_of.apply_async((1,), {"k": 2})
        found = result.get(timeout=PATIENCE)
        assert found["id"] == found["correlation_id"] == found["root_id"] == result.id
        assert (found["args"], found["kwargs"]) == ([1], {"k": 2})
        assert found["hostname"] == caller.main
        assert found["retries"] == 0
        assert found["lang"] == "py"
        assert found["delivery"]["routing_key"] == "celery"
        ours = {name for name in found["headers"] if name.startswith("cohort")}
        assert bool(ours) == caller.is_ours
