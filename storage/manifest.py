"""The manifest of a version: every file, folder and link in it, and where each file's bytes lie.

One JSON object a line, in the order of the paths, so the same tree has the same bytes and a
person can read it. A manifest is read through the reference that vouches for it (length and
SHA-256), and even then a path in it that leads out of its directory is `Damaged`.

Paths and link targets may hold any bytes: what isn't UTF-8 travels as lone surrogates.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from storage import durable, sealed
from storage.log import Reference

FORMAT = 1
PERMISSIONS = 0o777
_HASH = re.compile(r"[0-9a-f]{64}")
E = TypeVar("E")


@dataclass(frozen=True)
class File:
    """A regular file. `stored` is where its bytes lie, relative to the job directory."""

    path: str
    stored: str
    length: int
    sha256: str
    mode: int
    mtime_ns: int


@dataclass(frozen=True)
class Folder:
    path: str
    mode: int
    mtime_ns: int


@dataclass(frozen=True)
class Symlink:
    """A symbolic link, wherever it points: kept as it is, never followed."""

    path: str
    target: str


@dataclass(frozen=True)
class LeftOut:
    """What the run's tree held and a version can't: a device, a FIFO, a socket, a set-uid bit."""

    path: str
    what: str


@dataclass(frozen=True)
class Manifest:
    files: tuple[File, ...] = ()
    folders: tuple[Folder, ...] = ()
    symlinks: tuple[Symlink, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    def encode(self) -> bytes:
        body = {kind: _plain(getattr(self, kind)) for kind in _KINDS}
        return sealed.seal("manifest", FORMAT, body)

    @classmethod
    def decode(cls, data: bytes, path: Path) -> "Manifest":
        body = sealed.unseal(data, "manifest", FORMAT, path)
        try:
            manifest = cls(**{kind: _entries(shape, body[kind]) for kind, shape in _KINDS.items()})
            _check(manifest, path)
        except (TypeError, KeyError, AttributeError, UnicodeError) as error:
            sealed.damaged(path, f"the manifest's fields aren't those of a manifest ({error})")
        return manifest


_KINDS: dict[str, type] = {
    "files": File,
    "folders": Folder,
    "symlinks": Symlink,
    "left_out": LeftOut,
}


def write(root: Path, name: str, manifest: Manifest) -> Reference:
    """Store a manifest durably as `root/name`; what vouches for it."""
    data = manifest.encode()
    durable.create(root / name, data)
    return Reference(name, len(data), hashlib.sha256(data).hexdigest())


def read(root: Path, reference: Reference | None) -> Manifest:
    """The manifest that a record refers to; the empty one if it refers to none."""
    if reference is None:
        return Manifest()
    _check_stored(reference.path, root)
    path = root / reference.path
    data = durable.read(path)
    if data is None:
        sealed.damaged(path, "the manifest is missing")
    if len(data) != reference.length or hashlib.sha256(data).hexdigest() != reference.sha256:
        sealed.damaged(path, "the manifest isn't the one that its record names")
    return Manifest.decode(data, path)


def _plain(entries: Iterable[Any]) -> list[dict[str, Any]]:
    plain = [asdict(entry) for entry in entries]
    for entry in plain:
        for name in ("path", "target"):
            if name in entry:
                entry[name] = os.fsencode(entry[name]).decode("utf-8", "surrogateescape")
    return sorted(plain, key=lambda entry: str(entry["path"]))


def _entries(shape: type[E], entries: list[dict[str, Any]]) -> tuple[E, ...]:
    for entry in entries:
        for name in ("path", "target"):
            if name in entry:
                entry[name] = os.fsdecode(entry[name].encode("utf-8", "surrogateescape"))
    # In order of the paths a folder comes before what is in it, which a checkout relies on.
    return tuple(shape(**entry) for entry in sorted(entries, key=lambda entry: str(entry["path"])))


def _check(manifest: Manifest, source: Path) -> None:
    """Everything that a checkout relies on, before it touches the disk."""
    folders = {folder.path for folder in manifest.folders}
    taken: set[str] = set()
    entries: tuple[Folder | File | Symlink, ...] = (
        *manifest.folders,
        *manifest.files,
        *manifest.symlinks,
    )
    for entry in entries:
        for field in fields(entry):
            if not isinstance(getattr(entry, field.name), cast(type, field.type)):
                sealed.damaged(source, f"{field.name} of {entry.path!r} has the wrong type")
        parent, _, name = entry.path.rpartition("/")
        # With its parent a folder of this manifest, no path can lead through a link or go up.
        if name in ("", ".", "..") or "\0" in name or (parent and parent not in folders):
            sealed.damaged(source, f"the path {entry.path!r} leaves the directory")
        if entry.path.startswith("/"):
            sealed.damaged(source, f"the path {entry.path!r} leaves the directory")
        if entry.path in taken:
            sealed.damaged(source, f"the path {entry.path!r} is there twice")
        taken.add(entry.path)
        if isinstance(entry, (File, Folder)) and entry.mode & ~PERMISSIONS:
            sealed.damaged(source, f"the mode of {entry.path!r} has more than permissions")
        if isinstance(entry, File):
            _check_stored(entry.stored, source)
            if entry.length < 0 or not _HASH.fullmatch(entry.sha256):
                sealed.damaged(source, f"length or checksum of {entry.path!r} can't be right")


def _check_stored(stored: str, source: Path) -> None:
    parts = stored.split("/")
    if parts[0] != "runs" or any(part in ("", ".", "..") or "\0" in part for part in parts):
        sealed.damaged(source, f"the stored file {stored!r} lies outside the runs of this key")
