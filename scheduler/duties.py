"""The fleet's duties: each a noun with `run_once`. Every worker is a candidate; a leader lease
picks who does them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import redis
from celery import bootsteps
from celery.utils.log import get_logger

from broker import server
from broker.leader import Leadership
from broker.scripts import Scripts
from errors import CohortError
from scheduler.expiry import PACE, Expiry
from scheduler.reaper import Reaper
from scheduler.recovery import Recovery
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
        self._begin("cohort-duties", self._run)
        self._expiry = Expiry(
            # Its own as well: many that expire at once are no reason to reap late.
            Scripts(server.connect(settings.redis, timeout=max(1.0, settings.lease / 4))),
            lambda task_id, reason: worker.app.backend.settle(task_id, reason),
            lambda task_ids: worker.app.backend.write_down(task_ids),
        )
        self._begin("cohort-expiry", self._run_expiry)
        if settings.root is not None:
            self._recovery = Recovery(
                # Its own connection: reading a folder of millions must not hold the reaper up.
                Scripts(server.connect(settings.redis)),
                settings.root,
                settings.lease,
                settings.journal_keep,
            )
            self._begin("cohort-recovery", self._run_recovery)

    def _begin(self, name: str, run: Callable[[], None]) -> None:
        threading.Thread(target=run, name=name, daemon=True).start()

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

    def _run_expiry(self) -> None:
        while not self._stopped.wait(PACE):
            try:
                self._expiry.run_once()
            except (redis.RedisError, OSError, CohortError) as error:
                logger.warning("what expires waits for Redis: %s", error)

    def _run_recovery(self) -> None:
        while True:
            try:
                self._recovery.run_once()
            except (redis.RedisError, OSError, CohortError) as error:
                logger.warning("the recovery waits: %s", error)
            if self._stopped.wait(self._pace):
                return
