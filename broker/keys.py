"""The names of Cohort's keys in Redis. All but the queues themselves share one hash tag.

A queue stays a plain list under its own name, so that a stock Celery producer can feed it.
`TABLE`, at the end, says of every key in a fleet's Redis whose it is and when it goes. The tests
look it up for each key that they leave behind: what isn't in it is a leak or an oversight.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

TAG = "{cohort}"

LOCKS = f"{TAG}locks"
"""Hash: job key -> the claim id that holds it, or `owed:<task id>`."""
PARKED = f"{TAG}parked"
"""Sorted set, all scores 0: `<job key> NUL <priority><sequence> NUL <claim>`."""
READY = f"{TAG}ready"
"""List of claims to be served before the queues: handed-on locks, and what came back."""
SEQUENCE = f"{TAG}sequence"
"""Counter: the order of arrival of parked jobs."""
DELIVERIES = f"{TAG}deliveries"
"""Hash: task id -> how many of its deliveries were lost with their node or process."""
WAITING = f"{TAG}waiting"
"""Sorted set, all scores 0: `<shape> NUL <rank> NUL <claim>`, for a node that it fits."""
SHAPES = f"{TAG}shapes"
"""Hash: shape -> how many of it wait."""
RESERVED = f"{TAG}reserved"
"""Hash: `<node>:<incarnation>` -> `<shape> NUL <rank>` of the job that it keeps room for."""
SPARE = f"{TAG}spare"
"""Hash: `<node>:<incarnation>` -> CPUs, bytes of memory and GPUs that no claim of it needs."""
CLAIMED = f"{TAG}claimed"
"""Hash: task id -> the claim id under which a node has it, or `back`: one had it, and it waits."""
SETTLED = f"{TAG}settled"
"""Hash: task id -> when (ms) and why it got an outcome without having run: revoked, expired."""
EXPIRING = f"{TAG}expiring"
"""Sorted set: task id -> when it is over though it hasn't run, in ms of Redis time."""
DEAD = f"{TAG}dead"
"""Hash: task id -> why and when it was dead-lettered (JSON), NUL, its message. What isn't a task's
message stands there under `element-<hash>`."""
BELL = f"{TAG}bell"
"""List of rings: idle nodes block on it."""
LEASES = f"{TAG}leases"
"""Sorted set: `<node>:<incarnation>` -> when its lease ends, in ms of Redis time."""
NODES = f"{TAG}nodes"
"""Hash: `<node>:<incarnation>` -> JSON with its capacity, host, pid and mount nonce."""
BIRTH = f"{TAG}birth"
"""String: a name that this Redis keeps until it is emptied."""
FLEET = f"{TAG}fleet"
"""String: the id of the shared folder that this Redis belongs to."""
SEGMENTS = f"{TAG}segments"
"""Hash: the numbers of segments by name, their names by number, and who filled the index last."""
GENERATION = f"{TAG}generation"
"""String: there as long as this Redis knows what the shared folder holds."""
REFILLED = f"{TAG}refilled"
"""Channel: the index was rebuilt."""


def outcomes(bucket: int) -> str:
    """Hash, one of 65,536: a part of the hash of the task id -> where its outcome lies."""
    return f"{TAG}outcomes:{bucket:04x}"


def submitted(bucket: int) -> str:
    """Hash, one of 65,536, with a time to live: marks of what was put into a queue."""
    return f"{TAG}submitted:{bucket:04x}"


def claims(member: str) -> str:
    """Hash of one incarnation: claim id -> claim."""
    return f"{TAG}claims:{member}"


def own_bell(member: str) -> str:
    """List of rings for one incarnation: it has room again."""
    return f"{TAG}bell:{member}"


def delayed(queue: str) -> str:
    """Sorted set: list name NUL message -> when it is due, in ms of Redis time."""
    return f"{TAG}delayed:{queue}"


def leader(duty: str) -> str:
    """String with a time to live: who does this duty now."""
    return f"{TAG}leader:{duty}"


Type = Literal["string", "hash", "list", "set", "zset", "stream"]


