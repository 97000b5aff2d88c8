"""Garbage collection: what goes, what never goes, and what a late reader is told."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import crashpoints
from errors import Fenced, Refused, SnapshotExpired, StandAside
from storage.directory import Attempt, Directory, Version
from storage.garbage import Garbage, Retention
from storage.worktree import WorkTree
from tests.storage_kit import Crash, contents, files_below, run, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


NEWEST = Retention(keep=1, max_age=0)


def collect(root: Path, keep: int = 1, limit: int = 10_000) -> list[str]:
    """One whole round; what went, relative to the job directory."""
    garbage = Garbage(root, Retention(keep, 0))
    gone = []
    while some := garbage.run_once(limit):
        assert len(some) <= limit
        gone += [os.path.relpath(candidate.path, root / "jobs/k/runs") for candidate in some]
    assert garbage.troubles == {}
    return sorted(gone)


def five_versions(root: Path, scratch: Path) -> Directory:
    run(root, scratch, "t1", lambda tree: [write(f"f{n}", f"{n}")(tree) for n in range(30)])
    for n in range(2, 6):
        run(root, scratch, f"t{n}", write("a", f"{n}"))
    return Directory.open(root, "k")


def test_what_only_old_versions_name_goes(root: Path, scratch: Path) -> None:
    directory = five_versions(root, scratch)
    before, log = contents(directory.head()), files_below(root / "jobs/k/log")
    assert collect(root) == sorted(
        f"t{n}/claim-of-t{n}/{kind}"
        for n in (2, 3, 4)
        for kind in (f"data-{n - 1}-1", f"manifest-{n - 1}")
    )
    assert contents(directory.head()) == before
    assert files_below(root / "jobs/k/log") == log
    assert collect(root) == []
    assert contents(run_on(root, scratch)) == {**before, "b": b"b"}


def run_on(root: Path, scratch: Path) -> Version:
    run(root, scratch / "of another node", "later", write("b", "b"))
    return Directory.open(root, "k").head()


def test_retained_versions_stay_whole_and_older_ones_have_expired(
    root: Path, scratch: Path
) -> None:
    directory = five_versions(root, scratch)
    whole = {n: contents(directory.version(n)) for n in range(1, 6)}
    collect(root, keep=2)
    directory = Directory.open(root, "k")
    for n in (4, 5):
        assert contents(directory.version(n)) == whole[n]
    for n in (2, 3):
        with pytest.raises(SnapshotExpired, match=f"version {n} was collected; those from 4 on"):
            contents(directory.version(n))
        with pytest.raises(SnapshotExpired):
            WorkTree(scratch / "x", "k", f"c{n}").checkout(directory, directory.version(n))
        with pytest.raises(SnapshotExpired):
            directory.restore(n, f"r{n}", "c", result=None, attempt=1, node="n")
    assert directory.head().n == 5


def test_outcomes_are_found_for_ever(root: Path, scratch: Path) -> None:
    directory = five_versions(root, scratch)
    collect(root)
    for n in range(1, 6):
        assert (directory.outcome_of(f"t{n}") or pytest.fail()).n == n
        assert run(root, scratch, f"t{n}", write("a", "again"), claim_id="again").n == n


def test_a_version_that_failed_keeps_its_base_s_files(root: Path, scratch: Path) -> None:
    directory = five_versions(root, scratch)
    before = contents(directory.head())
    directory.begin("t6", "c", directory.head()).conclude("FAILURE", 1, attempt=1, node="n")
    collect(root)
    assert contents(directory.head()) == before


def test_young_versions_stay_by_the_server_s_clock(root: Path, scratch: Path) -> None:
    directory = five_versions(root, scratch)
    # Two days ago, as the server sees it; this node's own clock has no say.
    for n in (1, 2, 3):
        os.utime(directory.log.path(n), (5, os.stat(directory.log.path(5)).st_mtime - 2 * 86400))
    plan = Garbage(root, Retention(keep=1, max_age=86400)).plan("k")
    assert plan.floor == 4
    assert {candidate.path.name for candidate in plan.files} == {
        "data-1-1", "manifest-1", "data-2-1", "manifest-2",
    }  # fmt: skip
    assert Garbage(root, Retention(keep=1, max_age=3 * 86400)).plan("k").files == []


def test_a_plan_removes_nothing_and_says_why(root: Path, scratch: Path) -> None:
    five_versions(root, scratch)
    before = files_below(root)
    plan = Garbage(root, NEWEST).plan("k")
    assert files_below(root) == before
    assert plan.bytes == sum(os.stat(candidate.path).st_size for candidate in plan.files) > 0
    assert "no version from 5 on names it, and version 3 is decided" in {
        candidate.why for candidate in plan.files
    }


def test_it_goes_in_bounded_steps(root: Path, scratch: Path) -> None:
    five_versions(root, scratch)
    assert len(collect(root, limit=2)) == 6


def begun(root: Path, scratch: Path, task_id: str) -> tuple[Directory, Attempt, WorkTree]:
    directory = Directory.open(root, "k")
    attempt = directory.begin(task_id, "c", directory.head())
    tree = WorkTree(scratch, "k", "c")
    tree.checkout(directory, attempt.base)
    write("mine", task_id)(tree.path)
    return directory, attempt, tree


@pytest.mark.parametrize(
    "point", ["commit:files-written", "commit:manifest-written", "commit:record-written",
              "commit:before-link", "commit:after-link"],
)  # fmt: skip
def test_a_run_that_may_still_commit_keeps_its_files(
    point: str, root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector works in the middle of a commit, with the shortest retention."""
    five_versions(root, scratch)
    gone: list[str] = []

    def meanwhile(reached: str) -> None:
        if reached == point:
            gone.extend(collect(root))

    monkeypatch.setattr(crashpoints, "on_reach", meanwhile)
    run(root, scratch, "t6", write("mine", "6"))
    assert len(gone) == (7 if point == "commit:after-link" else 6)
    head = Directory.open(root, "k").head()
    assert contents(head)["mine"] == b"6"
    assert contents(head)["f7"] == b"7"


