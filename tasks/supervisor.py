"""Runs one program for an attempt, and sees to it that nothing of it outlives its end.

    python -I -S supervisor.py FD [KEPT ...]

FD is one end of a socket pair whose other end only the attempt's process holds. The attempt sends
one line of JSON, {argv, environ, grace}, and later perhaps b"end": then the program's process
group gets SIGTERM, and what is left after `grace` seconds SIGKILL. When the other end is closed,
however its process went, everything is killed at once: what it does has become worthless.

Whatever the program leaves behind when it ends, daemons included, is ended too: as this process
is their subreaper, nobody escapes to init. The last line sent is {status, usage}, once nothing
is left; or {errno}, if the program couldn't be started.

Other descriptors are only kept open: the lock of the program's work tree stays taken until
nothing of the program can write there any more.

It runs without site-packages, so that it starts in a blink: the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
LEFTOVER_GRACE = 1.0
"""Seconds that processes which the program left behind get to end after a SIGTERM."""


def descendants(ancestor: int) -> list[int]:
    """The processes below this one, as /proc shows them now."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry))
    found = list(children.get(ancestor, ()))
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def _parent(pid: str) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in parentheses, may itself hold parentheses and spaces.
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return None


class Supervisor:
    """One program, from its start until nothing of it is left."""

    def __init__(self, owner: socket.socket) -> None:
        self._owner = owner
        self._grace = 0.0
        self._pid = 0
        self._status: int | None = None
        self._user = self._system = 0.0
        self._most_memory = 0
        self._wake, write_end = socket.socketpair()
        self._wake.setblocking(False)
        write_end.setblocking(False)
        self._write_end = write_end
        signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")

    def run(self) -> None:
        """Start what the owner asks for, and stay until nothing of it is left."""
        with self._owner.makefile("rb") as lines:
            request = json.loads(lines.readline())
        self._grace = request["grace"]
        try:
            self._pid = os.posix_spawnp(
                request["argv"][0],
                request["argv"],
                request["environ"],
                setsid=True,
                setsigmask=(),
                # What a worker ignores or blocks is none of the program's business.
                setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
            )
        except OSError as error:
            self._tell(errno=error.errno)
            return
        self._tell(pid=self._pid)
        # The output ends when the program and its descendants have closed it, not with us.
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2):
            os.dup2(nothing, descriptor)
        self._hold()
        self._end_the_rest()
        self._tell(
            status=self._status,
            usage={
                "user_seconds": self._user,
                "system_seconds": self._system,
                "most_memory": self._most_memory,
            },
        )

    def _hold(self) -> None:
        """Wait for the program, or for the order to end it, or for the owner's end."""
        deadline: float | None = None
        while self._reap():
            if self._status is not None:
                return
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            ready = select.select([self._owner, self._wake], [], [], left)[0]
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake.recv(4096)
            if self._owner in ready:
                if not self._asked():
                    self._grace = 0.0
                    return
                if deadline is None:
                    deadline = time.monotonic() + self._grace
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self._pid, signal.SIGTERM)

    def _end_the_rest(self) -> None:
        if self._status is not None and self._grace and self._reap():
            self._signal_all(signal.SIGTERM)
            deadline = time.monotonic() + min(LEFTOVER_GRACE, self._grace)
            while self._reap() and (left := deadline - time.monotonic()) > 0:
                if select.select([self._wake], [], [], left)[0]:
                    with contextlib.suppress(BlockingIOError):
                        self._wake.recv(4096)
        while self._reap():
            self._signal_all(signal.SIGKILL)
            # What was forked behind the look at /proc belongs to somebody who dies now: that
            # death ends this wait, and the next look sees it.
            self._reap(wait=True)

    def _signal_all(self, number: int) -> None:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)

    def _reap(self, wait: bool = False) -> bool:
        """Collect whoever has died; whether anybody is left."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, 0 if wait else os.WNOHANG)
            except ChildProcessError:
                return False
            if not pid:
                return True
            wait = False
            self._user += usage.ru_utime
            self._system += usage.ru_stime
            self._most_memory = max(self._most_memory, usage.ru_maxrss * 1024)
            if pid == self._pid:
                self._status = status

    def _asked(self) -> bool:
        try:
            return bool(self._owner.recv(16))
        except OSError:
            return False

    def _tell(self, **what: object) -> None:
        with contextlib.suppress(OSError):
            self._owner.sendall(json.dumps(what).encode() + b"\n")


def main(arguments: list[str]) -> None:
    """Serve the owner at the other end of the first descriptor."""
    for descriptor in arguments:
        os.set_inheritable(int(descriptor), False)
    with socket.socket(fileno=int(arguments[0])) as owner:
        Supervisor(owner).run()


if __name__ == "__main__":
    main(sys.argv[1:])
