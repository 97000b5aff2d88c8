"""Submitting many jobs by one call, and the results of that, made when somebody asks for them.

The message of a job is built once; of the others only what differs: id, arguments, key. A
submission is checked as a whole before the first job is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.result import ResultSet
from kombu.utils.uuid import uuid

from tasks.waiting import JobGroupResult

if TYPE_CHECKING:
    from tasks.job import JobTask

Call = tuple[Sequence[Any], Mapping[str, Any]]
"""One job's arguments: by position, and by name."""


class Submitted(JobGroupResult):
    """The results of `submit_many`, in its order: a `GroupResult` under an id of its own.

    `ids` costs nothing. The results themselves are made when something looks at them.
    """

    ids: list[str]

    def __init__(self, id: str, ids: list[str], app: Any, **kwargs: Any) -> None:
        self.id = id
        self.ids = ids
        self.parent = None
        self._app = app

    def __len__(self) -> int:
        return len(self.ids)

    def __getattribute__(self, name: str) -> Any:
        if name in ("results", "on_ready", "_on_full") and name not in self.__dict__:
            made = [self._app.AsyncResult(task_id) for task_id in self.ids]
            ResultSet.__init__(self, made, app=self._app)
        return super().__getattribute__(name)

    def __reduce__(self) -> Any:
        return _unpickled, (self.id, self.ids)


def _unpickled(id: str, ids: list[str]) -> Submitted:
    from tasks.application import app

    return Submitted(id, ids, app)


def submit_many(
    task: JobTask, calls: Iterable[Call], task_ids: Iterable[str] | None, options: dict[str, Any]
) -> Submitted:
    """Submit a job for each call, with `apply_async`'s options for all of them."""
    app = task._get_app()
    checked = [_checked(at, call) for at, call in enumerate(calls)]
    ids = [uuid() for _ in checked] if task_ids is None else list(task_ids)
    _check_ids(ids, len(checked))
    if task.typing:
        for args, kwargs in checked:
            task.__header__(*args, **kwargs)
    abouts = [task.about(args, kwargs) for args, kwargs in checked]
    submitted = Submitted(uuid(), ids, app)
    if app.submitter.submit_many(task, checked, ids, abouts, options):
        if app.current_worker_task:
            app.current_worker_task.add_trail(submitted)
    else:
        for task_id, (args, kwargs) in zip(ids, checked, strict=True):
            task.apply_async(args, kwargs, task_id=task_id, **options)
    return submitted


def _checked(at: int, call: Any) -> Call:
    if isinstance(call, (list, tuple)) and len(call) == 2:
        args, kwargs = call
        if isinstance(args, (list, tuple)) and isinstance(kwargs, Mapping):
            return args, kwargs
    raise TypeError(
        f"job {at} of submit_many is {ascii(call)[:60]}; expected a pair of its arguments: "
        "a list by position and a dictionary by name, such as ([1, 2], {})"
    )


def _check_ids(ids: list[Any], count: int) -> None:
    if len(ids) != count:
        raise ValueError(f"submit_many: {len(ids)} task ids for {count} jobs; one each, or none")
    if not all(isinstance(task_id, str) and task_id for task_id in ids):
        raise TypeError("submit_many: a task id is a text that isn't empty")
    if len(set(ids)) != count:
        raise ValueError("submit_many: a task id stands there twice: an id is one job")
