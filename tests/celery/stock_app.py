"""A plain Celery app on Redis: nothing of Cohort is in it, nor in its worker's process.

Its settings are those of Cohort's app where they are a mere option of Celery, so that a
difference that a test sees is one of behaviour.
"""

from __future__ import annotations

import os

from celery import Celery


def stock_app(name: str, url: str, results: str | None = None) -> Celery:
    """An app with the tasks of these tests."""
    made = Celery(name, broker=url, backend=results or url, include=["tests.celery.tasks_of_tests"])
    made.conf.update(
        broker_connection_retry_on_startup=True,
        # By name: Cohort gives `redis` another meaning in the tests' own process.
        broker_transport="kombu.transport.redis:Transport",
        result_extended=True,
        task_track_started=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_send_task_events=True,
        task_send_sent_event=True,
        timezone="UTC",
    )
    return made


app = stock_app("stock", os.environ.get("STOCK_REDIS", "redis://127.0.0.1:1/0"))
