"""The recipe: in which order it works, and what a disk that fails in the middle leaves behind."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errors import Damaged, Unavailable
from storage import durable


def fail(name: str, code: int, monkeypatch: pytest.MonkeyPatch, times: int = 1_000_000) -> None:
    """Let a call of `os` fail that often before it works."""
    real: Callable[..., Any] = getattr(os, name)
    left = [times]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


def test_create_writes_exactly_the_data(tmp_path: Path) -> None:
    durable.create(tmp_path / "new", b"data")
    assert (tmp_path / "new").read_bytes() == b"data"


def test_create_syncs_the_file_after_its_last_byte_and_then_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    write, fsync = os.write, os.fsync

    def noting_write(file: int, data: memoryview) -> int:
        steps.append("write")
        return write(file, data[:3])  # a system that takes little at a time

    def noting_fsync(file: int) -> None:
        steps.append(f"fsync {os.path.relpath(os.readlink(f'/proc/self/fd/{file}'), tmp_path)}")
        fsync(file)

    monkeypatch.setattr(os, "write", noting_write)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    durable.create(tmp_path / "new", b"data")
    assert steps == ["write", "write", "fsync new", "fsync ."]
    assert (tmp_path / "new").read_bytes() == b"data"


def test_create_never_writes_over_a_name(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(Unavailable, match="old: File exists"):
        durable.create(tmp_path / "old", b"new")
    assert (tmp_path / "old").read_bytes() == b"old"


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_full_disk_is_named_and_leaves_nothing(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(call, code, monkeypatch)
    with pytest.raises(Unavailable, match=f"new: {os.strerror(code)}"):
        durable.create(tmp_path / "new", b"data")
    assert os.listdir(tmp_path) == []


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    script = (
        "import resource, sys; from pathlib import Path; from storage import durable\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "durable.create(Path(sys.argv[1]), b'x' * 2000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "new")],
        env={"PYTHONPATH": str(Path(durable.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "errors.Unavailable" in done.stderr
    assert "new: File too large" in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_server_that_lost_bytes_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def losing(file: int) -> None:
        os.ftruncate(file, 2)
        fsync(file)

    monkeypatch.setattr(os, "fsync", losing)
    with pytest.raises(Unavailable, match="2 bytes are there of 4"):
        durable.create(tmp_path / "new", b"data")


def test_copy_into_tells_what_it_read(tmp_path: Path) -> None:
    data = os.urandom(durable.CHUNK + 17)
    (tmp_path / "from").write_bytes(data)
    told = durable.copy_into(tmp_path / "from", tmp_path / "to")
    assert told == (len(data), hashlib.sha256(data).hexdigest())
    assert (tmp_path / "to").read_bytes() == data


def test_copy_into_follows_no_link_and_hangs_on_no_fifo(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "link").symlink_to("secret")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(Damaged, match=f"{name} should be a plain file"):
            durable.copy_into(tmp_path / name, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_link_or_fail_lets_one_have_the_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert durable.link_or_fail(tmp_path / "a", tmp_path / "name")
    assert not durable.link_or_fail(tmp_path / "b", tmp_path / "name")
    assert (tmp_path / "name").read_text() == "a"


def test_make_directory_says_whether_it_made_it(tmp_path: Path) -> None:
    assert durable.make_directory(tmp_path / "new")
    assert not durable.make_directory(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(Damaged, match="file should be a directory"):
        durable.make_directory(tmp_path / "file")
    with pytest.raises(Unavailable, match="No such file"):
        durable.make_directory(tmp_path / "missing" / "new")


def test_a_hint_never_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable.replace_hint(tmp_path / "HEAD", b"1", tmp_path / "way-1")
    durable.replace_hint(tmp_path / "HEAD", b"2", tmp_path / "way-2")
    assert (tmp_path / "HEAD").read_bytes() == b"2"
    fail("write", errno.ENOSPC, monkeypatch)
    durable.replace_hint(tmp_path / "HEAD", b"3", tmp_path / "way-3")
    assert (tmp_path / "HEAD").read_bytes() == b"2"
    assert os.listdir(tmp_path) == ["HEAD"]


def test_missing_is_believed_only_after_the_parent_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an NFS client does: "no such file" again and again, until somebody opens the parent."""
    (tmp_path / "there").write_bytes(b"data")
    opened, real = set(), os.open

    def cached_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECTORY:
            opened.add(Path(path))
        elif Path(path).parent not in opened:
            raise FileNotFoundError(errno.ENOENT, "cached", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", cached_open)
    assert durable.read(tmp_path / "there") == b"data"
    assert durable.read(tmp_path / "missing") is None
    assert durable.read(tmp_path / "no" / "folder" / "either") is None


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_read_that_fails_is_tried_again_then_named(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "PAUSES", (0.0, 0.0, 0.0))
    (tmp_path / "there").write_bytes(b"data")
    with monkeypatch.context() as patch:
        fail("open", code, patch, times=2)
        assert durable.read(tmp_path / "there") == b"data"
    fail("open", code, monkeypatch)
    with pytest.raises(Unavailable, match=f"there: {os.strerror(code)}"):
        durable.read(tmp_path / "there")


def test_something_else_in_a_file_s_place_is_reported(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("anything")
    for name in ("folder", "link"):
        with pytest.raises(Damaged, match=f"{name} should be a plain file"):
            durable.read(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(Damaged, match="file should be a directory"):
        durable.entries(tmp_path / "file")
