"""Any version of a job's directory, from anywhere that has the shared folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import InvalidKey, Refused
from storage import directory
from storage.worktree import WorkTree
from tasks import Directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    for n in (1, 2):
        written = directory.Directory.open(root, "report")
        attempt = written.begin(f"task-{n}", "claim", written.head())
        tree = WorkTree(tmp_path / "scratch", "report", "claim")
        tree.checkout(written, attempt.base)
        (tree.path / "n").write_text(str(n))
        attempt.commit(tree, None, attempt=1, node="n")
        tree.release()
    return root


def test_the_newest_and_any_other(root: Path) -> None:
    assert Directory.open("report", root=root).read("n") == b"2"
    assert Directory.open("report", 1, root=root).read("n") == b"1"
    assert dict(Directory.open("report", 0, root=root).entries) == {}


def test_what_is_not_there(root: Path) -> None:
    with pytest.raises(Refused, match="no job directory 'other'"):
        Directory.open("other", root=root)
    assert not (root / "jobs" / "other").exists()
    with pytest.raises(Refused, match="no version 3; its newest is 2"):
        Directory.open("report", 3, root=root)
    with pytest.raises(InvalidKey):
        Directory.open("../report", root=root)
