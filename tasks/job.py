"""`@job`: a function becomes a Celery task with a key, needs and limits.

The key names the job's lock and its directory. It is a template over the function's arguments
and is worked out when the job is submitted, so that a bad one is refused before anything is sent.
"""

from __future__ import annotations

import functools
import inspect
import re
import string
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args, overload

from celery import Celery, Task
from celery.utils.functional import head_from_fun
from kombu.serialization import loads, prepare_accept_content

from broker.needs import Needs
from broker.transport import Qualities
from errors import CohortError, DeadLettered, InvalidKey, Refused
from storage.keys import check_key
from tasks.bulk import Submitted, submit_many
from tasks.journal import root_of
from tasks.settings import current, parse_size, parse_span

_HARD_LIMIT_GRACE = 30.0
"""Seconds that a job has to clean up after its timeout, before its process is killed."""

PREFORK = "prefork"
"""The label of a node whose pool has processes."""

Conflict = Literal["wait", "skip", "replace"]
"""What a submission does whose key is taken: it waits its turn; it is dropped; or it takes the
place of the one that waits.
"""


class _ANeedOnly(str):
    """The memory of a job whose author gave none: it is kept free, and nobody is held to it."""

    __slots__ = ()


_MEMORY = _ANeedOnly("512 MiB")


@dataclass(frozen=True)
class JobDefinition:
    """What `@job` was told. Memory is in bytes, timeout in seconds."""

    function: Callable[..., Any]
    key: str | None
    cpus: int
    memory: int
    """What a node must have free for it."""
    retries: int
    timeout: float | None
    after_commit: Callable[[Any], object] | None
    memory_limit: int | None = None
    """What it is ended for exceeding: its memory, if its author gave one."""
    gpus: int = 0
    labels: tuple[str, ...] = ()
    """What a node must be called to run it: each of them, in order, each once."""
    conflict: Conflict = "wait"
    directory: bool = True
    """False: the key is a lock only. No directory, and an outcome like a keyless job's."""

    @cached_property
    def needs(self) -> Needs:
        """What a node must have to spare, and the label `prefork` if only a process will do."""
        labels = {*self.labels, PREFORK} if self.needs_a_process else self.labels
        return Needs(self.cpus, self.memory, self.gpus, frozenset(labels))

    @property
    def needs_a_process(self) -> bool:
        """Whether a thread of a worker won't do: it has a directory, or is to be ended in time."""
        has_files = self.key is not None and self.directory
        return has_files or self.timeout is not None or self.memory_limit is not None

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the header `cohort` says of every submission, for the broker to read."""
        about = {"needs": self.needs.text}
        if self.conflict != "wait":
            about["conflict"] = self.conflict
        return about

    @cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self.function)

    def key_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The key for these arguments, or None for a keyless job. Raises `InvalidKey`."""
        if self.key is None:
            return None
        bound = self._signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        try:
            key = self.key.format(**bound.arguments)
        except (ValueError, TypeError) as error:
            raise InvalidKey(
                f"{self.function.__qualname__}: key {self.key!r} doesn't fit its arguments: {error}"
            ) from None
        return check_key(key)


