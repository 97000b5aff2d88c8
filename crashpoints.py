"""The named places where a test may kill the process: the steps of an attempt, before and after.

`COHORT_CRASH=<name>@<file>` makes the first process that reaches the point and can create the file
die there by SIGKILL, once. Without that variable a point costs one look at the environment.
A point that isn't listed here doesn't exist: the list is what the tests walk through.
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
    order = os.environ.get("COHORT_CRASH")
    if not order:
        return
    wanted, _, once = order.partition("@")
    assert wanted in POINTS and once, f"COHORT_CRASH={order!r} isn't <crash point>@<file>"
    if wanted != name:
        return
    try:
        os.close(os.open(once, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
