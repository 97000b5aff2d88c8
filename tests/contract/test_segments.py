"""Segments: what comes back, what a killed writer leaves, and what is damage instead."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from errors import Damaged, Refused, Unavailable
from storage import segments
from storage.segments import MAGIC, Entry, SegmentWriter, read

ENTRIES = [
    Entry("outcome", "task-1", 1_700_000_000_000, b'{"status": "SUCCESS"}'),
    Entry("pointer", "ü" * 50, 0, b""),
    Entry("journal", "task-3", 2**63, bytes(range(256)) * 10),
]


def written(root: Path, *batches: list[Entry]) -> Path:
    writer = SegmentWriter(root, "node-1", "start")
    for batch in batches:
        writer.append(batch)
    assert writer.path is not None
    return writer.path


def test_entries_come_back_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, ENTRIES[:1], [], ENTRIES[1:])
    assert path == tmp_path / "segments/node-1/start-1"
    segment = read(path)
    assert list(segment) == ENTRIES
    assert segment.torn_at is None


def test_nothing_is_made_before_the_first_entry(tmp_path: Path) -> None:
    SegmentWriter(tmp_path, "node-1", "start").append([])
    assert os.listdir(tmp_path) == []


def test_a_batch_is_one_write_and_one_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SegmentWriter(tmp_path, "node-1", "start")
    writer.append(ENTRIES)
    calls: list[str] = []
    for name in ("write", "fsync"):
        real = getattr(os, name)

        def noting(*args: Any, name: str = name, real: Any = real) -> Any:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, noting)
    writer.append(ENTRIES * 30)
    assert calls == ["write", "fsync"]


def test_a_full_segment_is_followed_by_the_next(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, "node-1", "start", roll_at=200)
    for _ in range(4):
        writer.append(ENTRIES[:1] * 2)
    folder = tmp_path / "segments/node-1"
    assert sorted(os.listdir(folder)) == [f"start-{n}" for n in (1, 2, 3, 4)]
    assert [entry for n in (1, 2, 3, 4) for entry in read(folder / f"start-{n}")] == ENTRIES[:1] * 8


def test_two_lives_of_a_node_share_no_segment(tmp_path: Path) -> None:
    one, two = (SegmentWriter(tmp_path, "node-1", start) for start in ("a", "b"))
    one.append(ENTRIES)
    two.append(ENTRIES)
    assert one.path != two.path


def test_another_writer_s_segment_is_never_written_to(tmp_path: Path) -> None:
    path = written(tmp_path, ENTRIES[:1])
    with pytest.raises(Unavailable, match="start-1: File exists"):
        written(tmp_path, ENTRIES[1:])
    assert list(read(path)) == ENTRIES[:1]


@pytest.mark.parametrize("cut", range(1, len(ENTRIES[0].encode())))
def test_a_torn_tail_is_cut_at_the_last_whole_entry_and_reported(cut: int, tmp_path: Path) -> None:
    path = written(tmp_path, ENTRIES[1:], ENTRIES[:1])
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    segment = read(path)
    assert list(segment) == ENTRIES[1:]
    assert segment.torn_at == len(data) - len(ENTRIES[0].encode())
    assert path.read_bytes() == data[:-cut]


def test_a_tail_of_zeros_or_with_a_hole_is_torn(tmp_path: Path) -> None:
    path = written(tmp_path, ENTRIES)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 500)
    segment = read(path)
    assert list(segment) == ENTRIES
    assert segment.torn_at == len(whole)
    path.write_bytes(whole[:-100] + b"\0" * 100)
    assert list(segment) == ENTRIES[:2]
    assert segment.torn_at == len(whole) - len(ENTRIES[2].encode())


@pytest.mark.parametrize("size", range(len(MAGIC) + 1))
def test_a_segment_whose_writer_died_at_its_birth_is_empty(size: int, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(MAGIC[:size])
    segment = read(tmp_path / "s")
    assert list(segment) == []
    assert segment.torn_at == (0 if 0 < size < len(MAGIC) else None)


@pytest.mark.parametrize("at", range(len(ENTRIES[0].encode())))
def test_any_wrong_byte_before_the_last_entry_is_damage(at: int, tmp_path: Path) -> None:
    path = written(tmp_path, ENTRIES)
    data = bytearray(path.read_bytes())
    data[len(MAGIC) + at] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(Damaged, match=f"start-1: the entry at byte {len(MAGIC)} has a wrong"):
        list(read(path))


def test_what_is_no_segment_is_reported_by_name(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(MAGIC.replace(b"1", b"2") + b"data")
    with pytest.raises(Damaged, match=r"/s: this is no segment, or of a format not known"):
        list(read(tmp_path / "s"))
    with pytest.raises(Damaged, match=r"/missing: the segment is missing"):
        list(read(tmp_path / "missing"))


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_after_a_full_disk_it_goes_on_in_the_next_segment(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SegmentWriter(tmp_path, "node-1", "start")
    writer.append(ENTRIES[:1])
    first = writer.path
    assert first is not None
    real = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data[: len(data) // 2])

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, half if call == "write" else full)
        with pytest.raises(Unavailable, match="node-1: No space left on device"):
            writer.append(ENTRIES[1:])
    before = first.read_bytes()
    writer.append(ENTRIES[1:])
    assert writer.path == first.with_name("start-2")
    assert first.read_bytes() == before
    assert list(read(first))[:1] == ENTRIES[:1]
    assert list(read(writer.path)) == ENTRIES[1:]


def test_an_entry_that_can_t_be_written_is_refused_before_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "LARGEST", 1000)
    with pytest.raises(Refused, match="larger than 1000 bytes"):
        SegmentWriter(tmp_path, "n", "s").append([Entry("outcome", "a", 0, b"x" * 1001)])
    with pytest.raises(Refused, match=r"node '\.\./x'"):
        SegmentWriter(tmp_path, "../x", "s")
    assert os.listdir(tmp_path) == []


def test_what_was_appended_survives_a_kill(tmp_path: Path) -> None:
    """All that it had said is there, and no more than it had tried."""
    script = (
        "import sys; from pathlib import Path; from storage.segments import Entry, SegmentWriter\n"
        "writer = SegmentWriter(Path(sys.argv[1]), 'node', 'start', roll_at=50_000)\n"
        "for n in range(10**9):\n"
        "    writer.append([Entry('outcome', str(n), 0, b'x' * 100 * (n % 50))])\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env={"PYTHONPATH": str(Path(segments.__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while int(process.stdout.readline()) < 60:
        pass
    process.send_signal(signal.SIGKILL)
    said = [int(line) for line in process.stdout.read().split("\n") if line]
    process.wait()
    process.stdout.close()
    last = max(said, default=60)
    files = (tmp_path / "segments/node").iterdir()
    ordered = sorted(files, key=lambda path: int(path.name.partition("-")[2]))
    found = [int(entry.id) for path in ordered for entry in read(path)]
    assert found in (list(range(last + 1)), list(range(last + 2)))