class JobTask(Task):  # type: ignore[misc]
    """A Celery task that tells the broker what it needs; the base of every task of the app."""

    Request = "tasks.request:JobRequest"
    throws = (CohortError,)  # These say all there is to say: no traceback in the log.
    definition: JobDefinition | None = None

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *positional: Any,
        **options: Any,
    ) -> Any:
        """Submit it. The key travels in the message's header `cohort`, for the broker to read.

        `durable=True`: it is accepted when a note of it is on the shared folder, and put back into
        its queue if Redis loses it.
        """
        about = self.about(args or (), kwargs or {})
        if options.pop("durable", False):
            root_of(self.app)
            about["durable"] = True
        elif (self.request.get("cohort") or {}).get("durable") and (
            options.get("task_id") == self.request.id
        ):
            about["durable"] = "noted"  # A retry: the note of the first try stands for it.
        if not positional and "durable" not in about:
            submitted = self._get_app().submitter.submit(self, args, kwargs, about, options)
            if submitted is not None:
                return submitted
        options["headers"] = {**(options.get("headers") or {}), "cohort": about}
        return super().apply_async(args, kwargs, *positional, **options)

    def about(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What the header `cohort` says of a submission: its key, and what it needs."""
        if self.definition is None:
            return {}
        try:
            key = self.definition.key_of(args, kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from None
        said = self.definition.about
        return dict(said) if key is None else {**said, "key": key}

    def submit_many(
        self,
        calls: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
        *,
        task_ids: Iterable[str] | None = None,
        **options: Any,
    ) -> Submitted:
        """Submit a job for each call, a pair of its arguments by position and by name, in order.

        All are checked before the first is sent. `options` are `apply_async`'s, for all of them.
        With `task_ids` of one's own, doing it again after an error submits only what is missing.
        """
        return submit_many(self, calls, task_ids, options)

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """A plain task that was lost too often isn't tried again; a job's attempt checks it."""
        if self.definition is None:
            refuse_if_dead(self.request)


def refuse_if_dead(request: Any) -> None:
    """Raise `DeadLettered` for a delivery that was lost with its node or process too often."""
    lost = request.get("cohort_lost") or 0
    if lost >= current().deliveries:
        raise DeadLettered(
            f"{request.task}[{request.id}]: its node or process died on each of {lost} deliveries; "
            "it isn't tried again"
        )


@overload
def job(function: Callable[..., Any]) -> JobTask: ...


@overload
def job(
    *,
    key: str | None = None,
    cpus: int = 1,
    memory: str | int = _MEMORY,
    retries: int = 0,
    timeout: str | float | None = None,
    after_commit: Callable[[Any], object] | None = None,
    gpus: int = 0,
    labels: Sequence[str] = (),
    conflict: Conflict = "wait",
    directory: bool = True,
    **options: Any,
) -> Callable[[Callable[..., Any]], JobTask]: ...


def job(
    function: Callable[..., Any] | None = None,
    *,
    key: str | None = None,
    cpus: int = 1,
    memory: str | int = _MEMORY,
    retries: int = 0,
    timeout: str | float | None = None,
    after_commit: Callable[[Any], object] | None = None,
    gpus: int = 0,
    labels: Sequence[str] = (),
    conflict: Conflict = "wait",
    directory: bool = True,
    **options: Any,
) -> Any:
    """Make a function that takes a `Run` first into a Celery task of Cohort's app.

    `key` is a template over the function's arguments, `None` for a job without lock and directory.
    `retries` counts tries after the first. `timeout` is a span such as "2h". A job that takes more
    than the `memory` given is ended; without one a node keeps 512 MiB free for it. `after_commit`
    is called with the result once it is committed, and again if the job is delivered again: it
    must be idempotent. It runs on a node with `gpus` to spare that bears every one of `labels`.

    `conflict` says what becomes of a submission whose key is taken: "wait" for its turn, "skip" it,
    or "replace" the one that waits. With `directory=False` the key is a lock and nothing else: the
    run's directory is empty and its own, nothing is committed. Further options are Celery's.
    """
    if function is None:
        return functools.partial(
            job,
            key=key,
            cpus=cpus,
            memory=memory,
            retries=retries,
            timeout=timeout,
            after_commit=after_commit,
            gpus=gpus,
            labels=labels,
            conflict=conflict,
            directory=directory,
            **options,
        )
    definition = _define(
        function,
        key,
        cpus,
        memory,
        retries,
        timeout,
        after_commit,
        gpus,
        labels,
        conflict,
        directory,
    )
    return _register(definition, options)


def _define(
    function: Callable[..., Any],
    key: str | None,
    cpus: int,
    memory: str | int,
    retries: int,
    timeout: str | float | None,
    after_commit: Callable[[Any], object] | None,
    gpus: int,
    labels: Sequence[str],
    conflict: Conflict,
    directory: bool,
) -> JobDefinition:
    name = f"@job {function.__qualname__}"
    parameters = list(inspect.signature(function).parameters)
    if not parameters:
        raise Refused(f"{name}: its first parameter must be the run: def {function.__name__}(run)")
    for field in _fields_of(key or "", name):
        if field not in parameters[1:]:
            raise InvalidKey(
                f"{name}: key {key!r} names {{{field}}}; its arguments are "
                f"{', '.join(parameters[1:]) or 'none'}"
            )
    counts: tuple[tuple[str, object, int], ...] = (
        ("cpus", cpus, 1),
        ("gpus", gpus, 0),
        ("retries", retries, 0),
    )
    for option, value, least in counts:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise Refused(f"{name}: {option} must be a whole number of at least {least}")
    _check_key_options(name, key, conflict, directory)
    try:
        return JobDefinition(
            function=function,
            key=key,
            cpus=cpus,
            memory=parse_size(memory),
            retries=retries,
            timeout=None if timeout is None else parse_span(timeout),
            after_commit=after_commit,
            gpus=gpus,
            labels=_labels(labels, name),
            conflict=conflict,
            directory=directory,
            memory_limit=None if isinstance(memory, _ANeedOnly) else parse_size(memory),
        )
    except ValueError as error:
        raise Refused(f"{name}: memory or timeout: expected {error}") from None


def _check_key_options(name: str, key: str | None, conflict: object, directory: object) -> None:
    if conflict not in get_args(Conflict):
        raise Refused(f"{name}: conflict must be one of {', '.join(get_args(Conflict))}")
    if not isinstance(directory, bool):
        raise Refused(f"{name}: directory must be True or False")
    if key is None and conflict != "wait":
        raise Refused(f"{name}: conflict={conflict!r} is about a key, and it has none: give it one")
    if key is None and not directory:
        raise Refused(
            f"{name}: directory=False is about a key, and it has none: leave it out; "
            "a job without a key has no lasting directory"
        )


_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:=/-]{0,62}")


def _labels(labels: object, name: str) -> tuple[str, ...]:
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise Refused(f'{name}: labels must be a list of names, such as ["ssd"]')
    for label in labels:
        if not isinstance(label, str) or not _LABEL.fullmatch(label):
            raise Refused(
                f"{name}: label {ascii(label)[:60]} is none: 1 to 63 letters, digits and "
                "'_', '.', ':', '=', '/' or '-', beginning with a letter or digit"
            )
    return tuple(sorted(set(labels)))


def _fields_of(template: str, name: str) -> list[str]:
    """The arguments that a key names, also those inside a format: `{n:{width}}`."""
    fields = []
    try:
        for _, field, spec, _ in string.Formatter().parse(template):
            if field is not None:
                fields += [field, *_fields_of(spec or "", name)]
    except ValueError as error:
        raise InvalidKey(f"{name}: key {template!r} is no template: {error}") from None
    return fields


def _register(definition: JobDefinition, options: dict[str, Any]) -> JobTask:
    from tasks.application import app
    from tasks.attempt import attempt

    function = definition.function

    @functools.wraps(function)
    def body(self: JobTask, *args: Any, **kwargs: Any) -> Any:
        return attempt(self, args, kwargs)

    limits = {}
    if definition.timeout is not None:
        limits = {
            "soft_time_limit": definition.timeout,
            "time_limit": definition.timeout + _HARD_LIMIT_GRACE,
        }
    for option in ("acks_late", "reject_on_worker_lost"):
        if not options.pop(option, True):
            raise Refused(
                f"@job {function.__qualname__}: {option}=False: a job is acknowledged when its "
                "outcome is on disk; a plain task of Celery's has the choice"
            )
    # A job with files takes its time; of one without, STARTED would cost more than the job.
    options.setdefault("track_started", definition.key is not None and definition.directory)
    task: JobTask = app.task(
        bind=True,
        definition=definition,
        max_retries=definition.retries,
        __header__=staticmethod(head_from_fun(function, bound=True)),
        # Now: made at its first use, by two threads at once, one of them finds it half made.
        lazy=False,
        **{**limits, **options},
        # Its claim ends when its outcome is on disk, and goes back when its process is lost.
        acks_late=True,
        reject_on_worker_lost=True,
    )(body)
    return task


def qualities_of_message(app: Celery, message: Mapping[str, Any]) -> Qualities:
    """What a message is that a stock producer wrote."""
    task = app.tasks.get(message["headers"].get("task"))
    definition: JobDefinition | None = getattr(task, "definition", None)
    if definition is None:
        return Qualities()
    return Qualities(_key_in(definition, message), definition.needs, definition.conflict)


def _key_in(definition: JobDefinition, message: Mapping[str, Any]) -> str:
    if definition.key is None:
        return ""
    try:
        body = message["body"]
        if message["properties"].get("body_encoding") == "base64":
            body = b64decode(body)
        args, kwargs, _ = loads(
            body,
            message["content-type"],
            message["content-encoding"],
            accept=prepare_accept_content(["json"]),
        )
        return definition.key_of(args, kwargs) or ""
    except Exception:
        # The attempt fails with the reason, in an outcome that somebody sees.
        return ""
