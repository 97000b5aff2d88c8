"""A work tree: what survives the way into a version and out, and what doesn't and is named."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import stat
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from errors import Damaged, Refused
from storage import fetch, look, manifest, scan, sealed, worktree
from storage.contents import Store
from storage.directory import Attempt, Directory
from storage.listing import Listing
from storage.log import Reference
from storage.manifest import Entry, Extent, File, Folder, Head, Symlink
from storage.treefiles import Files
from storage.worktree import WorkTree
from tests.storage_kit import both, contents, run, write

YEAR_2001 = 1_000_000_000_123_456_789


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def start(root: Path, scratch: Path, task_id: str) -> tuple[Attempt, WorkTree]:
    directory = Directory.open(root, "k")
    attempt = directory.begin(task_id, f"c-{task_id}", directory.head())
    tree = WorkTree(scratch, "k", f"c-{task_id}")
    tree.checkout(directory, attempt.base)
    return attempt, tree


def shape(tree: Path) -> dict[str, object]:
    """Everything that a checkout promises to bring back, by path."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(tree):
        for name in folders + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            key = os.path.relpath(path, tree)
            if stat.S_ISLNK(status.st_mode):
                found[key] = ("link", os.readlink(path), status.st_mtime_ns)
            else:
                what = Path(path).read_bytes() if stat.S_ISREG(status.st_mode) else "folder"
                found[key] = (what, oct(status.st_mode & 0o7777), status.st_mtime_ns)
    return found


def fill(tree: Path) -> None:
    """A tree with everything in it that a version can hold."""
    (tree / "empty").mkdir()
    (tree / "deep/er/still").mkdir(parents=True)
    (tree / "deep/er/still/file").write_bytes(os.urandom(2_000_000))
    (tree / "script.sh").write_text("#!/bin/sh\n")
    (tree / "script.sh").chmod(0o755)
    (tree / "secret").write_text("secret")
    (tree / "secret").chmod(0o400)
    (tree / "nothing").touch()
    (tree / "nothing").chmod(0)
    for name in (
        b"caf\xe9 latin-1",
        b"\xff\xfe",
        "ü 🦉".encode(),
        b"new\nline",
        b"-rf",
        b"a\\b",
        b" ",
    ):
        Path(os.fsdecode(os.fsencode(tree) + b"/" + name)).write_bytes(name)
    (tree / "inside").symlink_to("deep/er/still/file")
    (tree / "outside").symlink_to("/etc/passwd")
    (tree / "up").symlink_to("../../../..")
    (tree / "dangling").symlink_to(os.fsdecode(b"no\xffwhere"))
    (tree / "to-folder").symlink_to("deep")
    os.utime(tree / "script.sh", ns=(YEAR_2001, YEAR_2001))
    (tree / "sealed").mkdir()
    (tree / "sealed/in").touch()
    (tree / "sealed").chmod(0o500)
    os.utime(tree / "deep/er", ns=(YEAR_2001, YEAR_2001))


def test_a_version_is_the_tree_exactly(root: Path, scratch: Path) -> None:
    seen: list[dict[str, object]] = []
    run(root, scratch, "t1", both(fill, lambda tree: seen.append(shape(tree))))
    for node in (scratch, scratch / "of another node"):
        run(root, node, f"t-{node.name}", lambda tree: seen.append(shape(tree)))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["outside"][:2] == ("link", "/etc/passwd")  # type: ignore[index]
    assert len(seen[0]) == 22
    directory = Directory.open(root, "k")
    assert directory.head().manifest == directory.version(1).manifest
    directory.head().copy_to(scratch / "copy")
    assert shape(scratch / "copy") == seen[0]


