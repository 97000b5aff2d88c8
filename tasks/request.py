"""A job in a worker's main process: how it is handed to the pool and what becomes of it.

The child hands its outcomes back with its result; the node writes them down before the claim is
acknowledged. An outcome that the node decides *for* a child (a time limit, a revocation) is
recorded only once the child is dead and the log has been read.
"""

from __future__ import annotations

import os
import pickle
import select
from typing import Any, Protocol
from weakref import ref

from billiard.exceptions import Terminated, WorkerLostError
from celery.app.trace import fast_trace_task
from celery.exceptions import Ignore, Reject, Retry, TaskRevokedError, TimeLimitExceeded
from celery.signals import task_revoked
from celery.utils.log import get_logger
from celery.utils.saferepr import saferepr
from celery.utils.serialization import create_exception_cls, get_pickleable_exception
from celery.worker.request import Request
from celery.worker.state import task_ready

from broker.producing import Put
from broker.retry import kept_retry
from broker.transport import current_claimant
from errors import DeadLettered
from storage.log import State
from tasks.attempt import GoesBack
from tasks.family import Child
from tasks.results import Outcome, collected_outcomes

logger = get_logger(__name__)


class Node(Protocol):
    """What a request needs of the node that it runs on."""

    def record(self, outcome: Outcome) -> None:
        """Write a final outcome down, then announce it."""

    def end(self, request: JobRequest) -> None:
        """It has ended and leaves no outcome."""

    def end_lost(self, request: JobRequest, error: BaseException) -> None:
        """Its child was lost: back goes the claim, unless the node knows of a reason to end it."""

    def conclude(self, request: JobRequest, state: State, error: BaseException) -> None:
        """Record a final outcome for a child, once it is dead and the log has been read."""

    def end_child(self, request: JobRequest) -> None:
        """Make sure that a child ends, in the background."""

    def end_cancelled(self, request: JobRequest) -> None:
        """The same; then its claim goes back, unless it came to an end of its own."""

    def leave_to_processes(self, request: JobRequest) -> None:
        """It needs another pool than this node's: let it wait for one."""

    def leave_at_once(self) -> None:
        """End this process without waiting for what runs; all of its claims go back."""


_node: Node | None = None


def run_on(node: Node | None) -> None:
    """From now on this process's requests belong to that node."""
    global _node
    _node = node


def has_processes(pool: Any) -> bool:
    """Whether a pool runs its jobs in processes that can be ended."""
    return "prefork" in type(pool).__module__


_ATOMIC = select.PIPE_BUF
"""Bytes that a pipe takes all at once or not at all."""


def in_one_write(result: Any) -> Any:
    """What the pool was just given goes to its process in one piece, if it is small. Celery writes
    its length and then the rest, and wakes the process twice.
    """
    payload = getattr(result, "_payload", None)  # Other pools have none.
    if payload is not None:
        header, body, size = payload
        if len(header) + size <= _ATOMIC:
            result._payload = memoryview(bytes(header) + bytes(body)), memoryview(b""), 0
    return result


Traced = tuple[int, Any, Any, list[Outcome], Put | None]


def trace_job(name: str, task_id: str, *args: Any, **kwargs: Any) -> Traced:
    """In the child: Celery's own tracer, with the final outcomes and the next try, if there is to
    be one, handed back beside its result.
    """
    with collected_outcomes() as outcomes, kept_retry(task_id) as kept:
        failed, value, runtime = fast_trace_task(name, task_id, *args, **kwargs)
    return failed, _readable(failed, value), runtime, outcomes, kept.put


def trace_early(*args: Any, **kwargs: Any) -> Traced:
    """The same for a task that is acknowledged when it begins: its retry has no claim to go with,
    and is sent.
    """
    with collected_outcomes() as outcomes:
        failed, value, runtime = fast_trace_task(*args, **kwargs)
    return failed, _readable(failed, value), runtime, outcomes, None


def _readable(failed: int, value: Any) -> Any:
    """What the main process can read. An exception that can be pickled may be none that comes out
    again, and Celery looks at those of failures only, not at why a task was rejected.
    """
    if not failed:
        return value
    try:
        pickle.loads(pickle.dumps(value))  # our own, a moment ago
    except Exception:
        error = getattr(value.exception, "exc", value.exception)
        if isinstance(error, Reject):
            value.exception = Reject(saferepr(error.reason), error.requeue)
        elif isinstance(error, Ignore):
            value.exception = Ignore(saferepr(error))
        else:
            value.exception = get_pickleable_exception(error)
        value.type = type(value.exception)
    return value


