"""The note beside a work tree of what it holds: so that it can be believed, or not at all.

    <slot>/index    a line of JSON, then the tables, with a checksum

The invariant: *a file whose identity is the one in the index has the content that the index's
manifest gives it.* It holds at every moment, also while a run is at work and when it is killed,
because whoever changes a file changes its identity. So the index is written when it is known to be
true (after a checkout, after a commit) and never needs to be taken back: a tree is looked through
before it is used again, and what isn't as the index says is made anew.

A crash of the machine is another matter, since it may keep a file's attributes and lose its bytes:
an index of another boot isn't believed, and no fsync is needed here.
"""

import json
import os
import zlib
from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from storage.log import Reference
from storage.scan import Identity

FORMAT = 1
_COLUMNS = 5  # of an Identity


@dataclass
class Index:
    """What a tree holds: the listing of this reference, as it looks on this disk."""

    reference: Reference | None = None
    files: dict[str, Identity] = field(default_factory=dict)
    folders: dict[str, tuple[int, int]] = field(default_factory=dict)
    symlinks: dict[str, tuple[str, int]] = field(default_factory=dict)

    def newest(self) -> int:
        """The newest ctime in it."""
        return max((identity[3] for identity in self.files.values()), default=0)

    def save(self, path: Path) -> None:
        """Replace the index. A kill leaves the old one or the new one, and both are true."""
        try:
            numbers = array("q", chain.from_iterable(self.files.values()))
        except OverflowError:  # an inode's number of 64 bits: nothing is noted, all is made anew
            path.unlink(missing_ok=True)
            return
        names = "\0".join(self.files).encode("utf-8", "surrogateescape")
        tables = json.dumps([self.folders, self.symlinks]).encode("ascii")
        body = numbers.tobytes() + names + b"\n" + tables
        head = {
            "format": FORMAT,
            "boot": boot_id(),
            "reference": self.reference and self.reference.__dict__,
            "files": len(self.files),
            "names": len(names),
            "checksum": zlib.crc32(body),
        }
        new = path.with_name(f"{path.name}.new")
        with open(new, "wb") as file:
            file.write(json.dumps(head).encode("ascii") + b"\n")
            file.write(body)
        os.replace(new, path)

    @classmethod
    def load(cls, path: Path) -> "Index | None":
        """None if there is none to be believed."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            line, _, body = path.read_bytes().partition(b"\n")
            head = json.loads(line)
            if (head["format"], head["boot"]) != (FORMAT, boot_id()):
                return None
            if head["checksum"] != zlib.crc32(body):
                return None
            return cls._decoded(head, body)
        return None

    @classmethod
    def _decoded(cls, head: dict[str, object], body: bytes) -> "Index":
        count, named = head["files"], head["names"]
        assert isinstance(count, int) and isinstance(named, int)
        start = count * _COLUMNS * 8
        numbers = iter(array("q", body[:start]))
        names = body[start : start + named].decode("utf-8", "surrogateescape").split("\0")
        folders, symlinks = json.loads(body[start + named + 1 :])
        reference = head["reference"]
        return cls(
            Reference(**reference) if isinstance(reference, dict) else None,
            dict(zip(names, zip(*[numbers] * _COLUMNS, strict=True), strict=True)) if count else {},
            {name: (mode, mtime) for name, (mode, mtime) in folders.items()},
            {name: (target, mtime) for name, (target, mtime) in symlinks.items()},
        )


def boot_id() -> str:
    """Another one after each start of the machine."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "unknown"
