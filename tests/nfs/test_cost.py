"""What a commit asks of the file server: by what it changed, not by what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.directory import Directory
from storage.segments import Entry, SegmentWriter
from storage.worktree import WorkTree
from tests.nfs.conftest import Pair
from tests.nfs.trace import Cost, counting
from tests.storage_kit import run, write


def cost_of_a_commit(pair: Pair, scratch: Path, there: int, changed: int) -> Cost:
    """On a directory of so many files."""

    def fill(tree: Path) -> None:
        for n in range(there):
            (tree / f"f{n}").write_text("old")

    run(pair.backing, scratch, "t1", fill)
    run(pair.backing, scratch, "t2", write("another", "x"))
    directory = Directory.open(pair.on_a, "k")
    base = directory.head()
    tree = WorkTree(scratch / "tree", "k", "c")
    tree.checkout(directory, base)
    for n in range(changed):
        (tree.path / f"f{n}").write_text("new")
    with counting(pair.a) as cost:
        directory.begin("t3", "c", base).commit(tree, None, attempt=1, node="n")
    tree.release()
    return cost


@pytest.mark.parametrize("changed", [1, 3, 20])
def test_a_commit_costs_by_what_it_changed(changed: int, pair: Pair, tmp_path: Path) -> None:
    cost = cost_of_a_commit(pair, tmp_path, there=30, changed=changed)
    assert cost.by_kind["link"] == 1
    assert cost.operations <= 3 * changed + 12, cost


def test_a_commit_costs_the_same_however_much_is_there(pair: Pair, tmp_path: Path) -> None:
    few = cost_of_a_commit(pair, tmp_path / "few", there=10, changed=3)
    pair.on_a, pair.backing = pair.on_a / "many", pair.backing / "many"
    pair.backing.mkdir()
    many = cost_of_a_commit(pair, tmp_path / "many", there=600, changed=3)
    assert many.operations <= few.operations, (str(few), str(many))


def test_outcomes_are_written_together(pair: Pair) -> None:
    entries = [Entry("outcome", f"task-{n}", 0, b"x" * 100) for n in range(200)]
    writer = SegmentWriter(pair.on_a, "node-1", "start")
    writer.append(entries[:1])
    with counting(pair.a) as cost:
        writer.append(entries)
    writer.close()
    assert (cost.by_kind["store"], cost.by_kind["fsync"]) == (1, 1)
    assert cost.operations == 2, cost
