"""Two real fleets side by side, stock Celery's and ours, and who calls their tasks.

A test gets a `Side` and doesn't know which one. There are three: stock Celery on stock workers,
ours on ours, and a stock producer that feeds our workers.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import redis
from celery import Celery
from kombu import pools

from deploy.fleet import PROJECT, Fleet
from deploy.parts import Part
from tests import fleets
from tests.fleets import Producer

READY = 60.0
T = TypeVar("T")
TASKS = "tests.celery.tasks_of_tests"


def wait_for(fact: Callable[[], T | None], what: str, timeout: float = 15.0) -> T:
    """Wait until a fact is true, and return it."""
    found = fleets.wait_for(fact, what, timeout)
    assert found is not None
    return found


def _is_ready(part: Part) -> bool:
    return " ready." in part.log.read_text()


class Workers:
    """One Redis and the workers on it, stock Celery's or ours."""

    def __init__(self, home: Path, *, ours: bool) -> None:
        self.home = home
        self.is_ours = ours
        self.fleet = Fleet(home / "fleet", nodes=0)
        self.parts: dict[str, Part] = {}
        self._app = "tasks" if ours else "tests.celery.stock_app"

    @property
    def environ(self) -> dict[str, str]:
        """What a process on this side finds in its environment."""
        kept = {
            name: value
            for name, value in self.fleet.environ.items()
            if not name.startswith("COHORT_")
        }
        if not self.is_ours:
            return {**kept, "STOCK_REDIS": self.fleet.redis_url}
        return {
            **kept,
            "COHORT_REDIS": self.fleet.redis_url,
            "COHORT_ROOT": str(self.fleet.root),
            "COHORT_STATE": str(self.home / "state"),
            "COHORT_SCRATCH": str(self.home / "scratch" / "producer"),
            "COHORT_JOBS": f"{TASKS},tests.sample_jobs",
            "COHORT_LEASE": "3s",
            "COHORT_STOP_GRACE": "1s",
            "COHORT_UNKNOWN_GRACE": "1s",
        }

    def launch(self, name: str, *words: str, environ: Mapping[str, str] | None = None) -> Part:
        """Start `celery -A app worker`. Its name in the cluster is <name>@side."""
        environ = {
            **self.environ,
            "COHORT_NODE": name,
            "COHORT_SCRATCH": str(self.home / "scratch" / name),
            **(environ or {}),
        }
        if not any(word in ("-n", "--hostname") for word in words):
            words = ("-n", f"{name}@side", *words)
        if not any(word in ("-l", "--loglevel") for word in words):
            words = ("-l", "INFO", *words)
        # What the stock app has in its settings: the comparison is of behaviour.
        words = ("task.acks_late=1", "task.reject_on_worker_lost=1", *words)
        command = self.command("worker", *words)
        part = Part(name, command, environ, self.home / f"{name}.log", grace=5.0)
        self.parts[name] = part
        return part

    def wait_ready(self, *parts: Part) -> None:
        """Wait until they take tasks."""
        for part in parts:
            part.wait_until(functools.partial(_is_ready, part), READY, "ready")

    def command(self, *words: str) -> list[str]:
        """`celery -A app ...`"""
        return [sys.executable, "-P", "-m", "celery", "-A", self._app, *words]

    def close(self) -> None:
        """End all of it."""
        for part in self.parts.values():
            part.kill()
        self.fleet.kill()


