"""A run's own copy of a version, on the node's local disk.

    <scratch>/<key>/<claim id>/     nothing in it is visible to anybody else

Promises: after `checkout` the tree is the version, exactly: contents (verified by hash and length
while they are copied), modes, mtimes, symbolic links, empty folders. `changes` tells what the run
touched without reading what it didn't. A symbolic link is never followed.

What is not kept: owners, extended attributes, holes. Hard links become copies.
"""

import os
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from errors import Refused
from storage import durable, sealed
from storage.keys import check_key, check_name
from storage.manifest import PERMISSIONS, File, Folder, LeftOut, Symlink

if TYPE_CHECKING:
    from storage.directory import Directory, Version

T = TypeVar("T")

# Longer than the clock tick of any local file system that a node would use for scratch.
A_TICK = 2.0


@dataclass(frozen=True)
class Identity:
    """What changes when a file's content does: the kernel sets ctime, no program can."""

    inode: int
    length: int
    mtime_ns: int
    ctime_ns: int
    mode: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Identity":
        return cls(
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_mode & PERMISSIONS,
        )


@dataclass(frozen=True)
class Changes:
    """A tree as it stands, and which of its files aren't as they were checked out.

    Two of them are equal if nothing changed in the tree between the two looks.
    """

    files: dict[str, Identity]
    folders: tuple[Folder, ...]
    symlinks: tuple[Symlink, ...]
    left_out: tuple[LeftOut, ...]
    touched: frozenset[str]


class WorkTree:
    """One attempt's tree. Whoever makes it removes it, however the attempt ends."""

    def __init__(self, scratch: Path, key: str, claim_id: str):
        self.path = scratch / check_key(key) / check_name("claim id", claim_id)
        self.version_n: int | None = None
        """What was checked out; None before that was done."""
        self._tick = self.path.with_name(f"{claim_id}.tick")
        self._checked_out: dict[str, Identity] = {}

    def checkout(self, directory: "Directory", version: "Version") -> None:
        """Make the tree the version. `Damaged` if what is stored isn't what was committed."""
        with durable.reporting(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.path.mkdir()
            except FileExistsError:
                raise Refused(f"{self.path} exists; a work tree has one attempt") from None
            self.path.chmod(0o700)
            for folder in version.manifest.folders:  # sorted: parents come first
                os.mkdir(self.path / folder.path, 0o700)
            for link in version.manifest.symlinks:
                os.symlink(link.target, self.path / link.path)
            for file in version.manifest.files:
                self._checked_out[file.path] = self._fetch(directory.path, file)
            for folder in reversed(version.manifest.folders):  # a child's arrival sets the mtime
                os.chmod(self.path / folder.path, folder.mode)
                os.utime(self.path / folder.path, ns=(folder.mtime_ns, folder.mtime_ns))
            self._wait_for_the_next_tick()
        self.version_n = version.n

    def changes(self) -> Changes:
        """What is in the tree now, by one look at every name and no look into any file."""
        files: dict[str, Identity] = {}
        folders: list[Folder] = []
        symlinks: list[Symlink] = []
        left_out: list[LeftOut] = []
        to_visit = [""]
        while to_visit:
            inside = to_visit.pop()
            for name in self._look(inside, os.listdir):
                path = f"{inside}/{name}" if inside else name
                status = self._look(path, os.lstat)
                mode, kind = status.st_mode & PERMISSIONS, stat.S_IFMT(status.st_mode)
                if kind == stat.S_IFDIR:
                    folders.append(Folder(path, mode, status.st_mtime_ns))
                    to_visit.append(path)
                elif kind == stat.S_IFLNK:
                    symlinks.append(Symlink(path, self._look(path, os.readlink)))
                elif kind == stat.S_IFREG:
                    files[path] = Identity.of(status)
                else:
                    left_out.append(LeftOut(path, _KINDS.get(kind, "unknown kind of file")))
                    continue
                for bit, what in _BITS.items():
                    if status.st_mode & bit and kind != stat.S_IFLNK:
                        left_out.append(LeftOut(path, what))
        return Changes(
            files,
            tuple(sorted(folders, key=lambda folder: folder.path)),
            tuple(sorted(symlinks, key=lambda link: link.path)),
            tuple(sorted(left_out, key=lambda entry: (entry.path, entry.what))),
            frozenset(p for p, identity in files.items() if self._checked_out.get(p) != identity),
        )

    def remove(self) -> None:
        """Take the tree away, whatever modes the run left on its folders."""
        for folder, names, _ in os.walk(self.path):
            for name in names:
                path = os.path.join(folder, name)
                if not os.path.islink(path):
                    with suppress(OSError):
                        os.chmod(path, 0o700)
        shutil.rmtree(self.path, ignore_errors=True)
        self._tick.unlink(missing_ok=True)
        # The key's folder stays: another attempt may be about to make its tree in it.

    def _fetch(self, root: Path, file: File) -> Identity:
        """Copy one stored file into the tree; what it looks like before the run."""
        stored, path = root / file.stored, self.path / file.path
        source = _open_stored(stored)
        try:
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                length, digest = durable.copy_bytes(source, target, stored)
                if (length, digest) != (file.length, file.sha256):
                    sealed.damaged(stored, f"this isn't what was committed as {file.path!r}")
                os.fchmod(target, file.mode)
                os.utime(target, ns=(file.mtime_ns, file.mtime_ns))
                return Identity.of(os.fstat(target))
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _wait_for_the_next_tick(self) -> None:
        """Closes: the run rewrites a file within the clock tick of its checkout, with the same
        length and an mtime put back, and the file looks untouched.
        """
        if not self._checked_out:
            return
        newest = max(identity.ctime_ns for identity in self._checked_out.values())
        end = time.monotonic() + A_TICK
        try:
            self._tick.touch()
            while Identity.of(os.stat(self._tick)).ctime_ns <= newest:
                if time.monotonic() > end:
                    self._checked_out.clear()  # its clock tells nothing: read every file instead
                    return
                time.sleep(0.001)
                os.utime(self._tick)
        finally:
            self._tick.unlink(missing_ok=True)

    def _look(self, path: str, how: Callable[[str], T]) -> T:
        try:
            return how(os.path.join(self.path, path))
        except FileNotFoundError:
            raise Refused(f"{path!r} went away while the run was committed") from None
        except OSError as error:
            raise Refused(f"{path or '.'!r} can't be committed: {error.strerror}") from None


def _open_stored(stored: Path) -> int:
    try:
        return durable.open_to_read(stored)
    except FileNotFoundError:
        durable.reopen(stored.parent)
    try:
        return durable.open_to_read(stored)
    except FileNotFoundError:
        sealed.damaged(stored, "a stored file is missing")


_KINDS = {
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}
_BITS = {
    stat.S_ISUID: "set-uid bit",
    stat.S_ISGID: "set-gid bit",
    stat.S_ISVTX: "sticky bit",
}
