"""Submitting without Celery's detours, wherever a submission needs none of them.

Celery's own way to a queue costs a job ten times what the queue itself does: it routes, signals,
declares, builds a client and tells events each on a journey of its own. Here the same message is
built by the same function (`as_task_v2`), put by one script, many at a time if there are many, and
its event rides along. Whatever this doesn't handle goes Celery's way: signals somebody receives,
routes, exchanges, other serializers, stamps, expiry, another broker. No option means less here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from celery import Celery, Task, signals
from celery.app import amqp as celery_amqp
from celery.utils.functional import maybe_list
from celery.utils.nodenames import anon_nodename
from celery.utils.saferepr import saferepr
from kombu.exceptions import EncodeError, OperationalError
from kombu.serialization import dumps as serialize
from kombu.utils.functional import retry_over_time
from kombu.utils.json import dumps
from kombu.utils.uuid import uuid

from broker import retry
from broker.producing import A_SCRIPT, ProducingChannel, Put, due_ms, identity_of, without_defaults
from tasks.templates import Template, encoded

if TYPE_CHECKING:
    from tasks.job import JobTask

_TOLD = frozenset(
    [
        "task_id",
        "countdown",
        "eta",
        "group_id",
        "group_index",
        "retries",
        "chord",
        "chain",
        "link",
        "link_error",
        "reply_to",
        "time_limit",
        "soft_time_limit",
        "root_id",
        "parent_id",
        "shadow",
        "ignore_result",
        "replaced_task_nesting",
        "origin",
    ]
)
"""Options that `as_task_v2` puts into the message."""
_MARKS = ("id", "args", "kwargs", "body", "tag", "about", "clock", "timestamp")
_SIMPLE = frozenset(("task_id", "producer"))
_HANDLED = _TOLD | {"add_to_parent", "queue", "priority", "headers", "producer", "serializer"}

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

Compose = Callable[[str, Any, Any, dict[str, Any]], Put]
"""Task id, arguments by position and by name, what `cohort` says -> the message."""

_PLAIN = frozenset((int, float, bool, type(None)))


class App(Celery):  # type: ignore[misc]
    """A Celery app whose groups are submitted many at a time."""

    @cached_property
    def submitter(self) -> Submitter:
        """How this process submits."""
        return Submitter(self)

    @cached_property
    def GroupResult(self) -> Any:
        """The class of a group's results."""
        return self.subclass_with_self(
            "tasks.waiting:JobGroupResult", name="GroupResult", reverse="GroupResult"
        )

    def producer_or_acquire(self, producer: Any = None) -> AbstractContextManager[Any]:
        """Celery asks for one producer a group: what is submitted through this one is gathered."""
        if producer is None:
            return Batch(self)
        context: AbstractContextManager[Any] = super().producer_or_acquire(producer)
        return context


