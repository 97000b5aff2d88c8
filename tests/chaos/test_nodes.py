"""Nodes that die, freeze and wake; a Redis that restarts, is cut off, or comes back empty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker import keys
from broker.nodes import list_nodes
from deploy.parts import Part
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for


@pytest.fixture
def producer(tmp_path: Path) -> Iterator[Producer]:
    with running_fleet(tmp_path, nodes=2) as running:
        yield running


def start_held(producer: Producer, name: str, folder: Path) -> tuple[object, Path]:
    """A run that has begun and waits for its file `go`."""
    started, go = folder / f"{name}-started", folder / f"{name}-go"
    result = jobs.count.delay(name, str(started), str(go))
    wait_for(started.exists, "the run to begin")
    started.unlink()
    return result, go


def runner_of(producer: Producer) -> Part:
    """The node that holds a claim."""
    busy = [info.node for info in list_nodes(producer.client) if info.running]
    assert len(busy) == 1
    return producer.fleet.node(busy[0])


def test_a_killed_node_s_job_ends_on_another(producer: Producer, tmp_path: Path) -> None:
    result, go = start_held(producer, "kill", tmp_path)
    dead = runner_of(producer)
    dead.kill()
    wait_for((tmp_path / "kill-started").exists, "the run to begin again")
    assert runner_of(producer).name != dead.name
    go.touch()
    outcome = result.get(timeout=30)  # type: ignore[attr-defined]
    assert (outcome["n"], outcome["attempt"], outcome["version"]) == (1, 2, 0)
    assert outcome["node"] != dead.name
    assert len(producer.states_of("count-kill")) == 1


def test_a_node_that_sleeps_past_its_lease_is_late_and_harmless(
    producer: Producer, tmp_path: Path
) -> None:
    """It wakes when its job has ended elsewhere: it is fenced, and the outcome stays."""
    result, go = start_held(producer, "sleep", tmp_path)
    asleep = runner_of(producer)
    asleep.pause()
    wait_for((tmp_path / "sleep-started").exists, "the run to begin again")
    go.touch()
    outcome = result.get(timeout=30)  # type: ignore[attr-defined]
    assert outcome["node"] != asleep.name
    asleep.resume()
    # It joins anew; its late run has come to its end when the next job finds the key free.
    wait_for(
        lambda: any(i.node == asleep.name and i.is_live for i in list_nodes(producer.client)),
        "the sleeper to join anew",
    )
    assert jobs.count.delay("sleep").get(timeout=30)["n"] == 2
    wait_for(producer.is_quiet, "nothing to be left")
    assert [state for _, state in producer.states_of("count-sleep")] == ["SUCCESS", "SUCCESS"]
    history = producer.files_of("count-sleep", tmp_path)["history"].decode().splitlines()
    assert len(history) == 2


def test_jobs_go_on_through_a_restart_of_redis(producer: Producer, tmp_path: Path) -> None:
    result, go = start_held(producer, "restart", tmp_path)
    queued = jobs.count.delay("restart")
    assert producer.fleet.redis is not None
    producer.fleet.redis.kill()
    go.touch()  # The run ends, and commits, while there is no Redis.
    wait_for(lambda: len(producer.states_of("count-restart")) == 1, "the commit")
    producer.fleet.start_redis()
    assert result.get(timeout=60)["n"] == 1  # type: ignore[attr-defined]
    assert queued.get(timeout=60)["n"] == 2
    wait_for(producer.is_quiet, "nothing to be left")


def test_an_emptied_redis_costs_work_and_no_outcome(producer: Producer, tmp_path: Path) -> None:
    result, go = start_held(producer, "wiped", tmp_path)
    producer.client.flushall()
    wait_for(lambda: producer.client.zcard(keys.LEASES) == 2, "both nodes to join anew")
    # The run has no claim any more. It commits all the same, and who waits for it is told.
    go.touch()
    assert result.get(timeout=60)["n"] == 1  # type: ignore[attr-defined]
    assert jobs.count.delay("wiped").get(timeout=60)["n"] == 2
    wait_for(producer.is_quiet, "nothing to be left")
    assert [state for _, state in producer.states_of("count-wiped")] == ["SUCCESS", "SUCCESS"]


def test_warm_shutdown_finishes_what_runs_and_gives_back_the_rest(
    producer: Producer, tmp_path: Path
) -> None:
    result, go = start_held(producer, "warm", tmp_path)
    leaving = runner_of(producer)
    leaving.terminate()
    go.touch()
    assert result.get(timeout=30)["attempt"] == 1  # type: ignore[attr-defined]
    leaving.wait(30)
    assert leaving.name not in {info.node for info in list_nodes(producer.client)}
    assert jobs.count.delay("warm").get(timeout=30)["n"] == 2
