"""A node's disk is kept in order, and trees in use are left alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from storage.directory import Directory
from storage.worktree import WorkTree
from tasks.settings import Settings
from workers.housekeeping import Housekeeping


def a_tree(tmp_path: Path, key: str) -> WorkTree:
    tree = WorkTree(tmp_path / "scratch", key, "claim")
    directory = Directory.open(tmp_path / "root", key)
    tree.checkout(directory, directory.head())
    (tree.path / "data").write_text("x")
    return tree


def trees_of(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "scratch" / "trees").iterdir()}


def test_old_trees_go_and_used_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for key in ("old", "young"):
        a_tree(tmp_path, key).release()
    used = a_tree(tmp_path, "used")
    for slot in (tmp_path / "scratch" / "trees").glob("*/*"):
        if slot.parent.name != "young":
            os.utime(slot, (1, 1))
    settings = replace(Settings(), scratch=tmp_path / "scratch", scratch_free=0)
    assert Housekeeping(settings).run_once() == 1
    assert trees_of(tmp_path) == {"young", "used"}
    used.release()


def test_trees_go_when_the_disk_is_full(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    a_tree(tmp_path, "one").release()
    settings = replace(Settings(), scratch=tmp_path / "scratch", scratch_free=2**62)
    assert Housekeeping(settings).run_once() == 1
    assert trees_of(tmp_path) == set()
