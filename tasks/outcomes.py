"""A final outcome on its way to the shared folder, and back from there.

A small one lies in its segment whole. A large one has a file of its own. A keyed job's is in its
commit record; the segment has the rest of what Celery keeps of it, and points there. Each payload
begins with a letter for the state, so that the index can be rebuilt without reading further.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errors import Damaged, Unavailable
from storage.directory import Directory
from storage.segments import Entry, Kind, read_large

OWN_FILE_FROM = 64 << 10
"""Bytes of an encoded outcome from which it has a file of its own."""
PUSHED_UP_TO = 1 << 20
"""Bytes up to which it is also held in Redis for a while and pushed to who waits."""

LETTERS: dict[str, bytes] = {"SUCCESS": b"S", "FAILURE": b"F", "REVOKED": b"R"}
CODES: dict[int, int] = {ord("S"): 1, ord("F"): 2, ord("R"): 3}
"""The same as the index knows them."""
_ELSEWHERE = b"\0cohort "
_LENGTH = struct.Struct("<I")

Decode = Callable[[bytes], Mapping[str, Any]]
Encode = Callable[[Any], bytes]


@dataclass(frozen=True)
class Outcome:
    """One state of one task, encoded as Celery keeps it. `expires` in seconds, 0 for never."""

    task_id: str
    state: str
    name: str
    meta: bytes
    expires: float
    reference: tuple[Kind, bytes] | None = None
    """Where the result lies if not in the segment: an entry's kind and payload."""

    @property
    def ends_at_ms(self) -> int:
        """When it may be dropped, in ms since the epoch; 0 for never."""
        return int((time.time() + self.expires) * 1000) if self.expires else 0

    @property
    def is_final(self) -> bool:
        """Whether it ends the task."""
        return self.state in LETTERS

    @property
    def wants_file(self) -> bool:
        """Whether it is too large for a segment and has no file yet."""
        return self.reference is None and len(self.meta) > OWN_FILE_FROM

    @property
    def pushed(self) -> bytes:
        """What Redis holds of it for a while: all of it, or where it lies."""
        if self.reference is None or len(self.meta) <= PUSHED_UP_TO:
            return self.meta
        kind, payload = self.reference
        return _ELSEWHERE + kind.encode() + b" " + payload

    def stored_in(self, path: str) -> Outcome:
        """The same, after its meta was written to that file below `segments/`."""
        where = {
            "path": path,
            "length": len(self.meta),
            "sha256": hashlib.sha256(self.meta).hexdigest(),
        }
        payload = LETTERS[self.state] + json.dumps(where).encode()
        return replace(self, reference=("large", payload))

    def entry(self) -> Entry:
        """As it goes into a segment."""
        kind, payload = self.reference or ("outcome", LETTERS[self.state] + self.meta)
        return Entry(kind, self.task_id, self.ends_at_ms, payload)


def pointer(state: str, key: str, n: int, brief: bytes) -> tuple[Kind, bytes]:
    """A reference to a commit record, with the task's meta without its result."""
    where = json.dumps({"key": key, "n": n}).encode()
    return "pointer", LETTERS[state] + _LENGTH.pack(len(where)) + where + brief


def is_elsewhere(pushed: bytes) -> tuple[Kind, bytes] | None:
    """The reference, if what Redis holds says only where the outcome lies."""
    if not pushed.startswith(_ELSEWHERE):
        return None
    kind, _, payload = pushed[len(_ELSEWHERE) :].partition(b" ")
    return ("pointer" if kind == b"pointer" else "large"), payload


def meta_of(root: Path, kind: Kind, payload: bytes, decode: Decode, encode: Encode) -> bytes | None:
    """The encoded meta that an entry holds or refers to; None if that was dropped meanwhile."""
    if kind == "outcome":
        return payload[1:]
    if kind == "large":
        return _from_file(root, json.loads(payload[1:]))
    length = _LENGTH.unpack_from(payload, 1)[0]
    begins = 1 + _LENGTH.size
    where = json.loads(payload[begins : begins + length])
    # Not `Directory.open`: a reader makes no folders.
    record = Directory(root, where["key"]).log.read(where["n"])
    return encode({**decode(payload[begins + length :]), "result": record.result})


def _from_file(root: Path, where: Mapping[str, Any]) -> bytes | None:
    meta = read_large(root, where["path"])
    if meta is None:
        return None
    if len(meta) != where["length"] or hashlib.sha256(meta).hexdigest() != where["sha256"]:
        raise Damaged(f"segments/{where['path']}: length or checksum of a large outcome is wrong")
    return meta


def needs_root(task_id: str) -> Unavailable:
    """What a process without the shared folder is told about an outcome that lies there."""
    return Unavailable(
        f"the result of task {task_id} lies on the shared folder, Redis holds it only for a while: "
        "set COHORT_ROOT to the path of its mount"
    )
