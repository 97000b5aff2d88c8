"""A real fleet for tests: its processes, a producer's app on it, and facts to wait for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import redis
from celery import Celery
from celery.result import AsyncResult
from kombu import pools

from deploy.fleet import Fleet
from storage.directory import Directory
from storage.worktree import WorkTree
from tasks.application import configuration
from tasks.settings import Settings
from tests.redis_audit import audited

T = TypeVar("T")


def wait_for(fact: Callable[[], T], what: str, timeout: float = 60.0) -> T:
    """Wait until `fact` is true, and return it."""
    ends = time.monotonic() + timeout
    while True:
        value = fact()
        if value:
            return value
        assert time.monotonic() < ends, f"waited {timeout:.0f} s for {what}"
        time.sleep(0.01)


class Producer:
    """Submits jobs to a fleet, as another program would, and looks at what became of them."""

    def __init__(self, fleet: Fleet, crash: Path) -> None:
        self.fleet = fleet
        self.client = redis.Redis.from_url(fleet.redis_url)
        self._crash = crash
        from tasks import app

        environ = {"COHORT_REDIS": fleet.redis_url, "COHORT_ROOT": str(fleet.root)}
        configured = configuration(Settings.read(environ))
        # The tests' process knows one app; it is pointed at each module's own fleet in turn.
        app.conf.update(configured)
        pools.reset()
        app._pool = app.amqp._producer_pool = app._backend_cache = None
        app._local.__dict__.pop("backend", None)
        self.app: Celery = app

    def arm(self, point: str) -> None:
        """The first process of the fleet that reaches the point dies there."""
        (self._crash / point).touch()

    def is_armed(self, point: str) -> bool:
        """Whether nobody has reached it yet."""
        return (self._crash / point).exists()

    def files_of(self, key: str, into: Path) -> dict[str, bytes]:
        """The newest version of a job's directory, as a reader on this machine finds it."""
        directory = Directory.open(self.fleet.root, key)
        tree = WorkTree(into, key, f"look-{time.monotonic_ns()}")
        try:
            tree.checkout(directory, directory.head())
            return {
                str(path.relative_to(tree.path)): path.read_bytes()
                for path in sorted(tree.path.rglob("*"))
                if path.is_file()
            }
        finally:
            tree.remove()

    def states_of(self, key: str) -> list[tuple[str, str]]:
        """(task id, state) of every version of a key."""
        return [
            (record.task_id, record.state)
            for record in Directory.open(self.fleet.root, key).versions()
        ]

    def end_of(self, result: AsyncResult, timeout: float = 60.0) -> Any:
        """What a task came to: its value or its exception."""
        return result.get(timeout=timeout, propagate=False)

    def is_quiet(self) -> bool:
        """Whether nothing is queued, claimed, parked, owed or locked any more."""
        names = ("locks", "parked", "ready", "deliveries", "claims:*")
        found = [key for name in names for key in self.client.keys(f"{{cohort}}{name}")]
        return not found and self.client.llen("celery") == 0


@contextmanager
def running_fleet(
    home: Path,
    nodes: int,
    *,
    cpus: int = 2,
    flower: bool = False,
    redis_url: str | None = None,
    **settings: str,
) -> Iterator[Producer]:
    """A fleet with short leases that knows the sample jobs, and has a Redis unless it is given."""
    crash = home / "crash"
    crash.mkdir(parents=True)
    environ = {
        "COHORT_JOBS": "tests.sample_jobs",
        "COHORT_LEASE": "2s",
        "COHORT_STOP_GRACE": "1s",
        "COHORT_CRASH": str(crash),
        **settings,
    }
    with Fleet(
        home / "fleet",
        nodes=nodes,
        redis=redis_url,
        cpus=(cpus,),
        environ=environ,
        grace=5.0,
        flower=flower,
    ) as fleet:
        producer = Producer(fleet, crash)
        try:
            with audited(fleet.redis_url):
                yield producer
        finally:
            if os.environ.get("SHOW_FLEET_LOGS"):
                for part in fleet.parts:
                    print(part.log_tail(200))


__all__ = ["Producer", "running_fleet", "wait_for"]
