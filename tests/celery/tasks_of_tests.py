"""The tasks of these tests, defined once, for every app of their process.

What a test wants to see from outside a task leaves as a file: started, called, not called.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery import Task, chain, current_app, group, shared_task, signature
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.worker.control import control_command, inspect_command

LONGEST = 30.0

if os.environ.get("ACCEPTED"):
    # A worker that accepts more than JSON.
    current_app.conf.accept_content = os.environ["ACCEPTED"].split(",")


def task(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`shared_task`, with a type."""
    decorator: Callable[[Callable[..., Any]], Any] = shared_task(**options)
    return decorator


@task()
def add(x: int, y: int) -> int:
    return x + y


@task()
def subtract(x: int, y: int) -> int:
    return x - y


@task()
def mul(x: int, y: int) -> int:
    return x * y


@task()
def tsum(numbers: list[int]) -> int:
    return sum(numbers)


@task()
def echo(*args: Any, **kwargs: Any) -> Any:
    return [list(args), kwargs]


@task()
def same(value: Any) -> Any:
    return value


@task()
def fail(*args: Any, message: str = "as told") -> None:
    raise ValueError(message)


@task()
def note(*args: Any, path: str, word: str = "") -> Any:
    """Leaves a line with what it was called with."""
    with Path(path).open("a") as file:
        file.write(json.dumps([word, *args] if word else list(args)) + "\n")
    return args[0] if args else None


@task()
def note_error(request: Any, exc: BaseException, traceback: Any, path: str) -> None:
    """An errback of the new style: it is called with the request, in the worker."""
    with Path(path).open("a") as file:
        file.write(f"{request.id} {type(exc).__name__} {exc}\n")


@task()
def note_failed_id(task_id: str, path: str) -> None:
    """An errback of the old style: it is a task, with the id of the one that failed."""
    with Path(path).open("a") as file:
        file.write(f"{task_id}\n")


@task(track_started=True)
def hold(name: str, folder: str, value: Any = "held") -> Any:
    """Says that it runs, and runs until it is let go; a run more leaves a line more."""
    with Path(folder, f"{name}.runs").open("a") as file:
        file.write(f"{os.getpid()}\n")
    ends = time.monotonic() + LONGEST
    while not Path(folder, f"{name}.go").exists():
        if time.monotonic() > ends:
            raise TimeoutError(name)
        time.sleep(0.02)
    return value


@task(bind=True, track_started=True)
def report_progress(self: Task, steps: list[int]) -> str:
    for step in steps:
        self.update_state(state="PROGRESS", meta={"progress": step})
    return "hello world"


@task(bind=True)
def request_of(self: Task, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What a task knows of its own call."""
    request = self.request
    names = (
        *("id", "args", "kwargs", "argsrepr", "kwargsrepr", "shadow", "parent_id", "root_id"),
        *("group", "retries", "timelimit", "ignore_result", "correlation_id", "reply_to", "task"),
        *("origin", "hostname", "lang", "eta", "expires", "stamps", "stamped_headers"),
        *("is_eager", "periodic_task_name", "replaced_task_nesting"),
    )
    found = {name: getattr(request, name, None) for name in names}
    found["headers"] = dict(request.headers or {})
    delivery = request.delivery_info or {}
    found["delivery"] = {name: delivery.get(name) for name in ("exchange", "routing_key")}
    found["priority"] = delivery.get("priority")
    found["called_directly"] = request.called_directly
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


@task()
def call(what: Any) -> str:
    """Calls a signature that it was given."""
    return str(signature(what).delay().id)


@task(bind=True)
def progress_and_hold(self: Task, name: str, folder: str) -> Any:
    self.update_state(state="PROGRESS", meta={"progress": 7})
    return hold(name, folder)


class StrangeError(Exception):
    """Unknown to who waits: its module is hidden below."""

    __module__ = "only.in.the.worker"


@task()
def fail_strangely() -> None:
    raise StrangeError("of the worker's own")


@task(bind=True, max_retries=3)
def retry_until(self: Task, times: int, countdown: float = 0) -> int:
    if self.request.retries < times:
        raise self.retry(countdown=countdown, exc=ValueError("not yet"))
    return int(self.request.retries)


@task(
    bind=True, autoretry_for=(KeyError,), retry_backoff=False, default_retry_delay=0, max_retries=2
)
def retry_by_itself(self: Task, times: int) -> int:
    if self.request.retries < times:
        raise KeyError("not yet")
    return int(self.request.retries)


@task(bind=True)
def retry_and_tell(self: Task) -> list[Any]:
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return [self.request.retries, self.request.stamps]


@task(bind=True)
def replace_by_add(self: Task, x: int, y: int) -> Any:
    return self.replace(add.s(x, y))


@task(bind=True)
def replace_by_chain(self: Task, x: int) -> Any:
    return self.replace(chain(add.s(x, 1), mul.s(10)))


@task(bind=True)
def replace_by_group(self: Task, numbers: list[int]) -> Any:
    return self.replace(group(add.s(number, 1) for number in numbers))


@task(bind=True)
def add_to_chord(self: Task, x: int) -> int:
    self.add_to_chord(add.s(x, 100))
    return x


@task()
def spawn(count: int, add_to_parent: bool = True) -> list[str]:
    """Calls further tasks: they are its children."""
    called = [
        add.apply_async((number, number), add_to_parent=add_to_parent) for number in range(count)
    ]
    return [str(result.id) for result in called]


@task()
def wait_for_another(allowed: bool) -> int:
    result = add.delay(1, 1)
    return int(result.get(timeout=10, disable_sync_subtasks=not allowed))


@task()
def until_soft_limit(path: str = "", seconds: float = LONGEST) -> str:
    try:
        time.sleep(seconds)
    except SoftTimeLimitExceeded:
        if path:
            Path(path).touch()
        return "cleaned up"
    return "never"


@task()
def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@task(soft_time_limit=1)
def limited() -> None:
    time.sleep(LONGEST)


@task()
def pid() -> int:
    return os.getpid()


@task()
def grow(mebibytes: int) -> int:
    """Leaves its process with so much more memory."""
    kept.append(os.urandom(1) * (mebibytes << 20))
    return os.getpid()


kept: list[bytes] = []


@task()
def ignored() -> None:
    raise Ignore


@task()
def rejected() -> None:
    raise Reject("as told", requeue=False)


@task(bind=True)
def requeued(self: Task, path: str) -> str:
    """Is rejected once and asks to be delivered again."""
    if not Path(path).exists():
        Path(path).touch()
        raise Reject("once more", requeue=True)
    return "again"


@task()
def die(path: str) -> str:
    """Kills its process at its first run."""
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), 9)
    return "survived"


@task(acks_late=False)
def die_acknowledged() -> None:
    """Kills its process, having been acknowledged before."""
    os.kill(os.getpid(), 9)


@task(rate_limit=None)
def rated(path: str) -> None:
    with Path(path).open("a") as file:
        file.write(f"{time.time()}\n")


@task(bind=True)
def send_event(self: Task, word: str) -> None:
    self.send_event("task-of-mine", word=word)


@task(ignore_result=True)
def silent() -> int:
    return 7


@task(typing=False)
def untyped() -> None:
    """Takes nothing, and is only found out by running it."""


@control_command(args=[("n", int)], signature="[N=1]")  # type: ignore[untyped-decorator]
def multiply_by_two(state: Any, n: int = 1) -> dict[str, Any]:
    return {"ok": n * 2}


@inspect_command()  # type: ignore[untyped-decorator]
def current_prefetch_count(state: Any) -> dict[str, Any]:
    return {"prefetch_count": state.consumer.qos.value}
