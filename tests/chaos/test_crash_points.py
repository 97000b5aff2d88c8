"""`kill -9` at every step of an attempt: files and outcome are old or new, never mixed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from crashpoints import POINTS
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    with running_fleet(tmp_path_factory.mktemp("crash"), nodes=2) as running:
        yield running


@pytest.mark.parametrize("point", sorted(POINTS))
def test_killed_there_the_job_ends_once_and_whole(
    producer: Producer, tmp_path: Path, point: str
) -> None:
    key = f"count-{point.replace(':', '-')}"
    name = key.removeprefix("count-")
    first = jobs.count.delay(name)
    assert first.get(timeout=30)["n"] == 1

    producer.arm(point)
    second = jobs.count.delay(name)
    outcome = second.get(timeout=60)
    assert outcome["n"] == 2
    # Some points lie behind the outcome; the kill may still be under way.
    wait_for(lambda: not producer.is_armed(point), f"a process to die at {point}")
    if point.startswith("writer:"):
        restart_the_dead_node(producer)

    third = jobs.count.delay(name)
    assert third.get(timeout=60)["n"] == 3
    assert producer.states_of(key) == [(task.id, "SUCCESS") for task in (first, second, third)]
    files = producer.files_of(key, tmp_path)
    assert json.loads(files["count.json"]) == {"n": 3, "task": third.id}
    runs = [line.split()[0] for line in files["history"].decode().splitlines()]
    assert runs == [first.id, second.id, third.id]
    wait_for(producer.is_quiet, "every claim and lock to be gone", 30)


def restart_the_dead_node(producer: Producer) -> None:
    """The writer's points take the whole node with them. Its end may take a moment to be seen."""
    nodes = producer.fleet.nodes
    dead = wait_for(lambda: [node for node in nodes if not node.is_running], "a node to be dead")
    for node in dead:
        producer.fleet.start_node(node.name)
