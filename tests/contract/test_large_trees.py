"""A tree of many files: several processes look at it, and its index is added to, not rewritten."""

from __future__ import annotations

import array
import fcntl
import os
import random
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import errors
from errors import Refused
from storage import look, scan
from storage.directory import Directory
from storage.log import Reference
from storage.look import Identity
from storage.treefiles import Files
from storage.treeindex import Index
from storage.worktree import WorkTree
from tests.storage_kit import both, run, write

FOLDERS = 20


def fill(tree: Path) -> None:
    """Folders in folders, and in some of them what isn't a plain file with a plain name."""
    for n in range(FOLDERS):
        folder = tree / f"d{n}/deeper/still"
        folder.mkdir(parents=True)
        for m in range(5):
            (folder / f"f{m}").write_text(f"{n} {m}")
            (folder.parent / f"g{m}").write_text(f"{n} {m}")
    Path(os.fsdecode(os.fsencode(tree) + b"/d1/\xff\nname")).touch()
    (tree / "d2/link").symlink_to(os.fsdecode(b"no\xffwhere"))
    (tree / "d3/to-folder").symlink_to("../d4")
    os.link(tree / "d3/deeper/g1", tree / "d5/other name")
    os.mkfifo(tree / "d6/fifo")
    (tree / "d7/deeper/g0").chmod(0o4755)
    (tree / "d8/deeper").chmod(0o1777)
    os.truncate(tree / "d9/deeper/g0", 1_000_000)
    os.utime(tree / "d9/deeper/g1", ns=(-5, -5))
    (tree / "top").touch()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    fill(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every tree is a large one, for three processes; the two that are started."""
    started: list[subprocess.Popen[bytes]] = []
    real = scan._helper

    def noting(*args: Any) -> subprocess.Popen[bytes]:
        started.append(real(*args))
        return started[-1]

    monkeypatch.setattr(scan, "_helper", noting)
    monkeypatch.setattr(scan, "_processes", lambda: 3)
    monkeypatch.setattr(scan, "MANY", 0)
    monkeypatch.setattr(scan, "ENOUGH", 5)
    return started


def alone(tree: Path) -> scan.Scan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "MANY", 10**9)
        return scan.scan(tree)


def waiting_for_helpers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parent takes one batch at most: the helpers take all the others; what it looks at."""
    dealt: list[int] = []
    seen: list[str] = []
    real_dealt, real_look = scan._dealt, look.look

    def noting(*args: Any) -> tuple[int, BinaryIO]:
        queue = real_dealt(*args)
        dealt.append(queue[0])
        return queue

    def patient(
        tree: str, to_visit: list[str], before: Any, found: look.Found, until: int | None = None
    ) -> list[str]:
        end = time.monotonic() + 30
        while dealt and waiting_in(dealt[0]) > 3:  # what tells each of three that it is the end
            assert time.monotonic() < end, "no helper takes anything"
            time.sleep(0.001)
        dealt.clear()
        seen.extend(to_visit)
        return real_look(tree, to_visit, before, found, until)

    monkeypatch.setattr(scan, "_dealt", noting)
    monkeypatch.setattr(scan, "look", patient)
    return seen


def waiting_in(pipe: int) -> int:
    count = array.array("i", [0])
    with suppress(OSError):  # Closed meanwhile: all of it was taken.
        fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize("before", ["nothing", "the same", "another"])
def test_several_see_what_one_sees(
    before: str,
    tree: Path,
    helpers: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = alone(tree)
    known = expected.files if before != "nothing" else Files()
    if before == "another":
        (tree / "d10/deeper/g0").write_text("changed")
        (tree / "d11/deeper/g0").unlink()
        expected = alone(tree)
    seen = waiting_for_helpers(monkeypatch)
    found = scan.scan(tree, known)
    assert found == expected
    assert (set(found.files), found.left_out) == (set(expected.files), expected.left_out)
    assert found.left_out == tuple(sorted(found.left_out))
    assert len(expected.files) == FOLDERS * 10 + 3 - (before == "another")
    assert (len(found.symlinks), len(found.left_out), len(found.linked)) == (2, 3, 2)
    assert [os.path.basename(path) for path in found.sparse] == ["g0"]
    assert len(helpers) == 2
    assert len(seen) in (1, 2)  # the top, and at most one batch of one folder
    assert all(helper.returncode is not None for helper in helpers)


BAD_HELPERS = {
    "doesn't start": "raise SystemExit(1)",
    "dies with a batch": "import os, sys; os.read(int(sys.argv[1]), 1)",
    "answers rubbish": "import os, sys; os.read(int(sys.argv[1]), 1); print('rubbish')",
    "answers half": (
        "import marshal, os, sys; n = os.read(int(sys.argv[1]), 1)\n"
        "os.write(1, marshal.dumps((n, {}))[:-1])"
    ),
}


@pytest.mark.parametrize("how", BAD_HELPERS)
def test_what_no_helper_answered_for_is_looked_at(
    how: str,
    tree: Path,
    tmp_path: Path,
    helpers: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = tmp_path / "program.py"
    program.write_text(BAD_HELPERS[how])
    monkeypatch.setattr(look, "__file__", str(program))
    real = os.read

    def after_the_helpers(file: int, length: int) -> bytes:
        for helper in helpers:
            assert helper.wait(30) is not None
        return real(file, length)

    expected = alone(tree)
    monkeypatch.setattr(os, "read", after_the_helpers)
    assert scan.scan(tree) == expected
    assert len(helpers) == 2


@pytest.mark.parametrize("missing", ["program", "pipe", "memory file"])
def test_without_the_means_for_helpers_one_looks_alone(
    missing: str,
    tree: Path,
    helpers: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: object) -> None:
        raise OSError(24, "Too many open files")

    expected = alone(tree)
    if missing == "program":
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
    else:
        monkeypatch.setattr(os, "pipe" if missing == "pipe" else "memfd_create", failing)
    assert scan.scan(tree) == expected
    assert helpers == []


def test_what_can_t_be_looked_at_is_told_as_by_one_alone(
    tree: Path, helpers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = os.open(tree / "d12", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("x" * 250, dir_fd=deep)
        inner = os.open("x" * 250, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = inner
    os.close(deep)
    with pytest.raises(Refused, match="can't be committed: File name too long") as one:
        alone(tree)
    waiting_for_helpers(monkeypatch)
    with pytest.raises(Refused) as several:
        scan.scan(tree)
    assert str(several.value) == str(one.value)
    assert len(helpers) == 2


def test_an_interrupted_look_leaves_no_helper(
    tree: Path,
    tmp_path: Path,
    helpers: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(file: int, length: int) -> bytes:
        if len(helpers) == 2:
            raise KeyboardInterrupt
        return real(file, length)

    real = os.read
    endless = tmp_path / "endless.py"
    endless.write_text("import time; time.sleep(999)")
    monkeypatch.setattr(look, "__file__", str(endless))
    monkeypatch.setattr(os, "read", interrupted)
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        scan.scan(tree)
    assert [helper.returncode is not None for helper in helpers] == [True, True]
    assert len(os.listdir("/proc/self/fd")) == files


KILLED = """
import os, sys
from contextlib import ExitStack
from storage import look, scan
with ExitStack() as ending:
    numbers, batches = scan._dealt([], {}, 0, ending)
    os.read(numbers, 1)  # as if it had been taken: the helper waits for more
    print(scan._helper(sys.argv[1], numbers, batches, ending).pid, flush=True)
    sys.stdin.read()
"""


def test_a_helper_dies_with_its_parent(tree: Path) -> None:
    environment = {"PYTHONPATH": str(Path(errors.__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, tree],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        helper = int(parent.stdout.readline())
        assert state(helper) not in ("", "Z")
        parent.send_signal(signal.SIGKILL)
    end = time.monotonic() + 30
    while state(helper) not in ("", "Z"):
        assert time.monotonic() < end, "the helper lives on"
        time.sleep(0.01)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_a_helper_understands_names_as_its_parent_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scan._processes() == min(len(os.sched_getaffinity(0)), 4)
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    assert scan._processes() == 1


# The tables.


def random_files(source: random.Random) -> dict[str, Identity]:
    found: dict[str, Identity] = {}
    for folder in ("", "a", "a/b", "c\udcff"):
        for n in source.sample(range(8), source.randrange(8)):
            name = f"{folder}/f{n}" if folder else f"f{n}"
            inode = source.choice([1, 2, 2**63, 2**64 - 1])
            found[name] = (inode, source.randrange(3), source.choice([-5, 5]), 2**62, 0o100644)
    return found


def packed(files: dict[str, Identity]) -> Files:
    return Files().changed(files)


def test_files_are_a_table_of_paths() -> None:
    source = random.Random(3)
    for _ in range(300):
        old, new = random_files(source), random_files(source)
        one, two = packed(old), packed(new)
        assert {path: one[path] for path in one} == old
        assert (len(one), one.length()) == (len(old), sum(what[1] for what in old.values()))
        assert one.newest() == max((what[3] for what in old.values()), default=0)
        differing, gone = two.since(one)
        assert differing == {path for path in new if old.get(path) != new[path]}
        assert gone == old.keys() - new.keys()
        assert (one == two) == (old == new)
        after = one.changed({**dict.fromkeys(gone), **{p: new[p] for p in differing}})
        assert {path: after[path] for path in after} == new
        assert {path: one[path] for path in one} == old
        assert all((path in two, two.get(path)) == (path in new, new.get(path)) for path in old)
        assert "" not in after.folders or after.folders[""][0]


# The index.


def random_index(source: random.Random, n: int) -> Index:
    paths = ["x", "a/f1", "y\udcff"]
    files = {path: what for path, what in random_files(source).items() if path not in paths}
    index = Index(Reference(f"runs/t/c/manifest-{n}", n, "0" * 64))
    for path in source.sample(paths, source.randrange(4)):
        kind = source.randrange(3)
        if kind == 0:
            files[path] = (n, n, n, n, n)
        elif kind == 1:
            index.folders[path] = (0o755, n)
        else:
            index.symlinks[path] = ("no\udcffwhere", n)
    index.files = packed(files | {f"many{n // 100}/{n}": (n, 0, 0, 0, 0) for n in range(4000)})
    return index


def differing(one: Index, two: Index) -> set[str]:
    files = set().union(*two.files.since(one.files))
    for mine, theirs in ((one.folders, two.folders), (one.symlinks, two.symlinks)):
        files |= {path for path, _ in mine.items() ^ theirs.items()}
    return files


def told(index: Index | None) -> object:
    return index and (index.reference, index.files, index.folders, index.symlinks)


def states(path: Path, count: int) -> list[Index]:
    """So many indexes, each saved after the one before."""
    source = random.Random(7)
    found = [random_index(source, 0)]
    found[0].save(path)
    for n in range(1, count):
        found.append(random_index(source, n))
        found[n].save_after(found[n - 1], differing(found[n - 1], found[n]), path)
        assert told(Index.load(path)) == told(found[n])
    return found


def test_an_index_is_added_to_and_at_times_written_anew(tmp_path: Path) -> None:
    path, sizes = tmp_path / "index", []
    source = random.Random(7)
    index = random_index(source, 0)
    index.save(path)
    whole = path.stat().st_size
    for n in range(1, 100):
        # Also by one that knows the index from the file.
        before = index if n % 3 else Index.load(path)
        assert before is not None
        index = random_index(source, n)
        index.save_after(before, differing(before, index), path)
        assert told(Index.load(path)) == told(index)
        sizes.append(path.stat().st_size)
    assert max(sizes) < whole * 1.3
    assert 2 <= sum(one > two for one, two in pairwise(sizes)) < 60


def test_of_an_index_that_is_cut_the_state_before_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "index"
    found = states(path, 3)
    data = path.read_bytes()
    ends = [index._end for index in found]
    assert (ends[2], ends[0] < ends[1] < ends[2]) == (len(data), True)
    for length in (*range(ends[0], len(data), 7), len(data) - 1, len(data)):
        path.write_bytes(data[:length])
        state = 0 if length < ends[1] else 1 if length < ends[2] else 2
        known = Index.load(path)
        assert told(known) == told(found[state]), length
    path.write_bytes(data[: ends[0] - 1])
    assert Index.load(path) is None


def test_of_an_index_that_is_damaged_what_stands_before_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "index"
    found = states(path, 4)
    data = path.read_bytes()
    known = None
    for at in (*range(found[1]._end, found[2]._end, 7), found[2]._end - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        known = Index.load(path)
        assert told(known) == told(found[1]), at
    assert known is not None
    # The next state is written in its place; what stood behind it isn't believed again, although
    # it is whole and begins where this one ends.
    found[2].save_after(known, differing(known, found[2]), path)
    assert told(Index.load(path)) == told(found[2])


def many(tree: Path) -> None:
    for n in range(2_000):
        folder = tree / f"d{n // 100}"
        folder.mkdir(exist_ok=True)
        (folder / f"f{n}").write_text(f"{n}")


def checked_out(root: Path, node: Path) -> WorkTree:
    directory = Directory.open(root, "k")
    tree = WorkTree(node, "k", "c")
    tree.checkout(directory, directory.head())
    return tree


def expected(root: Path, tree: Path) -> object:
    now = alone(tree)
    reference = Directory.open(root, "k").head().listing.reference
    return reference, now.files, now.folders, now.symlinks


CHANGES: list[Callable[[Path], object]] = [
    write("d1/f101", "new"),
    lambda tree: (tree / "d2/f201").unlink(),
    both(lambda tree: (tree / "d3/f301").unlink(), lambda tree: (tree / "d3/f301").mkdir()),
    lambda tree: (tree / "d3/f301").rmdir(),
    lambda tree: (tree / "link").symlink_to("d1"),
    both(lambda tree: (tree / "link").unlink(), write("link", "a file")),
    lambda tree: None,
]


def test_a_run_that_changed_little_adds_to_the_index_and_it_is_right(tmp_path: Path) -> None:
    root, node, other = tmp_path / "root", tmp_path / "node", tmp_path / "other"
    root.mkdir()
    index = node / "trees/k/0/index"
    run(root, node, "t", many)
    whole = index.read_bytes()
    for n, change in enumerate(CHANGES):
        run(root, node if n % 2 else other, f"t{n}", change)
        if n % 2:
            assert told(Index.load(index)) == expected(root, node / "trees/k/0/tree")
        tree = checked_out(root, node)
        assert (tree.changes().touched, tree.changes().others) == (frozenset(), {})
        assert told(Index.load(index)) == expected(root, tree.path)
        tree.release()
        assert index.read_bytes().startswith(whole)
    assert len(whole) < index.stat().st_size < len(whole) + 6_000


def test_a_new_tree_is_noted_in_the_kernel_s_order_by_its_first_commit(tmp_path: Path) -> None:
    root, node, new = tmp_path / "root", tmp_path / "node", tmp_path / "new"
    root.mkdir()
    run(root, node, "t1", many)
    run(root, new, "t2", write("d1/f101", "changed"))
    found = Index.load(new / "trees/k/0/index")
    assert found is not None
    assert found.files.folders == alone(new / "trees/k/0/tree").files.folders
