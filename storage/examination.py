"""What the shared folder must do, tried out: by this node, and by two at once.

    for finding in examine(root, here, there):  ...

The folder that the tries are made in is removed at the end, whatever happened; one that a killed
examination left is removed by the next one a day later.
"""

from __future__ import annotations

import os
import secrets
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from errors import CohortError
from storage import durable, mount_options
from storage.finding import Finding, Verdict
from storage.halves import FOLDER, Half, Side, clock_offset, race
from storage.lateness import PATIENCE, Late
from storage.mount import LEAST_BYTES, LEAST_INODES

RACES = 60
_DAY = 86400.0
_LOW_BYTES, _LOW_INODES = 1 << 30, 10_000

SLOW_FROM = {
    "create, write, fsync, close": 0.025,
    "link": 0.015,
    "mkdir": 0.015,
    "read": 0.010,
    "list": 0.015,
}
"""From which p50, in seconds, an operation is called slow: about twice what EFS takes."""


@contextmanager
def examination_folder(root: Path) -> Iterator[str]:
    """A new folder for one examination, by name; gone afterwards."""
    _remove_old(root)
    name = f".examination-{secrets.token_hex(8)}"
    with durable.reporting(root):
        os.mkdir(root / name)
    try:
        yield name
    finally:
        shutil.rmtree(root / name, ignore_errors=True)


def examine(
    root: Path,
    here: Half,
    there: Side | None = None,
    *,
    patience: float = PATIENCE,
    tries: int = 50,
) -> Iterator[Finding]:
    """Every check, one after the other. Without another side, this node is both."""
    yield from mount_options.judge(mount_options.find(root))
    yield from _space(root)
    late = None
    if there is not None:
        same = _same_folder(here, there)
        yield same
        if same.verdict == "dangerous":
            return  # the other side has nothing to look at
        late = Late(here, there)  # begun first: these take a client's cache time
    other = there or here
    for how, what in RACED_FOR.items():
        yield _checked(what, partial(exclusive, here, other, how, what))
    yield _checked("close-to-open", partial(close_to_open, here, other))
    yield _checked("fsync", partial(_fsync, here, other))
    yield _checked("clock of the server", partial(_server_clock, here))
    if there is not None:
        yield _node_clock(here, there)
    yield from _latencies(here.folder, tries)
    if late is not None:
        yield from late.findings(patience)


RACED_FOR = {
    "link": "link-or-fail",
    "mkdir": "mkdir",
    "open": "create-or-fail (O_EXCL)",
}


def _checked(what: str, check: Callable[[], Finding]) -> Finding:
    """A check that can't be carried out is a finding too: the file system refused something."""
    try:
        return check()
    except (OSError, CohortError) as error:
        return Finding(what, "dangerous", f"it failed: {error}", "see that every node may write")


def exclusive(here: Side, there: Side, how: str, what: str) -> Finding:
    prefix = f"race-{how}"
    names = [f"{prefix}-{n}" for n in range(RACES)]
    ours, theirs = race(here, there, how, names, every=0.004)
    both = [n for n in range(RACES) if ours[n] and theirs[n]]
    if both:
        return Finding(
            what,
            "dangerous",
            f"both sides got {len(both)} of {RACES} names",
            "don't use this file system: two runs of a job could both commit",
        )
    for side in (here, there) if how == "link" else ():
        for n, holder in enumerate(side.do("read_all", names=names)):
            winner = here.name if ours[n] else there.name if theirs[n] else holder
            if holder is None or holder != winner:
                return Finding(
                    what,
                    "dangerous",
                    f"{side.name} finds {holder or 'nobody'} where {winner or 'nobody'} had won",
                    "don't use this file system: a commit could vanish",
                )
    neither = RACES - sum(ours) - sum(theirs)
    odd = f", {neither} whose reply was lost" if neither else ""
    return Finding(
        what, "fine", f"exclusive: {sum(ours)} names here, {sum(theirs)} there, none twice{odd}"
    )


def close_to_open(here: Side, there: Side) -> Finding:
    stale = 0
    for n in range(10):
        writer, reader = (here, there) if n % 2 else (there, here)
        text = f"round {n:04}"  # the same length each time: only its time tells that it changed
        writer.do("write", name="close-to-open", text=text)
        stale += reader.do("read", name="close-to-open") != text
    if stale:
        return Finding(
            "close-to-open",
            "dangerous",
            f"{stale} of 10 reads after the writer's close() gave old contents",
            "is it mounted with nocto? No mount option should be needed for this",
        )
    return Finding("close-to-open", "fine", "what one side closed, the other read, 10 of 10 times")


