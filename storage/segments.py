"""A node's outcomes on the shared file system: files that only grow, each with one writer, ever.

    <root>/segments/<node>/<start>-<seq>

A segment starts with a line that names the format; then come entries, each

    length of the body u32 | CRC32 of the body u32 | CRC32 of these eight bytes u32
    kind u8 | expiry in ms since 1970 u64 (0: never) | length of the id u16 | id | payload

Promises: what `append` returned from is durable. What it didn't return from may be there or not,
whole or torn at the end. Nothing is ever truncated or rewritten: after an error the writer leaves
the torn segment behind and goes on in the next one. A payload that is large for a segment lies in
a file of its own, `segments/<node>/large/<start>-<number>`, which an entry refers to.
"""

import itertools
import json
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from errors import Damaged, Refused
from storage import durable, sealed
from storage.keys import check_name

MAGIC = b"cohort segment 1\n"
ROLL_AT = 64 << 20
ROLL_AFTER = 86_400.0  # seconds without an append: one that looks abandoned may be removed
LARGEST = 1 << 30  # payload of an entry
_HEAD = struct.Struct("<II")
_GUARD = struct.Struct("<I")
_BODY = struct.Struct("<BQH")
_WHOLE_HEAD = _HEAD.size + _GUARD.size
_ALL = struct.Struct("<IIIBQH")  # head and guard, 12 bytes, and the body up to the id, 11
_FOLDER_OF_LARGE = "large"


# An outcome; a pointer to a keyed job's commit record; a job that was claimed or submitted, to be
# found again without Redis; a reference to a large outcome's file; a job that ended and leaves no
# outcome. The number is the kind's place in here, from 1 on: only ever append.
Kind = Literal["outcome", "pointer", "journal", "large", "ended"]
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


class Place(NamedTuple):
    """Where an entry lies: the segment's name below `segments/`, and its bytes in there."""

    segment: str
    offset: int
    length: int


Found = tuple[Kind, bytes, int, int, int, int]
"""What a fast look at an entry tells: kind, id, expiry in ms, offset, length, and the first byte of
its payload (0: it has none). A plain tuple, for speed."""


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
        self._large = itertools.count(1)
        self._last_append = time.monotonic()

    def append(self, entries: Sequence[Entry]) -> list[Place]:
        """Make the entries durable, all in one write. `Unavailable`: they may be appended again."""
        encoded = [entry.encode() for entry in entries]
        data = b"".join(encoded)
        if not data:
            return []
        idle = time.monotonic() - self._last_append
        if self.path is None or self._length + len(data) > self._roll_at or idle > ROLL_AFTER:
            self.close()
            self._open_next()
        self._last_append = time.monotonic()
        try:
            with durable.reporting(self.folder):
                durable.write_all(self._file, data)
                os.fsync(self._file)
        except BaseException:
            self.close()  # what is at the end is torn or unknown: nothing may follow it
            raise
        assert self.path is not None
        name, places = f"{self.folder.name}/{self.path.name}", []
        for entry in encoded:
            places.append(Place(name, self._length, len(entry)))
            self._length += len(entry)
        return places

    def store_large(self, payload: bytes) -> str:
        """A payload in a durable file of its own: its path below `segments/`. Any thread may."""
        folder = self.folder / _FOLDER_OF_LARGE
        for path in (self.folder.parent, self.folder, folder):
            durable.make_directory(path)
        path = folder / f"{self.start}-{next(self._large)}"
        durable.create(path, payload)
        return f"{self.folder.name}/{_FOLDER_OF_LARGE}/{path.name}"

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
        data = self._load()
        for _, _, _, at, length, _ in self._scan(data):
            yield _decode(self.path, data[at + _WHOLE_HEAD : at + length], at)

    def scan(self) -> Iterator[Found]:
        """Where each entry lies and what it is, a few times faster than reading them all."""
        return self._scan(self._load())

    def _load(self) -> bytes:
        data = durable.read(self.path)
        if data is None:
            sealed.damaged(self.path, "the segment is missing")
        if not data.startswith(MAGIC[: len(data)]):
            sealed.damaged(self.path, "this is no segment, or of a format not known here")
        return data

    def _scan(self, data: bytes) -> Iterator[Found]:
        self.torn_at = None
        if len(data) < len(MAGIC):
            self.torn_at = 0 if data else None
            return
        # Written for speed: after a loss of Redis a million of these stand between it and work.
        at, size, crc, unpack, known = (
            len(MAGIC),
            len(data),
            zlib.crc32,
            _ALL.unpack_from,
            len(_KINDS),
        )
        while at < size:
            end = payload = number = expires_ms = 0
            if at + 23 <= size:
                length, checksum, guard, number, expires_ms, name = unpack(data, at)
                end = at + 12 + length
                payload = at + 23 + name
                if (
                    payload > end
                    or end > size
                    or crc(data[at : at + 8]) != guard
                    or crc(data[at + 12 : end]) != checksum
                    or not 1 <= number <= known
                ):
                    end = 0
            if not end:
                whole = self._end_of_entry(data, at)
                if whole is None:
                    self.torn_at = at
                    return
                _decode(self.path, data[at + _WHOLE_HEAD : whole], at)
                raise AssertionError("an entry that can be read was looked at the slow way")
            first = data[payload] if payload < end else 0
            yield _KINDS[number - 1], data[at + 23 : payload], expires_ms, at, end - at, first
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


