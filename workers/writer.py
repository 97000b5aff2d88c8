"""The main process's half of the way of a job: announce, outcomes to disk, acknowledge.

One thread a node. What came in while it was writing goes with the next write: one write and one
fsync for all of it. Nothing is acknowledged whose outcome isn't on disk, however long that takes.

The journal goes the same way: a job that runs for longer than a moment is noted in the segment, so
that it can be found again when Redis has lost it and this node has died as well. A note causes no
write of its own unless nothing else is written for a second, and a job that has ended by then is
never noted: what can be lost is a job in its first second, unless it was submitted as durable.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from celery.utils.log import get_logger

from broker.claimant import Claimant
from crashpoints import reach
from errors import CohortError
from storage.segments import Entry, Place, SegmentWriter
from tasks.outcomes import PUSHED_UP_TO, Outcome
from workers.essential import essential_thread

logger = get_logger(__name__)

_PAUSE = 0.5
NOTED_AFTER = 1.0
"""Seconds after which a job that still runs is in the journal."""
_LARGEST_BATCH = 1000


class Results(Protocol):
    """What a writer needs of the result backend."""

    def announce(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Decide and publish; what is to be written."""

    def place(self, outcomes: Sequence[Outcome], places: Sequence[Place]) -> None:
        """Tell where they lie."""


@dataclass(frozen=True)
class _Finish:
    claim_id: str


@dataclass(frozen=True)
class _GiveBack:
    claim_id: str
    lost: bool


@dataclass(frozen=True)
class _Begun:
    claim_id: str
    task_id: str
    note: Callable[[], Entry]
    at: float
    durable: bool


@dataclass(frozen=True)
class _Ended:
    claim_id: str


@dataclass
class _Batch:
    outcomes: list[Outcome]
    notes: list[Entry]
    standing: list[Outcome] | None = None
    places: list[Place] | None = None


T = TypeVar("T")
_Order = Outcome | _Finish | _GiveBack | _Begun | _Ended


class Writer:
    """Takes outcomes and the ends of claims, in the order in which they come."""

    def __init__(
        self,
        segment: SegmentWriter,
        claimant: Claimant,
        results: Results,
        keep: float = 0.0,
    ) -> None:
        """`keep`: for how many seconds what it notes has to be there."""
        self._segment = segment
        self._claimant = claimant
        self._results = results
        self._keep = keep
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._thread = essential_thread("cohort-writer", self._run)
        self._impatient = threading.Event()
        self._unnoted: dict[str, _Begun] = {}
        self._noted: dict[str, str] = {}

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Write what is there; False if that didn't work in time. The claims go back then."""
        self._orders.put(None)
        self._thread.join(timeout)
        self._impatient.set()
        return not self._thread.is_alive()

    def record(self, outcome: Outcome) -> None:
        """A final outcome: to who waits for it, and to disk."""
        self._orders.put(outcome)

    def finish(self, claim_id: str) -> None:
        """A claim has ended; what was recorded before it is on disk when it is acknowledged."""
        self._orders.put(_Finish(claim_id))

    def give_back(self, claim_id: str, *, lost: bool) -> None:
        """A claim goes back to the front."""
        self._orders.put(_GiveBack(claim_id, lost))

    def begin(
        self, claim_id: str, task_id: str, note: Callable[[], Entry], *, durable: bool
    ) -> None:
        """A claim was taken: to be noted if it runs for a while."""
        self._orders.put(_Begun(claim_id, task_id, note, time.monotonic(), durable))

    def end(self, claim_id: str) -> None:
        """A job has ended and leaves no outcome."""
        self._orders.put(_Ended(claim_id))

    def _run(self) -> None:
        while True:
            batch, is_last = self._next_batch()
            outcomes = [order for order in batch if isinstance(order, Outcome)]
            notes = self._notes(batch)
            if outcomes or notes:
                reach("writer:before-segment")
                self._until_done("write outcomes", self._record, _Batch(outcomes, notes))
                reach("writer:after-segment")
            for order in batch:
                self._until_done("tell Redis", self._carry_out, order)
            if is_last:
                return

    def _next_batch(self) -> tuple[list[_Order], bool]:
        batch: list[_Order] = []
        with contextlib.suppress(queue.Empty):
            order = self._orders.get(timeout=self._patience())
            while order is not None:
                batch.append(order)
                if len(batch) == _LARGEST_BATCH:
                    return batch, False
                order = self._orders.get_nowait()
            return batch, True
        return batch, False

    def _patience(self) -> float | None:
        """Until the first note is due."""
        first = next(iter(self._unnoted.values()), None)
        return None if first is None else max(0.0, first.at + NOTED_AFTER - time.monotonic())

    def _notes(self, batch: Sequence[_Order]) -> list[Entry]:
        """What goes into the journal with this batch."""
        notes = []
        for order in batch:
            if isinstance(order, _Begun):
                if order.durable:
                    self._noted[order.claim_id] = order.task_id  # Its producer has noted it.
                else:
                    self._unnoted[order.claim_id] = order
            elif isinstance(order, _Ended):
                task_id = self._noted.pop(order.claim_id, None)
                if task_id is not None:
                    expires_ms = int((time.time() + self._keep) * 1000)
                    notes.append(Entry("ended", task_id, expires_ms, b""))
            elif isinstance(order, (_Finish, _GiveBack)):
                self._unnoted.pop(order.claim_id, None)
                self._noted.pop(order.claim_id, None)
        due = time.monotonic() - NOTED_AFTER
        for begun in list(self._unnoted.values()):
            if begun.at > due:
                break
            del self._unnoted[begun.claim_id]
            self._noted[begun.claim_id] = begun.task_id
            notes.append(begun.note())
        return notes

    def _record(self, batch: _Batch) -> None:
        """Each step is done once, however often the next one has to be tried."""
        if batch.standing is None:
            # What is too large to be pushed is pushed as a reference, which must lead somewhere.
            batch.outcomes = self._with_files(batch.outcomes, PUSHED_UP_TO)
            batch.standing = self._results.announce(batch.outcomes) if batch.outcomes else []
            reach("writer:after-announce")
        if batch.places is None:
            batch.standing = self._with_files(batch.standing, 0)
            entries = [outcome.entry() for outcome in batch.standing]
            batch.places = self._segment.append([*entries, *batch.notes])
        self._results.place(batch.standing, batch.places[: len(batch.standing)])

    def _with_files(self, outcomes: Sequence[Outcome], above: int) -> list[Outcome]:
        return [
            outcome.stored_in(self._segment.store_large(outcome.meta))
            if outcome.wants_file and len(outcome.meta) > above
            else outcome
            for outcome in outcomes
        ]

    def _carry_out(self, order: _Order) -> None:
        if isinstance(order, _GiveBack):
            self._claimant.give_back(order.claim_id, lost=order.lost)
        elif isinstance(order, _Finish):
            if self._claimant.finish_now(order.claim_id) == "superseded":
                logger.warning("claim %s had gone to another node already", order.claim_id)
            reach("writer:after-finish")

    def _until_done(self, what: str, act: Callable[[T], object], subject: T) -> None:
        """Try until it works: a full disk or an absent Redis may delay an outcome, not lose it."""
        failures = 0
        while True:
            try:
                act(subject)
            except (CohortError, OSError, RuntimeError, ConnectionError) as error:
                failures += 1
                if failures in (1, 10) or failures % 100 == 0:
                    logger.error("could not %s, trying on: %s", what, error)
                if self._impatient.is_set():
                    return
                time.sleep(_PAUSE)
            else:
                return
