"""A leash: runs one command and leaves nothing of it behind, whoever dies first.

    python -I -S leash.py FD GRACE COMMAND [ARGUMENTS]

FD is one end of a socket pair whose other end only the owner holds. The leash writes the
command's process id to it, then watches it: when the owner is gone, however it went, or when
the leash gets SIGTERM, the command gets SIGTERM, GRACE seconds, and then everything that came
from it is killed, daemons included. It ends as the command ended.

It runs without site-packages, so that it starts in a blink: the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ORPHAN_GRACE = 3.0
"""What the command gets at most once the owner is gone: nobody waits for it any more."""

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def descendants(ancestor: int) -> list[int]:
    """The processes below this one, parents before children, as /proc shows them now."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (parent := _parent(int(entry))) is not None:
            children.setdefault(parent, []).append(int(entry))
    found = list(children.get(ancestor, ()))
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def _parent(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in parentheses, may itself hold parentheses and spaces.
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _start(command: list[str], owner: socket.socket) -> int:
    leash = os.getpid()
    # A SIGTERM on the way from fork to exec waits until the command can take it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        return pid
    try:
        owner.close()
        os.setsid()
        # Should the leash itself be killed, its owner cleans up the rest of the group.
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != leash:
            os._exit(1)
        for number in _HANDLED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


class Leash:
    """One command, from its start until nothing of it is left."""

    def __init__(self, owner: socket.socket, grace: float, command: list[str]) -> None:
        self._owner = owner
        self._grace = grace
        self._asked_to_end = False
        self._deadline: float | None = None
        self._wake, write_end = socket.socketpair()
        self._wake.setblocking(False)
        write_end.setblocking(False)
        signal.set_wakeup_fd(write_end.fileno())
        self._write_end = write_end
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask_to_end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # Orphans of the command come to this process instead of escaping to init.
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._pid = _start(command, owner)

    def _ask_to_end(self, *_: object) -> None:
        self._asked_to_end = True

    def hold(self) -> int:
        """Wait for the command or for the order to end it; the command's wait status."""
        with contextlib.suppress(OSError):
            self._owner.sendall(b"%d\n" % self._pid)
        watched = [self._owner, self._wake]
        while (status := self._reap()) is None:
            left = None if self._deadline is None else self._deadline - time.monotonic()
            if left is not None and left <= 0:
                return self._kill_all(None)
            readable = select.select(watched, [], [], left)[0]
            if self._wake in readable:
                with contextlib.suppress(BlockingIOError):
                    self._wake.recv(4096)
            if self._asked_to_end:
                self._asked_to_end = False
                self._end(self._grace)
            if self._owner in readable and not self._owner_lives():
                watched.remove(self._owner)
                self._end(min(self._grace, ORPHAN_GRACE))
        return self._kill_all(status)

    def _owner_lives(self) -> bool:
        try:
            return bool(self._owner.recv(1))
        except OSError:
            return False

    def _end(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        if self._deadline is None or deadline < self._deadline:
            self._deadline = deadline
        os.kill(self._pid, signal.SIGTERM)

    def _reap(self) -> int | None:
        """Collect whoever has died; the command's status if it is among them."""
        with contextlib.suppress(ChildProcessError):
            while (died := os.waitpid(-1, os.WNOHANG))[0]:
                if died[0] == self._pid:
                    return died[1]
        return None

    def _kill_all(self, status: int | None) -> int:
        while True:
            for pid in descendants(os.getpid()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            try:
                # What was forked behind the look at /proc belongs to somebody who dies now:
                # that death ends this wait, and the next look sees it.
                pid, how = os.waitpid(-1, 0)
            except ChildProcessError:
                return status if status is not None else signal.SIGKILL
            if pid == self._pid:
                status = how


def main(arguments: list[str]) -> int:
    """Hold the command that the arguments name."""
    descriptor, grace, *command = arguments
    with socket.socket(fileno=int(descriptor)) as owner:
        owner.set_inheritable(False)
        status = Leash(owner, float(grace), command).hold()
    if os.WIFSIGNALED(status):
        return 128 + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
