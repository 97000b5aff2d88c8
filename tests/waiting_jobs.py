"""Jobs for tests of waiting: for a key, for room, for a time, and for a node that knows them."""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

from celery.exceptions import Retry

from tasks import Run, app, job
from tests.sample_jobs import wait_for_file


@job(key="held-{name}", directory=False)
def hold(run: Run, name: str, started: str, go: str) -> str:
    """Has the lock until it is let go."""
    Path(started).touch()
    wait_for_file(go)
    return run.node


@job(key="held-{name}", directory=False, conflict="skip")
def skip(run: Run, name: str) -> str:
    return run.task_id


@job(key="held-{name}", directory=False, conflict="replace")
def replace(run: Run, name: str) -> str:
    return run.task_id


@job(cpus=4)
def big(run: Run, traces: str) -> str:
    """Needs more CPUs than the first node has."""
    (Path(traces) / run.task_id).touch()
    return run.node


@job(labels=["of-nobody"], cpus=1)
def labelled(run: Run) -> None:
    """Never runs."""


@job
def note_the_end(run: Run, started: str, ended: str) -> None:
    """Says when it was told to end."""
    Path(started).touch()
    while not run.cancelled:
        time.sleep(0.01)
    Path(ended).write_text(str(time.time()))


@app.task(name="tests.waiting_jobs.plain_hold")  # type: ignore[untyped-decorator]
def plain_hold(started: str, go: str) -> str:
    """A plain task, acknowledged when it begins."""
    Path(started).touch()
    wait_for_file(go)
    return "done"


@app.task(bind=True, acks_late=True, name="tests.waiting_jobs.try_again")  # type: ignore[untyped-decorator]
def try_again(self: Any, traces: str) -> int:
    """Asks for another try, and its worker dies before it hears of that, once."""
    retries = int(self.request.retries)
    (Path(traces) / f"{retries}-{uuid.uuid4()}").touch()
    if retries:
        return retries
    try:
        raise self.retry(countdown=0)
    except Retry:
        killed = Path(traces) / "killed"
        if not killed.exists():
            killed.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        raise
