"""Chapter *Monitoring and Management*: the command line, queues in Redis, and events."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import redis

from tests.celery import tasks_of_tests as tasks
from tests.celery.sides import Gate, Side, remains, wait_for
from tests.celery.tasks_of_tests import add

PATIENCE = 10
T = TypeVar("T")
NAME = "tests.celery.tasks_of_tests."


class Watcher:
    """Receives events as a monitor does, while the test waits for them."""

    def __init__(self, side: Side, connection: Any, receiver: Any) -> None:
        self.side = side
        self.events: list[dict[str, Any]] = []
        self.state = side.app.events.State()
        self._connection = connection
        receiver.handlers["*"] = self._keep

    def _keep(self, event: dict[str, Any]) -> None:
        self.state.event(event)
        self.events.append(event)

    def wait(self, fact: Callable[[], T | None], what: str, timeout: float = 10.0) -> T:
        """Receive until something is so."""

        def look() -> T | None:
            with contextlib.suppress(TimeoutError):
                self._connection.drain_events(timeout=0.1)
            return fact()

        return wait_for(look, what, timeout)

    def of(self, task_id: str) -> list[str]:
        """The kinds of events of one task, in the order in which they came."""
        return [event["type"] for event in self.events if event.get("uuid") == task_id]

    def find(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Wait for one event."""

        def found() -> dict[str, Any] | None:
            for event in self.events:
                if event["type"] == kind and fields.items() <= event.items():
                    return event
            return None

        return self.wait(found, f"{kind} with {fields}")


@contextlib.contextmanager
def watching(side: Side) -> Iterator[Watcher]:
    """Watch a side's events; it is known that they arrive."""
    with side.app.connection_for_read() as connection:
        receiver = side.app.events.Receiver(connection, handlers={})
        watcher = Watcher(side, connection, receiver)
        # `wakeup` has every worker send a heartbeat.
        with receiver.consumer_context(wakeup=True) as (used, _, _):
            watcher._connection = used
            watcher.find("worker-heartbeat", hostname=side.main)
            yield watcher


