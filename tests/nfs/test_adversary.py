"""The adversary tells each lie that was measured on a real NFSv4.1 client, and no other.

What stands here in seconds there is told here by the cache time, or not at all.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.nfs.conftest import Pair
from tests.nfs.node import nodes
from tests.nfs.script import Action, Rule, Settings
from tests.nfs.trace import counting


def code_of(act: Callable[[], object]) -> str:
    """The name of the error that it raises, or "ok"."""
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def open_directory(path: Path) -> None:
    os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY))


def create(path: Path, data: bytes, sync: bool = True) -> None:
    with open(path, "xb", buffering=0) as file:
        file.write(data)
        if sync:
            os.fsync(file)


def test_space_is_told(pair: Pair) -> None:
    assert os.statvfs(pair.on_a).f_bavail > 0


# What it believes.


def test_a_missing_name_stays_missing_until_its_directory_is_opened(pair: Pair) -> None:
    assert not (pair.on_a / "x").exists()
    (pair.on_b / "x").write_text("there")
    for _ in range(3):
        assert not (pair.on_a / "x").exists()
        assert code_of(lambda: os.open(pair.on_a / "x", os.O_RDONLY)) == "ENOENT"
    open_directory(pair.on_a)
    assert (pair.on_a / "x").read_text() == "there"


def test_a_missing_name_stays_missing_for_the_cache_time(pair: Pair) -> None:
    pair.a.script(settings=Settings(cache_seconds=0.3))
    before = time.monotonic()
    assert not (pair.on_a / "x").exists()
    (pair.on_b / "x").write_text("there")
    while not (pair.on_a / "x").exists():
        assert time.monotonic() < before + 20
    assert time.monotonic() >= before + 0.3


def test_below_a_missing_directory_all_is_missing(pair: Pair) -> None:
    assert not (pair.on_a / "d").exists()
    (pair.on_b / "d").mkdir()
    (pair.on_b / "d/x").touch()
    assert not (pair.on_a / "d/x").exists()
    assert code_of(lambda: open_directory(pair.on_a / "d")) == "ENOENT"
    open_directory(pair.on_a)
    assert (pair.on_a / "d/x").exists()


def test_link_mkdir_and_exclusive_create_ask_the_server(pair: Pair) -> None:
    create(pair.on_a / "mine", b"a")
    for name in "123":
        assert not (pair.on_a / name).exists()
    create(pair.on_b / "1", b"b")
    create(pair.on_b / "2", b"b")
    (pair.on_b / "3").mkdir()
    assert code_of(lambda: os.link(pair.on_a / "mine", pair.on_a / "1")) == "EEXIST"
    assert code_of(lambda: create(pair.on_a / "2", b"a")) == "EEXIST"
    assert code_of(lambda: (pair.on_a / "3").mkdir()) == "EEXIST"


@pytest.mark.parametrize("what", ["link", "mkdir", "create"])
def test_exactly_one_of_many_gets_a_name(what: str, pair: Pair) -> None:
    got: list[int] = []
    for n in range(8):
        create(pair.backing / f"own-{n}", b"")
    start = threading.Barrier(8)

    def contend(n: int) -> None:
        on = pair.on_a if n % 2 else pair.on_b
        act = {
            "link": lambda: os.link(on / f"own-{n}", on / "name"),
            "mkdir": lambda: os.mkdir(on / "name"),
            "create": lambda: create(on / "name", b""),
        }[what]
        start.wait()
        if code_of(act) == "ok":
            got.append(n)

    threads = [threading.Thread(target=contend, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_attributes_are_old_until_the_file_is_opened(pair: Pair) -> None:
    create(pair.on_b / "x", b"1")
    assert os.stat(pair.on_a / "x").st_size == 1
    with open(pair.on_b / "x", "ab") as file:
        file.write(b"234")
    assert os.stat(pair.on_a / "x").st_size == 1
    assert (pair.on_a / "x").read_bytes() == b"1234"  # close-to-open
    assert os.stat(pair.on_a / "x").st_size == 4


def test_a_listing_is_new_when_the_directory_is_opened(pair: Pair) -> None:
    held = os.open(pair.on_a, os.O_RDONLY | os.O_DIRECTORY)
    assert os.listdir(pair.on_a) == []
    create(pair.on_b / "x", b"")
    assert os.listdir(held) == []
    os.close(held)
    assert os.listdir(pair.on_a) == ["x"]


def test_a_listing_is_old_on_a_mount_without_close_to_open(pair: Pair) -> None:
    pair.a.script(settings=Settings(stale_listings=True))
    assert os.listdir(pair.on_a) == []
    create(pair.on_b / "x", b"")
    assert os.listdir(pair.on_a) == []
    create(pair.on_a / "y", b"")
    assert sorted(os.listdir(pair.on_a)) == ["x", "y"]


def test_a_rename_over_a_living_file_is_read_stale(pair: Pair) -> None:
    create(pair.on_b / "x", b"old")
    os.link(pair.on_b / "x", pair.on_b / "second name")
    assert (pair.on_a / "x").read_bytes() == b"old"
    create(pair.on_b / "new", b"new")
    os.rename(pair.on_b / "new", pair.on_b / "x")
    assert (pair.on_b / "x").read_bytes() == b"new"
    assert (pair.on_a / "x").read_bytes() == b"old"
    open_directory(pair.on_a)
    assert (pair.on_a / "x").read_bytes() == b"new"


def test_a_rename_over_a_dead_file_is_seen(pair: Pair) -> None:
    create(pair.on_b / "x", b"old")
    assert (pair.on_a / "x").read_bytes() == b"old"
    create(pair.on_b / "new", b"new")
    os.rename(pair.on_b / "new", pair.on_b / "x")
    assert (pair.on_a / "x").read_bytes() == b"new"


def test_a_file_that_another_node_removed_is_stale(pair: Pair) -> None:
    create(pair.on_b / "x", b"data")
    with open(pair.on_a / "x", "rb", buffering=0) as file:
        assert file.read(2) == b"da"
        os.unlink(pair.on_b / "x")
        assert code_of(lambda: file.read(2)) == "ESTALE"


def test_a_file_that_this_node_removed_is_kept_while_open(pair: Pair) -> None:
    create(pair.on_a / "x", b"data")
    with open(pair.on_a / "x", "rb", buffering=0) as file:
        os.unlink(pair.on_a / "x")
        assert [name[:4] for name in os.listdir(pair.on_b)] == [".nfs"]
        assert file.read() == b"data"
    while os.listdir(pair.on_b):  # the kernel tells of a close later
        pass


def test_after_eexist_the_name_is_looked_up_again(pair: Pair) -> None:
    """Linux drops what it knew; a client that doesn't is harder to please than any known one."""
    for harsh in (False, True):
        pair.a.script(settings=Settings(believes_after_eexist=harsh))
        name = f"d-{harsh}"
        assert not (pair.on_a / name).exists()
        (pair.on_b / name).mkdir()
        assert code_of(lambda name=name: (pair.on_a / name).mkdir()) == "EEXIST"  # type: ignore[misc]
        assert (pair.on_a / name).exists() is not harsh


