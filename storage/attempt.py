"""One attempt's half of a commit: what it stores, and how it ends in one record.

<root>/jobs/<key>/runs/<task id>/<claim id>/data-<base>-<i>     bytes of files
                                           /manifest-<base>     the version's files
                                           /record-<n>-<try>    linked into the log: the commit
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import crashpoints
from errors import OverQuota, Refused
from storage import checkpoint, durable, listing, sealed
from storage.contents import Store
from storage.listing import Listing
from storage.log import Record, Reference, State
from storage.manifest import SMALL, Differences, File, LeftOut
from storage.worktree import Changes, WorkTree

if TYPE_CHECKING:
    from storage.directory import Directory, Version

# HEAD saves a reader listings of a thousand records; it needn't name the last one.
A_HINT_EVERY = 16


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

    def commit(
        self, tree: WorkTree, result: Any, *, attempt: int, node: str, quota: int | None = None
    ) -> Record:
        """Make the tree the next version, and `result` (JSON) the task's outcome: SUCCESS.

        A function as `result` is called with what was left out, and returns the result.
        Returns the record that decides the task: this one, or another claim's that came first.
        `Fenced`: another task committed on the base; this run has no outcome.
        `Refused`: the tree changed meanwhile, or the result isn't JSON; `OverQuota`: it holds more
        than `quota` bytes. Nothing was committed.
        """
        if not callable(result):
            sealed.to_json(result)
        if tree.version_n != self.base.n:
            raise Refused(f"{tree.path} holds version {tree.version_n}, not {self.base.n}")
        if self._stored:
            raise Refused(f"{self.folder}: this attempt has stored its files before; begin another")
        self._stored = True
        stored, changes = self.store(tree, self.folder, quota)
        self.left_out = changes.left_out
        told = result(changes.left_out) if callable(result) else result
        record = self.record("SUCCESS", stored.reference, told, attempt, node)
        if record.claim_id == self.claim_id and record.n == self.base.n + 1:
            tree.accept(stored, record.n, changes)
        return record

    def commit_version(self, old: Version, result: Any, *, attempt: int, node: str) -> Record:
        """Make an older version the next one. Returns and raises as `commit` does.

        What the base doesn't name is stored anew, also if it is still there: garbage collection
        may be about to remove it.
        """
        sealed.to_json(result)
        store = Store(self.directory.path, self.folder, self.base.n)
        kept = self.base.listing.stored_files()
        entries = old.differs_from(self.base)
        for path, entry in entries.items():
            if isinstance(entry, File):
                with self.directory.explaining(old.n):
                    entries[path] = store.copy(entry, kept)
        store.finish()
        head, differences = self.base.listing.after(entries, old.listing.left_out)
        name = os.path.relpath(self.folder / f"manifest-{self.base.n}", self.directory.path)
        stored = listing.write(self.directory.path, name, head, differences, named=False)
        return self.record("SUCCESS", stored.reference, result, attempt, node)

    def conclude(self, state: str, result: Any, *, attempt: int, node: str) -> Record:
        """Record an outcome that isn't a success: the base's files, unchanged, as next version.

        Returns and raises as `commit` does.
        """
        if state not in ("FAILURE", "REVOKED"):
            raise Refused(f"{state!r} is no outcome without files: it is FAILURE or REVOKED")
        reference = self.base.record.manifest if self.base.record else None
        return self.record(cast(State, state), reference, result, attempt, node)

    def checkpoint(self, tree: WorkTree, *, quota: int | None = None) -> int:
        """Keep the tree as it is for this task's next attempt; which checkpoint it became.

        Nobody else sees it, and it is worth something only as long as the base is the head.
        """
        if tree.version_n != self.base.n:
            raise Refused(f"{tree.path} holds version {tree.version_n}, not {self.base.n}")
        number, folder = checkpoint.make_folder(self.folder.parent)
        stored, changes = self.store(tree, folder, quota)
        checkpoint.seal(folder, self.base.n, stored)
        tree.accept(stored, self.base.n, changes)
        return number

    def store(self, tree: WorkTree, folder: Path, quota: int | None) -> tuple[Listing, Changes]:
        """Store what the run touched, and the manifest of the whole; the rest lies where it lay."""
        assert tree.listing is not None
        changes = tree.changes()
        used = changes.now.files.length()
        if quota is not None and used > quota:
            raise OverQuota(f"{self.directory.key}: {used:,} bytes are more than {quota:,}")
        entries = self._store_files(tree, changes, Store(self.directory.path, folder, self.base.n))
        tree.check_unchanged(changes)
        head, differences = tree.listing.after(entries, changes.left_out)
        name = os.path.relpath(folder / f"manifest-{self.base.n}", self.directory.path)
        stored = listing.write(self.directory.path, name, head, differences, named=False)
        crashpoints.reach("commit:manifest-written")
        return stored, changes

    def _store_files(self, tree: WorkTree, changes: Changes, store: Store) -> Differences:
        assert tree.listing is not None
        now = changes.now
        entries: Differences = dict(changes.others)
        linked: dict[int, File] = {}
        for path in sorted(changes.touched):
            inode, length, mtime_ns, _, mode = now.files[path]
            same = linked.get(inode)
            if same is not None:
                entries[path] = same._replace(path=path)
                continue
            # What is rewritten for certain isn't worth looking up in a large full manifest.
            old = tree.listing.get(path) if length > SMALL else tree.listing.changed.get(path)
            extents = store.add(
                tree.path / path, path, old if isinstance(old, File) else None, path in now.sparse
            )
            file = entries[path] = File(path, mode & 0o777, mtime_ns, extents)
            if path in now.linked:
                linked[inode] = file
            crashpoints.reach("commit:file-written")
        store.finish()
        crashpoints.reach("commit:files-written")
        return entries

    def record(
        self, state: State, manifest: Reference | None, result: Any, attempt: int, node: str
    ) -> Record:
        """Write the record and link it: the commit. As `commit` for what comes back."""
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
        durable.create(written, data)  # its folder's sync names the files and the manifest as well
        crashpoints.reach("commit:record-written")
        decided = self.directory.log.append(written, Record.decode(data, written))
        if decided.n == 1 or decided.n % A_HINT_EVERY == 0:
            self.directory.set_hint(decided.n, self.folder / f"HEAD-{self._tries}")
        crashpoints.reach("commit:head-written")
        return decided
