"""Keeps the node's lease alive, from a thread, whatever the event loop is busy with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import redis
from celery.utils.log import get_logger

from broker.claimant import Claimant
from workers.essential import essential_thread

logger = get_logger(__name__)


class Heartbeat:
    """Renews the lease three times in its length, and says so when it can't be trusted any more."""

    def __init__(self, claimant: Claimant, on_lease_lost: Callable[[], object]) -> None:
        self._claimant = claimant
        self._on_lease_lost = on_lease_lost
        self._margin = claimant.lease / 10
        self._stopped = threading.Event()
        self._trusts = True
        self._thread = essential_thread("cohort-lease", self._run)

    def start(self) -> None:
        """Begin to beat; the claimant has registered."""
        self._thread.start()

    def stop(self) -> None:
        """Stop beating. The lease runs out, unless the claimant leaves."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._claimant.lease / 3 if self._trusts else 0.5):
            self.run_once()

    def run_once(self) -> None:
        """One renewal, and what follows from it."""
        try:
            if self._claimant.renew() == "expelled":
                logger.error(
                    "the lease of %s has ended, its claims went to others; joining anew",
                    self._claimant.member,
                )
                self._lose_trust()
                self._claimant.rejoin()
            self._trusts = True
        except (redis.RedisError, OSError) as error:
            logger.warning("could not renew the lease: %s", error)
            # Stop before the lease does: another node may have the claims once it has ended.
            if time.monotonic() > self._claimant.trusted_until - self._margin:
                self._lose_trust()

    def _lose_trust(self) -> None:
        if self._trusts:
            self._trusts = False
            self._on_lease_lost()
