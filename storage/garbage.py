"""Garbage collection of one key's directory, or of all: it removes files, never versions.

    <root>/jobs/<key>/gc/<floor>    what may be read: versions from here on keep all their files

What stays:
- `log/` and every record of a run, for ever: they tell that a task has its outcome.
- Every file that a retained version names. Retained are the newest `keep` versions, and those
  younger than `max_age`, without a gap up to the head.
- Everything that an attempt may still commit: a file whose name says that it was made on base b
  may go only if record b + 1 was in the log *before* the retained versions were read. Then
  whatever is committed later names it only if a retained version does (a version names what its
  base names and what its own attempt wrote; `restore` writes anew what the head doesn't name).

So it may run beside live jobs, and several at once. Before the first file of a version goes, the
floor says so: a reader of that version is told `SnapshotExpired`, and not that files are damaged.
Ages are by the server's clock: times of files are compared with that of one made just now.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from errors import CohortError, Refused
from storage import durable
from storage.directory import Directory
from storage.keys import check_key
from storage.listing import Listing, Missing
from storage.log import Reference
from storage.manifest import Entry

# What an attempt writes before its record, each with the base's number in its name.
_OURS = re.compile(r"(?:data|manifest|sealed)-(\d+)(?:-\d+)?")
_RECORD = re.compile(r"record-(\d+)-\d+")


@dataclass(frozen=True)
class Retention:
    """What must stay readable."""

    keep: int = 10
    """The newest versions, at least one."""
    max_age: float = 7 * 86400.0
    """And every one that is younger, in seconds."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise Refused(f"keep={self.keep}: the newest version is always kept")
        if self.max_age < 0:
            raise Refused(f"max_age={self.max_age}: an age isn't negative")


@dataclass(frozen=True)
class Candidate:
    """A file that may go, and why."""

    path: Path
    length: int
    why: str


@dataclass
class Plan:
    """What would go from one key's directory."""

    key: str
    floor: int
    """Versions below lose files."""
    files: list[Candidate] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(candidate.length for candidate in self.files)


class Garbage:
    """The duty of collecting it: `plan` looks, `run_once` removes a bounded number of files."""

    def __init__(self, root: Path, retention: Retention | None = None):
        self.root = root
        self.retention = retention or Retention()
        self._left: Iterator[str] | None = None
        self._pending: list[Candidate] = []
        self.troubles: dict[str, str] = {}
        """Keys that couldn't be looked through, and why: nothing of theirs was removed."""

    def keys(self) -> list[str]:
        return [entry.name for entry in durable.entries(self.root / "jobs")]

    def plan(self, key: str) -> Plan:
        """What may go from a key's directory now. Removes nothing."""
        directory = Directory(self.root, check_key(key))
        head = directory.head().n
        floor = self._floor(directory, head)
        plan = Plan(key, floor)
        if head == 0:
            return plan
        needed: set[str] = set()
        fulls: dict[Reference, dict[str, Entry]] = {}
        for n in range(floor, head + 1):
            needed |= self._files_of(directory, n, fulls)
        for path, name in self._stored(directory):
            base = _base_of(path.name)
            if base is None:
                why = self._why_a_record_may_go(directory, path, head)
            elif base < head and name not in needed:
                why = f"no version from {floor} on names it, and version {base + 1} is decided"
            else:
                continue
            if why:
                length = 0
                with suppress(OSError):
                    length = path.stat().st_size
                plan.files.append(Candidate(path, length, why))
        return plan

    def _why_a_record_may_go(self, directory: Directory, path: Path, head: int) -> str:
        """A record that lost. One that won tells for ever that its task has an outcome."""
        found = _RECORD.fullmatch(path.name)
        if not found or int(found[1]) > head or path.lstat().st_nlink > 1:
            return ""
        winner = directory.log.read(int(found[1]))
        if winner.task_id == path.parent.parent.name:
            return ""
        return f"version {winner.n} went to task {winner.task_id}"

    def run_once(self, limit: int = 1000) -> list[Candidate]:
        """Remove up to `limit` files, going on where the last call ended; what went.

        Nothing is returned when a whole round through the keys is over.
        """
        gone: list[Candidate] = []
        while len(gone) < limit:
            if not self._pending and not self._next_key():
                break
            while self._pending and len(gone) < limit:
                candidate = self._pending.pop()
                with suppress(FileNotFoundError), durable.reporting(candidate.path):
                    os.unlink(candidate.path)
                gone.append(candidate)
                # Empty now: an attempt or a checkpoint that was decided against.
                with suppress(OSError):
                    candidate.path.parent.rmdir()
        return gone

    def _next_key(self) -> bool:
        """Plan the next key of this round. False: there is none, and the next call begins anew."""
        if self._left is None:
            self._left = iter(self.keys())
        for key in self._left:
            try:
                plan = self.plan(key)
            except CohortError as error:
                self.troubles[key] = str(error)
                continue
            if plan.files:
                self._raise_floor(Directory(self.root, key), plan.floor)
                self._pending = plan.files
                return True
        self._left = None
        return False

    def _floor(self, directory: Directory, head: int) -> int:
        """The oldest retained version. It never falls: what was collected stays collected."""
        floor = max(1, head - self.retention.keep + 1)
        if floor > 1:
            now = durable.servers_now(directory.path / "gc")
            while floor > 1 and now - self._written(directory, floor - 1) < self.retention.max_age:
                floor -= 1
        return max(floor, directory.floor(), 1)

    def _files_of(
        self, directory: Directory, n: int, fulls: dict[Reference, dict[str, Entry]]
    ) -> set[str]:
        try:
            listing = Listing.read(directory.path, directory.log.read(n).manifest)
            listing.share_full(fulls)
            return listing.stored_files()
        except Missing:
            if n < directory.floor():
                return set()  # another collector was here meanwhile, with a shorter retention
            raise

    def _stored(self, directory: Directory) -> Iterator[tuple[Path, str]]:
        for task in durable.entries(directory.path / "runs"):
            for run in durable.entries(Path(task.path)):
                for entry in durable.entries(Path(run.path)):
                    path = Path(entry.path)
                    yield path, os.path.relpath(path, directory.path)

    def _raise_floor(self, directory: Directory, floor: int) -> None:
        folder = directory.path / "gc"
        before = directory.floor()
        if before >= floor:
            return
        durable.make_directory(folder)
        with suppress(FileExistsError):
            os.close(os.open(folder / str(floor), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        durable.sync_directory(folder)
        for entry in durable.entries(folder):
            if entry.name.isdecimal() and int(entry.name) < floor:
                with suppress(OSError):
                    os.unlink(entry.path)

    def _written(self, directory: Directory, n: int) -> float:
        path = directory.log.path(n)
        with durable.reporting(path):
            return os.stat(path).st_mtime


def _base_of(name: str) -> int | None:
    """On which version the attempt stood that wrote a file; None: it isn't for us to remove."""
    found = _OURS.fullmatch(name)
    return int(found[1]) if found else None
