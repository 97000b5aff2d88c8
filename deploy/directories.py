"""`./cohort dir`: the versions of a job directory, from anywhere where the shared folder is.

`log`, `show`, `diff` and `cat` only read, and need no running fleet. `restore` and `rm` are jobs:
they take their turn behind the key's lock, and are versions like any other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from stat import S_IFDIR, S_IFLNK, S_IFREG, filemode
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from deploy.logs import ENDED, INTERRUPTED, POLL
from errors import Refused, SnapshotExpired, Unavailable
from storage import durable
from storage.directory import Directory, Version
from storage.manifest import Differences, Entry, File, Folder

NEEDS_FLEET = ("restore", "rm")
RESTORE = "tasks.directory.restore"
_HOW_MANY = 20


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """The command line of `dir`."""
    parser = commands.add_parser(
        "dir",
        allow_abbrev=False,
        help="the versions of a job directory",
        description="Look at the versions of a job directory, and bring an old one back.",
    )
    acts = parser.add_subparsers(required=True, metavar="ACT", dest="act")

    def act(name: str, what: str) -> argparse.ArgumentParser:
        made = acts.add_parser(name, allow_abbrev=False, help=what, description=what)
        made.add_argument("key", metavar="KEY", help="the job's key")
        return made

    log = act("log", "list the versions, the newest first: run, node, time, size, what changed")
    log.add_argument(
        "-n", type=int, default=_HOW_MANY, metavar="N", help=f"how many at most ({_HOW_MANY})"
    )
    log.add_argument("--json", action="store_true", help="as JSON")
    show = act("show", "list what a version holds")
    show.add_argument("--json", action="store_true", help="as JSON")
    diff = act("diff", "tell what changed between two versions")
    diff.add_argument("older", type=int, nargs="?", metavar="A", help="(the one before B)")
    diff.add_argument("newer", type=int, nargs="?", metavar="B", help="(the newest)")
    diff.add_argument("--json", action="store_true", help="as JSON")
    cat = act("cat", "write a file of a version to standard output")
    cat.add_argument("path", metavar="PATH", help="within the directory")
    for reads_one in (show, cat):
        reads_one.add_argument("--at", type=int, metavar="N", help="that version (the newest)")
    restore = act("restore", "commit an old version as a new one")
    restore.add_argument("version", type=int, metavar="N")
    remove = act("rm", "commit an empty directory; older versions stay until they are collected")
    remove.add_argument("--yes", action="store_true", help="it is meant")
    return parser


def run(options: argparse.Namespace, root: Path, app: Celery | None) -> int:
    """Do what the options say."""
    directory = _existing(root, options.key)
    if options.act == "log":
        return _log(options, directory)
    if options.act == "show":
        return _show(options, _version(directory, options.at))
    if options.act == "diff":
        return _diff(options, directory)
    if options.act == "cat":
        for piece in _version(directory, options.at).pieces(options.path):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return 0
    if options.act == "rm" and not options.yes:
        raise Refused(f"rm commits an empty directory as {options.key}'s next version: add --yes")
    assert app is not None
    return _restore(app, options.key, 0 if options.act == "rm" else options.version)


def _existing(root: Path, key: str) -> Directory:
    directory = Directory(root, key)
    if not durable.entries(directory.path):
        raise Refused(f"there is no job directory {key} in {root}")
    return directory


def _version(directory: Directory, n: int | None) -> Version:
    head = directory.head()
    if n is None or n == head.n:
        return head
    if not 0 <= n < head.n:
        raise Refused(f"{directory.key} has no version {n}; its newest is {head.n}")
    return directory.version(n)


# --- Versions ---


def _log(options: argparse.Namespace, directory: Directory) -> int:
    if options.n < 1:
        raise Refused(f"-n: a number from 1 on, not {options.n}")
    rows = list(_rows(directory, options.n))
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(
            f"version {row['version']}  {row['state']}  {row['time']}  node {row['node']}  "
            f"task {row['task']}  attempt {row['attempt']}"
        )
        if row["files"] is None:
            print("    its files were collected")
            continue
        print(f"    {row['files']:,} files, {_size(row['bytes'])}", end="")
        changes = row["changed"]
        if changes is None:
            print()
            continue
        counts = [f"{len(changes[how])} {how}" for how in _HOW.values() if changes[how]]
        print(f"; {', '.join(counts) or 'nothing changed'}")
        for entry in row["left_out"]:
            print(f"    left out: {entry['what']} of {_shown(entry['path'])}")
    return 0


def _rows(directory: Directory, most: int) -> Iterator[dict[str, Any]]:
    version = directory.head()
    while version.n > 0 and most > 0:
        assert version.record is not None
        older = directory.version(version.n - 1)
        row: dict[str, Any] = {
            "version": version.n,
            "state": version.record.state,
            "time": version.record.time,
            "node": version.record.node,
            "task": version.record.task_id,
            "attempt": version.record.attempt,
            "files": None,
            "bytes": None,
            "changed": None,
            "left_out": [],
        }
        try:
            files = [entry for entry in version.entries.values() if isinstance(entry, File)]
            row["files"], row["bytes"] = len(files), sum(file.length for file in files)
            row["left_out"] = [entry._asdict() for entry in version.listing.left_out]
            row["changed"] = _sorted_out(version.differs_from(older), older)
        except SnapshotExpired:
            pass
        yield row
        version, most = older, most - 1


_HOW = {"A": "added", "M": "changed", "D": "removed"}


def _sorted_out(differences: Differences, older: Version) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {how: [] for how in _HOW.values()}
    for path in sorted(differences):
        found[_HOW[_letter(differences[path], older.listing.get(path))]].append(path)
    return found


def _letter(new: Entry | None, old: Entry | None) -> str:
    if new is None:
        return "D"
    return "A" if old is None else "M"


# --- Files ---


def _show(options: argparse.Namespace, version: Version) -> int:
    entries = [_described(path, entry) for path, entry in sorted(version.entries.items())]
    left_out = [entry._asdict() for entry in version.listing.left_out]
    if options.json:
        told = {"version": version.n, "entries": entries, "left_out": left_out}
        print(json.dumps(told, indent=2))
        return 0
    width = max((len(str(entry["size"])) for entry in entries), default=0)
    for entry in entries:
        target = f" -> {_shown(entry['target'])}" if "target" in entry else ""
        print(
            f"{entry['mode']}  {entry['size']:>{width}}  {entry['mtime']}  "
            f"{_shown(entry['path'])}{target}"
        )
    for left in left_out:
        print(f"left out: {left['what']} of {_shown(left['path'])}")
    return 0


def _described(path: str, entry: Entry) -> dict[str, Any]:
    told = {"path": path, "size": 0, "mtime": _when(entry.mtime_ns)}
    if isinstance(entry, File):
        return {**told, "mode": filemode(S_IFREG | entry.mode), "size": entry.length}
    if isinstance(entry, Folder):
        return {**told, "mode": filemode(S_IFDIR | entry.mode)}
    return {**told, "mode": filemode(S_IFLNK | 0o777), "target": entry.target}


def _diff(options: argparse.Namespace, directory: Directory) -> int:
    newer = _version(directory, options.newer)
    older = _version(directory, max(0, newer.n - 1) if options.older is None else options.older)
    differences = newer.differs_from(older)
    rows: list[dict[str, Any]] = []
    for path in sorted(differences):
        new, old = differences[path], older.listing.get(path)
        rows.append(
            {
                "path": path,
                "how": _HOW[_letter(new, old)],
                "before": None if old is None else _described(path, old),
                "after": None if new is None else _described(path, new),
            }
        )
    if options.json:
        print(json.dumps({"older": older.n, "newer": newer.n, "changes": rows}, indent=2))
        return 0
    letters = {how: letter for letter, how in _HOW.items()}
    for row in rows:
        sizes = [str(side["size"]) for side in (row["before"], row["after"]) if side]
        print(f"{letters[row['how']]}  {_shown(row['path'])}  {' -> '.join(sizes)}")
    return 0


def _when(mtime_ns: int) -> str:
    return datetime.fromtimestamp(mtime_ns // 10**9, UTC).isoformat().replace("+00:00", "Z")


def _size(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _shown(path: str) -> str:
    """A name in any bytes, on one line of a terminal."""
    return path if path.isprintable() else ascii(path)


# --- As a job ---


def _restore(app: Celery, key: str, version: int) -> int:
    try:
        result = app.tasks[RESTORE].apply_async((key, version))
    except (OperationalError, redis.RedisError, OSError) as error:
        raise Unavailable(f"Redis doesn't take the job: {type(error).__name__}") from None
    print(f"cohort: {result.id}", file=sys.stderr, flush=True)
    try:
        while result.state not in ENDED:
            time.sleep(POLL)
    except KeyboardInterrupt:
        print(f"cohort: no longer waiting; {result.id} will run all the same", file=sys.stderr)
        return INTERRUPTED
    if result.state != "SUCCESS":
        print(f"cohort: {type(result.result).__name__}: {result.result}", file=sys.stderr)
        return 1
    what = f"version {version}" if version else "the empty directory"
    print(f"{key}: {what} is now version {result.result['as']}")
    return 0
