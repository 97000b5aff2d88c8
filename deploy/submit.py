"""`./cohort submit`: hand in a job, and with --wait follow it to its outcome."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import re
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import redis
from celery import Celery
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy import logs, submit_many
from deploy.logs import ENDED, INTERRUPTED, POLL
from errors import Refused, Unavailable
from storage.logs import LogReader

COMMAND = "tasks.command.command"
_HARD_LIMIT_GRACE = 30.0
"""Seconds that a program has to end after its timeout, before it is killed with its process."""


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """The command line of `submit`, up to `--`."""
    submit = commands.add_parser(
        "submit",
        allow_abbrev=False,
        usage="cohort submit [--wait] [--json] TASK [ARGS ...]\n"
        "       cohort submit [--json] --many FILE TASK\n"
        "       cohort submit [--wait] [--json] --directory KEY [--timeout SPAN] "
        "[--env NAME=VALUE] -- PROGRAM [ARGS ...]",
        help="hand in a job",
        description="Hand in a job and print its task id.",
        epilog="ARGS of a TASK are values and name=value pairs; a value is JSON if it reads as "
        "such, else text. With --wait the outcome is printed as JSON, and the exit code is 0 for a "
        "success. A PROGRAM runs in the job directory KEY; with --wait what it writes is shown as "
        "it comes, and the exit code is its own. Arguments and --env are no place for secrets: "
        "they are kept with the outcome.",
    )
    submit.add_argument("--wait", action="store_true", help="follow the job to its outcome")
    submit.add_argument("--json", action="store_true", help="print JSON only")
    submit.add_argument(
        "--many",
        metavar="FILE",
        help="a job for each line of FILE (- for standard input): a JSON list of its arguments, or "
        "an object of them by name",
    )
    submit.add_argument("--directory", metavar="KEY", help="the job directory of a program")
    submit.add_argument("--timeout", metavar="SPAN", help="end a program after so long, as 90s, 2h")
    submit.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[], help="for a program; repeatable"
    )
    submit.add_argument("task", metavar="TASK", nargs="?", help="the task's name, or its last part")
    submit.add_argument("args", metavar="ARGS", nargs="*", help="the job's arguments")
    return submit


def check_words(
    options: Namespace, program: list[str] | None, parser: argparse.ArgumentParser
) -> None:
    """Make the words after `--` part of the options: a program, or more arguments of a task."""
    options.program = None
    if options.many is not None and (options.wait or options.args or options.task is None):
        parser.error("--many FILE takes a TASK, whose arguments are in FILE, and no --wait")
    if options.task is not None:
        options.args += program or []
        if options.directory is not None or options.timeout is not None or options.env:
            parser.error("--directory, --timeout and --env are for a program: write `-- PROGRAM`")
    elif program:
        options.program = program
        if options.directory is None:
            parser.error("a program needs --directory KEY")
    else:
        parser.error("name a TASK, or `--directory KEY -- PROGRAM`")


def run(options: Namespace, app: Celery, root: Path | None, out: Console, err: Console) -> int:
    """Submit the job that the options name; the exit code tells its outcome if waited for."""
    if options.program is not None:
        return _run_program(options, app, root)
    name = find_task(options.task, app.tasks)
    if options.many is not None:
        return submit_many.run(options, app, name, _many_of(app, name), err)
    args, kwargs = parse_arguments(options.args)
    result = _submit(app, name, args, kwargs)
    if not options.wait:
        print(json.dumps({"id": result.id, "task": name}) if options.json else result.id)
        return 0
    try:
        if not options.json:
            print(result.id, flush=True)
        _follow(result, name, err)
    except KeyboardInterrupt:
        err.print(f"no longer waiting; {result.id} runs on", highlight=False)
        return INTERRUPTED
    print(json.dumps(_outcome_of(result, name), default=str, ensure_ascii=False))
    return 0 if result.state == "SUCCESS" else 1


def _many_of(app: Celery, name: str) -> submit_many.Submit:
    def submit(calls: Sequence[submit_many.Call]) -> Sequence[str]:
        with _refusals():
            ids: list[str] = app.tasks[name].submit_many(calls).ids
            return ids

    return submit


def _submit(app: Celery, name: str, args: Any, kwargs: Any, **options: Any) -> AsyncResult:
    with _refusals():
        return app.tasks[name].apply_async(args, kwargs, **options)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        raise Refused(str(error)) from None
    except (OperationalError, redis.RedisError, OSError) as error:
        raise Unavailable(f"Redis doesn't take the job: {type(error).__name__}") from None


def _outcome_of(result: AsyncResult, name: str) -> dict[str, Any]:
    outcome = {"id": result.id, "task": name, "state": result.state}
    if result.state == "SUCCESS":
        outcome["result"] = result.result
    else:
        outcome["error"] = f"{type(result.result).__name__}: {result.result}"
    return outcome


# --- Any program ---


def _run_program(options: Namespace, app: Celery, root: Path | None) -> int:
    kwargs = {"argv": options.program, "key": options.directory, "env": _variables(options.env)}
    result = _submit(app, COMMAND, (), kwargs, **_limits(options.timeout))
    if not options.wait:
        print(json.dumps({"id": result.id, "task": COMMAND}) if options.json else result.id)
        return 0
    # Its output is stdout's only content; or, with --json, the outcome is.
    stream = sys.stderr.buffer if options.json else sys.stdout.buffer
    lines = _Lines("cohort:")
    try:
        print(f"cohort: {result.id}", file=sys.stderr, flush=True)
        if root is None:
            print("cohort: COHORT_ROOT isn't set: its output can't be shown", file=sys.stderr)
            _follow_states(result, lines)
        else:
            output = logs.Output(LogReader(root, result.id), stream)
            logs.follow(result, output, lambda state: lines.show(state, {}))
    except KeyboardInterrupt:
        print(
            f"\ncohort: no longer waiting; {result.id} runs on: ./cohort logs -f {result.id}",
            file=sys.stderr,
        )
        return INTERRUPTED
    told = result.result if result.state == "SUCCESS" else getattr(result.result, "outcome", None)
    if options.json:
        print(json.dumps({**_outcome_of(result, COMMAND), "outcome": told}, default=str))
    else:
        summary = summary_of(told) if told else _outcome_of(result, COMMAND)["error"]
        print(f"cohort: {summary}", file=sys.stderr)
    return exit_code(told)


def exit_code(outcome: dict[str, Any] | None) -> int:
    """The program's own, as a shell tells it; 1 if it has none."""
    if not outcome:
        return 1
    if outcome["exit_status"] is not None:
        return int(outcome["exit_status"])
    name = outcome["signal"]
    try:
        return 128 + signal.Signals[name]
    except KeyError:
        return 128 + int(name.removeprefix("SIG"))


