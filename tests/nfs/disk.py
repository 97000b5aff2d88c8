"""What a local disk loses with the power: every change that no fsync has made durable.

Bytes are durable once their file was fsynced; a name once its directory was. What was not may be
lost or kept, each change by itself; the seed decides, and seed 0 loses all.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.nfs.beliefs import Inode, inode_of


@dataclass
class Undoing:
    directory: str
    undo: Callable[[], None]
    held: int = -1

    def forget(self) -> None:
        if self.held >= 0:
            os.close(self.held)


class Disk:
    """Keeps, beside the backing folder, how to undo what isn't durable."""

    def __init__(self) -> None:
        self._bytes: dict[Inode, tuple[int, bytes]] = {}
        self._names: list[Undoing] = []

    def before_write(self, real_fd: int) -> None:
        """The file's bytes are about to change."""
        inode = inode_of(os.fstat(real_fd))
        if inode not in self._bytes:
            held = os.open(f"/proc/self/fd/{real_fd}", os.O_RDWR | os.O_CLOEXEC)
            self._bytes[inode] = held, os.pread(held, os.fstat(held).st_size, 0)

    def synced(self, inode: Inode) -> None:
        held, _ = self._bytes.pop(inode, (-1, b""))
        if held >= 0:
            os.close(held)

    def made(self, real: str) -> None:
        """A name was made."""
        self._note(real, lambda: _remove(real))

    def before_removal(self, real: str) -> None:
        """A name is about to be removed or replaced."""
        try:
            status = os.lstat(real)
        except FileNotFoundError:
            self._note(real, lambda: _remove(real))
            return
        if stat.S_ISREG(status.st_mode):
            held = os.open(real, os.O_RDONLY | os.O_CLOEXEC)
            self._note(real, lambda: _put(real, held, status.st_mode), held)
        elif stat.S_ISDIR(status.st_mode):
            self._note(real, lambda: os.mkdir(real))

    def synced_directory(self, real: str) -> None:
        for undoing in [undoing for undoing in self._names if undoing.directory == real]:
            self._names.remove(undoing)
            undoing.forget()

    def lose_power(self, seed: int) -> None:
        chance = random.Random(seed)
        for held, data in self._bytes.values():
            now = os.pread(held, os.fstat(held).st_size, 0)
            zeros = b"\0" * len(now)
            torn = now[: chance.randrange(len(now) + 1)]
            left = data if seed == 0 else chance.choice([data, zeros, torn, now])
            os.ftruncate(held, 0)
            os.pwrite(held, left, 0)
            os.close(held)
        for undoing in reversed(self._names):
            if seed == 0 or chance.random() < 0.5:
                with suppress(OSError):
                    undoing.undo()
            undoing.forget()
        self._bytes.clear()
        self._names.clear()

    def _note(self, real: str, undo: Callable[[], None], held: int = -1) -> None:
        self._names.append(Undoing(os.path.dirname(real), undo, held))


def _remove(real: str) -> None:
    if os.path.isdir(real) and not os.path.islink(real):
        shutil.rmtree(real)
    else:
        os.unlink(real)


def _put(real: str, held: int, mode: int) -> None:
    """The file back under its name, with what the disk has of its bytes by now."""
    with suppress(OSError):
        os.unlink(real)
    with open(real, "xb") as file:
        file.write(os.pread(held, os.fstat(held).st_size, 0))
        os.fchmod(file.fileno(), stat.S_IMODE(mode))
