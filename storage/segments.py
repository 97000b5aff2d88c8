"""A node's outcomes on the shared file system: files that only grow, each with one writer, ever.

    <root>/segments/<node>/<start>-<seq>

A segment starts with a line that names the format; then come entries, each

    length of the body u32 | CRC32 of the body u32 | CRC32 of these eight bytes u32
    kind u8 | expiry in ms since 1970 u64 (0: never) | length of the id u16 | id | payload

Promises: what `append` returned from is durable. What it didn't return from may be there or not,
whole or torn at the end. Nothing is ever truncated or rewritten: after an error the writer leaves
the torn segment behind and goes on in the next one.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from errors import Refused
from storage import durable, sealed
from storage.keys import check_name

MAGIC = b"cohort segment 1\n"
ROLL_AT = 64 << 20
LARGEST = 1 << 30  # payload of an entry
_HEAD = struct.Struct("<II")
_GUARD = struct.Struct("<I")
_BODY = struct.Struct("<BQH")
_WHOLE_HEAD = _HEAD.size + _GUARD.size


# An outcome; a pointer to a keyed job's commit record; a job that was claimed or submitted, to be
# found again without Redis. The number is the kind's place in here, from 1 on: only ever append.
Kind = Literal["outcome", "pointer", "journal"]
_KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Entry:
    kind: Kind
    id: str
    expires_ms: int
    payload: bytes

    def encode(self) -> bytes:
        name = self.id.encode("utf-8", "surrogateescape")
        if len(name) > 0xFFFF or len(self.payload) > LARGEST:
            raise Refused(f"the entry {self.id[:40]!r} is larger than {LARGEST} bytes")
        body = (
            _BODY.pack(_KINDS.index(self.kind) + 1, self.expires_ms, len(name))
            + name
            + self.payload
        )
        head = _HEAD.pack(len(body), zlib.crc32(body))
        return head + _GUARD.pack(zlib.crc32(head)) + body


class SegmentWriter:
    """The one writer of a node's segments for one life of its worker (`start` names that life).

    Used by one thread. No file is made before the first entry.
    """

    def __init__(self, root: Path, node: str, start: str, roll_at: int = ROLL_AT):
        self.folder = root / "segments" / check_name("node", node)
        self.start = check_name("start", start)
        self.path: Path | None = None
        """The segment that is being written."""
        self._roll_at = roll_at
        self._file = -1
        self._length = 0
        self._seq = 0

    def append(self, entries: Sequence[Entry]) -> None:
        """Make the entries durable, all in one write. `Unavailable`: they may be appended again."""
        data = b"".join(entry.encode() for entry in entries)
        if not data:
            return
        if self.path is None or self._length + len(data) > self._roll_at:
            self.close()
            self._open_next()
        try:
            with durable.reporting(self.folder):
                durable.write_all(self._file, data)
                os.fsync(self._file)
        except BaseException:
            self.close()  # what is at the end is torn or unknown: nothing may follow it
            raise
        self._length += len(data)

    def close(self) -> None:
        if self.path is not None:
            with suppress(OSError):
                os.close(self._file)
        self.path, self._file = None, -1

    def _open_next(self) -> None:
        durable.make_directory(self.folder.parent)
        durable.make_directory(self.folder)
        self._seq += 1
        path = self.folder / f"{self.start}-{self._seq}"
        durable.create(path, MAGIC)
        with durable.reporting(path):
            # Not O_APPEND: with one writer it adds nothing, and on NFS it promises nothing.
            self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            self._length = os.lseek(self._file, 0, os.SEEK_END)
        self.path = path


class Segment:
    """The entries of one segment, in order, by iterating.

    After the last one `torn_at` is None, or the offset of an entry that was never finished: normal
    after its writer was killed. An entry that is wrong and isn't the last is `Damaged`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.torn_at: int | None = None

    def __iter__(self) -> Iterator[Entry]:
        self.torn_at = None
        data = durable.read(self.path)
        if data is None:
            sealed.damaged(self.path, "the segment is missing")
        if not data.startswith(MAGIC[: len(data)]):
            sealed.damaged(self.path, "this is no segment, or of a format not known here")
        if len(data) < len(MAGIC):
            self.torn_at = 0 if data else None
            return
        at = len(MAGIC)
        while at < len(data):
            end = self._end_of_entry(data, at)
            if end is None:
                self.torn_at = at
                return
            yield self._decode(data[at + _WHOLE_HEAD : end], at)
            at = end

    def _end_of_entry(self, data: bytes, at: int) -> int | None:
        """Where the entry at `at` ends if it is whole; None if it is the torn tail."""
        body_at = at + _WHOLE_HEAD
        if body_at > len(data):
            return None
        head = data[at : at + _HEAD.size]
        # The head vouches for itself: else a wrong length would make all that follows a "tail".
        if _GUARD.pack(zlib.crc32(head)) != data[at + _HEAD.size : body_at]:
            if not any(data[at:]):
                return None  # a length that became durable before its bytes
            sealed.damaged(self.path, f"the entry at byte {at} has a wrong length")
        length, checksum = _HEAD.unpack(head)
        end: int = body_at + length
        if end > len(data):
            return None
        if zlib.crc32(data[body_at:end]) != checksum:
            if end == len(data):
                return None
            sealed.damaged(self.path, f"the entry at byte {at} has a wrong checksum")
        return end

    def _decode(self, body: bytes, at: int) -> Entry:
        try:
            kind, expires_ms, length = _BODY.unpack_from(body)
            payload_at = _BODY.size + length
            name = body[_BODY.size : payload_at].decode("utf-8", "surrogateescape")
            if not 1 <= kind <= len(_KINDS):
                raise ValueError(f"kind {kind} isn't known here")
            return Entry(_KINDS[kind - 1], name, expires_ms, body[payload_at:])
        except (struct.error, ValueError) as error:
            sealed.damaged(self.path, f"the entry at byte {at} can't be read: {error}")


def read(path: Path) -> Segment:
    """The entries of a segment: `for entry in read(path)`."""
    return Segment(path)
