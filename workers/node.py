"""What this node does for the requests that it runs: it writes their outcomes, and decides for
children that can't any more. Implements `tasks.request.Node`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import redis
from celery import states
from celery.concurrency.prefork import _run_ready_callbacks
from celery.platforms import EX_FAILURE
from celery.utils.log import get_logger
from celery.worker import state as worker_state

from broker.claimant import Claimant
from broker.claims import Claimed
from broker.needs import Needs
from errors import CohortError
from storage.directory import conclude_for, conclusion_of
from storage.log import Record, State
from storage.worktree import WorkTree
from tasks.bundle import Trays
from tasks.family import Child
from tasks.job import PREFORK
from tasks.request import JobRequest, has_processes
from tasks.results import Outcome, committed_as
from tasks.settings import Settings
from workers.essential import essential_thread
from workers.limits import Limits, running_requests
from workers.writer import Writer

logger = get_logger(__name__)

_PAUSE = 1.0
_A_MOMENT = 0.5
"""Seconds after which a claim that waits for its turn goes back."""
_LONG = 0.05
"""Seconds after which jobs that share a process do so no longer."""


class WorkerNode:
    """One worker's main process, for as long as it lives."""

    def __init__(
        self,
        settings: Settings,
        root: Path,
        writer: Writer,
        claimant: Claimant,
        limits: Limits,
        trays: Trays,
        leave: Callable[[], object],
        loop: Any = None,
    ) -> None:
        """`leave` ends the lease and gives every claim back. `loop` is the worker's event loop; of
        the one that kombu tells of, nothing is left after a lost connection.
        """
        self._settings = settings
        self._root = root
        self._writer = writer
        self._claimant = claimant
        self._limits = limits
        self._trays = trays
        self._leave = leave
        self._loop = loop
        self._left: set[str] = set()
        self._stopped = threading.Event()
        self._has_loop = True

    def record(self, outcome: Outcome) -> None:
        """Write a final outcome down, then announce it."""
        self._writer.record(outcome)

    def end(self, request: JobRequest) -> None:
        """It has ended and leaves no outcome."""
        self._writer.end(request.claim_id)

    def end_lost(self, request: JobRequest, error: BaseException) -> None:
        """Its child was lost: back goes the claim, unless the node knows of a reason to end it."""
        self._aside(self._end_lost, request, error)

    def conclude(self, request: JobRequest, state: State, error: BaseException) -> None:
        """Record a final outcome for a child, once it is dead and the log has been read."""
        self._aside(self._conclude, request, state, error)

    def end_child(self, request: JobRequest) -> None:
        """Make sure that a child ends, in the background."""
        self._aside(self._end_child, request)

    def end_cancelled(self, request: JobRequest) -> None:
        """The same; then its claim goes back, unless it came to an end of its own."""
        self._aside(self._end_cancelled, request)

    def leave_to_processes(self, request: JobRequest) -> None:
        """It needs another pool than this node's: let it wait for one."""
        if request.name not in self._left:
            self._left.add(request.name)
            logger.warning(
                "%s[%s] waits for another node, and so does every other of its kind: a job with a "
                "key, a time limit or a memory limit needs a worker with --pool prefork",
                request.name,
                request.id,
            )
        claimed = self._claimant.claimed(request.claim_id)
        request.settle()
        if claimed is not None:
            self._aside(self._leave_to_processes, request, claimed)

    def leave_at_once(self) -> None:
        """End this process without waiting for what runs; all of its claims go back."""
        # Not here: a signal's handler may have interrupted who holds the locks.
        essential_thread("cohort-leave", self._leave_at_once).start()

    def stop(self) -> None:
        """Conclude nothing from now on; what is unsettled goes back with the lease."""
        self._stopped.set()

    def give_back(self, request: JobRequest) -> None:
        """It hasn't begun, and won't here."""
        request.settle()
        self._writer.give_back(request.claim_id, lost=False)

    def give_back_overdue(self) -> None:
        """What was claimed ahead for a moment and hasn't got its turn: others may have room."""
        for bundle in self._trays.late(_LONG):
            bundle.recall()
            self._in_loop(bundle.withdraw)
        overdue = set(self._claimant.overdue(_A_MOMENT))
        if not overdue:
            return
        for request in _reserved():
            if isinstance(request, JobRequest) and request.claim_id in overdue:
                if request.task.rate_limit:
                    continue  # Celery's own brake; it would be claimed again at once.
                if self._claimant.take_back(request.claim_id):
                    self.give_back(request)

    def give_back_unbegun(self) -> None:
        """Nothing begins here any more: what hasn't is for others."""
        self._has_loop = False
        for claim_id in self._claimant.overdue(0.0):
            if self._claimant.take_back(claim_id):
                self._writer.give_back(claim_id, lost=False)

    def stop_keyless(self, pool: Any) -> None:
        """The lease can't be trusted: end what has no log to fence it. It runs again elsewhere."""
        if not has_processes(pool):
            # A thread can't be ended. It runs on, and who else runs it may be first.
            return
        for request in running_requests():
            # One that was acknowledged as it began runs nowhere else: ended, it would be lost.
            if request.key is None and request.task.acks_late:
                logger.error("%s[%s]: stopped, the lease is lost", request.name, request.id)
                request.cancel(pool, signal="KILL", emit_retry=False)
                # Should the lease live on after all, the next renewal doesn't name its claim, and
                # it goes back. Named, it would be held for ever: nobody is left to end it.
                request.settle()
                self._claimant.forget(request.claim_id)

    def _in_loop(self, act: Callable[[], None]) -> None:
        """Where a request's end is otherwise told, for as long as the worker's loop turns."""
        if self._has_loop and self._loop is not None:
            self._loop.call_soon(act)
        else:
            act()

    def _aside(self, act: Callable[..., None], request: JobRequest, *arguments: Any) -> None:
        def run() -> None:
            act(request, *arguments)
            self._limits.forget(request)

        # Waiting for a death and reading the shared folder have no place in the event loop.
        essential_thread("cohort-conclude", run).start()

    def _leave_to_processes(self, request: JobRequest, claimed: Claimed) -> None:
        # Its limit came with this one submission: its producer didn't say what that needs.
        needs = Needs.parse(claimed.needs)
        needs = replace(needs, labels=needs.labels | {PREFORK})
        try:
            self._claimant.scripts.requalify(
                self._claimant.member,
                claimed.claim_id,
                claimed.queue,
                claimed.key,
                None,
                needs=needs.text,
                fits=False,
            )
        except (redis.RedisError, OSError) as error:
            logger.warning("%s[%s] goes back: %s", request.name, request.id, error)
        self._writer.give_back(claimed.claim_id, lost=False)  # If it's still here.

    def _leave_at_once(self) -> None:
        # What has ended is acknowledged from the event loop, which a shutdown has stopped.
        if self._loop is not None:
            _run_ready_callbacks(self._loop)
        self._leave()
        logging.shutdown()
        os._exit(EX_FAILURE)

    def _end_child(self, request: JobRequest) -> None:
        child = request.child
        if child is not None and not self._is_done(request, child):
            logger.warning("%s[%s]: killed after its grace", request.name, request.id)
            child.kill()
            child.has_ended(self._settings.stop_grace)
        if child is not None:
            child.end_family(request.claim_id)
        if request.key is not None:
            WorkTree(self._settings.scratch, request.key, request.claim_id).remove()

    def _end_cancelled(self, request: JobRequest) -> None:
        self._end_child(request)
        if not request.has_returned:
            self._writer.give_back(request.claim_id, lost=False)

    def _is_done(self, request: JobRequest, child: Child) -> bool:
        """Wait for the child's end, or until it has come to an end of this job of its own."""
        ends = time.monotonic() + self._settings.stop_grace
        while not request.has_returned:
            left = ends - time.monotonic()
            if child.has_ended(max(0.0, min(0.05, left))):
                return True
            if left <= 0:
                return False
        return True

    def _end_lost(self, request: JobRequest, error: BaseException) -> None:
        self._end_child(request)
        reason = self._limits.reason_of(request)
        if reason is None:
            logger.error("%s[%s]: %s; it goes back", request.name, request.id, error)
            self._writer.give_back(request.claim_id, lost=True)
        else:
            logger.error("%s[%s]: %s", request.name, request.id, reason)
            self._conclude(request, "FAILURE", reason)

    def _conclude(self, request: JobRequest, state: State, error: BaseException) -> None:
        self._end_child(request)
        backend = request.task.backend
        if request.key is not None:
            record = self._record_end(request, state, error)
            if record is None:
                return
            if record.claim_id != conclusion_of(request.claim_id) and request.expires is None:
                # The task had its outcome before: the child's own, or another claim's. The next
                # delivery tells it, and sends the links and chains that nobody may have sent. It
                # mustn't be revoked on its way: what has ended can't be.
                worker_state.revoked.discard(request.id)
                self._writer.give_back(request.claim_id, lost=False)
                return
            committed_as(record.task_id, record.key, record.n)
            state = record.state
            if state == states.SUCCESS:
                # It ended before it expired, and each delivery from now on would be too late.
                backend.mark_as_done(
                    request.id, record.result, request.context, store_result=request.store_errors
                )
                self._writer.finish(request.claim_id)
                return
        if state == states.REVOKED:
            backend.mark_as_revoked(
                request.id, str(error), request=request.context, store_result=request.store_errors
            )
            self._writer.finish(request.claim_id)
        else:
            backend.mark_as_failure(
                request.id, error, request=request.context, store_result=request.store_errors
            )
            request.send_event("task-failed", exception=repr(error), traceback="")
            self._writer.finish(request.claim_id)

    def _record_end(self, request: JobRequest, state: State, error: BaseException) -> Record | None:
        """The task's record, made here if its child made none; None if this node ends first."""
        assert request.key is not None
        while not self._stopped.is_set():
            try:
                return conclude_for(
                    self._root,
                    request.key,
                    request.id,
                    request.claim_id,
                    state,
                    request.task.backend.prepare_exception(error, serializer="json"),
                    attempt=request.attempt,
                    node=self._settings.node,
                )
            except CohortError as trouble:
                # Full or away: the claim stays ours, and with it the duty to record an end.
                logger.error("%s[%s]: can't record its end: %s", request.name, request.id, trouble)
                self._stopped.wait(_PAUSE)
        return None


def _reserved() -> list[Any]:
    while True:
        try:
            return list(worker_state.reserved_requests)
        except RuntimeError:
            continue  # The loop has changed it meanwhile.
