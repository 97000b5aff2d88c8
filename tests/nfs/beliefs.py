"""What an NFS client believes without asking the server: names, attributes, listings.

As measured on the kernel's NFSv4.1 client: a name that was once missing stays missing, and a name
that was once found stays the same file, for the cache time or until the directory is opened. Link,
mkdir and exclusive create go to the server whatever is believed here.
"""

from __future__ import annotations

import os
import stat
import time
from collections import OrderedDict
from dataclasses import dataclass

MOST_HELD = 4000

Inode = tuple[int, int]


def inode_of(status: os.stat_result) -> Inode:
    return status.st_dev, status.st_ino


@dataclass
class Name:
    """A name as last seen: which file it was, or that it was missing."""

    until: float
    inode: Inode | None
    held: int = -1
    """An O_PATH descriptor of a plain file: the file may lose this name and live on."""


class Beliefs:
    def __init__(self) -> None:
        self._names: OrderedDict[str, Name] = OrderedDict()
        self._in_directory: dict[str, set[str]] = {}
        self._attributes: dict[Inode, tuple[float, os.stat_result]] = {}
        self._listings: dict[str, tuple[float, list[str]]] = {}

    def is_missing(self, path: str) -> bool:
        """Whether the name is believed to be missing, itself or with a directory above it."""
        name = self._valid(path)
        return name is not None and name.inode is None

    def attributes(self, path: str) -> os.stat_result | None:
        name = self._valid(path)
        if name is None or name.inode is None:
            return None
        until, status = self._attributes.get(name.inode, (0.0, None))
        return status if time.monotonic() < until else None

    def older_file(self, path: str, now_there: Inode | None) -> int | None:
        """The descriptor of the file believed to have this name, if it is another and it lives."""
        name = self._valid(path)
        if name is None or name.held < 0 or name.inode == now_there:
            return None
        return name.held if os.fstat(name.held).st_nlink > 0 else None

    def listing(self, path: str) -> list[str] | None:
        until, names = self._listings.get(path, (0.0, None))
        return names if time.monotonic() < until else None

    def learn(self, path: str, real: str, status: os.stat_result, seconds: float) -> None:
        self.forget_name(path)
        if seconds <= 0:
            return
        until = time.monotonic() + seconds
        held = -1
        if stat.S_ISREG(status.st_mode):
            held = os.open(real, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._remember(path, Name(until, inode_of(status), held))
        self._attributes[inode_of(status)] = until, status

    def learn_missing(self, path: str, seconds: float) -> None:
        self.forget_name(path)
        if seconds > 0:
            self._remember(path, Name(time.monotonic() + seconds, None))

    def learn_listing(self, path: str, names: list[str], seconds: float) -> None:
        self._listings[path] = time.monotonic() + seconds, names

    def forget_name(self, path: str) -> None:
        name = self._names.pop(path, None)
        if name is not None:
            self._in_directory.get(os.path.dirname(path), set()).discard(path)
            if name.held >= 0:
                os.close(name.held)

    def forget_attributes(self, inode: Inode) -> None:
        self._attributes.pop(inode, None)

    def forget_listing(self, directory: str) -> None:
        self._listings.pop(directory, None)

    def forget_names_in(self, directory: str) -> None:
        """What opening a directory does: its names are looked up again."""
        for path in list(self._in_directory.get(directory, ())):
            self.forget_name(path)

    def forget_below(self, path: str) -> None:
        for known in [p for p in self._names if p == path or p.startswith(path + "/")]:
            self.forget_name(known)
        for known in [p for p in self._listings if p == path or p.startswith(path + "/")]:
            self.forget_listing(known)

    def forget_all(self) -> None:
        for path in list(self._names):
            self.forget_name(path)
        self._attributes.clear()
        self._listings.clear()

    def _remember(self, path: str, name: Name) -> None:
        self._names[path] = name
        self._in_directory.setdefault(os.path.dirname(path), set()).add(path)
        while len(self._names) > MOST_HELD:
            self.forget_name(next(iter(self._names)))

    def _valid(self, path: str) -> Name | None:
        name = self._names.get(path)
        if name is not None and time.monotonic() >= name.until:
            self.forget_name(path)
            return None
        return name
