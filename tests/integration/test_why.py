"""`./cohort why` and `./cohort dead`, as a user types them, on a real fleet."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import NotRegistered
from celery.result import AsyncResult

from broker import keys
from tests import newer_jobs, waiting_jobs
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for
from tests.terminal import Terminal

KNOWN = "tests.sample_jobs,tests.waiting_jobs"
A_TIME = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    """One node of two CPUs, whose grace for what it doesn't know is short."""
    home = tmp_path_factory.mktemp("why")
    with running_fleet(home, nodes=1, COHORT_JOBS=KNOWN, COHORT_UNKNOWN_GRACE="1s") as running:
        yield running


@pytest.fixture
def terminal(producer: Producer) -> Terminal:
    return Terminal(producer.fleet.environ)


@pytest.fixture
def busy(producer: Producer, tmp_path: Path) -> Iterator[list[AsyncResult]]:
    """The only node's two processes are taken."""
    go = tmp_path / "go"
    holders = []
    for name in ("one", "two"):
        started = tmp_path / name
        holders.append(waiting_jobs.hold.delay(name, str(started), str(go)))
        wait_for(started.exists, f"the holder of {name}")
    yield holders
    go.touch()
    for holder in holders:
        holder.get(timeout=20)
    wait_for(producer.is_quiet, "every claim, lock and parked job to be gone", 20)


def why(terminal: Terminal, task_id: str) -> str:
    code, out, err = terminal.run("why", task_id)
    assert (code, err) == (0, "")
    return out.decode()


def facts(terminal: Terminal, *words: str, code: int = 0) -> Any:
    status, out, err = terminal.run(*words, "--json")
    assert status == code, err
    return json.loads(out)


def answer_on_a_terminal(producer: Producer, answer: str, *words: str) -> int:
    """Give a command its answer from a real terminal. Its exit code."""
    ours, its = os.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        return subprocess.run(
            [sys.executable, "-P", "-m", "deploy.cli", *words],
            env=producer.fleet.environ,
            stdin=its,
            capture_output=True,
            timeout=60,
        ).returncode
    finally:
        os.close(ours)
        os.close(its)


def test_what_nobody_knows(terminal: Terminal) -> None:
    code, out, err = terminal.run("why", "nonsense")
    assert (code, out) == (1, b"")
    assert err.startswith("cohort: nobody knows nonsense:")
    assert facts(terminal, "why", "nonsense", code=1)["where"] == "nowhere"


def test_what_has_ended(terminal: Terminal) -> None:
    good, bad = jobs.add.delay(1, 2), jobs.refuse.delay("why")
    assert good.get(timeout=20) == 3
    bad.get(timeout=20, propagate=False)
    assert why(terminal, good.id) == "it ran: SUCCESS\n"
    assert why(terminal, bad.id) == "it ran: FAILURE: Refused: no such thing\n"


def test_what_runs_and_what_waits_for_its_key(
    producer: Producer, terminal: Terminal, busy: list[AsyncResult]
) -> None:
    holder = busy[0]
    told = why(terminal, holder.id)
    assert re.fullmatch(f"it runs on node node-1 since {A_TIME}\n", told), told
    # Of a queue that nobody takes from, so that they stay there; what comes then is told as well.
    queued = [
        waiting_jobs.hold.apply_async(("one", "/dev/null", "/dev/null"), queue="elsewhere")
        for _ in range(2)
    ]
    told = why(terminal, queued[1].id)
    assert told.startswith("it waits in the queue elsewhere at priority 0: 1 before it\n")
    assert "no node takes from the queue elsewhere\n" in told
    then = (
        f"then for the key held-one, which claim .* of node node-1 holds \\(task {holder.id}\\)\n"
    )
    assert re.search(then, told), told
    answer = facts(terminal, "why", queued[1].id)
    assert (answer["where"], answer["before"], answer["of"]) == ("queued", 1, 2)
    assert answer["holder"]["task"] == holder.id
    assert answer["served_by"] == []
    producer.client.delete("elsewhere")


def test_a_plain_task_that_runs(terminal: Terminal, tmp_path: Path) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    result = waiting_jobs.plain_hold.delay(str(started), str(go))
    wait_for(started.exists, "the run")
    answer = facts(terminal, "why", result.id)
    assert (answer["where"], answer["node"]) == ("running", "node-1")
    assert re.fullmatch(A_TIME, answer["since"])
    go.touch()
    assert result.get(timeout=20) == "done"


