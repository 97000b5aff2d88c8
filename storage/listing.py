"""The files of one version, read from one manifest file or two.

A version is a full manifest and the differences to it, which are cumulative: opening a version
reads its record, its differences and its full manifest, however many versions there are. A commit
writes the differences only, and a full one every 64 versions, or when the differences have become
half of it. Whoever wants to know what changed between two versions of one full manifest reads
their differences, and not the full one.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from errors import Damaged
from storage import durable, manifest, sealed
from storage.log import Reference
from storage.manifest import Differences, Entry, Folder, Head, LeftOut, Manifest

A_FULL_ONE_EVERY = 64
# From so many single look-ups on, reading every entry is cheaper.
MANY_LOOKUPS = 200

EMPTY = Head(None, 0, 0, ())


class Missing(Damaged):
    """A stored file isn't there: collected, or lost."""


@dataclass
class Listing:
    """What a version holds. Reads the full manifest only when asked for what needs it."""

    directory: Path
    reference: Reference | None = None
    """The manifest file that a record names; None: the empty version before any."""
    head: Head = EMPTY
    changed: Differences = field(default_factory=dict)
    """What differs from the full manifest; all entries, if this is the full one itself."""
    _looked_up: dict[str, Entry | None] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path, reference: Reference | None) -> "Listing":
        """`Damaged` if the file isn't what the reference vouches for."""
        if reference is None:
            return cls(directory)
        head, entries = manifest.decode(_verified(directory, reference), directory / reference.path)
        listing = cls(directory, reference, head, entries)
        if head.full is None:
            manifest.check_parents(entries, entries.get, listing.path)
            if None in entries.values():
                sealed.damaged(listing.path, "a full manifest holds a difference")
        return listing

    @property
    def path(self) -> Path:
        return self.directory / (self.reference.path if self.reference else "")

    @property
    def full(self) -> Reference | None:
        """Names the full manifest; two listings with the same one are easily compared."""
        return self.head.full or self.reference

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        return self.head.left_out

    def get(self, path: str) -> Entry | None:
        """One entry, or None."""
        if "entries" in self.__dict__:
            return self.entries.get(path)
        if path in self.changed:
            return self.changed[path]
        if self.head.full is None:
            return None
        if "_full_entries" not in self.__dict__ and len(self._looked_up) < MANY_LOOKUPS:
            if path not in self._looked_up:
                source = self.directory / self.head.full.path
                self._looked_up[path] = manifest.look_up(self._full_bytes, path, source)
            return self._looked_up[path]
        return self._full_entries.get(path)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every entry, parents before what is in them."""
        merged: Mapping[str, Entry | None] = {**self._full_entries, **self.changed}
        whole = {path: entry for path in sorted(merged) if (entry := merged[path]) is not None}
        if self.head.full is not None:
            manifest.check_parents(whole, whole.get, self.path)
        return whole

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.of(self.entries.values(), self.left_out)

    def since(self, older: "Listing") -> Differences:
        """What must be done to the older one's files to have these."""
        if self.reference == older.reference:
            return {}
        if self.full == older.full:
            here = self.changed if self.head.full else {}
            there = older.changed if older.head.full else {}
            paths = {p for p in here.keys() | there.keys() if here.get(p, 0) != there.get(p, 0)}
        else:
            paths = set(self.entries.keys() | older.entries.keys())
        found = {
            path: self.get(path) for path in sorted(paths) if self.get(path) != older.get(path)
        }
        manifest.check_parents(found, self.get, self.path)
        return found

    def after(
        self, changes: Differences, left_out: tuple[LeftOut, ...]
    ) -> tuple[Head, Differences]:
        """The manifest file of the version that these changes make of this one."""
        differences = {**self.changed, **changes} if self.head.full else dict(changes)
        count, depth = self._count, self.head.depth + 1
        if self.full is None or depth >= A_FULL_ONE_EVERY or len(differences) * 2 > count:
            merged: Differences = {**self.entries, **changes}
            whole = {path: entry for path, entry in merged.items() if entry is not None}
            return Head(None, 0, len(whole), left_out), dict(whole)
        return Head(self.full, depth, count, left_out), differences

    def share_full(self, known: dict[Reference, dict[str, Entry]]) -> None:
        """Read the full manifest once for many versions; `known` remembers it."""
        if self.head.full is not None:
            if self.head.full not in known:
                known[self.head.full] = self._full_entries
            self.__dict__["_full_entries"] = known[self.head.full]

    def stored_files(self) -> set[str]:
        """Every file on the shared file system that this version needs."""
        names = {ref.path for ref in (self.reference, self.head.full) if ref is not None}
        for entry in self.entries.values():
            if isinstance(entry, manifest.File):
                names.update(extent.stored for extent in entry.extents)
        return names - {manifest.HOLE}

    @property
    def _count(self) -> int:
        return self.head.entries

    @cached_property
    def _full_bytes(self) -> bytes:
        assert self.head.full is not None
        return _verified(self.directory, self.head.full)

    @cached_property
    def _full_entries(self) -> dict[str, Entry]:
        if self.head.full is None:
            return {path: entry for path, entry in self.changed.items() if entry is not None}
        return Listing.read_full(self.directory, self.head.full, self._full_bytes)

    @staticmethod
    def read_full(directory: Path, reference: Reference, data: bytes) -> dict[str, Entry]:
        source = directory / reference.path
        head, entries = manifest.decode(data, source)
        if head.full is not None:
            sealed.damaged(source, "it is named as a full manifest and holds differences")
        manifest.check_parents(entries, entries.get, source)
        return {path: entry for path, entry in entries.items() if entry is not None}


def write(
    directory: Path, name: str, head: Head, entries: Differences, *, named: bool = True
) -> Listing:
    """Store a manifest durably as `directory/name`. `named`: as for `durable.create`."""
    data = manifest.encode(head, entries)
    durable.create(directory / name, data, named=named)
    reference = Reference(name, len(data), hashlib.sha256(data).hexdigest())
    return Listing(directory, reference, head, entries)


def is_folder(entry: Entry | None) -> bool:
    return isinstance(entry, Folder)


def _verified(directory: Path, reference: Reference) -> bytes:
    manifest.check_stored(reference.path, directory)
    path = directory / reference.path
    data = durable.read(path)
    if data is None:
        raise Missing(f"{path}: the manifest is missing")
    if len(data) != reference.length or hashlib.sha256(data).hexdigest() != reference.sha256:
        sealed.damaged(path, "the manifest isn't the one that its record names")
    return data