@dataclass(frozen=True)
class KeyKind:
    """What is known of all keys whose name matches `pattern` (a glob)."""

    pattern: str
    type: Type
    owner: Literal["cohort", "celery"]
    ends: str
    """Who takes out what is in it; an empty hash, list or set is no key any more."""
    expires: bool = False
    """Whether such a key must have a time to live: nobody else deletes it."""
    of_jobs: bool = False
    """Whether it is there only while some job waits or runs. In an idle fleet there is none."""

    def matches(self, name: str) -> bool:
        """Whether a key of this name is one of them."""
        return fnmatchcase(name, self.pattern)


def _ours(
    name: str, type: Type, ends: str, *, expires: bool = False, of_jobs: bool = False
) -> KeyKind:
    return KeyKind(name, type, "cohort", ends, expires, of_jobs)


def _celery(pattern: str, type: Type, ends: str, *, expires: bool = False) -> KeyKind:
    return KeyKind(pattern, type, "celery", ends, expires)


TABLE: tuple[KeyKind, ...] = (
    _ours(LOCKS, "hash", "finish, with nobody parked", of_jobs=True),
    _ours(PARKED, "zset", "finish, which hands the lock on", of_jobs=True),
    _ours(READY, "list", "claim", of_jobs=True),
    _ours(SEQUENCE, "string", "nobody: one counter"),
    _ours(DELIVERIES, "hash", "finish", of_jobs=True),
    _ours(WAITING, "zset", "claim", of_jobs=True),
    _ours(SHAPES, "hash", "claim", of_jobs=True),
    _ours(RESERVED, "hash", "claim, reap, leave"),
    _ours(SPARE, "hash", "reap, leave"),
    _ours(CLAIMED, "hash", "finish, give back, reap", of_jobs=True),
    _ours(SETTLED, "hash", "finish; sweep, after a week"),
    _ours(EXPIRING, "zset", "finish; the expiry, once it is due"),
    _ours(DEAD, "hash", "an operator"),
    _ours(own_bell("*"), "list", "the node that it wakes; reap, leave"),
    _ours(BELL, "list", "idle nodes; at most 100 rings"),
    _ours(LEASES, "zset", "reap, leave"),
    _ours(NODES, "hash", "reap, leave"),
    _ours(BIRTH, "string", "nobody: one name"),
    _ours(FLEET, "string", "nobody: one name"),
    _ours(SEGMENTS, "hash", "drop, when a segment has expired"),
    _ours(GENERATION, "string", "nobody: one note"),
    _ours(f"{TAG}outcomes:????", "hash", "sweep, forget"),
    _ours(f"{TAG}submitted:????", "hash", "its time to live", expires=True),
    _ours(claims("*"), "hash", "finish, give back, reap", of_jobs=True),
    _ours(delayed("*"), "zset", "claim, once it is due", of_jobs=True),
    _ours(leader("*"), "string", "its time to live", expires=True),
    # Celery's and kombu's own. Queues themselves are lists named by the bindings.
    _celery("celery-task-meta-*", "string", "its time to live", expires=True),
    _celery("celery-taskset-meta-*.j", "zset", "the chord; its time to live", expires=True),
    _celery("celery-taskset-meta-*.d", "set", "the chord; its time to live", expires=True),
    _celery("celery-taskset-meta-*.[cts]", "string", "the chord; its time to live", expires=True),
    _celery("celery-taskset-meta-*", "string", "its time to live", expires=True),
    _celery("_kombu.binding.*", "set", "whoever deletes the queue; one for each exchange"),
    _celery(
        "_kombu.binding_permanent.*", "set", "whoever deletes the queue; the same, of named ones"
    ),
    _celery("_kombu.binding_deadlines", "zset", "kombu, which renews them or lets them lapse"),
    _celery("unacked", "hash", "a stock consumer that acknowledges"),
    _celery("unacked_index", "zset", "a stock consumer that acknowledges"),
    _celery("unacked_mutex", "string", "its time to live", expires=True),
    _celery("*.reply.celery.pidbox", "list", "who asked by remote control"),
)


def kind_of(name: str) -> KeyKind | None:
    """The first line of the table that speaks of this key; None: a queue's list, or a stranger."""
    return next((kind for kind in TABLE if kind.matches(name)), None)
