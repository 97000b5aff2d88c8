"""Where outcomes lie: the index of the shared folder's segments, in Redis and small.

The outcome itself is in Redis only for a short while, under Celery's own key, so that it can be
pushed to who waits. What stays is an entry of 31 bytes, in one of 65,536 hashes, so that each hash
is small enough to be kept packed: a part of the id's hash, and where in which segment to read.

The first final outcome of a task stands: `announce` decides that, in one script, before anything
is on disk. An entry with segment 0 says "decided, not on disk yet". All of it can be lost and is
rebuilt by reading the segments.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple

import redis
from redis.exceptions import NoScriptError

from broker import keys
from broker.scripts import sha_of, source

BUCKETS = 1 << 16
_ENTRY = struct.Struct("<IIIBI")
_FIELD = 14
_A_SCRIPT = 200
"""Entries that one script looks at, at most."""
_A_SWEEP = 8
"""Buckets of one sweep: with a million outcomes held, about 120 entries."""

STATES: dict[str, int] = {"SUCCESS": 1, "FAILURE": 2, "REVOKED": 3}


class Placed(NamedTuple):
    """A final outcome's entry. `expires` in seconds since 1970, 0 for never."""

    segment: int
    offset: int
    length: int
    state: int
    expires: int


@dataclass(frozen=True)
class Announcement:
    """A task's state on its way to who waits: `name` is Celery's key, `seconds` how long it stays
    there. `final` is None for a state on the way, else (state, when it expires).
    """

    task_id: str
    name: str
    meta: bytes
    seconds: float
    final: tuple[str, int] | None


class Standing(NamedTuple):
    """What `announce` decided: ours, an earlier one on disk, or an earlier one to be written."""

    word: Literal["announced", "kept", "adopt"]
    meta: bytes


def spot_of(task_id: str | bytes) -> tuple[int, bytes]:
    """The bucket and the field of a task id. Who reads the entry compares the id that is there."""
    name = task_id if isinstance(task_id, bytes) else task_id.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return digest[0] << 8 | digest[1], digest[2:]


