"""An NFS client that lies as real ones do: a FUSE file system over a backing folder.

One process is one mount, and one mount is one node; several over the same backing folder are nodes
that share it. The kernel caches nothing of it (direct_io, every timeout 0), so every lie is told
here and by intent. Started by `tests/nfs/node.py`, which also speaks to its control socket.

    python -m tests.nfs.adversary BACKING MOUNTPOINT SOCKET TRACE

The trace has one JSON object a line for every call: n, time, op, path, to, pid, result, script.
It ends when it is unmounted, or when its standard input closes: no mount outlives its test.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import mfusepy

from tests.nfs.beliefs import inode_of
from tests.nfs.client import Client, Entry, call
from tests.nfs.control import serve
from tests.nfs.script import fail_with


class Adversary(Client):
    """The operations, under the names that mfusepy looks for."""

    use_ns = True

    # Names.

    @call("getattr")
    def getattr(self, path: str | None, fh: int | None = None) -> dict[str, int]:
        if fh is not None and fh in self._handles:
            return self._plain(os.fstat(self._handles[fh].real_fd))
        assert path is not None
        if self.beliefs.is_missing(path):
            raise fail_with(errno.ENOENT, path)
        status = self.beliefs.attributes(path)
        if status is None:
            try:
                status = os.lstat(self._real(path))
            except FileNotFoundError:
                self.beliefs.learn_missing(path, self._cache_seconds)
                raise
            self._learn(path, status)
        return self._plain(status)

    @call("readlink")
    def readlink(self, path: str) -> str:
        return os.readlink(self._real(path))

    @call("opendir")
    def opendir(self, path: str) -> int:
        real = self._real(path)
        directory = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.close(directory)
        self.beliefs.forget_names_in(path)
        known = self.beliefs.listing(path) if self.script.settings.stale_listings else None
        if known is None:
            known = os.listdir(real)
            self.beliefs.learn_listing(path, known, self._cache_seconds)
        entries: list[Entry] = []
        for name in known:
            with suppress(FileNotFoundError):
                status = os.lstat(os.path.join(real, name))
                entries.append((name, {"st_mode": status.st_mode, "st_ino": status.st_ino}, 0))
        self._last += 1
        self._listings[self._last] = path, entries
        return self._last

    @call("readdir", path_at=1)
    def readdir(self, path: str | None, fh: int) -> list[Any]:
        return [".", "..", *self._listings[fh][1]]

    @call("releasedir", path_at=1)
    def releasedir(self, path: str | None, fh: int) -> int:
        # The trace still needs the path; a listing is small and a test short.
        return 0

    @call("fsyncdir", path_at=2)
    def fsyncdir(self, path: str | None, datasync: int, fh: int) -> int:
        if self.script.settings.is_disk:
            self.disk.synced_directory(self._real(self._listings[fh][0]))
        return 0

    @call("mkdir")
    def mkdir(self, path: str, mode: int) -> int:
        with self._told_of(path):
            os.mkdir(self._real(path), mode)
        self._made(path)
        return 0

    @call("symlink")
    def symlink(self, path: str, points_to: str) -> int:
        with self._told_of(path):
            os.symlink(points_to, self._real(path))
        self._made(path)
        return 0

    @call("link")
    def link(self, path: str, existing: str) -> int:
        with self._told_of(path):
            os.link(self._real(existing), self._real(path), follow_symlinks=False)
        self._made(path)
        return 0

    @call("unlink")
    def unlink(self, path: str) -> int:
        real = self._real(path)
        self._before_removal(real)
        if not self._silly_rename(path):
            os.unlink(real)
        self._removed(path)
        return 0

    @call("rmdir")
    def rmdir(self, path: str) -> int:
        self._before_removal(self._real(path))
        os.rmdir(self._real(path))
        self._removed(path)
        return 0

    @call("rename", path_at=1)
    def rename(self, old: str, new: str) -> int:
        self._before_removal(self._real(new))
        self._before_removal(self._real(old))
        with suppress(FileNotFoundError):
            self._silly_rename(new)
        os.rename(self._real(old), self._real(new))
        self.beliefs.forget_below(old)
        self.beliefs.forget_below(new)
        self._removed(old)
        self._learn(new, os.lstat(self._real(new)))
        return 0

    # Attributes.

    @call("chmod")
    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._real(path), mode)
        return self._changed(path)

    @call("chown")
    def chown(self, path: str, uid: int, gid: int) -> int:
        os.chown(self._real(path), uid, gid, follow_symlinks=False)
        return self._changed(path)

    @call("utimens")
    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        now = time.time_ns()
        os.utime(self._real(path), ns=times or (now, now), follow_symlinks=False)
        return self._changed(path)

    @call("truncate")
    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        real_fd = os.open(self._real(path), os.O_RDWR | os.O_CLOEXEC)
        try:
            inode = inode_of(os.fstat(real_fd))
            self._write_back(inode, real_fd, path)
            if self.script.settings.is_disk:
                self.disk.before_write(real_fd)
            os.ftruncate(real_fd, length)
        finally:
            os.close(real_fd)
        return self._changed(path)

    @call("statfs")
    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._real(path))
        names = ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail")
        return {f"f_{name}": getattr(found, f"f_{name}") for name in (*names, "namemax")}

    # Contents.

    @call("create")
    def create(self, path: str, mode: int, flags: int) -> int:
        """Exclusive or not, it goes to the server whatever is believed here."""
        was_there = os.path.lexists(self._real(path))
        with self._told_of(path):
            real_fd = os.open(self._real(path), _flags(flags) | os.O_CREAT, mode)
        if not was_there:
            self._made(path)
        return self._new_handle(path, real_fd)

    @call("open")
    def open(self, path: str, flags: int) -> int:
        try:
            there = inode_of(os.lstat(self._real(path)))
        except FileNotFoundError:
            there = None
        older = self.beliefs.older_file(path, there)
        if older is not None:
            return self._new_handle(
                path, os.open(f"/proc/self/fd/{older}", _flags(flags) & ~os.O_NOFOLLOW)
            )
        try:
            real_fd = os.open(self._real(path), _flags(flags) & ~os.O_TRUNC)
        except FileNotFoundError:
            self.beliefs.learn_missing(path, self._cache_seconds)
            raise
        if flags & os.O_TRUNC:
            if self.script.settings.is_disk:
                self.disk.before_write(real_fd)
            os.ftruncate(real_fd, 0)
        # Close-to-open: the attributes come from the server, whatever was cached.
        self._learn(path, os.fstat(real_fd))
        return self._new_handle(path, real_fd)

    @call("read", path_at=3)
    def read(self, path: str | None, size: int, offset: int, fh: int) -> bytes:
        handle = self._alive(fh)
        dirty = self._opened[handle.inode].dirty
        end = max([handle.seen_size, *(at + len(data) for at, data in dirty)])
        size = max(0, min(size, end - offset))
        found = bytearray(os.pread(handle.real_fd, size, offset))
        for at, data in dirty:
            for n, byte in enumerate(data, at - offset):
                if 0 <= n < size:
                    found.extend(b"\0" * (n + 1 - len(found)))
                    found[n] = byte
        return bytes(found)

    @call("write", path_at=3)
    def write(self, path: str | None, data: bytes, offset: int, fh: int) -> int:
        """At the offset that the kernel computed: for O_APPEND from the size believed here."""
        handle = self._alive(fh)
        self._opened[handle.inode].dirty.append((offset, data))
        handle.seen_size = max(handle.seen_size, offset + len(data))
        self.beliefs.forget_attributes(handle.inode)
        if not self.script.settings.buffered:
            self._write_back(handle.inode, handle.real_fd, handle.path)
        return len(data)

    @call("flush", path_at=1, locked=False)
    def flush(self, path: str | None, fh: int) -> int:
        handle = self._handles[fh]
        if handle.can_write:
            self._write_back(handle.inode, handle.real_fd, handle.path)
        return 0

    @call("fsync", path_at=2, locked=False)
    def fsync(self, path: str | None, datasync: int, fh: int) -> int:
        handle = self._alive(fh)
        if handle.can_write:
            self._write_back(handle.inode, handle.real_fd, handle.path)
        with self._lock:
            if self.script.settings.is_disk:
                self.disk.synced(handle.inode)
        return 0

    @call("release", path_at=1, locked=False)
    def release(self, path: str | None, fh: int) -> int:
        handle = self._handles[fh]
        if handle.can_write:
            with suppress(OSError):
                self._write_back(handle.inode, handle.real_fd, handle.path)
        self.close_handle(fh)
        return 0

    def init_with_config(self, connection: Any, config: Any) -> None:
        config.nullpath_ok = True  # a file that lost its name is still read by its handle


class Mounting(mfusepy.FUSE):  # type: ignore[misc]
    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
        if flags:
            return -errno.EINVAL  # as NFS says to RENAME_NOREPLACE
        return int(super().rename_fuse_3(old, new, flags))


def _flags(flags: int) -> int:
    """Those that matter to the server. O_APPEND doesn't: the offset is the client's affair."""
    kept = os.O_ACCMODE | os.O_CREAT | os.O_EXCL | os.O_TRUNC
    # A reader of the file's own node must see what is still dirty: the descriptor reads as well.
    access = os.O_RDWR if flags & os.O_ACCMODE == os.O_WRONLY else flags & os.O_ACCMODE
    return (flags & kept & ~os.O_ACCMODE) | access | os.O_CLOEXEC | os.O_NOFOLLOW


def _end_with_the_test() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    backing, mountpoint, socket, trace = sys.argv[1:]
    os.umask(0)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
    adversary = Adversary(os.path.abspath(backing), trace)
    serve(socket, adversary.answer)
    threading.Thread(target=_end_with_the_test, daemon=True).start()
    no_cache = {"entry_timeout": 0, "negative_timeout": 0, "attr_timeout": 0, "ac_attr_timeout": 0}
    with suppress(RuntimeError):  # ended by a signal, while somebody still has a file open there
        Mounting(
            adversary,
            mountpoint,
            foreground=True,
            fsname="cohort-adversary",
            direct_io=True,
            use_ino=True,
            hard_remove=True,
            **no_cache,
        )


if __name__ == "__main__":
    main()
