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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from errors import Refused
from storage import look as look_program
from storage.look import ALL_TAKEN, CantLook, Found, Packed, identity_of, look
from storage.manifest import LeftOut
from storage.treefiles import Files

# From so many files on, the start of a process (15 ms) is less than what it saves.
MANY = 10_000
# So many folders can be divided fairly.
ENOUGH = 64
# A batch's number is one byte of the pipe, and not 0: nobody reads half of it.
A_BYTE = 255
NO_FILES = Files()

# Longer than the clock tick of any local file system that a node would use for scratch.
A_TICK = 2.0


@dataclass
class Scan:
    """A tree as it stands. Two of them are equal if nothing changed between the two looks."""

    files: Files = field(default_factory=Files)
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


def scan(tree: Path, before: Files = NO_FILES) -> Scan:
    """`Refused` if something can't be looked at, or goes away meanwhile.

    `before`: what is likely to be there. It tells whether it pays that other processes look at a
    part of the tree, and what is the same is shared with it.
    """
    top, found = os.fspath(tree), Found()
    helpers = _processes() - 1 if len(before) >= MANY else 0
    try:
        with _no_collecting():
            if helpers:
                _look_together(top, before.folders, found, helpers)
            else:
                look(top, [""], before.folders, found)
    except CantLook as error:
        raise Refused(str(error)) from None
    same = {folder: before.folders[folder] for folder in found.same}
    return Scan(
        Files(same | found.files),
        found.folders,
        found.symlinks,
        tuple(sorted(LeftOut(*entry) for entry in found.left_out)),
        frozenset(found.sparse),
        frozenset(found.linked),
    )


def _look_together(tree: str, before: dict[str, Packed], found: Found, helpers: int) -> None:
    """As `look`, with so many processes beside this one.

    The top of the tree is looked at here. The folders that are to be visited then are dealt out in
    batches, whose numbers stand in a pipe: whoever reads a number takes that batch, so that all
    are done at about the same time. What no helper answers for is looked at here, after all: of
    each folder one look counts, and what is wrong is always told by this process.
    """
    to_visit = look(tree, [""], before, found, until=ENOUGH)
    count = min(len(to_visit), A_BYTE)
    batches = [to_visit[n::count] for n in range(count)]
    missing = set(range(count))
    with suppress(OSError, subprocess.SubprocessError), ExitStack() as ending:
        queue = _dealt(batches, before, helpers, ending)
        started = [_helper(tree, *queue, ending) for _ in range(helpers if count > 1 else 0)]
        while (number := os.read(queue[0], 1)) != ALL_TAKEN:
            missing.discard(number[0] - 1)
            look(tree, batches[number[0] - 1], before, found)
        for helper in started:
            assert helper.stdout is not None
            with suppress(EOFError, ValueError, TypeError):  # it died: half an answer, or none
                covered, tables = marshal.loads(helper.stdout.read())
                found.add(tables)
                missing.difference_update(number - 1 for number in covered)
    for left in missing:
        look(tree, batches[left], before, found)


def _dealt(
    batches: list[list[str]], before: dict[str, Packed], helpers: int, ending: ExitStack
) -> tuple[int, BinaryIO]:
    """The pipe with the numbers, open as long as this process lives, and the file of the batches.

    A pipe holds so little at once that filling it can't block; a file has no such limit.
    """
    numbers, filling = os.pipe()
    ending.callback(os.close, numbers)
    ending.callback(os.close, filling)
    file = ending.enter_context(os.fdopen(os.memfd_create("batches"), "wb"))
    file.write(marshal.dumps((batches, before)))
    file.flush()
    os.write(filling, bytes(range(1, len(batches) + 1)) + ALL_TAKEN * (helpers + 1))
    return numbers, file


def _helper(
    tree: str, numbers: int, batches: BinaryIO, ending: ExitStack
) -> "subprocess.Popen[bytes]":
    """Another process that looks; it is gone when this one's look ends, however it ends."""
    # Not a fork: this process may hold much memory, and threads.
    process = subprocess.Popen(
        [
            *(sys.executable, "-I", "-S", "-X", "utf8", look_program.__file__),
            *(str(numbers), str(os.getpid()), tree),
        ],
        stdin=batches,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=[numbers],
    )
    ending.enter_context(process)
    ending.callback(process.kill)
    return process


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
