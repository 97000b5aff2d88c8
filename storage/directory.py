"""One key's directory on the shared file system: its versions, and how an attempt adds one.

    <root>/jobs/<key>/log/<n // 1000>/<n>           the commit log (storage/log.py)
    <root>/jobs/<key>/runs/<task id>/<claim id>/    one attempt's files, manifest and records
    <root>/jobs/<key>/HEAD                          a hint where the log ends, nothing more

Promises: a reader sees a version whole or not at all; a version is what exactly one attempt made
of the version before it; a task id has at most one record. An attempt that dies anywhere leaves a
folder in runs/ that nothing refers to, and the directory as it was.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import crashpoints
from errors import CohortError, Damaged, Fenced, Refused, StandAside
from storage import durable, sealed
from storage import manifest as manifests
from storage.keys import check_key, check_name
from storage.log import Log, Record, Reference, State
from storage.manifest import File, LeftOut, Manifest
from storage.worktree import Changes, WorkTree

BELONGS = ("log", "runs", "HEAD")


@dataclass(frozen=True)
class Version:
    """The files of one key as one record left them. Number 0 is the empty one before any."""

    directory: Path
    record: Record | None

    @property
    def n(self) -> int:
        return self.record.n if self.record else 0

    @cached_property
    def manifest(self) -> Manifest:
        """Read when first asked for. `Damaged` if it isn't what the record vouches for."""
        return manifests.read(self.directory, self.record.manifest if self.record else None)


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
        for folder in (
            root / "jobs",
            directory.path,
            directory.log.folder,
            directory.path / "runs",
        ):
            durable.make_directory(folder)
        directory._look_for_foreign_files()
        return directory

    def head(self) -> Version:
        """The newest version, as far as this node can see; a commit on an older one is fenced."""
        return Version(self.path, self.log.head(self._hint()))

    def version(self, n: int) -> Version:
        """Version n, which must exist."""
        return Version(self.path, self.log.read(n) if n else None)

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
        return self._begin(task_id, claim_id, check_name("claim id", claim_id), base)

    def conclude_for(
        self, task_id: str, claim_id: str, state: str, result: Any, *, attempt: int, node: str
    ) -> Record:
        """Record an outcome for a claim whose process is dead, unless the task has one: return it.

        It doesn't depend on a version that the dead run read, so when another task commits first,
        it is tried again on the new head. After `Unavailable` it may be called again.
        """
        # The claim's own folder had its writer; nor may its record pass for the claim's own.
        end = f"{check_name('claim id', claim_id)}-end"
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

    def _look_for_foreign_files(self) -> None:
        for entry in durable.entries(self.path):
            # .nfs...: what an NFS client keeps of a HEAD that it still had open when it was set.
            if entry.name not in BELONGS and not entry.name.startswith(".nfs"):
                raise Damaged(
                    f"{entry.path}: foreign in a job directory; only {', '.join(BELONGS)} belong"
                )


class Attempt:
    """One run of one task on one version, by one claim: the only writer of its folder, ever.

    A task has one outcome although several claims of it may be at work, each with its own view:
    before it links, an attempt looks for the task's outcome with `outcome_of`, and that is enough.
    Suppose another claim's record of this task is at n. This attempt has read its base, so every
    record up to there was in the log before the attempt began.
    - n <= base: it was there before, with its name in runs/<task id>; `outcome_of` finds it.
      (The attempt has since made its own folder in there, so no old listing can hide it.)
    - n = base + 1, where this attempt would link: the link fails, and the record is returned.
    - n > base + 1: then base + 1 exists, is another task's, and this attempt is fenced.
    """

    def __init__(
        self, directory: Directory, task_id: str, claim_id: str, folder: Path, base: Version
    ):
        self.directory = directory
        self.task_id = task_id
        self.claim_id = claim_id
        self.folder = folder
        self.base = base
        self.left_out: tuple[LeftOut, ...] = ()
        """What the committed tree held and a version can't, for the outcome to name."""
        self._stored = False
        self._tries = 0

    def commit(self, tree: WorkTree, result: Any, *, attempt: int, node: str) -> Record:
        """Make the tree the next version, and `result` (JSON) the task's outcome: SUCCESS.

        Returns the record that decides the task: this one, or another claim's that came first.
        `Fenced`: another task committed on the base; this run has no outcome.
        `Refused`: the tree changed meanwhile, or the result isn't JSON; nothing was committed.
        """
        sealed.to_json(result)
        if tree.version_n != self.base.n:
            raise Refused(f"{tree.path} holds version {tree.version_n}, not {self.base.n}")
        if self._stored:
            raise Refused(f"{self.folder}: this attempt has stored its files before; begin another")
        self._stored = True
        changes = tree.changes()
        files = self._store(tree, changes)
        if tree.changes() != changes:
            raise Refused(f"{self.directory.key}: the tree changed while it was committed")
        manifest = Manifest(files, changes.folders, changes.symlinks, changes.left_out)
        self.left_out = manifest.left_out
        reference = manifests.write(self.directory.path, self._within("manifest"), manifest)
        crashpoints.reach("commit:manifest-written")
        return self._record("SUCCESS", reference, result, attempt, node)

    def conclude(self, state: str, result: Any, *, attempt: int, node: str) -> Record:
        """Record an outcome that isn't a success: the base's files, unchanged, as next version.

        Returns and raises as `commit` does.
        """
        if state not in ("FAILURE", "REVOKED"):
            raise Refused(f"{state!r} is no outcome without files: it is FAILURE or REVOKED")
        reference = self.base.record.manifest if self.base.record else None
        return self._record(cast(State, state), reference, result, attempt, node)

    def _store(self, tree: WorkTree, changes: Changes) -> tuple[File, ...]:
        """Copy what the run touched into the attempt's folder; the rest lies where it lay."""
        known = {file.path: file for file in self.base.manifest.files}
        folder = self.folder / "files"
        durable.make_directory(folder)
        files = []
        for number, (path, found) in enumerate(sorted(changes.files.items())):
            if path not in changes.touched:
                files.append(known[path])
                continue
            length, digest = self._copy(tree, path, folder / str(number))
            stored = self._within(f"files/{number}")
            files.append(File(path, stored, length, digest, found.mode, found.mtime_ns))
            crashpoints.reach("commit:file-written")
        durable.sync_directory(folder)
        crashpoints.reach("commit:files-written")
        return tuple(files)

    def _copy(self, tree: WorkTree, path: str, target: Path) -> tuple[int, str]:
        try:
            return durable.copy_into(tree.path / path, target)
        except (OSError, Damaged) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no plain file now"
            raise Refused(f"{path!r} can't be committed: {reason}") from error

    def _record(
        self, state: State, manifest: Reference | None, result: Any, attempt: int, node: str
    ) -> Record:
        n = self.base.n + 1
        record = Record(
            n=n,
            base=self.base.n,
            key=self.directory.key,
            task_id=self.task_id,
            claim_id=self.claim_id,
            attempt=attempt,
            state=state,
            manifest=manifest,
            result=result,
            node=node,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        self._tries += 1
        data, written = record.encode(), self.folder / f"record-{n}-{self._tries}"
        if outcome := self.directory.outcome_of(self.task_id):
            return outcome
        durable.create(written, data)
        crashpoints.reach("commit:record-written")
        decided = self.directory.log.append(written, Record.decode(data, written))
        self.directory.set_hint(decided.n, self.folder / f"HEAD-{self._tries}")
        crashpoints.reach("commit:head-written")
        return decided

    def _within(self, name: str) -> str:
        return os.path.relpath(self.folder / name, self.directory.path)


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
