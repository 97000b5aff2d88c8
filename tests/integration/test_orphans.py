"""What a killed worker's jobs left running: the next start of that node ends it, and only it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.parts import Part
from tasks.family import look_at
from tests import family_jobs as jobs
from tests.fleets import running_fleet, wait_for
from tests.processes import marked
from workers.orphans import end_those_of_dead_lives

PROJECT = Path(__file__).resolve().parents[2]

# A worker of old: it leaves its mark, starts a program and a fork of its own, and waits.
LIFE = """
import os, subprocess, sys, time
from pathlib import Path
from workers.orphans import leave_mark
mark = leave_mark(Path(sys.argv[1]), sys.argv[2])
program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
fork = os.fork()
if fork == 0:
    os.setsid()
    time.sleep(600)
print(program.pid, fork, flush=True)
time.sleep(600)
"""


@pytest.fixture
def mark() -> Iterator[str]:
    mark = uuid.uuid4().hex
    yield mark
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)


class Life:
    """A main process of that node, and the two that it has started."""

    def __init__(self, scratch: Path, node: str, mark: str) -> None:
        self.main = subprocess.Popen(
            [sys.executable, "-c", LIFE, str(scratch), node],
            env={**os.environ, "PYTHONPATH": str(PROJECT), "TEST_MARK": mark},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.main.stdout is not None
        self.started = {int(word) for word in self.main.stdout.readline().split()}
        assert len(self.started) == 2

    def kill(self) -> None:
        self.main.kill()
        self.main.wait()


def test_only_what_a_dead_life_of_this_node_started_is_ended(tmp_path: Path, mark: str) -> None:
    dead, alive = Life(tmp_path, "node-1", mark), Life(tmp_path, "node-1", mark)
    of_another_node = Life(tmp_path, "node-2", mark)
    elsewhere = Life(tmp_path / "elsewhere", "node-1", mark)
    for life in (dead, of_another_node, elsewhere):
        life.kill()
    assert set(end_those_of_dead_lives(tmp_path, "node-1")) == dead.started
    assert marked(mark) == {
        *alive.started,
        alive.main.pid,
        *of_another_node.started,
        *elsewhere.started,
    }
    # What is over is looked for once.
    assert end_those_of_dead_lives(tmp_path, "node-1") == []
    alive.kill()
    assert set(end_those_of_dead_lives(tmp_path, "node-1")) == alive.started


def test_a_worker_that_comes_from_what_it_would_end_ends_the_rest(
    tmp_path: Path, mark: str
) -> None:
    """As after SIGHUP, on which Celery's worker becomes its successor, environment and all."""
    life = Life(tmp_path, "node-1", mark)
    life.kill()
    (name,) = (path.name for path in (tmp_path / "lives" / "node-1").iterdir())
    successor = (
        "import sys; from pathlib import Path; from workers.orphans import *;"
        "print(*end_those_of_dead_lives(Path(sys.argv[1]), 'node-1'))"
    )
    said = subprocess.run(
        [sys.executable, "-c", successor, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "CHILD_OF_COHORT_NODE": name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {int(word) for word in said.stdout.split()} == life.started


def is_alive(pid: int) -> bool:
    process = look_at(pid)
    return process is not None and process.lives


def leash_of(part: Part) -> int:
    process = look_at(part.pid)
    assert process is not None
    return process.parent


def test_the_next_start_ends_what_a_killed_worker_left(tmp_path: Path, mark: str) -> None:
    with running_fleet(tmp_path, nodes=1, COHORT_JOBS="tests.family_jobs") as producer:
        started, go = tmp_path / "started", tmp_path / "go"
        result = jobs.hold_a_family.delay("killed", mark, str(started), str(go))
        forked = int(wait_for(lambda: started.exists() and started.read_text(), "the run"))
        node = producer.fleet.node("node-1")
        # Its leash first, which would end everything: as a machine has none whose worker is
        # killed by hand or for want of memory. The main process dies with it, and then its pool.
        os.kill(leash_of(node), signal.SIGKILL)
        wait_for(lambda: not is_alive(node.pid), "the end of the worker")
        assert len(marked(mark)) == jobs.FAMILY
        assert is_alive(forked)
        left = marked(mark)
        node = producer.fleet.start_node("node-1")
        assert not left & marked(mark)
        assert not is_alive(forked)
        assert "ended 4 processes of this node's earlier life" in node.log.read_text()
        go.touch()
        assert result.get(timeout=30) == "node-1"
    assert list((tmp_path / "fleet" / "scratch" / "node-1" / "lives" / "node-1").iterdir()) == []
