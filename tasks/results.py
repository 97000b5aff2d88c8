"""Where outcomes go: Celery's result backend on the shared folder, with its index in Redis.

A final outcome travels child -> main process; there it is announced (the first one of a task
stands, decided in one script), written to the node's segment, put into the index, and only then is
the claim acknowledged. Redis holds it for a short while, so that it can be pushed to who waits;
after that it is read from the shared folder. States on the way (STARTED, RETRY, PROGRESS) are in
Redis only. A process that is no worker has no segment: a final outcome that it stores (a chord
that can't go on, say) stays in Redis until it expires, as with Celery's Redis backend.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import redis
from celery import states
from celery.backends.redis import RedisBackend
from celery.result import AsyncResult
from kombu.exceptions import EncodeError

from broker.index import Announcement, Index, Placed, Standing
from broker.scripts import Scripts
from errors import Damaged, Unavailable
from storage.segments import Place, read_at
from tasks.outcomes import Outcome, is_elsewhere, meta_of, needs_root, pointer
from tasks.waiting import OutcomeConsumer, seldom

LARGEST_RESULT = 8 << 20
"""Bytes of an encoded outcome."""
_JUST_NOW = 0.05
"""Seconds after its submission in which a job has mostly not ended."""


def check_size(encoded: bytes | str) -> None:
    """Refuse a result that is no result but data; the tracer makes it a failure of the task."""
    if len(encoded) > LARGEST_RESULT:
        raise EncodeError(
            f"the result takes {len(encoded):,} bytes, more than {LARGEST_RESULT:,}: leave data in "
            "run.directory and return where it is"
        )


class _Collector(threading.local):
    outcomes: list[Outcome] | None = None


_collector = _Collector()
_record: Callable[[Outcome], object] | None = None
_commits: dict[str, tuple[str, int]] = {}


@contextmanager
def collected_outcomes() -> Iterator[list[Outcome]]:
    """Keep the final outcomes that this thread stores, instead of announcing them."""
    outcomes: list[Outcome] = []
    _collector.outcomes = outcomes
    try:
        yield outcomes
    finally:
        _collector.outcomes = None


def _stored_here(name: bytes | str) -> bytes | None:
    """An outcome that this thread has stored and not handed on yet. It may be the one to put a
    chord's results together, and would wait for its own.
    """
    wanted = name if isinstance(name, str) else name.decode()
    return next((o.meta for o in _collector.outcomes or () if o.name == wanted), None)


def record_with(record: Callable[[Outcome], object] | None) -> None:
    """In a worker's main process: who writes final outcomes down. None: nobody."""
    global _record
    _record = record


def committed_as(task_id: str, key: str, n: int) -> None:
    """This task's outcome, which is stored next, is record n of that key."""
    _commits[task_id] = (key, n)


