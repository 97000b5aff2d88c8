"""Chapter *Workers*: what a running worker can be asked and told."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from tests.celery import tasks_of_tests as tasks
from tests.celery.marks import wrong_on
from tests.celery.sides import Gate, Part, Side, lines_of, remains, wait_for
from tests.celery.tasks_of_tests import add

PATIENCE = 10
NAME = "tests.celery.tasks_of_tests."


@pytest.fixture
def queue() -> str:
    return f"queue-{uuid.uuid4().hex[:6]}"


class TestInspect:
    def test_ping(self, side: Side) -> None:
        assert side.inspect().ping() == {side.main: {"ok": "pong"}}
        assert side.app.control.ping(destination=[side.main], timeout=5) == [
            {side.main: {"ok": "pong"}}
        ]

    def test_nobody_of_that_name(self, side: Side) -> None:
        assert side.inspect("nobody@side", timeout=0.3).ping() is None

    def test_active(self, side: Side, gate: Gate) -> None:
        result = tasks.hold.delay(*gate.args("held"))
        gate.wait("held")
        (found,) = side.inspect().active()[side.main]
        assert (found["id"], found["name"]) == (result.id, NAME + "hold")
        assert found["args"] == list(gate.args("held"))
        assert found["worker_pid"] == int(gate.runs("held")[0])
        assert found["acknowledged"] is False
        assert time.time() - 10 < found["time_start"] <= time.time()
        gate.open("held")
        result.get(timeout=PATIENCE)
        wait_for(lambda: side.inspect().active()[side.main] == [], "nothing to be active")

    def test_query_task(self, side: Side, gate: Gate) -> None:
        result = tasks.hold.delay(*gate.args("held"))
        gate.wait("held")
        found = side.inspect().query_task(result.id, "nobody")[side.main]
        assert found.keys() == {result.id}
        assert found[result.id][0] == "active"
        gate.open("held")
        result.get(timeout=PATIENCE)

    def test_reserved(self, side: Side, gate: Gate) -> None:
        # One process, and tasks that are acknowledged when they begin: one more may be fetched.
        name = "reserves@side"
        with side.worker("reserves", "-c", "1", "task.acks_late=0"):
            sent = [
                tasks.hold.apply_async(gate.args(str(number)), queue="reserves")
                for number in range(4)
            ]
            gate.wait("0")

            def reserved() -> list[str]:
                return [one["id"] for one in side.inspect(name).reserved()[name]]

            if not side.is_ours:  # Ours fetches by how long tasks take, and gives back.
                wait_for(lambda: reserved() == [sent[1].id], "one to be fetched ahead")
            found = reserved()
            if not side.is_ours:
                assert side.client.llen("reserves") + len(found) == 3
            gate.open(*(str(number) for number in range(4)))
            for result in sent:
                result.get(timeout=PATIENCE)

    def test_scheduled(self, side: Side) -> None:
        result = add.apply_async((1, 1), countdown=60)
        if side.is_ours:
            # It waits in Redis, for all workers.
            assert remains(lambda: side.inspect().scheduled()[side.main] == [], 0.3)
            assert side.client.zcard("{cohort}delayed:celery") >= 1
        else:

            def found() -> list[str]:
                waiting = side.inspect().scheduled()[side.main]
                return [one["request"]["id"] for one in waiting]

            wait_for(lambda: result.id in found(), "it to be scheduled")
        result.revoke()

    def test_revoked(self, side: Side) -> None:
        name = uuid.uuid4().hex
        side.app.control.revoke(name, reply=True, destination=[side.main], timeout=5)
        assert name in side.inspect().revoked()[side.main]

    def test_registered(self, side: Side) -> None:
        found = side.inspect().registered()[side.main]
        assert {NAME + "add", NAME + "limited"} <= set(found)
        detailed = side.inspect().registered("rate_limit", "soft_time_limit")[side.main]
        assert any(line.startswith(NAME + "limited [soft_time_limit=1") for line in detailed)

    def test_stats(self, side: Side) -> None:
        add.delay(1, 1).get(timeout=PATIENCE)
        found = side.inspect().stats()[side.main]
        assert found["pid"] == side.workers.parts["main"].pid
        assert found["total"][NAME + "add"] >= 1
        assert found["pool"]["max-concurrency"] == 4
        assert len(found["pool"]["processes"]) == 4
        assert found["broker"]["transport"] == "redis"
        # Stock: and one for each task with an ETA. Ours claims what fits, without such a number.
        assert found["prefetch_count"] == 0 if side.is_ours else found["prefetch_count"] >= 4
        assert found["rusage"]["utime"] > 0
        assert found["clock"]

    def test_report_conf_clock_and_memory(self, side: Side) -> None:
        asked = side.inspect()
        assert "celery:5." in asked.report()[side.main]["ok"]
        assert asked.conf()[side.main]["result_extended"] is True
        assert asked.clock()[side.main]["clock"] > 0

    def test_active_queues(self, side: Side) -> None:
        found = {one["name"]: one for one in side.inspect().active_queues()[side.main]}
        assert found["celery"]["routing_key"] == "celery"
        assert found["celery"]["exchange"]["name"] == "celery"


class TestControl:
    def test_broadcast_with_a_reply(self, side: Side) -> None:
        replies = side.app.control.broadcast("ping", reply=True, timeout=1.0)
        assert {side.main: {"ok": "pong"}} in replies

    def test_a_limit_of_replies_ends_the_wait(self, side: Side) -> None:
        begun = time.monotonic()
        side.app.control.broadcast("ping", reply=True, timeout=10, limit=1)
        assert time.monotonic() - begun < 5

    def test_destination_by_pattern(self, side: Side) -> None:
        replies = side.app.control.broadcast(
            "ping", reply=True, timeout=5, limit=1, pattern="main@*", matcher="glob"
        )
        assert replies == [{side.main: {"ok": "pong"}}]

    def test_add_and_cancel_consumer(self, side: Side, queue: str) -> None:
        assert queue in side.control("add_consumer", queue=queue)["ok"]
        assert queue in side.control("add_consumer", queue=queue)["ok"]  # Again: no harm.

        def names() -> list[str]:
            return sorted(found["name"] for found in side.inspect().active_queues()[side.main])

        wait_for(lambda: queue in names(), "the queue")
        assert add.apply_async((1, 1), queue=queue).get(timeout=PATIENCE) == 2
        assert queue in side.control("cancel_consumer", queue=queue)["ok"]
        wait_for(lambda: queue not in names(), "the queue to go")
        result = add.apply_async((1, 1), queue=queue)
        assert remains(lambda: not result.ready(), 0.5)
        assert side.client.llen(queue) == 1
        side.client.delete(queue)

    def test_rate_limit(self, side: Side, tmp_path: Path) -> None:
        path = tmp_path / "times"
        told = side.control("rate_limit", task_name=NAME + "rated", rate_limit="4/s")
        assert told == {"ok": "new rate limit set successfully"}
        try:
            for result in [tasks.rated.delay(str(path)) for _ in range(5)]:
                result.get(timeout=PATIENCE)
        finally:
            side.control("rate_limit", task_name=NAME + "rated", rate_limit=None)
        times = [float(line) for line in lines_of(path)]
        assert max(times) - min(times) > 0.7
        assert "error" in side.control("rate_limit", task_name="nobody", rate_limit="1/s")

    @wrong_on("stock", reason="Celery 5.7 reads a task's limits once, when its worker starts")
    def test_time_limit(self, side: Side) -> None:
        name = NAME + "until_soft_limit"
        told = side.control("time_limit", task_name=name, soft=1, hard=9)
        assert told == {"ok": "time limits set successfully"}
        try:
            result = tasks.until_soft_limit.delay(seconds=3)
            assert result.get(timeout=PATIENCE) == "cleaned up"
        finally:
            side.control("time_limit", task_name=name, soft=None, hard=None)

    @pytest.mark.long  # A pool looks every five seconds whether it has grown.
    def test_pool_grow_and_shrink(self, side: Side, gate: Gate) -> None:
        def size() -> tuple[int, int]:
            stats = side.inspect().stats()[side.main]
            return len(stats["pool"]["processes"]), 0 if side.is_ours else stats["prefetch_count"]

        processes, credit = size()
        side.control("pool_grow", n=1)
        grown = (processes + 1, credit if side.is_ours else credit + 1)
        wait_for(lambda: size() == grown, "a fifth process")
        sent = [tasks.hold.delay(*gate.args(str(number))) for number in range(5)]
        for number in range(5):
            gate.wait(str(number))
        gate.open(*(str(number) for number in range(5)))
        for result in sent:
            result.get(timeout=PATIENCE)
        side.control("pool_shrink", n=1)
        wait_for(lambda: size() == (processes, credit), "it to go")

    def test_commands_of_ones_own(self, side: Side) -> None:
        assert side.control("multiply_by_two", n=21) == {"ok": 42}
        assert side.control("current_prefetch_count").keys() == {"prefetch_count"}

    def test_autoscale_and_pool_restart_must_be_enabled(self, side: Side) -> None:
        assert "error" in side.control("autoscale", max=5, min=1)
        assert "error" in side.control("pool_restart")

    def test_an_unknown_command_gets_no_reply(self, side: Side) -> None:
        told = side.app.control.broadcast(
            "no_such_command", reply=True, timeout=0.3, destination=[side.main]
        )
        assert all("error" in reply[side.main] for reply in told)
        assert add.delay(1, 1).get(timeout=PATIENCE) == 2


class TestRevoke:
    def test_a_waiting_task_is_revoked_at_once(self, side: Side) -> None:
        result = add.apply_async((1, 1), countdown=60)
        result.revoke()
        wait_for(lambda: result.state == "REVOKED", "the outcome", 3)

    def test_several(self, side: Side) -> None:
        results = [add.apply_async((1, 1), countdown=1) for _ in range(3)]
        side.app.control.revoke([result.id for result in results])
        for result in results:
            with pytest.raises(TaskRevokedError):
                result.get(timeout=PATIENCE)

    def test_a_queued_task_never_runs(self, side: Side, gate: Gate) -> None:
        held = [tasks.hold.delay(*gate.args(f"held-{number}")) for number in range(4)]
        for number in range(4):
            gate.wait(f"held-{number}")
        waiting = tasks.hold.delay(*gate.args("never"))
        waiting.revoke(wait=True, timeout=1)
        gate.open(*(f"held-{number}" for number in range(4)))
        with pytest.raises(TaskRevokedError):
            waiting.get(timeout=PATIENCE)
        for result in held:
            result.get(timeout=PATIENCE)
        assert gate.runs("never") == []

    @pytest.mark.parametrize("signal", ["SIGTERM", "SIGKILL"])
    def test_terminate(self, side: Side, gate: Gate, signal: str) -> None:
        result = tasks.hold.delay(*gate.args("held"))
        gate.wait("held")
        side.app.control.revoke(result.id, terminate=True, signal=signal)
        with pytest.raises(TaskRevokedError):
            result.get(timeout=PATIENCE)
        (pid,) = gate.runs("held")
        wait_for(lambda: not Path("/proc", pid).exists(), "its process to end")
        # A new process takes its place.
        wait_for(lambda: len(side.inspect().stats()[side.main]["pool"]["processes"]) == 4, "four")
        assert add.delay(1, 1).get(timeout=PATIENCE) == 2
        assert len(gate.runs("held")) == 1

    def test_the_command_terminate(self, side: Side, gate: Gate) -> None:
        result = tasks.hold.delay(*gate.args("held"))
        gate.wait("held")
        side.app.control.terminate(result.id)
        with pytest.raises(TaskRevokedError):
            result.get(timeout=PATIENCE)

    def test_by_stamped_headers(self, side: Side) -> None:
        stamp = uuid.uuid4().hex
        made = add.s(1, 1)
        made.stamp(customer=stamp)
        side.control("revoke_by_stamped_headers", headers={"customer": [stamp]})
        result = made.apply_async()
        with pytest.raises(TaskRevokedError):
            result.get(timeout=PATIENCE)
        other = add.s(1, 1)
        other.stamp(customer="another")
        assert other.apply_async().get(timeout=PATIENCE) == 2

    def test_terminate_by_stamped_headers(self, side: Side, gate: Gate) -> None:
        stamp = uuid.uuid4().hex
        made = tasks.hold.s(*gate.args("held"))
        made.stamp(customer=stamp)
        result = made.apply_async()
        gate.wait("held")
        side.app.control.revoke_by_stamped_headers({"customer": stamp}, terminate=True)
        with pytest.raises(TaskRevokedError):
            result.get(timeout=PATIENCE)

    def test_a_chain_ends_where_it_is_revoked(self, side: Side) -> None:
        result = (add.s(1, 1) | add.s(1).set(countdown=1) | add.s(1))()
        result.parent.revoke()
        with pytest.raises(TaskRevokedError):
            result.parent.get(timeout=PATIENCE)
        assert remains(lambda: result.state in ("PENDING", "REVOKED"), 0.5)


class TestAnotherWorker:
    """Commands that would spoil the others' worker."""

    @pytest.fixture
    def another(self, side: Side) -> Iterator[Part]:
        with side.worker("another", "--autoscale=3,1", "worker.pool_restarts=1", "-c", "3") as part:
            yield part

    @pytest.mark.long
    def test_autoscaling_restarting_and_ending(self, side: Side, another: Part, gate: Gate) -> None:
        name = "another@side"

        def processes() -> list[int]:
            found: list[int] = side.inspect(name).stats()[name]["pool"]["processes"]
            return found

        assert len(processes()) == 1
        sent = [
            tasks.hold.apply_async(gate.args(str(number)), queue="another") for number in range(3)
        ]
        for number in range(3):
            gate.wait(str(number))
        assert len(processes()) == 3
        assert "autoscale now" in side.control("autoscale", name, max=4, min=2)["ok"]
        gate.open("0", "1", "2")
        for result in sent:
            result.get(timeout=PATIENCE)

        before = processes()
        assert side.control("pool_restart", name) == {"ok": "reload started"}
        # Each goes when it next has something to do.
        wait_for(lambda: set(before) - set(processes()), "another process")
        assert add.apply_async((1, 1), queue="another").get(timeout=PATIENCE) == 2

        side.app.control.broadcast("shutdown", destination=[name])
        assert another.wait(20) == 0
        assert side.inspect(name, timeout=0.3).ping() is None


class TestPersistentRevokes:
    @pytest.mark.long
    def test_they_outlive_the_worker(self, side: Side, tmp_path: Path) -> None:
        state = tmp_path / "state"
        words = ("--statedb", str(state), "-c", "1", "--without-mingle")
        name, revoked = "keeps@side", uuid.uuid4().hex
        with side.worker("keeps", *words) as worker:
            side.app.control.revoke(revoked, destination=[name], reply=True, timeout=5)
            assert revoked in side.inspect(name).revoked()[name]
            worker.terminate()
            worker.wait(20)
        assert [found for found in os.listdir(tmp_path) if found.startswith("state")]
        with side.worker("keeps", *words):
            assert revoked in side.inspect(name).revoked()[name]
            add.apply_async((1, 1), task_id=revoked, queue="keeps")
            with pytest.raises(TaskRevokedError):
                AsyncResult(revoked, app=side.app).get(timeout=PATIENCE)

    def test_a_new_worker_learns_them_from_the_others(self, side: Side) -> None:
        revoked = uuid.uuid4().hex
        side.app.control.revoke(revoked, destination=[side.main], reply=True, timeout=5)
        with side.worker("learns", "-c", "1"):
            assert revoked in side.inspect("learns@side").revoked()["learns@side"]
