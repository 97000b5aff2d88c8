"""What is in a work tree, by one look at every name and no look into any file.

A regular file is known by its identity: inode, length, mtime, ctime and mode. The kernel sets
ctime, no program can; so a file whose identity is the one noted before has the content that it
had then, provided that the clock had ticked in between (`wait_for_a_tick`).
"""

import gc
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from errors import Refused
from storage.manifest import LeftOut

Identity = tuple[int, int, int, int, int]
"""inode, length, mtime_ns, ctime_ns, st_mode"""

# Longer than the clock tick of any local file system that a node would use for scratch.
A_TICK = 2.0


identity_of: Callable[[os.stat_result], Identity] = attrgetter(
    "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns", "st_mode"
)


@dataclass
class Scan:
    """A tree as it stands. Two of them are equal if nothing changed between the two looks."""

    files: dict[str, Identity] = field(default_factory=dict)
    folders: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Path to all mode bits and mtime."""
    symlinks: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Path to target and mtime."""
    left_out: tuple[LeftOut, ...] = ()
    sparse: frozenset[str] = frozenset()
    """Files that take less room than their length says: they may have holes."""
    linked: frozenset[str] = frozenset()
    """Files whose inode has several names."""

    def kind(self, path: str) -> str | None:
        """file, folder, symlink, other, or None if there is nothing."""
        for kind, table in (
            ("file", self.files),
            ("folder", self.folders),
            ("symlink", self.symlinks),
        ):
            if path in table:
                return kind
        return "other" if any(path == entry.path for entry in self.left_out) else None


def scan(tree: Path) -> Scan:
    """`Refused` if something can't be looked at, or goes away meanwhile."""
    found = Scan()
    left_out: list[LeftOut] = []
    sparse: list[str] = []
    linked: list[str] = []
    to_visit, files = [""], found.files
    with _no_collecting():
        while to_visit:
            inside = to_visit.pop()
            prefix = f"{inside}/" if inside else ""
            try:
                folder = os.open(
                    os.path.join(tree, inside), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                )
                try:
                    with os.scandir(folder) as entries:
                        for entry in entries:
                            status = entry.stat(follow_symlinks=False)
                            mode = status.st_mode
                            kind = mode & 0o170000
                            path = prefix + entry.name
                            if kind == stat.S_IFREG:
                                files[path] = identity_of(status)
                                if status.st_nlink > 1:
                                    linked.append(path)
                                if status.st_blocks * 512 < status.st_size:
                                    sparse.append(path)
                            elif kind == stat.S_IFDIR:
                                found.folders[path] = (mode & 0o7777, status.st_mtime_ns)
                                to_visit.append(path)
                            elif kind == stat.S_IFLNK:
                                target = os.readlink(entry.name, dir_fd=folder)
                                found.symlinks[path] = (target, status.st_mtime_ns)
                                continue
                            else:
                                left_out.append(LeftOut(path, KINDS.get(kind, "unknown kind")))
                                continue
                            if mode & 0o7000:
                                left_out += [LeftOut(path, BITS[b]) for b in BITS if mode & b]
                finally:
                    os.close(folder)
            except FileNotFoundError as error:
                name = error.filename if isinstance(error.filename, str) else inside
                raise Refused(
                    f"{os.path.relpath(os.path.join(tree, inside, name), tree)!r} "
                    "went away while it was looked at"
                ) from None
            except OSError as error:
                raise Refused(f"{inside or '.'!r} can't be committed: {error.strerror}") from None
    found.left_out = tuple(sorted(left_out))
    found.sparse, found.linked = frozenset(sparse), frozenset(linked)
    return found


def wait_for_a_tick(beside: Path, newest: int | None = None) -> int | None:
    """Wait until whatever is written from now on has a ctime above `newest`, or above that of
    whatever was written until now. Returns the ctime of what is written now.

    Closes: a file is rewritten within the clock tick in which it was noted, with the same length
    and an mtime put back, and looks untouched. None: this file system's clock tells nothing.
    """
    end = time.monotonic() + A_TICK
    try:
        beside.touch()
        if newest is None:
            newest = identity_of(os.stat(beside))[3]
            os.utime(beside)
        while (now := identity_of(os.stat(beside))[3]) <= newest:
            if time.monotonic() > end:
                return None
            time.sleep(0.001)
            os.utime(beside)
        return now
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _no_collecting() -> Iterator[None]:
    # Hundreds of thousands of tuples that all stay: each collection would walk them in vain.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


KINDS = {
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}
BITS = {
    stat.S_ISUID: "set-uid bit",
    stat.S_ISGID: "set-gid bit",
    stat.S_ISVTX: "sticky bit",
}