class TestCommands:
    def test_what_they_say(self, side: Side) -> None:
        """Each in a process of its own; all at once, since starting them is what takes time."""
        result = add.delay(20, 22)
        result.get(timeout=PATIENCE)
        failed = tasks.fail.delay()
        failed.get(timeout=PATIENCE, propagate=False)
        wanted = {
            ("status", "-d", side.main): f"{side.main}: OK",
            ("inspect", "-d", side.main, "ping"): "pong",
            ("inspect", "-d", side.main, "registered"): NAME + "add",
            ("inspect", "-d", side.main, "--json", "active_queues"): '"name": "celery"',
            ("control", "-d", side.main, "enable_events"): "task events",
            ("control", "-d", side.main, "rate_limit", NAME + "rated", "100/s"): "new rate limit",
            ("result", result.id): "42",
            ("result", "--traceback", failed.id): "raise ValueError(message)",
            ("list", "bindings"): "celery",
            ("report",): "celery:5.",
            ("shell", "--python"): "",
        }
        done = side.celery_together(*wanted, timeout=60)
        for answer, (words, part) in zip(done, wanted.items(), strict=True):
            assert part in answer.stdout, (words, answer.stdout, answer.stderr)
            assert answer.returncode == 0 or words[0] == "result", (words, answer.stderr)
        side.control("rate_limit", task_name=NAME + "rated", rate_limit=None)

    def test_nobody_answers(self, side: Side) -> None:
        answer = side.celery("inspect", "-d", "nobody@side", "-t", "0.3", "ping")
        assert answer.returncode != 0
        assert "No nodes replied" in answer.stdout + answer.stderr

    def test_call_purge_and_length(self, side: Side) -> None:
        queue = f"purged-{uuid.uuid4().hex[:6]}"
        for number in range(3):
            add.apply_async((1, number), queue=queue)
        assert side.client.llen(queue) == 3
        called, listed = side.celery_together(
            ("call", NAME + "add", "-a", "[20, 22]"), ("purge", "-f", "-Q", queue)
        )
        assert side.app.AsyncResult(called.stdout.strip()).get(timeout=PATIENCE) == 42
        assert "3" in listed.stdout
        assert side.client.llen(queue) == 0
        assert not side.client.exists(queue)

    def test_purge_from_a_program(self, side: Side) -> None:
        queue = f"purged-{uuid.uuid4().hex[:6]}"
        for priority in (0, 3, 6, 9):
            add.apply_async((1, 1), queue=queue, priority=priority)
        with side.app.connection_for_write() as connection:
            assert side.app.amqp.queues.select_add(queue).bind(connection).purge() == 4

    def test_purge_takes_what_is_not_due_as_well(self, side: Side) -> None:
        queue = f"purged-{uuid.uuid4().hex[:6]}"
        result = add.apply_async((1, 1), queue=queue, countdown=0.5)
        with side.app.connection_for_write() as connection:
            side.app.amqp.queues.select_add(queue).bind(connection).purge()
        with side.consuming(queue):
            assert remains(lambda: not result.ready(), 1.5)

    @pytest.mark.long
    def test_migrate(self, side: Side) -> None:
        queue = f"moved-{uuid.uuid4().hex[:6]}"
        for number in range(3):
            add.apply_async((1, number), queue=queue)
        here = side.workers.fleet.redis_url
        there = here.removesuffix("/0") + "/9"
        (done,) = side.celery_together(("migrate", "-n", "3", "-Q", queue, here, there))
        assert done.returncode == 0, done.stderr
        other = redis.Redis.from_url(there)
        assert other.llen(queue) == 3
        other.flushdb()
        side.client.delete(queue)

    def test_events_dump(self, side: Side) -> None:
        command = side.workers.command("events", "--dump")
        dump = subprocess.Popen(
            command, env=side.workers.environ, stdout=subprocess.PIPE, text=True
        )
        try:
            assert dump.stdout is not None
            lines = iter(dump.stdout.readline, "")
            next(line for line in lines if "heartbeat" in line)
            result = add.delay(1, 1)
            seen = []
            for line in lines:
                if result.id in line:
                    seen.append(line)
                if "task succeeded" in line and result.id in line:
                    break
            assert any("task received" in line for line in seen)
        finally:
            dump.kill()
            dump.wait()

    @pytest.mark.long
    def test_a_camera(self, side: Side) -> None:
        command = side.workers.command(
            "events", "--camera", "tests.celery.camera.Camera", "--frequency", "0.5"
        )
        camera = subprocess.Popen(
            command, env=side.workers.environ, stdout=subprocess.PIPE, text=True
        )
        try:
            assert camera.stdout is not None
            lines = iter(camera.stdout.readline, "")
            next(line for line in lines if "main@side" in line)
            for _ in range(3):
                add.delay(1, 1).get(timeout=PATIENCE)
            # Each shot counts what has come since the one before.
            seen = 0
            while seen < 3:
                seen += int(next(lines).split()[-2])
            assert seen == 3
        finally:
            camera.send_signal(signal.SIGINT)
            camera.kill()
            camera.wait()


class TestQueues:
    def test_length_and_keys(self, side: Side) -> None:
        queue = f"counted-{uuid.uuid4().hex[:6]}"
        for _ in range(3):
            add.apply_async((1, 1), queue=queue)
        assert side.client.llen(queue) == 3
        assert queue in side.client.keys("*")
        with side.app.connection_for_read() as connection:
            declared = connection.default_channel.queue_declare(queue, passive=True)
            assert declared.message_count == 3
        side.client.delete(queue)

    def test_each_priority_has_a_list(self, side: Side) -> None:
        queue = f"counted-{uuid.uuid4().hex[:6]}"
        for priority in (0, 3, 6, 9):
            add.apply_async((1, 1), queue=queue, priority=priority)
        lists = [queue, *(f"{queue}\x06\x16{step}" for step in (3, 6, 9))]
        assert [side.client.llen(name) for name in lists] == [1, 1, 1, 1]
        side.client.delete(*lists)

    def test_what_runs_is_in_no_queue(self, side: Side, gate: Gate) -> None:
        def kept() -> bool:
            # Stock keeps what isn't acknowledged in one hash, ours in one for each worker.
            hashes = side.client.keys("{cohort}claims:main:*") if side.is_ours else ["unacked"]
            found = [value for name in hashes for value in side.client.hvals(name)]
            return any(result.id in value for value in found)

        result = tasks.hold.delay(*gate.args("held"))
        gate.wait("held")
        assert side.client.llen("celery") == 0
        assert kept()
        gate.open("held")
        result.get(timeout=PATIENCE)
        wait_for(lambda: not kept(), "its acknowledgement")


