"""The producer's half: how messages get into their queues, in order and each of them once.

Put is idempotent on (task id, retries): the same submission within a set time is one job, so a
client may try again after a lost reply. What was put is remembered in Redis as a mark of 14 bytes
in one of 65,536 hashes, each small enough to be kept packed; they expire by themselves.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal, NamedTuple

import redis
from kombu.transport import redis as stock
from kombu.utils.json import dumps
from redis.exceptions import NoScriptError, OutOfMemoryError

from broker import keys, retry
from broker.sources import sha_of, source
from errors import BrokerFull, Refused

Word = Literal["queued", "delayed", "there"]
"""What became of a message; "there": it had been put before."""

A_SCRIPT = 200
"""Messages that one script puts, at most."""
_A_SCRIPTS_BYTES = 1 << 20
_ENTRY = struct.Struct("<10sBd")
_NO_MARK = bytes(10)

_remembered = 600.0


def remember_for(seconds: float) -> None:
    """For how long the same (task id, retries) is the same job, in this process."""
    global _remembered
    _remembered = seconds


class Put(NamedTuple):
    """A message on its way into a queue's list."""

    list: str
    queue: str
    payload: str
    identity: str
    """What makes it the same submission, of `identity_of`; '' for a message that isn't marked."""
    due_ms: int | None = None
    event: str = ""
    """What those who listen to events are told of it, as JSON; '' for nothing."""
    expires: tuple[str, int] | None = None
    """Its task id, and when it is over though it hasn't run, in ms since 1970."""


Tell = Callable[[Sequence[str]], tuple[str, str]]
"""Some events -> the channel, and the message that tells them."""


def _nowhere(one: Put) -> float:
    raise Refused("a durable job can't be submitted here: nobody makes notes of jobs")


_write_down: Callable[[Put], float] = _nowhere


def note_with(write_down: Callable[[Put], float]) -> None:
    """How this process makes a note of a durable job; it returns for how long, in seconds."""
    global _write_down
    _write_down = write_down


def identity_of(headers: Mapping[str, Any]) -> str:
    """What makes a submission the same: id and retries. A task may replace itself under its id."""
    if not isinstance(headers.get("id"), str):
        return ""  # Of Celery's first protocol: its id is in the body.
    nesting = headers.get("replaced_task_nesting") or 0
    identity = f"{headers['id']}:{headers.get('retries') or 0}"
    return f"{identity}:{nesting}" if nesting else identity


def mark_of(identity: str) -> tuple[str, bytes]:
    """The hash and the field that remember a submission."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=12).digest()
    return keys.submitted(digest[0] << 8 | digest[1]), digest[2:]


def due_ms(headers: Mapping[str, Any]) -> int | None:
    """When a message is due, in ms since 1970; None: at once."""
    return _ms(headers.get("eta"))


def expires_of(headers: Mapping[str, Any]) -> tuple[str, int] | None:
    """Which task a message is of and when it expires, in ms since 1970; None: it doesn't."""
    ends = _ms(headers.get("expires"))
    return None if ends is None else (str(headers.get("id")), ends)


def _ms(told: object) -> int | None:
    if not isinstance(told, str):
        return None
    try:
        time = datetime.fromisoformat(told)
    except ValueError:
        return None  # Celery's worker says what is wrong with it.
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    return int(time.timestamp() * 1000)


_ABSENT: dict[str, Any] = {
    "shadow": None,
    "eta": None,
    "expires": None,
    "group": None,
    "group_index": None,
    "retries": 0,
    "timelimit": [None, None],
    "parent_id": None,
    "replaced_task_nesting": 0,
    "stamped_headers": None,
    "stamps": {},
}


