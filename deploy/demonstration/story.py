"""The four days, each with its accident. What a day promises is checked before the next begins."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from broker import keys
from deploy.demonstration.database import TABLES, Rows, Table
from deploy.demonstration.runs import Claim, DemoFailed, Job, Runs
from deploy.demonstration.screen import Screen
from deploy.demonstration.world import World

FLIGHTS = TABLES[0]


@dataclass
class Told:
    """What happened, for the verification and the table."""

    jobs: list[Job] = field(default_factory=list)
    full_tables: dict[tuple[str, int], Rows] = field(default_factory=dict)
    """(table, day) -> what a table that is exported in full held on that day."""
    killed: Claim | None = None
    fenced: Claim | None = None


class Story:
    """Lets the days pass."""

    def __init__(self, world: World, runs: Runs, screen: Screen) -> None:
        self._world = world
        self._runs = runs
        self._screen = screen
        self.told = Told(runs.jobs)

    def tell(self) -> Told:
        """All four days, in order. Raises `DemoFailed` when something isn't as promised."""
        for day, act in enumerate(
            (self._plain_day, self._other_nodes, self._killed_node, self._lost_lock), start=1
        ):
            began = time.monotonic()
            changed = self._world.database.begin_day(day)
            for table in TABLES:
                if not table.is_incremental:
                    self.told.full_tables[table.name, day] = self._world.database.rows(table)
            self._screen.say(f"day {day}: {sum(changed.values()):,} rows arrived or were updated")
            act(day)
            self._screen.say(f"      done in {time.monotonic() - began:.1f} s")
        return self.told

    def _submit_all(self, day: int) -> dict[str, Job]:
        return {table.name: self._runs.submit(day, table) for table in TABLES}

    def _plain_day(self, day: int) -> None:
        self._runs.finish(self._submit_all(day).values())

    def _other_nodes(self, day: int) -> None:
        """Each job goes to another node than yesterday: its node of yesterday takes none."""
        yesterday: dict[str, list[Table]] = {}
        for job in list(self._runs.jobs):
            yesterday.setdefault(self._runs.outcome(job).node, []).append(job.table)
        today: list[Job] = []
        for node, tables in sorted(yesterday.items()):
            names = ", ".join(table.name for table in tables)
            self._screen.say(
                f"      {node} stops taking jobs while yesterday's are handed in: {names}"
            )
            self._consume(node, False)
            jobs = [self._runs.submit(day, table) for table in tables]
            self._runs.wait(
                "taken by a node",
                lambda jobs=jobs: all(job.claims or job.has_ended for job in jobs),  # type: ignore[misc]
            )
            self._consume(node, True)
            today += jobs
        self._runs.finish(today)
        for node, tables in yesterday.items():
            for job in today:
                if job.table in tables and self._runs.outcome(job).node == node:
                    raise DemoFailed(f"{job.key}: on day {day} it ran on {node} again")

    def _consume(self, node: str, on: bool) -> None:
        """Tell a node, by Celery's remote control, to take jobs or to take none."""
        from tasks import app

        tell: Any = app.control.add_consumer if on else app.control.cancel_consumer
        queue = app.conf.task_default_queue
        replies = tell(queue, destination=[f"worker@{node}"], reply=True, timeout=15, limit=1)
        if not any("ok" in answer for reply in replies or () for answer in reply.values()):
            raise DemoFailed(f"{node} doesn't answer to remote control: {replies}")

    def _killed_node(self, day: int) -> None:
        """The node that runs the largest job dies in the middle of it."""
        jobs = self._submit_all(day)
        victim = jobs[FLIGHTS.name]
        self._runs.wait("half way", lambda: victim.is_half_way, victim)
        claim = self._only_claim(victim)
        self._world.dead = frozenset({claim.node})
        self._world.fleet.node(claim.node).kill()
        if self._runs.record(victim) is not None:
            raise DemoFailed(f"{victim.key}: it had committed before {claim.node} was killed")
        self.told.killed = claim
        self._screen.say(
            f"      kill -9 {claim.node}, with {victim.done:,.0f} of {victim.total:,.0f} rows of "
            f"{victim.table.name} moved"
        )
        self._runs.finish(jobs.values())
        heir = self._runs.outcome(victim)
        if heir.node == claim.node or heir.claim_id == claim.id:
            raise DemoFailed(f"{victim.key}: it ended on {heir.node}, which was killed")
        self._world.fleet.start_node(claim.node)
        self._world.dead = frozenset()
        self._screen.say(f"      {heir.node} did it anew; {claim.node} is started again")

    def _lost_lock(self, day: int) -> None:
        """A running job's lock is lost, so a second run of its key overlaps it."""
        first = self._runs.submit(day, FLIGHTS)
        self._runs.wait("half way", lambda: first.is_half_way, first)
        ours = self._only_claim(first)
        holder = self._world.redis.hget(keys.LOCKS, first.key)
        if holder != ours.id.encode():
            raise DemoFailed(f"{first.key} runs as {ours.id}, but its lock is held by {holder!r}")
        self._world.redis.hdel(keys.LOCKS, first.key)
        second = self._runs.submit(day, FLIGHTS)
        self._screen.say(f"      the lock of {first.key} is lost; a second run of it is handed in")
        self._runs.wait(
            "overlapped by the second run",
            lambda: second.state in ("STARTED", "PROGRESS"),
            first,
        )
        if self._runs.record(first) is not None:
            raise DemoFailed(f"{first.key}: it had committed before the second run began")
        theirs = self._only_claim(second)
        self._screen.say(f"      both run at once: on {ours.node} and on {theirs.node}")
        others = [self._runs.submit(day, table) for table in TABLES if table != FLIGHTS]
        self._runs.finish([first, second, *others])
        by_first_claim = [
            self._runs.outcome(job).claim_id == claim.id
            for job, claim in ((first, ours), (second, theirs))
        ]
        if sorted(by_first_claim) != [False, True]:
            raise DemoFailed(
                f"{first.key}: of two overlapping runs {sum(by_first_claim)} committed"
            )
        winner, loser = (first, second) if by_first_claim[0] else (second, first)
        self.told.fenced = theirs if loser is second else ours
        won, lost = self._runs.outcome(winner), self._runs.outcome(loser)
        if lost.base != won.n:
            raise DemoFailed(f"{first.key}: the fenced run went on with {lost.base}, not {won.n}")
        self._screen.say(
            f"      the run on {won.node} committed version {won.n}; the one on "
            f"{self.told.fenced.node} was fenced and ran again on it: {lost.result['rows']:,} rows"
        )

    def _only_claim(self, job: Job) -> Claim:
        held = self._runs.claims().get(job.task_id, [])
        if len(held) != 1:
            raise DemoFailed(f"{job.key}, day {job.day}: {len(held)} nodes run it, not one")
        return held[0]
