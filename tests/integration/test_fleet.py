"""A fleet on this machine: it comes up, takes jobs, and nothing of it stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from broker.nodes import list_nodes
from deploy.fleet import Fleet, free_port
from errors import Refused, Unavailable
from tests.processes import marked, wait_until

PROJECT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, "-P", "-m", "deploy.cli"]

JOBS = """
import time
from pathlib import Path
from tasks import job

@job(key="count-{name}")
def count(run, name, to=1):
    for number in range(to):
        run.progress(number + 1, to, "steps")
        time.sleep(0.5)
    return {"counted": to, "node": run.node}

@job()
def stumble(run, word):
    raise ValueError(f"over {word}")

@job()
def hold(run, gate):
    Path(gate, "holding").touch()
    while not Path(gate, "open").exists():
        time.sleep(0.05)
    return "held"
"""


def redis_process(lines: list[str]) -> Path:
    """The folder in /proc of the Redis that `up` has told of."""
    (pid,) = re.findall(r"redis .* process (\d+)", "\n".join(lines))
    return Path("/proc", pid)


class Terminal:
    """A shell, as it were, in a folder with jobs, with a state folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        (folder / "jobs_here.py").write_text(JOBS)
        kept = {name: value for name, value in os.environ.items() if "COHORT" not in name}
        self.environ = {
            **kept,
            "PYTHONPATH": str(PROJECT),
            "COHORT_STATE": str(folder / "state"),
            "COHORT_JOBS": "jobs_here",
            "TEST_MARK": self.mark,
        }

    def start(self, *words: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*CLI, *words],
            cwd=self.folder,
            env={**self.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words, **environ)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def up(self, *words: str) -> tuple[subprocess.Popen[str], list[str]]:
        """Start a fleet; what it says until it is ready."""
        process = self.start("up", *words)
        assert process.stdout is not None
        lines = []
        while (line := process.stdout.readline()) and not line.startswith("ready"):
            lines.append(line.rstrip())
        assert line, process.communicate()[1]
        return process, lines


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Terminal:
    return Terminal(tmp_path_factory.mktemp("terminal"))


@pytest.fixture(scope="module")
def up(terminal: Terminal) -> Iterator[list[str]]:
    """A fleet of two nodes; what it said when it came up."""
    process, lines = terminal.up(
        "--nodes", "2", "--cpus", "1,2", "--flower-port", str(free_port()), "--root", "shared"
    )
    yield lines
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert marked(terminal.mark) == set()
    assert not redis_process(lines).exists()
    assert not (terminal.folder / "state" / "fleet.json").exists()


def test_every_part_has_a_line_with_its_address(up: list[str], terminal: Terminal) -> None:
    said = dict(line.split(maxsplit=1) for line in up)
    assert list(said) == ["redis", "root", "node-1", "node-2", "beat", "flower", "logs"]
    client = redis.Redis.from_url(said["redis"].split()[0])
    settings = client.config_get("*")
    client.close()
    assert settings["maxmemory-policy"] == "noeviction"
    assert (settings["appendonly"], settings["appendfsync"]) == ("yes", "everysec")
    assert settings["bind"] == "127.0.0.1"
    assert said["root"] == str(terminal.folder / "shared")
    assert re.fullmatch(r"process \d+  1 cpus  2\.0 GiB of memory", said["node-1"])
    for name in ("node-1", "node-2", "beat", "flower"):
        pid = re.search(r"process (\d+)", said[name])
        assert pid is not None
        assert int(pid[1]) in marked(terminal.mark)
    with urllib.request.urlopen(said["flower"].split()[0] + "/workers", timeout=10) as page:
        assert b"Flower" in page.read()