def _fsync(here: Half, there: Side) -> Finding:
    text, began = "x" * (1 << 20), time.perf_counter()
    here.do("create", name="large", text=text)
    took = time.perf_counter() - began
    if there.do("read", name="large") != text:
        return Finding("fsync", "dangerous", "1 MiB written and synced came back different")
    return Finding("fsync", "fine", f"1 MiB durable in {took * 1000:.0f} ms")


def _server_clock(here: Side) -> Finding:
    before = here.do("clock")
    stamp = here.do("write", name="clock", text="now")
    after = here.do("clock")
    # Within the two, the file's time may be anywhere: file clocks tick every few milliseconds.
    ahead = stamp - after if stamp > after else min(0.0, stamp - before + 0.02)
    return _clock_finding("clock of the server", ahead, "this node's")


def _node_clock(here: Side, there: Side) -> Finding:
    offset, known = clock_offset(here, there)
    ahead = 0.0 if abs(offset) <= known else offset
    return _clock_finding(f"clock of {there.name}", ahead, "this node's")


def _clock_finding(what: str, ahead: float, whose: str) -> Finding:
    verdict: Verdict = "fine" if abs(ahead) <= 1 else "slow" if abs(ahead) <= 300 else "dangerous"
    advice = (
        "run chrony or systemd-timesyncd: programs such as make compare times that different "
        "nodes gave, and AWS refuses requests five minutes off"
    )
    direction = "ahead of" if ahead >= 0 else "behind"
    return Finding(
        what,
        verdict,
        f"{abs(ahead):.3f} s {direction} {whose}",
        "" if verdict == "fine" else advice,
    )


def _space(root: Path) -> Iterator[Finding]:
    space = os.statvfs(root)
    free = space.f_bavail * space.f_frsize
    verdict: Verdict = (
        "dangerous" if free < LEAST_BYTES else "slow" if free < _LOW_BYTES else "fine"
    )
    advice = "make room: `./cohort gc`, or a larger file system"
    yield Finding(
        "free space",
        verdict,
        "as much as is paid for" if free >= 1 << 60 else f"{free / 2**30:,.1f} GiB",
        "" if verdict == "fine" else advice,
    )
    if not space.f_files:
        yield Finding("free inodes", "fine", "it doesn't count them")
        return
    left = space.f_favail
    verdict = "dangerous" if left < LEAST_INODES else "slow" if left < _LOW_INODES else "fine"
    yield Finding("free inodes", verdict, f"{left:,}", "" if verdict == "fine" else advice)


def _same_folder(here: Side, there: Side) -> Finding:
    if there.do("is_there"):
        return Finding("the same folder", "fine", f"{there.name} sees what {here.name} made")
    return Finding(
        "the same folder",
        "dangerous",
        f"{there.name} doesn't see what {here.name} made: it has something else mounted",
        "mount the same file system on every node",
    )


def _latencies(folder: Path, tries: int) -> Iterator[Finding]:
    bench = folder / "latency"
    os.mkdir(bench)
    for n in range(tries):
        os.mkdir(bench / f"list-{n}")
    operations: dict[str, Callable[[int], object]] = {
        "create, write, fsync, close": lambda n: _write_synced(bench / f"file-{n}"),
        "link": lambda n: os.link(bench / "file-0", bench / f"link-{n}"),
        "mkdir": lambda n: os.mkdir(bench / f"folder-{n}"),
        "read": lambda n: (bench / f"file-{n}").read_bytes(),
        "list": lambda n: os.listdir(bench / f"list-{n}"),
    }
    for name, operation in operations.items():
        yield _checked(f"time to {name}", partial(_time, name, operation, tries))


def _time(name: str, operation: Callable[[int], object], tries: int) -> Finding:
    spans = []
    for n in range(tries):
        began = time.perf_counter()
        operation(n)
        spans.append(time.perf_counter() - began)
    middle = statistics.median(spans)
    high = sorted(spans)[min(tries - 1, round(tries * 0.99))]
    slow = middle > SLOW_FROM[name]
    return Finding(
        f"time to {name}",
        "slow" if slow else "fine",
        f"p50 {middle * 1000:.2f} ms, p99 {high * 1000:.2f} ms of {tries}",
        f"up to {SLOW_FROM[name] * 1000:.0f} ms is usual" if slow else "",
    )


def _write_synced(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        durable.write_all(file, b"x" * 100)
        os.fsync(file)
    finally:
        os.close(file)


def _remove_old(root: Path) -> None:
    with suppress(OSError, CohortError):
        for entry in durable.entries(root):
            if FOLDER.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > _DAY:
                shutil.rmtree(entry.path, ignore_errors=True)
