"""How a client waits for outcomes: pushed by Redis, never by asking again and again.

Celery's own consumer of published states, made for many: what a group's results are waited for is
subscribed in bounded batches, each once somebody waits, and looked at in as many round trips; so
waiting for n outcomes costs n. What Redis no longer holds is read from the shared folder when the
connection comes back; a Redis that was emptied tells its clients when it has been refilled; and
looking after a group's parents costs a bounded share of the time.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from celery import states
from celery.backends.asynchronous import _waiting_on, greenletDrainer
from celery.backends.redis import ResultConsumer
from celery.exceptions import TimeoutError as WaitedTooLong
from celery.result import AsyncResult, GroupResult

from broker import keys

_SHARE = 20
"""Of the time spent waiting, at most one part in so many goes to looking after parents."""
_LEAST_PAUSE = 0.5
_AT_ONCE = 500
"""Channels that one command subscribes, and outcomes that one looks for."""
_GLANCE = 1.0
_LAST_WORD = 5.0
"""Seconds to wait for a server to say that it has heard of our subscriptions."""


class OutcomeConsumer(ResultConsumer):  # type: ignore[misc]
    """One process's subscriptions.

    Results that are only attended to (a group's) are kept in `_unheard` until somebody waits, and
    then subscribed a window at a time: most have ended when their turn comes.
    """

    _pending_unsubscribe: set[Any]
    _pubsub: Any
    on_message: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unheard: dict[str, None] = {}
        self._heard = 0
        self._looked_at = 0.0
        self._unsure = False
        """Whether the server hasn't said in time that it has heard of us."""
        self._eager: list[None] = []
        """One for each wait that is for all that is unheard, as far as we know."""
        self._rests_until = 0.0

    def start(self, initial_task_id: str, **kwargs: Any) -> None:
        """Begin to listen."""
        self._listen_to([initial_task_id])

    def consume_from(self, task_id: str) -> None:
        """Listen for its outcome as soon as somebody waits for anything."""
        if self._get_key_for_task(task_id) not in self.subscribed_to:
            self._unheard[task_id] = None

    def cancel_for(self, task_id: str) -> None:
        """Listen no more."""
        self._unheard.pop(task_id, None)
        if self._get_key_for_task(task_id) in self.subscribed_to:
            super().cancel_for(task_id)

    def on_after_fork(self) -> None:
        """A child waits for nothing yet."""
        self._unheard = {}
        super().on_after_fork()

    def on_wait_for_pending(self, result: Any, **kwargs: Any) -> None:
        """Somebody waits: for one task, which is heard of first, or for many in their turn."""
        if isinstance(result, AsyncResult):
            self._unheard.pop(result.id, None)
            self._listen_to([result.id])
            super().on_wait_for_pending(result, **kwargs)
        else:
            self._hear()

    def drain_events(self, timeout: float | None = None) -> None:
        """Take what has been pushed; with nothing to take, wait for it."""
        eager = bool(self._eager)
        if self._unheard and (eager or time.monotonic() >= self._rests_until) and self._hear():
            return
        heard = self._heard
        super().drain_events(timeout)
        if eager and heard == self._heard and self._unheard:
            self._glance()

    def on_state_change(self, meta: Any, message: Any) -> None:
        """A task has changed its state."""
        if "task_id" not in meta:
            return  # What is looked up and has no state yet: Celery calls that one PENDING.
        self._heard += 1
        if self._shares_a_thread:
            super().on_state_change(meta, message)
            return
        # As Celery does it, without its `sleep(0)`, which lets greenlets run and costs a thread
        # 70 us: for each message, and for each turn of a wait.
        if self.on_message:
            self.on_message(meta)
        if meta["status"] in states.READY_STATES:
            task_id = meta["task_id"]
            waiters = _waiting_on(self._pending_results, task_id)
            for waiter in waiters:
                waiter._maybe_set_cache(meta)
                if (bucket := self.buckets.pop(waiter, None)) is not None:
                    bucket.append(waiter)
            if not waiters:
                self._pending_messages.put(task_id, meta)
            self.cancel_for(task_id)

    @property
    def _shares_a_thread(self) -> bool:
        """Whether others can go on only when this one lets them."""
        return isinstance(self.drainer, greenletDrainer)

    def _hear(self) -> int:
        """Subscribe to some of what is unheard. How many of them had ended."""
        # Looked at before: who has ended needn't be subscribed to; and after: or its end between
        # the look and the subscription would never be heard of.
        before, begun = self._heard, time.monotonic()
        while self._unheard and len(self.subscribed_to) <= _AT_ONCE:
            some = self._next_unheard()
            self._look_at(some)
            some = [task_id for task_id in some if self._unheard.pop(task_id, 0) is None]
            if some:
                self._listen_to(some)
                self._look_at(some)
        self._looked_at = time.monotonic()
        self._rests_until = self._looked_at + _SHARE * (self._looked_at - begun)
        return self._heard - before

    def _next_unheard(self) -> list[str]:
        # Copied in one step: the garbage collector may run `cancel_for` at any other moment.
        return list(self._unheard)[:_AT_ONCE]

    def _listen_to(self, task_ids: Iterable[str]) -> None:
        names = [self._get_key_for_task(task_id) for task_id in task_ids]
        with self._locked():
            if self._pubsub is None:
                self._pubsub = self.backend.client.pubsub(ignore_subscribe_messages=True)
                self._listen_for_refill()
            self._pending_unsubscribe.difference_update(names)
            names = [name for name in names if name not in self.subscribed_to]
            self.subscribed_to.update(names)
            if names:
                with self.reconnect_on_error():
                    self._pubsub.subscribe(*names)
                    self._be_heard(_LAST_WORD, names[-1])

    def _glance(self) -> None:
        """All that is listened to takes long: look at some that wait behind it, and send them to
        the end.
        """
        if time.monotonic() < self._looked_at + _GLANCE:
            return
        some = self._next_unheard()
        self._look_at(some)
        self._looked_at = time.monotonic()
        for task_id in some:
            if self._unheard.pop(task_id, 0) is None:
                self._unheard[task_id] = None

    def _look_at(self, task_ids: Iterable[str]) -> None:
        names = [self._get_key_for_task(task_id) for task_id in task_ids]
        for value in self.backend.mget(names) if names else ():
            if value is not None:
                meta = self._decode_result(value)
                if meta["status"] in states.READY_STATES:
                    self.on_state_change(meta, None)

    def _flush_pending_unsubscribe(self) -> None:
        """Unsubscribe many at a time. Never blocks, as it may run in the garbage collector."""
        if self._lock_depth.value or len(self._pending_unsubscribe) < _AT_ONCE // 4:
            return
        if not self._pubsub_lock.acquire(blocking=False):
            return  # Whoever holds it does this when done.
        self._lock_depth.value += 1
        try:
            ended, self._pending_unsubscribe = self._pending_unsubscribe, set()
            ended &= self.subscribed_to
            self.subscribed_to -= ended
            if ended and self._pubsub and not sys.is_finalizing():
                # A connection that is lost has no subscriptions: whoever waits connects anew.
                with suppress(*self._connection_errors):
                    self._pubsub.unsubscribe(*ended)
        finally:
            self._lock_depth.value -= 1
            self._pubsub_lock.release()

    def _reconnect_pubsub(self) -> None:
        super()._reconnect_pubsub()
        self._listen_for_refill()
        # Only now: what is announced from here on is pushed.
        self._be_heard(_LAST_WORD)
        self.look_again()

    def _wait_for_pending(self, result: Any, on_message: Any = None, **kwargs: Any) -> Any:
        # Celery looks first, and it is while we look that the first word may come.
        before, self.on_message = self.on_message, on_message
        # Who waits for a chord or a chain waits for its last task only. What comes before that is
        # attended to as well, but 10,000 results of a header cost more than all the rest.
        is_last = isinstance(result, AsyncResult) and result.parent is not None
        eager = [] if is_last else [None]
        self._eager += eager
        try:
            if self._shares_a_thread:
                yield from super()._wait_for_pending(result, on_message=on_message, **kwargs)
            else:
                yield from self._wait(result, **kwargs)
        finally:
            del self._eager[: len(eager)]
            self.on_message = before

    def _wait(
        self,
        result: Any,
        timeout: float | None = None,
        on_interval: Callable[[], object] | None = None,
        **kwargs: Any,
    ) -> Any:
        self.on_wait_for_pending(result, timeout=timeout, **kwargs)
        try:
            yield from self.drain_events_until(
                result.on_ready, timeout=timeout, on_interval=on_interval
            )
        except TimeoutError:
            raise WaitedTooLong("The operation timed out.") from None

    def _be_heard(self, patience: float, last: Any = None) -> None:
        """Wait until the server has seen all that was sent on the connection of subscriptions; its
        word is its answer to the `last` of them, or else to a question.

        We look on another connection. What is announced after that look and before a subscription
        has arrived would be neither seen nor pushed, and who waits would wait for ever.
        """
        with self._locked():
            if self._pubsub is None or not self._pubsub.subscribed:
                return
            if last is None or self._unsure:  # An answer may be to what was asked before.
                last, kind = uuid.uuid4().hex.encode(), "pong"
                self._pubsub.ping(last)
            else:
                kind = "subscribe"
            self._unsure, ends = True, time.monotonic() + patience
            self._pubsub.ignore_subscribe_messages = False
            while (left := ends - time.monotonic()) > 0:
                message = self._pubsub.get_message(timeout=left)
                if message is None:
                    continue
                if message["type"] == "message":
                    self.on_state_change(self._decode_result(message["data"]), message)
                elif message["type"] == kind and last in (message["data"], message["channel"]):
                    self._unsure = False
                    break
            self._pubsub_read.notify_all()

    def _listen_for_refill(self) -> None:
        with self._locked():
            self._pubsub.subscribe(**{keys.REFILLED: lambda message: self.look_again()})

    def look_again(self) -> None:
        """Read the state of everything that is waited for."""
        waited_for = list(self.subscribed_to)
        for at in range(0, len(waited_for), 1000):
            for value in self.backend.mget(waited_for[at : at + 1000]):
                if value is not None:
                    self.on_state_change(self._decode_result(value), None)


class JobGroupResult(GroupResult):  # type: ignore[misc]
    """A group's results, that are looked at together."""

    def maybe_throw(self, callback: Any = None, propagate: bool = True) -> None:
        """Raise the error of one that has failed. Those that run are asked about many at a time."""
        self._look()
        for result in self.results:
            if not isinstance(result, AsyncResult) or result._cache is not None:
                result.maybe_throw(callback=callback, propagate=propagate)

    maybe_reraise = maybe_throw

    def _look(self) -> None:
        running = [r for r in self.results if isinstance(r, AsyncResult) and r._cache is None]
        backend = self.backend
        for at in range(0, len(running), _AT_ONCE):
            some = running[at : at + _AT_ONCE]
            values = backend.mget([backend.get_key_for_task(result.id) for result in some])
            for result, value in zip(some, values, strict=True):
                if value is not None:
                    result._maybe_set_cache(backend.decode_result(value))


def seldom(act: Callable[[], object]) -> Callable[[], None]:
    """Celery calls it after each message, and for a group it asks for every task that hasn't
    ended: n messages, n questions each. From here on it is called as often as it is cheap.
    """
    next_at = time.monotonic() + _LEAST_PAUSE  # Celery has just done it.

    def act_if_due() -> None:
        nonlocal next_at
        begun = time.monotonic()
        if begun < next_at:
            return
        act()
        ended = time.monotonic()
        next_at = ended + max(_LEAST_PAUSE, _SHARE * (ended - begun))

    return act_if_due
