"""Jobs that take more memory than they may are ended, and their outcomes say so.

Where this node may make control groups, the kernel holds the limit (tasks/groups.py); here is read
what it did. Elsewhere a thread looks at the running jobs that have a limit, four times a second:
what their processes hold, each page shared by several counted in parts, as the kernel tells it
(PSS). That is late by a quarter of a second; what a job can take in that time, a node needs to
spare.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from celery.utils.log import get_logger
from celery.worker import state as worker_state

from errors import MemoryExceeded
from tasks import groups
from tasks.family import descendants, everybody
from tasks.request import JobRequest
from workers.essential import essential_thread

logger = get_logger(__name__)

PAUSE = 0.25
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MIB = 2**20


def limit_of(request: JobRequest) -> int | None:
    """The bytes that a request may take; None if nobody limited it."""
    definition = getattr(request.task, "definition", None)
    return None if definition is None else definition.memory_limit


def running_requests() -> list[JobRequest]:
    """What the pool runs, from any thread."""
    while True:
        try:
            requests = list(worker_state.active_requests)
        except RuntimeError:  # The event loop has just added one.
            continue
        return [request for request in requests if isinstance(request, JobRequest)]


class Limits:
    """What the running jobs of this node may take, and who has taken more."""

    def __init__(self, own_group: Path | None) -> None:
        self._groups = own_group
        self._reasons: dict[str, MemoryExceeded] = {}
        self._stopped = threading.Event()
        self._thread = essential_thread("cohort-limits", self._run)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End nothing from now on."""
        self._stopped.set()
        self._thread.join()

    def reason_of(self, request: JobRequest) -> MemoryExceeded | None:
        """Why a job's processes were ended; None if it wasn't for a limit."""
        reason = self._reasons.get(request.claim_id)
        limit = limit_of(request)
        if reason is None and limit is not None and self._groups is not None:
            used = groups.exceeded(self._groups, request.claim_id)
            if used is not None:
                return _exceeded(request.name, used, limit, "ended by its control group")
        return reason

    def forget(self, request: JobRequest) -> None:
        """Its end has been told, and its processes are dead."""
        self._reasons.pop(request.claim_id, None)
        if self._groups is not None:
            groups.remove(self._groups, request.claim_id)

    def _run(self) -> None:
        while not self._stopped.wait(PAUSE):
            self.run_once()

    def run_once(self) -> None:
        """One look at everybody who has a limit; costs nothing where nobody has."""
        if self._groups is not None:
            return
        limited = [
            (request, limit)
            for request in running_requests()
            if request.child is not None and (limit := limit_of(request)) is not None
        ]
        if not limited:
            return
        processes = everybody()
        for request, limit in limited:
            child = request.child
            assert child is not None
            below = descendants(child.pid, processes)
            family = [child.pid, *(process.pid for process in below if process.lives)]
            # Cheap, and never less than the exact sum: pages that are shared count for each.
            if sum(map(resident, family)) <= limit:
                continue
            used = sum(map(proportional, family))
            # The process may have gone on to another job meanwhile.
            if used > limit and request in worker_state.active_requests:
                self._reasons[request.claim_id] = _exceeded(
                    request.name, used, limit, f"seen in {len(family)} processes"
                )
                child.kill()


def resident(pid: int) -> int:
    """The bytes that a process has in memory; 0 if it has gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0


def proportional(pid: int) -> int:
    """The same, with what it shares divided among those who share it; 0 if it has gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except ProcessLookupError:
        return 0
    except OSError:
        return resident(pid)  # Not ours to look into: it runs as somebody else.
    return 0


def _exceeded(name: str, used: int, limit: int, how: str) -> MemoryExceeded:
    return MemoryExceeded(
        f"{name}: it took {used / _MIB:.0f} MiB of memory, {how}; its limit is "
        f"{limit / _MIB:.0f} MiB. Give it more: @job(memory=...)"
    )
