"""The one recipe for durable writes, and the reads that an NFS client's caches can't deceive.

Promises: what `create` and `copy_into` return from is on the disk, whole, under a name that nobody
had before. What they don't return from (a crash, a full disk) has a name that nothing refers to.
Only `replace_hint` writes over a name, for what may be wrong or missing without harm.

A file system that is full, read-only or away becomes `Unavailable` with the path and the reason.
"""

import errno
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TypeVar

from errors import CohortError, Damaged, Unavailable

T = TypeVar("T")

CHUNK = 1 << 20
# How long a read that fails without saying "missing" is tried again: a server that fails over.
PAUSES = (0.01, 0.05, 0.2, 1.0)


def create(path: Path, data: bytes, *, named: bool = True) -> None:
    """A new file holding exactly `data`, durable with its name when this returns.

    Not `named`: its name is durable only after `sync_directory(path.parent)`, once for many files.
    """
    with writing(path) as write:
        write(data)
    if named:
        sync_directory(path.parent)  # a local disk may lose the name of a file that it keeps


@contextmanager
def writing(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A new file from what the body writes, durable when it is done; its name isn't, as above."""
    length = 0

    def write(data: bytes) -> None:
        nonlocal length
        write_all(target, data)
        length += len(data)

    with _new_file(path) as target:
        yield write
        _make_durable(target, path, length)


def copy_into(source: Path, target: Path) -> tuple[int, str]:
    """Copy a file into a new durable one; the length and SHA-256 of what was read from the source.

    The name is durable only after `sync_directory(target.parent)`: once for many files.
    A source that can't be opened is its plain OSError; one that is no plain file is `Damaged`.
    """
    reading = open_to_read(source)
    try:
        with _new_file(target) as writing:
            length, digest = copy_bytes(reading, writing, source)
            _make_durable(writing, target, length)
    finally:
        os.close(reading)
    return length, digest


def copy_bytes(reading: int, writing: int, source: Path) -> tuple[int, str]:
    """Copy between descriptors; the length and SHA-256 of what was read."""
    digest, length = hashlib.sha256(), 0
    while chunk := _read_source(reading, source):
        write_all(writing, chunk)
        digest.update(chunk)
        length += len(chunk)
    return length, digest.hexdigest()


def write_all(target: int, data: bytes) -> None:
    """Write all of it, however little the system takes at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]


def servers_now(folder: Path) -> float:
    """The time by the file server's clock: that of a file made just now in this folder."""
    make_directory(folder)
    path = folder / f"clock-{secrets.token_hex(8)}"
    with reporting(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            return os.fstat(file).st_mtime
        finally:
            os.close(file)
            os.unlink(path)


def make_directory(path: Path) -> bool:
    """A durable directory. True: this call made it; False: it was there."""
    made = True
    with reporting(path):
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            reopen(path.parent)  # a client may go on believing that the name is missing
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise Damaged(f"{path} should be a directory and isn't") from None
            made = False
    # Also if it was there: whoever made it may have died before this line.
    sync_directory(path.parent)
    return made


def link_or_fail(source: Path, target: Path) -> bool:
    """Give `source` the second name `target`, if nobody has that name.

    True: the server said yes, to this call, and the name is durable. False: it said that the name
    exists, which may be this very link when the reply to a first try was lost. Any other OSError:
    nothing is known. After both of the last two, only reading `target` tells.
    """
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        return False
    sync_directory(target.parent)
    return True


def replace_hint(path: Path, data: bytes, by_way_of: Path) -> None:
    """Set a file that is never trusted, through a new name in the caller's own folder.

    No fsync and no error: a reader may see the old one, half of one or none, and must not care.
    """
    with suppress(OSError, CohortError):
        with _new_file(by_way_of) as target:
            write_all(target, data)
        os.rename(by_way_of, path)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. NFS does that by itself; a local disk needs it."""
    with reporting(path):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path) -> bytes | None:
    """The whole file, or None if it is really missing. Something else in its place is `Damaged`."""
    with reporting(path):
        try:
            return _until_known(lambda: _read_all(path))
        except FileNotFoundError:
            reopen(path.parent)
        with suppress(FileNotFoundError):
            return _until_known(lambda: _read_all(path))
    return None


def read_part(path: Path, offset: int, length: int) -> bytes | None:
    """Some bytes of a file, fewer at its end; None if it is really missing."""
    with reporting(path):
        try:
            return _until_known(lambda: _read_some(path, offset, length))
        except FileNotFoundError:
            reopen(path.parent)
        with suppress(FileNotFoundError):
            return _until_known(lambda: _read_some(path, offset, length))
    return None


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a directory, by name; nothing if it is really missing."""
    with reporting(folder):
        try:
            return _until_known(lambda: _list(folder))
        except FileNotFoundError:
            reopen(folder.parent)
        with suppress(FileNotFoundError):
            return _until_known(lambda: _list(folder))
    return []


def reopen(folder: Path) -> None:
    """Make the next look-up in a directory go to the server.

    An NFS client that once saw "no such file" repeats it, for half a minute, until the parent
    directory is opened; the parent may itself be such a name.
    """
    try:
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except FileNotFoundError:
        if folder.parent != folder:
            reopen(folder.parent)
            with suppress(FileNotFoundError):
                os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def open_to_read(path: Path) -> int:
    """A descriptor of a regular file. Never follows a link, never hangs on a FIFO in its place."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise Damaged(f"{path} should be a plain file and isn't") from None
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise Damaged(f"{path} should be a plain file and isn't")
    return file


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """A file system that doesn't do what it was asked: `Unavailable`, with the path and why."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{error.filename or path}: {error.strerror or error}") from error


@contextmanager
def _new_file(path: Path) -> Iterator[int]:
    """A descriptor of a file that wasn't there before; closed when the body is done."""
    with reporting(path):
        # Exclusive: a name is written once, by one writer, so no reader has an older one cached.
        target = FileIO(path, "x")
        try:
            yield target.fileno()
            target.close()  # an NFS client may report a full disk only here
        except Exception:
            with suppress(OSError):
                target.close()
            # Nothing refers to it, so it harms nobody; but a full disk needs its space back.
            with suppress(OSError):
                os.unlink(path)
            raise


def _make_durable(target: int, path: Path, length: int) -> None:
    os.fsync(target)  # closes: power lost, or the client gone, with the bytes still in its memory
    found = os.fstat(target).st_size
    if found != length:  # closes: a server that took less than it said
        raise Unavailable(f"{path}: {found} bytes are there of {length} written")


def _read_source(reading: int, source: Path) -> bytes:
    try:
        return os.read(reading, CHUNK)
    except OSError as error:
        raise Unavailable(f"reading {source}: {error.strerror}") from error


def _read_all(path: Path) -> bytes:
    file = open_to_read(path)
    try:
        length = os.fstat(file).st_size
        data = os.read(file, length + 1)
        # One read tells that the file ends where it should; what is anything else is read on.
        while len(data) != length and (more := os.read(file, CHUNK)):
            data += more
        return data
    finally:
        os.close(file)


def _read_some(path: Path, offset: int, length: int) -> bytes:
    file = open_to_read(path)
    try:
        return os.pread(file, length, offset)
    finally:
        os.close(file)


def _list(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except NotADirectoryError:
        raise Damaged(f"{folder} should be a directory and isn't") from None


def _until_known(look: Callable[[], T]) -> T:
    """Look again while the answer is neither "here it is" nor "there is none"."""
    for pause in PAUSES:
        try:
            return look()
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.EIO, errno.EINTR, errno.ETIMEDOUT):
                raise
            time.sleep(pause)
    return look()
