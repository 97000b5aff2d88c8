"""The examination of a shared folder: what is fine, and each thing that it must notice."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errors import Refused, WrongMount
from storage import examination, mount_options
from storage.examination import examination_folder, examine
from storage.finding import Finding, worst
from storage.halves import Half, Side
from storage.mount_options import find, judge, refuse
from tests.nfs.node import CantMount, Node, nodes
from tests.nfs.script import Settings

FOLDER = ".examination-0123456789abcdef"


class Other(Half):
    """The other side: a real one, unless it is told to answer something else to a step."""

    def __init__(self, root: Path, folder: str, **answers: Any) -> None:
        super().__init__(root, folder, "node-2")
        self.answers = answers

    def do(self, step: str, **arguments: Any) -> Any:
        seen = super().do(step, **arguments)
        if step not in self.answers:
            return seen
        answer = self.answers[step]
        return answer(seen) if callable(answer) else answer


def examined(root: Path, other: Path | None = None, **answers: Any) -> dict[str, Finding]:
    """Both halves on one folder, or on two views of it."""
    with examination_folder(root) as folder:
        there = Other(other or root, folder, **answers)
        found = list(examine(root, Half(root, folder, "node-1"), there, patience=3.0, tries=5))
    assert os.listdir(root) == []
    return {finding.what: finding for finding in found}


def test_a_good_folder_is_fine_and_left_clean(tmp_path: Path) -> None:
    found = examined(tmp_path)
    # The tests' folder may lie in memory or on a container's layer, which is said too.
    odd = {what: f for what, f in found.items() if f.verdict != "fine" and what != "file system"}
    assert odd == {} or set(odd) <= {f"time to {name}" for name in examination.SLOW_FROM}
    assert len(found) >= 15
    assert "60 names" in found["link-or-fail"].found or "none twice" in found["link-or-fail"].found


def test_one_node_alone_is_examined_too(tmp_path: Path) -> None:
    with examination_folder(tmp_path) as folder:
        found = list(examine(tmp_path, Half(tmp_path, folder, "node-1"), tries=5))
    assert {"link-or-fail", "close-to-open", "fsync"} <= {finding.what for finding in found}
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("call", "what"), [("link", "link-or-fail"), ("mkdir", "mkdir"), ("open", "create-or-fail")]
)
def test_what_isn_t_exclusive_is_dangerous(
    call: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, call)

    def lenient(*args: Any, **kwargs: Any) -> Any:
        try:
            return real(*args, **kwargs)
        except FileExistsError:
            return None if call != "open" else real(args[0], os.O_WRONLY)

    monkeypatch.setattr(os, call, lenient)
    finding = next(f for name, f in examined(tmp_path).items() if name.startswith(what))
    assert finding.verdict == "dangerous"
    assert "both sides got" in finding.found


def test_a_link_that_is_later_another_s_is_dangerous(tmp_path: Path) -> None:
    found = examined(tmp_path, read_all=lambda seen: ["nobody's", *seen[1:]])
    assert found["link-or-fail"].verdict == "dangerous"
    assert "node-2 finds nobody's" in found["link-or-fail"].found


def test_a_race_is_one(tmp_path: Path) -> None:
    """Both sides must have won some names, else nothing was contended and nothing was shown."""
    for _ in range(5):
        found = examined(tmp_path)
        words = found["link-or-fail"].found.split()
        if int(words[1]) > 0 and int(words[4]) > 0:
            return
    pytest.fail("in five races one side always won every name")


def test_old_contents_after_a_close_are_dangerous(tmp_path: Path) -> None:
    found = examined(tmp_path, read="old")
    assert found["close-to-open"].verdict == "dangerous"
    assert "5 of 10 reads" in found["close-to-open"].found
    assert found["fsync"].verdict == "dangerous"


def test_another_folder_ends_the_examination(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    found = list(examined(tmp_path / "a", tmp_path / "b").values())
    assert found[-1].what == "the same folder"
    assert "something else mounted" in found[-1].found
    assert worst(found) == "dangerous"


@pytest.mark.parametrize(("ahead", "verdict"), [(0, "fine"), (-20, "slow"), (400, "dangerous")])
def test_clocks_that_differ(ahead: float, verdict: str, tmp_path: Path) -> None:
    finding = examined(tmp_path, clock=lambda seen: seen + ahead)["clock of node-2"]
    assert finding.verdict == verdict
    if ahead:
        assert abs(float(finding.found.split()[0]) - abs(ahead)) < 1
        assert ("ahead" if ahead > 0 else "behind") in finding.found


def test_the_server_s_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 100)
    finding = examined(tmp_path)["clock of the server"]
    assert finding.verdict == "slow"
    assert 99.9 < float(finding.found.split()[0]) < 101
    assert "ahead of this node's" in finding.found


@pytest.mark.parametrize(
    ("field", "value", "what", "verdict"),
    [
        ("f_bavail", 3, "free space", "dangerous"),
        ("f_bavail", 10_000, "free space", "slow"),
        ("f_favail", 3, "free inodes", "dangerous"),
        ("f_favail", 5_000, "free inodes", "slow"),
    ],
)
def test_little_room(
    field: str, value: int, what: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = (
        "bsize",
        "f_frsize",
        "blocks",
        "bfree",
        "f_bavail",
        "files",
        "ffree",
        "f_favail",
        "",
        "_",
    )
    plain = {**dict.fromkeys(order, 10**7), "f_frsize": 4096, field: value}
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(plain.values()))
    assert examined(tmp_path)[what].verdict == verdict


def test_an_operation_that_fails_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refusing)
        found = examined_without_late(tmp_path)
    assert found["fsync"].verdict == "dangerous"
    assert "Operation not permitted" in found["fsync"].found


def examined_without_late(root: Path) -> dict[str, Finding]:
    with examination_folder(root) as folder:
        found = list(examine(root, Half(root, folder, "node-1"), tries=2))
    return {finding.what: finding for finding in found}


def test_slow_operations_are_called_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def slow(file: int) -> None:
        time.sleep(0.03)
        real(file)

    monkeypatch.setattr(os, "fsync", slow)
    finding = examined(tmp_path)["time to create, write, fsync, close"]
    assert finding.verdict == "slow"
    assert "of 5" in finding.found


def test_what_a_killed_examination_left_goes_a_day_later(tmp_path: Path) -> None:
    for age, name in ((90_000, f".examination-{0:016x}"), (3600, f".examination-{1:016x}")):
        (tmp_path / name / "inside").mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / ".examination-notes").mkdir()
    os.utime(tmp_path / ".examination-notes", (0, 0))
    with pytest.raises(KeyboardInterrupt), examination_folder(tmp_path):
        raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == [f".examination-{1:016x}", ".examination-notes"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "", "A", "a/b/c/d", "x" * 41])
def test_a_step_touches_nothing_outside_its_folder(name: str, tmp_path: Path) -> None:
    half = Half(tmp_path, FOLDER, "node-1")
    for step in ("see", "appears", "read"):
        with pytest.raises(Refused, match="no name in an examination"):
            half.do(step, name=name)
    with pytest.raises(Refused, match="no name in an examination"):
        half.do("write", name=name, text="")
    with pytest.raises(Refused, match="no folder of an examination"):
        Half(tmp_path, name, "node-1")


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    half: Side = Half(tmp_path, FOLDER, "node-1")
    for step in ("path", "__init__", "", "do"):
        with pytest.raises(Refused, match="there is no step"):
            half.do(step)


# --- On the client that believes what it saw ---


@pytest.fixture
def views(tmp_path: Path) -> Iterator[list[Node]]:
    """Two mounts of one folder, as two nodes have them."""
    try:
        with nodes(tmp_path, 2) as found:
            yield found
    except CantMount as error:
        if os.environ.get("COHORT_TEST_FUSE") == "required":
            raise
        pytest.skip(f"no FUSE here (Debian: apt install fuse3): {str(error).splitlines()[-1]}")


def test_how_late_a_caching_client_sees_things(views: list[Node]) -> None:
    for node in views:
        node.script(settings=Settings(cache_seconds=1.5))
    found = examined(views[0].root, views[1].root)
    name = found["a name looked up too early"]
    assert name.verdict == "fine"
    assert "at once when its folder is opened, else only after" in name.found
    assert 1.4 <= float(name.found.split()[-2]) <= 3.0
    assert "the old one is read for" in found["a file replaced by rename"].found
    assert found["link-or-fail"].verdict == "fine"
    assert found["close-to-open"].verdict == "fine"


def test_a_client_that_never_asks_again_is_dangerous(views: list[Node]) -> None:
    for node in views:
        node.script(settings=Settings(cache_seconds=60, stale_listings=True))
    found = examined(views[0].root, views[1].root)
    assert found["a folder listed before"].verdict == "dangerous"


# --- How it is mounted ---

EFS = "us-east-1a.fs-0123456789abcdef0.efs.us-east-1.amazonaws.com:/"
GOOD = (
    "rw,vers=4.1,rsize=1048576,wsize=1048576,namlen=255,hard,noresvport,proto=tcp,timeo=600,"
    "retrans=2,sec=sys,local_lock=none"
)


def verdicts(options: str, kind: str = "nfs4", source: str = "server:/export") -> dict[str, str]:
    table = f"36 35 0:40 / / rw,relatime shared:1 - {kind} {source} {options}"
    return {f.what: f.verdict for f in judge(find(Path("/"), table)) if f.verdict != "fine"}


def test_what_aws_advises_is_fine() -> None:
    assert verdicts(GOOD, source=EFS) == {}
    assert judge(find(Path("/"), f"1 2 0:1 / / rw - nfs4 {EFS} {GOOD}"))[0].found.startswith(
        "Amazon EFS"
    )


@pytest.mark.parametrize(
    ("option", "verdict"),
    [
        ("vers=3", "dangerous"),
        ("vers=4.0", "slow"),
        ("vers=4.1", None),
        ("vers=4.2", None),
        ("soft", "dangerous"),
        ("softerr", "dangerous"),
        ("softreval", "dangerous"),
        ("nocto", "dangerous"),
        ("ro", "dangerous"),
        ("proto=udp", "dangerous"),
        ("proto=tcp6", None),
        ("noac", "slow"),
        ("sync", "slow"),
        ("actimeo=0", "slow"),
        ("actimeo=30", None),
        ("acdirmax=60", None),
        ("acdirmax=600", "slow"),
        ("acregmax=0", "slow"),
        ("lookupcache=none", "slow"),
        ("lookupcache=pos", None),
        ("lookupcache=all", None),
        ("rsize=65536", "slow"),
        ("wsize=1048576", None),
        ("timeo=50", "slow"),
        ("nconnect=4", None),
        ("nolock", None),
        ("noatime", None),
        ("fsc", None),
        ("hard", None),
    ],
)
def test_the_table_of_options(option: str, verdict: str | None) -> None:
    assert verdicts(f"rw,{option}") == ({f"option {option}": verdict} if verdict else {})


def test_options_that_matter_on_efs_only() -> None:
    assert verdicts(f"{GOOD},nconnect=4", source=EFS) == {"option nconnect=4": "slow"}
    without = GOOD.replace(",noresvport", "")
    assert verdicts(without, source=EFS) == {"option noresvport": "slow"}
    assert verdicts(without) == {}


@pytest.mark.parametrize(
    ("kind", "options", "found"),
    [
        ("ext4", "rw", {}),
        ("xfs", "rw,noatime", {}),
        ("ext4", "rw,nobarrier", {"option nobarrier": "dangerous"}),
        ("ext4", "rw,barrier=0", {"option barrier=0": "dangerous"}),
        ("tmpfs", "rw", {"file system": "dangerous"}),
        ("overlay", "rw", {"file system": "dangerous"}),
        ("cifs", "rw", {"file system": "dangerous"}),
        ("fuse.s3fs", "rw", {"file system": "dangerous"}),
        ("fuse.something", "rw", {"file system": "slow"}),
    ],
)
def test_other_file_systems(kind: str, options: str, found: dict[str, str]) -> None:
    assert verdicts(options, kind=kind, source="/dev/x") == found


def test_every_option_of_the_table_is_in_the_documentation() -> None:
    text = Path(__file__).parents[2].joinpath("docs/filesystems.md").read_text()
    assert [name for name in mount_options.RULES if f"`{name}" not in text] == []
    assert [name for name in mount_options.TYPES if f"`{name}`" not in text] == []


def test_the_mount_that_a_folder_is_on(tmp_path: Path) -> None:
    inner = tmp_path / "a b"
    inner.mkdir()
    shown = str(inner).replace(" ", "\\040")
    table = "\n".join(
        [
            "1 0 8:1 / / rw - ext4 /dev/a rw",
            f"2 1 0:7 / {tmp_path} rw - nfs4 one:/ rw,vers=4.1",
            f"3 1 0:8 / {shown} ro,relatime shared:1 master:2 - nfs4 two:/x\\040y rw,vers=3",
            f"4 1 0:9 / {tmp_path}/a rw - ext4 /dev/other rw",
        ]
    )
    assert find(tmp_path, table).source == "one:/"
    found = find(inner, table)
    assert (found.point, found.source) == (str(inner), "two:/x y")
    assert "ro" in found.options
    assert found.options["vers"] == "3"
    assert find(Path("/"), table).kind == "ext4"
    assert find(tmp_path).point in str(tmp_path.resolve())


def test_a_mount_on_which_one_outcome_can_t_be_promised_is_refused() -> None:
    def mounted(options: str) -> None:
        refuse(find(Path("/"), f"1 2 0:1 / / rw - nfs4 server:/export {options}"))

    mounted(GOOD)
    with pytest.raises(WrongMount, match="nocto"):
        mounted(f"{GOOD},nocto")
