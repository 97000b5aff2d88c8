"""The node's local disk: which work tree is whose, and which may go.

    <scratch>/trees/<key>/<slot>/lock    held (flock) by the process whose run has the tree
                               /tree/    the job's working directory
                               /index    what the tree holds (storage/treeindex.py)

A key has one slot, or several if several runs of it were on this node at once; a run takes the
first free one, so a program finds its tree at the same path most of the time. The lock dies with
its process, however it dies. Nothing in here matters: a slot that is lost is fetched again.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from storage.keys import check_key


@dataclass
class Slot:
    """One tree's place, locked for this process until `release`."""

    path: Path
    _lock: int

    @property
    def lock(self) -> int:
        """The descriptor that keeps others away, for as long as any process holds it."""
        return self._lock

    @property
    def tree(self) -> Path:
        return self.path / "tree"

    @property
    def index(self) -> Path:
        return self.path / "index"

    def release(self) -> None:
        if self._lock >= 0:
            with suppress(OSError):
                os.utime(self.path)  # for eviction: used until now
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Take all of it away. The lock's file goes last: until then nobody else comes in."""
        if self._lock >= 0:
            wipe(self.tree)
            with suppress(OSError):
                for entry in self.path.iterdir():
                    if entry.name != "lock":
                        entry.unlink()
                (self.path / "lock").unlink()
                self.path.rmdir()
            with suppress(OSError):
                self.path.parent.rmdir()  # unless another slot of the key is there
            os.close(self._lock)
            self._lock = -1


def take(scratch: Path, key: str) -> Slot:
    """The first free slot of a key, made if need be."""
    folder = scratch / "trees" / check_key(key)
    number = 0
    while True:
        if slot := lock(folder / str(number), make=True):
            return slot
        number += 1


def lock(path: Path, *, make: bool = False) -> Slot | None:
    """The slot, locked; None if somebody has it, or if it isn't there and isn't to be made."""
    while True:
        try:
            if make:
                path.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0)
            file = os.open(path / "lock", flags, 0o600)
        except FileNotFoundError:
            if make:
                continue  # evicted in between
            return None
        except FileExistsError:
            if path.exists() and not path.is_dir():
                raise
            continue  # evicted in between, too: `mkdir` looks again, and finds nothing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        # Closes: it was evicted between the open and the lock, and the lock is on a file without
        # a name.
        with suppress(FileNotFoundError):
            if os.stat(path / "lock").st_ino == os.fstat(file).st_ino:
                return Slot(path, file)
        os.close(file)


def slots(scratch: Path) -> Iterator[Path]:
    """Every slot on this node."""
    for folder in _inside(scratch / "trees"):
        yield from (path for path in _inside(folder) if path.name.isdecimal())


def evict(
    scratch: Path,
    max_age: float,
    keep_free: int,
    free: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> list[Path]:
    """Remove trees that nobody used for `max_age` seconds, and the least recently used ones until
    `keep_free` bytes of the disk are free. Never one in use. Returns the slots that went.

    The age is by this node's clock on its own disk: nothing but room depends on it.
    """
    gone = []
    now = time.time()
    for used, path in sorted(_by_use(scratch)):
        if now - used <= max_age and free(scratch) >= keep_free:
            continue
        if slot := lock(path):
            slot.remove()
            gone.append(path)
    return gone


def wipe(tree: Path) -> None:
    """Remove a tree, whatever modes a run left on its folders. Follows no link."""
    with suppress(OSError):
        tree.chmod(0o700)
    for folder, names, _ in os.walk(tree):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                with suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(tree, ignore_errors=True)


def _by_use(scratch: Path) -> Iterator[tuple[float, Path]]:
    for path in slots(scratch):
        with suppress(OSError):
            yield path.stat().st_mtime, path


def _inside(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []
