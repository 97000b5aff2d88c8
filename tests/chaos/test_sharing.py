"""Who shares a queue and isn't of one mind: a stock producer, an old worker and a new one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.result import AsyncResult

from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for

STOCK = """
import json, sys
from celery import Celery

app = Celery("elsewhere", broker=sys.argv[1])
assert "broker.transport" not in sys.modules
ids = [app.send_task("tests.sample_jobs.count", ["stock"], priority=n % 10).id for n in range(6)]
ids.append(app.send_task("tests.sample_jobs.add", [1, 2], countdown=1).id)
ids.append(app.send_task("tests.sample_jobs.plain_add", [3, 4]).id)
print(json.dumps(ids))
"""


@pytest.fixture
def producer(tmp_path: Path) -> Iterator[Producer]:
    with running_fleet(tmp_path, nodes=2) as running:
        yield running


def test_a_stock_producer_feeds_a_fleet(producer: Producer, tmp_path: Path) -> None:
    """A program with Celery and nothing of ours; its keyed jobs take their turn all the same."""
    told = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, producer.fleet.redis_url],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    *counts, add, plain = [AsyncResult(id, app=producer.app) for id in json.loads(told.stdout)]
    outcomes = [result.get(timeout=30) for result in counts]
    assert sorted(outcome["n"] for outcome in outcomes) == [1, 2, 3, 4, 5, 6]
    assert {outcome["attempt"] for outcome in outcomes} == {1}
    assert (add.get(timeout=30), plain.get(timeout=30)) == (3, 7)
    assert len(producer.states_of("count-stock")) == 6
    wait_for(producer.is_quiet, "nothing to be left")


def test_an_old_worker_leaves_a_new_task_to_the_new_one(tmp_path: Path) -> None:
    """A rolling upgrade mustn't lose what only the new nodes know."""
    from tests.newer_jobs import newer

    with running_fleet(tmp_path, nodes=1) as producer:
        results = [newer.delay() for _ in range(3)]
        # In the order of arrival: the old worker has seen them before it ends this one.
        assert jobs.add.delay(1, 2).get(timeout=30) == 3
        fleet = producer.fleet
        fleet.capacities["node-2"] = fleet.capacities["node-1"]
        fleet._given["COHORT_JOBS"] += ",tests.newer_jobs"
        fleet.start_node("node-2")
        assert [result.get(timeout=30) for result in results] == ["node-2"] * 3
        assert jobs.add.delay(1, 2).get(timeout=30) == 3
        wait_for(producer.is_quiet, "nothing to be left")