def test_another_terminal_finds_the_nodes(up: list[str], terminal: Terminal) -> None:
    listed = terminal.run("nodes", "--json")
    assert listed.returncode == 0, listed.stderr
    nodes = json.loads(listed.stdout)
    assert [(node["node"], node["cpus"], node["state"]) for node in nodes] == [
        ("node-1", 1, "live"),
        ("node-2", 2, "live"),
    ]
    shown = terminal.run("nodes").stdout.splitlines()
    assert shown[0].split() == [
        *("node", "incarnation", "state", "cpus", "memory", "gpus", "running", "lease", "left"),
        "labels",
    ]
    assert [line.split()[0] for line in shown[1:]] == ["node-1", "node-2"]
    assert nodes[1]["spare"]["cpus"] == 2
    assert " 2 of 2 " in shown[2] and shown[2].endswith("prefork")
    assert nodes[0]["incarnation"] in shown[1]


def test_a_job_is_followed_to_its_outcome(up: list[str], terminal: Terminal) -> None:
    done = terminal.run("submit", "--wait", "count", "sheep", "to=3")
    assert done.returncode == 0, done.stderr
    task_id, outcome = done.stdout.splitlines()
    told = json.loads(outcome)
    assert told["id"] == task_id
    assert (told["state"], told["result"]["counted"]) == ("SUCCESS", 3)
    assert "jobs_here.count PROGRESS" in done.stderr
    assert "of 3 steps" in done.stderr


def test_a_failed_job_is_told_by_exit_code_and_reason(up: list[str], terminal: Terminal) -> None:
    failed = terminal.run("submit", "--wait", "--json", "jobs_here.stumble", "word=a stone")
    assert failed.returncode == 1
    told = json.loads(failed.stdout)
    assert (told["state"], told["error"]) == ("FAILURE", "ValueError: over a stone")


def test_an_interrupted_wait_leaves_the_job_running(
    up: list[str], terminal: Terminal, tmp_path: Path
) -> None:
    waiting = terminal.start("submit", "--wait", "hold", str(tmp_path))
    assert waiting.stdout is not None
    task_id = waiting.stdout.readline().strip()
    wait_until((tmp_path / "holding").exists)
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert f"{task_id} runs on" in err
    running = json.loads(terminal.run("nodes", "--json").stdout)
    assert sum(node["running"] for node in running) == 1
    (tmp_path / "open").touch()
    wait_until(
        lambda: not any(n["running"] for n in json.loads(terminal.run("nodes", "--json").stdout))
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cuont", "x"], r"no task cuont; did you mean jobs_here\.count\?"),
        (["count"], "missing a required argument"),
        (["count", "name=x", "name=y"], "name is given twice"),
        (["count", "a/b"], "a/b"),
    ],
)
def test_a_wrong_submission_is_refused_with_its_reason(
    up: list[str], terminal: Terminal, words: list[str], told: str
) -> None:
    refused = terminal.run("submit", *words)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert re.search(told, refused.stderr)
    assert "Traceback" not in refused.stderr


def test_a_second_fleet_in_the_same_state_folder_is_refused(
    up: list[str], terminal: Terminal
) -> None:
    refused = terminal.run("up")
    assert refused.returncode == 1
    assert "a fleet is running already as process" in refused.stderr


def test_celery_itself_finds_the_nodes(up: list[str], terminal: Terminal) -> None:
    known = json.loads((terminal.folder / "state" / "fleet.json").read_text())
    environ = {**terminal.environ, "COHORT_REDIS": known["redis"], "COHORT_ROOT": known["root"]}
    ways = {
        "celery": [sys.executable, "-m", "celery", "-A", "tasks"],
        "cohort": [sys.executable, "-P", "-m", "deploy.run_celery"],
    }
    for command in ways.values():
        # With destinations the wait ends with the last answer.
        to = "worker@node-1,worker@node-2"
        words = [*command, "inspect", "ping", "--json", "--timeout", "20", "--destination", to]
        asked = subprocess.run(
            words, cwd=terminal.folder, env=environ, capture_output=True, text=True
        )
        assert asked.returncode == 0, asked.stderr
        answer = {"ok": "pong"}
        assert json.loads(asked.stdout) == {"worker@node-1": answer, "worker@node-2": answer}


