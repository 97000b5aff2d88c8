"""`run.checkpoint()`: the next attempt of the task goes on from there, and nobody else sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.nodes import list_nodes
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    with running_fleet(tmp_path_factory.mktemp("checkpoints"), nodes=2) as running:
        yield running


def test_another_node_goes_on_from_a_killed_node_s_checkpoint(
    producer: Producer, tmp_path: Path
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    result = jobs.keep_steps.delay("kill", str(started), str(go))
    wait_for(started.exists, "the first step")
    assert producer.files_of("steps-kept-kill", tmp_path) == {}
    (busy,) = [info.node for info in list_nodes(producer.client) if info.running]
    started.unlink()
    producer.fleet.node(busy).kill()
    wait_for(started.exists, "the second step")
    go.touch()
    assert result.get(timeout=30) == ["one 1", "two 2", "three 2"]
    producer.fleet.start_node(busy)


def test_a_retry_goes_on_too(producer: Producer) -> None:
    assert jobs.keep_steps.delay("retry").get(timeout=30) == ["one 1", "two 2", "three 2"]


def test_a_node_that_is_asked_to_end_leaves_time_for_one(
    producer: Producer, tmp_path: Path
) -> None:
    """Nothing is lost, no delivery is counted, and the node is gone before the job has ended."""
    started = tmp_path / "started"
    result = jobs.leave_politely.delay("drain", str(started))
    wait_for(started.exists, "the run")
    (busy,) = [info.node for info in list_nodes(producer.client) if info.running]
    producer.fleet.node(busy).terminate()
    before, after, attempt = result.get(timeout=30)
    assert before == busy != after
    assert attempt == "1"
    assert producer.fleet.node(busy).wait(30) == 0
    producer.fleet.start_node(busy)
    assert producer.states_of("polite-drain") == [(result.id, "SUCCESS")]
