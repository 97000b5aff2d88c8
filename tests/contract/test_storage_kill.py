"""A real process is killed by SIGKILL at each step of a commit: files and outcome old or new."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import crashpoints
from storage.directory import Directory
from tests.storage_kit import contents, run, write

RUN = """
import sys
from pathlib import Path
from storage.directory import Directory, conclude_for
from storage.worktree import WorkTree

root, scratch, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if what == "conclude":
    conclude_for(root, "k", "t2", "c", "FAILURE", "lost", 1, "node")
else:
    directory = Directory.open(root, "k")
    attempt = directory.begin("t2", "c", directory.head())
    tree = WorkTree(scratch, "k", "c")
    tree.checkout(directory, attempt.base)
    (tree.path / "a").write_text("new")
    (tree.path / "b").write_text("new")
    attempt.commit(tree, {"rows": 2}, attempt=1, node="node")
"""
OURS = sorted(p for p in crashpoints.POINTS if p.startswith(("run:", "commit:")))
COMMITTED = {"commit:after-link", "commit:head-written"}
WITH_FILES = {"commit:file-written", "commit:files-written", "commit:manifest-written"}


def run_to_the(point: str, what: str, tmp_path: Path) -> int:
    """The exit status of a process that does one thing; it meets an armed point only once."""
    armed = tmp_path / "armed"
    if not armed.exists():
        armed.mkdir()
        (armed / point).touch()
    environment = {
        "PYTHONPATH": str(Path(crashpoints.__file__).parent),
        "COHORT_CRASH": str(armed),
    }
    command = [sys.executable, "-c", RUN, str(tmp_path / "root"), str(tmp_path / "scratch"), what]
    return subprocess.run(command, env=environment, check=False).returncode


@pytest.mark.parametrize("point", OURS)
def test_a_killed_commit_is_whole_or_nothing(point: str, tmp_path: Path) -> None:
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    root.mkdir()
    run(root, scratch, "t1", write("a", "old"))
    assert run_to_the(point, "commit", tmp_path) == -signal.SIGKILL
    directory = Directory.open(root, "k")
    outcome = directory.outcome_of("t2")
    if point in COMMITTED:
        assert outcome is not None and outcome.result == {"rows": 2}
        assert contents(directory.head()) == {"a": b"new", "b": b"new"}
    else:
        assert outcome is None
        assert contents(directory.head()) == {"a": b"old"}
    again = run(root, scratch, "t2", write("c", "again"), claim_id="second")
    assert again.n == directory.head().n == 2
    assert ("c" in contents(directory.head())) == (point not in COMMITTED)
    assert all(os.stat(directory.log.path(n)).st_nlink == 2 for n in (1, 2))


@pytest.mark.parametrize("point", sorted(set(OURS) - WITH_FILES))
def test_a_killed_conclusion_is_recorded_or_not_and_can_be_repeated(
    point: str, tmp_path: Path
) -> None:
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    root.mkdir()
    run(root, scratch, "t1", write("a", "old"))
    assert run_to_the(point, "conclude", tmp_path) == -signal.SIGKILL
    directory = Directory.open(root, "k")
    assert (directory.outcome_of("t2") is not None) == (point in COMMITTED)
    assert run_to_the(point, "conclude", tmp_path) == 0
    assert [(r.n, r.task_id) for r in directory.versions()] == [(1, "t1"), (2, "t2")]
    assert contents(directory.head()) == {"a": b"old"}
