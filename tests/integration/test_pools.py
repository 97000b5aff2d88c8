"""The pools prefork, threads and solo: what each runs, and what becomes of what it can't run."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chord, group

from broker import keys
from errors import MemoryExceeded
from tests import family_jobs
from tests import sample_jobs as jobs
from tests.fleets import wait_for
from tests.processes import marked
from tests.workers_kit import Workers, running_workers


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with running_workers(tmp_path_factory.mktemp("pools")) as workers:
        yield workers


@pytest.fixture
def workers(fleet: Workers) -> Iterator[Workers]:
    yield fleet
    try:
        wait_for(fleet.producer.is_quiet, "every claim, lock and parked job to be gone", 20)
    finally:
        fleet.stop()


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_what_runs_without_processes(workers: Workers, tmp_path: Path, pool: str) -> None:
    workers.start(pool, pool)
    results = [jobs.add.delay(number, 1) for number in range(40)]
    assert [result.get(timeout=20) for result in results] == list(range(1, 41))
    assert jobs.plain_add.delay(2, 3).get(timeout=20) == 5
    header = [jobs.add.s(number, number) for number in range(6)]
    assert group(header).apply_async().get(timeout=20) == [0, 2, 4, 6, 8, 10]
    assert chord(header)(jobs.total.s()).get(timeout=20) == 30
    with pytest.raises(ValueError, match="attempt 2 fails"):
        jobs.fail_keyless.delay(9).get(timeout=20)
    assert jobs.fail_keyless.delay(1).get(timeout=20) == 2
    assert jobs.keyless_once.delay(str(tmp_path)).get(timeout=20) == pool


@pytest.mark.parametrize("pool", ["threads", pytest.param("solo", marks=pytest.mark.long)])
def test_what_needs_a_process_waits_for_one(workers: Workers, tmp_path: Path, pool: str) -> None:
    """A key, a time limit, a memory limit; given at definition or at submission."""
    worker = workers.start(pool, pool)
    mark = uuid.uuid4().hex
    keyed = jobs.count.delay(f"needs-{pool}")
    limited = family_jobs.eat_in_a_program.delay(mark)
    timed = family_jobs.my_process.apply_async(soft_time_limit=20)
    plain = jobs.plain_add.apply_async((2, 3), soft_time_limit=20)  # As with stock Celery.
    # Two say it themselves; that the third has a limit this time only its worker sees.
    client: Any = workers.producer.client
    wait_for(lambda: client.zcard(keys.WAITING) == 3, "all three to wait for another node")
    assert "tests.family_jobs.my_process[" in worker.log
    assert client.zcard(keys.delayed("celery")) == 0
    assert plain.get(timeout=20) == 5
    assert jobs.keyless_once.delay(str(tmp_path)).get(timeout=20) == pool
    assert {result.state for result in (keyed, limited, timed)} == {"PENDING"}
    workers.start("prefork", "prefork")
    outcome = keyed.get(timeout=30)
    assert (outcome["n"], outcome["attempt"], outcome["node"]) == (1, 1, "prefork")
    assert isinstance(workers.producer.end_of(limited), MemoryExceeded)
    assert timed.get(timeout=30) != worker.pid
    assert marked(mark) == set()
