"""The pipes to and from a prefork pool's processes, where Celery comes to them too late.

- It writes a job at the next turn of its loop, when it is told that a pipe has room. By then the
  loop has asked for more work, and an idle job has waited for that.
- When a consumer closes it forgets what no process is known to have begun. What was written to one
  a moment ago begins all the same.
- When its pool ends it looks at one process after another, and sleeps half a second at each that
  has nothing to say. Of sixteen the last one's outcome would be eight seconds late.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from inspect import isgenerator
from multiprocessing.connection import wait
from typing import Any

from kombu.asynchronous import get_event_loop

from tasks.request import has_processes

_A_LOOK = 0.5
"""Seconds until an ending pool looks whether a time limit has passed, or a process has died."""
_A_TURN = 0.002
_A_MOMENT = 2.0
"""Seconds in which an idle process says that it has begun, however busy the machine is."""


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


def hear_what_has_begun(pool: Any) -> None:
    """Have a pool hear which of the jobs that it has written have begun. A job that it forgets goes
    back, and would run here and elsewhere.
    """
    processes: Any = getattr(pool, "_pool", None)
    if not hasattr(processes, "handle_result_event"):
        return  # It has no processes, or no event loop yet.
    ends, before = time.monotonic() + _A_MOMENT, set[int]()
    while (pipes := _of_what_is_written(processes)) and pipes != before:
        before = pipes
        for pipe in wait(pipes, max(0.0, ends - time.monotonic())):
            # One message; that it has begun is the next thing that such a process says.
            processes.handle_result_event(pipe)


def hear_who_speaks(pool: Any) -> None:
    """From now on a pool that ends reads what a process says when that says it."""
    handler: Any = getattr(getattr(pool, "_pool", None), "_result_handler", None)
    if not hasattr(handler, "_flush_outqueue"):
        return  # It has no processes.
    read_or_sleep = handler._flush_outqueue

    def read_if_it_speaks(pipe: int, remove: Any, processes: Any, on_message: Any) -> Any:
        if pipe not in processes or wait([pipe], 0.0) or _is_half_read(handler, pipe):
            return read_or_sleep(pipe, remove, processes, on_message)
        if wait(list(processes), _A_LOOK):
            time.sleep(_A_TURN)  # Its turn comes; and one that is broken keeps nobody busy.
        return None

    handler._flush_outqueue = read_if_it_speaks


def _is_half_read(handler: Any, pipe: int) -> bool:
    # Celery knows whether the rest will come.
    reader = handler._hub.readers.get(pipe) if handler._hub is not None else None
    return reader is not None and isgenerator(reader[0])


def _of_what_is_written(processes: Any) -> set[int]:
    """The pipes from which is to be heard of what was written and hasn't begun."""
    return {
        job._write_to.outqR_fd
        for job in processes._cache.values()
        if not job._accepted
        and job._write_to is not None
        and job._write_to.inqW_fd not in processes._active_writes
    }