def _ends(failed: int, value: Any) -> bool:
    """Whether a task that has no outcome is over all the same, and won't be tried again."""
    if not failed:
        return True
    error = getattr(value.exception, "exc", value.exception)
    return not isinstance(error, (Retry, GoesBack)) and not (
        isinstance(error, Reject) and error.requeue
    )


class JobRequest(Request):  # type: ignore[misc]
    """Celery's request, whose outcomes go through the node's writer."""

    child: Child | None = None
    has_returned = False
    """Whether the child has come to an end of its own: it may run another job by now."""
    took: float | None = None
    """Seconds, if its process has measured them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Celery specialises these two in a subclass of its own, for speed; ours must win.
        super().__init_subclass__(**kwargs)
        for name in ("execute_using_pool", "on_success"):
            if name in cls.__dict__:
                delattr(cls, name)

    @property
    def claim_id(self) -> str:
        """Which claim delivered it."""
        return str(self.request_dict.get("cohort_claim") or "")

    @property
    def key(self) -> str | None:
        """The key of its directory and log, or None: a key that is only a lock concerns Redis."""
        definition = getattr(self.task, "definition", None)
        if definition is not None and not definition.directory:
            return None
        return (self.request_dict.get("cohort") or {}).get("key") or None

    @property
    def settled(self) -> str:
        """Why it has an outcome without having run, or nothing."""
        return str(self.request_dict.get("cohort_settled") or "")

    def revoked(self) -> bool:
        """Whether it isn't to be run; then it has its outcome."""
        if self.settled and not self._already_revoked:
            self._announce_revoked(self.settled, False, None, False)
            return True
        return bool(super().revoked())

    @property
    def attempt(self) -> int:
        """1 for the first try."""
        retries = self.request_dict.get("retries") or 0
        return 1 + retries + (self.request_dict.get("cohort_lost") or 0)

    @property
    def needs_a_process(self) -> bool:
        """Whether it may have to be ended: only the prefork pool can do that."""
        definition = getattr(self.task, "definition", None)
        return definition is not None and bool(
            self.key or definition.memory_limit or self._has_time_limit
        )

    @property
    def _has_time_limit(self) -> bool:
        task = self.task
        return bool(any(self.time_limits) or task.soft_time_limit or task.time_limit)

    @property
    def context(self) -> Any:
        """The task's context, as the result backend wants it."""
        return self._context

    @property
    def may_share(self) -> bool:
        """Whether it may be handed to a process together with others: nobody ends it by itself."""
        return bool(self.claim_id) and not (
            self.needs_a_process or self._has_time_limit or self._is_followed
        )

    @property
    def _is_followed(self) -> bool:
        """Whether it sends on what comes after it: that mustn't end before this one is known."""
        try:
            _, _, embed = self._payload
        except Exception:
            return True  # Its process says what is wrong with it.
        return bool(embed.get("chain") or embed.get("callbacks"))

    def check(self) -> None:
        """Raises `TaskRevokedError` if it isn't to be run here."""
        claimant = current_claimant()
        if self.claim_id and claimant is not None and not claimant.knows(self.claim_id):
            # It was given back before its turn came, or is another's since the lease was lost.
            claimant.forget(self.claim_id)
            raise TaskRevokedError(self.id)
        if self.revoked():
            raise TaskRevokedError(self.id)

    def execute_using_pool(self, pool: Any, **kwargs: Any) -> Any:
        """Hand it to the pool, if it is to be run here."""
        self.check()
        if _node is not None and not has_processes(pool) and self.needs_a_process:
            _node.leave_to_processes(self)
            return None
        return self.hand_to(pool)

    @property
    def pool_arguments(self) -> tuple[Any, ...]:
        """What its process needs to run it: the arguments of `trace_job`."""
        return (
            self.type,
            self.id,
            self.request_dict,
            self.body,
            self.content_type,
            self.content_encoding,
        )

    def hand_to(self, pool: Any) -> Any:
        """Give it to a process of the pool."""
        hard, soft = self.time_limits
        result = in_one_write(
            pool.apply_async(
                trace_job if self.task.acks_late else trace_early,
                args=self.pool_arguments,
                accept_callback=self.on_accepted,
                timeout_callback=self.on_timeout,
                callback=self.on_success,
                error_callback=self.on_failure,
                soft_timeout=soft or self.task.soft_time_limit,
                timeout=hard or self.task.time_limit,
                correlation_id=self.id,
            )
        )
        self._apply_result = None if result is None else ref(result)
        return result

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """The pool runs it."""
        claimant = current_claimant()
        if claimant is not None:
            claimant.begin(self.claim_id)
            if not self.task.acks_late:
                claimant.acknowledged_early(self.claim_id)
        if pid != os.getpid() and self.child is None:
            self.child = Child(pid)
        super().on_accepted(pid, time_accepted)

    def on_success(self, returned: Traced, **kwargs: Any) -> None:
        """The child has come to an end of its own: success, failure or retry."""
        failed, value, runtime, outcomes, retry = returned
        self.has_returned = True
        self._end_with(failed, value, retry)
        if _node is not None:
            for outcome in outcomes:
                _node.record(outcome)
            if not outcomes and _ends(failed, value):
                _node.end(self)
        super().on_success((failed, value, runtime), **kwargs)
        # Celery acknowledges at the loop's next turn; the next job needn't wait for that.
        self._leave_room()

    def _leave_room(self) -> None:
        claimant = current_claimant()
        if claimant is not None:
            claimant.ended(self.claim_id, self.took)

    def _end_with(self, failed: int, value: Any, retry: Put | None) -> None:
        claimant = current_claimant()
        if claimant is None:
            return
        error = getattr(value.exception, "exc", value.exception) if failed else None
        if retry is not None:
            claimant.ends_as(self.claim_id, retry)
        elif isinstance(error, DeadLettered):
            claimant.ends_as(self.claim_id, str(error))

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """A time limit has passed."""
        if not soft and self.child is not None:
            self.child.kill()
        if soft or self.key is None or _node is None:
            super().on_timeout(soft, timeout)
            if not soft and _node is not None:
                _node.end_child(self)
            return
        logger.error("Hard time limit (%ss) exceeded for %s[%s]", timeout, self.name, self.id)
        self.settle()
        _node.conclude(self, "FAILURE", TimeLimitExceeded(timeout))

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> None:
        """The child failed, or was lost."""
        self._leave_room()
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            error = self._worker_lost_info(error).exception
        # Billiard marks the process: it may have been another job that was to be terminated.
        stray = isinstance(error, Terminated) and not (
            self._already_revoked or self._already_cancelled
        )
        if (stray or isinstance(error, WorkerLostError)) and _node is not None:
            if not self.acknowledged:
                self.settle()
                _node.end_lost(self, error)
            elif not self.task.acks_late:
                super().on_failure(exc_info, send_failed_event, return_ok)
            return
        if isinstance(error, GoesBack):
            task_ready(self)
            self.reject(requeue=True)
            return
        if self.key is not None and (self.acknowledged or isinstance(error, TimeLimitExceeded)):
            return  # Its conclusion is on its way already, or `on_timeout` is called next.
        if isinstance(error, MemoryError):
            # Celery ends the worker for it, and then the next one that is given the job. It was the
            # child that had no memory.
            kind = type(error)
            exc_info.exception = create_exception_cls(kind.__name__, kind.__module__)(*error.args)
        super().on_failure(exc_info, send_failed_event, return_ok)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A cold shutdown, a lost lease, or a lost connection if Celery is told so: it runs again
        elsewhere, unless it ends in its grace.
        """
        if _node is None:
            super().cancel(pool, signal, emit_retry)
        elif has_processes(pool):
            super().cancel(pool, signal, emit_retry)
            # A run makes of SIGTERM a request to end, and may not listen.
            _node.end_cancelled(self)
        else:
            _node.leave_at_once()

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        # One that never had its lock has no place in the log: its record would fence who has it.
        if self.key is None or self.settled or _node is None:
            super()._announce_revoked(reason, terminated, signum, expired)
            if terminated and _node is not None:
                _node.end_child(self)
            return
        if self.acknowledged:
            return
        self.settle()
        self._already_revoked = True
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
        _node.conclude(self, "REVOKED", TaskRevokedError(reason))
        task_revoked.send(
            sender=self.task,
            request=self._context,
            terminated=terminated,
            signum=signum,
            expired=expired,
        )

    def settle(self) -> None:
        """The pool is done with it; what becomes of its claim is the node's affair now."""
        task_ready(self)
        self.acknowledged = True
        self.message.channel.qos.release(self.claim_id)
