"""What a killed worker's jobs left running is ended by the next start of that node.

When a worker is killed, its pool dies with it; what its jobs had started doesn't. It writes into
work trees, takes memory, and nobody knows of it. So each life of a node leaves a mark:

    <scratch>/lives/<node>/<life>     locked by the node's main process for as long as it lives

All that comes from that process carries the mark, however it was started: a variable in its
environment, or, if it was only forked, a page of that file in its memory. Nothing is ended that
isn't proved to be ours: it runs as this user, carries the mark of a life of this node in this
scratch folder, and that life's main process is dead, for its lock is free. A program that was
started with an empty environment, and whose pool process was killed together with the worker, is
not found.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from tasks.family import end_marked

VARIABLE = "CHILD_OF_COHORT_NODE"
"""Not one of the settings `COHORT_*`: a job's program may be one of ours."""


@dataclass
class Mark:
    """This process's own life. The lock goes with the process, however that ends."""

    path: Path
    _lock: int
    _page: mmap.mmap

    def remove(self) -> None:
        """It leaves in good order: nothing of it is to be looked for."""
        self.path.unlink(missing_ok=True)


def leave_mark(scratch: Path, node: str) -> Mark:
    """From now on, what this process starts carries its mark."""
    folder = scratch / "lives" / node
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / uuid.uuid4().hex
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.truncate(lock, mmap.PAGESIZE)
    # A record lock: a forked child doesn't have it, so it is free once this process is dead.
    fcntl.lockf(lock, fcntl.LOCK_EX)
    page = mmap.mmap(lock, mmap.PAGESIZE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    os.environ[VARIABLE] = path.name
    return Mark(path, lock, page)


def end_those_of_dead_lives(scratch: Path, node: str) -> list[int]:
    """End what the lives of this node have left that are over. Returns the processes' numbers."""
    ended = []
    folder = scratch / "lives" / node
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # It lives: two workers of one name. Which may stay, the lease decides.
        else:
            ended += end_marked(path.name, ("environ", "maps"))
            path.unlink(missing_ok=True)
        finally:
            os.close(lock)
    return ended
