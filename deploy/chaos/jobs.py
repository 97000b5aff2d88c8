"""The jobs of a run of chaos: counters under keys, and keyless ones that leave a trace."""

from __future__ import annotations

import os
import time
from pathlib import Path

from deploy.chaos.load import TRACES
from tasks import Run, job

COUNTER = "counter"
LOG = "log"


class Planned(Exception):
    """The failure that a job was told to have."""


@job(key="chaos-{name}", retries=2)
def increment(run: Run, name: str, pause: float = 0.0, failures: int = 0) -> int:
    """Count in a file; fail before the last step for so many attempts."""
    counter = run.directory / COUNTER
    count = int(counter.read_text()) if counter.exists() else 0
    # What another run counts meanwhile would be lost here.
    time.sleep(pause)
    counter.write_text(str(count + 1))
    with (run.directory / LOG).open("a") as log:
        log.write(f"{run.task_id}\n")
    if run.attempt <= failures:
        raise Planned(f"attempt {run.attempt} of {failures} that fail")
    return count + 1


@job(retries=2)
def leave_trace(run: Run, pause: float = 0.0, failures: int = 0) -> str:
    """Leave a file that names the task and the claim."""
    time.sleep(pause)
    if run.attempt <= failures:
        raise Planned(f"attempt {run.attempt} of {failures} that fail")
    (Path(os.environ[TRACES]) / f"{run.task_id}.{run.claim_id}").touch()
    return run.claim_id
