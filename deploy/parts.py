"""One part of a fleet: a process with all that it starts, on a leash, with a log of its own.

Whatever happens to the process that holds a part, the part doesn't outlive it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deploy import leash
from errors import Unavailable

_LEASH = [sys.executable, "-I", "-S", leash.__file__]


class Part:
    """A running part. Ending it, by any way, ends everything that it has started.

    It runs for as long as this object is held.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        log: Path,
        grace: float = 10.0,
    ) -> None:
        self.name = name
        self.log = log
        self._paused = False
        self._swept = False
        self._owner, theirs = socket.socketpair()
        log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, log.open("wb") as output:
            self._leash = subprocess.Popen(
                [*_LEASH, str(theirs.fileno()), str(grace), *command],
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                # A Ctrl-C in the terminal is for the owner, who ends the parts in order.
                start_new_session=True,
            )
        said = self._owner.makefile().readline()
        if not said:
            raise Unavailable(f"{name} didn't start\n{self.log_tail()}")
        self.pid = int(said)

    @property
    def is_running(self) -> bool:
        """Whether the part's own process lives."""
        return self.exit_code is None

    @property
    def exit_code(self) -> int | None:
        """How it ended, as a shell tells it, or None while it runs."""
        code = self._leash.poll()
        if code is not None and code < 0 and not self._swept:
            # The leash was itself killed, and has left the command's group behind.
            self._swept = True
            self._signal_group(signal.SIGKILL)
        return code

    def terminate(self) -> None:
        """Ask it to end: SIGTERM, then its grace, then SIGKILL. Returns at once."""
        self.resume()
        with contextlib.suppress(ProcessLookupError):
            self._leash.terminate()

    def kill(self) -> None:
        """SIGKILL the process and all below it at once, as a dying machine would."""
        if self.is_running:
            self._signal_group(signal.SIGKILL)
            self._signal_tree(signal.SIGKILL)
        self.wait(30)

    def pause(self) -> None:
        """SIGSTOP the process and all below it, as a machine that freezes."""
        self._paused = True
        # Its parent first: what is stopped starts nothing new, so the second look is complete.
        self._signal_tree(signal.SIGSTOP)
        self._signal_tree(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused part go on."""
        if self._paused:
            self._paused = False
            self._signal_tree(signal.SIGCONT)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once nothing of it is left."""
        try:
            self._leash.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{self.name} (process {self.pid}) doesn't end") from None
        self._owner.close()
        code = self.exit_code
        assert code is not None
        return code

    def wait_until(self, is_ready: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait for a fact about the part; a part that dies meanwhile is an error with its log."""
        deadline = time.monotonic() + timeout
        while not is_ready():
            if self.exit_code is not None:
                raise Unavailable(
                    f"{self.name} ended with exit code {self.exit_code} before {what}\n"
                    + self.log_tail()
                )
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"{self.name}: not {what} after {timeout:.0f} s\n{self.log_tail()}"
                )
            time.sleep(0.02)

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of its log, under the log's name."""
        try:
            text = self.log.read_text("utf-8", errors="replace")
        except OSError:
            text = ""
        return "\n".join([f"--- {self.log}", *text.splitlines()[-lines:]])

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _signal_tree(self, number: int) -> None:
        if not self.is_running:
            return
        for pid in [self.pid, *leash.descendants(self._leash.pid)]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
