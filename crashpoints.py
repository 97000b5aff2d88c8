"""The named places where a test may kill the process: the steps of an attempt, before and after.

`COHORT_CRASH` names a folder. A file there with a point's name arms it: the first process that
reaches the point takes the file away and dies by SIGKILL. Without the variable a point costs one
look at the environment. A point that isn't listed here doesn't exist: tests walk through the list.
"""

import os
import signal
from collections.abc import Callable

POINTS: frozenset[str] = frozenset(
    {
        # the attempt, in the child process
        "attempt:before-snapshot",
        "attempt:after-snapshot",
        "attempt:after-checkout",
        "attempt:after-body",
        "attempt:after-commit",
        "attempt:after-after-commit",
        # the commit, in whichever process writes the record
        "run:folder-made",
        "commit:file-written",
        "commit:files-written",
        "commit:manifest-written",
        "commit:record-written",
        "commit:before-link",
        "commit:after-link",
        "commit:head-written",
        # the writer, in the main process
        "writer:before-segment",
        "writer:after-announce",
        "writer:after-segment",
        "writer:after-finish",
    }
)

# A model test sets this to raise instead of dying: thousands of crashes a minute in one process.
on_reach: Callable[[str], None] | None = None


def reach(name: str) -> None:
    """Die here if the environment says so; otherwise do nothing."""
    assert name in POINTS, f"unknown crash point {name!r}"
    if on_reach is not None:
        on_reach(name)
    armed = os.environ.get("COHORT_CRASH")
    if not armed:
        return
    try:
        os.unlink(os.path.join(armed, name))
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
