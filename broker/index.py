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
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple

import redis
from redis.exceptions import NoScriptError

from broker import keys
from broker.ahead import Ahead
from broker.sources import sha_of, source
from errors import Unavailable

BUCKETS = 1 << 16
_ENTRY = struct.Struct("<IIIBI")
_FORGOTTEN = 0xFFFFFFFF
"""In the place of a segment's number."""
_A_MOMENT = 30
"""Seconds."""
_A_SCRIPT = 200
"""Entries that one script looks at, at most."""
_A_STEP = 32
"""Outcomes that one script announces, each to whoever waits for it."""
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
    """A task's state on its way to who waits: `name` is Celery's key. `final` is None for a state
    on the way, else (state, when it expires).
    """

    task_id: str
    name: str
    meta: bytes
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


def _calls(
    script: str, first: str, buckets: Iterable[tuple[str, Sequence[bytes]]]
) -> Iterator[Sequence[Any]]:
    """Commands for a script that takes buckets and their entries, of bounded size."""
    names: list[str] = []
    blobs: list[bytes] = []
    room = _A_SCRIPT
    for name, packed in buckets:
        for at in range(0, len(packed), _A_SCRIPT):
            some = packed[at : at + _A_SCRIPT]
            if len(some) > room:
                yield ["EVALSHA", script, 1 + len(names), keys.SEGMENTS, *names, first, *blobs]
                names, blobs, room = [], [], _A_SCRIPT
            names.append(name)
            blobs.append(b"".join(some))
            room -= len(some)
    if names:
        yield ["EVALSHA", script, 1 + len(names), keys.SEGMENTS, *names, first, *blobs]


