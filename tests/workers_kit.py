"""Single workers for tests, each with a pool of its own choice, on a fleet that has none.

They have no leash: what they leave behind is there to be found.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from broker.nodes import list_nodes
from tests.fleets import Producer, running_fleet, wait_for
from tests.processes import marked


class Worker:
    """One `celery worker`."""

    def __init__(self, name: str, mark: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.pid = process.pid
        self._mark = mark
        self._process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def processes(self) -> set[int]:
        """All that came from it and lives."""
        return marked(self._mark)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 30) -> int:
        """Its exit code, once its main process has ended."""
        return self._process.wait(timeout)

    def kill(self) -> None:
        """End all of it."""
        while left := self.processes:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            self._process.wait(10)


class Workers:
    """Starts workers beside a producer, and ends them with the test."""

    def __init__(self, producer: Producer, home: Path) -> None:
        self.producer = producer
        self._home = home
        self._workers: list[Worker] = []

    def start(self, name: str, pool: str, cpus: int = 2) -> Worker:
        """A worker that has its lease."""
        words = ["worker", "--hostname", f"worker@{name}", "--pool", pool, "-c", str(cpus), "-E"]
        mark = uuid.uuid4().hex
        log = self._home / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "deploy.run_celery", *words],
                env={
                    **self.producer.fleet.environ,
                    "COHORT_NODE": name,
                    "COHORT_CPUS": str(cpus),
                    "COHORT_SCRATCH": str(self._home / "scratch" / name),
                    "TEST_MARK": mark,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        worker = Worker(name, mark, process, log)
        self._workers.append(worker)
        wait_for(lambda: self._has_lease(worker), f"{name} to be ready")
        return worker

    def _has_lease(self, worker: Worker) -> bool:
        assert worker._process.poll() is None, worker.log
        return any(
            info.pid == worker.pid and info.is_live for info in list_nodes(self.producer.client)
        )

    def stop(self) -> None:
        """End them all, at once."""
        for worker in self._workers:
            worker.kill()
            if os.environ.get("SHOW_FLEET_LOGS"):
                print(f"--- {worker.name}\n{worker.log}")


@contextmanager
def running_workers(home: Path, *, soft_shutdown: str = "") -> Iterator[Workers]:
    """A fleet without a node; its leases are so long that nothing waits for the end of one."""
    soft = {"COHORT_SOFT_SHUTDOWN": soft_shutdown} if soft_shutdown else {}
    modules = "tests.sample_jobs,tests.family_jobs"
    with running_fleet(
        home, nodes=0, cpus=2, flower=False, COHORT_JOBS=modules, COHORT_LEASE="60s", **soft
    ) as producer:
        workers = Workers(producer, home)
        try:
            yield workers
        finally:
            workers.stop()
