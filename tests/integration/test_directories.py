"""`./cohort dir`: reading needs no fleet; what changes a directory takes its turn as a job."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import Refused
from tasks.command import command
from tasks.directory import restore
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for
from tests.terminal import Terminal

SCRIPTS = (
    "mkdir sub; printf one >file; printf 'a\\377\\0b' >sub/odd; ln -s file link; mkdir empty",
    "printf two!! >file; printf new >'new\nname'; rm link",
    "exit 1",
    "mkfifo pipe; rm -r empty",
)


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    with running_fleet(tmp_path_factory.mktemp("dir"), nodes=2) as running:
        for script in SCRIPTS:
            command.delay(["sh", "-c", script], key="history").get(timeout=30, propagate=False)
        yield running


@pytest.fixture
def terminal(producer: Producer) -> Terminal:
    return Terminal(producer.fleet.environ)


@pytest.fixture
def reader(producer: Producer, tmp_path: Path) -> Terminal:
    """A machine that has the shared folder and no Redis."""
    environ = {name: value for name, value in os.environ.items() if "COHORT" not in name}
    return Terminal(
        {
            **environ,
            "PYTHONPATH": producer.fleet.environ["PYTHONPATH"],
            "COHORT_ROOT": str(producer.fleet.root),
            "COHORT_STATE": str(tmp_path / "state"),
        }
    )


def test_log_tells_of_each_version(producer: Producer, reader: Terminal) -> None:
    code, out, err = reader.run("dir", "log", "history", "--json")
    assert (code, err) == (0, "")
    rows = {row["version"]: row for row in json.loads(out)}
    assert list(rows)[:4][::-1] == sorted(rows)[:4]  # the newest first
    assert [rows[n]["state"] for n in (1, 2, 3, 4)] == [
        *("SUCCESS", "SUCCESS", "FAILURE", "SUCCESS"),
    ]
    assert rows[1]["changed"]["added"] == ["empty", "file", "link", "sub", "sub/odd"]
    assert (rows[1]["files"], rows[1]["bytes"]) == (2, 7)
    assert rows[2]["changed"] == {
        "added": ["new\nname"],
        "changed": ["file"],
        "removed": ["link"],
    }
    assert rows[3]["changed"] == {"added": [], "changed": [], "removed": []}
    assert rows[4]["changed"]["removed"] == ["empty"]
    assert rows[4]["left_out"] == [{"path": "pipe", "what": "FIFO"}]
    assert {rows[n]["node"] for n in rows} <= {"node-1", "node-2"}
    assert [task for task, _ in producer.states_of("history")][:4] == [
        rows[n]["task"] for n in (1, 2, 3, 4)
    ]
    shown = reader.run("dir", "log", "history", "-n", "100")[1].decode()
    assert "2 files, 7 B; 5 added" in shown
    assert "left out: FIFO of pipe" in shown
    one = json.loads(reader.run("dir", "log", "history", "-n", "1", "--json")[1])
    assert [row["version"] for row in one] == [max(rows)]


def test_show_diff_and_cat(reader: Terminal) -> None:
    shown = reader.run("dir", "show", "history", "--at", "1")[1].decode().splitlines()
    assert [line.split()[-1] for line in shown] == ["empty", "file", "file", "sub", "sub/odd"]
    assert shown[2].endswith("link -> file")
    assert shown[1].split()[:2] == ["-rw-r--r--", "3"]
    told = json.loads(reader.run("dir", "show", "history", "--at", "4", "--json")[1])
    assert [entry["path"] for entry in told["entries"]] == ["file", "new\nname", "sub", "sub/odd"]
    assert told["left_out"] == [{"path": "pipe", "what": "FIFO"}]
    changed = reader.run("dir", "diff", "history", "1", "2")[1].decode().splitlines()
    assert [line.split() for line in changed] == [
        ["M", "file", "3", "->", "5"],
        ["D", "link", "0"],
        ["A", r"'new\nname'", "3"],
    ]
    back = json.loads(reader.run("dir", "diff", "history", "2", "1", "--json")[1])
    assert {row["path"]: row["how"] for row in back["changes"]} == {
        "file": "changed",
        "link": "added",
        "new\nname": "removed",
    }
    assert reader.run("dir", "cat", "history", "sub/odd", "--at", "1")[1] == b"a\xff\0b"
    assert reader.run("dir", "cat", "history", "file", "--at", "1")[1] == b"one"


def test_restore_makes_an_old_version_the_newest(
    producer: Producer, terminal: Terminal, tmp_path: Path
) -> None:
    command.delay(["sh", "-c", "echo old >file; chmod 640 file"], key="back").get(timeout=30)
    old = producer.files_of("back", tmp_path)
    command.delay(["sh", "-c", "rm file; echo new >other"], key="back").get(timeout=30)
    code, out, _ = terminal.run("dir", "restore", "back", "1")
    assert (code, out) == (0, b"back: version 1 is now version 3\n")
    assert producer.files_of("back", tmp_path) == old
    outcome = command.delay(["sh", "-c", "stat -c %a file; ls"], key="back").get(timeout=30)
    assert outcome["last_lines"] == ["640", "file"]


def test_rm_empties_a_directory_and_restore_brings_it_back(
    producer: Producer, terminal: Terminal, tmp_path: Path
) -> None:
    command.delay(["sh", "-c", "echo kept >file"], key="gone").get(timeout=30)
    code, out, err = terminal.run("dir", "rm", "gone")
    assert (code, out) == (1, b"")
    assert "--yes" in err
    assert len(producer.states_of("gone")) == 1
    code, out, _ = terminal.run("dir", "rm", "gone", "--yes")
    assert (code, out) == (0, b"gone: the empty directory is now version 2\n")
    assert producer.files_of("gone", tmp_path) == {}
    assert command.delay(["ls"], key="gone").get(timeout=30)["last_lines"] == []
    terminal.run("dir", "restore", "gone", "1")
    assert producer.files_of("gone", tmp_path) == {"file": b"kept\n"}


def test_restore_waits_for_the_run_that_has_the_lock(producer: Producer, tmp_path: Path) -> None:
    jobs.count.delay("held").get(timeout=30)
    started, go = tmp_path / "started", tmp_path / "go"
    running = jobs.count.delay("held", str(started), str(go))
    wait_for(started.exists, "the run")
    back = restore.delay("count-held", 1)
    go.touch()
    assert running.get(timeout=30)["n"] == 2
    assert back.get(timeout=30) == {"restored": 1, "as": 3}
    assert jobs.count.delay("held").get(timeout=30)["n"] == 2
    for version in (99, -1, True):
        assert isinstance(producer.end_of(restore.delay("count-held", version)), Refused)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["dir", "log", "nobody"], 1, "no job directory nobody"),
        (["dir", "log", "a/b"], 1, "a/b"),
        (["dir", "log", "history", "-n", "0"], 1, "-n"),
        (["dir", "show", "history", "--at", "999"], 1, "no version 999"),
        (["dir", "cat", "history", "absent"], 1, "'absent'"),
        (["dir", "cat", "history", "sub"], 1, "'sub'"),
        (["dir", "diff", "history", "-3"], 1, "no version -3"),
        (["dir", "nonsense", "history"], 2, "nonsense"),
        (["dir", "restore", "history", "1"], 1, "no fleet is running here"),
    ],
)
def test_wrong_words_are_refused_with_the_reason(
    producer: Producer, reader: Terminal, words: list[str], code: int, told: str
) -> None:
    ended, out, err = reader.run(*words)
    assert (ended, out) == (code, b"")
    assert told in err
    assert "Traceback" not in err
    assert not (producer.fleet.root / "jobs" / "nobody").exists()
