"""The look itself: at every name below some folders, and into no file.

It is also a program, with nothing but the standard library: `storage/scan.py` starts it to have the
folders of a large tree divided among processes, each of which takes the next batch of folders when
it is done with one. It dies with its parent, and without a word if something is wrong: then the
parent looks for itself, and finds out what.
"""

import gc
import marshal
import os
import stat
import sys
from collections.abc import Callable
from operator import attrgetter
from typing import Any

Identity = tuple[int, int, int, int, int]
"""inode, length, mtime_ns, ctime_ns, st_mode"""

identity_of: Callable[[os.stat_result], Identity] = attrgetter(
    "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns", "st_mode"
)

ALL_TAKEN = b"\0"
"""Stands in the queue behind the number of the last batch, once for every process."""


class CantLook(Exception):
    """Something can't be looked at, or went away meanwhile."""


class Found:
    """What was seen, in plain data; storage/scan.py says what each table means."""

    def __init__(self) -> None:
        self.files: dict[str, Identity] = {}
        self.folders: dict[str, tuple[int, int]] = {}
        self.symlinks: dict[str, tuple[str, int]] = {}
        self.left_out: list[tuple[str, str]] = []
        self.sparse: list[str] = []
        self.linked: list[str] = []

    def add(self, other: dict[str, Any]) -> None:
        """What another process saw, in other folders."""
        for name, mine in self.__dict__.items():
            if isinstance(mine, dict):
                mine.update(other[name])
            else:
                mine.extend(other[name])


def look(tree: str, to_visit: list[str], found: Found, until: int | None = None) -> list[str]:
    """Look at all that is below these folders, or until so many are known that are to be visited.
    Returns those.
    """
    files = found.files
    while to_visit and (until is None or len(to_visit) < until):
        # In breadth if the rest is to be divided, else in depth: that keeps the list short.
        inside = to_visit.pop(-1 if until is None else 0)
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
                                found.linked.append(path)
                            if status.st_blocks * 512 < status.st_size:
                                found.sparse.append(path)
                        elif kind == stat.S_IFDIR:
                            found.folders[path] = (mode & 0o7777, status.st_mtime_ns)
                            to_visit.append(path)
                        elif kind == stat.S_IFLNK:
                            target = os.readlink(entry.name, dir_fd=folder)
                            found.symlinks[path] = (target, status.st_mtime_ns)
                            continue
                        else:
                            found.left_out.append((path, KINDS.get(kind, "unknown kind")))
                            continue
                        if mode & 0o7000:
                            found.left_out += [(path, BITS[b]) for b in BITS if mode & b]
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
    return to_visit


def main() -> None:
    """For argv: the queue, the parent's process id, the tree; on stdin a file: the batches.

    Takes batches as long as there are any, and writes which they were and what was in them.
    """
    queue, parent, tree = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    found, numbers, batches = Found(), b"", None
    while (number := os.read(queue, 1)) != ALL_TAKEN:
        if os.getppid() != parent or not number:
            return
        if batches is None:  # complete since before the first number
            batches = marshal.loads(os.pread(0, os.fstat(0).st_size, 0))
        look(tree, batches[number[0] - 1], found)
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
