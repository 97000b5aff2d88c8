"""The note beside a work tree of what it holds: so that it can be believed, or not at all.

    <slot>/index    a line of JSON, then the tables, with a checksum: the whole
                    a line for each later state: a checksum, and what differs from the one before

The invariant: *a file whose identity is the one in the index has the content that the index's
manifest gives it.* It holds at every moment, also while a run is at work and when it is killed,
because whoever changes a file changes its identity. So the index is written when it is known to be
true (after a checkout, after a commit) and never needs to be taken back: a tree is looked through
before it is used again, and what isn't as the index says is made anew.

For the same reason each state that was ever noted stays true: of a line that a kill cut short, or
that is damaged, and of what stands behind it, nothing is believed, and what stands before it is
right. The next line is written in its place.

A crash of the machine is another matter, since it may keep a file's attributes and lose its bytes:
an index of another boot isn't believed, and no fsync is needed here.
"""

import json
import marshal
import os
import zlib
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.log import Reference
from storage.treefiles import Files

FORMAT = 2
_MARSHAL = 4  # known to every Python
# So much of the whole's length may the lines behind it take, and so many folders be in another
# order, before it is written anew.
_LINES = 1 / 8


@dataclass
class Index:
    """What a tree holds: the listing of this reference, as it looks on this disk."""

    reference: Reference | None = None
    files: Files = field(default_factory=Files)
    folders: dict[str, tuple[int, int]] = field(default_factory=dict)
    symlinks: dict[str, tuple[str, int]] = field(default_factory=dict)
    _whole: int = 0
    """How long the whole is in the file that this was read from or saved to; 0: in none."""
    _end: int = 0
    """Where the last line ends there."""

    def save(self, path: Path) -> None:
        """Replace the index. A kill leaves the old one or the new one, and both are true."""
        self._whole = self._end = 0
        body = marshal.dumps((self.files.folders, self.folders, self.symlinks), _MARSHAL)
        head = {
            "format": FORMAT,
            "boot": boot_id(),
            "reference": self.reference and self.reference.__dict__,
            "length": len(body),
            "checksum": zlib.crc32(body),
        }
        line = json.dumps(head).encode("ascii") + b"\n"
        new = path.with_name(f"{path.name}.new")
        with open(new, "wb") as file:
            file.write(line)
            file.write(body)
        os.replace(new, path)
        self._whole = self._end = len(line) + len(body)

    def save_after(self, before: "Index", differing: Collection[str], path: Path) -> None:
        """As `save`, where `before` is what the file holds, and differs from this in nothing but
        these paths: costs by their number.

        After a checkout into a new tree the order of names is that of the manifest, and no folder
        equals what the kernel tells. So that this is found out once, and not by each run, an index
        with many such folders is written anew when the kernel's order is known.
        """
        room = before._whole * (1 + _LINES) - before._end
        then, now = before.files.folders, self.files.folders
        apart = sum(then.get(folder) != files for folder, files in now.items())
        if len(differing) * 100 < room and apart < len(now) * _LINES:
            files = {path: self.files.get(path) for path in differing}
            tables = [{p: t.get(p) for p in differing} for t in (self.folders, self.symlinks)]
            reference = self.reference and self.reference.__dict__
            text = json.dumps([reference, files, *tables]).encode("ascii")
            line = b"%08x %s\n" % (zlib.crc32(text), text)
            if len(line) < room:
                with open(path, "r+b") as file:
                    file.truncate(before._end)
                    file.seek(before._end)
                    file.write(line)
                self._whole, self._end = before._whole, before._end + len(line)
                return
        self.save(path)

    @classmethod
    def load(cls, path: Path) -> "Index | None":
        """None if there is none to be believed."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            line, _, rest = path.read_bytes().partition(b"\n")
            head = json.loads(line)
            if (head["format"], head["boot"]) != (FORMAT, boot_id()):
                return None
            body = memoryview(rest)[: head["length"]]
            if head["checksum"] != zlib.crc32(body):
                return None
            files, folders, symlinks = marshal.loads(body)
            index = cls(_reference(head["reference"]), Files(files), folders, symlinks)
            index._whole = index._end = len(line) + 1 + len(body)
            for line in rest[len(body) :].splitlines(keepends=True):
                if not index._goes_on(line):
                    break
            return index
        return None

    def _goes_on(self, line: bytes) -> bool:
        """Bring this to the state that the line notes; False if the line isn't whole."""
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text[:-1]):  # without the end of the line
            return False
        reference, files, folders, symlinks = json.loads(text)
        self.reference = _reference(reference)
        self.files = self.files.changed({p: what and tuple(what) for p, what in files.items()})
        for mine, differing in ((self.folders, folders), (self.symlinks, symlinks)):
            for path, what in differing.items():
                mine.pop(path, None)
                if what is not None:
                    mine[path] = tuple(what)
        self._end += len(line)
        return True


def _reference(fields: dict[str, Any] | None) -> Reference | None:
    return None if fields is None else Reference(**fields)


def boot_id() -> str:
    """Another one after each start of the machine."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "unknown"
