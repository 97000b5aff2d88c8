"""`./cohort gc`: remove files that no version to be read names, and logs that have expired."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, _SubParsersAction
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from errors import CohortError, SettingsError
from storage import logs
from storage.garbage import Candidate, Garbage, Retention

_STEP = 200
"""Files removed between two looks at the screen: live jobs share the file system."""


_AN_OLD_LOG = "nothing was written to this log for that long"


@dataclass
class _Total:
    files: int = 0
    bytes: int = 0

    def add(self, length: int) -> None:
        self.files += 1
        self.bytes += length

    def __str__(self) -> str:
        return f"{self.files:,} files, {self.bytes / 2**20:,.1f} MiB"


def add_parser(commands: _SubParsersAction[ArgumentParser]) -> ArgumentParser:
    """The command's words."""
    parser = commands.add_parser(
        "gc",
        allow_abbrev=False,
        help="remove files that no retained version names",
        description="Remove files of job directories that no retained version names, files of runs "
        "that can't commit any more, and logs that have expired. Versions, records and outcomes "
        "stay. It may run beside live jobs.",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would go, and why")
    parser.add_argument(
        "--keep", type=int, default=10, metavar="N", help="versions that stay readable (10)"
    )
    parser.add_argument(
        "--max-age", default="7d", metavar="SPAN", help="younger versions and logs stay too (7d)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, a line each")
    return parser


def run(options: Namespace, root: Path, out: Console, err: Console) -> int:
    """Collect, or say what would be collected. Exit code 1 if a directory couldn't be looked at."""
    from tasks.settings import parse_span

    try:
        max_age = parse_span(options.max_age)
    except ValueError as error:
        raise SettingsError(f"--max-age: expected {error}") from None
    garbage = Garbage(root, Retention(options.keep, max_age))
    found = _Plan(options.json, out)
    if options.dry_run:
        for key in garbage.keys():  # noqa: SIM118 - no mapping
            try:
                plan = garbage.plan(key)
            except CohortError as error:
                garbage.troubles[key] = str(error)
                continue
            for candidate in plan.files:
                found.tell(candidate)
        for path, length in logs.expired(root, max_age):
            found.tell(Candidate(path, length, _AN_OLD_LOG))
    else:
        _collect(garbage, root, max_age, found, err)
    did = "would go" if options.dry_run else "gone"
    err.print(f"{found.total} {did}", highlight=False)
    for key, trouble in sorted(garbage.troubles.items()):
        err.print(f"{key}: left alone: {trouble}", highlight=False, markup=False)
    return 1 if garbage.troubles else 0


def _collect(garbage: Garbage, root: Path, max_age: float, found: _Plan, err: Console) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as progress:
        bar = progress.add_task("looking")
        while gone := garbage.run_once(_STEP):
            for candidate in gone:
                found.tell(candidate)
            progress.update(bar, description=str(found.total))
        for path, length in logs.expired(root, max_age):
            logs.remove_expired(path)
            found.tell(Candidate(path, length, _AN_OLD_LOG))


class _Plan:
    """What goes, told as it is found."""

    def __init__(self, as_json: bool, out: Console) -> None:
        self.total = _Total()
        self._as_json = as_json
        self._out = out

    def tell(self, candidate: Candidate) -> None:
        """One file."""
        self.total.add(candidate.length)
        if self._as_json:
            line = {
                "path": str(candidate.path),
                "bytes": candidate.length,
                "why": candidate.why,
            }
            print(json.dumps(line))
        else:
            text = f"{candidate.path}  {candidate.length:,} bytes: {candidate.why}"
            self._out.print(text, highlight=False, markup=False, soft_wrap=True)
