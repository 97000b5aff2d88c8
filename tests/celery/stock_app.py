"""A plain Celery app on Redis: nothing of Cohort is in it, nor in its worker's process.

Its settings are those of Cohort's app where they are a mere option of Celery, so that a
difference that a test sees is one of behaviour.
"""

from __future__ import annotations

import os
import sys

from celery import Celery


def stock_app(name: str, url: str, results: str | None = None) -> Celery:
    """An app with the tasks of these tests."""
    made = Celery(name, broker=url, backend=results or url, include=["tests.celery.tasks_of_tests"])
    made.conf.update(
        broker_connection_retry_on_startup=True,
        result_extended=True,
        task_track_started=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_send_task_events=True,
        task_send_sent_event=True,
        timezone="UTC",
    )
    if "tasks" in sys.modules:
        # The tests' own process, where `redis` means Cohort's transport.
        made.conf.broker_transport = "kombu.transport.redis:Transport"
    return made


app = stock_app("stock", os.environ.get("STOCK_REDIS", "redis://127.0.0.1:1/0"))
