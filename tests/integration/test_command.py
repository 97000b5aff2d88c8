"""Any program as a job: what it finds, what becomes of it, and what is told of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from errors import Refused
from storage.directory import Directory
from storage.logs import LogReader
from tasks.command import CommandFailed, command
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for
from tests.processes import marked, wait_until


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    home = tmp_path_factory.mktemp("command")
    with running_fleet(home, nodes=2, TEST_MARK=str(home), COHORT_STOP_GRACE="3s") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(producer: Producer) -> Iterator[None]:
    yield
    wait_for(producer.is_quiet, "every claim, lock and parked job to be gone", 20)


def said(producer: Producer, task_id: str) -> bytes:
    reader = LogReader(producer.fleet.root, task_id)
    return b"".join(data for _, data in reader.news())


def test_it_finds_what_the_last_run_left_and_tells_how_it_went(
    producer: Producer, tmp_path: Path
) -> None:
    script = "echo $1 >>log; wc -l <log; echo to-err >&2"
    first = command.delay(["sh", "-c", script, "sh", "one"], key="append")
    second = command.delay(["sh", "-c", script, "sh", "two"], key="append")
    outcome = first.get(timeout=30)
    assert (outcome["exit_status"], outcome["signal"]) == (0, None)
    assert outcome["last_lines"] == ["1", "to-err"]
    assert outcome["elapsed"] > 0
    assert outcome["most_memory"] > 0
    assert {"user_seconds", "system_seconds"} <= set(outcome)
    log = producer.fleet.root / outcome["log"]
    assert log.read_bytes() == b"1\nto-err\n"
    assert second.get(timeout=30)["last_lines"] == ["2", "to-err"]
    assert producer.files_of("append", tmp_path) == {"log": b"one\ntwo\n"}


def test_another_exit_status_is_a_failure_that_leaves_the_directory(
    producer: Producer, tmp_path: Path
) -> None:
    command.delay(["sh", "-c", "echo good >file"], key="fails").get(timeout=30)
    result = command.delay(["sh", "-c", "echo bad >file; echo oh dear; exit 7"], key="fails")
    error = producer.end_of(result)
    assert isinstance(error, CommandFailed)
    assert str(error) == "sh: exit status 7; its last line: oh dear"
    assert (error.outcome["exit_status"], error.outcome["last_lines"]) == (7, ["oh dear"])
    assert producer.files_of("fails", tmp_path) == {"file": b"good\n"}
    assert [state for _, state in producer.states_of("fails")] == ["SUCCESS", "FAILURE"]
    killed = producer.end_of(command.delay(["sh", "-c", "kill -KILL $$"], key="fails"))
    assert (killed.outcome["exit_status"], killed.outcome["signal"]) == (None, "SIGKILL")


def test_a_program_that_isn_t_there_is_named(producer: Producer) -> None:
    error = producer.end_of(command.delay(["no-such-program", "x"], key="absent"))
    assert isinstance(error, Refused)
    assert "no-such-program: there is no such program" in str(error)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"argv": "ls -l", "key": "k"}, r"argv is a list of texts"),
        ({"argv": [], "key": "k"}, r"argv is a list of texts"),
        ({"argv": ["ls", 3], "key": "k"}, r"argv\[1\]"),
        ({"argv": ["ls", "a\0b"], "key": "k"}, r"argv\[1\]"),
        ({"argv": [""], "key": "k"}, r"argv\[0\], the program, is empty"),
        ({"argv": ["ls"], "key": None}, r"key is a text"),
        ({"argv": ["ls"], "key": "a/b"}, r"job key"),
        ({"argv": ["ls"], "key": "k", "env": ["A"]}, r"env is a mapping"),
        ({"argv": ["ls"], "key": "k", "env": {"A=B": "x"}}, r"can't name a variable"),
        ({"argv": ["ls"], "key": "k", "env": {"A": 3}}, r"env: A must be a text"),
    ],
)
def test_what_can_be_no_command_is_refused_before_it_is_sent(
    producer: Producer, arguments: dict[str, object], told: str
) -> None:
    with pytest.raises(Refused, match=told):
        command.delay(**arguments)
    with pytest.raises(TypeError, match="argv"):
        command.delay(key="k")
    assert producer.client.llen("celery") == 0


def test_its_environment_is_the_worker_s_without_what_is_the_worker_s_own(
    producer: Producer,
) -> None:
    script = "import os; print(*sorted(os.environ), os.environ['MINE'], sep='\\n')"
    result = command.delay([sys.executable, "-c", script], key="env", env={"MINE": "zzz"})
    result.get(timeout=30)
    names = said(producer, result.id).decode().splitlines()
    assert {"PATH", "HOME", "MINE"} < set(names)
    assert names[-1] == "zzz"
    assert not [name for name in names if name.startswith("COHORT_")]


def test_what_it_leaves_running_is_ended_before_the_commit(
    producer: Producer, tmp_path: Path
) -> None:
    """Else a daemon of it would write into the tree while, or after, it is committed."""
    script = "setsid sh -c 'while :; do echo x >>late; done' & while [ ! -s late ]; do :; done"
    command.delay(["sh", "-c", script], key="daemon").get(timeout=30)
    tree = producer.files_of("daemon", tmp_path)
    assert set(tree) == {"late"}
    wait_until(lambda: not sleepers(producer, b"while :;"), 5)


def sleepers(producer: Producer, mark: bytes) -> list[int]:
    """The processes of the fleet with this in their command line."""
    found = []
    for pid in marked(str(producer.fleet.home.parent)):
        try:
            if mark in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def test_terminated_it_may_tidy_up_and_leaves_nothing(producer: Producer, tmp_path: Path) -> None:
    script = """
        trap 'echo tidied; exit 0' TERM
        (while :; do sleep 0.77; done) &
        echo ready; while :; do sleep 0.05; done
    """
    result = command.delay(["sh", "-c", script], key="terminated")
    wait_for(lambda: b"ready" in said(producer, result.id), "the program")
    result.revoke(terminate=True)
    assert isinstance(producer.end_of(result), TaskRevokedError)
    assert said(producer, result.id).splitlines()[-1] == b"tidied"
    assert producer.states_of("terminated") == [(result.id, "REVOKED")]
    wait_until(lambda: not sleepers(producer, b"0.77"), 5)


def test_the_soft_time_limit_asks_and_the_hard_one_kills(producer: Producer) -> None:
    script = "trap 'echo asked; exit 0' TERM; while :; do sleep 0.05; done"
    soft = command.apply_async((["sh", "-c", script], "limits"), soft_time_limit=1)
    assert "SoftTimeLimitExceeded" in repr(producer.end_of(soft))
    assert said(producer, soft.id).splitlines()[-1] == b"asked"
    deaf = "trap '' TERM; while :; do sleep 0.66; done"
    hard = command.apply_async((["sh", "-c", deaf], "limits"), time_limit=1)
    assert isinstance(producer.end_of(hard), TimeLimitExceeded)
    assert [state for _, state in producer.states_of("limits")] == ["FAILURE", "FAILURE"]
    wait_until(lambda: not sleepers(producer, b"0.66"), 5)


def test_its_output_is_there_while_it_runs_also_when_it_is_huge(
    producer: Producer, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    script = f"echo first; while [ ! -e {go} ]; do sleep 0.05; done; yes 0123456 | head -c 80000000"
    result = command.delay(["sh", "-c", script], key="huge")
    wait_for(lambda: said(producer, result.id) == b"first\n", "the first line")
    assert result.state == "STARTED"
    go.touch()
    outcome = result.get(timeout=60)
    log = producer.fleet.root / outcome["log"]
    assert log.stat().st_size == 6 + 80_000_000
    assert outcome["last_lines"] == ["0123456"] * 20


def test_output_that_is_no_text_harms_nothing(producer: Producer) -> None:
    outcome = command.delay(["printf", r"\377\376\0ok\n"], key="bytes").get(timeout=30)
    assert outcome["last_lines"] == ["\ufffd\ufffd\0ok"]


def test_what_a_version_can_t_hold_is_left_out_and_named(
    producer: Producer, tmp_path: Path
) -> None:
    script = "mkfifo pipe; touch plain suid; chmod 4755 suid"
    result = command.delay(["sh", "-c", script], key="odd")
    assert result.get(timeout=30)["left_out"] == [
        {"path": "pipe", "what": "FIFO"},
        {"path": "suid", "what": "set-uid bit"},
    ]
    record = Directory.open(producer.fleet.root, "odd").head().record
    assert record is not None and record.result == result.result
    assert set(producer.files_of("odd", tmp_path)) == {"plain", "suid"}
    told = said(producer, result.id).decode()
    assert "left out of the directory: FIFO of 'pipe'" in told
    assert "left out of the directory: set-uid bit of 'suid'" in told
    version = Directory.open(producer.fleet.root, "odd").head()
    assert [entry.path for entry in version.manifest.left_out] == ["pipe", "suid"]


def test_a_job_s_log_is_for_the_same_readers(producer: Producer) -> None:
    result = jobs.talk.delay(["good morning", "gr\u00fc\u00df Gott"])
    result.get(timeout=30)
    lines = said(producer, result.id).decode().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "INFO good morning",
        "INFO gr\u00fc\u00df Gott",
    ]


def test_what_a_cancelled_job_says_last_is_there(producer: Producer, tmp_path: Path) -> None:
    """Its process ends itself then: nothing may be left in its memory."""
    result = jobs.talk_when_cancelled.delay("last", str(tmp_path / "started"))
    wait_for((tmp_path / "started").exists, "the run")
    result.revoke(terminate=True)
    assert isinstance(producer.end_of(result), TaskRevokedError)
    lines = said(producer, result.id).decode().splitlines()
    assert [line.split()[-1] for line in lines] == [str(number) for number in range(100)]


def test_a_killed_node_s_program_dies_and_runs_again_elsewhere(
    producer: Producer, tmp_path: Path
) -> None:
    command.delay(["sh", "-c", "echo one >file"], key="lost").get(timeout=30)
    go = tmp_path / "go"
    script = (
        f"echo half >>file; echo begun; while [ ! -e {go} ]; do sleep 0.55; done; echo two >>file"
    )
    result = command.delay(["sh", "-c", script], key="lost")
    wait_for(lambda: said(producer, result.id) == b"begun\n", "the program")
    busy = [pid for pid in sleepers(producer, b"0.55") if pid]
    node = next(part for part in producer.fleet.nodes if is_below(busy[0], part.pid))
    node.kill()
    wait_for(lambda: said(producer, result.id) == b"begun\n" * 2, "the program, again")
    go.touch()
    assert result.get(timeout=30)["exit_status"] == 0
    assert producer.files_of("lost", tmp_path) == {"file": b"one\nhalf\ntwo\n"}
    reader = LogReader(producer.fleet.root, result.id)
    list(reader.news())
    assert [log.attempt for log in reader.found] == [1, 2]
    producer.fleet.start_node(node.name)


def is_below(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    return False
