"""The worker's boot step: prove the mount, take a lease, write outcomes; leave in good order."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import redis
from celery import bootsteps
from celery.signals import worker_shutdown
from celery.utils.log import get_logger
from celery.worker import state

from broker import nodes, server
from broker.claimant import Claimant, NodeDescription
from broker.claims import Claimed
from broker.journal import note_of
from broker.scripts import Scripts
from broker.transport import consume_as
from errors import CohortError, SettingsError, WrongMount
from storage import mount, mount_options
from storage.segments import Entry, SegmentWriter
from tasks import groups
from tasks.bundle import Bundle, Trays
from tasks.enclosure import enclose_in
from tasks.job import PREFORK
from tasks.journal import entry_of
from tasks.request import JobRequest, has_processes, run_on
from tasks.results import record_with
from tasks.settings import Settings, current
from workers import examine  # noqa: F401  # registers the other half of `./cohort doctor`
from workers.essential import essential_thread
from workers.heartbeat import Heartbeat
from workers.housekeeping import Housekeeping
from workers.limits import Limits
from workers.node import WorkerNode
from workers.orphans import end_those_of_dead_lives, leave_mark
from workers.pipes import hear_who_speaks, writing_at_once
from workers.writer import Writer

logger = get_logger(__name__)

_FLUSH_SECONDS = 10.0
_SPARE_TRAYS = 8
_LOOK_EVERY = 0.1
"""Seconds between two looks for what was claimed ahead and didn't get its turn."""


class NodeStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """This worker as a node of the fleet. Starts after the pool and before anything is claimed."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        try:
            self._prepare(current())
        except CohortError as error:
            # An operator's mistake: one line, and no worker.
            sys.exit(f"cohort: {error}")

    def _prepare(self, settings: Settings) -> None:
        if settings.root is None:
            raise SettingsError(
                "COHORT_ROOT: a worker needs the shared folder; give the path of its mount"
            )
        self._settings = settings
        self._root = settings.root
        self._client = server.connect(settings.redis, timeout=max(1.0, settings.lease / 4))
        server.check(self._client, settings.redis)
        proof = mount.prove(self._root, settings.node)
        mounted = mount_options.find(self._root)
        mount_options.refuse(mounted)
        for said in mount_options.judge(mounted):
            if said.verdict == "dangerous":
                folder = f"{self._root}: {said.what}: {said.found}"
                logger.warning("dangerous shared folder %s; %s", folder, said.advice)
        server.belongs_to(self._client, proof.fleet_id)
        self._see_the_others()
        # Before the pool is forked: what its processes start inherits the mark, and the group.
        left = end_those_of_dead_lives(settings.scratch, settings.node)
        if left:
            logger.warning("ended %d processes of this node's earlier life: %s", len(left), left)
        self._leaving = threading.Lock()
        self._mark = leave_mark(settings.scratch, settings.node)
        self._groups = groups.delegated()
        enclose_in(self._groups)

    def _see_the_others(self) -> None:
        """Each live node left a nonce in the folder; who doesn't see it looks at another folder."""
        for other in nodes.list_nodes(self._client):
            if other.is_live and not mount.sees_nonce(
                self._root, other.node, other.incarnation, other.nonce
            ):
                raise WrongMount(
                    f"the shared folder {self._root} isn't the one that node {other.node} uses: "
                    "its nonce isn't there. Mount the same file system on every node"
                )

    def _describe(self, incarnation: str) -> NodeDescription:
        return NodeDescription(
            cpus=self._settings.cpus,
            memory=self._settings.memory,
            host=socket.gethostname(),
            pid=os.getpid(),
            nonce=mount.leave_nonce(self._root, self._settings.node, incarnation),
            life=self.life,
            gpus=self._settings.gpus,
            labels=self._labels,
        )

    def create(self, worker: Any) -> None:
        """What is claimed begins when there is room for it."""
        # Before the pool is forked: to look through all that is loaded, and stays, would stop each
        # process for 80 ms now and then.
        gc.collect()
        gc.freeze()
        process = worker.process_task
        self._trays = Trays(_trays_for(worker))

        def process_when_there_is_room(request: Any) -> None:
            claim_id = request.claim_id if isinstance(request, JobRequest) else ""
            if claim_id:
                may_share = bool(self._trays) and request.may_share
                self.claimant.start(claim_id, request, may_share=may_share)
            else:
                process(request)

        def process_now(requests: Sequence[JobRequest]) -> None:
            several = len(requests) > 1
            job = Bundle(requests, self._trays, self.node.give_back) if several else requests[0]
            # Room may have been made by any thread; the pool knows of one.
            if worker.hub is None or threading.current_thread() is self._pools_thread:
                process(job)
            else:
                worker.hub.call_soon(process, job)

        self._process_now = process_now
        worker.process_task = process_when_there_is_room

    def start(self, worker: Any) -> None:
        """Join the fleet."""
        self._pools_thread = threading.current_thread()
        self._labels = self._settings.labels
        if has_processes(worker.pool):
            self._labels += (PREFORK,)
        self.claimant = Claimant(
            Scripts(self._client),
            self._settings.node,
            self._settings.lease,
            self._describe,
            slots=lambda: _slots_of(worker),
            patience=self._settings.reserve_after,
        )
        self.life = self.claimant.incarnation
        backend = worker.app.backend
        self.writer = Writer(
            SegmentWriter(self._root, self._settings.node, self.life),
            self.claimant,
            backend,
            self._settings.journal_keep,
        )
        self.limits = Limits(self._groups)
        self.node = WorkerNode(
            self._settings,
            self._root,
            self.writer,
            self.claimant,
            self.limits,
            self._trays,
            self._leave,
            worker.hub,
        )
        self.heartbeat = Heartbeat(self.claimant, lambda: self.node.stop_keyless(worker.pool))
        self.claimant.on_finish = self.writer.finish
        self.claimant.on_claim = self._note
        self.claimant.on_start = self._process_now
        self.claimant.register()
        self.housekeeping = Housekeeping(self._settings)
        self.writer.start()
        self.heartbeat.start()
        self.housekeeping.start()
        self.limits.start()
        record_with(self.writer.record)
        run_on(self.node)
        consume_as(self.claimant, writing_at_once(worker), _is_told_to_end)
        self._gone = threading.Event()
        self._is_ending = False
        # From a thread: the loop of a solo pool stands still while a job runs.
        essential_thread("cohort-overdue", self._look_for_overdue).start()
        if not has_processes(worker.pool):
            logger.warning(
                "pool without processes: jobs with a directory, a time or a memory limit are left "
                "to nodes with --pool prefork"
            )
        logger.info("node %s joined as %s", self._settings.node, self.claimant.incarnation)

    def _look_for_overdue(self) -> None:
        while not self._gone.wait(_LOOK_EVERY):
            self.node.give_back_overdue()
            if self._is_ending:
                self._give_back_unbegun()

    def _give_back_unbegun(self) -> None:
        """The consumer has stopped and forgotten what hadn't begun: others can have it now."""
        self.node.give_back_unbegun()
        try:
            self.claimant.renew()  # It names what is held; what a closed channel let go goes back.
        except (redis.RedisError, OSError) as error:
            logger.warning("what hadn't begun goes back with the lease: %s", error)

    def _note(self, claimed: Claimed, headers: Mapping[str, Any]) -> None:
        def note() -> Entry:
            return entry_of(
                note_of(claimed.queue, claimed.list_name, claimed.payload),
                self._settings.journal_keep,
            )

        durable = bool(headers["cohort"].get("durable"))
        keyed = bool(claimed.key)
        self.writer.begin(claimed.claim_id, headers["id"], note, durable=durable, keyed=keyed)

    def stop(self, worker: Any) -> None:
        """A warm shutdown: the pool, ended after this step, still has outcomes to hand over."""
        self._is_ending = True
        self.claimant.begin_no_more()
        hear_who_speaks(worker.pool)
        worker_shutdown.connect(self._leave, weak=False)

    def terminate(self, worker: Any) -> None:
        """A cold shutdown: what runs is killed next, and goes back."""
        self._leave()

    def _leave(self, **kwargs: Any) -> None:
        if not self._leaving.acquire(blocking=False):
            return  # A cold shutdown may be asked for while a warm one is at it.
        self.node.stop()
        self.limits.stop()
        self.housekeeping.stop()
        if not self.writer.stop(_FLUSH_SECONDS):
            logger.error("outcomes could not be written in time; their claims go back")
        self.heartbeat.stop()
        consume_as(None)
        try:
            self.claimant.leave()
        except (redis.RedisError, OSError) as error:
            logger.warning("could not say goodbye, the lease runs out instead: %s", error)
        self._mark.remove()


def _slots_of(worker: Any) -> int:
    """How many jobs it may run at once: as many as it may have processes, or it never got more."""
    scaler = getattr(worker, "autoscaler", None)
    return int(worker.pool.num_processes if scaler is None else scaler.max_concurrency)


def _trays_for(worker: Any) -> int:
    """How many of its pool's processes may be handed several jobs at once, and some more."""
    if not has_processes(worker.pool) or not worker.pool.forking_enable:
        return 0
    if worker.max_tasks_per_child or worker.time_limit or worker.soft_time_limit:
        return 0  # These count, and end, what the pool is handed.
    return int(worker.max_concurrency or worker.concurrency) + _SPARE_TRAYS


def _is_told_to_end() -> bool:
    # As Celery asks: 0, the exit code, is a yes.
    words = (state.should_stop, state.should_terminate)
    return any(word is not None and word is not False for word in words)