def summary_of(outcome: dict[str, Any]) -> str:
    """One line for people."""
    how = f"exit status {outcome['exit_status']}"
    if outcome["signal"] is not None:
        how = f"ended by {outcome['signal']}"
    cpu = outcome["user_seconds"] + outcome["system_seconds"]
    left_out = [f"{entry['what']} of {entry['path']}" for entry in outcome.get("left_out", ())]
    return (
        f"{how} after {outcome['elapsed']:.1f} s, {cpu:.1f} s of CPU, "
        f"{outcome['most_memory'] / 2**20:.0f} MiB of memory"
        + (f"; left out: {', '.join(left_out)}" if left_out else "")
    )


def _limits(timeout: str | None) -> dict[str, float]:
    from tasks.settings import parse_span

    if timeout is None:
        return {}
    try:
        span = parse_span(timeout)
    except ValueError as error:
        raise Refused(f"--timeout: expected {error}") from None
    return {"soft_time_limit": span, "time_limit": span + _HARD_LIMIT_GRACE}


def _variables(words: Sequence[str]) -> dict[str, str] | None:
    variables = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise Refused(f"--env: NAME=VALUE, not {name}")
        variables[name] = value
    return variables or None


# --- Tasks of Python ---


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
    near = difflib.get_close_matches(wanted, [*names, *shorts], n=3, cutoff=0.6)
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
            if state in ENDED:
                return
            time.sleep(POLL)


def _follow_states(result: AsyncResult, display: _Display) -> None:
    while (state := result.state) not in ENDED:
        display.show(state, {})
        time.sleep(POLL)
    display.show(state, {})


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
