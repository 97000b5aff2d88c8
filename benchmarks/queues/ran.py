"""What has run: a no-op writes one byte, so that the runner counts and not the queue."""

from __future__ import annotations

import os
import time
from pathlib import Path

_open: dict[int, int] = {}


def mark() -> int:
    """One byte more in this process's file."""
    pid = os.getpid()
    if pid not in _open:
        name = os.path.join(os.environ["BENCH_RAN"], str(pid))
        _open[pid] = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return os.write(_open[pid], b".")


class Ran:
    """The bytes in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Begin anew."""
        for path in self._folder.iterdir():
            path.unlink()

    def count(self) -> int:
        """How many have run."""
        return sum(entry.stat().st_size for entry in os.scandir(self._folder))

    def rate(self, first: int, last: int, seconds: float) -> float:
        """Tasks a second, from the time when `first` have run to when `last` have."""
        begun = self._when(first, seconds)
        at_begin = self.count()
        ended = self._when(last, seconds)
        return (self.count() - at_begin) / (ended - begun)

    def _when(self, count: int, seconds: float) -> float:
        deadline = time.perf_counter() + seconds
        while self.count() < count:
            if time.perf_counter() > deadline:
                raise TimeoutError(f"{self.count()} of {count} had run after {seconds:.0f} s")
            time.sleep(0.005)
        return time.perf_counter()
