"""Jobs that are noted outside Redis: how one gets into its queue, once, and which are there.

A note is a message as its producer wrote it, with the list that it belongs into.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import redis

from broker import keys
from broker.producing import Put, Putter, Word, expires_of, identity_of
from broker.scripts import Scripts


@dataclass(frozen=True)
class Note:
    """One delivery of one job. `due_ms` is None unless it has to wait."""

    task_id: str
    retries: int
    queue: str
    list: str
    message: str
    due_ms: int | None
    durable: bool

    def encode(self) -> bytes:
        """As it goes into the journal."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, payload: bytes) -> Note:
        """What `encode` made."""
        return cls(**json.loads(payload))


def note_of(queue: str, list_name: str, message: str | bytes, due_ms: int | None = None) -> Note:
    """The note of a message; `ValueError` if it isn't a task's."""
    message = message if isinstance(message, str) else message.decode()
    headers = json.loads(message).get("headers") or {}
    if not isinstance(headers.get("id"), str):
        raise ValueError("a message without a task id")
    # It may be anybody's: what is claimed is noted, whatever else its headers are.
    about, retries = headers.get("cohort"), headers.get("retries")
    return Note(
        task_id=headers["id"],
        retries=retries if isinstance(retries, int) else 0,
        queue=queue,
        list=list_name,
        message=message,
        due_ms=due_ms,
        durable=isinstance(about, dict) and bool(about.get("durable")),
    )


def put_once(scripts: Scripts, note: Note, keep: float) -> Word:
    """Put a noted job into its queue unless that was done before. Raises `BrokerFull`."""
    expires = expires_of(json.loads(note.message)["headers"])
    one = Put(note.list, note.queue, note.message, _identity(note), note.due_ms, expires=expires)
    return Putter(scripts.client).put([one], keep)[0]


def put_before(client: redis.Redis, notes: Iterable[Note]) -> list[bool]:
    """Which deliveries carry the mark of having been put."""
    return Putter(client).known([_identity(note) for note in notes])


def _identity(note: Note) -> str:
    """A durable job is put by its producer or from its note, whoever is first. Of another there is
    a note because a node had claimed it: that it was put once is no reason not to put it again.
    """
    submission = identity_of(json.loads(note.message)["headers"])
    return submission if note.durable else f"{submission} again"


def jobs_in_redis(client: Any) -> set[str]:
    """The task ids of every job that is queued, waits, is owed a lock or is claimed."""
    return set(ids_in_redis(client))


def ids_in_redis(client: Any) -> Iterator[str]:
    """The same one after the other, some more than once.

    A job moves while this looks: from the queues into claims, and from there back to `ready`. So
    it looks in that order, and at `ready` twice. One that has ended meanwhile has an outcome.
    """
    for payload in _messages(client):
        try:
            yield str(json.loads(payload)["headers"]["id"])
        except (ValueError, TypeError, LookupError):
            continue
    for raw in _claims(client):
        yield str(json.loads(raw.partition(b"\0")[0])["task"])


def _messages(client: Any) -> Iterator[bytes]:
    for name in client.scan_iter(_type="list", count=1000):
        if not name.startswith(keys.TAG.encode()):
            yield from pages(client, name)
    for name in client.scan_iter(match=keys.delayed("*"), count=1000):
        for member, _ in client.zscan_iter(name, count=1000):
            yield member.partition(b"\0")[2]


def _claims(client: Any) -> Iterator[bytes]:
    yield from _set_aside(client)
    for name in client.scan_iter(match=keys.claims("*"), count=1000):
        for _, claim in client.hscan_iter(name, count=1000):
            yield claim
    yield from _set_aside(client)


def _set_aside(client: Any) -> Iterator[bytes]:
    yield from pages(client, keys.READY)
    for name in (keys.PARKED, keys.WAITING):
        for member, _ in client.zscan_iter(name, count=1000):
            yield member.split(b"\0", 2)[2]


def pages(client: Any, name: bytes | str) -> Iterator[bytes]:
    """Every element of a list, the last one first, a thousand at a time."""
    # From the end at which claims take: what is pushed meanwhile shifts nothing past us unseen.
    end = -1
    while page := client.lrange(name, end - 999, end):
        yield from reversed(page)
        end -= 1000
