"""Keeps the node's own disk in order: work trees that nobody uses any more go."""

from __future__ import annotations

import threading

from celery.utils.log import get_logger

from storage import scratch
from tasks.settings import Settings
from workers.essential import essential_thread

logger = get_logger(__name__)

_PACE = 300.0


class Housekeeping:
    """Looks at the scratch folder at start and every five minutes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopped = threading.Event()
        self._thread = essential_thread("cohort-housekeeping", self._run)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _run(self) -> None:
        while True:
            self.run_once()
            if self._stopped.wait(_PACE):
                return

    def run_once(self) -> int:
        """One look. How many trees went."""
        settings = self._settings
        try:
            settings.scratch.mkdir(parents=True, exist_ok=True)
            gone = scratch.evict(settings.scratch, settings.trees_keep, settings.scratch_free)
        except OSError as error:
            logger.warning("the scratch folder %s: %s", settings.scratch, error.strerror)
            return 0
        for path in gone:
            logger.info("work tree %s: removed, nobody used it or its room is needed", path)
        return len(gone)
