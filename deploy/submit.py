"""`./cohort submit`: hand in a job, and with --wait follow it to its outcome."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import redis
from celery import Celery
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from errors import Refused, Unavailable

POLL = 0.2
"""How often, in seconds, a followed job is asked how far it is."""
INTERRUPTED = 130


def run(options: Namespace, app: Celery, out: Console, err: Console) -> int:
    """Submit the job that the options name; the exit code tells its outcome if waited for."""
    name = find_task(options.task, app.tasks)
    args, kwargs = parse_arguments(options.args)
    try:
        result = app.tasks[name].apply_async(args, kwargs)
    except TypeError as error:
        raise Refused(str(error)) from None
    except (OperationalError, redis.RedisError, OSError) as error:
        raise Unavailable(f"Redis doesn't take the job: {type(error).__name__}") from None
    if not options.wait:
        print(json.dumps({"id": result.id, "task": name}) if options.json else result.id)
        return 0
    if not options.json:
        print(result.id, flush=True)
    try:
        _follow(result, name, err)
    except KeyboardInterrupt:
        err.print(f"no longer waiting; {result.id} runs on", highlight=False)
        return INTERRUPTED
    outcome = {"id": result.id, "task": name, "state": result.state}
    if result.state == "SUCCESS":
        outcome["result"] = result.result
    else:
        outcome["error"] = f"{type(result.result).__name__}: {result.result}"
    print(json.dumps(outcome, default=str, ensure_ascii=False))
    return 0 if result.state == "SUCCESS" else 1


def find_task(wanted: str, known: Sequence[str]) -> str:
    """The full name of a task that is named in full or by its last part."""
    names = sorted(name for name in known if not name.startswith("celery."))
    if wanted in names:
        return wanted
    matches = [name for name in names if name.rpartition(".")[2] == wanted]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise Refused(f"{wanted} could be {' or '.join(matches)}: give the full name")
    shorts = {name.rpartition(".")[2]: name for name in names}
    near = difflib.get_close_matches(wanted, [*names, *shorts], n=3, cutoff=0.5)
    near = list(dict.fromkeys(shorts.get(word, word) for word in near))
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
    raise Refused(f"there is no task {wanted}; {hint}")


def parse_arguments(words: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments; each value is JSON if it reads as such, else text."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (equals and re.fullmatch(r"[A-Za-z_]\w*", name)):
            args.append(_value(word))
        elif name in kwargs:
            raise Refused(f"the argument {name} is given twice")
        else:
            kwargs[name] = _value(value)
    return args, kwargs


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class _Display(Protocol):
    def show(self, state: str, meta: dict[str, Any]) -> None: ...


def _follow(result: AsyncResult, name: str, err: Console) -> None:
    with _display(name, err) as display:
        while True:
            meta = result.backend.get_task_meta(result.id)
            state, info = meta["status"], meta.get("result")
            display.show(state, info if isinstance(info, dict) else {})
            if state in ("SUCCESS", "FAILURE", "REVOKED"):
                return
            time.sleep(POLL)


@contextlib.contextmanager
def _display(name: str, err: Console) -> Iterator[_Display]:
    if not err.is_terminal:
        yield _Lines(name)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as progress:
        yield _Bar(name, progress)


class _Bar:
    """Progress on a terminal."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name = name
        self._progress = progress
        self._bar = progress.add_task(name, total=None, unit="")

    def show(self, state: str, meta: dict[str, Any]) -> None:
        self._progress.update(self._bar, description=f"{self._name} {state}")
        if state == "PROGRESS":
            self._progress.update(
                self._bar,
                completed=meta.get("done", 0),
                total=meta.get("total"),
                unit=meta.get("unit", ""),
            )


class _Lines:
    """Progress where there is no terminal: a line for each change."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._last = ""

    def show(self, state: str, meta: dict[str, Any]) -> None:
        line = f"{self._name} {state}"
        if state == "PROGRESS":
            total = "" if meta.get("total") is None else f" of {meta['total']:,}"
            line += f" {meta.get('done', 0):,}{total} {meta.get('unit', '')}".rstrip()
        if line != self._last:
            print(line, file=sys.stderr, flush=True)
            self._last = line
