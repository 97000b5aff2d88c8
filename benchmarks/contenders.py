"""The task queues that `benchmarks/broker.py` compares: how each is filled, started and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from benchmarks.queues.ran import Ran
from deploy.fleet import Fleet

PACKAGE = "benchmarks.queues"


@dataclass(frozen=True)
class Contender:
    """One queue in one way of running it. `commands`: the arguments of each of its processes."""

    name: str
    module: str
    database: int
    commands: tuple[tuple[str, ...], ...]
    fills: str = "fill"


def _celery(*words: str) -> tuple[str, ...]:
    return ("-m", "celery", "-A", f"{PACKAGE}.of_celery:app", "worker", *words)


def _cohort(*words: str) -> tuple[str, ...]:
    return ("-P", "-m", "deploy.run_celery", "worker", *words)


STOCK = Contender("stock prefork -c 2", "of_celery", 1, (_celery("-c", "2"),))
PREFORK = Contender("cohort prefork -c 2", "of_cohort", 0, (_cohort("-c", "2"),))
KEYED = Contender("cohort, a key each", "of_cohort", 0, (_cohort("-c", "2"),), "fill_keyed")
BEST = (
    Contender("cohort threads -c 2", "of_cohort", 0, (_cohort("-P", "threads", "-c", "2"),)),
    Contender("cohort solo x 2", "of_cohort", 0, (_cohort("-P", "solo"),) * 2),
)
OTHERS = (
    Contender("stock solo x 2", "of_celery", 1, (_celery("-P", "solo"),) * 2),
    Contender(
        "huey -k process -w 2",
        "of_huey",
        2,
        (("-m", "huey.bin.huey_consumer", f"{PACKAGE}.of_huey.huey", "-k", "process", "-w", "2"),),
    ),
    Contender(
        "dramatiq -p 2 -t 4",
        "of_dramatiq",
        3,
        (("-m", "dramatiq", f"{PACKAGE}.of_dramatiq", "-p", "2", "-t", "4"),),
    ),
    Contender(
        "taskiq --workers 2",
        "of_taskiq",
        4,
        (("-m", "taskiq", "worker", f"{PACKAGE}.of_taskiq:broker", "--workers", "2"),),
    ),
)


class Arena:
    """One Redis, one folder, and whoever runs in it."""

    def __init__(self, home: Path, url: str, environ: Mapping[str, str]) -> None:
        self.home = home
        self.url = url.rpartition("/")[0]
        self.ran = Ran(home / "ran")
        names = ("STOCK", "HUEY", "DRAMATIQ", "TASKIQ")
        urls = {f"BENCH_{name}": f"{self.url}/{at}" for at, name in enumerate(names, 1)}
        self.environ = {**environ, **urls, "BENCH_RAN": str(home / "ran")}
        self.fleet: Fleet | None = None
        self._started = 0

    def client(self, database: int = 0) -> redis.Redis:
        """A client of one of its databases."""
        return redis.Redis.from_url(f"{self.url}/{database}")

    def empty(self, contender: Contender) -> None:
        """Nothing is queued, nothing has run."""
        with self.client(contender.database) as client:
            client.flushdb()
        self.ran.clear()

    def fill(
        self, contender: Contender, count: int, results: bool = True, *, delayed: bool = False
    ) -> None:
        """Queue so many, from a process of its own."""
        module = f"{PACKAGE}.{contender.module}"
        function = "fill_delayed" if delayed else contender.fills
        code = f"import {module} as queue; queue.{function}({count}, {results})"
        self.python(["-c", code], results)

    def python(self, words: Sequence[str], results: bool = True) -> str:
        """Run something to its end; what it printed."""
        environ = {**self.environ, "BENCH_RESULTS": "1" if results else "0"}
        done = subprocess.run(
            [sys.executable, *words], env=environ, check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return done.stdout

    @contextmanager
    def running(
        self, contender: Contender, results: bool = True, lease: str = "15s"
    ) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Its worker processes, ended with the block: nobody waits for what they still have."""
        started = [self.start(command, results, lease) for command in contender.commands]
        try:
            yield started
        finally:
            for process in started:
                self.end(process)

    def start(
        self, command: Sequence[str], results: bool = True, lease: str = "15s"
    ) -> subprocess.Popen[bytes]:
        """One worker, in a process group of its own."""
        self._started += 1
        name = f"n{self._started}"
        settings = {
            "COHORT_NODE": name,
            "COHORT_CPUS": "2",
            "COHORT_LEASE": lease,
            "COHORT_SCRATCH": str(self.home / "scratch" / name),
            "COHORT_JOBS": f"{PACKAGE}.of_cohort",
            "BENCH_RESULTS": "1" if results else "0",
        }
        words = list(command)
        if "worker" in words and "taskiq" not in words:
            words += ["--hostname", f"w{self._started}@{name}"]
        with (self.home / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *words],
                env={**self.environ, **settings},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @staticmethod
    def end(process: subprocess.Popen[bytes]) -> None:
        """`kill -9` for the worker and its children."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            process.wait(10)


@contextmanager
def stock_worker(environ: dict[str, str]) -> Iterator[None]:
    """Stock Celery's worker with the tasks of `bench_jobs`, ended at the end."""
    command = ["-m", "celery", "-A", "benchmarks.bench_jobs:stock", "worker", "-c", "2", "-E"]
    worker = subprocess.Popen(
        [sys.executable, *command],
        env={**environ, "BENCH": "stock"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        worker.terminate()
        worker.wait(30)
