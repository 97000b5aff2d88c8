"""Proving the shared folder: what passes, and what each wrong one is told."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from errors import Damaged, Refused, WrongMount
from storage import mount


def test_a_good_folder_passes_and_is_left_clean(tmp_path: Path) -> None:
    first = mount.prove(tmp_path, "node-1")
    assert mount.prove(tmp_path, "node-2") == first
    assert sorted(os.listdir(tmp_path)) == ["cohort.json", "nodes"]
    assert os.listdir(tmp_path / "nodes") == []


def test_nodes_that_start_at_once_agree_on_the_fleet(tmp_path: Path) -> None:
    start, found = threading.Barrier(8), []

    def node(n: int) -> None:
        start.wait()
        found.append(mount.prove(tmp_path, f"node-{n}").fleet_id)

    threads = [threading.Thread(target=node, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_another_folder_is_another_fleet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert mount.prove(tmp_path / "a", "n").fleet_id != mount.prove(tmp_path / "b", "n").fleet_id


def test_a_missing_folder_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(WrongMount, match="missing: it doesn't exist"):
        mount.prove(tmp_path / "missing", "node-1")
    assert os.listdir(tmp_path) == []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WrongMount, match="file: it isn't a directory"):
        mount.prove(tmp_path / "file", "node-1")
    with pytest.raises(WrongMount, match="file/below: Not a directory"):
        mount.prove(tmp_path / "file/below", "node-1")


@pytest.mark.parametrize("call", ["mkdir", "open"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_can_t_be_written_is_named(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: root may write everywhere, and a read-only mount needs rights that CI hasn't."""

    def refusing(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refusing)
    with pytest.raises(WrongMount, match=f"{tmp_path}: it can't be written: .*{os.strerror(code)}"):
        mount.prove(tmp_path, "node-1")


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "nodes").touch()
    with pytest.raises(Damaged, match="nodes should be a directory"):
        mount.prove(tmp_path, "node-1")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("f_bavail", 3, "KiB free"), ("f_favail", 3, "3 inodes free")],
)
def test_a_full_folder_is_named(
    field: str, value: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    names: tuple[str, ...] = (
        "bsize",
        "frsize",
        "blocks",
        "bfree",
        "bavail",
        "files",
        "ffree",
        "favail",
        "flag",
    )
    names = tuple(f"f_{name}" for name in names)
    fields = [value if name == field else getattr(real, name) for name in (*names, "f_namemax")]
    fields[5] = 1000
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    with pytest.raises(WrongMount, match=f"it is full .*{reason}"):
        mount.prove(tmp_path, "node-1")
    assert os.listdir(tmp_path) == []


def test_a_link_that_isn_t_exclusive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def replacing(source: Path, target: Path, **kwargs: Any) -> None:
        target.unlink(missing_ok=True)
        real(source, target)

    monkeypatch.setattr(os, "link", replacing)
    with pytest.raises(WrongMount, match=r"link\(\) isn't exclusive"):
        mount.prove(tmp_path, "node-1")
    assert os.listdir(tmp_path / "nodes") == []


def test_a_file_system_without_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", unsupported)
    with pytest.raises(WrongMount, match="Operation not permitted"):
        mount.prove(tmp_path, "node-1")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 1, "fleet": "x"}', b'{"format": 2}']
)
def test_a_damaged_fleet_file_is_reported_by_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "cohort.json").write_bytes(data)
    with pytest.raises(Damaged, match=r"cohort\.json: "):
        mount.prove(tmp_path, "node-1")
    assert (tmp_path / "cohort.json").read_bytes() == data


def test_a_nonce_shows_who_sees_the_same_folder(tmp_path: Path) -> None:
    for name in ("shared", "other"):
        (tmp_path / name).mkdir()
        mount.prove(tmp_path / name, "node-1")
    nonce = mount.leave_nonce(tmp_path / "shared", "node-1", "i1")
    assert mount.sees_nonce(tmp_path / "shared", "node-1", "i1", nonce)
    assert not mount.sees_nonce(tmp_path / "shared", "node-1", "i1", "another")
    assert not mount.sees_nonce(tmp_path / "shared", "node-1", "i2", nonce)
    assert not mount.sees_nonce(tmp_path / "other", "node-1", "i1", nonce)
    assert not mount.sees_nonce(tmp_path / "missing", "node-1", "i1", nonce)
    assert mount.leave_nonce(tmp_path / "shared", "node-1", "i2") != nonce


def test_a_bad_node_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="node 'a/b' contains '/'"):
        mount.prove(tmp_path, "a/b")