def _decode(path: Path, body: bytes, at: int) -> Entry:
    try:
        kind, expires_ms, length = _BODY.unpack_from(body)
        payload_at = _BODY.size + length
        name = body[_BODY.size : payload_at].decode("utf-8", "surrogateescape")
        if not 1 <= kind <= len(_KINDS):
            raise ValueError(f"kind {kind} isn't known here")
        if payload_at > len(body):
            raise ValueError("its id is longer than the entry")
        return Entry(_KINDS[kind - 1], name, expires_ms, body[payload_at:])
    except (struct.error, ValueError) as error:
        sealed.damaged(path, f"the entry at byte {at} can't be read: {error}")


def read(path: Path) -> Segment:
    """The entries of a segment: `for entry in read(path)`."""
    return Segment(path)


def read_at(root: Path, place: Place) -> Entry | None:
    """One entry, by a single read; None if its segment is gone. Opened anew each time: a held
    descriptor of a file that another node appends to may never see the end of it."""
    path = root / "segments" / place.segment
    data = durable.read_part(path, place.offset, place.length)
    if data is None:
        return None
    body = data[_WHOLE_HEAD:]
    head = data[: _HEAD.size]
    if (
        len(data) != place.length
        or _GUARD.pack(zlib.crc32(head)) != data[_HEAD.size : _WHOLE_HEAD]
        or _HEAD.unpack(head) != (len(body), zlib.crc32(body))
    ):
        raise Damaged(f"{path}: there is no whole entry at byte {place.offset}")
    return _decode(path, body, place.offset)


def read_large(root: Path, path: str) -> bytes | None:
    """What `store_large` stored; None if it is gone."""
    return durable.read(root / "segments" / path)


def remove_large(root: Path, reference: bytes) -> None:
    """Remove what `store_large` stored, by the entry that refers to it."""
    with suppress(FileNotFoundError):
        os.unlink(root / "segments" / json.loads(reference)["path"])


def list_segments(root: Path) -> list[Path]:
    """Every segment in the shared folder."""
    found = []
    for node in durable.entries(root / "segments"):
        if node.is_dir(follow_symlinks=False):
            found += [
                Path(entry.path)
                for entry in durable.entries(Path(node.path))
                if entry.is_file(follow_symlinks=False) and "-" in entry.name
            ]
    return found


def name_of(path: Path) -> str:
    """A segment's name below `segments/`."""
    return f"{path.parent.name}/{path.name}"


def life_of(path: Path) -> str:
    """Which life of its writer a segment belongs to: `<node>/<start>`."""
    return f"{path.parent.name}/{path.name.rpartition('-')[0]}"
