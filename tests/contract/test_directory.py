"""A job directory: what a run finds, what it leaves, and what no accident may change."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import crashpoints
from errors import Damaged, Fenced, InvalidKey, OverQuota, Refused, StandAside, Unavailable
from storage import durable
from storage.directory import Directory, conclude_for
from storage.log import Record
from storage.worktree import WorkTree
from tests.storage_kit import Crash, both, changing_calls, contents, files_below, run, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def nothing(tree: Path) -> None:
    pass


def end(root: Path, task_id: str, state: str = "FAILURE") -> Record:
    return conclude_for(root, "k", task_id, f"claim-of-{task_id}", state, "lost", 1, "node-1")


def test_a_run_finds_what_the_last_one_left(root: Path, scratch: Path) -> None:
    directory = Directory.open(root, "k")
    assert (directory.head().n, directory.head().manifest.files) == (0, ())
    first = run(root, scratch, "t1", write("a", "1"), result={"rows": 1})
    found: list[str] = []
    second = run(
        root,
        scratch,
        "t2",
        both(lambda tree: found.append((tree / "a").read_text()), write("b", "2")),
    )
    assert found == ["1"]
    assert contents(directory.head()) == {"a": b"1", "b": b"2"}
    assert contents(directory.version(1)) == {"a": b"1"}
    assert [first.n, second.n, second.base] == [1, 2, 1]
    assert list(directory.versions()) == [first, second]
    assert first.result == {"rows": 1}


def test_only_what_was_touched_is_stored_again(root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", lambda tree: [write(f"f{n}", "old")(tree) for n in range(20)])
    run(root, scratch, "t2", write("f7", "new"))
    head = Directory.open(root, "k").head()
    of_t2 = [f.path for f in head.manifest.files if f.extents[0].stored.startswith("runs/t2/")]
    assert of_t2 == ["f7"]
    assert (root / "jobs/k/runs/t2/claim-of-t2/data-1-1").read_bytes() == b"new"
    assert contents(head) == {f"f{n}": b"new" if n == 7 else b"old" for n in range(20)}


def test_a_file_that_was_removed_is_gone_and_still_in_the_older_version(
    root: Path, scratch: Path
) -> None:
    run(root, scratch, "t1", write("a", "1"))
    run(root, scratch, "t2", lambda tree: (tree / "a").unlink())
    directory = Directory.open(root, "k")
    assert contents(directory.head()) == {}
    assert contents(directory.version(1)) == {"a": b"1"}


def test_the_layout_is_the_design_s(root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", write("a", "1"))
    assert {os.path.relpath(name, root) for name in files_below(root)} == {
        "jobs/k/HEAD",
        "jobs/k/log/0/1",
        "jobs/k/runs/t1/claim-of-t1/data-0-1",
        "jobs/k/runs/t1/claim-of-t1/manifest-0",
        "jobs/k/runs/t1/claim-of-t1/record-1-1",
    }
    assert (root / "jobs/k/HEAD").read_text() == "1\n"
    assert os.stat(root / "jobs/k/log/0/1").st_nlink == 2


@pytest.mark.parametrize(
    "hint", [None, b"", b"x", b"-4", b"0", b"1", b"999999", b"9" * 9999, b"\xff"]
)
def test_a_wrong_hint_is_harmless(hint: bytes | None, root: Path, scratch: Path) -> None:
    for n in (1, 2):
        run(root, scratch, f"t{n}", nothing)
    (root / "jobs/k/HEAD").unlink()
    if hint is not None:
        (root / "jobs/k/HEAD").write_bytes(hint)
    assert Directory.open(root, "k").head().n == 2
    assert run(root, scratch, "t3", nothing).n == 3


@pytest.mark.parametrize("n", [16, 17, 18, 19])
def test_a_record_that_is_missing_behind_the_hint_is_reported(
    n: int, root: Path, scratch: Path
) -> None:
    for number in range(1, 21):
        run(root, scratch, f"t{number}", nothing)
    directory = Directory.open(root, "k")
    assert ((root / "jobs/k/HEAD").read_text(), directory.head().n) == ("16\n", 20)
    directory.log.path(n).unlink()
    with pytest.raises(Damaged, match=f"log/0/{n}: missing, although record 20 exists"):
        directory.head()


def test_a_hint_far_behind_is_harmless(root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", nothing)
    record = Directory.open(root, "k").head().record
    assert record is not None
    for n in range(2, 1100):
        path = Directory.open(root, "k").log.path(n)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(replace(record, n=n, base=n - 1, task_id=f"x{n}").encode())
    assert Directory.open(root, "k").head().n == 1099


def test_a_hint_that_can_t_be_written_is_harmless(root: Path, scratch: Path) -> None:
    Directory.open(root, "k")
    (root / "jobs/k/HEAD").mkdir()
    assert run(root, scratch, "t1", nothing).n == 1
    assert Directory.open(root, "k").head().n == 1


# Fencing.


def test_a_late_run_is_fenced_and_leaves_no_trace_in_any_version(root: Path, scratch: Path) -> None:
    directory = Directory.open(root, "k")
    stale = directory.head()
    run(root, scratch, "winner", write("a", "winner"))
    with pytest.raises(Fenced, match="version 1 went to task winner"):
        run(root, scratch, "late", write("a", "late"), base=stale)
    assert contents(directory.head()) == {"a": b"winner"}
    assert directory.outcome_of("late") is None
    assert run(root, scratch, "late", write("b", "late"), claim_id="again").n == 2


def test_a_failure_carries_the_files_of_its_base_and_fences(root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", write("a", "1"))
    directory = Directory.open(root, "k")
    base = directory.head()
    failed = directory.begin("t2", "c2", base).conclude("FAILURE", "boom", attempt=3, node="n")
    assert (failed.n, failed.state, failed.result, failed.attempt) == (2, "FAILURE", "boom", 3)
    assert directory.head().manifest == base.manifest
    with pytest.raises(Fenced):
        run(root, scratch, "t3", nothing, base=base)
    with pytest.raises(Fenced):
        directory.begin("t4", "c4", base).conclude("REVOKED", None, attempt=1, node="n")


def test_of_many_writers_on_one_base_exactly_one_wins(root: Path, scratch: Path) -> None:
    base = Directory.open(root, "k").head()
    start, won, fenced = threading.Barrier(8), [], []

    def contend(name: str) -> None:
        start.wait()
        try:
            won.append(run(root, scratch, name, write("who", name), base=base))
        except Fenced:
            fenced.append(name)

    threads = [threading.Thread(target=contend, args=(f"t{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = won
    assert len(fenced) == 7
    assert contents(Directory.open(root, "k").head()) == {"who": winner.task_id.encode()}


# One outcome.


def test_a_task_s_outcome_is_found_whatever_came_later(root: Path, scratch: Path) -> None:
    records = [run(root, scratch, f"t{n}", nothing, result=n) for n in range(1, 4)]
    directory = Directory.open(root, "k")
    for n in range(1, 4):
        assert directory.outcome_of(f"t{n}") == records[n - 1]
    assert directory.outcome_of("t4") is None


def test_a_task_never_gets_a_second_record(root: Path, scratch: Path) -> None:
    base = Directory.open(root, "k").head()
    first = run(root, scratch, "t", write("a", "1"), claim_id="A")
    assert run(root, scratch, "t", write("a", "2"), claim_id="B", base=base) == first
    assert run(root, scratch, "t", write("a", "3"), claim_id="C") == first
    run(root, scratch, "other", nothing)
    assert run(root, scratch, "t", write("a", "4"), claim_id="D") == first
    assert run(root, scratch, "t", write("a", "5"), claim_id="E", base=base) == first
    assert end(root, "t") == first
    directory = Directory.open(root, "k")
    assert [record.task_id for record in directory.versions()] == ["t", "other"]
    assert contents(directory.head()) == {"a": b"1"}


def test_an_outcome_for_a_dead_child(root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", write("a", "1"))
    ended = end(root, "t2", "REVOKED")
    assert (ended.n, ended.state, ended.result) == (2, "REVOKED", "lost")
    assert ended.claim_id != "claim-of-t2"  # nobody may take it for the child's own
    assert end(root, "t2") == ended
    assert contents(Directory.open(root, "k").head()) == {"a": b"1"}


def test_an_outcome_for_a_dead_child_doesn_t_give_way(
    root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = iter(["first", "second"])

    def beaten(point: str) -> None:
        if point == "commit:record-written":
            monkeypatch.setattr(crashpoints, "on_reach", None)
            for other in others:
                run(root, scratch, other, nothing)
                if other == "first":
                    monkeypatch.setattr(crashpoints, "on_reach", beaten)
                    return

    monkeypatch.setattr(crashpoints, "on_reach", beaten)
    assert end(root, "t").n == 3
    assert [r.task_id for r in Directory.open(root, "k").versions()] == ["first", "second", "t"]


def test_a_child_that_wasn_t_dead_gets_the_outcome_recorded_for_it(
    root: Path, scratch: Path
) -> None:
    base = Directory.open(root, "k").head()
    ended = end(root, "t")
    assert run(root, scratch, "t", write("a", "1"), base=base) == ended
    assert Directory.open(root, "k").head().n == 1


def test_a_run_s_folder_has_one_writer(root: Path) -> None:
    directory = Directory.open(root, "k")
    directory.begin("t", "c", directory.head())
    with pytest.raises(StandAside, match="runs/t/c exists; a run's folder has one writer, ever"):
        directory.begin("t", "c", directory.head())


def test_after_a_refused_commit_the_failure_can_be_recorded(root: Path, scratch: Path) -> None:
    directory = Directory.open(root, "k")
    attempt = directory.begin("t", "c", directory.head())
    tree = WorkTree(scratch, "k", "c")
    tree.checkout(directory, attempt.base)
    with pytest.raises(Refused, match="JSON can't carry this value"):
        attempt.commit(tree, object(), attempt=1, node="n")
    assert attempt.conclude("FAILURE", "no JSON", attempt=1, node="n").n == 1


def test_a_conclusion_that_found_no_room_can_be_tried_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Directory.open(root, "k")
    attempt = directory.begin("t", "c", directory.head())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(Unavailable, match="No space left on device; nothing was committed"):
            attempt.conclude("FAILURE", 1, attempt=1, node="n")
    assert attempt.conclude("FAILURE", 2, attempt=1, node="n").result == 2


# What a commit costs on the shared file system.


@pytest.mark.parametrize(("files", "k"), [(10, 1), (10, 3), (2000, 1), (2000, 3), (2000, 40)])
def test_a_run_costs_what_it_changed(files: int, k: int, root: Path, scratch: Path) -> None:
    def fill(tree: Path) -> None:
        for n in range(files):
            (tree / f"d{n % 20}").mkdir(exist_ok=True)
            write(f"d{n % 20}/f{n}", f"{n}")(tree)

    run(root, scratch, "t1", fill)
    run(root, scratch, "t2", write("other", "1"))

    def change(tree: Path) -> None:
        for n in range(k):
            write(f"d{n % 20}/f{n}", "new")(tree)

    calls = changing_calls(lambda: run(root, scratch, "t3", change), root)
    # The snapshot, the attempt and the commit together; and all small files in one stored file.
    assert sorted(call for call in calls if call != "fsyncdir") == sorted(
        ["mkdir"] * 2 + ["create", "write", "fsync"] * 3 + ["link"] + ["read"] * 3
    )
    assert len(calls) - calls.count("fsyncdir") <= 3 * k + 12
    assert calls.count("fsyncdir") == 4  # two new folders, the attempt's files, the link


# Bad input.


def test_a_directory_over_its_quota_is_refused(root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", write("a", "1"))
    directory = Directory.open(root, "k")
    attempt = directory.begin("t2", "c", directory.head())
    tree = WorkTree(scratch, "k", "c")
    tree.checkout(directory, attempt.base)
    (tree.path / "b").write_bytes(b"x" * 5000)
    with pytest.raises(OverQuota, match="k: 5,001 bytes are more than 5,000"):
        attempt.commit(tree, None, attempt=1, node="n", quota=5000)
    assert os.listdir(attempt.folder) == []
    assert attempt.conclude("FAILURE", "over quota", attempt=1, node="n").n == 2
    assert contents(directory.head()) == {"a": b"1"}
    attempt = directory.begin("t3", "c", directory.head())
    tree.release()
    tree = WorkTree(scratch, "k", "c")
    tree.checkout(directory, attempt.base)
    (tree.path / "b").write_bytes(b"x" * 4999)
    assert attempt.commit(tree, None, attempt=1, node="n", quota=5000).n == 3


@pytest.mark.parametrize("key", ["a/b", "..", "a\0b", "x" * 300])
def test_a_bad_key_makes_nothing(key: str, root: Path) -> None:
    with pytest.raises(InvalidKey):
        Directory.open(root, key)
    assert os.listdir(root) == []


def test_a_bad_task_or_claim_id_makes_nothing(root: Path) -> None:
    directory = Directory.open(root, "k")
    for task_id, claim_id in (("../../x", "c"), ("t", "../x"), ("t", "")):
        with pytest.raises(Refused):
            directory.begin(task_id, claim_id, directory.head())
    assert os.listdir(directory.path / "runs") == []


def test_a_missing_root_isn_t_made(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        Directory.open(tmp_path / "missing", "k")
    assert os.listdir(tmp_path) == []


def test_a_foreign_file_is_reported_by_name(root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", nothing)
    (root / "jobs/k/.nfs0001").touch()  # an NFS client's own
    Directory.open(root, "k")
    (root / "jobs/k/notes.txt").touch()
    with pytest.raises(Damaged, match=r"jobs/k/notes.txt: foreign in a job directory"):
        Directory.open(root, "k")
    (root / "jobs/k/notes.txt").unlink()
    (root / "jobs/k/runs/t2").mkdir()
    (root / "jobs/k/runs/t2/notes").touch()
    with pytest.raises(Damaged, match=r"runs/t2/notes: foreign"):
        Directory.open(root, "k").outcome_of("t2")


def damage(path: Path, how: Callable[[bytes], bytes]) -> None:
    path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize(
    "how", [lambda d: d[:-9], lambda d: d[:7], lambda d: b"", lambda d: d.replace(b"a", b"b")]
)
def test_a_damaged_manifest_is_reported_by_name(
    how: Callable[[bytes], bytes], root: Path, scratch: Path
) -> None:
    run(root, scratch, "t1", write("a", "1"))
    damage(root / "jobs/k/runs/t1/claim-of-t1/manifest-0", how)
    before = files_below(root)
    with pytest.raises(Damaged, match="claim-of-t1/manifest-0: the manifest isn't the one"):
        _ = Directory.open(root, "k").head().manifest
    assert files_below(root) == before


def test_a_missing_manifest_is_reported_by_name(root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", nothing)
    (root / "jobs/k/runs/t1/claim-of-t1/manifest-0").unlink()
    with pytest.raises(Damaged, match="claim-of-t1/manifest-0: the manifest is missing"):
        _ = Directory.open(root, "k").head().manifest


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (lambda path: damage(path, lambda d: d[:-1]), "isn't what was committed as 'a'"),
        (lambda path: damage(path, lambda d: b"X" + d[1:]), "isn't what was committed as 'a'"),
        (lambda path: path.unlink(), "a stored file is missing"),
        (both(Path.unlink, Path.mkdir), "should be a plain file"),
        (both(Path.unlink, lambda path: path.symlink_to("/etc/passwd")), "should be a plain file"),
    ],
)
def test_a_damaged_stored_file_is_reported_by_name(
    how: Callable[[Path], object], what: str, root: Path, scratch: Path
) -> None:
    run(root, scratch, "t1", write("a", "some content"))
    how(root / "jobs/k/runs/t1/claim-of-t1/data-0-1")
    with pytest.raises(Damaged, match=f"claim-of-t1/data-0-1.*{what}"):
        run(root, scratch / "of another node", "t2", nothing)
    assert Directory.open(root, "k").head().n == 1


def test_a_half_written_run_is_normal_and_left_alone(root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", write("a", "1"))
    half = root / "jobs/k/runs/t2/dead"
    half.mkdir(parents=True)
    (half / "data-1-1").write_bytes(b"ha")
    (half / "manifest-1").write_bytes(b"cohort mani")
    (half / "record-2-1").write_bytes(b"cohort rec")
    assert Directory.open(root, "k").outcome_of("t2") is None
    assert run(root, scratch, "t2", write("b", "2"), claim_id="alive").n == 2
    assert (half / "record-2-1").read_bytes() == b"cohort rec"


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("at", range(12))
def test_a_disk_that_fills_up_anywhere_changes_nothing(
    call: str, at: int, root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, scratch, "t1", write("a", "1"))
    directory = Directory.open(root, "k")
    attempt = directory.begin("t2", "c", directory.head())
    tree = WorkTree(scratch, "k", "c")
    tree.checkout(directory, attempt.base)
    write("b", "2")(tree.path)
    real, calls = getattr(os, call), [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] > at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        try:
            committed = attempt.commit(tree, None, attempt=1, node="n").n
        except Unavailable as error:
            assert "No space left on device" in str(error)
            committed = 1
    head = Directory.open(root, "k").head()
    # The one that may be there without having been told so: the link was made, its fsync failed.
    if outcome := directory.outcome_of("t2"):
        assert (head.n, outcome.n) == (2, 2)
        assert contents(head) == {"a": b"1", "b": b"2"}
    else:
        assert (head.n, committed) == (1, 1)
        assert contents(head) == {"a": b"1"}
        assert run(root, scratch, "t2", write("b", "2")).n == 2


# Every crash point, in one process; real kills are in test_storage_kill.py.

OURS = sorted(p for p in crashpoints.POINTS if p.startswith(("run:", "commit:")))


@pytest.mark.parametrize("point", OURS)
def test_a_crash_leaves_the_old_version_or_the_new_one(
    point: str, root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, scratch, "t1", write("a", "1"))

    def crash(reached: str) -> None:
        if reached == point:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(crashpoints, "on_reach", crash)
        with pytest.raises(Crash):
            run(root, scratch, "t2", both(write("a", "2"), write("b", "2")))
    directory = Directory.open(root, "k")
    committed = point in ("commit:after-link", "commit:head-written")
    outcome = directory.outcome_of("t2")
    assert (outcome is not None) == committed
    assert contents(directory.head()) == ({"a": b"2", "b": b"2"} if committed else {"a": b"1"})
    again = run(root, scratch, "t2", write("a", "3"), claim_id="second")
    assert again.n == 2
    assert contents(directory.head())["a"] == (b"2" if committed else b"3")


def test_stored_content_never_changes(root: Path, scratch: Path) -> None:
    for n in range(3):
        run(root, scratch, f"t{n}", write("a", str(n)))
    before = {name: data for name, data in files_below(root).items() if not name.endswith("HEAD")}
    run(root, scratch, "t9", both(write("a", "9"), write("b", "9")))
    end(root, "t10")
    after = files_below(root)
    assert {name: after[name] for name in before} == before


def test_a_record_whose_writer_died_before_its_fsync_is_made_durable_by_who_reads_it(
    root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, scratch, "t1", nothing)
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_directory", synced.append)
    Directory(root, "k").outcome_of("t1")
    assert synced == [root / "jobs/k/log/0"]


def test_everything_is_durable_before_the_link_and_the_link_after_it(
    root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, link = os.fsync, os.link

    def noting_fsync(file: int) -> None:
        steps.append(os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), root / "jobs/k"))
        fsync(file)

    def noting_link(*args: Any, **kwargs: Any) -> None:
        link(*args, **kwargs)
        steps.append("LINK")

    directory = Directory.open(root, "k")
    for n in range(1, 1000):  # to the end of the first bucket, so that the next one is made
        directory.log.path(n).parent.mkdir(exist_ok=True)
        filler = Record(n, n - 1, "k", f"f{n}", "c", 1, "FAILURE", None, None, "node", "now")
        directory.log.path(n).write_bytes(filler.encode())
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "link", noting_link)
    assert run(root, scratch, "t", both(write("a", "1"), write("b", "2")), claim_id="c").n == 1000
    mine = "runs/t/c"
    at = steps.index("LINK")
    order = [f"{mine}/{name}" for name in ("data-999-1", "manifest-999", "record-1000-1")]
    places = [steps.index(name) for name in order]
    assert places == sorted(places)
    assert {*order, mine, "runs/t", "runs"} <= set(steps[:at])
    assert mine in steps[steps.index(f"{mine}/record-1000-1") : at]
    assert {"log", "log/0"} <= set(steps[:at])
    assert steps[at + 1 :] == ["log/1"]
