"""The jobs that the demo has handed in, and the facts about them.

Who runs a job is read in Redis, where its claim is; how it ended, in the commit log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from broker import keys
from broker.nodes import list_nodes
from deploy.demonstration.database import WATERMARK, Table
from deploy.demonstration.screen import Screen
from deploy.demonstration.world import SOURCE, TO, World
from errors import CohortError, Unavailable
from storage.directory import Directory
from storage.log import Record

_LOOK = 0.03
_PATIENCE = 60.0


class DemoFailed(CohortError):
    """Something didn't go as promised."""


@dataclass(frozen=True)
class Claim:
    """One node's hold on one job."""

    id: str
    node: str


@dataclass
class Job:
    """One submitted export."""

    day: int
    table: Table
    result: Any = field(repr=False)
    """Celery's AsyncResult."""
    state: str = "PENDING"
    done: float = 0
    total: float | None = None
    claims: list[Claim] = field(default_factory=list)
    """Every claim on it that was seen, the latest last."""

    @property
    def task_id(self) -> str:
        return str(self.result.id)

    @property
    def key(self) -> str:
        return key_of(self.table)

    @property
    def has_ended(self) -> bool:
        return self.state in ("SUCCESS", "FAILURE", "REVOKED")

    @property
    def is_half_way(self) -> bool:
        """Some of its rows are moved and some aren't."""
        return self.state == "PROGRESS" and self.total is not None and 0 < self.done < self.total


def key_of(table: Table) -> str:
    """The job key of a table's export."""
    return f"export-{SOURCE}-{table.name}"


class Runs:
    """Submits jobs, and follows them on the screen."""

    def __init__(self, world: World, screen: Screen) -> None:
        self._world = world
        self._screen = screen
        self.jobs: list[Job] = []
        self.nodes: dict[str, str] = {}
        """Incarnation -> node, of every incarnation that was seen."""

    def submit(self, day: int, table: Table) -> Job:
        """Hand in the export of a table."""
        from tasks.export import export

        arguments: dict[str, Any] = {"to": TO, "source": SOURCE}
        if table.is_incremental:
            arguments |= {"mode": "incremental", "column": WATERMARK, "rows_per_file": 4000}
        job = Job(day, table, export.delay(table.name, **arguments))
        self.jobs.append(job)
        return job

    def directory(self, table: Table) -> Directory:
        """The table's job directory on the shared folder."""
        return Directory(self._world.root, key_of(table))

    def record(self, job: Job) -> Record | None:
        """The job's outcome in the commit log; None while it has none."""
        return self.directory(job.table).outcome_of(job.task_id)

    def outcome(self, job: Job) -> Record:
        """The job's outcome, which is there once it has ended."""
        record = self.record(job)
        if record is None:
            raise DemoFailed(f"{job.key}, day {job.day}: it ended, but the log has no record of it")
        return record

    def wait(self, what: str, until: Callable[[], bool], *jobs: Job) -> None:
        """Follow all jobs until a fact is there; raise if one fails or `jobs` all end before."""
        ends = time.monotonic() + _PATIENCE
        while True:
            self.look()
            if until():
                return
            self._world.check()
            if jobs and all(job.has_ended for job in jobs):
                raise DemoFailed(f"{jobs[0].key}, day {jobs[0].day}: it ended before {what}")
            if time.monotonic() > ends:
                raise Unavailable(f"after {_PATIENCE:.0f} s still not {what}")
            time.sleep(_LOOK)

    def finish(self, jobs: Iterable[Job]) -> None:
        """Wait until these jobs have ended."""
        wanted = list(jobs)
        self.wait("ended", lambda: all(job.has_ended for job in wanted))

    def look(self) -> None:
        """Look at every job once."""
        held = self.claims()
        for job in self.jobs:
            if job.has_ended:
                continue
            for claim in held.get(job.task_id, ()):
                if claim not in job.claims:
                    job.claims.append(claim)
            meta = job.result.backend.get_task_meta(job.task_id)
            job.state, info = meta["status"], meta.get("result")
            if job.state == "PROGRESS":
                job.done, job.total = info["done"], info["total"]
            if job.state in ("FAILURE", "REVOKED"):
                raise DemoFailed(f"{job.key}, day {job.day}: {job.state}: {info}")
            where = job.claims[-1].node if job.claims else ""
            if not job.has_ended:
                self._screen.show(job.task_id, job.table.name, where, job.done, job.total)
                continue
            self._screen.end(job.task_id)
            record = self.outcome(job)
            self._screen.say(
                f"      {job.table.name:<18} {record.node:<8} {record.result['rows']:>7,} rows"
                f"  version {record.base} -> {record.n}"
            )

    def claims(self) -> dict[str, list[Claim]]:
        """The claims that nodes hold now, by task id."""
        held: dict[str, list[Claim]] = {}
        for info in list_nodes(self._world.redis):
            self.nodes[info.incarnation] = info.node
            member = keys.claims(f"{info.node}:{info.incarnation}")
            found = cast("dict[bytes, bytes]", self._world.redis.hgetall(member))
            for claim_id, claim in found.items():
                task_id = json.loads(claim.partition(b"\0")[0])["task"]
                held.setdefault(task_id, []).append(Claim(claim_id.decode(), info.node))
        return held