class TestEvents:
    def test_success(self, side: Side) -> None:
        with watching(side) as watcher:
            result = add.delay(2, 2)
            done = watcher.find("task-succeeded", uuid=result.id)
            assert done["result"] == "4"
            assert done["runtime"] > 0
            assert done["hostname"] == side.main
            sent = watcher.find("task-sent", uuid=result.id)
            assert (sent["name"], sent["args"], sent["kwargs"]) == (NAME + "add", "(2, 2)", "{}")
            assert sent["queue"] == sent["routing_key"] == "celery"
            received = watcher.find("task-received", uuid=result.id)
            assert (received["name"], received["args"]) == (NAME + "add", "(2, 2)")
            assert received["root_id"] == result.id
            started = watcher.find("task-started", uuid=result.id)
            assert started["pid"]
            known = watcher.state.tasks[result.id]
            assert (known.state, known.name, known.result) == ("SUCCESS", NAME + "add", "4")
            assert known.worker.hostname == side.main

    def test_failure(self, side: Side) -> None:
        with watching(side) as watcher:
            result = tasks.fail.delay()
            failed = watcher.find("task-failed", uuid=result.id)
            assert failed["exception"] == "ValueError('as told')"
            assert "raise ValueError(message)" in failed["traceback"]

    def test_retry(self, side: Side) -> None:
        with watching(side) as watcher:
            result = tasks.retry_until.delay(1)
            retried = watcher.find("task-retried", uuid=result.id)
            assert "ValueError('not yet')" in retried["exception"]
            watcher.find("task-succeeded", uuid=result.id)
            assert watcher.of(result.id).count("task-received") == 2

    def test_revoked_while_it_runs(self, side: Side, gate: Gate) -> None:
        with watching(side) as watcher:
            result = tasks.hold.delay(*gate.args("held"))
            gate.wait("held")
            result.revoke(terminate=True)
            revoked = watcher.find("task-revoked", uuid=result.id)
            assert (revoked["terminated"], revoked["expired"]) == (True, False)
            assert revoked["signum"] in (15, "15", "SIGTERM")

    def test_expired(self, side: Side) -> None:
        with watching(side) as watcher:
            result = add.apply_async((1, 1), expires=-1)
            assert watcher.find("task-revoked", uuid=result.id)["expired"] is True

    def test_rejected(self, side: Side) -> None:
        with watching(side) as watcher:
            watcher.find("task-rejected", uuid=tasks.rejected.delay().id)

    def test_events_of_ones_own(self, side: Side) -> None:
        with watching(side) as watcher:
            result = tasks.send_event.delay("hello")
            assert watcher.find("task-of-mine", uuid=result.id)["word"] == "hello"

    def test_a_worker_comes_is_switched_on_and_off_and_goes(self, side: Side) -> None:
        name = "guest@side"
        words = ("-c", "1", "worker.send_task_events=0")
        with watching(side) as watcher, side.worker("guest", *words) as worker:
            watcher.find("worker-online", hostname=name)
            beat = watcher.wait(
                lambda: next(
                    (e for e in watcher.events if e["hostname"] == name and "processed" in e), None
                ),
                "a heartbeat",
            )
            assert {"freq", "sw_ident", "sw_ver", "sw_sys", "active", "loadavg"} <= set(beat)
            assert watcher.state.workers[name].alive

            def heard_of(last: str = "task-sent") -> list[str]:
                result = add.apply_async((1, 1), queue="guest")
                result.get(timeout=PATIENCE)
                watcher.find(last, uuid=result.id)
                # What is sent next comes later than all of it.
                watcher.find("task-succeeded", uuid=add.delay(1, 1).id)
                return watcher.of(result.id)

            assert heard_of() == ["task-sent"]
            assert "ok" in side.control("enable_events", name)
            assert set(heard_of("task-succeeded")) == {
                *("task-sent", "task-received", "task-started", "task-succeeded")
            }
            assert "ok" in side.control("disable_events", name)
            assert heard_of() == ["task-sent"]
            os.kill(worker.pid, signal.SIGTERM)
            watcher.find("worker-offline", hostname=name)
            assert not watcher.state.workers[name].alive
