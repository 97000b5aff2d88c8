"""The commit log of one job directory: who decided version n, and how it ended.

    log/<n // 1000>/<n>     one record, n = 1, 2, 3 ... without a gap

A record comes into the log by `link()` from its writer's own folder: the file server lets exactly
one writer have the name, however stale anybody's view is. That link is the commit. A name is never
renamed, deleted or used again, so a record that was read once is true for ever.

Invariants, by which any new code path may be judged:
- A record is linked only when it, its manifest and its files are durable.
- Record n is linked only by a writer that has read record n - 1 (its base).
- What the server's reply leaves open is settled by reading the name, never by assuming.
"""

import errno
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import crashpoints
from errors import Damaged, Fenced, Unavailable
from storage import durable, sealed

FORMAT = 1
A_BUCKET = 1000  # records in one directory
A_FEW = 64  # so many records behind the head a hint is still of use
# How long an unknown outcome of the link is looked into before this process gives up knowing it.
PAUSES = (0.0, 0.02, 0.1, 0.5, 2.0, 5.0)
NO_POINT_IN_WAITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)

State = Literal["SUCCESS", "FAILURE", "REVOKED"]


@dataclass(frozen=True)
class Reference:
    """A file that another file vouches for: its path within the job directory and its content."""

    path: str
    length: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """One final outcome of a keyed job, and the version of its directory that came of it."""

    n: int
    base: int
    key: str
    task_id: str
    claim_id: str
    attempt: int
    state: State
    manifest: Reference | None
    """The version's files; None as long as nothing was ever committed."""
    result: Any
    """JSON: what the job returned, or its error."""
    node: str
    time: str
    """By the node's clock, for people. Nothing is decided by it."""

    def encode(self) -> bytes:
        return sealed.seal("record", FORMAT, asdict(self))

    @classmethod
    def decode(cls, data: bytes, path: Path) -> "Record":
        body = sealed.unseal(data, "record", FORMAT, path)
        try:
            manifest = body.pop("manifest")
            record = cls(manifest=Reference(**manifest) if manifest else None, **body)
        except (TypeError, AttributeError, KeyError):
            sealed.damaged(path, "the record's fields aren't those of a record")
        if record.state not in get_args(State):
            sealed.damaged(path, f"no outcome is called {record.state!r}")
        return record


