"""`./cohort gc` on a real folder: it says what would go and why, and removes just that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage import logs
from storage.directory import Directory
from storage.worktree import WorkTree


def gc(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "gc", *words],
        env={**os.environ, "COHORT_ROOT": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five versions of one key, each with a file of its own size; a log from long ago."""
    root = tmp_path / "root"
    root.mkdir()
    for n in range(1, 6):
        directory = Directory.open(root, "report")
        attempt = directory.begin(f"task-{n}", "claim", directory.head())
        tree = WorkTree(tmp_path / "scratch", "report", "claim")
        tree.checkout(directory, attempt.base)
        (tree.path / "data").write_bytes(os.urandom(100_000 + n))
        attempt.commit(tree, None, attempt=1, node="n")
        tree.release()
    old = logs.folder_of(root, "task-1") / "0001-claim"
    old.parent.mkdir(parents=True)
    old.write_text("said\n")
    os.utime(old, (1, 1))
    return root


def held(root: Path) -> set[str]:
    return {str(path) for path in root.rglob("*") if path.is_file()}


def test_a_dry_run_tells_and_removes_nothing(root: Path) -> None:
    before = held(root)
    said = gc(root, "--dry-run", "--json", "--keep", "2", "--max-age", "1ms")
    assert said.returncode == 0, said.stderr
    lines = [json.loads(line) for line in said.stdout.splitlines()]
    assert sum(line["bytes"] for line in lines if "/jobs/" in line["path"]) > 300_000
    assert all(line["why"] for line in lines)
    assert held(root) == before


def test_what_was_told_goes_and_the_rest_stays_readable(root: Path, tmp_path: Path) -> None:
    told = gc(root, "--dry-run", "--json", "--keep", "2", "--max-age", "1ms")
    would_go = {json.loads(line)["path"] for line in told.stdout.splitlines()}
    before = held(root)
    done = gc(root, "--keep", "2", "--max-age", "1ms")
    assert done.returncode == 0, done.stderr
    assert before - held(root) == would_go
    directory = Directory.open(root, "report")
    for n in (4, 5):
        tree = WorkTree(tmp_path / "look", "report", f"look-{n}")
        tree.checkout(directory, directory.version(n))
        assert (tree.path / "data").stat().st_size == 100_000 + n
        tree.remove()
    assert [record.n for record in directory.versions()] == [1, 2, 3, 4, 5]


def test_young_versions_and_logs_stay(root: Path) -> None:
    before = held(root)
    done = gc(root, "--keep", "1")
    assert {Path(path).parent.parent.name for path in before - held(root)} == {"logs"}
    assert "1 files" in done.stderr


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    done = gc(tmp_path / "missing")
    assert done.returncode == 1
    assert "COHORT_ROOT" in done.stderr
