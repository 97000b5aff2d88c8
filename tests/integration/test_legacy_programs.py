"""Real programs that know nothing of Cohort find on another node what they left on this one.

Every program runs twice or more, each time on the other of two nodes. What they look at is what
programs do look at: mtimes (make, rsync, tar), inodes and ctimes (git), holes, links, names.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.result import AsyncResult

from broker.nodes import list_nodes
from storage.directory import Directory
from storage.logs import LogReader
from tasks.command import CommandFailed, command
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for

# What a directory is, exactly: every name, kind, mode, mtime, content and target.
PICTURE = r"""
import hashlib, os, stat
for folder, folders, files in os.walk(b"."):
    for name in sorted(folders + files):
        path = os.path.join(folder, name)
        status = os.lstat(path)
        what = b""
        if stat.S_ISLNK(status.st_mode):
            what = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            what = hashlib.sha256(open(path, "rb").read()).hexdigest()
        print(path, oct(status.st_mode), status.st_mtime_ns, what)
"""


class TwoNodes:
    """A fleet of two nodes with one processor each, one of which is always held busy."""

    def __init__(self, producer: Producer, folder: Path) -> None:
        self.producer = producer
        self._folder = folder
        self._holds = 0
        self._held: tuple[AsyncResult, Path] | None = None
        self.hold_one()

    def run(self, key: str, *argv: str) -> str:
        """Run a program on the node on which the last one didn't run; what it wrote."""
        node = self.free_node
        result = command.delay(list(argv), key=key)
        outcome = self.producer.end_of(result)
        assert isinstance(outcome, (dict, CommandFailed)), outcome
        record = Directory.open(self.producer.fleet.root, key).head().record
        assert record is not None and record.task_id == result.id
        assert record.node == node
        self.hold_one()
        said = self.said(result)
        assert not isinstance(outcome, CommandFailed), said
        return said

    def said(self, result: AsyncResult) -> str:
        reader = LogReader(self.producer.fleet.root, result.id)
        return b"".join(data for _, data in reader.news()).decode(errors="replace")

    def sh(self, key: str, script: str) -> str:
        return self.run(key, "sh", "-ec", script)

    def python(self, key: str, script: str) -> str:
        return self.run(key, sys.executable, "-c", script)

    @property
    def free_node(self) -> str:
        def free() -> list[str]:
            return [info.node for info in list_nodes(self.producer.client) if not info.running]

        (node,) = wait_for(free, "a node to be free")
        return node

    def hold_one(self) -> None:
        """Hold the free node, and let go of the other."""
        self._holds += 1
        started, go = (self._folder / f"{what}-{self._holds}" for what in ("started", "go"))
        holder = jobs.keyless_once.delay(str(self._folder), str(started), str(go))
        wait_for(started.exists, "a node to be held")
        self.let_go()
        self._held = (holder, go)

    def let_go(self) -> None:
        """Both nodes are free."""
        if self._held is not None:
            holder, go = self._held
            go.touch()
            holder.get(timeout=30)
            self._held = None


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    home = tmp_path_factory.mktemp("legacy")
    (home / "holds").mkdir()
    with running_fleet(home, nodes=2, cpus=1) as producer:
        two = TwoNodes(producer, home / "holds")
        yield two
        two.let_go()


def test_make_builds_only_what_has_changed(nodes: TwoNodes) -> None:
    makefile = r"all: a.out b.out\n%%.out: %%.in\n\tcp $< $@\n"
    built = nodes.sh("make", f"printf '{makefile}' >Makefile; touch a.in b.in; make")
    assert built.splitlines() == ["cp a.in a.out", "cp b.in b.out"]
    assert "Nothing to be done for 'all'" in nodes.run("make", "make")
    assert nodes.sh("make", "touch b.in; make").splitlines() == ["cp b.in b.out"]
    assert "Nothing to be done for 'all'" in nodes.run("make", "make")


