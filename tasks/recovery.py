"""What was lost with Redis, found again by reading the shared folder.

`reindex` tells Redis where every outcome lies. `recover` puts back every noted job that has no
outcome, is in no queue and runs on no node that lives. `drop_expired` removes what nobody may ask
for any more. Each may be interrupted at any point and begun again.

A segment is never changed. What its writer left unfinished at the end is reported and passed over.
Of two outcomes of one task, both on disk (the first one's node died before it could say so, and
Redis, which knew, is gone), the one in the segment that was written to last stands.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker import journal, nodes
from broker.index import Index
from broker.journal import Note
from broker.scripts import Scripts
from errors import Damaged
from storage import segments
from storage.segments import Place
from tasks.outcomes import CODES

Progress = Callable[[int, int], object]
_OUTCOMES = frozenset({"outcome", "pointer", "large"})
_LEAST_AGE = 2 * 86_400.0
"""Seconds; a writer begins a new segment when its last one is half as old."""


@dataclass
class Read:
    """What was read. Damaged and torn segments were read up to where that shows."""

    segments: int = 0
    torn: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


@dataclass
class Reindexed(Read):
    """What `reindex` did. `placed`: outcomes that Redis didn't know."""

    outcomes: int = 0
    placed: int = 0
    seconds: float = 0.0


@dataclass
class Recovered(Read):
    """What `recover` found among the notes, and the ids of the jobs that it put back."""

    noted: int = 0
    ended: int = 0
    running: int = 0
    waiting: int = 0
    put_back: list[str] = field(default_factory=list)


def reindex(root: Path, index: Index, progress: Progress = lambda done, total: None) -> Reindexed:
    """Put every outcome in the folder that hasn't expired into the index."""
    report, begun = Reindexed(), time.monotonic()
    now_ms = index.now_ms()
    paths = _newest_first(root)
    total, done = sum(size for _, size in paths), 0
    filling = index.fill()
    for path, size in paths:
        found = (
            (name, offset, length, CODES[letter], expires_ms)
            for kind, name, expires_ms, offset, length, letter in _scanned(path, report)
            if kind in _OUTCOMES and not 0 < expires_ms < now_ms
        )
        report.outcomes += filling.add(segments.name_of(path), found)
        done += size
        progress(done, total)
    filling.end()
    report.placed = filling.placed
    report.seconds = time.monotonic() - begun
    return report


def recover(
    root: Path,
    scripts: Scripts,
    keep: float,
    *,
    dry_run: bool = False,
    progress: Progress = lambda done, total: None,
) -> Recovered:
    """Put back what was noted and has no outcome, each job once."""
    report = Recovered()
    notes = _notes(root, report)
    report.noted = len(notes)
    live = {f"{info.node}/{info.life}" for info in nodes.list_nodes(scripts.client) if info.is_live}
    known = journal.jobs_in_redis(scripts.client)
    # Last: a job that was in Redis when its place was looked at may have ended since.
    ended = _ended(root, notes, progress)
    for task_id, (note, life) in notes.items():
        if task_id in ended:
            report.ended += 1
        elif life in live and not note.durable:
            report.running += 1
        elif task_id in known:
            report.waiting += 1
        elif dry_run:
            if journal.put_before(scripts.client, [note])[0]:
                report.waiting += 1
            else:
                report.put_back.append(task_id)
        elif journal.put_once(scripts, note, keep) == "there":
            report.waiting += 1
        else:
            report.put_back.append(task_id)
    return report


def drop_expired(root: Path, index: Index, keep: float) -> list[str]:
    """Remove the segments of which nobody may ask for anything any more, and their large files."""
    dropped = []
    now_ms = index.now_ms()
    for path, _ in _newest_first(root):
        # An outcome must outlast the notes of its job, or the job would seem never to have ended.
        if now_ms / 1000 - path.stat().st_mtime < max(keep, _LEAST_AGE):
            continue
        report = Read()
        if any(not 0 < expires_ms < now_ms for _, _, expires_ms, *_ in _scanned(path, report)):
            continue
        if report.damaged:
            continue  # A person must look.
        for entry in segments.read(path):
            if entry.kind == "large":
                segments.remove_large(root, entry.payload[1:])
        os.unlink(path)
        index.drop(segments.name_of(path))
        dropped.append(segments.name_of(path))
    return dropped


def _notes(root: Path, report: Read) -> dict[str, tuple[Note, str]]:
    """The last noted delivery of each job, and which life noted it; not those that are over."""
    notes: dict[str, tuple[Note, str]] = {}
    over: set[str] = set()
    for path, _ in _newest_first(root):
        life = segments.life_of(path)
        for kind, name, _, offset, length, _ in _scanned(path, report):
            if kind == "ended":
                over.add(name.decode())
            elif kind == "journal":
                entry = segments.read_at(root, Place(segments.name_of(path), offset, length))
                if entry is None:
                    continue
                note = Note.decode(entry.payload)
                known = notes.get(note.task_id)
                # Noted by its producer and by a node: the node's says whether it still runs.
                if known is None or note.retries >= known[0].retries:
                    notes[note.task_id] = (note, life)
    return {task_id: found for task_id, found in notes.items() if task_id not in over}


def _ended(root: Path, notes: Any, progress: Progress) -> set[str]:
    """Which of these have an outcome, also one that has expired since."""
    ended: set[str] = set()
    if not notes:
        return ended
    wanted = {task_id.encode() for task_id in notes}
    paths = _newest_first(root)
    total, done = sum(size for _, size in paths), 0
    for path, size in paths:
        for kind, name, *_ in _scanned(path, Read()):
            if name in wanted and (kind in _OUTCOMES or kind == "ended"):
                ended.add(name.decode())
        done += size
        progress(done, total)
    return ended


def _scanned(path: Path, report: Read) -> Iterator[segments.Found]:
    segment = segments.read(path)
    report.segments += 1
    try:
        yield from segment.scan()
    except Damaged as error:
        report.damaged.append(str(error))
    if segment.torn_at is not None:
        report.torn.append(f"{segments.name_of(path)} at byte {segment.torn_at}")


def _newest_first(root: Path) -> list[tuple[Path, int]]:
    """The segments, by when they were last written to, and their sizes."""
    found = []
    for path in segments.list_segments(root):
        try:
            about = path.stat()
        except FileNotFoundError:
            continue  # Dropped meanwhile.
        found.append((about.st_mtime_ns, path, about.st_size))
    return [(path, size) for _, path, size in sorted(found, reverse=True)]
