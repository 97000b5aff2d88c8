"""Where outcomes go: Celery's Redis backend as the index, behind the node's segment on disk.

A final outcome travels child -> main process -> segment (fsync) -> index, and only then is the
claim acknowledged. States on the way (STARTED, RETRY, PROGRESS) go straight to the index. The
first final outcome of a task stands, decided in one script.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from celery import states
from celery.backends.redis import RedisBackend
from kombu.exceptions import EncodeError

from broker.scripts import Scripts

LARGEST_RESULT = 8 << 20
"""Bytes of an encoded outcome."""


@dataclass(frozen=True)
class Outcome:
    """One state of one task, encoded as Celery keeps it. `expires` in seconds, 0 for never."""

    task_id: str
    state: str
    name: str
    meta: bytes
    expires: float

    @property
    def ends_at_ms(self) -> int:
        """When it may be dropped, in ms since the epoch; 0 for never."""
        return int((time.time() + self.expires) * 1000) if self.expires else 0


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


@contextmanager
def collected_outcomes() -> Iterator[list[Outcome]]:
    """Keep the final outcomes that this thread stores, instead of announcing them."""
    outcomes: list[Outcome] = []
    _collector.outcomes = outcomes
    try:
        yield outcomes
    finally:
        _collector.outcomes = None


def record_with(record: Callable[[Outcome], object] | None) -> None:
    """In a worker's main process: who writes final outcomes down. None: nobody."""
    global _record
    _record = record


class SharedResults(RedisBackend):  # type: ignore[misc]
    """Celery's result backend on the shared file system, with its index in Redis."""

    @cached_property
    def _scripts(self) -> Scripts:
        return Scripts(self.client)

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
        encoded = self.encode(meta)
        if isinstance(encoded, str):
            encoded = encoded.encode()
        check_size(encoded)
        outcome = Outcome(
            task_id,
            state,
            # Celery's key, so that Celery's own client waits for it.
            self.get_key_for_task(task_id).decode(),
            encoded,
            float(self.expires or 0),
        )
        if state not in states.READY_STATES:
            self.announce(outcome)
        elif _collector.outcomes is not None:
            _collector.outcomes.append(outcome)
        elif _record is not None:
            _record(outcome)
        else:
            self.announce(outcome)
        return result

    def mark_as_revoked(
        self,
        task_id: str,
        reason: str = "",
        request: Any = None,
        store_result: bool = True,
        state: str = states.REVOKED,
    ) -> None:
        """Record a revocation, once the worker that has claimed the task says so.

        Celery's remote control says it without a request, on every worker at once, while the task
        may be about to commit on one of them: a second outcome. Who claims it will say it.
        """
        if request is not None:
            super().mark_as_revoked(task_id, reason, request, store_result, state)

    def announce(self, outcome: Outcome) -> None:
        """Put it into the index and tell who waits; a final outcome that stands there stays."""
        self._scripts.announce(outcome.name, outcome.meta, outcome.expires)
