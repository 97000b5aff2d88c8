"""The log of an attempt's output: what is written can be followed, whole, in order and bounded."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from errors import Damaged, Refused
from storage import logs
from storage.logs import LogReader, OutputLog
from tests.processes import wait_until


def news(reader: LogReader) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for log, data in reader.news():
        found[log.claim_id] = found.get(log.claim_id, b"") + data
    return found


def test_it_is_followed_while_it_grows(tmp_path: Path) -> None:
    log, reader = OutputLog(tmp_path, "task", 1, "claim-1"), LogReader(tmp_path, "task")
    assert news(reader) == {}
    log.write(b"one\n")
    log.write(b"\xff\0two")
    seen = b""

    def has_come() -> bool:
        nonlocal seen
        seen += news(reader).get("claim-1", b"")
        return seen == b"one\n\xff\0two"

    wait_until(has_come, 10)
    log.write(b" three")
    log.close()
    assert news(reader) == {"claim-1": b" three"}
    assert news(reader) == {}
    assert (tmp_path / "logs" / "task" / "0001-claim-1").read_bytes() == b"one\n\xff\0two three"


def test_attempts_are_told_apart_and_come_in_order(tmp_path: Path) -> None:
    for attempt, claim in ((2, "a"), (1, "z"), (10, "b")):
        log = OutputLog(tmp_path, "task", attempt, claim)
        log.write(claim.encode())
        log.close()
    reader = LogReader(tmp_path, "task")
    assert list(news(reader)) == ["z", "a", "b"]
    assert [log.attempt for log in reader.found] == [1, 2, 10]
    assert news(LogReader(tmp_path, "task", attempt=2)) == {"a": b"a"}


def test_nothing_said_leaves_no_file_and_nowhere_keeps_nothing(tmp_path: Path) -> None:
    OutputLog(tmp_path, "task", 1, "claim").close()
    nowhere = OutputLog.nowhere()
    nowhere.write(b"x")
    nowhere.close()
    assert list(tmp_path.iterdir()) == []


def test_a_task_id_that_leads_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="task id"):
        OutputLog(tmp_path, "../task", 1, "claim")
    with pytest.raises(Refused, match="task id"):
        LogReader(tmp_path, "..")


def test_what_is_no_log_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs" / "task").mkdir(parents=True)
    (tmp_path / "logs" / "task" / "stray").touch()
    with pytest.raises(Damaged, match="stray"):
        list(LogReader(tmp_path, "task").news())


def test_many_small_writes_are_few_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[float] = []
    real = os.fsync

    def fsync(file: int) -> None:
        flushes.append(time.monotonic())
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    begun = time.monotonic()
    log = OutputLog(tmp_path, "task", 1, "claim")
    lines = 0
    while time.monotonic() - begun < 1.0:
        log.write(b"a line\n")
        lines += 1
        time.sleep(0.001)
    log.close()
    assert lines > 100
    assert len(flushes) <= 1 / logs.INTERVAL + 3
    assert (tmp_path / "logs/task/0001-claim").stat().st_size == lines * 7


def test_a_writer_that_is_faster_than_the_file_system_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    real = os.write

    def slow(file: int, data: bytes) -> int:
        gate.wait()
        return real(file, data)

    monkeypatch.setattr("storage.durable.os.write", slow)
    log = OutputLog(tmp_path, "task", 1, "claim")
    handed = 0

    def write() -> None:
        nonlocal handed
        for _ in range(40):
            log.write(b"x" * (256 << 10))
            handed += 256 << 10

    writer = threading.Thread(target=write)
    writer.start()
    writer.join(0.7)
    assert writer.is_alive()
    assert handed <= 3 * logs.BATCH
    gate.set()
    writer.join(20)
    log.close()
    assert (tmp_path / "logs/task/0001-claim").stat().st_size == 40 * (256 << 10)


def test_a_full_disk_loses_output_says_so_and_harms_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = True
    real = os.write

    def write(file: int, data: bytes) -> int:
        if full:
            raise OSError(28, "No space left on device")
        return real(file, data)

    monkeypatch.setattr("storage.durable.os.write", write)
    log = OutputLog(tmp_path, "task", 1, "claim")
    log.write(b"x" * 5000)
    wait_until(lambda: log._lost == 5000, 10)
    full = False
    log.write(b"it goes on\n")
    log.close()
    said = (tmp_path / "logs/task/0001-claim").read_text()
    assert said == "\n[5,000 bytes of output were lost here: no room for them]\nit goes on\n"
