"""One node's half of an examination: named steps in a folder made for it, each a few calls.

Steps look at files as a program does that knows nothing of NFS, so that what its caches say is
seen; only `appears` opens the folder first, as everything in `storage/` does.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from errors import Refused
from storage import durable

FOLDER = re.compile(r"\.examination-[0-9a-f]{16}")
_NAME = re.compile(r"[a-z0-9-]{1,40}(/[a-z0-9-]{1,40}){0,2}")
MOST_NAMES = 150


class Side(Protocol):
    """A node that takes steps: this process, or a worker elsewhere that is asked to."""

    name: str

    def do(self, step: str, **arguments: Any) -> Any:
        """Take one step. What it gives back is plain data."""


class Half:
    """This process as one side of the examination."""

    def __init__(self, root: Path, folder: str, name: str) -> None:
        if not FOLDER.fullmatch(folder):
            raise Refused(f"{folder!r} is no folder of an examination")
        self.name = name
        self.folder = root / folder
        self._own: Path | None = None

    def do(self, step: str, **arguments: Any) -> Any:
        """Take one step; a name or step that isn't known is refused, for it may come by network."""
        if step not in STEPS:
            raise Refused(f"there is no step {step!r}; there are {', '.join(STEPS)}")
        taken: Callable[..., Any] = getattr(self, f"_{step}")
        return taken(**arguments)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise Refused(f"{name!r} is no name in an examination")
        return self.folder / name

    # --- Steps: one for each name in STEPS ---

    def _is_there(self) -> bool:
        durable.reopen(self.folder.parent)
        return self.folder.is_dir()

    def _clock(self) -> float:
        return time.time()

    def _see(self, name: str) -> bool:
        try:
            os.stat(self._path(name))
        except FileNotFoundError:
            return False
        return True

    def _appears(self, name: str) -> bool:
        durable.reopen(self._path(name).parent)
        return self._see(name)

    def _write(self, name: str, text: str) -> float:
        """Rewrites a file in place, as programs do; its time by the server's clock."""
        with open(self._path(name), "w") as file:
            file.write(text)
        return os.stat(self._path(name)).st_mtime

    def _create(self, name: str, text: str) -> None:
        durable.create(self._path(name), text.encode())

    def _read(self, name: str) -> str | None:
        with suppress(FileNotFoundError):
            return self._path(name).read_text()
        return None

    def _list(self, name: str) -> list[str]:
        return sorted(os.listdir(self._path(name)))

    def _read_all(self, names: list[str]) -> list[str | None]:
        durable.reopen(self.folder)
        return [self._read(name) for name in names[:MOST_NAMES]]

    def _rename(self, name: str, to: str) -> None:
        os.rename(self._path(name), self._path(to))

    def _link(self, name: str, to: str) -> None:
        os.link(self._path(name), self._path(to))

    def _make_folder(self, name: str) -> None:
        os.mkdir(self._path(name))

    def _race(self, how: str, names: list[str], start: float, every: float) -> list[bool]:
        """Try to be the first to each name, at a set time by this node's clock; which were won."""
        take = {"link": self._take_link, "mkdir": self._take_mkdir, "open": self._take_open}.get(
            how
        )
        if take is None or len(names) > MOST_NAMES or not 0 <= every <= 0.02:
            raise Refused(f"there is no race {how!r} for {len(names)} names every {every} s")
        ready = [take(name) for name in names]
        # However wrong a clock may be, a worker's loop isn't held up for longer than this.
        latest = time.monotonic() + 1 + len(names) * every
        won = []
        for n, attempt in enumerate(ready):
            wait = min(start + n * every - time.time(), latest - time.monotonic())
            time.sleep(max(0.0, wait))
            try:
                attempt()
                won.append(True)
            except FileExistsError:
                won.append(False)
        return won

    def _take_link(self, name: str) -> Callable[[], object]:
        path = self._path(name)
        # What is linked says whose it is. One file for all: a file may have 177 links on EFS.
        if self._own is None:
            self._own = self.folder / f"own-{os.urandom(6).hex()}"
            durable.create(self._own, self.name.encode())
        own = self._own
        return lambda: os.link(own, path)

    def _take_mkdir(self, name: str) -> Callable[[], object]:
        path = self._path(name)
        return lambda: os.mkdir(path)

    def _take_open(self, name: str) -> Callable[[], object]:
        path = self._path(name)
        return lambda: os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


STEPS = (
    "is_there", "clock", "see", "appears", "write", "create", "read", "read_all", "rename", "link",
    "list", "make_folder", "race",
)  # fmt: skip


def race(here: Side, there: Side, how: str, names: list[str], every: float) -> list[list[bool]]:
    """Both sides try for the same names at the same moments; who won which."""
    offset = clock_offset(here, there)[0]
    start = time.time() + 0.15  # the message must have come by then
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(
            there.do, "race", how=how, names=names, start=start + offset, every=every
        )
        ours = here.do("race", how=how, names=names, start=start, every=every)
        return [ours, theirs.result()]


def clock_offset(here: Side, there: Side) -> tuple[float, float]:
    """How far the other side's clock is ahead, in seconds, and how exactly that is known."""
    tries = []
    for _ in range(5):
        before = here.do("clock")
        found = there.do("clock")
        after = here.do("clock")
        tries.append((after - before, found - (before + after) / 2))
    span, offset = min(tries)
    return offset, span / 2
