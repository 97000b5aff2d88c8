"""What is wrong with a history: a function of the recorded facts, and of nothing else.

It holds the fleet to its promises: each accepted job has one outcome; a keyed job's outcome is one
record of its key's log; each success is counted once, on the files of the success before it, and
nothing else is; nothing is left in Redis; no node ends by itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from deploy.chaos.history import (
    FINAL,
    Answered,
    Committed,
    Ended,
    Fact,
    Files,
    Left,
    Ran,
    Recorded,
    Revoked,
    Submitted,
)

EXPECTED_FAILURES: frozenset[str] = frozenset({"Planned", "DeadLettered"})
"""Of jobs that were told to fail, and of those whose nodes or processes died each time."""

Kind = Literal[
    "lost update",
    "doubled success",
    "stale file",
    "missing job",
    "two outcomes",
    "wrong outcome",
    "unknown job",
    "left behind",
    "dead node",
]


@dataclass(frozen=True)
class Problem:
    """One promise that wasn't kept, and for what."""

    kind: Kind
    what: str


@dataclass
class _Facts:
    submitted: dict[str, Submitted] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)
    ran: Counter[str] = field(default_factory=Counter)
    commits: dict[str, list[Committed]] = field(default_factory=lambda: defaultdict(list))
    recorded: dict[str, list[Recorded]] = field(default_factory=lambda: defaultdict(list))
    answered: dict[str, str] = field(default_factory=dict)
    files: dict[str, Files] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)


def check(history: Iterable[Fact]) -> list[Problem]:
    """Everything that is wrong with it; nothing, if all was kept."""
    facts = _sorted(history)
    problems = [Problem("left behind", left.what) for left in facts.left]
    problems += [
        Problem("dead node", f"{one.node} ended by itself, with exit code {one.exit_code}")
        for one in facts.ended
    ]
    problems += _check_jobs(facts)
    for key in sorted({*facts.commits, *facts.files}):
        problems += _check_key(key, facts.commits.get(key, []), facts.files.get(key))
    return problems


def _sorted(history: Iterable[Fact]) -> _Facts:
    facts = _Facts()
    for fact in history:
        match fact:
            case Submitted():
                facts.submitted[fact.task_id] = fact
            case Revoked():
                facts.revoked.add(fact.task_id)
            case Ran():
                facts.ran[fact.task_id] += 1
            case Committed():
                facts.commits[fact.key].append(fact)
            case Recorded():
                facts.recorded[fact.task_id].append(fact)
            case Answered():
                facts.answered[fact.task_id] = fact.state
            case Files():
                facts.files[fact.key] = fact
            case Left():
                facts.left.append(fact)
            case Ended():
                facts.ended.append(fact)
    return facts


# --- Jobs: one outcome each ---


def _check_jobs(facts: _Facts) -> Iterator[Problem]:
    records: dict[str, list[Committed]] = defaultdict(list)
    for commits in facts.commits.values():
        for record in commits:
            records[record.task_id].append(record)
    for task_id, job in facts.submitted.items():
        yield from _check_job(job, facts, records[task_id])
    known = facts.submitted.keys()
    for task_id in sorted({*facts.recorded, *records, *facts.ran} - known):
        if facts.recorded.get(task_id) or records.get(task_id) or facts.ran[task_id]:
            yield Problem("unknown job", f"{task_id} was never submitted")


def _check_job(job: Submitted, facts: _Facts, records: Sequence[Committed]) -> Iterator[Problem]:
    task_id = job.task_id
    # Written twice by two nodes, of which one died, it is still the same one.
    outcomes = {(one.state, one.detail): one for one in facts.recorded.get(task_id, ())}
    answer = facts.answered.get(task_id, "PENDING")
    name = f"{task_id} ({job.key or 'keyless'})"
    if not outcomes:
        if job.accepted:
            yield Problem("missing job", f"{name} was accepted and has no outcome; {answer}")
        elif records:
            yield Problem("missing job", f"{name} has a record and no outcome")
        return
    if len(outcomes) > 1:
        told = ", ".join(sorted(f"{state} {detail}" for state, detail in outcomes))
        yield Problem("two outcomes", f"{name}: {told}")
    # Who is revoked before it ever had its lock has no place in the log.
    unlocked = not records and all(state == "REVOKED" for state, _ in outcomes)
    if job.key is not None and len(records) != 1 and not unlocked:
        numbers = [record.n for record in records]
        kind: Kind = "two outcomes" if records else "wrong outcome"
        yield Problem(kind, f"{name} has {len(records)} records in its key's log: {numbers}")
    for outcome in outcomes.values():
        yield from _check_outcome(name, job, outcome, facts, records)
    if answer not in {outcome.state for outcome in outcomes.values()}:
        yield Problem("wrong outcome", f"{name}: who asks is told {answer}")


def _check_outcome(
    name: str, job: Submitted, outcome: Recorded, facts: _Facts, records: Sequence[Committed]
) -> Iterator[Problem]:
    task_id, state = job.task_id, outcome.state
    if state not in FINAL:
        yield Problem("wrong outcome", f"{name}: {state} is no outcome")
    if state == "REVOKED" and task_id not in facts.revoked:
        yield Problem("wrong outcome", f"{name} is REVOKED; nobody asked for that")
    if state == "FAILURE" and outcome.error not in EXPECTED_FAILURES:
        yield Problem("wrong outcome", f"{name} failed by {outcome.error or 'nothing'}")
    if state == "SUCCESS" and job.key is None and not facts.ran[task_id]:
        yield Problem("wrong outcome", f"{name} is a success and never ran")
    for record in records:
        if record.state != state:
            yield Problem(
                "two outcomes", f"{name}: {state}, but record {record.n} says {record.state}"
            )


# --- Keys: each success counted once, on the files of the one before ---


def _check_key(key: str, commits: Sequence[Committed], files: Files | None) -> Iterator[Problem]:
    commits = sorted(commits, key=lambda record: record.n)
    for expected, record in enumerate(commits, start=1):
        if record.n != expected:
            yield Problem("two outcomes", f"{key}: record {record.n} where {expected} belongs")
            break
    successes = [record for record in commits if record.state == "SUCCESS"]
    for expected, record in enumerate(successes, start=1):
        if record.count != expected:
            yield Problem(
                "stale file",
                f"{key}: record {record.n}, {record.task_id}, made the counter {record.count}; "
                f"the success before it had left {expected - 1}",
            )
            break
    count, log = (files.count, files.log) if files is not None else (0, ())
    if count < len(successes):
        yield Problem("lost update", f"{key}: {len(successes)} successes, its counter is {count}")
    if count > len(successes):
        yield Problem(
            "doubled success", f"{key}: {len(successes)} successes, its counter is {count}"
        )
    yield from _check_log(key, Counter(log), Counter(record.task_id for record in successes))


def _check_log(
    key: str, logged: Mapping[str, int], succeeded: Mapping[str, int]
) -> Iterator[Problem]:
    for task_id in sorted({*logged, *succeeded}):
        times, wanted = logged.get(task_id, 0), succeeded.get(task_id, 0)
        if times > max(wanted, 1) or (times and not wanted):
            why = "it succeeded" if wanted else "it has no success"
            yield Problem("doubled success", f"{key}: {task_id} is counted {times} times; {why}")
        elif times < wanted:
            yield Problem("lost update", f"{key}: {task_id} succeeded and isn't counted")
