"""What a job is, the one recipe by which it runs, the Celery app and its result backend.

from tasks import job

@job(key="report-{month}", timeout="2h", retries=3)
def report(run, month):
    ...
"""

from tasks.application import app
from tasks.job import job
from tasks.run import Run

__all__ = ["Run", "app", "job"]
