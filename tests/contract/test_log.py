"""The commit log on a local directory: who gets a name, and what is reported, never repaired."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from errors import Damaged, Fenced, Unavailable
from storage import durable, log
from storage.log import Log, Record

Link = Callable[[Path, Path], bool]


def record(n: int, task_id: str = "", key: str = "k") -> Record:
    task_id = task_id or f"task-{n}"
    return Record(n, n - 1, key, task_id, "claim", 1, "SUCCESS", None, {"n": n}, "node", "now")


@pytest.fixture
def k(tmp_path: Path) -> Log:
    (tmp_path / "log").mkdir()
    (tmp_path / "runs").mkdir()
    return Log(tmp_path / "log", "k")


def add(to: Log, new: Record, name: str = "") -> Record:
    written = to.folder.parent / "runs" / (name or f"{new.task_id}-{new.n}")
    durable.create(written, new.encode())
    return to.append(written, new)


def grow(to: Log, last: int) -> None:
    """Records 1 to `last`, without the fsyncs."""
    for n in range(1, last + 1):
        to.path(n).parent.mkdir(exist_ok=True)
        to.path(n).write_bytes(record(n).encode())


def test_records_come_back_as_they_were(k: Log) -> None:
    assert k.head() is None
    for n in (1, 2, 3):
        assert add(k, record(n)) == record(n)
        assert k.head() == record(n)
    assert [k.read(n) for n in (1, 2, 3)] == [record(n) for n in (1, 2, 3)]
    assert os.stat(k.path(1)).st_nlink == 2


def test_the_second_writer_of_a_name_is_fenced_and_told_by_whom(k: Log) -> None:
    add(k, record(1, "mine"))
    with pytest.raises(Fenced, match="version 1 went to task mine, so this run of other"):
        add(k, record(1, "other"))
    assert k.head() == record(1, "mine")


def test_the_same_task_gets_the_outcome_that_it_already_has(k: Log) -> None:
    first = add(k, record(1, "task"))
    again = replace(record(1, "task"), claim_id="another claim", result="another")
    assert add(k, again, "again") == first


@pytest.mark.parametrize("reply", [errno.EEXIST, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_lost_reply_to_the_own_link_is_a_commit(
    reply: int, k: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def losing(*args: Path, **kwargs: bool) -> None:
        real(*args, **kwargs)  # type: ignore[arg-type]
        raise OSError(reply, os.strerror(reply))

    monkeypatch.setattr(os, "link", losing)
    assert add(k, record(1)) == record(1)
    assert k.head() == record(1)


def test_a_link_that_failed_in_an_unknown_way_is_tried_again(
    k: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PAUSES", (0.0, 0.0, 0.0))
    real, failures = os.link, [errno.EIO, errno.ESTALE]

    def failing(*args: Path, **kwargs: bool) -> None:
        if failures:
            raise OSError(failures.pop(), "unknown")
        real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", failing)
    assert add(k, record(1)) == record(1)
    assert failures == []


def test_another_s_win_behind_an_unknown_error_fences(
    k: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def beaten(source: Path, target: Path, **kwargs: bool) -> None:
        other = source.with_name("other")
        other.write_bytes(record(1, "other").encode())
        real(other, target)
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "link", beaten)
    with pytest.raises(Fenced, match="went to task other"):
        add(k, record(1, "mine"))


@pytest.mark.parametrize(
    ("code", "known"),
    [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EROFS, True), (errno.EIO, False)],
)
def test_a_link_that_never_works_says_what_is_known(
    code: int, known: bool, k: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "PAUSES", (0.0, 0.0, 0.0))

    def failing(*args: Path, **kwargs: bool) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", failing)
    ending = "nothing was committed" if known else "whether it was committed isn't known"
    with pytest.raises(Unavailable, match=f"0/1: {os.strerror(code)}; {ending}"):
        add(k, record(1))
    assert k.head() is None


def test_buckets_of_a_thousand(k: Log) -> None:
    grow(k, 998)
    for n in (999, 1000, 1001):
        add(k, record(n))
        for hint in (0, 1, n - 1, n, n + 1, 2000, 10**9):
            head = k.head(hint)
            assert head is not None and head.n == n, hint
    assert sorted(os.listdir(k.folder)) == ["0", "1"]
    assert sorted(os.listdir(k.folder / "1")) == ["1000", "1001"]


def test_a_bucket_whose_maker_died_is_no_damage(k: Log) -> None:
    (k.folder / "0").mkdir()
    assert k.head() is None
    grow(k, 999)
    (k.folder / "1").mkdir()
    for hint in (0, 999, 1000):
        head = k.head(hint)
        assert head is not None and head.n == 999


def test_a_gap_is_named(k: Log) -> None:
    grow(k, 5)
    k.path(3).unlink()
    with pytest.raises(Damaged, match="0/3: missing, although record 5 exists"):
        k.head()
    with pytest.raises(Damaged, match="0/3"):
        k.read(3)


def test_a_listing_that_misses_names_is_no_gap_and_no_end(
    k: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's cached listing, or one made while others link: the names are asked for."""
    grow(k, 9)
    real = durable.entries
    monkeypatch.setattr(
        durable, "entries", lambda folder: [e for e in real(folder) if e.name not in "379"]
    )
    head = k.head()
    assert head is not None and head.n == 9


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "0/notes.txt",
        "0/01",
        "0/+3",
        "0/1000",
        "0/0",
        "0/٣",
        "0/.nfs01",
        "00/1",
        "-1/1",
    ],
)
def test_a_foreign_file_is_reported_by_name(name: str, k: Log) -> None:
    grow(k, 2)
    (k.folder / name).parent.mkdir(exist_ok=True)
    (k.folder / name).write_text("hello")
    foreign = k.folder / (name if "/" not in name or name[:2] == "0/" else name.split("/")[0])
    with pytest.raises(Damaged) as caught:
        k.head()
    assert str(caught.value).startswith(f"{foreign}: ")
    assert "foreign" in str(caught.value)


