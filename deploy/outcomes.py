"""`./cohort results reindex` and `./cohort recover`: Redis is made to know again what the shared
folder holds. Workers do both by themselves when they find Redis empty.
"""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from broker.index import Index
from broker.scripts import Scripts
from deploy.connection import connected
from errors import SettingsError

if TYPE_CHECKING:  # `tasks` reads the settings when it is imported: only in a command that runs.
    from tasks.recovery import Read
    from tasks.settings import Settings

Shown = Callable[[int, int], object]


def add_commands(commands: Any, join_fleet: Callable[[], Settings]) -> None:
    """The commands' words, for the parser of all commands."""
    results = commands.add_parser(
        "results", allow_abbrev=False, help="the outcomes on the shared folder"
    )
    actions = results.add_subparsers(required=True, metavar="ACTION")
    again = actions.add_parser(
        "reindex",
        allow_abbrev=False,
        help="tell Redis where every outcome lies",
        description="Read the segments on the shared folder and tell Redis where every outcome "
        "lies. Workers do this by themselves when they find Redis empty.",
    )
    again.add_argument("--json", action="store_true", help="as JSON")
    again.set_defaults(run=lambda options: run_reindex(options, join_fleet()))
    recover = commands.add_parser(
        "recover",
        allow_abbrev=False,
        help="put back jobs that Redis has lost",
        description="Put back every job that was submitted as durable, or that ran on a node that "
        "is gone, and that has no outcome and is in no queue. Workers do this by themselves when "
        "they find Redis empty.",
    )
    recover.add_argument("--dry-run", action="store_true", help="only print their ids")
    recover.add_argument("--json", action="store_true", help="as JSON")
    recover.set_defaults(run=lambda options: run_recover(options, join_fleet()))


def run_reindex(options: Namespace, settings: Settings) -> int:
    """Read every outcome into the index; exit code 1 if something on the folder is damaged."""
    from tasks import recovery

    out, err = Console(), Console(stderr=True)
    root = _root(settings)
    with connected(settings) as client, _progress(err, "reading outcomes") as shown:
        index = Index(client)
        report = recovery.reindex(root, index, shown)
        index.refilled()
    if options.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        rate = report.outcomes / max(report.seconds, 0.001)
        out.print(
            f"{report.outcomes:,} outcomes in {report.segments:,} segments, {report.placed:,} of "
            f"them new to Redis; {report.seconds:.1f} s, {rate:,.0f}/s",
            highlight=False,
        )
    return _tell_of_trouble(report, err)


def run_recover(options: Namespace, settings: Settings) -> int:
    """Put back the jobs that Redis has lost."""
    from tasks import recovery

    err = Console(stderr=True)
    root = _root(settings)
    with connected(settings) as client, _progress(err, "reading the journal") as shown:
        scripts = Scripts(client)
        report = recovery.recover(
            root, scripts, settings.journal_keep, dry_run=options.dry_run, progress=shown
        )
    if options.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        for task_id in report.put_back:
            print(task_id)
        did = "would be put back" if options.dry_run else "put back"
        err.print(
            f"{len(report.put_back):,} jobs {did}; of {report.noted:,} noted {report.ended:,} have "
            f"ended, {report.running:,} run, {report.waiting:,} are in Redis",
            highlight=False,
        )
    return _tell_of_trouble(report, err)


def _root(settings: Settings) -> Path:
    if settings.root is None:
        raise SettingsError("COHORT_ROOT: outcomes and notes lie there; give the path of its mount")
    if not settings.root.is_dir():
        raise SettingsError(f"COHORT_ROOT: {settings.root} is no folder")
    return settings.root


@contextmanager
def _progress(err: Console, what: str) -> Iterator[Shown]:
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _tell_of_trouble(report: Read, err: Console) -> int:
    for where in report.torn:
        err.print(f"an unfinished entry was passed over: {where}", highlight=False)
    for what in report.damaged:
        err.print(f"damaged: {what}", highlight=False)
    return 1 if report.damaged else 0
