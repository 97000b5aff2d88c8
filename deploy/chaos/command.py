"""`./cohort chaos`: run a fleet under faults, drain it, and hold it to its promises.

Exit codes: 0 all was kept, 1 something wasn't (what, and where the history and the logs lie, is
said), 2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
import sys
import time
from collections import Counter
from typing import Any

import redis
from rich.console import Console
from rich.status import Status
from rich.table import Table

from broker import keys
from deploy.chaos import harvest
from deploy.chaos.checker import Problem, check
from deploy.chaos.faults import plan
from deploy.chaos.history import Ended, Fact, Recorded, Submitted, save
from deploy.chaos.load import Producer
from deploy.chaos.world import World
from deploy.ending import AskedToEnd, end_by_signals, ignore_signals
from errors import CohortError

_PRODUCERS = 2
_RATE = 6.0
"""Jobs a second of each producer."""
_BACKLOG = 60
_PATIENCE = 120.0


class Run:
    """One run of chaos: its world, its producers and the facts that become known."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options = options
        self.seed: int = options.seed
        self.history: list[Fact] = []
        self.world = World(options.nodes, self.history.append)
        self._console = console
        self._status: Status | None = None
        self._began = time.monotonic()
        self._backlog = 0

    @property
    def elapsed(self) -> float:
        """Seconds from the start."""
        return time.monotonic() - self._began

    def run(self) -> list[Problem]:
        """All of it; what wasn't kept."""
        seconds = self.options.minutes * 60
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        try:
            self.say(f"seed {self.seed}: {self.options.nodes} nodes, {self.world.home}")
            self.world.start()
            self._shake(seconds)
            self._harvest()
        finally:
            if self._status is not None:
                self._status.stop()
        return check(self.history)

    def _shake(self, seconds: float) -> None:
        producers = [
            Producer(
                number,
                self.seed,
                self.world.fleet.redis_url,
                self.history.append,
                lambda: self._backlog < _BACKLOG,
                _RATE,
            )
            for number in range(_PRODUCERS)
        ]
        faults = plan(self.seed, seconds)
        self.world.began = began = time.monotonic()
        for producer in producers:
            producer.start()
        while (now := time.monotonic() - began) < seconds:
            self.world.tend()
            while faults and faults[0].at <= now:
                fault = faults.pop(0)
                to = self.world.inject(fault)
                if to is not None:
                    self.say(f"{now:6.1f} s  {fault.kind}: {to}")
            self._look()
            self.show(f"{now:.0f} s of {seconds:.0f}")
            for producer in producers:
                if producer.error is not None:
                    raise producer.error
            time.sleep(0.02)
        for producer in producers:
            producer.stop()
        self.show("calming down")
        self.world.calm()
        for producer in producers:
            while not producer.join(0.1):
                self.world.tend()
            if producer.error is not None:
                raise producer.error

    def _look(self) -> None:
        try:
            queued: Any = self.world.redis.llen(harvest.QUEUE)
            parked: Any = self.world.redis.zcard(keys.PARKED)
            self._backlog = queued + parked
        except redis.RedisError:
            return  # It is down: nobody gets in anyway.

    def _harvest(self) -> None:
        self.say(f"{self.elapsed:6.1f} s  all faults are undone; waiting for the last jobs")
        world = self.world

        def tend() -> None:
            world.tend()
            self.show("waiting for the last jobs")

        self.history += harvest.drain(world.redis, tend, _PATIENCE)
        self.show("reading what came of it")
        self.history += harvest.facts_of_traces(world.traces)
        self.history += harvest.facts_of_keys(world.root)
        self.history += harvest.facts_of_outcomes(world.root)
        submitted = [fact.task_id for fact in self.history if isinstance(fact, Submitted)]
        self.history += harvest.answers(submitted)

    # --- What is shown ---

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._console.file.flush()

    def show(self, line: str) -> None:
        """What is going on now; on a terminal only."""
        if self._status is not None:
            submitted = sum(isinstance(fact, Submitted) for fact in self.history)
            faults = sum(self.world.counts.values())
            self._status.update(f"{line}   {submitted} jobs submitted, {faults} faults")

    def summary(self, problems: list[Problem]) -> dict[str, Any]:
        """The run in numbers."""
        submitted = [fact for fact in self.history if isinstance(fact, Submitted)]
        states = {fact.task_id: fact.state for fact in self.history if isinstance(fact, Recorded)}
        died = {
            fact.task_id
            for fact in self.history
            if isinstance(fact, Recorded) and fact.error == "DeadLettered"
        }
        outcomes = Counter(
            "DEAD-LETTERED" if job.task_id in died else states.get(job.task_id, "NONE")
            for job in submitted
        )
        return {
            "seed": self.seed,
            "minutes": self.options.minutes,
            "nodes": self.options.nodes,
            "ok": not problems,
            "jobs": {
                "submitted": len(submitted),
                "refused": sum(not job.accepted for job in submitted),
                "keyed": sum(job.key is not None for job in submitted),
                "durable": sum(job.durable for job in submitted),
                "stock": sum(job.stock for job in submitted),
            },
            "outcomes": dict(sorted(outcomes.items())),
            "faults": {kind: count for kind, count in self.world.counts.items() if count},
            "ended_by_itself": sum(isinstance(fact, Ended) for fact in self.history),
            "problems": [{"kind": problem.kind, "what": problem.what} for problem in problems],
            "seconds": round(self.elapsed, 1),
        }