class Side:
    """Who calls tasks, and the workers that run them."""

    def __init__(self, name: str, app: Celery, workers: Workers) -> None:
        self.name = name
        self.app = app
        self.workers = workers
        self.main = "main@side"

    def calls(self, task: Any, *args: Any, **options: Any) -> Any:
        """Call a task by its name alone, as a program does that doesn't have its code."""
        return self.app.send_task(task.name, args, **options)

    @property
    def is_ours(self) -> bool:
        """Whether the workers are ours."""
        return self.workers.is_ours

    @property
    def client(self) -> Any:
        """Its Redis."""
        return redis.Redis.from_url(self.workers.fleet.redis_url, decode_responses=True)

    @contextmanager
    def worker(
        self, name: str, *words: str, environ: Mapping[str, str] | None = None
    ) -> Iterator[Part]:
        """One more worker, which takes from a queue of its own name and from no other."""
        if "-Q" not in words:
            words = ("-Q", name, *words)
        part = self.workers.launch(name, *words, environ=environ)
        try:
            self.workers.wait_ready(part)
            if "-n" not in words:
                self.wait_listening(f"{name}@side")
            yield part
        except BaseException:
            print(part.log_tail(60))
            raise
        finally:
            part.kill()

    def wait_listening(self, worker: str) -> None:
        """Wait until remote control reaches it: a little later than it takes tasks."""
        wait_for(lambda: self.inspect(worker, timeout=0.3).ping(), f"{worker} to listen")

    def celery(self, *words: str, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
        """`celery -A app ...` in a process of its own."""
        return self.celery_together(words, timeout=timeout)[0]

    def celery_together(
        self, *commands: Sequence[str], timeout: float = 30.0
    ) -> list[subprocess.CompletedProcess[str]]:
        """Several at once."""
        processes = [
            subprocess.Popen(
                self.workers.command(*words),
                env=self.workers.environ,
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for words in commands
        ]
        done = []
        try:
            for process, words in zip(processes, commands, strict=True):
                out, err = process.communicate(timeout=timeout)
                done.append(subprocess.CompletedProcess(words, process.returncode, out, err))
        finally:
            for process in processes:
                process.kill()
        return done

    def inspect(self, worker: str | None = None, timeout: float = 5.0) -> Any:
        """What one worker says of itself; it answers at once, or the test waits for it."""
        return self.app.control.inspect(destination=[worker or self.main], timeout=timeout)

    def control(self, command: str, worker: str | None = None, **arguments: Any) -> Any:
        """One worker's answer to a command."""
        name = worker or self.main
        (reply,) = self.app.control.broadcast(
            command, arguments=arguments, destination=[name], reply=True, timeout=5.0
        )
        return reply[name]

    @contextmanager
    def consuming(self, queue: str, **binding: str) -> Iterator[None]:
        """The main worker takes from one more queue. It answers before it has bound it."""
        self.control("add_consumer", queue=queue, **binding)

        def consumes() -> bool:
            queues = self.inspect().active_queues()[self.main]
            return queue in [found["name"] for found in queues]

        wait_for(consumes, f"{queue} to be bound")
        try:
            yield
        finally:
            self.control("cancel_consumer", queue=queue)


class Sides:
    """All of them. Each is started when it is first wanted, and ends with the session."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._workers: dict[bool, Workers] = {}
        self._apps: dict[str, Celery] = {}
        self._producer: Producer | None = None

    def side(self, name: str) -> Side:
        """'stock', 'ours', or 'stock producer'."""
        import tasks  # noqa: F401  # before the stock app, which looks whether it is there
        from tests.celery import stock_app

        workers = self._started(ours=name != "stock")
        url = workers.fleet.redis_url
        if name == "ours":
            app = self._point(workers)
        elif name in self._apps:
            app = self._apps[name]
        elif name == "stock":
            app = stock_app.app
            app.conf.update(broker_url=url, result_backend=url)
        else:
            app = stock_app.stock_app(name, url)
        if app.pool._closed or app.amqp.producer_pool._closed:
            # Kombu's pools are the process's: another app with an equal connection closed them.
            pools.reset()
            app._pool = app.amqp._producer_pool = None
        app.set_current()
        side = Side(name, app, workers)
        if name not in self._apps:
            self._apps[name] = app
            side.wait_listening(side.main)
        return side

    def _started(self, *, ours: bool) -> Workers:
        if ours not in self._workers:
            workers = Workers(self._home / ("ours" if ours else "stock"), ours=ours)
            self._workers[ours] = workers
            workers.fleet.start()
            workers.wait_ready(workers.launch("main", "-c", "4", "-E"))
        return self._workers[ours]

    def _point(self, workers: Workers) -> Celery:
        from tasks import app

        if app.conf.broker_url != workers.fleet.redis_url:
            __import__(TASKS)
            self._producer = Producer(workers.fleet, self._home)
            app.conf.task_send_sent_event = True
            for other in self._apps.values():
                # Its pools were closed with all others.
                other._pool = other.amqp._producer_pool = None
        return app

    def close(self) -> None:
        """End all of it."""
        from tasks import app

        app.set_current()
        for workers in self._workers.values():
            if os.environ.get("SHOW_FLEET_LOGS"):
                for part in workers.parts.values():
                    print(part.log_tail(200))
            workers.close()


def lines_of(path: Path) -> list[str]:
    """What tasks have left in a file."""
    return path.read_text().splitlines() if path.exists() else []


class Gate:
    """Tasks that have begun and wait to be let go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def args(self, name: str) -> tuple[str, str]:
        """Arguments of `hold`."""
        return name, str(self.folder)

    def runs(self, name: str) -> list[str]:
        """The processes that have begun it, one for each time."""
        return lines_of(self.folder / f"{name}.runs")

    def wait(self, name: str, runs: int = 1, timeout: float = 20.0) -> None:
        """Wait until it has begun."""
        wait_for(lambda: len(self.runs(name)) >= runs, f"{name} to begin", timeout)

    def open(self, *names: str) -> None:
        """Let it go on."""
        for name in names:
            (self.folder / f"{name}.go").touch()


def remains(fact: Any, seconds: float = 0.5) -> bool:
    """Whether something stays so for a while. For what mustn't happen; proves no more than that."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if not fact():
            return False
        time.sleep(0.02)
    return True


__all__ = ["Gate", "Part", "Side", "Sides", "Workers", "lines_of", "remains", "wait_for"]
