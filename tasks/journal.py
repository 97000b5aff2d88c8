"""What a producer notes on the shared folder before it puts a durable job into its queue.

Each process has a folder and segments of its own: `segments/producer-<node>-<process>/`. When the
note is on disk the job is accepted: it is found again if Redis loses it.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from broker.journal import Note
from errors import SettingsError
from storage.segments import Entry, SegmentWriter
from tasks.settings import current

_lock = threading.Lock()
_writers: dict[tuple[int, str], SegmentWriter] = {}


def entry_of(note: Note, keep: float) -> Entry:
    """A note as a segment holds it."""
    return Entry("journal", note.task_id, int((time.time() + keep) * 1000), note.encode())


def root_of(app: Any) -> Path:
    """The shared folder, which a durable job needs where it is submitted."""
    root = app.conf.get("cohort_root")
    if root is None:
        raise SettingsError(
            "durable=True notes the job on the shared folder before it is sent: set COHORT_ROOT "
            "to the path of its mount"
        )
    return Path(root)


def write_down(app: Any, note: Note) -> float:
    """Make a note durable. How long it is kept, in seconds."""
    root = root_of(app)
    keep = float(app.conf.get("cohort_journal_keep"))
    with _lock:
        # A forked child must not write to its parent's segment.
        mine = (os.getpid(), str(root))
        if mine not in _writers:
            start = uuid.uuid4().hex[:12]
            name = f"producer-{current().node}-{start}"
            _writers[mine] = SegmentWriter(root, name, start)
        _writers[mine].append([entry_of(note, keep)])
    return keep
