"""For workers whose Celery is told to cancel what runs when a connection is lost."""

from __future__ import annotations

from tasks import app

app.conf.worker_cancel_long_running_tasks_on_connection_loss = True
