"""Jobs that start processes, take memory, and don't end by themselves: for tests of limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tasks import Run, app, job
from tests.sample_jobs import wait_for_file

# A program with a child and with a daemon in a session of its own, whose parent has gone.
_FAMILY = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    if os.fork() == 0:
        os.setsid()
        if os.fork() > 0:
            os._exit(0)
    os.write(1, b"started\\n")
    time.sleep(600)
os.write(1, b"started\\n")
time.sleep(600)
"""
FAMILY = 3
"""How many processes of it live."""

_HUNGRY = """
import sys, time
eaten = []
while True:
    eaten.append(bytearray(10 << 20))
    time.sleep(0.02)
"""


def start_family(mark: str) -> None:
    """Three processes that carry the mark and ignore SIGTERM."""
    program = subprocess.Popen(
        [sys.executable, "-c", _FAMILY],
        env={**os.environ, "TEST_MARK": mark},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    for _ in range(FAMILY):
        assert program.stdout.readline() == "started\n"


def _start_stray() -> int:
    """One process more: it runs no program of its own, and leaves its session."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        time.sleep(600)
    return pid


def _stubborn(seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            time.sleep(0.05)
        except Exception:
            continue


@job(key="eat-{name}", memory="300 MiB", retries=2)
def eat(run: Run, name: str, mib: int, traces: str) -> int:
    """Takes so much memory, ten MiB at a time."""
    (Path(traces) / run.claim_id).touch()
    (run.directory / "eaten").touch()
    eaten = []
    for _ in range(mib // 10):
        eaten.append(bytearray(10 << 20))
        time.sleep(0.02)
    return len(eaten)


@job(memory="300 MiB", retries=2)
def eat_in_a_program(run: Run, mark: str) -> None:
    start_family(mark)
    subprocess.run([sys.executable, "-c", _HUNGRY], env={**os.environ, "TEST_MARK": mark})


@job(memory="300 MiB")
def share(run: Run, mib: int) -> int:
    """Five processes that hold the same memory: it is there but once."""
    shared = b"x" * (mib << 20)
    for _ in range(4):
        if os.fork() == 0:
            time.sleep(600)
    time.sleep(1)
    return len(shared) >> 20


@job
def eat_without_a_limit(run: Run) -> int:
    """More than the 512 MiB that a node keeps free for a job that says nothing."""
    eaten = bytearray(600 << 20)
    time.sleep(0.6)
    return len(eaten)


@job(key="family-{name}", timeout="1s")
def outlive(run: Run, name: str, mark: str, stray: str = "") -> None:
    """Outlives its timeout, with a family, and doesn't listen."""
    start_family(mark)
    if stray:
        Path(stray).write_text(str(_start_stray()))
    _stubborn()


@job(timeout="1s")
def outlive_keyless(run: Run, mark: str) -> None:
    start_family(mark)
    _stubborn()


@job(key="leave-{name}")
def leave_a_family(run: Run, name: str, mark: str, how: str = "return") -> int:
    """Returns, fails or dies, and leaves a family behind."""
    start_family(mark)
    if how == "fail":
        raise ValueError("on purpose")
    if how == "die" and run.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return run.attempt


@job(key="hold-{name}")
def hold_a_family(run: Run, name: str, mark: str, started: str, go: str) -> str:
    """Starts a family and one process more, which runs no program of its own, and waits."""
    start_family(mark)
    Path(started).write_text(str(_start_stray()))
    wait_for_file(go)
    return run.node


@app.task(name="tests.family_jobs.plain_family")  # type: ignore[untyped-decorator]
def plain_family(mark: str) -> int:
    """A plain Celery task may leave processes running, as it may anywhere."""
    start_family(mark)
    return os.getpid()


@job
def my_process(run: Run, wait: float = 0.0) -> int:
    time.sleep(wait)
    return os.getpid()
