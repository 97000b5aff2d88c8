"""How a client waits for outcomes: pushed by Redis, never by asking again and again.

Celery's own consumer of published states, with three things added: what Redis no longer holds is
read from the shared folder when the connection comes back; a Redis that was emptied tells its
clients when it has been refilled; and looking after a group's parents costs a bounded share of
the time.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from celery.backends.redis import ResultConsumer

from broker import keys

_SHARE = 20
"""Of the time spent waiting, at most one part in so many goes to looking after parents."""
_LEAST_PAUSE = 0.5
_LAST_WORD = 5.0
"""Seconds to wait for a server to say that it has heard of our subscriptions."""


class OutcomeConsumer(ResultConsumer):  # type: ignore[misc]
    """One process's subscriptions."""

    on_message: Any

    def start(self, initial_task_id: str, **kwargs: Any) -> None:
        """Begin to listen."""
        super().start(initial_task_id, **kwargs)
        self._listen_for_refill()

    def _reconnect_pubsub(self) -> None:
        super()._reconnect_pubsub()
        self._listen_for_refill()
        # Only now: what is announced from here on is pushed.
        self._be_heard(_LAST_WORD)
        self.look_again()

    def _wait_for_pending(
        self, result: Any, timeout: float | None = None, on_message: Any = None, **kwargs: Any
    ) -> Any:
        # Celery looks first. It sees all of which we wouldn't be told, if that comes after this.
        before, self.on_message = self.on_message, on_message
        try:
            with self._locked(), self.reconnect_on_error():
                self._be_heard(_LAST_WORD if timeout is None else min(timeout, _LAST_WORD))
        finally:
            self.on_message = before
        return super()._wait_for_pending(result, timeout=timeout, on_message=on_message, **kwargs)

    def _be_heard(self, patience: float) -> None:
        """Wait until the server has seen all that was sent on the connection of subscriptions.

        We look on another connection. What is announced after that look and before a subscription
        has arrived would be neither seen nor pushed, and who waits would wait for ever.
        """
        with self._locked():
            if self._pubsub is None or not self._pubsub.subscribed:
                return
            word, ends = uuid.uuid4().hex, time.monotonic() + patience
            self._pubsub.ping(word)
            while (left := ends - time.monotonic()) > 0:
                message = self._pubsub.get_message(timeout=left)
                if message is None:
                    continue
                if message["type"] == "message":
                    self.on_state_change(self._decode_result(message["data"]), message)
                elif message["type"] == "pong" and message["data"] == word.encode():
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


def seldom(act: Callable[[], object]) -> Callable[[], None]:
    """Celery calls it after each message, and for a group it asks for every task that hasn't
    ended: n messages, n questions each. From here on it is called as often as it is cheap.
    """
    next_at = 0.0

    def act_if_due() -> None:
        nonlocal next_at
        begun = time.monotonic()
        if begun < next_at:
            return
        act()
        ended = time.monotonic()
        next_at = ended + max(_LEAST_PAUSE, _SHARE * (ended - begun))

    return act_if_due
