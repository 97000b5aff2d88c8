"""The main process's half of the way of a job: announce, outcomes to disk, acknowledge.

Two threads a node, one behind the other: one announces, the other writes. A single outcome is
announced by the thread that hears of it, which doesn't wait for the reply: the writer reads that.
What comes in within moments, or while it is writing, goes with the next write: one write and one
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

import redis
from celery.utils.log import get_logger

from broker.claimant import Claimant, End
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
_GATHER = 0.003
"""Seconds in which outcomes are gathered to be announced, if many come."""
_WRITTEN_AFTER = 0.005
"""Seconds in which they are gathered to be written. Who waits for them has been told."""
_APART = 0.001
"""Seconds after which an outcome isn't one of many."""
_A_FEW, _MANY = 4, 100
"""Orders, of which an outcome and the end of its claim are two."""


class Results(Protocol):
    """What a writer needs of the result backend."""

    def announce(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Decide and publish; what is to be written."""

    def announce_ahead(self, outcome: Outcome) -> Callable[[], list[Outcome]] | None:
        """The same for one, without waiting; what is returned says it, later and once. None:
        nothing was done.
        """

    def place(self, outcomes: Sequence[Outcome], places: Sequence[Place]) -> None:
        """Tell where they lie."""


@dataclass(frozen=True)
class _Finish:
    claim_id: str
    end: End = None


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


@dataclass(frozen=True)
class _Ended:
    claim_id: str


_Order = Outcome | _Finish | _GiveBack | _Ended


@dataclass
class _Decided:
    """Orders whose outcomes have been announced; `standing` is what has to be written for them."""

    orders: list[_Order]
    outcomes: list[Outcome]
    standing: list[Outcome]
    heard: Callable[[], list[Outcome]] | None = None
    """Says what is standing: it was announced ahead."""


@dataclass
class _Work:
    standing: list[Outcome]
    notes: list[Entry]
    places: list[Place] | None = None


T = TypeVar("T")


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
        self._decided: queue.SimpleQueue[_Decided | None] = queue.SimpleQueue()
        self._announcer = essential_thread("cohort-announcer", self._announce)
        self._thread = essential_thread("cohort-writer", self._write)
        self._impatient = threading.Event()
        self._guard = threading.RLock()  # A signal's handler may end jobs.
        self._on_their_way = 0
        """Orders that the announcer hasn't passed on yet: nothing may overtake them."""
        self._last_recorded = 0.0
        self._awaited: set[str] = set()
        self._unnoted: dict[str, _Begun] = {}
        self._noted: dict[str, str] = {}

    def start(self) -> None:
        """Begin to write."""
        self._announcer.start()
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Write what is there; False if that didn't work in time. The claims go back then."""
        self._orders.put(None)
        self._thread.join(timeout)
        self._impatient.set()
        return not self._thread.is_alive()

    def record(self, outcome: Outcome) -> None:
        """A final outcome: to who waits for it, and to disk."""
        now = time.monotonic()
        with self._guard:
            if not self._on_their_way and now > self._last_recorded + _APART:
                # Who waits for a single one needn't wait for threads to wake.
                heard = self._results.announce_ahead(outcome)
                if heard is not None:
                    self._decided.put(_Decided([outcome], [outcome], [], heard))
                    self._last_recorded = now
                    return
            self._last_recorded = now
        self._order(outcome)

    def _order(self, order: _Order) -> None:
        with self._guard:
            if self._on_their_way or isinstance(order, Outcome):
                self._on_their_way += 1
                self._orders.put(order)
            else:
                self._decided.put(_Decided([order], [], []))

    def finish(self, claim_id: str, end: End = None) -> None:
        """A claim has ended; what was recorded before it is on disk when it is acknowledged."""
        self._order(_Finish(claim_id, end))

    def give_back(self, claim_id: str, *, lost: bool) -> None:
        """A claim goes back to the front."""
        self._order(_GiveBack(claim_id, lost))

    def begin(
        self,
        claim_id: str,
        task_id: str,
        note: Callable[[], Entry],
        *,
        durable: bool,
        keyed: bool = False,
    ) -> None:
        """A claim was taken: to be noted if it runs for a while. Others may wait for its key."""
        if keyed:
            self._awaited.update((claim_id, task_id))
        if durable:
            self._noted[claim_id] = task_id  # Its producer has noted it.
        else:
            self._unnoted[claim_id] = _Begun(claim_id, task_id, note, time.monotonic())

    def end(self, claim_id: str) -> None:
        """A job has ended and leaves no outcome."""
        self._order(_Ended(claim_id))

    def _announce(self) -> None:
        is_last, gather = False, 0.0

        def how_long(first: _Order) -> float:
            return gather

        while not is_last:
            taken: tuple[list[_Order], bool] = _all_of(self._orders, None, how_long)
            orders, is_last = taken
            # A single one goes at once. When several came together, more are on their way; very
            # many gather by themselves while these are announced.
            gather = _GATHER if _A_FEW < len(orders) < _MANY else 0.0
            outcomes = [order for order in orders if isinstance(order, Outcome)]
            decided = _Decided(orders, outcomes, [])
            if outcomes:
                if not self._until_done("announce outcomes", self._decide, decided):
                    break
                reach("writer:after-announce")
            if orders:
                self._decided.put(decided)
            with self._guard:
                self._on_their_way -= len(orders)
        self._decided.put(None)

    def _write(self) -> None:
        is_last = False
        while not is_last:
            # It wakes by itself, too: a job that runs on is to be noted.
            batch, is_last = _all_of(self._decided, NOTED_AFTER / 4, self._gather)
            for decided in batch:
                if decided.heard is not None:
                    if not self._until_done("announce outcomes", self._hear, decided):
                        return
                    reach("writer:after-announce")
            orders = [order for decided in batch for order in decided.orders]
            work = _Work(
                [outcome for decided in batch for outcome in decided.standing], self._notes(orders)
            )
            if work.standing or work.notes:
                reach("writer:before-segment")
                if not self._until_done("write outcomes", self._record, work):
                    return  # Nothing is acknowledged from here on.
                reach("writer:after-segment")
            if not self._until_done("tell Redis", self._acknowledge, orders):
                return
            for order in orders:
                if not self._until_done("tell Redis", self._carry_out, order):
                    return

    def _notes(self, batch: Sequence[_Order]) -> list[Entry]:
        """What goes into the journal with this batch."""
        notes = []
        for order in batch:
            if isinstance(order, _Ended):
                task_id = self._noted.pop(order.claim_id, None)
                if task_id is not None:
                    expires_ms = int((time.time() + self._keep) * 1000)
                    notes.append(Entry("ended", task_id, expires_ms, b""))
            elif isinstance(order, (_Finish, _GiveBack)):
                begun = self._unnoted.pop(order.claim_id, None)
                task_id = self._noted.pop(order.claim_id, None) if begun is None else begun.task_id
                self._awaited.difference_update((order.claim_id, task_id or ""))
        due = time.monotonic() - NOTED_AFTER
        for begun in list(self._unnoted.values()):
            if begun.at > due:
                break
            del self._unnoted[begun.claim_id]
            if not self._is_here(begun.claim_id):
                continue  # It went back, or is another's.
            self._noted[begun.claim_id] = begun.task_id
            notes.append(begun.note())
        return notes

    def _is_here(self, claim_id: str) -> bool:
        # While the node joins again it knows of no claim for a moment; what it runs, it holds.
        return self._claimant.knows(claim_id) or self._claimant.claimed(claim_id) is not None

    def _gather(self, decided: _Decided) -> float:
        """For how long more may join it. The end of a key's claim is waited for, no other is; but
        so many at once are worth a write of their own, and may be all that there are.
        """
        if len(decided.orders) >= _MANY:
            return 0.0
        for order in decided.orders:
            if self._awaited:
                task_or_claim = order.task_id if isinstance(order, Outcome) else order.claim_id
                if task_or_claim in self._awaited:
                    return 0.0
        return _WRITTEN_AFTER

    def _hear(self, decided: _Decided) -> None:
        heard, decided.heard = decided.heard, None
        try:
            if heard is not None:
                decided.standing = heard()
                return
        except redis.RedisError:
            pass  # It may have been announced or not; said again, it is.
        self._decide(decided)

    def _decide(self, decided: _Decided) -> None:
        # What is too large to be pushed is pushed as a reference, which must lead somewhere.
        decided.outcomes = self._with_files(decided.outcomes, PUSHED_UP_TO)
        decided.standing = self._results.announce(decided.outcomes)

    def _record(self, work: _Work) -> None:
        """Each step is done once, however often the next one has to be tried."""
        if work.places is None:
            work.standing = self._with_files(work.standing, 0)
            entries = [outcome.entry() for outcome in work.standing]
            work.places = self._segment.append([*entries, *work.notes])
        self._results.place(work.standing, work.places[: len(work.standing)])

    def _with_files(self, outcomes: Sequence[Outcome], above: int) -> list[Outcome]:
        return [
            outcome.stored_in(self._segment.store_large(outcome.meta))
            if outcome.wants_file and len(outcome.meta) > above
            else outcome
            for outcome in outcomes
        ]

    def _acknowledge(self, orders: Sequence[_Order]) -> None:
        plain = [o.claim_id for o in orders if isinstance(o, _Finish) and o.end is None]
        if plain:
            self._finish(plain, None)

    def _carry_out(self, order: _Order) -> None:
        if isinstance(order, _GiveBack):
            self._claimant.give_back(order.claim_id, lost=order.lost)
        elif isinstance(order, _Finish) and order.end is not None:
            self._finish([order.claim_id], order.end)

    def _finish(self, claim_ids: Sequence[str], end: End) -> None:
        words = self._claimant.finish_now(claim_ids, end)
        for claim_id, word in zip(claim_ids, words, strict=True):
            if word == "superseded":
                logger.warning("claim %s had gone to another node already", claim_id)
        reach("writer:after-finish")

    def _until_done(self, what: str, act: Callable[[T], object], subject: T) -> bool:
        """Try until it works: a full disk or an absent Redis may delay an outcome, not lose it.

        False if the node leaves before that. Then its claims go back.
        """
        failures = 0
        while True:
            try:
                act(subject)
            except (CohortError, OSError, RuntimeError, redis.RedisError) as error:
                failures += 1
                if failures in (1, 10) or failures % 100 == 0:
                    logger.error("could not %s, trying on: %s", what, error)
                if self._impatient.wait(_PAUSE):
                    return False
            else:
                return True


def _all_of(
    orders: queue.SimpleQueue[T | None], patience: float | None, gather: Callable[[T], float]
) -> tuple[list[T], bool]:
    """What is there, and whether that is the last of it; waits for the first, at most so long, and
    then for more, as long as `gather` says of the first.
    """
    batch: list[T] = []
    with contextlib.suppress(queue.Empty):
        order = orders.get(timeout=patience)
        if order is not None and (seconds := gather(order)):
            time.sleep(seconds)
        while order is not None:
            batch.append(order)
            if len(batch) == _LARGEST_BATCH:
                return batch, False
            order = orders.get_nowait()
        return batch, True
    return batch, False
