"""What a job says while it runs: one file an attempt, which any node and any terminal can follow.

    <root>/logs/<task id>/<attempt>-<claim id>      append only, one writer, ever

Promises: what was written is there for other nodes within about `INTERVAL`, and all of it once
`close` has returned. Memory stays bounded however much is written: a writer that is faster than
the file system waits for it. A file system that refuses loses output, never a job: the file says
how much is missing as soon as it takes bytes again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from errors import Damaged
from storage import durable
from storage.keys import check_name

INTERVAL = 0.2
"""Seconds between two flushes. A flush is a round trip to the server; each line isn't one."""
BATCH = 1 << 20


def folder_of(root: Path, task_id: str) -> Path:
    """Where the output of a task's attempts lies."""
    return root / "logs" / check_name("task id", task_id)


def expired(root: Path, max_age: float) -> Iterator[tuple[Path, int]]:
    """The files of logs in which nothing was written for so many seconds, and their lengths."""
    folder = root / "logs"
    if not folder.is_dir():
        return
    now = durable.servers_now(root / "nodes")
    for task in durable.entries(folder):
        for entry in durable.entries(Path(task.path)):
            status = entry.stat(follow_symlinks=False)
            if now - status.st_mtime > max_age:
                yield Path(entry.path), status.st_size


def remove_expired(path: Path) -> None:
    """Take one of them away, and its task's folder with the last."""
    with suppress(FileNotFoundError), durable.reporting(path):
        path.unlink()
    with suppress(OSError):
        path.parent.rmdir()


class OutputLog:
    """The one writer of one attempt's output. Makes its file when it has something to write."""

    def __init__(self, root: Path | None, task_id: str, attempt: int, claim_id: str) -> None:
        """Without a shared folder (`root=None`) output goes nowhere."""
        self._root = root
        self._task_id = check_name("task id", task_id)
        self._name = f"{attempt:04d}-{check_name('claim id', claim_id)}"
        self._waiting = bytearray()
        self._lost = 0
        self._file: int | None = None
        self._flushed_at = 0.0
        self._is_flushed = True
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @cached_property
    def path(self) -> Path | None:
        """Its file, which is there when something was said."""
        return None if self._root is None else folder_of(self._root, self._task_id) / self._name

    @classmethod
    def nowhere(cls) -> OutputLog:
        """One that keeps nothing."""
        return cls(None, "none", 0, "none")

    def write(self, data: bytes) -> None:
        """Hand over some output; waits while the file system is behind by more than a batch."""
        if self.path is None or not data:
            return
        with self._changed:
            if self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep_writing, daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: len(self._waiting) < BATCH)
            self._waiting += data
            self._changed.notify_all()

    def close(self) -> None:
        """Return when everything is there for others to read. Further output is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _keep_writing(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting or self._closed,
                    None if self._is_flushed else self._until_flush(),
                )
                # What comes close together is written together.
                self._changed.wait_for(
                    lambda: len(self._waiting) >= BATCH or self._closed, self._until_flush()
                )
                batch, self._waiting = self._waiting, bytearray()
                ends = self._closed
                self._changed.notify_all()
            self._put(bytes(batch), flush=ends or self._until_flush() == 0)
            if ends:
                break
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)

    def _until_flush(self) -> float:
        return max(0.0, self._flushed_at + INTERVAL - time.monotonic())

    def _put(self, batch: bytes, flush: bool) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            if self._lost and batch:
                note = f"\n[{self._lost:,} bytes of output were lost here: no room for them]\n"
                durable.write_all(self._file, note.encode())
                self._lost = 0
            durable.write_all(self._file, batch)
            self._is_flushed = not batch and self._is_flushed
            if flush and not self._is_flushed:
                # An NFS client keeps written bytes to itself until it is made to send them.
                os.fsync(self._file)
                self._is_flushed = True
        except OSError:
            self._lost += len(batch)
            self._is_flushed = True
        if flush:
            self._flushed_at = time.monotonic()

    def _open(self) -> int:
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.path, flags, 0o644)


@dataclass(frozen=True)
class AttemptLog:
    """One attempt's file."""

    path: Path
    attempt: int
    claim_id: str


class LogReader:
    """Reads what a task's attempts have written since the last look, from any node."""

    def __init__(self, root: Path, task_id: str, attempt: int | None = None) -> None:
        """All attempts, or the one of that number."""
        self.folder = folder_of(root, task_id)
        self._attempt = attempt
        self._read: dict[AttemptLog, int] = {}
        """How far each is read, in the order in which they were first seen."""

    @property
    def found(self) -> tuple[AttemptLog, ...]:
        """The files that were there at the last look."""
        return tuple(self._read)

    def news(self) -> Iterator[tuple[AttemptLog, bytes]]:
        """What is new, in pieces of at most `BATCH` bytes. `Unavailable`: ask again later."""
        self._look_for_attempts()
        for log in self._read:
            # Opened anew each time: a held descriptor never sees what another NFS client appends.
            with durable.reporting(log.path), suppress(FileNotFoundError):
                file = durable.open_to_read(log.path)
                try:
                    while data := os.pread(file, BATCH, self._read[log]):
                        self._read[log] += len(data)
                        yield log, data
                finally:
                    os.close(file)

    def _look_for_attempts(self) -> None:
        new: list[tuple[int, int, AttemptLog]] = []
        for entry in durable.entries(self.folder):
            number, dash, claim_id = entry.name.partition("-")
            if not (dash and number.isdecimal()):
                raise Damaged(f"{entry.path}: foreign among a task's logs")
            log = AttemptLog(Path(entry.path), int(number), claim_id)
            if log not in self._read and self._attempt in (None, log.attempt):
                with suppress(OSError):
                    new.append((log.attempt, entry.stat().st_mtime_ns, log))
        for _, _, log in sorted(new, key=lambda found: found[:2]):
            self._read[log] = 0
