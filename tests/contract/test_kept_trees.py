"""A work tree that is kept between runs: what is fetched, what isn't, and what is believed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import errors
from storage import fetch, scratch, treeindex
from storage.directory import Directory
from storage.listing import Listing
from storage.manifest import Extent, File
from storage.worktree import WorkTree
from tests.storage_kit import both, run, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def node(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@contextmanager
def fetched() -> Iterator[list[str]]:
    """The files that are brought from the shared file system meanwhile."""
    names: list[str] = []
    real = fetch.bring

    def noting(directory: Path, files: list[File], *args: object) -> object:
        names.extend(file.path for file in files)
        return real(directory, files, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "bring", noting)
        yield names


def opened(root: Path, node: Path, claim_id: str = "c") -> WorkTree:
    """The head's tree, as a run would get it."""
    directory = Directory.open(root, "k")
    tree = WorkTree(node, "k", claim_id)
    tree.checkout(directory, directory.head())
    return tree


def shape(tree: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(tree):
        for name in folders + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            what: object = "folder"
            if os.path.islink(path):
                what = os.readlink(path)
            elif name in files:
                what = Path(path).read_bytes()
            found[os.path.relpath(path, tree)] = (what, oct(status.st_mode), status.st_mtime_ns)
    return found


def fill(tree: Path) -> None:
    (tree / "folder/deep").mkdir(parents=True)
    (tree / "empty").mkdir()
    for n in range(20):
        (tree / f"folder/f{n}").write_text(f"{n}")
    (tree / "folder/deep/large").write_bytes(os.urandom(3_000_000))
    (tree / "link").symlink_to("folder")
    (tree / "script").write_text("#!")
    (tree / "script").chmod(0o755)


def test_after_a_success_the_tree_is_at_the_new_version(root: Path, node: Path) -> None:
    run(root, node, "t1", fill)
    with fetched() as names:
        run(root, node, "t2", write("folder/f3", "new"))
        run(root, node, "t3", lambda tree: (tree / "folder/f4").unlink())
        tree = opened(root, node)
    assert names == []
    assert (tree.path / "folder/f3").read_text() == "new"
    assert not (tree.path / "folder/f4").exists()


def test_another_node_s_changes_are_all_that_is_fetched(root: Path, node: Path) -> None:
    other = node.with_name("other")
    run(root, node, "t1", fill)
    run(root, other, "t2", both(write("folder/f3", "new"), write("folder/deep/more", "1")))
    run(root, other, "t3", lambda tree: (tree / "empty").rmdir())
    with fetched() as names:
        tree = opened(root, node)
    assert sorted(names) == ["folder/deep/more", "folder/f3"]
    assert shape(tree.path) == shape(opened(root, node.with_name("new")).path)


def seal_all(tree: Path) -> None:
    (tree / "folder/deep").chmod(0)
    (tree / "folder").chmod(0o500)


def all_removed(tree: Path) -> None:
    scratch.wipe(tree)
    tree.mkdir()


def turned_around(tree: Path) -> None:
    """Files become folders, folders files, links something else."""
    (tree / "script").unlink()
    (tree / "script").mkdir()
    (tree / "script/in").touch()
    (tree / "empty").rmdir()
    (tree / "empty").touch()
    (tree / "link").unlink()
    (tree / "link").symlink_to("/etc")
    (tree / "folder/f1").unlink()
    (tree / "folder/f1").symlink_to("f2")
    os.mkfifo(tree / "fifo")


MESSES: dict[str, Callable[[Path], object]] = {
    "rewritten": write("folder/f3", "broken"),
    "appended": lambda tree: (tree / "folder/deep/large").open("ab").write(b"x"),
    "cut": lambda tree: os.truncate(tree / "folder/deep/large", 5),
    "modes": lambda tree: (tree / "script").chmod(0o4711),
    "folder modes": lambda tree: (tree / "folder").chmod(0o1700),
    "times": lambda tree: os.utime(tree / "folder", ns=(5, 5)),
    "link times": lambda tree: os.utime(tree / "link", ns=(5, 5), follow_symlinks=False),
    "new": lambda tree: (tree / "a/b/c").mkdir(parents=True),
    "gone": lambda tree: (tree / "folder/f7").unlink(),
    "moved": lambda tree: (tree / "folder").rename(tree / "elsewhere"),
    "linked": lambda tree: os.link(tree / "folder/f1", tree / "other name"),
    "swapped": lambda tree: os.replace(tree / "folder/f1", tree / "folder/f2"),
    "turned around": turned_around,
    "sealed": seal_all,
    "all removed": all_removed,
    "top folder": lambda tree: tree.chmod(0),
}


def failing(how: str) -> Callable[[Path], object]:
    def body(tree: Path) -> None:
        MESSES[how](tree)
        raise RuntimeError("the job failed")

    return body


@pytest.mark.parametrize("how", MESSES)
def test_what_a_failed_run_did_is_put_back(how: str, root: Path, node: Path) -> None:
    run(root, node, "t1", fill)
    before = shape(opened(root, node.with_name("new")).path)
    with pytest.raises(RuntimeError):
        run(root, node, "t2", failing(how))
    with fetched() as names:
        tree = opened(root, node)
    assert shape(tree.path) == before
    if how not in ("moved", "sealed", "all removed"):
        assert len(names) <= 3
    # And what is noted of it is right: nothing looks touched, and nothing is fetched again.
    assert (tree.changes().touched, tree.changes().others) == (frozenset(), {})
    tree.release()
    with fetched() as names:
        opened(root, node)
    assert names == []


KILLED = """
import os, sys
from pathlib import Path
from storage.directory import Directory
from storage.worktree import WorkTree
directory = Directory.open(Path(sys.argv[1]), "k")
calls, at = 0, int(sys.argv[3])

def dies(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    return call

for name in ("open", "write", "unlink", "mkdir", "rmdir", "symlink", "chmod", "utime", "replace",
             "fchmod", "pwrite", "ftruncate"):
    setattr(os, name, dies(getattr(os, name)))
from storage import fetch
fetch.THREADS = 1
tree = WorkTree(Path(sys.argv[2]), "k", "killed")
tree.checkout(directory, directory.head())
"""


def test_a_checkout_killed_anywhere_is_never_believed(root: Path, node: Path) -> None:
    """The tree goes from version 1 to 2; killed at each call in between, the next run finds 2."""
    other = node.with_name("other")
    run(root, node, "t1", fill)
    again = write("folder/deep/large", "x" * 100_000)
    run(root, other, "t2", both(turned_around, again, lambda t: (t / "fifo").unlink()))
    whole = shape(opened(root, other).path)
    environment = {"PYTHONPATH": str(Path(errors.__file__).parent)}
    at, copy = 0, node.with_name("copy")
    while True:
        at += 3
        scratch.wipe(copy)
        # Made by this node before, at version 1, and with identities of its own.
        run_at_one(root, copy)
        command = [sys.executable, "-c", KILLED, str(root), str(copy), str(at)]
        status = subprocess.run(command, env=environment, check=False).returncode
        tree = opened(root, copy)
        assert shape(tree.path) == whole, f"killed at call {at}"
        tree.release()
        if status != -signal.SIGKILL:
            assert (status, at > 30) == (0, True)
            return


def run_at_one(root: Path, node: Path) -> None:
    directory = Directory.open(root, "k")
    tree = WorkTree(node, "k", "c")
    tree.checkout(directory, directory.version(1))
    tree.release()


def test_two_runs_at_once_have_trees_of_their_own(root: Path, node: Path) -> None:
    run(root, node, "t1", fill)
    one, two = opened(root, node), opened(root, node)
    assert one.path != two.path
    assert shape(one.path) == shape(two.path)
    first = one.path
    one.release()
    assert opened(root, node).path == first


def test_the_lock_dies_with_its_process(root: Path, node: Path) -> None:
    holding = (
        "import sys, time; from pathlib import Path; from storage.scratch import take\n"
        "slot = take(Path(sys.argv[1]), 'k'); print(slot.path, flush=True); time.sleep(99)"
    )
    environment = {"PYTHONPATH": str(Path(errors.__file__).parent)}
    command = [sys.executable, "-c", holding, str(node)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        held = Path(os.fsdecode(process.stdout.readline().strip()))
        with_it = scratch.take(node, "k")
        assert with_it.path != held
        process.kill()
        process.wait()
    assert scratch.take(node, "k").path == held


def test_what_is_left_at_work_after_the_commit_isn_t_believed(root: Path, node: Path) -> None:
    run(root, node, "t1", fill)
    slot = node / "trees/k/0/tree"
    status = os.stat(slot / "folder/f3")
    (slot / "folder/f3").write_text("9")  # by a process that the run left behind
    os.utime(slot / "folder/f3", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (opened(root, node).path / "folder/f3").read_text() == "3"


@pytest.mark.parametrize("where", [0, 10, 200, -5])
def test_a_damaged_index_isn_t_believed(where: int, root: Path, node: Path) -> None:
    run(root, node, "t1", fill)
    index = node / "trees/k/0/index"
    data = bytearray(index.read_bytes())
    data[where] ^= 1
    index.write_bytes(data)
    with fetched() as names:
        tree = opened(root, node)
    assert len(names) == 22
    assert shape(tree.path) == shape(opened(root, node.with_name("new")).path)


def test_a_tree_of_before_a_start_of_the_machine_isn_t_believed(
    root: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, node, "t1", fill)
    monkeypatch.setattr(treeindex, "boot_id", lambda: "another")
    with fetched() as names:
        opened(root, node)
    assert len(names) == 22


def without_files(tree: Path) -> None:
    for path in tree.glob("*/f*"):
        path.unlink()


def test_a_kept_tree_whose_manifest_was_collected_is_made_anew(root: Path, node: Path) -> None:
    run(root, node, "t1", fill)
    run(root, node.with_name("other"), "t2", without_files)
    head = Directory.open(root, "k").head()
    assert head.listing.head.full is None  # so that version 1's is needed by nobody else
    (root / "jobs/k/runs/t1/claim-of-t1/manifest-0").unlink()
    assert not list(opened(root, node).path.glob("*/f*"))


# Eviction.


def used(path: Path, ago: float) -> None:
    os.utime(path, (time.time() - ago,) * 2)


def test_trees_go_by_age_and_for_room_and_never_one_in_use(root: Path, node: Path) -> None:
    for key in ("old", "older", "new", "at work"):
        run(root, node, "t1", fill, key=key)
        used(node / "trees" / key / "0", {"old": 500, "older": 900, "new": 10}.get(key, 9999))
    at_work = scratch.take(node, "at work")
    used(at_work.path, 9999)
    assert scratch.evict(node, 1000, 0) == []
    assert scratch.evict(node, 600, 0) == [node / "trees/older/0"]
    free = iter([0, 10**12])
    assert scratch.evict(node, 1000, 10, lambda path: next(free)) == [node / "trees/old/0"]
    assert sorted(os.listdir(node / "trees")) == ["at work", "new"]
    at_work.release()
    used(at_work.path, 9999)
    assert scratch.evict(node, 1000, 0) == [at_work.path]
    run(root, node, "t2", write("a", "1"), key="old")


def test_nothing_but_trees_is_evicted(root: Path, node: Path) -> None:
    (node / "keyless-abc/0").mkdir(parents=True)
    (node / "keyless-abc/0/lock").touch()
    used(node / "keyless-abc/0", 9999)
    (node / "trees/k/notes").mkdir(parents=True)
    assert scratch.evict(node, 1, 10**18) == []


def test_a_tree_evicted_between_open_and_lock_isn_t_used(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    first = scratch.take(node, "k")
    first.release()
    real = fcntl.flock
    once: list[int] = []

    def late(file: int, how: int) -> None:
        if not once:
            once.append(1)
            scratch.evict(node, -1, 0)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    taken = scratch.take(node, "k")
    assert os.stat(taken.path / "lock").st_ino == os.fstat(taken._lock).st_ino


# What a version keeps of a file.


def pieces(root: Path) -> dict[str, tuple[int, list[tuple[str, int]]]]:
    listing: Listing = Directory.open(root, "k").head().listing
    return {
        path: (
            entry.length,
            [(e.stored.split("/")[1] if e.stored else "", e.length) for e in entry.extents],
        )
        for path, entry in listing.entries.items()
        if isinstance(entry, File)
    }


def append(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda tree: (tree / name).open("ab").write(data)


def test_a_file_that_only_grew_is_stored_as_what_was_added(root: Path, node: Path) -> None:
    data = os.urandom(300_000)
    run(root, node, "t1", append("log", data))
    run(root, node, "t2", append("log", b"more"))
    assert pieces(root) == {"log": (300_004, [("t1", 300_000), ("t2", 4)])}
    assert (root / "jobs/k/runs/t2/claim-of-t2/data-1-1").read_bytes() == b"more"

    def rewritten_and_grown(tree: Path) -> None:
        with open(tree / "log", "r+b") as file:
            file.write(b"new beginning")
            file.seek(0, os.SEEK_END)
            file.write(b"end")

    run(root, node, "t3", rewritten_and_grown)
    expected = b"new beginning" + data[13:] + b"moreend"
    assert Directory.open(root, "k").head().read("log") == expected
    assert (opened(root, node.with_name("new")).path / "log").read_bytes() == expected


def test_a_file_of_many_short_pieces_is_stored_anew(root: Path, node: Path) -> None:
    data = os.urandom(100_000)
    run(root, node, "t0", append("log", data))
    for n in range(1, 45):
        run(root, node, f"t{n}", append("log", b"%03d" % n))
        assert len(pieces(root)["log"][1]) <= 34
    assert len(pieces(root)["log"][1]) < 20
    assert Directory.open(root, "k").head().read("log").startswith(data + b"001002003")


def test_of_a_large_file_only_what_changed_is_stored_and_fetched(
    root: Path, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage import contents

    monkeypatch.setattr(contents, "A_PIECE", 100_000)
    other = node.with_name("other")
    data = bytearray(os.urandom(1_000_000))
    run(root, node, "t1", append("large", bytes(data)))

    def patched(tree: Path) -> None:
        with open(tree / "large", "r+b") as file:
            file.seek(450_000)
            file.write(b"patch")

    run(root, other, "t2", patched)
    data[450_000:450_005] = b"patch"
    assert pieces(root)["large"][1] == [("t2" if n == 4 else "t1", 100_000) for n in range(10)]
    read: list[str] = []
    real = fetch.Stored.read

    def noting(self: fetch.Stored, extent: Extent, of: str, ahead: int) -> bytes:
        read.append(extent.stored)
        return real(self, extent, of, ahead)

    monkeypatch.setattr(fetch.Stored, "read", noting)
    assert (opened(root, node).path / "large").read_bytes() == data
    assert read == ["runs/t2/claim-of-t2/data-1-1"]


def test_holes_stay_holes(root: Path, node: Path) -> None:
    def sparse(tree: Path) -> None:
        with open(tree / "sparse", "wb") as file:
            file.write(b"start")
            file.seek(50_000_000)
            file.write(b"middle")
            file.truncate(90_000_000)
        os.truncate(os.open(tree / "all", os.O_CREAT | os.O_WRONLY), 10_000_000)

    run(root, node, "t1", sparse)
    stored = sum(os.stat(p).st_size for p in (root / "jobs/k/runs").rglob("data-*"))
    assert stored < 100_000
    tree = opened(root, node.with_name("new"))
    for name, length in (("sparse", 90_000_000), ("all", 10_000_000)):
        status = os.stat(tree.path / name)
        assert (status.st_size, status.st_blocks * 512 < 100_000) == (length, True)
    with open(tree.path / "sparse", "rb") as file:
        assert file.read(5) == b"start"
        file.seek(50_000_000)
        assert file.read(7) == b"middle\0"
    with Directory.open(root, "k").head().open("sparse") as stream:
        stream.seek(49_999_998)
        assert stream.read(8) == b"\0\0middle"


def test_small_files_share_a_stored_file(root: Path, node: Path) -> None:
    run(root, node, "t1", lambda tree: [write(f"f{n}", f"{n}")(tree) for n in range(200)])
    assert len(list((root / "jobs/k/runs").rglob("data-*"))) == 1
    tree = opened(root, node.with_name("new"))
    assert all((tree.path / f"f{n}").read_text() == f"{n}" for n in range(200))


def test_hard_links_are_stored_once_and_stay_in_a_kept_tree(root: Path, node: Path) -> None:
    def linked(tree: Path) -> None:
        (tree / "a").write_bytes(os.urandom(200_000))
        os.link(tree / "a", tree / "b")

    run(root, node, "t1", linked)
    assert sum(os.stat(p).st_size for p in (root / "jobs/k/runs").rglob("data-*")) == 200_000
    kept, new = opened(root, node), opened(root, node.with_name("new"))
    assert os.stat(kept.path / "a").st_nlink == 2
    assert os.stat(new.path / "a").st_nlink == 1
    new.release()
    run(root, node.with_name("new"), "t2", append("a", b"only this one"))
    kept.release()
    tree = opened(root, node)  # the fix of one name must not reach through to the other
    assert os.stat(tree.path / "b").st_size == 200_000
    assert (tree.path / "a").read_bytes().endswith(b"only this one")


# Manifests.


def test_every_64_versions_there_is_a_full_manifest_and_opening_reads_two(
    root: Path, node: Path
) -> None:
    run(root, node, "t1", lambda tree: [write(f"f{n}", "x" * n)(tree) for n in range(300)])
    fulls = []
    for n in range(2, 140):
        run(root, node, f"t{n}", write(f"f{n % 7}", f"{n}"))
        listing = Directory.open(root, "k").head().listing
        if listing.head.full is None:
            fulls.append(n)
        assert listing.head.depth < 64
        assert len(listing.changed) < 10 or listing.head.full is None
    assert fulls == [65, 129]
    new = opened(root, node.with_name("new"))
    assert {n: (new.path / f"f{n}").read_text() for n in (2, 6, 50)} == {
        2: "135",
        6: "139",
        50: "x" * 50,
    }


def test_a_kept_tree_follows_across_a_full_manifest(root: Path, node: Path) -> None:
    other = node.with_name("other")
    run(root, node, "t1", lambda tree: [write(f"f{n}", "x" * n)(tree) for n in range(150)])
    for n in range(2, 70):
        run(root, other, f"t{n}", write("g" if n % 2 else "f1", f"{n}"))
    with fetched() as names:
        tree = opened(root, node)
    assert sorted(names) == ["f1", "g"]
    assert shape(tree.path) == shape(opened(root, other).path)


def test_a_path_is_found_in_a_full_manifest_without_reading_the_others(
    root: Path, node: Path
) -> None:
    names = [f"d{n}/f{m}" for n in range(9) for m in range(9)] + ["ü", "\udcff", 'a"b', "z,]"]

    def body(tree: Path) -> None:
        for name in names:
            (tree / name).parent.mkdir(exist_ok=True)
            (tree / name).write_text(name.encode("utf-8", "surrogateescape").hex())

    run(root, node, "t1", body)
    run(root, node, "t2", write("one more", ""))
    listing = Directory.open(root, "k").head().listing
    assert listing.head.full is not None
    for name in names:
        entry = listing.get(name)
        assert isinstance(entry, File) and entry.path == name
    assert listing.get("d3") is not None
    for name in ("", "a", "d3/f", "d3/f99", "zz", "é"):
        assert listing.get(name) is None
    assert "_full_entries" not in listing.__dict__
