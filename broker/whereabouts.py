"""Where in Redis a task is: read only, in bounded steps, however much waits there.

A task moves while this looks: from the queues into claims, and from there back. So it looks where
tasks come from before it looks where they go, and at everything twice before it says "nowhere".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from broker import keys
from broker.journal import pages
from broker.needs import Needs

Where = Literal["queued", "delayed", "parked", "waiting", "ready", "claimed"]
_SEPARATOR = "\x06\x16"
"""Kombu's, between a queue's name and the step of its priority."""
_A_STEP = 1000


@dataclass(frozen=True)
class Found:
    """A task that is in Redis, and what is known of it there."""

    where: Where
    task: str
    queue: str
    priority: int
    key: str
    needs: Needs
    before: int = 0
    """How many are served before it: in its queue, of its key, or of those that need the same."""
    of: int = 0
    """How many wait there in all."""
    due_ms: int = 0
    claim_id: str = ""
    member: str = ""
    """Whose claim it is."""
    kept_by: str = ""
    """Which incarnation keeps room for it."""
    settled: str = ""
    headers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Holder:
    """Who has the lock of a key. Without a member it is owed to a task that is taken next."""

    task_id: str
    claim_id: str = ""
    member: str = ""


def find(
    client: Any, task_id: str, looked: Callable[[int], object] = lambda count: None
) -> Found | None:
    """Where the task is; None: nowhere. `looked` hears of every so many that were looked at."""
    search = _Search(client, task_id, looked)
    for _ in range(2):
        for look in (search.queues, search.delayed, search.parked, search.waiting, search.ready):
            found = search.claimed() or look()
            if found is not None:
                return found
    return search.claimed()


def holder_of(client: Any, key: str) -> Holder | None:
    """Who has the lock of a key; None: nobody."""
    raw = client.hget(keys.LOCKS, _bytes(key))
    if raw is None:
        return None
    holder = _text(raw)
    if holder.startswith("owed:"):
        return Holder(holder.removeprefix("owed:"))
    for member, claim in _claims(client, holder):
        return Holder(str(claim["task"]), holder, member)
    return Holder("", holder)  # It has just ended.


def _claims(client: Any, claim_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for raw in client.zrange(keys.LEASES, 0, -1):
        member = _text(raw)
        claim = client.hget(keys.claims(member), claim_id)
        if claim is not None:
            yield member, _facts(claim)


class _Search:
    def __init__(self, client: Any, task_id: str, looked: Callable[[int], object]) -> None:
        self._client = client
        self._id = task_id
        # As Python writes it into JSON, and as Lua does: what has neither isn't worth parsing.
        self._signs = {_bytes(task_id), json.dumps(task_id)[1:-1].encode()}
        self._looked = looked
        self._count = 0

    def claimed(self) -> Found | None:
        """A node has it."""
        raw = self._client.hget(keys.CLAIMED, _bytes(self._id))
        for member, claim in _claims(self._client, _text(raw)) if raw else ():
            if claim["task"] == self._id:
                return self._of_claim("claimed", claim, claim_id=_text(raw), member=member)
        return None

    def queues(self) -> Found | None:
        """It is in its queue's list of its priority."""
        for raw_name in self._client.scan_iter(_type="list", count=_A_STEP):
            name = _text(raw_name)
            if name.startswith(keys.TAG):
                continue
            for before, payload in enumerate(self._all(pages(self._client, raw_name))):
                message = self._message(payload)
                if message is not None:
                    queue, _, step = name.partition(_SEPARATOR)
                    sooner = self._in_better_lists(queue, int(step or 0))
                    length = self._client.llen(raw_name)
                    place = {"before": sooner + before, "of": sooner + max(length, before + 1)}
                    return _of_message("queued", queue, message, place)
        return None

    def _in_better_lists(self, queue: str, step: int) -> int:
        names = [f"{queue}{_SEPARATOR}{other}" if other else queue for other in range(step)]
        return sum(self._client.llen(_bytes(name)) for name in names)

    def delayed(self) -> Found | None:
        """It isn't due yet."""
        for name in self._client.scan_iter(match=keys.delayed("*"), count=_A_STEP):
            for member, due in self._all(self._client.zscan_iter(name, count=_A_STEP)):
                message = self._message(member)
                if message is not None:
                    queue = _text(name).removeprefix(keys.delayed(""))
                    return _of_message("delayed", queue, message, {"due_ms": int(due)})
        return None

    def parked(self) -> Found | None:
        """It waits for the lock of its key."""
        for member, _ in self._all(self._client.zscan_iter(keys.PARKED, count=_A_STEP)):
            claim = self._claim(member.split(b"\0", 2)[2])
            if claim is not None:
                key = member.partition(b"\0")[0]
                return self._of_claim("parked", claim, **self._place(keys.PARKED, key, member))
        return None

    def waiting(self) -> Found | None:
        """It waits for a node that it fits."""
        for member, _ in self._all(self._client.zscan_iter(keys.WAITING, count=_A_STEP)):
            claim = self._claim(member.split(b"\0", 2)[2])
            if claim is not None:
                shape, rank, _ = member.split(b"\0", 2)
                kept = self._client.hgetall(keys.RESERVED).items()
                keepers = [_text(who) for who, mark in kept if mark == shape + b"\0" + rank]
                place = self._place(keys.WAITING, shape, member)
                return self._of_claim("waiting", claim, kept_by="".join(keepers[:1]), **place)
        return None

    def ready(self) -> Found | None:
        """It is served before the queues."""
        for behind, raw in enumerate(self._all(pages(self._client, keys.READY))):
            claim = self._claim(raw)
            if claim is not None:
                length = max(self._client.llen(keys.READY), behind + 1)
                return self._of_claim("ready", claim, before=length - 1 - behind, of=length)
        return None

    def _place(self, name: str, prefix: bytes, member: bytes) -> dict[str, Any]:
        first, last = b"[" + prefix + b"\0", b"(" + prefix + b"\1"
        return {
            "before": self._client.zlexcount(name, first, b"(" + member),
            "of": self._client.zlexcount(name, first, last),
        }

    def _all(self, some: Iterable[Any]) -> Iterator[Any]:
        for one in some:
            self._count += 1
            if self._count % _A_STEP == 0:
                self._looked(self._count)
            yield one

    def _has_sign(self, raw: bytes) -> bool:
        return any(sign in raw for sign in self._signs)

    def _message(self, raw: bytes) -> dict[str, Any] | None:
        if self._has_sign(raw):
            try:
                # In a delayed set its list's name stands before it.
                message = json.loads(raw.rpartition(b"\0")[2])
                if message["headers"]["id"] == self._id:
                    return dict(message)
            except (ValueError, TypeError, LookupError):
                pass  # No task's message; who claims it puts it aside.
        return None

    def _claim(self, raw: bytes) -> dict[str, Any] | None:
        if self._has_sign(raw):
            facts = _facts(raw)
            if facts["task"] == self._id:
                return facts
        return None

    def _of_claim(self, where: Where, claim: dict[str, Any], **more: Any) -> Found:
        return Found(
            where,
            str(claim["name"]),
            str(claim["queue"]),
            int(claim["priority"]),
            str(claim["key"]),
            Needs.parse(claim["needs"]),
            settled=str(claim["settled"]),
            **more,
        )


def _of_message(where: Where, queue: str, message: dict[str, Any], place: dict[str, Any]) -> Found:
    headers = message["headers"]
    told = headers.get("cohort")
    about: dict[str, Any] = told if isinstance(told, dict) else {}
    return Found(
        where,
        str(headers.get("task") or ""),
        queue,
        int(message["properties"].get("priority") or 0),
        str(about.get("key") or ""),
        Needs.parse(str(about.get("needs") or "")),
        headers=headers,
        **place,
    )


def _facts(claim: bytes) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(claim.partition(b"\0")[0])
    return facts


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
