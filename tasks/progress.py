"""A run's progress, as the Celery state PROGRESS that `AsyncResult` and `submit --wait` show."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tasks.run import Progress

if TYPE_CHECKING:
    from tasks.job import JobTask

PROGRESS = "PROGRESS"
_INTERVAL = 0.25


class ProgressReport:
    """Sends at most four reports a second, and always the last one."""

    def __init__(self, task: JobTask) -> None:
        self._task = task
        self._task_id = task.request.id
        self._sent_at = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        is_last = progress.total is not None and progress.done >= progress.total
        if not is_last and now - self._sent_at < _INTERVAL:
            return
        self._sent_at = now
        meta: dict[str, Any] = {
            "done": progress.done,
            "total": progress.total,
            "unit": progress.unit,
        }
        try:
            self._task.update_state(task_id=self._task_id, state=PROGRESS, meta=meta)
        except Exception:
            # Nobody loses a job because nobody could watch it.
            return