class SharedResults(RedisBackend):  # type: ignore[misc]
    """Celery's result backend on the shared file system, with its index in Redis."""

    ResultConsumer = OutcomeConsumer

    subscribes_on_call = False
    """Nothing has to be done here before a task is sent."""

    @cached_property
    def index(self) -> Index:
        """Where outcomes lie."""
        return Index(self.client)

    @cached_property
    def root(self) -> Path | None:
        """The shared folder, if this process has it."""
        root = self.app.conf.get("cohort_root")
        return None if root is None else Path(root)

    # Storing.

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        meta = self._get_result_meta(
            result=result, state=state, traceback=traceback, request=request
        )
        meta["task_id"] = task_id
        encoded = self._encoded(meta)
        check_size(encoded)
        outcome = Outcome(
            task_id,
            state,
            # Celery's key, so that Celery's own client waits for it.
            self.get_key_for_task(task_id).decode(),
            encoded,
            float((self.failure_expires if state == states.FAILURE else self.expires) or 0),
            self._reference(task_id, meta),
        )
        if not outcome.is_final:
            self._announce([outcome], outcome.expires)
        elif _collector.outcomes is not None:
            _collector.outcomes.append(outcome)
        elif _record is not None:
            _record(outcome)
        else:
            self._announce([outcome], outcome.expires)
        return result

    def _encoded(self, meta: Any) -> bytes:
        encoded = self.encode(meta)
        return encoded.encode() if isinstance(encoded, str) else encoded

    def _reference(self, task_id: str, meta: dict[str, Any]) -> Any:
        if meta["status"] not in states.READY_STATES:
            return None
        commit = _commits.pop(task_id, None)
        if commit is None or self.serializer != "json":
            return None  # A record's result is JSON.
        return pointer(meta["status"], *commit, self._encoded({**meta, "result": None}))

    def mark_as_revoked(
        self,
        task_id: str,
        reason: str = "",
        request: Any = None,
        store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:
        """Record a revocation, once the worker that has claimed the task says so.

        Celery's remote control says it without a request, on every worker at once: of a task that
        waits, mostly. Of one that a node has claimed, that node will say it.
        """
        if request is not None:
            super().mark_as_revoked(task_id, reason, request, store_result, state)
        else:
            self.settle(task_id, reason)

    def settle(self, task_id: str, reason: str) -> bool:
        """Give a task that waits, wherever that is, its outcome: REVOKED, and why. Its message is
        dropped when a node comes by it. False if a node has it, or if it has ended.
        """
        if self.get_state(task_id) in states.READY_STATES:
            return False
        if Scripts(self.client).settle(task_id, reason) == "running":
            return False
        super().mark_as_revoked(task_id, reason, None, True)
        return True

    def write_down(self, task_ids: Sequence[str]) -> int:
        """In a worker: have those of these outcomes written that Redis alone knows. How many."""
        places = self.index.find_many(task_ids)
        undone = [
            task_id
            for task_id, placed in zip(task_ids, places, strict=True)
            if placed is not None and placed.segment == 0
        ]
        if not undone or _record is None:
            return 0
        names = [self.get_key_for_task(task_id) for task_id in undone]
        for task_id, name, meta in zip(undone, names, self.client.mget(names), strict=True):
            if meta is not None:
                state = str(self.decode_result(meta)["status"])
                expires = float(self.expires or 0)
                _record(Outcome(task_id, state, name.decode(), meta, expires, is_elsewhere(meta)))
        return len(undone)

    def announce(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The node's writer: decide and publish. What is to be written, which may be the outcome
        of an earlier run whose node died before it had written it.
        """
        standing = self._announce(outcomes, self._hot)
        with suppress(redis.RedisError, OSError):
            self.index.ahead.open()
        return standing

    def announce_ahead(self, outcome: Outcome) -> Callable[[], list[Outcome]] | None:
        """The same for one, without waiting: what is returned says what is to be written, or raises
        what `announce` may be tried after. None: nothing was sent.
        """
        if outcome.wants_file:
            return None
        heard = self.index.announce_ahead(_announcement(outcome), self._hot)
        return None if heard is None else lambda: self._to_write([outcome], heard())

    @cached_property
    def _hot(self) -> float:
        return float(self.app.conf.get("cohort_results_in_redis") or 300)

    def _announce(self, outcomes: Sequence[Outcome], seconds: float) -> list[Outcome]:
        standings = self.index.announce([_announcement(o) for o in outcomes], seconds)
        return self._to_write(outcomes, standings)

    def _to_write(
        self, outcomes: Sequence[Outcome], standings: Sequence[Standing]
    ) -> list[Outcome]:
        to_write = []
        for outcome, standing in zip(outcomes, standings, strict=True):
            if standing.word == "announced":
                to_write.append(outcome)
            elif standing.word == "adopt":
                to_write.append(self._adopted(outcome, standing.meta))
        return to_write

    def _adopted(self, ours: Outcome, meta: bytes) -> Outcome:
        state = str(self.decode_result(meta)["status"])
        reference = is_elsewhere(meta)
        return Outcome(ours.task_id, state, ours.name, meta, ours.expires, reference)

    def place(self, outcomes: Sequence[Outcome], places: Sequence[Place]) -> None:
        """The node's writer: these are on disk now."""
        if outcomes:
            self.index.place(
                places[0].segment,
                [
                    (o.task_id, place.offset, place.length, o.state, _seconds(o.ends_at_ms))
                    for o, place in zip(outcomes, places, strict=True)
                ],
            )

    # Reading.

    def get(self, key: bytes) -> Any:
        """What Celery keeps under a key: from Redis, or from where the index says that it lies."""
        task_id = self._task_of(key)
        if task_id is None:
            return self.client.get(key)
        own = _stored_here(key)
        if own is not None:
            return own
        held, entry = self.index.look(key, task_id)
        return held if held is not None or entry is None else self._read(task_id, entry)

    def mget(self, keys: Sequence[bytes]) -> list[Any]:
        """The same for many, in two round trips at most."""
        values = self.client.mget(keys)
        if _collector.outcomes:
            values = [_stored_here(key) or value for key, value in zip(keys, values, strict=True)]
        missing = [
            (at, task_id)
            for at, (key, value) in enumerate(zip(keys, values, strict=True))
            if value is None and (task_id := self._task_of(key)) is not None
        ]
        found = self.index.find_many([task_id for _, task_id in missing])
        for (at, task_id), entry in zip(missing, found, strict=True):
            if entry is not None:
                values[at] = self._read(task_id, entry)
        return list(values)

    def decode_result(self, payload: Any) -> Any:
        """What was pushed or read; a large outcome is fetched from its file."""
        elsewhere = is_elsewhere(payload) if isinstance(payload, bytes) else None
        if elsewhere is None:
            return super().decode_result(payload)
        if self.root is None:
            raise needs_root("that was waited for")
        meta = meta_of(self.root, *elsewhere, super().decode_result, self._encoded)
        if meta is None:
            raise Unavailable("a large outcome was dropped from the shared folder: it has expired")
        return super().decode_result(meta)

    def _task_of(self, key: bytes | str) -> str | None:
        name = key.encode() if isinstance(key, str) else key
        prefix = self.task_keyprefix
        return name[len(prefix) :].decode() if name.startswith(prefix) else None

    def _read(self, task_id: str, placed: Placed) -> bytes | None:
        """What the index points at; None when it isn't on disk (yet, or any more)."""
        if placed.segment == 0:
            return None
        if self.root is None:
            raise needs_root(task_id)
        segment = self.index.segment(placed.segment)
        for again in (True, False):
            try:
                meta = self._read_at(self.root, task_id, segment, placed)
            except Damaged:
                if not again:
                    raise
                meta = None
            if meta is not None or not again:
                return meta
            # Numbers begin anew when Redis was emptied; then this is another segment's.
            fresh = self.index.find(task_id)
            if fresh is None or fresh.segment == 0:
                return None
            placed, segment = fresh, self.index.segment(fresh.segment, again=True)
        return None

    def _read_at(
        self, root: Path, task_id: str, segment: str | None, placed: Placed
    ) -> bytes | None:
        if segment is None:
            return None
        entry = read_at(root, Place(segment, placed.offset, placed.length))
        if entry is None or entry.id != task_id:
            return None
        return meta_of(root, entry.kind, entry.payload, super().decode_result, self._encoded)

    def _forget(self, task_id: str) -> None:
        super()._forget(task_id)
        self.index.forget(task_id)

    # Waiting.

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Celery subscribes here, before it is known that anybody will wait."""

    def add_pending_result(
        self, result: Any, weak: bool | None = None, start_drainer: bool = True
    ) -> Any:
        """Wait for a result. `get` (which names no `weak`) looks first: mostly it is there, unless
        it was submitted just now.
        """
        since = time.monotonic() - getattr(result, "submitted", 0.0)
        if weak is None and result._cache is None and since > _JUST_NOW:
            meta = self.get_task_meta(result.id)
            if meta["status"] in states.READY_STATES:
                result._maybe_set_cache(meta)
                return result
        return super().add_pending_result(result, weak=bool(weak), start_drainer=start_drainer)

    def _wait_for_pending(
        self,
        result: Any,
        timeout: float | None = None,
        on_interval: Callable[[], object] | None = None,
        on_message: Any = None,
        **kwargs: Any,
    ) -> Any:
        if isinstance(result, AsyncResult) and result._cache is not None:
            return ()  # `add_pending_result` has found its outcome: there's nothing to wait for.
        return super()._wait_for_pending(
            result,
            timeout=timeout,
            on_interval=None if on_interval is None else seldom(on_interval),
            on_message=on_message,
            **kwargs,
        )


def _announcement(outcome: Outcome) -> Announcement:
    final = (outcome.state, _seconds(outcome.ends_at_ms)) if outcome.is_final else None
    return Announcement(outcome.task_id, outcome.name, outcome.pushed, final)


def _seconds(ms: int) -> int:
    return math.ceil(ms / 1000)


__all__ = ["Outcome", "SharedResults", "check_size", "collected_outcomes", "committed_as"]
