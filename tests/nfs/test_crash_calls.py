"""Death at every single call to the file system: old or new, never mixed, and the next run works.

Every call that changes something is a crash point, of a process (`kill`), of a node with all that
its NFS client had buffered (`node`), and of a machine whose disk keeps only what was fsynced
(`disk`, where what else is left is up to a seed). Each third by default, all of them with --long.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from storage.directory import Directory, conclude_for
from storage.garbage import Garbage, Retention
from storage.segments import Entry, SegmentWriter
from storage.segments import read as read_segment
from storage.worktree import WorkTree
from tests.nfs.conftest import Pair
from tests.nfs.script import Action, Settings
from tests.nfs.victim import dies_at
from tests.storage_kit import both, contents, run, write

DEATHS: dict[str, tuple[Action, Settings]] = {
    "kill": ("kill", Settings()),
    "node": ("power", Settings()),
    "disk": ("power", Settings(is_disk=True)),
    "disk, seed 1": ("power", Settings(is_disk=True, seed=1)),
    "disk, seed 2": ("power", Settings(is_disk=True, seed=2)),
}
OLD = {"a": b"old", "kept": b"kept"}
NEW = {"a": b"new", "kept": b"kept", "b": b"new"}
MOST_CALLS = 300


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """By default each kind of death with one of the three starts, in turn."""
    if "death" not in metafunc.fixturenames:
        return
    params = []
    for number, name in enumerate(DEATHS):
        for first in (1, 2, 3):
            marks = [] if first == number % 3 + 1 else [pytest.mark.long]
            params.append(
                pytest.param((*DEATHS[name], first), id=f"{name}, from {first}", marks=marks)
            )
    metafunc.parametrize("death", params)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def each_death(
    pair: Pair, death: tuple[Action, Settings, int], work_on: Callable[[Path, str], object]
) -> Iterator[tuple[str, bool]]:
    """Die at every third call, each time in a directory of its own that holds version 1.

    Gives the key, and whether the work was done when death came; lastly once without a death.
    """
    do, settings, first = death
    for n in range(first, MOST_CALLS, 3):
        key = f"k{n}"
        run(pair.backing, pair.backing / "scratch", "t1", both(*OLD_BODY), key=key)
        died = dies_at(n, pair.a, do, partial(work_on, pair.on_a, key), settings=settings)
        yield key, not died
        if not died:
            assert n > 3, "nothing was killed, so nothing was tested"
            return
    raise AssertionError(f"more than {MOST_CALLS} calls")


OLD_BODY = (write("a", "old"), write("kept", "kept"))
NEW_BODY = (write("a", "new"), write("b", "new"))


def test_a_commit_is_whole_or_nothing(
    pair: Pair, scratch: Path, death: tuple[Action, Settings, int]
) -> None:
    def commit(root: Path, key: str) -> None:
        run(root, scratch, "t2", both(*NEW_BODY), key=key, result={"rows": 2})

    seen = set()
    for key, done in each_death(pair, death, commit):
        outcome = Directory.open(pair.backing, key).outcome_of("t2")
        assert outcome is not None or not done
        for root in (pair.backing, pair.on_a, pair.on_b):
            directory = Directory.open(root, key)
            assert directory.outcome_of("t2") == outcome
            assert contents(directory.head()) == (NEW if outcome else OLD)
        seen.add(outcome is not None)
        again = run(pair.on_b, scratch, "t2", write("c", "again"), key=key, claim_id="second")
        assert (again.n, again.task_id) == (2, "t2")
        assert outcome in (None, again)
        assert run(pair.on_a, scratch, "t3", write("d", "3"), key=key).n == 3
        files = NEW if outcome else {**OLD, "c": b"again"}
        assert contents(Directory.open(pair.backing, key).head()) == {**files, "d": b"3"}
    assert seen == {True, False}


def test_a_conclusion_is_recorded_or_not_and_can_be_repeated(
    pair: Pair, death: tuple[Action, Settings, int]
) -> None:
    def conclude(root: Path, key: str) -> None:
        conclude_for(root, key, "t2", "c", "FAILURE", "lost", 1, "node")

    for key, done in each_death(pair, death, conclude):
        directory = Directory.open(pair.on_b, key)
        outcome = directory.outcome_of("t2")
        assert outcome is not None or not done
        assert contents(directory.head()) == OLD
        conclude(pair.on_a, key)
        assert [r.task_id for r in Directory.open(pair.backing, key).versions()] == ["t1", "t2"]


def test_a_checkpoint_is_whole_or_none(
    pair: Pair, scratch: Path, death: tuple[Action, Settings, int]
) -> None:
    def attempt_on(root: Path, key: str, claim_id: str) -> dict[str, bytes]:
        """What an attempt finds; it works on, and keeps a checkpoint."""
        directory = Directory.open(root, key)
        attempt = directory.begin("t2", claim_id, directory.head())
        tree = WorkTree(scratch / claim_id, key, claim_id)
        try:
            tree.checkout(directory, attempt.base, directory.checkpoint_of("t2", attempt.base))
            found = {path.name: path.read_bytes() for path in tree.path.iterdir()}
            both(*NEW_BODY)(tree.path)
            attempt.checkpoint(tree)
        finally:
            tree.release()
        return found

    for key, done in each_death(pair, death, lambda root, key: attempt_on(root, key, "first")):
        found = attempt_on(pair.on_b, key, "second")
        assert found in ((NEW,) if done else (OLD, NEW))
        directory = Directory.open(pair.backing, key)
        assert contents(directory.head()) == OLD  # it is nobody else's
        assert directory.checkpoint_of("t2", directory.head()) is not None


def test_a_collection_takes_nothing_that_is_kept(
    pair: Pair, scratch: Path, death: tuple[Action, Settings, int]
) -> None:
    def collect(root: Path, key: str) -> None:
        garbage = Garbage(root, Retention(keep=2, max_age=0))
        while garbage.run_once(limit=2):
            pass
        assert garbage.troubles == {}

    do, settings, first = death
    local = pair.backing / "scratch"
    for n in range(first, MOST_CALLS, 3):
        (pair.backing / str(n)).mkdir()
        root = pair.backing / str(n)
        for task in range(1, 6):
            run(root, local, f"t{task}", both(write("a", str(task)), write(f"f{task}", "x")))
        Directory.open(root, "k").begin("dead", "c", Directory.open(root, "k").version(1))
        expected = {v: contents(Directory.open(root, "k").version(v)) for v in (4, 5)}
        on_a = pair.on_a / str(n)
        died = dies_at(n, pair.a, do, partial(collect, on_a, "k"), settings=settings)
        for node in (pair.backing, pair.on_b):
            directory = Directory.open(node / str(n), "k")
            assert {v: contents(directory.version(v)) for v in (4, 5)} == expected
            assert [record.n for record in directory.versions()] == [1, 2, 3, 4, 5]
        collect(pair.on_b / str(n), "k")
        assert Garbage(root, Retention(keep=2, max_age=0)).plan("k").files == []
        assert run(pair.on_a / str(n), scratch / str(n), "t6", write("g", "6")).n == 6
        if not died:
            assert n > 3
            return
    raise AssertionError(f"more than {MOST_CALLS} calls")


def test_a_segment_holds_what_was_said_and_no_more_than_was_tried(
    pair: Pair, death: tuple[Action, Settings, int]
) -> None:
    entries = [Entry("outcome", f"task-{n}", 0, bytes([n]) * 50) for n in range(8)]
    do, settings, first = death
    for n in range(first, MOST_CALLS, 3):
        hears, says = os.pipe()

        def work(start: str = f"s{n}", says: int = says) -> None:
            writer = SegmentWriter(pair.on_a, "node-1", start, roll_at=250)
            for at in range(0, 8, 2):
                writer.append(entries[at : at + 2])
                os.write(says, b".")

        died = dies_at(n, pair.a, do, work, settings=settings)
        os.close(says)
        said = 2 * len(os.read(hears, 100))
        os.close(hears)
        for root in (pair.backing, pair.on_b):
            folder = root / "segments/node-1"
            names = os.listdir(folder) if folder.exists() else []
            ours = sorted(
                (name for name in names if name.startswith(f"s{n}-")),
                key=lambda name: int(name.rpartition("-")[2]),
            )
            found = [entry for name in ours for entry in read_segment(folder / name)]
            assert found == entries[: len(found)]
            assert said <= len(found) <= min(8, said + 2)
        writer = SegmentWriter(pair.on_b, "node-1", f"next-{n}")
        writer.append(entries[:1])
        writer.close()
        if not died:
            assert said == 8
            return
    raise AssertionError(f"more than {MOST_CALLS} calls")