def test_what_is_parked_behind_others(
    producer: Producer, terminal: Terminal, tmp_path: Path
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    holder = waiting_jobs.hold.delay("parked", str(started), str(go))
    wait_for(started.exists, "the holder")
    parked = [waiting_jobs.hold.delay("parked", str(started), str(go)) for _ in range(2)]
    wait_for(lambda: producer.client.zcard(keys.PARKED) == 2, "both to be parked")
    told = why(terminal, parked[1].id)
    first, second, _ = told.split("\n")
    assert first.startswith("it waits for the key held-parked, which claim claim-"), told
    assert first.endswith(f" of node node-1 holds (task {holder.id})"), told
    assert second == "1 before it, of 2 jobs that wait for it"
    answer = facts(terminal, "why", parked[0].id)
    assert (answer["where"], answer["key"], answer["before"]) == ("parked", "held-parked", 0)
    assert (answer["holder"]["node"], answer["holder"]["task"]) == ("node-1", holder.id)
    go.touch()
    for one in parked:
        one.get(timeout=20)


def test_what_fits_no_node(producer: Producer, terminal: Terminal, tmp_path: Path) -> None:
    result, other = waiting_jobs.big.delay(str(tmp_path)), waiting_jobs.labelled.delay()
    wait_for(lambda: producer.client.zcard(keys.WAITING) == 2, "them to wait for a node")
    told = why(terminal, result.id)
    assert told.startswith("it waits for a node with 4 CPUs, 512 MiB\n")
    assert "no node of the fleet can give it 4 CPUs, 512 MiB: start one that can\n" in told
    assert "  node node-1 never can: 2 CPUs and 2.0 GiB to spare of 2 CPUs and 2.0 GiB\n" in told
    answer = facts(terminal, "why", other.id)
    assert answer["needs"]["labels"] == ["of-nobody"]
    assert answer["nodes"][0]["missing_labels"] == ["of-nobody"]
    assert answer["nodes"][0]["could"] is False
    for one in (result, other):
        one.revoke()
    told = why(terminal, other.id)
    assert told.startswith("it was ended, or never ran: REVOKED, revoked\n")
    assert told.endswith("its message still waits; the node that meets it drops it\n")
    producer.client.delete(keys.WAITING, keys.SHAPES, keys.SETTLED)  # No node ever meets them.


def test_what_is_not_due(producer: Producer, terminal: Terminal) -> None:
    result = jobs.add.apply_async((1, 2), countdown=3600)
    told = why(terminal, result.id)
    match = re.fullmatch(rf"it waits until {A_TIME}, ([\d,]+) s from now\n", told)
    assert match, told
    assert 3500 < int(match[1].replace(",", "")) <= 3600
    producer.client.delete(keys.delayed("celery"))


def test_dead_letters(producer: Producer, terminal: Terminal) -> None:
    result = newer_jobs.newer.delay()
    assert isinstance(producer.end_of(result), NotRegistered)
    producer.client.lpush("celery", "garbage \x1b[31m")
    wait_for(lambda: producer.client.hlen(keys.DEAD) == 2, "both dead letters")

    told = why(terminal, result.id)
    reason = "no node knows the task tests.newer_jobs.newer"
    assert f"{reason}; see `./cohort dead show {result.id}`\n" in told
    rows = facts(terminal, "dead", "list")
    rows_of = {row["id"]: row for row in rows}
    task, element = rows_of[result.id], next(row for row in rows if row["task"] is None)
    assert (task["task"], task["reason"]) == ("tests.newer_jobs.newer", reason)
    assert (task["queue"], task["lost_deliveries"]) == ("celery", 0)
    assert element["reason"] == "it is no task message"
    code, out, _ = terminal.run("dead", "list")
    assert code == 0
    assert all(row["id"] in out.decode() for row in rows)
    code, out, _ = terminal.run("dead", "show", element["id"])
    assert code == 0
    assert r"garbage \x1b[31m" in out.decode()
    shown = facts(terminal, "dead", "show", result.id)
    assert shown["headers"]["task"] == "tests.newer_jobs.newer"

    # Nothing is done while anything is wrong with what was asked.
    for words, said in [
        (("retry", result.id, element["id"]), f"{element['id']} isn't a task's message"),
        (("retry", result.id, "nonsense"), "nonsense is no dead letter"),
        (("retry",), "dead retry: give task ids, or --all and none"),
        (("drop", result.id), "drop removes 1 dead letter for good: add --yes"),
    ]:
        code, out, err = terminal.run("dead", *words)
        assert (code, out) == (1, b"")
        assert said in err
    assert producer.client.hlen(keys.DEAD) == 2

    producer.fleet.capacities["node-2"] = (2, 2 << 30)
    producer.fleet._given["COHORT_JOBS"] = f"{KNOWN},tests.newer_jobs"
    node = producer.fleet.node("node-1")
    node.terminate()
    node.wait(30)
    queued = jobs.add.delay(1, 2)
    assert why(terminal, queued.id) == (
        "it waits in the queue celery at priority 0: 0 before it\n"
        "no node is alive: none has a lease\n"
    )
    producer.fleet.start_node("node-2")
    code, out, err = terminal.run("dead", "retry", "--all")
    assert code == 0
    assert f"{element['id']} isn't a task's message: it stays" in err
    match = re.fullmatch(rf"{result.id} is tried again as (\S+)\n", out.decode())
    assert match
    assert producer.app.AsyncResult(match[1]).get(timeout=20) == "node-2"
    assert result.state == "FAILURE"  # One task has one outcome.

    assert answer_on_a_terminal(producer, "n", "dead", "drop", "--all") == 1
    assert producer.client.hlen(keys.DEAD) == 1
    assert answer_on_a_terminal(producer, "y", "dead", "drop", "--all") == 0
    assert facts(terminal, "dead", "drop", "--all", "--yes") == {"dropped": 0}
    assert facts(terminal, "dead", "list") == []
