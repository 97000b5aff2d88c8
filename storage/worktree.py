"""A run's own copy of a version, on the node's local disk, kept between runs like a git work tree.

Promises: after `checkout` the tree is the version, exactly: contents (verified by hash while they
are fetched), modes, mtimes, symbolic links, empty folders, holes. It costs what differs from what
the tree held before, after a run that failed or was killed, too. `changes` tells what the run
touched without reading what it didn't. A symbolic link is never followed. Two runs never share a
tree. Why a tree that was kept can be believed is told in storage/treeindex.py.

What is not kept: owners, extended attributes, mode and mtime of the top folder. Hard links stay
links in a tree that is kept, and are stored once; on another node they are copies.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from errors import Damaged, Refused
from storage import durable, fetch
from storage.keys import check_key, check_name
from storage.listing import Listing
from storage.manifest import Differences, File, Folder, LeftOut, Symlink
from storage.scan import Scan, identity_of, scan, wait_for_a_tick
from storage.scratch import Slot, take, wipe
from storage.treeindex import Index

if TYPE_CHECKING:
    from storage.directory import Directory, Version


@dataclass(frozen=True)
class Changes:
    """A tree as it stands, and how it differs from what was checked out."""

    now: Scan
    touched: frozenset[str]
    """Files that are new, or aren't as they were checked out."""
    others: Differences
    """Folders and links that are new or differ; None for everything that is gone."""
    begin: int | None = None
    """Whatever changed after the look began has this ctime or a later one."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        return self.now.left_out


class WorkTree:
    """One attempt's tree. Whoever checks it out releases it, however the attempt ends."""

    def __init__(self, scratch: Path, key: str, claim_id: str):
        self._scratch, self._key = scratch, check_key(key)
        check_name("claim id", claim_id)
        self._slot: Slot | None = None
        self._known = Index()
        self._clock_tells = True
        self.version_n: int | None = None
        """What was checked out; None before that was done."""
        self.listing: Listing | None = None
        """The files that were checked out: those of the version, or of a checkpoint on it."""

    @property
    def path(self) -> Path:
        """The run's working directory. It is known from the checkout on."""
        if self._slot is None:
            raise Refused(f"no work tree of {self._key!r} is checked out here")
        return self._slot.tree

    @property
    def locks(self) -> tuple[int, ...]:
        """Descriptors for a program that may outlive this process: the tree is in use while it
        holds them.
        """
        return () if self._slot is None else (self._slot.lock,)

    def checkout(
        self, directory: "Directory", version: "Version", checkpoint: Listing | None = None
    ) -> None:
        """Make the tree the version, or what a checkpoint made of it if that can be read.

        `Damaged` if what is stored isn't what was committed; `SnapshotExpired` if it was collected.
        """
        if self._slot is not None:
            raise Refused(f"{self._slot.tree} exists; a work tree has one attempt")
        with durable.reporting(self._scratch):
            self._slot = take(self._scratch, self._key)
        with durable.reporting(self.path), directory.explaining(version.n):
            self.version_n = version.n
            if checkpoint is not None:
                with suppress(Damaged):
                    self._bring_to(directory.path, checkpoint)
                    return
            self._bring_to(directory.path, version.listing)

    def changes(self) -> Changes:
        """What is in the tree now, by one look at every name and no look into any file."""
        begin = wait_for_a_tick(self._tick) if self._clock_tells else None
        return _compared(scan(self.path), self._known, self._clock_tells, begin)

    def check_unchanged(self, changes: Changes) -> None:
        """What was read of the touched files since is, with the rest, the tree of one moment: that
        in which `changes` began to look. `Refused` if it isn't.

        - What the look found as it was before had not been changed by then.
        - What it found touched had, and not since: that would have given it a later ctime.
        - No name came or went since: that would have given its folder a later ctime.

        So nobody need look at the rest once more. Without a clock that tells, one has to.
        """
        changed = f"{self._key}: the tree changed while it was committed"
        if changes.begin is None:
            if _compared(scan(self.path), self._known, clock_tells=False) != changes:
                raise Refused(changed)
            return
        for path in ("", *changes.now.folders, *changes.touched):
            try:
                found = identity_of(os.lstat(os.path.join(self.path, path)))
            except OSError as error:
                raise Refused(f"{changed} ({path!r}: {error.strerror})") from None
            if found[3] >= changes.begin or changes.now.files.get(path, found) != found:
                raise Refused(f"{changed} ({path or '.'!r})")

    def accept(self, listing: Listing, version_n: int, changes: Changes) -> None:
        """The tree, as `changes` saw it, is what was stored as `listing`. To be called only then.

        A tree that held what a version can't, or whose clock tells nothing, isn't believed.
        """
        self.listing, self.version_n = listing, version_n
        now = changes.now
        self._known = Index(listing.reference, now.files, now.folders, now.symlinks)
        if self._clock_tells:
            self._known.save(self._index)

    def release(self) -> None:
        """Give the tree back, to be kept for the key's next run on this node."""
        if self._slot is not None:
            self._slot.release()
            self._slot = None

    def remove(self) -> None:
        """Take the tree away for good."""
        if self._slot is not None:
            self._slot.remove()
            self._slot = None

    def _bring_to(self, directory: Path, wanted: Listing) -> None:
        self.path.mkdir(exist_ok=True)
        self.path.chmod(0o700)
        known, now, to_do = self._as_it_was(directory, wanted) or self._anew(directory, wanted)
        found = _compared(now, known, clock_tells=True)
        astray = found.touched | found.others.keys() | {entry.path for entry in now.left_out}
        for path in sorted(astray - to_do.keys()):
            to_do[path] = wanted.get(path)
        if to_do:
            wait_for_a_tick(self._tick, known.newest())
            known = self._apply(directory, wanted, now, known, to_do)
        newest = known.newest()
        self._clock_tells = not known.files or wait_for_a_tick(self._tick, newest) is not None
        if to_do or known.reference != wanted.reference:
            known.reference = wanted.reference
            if self._clock_tells:
                known.save(self._index)
            else:
                self._index.unlink(missing_ok=True)
        self._known, self.listing = known, wanted

    def _as_it_was(
        self, directory: Path, wanted: Listing
    ) -> tuple[Index, Scan, Differences] | None:
        """The tree that was kept, and what it lacks; None if it can't be looked at or compared."""
        known = Index.load(self._index)
        if known is not None:
            with suppress(Refused, Damaged):
                if known.reference == wanted.reference:
                    return known, scan(self.path), {}
                before = Listing.read(directory, known.reference)
                return known, scan(self.path), wanted.since(before)
        return None

    def _anew(self, directory: Path, wanted: Listing) -> tuple[Index, Scan, Differences]:
        wipe(self.path)
        self._index.unlink(missing_ok=True)
        self.path.mkdir()
        return Index(), Scan(), wanted.since(Listing(directory))

    def _apply(
        self, directory: Path, wanted: Listing, now: Scan, known: Index, to_do: Differences
    ) -> Index:
        """Do what is to be done; what the tree looks like then."""
        top = os.fspath(self.path)
        parents = {path.rpartition("/")[0] for path in to_do} - {""}
        for parent in parents & now.folders.keys():
            if now.folders[parent][0] & 0o700 != 0o700:
                os.chmod(os.path.join(top, parent), 0o700)
        files: list[File] = []
        for path, entry in sorted(to_do.items(), reverse=True):  # what is inside goes first
            kind = now.kind(path)
            if kind == "folder" and not isinstance(entry, Folder):
                os.chmod(os.path.join(top, path), 0o700)
                os.rmdir(os.path.join(top, path))
            elif kind in ("symlink", "other") or (kind == "file" and not isinstance(entry, File)):
                os.unlink(os.path.join(top, path))
            if isinstance(entry, File):
                files.append(entry)
        links = dict(now.symlinks)
        for path, entry in sorted(to_do.items()):
            links.pop(path, None)
            if isinstance(entry, Folder) and path not in now.folders:
                os.mkdir(os.path.join(top, path), 0o700)
            elif isinstance(entry, Symlink):
                os.symlink(entry.target, os.path.join(top, path))
                times = (entry.mtime_ns, entry.mtime_ns)
                os.utime(os.path.join(top, path), ns=times, follow_symlinks=False)
                links[path] = (entry.target, entry.mtime_ns)
        new = Index(wanted.reference, dict(known.files), dict(now.folders), links)
        for path in to_do:
            new.files.pop(path, None)
            new.folders.pop(path, None)
        reusable = now.files.keys() - now.linked
        new.files.update(fetch.bring(directory, files, self.path, reusable.__contains__))
        # Last, and what is inside first: an arrival sets the mtime of its folder.
        again = parents | {path for path, entry in to_do.items() if isinstance(entry, Folder)}
        for path in sorted(again, reverse=True):
            folder = to_do[path] if path in to_do else wanted.get(path)
            if isinstance(folder, Folder):
                os.chmod(os.path.join(top, path), folder.mode)
                os.utime(os.path.join(top, path), ns=(folder.mtime_ns, folder.mtime_ns))
                new.folders[path] = (folder.mode, folder.mtime_ns)
        return new

    @property
    def _index(self) -> Path:
        return self.path.parent / "index"

    @property
    def _tick(self) -> Path:
        return self.path.parent / "tick"


def _compared(now: Scan, known: Index, clock_tells: bool, begin: int | None = None) -> Changes:
    before = known.files
    if clock_tells:
        touched = frozenset(path for path, what in now.files.items() if before.get(path) != what)
    else:
        touched = frozenset(now.files)
    others: Differences = {}
    for path, (mode, mtime_ns) in now.folders.items():
        if known.folders.get(path) != (mode, mtime_ns):
            others[path] = Folder(path, mode & 0o777, mtime_ns)
    for path, (target, mtime_ns) in now.symlinks.items():
        if known.symlinks.get(path) != (target, mtime_ns):
            others[path] = Symlink(path, target, mtime_ns)
    here = now.files.keys() | now.folders.keys() | now.symlinks.keys()
    for path in (before.keys() | known.folders.keys() | known.symlinks.keys()) - here:
        others[path] = None
    return Changes(now, touched, others, begin)
