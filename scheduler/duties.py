"""The fleet's duties: each a noun with `run_once`. Every worker is a candidate; a leader lease
picks who does them.
"""

from __future__ import annotations

import threading
from typing import Any

import redis
from celery import bootsteps
from celery.utils.log import get_logger

from broker import server
from broker.leader import Leadership
from broker.scripts import Scripts
from scheduler.reaper import Reaper
from tasks.settings import current

logger = get_logger(__name__)


class DutiesStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Runs the duties while this node leads."""

    requires = ("workers.steps:NodeStep",)

    def start(self, worker: Any) -> None:
        """Begin to campaign."""
        settings = current()
        pace = settings.lease / 5
        scripts = Scripts(server.connect(settings.redis, timeout=max(1.0, settings.lease / 4)))
        self._pace = pace
        self._leadership = Leadership(scripts, "reaper", settings.lease)
        self._reaper = Reaper(scripts, settings.lease, pace)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cohort-duties", daemon=True)
        self._thread.start()

    def stop(self, worker: Any) -> None:
        """Stop; another node takes the lead when the lease has run out."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._pace):
            try:
                if self._leadership.campaign():
                    self._reaper.run_once()
                else:
                    self._reaper.watch()
            except (redis.RedisError, OSError) as error:
                logger.warning("the duties wait for Redis: %s", error)