def main(arguments: list[str] | None = None) -> int:
    """Run it."""
    options = _parser().parse_args(arguments)
    out = Console(stderr=options.json)
    if not out.is_terminal:
        out = Console(stderr=options.json, width=160)
    end_by_signals()
    run: Run | None = None
    code, keep = 1, False
    summary: dict[str, Any] | None = None
    try:
        run = Run(options, out)
        problems = run.run()
        summary = run.summary(problems)
        code, keep = (1, True) if problems else (0, False)
    except AskedToEnd:
        code = 130
    except CohortError as error:
        keep = run is not None and run.world.has_logs
        print(f"chaos: {error}", file=sys.stderr, flush=True)
    except BaseException:
        keep = run is not None and run.world.has_logs
        raise
    finally:
        # From here on nothing interrupts: whatever happened above, nothing stays running.
        ignore_signals()
        if run is not None:
            run.world.end()
            if keep:
                save(run.history, run.world.home / "history.jsonl")
            else:
                run.world.remove()
            if keep:
                print(
                    f"chaos: seed {run.seed}; logs, files and history.jsonl are kept in "
                    f"{run.world.home}",
                    file=sys.stderr,
                    flush=True,
                )
    if run is not None and summary is not None:
        if options.json:
            print(json.dumps({**summary, "kept": str(run.world.home) if keep else None}))
        else:
            _print(summary, out)
    return code


def _print(summary: dict[str, Any], out: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("faults", "jobs", "outcomes"):
        table.add_column(heading, no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    columns = [list(summary[name].items()) for name in ("faults", "jobs", "outcomes")]
    for row in range(max(map(len, columns))):
        cells = [column[row] if row < len(column) else ("", "") for column in columns]
        table.add_row(*(str(cell) for pair in cells for cell in pair))
    out.print()
    out.print(table, highlight=False)
    out.print()
    for problem in summary["problems"]:
        print(f"chaos: {problem['kind']}: {problem['what']}")
    said = "all was kept" if summary["ok"] else f"{len(summary['problems'])} problems"
    print(f"chaos: seed {summary['seed']}, {summary['seconds']:.0f} s: {said}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cohort chaos",
        allow_abbrev=False,
        description="Run a fleet on this machine under faults: killed and frozen nodes, killed "
        "pool processes, a bad network, a Redis that is killed and comes back, nodes that leave "
        "and join. Then see whether each job has one outcome, and each success is counted once.",
        epilog="Exit code 1: a promise wasn't kept; history and logs are then kept.",
    )
    parser.add_argument(
        "--seed", type=_seed, metavar="N", help="which faults and jobs, and when (a new one)"
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=1.0, metavar="M", help="how long faults come (1)"
    )
    parser.add_argument("--nodes", type=_count, default=3, metavar="K", help="how many nodes (3)")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    parser.set_defaults(seed=secrets.randbelow(1_000_000))
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number from 0 on")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes <= 1440:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of minutes above 0, up to 1440")
    return minutes


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 16:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of nodes from 1 to 16")
    return int(text)
