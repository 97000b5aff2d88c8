"""Several short jobs handed to one process of the pool in one message, and run one after another.

What a job costs Celery's pool (two writes, two reads, the turns of the event loop between them) is
then paid once for all of them. Nothing else changes for a job:

- Its outcome is laid into shared memory as it ends. A process that dies takes with it the job that
  it was at, as ever, and none that had ended.
- Each but the first has a turn, which either its process takes or the node takes back: an eventfd
  counts them, and the kernel gives each to one. When a job turns out to be long, what ended before
  it has its outcome within moments, and what stands behind it goes back and runs elsewhere.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import ref

from celery.exceptions import TaskRevokedError
from celery.utils.log import get_logger

from broker.producing import puts_of_this_thread
from broker.transport import current_claimant
from tasks.family import Child
from tasks.request import JobRequest, Traced, trace_early, trace_job

logger = get_logger(__name__)

Tracer = Callable[..., Traced]
Job = tuple[Tracer, tuple[Any, ...], bool]
"""What a process is told of one: how to run it, with what, and whether it is a part of a chord."""
Ended = tuple[JobRequest, Traced, float]
"""A request, what came of it, and its seconds."""

_SIZE = 1 << 20
_BEGIN = 8
"""Behind the length of all that lies there."""


class Tray:
    """Memory and turns that one bundle shares with its process. Made before the pool is forked."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._memory = mmap.mmap(-1, _SIZE)
        # Set in one step, whatever the other process reads meanwhile; `struct` writes zeros first.
        self._length = memoryview(self._memory)[:_BEGIN].cast("Q")
        self._turns = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE | os.EFD_CLOEXEC)

    def lay_out(self, turns: int) -> None:
        """Begin anew, with so many turns."""
        self.take_turns_back()
        self._length[0] = 0
        if turns:
            os.eventfd_write(self._turns, turns)

    def take_turn(self) -> bool:
        """Whether the next one may be begun."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._turns)
            return True
        return False

    def take_turns_back(self) -> int:
        """How many hadn't been taken; nobody takes them now."""
        turns = 0
        while self.take_turn():
            turns += 1
        return turns

    def put(self, traced: Traced, took: float) -> bool:
        """Lay down what came of the next one; False if there is no room for it."""
        ended = pickle.dumps((traced, took), protocol=pickle.HIGHEST_PROTOCOL)
        length = self._length[0]
        begin = _BEGIN + length
        if begin + len(ended) > _SIZE:
            return False
        self._memory[begin : begin + len(ended)] = ended
        # Last: a process that dies before this hasn't ended the job.
        self._length[0] = length + len(ended)
        return True

    def take(self) -> list[tuple[Traced, float]]:
        """What has come of those that have ended, in their order, and each one's seconds."""
        length = self._length[0]
        file = io.BytesIO(self._memory[_BEGIN : _BEGIN + length])
        ended = []
        while file.tell() < length:
            ended.append(pickle.load(file))  # our own process wrote it
        return ended


class Trays:
    """This node's trays, and the bundles that lie in them."""

    def __init__(self, count: int) -> None:
        self._guard = threading.Lock()
        self._free = [Tray(number) for number in range(count)]
        self.under_way: dict[int, Bundle] = {}
        _trays.update((tray.number, tray) for tray in self._free)

    def __bool__(self) -> bool:
        return bool(self._free)

    def take(self, bundle: Bundle) -> Tray | None:
        """A free one, if there is any."""
        with self._guard:
            if not self._free:
                return None
            tray = self._free.pop()
            self.under_way[tray.number] = bundle
            return tray

    def release(self, tray: Tray) -> None:
        """Its bundle is over."""
        with self._guard:
            if self.under_way.pop(tray.number, None) is not None:
                self._free.append(tray)

    def lose(self, tray: Tray) -> None:
        """Its process may still write into it: nobody gets it any more."""
        with self._guard:
            self.under_way.pop(tray.number, None)

    def late(self, seconds: float) -> list[Bundle]:
        """The bundles that have been in their process for longer than that."""
        before = time.monotonic() - seconds
        with self._guard:
            return [bundle for bundle in self.under_way.values() if bundle.since < before]


_trays: dict[int, Tray] = {}
"""Inherited by the pool's processes."""