def test_a_killed_script_leaves_nothing_behind(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    process, lines = terminal.up("--nodes", "2", "--flower-port", str(free_port()))
    server = redis_process(lines)
    try:
        # The script, four parts and Redis, a leash for each, and two children of each node.
        # Redis writes its title over its environment, so the mark can't be seen on it.
        wait_until(lambda: len(marked(terminal.mark)) >= 1 + 4 + 5 + 4)
        assert server.exists()
    finally:
        process.kill()
        process.communicate(timeout=30)
    wait_until(lambda: marked(terminal.mark) == set() and not server.exists(), timeout=15)
    # The note that it left misleads nobody.
    assert (tmp_path / "state" / "fleet.json").exists()
    lost = terminal.run("nodes")
    assert lost.returncode == 1
    assert "no fleet is running here" in lost.stderr


def test_a_part_that_cannot_start_ends_the_fleet_with_its_log(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    failed = terminal.run("up", "--nodes", "1", "--no-flower", COHORT_JOBS="jobs_nowhere")
    assert failed.returncode == 1
    assert "cohort: node-1 ended with exit code 1 before ready" in failed.stderr
    assert "No module named 'jobs_nowhere'" in failed.stderr
    assert marked(terminal.mark) == set()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "0"], "--nodes: from 1 to 64, not 0"),
        (["--cpus", "1,2"], "cpus: one value for all nodes or 3, not 2"),
        (["--cpus", "0"], "--cpus or --memory: expected whole numbers of at least 1"),
        (["--memory", "lots"], "--cpus or --memory: expected a size"),
        (
            ["--redis", "redis://:secret@127.0.0.1:1/0"],
            r"redis://\*\*\*@127.0.0.1:1/0 doesn't answ",
        ),
    ],
)
def test_a_wrong_fleet_is_refused_before_it_starts(
    tmp_path: Path, words: list[str], told: str
) -> None:
    terminal = Terminal(tmp_path)
    refused = terminal.run("up", *words)
    assert refused.returncode == 1
    assert re.search(told, refused.stderr)
    assert "secret" not in refused.stderr + refused.stdout
    assert marked(terminal.mark) == set()


def test_a_node_can_be_killed_and_started_again(tmp_path: Path) -> None:
    with Fleet(tmp_path, nodes=2, cpus=[1]) as fleet:
        client = redis.Redis.from_url(fleet.redis_url)
        first = fleet.node("node-1")
        first.kill()
        assert not first.is_running
        assert fleet.node("node-2").is_running
        second = fleet.start_node("node-1")
        assert second.pid != first.pid
        assert fleet.node("node-1") is second
        assert second.pid in {info.pid for info in list_nodes(client) if info.is_live}
        with pytest.raises(Refused, match="no node node-9; there are node-1, node-2"):
            fleet.start_node("node-9")
        client.close()
    assert not any(part.is_running for part in fleet.parts)


def test_redis_keeps_what_it_took_when_it_is_killed(tmp_path: Path) -> None:
    with Fleet(tmp_path, nodes=0) as fleet:
        client = redis.Redis.from_url(fleet.redis_url)
        client.set("taken", "yes")
        assert fleet.redis is not None
        fleet.redis.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        fleet.start_redis()
        assert client.get("taken") == b"yes"
        client.close()


def test_another_redis_is_used_and_left_running(tmp_path: Path) -> None:
    with Fleet(tmp_path / "a", nodes=0) as owner:
        with Fleet(tmp_path / "b", nodes=1, cpus=[1], redis=owner.redis_url) as guest:
            assert guest.redis is None
            assert guest.node("node-1").is_running
        client = redis.Redis.from_url(owner.redis_url)
        assert client.ping()
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.close()
        with pytest.raises(Refused, match="maxmemory-policy allkeys-lru"):
            Fleet(tmp_path / "b", nodes=1, redis=owner.redis_url).start()
    with pytest.raises(Unavailable, match="doesn't answer"):
        Fleet(tmp_path / "b", nodes=1, redis=owner.redis_url).start()
