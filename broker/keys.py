"""The names of Cohort's keys in Redis. All but the queues themselves share one hash tag.

A queue stays a plain list under its own name, so that a stock Celery producer can feed it.
"""

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
DEAD = f"{TAG}dead"
"""List, newest first, at most 1,000: elements of queues that aren't task messages."""
BELL = f"{TAG}bell"
"""List of rings: idle nodes block on it."""
LEASES = f"{TAG}leases"
"""Sorted set: `<node>:<incarnation>` -> when its lease ends, in ms of Redis time."""
NODES = f"{TAG}nodes"
"""Hash: `<node>:<incarnation>` -> JSON with its capacity, host, pid and mount nonce."""
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


def delayed(queue: str) -> str:
    """Sorted set: list name NUL message -> when it is due, in ms of Redis time."""
    return f"{TAG}delayed:{queue}"


def leader(duty: str) -> str:
    """String with a time to live: who does this duty now."""
    return f"{TAG}leader:{duty}"
