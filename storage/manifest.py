"""The manifest: every file, folder and link of a version, and where each file's bytes lie.

A manifest file is a JSON array, an entry a line in the order of the paths, so that the same tree
has the same bytes, a person can read it, and one entry is found without parsing the others:

    [{"full": ..., "depth": ..., "entries": ..., "stores": [...], "left_out": [...]},
    ["d", path, mode, mtime],                     a folder
    ["f", path, mode, mtime, [[store, offset, length, sha256], ...]],
    ["l", path, target, mtime],                   a symbolic link
    ["-", path]]                                  not there any more (only in differences)

It is *full*, or holds the differences to the full one that its head names. `store` counts in
`stores`; -1 is a hole. It is read through the reference that vouches for it (length and SHA-256),
and even then a path in it that leads out of its directory is `Damaged`.

Paths and link targets may hold any bytes: what isn't UTF-8 travels as lone surrogates.
"""

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from storage import sealed
from storage.log import Reference

FORMAT = 2
PERMISSIONS = 0o777
HOLE = ""
# Up to this length files share one stored file: creating one costs more than writing it.
SMALL = 64 << 10
_HASH = re.compile(r"[0-9a-f]{64}")


class Extent(NamedTuple):
    """A piece of a file: `length` bytes at `offset` of `stored`, relative to the job directory.

    A hole is stored nowhere.
    """

    stored: str
    offset: int
    length: int
    sha256: str


class File(NamedTuple):
    """A regular file: its pieces in their order, none of them empty."""

    path: str
    mode: int
    mtime_ns: int
    extents: tuple[Extent, ...]

    @property
    def length(self) -> int:
        return sum(extent.length for extent in self.extents)


class Folder(NamedTuple):
    path: str
    mode: int
    mtime_ns: int


class Symlink(NamedTuple):
    """A symbolic link, wherever it points: kept as it is, never followed."""

    path: str
    target: str
    mtime_ns: int


class LeftOut(NamedTuple):
    """What the run's tree held and a version can't: a device, a FIFO, a socket, a set-uid bit."""

    path: str
    what: str


Entry = File | Folder | Symlink
Differences = dict[str, Entry | None]
"""By path; None: not there any more."""