class Index:
    """The index on one Redis. Safe to share between threads."""

    def __init__(self, client: redis.Redis) -> None:
        self.client: Any = client
        """Untyped: redis-py's types allow for every protocol and encoding."""
        self._names: dict[int, str] = {}

    @cached_property
    def ahead(self) -> Ahead:
        """Over which one thread announces, and another one hears what became of it."""
        return Ahead(self.client)

    @cached_property
    def _announce(self) -> str:
        return sha_of(source("announce"))

    @cached_property
    def _place(self) -> str:
        return sha_of(source("place"))

    @cached_property
    def _refill(self) -> str:
        return sha_of(source("refill"))

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

    def announce(self, announcements: Sequence[Announcement], seconds: float) -> list[Standing]:
        """Publish states, for so many seconds; the first final outcome of a task stands."""
        steps = [announcements[at : at + _A_STEP] for at in range(0, len(announcements), _A_STEP)]
        replies = self._run("announce", [self._announcing(some, seconds) for some in steps])
        return self._standings(announcements, [word for reply in replies for word in reply])

    def announce_ahead(
        self, one: Announcement, seconds: float
    ) -> Callable[[], list[Standing]] | None:
        """The same for one, without waiting: what is returned reads the reply, or raises what may
        be announced again. None, and nothing sent: there's no connection for it now.
        """
        reply = self.ahead.send(self._announcing([one], seconds))
        return None if reply is None else lambda: self._standings([one], reply())

    @staticmethod
    def _standings(announcements: Sequence[Announcement], words: Sequence[Any]) -> list[Standing]:
        standings = []
        for one, word in zip(announcements, words, strict=True):
            if isinstance(word, list):
                standings.append(Standing("adopt", word[0]))
            else:
                standings.append(Standing("kept" if word == b"kept" else "announced", one.meta))
        return standings

    def _announcing(self, some: Sequence[Announcement], seconds: float) -> Sequence[Any]:
        names, buckets, arguments = [], [], []
        for one in some:
            bucket, field = spot_of(one.task_id)
            names.append(one.name)
            buckets.append(keys.outcomes(bucket))
            entry = b""
            if one.final is not None:
                state, expires = one.final
                entry = _ENTRY.pack(0, 0, 0, STATES[state], expires)
            arguments += [one.meta, field, entry]
        size, lives = len(some), int(seconds * 1000)
        return ["EVALSHA", self._announce, 2 * size, *names, *buckets, size, lives, *arguments]

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
        named = ((keys.outcomes(bucket), packed) for bucket, packed in buckets.items())
        calls = list(_calls(self._place, segment, named))
        placed = 0
        for at in range(0, len(calls), 100):
            placed += sum(self._run("place", calls[at : at + 100]))
        return placed

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
        placed = None if entry is None else Placed(*_ENTRY.unpack(entry))
        return None if placed is None or placed.segment == _FORGOTTEN else placed

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
        """Take a task's entry out. Its outcome may be on its way to the disk: for a moment an entry
        stands there that leads nowhere, or whoever writes it down would make it known again.
        """
        bucket, field = spot_of(task_id)
        entry = _ENTRY.pack(_FORGOTTEN, 0, 0, 0, self.now_ms() // 1000 + _A_MOMENT)
        self.client.hset(keys.outcomes(bucket), field, entry)

    def drop(self, segment: str) -> None:
        """Forget a segment's name, once nothing in the index refers to it."""
        number = self.client.hget(keys.SEGMENTS, f"s{segment}")
        if number is not None:
            self.client.hdel(keys.SEGMENTS, f"s{segment}", f"n{number.decode()}")

    def fill(self) -> Filling:
        """Begin to put in what was found on disk."""
        return Filling(self)

    def is_filled(self) -> bool:
        """Whether a filling has come to its end since this Redis was last empty."""
        return bool(self.client.hexists(keys.SEGMENTS, "filled"))

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


class Filling:
    """Puts many outcomes into the index at once: a million in seconds.

    Entries are gathered, so that a bucket is sent with all that it gets, and sent from a thread
    while the next ones are read. `Unavailable` if Redis is emptied meanwhile: begin anew.
    """

    _AT_ONCE = 1_000_000

    def __init__(self, index: Index) -> None:
        self._index = index
        self._token = uuid.uuid4().hex
        index.client.hset(keys.SEGMENTS, "filling", self._token)
        index.client.script_load(source("refill"))
        self._buckets: defaultdict[bytes, list[bytes]] = defaultdict(list)
        self._gathered = 0
        self._sender = ThreadPoolExecutor(1, "cohort-fill")
        self._sent: deque[Future[int]] = deque()
        self.placed = 0
        """How many were new to Redis, of those that have been sent."""

    def add(self, segment: str, found: Iterable[tuple[bytes, int, int, int, int]]) -> int:
        """The outcomes of one segment: (id, offset, length, state, expires in ms). How many."""
        number = self._number_of(segment)
        buckets, digest_of, pack = self._buckets, hashlib.blake2b, _ENTRY.pack
        count = 0
        for task_id, offset, length, state, expires_ms in found:
            digest = digest_of(task_id, digest_size=16).digest()
            buckets[digest[:2]].append(
                digest[2:] + pack(number, offset, length, state, (expires_ms + 999) // 1000)
            )
            count += 1
        self._gathered += count
        if self._gathered >= self._AT_ONCE:
            self._send()
        return count

    def end(self) -> None:
        """Send what is left and wait until all of it is there."""
        try:
            self._send()
            self._settle(0)
        finally:
            self._sender.shutdown(cancel_futures=True)
        self._index.client.hset(keys.SEGMENTS, "filled", self._token)

    def _send(self) -> None:
        named = (
            (keys.outcomes(int.from_bytes(bucket)), packed)
            for bucket, packed in self._buckets.items()
        )
        calls = _calls(self._index._refill, self._token, named)
        while some := list(islice(calls, 50)):
            self._sent.append(self._sender.submit(self._tell, some))
            self._settle(20)
        self._buckets.clear()
        self._gathered = 0

    def _settle(self, most: int) -> None:
        """Wait until no more than so many steps are under way."""
        while len(self._sent) > most:
            self.placed += self._sent.popleft().result()

    def _tell(self, calls: Sequence[Sequence[Any]]) -> int:
        replies = self._index._run("refill", calls)
        if -1 in replies:
            raise Unavailable("Redis was emptied while it was being filled")
        return sum(replies)

    def _number_of(self, segment: str) -> int:
        # By the script that numbers them, so that two who fill give one segment one number.
        index = self._index
        index._run("place", [["EVALSHA", index._place, 1, keys.SEGMENTS, segment]])
        number = index.client.hget(keys.SEGMENTS, f"s{segment}")
        if number is None:
            raise Unavailable("Redis was emptied while it was being filled")
        return int(number)
