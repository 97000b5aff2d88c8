"""`command`: any program as a job, in a job directory that it knows nothing about.

    command.delay(["python", "load.py", "--full"], key="daily-load")

It runs with the job directory as its working directory and finds there what the last successful
run left. Exit status 0 is a success, which commits the directory; any other end is a failure,
which leaves the directory as it was. All that it writes to standard output and standard error
goes to a log on the shared folder. See docs/jobs.md.

Arguments and `env` travel in the message, and are kept with the outcome, for all to read who may
read those: no place for secrets.
"""

from __future__ import annotations

import inspect
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from errors import CohortError, Refused
from storage.manifest import LeftOut
from tasks.job import JobTask, job
from tasks.program import Ended, Program
from tasks.run import Run
from tasks.settings import current

LAST_LINES = 20
LAST_BYTES = 4096
_PROJECT = str(Path(__file__).resolve().parent.parent)


class CommandFailed(CohortError):
    """A program ended with another exit status than 0, or by a signal."""

    def __init__(self, message: str, outcome: Mapping[str, Any] | None = None) -> None:
        # Both travel: Celery makes the exception anew from its arguments.
        super().__init__(message, dict(outcome or {}))
        self.message = message
        self.outcome: dict[str, Any] = dict(outcome or {})
        """What a successful `command` returns: exit_status, signal, last_lines, log ..."""

    def __str__(self) -> str:
        return self.message


class CommandTask(JobTask):
    """A job whose arguments are looked at before anything is sent."""

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        *positional: Any,
        **options: Any,
    ) -> Any:
        """Submit it. Raises `Refused` for what can be no command."""
        assert self.definition is not None
        try:
            given = inspect.signature(self.definition.function).bind(
                None, *(args or ()), **(kwargs or {})
            )
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}") from None
        _check(**{name: value for name, value in given.arguments.items() if name != "run"})
        return super().apply_async(args, kwargs, *positional, **options)


@job(key="{key}", base=CommandTask)
def command(
    run: Run, argv: Sequence[str], key: str, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run the program `argv[0]` with the arguments `argv[1:]`; no shell is involved.

    Returns exit_status (0), signal (None), elapsed, user_seconds, system_seconds, most_memory
    (bytes), last_lines, log, a path on the shared folder, and left_out: what of the directory a
    version can't hold, each with its path and what it is. Raises `CommandFailed`, whose
    `outcome` holds the same, or `Refused` for a program that can't be started. `env` is added to
    the worker's environment. Time limits are Celery's: `apply_async(..., soft_time_limit=60)`
    ends it in good order, by SIGTERM.
    """
    _check(argv, key, env)
    last = _LastLines()
    # A cancelled run is killed after its grace, with the log half written: be done before.
    grace = 0.8 * current().stop_grace
    with Program(argv, run.directory, _environment(env), grace, run._locks) as program:
        try:
            _pass_on(program, run, last)
        except BaseException:
            program.end()  # The soft time limit, most likely.
            _pass_on(program, run, last)
            raise
        ended = program.ended()
    outcome = _outcome(ended, last, run)
    if not ended.is_success:
        said = f"; its last line: {last.lines[-1]}" if last.lines else ""
        raise CommandFailed(f"{argv[0]}: {ended}{said}", outcome)
    run._complete = _with_left_out
    return outcome


def _with_left_out(outcome: dict[str, Any], left_out: Sequence[LeftOut]) -> dict[str, Any]:
    return {
        **outcome,
        "left_out": [
            # A name in any bytes; what isn't UTF-8 shows as escapes.
            {"path": os.fsencode(path).decode("utf-8", "backslashreplace"), "what": what}
            for path, what in left_out
        ],
    }


def _pass_on(program: Program, run: Run, last: _LastLines) -> None:
    for data in program.output():
        run.output.write(data)
        last.add(data)
        if run.cancelled:
            program.end()


def _outcome(ended: Ended, last: _LastLines, run: Run) -> dict[str, Any]:
    log = None
    if last.lines and run.output.path is not None:
        log = str(Path(*run.output.path.parts[-3:]))
    return {**asdict(ended), "last_lines": last.lines, "log": log}


class _LastLines:
    """The end of what was written, however much that is."""

    def __init__(self) -> None:
        self._end = b""

    def add(self, data: bytes) -> None:
        self._end = (self._end + data[-LAST_BYTES:])[-LAST_BYTES:]

    @property
    def lines(self) -> list[str]:
        # Splits at "\r" as well: of a progress bar only its last look counts.
        text = self._end.decode("utf-8", errors="replace").splitlines()
        return list(deque(filter(None, text), LAST_LINES))


def _environment(env: Mapping[str, str] | None) -> dict[str, str]:
    """The worker's environment without what is the worker's own, above all Redis's password."""
    ours = {n: v for n, v in os.environ.items() if not n.startswith("COHORT_")}
    if "COHORT_SETTINGS" in os.environ:
        ours["COHORT_SETTINGS"] = os.environ["COHORT_SETTINGS"]
    # Modules of Cohort (`errors`, `tasks`, ...) must not stand in for the program's own.
    path = ours.pop("PYTHONPATH", "").split(os.pathsep)
    if kept := [folder for folder in path if folder not in ("", _PROJECT)]:
        ours["PYTHONPATH"] = os.pathsep.join(kept)
    return {**ours, **(env or {})}


def _check(argv: object, key: object = "", env: object = None) -> None:
    name = "command"
    if not isinstance(key, str):
        raise Refused(f"{name}: key is a text, not {type(key).__name__}")
    if isinstance(argv, str) or not isinstance(argv, Sequence) or not argv:
        raise Refused(f'{name}: argv is a list of texts, such as ["python", "load.py"]')
    for number, word in enumerate(argv):
        if not isinstance(word, str) or "\0" in word:
            raise Refused(f"{name}: argv[{number}] must be a text without NUL, not {word!r}")
    if not argv[0]:
        raise Refused(f"{name}: argv[0], the program, is empty")
    if env is None:
        return
    if not isinstance(env, Mapping):
        raise Refused(f"{name}: env is a mapping of names to texts, not {type(env).__name__}")
    for variable, value in env.items():
        if not isinstance(variable, str) or not variable or set("=\0") & set(variable):
            raise Refused(f"{name}: env: {variable!r} can't name a variable")
        if not isinstance(value, str) or "\0" in value:
            # The value isn't shown, in case that it is a secret after all.
            raise Refused(f"{name}: env: {variable} must be a text without NUL")
