"""The Celery app. `celery -A tasks worker|beat|flower|inspect` all find it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from celery.schedules import crontab
from kombu.transport import TRANSPORT_ALIASES

from broker.journal import note_of
from broker.producing import Put, note_with, remember_for
from broker.transport import Qualities, qualify_with
from errors import SettingsError
from tasks.batches import App
from tasks.journal import write_down
from tasks.settings import Settings, current


def _settings_or_exit() -> Settings:
    try:
        return current()
    except SettingsError as error:
        if Path(sys.argv[0]).name == "celery" or "celery/__main__" in sys.argv[0]:
            # For an operator one line says more than a traceback. A program gets the exception.
            sys.exit(f"cohort: {error}")
        raise


def configuration(settings: Settings) -> dict[str, Any]:
    """Celery's configuration. What isn't named here keeps Celery's default."""
    return {
        "broker_url": settings.redis,
        "broker_connection_retry_on_startup": True,
        "result_backend": f"tasks.results:SharedResults+{settings.redis}",
        "result_expires": settings.results_expire,
        "cohort_results_in_redis": settings.results_in_redis,
        "cohort_journal_keep": settings.journal_keep,
        "cohort_root": None if settings.root is None else str(settings.root),
        "result_extended": True,
        "result_backend_always_retry": True,
        "imports": ("tasks.command", "tasks.directory", "tasks.export", *settings.jobs),
        "worker_concurrency": settings.cpus,
        "worker_consumer": "workers.consumer:FleetConsumer",
        # What is claimed ahead is limited by how long it takes, and goes back if it takes longer.
        "worker_prefetch_multiplier": 0,
        "worker_soft_shutdown_timeout": settings.soft_shutdown,
        "timezone": "UTC",
        "beat_schedule_filename": str(settings.state / "beat-schedule"),
        "beat_schedule": {
            "export-every-day": {
                "task": "tasks.export.export_daily",
                "schedule": crontab(hour="2", minute="0"),
            }
        },
    }


# Under the scheme that Flower and every tool know. For messages of other apps it is the stock one.
TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), "broker.transport:Transport"))

app = App(
    "cohort",
    task_cls="tasks.job:JobTask",
    control="tasks.control:FleetControl",
    set_as_current=True,
)
app.conf.update(configuration(_settings_or_exit()))
remember_for(current().ids_remembered)

# By name, and so only in a worker: these floors lie above this one.
app.steps["worker"].update({"workers.steps:NodeStep", "scheduler.duties:DutiesStep"})


def _qualities_of_message(message: Any) -> Qualities:
    from tasks.job import qualities_of_message

    return qualities_of_message(app, message)


def _note_of(one: Put) -> float:
    return write_down(app, note_of(one.queue, one.list, one.payload, one.due_ms))


qualify_with(_qualities_of_message)
note_with(_note_of)