def test_git_commits_into_a_repository_that_is_kept(nodes: TwoNodes) -> None:
    commit = "git -c user.name=a -c user.email=a@b commit -qm"
    nodes.sh("git", f"git init -q .; echo 1 >f; git add f; {commit} one")
    for number in (2, 3):
        assert nodes.sh("git", f"git status --porcelain; echo {number} >>f; {commit} n -a") == ""
    assert nodes.sh("git", "git gc -q; git fsck --strict; git rev-list --count HEAD") == "3\n"
    assert nodes.sh("git", "git fsck --strict; git status --porcelain; git show HEAD:f") == (
        "1\n2\n3\n"
    )


def test_sqlite_in_wal_mode_left_as_if_it_had_crashed(nodes: TwoNodes) -> None:
    """The log holds what the database doesn't yet: both must come along, and fit."""
    script = """
import os, sqlite3
db = sqlite3.connect("state.db")
assert db.execute("pragma journal_mode=wal").fetchone() == ("wal",)
db.execute("pragma wal_autocheckpoint=0")
assert db.execute("pragma integrity_check").fetchone() == ("ok",)
db.execute("create table if not exists runs (n)")
db.execute("insert into runs select count(*) from runs")
db.commit()
print([n for (n,) in db.execute("select n from runs order by n")], os.path.exists("state.db-wal"),
      flush=True)
os._exit(0)
"""
    for expected in ("[0] True\n", "[0, 1] True\n", "[0, 1, 2] True\n"):
        assert nodes.python("sqlite", script) == expected


def test_tar_finds_no_difference(nodes: TwoNodes) -> None:
    nodes.sh(
        "tar",
        """
        mkdir -p d/e d/empty; echo x >d/e/f; chmod 4640 d/e/f; chmod 750 d/e; ln -s ../g d/e/l
        chmod 640 d/e/f; touch -d '2001-02-03 04:05:06.789' d/e/f; touch -hd 2002-02-02 d/e/l
        touch -d 2003-03-03 d/empty d/e; tar -cf a.tar d
        """,
    )
    for _ in range(2):
        assert nodes.run("tar", "tar", "--compare", "-f", "a.tar") == ""
    assert nodes.sh("tar", "rm -r d; tar -xf a.tar; tar --compare -f a.tar") == ""
    assert nodes.run("tar", "tar", "--compare", "-f", "a.tar") == ""


def test_rsync_copies_only_what_has_changed(nodes: TwoNodes) -> None:
    if shutil.which("rsync") is None:
        if os.environ.get("CI"):
            pytest.fail("no rsync: CI must have it (Debian: apt install rsync)")
        pytest.skip("no rsync here (Debian: apt install rsync)")
    copy = "rsync -a --out-format=%n from/ to/"
    made = nodes.sh("rsync", f"mkdir -p from/sub; echo 1 >from/a; echo 2 >from/sub/b; {copy}")
    assert set(made.split()) >= {"a", "sub/b"}
    assert nodes.sh("rsync", copy) == ""
    assert nodes.sh("rsync", f"echo 33 >from/sub/b; {copy}").split() == ["sub/b"]
    assert nodes.sh("rsync", f"{copy}; diff -r from to") == ""


def test_sed_in_place_and_a_script_that_appends(nodes: TwoNodes) -> None:
    nodes.sh("edit", "echo count=0 >state; echo begun >>log")
    for number in (1, 2, 3):
        nodes.sh("edit", f"sed -i 's/count=.*/count={number}/' state; cat state >>log")
    assert nodes.sh("edit", "cat log") == "begun\ncount=1\ncount=2\ncount=3\n"


def test_a_lock_file_that_a_failed_run_left_is_gone(nodes: TwoNodes) -> None:
    locked = "set -C; echo $$ >lock; trap 'rm lock' EXIT;"
    nodes.sh("lock", f"{locked} echo 1 >>done")
    # Killed before it can take its lock away; not committed, and so nobody finds it.
    failed = command.delay(["sh", "-ec", f"{locked} kill -9 $$"], key="lock")
    assert isinstance(nodes.producer.end_of(failed), CommandFailed)
    assert nodes.sh("lock", f"{locked} echo 2 >>done; cat done") == "1\n2\n"
    assert nodes.sh("lock", "flock -n guard wc -l <done; ls") == "2\ndone\nguard\n"


