"""What is in a work tree, by one look at every name and no look into any file.

A regular file is known by its identity: inode, length, mtime, ctime and mode. The kernel sets
ctime, no program can; so a file whose identity is the one noted before has the content that it
had then, provided that the clock had ticked in between (`wait_for_a_tick`).
"""

import gc
import marshal
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from errors import Refused
from storage import look as look_program
from storage.look import ALL_TAKEN, CantLook, Found, Identity, identity_of, look
from storage.manifest import LeftOut

# From so many files on, the start of a process (15 ms) is less than what it saves.
MANY = 10_000
# So many folders can be divided fairly.
ENOUGH = 64

# Longer than the clock tick of any local file system that a node would use for scratch.
A_TICK = 2.0


@dataclass
class Scan:
    """A tree as it stands. Two of them are equal if nothing changed between the two looks."""

    files: dict[str, Identity] = field(default_factory=dict)
    folders: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Path to all mode bits and mtime."""
    symlinks: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Path to target and mtime."""
    left_out: tuple[LeftOut, ...] = ()
    sparse: frozenset[str] = frozenset()
    """Files that take less room than their length says: they may have holes."""
    linked: frozenset[str] = frozenset()
    """Files whose inode has several names."""

    def kind(self, path: str) -> str | None:
        """file, folder, symlink, other, or None if there is nothing."""
        for kind, table in (
            ("file", self.files),
            ("folder", self.folders),
            ("symlink", self.symlinks),
        ):
            if path in table:
                return kind
        return "other" if any(path == entry.path for entry in self.left_out) else None


def scan(tree: Path, about: int = 0) -> Scan:
    """`Refused` if something can't be looked at, or goes away meanwhile.

    If about so many files are expected that it pays, other processes look at a part of them.
    """
    top, found = os.fspath(tree), Found()
    helpers = _processes() - 1 if about >= MANY else 0
    try:
        with _no_collecting():
            if helpers:
                _look_together(top, found, helpers)
            else:
                look(top, [""], found)
    except CantLook as error:
        raise Refused(str(error)) from None
    return Scan(
        found.files,
        found.folders,
        found.symlinks,
        tuple(sorted(LeftOut(*entry) for entry in found.left_out)),
        frozenset(found.sparse),
        frozenset(found.linked),
    )


def _look_together(tree: str, found: Found, helpers: int) -> None:
    """As `look`, with so many processes beside this one.

    The top of the tree is looked at here. When folders to be visited are known, they are dealt out
    in batches, whose numbers stand in a pipe: whoever reads a number takes that batch, so that all
    are done at about the same time. What no helper answered for is looked at here: each folder is
    seen by exactly one look that counts, and what it can't look at is told by this process.
    """
    queue, numbers = os.pipe()
    started: list[subprocess.Popen[bytes]] = []
    with os.fdopen(os.memfd_create("batches"), "wb") as dealt:
        try:
            with suppress(OSError, subprocess.SubprocessError):
                for _ in range(helpers):
                    started.append(_helper(tree, queue, dealt))
            to_visit = look(tree, [""], found, until=ENOUGH)
            count = min(len(to_visit), 255)
            batches = [to_visit[n::count] for n in range(count)]
            dealt.write(marshal.dumps(batches))
            dealt.flush()
            os.write(numbers, bytes(range(1, count + 1)) + ALL_TAKEN * (helpers + 1))
            missing = set(range(1, count + 1))
            while (number := os.read(queue, 1)) != ALL_TAKEN:
                missing.discard(number[0])
                look(tree, batches[number[0] - 1], found)
            for helper in started:
                # A helper that died left half an answer, or none.
                with suppress(EOFError, ValueError, TypeError):
                    assert helper.stdout is not None
                    covered, tables = marshal.loads(helper.stdout.read())
                    found.add(tables)
                    missing -= set(covered)
            for left in missing:
                look(tree, batches[left - 1], found)
        finally:
            os.close(queue)
            os.close(numbers)
            for helper in started:
                helper.kill()
                helper.communicate()


def _helper(tree: str, queue: int, dealt: BinaryIO) -> "subprocess.Popen[bytes]":
    # Not a fork: this process may hold much memory, and threads.
    return subprocess.Popen(
        [
            *(sys.executable, "-I", "-S", "-X", "utf8", look_program.__file__),
            *(str(queue), str(os.getpid()), tree),
        ],
        stdin=dealt,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[queue],
    )


def _processes() -> int:
    """How many should look at a large tree."""
    if not sys.executable or sys.getfilesystemencoding() != "utf-8":
        return 1  # names would mean something else to another process
    return min(len(os.sched_getaffinity(0)), 4)


def wait_for_a_tick(beside: Path, newest: int | None = None) -> int | None:
    """Wait until whatever is written from now on has a ctime above `newest`, or above that of
    whatever was written until now. Returns the ctime of what is written now.

    Closes: a file is rewritten within the clock tick in which it was noted, with the same length
    and an mtime put back, and looks untouched. None: this file system's clock tells nothing.
    """
    end = time.monotonic() + A_TICK
    try:
        beside.touch()
        if newest is None:
            newest = identity_of(os.stat(beside))[3]
            os.utime(beside)
        while (now := identity_of(os.stat(beside))[3]) <= newest:
            if time.monotonic() > end:
                return None
            time.sleep(0.001)
            os.utime(beside)
        return now
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _no_collecting() -> Iterator[None]:
    # Hundreds of thousands of tuples that all stay: each collection would walk them in vain.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
