"""A signal that asks a command to end: it is raised as `AskedToEnd` wherever the command is.

Python swallows what is raised within a destructor or a callback of the garbage collector, and a
result that is forgotten unsubscribes in its destructor. So a request that was swallowed there is
made again a moment later.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN = 0.05
"""Seconds until it is made again: outside of what has swallowed it."""


class AskedToEnd(BaseException):
    """A signal asked the command to end."""


def end_by_signals() -> None:
    """From now on they raise `AskedToEnd` in the main thread."""
    for number in (*_ENDING, signal.SIGALRM):
        signal.signal(number, _raise)
    sys.unraisablehook = _note


def ignore_signals() -> None:
    """From now on nothing interrupts."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (*_ENDING, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise AskedToEnd


def _note(unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, AskedToEnd):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
    else:
        sys.__unraisablehook__(unraisable)