def test_thousands_of_small_files(nodes: TwoNodes) -> None:
    made = nodes.python(
        "many",
        """
import os
for n in range(3000):
    os.makedirs(f"d{n % 40}", exist_ok=True)
    with open(f"d{n % 40}/{n}", "w") as file: file.write("x" * (n % 700))
""",
    )
    assert made == ""
    nodes.sh("many", "find d* -type f | xargs sha256sum >sums; wc -l <sums")
    changed = "sha256sum --quiet -c sums; echo new >d1/1; rm d2/2; echo y >d3/new"
    assert nodes.sh("many", f"{changed}; find d* -type f | xargs sha256sum >sums") == ""
    assert nodes.sh("many", "sha256sum --quiet -c sums; wc -l <sums") == "3000\n"


def test_names_in_any_bytes_holes_links_and_empty_folders(nodes: TwoNodes) -> None:
    nodes.python(
        "odd",
        r"""
import os
for name in (b"\xff\xfe", b"new\nline", "größe".encode(), b"-rf", b" ", b"a" * 255, b"'\"$x"):
    open(name, "wb").write(name)
os.mkdir("empty", 0o511)
os.symlink("/nowhere/at all", "dangling")
os.symlink(b"\xff", b"link\xff")
with open("sparse", "wb") as file:
    file.seek(200 << 20)
    file.write(b"end")
os.link("sparse", "linked")
""",
    )
    first = nodes.python("odd", PICTURE)
    assert nodes.python("odd", PICTURE) == first
    assert len(first.splitlines()) == 12
    sizes = nodes.sh("odd", "stat -c '%s %b' sparse").split()
    assert int(sizes[0]) == (200 << 20) + 3
    assert int(sizes[1]) * 512 < 1 << 20


def test_a_node_killed_in_the_middle_leaves_the_directory_exact(
    nodes: TwoNodes, tmp_path: Path
) -> None:
    """On the other node, and on the killed one once it is back with its half changed tree."""
    key, fleet = "killed", nodes.producer.fleet
    nodes.sh(key, "mkdir -p a/b c; echo 1 >a/1; echo 2 >a/b/2; ln -s a/1 l; chmod 640 a/1; touch x")
    nodes.sh(key, "echo 3 >a/3; touch -d 2001-01-01 x")
    before = nodes.python(key, PICTURE)
    begun, go = tmp_path / "begun", tmp_path / "go"
    havoc = f"""
        {sys.executable} -c "$0"
        echo other >a/1; rm -r a/b l; chmod 600 x; touch new x; mkdir a/b; echo 2 >a/b/2
        echo x >>{begun}
        while [ ! -e {go} ]; do sleep 0.05; done
        exit 3
    """
    doomed = nodes.free_node
    result = command.delay(["sh", "-c", havoc, PICTURE], key=key)
    wait_for(begun.exists, "the run to make havoc")
    # What it wrote in its last fifth of a second may die with a node.
    wait_for(lambda: nodes.said(result) == before, "its picture to be in the log")
    fleet.node(doomed).kill()
    nodes.let_go()  # The other node takes over.
    wait_for(lambda: len(begun.read_text().split()) == 2, "the second attempt")
    go.touch()
    error = nodes.producer.end_of(result)
    assert isinstance(error, CommandFailed)
    assert error.outcome["exit_status"] == 3
    assert nodes.said(result) == before + before
    # Each node in turn: the one that failed, and the one that was killed.
    fleet.start_node(doomed)
    nodes.hold_one()
    assert nodes.python(key, PICTURE) == before
    assert nodes.python(key, PICTURE) == before
