"""Returns the claims of nodes that have died."""

from __future__ import annotations

import time

import redis
from celery.utils.log import get_logger

from broker import nodes
from broker.scripts import Scripts

logger = get_logger(__name__)


class Reaper:
    """Reaps incarnations whose lease has ended.

    Only after it has seen the same Redis, without a gap, for one full lease: right after a Redis
    outage every lease looks expired, and the nodes must have had time to renew.
    """

    def __init__(self, scripts: Scripts, lease: float, pace: float) -> None:
        self._scripts = scripts
        self._lease = lease
        self._longest_gap = 3 * pace
        self._server: str | None = None
        self._seen_since = 0.0
        self._seen_last = 0.0

    def run_once(self) -> int:
        """One pass. How many claims went back."""
        if not self.watch():
            return 0
        returned = 0
        for info in nodes.list_nodes(self._scripts.client):
            if info.is_live:
                continue
            claims = self._scripts.reap(f"{info.node}:{info.incarnation}")
            if claims is not None:
                logger.warning("node %s is dead: %d of its claims went back", info.node, claims)
                returned += claims
        return returned

    def watch(self) -> bool:
        """Look at the server, as standbys do too; whether it has been there long enough."""
        try:
            run_id = str(self._scripts.client.info("server")["run_id"])
        except (redis.RedisError, OSError):
            self._server = None
            raise
        now = time.monotonic()
        if run_id != self._server or now - self._seen_last > self._longest_gap:
            self._server = run_id
            self._seen_since = now
        self._seen_last = now
        return now - self._seen_since >= self._lease