# What it writes.


def test_bytes_are_seen_by_others_only_after_fsync_or_close(pair: Pair) -> None:
    with open(pair.on_a / "x", "xb", buffering=0) as file:
        file.write(b"data")
        assert (pair.on_b / "x").read_bytes() == b""
        assert (pair.on_a / "x").read_bytes() == b"data"
        os.fsync(file)
        assert (pair.on_b / "x").read_bytes() == b"data"
        file.write(b"more")
        assert (pair.on_b / "x").read_bytes() == b"data"
    assert (pair.on_b / "x").read_bytes() == b"datamore"


def test_two_who_append_lose_half(pair: Pair) -> None:
    """As measured: 1,000 bytes written, 500 survived."""
    with (
        open(pair.on_a / "x", "ab", buffering=0) as one,
        open(pair.on_b / "x", "ab", buffering=0) as two,
    ):
        for n in range(100):
            file = two if n % 2 else one
            file.write(b"0123456789")
            os.fsync(file)
    assert len((pair.backing / "x").read_bytes()) == 500


def test_a_held_descriptor_never_sees_what_another_node_appends(pair: Pair) -> None:
    create(pair.on_b / "x", b"1")
    with open(pair.on_a / "x", "rb", buffering=0) as file:
        assert file.read() == b"1"
        with open(pair.on_b / "x", "ab") as other:
            other.write(b"2")
        assert file.read() == b""
    assert (pair.on_a / "x").read_bytes() == b"12"


def test_rename_without_replacing_isn_t_known(pair: Pair) -> None:
    import ctypes

    create(pair.on_a / "x", b"")
    libc = ctypes.CDLL(None, use_errno=True)
    old, new = (os.fsencode(pair.on_a / name) for name in "xy")
    assert libc.renameat2(-100, old, -100, new, 1) == -1
    assert ctypes.get_errno() == errno.EINVAL


