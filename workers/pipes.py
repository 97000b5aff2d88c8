"""The pipes to a prefork pool's processes: a job that was just claimed is written there at once.

Celery's pool writes at the next turn of its loop, when it is told that a pipe has room. By then the
loop has asked for more work, and an idle job has waited for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kombu.asynchronous import get_event_loop

from tasks.request import has_processes


def writing_at_once(worker: Any) -> Callable[[], None] | None:
    """What has a worker's pool write the jobs that it was given, to those of its processes that are
    idle. None for a pool without processes.
    """
    if not has_processes(worker.pool):
        return None

    def write() -> None:
        processes, hub = worker.pool._pool, get_event_loop()
        if hub is None or not getattr(processes, "outbound_buffer", None):
            return
        idle = processes._all_inqueues - processes._active_writes - processes._busy_workers
        if idle:
            # That it was received is told before it begins, as ever: telling may take a while if
            # Redis is out of reach, and what runs meanwhile couldn't be stopped.
            if worker.consumer.event_dispatcher is not None:
                worker.consumer.event_dispatcher.flush()
            # What the loop calls with the pipes that have room. One that hasn't is waited for.
            hub.consolidate_callback(list(idle)[: len(processes.outbound_buffer)])

    return write
