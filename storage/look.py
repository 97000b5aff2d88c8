"""The look itself: at every name below some folders, and into no file.

It is also a program, with nothing but the standard library: `storage/scan.py` starts it to have the
folders of a large tree divided among processes, each of which takes the next batch of folders when
it is done with one. It dies with its parent, and without a word if something is wrong: then the
parent looks for itself, and finds out what.
"""

from __future__ import annotations

import gc
import marshal
import os
import stat
import sys
from array import array
from operator import attrgetter

TYPE_CHECKING = False  # as in typing, whose import takes as long as the rest of the start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

Identity = tuple[int, int, int, int, int]
"""inode, length, mtime_ns, ctime_ns, st_mode"""

identity_of: Callable[[os.stat_result], Identity] = attrgetter(
    "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns", "st_mode"
)

COLUMNS = 5

Packed = tuple[str, bytes]
"""The regular files right inside a folder, in the order in which the kernel names them: the names,
joined by NUL, and the identities, each number in 8 bytes. So the tables of a large tree are few
objects, and that nothing differs in a folder is seen by one comparison.
"""

ALL_TAKEN = b"\0"
"""Stands in the queue behind the number of the last batch, once for every process."""


class CantLook(Exception):
    """Something can't be looked at, or went away meanwhile."""


class Found:
    """What was seen, in plain data; storage/scan.py says what each table means."""

    def __init__(self) -> None:
        self.files: dict[str, Packed] = {}
        """Only folders whose files aren't the same as before."""
        self.same: list[str] = []
        self.folders: dict[str, tuple[int, int]] = {}
        self.symlinks: dict[str, tuple[str, int]] = {}
        self.left_out: list[tuple[str, str]] = []
        self.sparse: list[str] = []
        self.linked: list[str] = []

    def add(self, other: dict[str, Any]) -> None:
        """What another process saw, in other folders."""
        for name, mine in vars(self).items():
            if isinstance(mine, dict):
                mine.update(other[name])
            else:
                mine.extend(other[name])


def look(
    tree: str,
    to_visit: list[str],
    before: dict[str, Packed],
    found: Found,
    until: int | None = None,
) -> list[str]:
    """Look at all that is below these folders, or until so many are known that are to be visited.
    Returns those.
    """
    while to_visit and (until is None or len(to_visit) < until):
        # In breadth if the rest is to be divided, else in depth: that keeps the list short.
        inside = to_visit.pop(-1 if until is None else 0)
        prefix = f"{inside}/" if inside else ""
        names: list[str] = []
        numbers: list[int] = []
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
                        name = entry.name
                        if kind == stat.S_IFREG:
                            names.append(name)
                            numbers += identity_of(status)
                            if status.st_nlink > 1:
                                found.linked.append(prefix + name)
                            if status.st_blocks * 512 < status.st_size:
                                found.sparse.append(prefix + name)
                        elif kind == stat.S_IFDIR:
                            found.folders[prefix + name] = (mode & 0o7777, status.st_mtime_ns)
                            to_visit.append(prefix + name)
                        elif kind == stat.S_IFLNK:
                            target = os.readlink(name, dir_fd=folder)
                            found.symlinks[prefix + name] = (target, status.st_mtime_ns)
                            continue
                        else:
                            what = KINDS.get(kind, "unknown kind")
                            found.left_out.append((prefix + name, what))
                            continue
                        if mode & 0o7000:
                            found.left_out += [(prefix + name, BITS[b]) for b in BITS if mode & b]
            finally:
                os.close(folder)
        except FileNotFoundError as error:
            name = error.filename if isinstance(error.filename, str) else inside
            raise CantLook(
                f"{os.path.relpath(os.path.join(tree, inside, name), tree)!r} "
                "went away while it was looked at"
            ) from None
        except OSError as error:
            raise CantLook(f"{inside or '.'!r} can't be committed: {error.strerror}") from None
        if names:
            files = packed(names, numbers)
            if files == before.get(inside):
                found.same.append(inside)
            else:
                found.files[inside] = files
    return to_visit


def packed(names: Iterable[str], numbers: list[int]) -> Packed:
    """The names and, one after the other, their identities."""
    try:
        columns = array("q", numbers)
    except OverflowError:  # an inode's number of 64 bits
        half = 1 << 63
        columns = array("q", [(number + half) % (2 * half) - half for number in numbers])
    return "\0".join(names), columns.tobytes()


def unpacked(files: Packed) -> dict[str, Identity]:
    """Name to identity."""
    numbers = iter(array("q", files[1]))
    rows = zip(*[numbers] * COLUMNS, strict=True)
    return {
        name: (inode % (1 << 64), length, mtime_ns, ctime_ns, mode)
        for name, (inode, length, mtime_ns, ctime_ns, mode) in zip(
            files[0].split("\0"), rows, strict=True
        )
    }


def main() -> None:
    """For argv: the queue, the parent's process id, the tree; on stdin a file: the batches, and
    what was in the tree before.

    Takes batches as long as there are any, and writes which they were and what was in them.
    """
    queue, parent, tree = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    found, numbers, batches, before = Found(), b"", None, {}
    while (number := os.read(queue, 1)) != ALL_TAKEN:
        if os.getppid() != parent or not number:
            return
        if batches is None:  # complete since before the first number
            batches, before = marshal.loads(os.pread(0, os.fstat(0).st_size, 0))
        look(tree, batches[number[0] - 1], before, found)
        numbers += number
    with open(1, "wb") as answer:
        marshal.dump((numbers, vars(found)), answer)
        answer.flush()
        os._exit(0)  # taking the tables apart in order would keep the parent waiting


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

if __name__ == "__main__":
    gc.disable()
    main()
