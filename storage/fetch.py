"""Bringing files from the shared file system to the local disk, several at a time.

Promises: what is brought was verified, piece by piece, against the hashes of the manifest while it
was copied. A file that is there already, as an older version or as a failed run left it, is kept
where its pieces are right, and only the others are brought. A name's old file is replaced, never
written through a link.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from storage import durable, sealed
from storage.listing import Missing
from storage.look import Identity, identity_of
from storage.manifest import HOLE, SMALL, Extent, File

THREADS = 8
# So many small files are one piece of work for a thread.
A_BATCH = 200
AT_ONCE = 1 << 20
A_FEW = 16


class Stored:
    """Reads pieces of stored files, ahead where they lie side by side. One thread's own."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._name = ""
        self._file = -1
        self._start = 0
        self._ahead = b""

    def read(self, extent: Extent, of: str, ahead: int) -> bytes:
        """The piece. `Missing` if its file isn't there, `Damaged` if it isn't what was stored."""
        path = self._directory / extent.stored
        if extent.stored != self._name:
            self.close()
            self._file = _open(path)
            self._name, self._ahead = extent.stored, b""
        begin = extent.offset - self._start
        data = self._ahead[begin : begin + extent.length] if begin >= 0 else b""
        if len(data) != extent.length:
            with durable.reporting(path):
                self._ahead = os.pread(self._file, max(ahead, extent.length), extent.offset)
                while 0 < len(self._ahead) < extent.length:
                    at = extent.offset + len(self._ahead)
                    more = os.pread(self._file, extent.length - len(self._ahead), at)
                    if not more:
                        break
                    self._ahead += more
            self._start = extent.offset
            data = self._ahead[: extent.length]
        if len(data) != extent.length or hashlib.sha256(data).hexdigest() != extent.sha256:
            sealed.damaged(path, f"this isn't what was committed as {of!r}")
        return data

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._name, self._file = "", -1


def bring(
    directory: Path, files: Iterable[File], into: Path, reusable: Callable[[str], bool]
) -> dict[str, Identity]:
    """Make each file in the tree `into` what it should be; what it looks like then.

    `reusable(path)`: there is a plain file with no other name there, whose pieces may be right.
    Any other file at the path must have been taken away.
    """
    small: list[File] = []
    large: list[File] = []
    for file in files:
        (small if file.length <= SMALL else large).append(file)
    small.sort(key=lambda file: file.extents[:1])
    batches = [small[at : at + A_BATCH] for at in range(0, len(small), A_BATCH)]
    found: dict[str, Identity] = {}
    if len(batches) + len(large) <= 1:
        for batch in batches:
            found.update(_bring_small(directory, batch, into))
        for file in large:
            found[file.path] = _bring_large(directory, file, into, reusable(file.path), map)
        return found
    with ThreadPoolExecutor(THREADS, "cohort-fetch") as pool:
        for some in pool.map(lambda batch: _bring_small(directory, batch, into), batches):
            found.update(some)
        # One after the other, the pieces of each in parallel: memory stays bounded.
        for file in large:
            found[file.path] = _bring_large(directory, file, into, reusable(file.path), pool.map)
    return found


def read_file(directory: Path, file: File) -> Iterator[bytes]:
    """A version's file, piece by piece."""
    stored = Stored(directory)
    try:
        for extent in file.extents:
            if extent.stored == HOLE:
                for start in range(0, extent.length, AT_ONCE):
                    yield bytes(min(AT_ONCE, extent.length - start))
            else:
                yield stored.read(extent, file.path, 0)
    finally:
        stored.close()


def _bring_small(directory: Path, files: list[File], into: Path) -> dict[str, Identity]:
    stored, found = Stored(directory), {}
    ahead = AT_ONCE if len(files) > A_FEW else 0
    try:
        for file in files:
            data = [stored.read(e, file.path, ahead) for e in file.extents if e.stored != HOLE]
            path = os.path.join(into, file.path)
            with suppress(FileNotFoundError):
                os.unlink(path)
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, file.mode)
            try:
                if len(data) == len(file.extents):
                    for piece in data:
                        durable.write_all(target, piece)
                else:
                    _write_around_holes(target, file, iter(data))
                found[file.path] = _finished(target, file)
            finally:
                os.close(target)
    finally:
        stored.close()
    return found


def _write_around_holes(target: int, file: File, data: Iterator[bytes]) -> None:
    offset = 0
    for extent in file.extents:
        if extent.stored != HOLE:
            os.lseek(target, offset, os.SEEK_SET)
            durable.write_all(target, next(data))
        offset += extent.length
    os.ftruncate(target, offset)


def _bring_large(
    directory: Path,
    file: File,
    into: Path,
    reuse: bool,
    each: Callable[..., Iterable[None]],
) -> Identity:
    path = into / file.path
    # What stands where a hole should be can't be taken away portably: begin with an empty file.
    reuse = reuse and all(extent.stored != HOLE for extent in file.extents)
    if not reuse:
        with suppress(FileNotFoundError):
            os.unlink(path)
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if reuse else os.O_CREAT | os.O_EXCL)
    if reuse:
        os.chmod(path, stat.S_IMODE(os.lstat(path).st_mode) | 0o600)
    target = os.open(path, flags, 0o600)
    try:
        before = os.fstat(target).st_size
        os.ftruncate(target, file.length)
        offset, work = 0, []
        for extent in file.extents:
            work.append((offset, extent))
            offset += extent.length

        def bring_piece(item: tuple[int, Extent]) -> None:
            offset, extent = item
            if extent.stored == HOLE:
                return
            if offset < before:
                there = os.pread(target, extent.length, offset)
                if hashlib.sha256(there).hexdigest() == extent.sha256:
                    return
            stored = Stored(directory)
            try:
                data = memoryview(stored.read(extent, file.path, 0))
            finally:
                stored.close()
            while data:
                written = os.pwrite(target, data, offset)
                data, offset = data[written:], offset + written

        for _ in each(bring_piece, work):
            pass
        return _finished(target, file)
    finally:
        os.close(target)


def _finished(target: int, file: File) -> Identity:
    os.utime(target, ns=(file.mtime_ns, file.mtime_ns))
    status = os.fstat(target)
    if stat.S_IMODE(status.st_mode) != file.mode:
        os.fchmod(target, file.mode)
        status = os.fstat(target)
    return identity_of(status)


def _open(stored: Path) -> int:
    with durable.reporting(stored):
        try:
            return durable.open_to_read(stored)
        except FileNotFoundError:
            durable.reopen(stored.parent)
        try:
            return durable.open_to_read(stored)
        except FileNotFoundError:
            raise Missing(f"{stored}: a stored file is missing") from None