@pytest.mark.parametrize("name", ["7", "0/3", "notes"])
def test_a_foreign_folder_is_reported_by_name(name: str, k: Log) -> None:
    grow(k, 2)
    (k.folder / name).mkdir()
    with pytest.raises(Damaged, match=f"{k.folder / name}: .*foreign"):
        k.head()


GOOD = record(2).encode()
BAD_RECORDS = {
    "empty": (b"", "this is no record of Cohort"),
    "cut in the head": (GOOD[:20], "this is no record of Cohort"),
    "cut": (GOOD[:-5], "length or checksum"),
    "longer": (GOOD + b"x", "length or checksum"),
    "one letter": (GOOD.replace(b"task-2", b"task-3"), "length or checksum"),
    "one zero": (GOOD.replace(b"now", b"no\0"), "length or checksum"),
    "zeros": (b"\0" * len(GOOD), "this is no record"),
    "another format": (GOOD.replace(b"record 1 ", b"record 2 "), "format 2 isn't known here"),
    "a manifest": (GOOD.replace(b"cohort record", b"cohort manifest"), "this is no record"),
    "another number": (record(7).encode(), "it is record 7 on 6 of 'k', not 2 on 1 of 'k'"),
    "another key": (record(2, key="j").encode(), "it is record 2 on 1 of 'j'"),
    "another base": (replace(record(2), base=0).encode(), "it is record 2 on 0 of 'k'"),
    "another state": (
        replace(record(2), state="MAYBE").encode(),  # type: ignore[arg-type]
        "no outcome is called 'MAYBE'",
    ),
}


@pytest.mark.parametrize("bad", BAD_RECORDS)
def test_a_damaged_record_is_reported_by_name_and_left_alone(bad: str, k: Log) -> None:
    grow(k, 2)
    data, reason = BAD_RECORDS[bad]
    k.path(2).write_bytes(data)
    for look in (k.head, lambda: k.read(2), lambda: add(k, record(2, "late"), os.urandom(4).hex())):
        with pytest.raises(Damaged) as caught:
            look()
        assert str(caught.value).startswith(f"{k.path(2)}: ")
        assert reason in str(caught.value)
    assert k.path(2).read_bytes() == data


def test_a_link_in_a_record_s_place_isn_t_followed(k: Log) -> None:
    grow(k, 2)
    k.path(2).unlink()
    k.path(2).symlink_to("1")
    with pytest.raises(Damaged, match=r"0/2"):
        k.head()
    with pytest.raises(Damaged, match=r"0/2 should be a plain file"):
        k.read(2)