def without_defaults(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Headers without what Celery's worker takes for said when it isn't: 300 bytes a job."""
    return {
        name: value
        for name, value in headers.items()
        if name not in _ABSENT or value != _ABSENT[name]
    }


class _Count(threading.local):
    puts = 0


_count = _Count()


def puts_of_this_thread() -> int:
    """How many messages it has put so far."""
    return _count.puts


class Putter:
    """Puts messages on one Redis. Safe to share between threads."""

    def __init__(self, client: redis.Redis) -> None:
        self.client: Any = client
        """Untyped: redis-py's types allow for every protocol and encoding."""

    @cached_property
    def _sha(self) -> str:
        return sha_of(source("put"))

    def _run(self, names: Sequence[str], arguments: Sequence[Any]) -> list[Any]:
        command = ("EVALSHA", self._sha, len(names), *names, *arguments)
        try:
            reply: list[Any] = self.client.execute_command(*command)
        except NoScriptError:
            self.client.script_load(source("put"))
            reply = self.client.execute_command(*command)
        except ValueError as error:
            # What redis-py says when another thread has closed the connection meanwhile.
            raise redis.ConnectionError(str(error)) from error
        return reply

    def put(
        self, puts: Sequence[Put], keep: float | None = None, tell: Tell | None = None
    ) -> list[Word]:
        """Put messages, in order, in steps of bounded size. Raises `BrokerFull`.

        They are remembered for `keep` seconds, else as `remember_for` was told. All of it may be
        done again: what was put stays put.
        """
        _count.puts += len(puts)
        words: list[Word] = []
        for some in _steps(puts):
            try:
                found = self._put(some, _remembered if keep is None else keep, tell)
            except OutOfMemoryError:
                queues = ", ".join(sorted({one.queue for one in some}))
                accepted = f" Of {len(puts)} {len(words)} are accepted." if words else ""
                raise BrokerFull(
                    f"queue {queues}: Redis is at its memory limit and takes no new jobs; those "
                    f"accepted go on.{accepted} Try again when some have ended, or raise maxmemory"
                ) from None
            words += [word.decode() for word in found]
        return words

    def _put(self, some: Sequence[Put], keep: float, tell: Tell | None) -> list[Any]:
        places: dict[tuple[str, str], int] = {}
        entries: list[bytes] = []
        buckets: list[str] = []
        for one in some:
            place = places.setdefault((one.list, one.queue), len(places))
            due = 0.0 if one.due_ms is None else float(one.due_ms)
            if one.identity:
                bucket, mark = mark_of(one.identity)
                buckets.append(bucket)
            else:
                mark = _NO_MARK
            entries.append(_ENTRY.pack(mark, place, due))
        named = [name for place in places for name in (place[0], keys.delayed(place[1]))]
        events = [one.event for one in some if one.event]
        channel, telling = tell(events) if tell and events else ("", "")
        expiring = [(at, *one.expires) for at, one in enumerate(some, 1) if one.expires]
        arguments: list[Any] = [len(places), int(keep * 1000), channel, telling, b"".join(entries)]
        arguments.append(dumps(expiring) if expiring else "")
        arguments += [one.payload for one in some]
        return self._run([keys.BELL, keys.EXPIRING, *named, *buckets], arguments)

    def known(self, identities: Sequence[str]) -> list[bool]:
        """Which of these are remembered as put."""
        with self.client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            for identity in identities:
                pipeline.hget(*mark_of(identity))
            (seconds, _), *marks = pipeline.execute()
        return [mark is not None and struct.unpack("<I", mark)[0] > seconds for mark in marks]


def _steps(puts: Sequence[Put]) -> Iterator[Sequence[Put]]:
    begun = size = 0
    for at, one in enumerate(puts):
        full = at - begun == A_SCRIPT or size + len(one.payload) > _A_SCRIPTS_BYTES
        if full and at > begun:
            yield puts[begun:at]
            begun, size = at, 0
        size += len(one.payload)
    if begun < len(puts):
        yield puts[begun:]


class PutBatch(stock.PublishBatch):  # type: ignore[misc]
    """What is published within kombu's `Producer.batch()`: our messages by our script."""

    def __init__(self, channel: Any, max_size: int) -> None:
        super().__init__(channel, max_size)
        self._puts: list[Put] = []

    def put(self, one: Put) -> None:
        """Keep a message until the batch is flushed."""
        self._check_usable()
        self._puts.append(one)
        if len(self._puts) >= min(self.max_size, A_SCRIPT):
            self.flush()

    def flush(self) -> None:
        """Put what was kept, and send the rest."""
        puts, self._puts = self._puts, []
        if puts:
            self._check_usable()
            self.channel.putter.put(puts)
        super().flush()

    def discard(self) -> None:
        """Forget what was kept."""
        self._puts = []
        super().discard()


class ProducingChannel(stock.Channel):  # type: ignore[misc]
    """Kombu's Redis channel, whose messages with our header are put by our script."""

    @cached_property
    def putter(self) -> Putter:
        """Puts over this channel's connections."""
        if self.connection is None:
            # Another thread has closed it since: whoever publishes connects anew.
            raise redis.ConnectionError("the channel was closed")
        return Putter(self._create_client())

    def create_publish_batch(self, max_size: int) -> PutBatch:
        """What `Producer.batch()` collects in."""
        return PutBatch(self, max_size)

    def list_for(self, queue: str, priority: int) -> str:
        """The Redis list of a queue for this priority."""
        name: str = self._q_for_pri(queue, priority)
        return name

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        headers = message.get("headers") or {}
        if "cohort" not in headers:
            super()._put(queue, message, **kwargs)
            return
        message = {**message, "headers": without_defaults(headers)}
        list_name = self.list_for(queue, self._get_message_priority(message, reverse=False))
        one = Put(
            list_name,
            queue,
            dumps(message),
            identity_of(headers),
            due_ms(headers),
            expires=expires_of(headers),
        )
        if retry.keep(str(headers.get("id")), one):
            return
        about = headers["cohort"]
        if isinstance(about, dict) and about.get("durable") is True:
            # On disk before it is in Redis. Put again after a lost reply, it is there but once.
            self.putter.put([one], _write_down(one))
        elif "_publish_batch" in kwargs:
            kwargs["_publish_batch"].put(one)
        else:
            self.putter.put([one])
