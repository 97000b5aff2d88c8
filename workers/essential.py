"""Threads without which a node must not live.

A node whose writer or heartbeat has died would hold its claims and end none of them; one that has
failed to conclude a job would hold that job. It dies instead: the lease runs out, and another node
takes over.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from celery.utils.log import get_logger

logger = get_logger(__name__)


def essential_thread(name: str, run: Callable[[], object]) -> threading.Thread:
    """A thread whose failure ends the process at once."""

    def run_or_die() -> None:
        try:
            run()
        except BaseException:
            logger.critical("%s has failed; this node ends", name, exc_info=True)
            os._exit(os.EX_SOFTWARE)

    return threading.Thread(target=run_or_die, name=name, daemon=True)
