"""`./cohort submit --many FILE TASK`: hand in a job for each line of a file.

Every line is read and checked before the first job is sent. Task ids go to standard output as the
jobs are accepted, so that what was submitted is known whatever comes then.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from celery import Celery
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from errors import Refused

_AT_ONCE = 1000

Call = tuple[list[Any], dict[str, Any]]
Submit = Callable[[Sequence[Call]], Sequence[str]]
"""Submits some jobs: their ids."""


def read_calls(lines: Iterable[str], where: str) -> list[Call]:
    """The arguments of each job: a JSON list by position, or a JSON object by name."""
    calls: list[Call] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except ValueError as error:
            raise Refused(f"{where}, line {number}: no JSON: {error}") from None
        if isinstance(given, list):
            calls.append((given, {}))
        elif isinstance(given, dict):
            calls.append(([], given))
        else:
            raise Refused(
                f"{where}, line {number}: {ascii(given)[:40]}; expected a job's arguments, as a "
                'list such as ["acme", 3] or by name such as {"customer": "acme"}'
            )
    return calls


def run(options: Namespace, app: Celery, name: str, submit: Submit, err: Console) -> int:
    """Submit them, a thousand at a time."""
    calls = _read(options.many)
    task: Any = app.tasks[name]
    for args, kwargs in calls:
        try:
            task.about(args, kwargs)
            if task.typing:
                task.__header__(*args, **kwargs)
        except TypeError as error:
            raise Refused(f"{name}: {error}") from None
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        bar = progress.add_task(name, total=len(calls))
        for at in range(0, len(calls), _AT_ONCE):
            for task_id in submit(calls[at : at + _AT_ONCE]):
                print(json.dumps({"id": task_id, "task": name}) if options.json else task_id)
            sys.stdout.flush()
            progress.update(bar, completed=min(at + _AT_ONCE, len(calls)))
    return 0


def _read(file: str) -> list[Call]:
    if file == "-":
        return read_calls(sys.stdin, "standard input")
    try:
        with Path(file).open(encoding="utf-8") as lines:
            return read_calls(lines, file)
    except OSError as error:
        raise Refused(f"--many: {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Refused(f"--many: {file}: not a text in UTF-8") from None
