"""`submit -- PROGRAM` and `logs`, as their user sees them in a terminal."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.command import command
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for
from tests.terminal import Terminal


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    with running_fleet(tmp_path_factory.mktemp("terminal"), nodes=1) as running:
        yield running


@pytest.fixture
def terminal(producer: Producer) -> Terminal:
    return Terminal(producer.fleet.environ)


def submit(key: str, script: str, *options: str) -> list[str]:
    return ["submit", "--wait", "--directory", key, *options, "--", "sh", "-c", script, "sh"]


def test_a_program_s_output_and_exit_status_are_the_command_s_own(terminal: Terminal) -> None:
    code, out, err = terminal.run(*submit("own", r"printf 'a\377b\n'; echo $1 $2"), "--wait", "-x")
    assert (code, out) == (0, b"a\xffb\n--wait -x\n")
    lines = err.splitlines()
    assert lines[-1].startswith("cohort: exit status 0 after ")
    assert all(line.startswith("cohort: ") for line in lines)
    assert terminal.run(*submit("own", "echo oh; exit 7"))[:2] == (7, b"oh\n")
    code, _, err = terminal.run(*submit("own", "kill -TERM $$"))
    assert code == 128 + signal.SIGTERM
    assert "ended by SIGTERM" in err


def test_json_is_all_that_stdout_holds(terminal: Terminal) -> None:
    code, out, err = terminal.run(*submit("json", "echo said; exit 3", "--json"))
    assert code == 3
    told = json.loads(out)
    assert (told["state"], told["outcome"]["exit_status"]) == ("FAILURE", 3)
    assert told["error"] == "CommandFailed: sh: exit status 3; its last line: said"
    assert "said" in err.splitlines()


def test_env_and_timeout(terminal: Terminal) -> None:
    code, out, _ = terminal.run(*submit("env", "echo $WORD", "--env", "WORD=a=b"))
    assert (code, out) == (0, b"a=b\n")
    code, _, err = terminal.run(*submit("env", "echo waits; sleep 60", "--timeout", "1s"))
    assert code == 1
    assert "SoftTimeLimitExceeded" in err


def test_output_comes_while_it_runs_and_an_interrupted_wait_leaves_it_running(
    producer: Producer, terminal: Terminal, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    script = f"echo begun; while [ ! -e {go} ]; do sleep 0.05; done; echo ended"
    waiting = terminal.start(*submit("interrupted", script))
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == b"begun\n"
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    task_id = err.decode().rpartition("logs -f ")[2].strip()
    assert f"{task_id} runs on" in err.decode()
    following = terminal.start("logs", "-f", task_id)
    assert following.stdout is not None
    assert following.stdout.readline() == b"begun\n"
    go.touch()
    out, err = following.communicate(timeout=30)
    assert (following.returncode, out) == (0, b"ended\n")
    assert err.decode().splitlines()[-1] == f"{task_id}: SUCCESS"
    assert terminal.run("logs", task_id)[:2] == (0, b"begun\nended\n")


def test_logs_of_several_attempts(producer: Producer, terminal: Terminal) -> None:
    result = jobs.talk_and_fail.delay("stutter", times=1)
    result.get(timeout=30)
    code, out, err = terminal.run("logs", "-f", result.id)
    assert code == 0
    assert [line.split()[1:] for line in out.decode().splitlines()] == [
        ["INFO", "attempt", "1"],
        ["INFO", "attempt", "2"],
    ]
    assert err.splitlines() == ["cohort: attempt 2", f"{result.id}: SUCCESS"]
    out = terminal.run("logs", "--attempt", "2", result.id)[1]
    assert out.decode().split()[1:] == ["INFO", "attempt", "2"]


def test_a_follower_that_comes_first_waits_for_the_task(
    producer: Producer, terminal: Terminal
) -> None:
    following = terminal.start("logs", "-f", "to-come")
    command.apply_async((["echo", "here"], "to-come"), task_id="to-come").get(timeout=30)
    out, _ = following.communicate(timeout=30)
    assert (following.returncode, out) == (0, b"here\n")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["submit", "--", "ls"], 2, "a program needs --directory KEY"),
        (["submit", "--directory", "k"], 2, "name a TASK, or"),
        (["submit", "--directory", "k", "--"], 2, "name a TASK, or"),
        (["submit", "--directory", "k", "talk"], 2, "are for a program"),
        (["submit", "--directory", "a/b", "--", "ls"], 1, "a/b"),
        (["submit", "--directory", "k", "--timeout", "soon", "--", "ls"], 1, "--timeout"),
        (["submit", "--directory", "k", "--env", "WORD", "--", "ls"], 1, "NAME=VALUE"),
        (["logs", "no-such-task"], 1, "no-such-task has written nothing"),
        (["logs", "../x"], 1, "task id"),
        (["logs", "--attempt", "0", "x"], 1, "--attempt"),
        (["logs"], 2, "ID"),
    ],
)
def test_wrong_words_are_refused_with_the_reason(
    producer: Producer, terminal: Terminal, words: list[str], code: int, told: str
) -> None:
    ended, out, err = terminal.run(*words)
    assert (ended, out) == (code, b"")
    assert told in err
    assert "Traceback" not in err
    assert producer.client.llen("celery") == 0


def test_a_program_that_can_t_be_started_has_no_exit_status(terminal: Terminal) -> None:
    words = ["submit", "--wait", "--directory", "absent", "--", "no-such-program"]
    code, out, err = terminal.run(*words)
    assert (code, out) == (1, b"")
    assert "Refused: no-such-program: there is no such program" in err


def test_without_wait_the_id_is_printed(producer: Producer, terminal: Terminal) -> None:
    code, out, _ = terminal.run("submit", "--directory", "quick", "--", "true")
    assert code == 0
    assert producer.app.AsyncResult(out.decode().strip()).get(timeout=30)["exit_status"] == 0
    wait_for(producer.is_quiet, "nothing to be left")
