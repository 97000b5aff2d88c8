"""Processes seen from outside: which of them carry a mark, and waiting for facts about them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def marked(mark: str) -> set[int]:
    """The processes with this TEST_MARK in their environment, however they were started."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"TEST_MARK={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def wait_until(fact: Callable[[], bool], timeout: float = 30) -> None:
    """Wait until the fact is true."""
    deadline = time.monotonic() + timeout
    while not fact():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s"
        time.sleep(0.01)