def test_a_commit_between_the_plan_and_the_removal_loses_nothing(root: Path, scratch: Path) -> None:
    five_versions(root, scratch)
    garbage = Garbage(root, NEWEST)
    garbage.run_once(1)
    for n in range(6, 9):
        run(root, scratch, f"t{n}", write("a", f"{n}"))
        garbage.run_once(1)
    while garbage.run_once(1):
        pass
    head = Directory.open(root, "k").head()
    assert (contents(head)["a"], contents(head)["f7"]) == (b"8", b"7")


def test_what_a_killed_run_left_goes_once_it_is_decided(
    root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, scratch, "t1", write("a", "1"))

    def crash(reached: str) -> None:
        if reached == "commit:before-link":
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(crashpoints, "on_reach", crash)
        with pytest.raises(Crash):
            run(root, scratch, "dead", write("a", "dead"))
    assert collect(root) == []  # it might be frozen, not dead
    run(root, scratch, "t2", write("a", "2"))
    assert [name for name in collect(root) if name.startswith("dead/")] == [
        "dead/claim-of-dead/data-1-1",
        "dead/claim-of-dead/manifest-1",
        "dead/claim-of-dead/record-2-1",
    ]
    assert not (root / "jobs/k/runs/dead/claim-of-dead").exists()


