"""A Celery app that submits many jobs at a time, where Celery sends them one by one.

Celery asks its app for one producer for a whole group or chord, and gives it to each of their
jobs. Here that producer keeps what is submitted through it, so that a script puts many at once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from celery import Celery

from broker.producing import A_SCRIPT, Put

if TYPE_CHECKING:
    from tasks.submitting import Submitter


class App(Celery):  # type: ignore[misc]
    """Celery's app, whose groups are submitted many at a time, and whose time costs little."""

    @cached_property
    def submitter(self) -> Submitter:
        """How this process submits."""
        from tasks.submitting import Submitter

        return Submitter(self)

    @cached_property
    def GroupResult(self) -> Any:
        """The class of a group's results."""
        return self.subclass_with_self(
            "tasks.waiting:JobGroupResult", name="GroupResult", reverse="GroupResult"
        )

    def now(self) -> datetime:
        """The time, in the app's zone. Celery asks dateutil about it: 5 us of each outcome."""
        return datetime.now(self.timezone)

    def producer_or_acquire(self, producer: Any = None) -> AbstractContextManager[Any]:
        """Celery asks for one producer a group: what is submitted through this one is gathered."""
        return Batch(self) if producer is None else self.celerys_producer(producer)

    def celerys_producer(self, producer: Any = None) -> AbstractContextManager[Any]:
        """Celery's own, from its pool of connections."""
        context: AbstractContextManager[Any] = super().producer_or_acquire(producer)
        return context


class Batch:
    """A producer that keeps what is submitted through it, and puts it in bounded steps.

    Ends its block in an error, it puts nothing more. What it isn't asked by us it leaves to a
    producer of Celery's, once what it has kept is sent.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._puts: list[Put] = []
        self._celerys: Any = None
        self._context: AbstractContextManager[Any] | None = None

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self.flush()
        finally:
            if self._context is not None:
                self._context.__exit__(*error)

    def add(self, one: Put) -> None:
        """Put it, now or with those that follow."""
        self._puts.append(one)
        if len(self._puts) >= A_SCRIPT:
            self.flush()

    def flush(self) -> None:
        """Put what was kept."""
        puts, self._puts = self._puts, []
        if puts:
            self._app.submitter.put(puts)

    def __getattr__(self, name: str) -> Any:
        self.flush()
        if self._celerys is None:
            self._context = self._app.celerys_producer()
            self._celerys = self._context.__enter__()
        return getattr(self._celerys, name)
