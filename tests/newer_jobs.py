"""A job that only the newer workers of a fleet know."""

from __future__ import annotations

from tasks import Run, job


@job
def newer(run: Run) -> str:
    return run.node