# What goes wrong by the script.


@pytest.mark.parametrize("reply", [errno.EEXIST, errno.EIO])
def test_a_link_whose_reply_is_lost_was_made(reply: int, pair: Pair) -> None:
    create(pair.on_a / "x", b"")
    pair.a.script(Rule("lose_reply", "link", error=reply))
    act = lambda: os.link(pair.on_a / "x", pair.on_a / "y")  # noqa: E731
    assert code_of(act) == errno.errorcode[reply]
    assert os.stat(pair.backing / "y").st_nlink == 2
    assert code_of(act) == "EEXIST"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("op", ["create", "write", "store", "fsync", "link", "mkdir", "unlink"])
def test_the_nth_call_of_a_kind_fails(op: str, code: int, pair: Pair) -> None:
    pair.a.script(Rule("fail", op, at=2, error=code))

    def work(name: str) -> None:
        create(pair.on_a / name, b"data")
        os.link(pair.on_a / name, pair.on_a / f"{name}-2")
        os.mkdir(pair.on_a / f"{name}-3")
        os.unlink(pair.on_a / f"{name}-2")

    codes = [code_of(lambda name=name: work(name)) for name in ("1", "2", "3")]  # type: ignore[misc]
    assert codes == ["ok", errno.errorcode[code], "ok"]


def test_a_full_disk_may_show_at_the_close(pair: Pair) -> None:
    pair.a.script(Rule("fail", "store", error=errno.ENOSPC))
    file = os.open(pair.on_a / "x", os.O_CREAT | os.O_WRONLY)
    os.write(file, b"data")
    assert code_of(lambda: os.close(file)) == "ENOSPC"
    assert (pair.backing / "x").read_bytes() == b""


def test_a_torn_write_leaves_a_part(pair: Pair) -> None:
    pair.a.script(Rule("torn", "store", bytes=3, error=errno.ENOSPC))
    assert code_of(lambda: create(pair.on_a / "x", b"data")) == "ENOSPC"
    assert (pair.backing / "x").read_bytes() == b"dat"
    create(pair.on_a / "y", b"data")
    assert (pair.backing / "y").read_bytes() == b"data"


def test_rules_are_for_a_path_and_a_kind(pair: Pair) -> None:
    pair.a.script(Rule("fail", "create", path="*/y", times=None), Rule("fail", "mkdir|link"))
    assert code_of(lambda: create(pair.on_a / "x", b"")) == "ok"
    assert code_of(lambda: create(pair.on_a / "y", b"")) == "EIO"
    assert code_of(lambda: os.mkdir(pair.on_a / "d")) == "EIO"
    assert code_of(lambda: create(pair.on_a / "y", b"")) == "EIO"
    assert code_of(lambda: create(pair.on_b / "y", b"")) == "ok"
    assert [rule.fired for rule in pair.a.rules()] == [2, 1]


def test_latency_is_added(pair: Pair) -> None:
    pair.a.script(Rule("delay", "write|fsync", times=None, seconds=0.05))
    before = time.monotonic()
    create(pair.on_a / "x", b"data")
    assert time.monotonic() - before >= 0.1


def test_a_call_is_held_until_it_is_released(pair: Pair) -> None:
    create(pair.on_a / "x", b"a")
    (pair.on_a / "d").mkdir()
    pair.a.script(Rule("hold", "link"))
    codes: list[str] = []
    late = threading.Thread(
        target=lambda: codes.append(code_of(lambda: os.link(pair.on_a / "x", pair.on_a / "y")))
    )
    late.start()
    pair.a.wait_until_held()
    create(pair.on_a / "d/z", b"")  # nobody waits but those who change the same directory
    create(pair.on_b / "y", b"b")
    pair.a.release()
    late.join()
    assert codes == ["EEXIST"]


def test_a_node_sleeps_and_wakes_with_old_beliefs(pair: Pair) -> None:
    assert not (pair.on_a / "x").exists()
    pair.a.pause()
    found: list[bool] = []
    sleeper = threading.Thread(target=lambda: found.append((pair.on_a / "x").exists()))
    sleeper.start()
    create(pair.on_b / "x", b"")
    assert found == []
    pair.a.wake()
    sleeper.join()
    assert found == [False]


