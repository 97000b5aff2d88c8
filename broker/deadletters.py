"""Dead letters: messages of tasks that nobody could bring to an end, and what is no task's message.

One task has one outcome, and a dead letter's is recorded. So what is tried again is a new task,
which says of which one it is the retry. The group of the old one has heard of its end and isn't
told of the new one's; the `expires` that its producer gave no longer counts.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from broker import keys
from broker.scripts import Scripts
from errors import Refused

RETRY_OF = "cohort_retry_of"
"""Header: the task id of the dead letter that this message was."""
UNKNOWN_SINCE = "cohort_unknown"
"""Header: since when the task is known to be unknown to some node, in ms since the epoch."""
_OF_THE_OLD = ("group", "group_index", "expires", "eta", UNKNOWN_SINCE)


@dataclass(frozen=True)
class DeadLetter:
    """One of them. `name` is its task id, or `element-<hash>` of what isn't a task's message."""

    name: str
    raw: bytes
    """What stands in Redis."""

    @cached_property
    def about(self) -> dict[str, str]:
        """Why, when (ms), from which queue and list, and how many deliveries were lost."""
        told: dict[str, str] = json.loads(self.raw.partition(b"\0")[0])
        return told

    @property
    def reason(self) -> str:
        """Why."""
        return self.about["reason"]

    @property
    def time_ms(self) -> int:
        """When."""
        return int(self.about["time"])

    @property
    def payload(self) -> bytes:
        """The message as its producer wrote it."""
        return self.raw.partition(b"\0")[2]

    @cached_property
    def message(self) -> dict[str, Any] | None:
        """The task's message; None if it is none."""
        try:
            message = json.loads(self.payload)
            if message["headers"]["id"] == self.name and isinstance(message["properties"], dict):
                return dict(message)
        except (ValueError, TypeError, LookupError):
            pass
        return None

    @property
    def task(self) -> str:
        """The task's name, '' if it isn't a task's."""
        return "" if self.message is None else str(self.message["headers"].get("task") or "")


def each(client: Any) -> Iterator[DeadLetter]:
    """All of them, in no order."""
    for name, raw in client.hscan_iter(keys.DEAD, count=100):
        yield DeadLetter(_text(name), raw)


def find(client: Any, name: str) -> DeadLetter | None:
    """The one of that name."""
    raw = client.hget(keys.DEAD, name.encode("utf-8", "surrogateescape"))
    return None if raw is None else DeadLetter(name, raw)


@dataclass(frozen=True)
class Retry:
    """The new task that a dead letter is to become."""

    letter: DeadLetter
    task_id: str
    message: str

    @property
    def list(self) -> str:
        """Where it goes."""
        return self.letter.about["list"]

    @property
    def queue(self) -> str:
        """The queue of that list."""
        return self.letter.about["queue"]

    def put(self, scripts: Scripts) -> bool:
        """Put it into its queue; False if the letter is gone, or another one."""
        word = scripts.retry_dead(self.letter.name, self.letter.raw, self.list, self.message)
        return word == "retried"


def retry_of(letter: DeadLetter) -> Retry:
    """Its message under a new task id; two who retry the same letter name the same task."""
    message = letter.message
    if message is None:
        raise Refused(f"{letter.name} isn't a task's message: it can be shown and dropped")
    seed = f"{letter.name} {letter.time_ms}".encode("utf-8", "surrogateescape")
    task_id = str(uuid.uuid5(uuid.NAMESPACE_OID, seed.hex()))
    old = message["headers"]
    headers = {name: value for name, value in old.items() if name not in _OF_THE_OLD}
    headers |= {"id": task_id, RETRY_OF: letter.name}
    if old.get("root_id") == letter.name:
        headers["root_id"] = task_id
    properties = {**message["properties"], "delivery_tag": str(uuid.uuid4())}
    properties["correlation_id"] = task_id
    text = json.dumps({**message, "headers": headers, "properties": properties})
    return Retry(letter, task_id, text)


def drop(client: Any, letters: Sequence[DeadLetter]) -> int:
    """Take them out for good. How many were still there."""
    gone = 0
    for at in range(0, len(letters), 200):
        names = [one.name.encode("utf-8", "surrogateescape") for one in letters[at : at + 200]]
        gone += client.hdel(keys.DEAD, *names)
    return gone


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
