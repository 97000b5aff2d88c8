"""Refills a Redis that came back empty from the shared folder, and removes what has expired."""

from __future__ import annotations

import json
import time
from pathlib import Path

from celery.utils.log import get_logger

from broker import nodes, settled
from broker.index import Index
from broker.leader import Leadership
from broker.scripts import Scripts
from errors import StandAside
from tasks.recovery import drop_expired, recover, reindex

logger = get_logger(__name__)

_CLEAN_EVERY = 3600.0


class Recovery:
    """One candidate for the duty.

    First outcomes are made known again. Jobs are put back only one lease later: by then every node
    that lives has joined anew, and what it runs isn't put back. Such a run has no claim in the new
    Redis, so when its node goes later, its jobs are looked after once more.
    """

    def __init__(self, scripts: Scripts, root: Path, lease: float, keep: float) -> None:
        self._scripts = scripts
        self._index = Index(scripts.client)
        self._root = root
        self._lease = lease
        self._keep = keep
        self._leadership = Leadership(scripts, "recovery", lease)
        self._empty_since: float | None = None
        self._cleaned = time.monotonic()

    def run_once(self) -> None:
        """One look, and what it calls for."""
        generation = self._index.generation()
        if generation is None:
            self._refill()
            return
        self._empty_since = None
        survivors = set(json.loads(generation)["survivors"])
        if survivors and self._leadership.campaign():
            gone = survivors - self._lives()
            if gone:
                self._recover(survivors - gone)
        if time.monotonic() - self._cleaned > _CLEAN_EVERY:
            self._cleaned = time.monotonic()
            if self._leadership.campaign():
                self._clean()

    def _refill(self) -> None:
        now = time.monotonic()
        if self._empty_since is None:
            self._empty_since = now
        if not self._leadership.campaign():
            return
        if not self._index.is_filled():
            report = reindex(self._root, self._index, self._lead_on)
            self._index.refilled()
            if report.outcomes:
                logger.warning(
                    "Redis was empty: %d outcomes are known again, after %.1f s",
                    report.outcomes,
                    report.seconds,
                )
            for what in (*report.torn, *report.damaged):
                logger.warning("segment not read to its end: %s", what)
        if now - self._empty_since > 1.5 * self._lease:
            self._recover(self._lives())

    def _recover(self, survivors: set[str]) -> None:
        report = recover(self._root, self._scripts, self._keep, progress=self._lead_on)
        if report.put_back:
            logger.warning("%d jobs that Redis had lost are put back", len(report.put_back))
        self._index.now_known(json.dumps({"survivors": sorted(survivors)}))

    def _clean(self) -> None:
        for name in drop_expired(self._root, self._index, self._keep):
            logger.info("segment %s has expired", name)
        for _ in self._index.sweep():
            self._lead_on(0, 0)
        for _ in settled.sweep(self._scripts.client, self._keep):
            self._lead_on(0, 0)

    def _lives(self) -> set[str]:
        known = nodes.list_nodes(self._scripts.client)
        return {f"{info.node}/{info.life}" for info in known if info.is_live}

    def _lead_on(self, done: int, total: int) -> None:
        """A long duty renews its lead on the way; who lost it leaves the rest to the other."""
        if not self._leadership.campaign():
            raise StandAside("another node has taken the recovery over")