class Batch:
    """A producer that keeps what is submitted through it, and puts it in bounded steps.

    Ends its block in an error, it puts nothing more. What it isn't asked by us it leaves to a
    producer of Celery's, once what it has kept is sent.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._puts: list[Put] = []
        self._celerys: Any = None
        self._context: AbstractContextManager[Any] | None = None

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                self.flush()
        finally:
            if self._context is not None:
                self._context.__exit__(*error)

    def add(self, one: Put) -> None:
        """Put it, now or with those that follow."""
        self._puts.append(one)
        if len(self._puts) >= A_SCRIPT:
            self.flush()

    def flush(self) -> None:
        """Put what was kept."""
        puts, self._puts = self._puts, []
        if puts:
            self._app.submitter.put(puts)

    def __getattr__(self, name: str) -> Any:
        self.flush()
        if self._celerys is None:
            self._context = super(App, self._app).producer_or_acquire(None)
            self._celerys = self._context.__enter__()
        return getattr(self._celerys, name)


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
        self._telling: dict[str, tuple[str, Template]] = {}
        self._channel: ProducingChannel
        self._errors: tuple[tuple[type[BaseException], ...], ...] = ((), ())
        """What says that the connection was lost, and what else the broker may say."""
        self._tells = False
        self._retry_policy: dict[str, Any] | None = None
        self._origin = ""
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
        self._telling = {}
        self._origin = anon_nodename()
        self._tells = bool(conf.task_send_sent_event)
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
            with super(App, self._app).producer_or_acquire() as producer:
                channel = producer.channel
            self._is_plain = isinstance(channel, ProducingChannel)
            self._channel = channel
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
        with super(App, self._app).producer_or_acquire() as producer:
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

        if parent is None and options.keys() <= _SIMPLE and merged["shadow"] is None:
            # The usual `.delay()`: what it says beside its arguments, it said the last time.
            name = (task.name, queue, task.ignore_result)
            if name not in self._composers:
                self._composers[name] = self._composer(task, merged, queue)
            compose = self._composers[name]
        else:

            def compose(task_id: str, args: Any, kwargs: Any, about: dict[str, Any]) -> Put:
                return self._composed(task.name, args, kwargs, about, merged, queue)

        try:
            one = compose(task_id, args or (), kwargs or {}, about)
        except (TypeError, ValueError) as error:
            raise EncodeError(str(error)) from error
        if not retry.keep(task_id, one):
            if batch is None:
                self.put([one])
            else:
                batch.add(one)

        result = task.AsyncResult(task_id)
        result.ignored = merged["ignore_result"]
        if parent and merged.get("add_to_parent", True):
            parent.add_trail(result)
        return result

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
        compose = self._composer(task, merged, queue)
        jobs = zip(ids, calls, abouts, strict=True)
        while some := list(islice(jobs, A_SCRIPT)):
            self.put([compose(task_id, *call, about) for task_id, call, about in some])
        return True

    def _composer(self, task: JobTask, options: dict[str, Any], queue: str) -> Compose:
        """Composes the messages of many jobs that have all but id, arguments and key in common."""
        marks = {name: f"{name} {uuid()}" for name in _MARKS}
        one = self._composed(task.name, (), {}, {}, {**options, "task_id": marks["id"]}, queue)
        message = json.loads(one.payload)
        embedded = json.dumps(json.loads(message["body"])[2])
        message["body"] = marks["body"]
        message["properties"]["delivery_tag"] = marks["tag"]
        told = {"argsrepr": marks["args"], "kwargsrepr": marks["kwargs"], "cohort": marks["about"]}
        message["headers"].update(told)
        payload = Template(json.dumps(message), marks)
        event: Template | None = None
        if one.event:
            sent = json.loads(one.event)
            sent.update({name: marks[name] for name in ("args", "kwargs", "clock", "timestamp")})
            event = Template(json.dumps(sent), marks)
        forward = self._app.clock.forward
        identity = one.identity.removeprefix(marks["id"])

        def compose(task_id: str, args: Any, kwargs: Any, about: dict[str, Any]) -> Put:
            said = {
                "id": encoded(task_id),
                "args": encoded(self._shown(args)),
                "kwargs": encoded(self._shown(kwargs)),
                "body": encoded(f"[{encoded(args)}, {encoded(kwargs)}, {embedded}]"),
                "tag": encoded(uuid()),
                "about": encoded(about),
            }
            text = payload.filled(said)
            telling = ""
            if event is not None:
                said["clock"], said["timestamp"] = str(forward()), repr(time.time())
                telling = event.filled(said)
            return Put(one.list, one.queue, text, task_id + identity, one.due_ms, telling)

        return compose

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

    def _composed(
        self,
        name: str,
        args: Any,
        kwargs: Any,
        about: dict[str, Any],
        options: Mapping[str, Any],
        queue: str,
    ) -> Put:
        """The message, as Celery builds it, and what is said of it."""
        told = {name: options[name] for name in _TOLD & options.keys()}
        for link, key in (("callbacks", "link"), ("errbacks", "link_error")):
            told[link] = maybe_list(told.pop(key, None))
        told.setdefault("origin", self._origin)
        headers, properties, body, event = self._app.amqp.as_task_v2(
            told.pop("task_id"),
            name,
            args,
            kwargs,
            create_sent_event=self._tells,
            argsrepr=self._shown(args),
            kwargsrepr=self._shown(kwargs),
            **told,
        )
        headers.update(options.get("headers") or {})
        headers["cohort"] = about
        content_type, content_encoding, text = serialize(
            (*body[:2], {key: value for key, value in body[2].items() if value is not None}), "json"
        )
        message = {
            "body": text,
            "content-encoding": content_encoding,
            "content-type": content_type,
            "headers": without_defaults(headers),
            "properties": {
                **{key: value for key, value in properties.items() if value},
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": options.get("priority") or 0,
                "delivery_tag": uuid(),
            },
        }
        if event:
            event.update(queue=queue, exchange="", routing_key=queue)
            event = self._app.amqp._event_dispatcher._prepare_event("task-sent", event)
        channel = self._channel
        return Put(
            channel.list_for(queue, channel._get_message_priority(message, reverse=False)),
            queue,
            dumps(message),
            identity_of(headers),
            due_ms(headers),
            dumps(event) if event else "",
        )

    def _shown(self, arguments: Any) -> str:
        """What Celery's `saferepr` says, in a fifth of the time where nothing is to be feared."""
        if not arguments or (
            type(arguments) in (tuple, list)
            and len(arguments) < 9
            and all(type(one) in _PLAIN for one in arguments)
        ):
            return repr(arguments)
        shown: str = saferepr(arguments, 1024, maxlevels=self._app.conf.task_repr_maxlevels)
        return shown

    # Sending.

    def put(self, puts: Sequence[Put]) -> None:
        """Put them, and again after a lost connection, as the configuration says."""
        # It may be closed meanwhile, and has no transport then; it puts all the same.
        channel, (lost, refused) = self._channel, self._errors

        def act() -> None:
            channel.putter.put(puts, tell=self._tell)

        try:
            if self._retry_policy is None:
                act()
            else:
                retry_over_time(act, lost, **self._retry_policy)
        except (*lost, *refused) as error:
            raise OperationalError(str(error)) from error

    def _tell(self, events: Sequence[str]) -> tuple[str, str]:
        """The channel and the message by which whoever listens to events hears of these."""
        name = "task.sent" if len(events) == 1 else "task.multi"
        if name not in self._telling:
            self._telling[name] = self._envelope(name)
        topic, envelope = self._telling[name]
        body = events[0] if len(events) == 1 else f"[{','.join(events)}]"
        return topic, envelope.filled({"body": encoded(body), "tag": encoded(uuid())})

    def _envelope(self, routing_key: str) -> tuple[str, Template]:
        dispatcher = self._app.amqp._event_dispatcher
        exchange: str = dispatcher.exchange.name
        marks = {name: f"{name} {uuid()}" for name in ("body", "tag")}
        message = {
            "body": marks["body"],
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": dispatcher.headers,
            "properties": {
                "delivery_mode": 1,
                "delivery_info": {"exchange": exchange, "routing_key": routing_key},
                "priority": 0,
                "delivery_tag": marks["tag"],
            },
        }
        topic: str = self._channel._get_publish_topic(exchange, routing_key)
        return topic, Template(json.dumps(message), marks)


def check_limits(task: Any) -> None:
    """Celery's check, in Celery's words."""
    if task.soft_time_limit and task.time_limit and task.soft_time_limit > task.time_limit:
        raise ValueError("soft_time_limit must be less than or equal to time_limit")


__all__ = ["App", "Batch", "Submitter"]