@dataclass(frozen=True)
class Manifest:
    """A whole version, in memory."""

    files: tuple[File, ...] = ()
    folders: tuple[Folder, ...] = ()
    symlinks: tuple[Symlink, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @classmethod
    def of(cls, entries: Iterable[Entry], left_out: tuple[LeftOut, ...] = ()) -> "Manifest":
        kinds: dict[type, list[Any]] = {File: [], Folder: [], Symlink: []}
        for entry in entries:
            kinds[type(entry)].append(entry)
        files, folders, symlinks = (tuple(sorted(kinds[k])) for k in (File, Folder, Symlink))
        return cls(files, folders, symlinks, left_out)


@dataclass(frozen=True)
class Head:
    """What stands above the entries of one manifest file."""

    full: Reference | None
    """The full manifest that the entries are differences to; None: these are all."""
    depth: int
    """How many versions ago the full one was written."""
    entries: int
    """How many entries the full one has."""
    left_out: tuple[LeftOut, ...]


def encode(head: Head, entries: Mapping[str, Entry | None]) -> bytes:
    """The file's bytes."""
    stores: dict[str, int] = {HOLE: -1}
    lines = [_line(path, entries[path], stores) for path in sorted(entries, key=_plain)]
    top = {
        "full": head.full and head.full.__dict__,
        "depth": head.depth,
        "entries": head.entries,
        "stores": [store for store in stores if store],
        "left_out": [[_plain(path), what] for path, what in head.left_out],
    }
    payload = "[" + ",\n".join([sealed.to_json(top), *lines]) + "]\n"
    return sealed.seal_bytes("manifest", FORMAT, payload.encode("ascii"))


def decode(data: bytes, source: Path) -> tuple[Head, Differences]:
    """What was encoded, each entry checked by itself; not yet whether its parent is a folder."""
    try:
        top, *lines = sealed.unseal(data, "manifest", FORMAT, source)
        head, stores = _head(top, source)
        entries: Differences = {}
        for line in lines:
            path, entry = _entry(line, stores, source)
            if path in entries:
                sealed.damaged(source, f"the path {path!r} is there twice")
            entries[path] = entry
    except (TypeError, KeyError, ValueError, AttributeError, IndexError, UnicodeError) as error:
        sealed.damaged(source, f"the manifest's fields aren't those of a manifest ({error})")
    return head, entries


def look_up(data: bytes, wanted: str, source: Path) -> Entry | None:
    """One entry of a checked full manifest, by bisection: the others aren't parsed."""
    start = data.index(b"\n") + 1
    first = data.find(b"\n", start) + 1
    _, stores = _head(sealed.from_json(data[start + 1 : first].rstrip(b",\n]"), source), source)
    low, high = first, len(data)
    while low < high:
        middle = max(data.rfind(b"\n", low, (low + high) // 2) + 1, low)
        end = data.find(b"\n", middle)
        line = sealed.from_json(_one_line(data[middle:end]), source)
        path = _native(line[1])
        if path == wanted:
            return _entry(line, stores, source)[1]
        if _plain(path) < _plain(wanted):
            low = end + 1
        else:
            high = middle
    return None


def check_parents(entries: Mapping[str, Entry | None], among: Any, source: Path) -> None:
    """Each entry's parent is a folder, by `among(path)`: then no path leads through a link."""
    known: set[str] = set()
    for path, entry in entries.items():
        parent = path.rpartition("/")[0]
        if entry is None or not parent or parent in known:
            continue
        if not isinstance(among(parent), Folder):
            sealed.damaged(source, f"the path {path!r} leaves the directory")
        known.add(parent)


def check_stored(stored: str, source: Path) -> str:
    parts = stored.split("/")
    if parts[0] != "runs" or any(part in ("", ".", "..") or "\0" in part for part in parts):
        sealed.damaged(source, f"the stored file {stored!r} lies outside the runs of this key")
    return stored


def _one_line(line: bytes) -> bytes:
    return line[:-1] if line.endswith((b",", b"]]")) else line


def _line(path: str, entry: Entry | None, stores: dict[str, int]) -> str:
    if entry is None:
        return sealed.to_json(["-", _plain(path)])
    if isinstance(entry, Folder):
        return sealed.to_json(["d", _plain(path), entry.mode, entry.mtime_ns])
    if isinstance(entry, Symlink):
        return sealed.to_json(["l", _plain(path), _plain(entry.target), entry.mtime_ns])
    pieces = [
        [stores.setdefault(stored, len(stores) - 1), offset, length, sha256]
        for stored, offset, length, sha256 in entry.extents
    ]
    return sealed.to_json(["f", _plain(path), entry.mode, entry.mtime_ns, pieces])


def _head(top: Any, source: Path) -> tuple[Head, list[str]]:
    full = Reference(**top["full"]) if top["full"] else None
    if full is not None:
        check_stored(full.path, source)
    stores = [check_stored(store, source) for store in top["stores"]]
    left_out = tuple(LeftOut(_native(path), what) for path, what in top["left_out"])
    return Head(full, int(top["depth"]), int(top["entries"]), left_out), [*stores, HOLE]


def _entry(line: list[Any], stores: list[str], source: Path) -> tuple[str, Entry | None]:
    kind, path = line[0], _native(line[1])
    name = path.rpartition("/")[2]
    if name in ("", ".", "..") or "\0" in path or path[0] == "/" or "//" in path:
        sealed.damaged(source, f"the path {path!r} leaves the directory")
    if kind == "-":
        return path, None
    if kind == "l":
        _, _, target, mtime_ns = line
        link = Symlink(path, _native(target), mtime_ns)
        if type(mtime_ns) is not int or not target or "\0" in link.target:
            sealed.damaged(source, f"a field of {path!r} has the wrong type")
        return path, link
    mode, mtime_ns = line[2], line[3]
    if type(mode) is not int or type(mtime_ns) is not int:
        sealed.damaged(source, f"a field of {path!r} has the wrong type")
    if mode & ~PERMISSIONS:
        sealed.damaged(source, f"the mode of {path!r} has more than permissions")
    if kind == "d" and len(line) == 4:
        return path, Folder(path, mode, mtime_ns)
    if kind != "f" or len(line) != 5:
        raise ValueError(f"{path!r} is of no known kind")
    pieces = []
    for store, offset, length, sha256 in line[4]:
        hole = store == -1 and not sha256
        if type(store) is not int or not -1 <= store < len(stores) - 1:
            sealed.damaged(source, f"a piece of {path!r} is stored nowhere")
        if type(offset) is not int or type(length) is not int or offset < 0 or length <= 0:
            sealed.damaged(source, f"length or checksum of {path!r} can't be right")
        if not hole and not _HASH.fullmatch(sha256):
            sealed.damaged(source, f"length or checksum of {path!r} can't be right")
        pieces.append(Extent(stores[store], offset, length, sha256))
    return path, File(path, mode, mtime_ns, tuple(pieces))


def _through_bytes(text: str) -> str:
    return os.fsencode(text).decode("utf-8", "surrogateescape")


def _from_bytes(text: str) -> str:
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def _same(text: str) -> str:
    return text


# Where names on disk are UTF-8 nothing needs to be translated.
_UTF8 = sys.getfilesystemencoding() == "utf-8"
_plain = _same if _UTF8 else _through_bytes
_native = _same if _UTF8 else _from_bytes
