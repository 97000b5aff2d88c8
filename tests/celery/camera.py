"""A snapshot camera as the manual has it, for `celery events --camera`."""

from __future__ import annotations

from typing import Any

from celery.events.snapshot import Polaroid


class Camera(Polaroid):  # type: ignore[misc]
    """Prints who works and how many tasks there have been."""

    clear_after = True

    def on_shutter(self, state: Any) -> None:
        print(" ".join(state.workers), f"{state.task_count} tasks", flush=True)
