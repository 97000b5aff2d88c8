"""A program that an attempt runs: its output as it comes, and how it ended.

Promises: when `output` is exhausted nothing of the program is alive, and what it wrote has been
handed over; if the process that holds it dies, the program dies too (tasks/supervisor.py).
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import CohortError, Refused
from tasks import supervisor

_POLL = 0.2
_PIPE = 1 << 20


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it and its descendants took. Seconds and bytes."""

    exit_status: int | None
    """None if a signal ended it."""
    signal: str | None
    """Such as "SIGKILL"; None if it ended by itself."""
    elapsed: float
    user_seconds: float
    system_seconds: float
    most_memory: int
    """The resident set of the largest of its processes."""

    @property
    def is_success(self) -> bool:
        return self.exit_status == 0

    def __str__(self) -> str:
        return (
            f"exit status {self.exit_status}" if self.signal is None else f"ended by {self.signal}"
        )


class Program:
    """One running program. Use it as a context manager: leaving it ends what is left."""

    def __init__(
        self,
        argv: Sequence[str],
        directory: Path,
        environ: Mapping[str, str],
        grace: float,
        locks: Sequence[int] = (),
    ) -> None:
        """Start it, or raise `Refused` that names it. Between SIGTERM and SIGKILL: `grace`.

        The descriptors `locks` stay open as long as anything of it lives, whoever dies.
        """
        self._argv = list(argv)
        self._said = b""
        self._asked_to_end = False
        self._began = time.monotonic()
        self._owner, theirs = socket.socketpair()
        self._output, writing = os.pipe()
        kept = [theirs.fileno(), *locks]
        try:
            with theirs:
                self._supervisor = subprocess.Popen(
                    [sys.executable, "-I", "-S", supervisor.__file__, *map(str, kept)],
                    cwd=directory,
                    stdin=subprocess.DEVNULL,
                    stdout=writing,
                    stderr=writing,
                    pass_fds=kept,
                    start_new_session=True,
                )
        except BaseException:
            self._owner.close()
            os.close(self._output)
            raise
        finally:
            os.close(writing)
        request = {"argv": self._argv, "environ": dict(environ), "grace": grace}
        try:
            self._owner.sendall(json.dumps(request).encode() + b"\n")
            self._wait_for_the_start()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        # Closing it kills what is left; the supervisor ends when nothing is.
        self._owner.close()
        self._supervisor.wait()
        self._mourn()
        os.close(self._output)

    def output(self) -> Iterator[bytes]:
        """What it writes, as it comes, and b"" now and then, until nothing of it is left."""
        watched: list[Any] = [self._output, self._owner]
        while watched:
            ready = select.select(watched, [], [], _POLL)[0]
            if not ready:
                yield b""
            if self._owner in ready and not self._listen():
                watched.remove(self._owner)
                self._mourn()
            if self._output in ready:
                data = os.read(self._output, _PIPE)
                if not data:
                    watched.remove(self._output)
                yield data

    def end(self) -> None:
        """Ask it to end: SIGTERM, its grace, SIGKILL. Returns at once; read `output` on."""
        if not self._asked_to_end:
            self._asked_to_end = True
            try:
                self._owner.sendall(b"end")
            except OSError:
                return  # It has ended.

    def ended(self) -> Ended:
        """How it ended. Call it when `output` is exhausted."""
        told = self._told()
        if "status" not in told:
            raise CohortError(
                f"{self._argv[0]}: its supervisor was killed, and with it the program"
            )
        status = told["status"]
        signalled = status is None or os.WIFSIGNALED(status)
        number = signal.SIGKILL if status is None else os.WTERMSIG(status)
        return Ended(
            None if signalled else os.WEXITSTATUS(status),
            _name_of(number) if signalled else None,
            round(time.monotonic() - self._began, 3),
            **told["usage"],
        )

    def _wait_for_the_start(self) -> None:
        while b"\n" not in self._said and self._listen():
            pass
        told = self._told()
        if "pid" in told:
            return
        number = told.get("errno")
        if number is None:
            raise CohortError(
                f"{self._argv[0]}: its supervisor was killed, and with it the program"
            )
        raise Refused(f"{self._argv[0]}: {_why(number)}")

    def _mourn(self) -> None:
        """Somebody killed the supervisor before its last word: at least the group goes with it."""
        told = self._told()
        if "pid" in told and "status" not in told:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(told["pid"], signal.SIGKILL)

    def _listen(self) -> bool:
        try:
            said = self._owner.recv(4096)
        except ConnectionResetError:
            return False
        self._said += said
        return bool(said)

    def _told(self) -> dict[str, Any]:
        """What the supervisor has sent, of all its whole lines."""
        told: dict[str, Any] = {}
        for line in self._said.split(b"\n")[:-1]:
            told |= json.loads(line)
        return told


def _why(number: int) -> str:
    if number == errno.ENOENT:
        return "there is no such program, in PATH or in the job directory"
    if number == errno.EACCES:
        return "it isn't executable"
    if number == errno.ENOEXEC:
        return "it is no program: a script begins with a line such as #!/bin/sh"
    if number == errno.E2BIG:
        return "its arguments and environment are too long"
    return os.strerror(number)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"  # A real-time signal.
