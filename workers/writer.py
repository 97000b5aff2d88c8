"""The main process's half of the way of a job: outcomes to disk, then announce, then acknowledge.

One thread a node. What came in while it was writing goes with the next write: one write and one
fsync for all of it. Nothing is acknowledged whose outcome isn't on disk, however long that takes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from celery.utils.log import get_logger

from broker.claimant import Claimant
from crashpoints import reach
from errors import CohortError
from storage.segments import Entry, SegmentWriter
from tasks.results import Outcome
from workers.essential import essential_thread

logger = get_logger(__name__)

_PAUSE = 0.5


@dataclass(frozen=True)
class _Finish:
    claim_id: str


@dataclass(frozen=True)
class _GiveBack:
    claim_id: str
    lost: bool


T = TypeVar("T")
_Order = Outcome | _Finish | _GiveBack


class Writer:
    """Takes outcomes and the ends of claims, in the order in which they come."""

    def __init__(
        self,
        segment: SegmentWriter,
        claimant: Claimant,
        announce: Callable[[Outcome], object],
    ) -> None:
        self._segment = segment
        self._claimant = claimant
        self._announce = announce
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._thread = essential_thread("cohort-writer", self._run)
        self._impatient = threading.Event()

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
        """A final outcome: to disk, then to who waits for it."""
        self._orders.put(outcome)

    def finish(self, claim_id: str) -> None:
        """A claim has ended; what was recorded before it is on disk when it is acknowledged."""
        self._orders.put(_Finish(claim_id))

    def give_back(self, claim_id: str, *, lost: bool) -> None:
        """A claim goes back to the front."""
        self._orders.put(_GiveBack(claim_id, lost))

    def _run(self) -> None:
        while True:
            batch, is_last = self._next_batch()
            outcomes = [order for order in batch if isinstance(order, Outcome)]
            if outcomes:
                reach("writer:before-segment")
                self._until_done("write outcomes", self._append, outcomes)
                reach("writer:after-segment")
            for order in batch:
                self._until_done("tell Redis", self._carry_out, order)
            if is_last:
                return

    def _next_batch(self) -> tuple[list[_Order], bool]:
        batch: list[_Order] = []
        order = self._orders.get()
        while order is not None:
            batch.append(order)
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _append(self, outcomes: Sequence[Outcome]) -> None:
        self._segment.append(
            [
                Entry(
                    kind="outcome",
                    id=outcome.task_id,
                    expires_ms=outcome.ends_at_ms,
                    payload=outcome.meta,
                )
                for outcome in outcomes
            ]
        )

    def _carry_out(self, order: _Order) -> None:
        if isinstance(order, Outcome):
            self._announce(order)
        elif isinstance(order, _GiveBack):
            self._claimant.give_back(order.claim_id, lost=order.lost)
        else:
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
