"""What a worker asks Redis for, and what it is given: the words of `claim.lua`, typed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from broker import keys

_CLAIM_KEYS = (
    keys.LOCKS,
    keys.PARKED,
    keys.READY,
    keys.SEQUENCE,
    keys.DELIVERIES,
    keys.BELL,
    keys.LEASES,
    keys.DEAD,
    keys.WAITING,
    keys.SHAPES,
    keys.RESERVED,
    keys.SETTLED,
    keys.SPARE,
    keys.CLAIMED,
)


class Claimed(NamedTuple):
    """What a claim brought."""

    claim_id: str
    queue: str
    payload: bytes
    lost_deliveries: int
    key: str
    qualified: bool
    """Whether what it needs is known; for a stock producer's message the worker must find out."""
    needs: str
    """As `Needs.text`."""
    settled: str
    """Why it has an outcome without having run, or nothing: it is to be run."""
    list_name: str


class Running(NamedTuple):
    """A claim that a node has begun, and what its message says: task id, name and priority."""

    claimed: Claimed
    task: str
    name: str
    priority: int

    @property
    def facts(self) -> str:
        """As a claim has them in Redis (see prelude.lua)."""
        claimed = self.claimed
        facts = {
            "queue": claimed.queue,
            "list": claimed.list_name,
            "key": claimed.key,
            "task": self.task,
            "name": self.name,
            "priority": str(self.priority),
            "needs": claimed.needs,
            "conflict": "wait",
            "bare": "0" if claimed.qualified else "1",
            "settled": claimed.settled,
        }
        return json.dumps(facts)


@dataclass(frozen=True)
class Asking:
    """Who claims what: of these `lists`, (Redis list, queue), the first is served first."""

    member: str
    prefix: str
    """How the ids of the claims begin; a number follows."""
    first: int
    most: int
    node: str
    """What the node has and may claim (JSON, see claim.lua)."""
    queues: Sequence[str]
    lists: Sequence[tuple[str, str]]
    tops: Sequence[str]
    """For each list the last priority that it serves, as a digit."""

    @property
    def keys(self) -> list[str]:
        """Every key that the script touches."""
        delayed = map(keys.delayed, self.queues)
        lists = (name for name, _ in self.lists)
        return [keys.claims(self.member), *_CLAIM_KEYS, *delayed, *lists]

    @property
    def arguments(self) -> list[Any]:
        """What the script is told."""
        served = zip(self.lists, self.tops, strict=True)
        return [
            *(self.member, self.prefix, self.first, self.most, self.node),
            *(len(self.queues), *self.queues),
            *(argument for (_, queue), top in served for argument in (queue, top)),
        ]


class Claims(NamedTuple):
    """The answer: "again" if there may be more, "busy" if no process is idle, "all", "expelled"."""

    word: Literal["all", "again", "busy", "expelled"]
    claimed: list[Claimed]

    @classmethod
    def of(cls, asking: Asking, reply: Sequence[Any]) -> Claims:
        """What the server said."""
        claimed = [
            Claimed(
                f"{asking.prefix}{number}",
                queue.decode(),
                payload,
                int(lost),
                key.decode(),
                qualified == b"1",
                needs.decode(),
                settled.decode(),
                list_name.decode(),
            )
            for number, queue, payload, lost, key, qualified, needs, settled, list_name in reply[1:]
        ]
        return cls(reply[0].decode(), claimed)
