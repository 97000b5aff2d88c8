"""Storing what a run touched: the bytes that the last version doesn't have, and only those.

    <attempt's folder>/data-<base>-<number>     many small files, or what is new of a large one

A large file is a list of pieces. Those pieces of its last version that still stand at their place
in it (by hash: the local file is read, the shared one isn't) are named again; what was appended,
rewritten or moved is stored. So a file that only grew is stored as what was added. Holes stay
holes. When a file has come to consist of many short pieces, these are stored anew as long ones.

The base's number is in the name, so that garbage collection can tell what may still be committed.
"""

import bisect
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from errors import Damaged, Refused
from storage import durable, fetch
from storage.manifest import HOLE, SMALL, Extent, File

A_PACK = 4 << 20
A_PIECE = 8 << 20
# So many pieces shorter than A_PIECE a file may have before they are stored anew.
MOST_SHORT_PIECES = 32


@dataclass
class Store:
    """One attempt's stored files. `finish` before anything refers to them."""

    directory: Path
    folder: Path
    base: int
    _number: int = 0
    _pack: list[bytes] = field(default_factory=list)
    _packed: int = 0
    _pack_name: str = ""
    written: int = 0

    def add(self, local: Path, path: str, old: File | None, sparse: bool) -> tuple[Extent, ...]:
        """Where the bytes of a local file lie from now on. `Refused` if it can't be read."""
        try:
            file = durable.open_to_read(local)
        except (OSError, Damaged) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no plain file now"
            raise Refused(f"{path!r} can't be committed: {reason}") from error
        try:
            length = os.fstat(file).st_size
            if length <= SMALL and not sparse:
                return self._add_small(_read(file, 0, length + 1), old)
            return tuple(self._add_large(file, length, old, sparse))
        except OSError as error:
            raise Refused(f"{path!r} can't be committed: {error.strerror}") from error
        finally:
            os.close(file)

    def copy(self, file: File, kept: set[str]) -> File:
        """The same file with those of its pieces stored anew that don't lie in `kept` files."""
        pieces = list(file.extents)
        stored = fetch.Stored(self.directory)
        try:
            for at, extent in enumerate(pieces):
                if extent.stored == HOLE or extent.stored in kept:
                    continue
                data = stored.read(extent, file.path, 0)
                if len(data) <= SMALL:
                    (pieces[at],) = self._add_small(data, None)
                    continue
                name = self._new_name()
                with durable.writing(self.folder / name) as write:
                    write(data)
                pieces[at] = extent._replace(stored=self._stored(name), offset=0)
        finally:
            stored.close()
        return file._replace(extents=tuple(pieces))

    def finish(self) -> None:
        """Everything that was added is stored; durable with the folder's next `sync_directory`."""
        if self._pack:
            with durable.writing(self.folder / self._pack_name) as write:
                write(b"".join(self._pack))
            self._pack, self._packed = [], 0

    def _add_small(self, data: bytes, old: File | None) -> tuple[Extent, ...]:
        if not data:
            return ()
        digest = hashlib.sha256(data).hexdigest()
        if old and [(e.length, e.sha256) for e in old.extents] == [(len(data), digest)]:
            return old.extents
        if self._packed + len(data) > A_PACK:
            self.finish()
        if not self._pack:
            self._pack_name = self._new_name()
        extent = Extent(self._stored(self._pack_name), self._packed, len(data), digest)
        self._pack.append(data)
        self._packed += len(data)
        self.written += len(data)
        return (extent,)

    def _add_large(
        self, file: int, length: int, old: File | None, sparse: bool
    ) -> Iterator[Extent]:
        """Its pieces in order. What is new of it goes into one stored file, written as it comes."""
        plan = list(_plan(file, length, old, sparse))
        if not any(extent.stored == _NEW for extent in plan):
            yield from plan
            return
        name = self._new_name()
        stored, offset, position = self._stored(name), 0, 0
        with durable.writing(self.folder / name) as write:
            for extent in plan:
                if extent.stored != _NEW:
                    yield extent
                else:
                    data = _read(file, position, extent.length)
                    if len(data) != extent.length:
                        raise Refused("a file was cut off while it was committed")
                    write(data)
                    digest = hashlib.sha256(data).hexdigest()
                    yield Extent(stored, offset, extent.length, digest)
                    offset += extent.length
                position += extent.length
        self.written += offset

    def _new_name(self) -> str:
        self._number += 1
        return f"data-{self.base}-{self._number}"

    def _stored(self, name: str) -> str:
        return os.path.relpath(self.folder / name, self.directory)


_NEW = "?"


def _plan(file: int, length: int, old: File | None, sparse: bool) -> Iterator[Extent]:
    """The file as pieces: holes, pieces of the old version that still stand, and new ones."""
    kept = dict(_still_there(file, length, old))
    starts = sorted(kept)
    for start, end, is_hole in _segments(file, length, sparse):
        if is_hole:
            yield Extent(HOLE, 0, end - start, "")
            continue
        position = start
        while position < end:
            extent = kept.get(position)
            if extent is not None and position + extent.length <= end:
                yield extent
                position += extent.length
                continue
            following = bisect.bisect_right(starts, position)
            until = min(end, position + A_PIECE, *starts[following : following + 1])
            yield Extent(_NEW, 0, until - position, "")
            position = until


def _still_there(file: int, length: int, old: File | None) -> Iterator[tuple[int, Extent]]:
    if old is None:
        return
    short = [e for e in old.extents if e.stored != HOLE and e.length < A_PIECE]
    renew = len(short) > MOST_SHORT_PIECES
    offset = 0
    for extent in old.extents:
        begin, offset = offset, offset + extent.length
        if extent.stored == HOLE or offset > length or (renew and extent.length < A_PIECE):
            continue
        if hashlib.sha256(_read(file, begin, extent.length)).hexdigest() == extent.sha256:
            yield begin, extent


def _segments(file: int, length: int, sparse: bool) -> Iterator[tuple[int, int, bool]]:
    """The data and the holes of a file, in order."""
    position = 0
    while position < length:
        if not sparse:
            yield 0, length, False
            return
        try:
            data = min(os.lseek(file, position, os.SEEK_DATA), length)
        except OSError:  # ENXIO: nothing but a hole follows
            data = length
        if data > position:
            yield position, data, True
            position = data
        if position < length:
            hole = min(os.lseek(file, position, os.SEEK_HOLE), length)
            yield position, hole, False
            position = hole


def _read(file: int, offset: int, length: int) -> bytes:
    """That many bytes, fewer only where the file ends."""
    data = os.pread(file, length, offset)
    while 0 < len(data) < length and (
        more := os.pread(file, length - len(data), offset + len(data))
    ):
        data += more
    return data
