"""`./cohort up`: a fleet on this machine, for as long as this process runs."""

from __future__ import annotations

import os
import time
from argparse import Namespace

from rich.console import Console

from deploy import state
from deploy.ending import AskedToEnd, end_by_signals, ignore_signals
from deploy.fleet import Fleet, describe
from errors import Refused, SettingsError
from tasks.settings import Settings, parse_size

NODE_LIMIT = 64
"""More nodes than this on one machine are a slip of the finger."""


def run(options: Namespace, settings: Settings, out: Console) -> int:
    """Start the fleet, show its parts, and end it when asked to."""
    fleet = _describe_fleet(options, settings)
    end_by_signals()
    try:
        with state.only_fleet(settings.state):
            return _live(fleet, settings, out)
    except AskedToEnd:
        return 0


def _live(fleet: Fleet, settings: Settings, out: Console) -> int:
    try:
        fleet.start()
        running = state.RunningFleet(os.getpid(), fleet.redis_url, str(fleet.root))
        state.announce(settings.state, running)
        for name, where in describe(fleet):
            _tell(out, f"{name:<8} {where}")
        _tell(out, "ready: Ctrl-C ends it")
        return _watch(fleet, out)
    except AskedToEnd:
        return _end(fleet, out)
    finally:
        # Whatever went wrong above, and a third Ctrl-C: nothing stays.
        ignore_signals()
        fleet.kill()


def _tell(out: Console, line: str) -> None:
    # For a reader in a pipe, too, a line is there when it is true.
    out.print(line, highlight=False, markup=False, soft_wrap=True)
    out.file.flush()


def _describe_fleet(options: Namespace, settings: Settings) -> Fleet:
    if not 1 <= options.nodes <= NODE_LIMIT:
        raise Refused(f"--nodes: from 1 to {NODE_LIMIT}, not {options.nodes}")
    try:
        cpus = [parse_count(word) for word in options.cpus.split(",")]
        memory = [parse_size(word) for word in options.memory.split(",")]
    except ValueError as error:
        raise SettingsError(f"--cpus or --memory: expected {error}") from None
    return Fleet(
        settings.state / "fleet",
        nodes=options.nodes,
        root=options.root or settings.root,
        redis=options.redis,
        cpus=cpus,
        memory=memory,
        beat=not options.no_beat,
        flower=not options.no_flower,
        flower_port=options.flower_port,
        grace=options.grace,
    )


def parse_count(word: str) -> int:
    """A whole number above zero."""
    if not (word.isdecimal() and int(word) > 0):
        raise ValueError("whole numbers of at least 1")
    return int(word)


def _watch(fleet: Fleet, out: Console) -> int:
    """Tell of parts that end by themselves, until a signal comes or Redis is gone."""
    told: set[int] = set()
    while True:
        for part in fleet.parts:
            if part.exit_code is None or part.pid in told:
                continue
            told.add(part.pid)
            _tell(out, f"{part.name:<8} has ended with exit code {part.exit_code}: {part.log}")
            if part is fleet.redis:
                _tell(out, "without Redis there is no fleet: ending the rest")
                return 1
        time.sleep(0.5)


def _end(fleet: Fleet, out: Console) -> int:
    _tell(out, "ending the fleet; a second Ctrl-C kills it")
    try:
        fleet.stop()
    except AskedToEnd:
        fleet.kill()
    _tell(out, "ended")
    return 0
