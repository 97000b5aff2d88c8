"""What a run starts is enclosed: it counts as the run's, and ends with it.

In a process of the prefork pool, for the time of a job's function. Afterwards nothing that the
function started is alive: no straggler writes into a directory that is being committed or that is
the next run's, and none takes memory that the node has promised to another. Plain Celery tasks
are left alone, and so is what they leave running.

Where the node has a control group to itself (tasks/groups.py), a run with a limit of memory gets
one of its own, and the kernel holds the limit.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from billiard.process import current_process
from celery.signals import worker_process_init

from tasks.family import Relative, adopt_orphans, descendants, has_children
from tasks.groups import limited

RUN = "CHILD_OF_COHORT_RUN"
"""Holds the run's claim id, in what it starts: who finds it knows whose it is."""
GRACE = 1.0
"""Seconds between SIGTERM and SIGKILL for what a run left behind."""
_ROUNDS = 100

_groups: Path | None = None


def enclose_in(folder: Path | None) -> None:
    """Where this node's control groups are made; called before the pool is forked."""
    global _groups
    _groups = folder


@worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
def _lead_a_session(**_: object) -> None:
    if _is_pool_process():
        # A Ctrl-C in the worker's terminal is for its main process, which ends the jobs in order.
        with suppress(PermissionError):  # It leads one already.
            os.setsid()


def _is_pool_process() -> bool:
    # In the pools `solo` and `threads` the job runs in the main process, which has no index.
    return getattr(current_process(), "index", None) is not None


@contextmanager
def enclosed(claim_id: str, memory: int | None) -> Iterator[None]:
    """Everything that is started inside ends here, whatever comes of the run."""
    if not _is_pool_process():
        yield
        return
    # What a plain task of this process left running isn't ours.
    others = _below() if has_children() else set()
    adopt_orphans(True)
    os.environ[RUN] = claim_id
    try:
        group: AbstractContextManager[None] = nullcontext()
        if memory is not None and _groups is not None:
            group = limited(_groups, claim_id, memory)
        with group:
            try:
                yield
            finally:
                if has_children():
                    _end_what_is_left(others)
    finally:
        del os.environ[RUN]
        adopt_orphans(False)


def _below() -> set[tuple[int, int]]:
    return {_identity(process) for process in descendants(os.getpid())}


def _identity(process: Relative) -> tuple[int, int]:
    return process.pid, process.began


def _end_what_is_left(others: set[tuple[int, int]]) -> None:
    try:
        _end_all_but(others, GRACE)
    except BaseException:
        # The soft time limit comes as an exception, wherever this process is.
        _end_all_but(others, 0.0)
        raise


def _end_all_but(others: set[tuple[int, int]], grace: float) -> None:
    """SIGTERM, a moment, SIGKILL; and nobody stays behind as a zombie of this process."""
    deadline = time.monotonic() + grace
    told: set[tuple[int, int]] = set()
    for _ in range(_ROUNDS):
        left = [process for process in descendants(os.getpid()) if _identity(process) not in others]
        for process in left:
            if not process.lives:
                with suppress(ChildProcessError):  # Its own parent's, which goes as well.
                    os.waitpid(process.pid, os.WNOHANG)
        alive = [process for process in left if process.lives]
        if not left:
            return
        for process in alive:
            number = signal.SIGKILL
            if time.monotonic() < deadline:
                if _identity(process) in told:
                    continue
                told.add(_identity(process))
                number = signal.SIGTERM
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, number)
        if alive:
            _wait_for(alive[0].pid, deadline)


def _wait_for(pid: int, deadline: float) -> None:
    """Its death, the end of the grace, or a moment after that."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            poll.poll(max(10.0, (deadline - time.monotonic()) * 1000))
        finally:
            os.close(descriptor)
