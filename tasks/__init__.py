"""What a job is, the one recipe by which it runs, the Celery app and its result backend.

A job is a function with `@job(key="report-{month}", timeout="2h", retries=3)` above it, whose
first parameter is its `Run`.
"""

from tasks.application import app
from tasks.job import job
from tasks.reading import Directory
from tasks.run import Run

__all__ = ["Directory", "Run", "app", "job"]