class Log:
    """The records of one key. Reads what is there; adds by `append` alone."""

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        self.key = key

    def path(self, n: int) -> Path:
        return self.folder / str(n // A_BUCKET) / str(n)

    def head(self, hint: int = 0) -> Record | None:
        """The highest record, or None while there is none.

        From a record that the hint names rightly the log is read forward; otherwise it is listed.
        The answer may be old by the time it is used, and on NFS from the start: the commit on top
        of it is then fenced.
        """
        return self._head_from(hint) or self._head_by_listing(hint)

    def _head_from(self, hint: int) -> Record | None:
        """Read forward from the hint's record; None if that doesn't lead to the head."""
        n = hint
        while n > 0 and os.path.lexists(self.path(n)):
            if n > hint + A_FEW:
                return None
            n += 1
        if n <= max(hint, 0):
            return None
        # What a look-up didn't show may be there: an NFS client repeats what it once heard.
        head = self.read(n - 1)
        while following := self.find(head.n + 1):
            head = following
        # A gap, or others commit just now: the listing tells which.
        return None if os.path.lexists(self.path(head.n + 2)) else head

    def _head_by_listing(self, hint: int) -> Record | None:
        buckets = self._numbers(self.folder, "directories of 1000 records", os.DirEntry.is_dir)
        first = hint // A_BUCKET if hint // A_BUCKET in buckets else 0
        found: set[int] = set()
        for bucket in buckets:
            if bucket >= first:
                found |= self._records_in(bucket)
        if not found and first > 0:
            return self._head_by_listing(0)
        highest = max(found, default=0)
        for n in range(max(1, first * A_BUCKET), highest):
            # A listing made while others link may miss a name that was there: ask for it.
            if n not in found and self.find(n) is None:
                sealed.damaged(self.path(n), f"missing, although record {highest} exists")
        for bucket in buckets:
            if bucket > (highest + 1) // A_BUCKET:
                sealed.damaged(self.folder / str(bucket), "a foreign directory in a commit log")
        # A listing may come from the client's cache, too; what follows it is asked for by name.
        head = self.read(highest) if highest else None
        while following := self.find(highest + 1):
            head, highest = following, highest + 1
        return head

    def find(self, n: int) -> Record | None:
        """Record n, or None if there is none yet."""
        path = self.path(n)
        data = durable.read(path)
        if data is None:
            return None
        record = Record.decode(data, path)
        if (record.n, record.base, record.key) != (n, n - 1, self.key):
            sealed.damaged(
                path,
                f"it is record {record.n} on {record.base} of {record.key!r}, "
                f"not {n} on {n - 1} of {self.key!r}",
            )
        return record

    def read(self, n: int) -> Record:
        """Record n, which must be there."""
        record = self.find(n)
        if record is None:
            sealed.damaged(self.path(n), "the record is missing")
        return record

    def append(self, written: Path, record: Record) -> Record:
        """Commit a durable record file. The record that now decides this task's outcome.

        That is `record`, or the one of another claim of the same task that was faster. If another
        task has the name, `Fenced`. `Unavailable` means that the outcome isn't known here; whoever
        asks again later will read it.
        """
        if record.n == 1 or record.n % A_BUCKET == 0:
            # The first of its bucket: those after it find the bucket made, and durable.
            durable.make_directory(self.path(record.n).parent)
        if record.n % A_BUCKET == 0:
            # Closes: power lost with record n durable and n - 1, in another directory, not.
            durable.sync_directory(self.path(record.base).parent)
        crashpoints.reach("commit:before-link")
        winner = self._link(written, record)
        crashpoints.reach("commit:after-link")
        if winner.task_id != record.task_id:
            raise Fenced(
                f"{self.key}: version {record.n} went to task {winner.task_id}, "
                f"so this run of {record.task_id} on version {record.base} has no outcome"
            )
        return winner

    def settle(self, n: int) -> None:
        """Make a record durable that was found: its writer may have died before doing so."""
        durable.sync_directory(self.path(n).parent)

    def _link(self, written: Path, record: Record) -> Record:
        """Try until it is known who has the name. Trying again is harmless: it is the same file."""
        target = self.path(record.n)
        trouble = ""
        for pause in PAUSES:
            time.sleep(pause)
            trouble, hopeless = "the name exists, and yet can't be read", False
            try:
                if durable.link_or_fail(written, target):
                    return record
            except OSError as error:
                trouble, hopeless = str(error.strerror), error.errno in NO_POINT_IN_WAITING
            winner = self.find(record.n)
            if winner is not None:
                self.settle(record.n)
                return winner
            if hopeless:
                raise Unavailable(f"{target}: {trouble}; nothing was committed")
        raise Unavailable(f"{target}: {trouble}; whether it was committed isn't known")

    def _records_in(self, bucket: int) -> set[int]:
        folder = self.folder / str(bucket)
        found = self._numbers(folder, "records", os.DirEntry.is_file)
        for n in found:
            if n < 1 or n // A_BUCKET != bucket:
                sealed.damaged(folder / str(n), "a foreign file in a commit log: the wrong bucket")
        return found

    def _numbers(self, folder: Path, what: str, is_kind: Callable[..., bool]) -> set[int]:
        """The names in a directory of the log; one that isn't ours is reported, not skipped."""
        numbers = set()
        for entry in durable.entries(folder):
            ours = re.fullmatch(r"0|[1-9][0-9]*", entry.name)
            if not ours or not is_kind(entry, follow_symlinks=False):
                raise Damaged(f"{entry.path}: foreign in a commit log; only {what} belong here")
            numbers.add(int(entry.name))
        return numbers