class Bundle:
    """Requests that share a process; to the worker it is one request."""

    def __init__(
        self,
        requests: Sequence[JobRequest],
        trays: Trays,
        give_back: Callable[[JobRequest], object],
    ) -> None:
        """`give_back`: what becomes of one that hasn't begun."""
        self._requests = list(requests)
        self._trays = trays
        self._give_back = give_back
        self._guard = threading.Lock()
        self._tray: Tray | None = None
        self._taken = 0
        self._recalled = 0
        self._child: Child | None = None
        self._accepted: tuple[int, float] | None = None
        self._result: Callable[[], object | None] | None = None
        self.since = time.monotonic()

    def execute_using_pool(self, pool: Any, **kwargs: Any) -> Any:
        """Hand what is still to be run to the pool."""
        asked, self._requests = self._requests, [r for r in self._requests if _is_ready(r)]
        if not self._requests:
            raise TaskRevokedError("all of a bundle")
        claimant = current_claimant()
        if claimant is not None:
            # The room was taken for the first of them.
            dropped = [request.claim_id for request in asked if request not in self._requests]
            claimant.pass_room(dropped, self._requests[0].claim_id)
        self._tray = self._trays.take(self) if len(self._requests) > 1 else None
        if self._tray is None:
            # There were some when they were put together. Side by side they'd have one room.
            first, *others = self._requests
            self._return(others)
            return first.hand_to(pool)
        self._tray.lay_out(len(self._requests) - 1)
        result = pool.apply_async(
            trace_bundle,
            args=(self._tray.number, [_to_trace(request) for request in self._requests]),
            accept_callback=self.on_accepted,
            callback=self.on_success,
            error_callback=self.on_failure,
            correlation_id=self._requests[0].id,
        )
        self._result = None if result is None else ref(result)
        self._requests[0]._apply_result = self._result
        return result

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """The process has it, and is at the first one."""
        # The pool itself answers for what was to be terminated and gets no process any more.
        self._child = Child(pid) if pid != os.getpid() else None
        self._accepted = (pid, time_accepted)
        self.since = time.monotonic()
        claimant = current_claimant()
        if claimant is not None:
            for request in self._requests[1:]:
                claimant.begin(request.claim_id)  # It outlives a lost connection with the first.
        self._accept(self._requests[0])

    def on_success(self, last: tuple[Traced, float] | None, **kwargs: Any) -> None:
        """The process is through with it; `last`: what had no room in the tray."""
        ended, rest, _ = self._look(is_over=True)
        if last is not None:
            ended.append((rest.pop(0), *last))
        self._end(ended)
        self._return(rest)

    def on_failure(self, exc_info: Any, **kwargs: Any) -> None:
        """The process was lost at one of them."""
        ended, rest, turns = self._look(is_over=True)
        self._end(ended)
        unbegun = len(rest) - turns
        for request in rest[:unbegun]:
            self._accept(request)
            _guarded(request, request.on_failure, exc_info)
        self._return(rest[unbegun:])

    def recall(self) -> None:
        """From any thread, whatever the loop is busy with: one that the pool has forgotten runs
        elsewhere as well, and goes no further than it has come.
        """
        with self._guard:
            if self._tray is not None and self._is_forgotten():
                self._recalled += self._tray.take_turns_back()

    def withdraw(self) -> None:
        """One of them takes long: what has ended before it has its outcome, and what was to come
        after it goes back.
        """
        if self._accepted is None and not self._is_forgotten():
            return  # It is on its way; who has begun is acknowledged first.
        ended, rest, turns = self._look(is_over=False)
        unbegun = len(rest) - turns
        claimant = current_claimant()
        if rest[:unbegun]:
            if claimant is not None:
                claimant.pass_room([request.claim_id for request, *_ in ended], rest[0].claim_id)
            self._accept(rest[0])
        self._end(ended)
        self._return(rest[unbegun:])

    def _is_forgotten(self) -> bool:
        # The pool forgets what is on its way to a process when a connection is lost.
        return self._result is not None and self._result() is None

    def _accept(self, request: JobRequest) -> None:
        """It has begun: a plain task is acknowledged now."""
        if request.worker_pid is None and self._accepted is not None:
            request.child = self._child
            _guarded(request, lambda accepted: request.on_accepted(*accepted), self._accepted)

    def _look(self, *, is_over: bool) -> tuple[list[Ended], list[JobRequest], int]:
        """Which have ended since the last look, which haven't, and of how many of these the turn
        hasn't come, and won't. All of them are the caller's, but one that runs.
        """
        with self._guard:
            tray, requests = self._tray, self._requests
            if tray is None:
                return [], [], 0
            turns = self._recalled + tray.take_turns_back()
            self._recalled = 0
            come = tray.take()[self._taken :]
            ended = [(r, *what) for r, what in zip(requests, come, strict=False)]
            rest = requests[len(ended) :]
            self._taken += len(ended)
            self._requests = rest[: len(rest) - turns]
            if is_over:
                self._tray = None
                self._trays.release(tray)
            elif self._is_forgotten():
                self._trays.lose(tray)
        return ended, rest, turns

    def _end(self, ended: Sequence[Ended]) -> None:
        for request, traced, took in ended:
            request.took = took
            request._terminate_on_ack = None  # Too late: its process is at another one by now.
            self._accept(request)
            _guarded(request, request.on_success, traced)

    def _return(self, requests: Sequence[JobRequest]) -> None:
        for request in requests:
            if not request.acknowledged:
                _guarded(request, self._give_back, request)


def _to_trace(request: JobRequest) -> Job:
    trace = trace_job if request.task.acks_late else trace_early
    return trace, request.pool_arguments, bool(request.chord)


def _is_ready(request: JobRequest) -> bool:
    try:
        request.check()
    except TaskRevokedError:
        return False
    return True


def _guarded(request: JobRequest, act: Callable[[Any], object], subject: Any) -> None:
    # One that fails must not take those behind it along.
    try:
        act(subject)
    except Exception:
        logger.exception("%s[%s]: could not be ended", request.name, request.id)


def trace_bundle(number: int, jobs: Sequence[tuple[Any, ...]]) -> tuple[Traced, float] | None:
    """In the child: run them one after another, for as long as it is their turn."""
    tray = _trays[number]
    for at, (trace, arguments, is_part) in enumerate(jobs):
        if at and not tray.take_turn():
            break
        begun, puts = time.perf_counter(), puts_of_this_thread()
        traced = trace(*arguments)
        took = time.perf_counter() - begun
        if not tray.put(traced, took):
            return traced, took
        if is_part and puts_of_this_thread() != puts:
            break  # It has sent the chord's body, which mustn't end before its parts are known.
    return None