def test_what_a_version_can_t_hold_is_left_out_and_named(root: Path, scratch: Path) -> None:
    attempt, tree = start(root, scratch, "t1")
    os.mkfifo(tree.path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tree.path)  # the path of a socket must be short
        try:
            listening.bind("socket")
        finally:
            os.chdir(here)
    write("program", "x")(tree.path)
    (tree.path / "program").chmod(0o4755)
    (tree.path / "shared").mkdir()
    (tree.path / "shared").chmod(0o3777)
    attempt.commit(tree, None, attempt=1, node="n")
    assert [(entry.path, entry.what) for entry in attempt.left_out] == [
        ("fifo", "FIFO"),
        ("program", "set-uid bit"),
        ("shared", "set-gid bit"),
        ("shared", "sticky bit"),
        ("socket", "socket"),
    ]
    assert Directory.open(root, "k").head().manifest.left_out == attempt.left_out
    seen: list[dict[str, object]] = []
    run(root, scratch, "t2", lambda tree: seen.append(shape(tree)))
    assert sorted(seen[0]) == ["program", "shared"]
    assert seen[0]["program"][1] == "0o755"  # type: ignore[index]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
def test_a_device_is_left_out_and_named(root: Path, scratch: Path) -> None:
    attempt, tree = start(root, scratch, "t1")
    try:
        os.mknod(tree.path / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("not allowed in this container")
    attempt.commit(tree, None, attempt=1, node="n")
    assert [entry.what for entry in attempt.left_out] == ["character device"]


def rewrite_in_place(path: Path, number: int = 9) -> None:
    """The same length, and the mtime put back: only the kernel's ctime tells."""
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.write(b"%d" % number)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


TOUCHES: dict[str, Callable[[Path], object]] = {
    "appended": lambda path: path.open("a").write("x"),
    "rewritten": rewrite_in_place,
    "chmod": lambda path: path.chmod(0o600),
    "utime": lambda path: os.utime(path, ns=(5, 5)),
    "replaced": lambda path: (
        path.with_name("n").write_text("abc"),
        path.with_name("n").rename(path),
    ),
}


@pytest.mark.parametrize("how", TOUCHES)
def test_a_touched_file_is_seen(how: str, root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", lambda tree: [write(f"f{n}", "abc")(tree) for n in range(5)])
    _, tree = start(root, scratch, "t2")
    assert tree.changes().touched == frozenset()
    TOUCHES[how](tree.path / "f3")
    assert tree.changes().touched == {"f3"}


def with_a_clock_of(tick_ns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local file system whose time stamps are that coarse."""

    def coarse(status: os.stat_result) -> look.Identity:
        inode, length, mtime_ns, ctime_ns, mode = real(status)
        return inode, length, mtime_ns, ctime_ns // tick_ns * tick_ns, mode

    real = look.identity_of
    for module in (look, scan, fetch, worktree):
        monkeypatch.setattr(module, "identity_of", coarse)


def in_place(number: int, tree: Path) -> None:
    rewrite_in_place(tree / "f", number)


def test_a_rewrite_right_after_the_checkout_is_seen(
    root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the tick of the checkout it would look untouched; so no run begins within it."""
    with_a_clock_of(50_000_000, monkeypatch)
    run(root, scratch, "t0", write("f", "abcdef"))
    for n in range(1, 6):
        run(root, scratch, f"t{n}", partial(in_place, n))
        head = Directory.open(root, "k").head()
        assert head.manifest.files[0].extents[0].stored.startswith(f"runs/t{n}/")


def test_with_a_clock_that_tells_nothing_every_file_is_read_and_no_tree_is_kept(
    root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "A_TICK", 0.05)
    run(root, scratch, "t1", write("f", "abc"))
    with_a_clock_of(10**19, monkeypatch)
    _, tree = start(root, scratch / "new", "t2")
    assert tree.changes().touched == {"f"}
    rewrite_in_place(tree.path / "f")
    tree.release()
    seen: list[str] = []
    run(root, scratch / "new", "t3", lambda tree: seen.append((tree / "f").read_text()))
    assert seen == ["abc"]


def test_what_wasn_t_touched_isn_t_read(root: Path, scratch: Path) -> None:
    run(root, scratch, "t1", both(write("a", "1"), write("b", "1")))
    attempt, tree = start(root, scratch, "t2")
    write("b", "2")(tree.path)
    opened: list[str] = []
    real = os.open

    def noting(path: str, *args: int, **kwargs: int) -> int:
        opened.append(os.fspath(path))
        return real(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", noting)
        attempt.commit(tree, None, attempt=1, node="n")
    assert str(tree.path / "b") in opened
    assert str(tree.path / "a") not in opened


def gone(tree: Path) -> None:
    (tree / "a").unlink()


CHANGES: dict[str, Callable[[Path], object]] = {
    "grew": lambda tree: (tree / "a").open("a").write("more"),
    "shrank": lambda tree: os.truncate(tree / "a", 1),
    "rewritten": lambda tree: rewrite_in_place(tree / "a"),
    "gone": gone,
    "a link now": both(gone, lambda tree: (tree / "a").symlink_to("/etc/passwd")),
    "a FIFO now": both(gone, lambda tree: os.mkfifo(tree / "a")),
    "a new one": lambda tree: (tree / "new").touch(),
    "a folder gone": lambda tree: (tree / "folder").rmdir(),
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("after", [0, 1])
def test_a_tree_that_changes_while_it_is_committed_is_refused(
    how: str, after: int, root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root, scratch, "t1", both(write("old", "1"), lambda tree: (tree / "folder").mkdir()))
    attempt, tree = start(root, scratch, "t2")
    for name in ("0", "a", "b"):
        write(name, "content")(tree.path)
    real, copied = Store.add, [0]

    def interfering(
        self: Store, local: Path, path: str, old: File | None, sparse: bool
    ) -> tuple[Extent, ...]:
        if copied[0] == after * 2:  # before the first file, "0", or after "a" was read
            CHANGES[how](local.parent)
        copied[0] += 1
        return real(self, local, path, old, sparse)

    monkeypatch.setattr(Store, "add", interfering)
    with pytest.raises(
        Refused, match=r"changed while it was committed|can't be committed|went away"
    ):
        attempt.commit(tree, None, attempt=1, node="n")
    assert copied[0] >= 1
    directory = Directory.open(root, "k")
    assert (directory.head().n, directory.outcome_of("t2")) == (1, None)
    assert attempt.conclude("FAILURE", "it changed", attempt=1, node="n").n == 2
    assert contents(directory.head()) == {"old": b"1"}


def test_a_version_is_the_tree_of_one_moment(
    root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that the run left alone and that is written to after that moment is not in it."""
    run(root, scratch, "t1", both(write("a", "1"), write("old", "1")))
    attempt, tree = start(root, scratch, "t2")
    write("a", "2")(tree.path)
    real = Store.finish

    def too_late(self: Store) -> None:
        write("old", "too late")(tree.path)
        real(self)

    monkeypatch.setattr(Store, "finish", too_late)
    attempt.commit(tree, None, attempt=1, node="n")
    tree.release()
    assert contents(Directory.open(root, "k").head()) == {"a": b"2", "old": b"1"}
    seen: list[str] = []
    monkeypatch.undo()
    run(root, scratch, "t3", lambda tree: seen.append((tree / "old").read_text()))
    assert seen == ["1"]


@pytest.mark.parametrize("look", ["one that was there", "a new one"])
def test_a_file_that_changes_while_the_tree_is_looked_at_is_refused(
    look: str, root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look may have passed one of two files that belong together before both changed."""
    run(root, scratch, "t1", write("a", "1"))
    attempt, tree = start(root, scratch, "t2")
    name = "a" if look == "one that was there" else "b"

    def after_the_moment(path: Path, before: Files) -> scan.Scan:
        write(name, "new")(path)
        return scan.scan(path, before)

    monkeypatch.setattr(worktree, "scan", after_the_moment)
    with pytest.raises(Refused, match="changed while it was committed"):
        attempt.commit(tree, None, attempt=1, node="n")
    assert Directory.open(root, "k").head().n == 1


def test_a_file_that_changes_twice_in_one_tick_while_it_is_committed_is_seen(
    root: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looks see the same: length, mtime, and the ctime of the one tick. So neither counts."""
    with_a_clock_of(1_000_000_000, monkeypatch)
    attempt, tree = start(root, scratch, "t1")
    write("a", "1")(tree.path)
    looked, added = scan.scan, Store.add

    def rewritten_before(path: Path, before: Files) -> scan.Scan:
        rewrite_in_place(path / "a", 2)
        return looked(path, before)

    def and_again(
        self: Store, local: Path, path: str, old: File | None, sparse: bool
    ) -> tuple[Extent, ...]:
        extents = added(self, local, path, old, sparse)
        rewrite_in_place(local, 3)
        return extents

    monkeypatch.setattr(worktree, "scan", rewritten_before)
    monkeypatch.setattr(Store, "add", and_again)
    with pytest.raises(Refused, match="changed while it was committed"):
        attempt.commit(tree, None, attempt=1, node="n")


def test_a_tree_of_another_version_isn_t_committed(root: Path, scratch: Path) -> None:
    _, tree = start(root, scratch, "t1")
    run(root, scratch, "t2", write("a", "1"))
    directory = Directory.open(root, "k")
    attempt = directory.begin("t3", "c", directory.head())
    with pytest.raises(Refused, match="holds version 0, not 1"):
        attempt.commit(tree, None, attempt=1, node="n")


def test_a_tree_belongs_to_one_attempt(root: Path, scratch: Path) -> None:
    attempt, tree = start(root, scratch, "t1")
    write("a", "1")(tree.path)
    with pytest.raises(Refused, match="exists; a work tree has one attempt"):
        tree.checkout(attempt.directory, attempt.base)
    assert (tree.path / "a").read_text() == "1"


def test_two_attempts_of_a_key_have_trees_of_their_own(root: Path, scratch: Path) -> None:
    _, one = start(root, scratch, "t1")
    _, two = start(root, scratch, "t2")
    write("a", "1")(one.path)
    assert os.listdir(two.path) == []
    one.remove()
    assert two.path.is_dir()


def test_remove_takes_away_what_the_run_sealed_and_follows_no_link(
    root: Path, scratch: Path
) -> None:
    outside = scratch.parent / "outside"
    outside.mkdir(mode=0o711)
    write("keep", "1")(outside)
    _, tree = start(root, scratch, "t1")
    (tree.path / "sealed/deep").mkdir(parents=True)
    (tree.path / "sealed").chmod(0)
    (tree.path / "link").symlink_to(outside)
    path = tree.path
    tree.remove()
    assert not path.exists()
    assert stat.S_IMODE(outside.stat().st_mode) == 0o711
    assert (outside / "keep").read_text() == "1"
    tree.remove()


def test_two_threads_may_start_trees_of_one_key(root: Path, scratch: Path) -> None:
    directory = Directory.open(root, "k")
    failed = []

    def many(name: str) -> None:
        for n in range(50):
            tree = WorkTree(scratch, "k", f"{name}-{n}")
            try:
                tree.checkout(directory, directory.head())
            except Exception as error:
                failed.append(error)
            tree.remove()

    threads = [threading.Thread(target=many, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


# The manifest's own file.

A_FILE = File("a", 0o644, 5, (Extent("runs/t/c/data-0-1", 0, 1, "0" * 64),))


def of(*entries: Entry | None) -> bytes:
    whole = {entry.path: entry for entry in entries if entry is not None}
    return manifest.encode(Head(None, 0, len(whole), ()), whole)


def test_a_manifest_has_the_same_bytes_however_it_was_put_together() -> None:
    other = A_FILE._replace(path="b")
    assert of(A_FILE, other) == of(other, A_FILE)


def stored(name: str, offset: int = 0, length: int = 1, sha256: str = "0" * 64) -> File:
    return File("a", 0, 5, (Extent(name, offset, length, sha256),))


GOOD = "runs/t/c/data-0-1"
BAD_MANIFESTS: dict[str, list[Entry]] = {
    "absolute": [Folder("/x", 0, 0)],
    "up": [Folder("..", 0, 0)],
    "up and down": [Folder("a", 0, 0), Folder("a/..", 0, 0)],
    "dot": [Folder(".", 0, 0)],
    "empty": [Folder("", 0, 0)],
    "NUL": [Folder("a\0b", 0, 0)],
    "double slash": [Folder("a", 0, 0), Folder("a//b", 0, 0)],
    "no parent": [Folder("a/b", 0, 0)],
    "through a link": [Folder("a/b", 0, 0), Symlink("a", "/etc", 0)],
    "through a file": [A_FILE, Folder("a/b", 0, 0)],
    "stored elsewhere": [stored("../j/runs/t/c/data-0-1")],
    "stored up": [stored("runs/../../x")],
    "stored absolute": [stored("/etc/passwd")],
    "set-uid": [A_FILE._replace(mode=0o4755)],
    "length": [stored(GOOD, 0, -1)],
    "no length": [stored(GOOD, 0, 0)],
    "offset": [stored(GOOD, -1)],
    "hash": [stored(GOOD, 0, 1, "xyz")],
    "type": [stored(GOOD, 0, "1")],  # type: ignore[arg-type]
    "target": [Symlink("a", "", 0)],
}


@pytest.mark.parametrize("bad", BAD_MANIFESTS)
def test_a_manifest_that_leads_astray_is_damaged(bad: str, tmp_path: Path) -> None:
    (tmp_path / "runs").write_bytes(data := of(*BAD_MANIFESTS[bad]))
    reference = Reference("runs", len(data), hashlib.sha256(data).hexdigest())
    with pytest.raises(Damaged, match=r"runs: "):
        Listing.read(tmp_path, reference)


def test_a_path_that_is_there_twice_is_damaged(tmp_path: Path) -> None:
    body = of(A_FILE).partition(b"\n")[2].rstrip()[:-1] + b',\n["d","a",0,0]]\n'
    with pytest.raises(Damaged, match="there twice"):
        manifest.decode(sealed.seal_bytes("manifest", 2, body), tmp_path)


@pytest.mark.parametrize("body", [[], {}, [{"full": 5}], [[]], None, 5, [{}, 5]])
def test_a_manifest_of_another_shape_is_damaged(body: object, tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="fields aren't those of a manifest"):
        manifest.decode(sealed.seal("manifest", 2, body), tmp_path)


@pytest.mark.parametrize("line", [5, [], ["x", "a"], ["d", "a"], ["d", 5, 0, 0], ["f", "a", 0, 0]])
def test_an_entry_of_another_shape_is_damaged(line: object, tmp_path: Path) -> None:
    top = json.loads(of().partition(b"\n")[2])[0]
    with pytest.raises(Damaged):
        manifest.decode(sealed.seal("manifest", 2, [top, line]), tmp_path)


@pytest.mark.parametrize("version", [1, 3])
def test_a_manifest_of_another_format_is_damaged(version: int, tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=f"format {version} isn't known here"):
        manifest.decode(sealed.seal("manifest", version, []), tmp_path)


def test_a_reference_out_of_the_job_directory_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="lies outside the runs of this key"):
        Listing.read(tmp_path, Reference("../other/runs/t/c/manifest", 1, "0" * 64))


def test_a_manifest_can_be_read_by_a_person() -> None:
    lines = of(A_FILE, Folder("d", 0o755, 7)).decode().splitlines()
    assert lines[2] == f'["f","a",420,5,[[0,0,1,"{"0" * 64}"]]],'
    assert lines[3] == '["d","d",493,7]]'
