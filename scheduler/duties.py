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
        self._leadership = Leadership(scripts, "reaper", settings.lease)
        self._reaper = Reaper(scripts, settings.lease, pace)
        self._stopped = threading.Event()
        self._begin("cohort-duties", pace, self._reap)
        self._expiry = Expiry(
            # Its own as well: many that expire at once are no reason to reap late.
            Scripts(server.connect(settings.redis, timeout=max(1.0, settings.lease / 4))),
            lambda task_id, reason: worker.app.backend.settle(task_id, reason),
            lambda task_ids: worker.app.backend.write_down(task_ids),
        )
        self._begin("cohort-expiry", PACE, self._expiry.run_once)
        if settings.root is not None:
            self._recovery = Recovery(
                # Its own connection: reading a folder of millions must not hold the reaper up.
                Scripts(server.connect(settings.redis)),
                settings.root,
                settings.lease,
                settings.journal_keep,
            )
            self._begin("cohort-recovery", pace, self._recovery.run_once)

    def _begin(self, name: str, seconds: float, act: Callable[[], object]) -> None:
        duty = (seconds, act, name.removeprefix("cohort-"))
        threading.Thread(target=self._every, args=duty, name=name, daemon=True).start()

    def stop(self, worker: Any) -> None:
        """Stop; another node takes the lead when the lease has run out."""
        self._stopped.set()

    def _reap(self) -> None:
        if self._leadership.campaign():
            self._reaper.run_once()
        else:
            self._reaper.watch()

    def _every(self, seconds: float, act: Callable[[], object], what: str) -> None:
        while not self._stopped.is_set():
            try:
                act()
            except (redis.RedisError, OSError, CohortError) as error:
                logger.warning("%s: trying on: %s", what, error)
            except Exception:
                # Nobody would miss a duty that ended.
                logger.exception("%s failed", what)
            self._stopped.wait(seconds)