def test_a_late_run_whose_files_went_is_fenced_or_stands_aside(root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", write("a", "1"))
    directory, attempt, tree = begun(root, scratch, "late")
    run(root, scratch, "t2", write("a", "2"))
    collect(root)
    with pytest.raises((Fenced, StandAside)):
        attempt.commit(tree, None, attempt=1, node="n")
    assert directory.head().n == 2


def test_restore_commits_an_old_version_that_lives_on(root: Path, scratch: Path) -> None:
    directory = five_versions(root, scratch)
    old = contents(directory.version(2))
    record = directory.restore(2, "r", "c", result={"restored": 2}, attempt=1, node="n")
    assert (record.n, record.state) == (6, "SUCCESS")
    collect(root)
    assert contents(Directory.open(root, "k").head()) == old
    seen: list[str] = []
    run(root, scratch, "t7", lambda tree: seen.append((tree / "a").read_text()))
    run(root, scratch / "new", "t8", lambda tree: seen.append((tree / "a").read_text()))
    assert seen == ["2", "2"]


def test_restore_in_the_middle_of_a_collection_loses_nothing(root: Path, scratch: Path) -> None:
    """What the head doesn't name is stored anew: the collector may have it on its list already."""
    directory = five_versions(root, scratch)
    old = contents(directory.version(2))
    garbage = Garbage(root, NEWEST)
    (gone,) = garbage.run_once(1)
    assert "t2" not in str(gone.path)  # version 2's are on its list, and still there
    (root / "jobs/k/gc/5").unlink()  # the reader looked before the floor was raised
    directory.restore(2, "r", "c", result=None, attempt=1, node="n")
    while garbage.run_once():
        pass
    assert contents(Directory.open(root, "k").head()) == old


def test_a_shared_folder_that_was_copied_without_its_links_keeps_its_outcomes(
    root: Path, scratch: Path
) -> None:
    five_versions(root, scratch)
    copied = root.with_name("copied")
    shutil.copytree(root, copied)
    while Garbage(copied, NEWEST).run_once():
        pass
    directory = Directory.open(copied, "k")
    assert [(directory.outcome_of(f"t{n}") or pytest.fail()).n for n in range(1, 6)] == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip


def test_restore_of_removed_large_and_sparse_files(root: Path, scratch: Path) -> None:
    def body(tree: Path) -> None:
        (tree / "large").write_bytes(b"x" * 300_000)
        with open(tree / "sparse", "wb") as file:
            file.seek(10_000_000)
            file.write(b"end")

    run(root, scratch, "t1", body)

    def none(tree: Path) -> None:
        for path in tree.iterdir():
            path.unlink()

    run(root, scratch, "t2", none)
    directory = Directory.open(root, "k")
    whole = contents(directory.version(1))
    directory.restore(1, "r", "c", result=None, attempt=1, node="n")
    collect(root)
    assert contents(directory.head()) == whole


def test_a_key_that_is_damaged_is_left_alone_and_reported(root: Path, scratch: Path) -> None:
    five_versions(root, scratch)
    run(root, scratch, "t1", write("a", "1"), key="damaged")
    run(root, scratch, "t2", write("a", "2"), key="damaged")
    manifest = root / "jobs/damaged/runs/t2/claim-of-t2/manifest-1"
    manifest.write_bytes(b"x")
    before = files_below(root / "jobs/damaged")
    garbage = Garbage(root, NEWEST)
    assert len(garbage.run_once()) == 6
    assert "claim-of-t2/manifest-1: the manifest isn't the one" in garbage.troubles["damaged"]
    assert files_below(root / "jobs/damaged") == before


@pytest.mark.parametrize("bad", [{"keep": 0}, {"max_age": -1.0}])
def test_a_retention_of_nothing_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(Refused):
        Retention(**bad)  # type: ignore[arg-type]


# Checkpoints.


def with_checkpoint(root: Path, scratch: Path) -> Directory:
    """A task that keeps half its work and dies."""
    run(root, scratch, "t1", lambda tree: [write(f"f{n}", f"{n}")(tree) for n in range(30)])
    directory, attempt, tree = begun(root, scratch, "t")
    write("half", "done")(tree.path)
    (tree.path / "f3").unlink()
    assert attempt.checkpoint(tree) == 1
    write("half", "lost")(tree.path)
    tree.release()
    return directory


def next_attempt(directory: Directory, scratch: Path) -> tuple[Attempt, WorkTree]:
    base = directory.head()
    attempt = directory.begin("t", "next", base)
    tree = WorkTree(scratch, "k", "next")
    tree.checkout(directory, base, directory.checkpoint_of("t", base))
    return attempt, tree


@pytest.mark.parametrize("node", ["", "another node"])
def test_the_next_attempt_starts_from_the_checkpoint(node: str, root: Path, scratch: Path) -> None:
    directory = with_checkpoint(root, scratch)
    attempt, tree = next_attempt(directory, scratch / node)
    assert (tree.path / "half").read_text() == "done"
    assert not (tree.path / "f3").exists()
    assert "half" not in contents(directory.head())
    write("rest", "too")(tree.path)
    record = attempt.commit(tree, None, attempt=2, node="n")
    expected = {f"f{n}": b"%d" % n for n in range(30) if n != 3}
    expected |= {"half": b"done", "mine": b"t", "rest": b"too"}
    assert contents(directory.version(record.n)) == expected
    # What the checkpoint stored isn't stored again, and stays while it is named.
    assert os.listdir(directory.path / "runs/t/next") != []
    collect(root)
    assert contents(directory.head()) == expected


def test_a_checkpoint_on_a_version_that_isn_t_the_head_is_of_no_use(
    root: Path, scratch: Path
) -> None:
    directory = with_checkpoint(root, scratch)
    run(root, scratch, "other", write("f1", "other"))
    _, tree = next_attempt(directory, scratch)
    assert not (tree.path / "half").exists()
    gone = collect(root)
    assert {name for name in gone if name.startswith("t/")} == {
        "t/checkpoint-1/data-1-1", "t/checkpoint-1/manifest-1", "t/checkpoint-1/sealed-1",
    }  # fmt: skip
    assert not (directory.path / "runs/t/checkpoint-1").exists()


SPOILED: dict[str, Callable[[Path], object]] = {
    "not sealed": lambda folder: (folder / "sealed-1").unlink(),
    "half sealed": lambda folder: os.truncate(folder / "sealed-1", 20),
    "no manifest": lambda folder: (folder / "manifest-1").unlink(),
    "no file": lambda folder: (folder / "data-1-1").unlink(),
    "damaged file": lambda folder: (folder / "data-1-1").write_bytes(b"x"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_checkpoint_that_can_t_be_read_costs_work_and_nothing_else(
    how: str, root: Path, scratch: Path
) -> None:
    directory = with_checkpoint(root, scratch)
    SPOILED[how](directory.path / "runs/t/checkpoint-1")
    attempt, tree = next_attempt(directory, scratch / "another node")
    assert not (tree.path / "half").exists()
    assert (tree.path / "f3").read_text() == "3"
    assert attempt.commit(tree, None, attempt=2, node="n").n == 2


def test_checkpoints_are_numbered_and_the_last_one_counts(root: Path, scratch: Path) -> None:
    directory = with_checkpoint(root, scratch)
    attempt, tree = next_attempt(directory, scratch)
    write("half", "more")(tree.path)
    assert attempt.checkpoint(tree) == 2
    tree.release()
    directory.begin("t", "third", directory.head())
    tree = WorkTree(scratch / "new", "k", "third")
    tree.checkout(directory, directory.head(), directory.checkpoint_of("t", directory.head()))
    assert (tree.path / "half").read_text() == "more"
    assert directory.outcome_of("t") is None
    with pytest.raises(Refused, match="is the name of a checkpoint"):
        directory.begin("t", "checkpoint-7", directory.head())
