"""Processes and what comes from them, as /proc shows them; and how to end all of it.

A process of the pool leads a session of its own, and adopts what its job's processes leave behind
(it is their subreaper while a job runs). So everything that a job starts, daemons included, is
below its pool process for as long as that lives; and what stayed in its session is known by that
session's number even after its death.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

_PR_SET_CHILD_SUBREAPER = 36
_ROUNDS = 100
_DEATH_MS = 5000
_TICKS = os.sysconf("SC_CLK_TCK")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Relative:
    """One process. `began` is in clock ticks since the machine came up."""

    pid: int
    state: str
    parent: int
    session: int
    began: int

    @property
    def lives(self) -> bool:
        """False for a zombie: it holds nothing any more, and no signal reaches it."""
        return self.state not in "ZX"


def look_at(pid: int) -> Relative | None:
    """What /proc says of a process; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in parentheses, may itself hold parentheses and spaces.
            words = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return Relative(pid, words[0].decode(), int(words[1]), int(words[3]), int(words[19]))


def everybody() -> list[Relative]:
    """All processes of this machine."""
    looked = (look_at(int(entry)) for entry in os.listdir("/proc") if entry.isdecimal())
    return [process for process in looked if process is not None]


def descendants(ancestor: int, among: Iterable[Relative] | None = None) -> list[Relative]:
    """Those below a process, parents before children."""
    children: dict[int, list[Relative]] = {}
    for process in everybody() if among is None else among:
        children.setdefault(process.parent, []).append(process)
    found = list(children.get(ancestor, ()))
    for process in found:
        found.extend(children.get(process.pid, ()))
    return found


def now_in_ticks() -> int:
    """This moment, as `Relative.began` counts."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * _TICKS)


def adopt_orphans(adopts: bool) -> None:
    """Whether what this process's descendants leave behind comes to it, instead of to init."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, int(adopts), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def has_children() -> bool:
    """Whether this process has any child, dead or alive. One system call, whatever runs here."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def end_descendants(ancestor: int) -> None:
    """SIGKILL to all below a process that starts nothing meanwhile and adopts what is orphaned."""
    for _ in range(_ROUNDS):
        # What was forked behind one look is there for the next.
        left = [process for process in descendants(ancestor) if process.lives]
        if not left:
            return
        for process in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)


def own_processes() -> list[int]:
    """This user's processes, without this one and those that it comes from."""
    forebears = {os.getpid(), 1}
    process = look_at(os.getppid())
    while process is not None and process.pid not in forebears:
        forebears.add(process.pid)
        process = look_at(process.parent)
    found = []
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            if entry.isdecimal() and os.stat(f"/proc/{entry}").st_uid == os.geteuid():
                found.append(int(entry))
    return [pid for pid in found if pid not in forebears]


def carries(pid: int, mark: str, places: Sequence[str] = ("environ",)) -> bool:
    """Whether a process has that mark: in the environment that its program was started with, or,
    in `maps`, by a file in its memory, which it has also when it was only forked.
    """
    for place in places:
        with suppress(OSError), open(f"/proc/{pid}/{place}", "rb") as file:
            if mark.encode() in file.read():
                return True
    return False


def end_marked(mark: str, places: Sequence[str] = ("environ",)) -> list[int]:
    """SIGKILL to who carries a mark, until nobody does; their numbers."""
    ended: list[int] = []
    for _ in range(_ROUNDS):
        # What was forked behind one look is there for the next.
        marked = [pid for pid in own_processes() if carries(pid, mark, places)]
        left = [pid for pid in marked if _end(pid, mark, places)]
        if not left:
            break
        ended += left
    return ended


def _end(pid: int, mark: str, places: Sequence[str]) -> bool:
    """Kill it and wait for its end; False if it had gone already."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Looked at again: until the descriptor was open, the number could come to mean another.
        if not carries(pid, mark, places):
            return False
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll(_DEATH_MS)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


class Child:
    """A pool process, held by a descriptor, so that its number can't come to mean another."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._descriptor: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._descriptor = None

    def has_ended(self, timeout: float) -> bool:
        """Wait up to so many seconds for its end."""
        if self._descriptor is None:
            return True
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def kill(self) -> None:
        """End it at once, and before it everything that came from it."""
        if self._descriptor is None:
            return
        try:
            # Stopped it starts nothing more, and still adopts: nobody escapes to init.
            signal.pidfd_send_signal(self._descriptor, signal.SIGSTOP)
            end_descendants(self.pid)
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        except ProcessLookupError:
            return

    def end_family(self, mark: str) -> None:
        """It has died, by itself or by another's hand: end what is left of its session, and who
        else carries the mark of its run.
        """
        for _ in range(_ROUNDS):
            left = [process for process in self._session() if process.lives]
            for process in left:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, signal.SIGKILL)
            if not left and not end_marked(mark):
                return

    def _session(self) -> list[Relative]:
        until = now_in_ticks()
        session = [process for process in everybody() if process.session == self.pid]
        if any(process.pid == self.pid and process.lives for process in session):
            return []  # The number has come to mean another process, with a session of its own.
        return [process for process in session if process.began <= until]

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
