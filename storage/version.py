"""One version of a job directory, to be read from anywhere: listed, opened, copied, compared."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from errors import Refused
from storage import durable, fetch
from storage.listing import Listing
from storage.log import Record
from storage.manifest import HOLE, Differences, Entry, Extent, File, Folder, Manifest, Symlink

if TYPE_CHECKING:
    from storage.directory import Directory


@dataclass(frozen=True)
class Version:
    """The files of one key as one record left them. Number 0 is the empty one before any.

    What reads files raises `SnapshotExpired` if garbage collection has taken them, and `Damaged`
    if they aren't what was committed.
    """

    of: Directory
    record: Record | None

    @property
    def n(self) -> int:
        return self.record.n if self.record else 0

    @property
    def directory(self) -> Path:
        return self.of.path

    @cached_property
    def listing(self) -> Listing:
        """Read when first asked for. `Damaged` if it isn't what the record vouches for."""
        with self.of.explaining(self.n):
            return Listing.read(self.of.path, self.record.manifest if self.record else None)

    @property
    def manifest(self) -> Manifest:
        """Everything in it."""
        with self.of.explaining(self.n):
            return self.listing.manifest

    @property
    def entries(self) -> dict[str, Entry]:
        """Files, folders and links by path, parents first."""
        with self.of.explaining(self.n):
            return self.listing.entries

    def pieces(self, path: str) -> Iterator[bytes]:
        """A file's content, verified piece by piece: for files of any size."""
        with self.of.explaining(self.n):
            entry = self.listing.get(path)
            if not isinstance(entry, File):
                raise Refused(f"version {self.n} of {self.of.key} has no file {path!r}")
            yield from fetch.read_file(self.of.path, entry)

    def read(self, path: str) -> bytes:
        """A file's whole content."""
        return b"".join(self.pieces(path))

    def open(self, path: str) -> BinaryIO:
        """A file to be read like any other, with `seek`; a piece is fetched when it is wanted."""
        with self.of.explaining(self.n):
            entry = self.listing.get(path)
        if not isinstance(entry, File):
            raise Refused(f"version {self.n} of {self.of.key} has no file {path!r}")
        return io.BufferedReader(_Reading(self, entry))

    def differs_from(self, older: Version) -> Differences:
        """What has to be done to the older one's files to have these: None is to be removed."""
        with older.of.explaining(older.n):
            _ = older.listing.entries
        with self.of.explaining(self.n):
            return self.listing.since(older.listing)

    def copy_to(self, folder: Path) -> None:
        """The whole version as a new folder, anywhere. It must not exist."""
        with durable.reporting(folder), self.of.explaining(self.n):
            try:
                folder.mkdir()
            except FileExistsError:
                raise Refused(f"{folder} exists; a version is copied to a new folder") from None
            entries = self.listing.entries.values()
            folders = [entry for entry in entries if isinstance(entry, Folder)]
            for entry in folders:
                (folder / entry.path).mkdir(0o700)
            files = [entry for entry in entries if isinstance(entry, File)]
            fetch.bring(self.of.path, files, folder, lambda path: False)
            for link in entries:
                if isinstance(link, Symlink):
                    os.symlink(link.target, folder / link.path)
                    times = (link.mtime_ns, link.mtime_ns)
                    os.utime(folder / link.path, ns=times, follow_symlinks=False)
            for entry in reversed(folders):  # a child's arrival sets the mtime
                os.chmod(folder / entry.path, entry.mode)
                os.utime(folder / entry.path, ns=(entry.mtime_ns, entry.mtime_ns))


class _Reading(io.RawIOBase):
    """A stored file as a stream. It holds one piece in memory."""

    def __init__(self, version: Version, file: File):
        self._version, self._file = version, file
        self._stored = fetch.Stored(version.of.path)
        self._position = 0
        self._held: tuple[Extent, bytes] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.length}
        if start[whence] + offset < 0:
            raise ValueError("before the start of the file")
        self._position = start[whence] + offset
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        begin = 0
        for extent in self._file.extents:
            if begin <= self._position < begin + extent.length:
                at = self._position - begin
                size = min(len(view), extent.length - at)
                view[:size] = self._piece(extent)[at : at + size] if extent.stored else bytes(size)
                self._position += size
                return size
            begin += extent.length
        return 0

    def close(self) -> None:
        self._stored.close()
        super().close()

    def _piece(self, extent: Extent) -> bytes:
        assert extent.stored != HOLE
        if self._held is None or self._held[0] != extent:
            with self._version.of.explaining(self._version.n):
                data = self._stored.read(extent, self._file.path, 0)
            self._held = (extent, data)
        return self._held[1]