def packed(
    task_id: str | bytes, offset: int, length: int, state: int, expires_ms: int
) -> tuple[int, bytes]:
    """The bucket of an outcome and its entry there, as `Index.load` takes them."""
    bucket, field = spot_of(task_id)
    return bucket, field + _ENTRY.pack(0, offset, length, state, (expires_ms + 999) // 1000)


class Index:
    """The index on one Redis. Safe to share between threads."""

    def __init__(self, client: redis.Redis) -> None:
        self.client: Any = client
        """Untyped: redis-py's types allow for every protocol and encoding."""
        self._names: dict[int, str] = {}

    @cached_property
    def _announce(self) -> str:
        return sha_of(source("announce"))

    @cached_property
    def _place(self) -> str:
        return sha_of(source("place"))

    @cached_property
    def _sweep(self) -> str:
        return sha_of(source("sweep"))

    def _run(self, script: str, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """One script many times, in one round trip. Each of ours may run twice."""
        try:
            return self._pipelined(calls)
        except NoScriptError:
            self.client.script_load(source(script))
            return self._pipelined(calls)

    def _pipelined(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        if len(calls) == 1:
            return [self.client.execute_command(*calls[0])]
        with self.client.pipeline(transaction=False) as pipeline:
            for call in calls:
                pipeline.execute_command(*call)
            replies: list[Any] = pipeline.execute()
            return replies

    def announce(self, announcements: Sequence[Announcement]) -> list[Standing]:
        """Publish states; the first final outcome of a task stands."""
        calls = []
        for one in announcements:
            bucket, field = spot_of(one.task_id)
            tentative = b""
            if one.final is not None:
                state, expires = one.final
                tentative = _ENTRY.pack(0, 0, 0, STATES[state], expires)
            calls.append(
                (
                    *("EVALSHA", self._announce, 2, one.name, keys.outcomes(bucket)),
                    *(one.meta, int(one.seconds * 1000), field, tentative),
                )
            )
        standings = []
        for one, reply in zip(announcements, self._run("announce", calls), strict=True):
            word = reply[0].decode()
            standings.append(Standing(word, reply[1] if word == "adopt" else one.meta))
        return standings

    def place(
        self, segment: str, entries: Iterable[tuple[str | bytes, int, int, str | int, int]]
    ) -> int:
        """Say where outcomes lie: (task id, offset, length, state, expires). How many are new."""
        buckets: dict[int, list[bytes]] = {}
        for task_id, offset, length, state, expires in entries:
            bucket, field = spot_of(task_id)
            code = STATES[state] if isinstance(state, str) else state
            packed = field + _ENTRY.pack(0, offset, length, code, expires)
            buckets.setdefault(bucket, []).append(packed)
        return sum(self.load(segment, buckets))

    def load(self, segment: str, buckets: Mapping[int, Sequence[bytes]]) -> Iterator[int]:
        """`place` for what is packed already, some buckets at a time."""
        calls = list(self._loading(segment, buckets))
        for at in range(0, len(calls), 500):
            yield sum(self._run("place", calls[at : at + 500]))

    def _loading(
        self, segment: str, buckets: Mapping[int, Sequence[bytes]]
    ) -> Iterator[Sequence[Any]]:
        names: list[str] = []
        blobs: list[bytes] = []
        room = _A_SCRIPT

        def call() -> Sequence[Any]:
            return ["EVALSHA", self._place, 1 + len(names), keys.SEGMENTS, *names, segment, *blobs]

        for bucket, packed in buckets.items():
            for at in range(0, len(packed), _A_SCRIPT):
                some = packed[at : at + _A_SCRIPT]
                if len(some) > room:
                    yield call()
                    names, blobs, room = [], [], _A_SCRIPT
                names.append(keys.outcomes(bucket))
                blobs.append(b"".join(some))
                room -= len(some)
        if names:
            yield call()

    def find(self, task_id: str) -> Placed | None:
        """Where a task's final outcome lies, if there is one that hasn't expired."""
        bucket, field = spot_of(task_id)
        return self.read(self.client.hget(keys.outcomes(bucket), field))

    def look(self, name: str | bytes, task_id: str) -> tuple[bytes | None, Placed | None]:
        """What Redis holds under Celery's key, and the task's entry, in one round trip."""
        bucket, field = spot_of(task_id)
        held, entry = self._pipelined(
            [("GET", name), ("HGET", keys.outcomes(bucket), field)],
        )
        return held, self.read(entry)

    def find_many(self, task_ids: Sequence[str]) -> list[Placed | None]:
        """The same for many, in one round trip."""
        if len(task_ids) == 1:
            return [self.find(task_ids[0])]
        with self.client.pipeline(transaction=False) as pipeline:
            for task_id in task_ids:
                bucket, field = spot_of(task_id)
                pipeline.hget(keys.outcomes(bucket), field)
            return [self.read(entry) for entry in pipeline.execute()]

    @staticmethod
    def read(entry: bytes | None) -> Placed | None:
        """An entry of the index. Expired ones are for `sweep`, on the server's clock, to remove."""
        return None if entry is None else Placed(*_ENTRY.unpack(entry))

    def segment(self, number: int, *, again: bool = False) -> str | None:
        """The name of a segment; `again` asks Redis, which may have been emptied and refilled."""
        if again or number not in self._names:
            name = self.client.hget(keys.SEGMENTS, f"n{number}")
            if name is None:
                self._names.pop(number, None)
                return None
            self._names[number] = name.decode("utf-8", "surrogateescape")
        return self._names[number]

    def forget(self, task_id: str) -> None:
        """Take a task's entry out."""
        bucket, field = spot_of(task_id)
        self.client.hdel(keys.outcomes(bucket), field)

    def drop(self, segment: str) -> None:
        """Forget a segment's name, once nothing in the index refers to it."""
        number = self.client.hget(keys.SEGMENTS, f"s{segment}")
        if number is not None:
            self.client.hdel(keys.SEGMENTS, f"s{segment}", f"n{number.decode()}")

    def sweep(self) -> Iterator[int]:
        """Take out what has expired, in bounded steps: how many went with each."""
        buckets = iter(range(BUCKETS))
        while some := list(islice(buckets, _A_SWEEP * 32)):
            calls = []
            for at in range(0, len(some), _A_SWEEP):
                names = [keys.outcomes(bucket) for bucket in some[at : at + _A_SWEEP]]
                calls.append(["EVALSHA", self._sweep, len(names), *names])
            yield sum(self._run("sweep", calls))

    def now_ms(self) -> int:
        """The server's clock."""
        seconds, micros = self.client.time()
        return int(seconds * 1000 + micros // 1000)

    def refilled(self) -> None:
        """Tell those who wait for outcomes to look again."""
        self.client.publish(keys.REFILLED, "")

    def generation(self) -> bytes | None:
        """What `now_known` was told; None if this Redis was emptied since, or is new."""
        held: bytes | None = self.client.get(keys.GENERATION)
        return held

    def now_known(self, generation: str) -> None:
        """This Redis has been filled from the shared folder."""
        self.client.set(keys.GENERATION, generation)
