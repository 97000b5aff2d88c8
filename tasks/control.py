"""Celery's remote control, which needs no worker to revoke what waits."""

from __future__ import annotations

from typing import Any

from celery.app.control import Control
from celery.utils.functional import maybe_list


class FleetControl(Control):  # type: ignore[misc]
    """The app's `control`."""

    def revoke(self, task_id: Any, destination: Any = None, **options: Any) -> Any:
        """What waits is revoked at once, here; then the workers are told, for what runs."""
        if destination is None:
            for one in maybe_list(task_id) or ():
                self.app.backend.settle(one, "revoked")
        return super().revoke(task_id, destination=destination, **options)
