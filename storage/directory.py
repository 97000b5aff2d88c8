"""One key's directory on the shared file system: its versions, and how an attempt adds one.

    <root>/jobs/<key>/log/<n // 1000>/<n>           the commit log (storage/log.py)
    <root>/jobs/<key>/runs/<task id>/<claim id>/    one attempt's files, manifest and records
    <root>/jobs/<key>/HEAD                          a hint where the log ends, nothing more

Promises: a reader sees a version whole or not at all; a version is what exactly one attempt made
of the version before it; a task id has at most one record. An attempt that dies anywhere leaves a
folder in runs/ that nothing refers to, and the directory as it was.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import crashpoints
from errors import CohortError, Damaged, Fenced, Refused, SnapshotExpired, StandAside
from storage import checkpoint, durable
from storage.attempt import Attempt
from storage.keys import check_key, check_name
from storage.listing import Listing, Missing
from storage.log import Log, Record
from storage.version import Version

__all__ = ["Attempt", "Directory", "Version", "conclude_for", "conclusion_of"]

BELONGS = ("log", "runs", "gc", "HEAD")


class Directory:
    """The directory of one key. Holds no state of its own: several may look at the same one."""

    def __init__(self, root: Path, key: str):
        self.path = root / "jobs" / check_key(key)
        self.key = key
        self.log = Log(self.path / "log", key)

    @classmethod
    def open(cls, root: Path, key: str) -> "Directory":
        """The directory, made if it isn't there. The shared folder itself must be."""
        directory = cls(root, key)
        names = directory._look_for_foreign_files()
        if "HEAD" not in names:  # it is set after the first commit: until then make sure of all
            for folder in (
                root / "jobs",
                directory.path,
                directory.log.folder,
                directory.path / "runs",
            ):
                durable.make_directory(folder)
        return directory

    def head(self) -> Version:
        """The newest version, as far as this node can see; a commit on an older one is fenced."""
        return Version(self, self.log.head(self._hint()))

    def version(self, n: int) -> Version:
        """Version n, which must exist."""
        return Version(self, self.log.read(n) if n else None)

    def versions(self) -> Iterator[Record]:
        """Every record, from 1 to the head."""
        for n in range(1, self.head().n + 1):
            yield self.log.read(n)

    def outcome_of(self, task_id: str) -> Record | None:
        """The task's recorded outcome, whatever was committed since; None if it has none.

        The names of the records in its runs say where in the log to look; what is there decides.
        A record that isn't there, or is only half written, belongs to a run that died or lost.
        """
        for run in durable.entries(self.runs_of(task_id)):
            if not run.is_dir(follow_symlinks=False):
                raise Damaged(f"{run.path}: foreign among the runs of a task; each is a folder")
            if run.name.startswith(checkpoint.PREFIX):
                continue
            for entry in durable.entries(Path(run.path)):
                kind, _, rest = entry.name.partition("-")
                number = rest.partition("-")[0]
                if kind != "record" or not number.isdecimal():
                    continue
                record = self.log.find(int(number))
                if record is not None and record.task_id == task_id:
                    self.log.settle(record.n)
                    return record
        return None

    def begin(self, task_id: str, claim_id: str, base: Version) -> "Attempt":
        """Start an attempt on `base`: its own folder first. `StandAside` if it was begun before."""
        if claim_id.startswith(checkpoint.PREFIX):
            raise Refused(f"claim id {claim_id!r} is the name of a checkpoint")
        return self._begin(task_id, claim_id, check_name("claim id", claim_id), base)

    def checkpoint_of(self, task_id: str, base: Version) -> Listing | None:
        """What an earlier attempt of the task kept of its work on `base`, for `checkout`."""
        return checkpoint.newest(self.path, self.runs_of(task_id), base.n)

    @contextmanager
    def explaining(self, n: int) -> Iterator[None]:
        """A stored file of version n that is missing: collected, or lost?"""
        try:
            yield
        except Missing as missing:
            if n < (floor := self.floor()):
                raise SnapshotExpired(
                    f"{self.key}: version {n} was collected; those from {floor} on are kept"
                ) from missing
            raise

    def floor(self) -> int:
        """The oldest version whose files are all kept; garbage collection raises it."""
        names = (entry.name for entry in durable.entries(self.path / "gc"))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def restore(
        self, n: int, task_id: str, claim_id: str, *, result: Any, attempt: int, node: str
    ) -> Record:
        """Commit version n once more, as the newest one. Raises as `Attempt.commit` does.

        `SnapshotExpired` if files of it were collected.
        """
        mine = self.begin(task_id, claim_id, self.head())
        return mine.commit_version(self.version(n), result, attempt=attempt, node=node)

    def conclude_for(
        self, task_id: str, claim_id: str, state: str, result: Any, *, attempt: int, node: str
    ) -> Record:
        """Record an outcome for a claim whose process is dead, unless the task has one: return it.

        It doesn't depend on a version that the dead run read, so when another task commits first,
        it is tried again on the new head. After `Unavailable` it may be called again.
        """
        # The claim's own folder had its writer; nor may its record pass for the claim's own.
        end = conclusion_of(check_name("claim id", claim_id))
        ending = self._begin(task_id, end, f"{end}-{secrets.token_hex(4)}", self.head())
        while True:
            try:
                return ending.conclude(state, result, attempt=attempt, node=node)
            except Fenced:
                ending.base = self.head()

    def _begin(self, task_id: str, claim_id: str, name: str, base: Version) -> "Attempt":
        folder = self.runs_of(task_id) / name
        durable.make_directory(folder.parent)
        if not durable.make_directory(folder):
            raise StandAside(f"{folder} exists; a run's folder has one writer, ever")
        crashpoints.reach("run:folder-made")
        return Attempt(self, task_id, claim_id, folder, base)

    def runs_of(self, task_id: str) -> Path:
        return self.path / "runs" / check_name("task id", task_id)

    def set_hint(self, n: int, by_way_of: Path) -> None:
        durable.replace_hint(self.path / "HEAD", f"{n}\n".encode(), by_way_of)

    def _hint(self) -> int:
        with suppress(CohortError, ValueError):
            return max(0, int(durable.read(self.path / "HEAD") or b"0"))
        return 0

    def _look_for_foreign_files(self) -> set[str]:
        found = set()
        for entry in durable.entries(self.path):
            # .nfs...: what an NFS client keeps of a HEAD that it still had open when it was set.
            if entry.name not in BELONGS and not entry.name.startswith(".nfs"):
                raise Damaged(
                    f"{entry.path}: foreign in a job directory; only {', '.join(BELONGS)} belong"
                )
            found.add(entry.name)
        return found


def conclusion_of(claim_id: str) -> str:
    """The claim id of a record that `conclude_for` made for that claim."""
    return f"{claim_id}-end"


def conclude_for(
    root: Path,
    key: str,
    task_id: str,
    claim_id: str,
    state: str,
    result: Any,
    attempt: int,
    node: str,
) -> Record:
    """`Directory.conclude_for` for the node's main process, which has no directory open.

    Call it only after making sure that the child is dead.
    """
    directory = Directory.open(root, key)
    return directory.conclude_for(task_id, claim_id, state, result, attempt=attempt, node=node)