@pytest.mark.parametrize(("do", "left"), [("kill", b""), ("kill_after", b"1"), ("power", b"")])
def test_the_caller_is_killed_at_its_nth_call(do: Action, left: bytes, pair: Pair) -> None:
    script = (
        "import os, sys; sys.stdin.readline(); file = open(sys.argv[1], 'xb', buffering=0)\n"
        "file.write(b'1'); os.fsync(file); print('not dead')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(pair.on_a / "x")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    before = pair.a.calls_so_far()
    pair.a.script(Rule(do, "write", pid=child.pid))
    create(pair.on_a / "another's", b"data")
    assert child.communicate("go\n")[0] == ""
    assert child.returncode == -signal.SIGKILL
    while not any(
        call["op"] == "release" and call["path"].endswith("/x") for call in pair.a.trace(before)
    ):
        pass
    assert (pair.backing / "x").read_bytes() == left
    assert (pair.backing / "another's").read_bytes() == b"data"


# What the power takes along.


def test_a_client_that_lost_its_power_loses_what_it_buffered(pair: Pair) -> None:
    with open(pair.on_a / "x", "xb", buffering=0) as file:
        file.write(b"1")
        os.fsync(file)
        file.write(b"2")
        pair.a.lose_power()
    assert (pair.backing / "x").read_bytes() == b"1"


def test_a_disk_keeps_what_was_fsynced_and_no_more(pair: Pair) -> None:
    pair.a.script(settings=Settings(is_disk=True))
    (pair.on_a / "d").mkdir()
    create(pair.on_a / "d/named", b"data")
    create(pair.on_a / "d/not synced", b"data", sync=False)
    for path in (pair.on_a, pair.on_a / "d"):
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)
    create(pair.on_a / "d/not named", b"data")
    os.link(pair.on_a / "d/named", pair.on_a / "d/second")
    os.rename(pair.on_a / "d/not synced", pair.on_a / "d/renamed")
    pair.a.lose_power()
    assert {path.name: path.read_bytes() for path in (pair.on_a / "d").iterdir()} == {
        "named": b"data",
        "not synced": b"",
    }


def test_what_a_disk_loses_of_the_rest_is_up_to_the_seed(pair: Pair) -> None:
    left = set()
    for seed in range(1, 13):
        pair.a.script(settings=Settings(is_disk=True, seed=seed))
        (pair.backing / str(seed)).mkdir()
        for n in range(3):
            create(pair.on_a / str(seed) / str(n), b"data", sync=False)
        pair.a.lose_power()
        left.add(tuple(sorted(p.read_bytes() for p in (pair.backing / str(seed)).iterdir())))
    assert len(left) > 3


# What it tells afterwards.


def test_the_trace_has_every_call_with_who_and_what_came_of_it(pair: Pair) -> None:
    create(pair.on_a / "x", b"")
    pair.a.script(Rule("lose_reply", "link", error=errno.EEXIST))
    before = pair.a.calls_so_far()
    code_of(lambda: os.link(pair.on_a / "x", pair.on_a / "y"))
    (link,) = [call for call in pair.a.trace(before) if call["op"] == "link"]
    name = pair.backing.name
    assert (link["path"], link["to"]) == (f"/{name}/y", f"/{name}/x")
    assert (link["pid"], link["result"]) == (os.getpid(), "EEXIST")
    assert link["script"] == "lose_reply"
    assert [call["n"] for call in pair.a.trace(before)] == list(
        range(before + 1, pair.a.calls_so_far() + 1)
    )


def test_the_cost_is_what_reaches_the_server(pair: Pair) -> None:
    with counting(pair.a) as cost:
        create(pair.on_a / "x", b"data")
        (pair.on_a / "x").read_bytes()
        os.listdir(pair.on_a)
        os.stat(pair.on_a / "x")
    kinds = {kind: n for kind, n in cost.by_kind.items() if kind in ("create", "store", "fsync")}
    assert kinds == {"create": 1, "store": 1, "fsync": 1}
    assert cost.by_kind["read"] == 1
    assert cost.operations == 4


def test_nothing_is_left_behind(tmp_path: Path, pair: Pair) -> None:
    before = Path("/proc/mounts").read_text()
    with nodes(tmp_path, 2) as (one, two):
        held = os.open(one.root, os.O_RDONLY | os.O_DIRECTORY)  # a lazy unmount is needed
        processes = [node._process for node in (one, two)]
        assert Path("/proc/mounts").read_text() != before
    os.close(held)
    assert Path("/proc/mounts").read_text() == before
    assert all(process.returncode is not None for process in processes)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["shared"]
