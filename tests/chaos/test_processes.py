"""`kill -9` of single processes, and SIGSTOP past the lease: who is late is told so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.nodes import list_nodes
from deploy import leash
from deploy.parts import Part
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for


@pytest.fixture
def producer(tmp_path: Path) -> Iterator[Producer]:
    # One pool process each, so that it is known which one runs the job.
    with running_fleet(tmp_path, nodes=2, cpus=1) as running:
        yield running


def runner_of(producer: Producer) -> Part:
    """The node that holds the one claim."""
    (busy,) = [info.node for info in list_nodes(producer.client) if info.running]
    return producer.fleet.node(busy)


def child_of(node: Part) -> int:
    """Its one pool process."""
    (child,) = leash.descendants(node.pid)
    return child


def claims_of(producer: Producer, key: str, task_id: str) -> set[str]:
    """The attempts at a task that have begun."""
    folder = producer.fleet.root / "jobs" / key / "runs" / task_id
    return {path.name for path in folder.iterdir()}


def test_the_main_process_alone_is_killed(producer: Producer, tmp_path: Path) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    result = jobs.count.delay("main", str(started), str(go))
    wait_for(started.exists, "the run to begin")
    started.unlink()
    dead = runner_of(producer)
    child = child_of(dead)
    os.kill(dead.pid, signal.SIGKILL)
    wait_for(started.exists, "the run to begin again")
    wait_for(lambda: not Path(f"/proc/{child}").exists(), "the orphan to be gone")
    assert runner_of(producer).name != dead.name
    go.touch()
    outcome = result.get(timeout=30)
    assert (outcome["n"], outcome["attempt"]) == (1, 2)
    assert producer.states_of("count-main") == [(result.id, "SUCCESS")]
    wait_for(producer.is_quiet, "nothing to be left")


def test_the_pool_process_alone_is_killed(producer: Producer, tmp_path: Path) -> None:
    """Its node lives on and gives the job back at once: nobody waits for a lease."""
    started, go = tmp_path / "started", tmp_path / "go"
    result = jobs.count.delay("child", str(started), str(go))
    parked = jobs.count.delay("child")
    wait_for(started.exists, "the run to begin")
    node = runner_of(producer)
    started.unlink()
    os.kill(child_of(node), signal.SIGKILL)
    wait_for(started.exists, "the run to begin again")
    go.touch()
    outcome = result.get(timeout=30)
    assert (outcome["n"], outcome["attempt"]) == (1, 2)
    assert parked.get(timeout=30)["n"] == 2
    assert node.is_running
    wait_for(producer.is_quiet, "nothing to be left")


def test_a_sleeper_s_finish_is_refused_and_its_commit_fenced(
    producer: Producer, tmp_path: Path
) -> None:
    """Its run ends only when it has woken: both runs are whole, and one of them counts."""
    started, go = tmp_path / "started", tmp_path / "go"
    result = jobs.count.delay("fenced", str(started), str(go))
    wait_for(started.exists, "the run to begin")
    started.unlink()
    (first,) = claims_of(producer, "count-fenced", result.id)
    asleep = runner_of(producer)
    asleep.pause()
    wait_for(started.exists, "the run to begin again")
    go.touch()
    assert result.get(timeout=30)["node"] != asleep.name
    wait_for(producer.is_quiet, "nothing to be claimed")
    asleep.resume()
    said = "had gone to another node"
    wait_for(lambda: said in asleep.log.read_text(), "its finish to be refused")
    (second,) = claims_of(producer, "count-fenced", result.id) - {first}
    (record,) = _records(producer, "count-fenced")
    assert record == (result.id, second)
    files = producer.files_of("count-fenced", tmp_path)
    assert len(files["history"].decode().splitlines()) == 1
    wait_for(producer.is_quiet, "nothing to be left")


def _records(producer: Producer, key: str) -> list[tuple[str, str]]:
    from storage.directory import Directory

    versions = Directory.open(producer.fleet.root, key).versions()
    return [(record.task_id, record.claim_id) for record in versions]


def test_a_job_that_was_revoked_too_late_keeps_its_success(
    producer: Producer, tmp_path: Path
) -> None:
    """It has committed, and its child dies before it can say so: whoever takes it up tells that."""
    started, heard, go = (tmp_path / name for name in ("started", "heard", "go"))
    producer.arm("attempt:after-commit")
    result = jobs.deaf_to_termination.delay("late", str(started), str(heard), str(go))
    wait_for(started.exists, "the run to begin")
    result.revoke(terminate=True)
    wait_for(heard.exists, "the signal")
    go.touch()
    wait_for(lambda: not producer.is_armed("attempt:after-commit"), "the child to die")
    assert producer.end_of(result, 30) == "heard nothing"
    assert result.state == "SUCCESS"
    assert producer.states_of("deaf-late") == [(result.id, "SUCCESS")]
    wait_for(producer.is_quiet, "nothing to be left")


def test_terminating_a_job_that_ends_just_then_hits_nobody_else(tmp_path: Path) -> None:
    with running_fleet(tmp_path, nodes=1, cpus=1) as producer:
        names = ("started", "heard", "go", "next-started", "next-go")
        started, heard, go, next_started, next_go = (tmp_path / name for name in names)
        revoked = jobs.deaf_to_termination.delay("it", str(started), str(heard), str(go))
        wait_for(started.exists, "the run to begin")
        innocent = jobs.count.delay("innocent", str(next_started), str(next_go))
        revoked.revoke(terminate=True)
        wait_for(heard.exists, "the signal")
        go.touch()
        wait_for(next_started.exists, "the next run to begin")
        # COHORT_STOP_GRACE is a second: by then whoever was to be killed has been.
        ends = time.monotonic() + 3
        wait_for(lambda: innocent.ready() or time.monotonic() > ends, "the grace to be over")
        next_go.touch()
        assert producer.end_of(innocent, 20)["attempt"] == 1
        assert revoked.get(timeout=20) == "heard nothing"
        wait_for(producer.is_quiet, "nothing to be left")
