"""Submitting without Celery's detours, wherever a submission needs none of them.

Celery's own way to a queue costs a job ten times what the queue itself does: it routes, signals,
declares, builds a client and tells events each on a journey of its own. Here the same message is
built by the same function (`as_task_v2`), put by one script, many at a time if there are many, and
its event rides along. Whatever this doesn't handle goes Celery's way: signals somebody receives,
routes, exchanges, other serializers, stamps, expiry, another broker. No option means less here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from celery import Task, signals
from celery.app import amqp as celery_amqp
from kombu.exceptions import EncodeError, OperationalError
from kombu.utils.functional import retry_over_time
from kombu.utils.uuid import uuid

from broker import retry
from broker.producing import A_SCRIPT, ProducingChannel, Put
from tasks.batches import Batch
from tasks.composing import TOLD, Compose, Composer

if TYPE_CHECKING:
    from tasks.batches import App
    from tasks.job import JobTask

_SIMPLE = frozenset(("task_id", "producer"))
_COMMON = ("group_id", "root_id", "parent_id", "reply_to")
_OF_A_GROUP = _SIMPLE.union(_COMMON, ("group_index", "chord", "add_to_parent"))
_ENOUGH = 2
"""How many of a group are composed one by one before it pays to do it for all of them."""
_HANDLED = TOLD | {"add_to_parent", "queue", "priority", "headers", "producer", "serializer"}

_DECIDES = [
    "task_always_eager",
    "task_protocol",
    "task_serializer",
    "task_compression",
    "task_routes",
    "task_queues",
    "task_inherit_parent_priority",
    "task_default_queue",
    "task_send_sent_event",
    "event_serializer",
    "task_publish_retry",
    "task_publish_retry_policy",
    "task_repr_maxlevels",
    "broker_transport_options",
    "broker_url",
    "broker_write_url",
]
"""Configuration that decides which way a submission goes, and what it says."""


class Submitter:
    """What one process knows about its broker and its configuration. Safe between threads."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._pool: Any = None
        self._pid = 0
        self._decided: tuple[Any, ...] = ()
        self._is_plain = False
        self._queues: dict[str, str | None] = {}
        self._composers: dict[tuple[str, str, bool], Compose] = {}
        self._group: tuple[Any, Any, Compose] | None = None
        """What the last group's jobs have in common, the chord they are of, and their composer."""
        self._composer: Composer
        self._channel: ProducingChannel
        self._errors: tuple[tuple[type[BaseException], ...], ...] = ((), ())
        """What says that the connection was lost, and what else the broker may say."""
        self._retry_policy: dict[str, Any] | None = None
        self._default_queue: Any = None

    # Whether, and to which queue.

    def _goes_here(self) -> bool:
        """Whether the configuration asks for nothing but what is done here."""
        if (
            signals.before_task_publish.receivers
            or signals.after_task_publish.receivers
            or signals.task_sent.receivers
            or celery_amqp._callback_publish_retry.get()
        ):
            return False
        conf = self._app.conf
        decided = (conf, *map(conf.changes.get, _DECIDES))
        if (
            decided != self._decided
            or self._app.pool is not self._pool
            or os.getpid() != self._pid
            # Whoever shares its connection, remote control say, found that lost and closed it.
            or (self._is_plain and self._channel.closed)
        ):
            try:
                self._decide(conf)
            except OperationalError:
                # Nobody is there. Celery's way knows how often to try, and what to say.
                self._decided = ()
                return False
            self._decided, self._pool, self._pid = decided, self._app.pool, os.getpid()
        return self._is_plain and not self._app.backend.subscribes_on_call

    def _decide(self, conf: Any) -> None:
        self._queues = {}
        self._composers = {}
        self._group = None
        policy = dict(conf.task_publish_retry_policy or {})
        policy.pop("retry_errors", None)
        self._retry_policy = policy if conf.task_publish_retry else None
        self._default_queue = conf.task_default_queue
        self._is_plain = (
            conf.task_protocol == 2
            and conf.task_serializer == conf.event_serializer == "json"
            and not conf.task_always_eager
            and not conf.task_compression
            and not conf.task_inherit_parent_priority
            and not self._app.amqp.router.routes
        )
        if self._is_plain:
            with self._app.celerys_producer() as producer:
                channel = producer.channel
            self._is_plain = isinstance(channel, ProducingChannel)
            self._channel = channel
            self._composer = Composer(self._app, channel)
            transport = channel.connection
            self._errors = transport.connection_errors, transport.channel_errors

    def _queue_named(self, name: Any) -> str | None:
        """The queue's name; None if Celery must find out where that is."""
        name = name or self._default_queue
        if not isinstance(name, str):
            return None
        if name not in self._queues:
            self._queues[name] = self._declared(name)
        return self._queues[name]

    def _declared(self, name: str) -> str | None:
        try:
            queue = self._app.amqp.queues[name]
        except KeyError:
            return None
        if queue.exchange.type != "direct":
            return None
        with self._app.celerys_producer() as producer:
            producer.maybe_declare(queue)
        found: str = queue.name
        return found

    # One.

    def submit(
        self, task: JobTask, args: Any, kwargs: Any, about: dict[str, Any], options: dict[str, Any]
    ) -> Any:
        """Submit a job. None, and nothing done, if it must go Celery's way."""
        batch = options.get("producer")
        if (batch is not None and not isinstance(batch, Batch)) or not self._goes_here():
            return None
        merged = self._merged(task, options)
        queue = None if merged is None else self._queue_named(merged.get("queue"))
        if merged is None or queue is None:
            return None
        check_limits(task)
        if task.typing:
            task.__header__(*(args or ()), **(kwargs or {}))
        merged["shadow"] = merged.get("shadow") or task.shadow_name(args, kwargs, options)
        merged["task_id"] = task_id = merged.get("task_id") or uuid()
        parent = self._app.current_worker_task
        if parent and not merged.get("root_id"):
            merged["root_id"] = parent.request.root_id or parent.request.id
        if parent and not merged.get("parent_id"):
            merged["parent_id"] = parent.request.id

        compose, index = self._composer_for(task, options, merged, queue), merged.get("group_index")
        try:
            one = (
                self._composer.one(task.name, args or (), kwargs or {}, about, merged, queue)
                if compose is None
                else compose(task_id, args or (), kwargs or {}, about, index)
            )
        except (TypeError, ValueError) as error:
            raise EncodeError(str(error)) from error
        if not retry.keep(task_id, one):
            if batch is None:
                self.put([one])
            else:
                batch.add(one)

        result = task.AsyncResult(task_id)
        result.ignored = merged["ignore_result"]
        result.submitted = time.monotonic()
        if parent and merged.get("add_to_parent", True):
            parent.add_trail(result)
        return result

    def _composer_for(
        self, task: JobTask, options: Mapping[str, Any], merged: dict[str, Any], queue: str
    ) -> Compose | None:
        """Who composes messages such as this one; None if there may be no other."""
        if merged["shadow"] is not None:
            return None
        name = (task.name, queue, task.ignore_result)
        if options.keys() <= _SIMPLE and merged.get("root_id") is None:
            # The usual `.delay()`: what it says beside its arguments, it said the last time.
            if name not in self._composers:
                self._composers[name] = self._composer.many(task, merged, queue)
            return self._composers[name]
        index, chord = merged.get("group_index"), merged.get("chord")
        if not (options.keys() <= _OF_A_GROUP and type(index) is int and index >= _ENOUGH):
            return None
        common = (name, *map(merged.get, _COMMON))
        # One of the group's own: another thread may be at another group.
        group = self._group
        if group is None or group[0] != common or group[1] is not chord:
            self._group = group = (common, chord, self._composer.many(task, merged, queue))
        return group[2]

    # Many.

    def submit_many(
        self,
        task: JobTask,
        calls: Sequence[tuple[Any, Any]],
        ids: Sequence[str],
        abouts: Sequence[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> bool:
        """Submit a job for each call. False, and nothing done, if they must go Celery's way."""
        if not self._goes_here():
            return False
        merged = self._merged(task, options)
        queue = None if merged is None else self._queue_named(merged.get("queue"))
        if merged is None or queue is None or type(task).shadow_name is not Task.shadow_name:
            return False
        parent = self._app.current_worker_task
        if parent:
            merged.setdefault("root_id", parent.request.root_id or parent.request.id)
            merged.setdefault("parent_id", parent.request.id)
        compose = self._composer.many(task, merged, queue)
        jobs = zip(ids, calls, abouts, strict=True)
        while some := list(islice(jobs, A_SCRIPT)):
            self.put([compose(task_id, *call, about, None) for task_id, call, about in some])
        return True

    def _merged(self, task: JobTask, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """The options with the task's own, if all of them are handled here."""
        merged = {k: v for k, v in task._get_exec_options().items() if v is not None}
        merged.update(options)
        merged.setdefault("ignore_result", task.ignore_result)
        for name in [name for name, value in merged.items() if name not in _HANDLED]:
            if merged.pop(name) is not None:
                return None
        if merged.get("serializer") not in (None, "json"):
            return None
        return None if task._dump_pydantic_arguments is not None else merged

    # Sending.

    def put(self, puts: Sequence[Put]) -> None:
        """Put them, and again after a lost connection, as the configuration says."""
        # It may be closed meanwhile, and has no transport then; it puts all the same.
        channel, (lost, refused) = self._channel, self._errors

        def act() -> None:
            channel.putter.put(puts, tell=self._composer.told)

        try:
            if self._retry_policy is None:
                act()
            else:
                retry_over_time(act, lost, **self._retry_policy)
        except (*lost, *refused) as error:
            raise OperationalError(str(error)) from error


def check_limits(task: Any) -> None:
    """Celery's check, in Celery's words."""
    if task.soft_time_limit and task.time_limit and task.soft_time_limit > task.time_limit:
        raise ValueError("soft_time_limit must be less than or equal to time_limit")
