"""Chapter *Workers*: the options with which one is started, its pools and its limits."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from kombu.serialization import disable_insecure_serializers, enable_insecure_serializers

from tests.celery import tasks_of_tests as tasks
from tests.celery.sides import Gate, Part, Side, remains, wait_for
from tests.celery.tasks_of_tests import add

PATIENCE = 10


def ports_of(pid: int) -> set[int]:
    """The local TCP ports of a process's connections."""
    inodes = set()
    for descriptor in Path("/proc", str(pid), "fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return {int(found[1].rpartition(":")[2], 16) for found in fields if found[9] in inodes}


class TestLimits:
    def test_soft_time_limit_of_the_task(self, side: Side) -> None:
        with pytest.raises(SoftTimeLimitExceeded):
            tasks.limited.delay().get(timeout=PATIENCE)

    def test_hard_time_limit(self, side: Side, gate: Gate) -> None:
        result = tasks.hold.apply_async(gate.args("held"), time_limit=1)
        with pytest.raises(TimeLimitExceeded):
            result.get(timeout=PATIENCE)
        (pid,) = gate.runs("held")
        wait_for(lambda: not Path("/proc", pid).exists(), "its process to end")
        assert remains(lambda: len(gate.runs("held")) == 1, 0.3)

    def test_soft_then_hard(self, side: Side, tmp_path: Path) -> None:
        result = tasks.until_soft_limit.apply_async(
            (str(tmp_path / "cleaned"),), soft_time_limit=1, time_limit=20
        )
        assert result.get(timeout=PATIENCE) == "cleaned up"

    def test_a_lost_process_with_late_acknowledgement(self, side: Side, tmp_path: Path) -> None:
        # With `task_reject_on_worker_lost`, as here: it runs again.
        result = tasks.die.delay(str(tmp_path / "once"))
        assert result.get(timeout=20) == "survived"

    @pytest.mark.long
    def test_a_lost_process_with_early_acknowledgement(self, side: Side) -> None:
        result = tasks.die_acknowledged.delay()
        with pytest.raises(WorkerLostError):
            result.get(timeout=15)

    def test_usr1_dumps_all_threads(self, side: Side) -> None:
        main = side.workers.parts["main"]
        os.kill(main.pid, signal.SIGUSR1)
        wait_for(lambda: "=================================" in main.log.read_text(), "a dump")
        assert "MainThread" in main.log.read_text()
        assert add.delay(1, 1).get(timeout=PATIENCE) == 2


class TestOptions:
    @pytest.mark.long
    def test_names_files_queues_and_limits(self, side: Side, tmp_path: Path) -> None:
        """One worker with many options: starting one takes its time."""
        name = f"many@{socket.gethostname()}"
        words = (
            *("-n", "many@%h", "-c", "1", "-Q", "many,others", "--max-tasks-per-child", "2"),
            *("-f", str(tmp_path / "%n%I.log"), "--pidfile", str(tmp_path / "%n.pid")),
            *("--time-limit", "8", "--soft-time-limit", "1", "--prefetch-multiplier", "3"),
            *("-O", "fair", "--without-gossip", "task.default_queue=many"),
        )
        part = side.workers.launch("many", *words)
        try:
            side.wait_listening(name)
            stats = side.inspect(name).stats()[name]
            assert stats["prefetch_count"] == 3
            assert int((tmp_path / "many.pid").read_text()) == part.pid
            queues = [queue["name"] for queue in side.inspect(name).active_queues()[name]]
            assert sorted(queues) == ["many", "others"]

            def pid(queue: str) -> int:
                found: int = tasks.pid.apply_async(queue=queue).get(timeout=PATIENCE)
                return found

            pids = [pid(queue) for queue in ("many", "others", "many", "others")]
            assert pids[0] == pids[1] != pids[2] == pids[3]
            result = tasks.until_soft_limit.apply_async(queue="many")
            assert result.get(timeout=PATIENCE) == "cleaned up"
            part.terminate()
            assert part.wait(20) == 0
            assert not (tmp_path / "many.pid").exists()
            logs = {path.name for path in tmp_path.iterdir()}
            assert {"many.log", "many-1.log"} <= logs
            assert "ready." in (tmp_path / "many.log").read_text()
        finally:
            part.kill()

    @pytest.mark.long
    def test_excluded_queues_and_memory_per_child(self, side: Side) -> None:
        words = ("-X", "celery", "-c", "1", "--max-memory-per-child", "150000")
        with side.worker("frugal", *words):
            name = "frugal@side"
            assert [q["name"] for q in side.inspect(name).active_queues()[name]] == ["frugal"]
            first = tasks.grow.apply_async((1,), queue="frugal").get(timeout=PATIENCE)
            assert tasks.grow.apply_async((150,), queue="frugal").get(timeout=PATIENCE) == first
            # It is looked at after a task: this one finds a new process.
            assert tasks.pid.apply_async(queue="frugal").get(timeout=PATIENCE) != first

    @pytest.mark.long
    @pytest.mark.parametrize("accepted", ["yaml", "pickle"])
    def test_a_worker_that_accepts_more(self, side: Side, accepted: str) -> None:
        value = {"text": "ä", "number": 1.5, "list": [1, None, True]}
        environ = {"ACCEPTED": f"json,{accepted}", "C_FORCE_ROOT": "1"}
        with side.worker("accepts", "-c", "1", environ=environ):
            enable_insecure_serializers([accepted])
            try:
                result = tasks.same.apply_async((value,), serializer=accepted, queue="accepts")
            finally:
                disable_insecure_serializers(["json"])
            assert result.get(timeout=PATIENCE) == value


class TestDaemons:
    @pytest.mark.long
    def test_multi_starts_restarts_and_stops(self, side: Side, tmp_path: Path) -> None:
        pidfile = tmp_path / "one.pid"
        files = (f"--pidfile={tmp_path}/%n.pid", f"--logfile={tmp_path}/%n%I.log")
        words = ("-c", "1", "-Q", "multi", "-l", "INFO")
        app = side.workers.command()[-1]
        environ = {**side.workers.environ, "COHORT_NODE": "multi"}

        def multi(command: str, *more: str) -> None:
            line = [sys.executable, "-m", "celery", "multi", command, "one@side", *more]
            subprocess.run(line, env=environ, check=True, timeout=60, stdout=subprocess.DEVNULL)

        def answers() -> int:
            side.wait_listening("one@side")
            assert add.apply_async((1, 1), queue="multi").get(timeout=20) == 2
            return int(pidfile.read_text())

        multi("start", "-A", app, *words, *files)
        try:
            first = answers()
            multi("restart", "-A", app, *words, *files)
            wait_for(lambda: (tmp_path / "one.log").read_text().count("ready.") == 2, "a restart")
            assert answers() != first
        finally:
            multi("stopwait", *files)
        wait_for(lambda: not pidfile.exists(), "its end")


class TestPools:
    @pytest.fixture(params=["threads", "solo"])
    def pool(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_other_pools(self, side: Side, pool: str, gate: Gate) -> None:
        """Tasks, retries, failures, chords; what runs at once; what can be asked meanwhile."""
        count = {"threads": 2, "solo": 1}[pool]
        name = f"{pool}@side"
        with side.worker(pool, "-P", pool, "-c", "2") as part:

            def call(task: object, *args: object) -> object:
                return task.apply_async(args, queue=pool).get(timeout=PATIENCE)  # type: ignore[attr-defined]

            assert call(add, 2, 2) == 4
            assert call(tasks.pid) == part.pid
            assert call(tasks.retry_until, 1) == 1
            with pytest.raises(ValueError, match="as told"):
                call(tasks.fail)
            sent = [
                tasks.hold.apply_async(gate.args(str(number)), queue=pool) for number in range(3)
            ]
            for number in range(count):
                gate.wait(str(number))
            assert remains(lambda: not gate.runs(str(count)), 0.3)
            if pool == "threads":
                assert len(side.inspect(name).active()[name]) == count
            gate.open("0", "1", "2")
            assert [result.get(timeout=PATIENCE) for result in sent] == ["held"] * 3
            part.terminate()
            assert part.wait(20) == 0

    def test_prefork_is_the_default(self, side: Side) -> None:
        stats = side.inspect().stats()[side.main]
        assert stats["pool"]["implementation"] == "celery.concurrency.prefork:TaskPool"


class TestShutdown:
    def test_term_is_warm(self, side: Side, gate: Gate) -> None:
        with side.worker("warm", "-c", "1") as worker:
            running = tasks.hold.apply_async(gate.args("running"), queue="warm")
            waiting = tasks.hold.apply_async(gate.args("waiting"), queue="warm")
            gate.wait("running")
            os.kill(worker.pid, signal.SIGTERM)
            wait_for(lambda: "Warm shutdown" in worker.log.read_text(), "its beginning")
            os.kill(worker.pid, signal.SIGTERM)  # Once more makes no difference.
            assert remains(lambda: worker.is_running, 0.5)
            gate.open("running")
            assert running.get(timeout=PATIENCE) == "held"
            assert worker.wait(20) == 0
        assert gate.runs("waiting") == []
        assert not waiting.ready()
        # What it had fetched is there for others.
        self.taken_over(side, "warm", gate, "waiting", waiting, 1)

    @pytest.mark.parametrize(
        "way", ["QUIT", *(pytest.param(w, marks=pytest.mark.long) for w in ("INT twice", "REMAP"))]
    )
    def test_quit_is_cold(self, side: Side, gate: Gate, way: str) -> None:
        environ = {"REMAP_SIGTERM": "SIGQUIT"} if way == "REMAP" else {}
        with side.worker("cold", "-c", "1", environ=environ) as worker:
            running = tasks.hold.apply_async(gate.args("running"), queue="cold")
            gate.wait("running")
            if way == "INT twice":
                os.kill(worker.pid, signal.SIGINT)
                wait_for(lambda: "Warm shutdown" in worker.log.read_text(), "its beginning")
                os.kill(worker.pid, signal.SIGINT)
            else:
                number = signal.SIGTERM if environ else signal.SIGQUIT
                os.kill(worker.pid, number)
            begun = time.monotonic()
            worker.wait(20)
            assert time.monotonic() - begun < 10
            (pid,) = gate.runs("running")
            assert not Path("/proc", pid).exists()
        # Acknowledged late, it runs again elsewhere.
        self.taken_over(side, "cold", gate, "running", running, 2)

    @pytest.mark.long
    def test_soft_shutdown_gives_some_time(self, side: Side, gate: Gate) -> None:
        with side.worker("soft", "-c", "2", "worker.soft_shutdown_timeout=2") as worker:
            short = tasks.hold.apply_async(gate.args("short"), queue="soft")
            long = tasks.hold.apply_async(gate.args("long"), queue="soft")
            gate.wait("short")
            gate.wait("long")
            os.kill(worker.pid, signal.SIGQUIT)
            wait_for(lambda: "Initiating Soft Shutdown" in worker.log.read_text(), "its beginning")
            gate.open("short")
            worker.wait(20)
        assert len(gate.runs("short")) == 1
        assert short.get(timeout=PATIENCE) == "held"
        self.taken_over(side, "soft", gate, "long", long, 2)

    @staticmethod
    def taken_over(
        side: Side, queue: str, gate: Gate, name: str, result: object, runs: int
    ) -> None:
        side.control("add_consumer", queue=queue)
        try:
            gate.wait(name, runs=runs)
            gate.open(name)
            assert result.get(timeout=PATIENCE) == "held"  # type: ignore[attr-defined]
        finally:
            side.control("cancel_consumer", queue=queue)


class TestConnectionLoss:
    def cut(self, side: Side, worker: Part) -> None:
        for client in side.client.client_list():
            if int(client["addr"].rpartition(":")[2]) in ports_of(worker.pid):
                side.client.client_kill_filter(_id=client["id"])
        wait_for(lambda: "Connection to broker lost" in worker.log.read_text(), "the loss")

    @pytest.mark.long
    def test_it_connects_anew(self, side: Side, gate: Gate) -> None:
        with side.worker("cut", "-c", "2") as worker:
            result = tasks.hold.apply_async(gate.args("held"), queue="cut")
            gate.wait("held")
            self.cut(side, worker)
            if side.is_ours:  # What runs goes on, and isn't run a second time beside itself.
                assert remains(lambda: len(gate.runs("held")) == 1, 3)
            else:
                gate.wait("held", runs=2)
            gate.open("held")
            assert result.get(timeout=20) == "held"
            assert add.apply_async((1, 1), queue="cut").get(timeout=20) == 2
            assert len(gate.runs("held")) == (1 if side.is_ours else 2)

    @pytest.mark.long
    def test_long_tasks_may_be_cancelled(self, side: Side, gate: Gate) -> None:
        option = "worker.cancel_long_running_tasks_on_connection_loss=1"
        with side.worker("cut", "-c", "2", option) as worker:
            result = tasks.hold.apply_async(gate.args("held"), queue="cut")
            gate.wait("held")
            self.cut(side, worker)
            gate.wait("held", runs=2, timeout=10)
            gate.open("held")
            assert result.get(timeout=20) == "held"
