"""`./cohort logs`: what a task says, from any terminal, also while it runs.

Its output goes to stdout byte by byte as it was written; whatever is ours, to stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from celery import Celery
from celery.result import AsyncResult

from errors import Refused, TryLater
from storage.logs import AttemptLog, LogReader

POLL = 0.2
"""How often, in seconds, a followed task is looked at."""
INTERRUPTED = 130
ENDED = frozenset({"SUCCESS", "FAILURE", "REVOKED"})


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """The command line of `logs`."""
    logs = commands.add_parser(
        "logs",
        allow_abbrev=False,
        help="what a task says",
        description="Print what a task has written, of every attempt or of one.",
    )
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the task has ended")
    logs.add_argument("--attempt", type=int, metavar="N", help="only of this attempt, from 1 on")
    logs.add_argument("id", metavar="ID", help="the task id that `submit` has printed")
    return logs


def run(options: argparse.Namespace, root: Path, app: Celery) -> int:
    """Print the log of the task that the options name."""
    if options.attempt is not None and options.attempt < 1:
        raise Refused(f"--attempt: from 1 on, not {options.attempt}")
    output = Output(LogReader(root, options.id, options.attempt), sys.stdout.buffer)
    if not options.follow:
        if not output.pass_on():
            which = "" if options.attempt is None else f" in attempt {options.attempt}"
            raise Refused(
                f"{options.id} has written nothing{which}, or there is no such task; "
                "-f waits for it"
            )
        return 0
    result = app.AsyncResult(options.id)
    try:
        follow(result, output, lambda state: None)
    except KeyboardInterrupt:
        return INTERRUPTED
    print(f"{options.id}: {result.state}", file=sys.stderr)
    return 0


class Output:
    """A task's output on its way to a stream, with a line on stderr where an attempt begins."""

    def __init__(self, reader: LogReader, stream: IO[bytes]) -> None:
        self._reader = reader
        self._stream = stream
        self._last: AttemptLog | None = None

    def pass_on(self) -> bool:
        """Write what is new; whether there was anything."""
        was_any = False
        for log, data in self._reader.news():
            if log != self._last:
                if self._last is not None or log.attempt > 1:
                    print(f"cohort: attempt {log.attempt}", file=sys.stderr, flush=True)
                self._last = log
            self._stream.write(data)
            was_any = True
        self._stream.flush()
        return was_any


def follow(result: AsyncResult, output: Output, tell: Callable[[str], object]) -> None:
    """Pass a task's output on until it has ended; `tell` is called with each state seen."""
    while True:
        # In this order: once it has ended, all that it wrote is there.
        state = result.state
        tell(state)
        try:
            output.pass_on()
        except TryLater as trouble:
            print(f"cohort: {trouble}; trying again", file=sys.stderr)
        if state in ENDED:
            return
        time.sleep(POLL)
