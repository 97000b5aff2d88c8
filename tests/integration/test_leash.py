"""The leash: whoever dies first, nothing of a part stays behind. Real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.parts import Part
from errors import Unavailable
from tests.processes import marked, wait_until

PROJECT = Path(__file__).resolve().parents[2]

# A process with a child, a grandchild, and a daemon in a session of its own.
FAMILY = """
import os, signal, sys, time
stubborn = "stubborn" in sys.argv
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        if os.fork() > 0:
            os._exit(0)
    print("started", flush=True)
    time.sleep(600)
print("started", flush=True)
time.sleep(600)
"""


@pytest.fixture
def mark() -> Iterator[str]:
    mark = uuid.uuid4().hex
    yield mark
    left = marked(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def family(mark: str, folder: Path, *words: str, grace: float = 10) -> Part:
    command = [sys.executable, "-c", FAMILY, *words]
    part = Part("family", command, {**os.environ, "TEST_MARK": mark}, folder / "log", grace)
    part.wait_until(lambda: part.log.read_text().count("started") == 3, 30, "complete")
    # The leash, the process, its child and the daemon.
    assert len(marked(mark)) == 4
    return part


def test_the_end_of_a_part_ends_its_daemons(mark: str, tmp_path: Path) -> None:
    part = family(mark, tmp_path)
    part.terminate()
    assert part.wait(30) == 128 + signal.SIGTERM
    assert marked(mark) == set()


def test_a_part_that_ignores_sigterm_is_killed_after_its_grace(mark: str, tmp_path: Path) -> None:
    part = family(mark, tmp_path, "stubborn", grace=0.3)
    before = time.monotonic()
    part.terminate()
    assert part.wait(30) == 128 + signal.SIGKILL
    assert time.monotonic() - before >= 0.3
    assert marked(mark) == set()


def test_a_killed_part_leaves_nothing(mark: str, tmp_path: Path) -> None:
    part = family(mark, tmp_path)
    part.kill()
    assert part.exit_code == 128 + signal.SIGKILL
    assert marked(mark) == set()


def test_a_part_whose_process_ends_leaves_no_children(mark: str, tmp_path: Path) -> None:
    part = family(mark, tmp_path)
    os.kill(part.pid, signal.SIGKILL)
    assert part.wait(30) == 128 + signal.SIGKILL
    assert marked(mark) == set()


def test_a_killed_leash_takes_its_process_group_along(mark: str, tmp_path: Path) -> None:
    part = Part(
        "pair",
        ["sh", "-c", "sleep 600 & echo started; sleep 600"],
        {**os.environ, "TEST_MARK": mark},
        tmp_path / "log",
    )
    part.wait_until(lambda: "started" in part.log.read_text(), 30, "started")
    (leash,) = {pid for pid in marked(mark) if pid != part.pid and b"leash" in cmdline(pid)}
    os.kill(leash, signal.SIGKILL)
    # The part's own process falls without anybody's help, the rest with its owner's.
    wait_until(lambda: part.pid not in marked(mark))
    assert marked(mark) != set()
    wait_until(lambda: not part.is_running)
    wait_until(lambda: marked(mark) == set())


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_paused_part_stands_still_as_a_whole_and_goes_on(mark: str, tmp_path: Path) -> None:
    part = family(mark, tmp_path)
    below = {pid for pid in marked(mark) if b"leash.py" not in cmdline(pid)}
    part.pause()
    wait_until(lambda: {state(pid) for pid in below} == {"T"})
    part.resume()
    wait_until(lambda: "T" not in {state(pid) for pid in below})
    part.pause()
    part.terminate()
    assert part.wait(30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("word", ["", "stubborn"])
def test_a_part_does_not_outlive_its_owner(
    mark: str, tmp_path: Path, number: signal.Signals, word: str
) -> None:
    script = f"""
import os, signal, sys
from pathlib import Path
from deploy.parts import Part
command = [sys.executable, "-c", {FAMILY!r}, {word!r}]
part = Part("family", command, os.environ, Path({str(tmp_path)!r}, "log"))
signal.pause()
"""
    environ = {**os.environ, "TEST_MARK": mark, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen([sys.executable, "-c", script], env=environ) as owner:
        log = tmp_path / "log"
        wait_until(lambda: log.exists() and log.read_text().count("started") == 3)
        owner.send_signal(number)
        owner.wait(30)
    wait_until(lambda: marked(mark) == set(), timeout=10)


def test_an_order_to_end_is_never_lost_however_early_it_comes(mark: str, tmp_path: Path) -> None:
    before = time.monotonic()
    for _ in range(20):
        part = Part(
            "brief", ["sleep", "600"], {**os.environ, "TEST_MARK": mark}, tmp_path / "log", 60
        )
        os.kill(part.pid, signal.SIGTERM)
        assert part.wait(30) == 128 + signal.SIGTERM
    assert time.monotonic() - before < 30


def test_a_part_that_ends_before_it_is_ready_is_told_with_its_log(
    mark: str, tmp_path: Path
) -> None:
    command = ["sh", "-c", "echo the reason; exit 3"]
    part = Part("hasty", command, {**os.environ, "TEST_MARK": mark}, tmp_path / "log")
    with pytest.raises(Unavailable, match=r"hasty ended with exit code 3 before ready\n.*\nthe re"):
        part.wait_until(lambda: False, 30, "ready")


def test_a_command_that_is_absent_is_told(mark: str, tmp_path: Path) -> None:
    part = Part("absent", ["/no/such"], {**os.environ, "TEST_MARK": mark}, tmp_path / "log")
    with pytest.raises(Unavailable, match=r"/no/such: No such file"):
        part.wait_until(lambda: False, 30, "ready")
