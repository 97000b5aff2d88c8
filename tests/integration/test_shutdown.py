"""A worker that is asked to end: what it doesn't finish runs elsewhere at once, what it finishes
doesn't, and no process is left of it.

The leases are a minute long: what starts again in these tests was given back.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker import keys
from broker.nodes import list_nodes
from tests import family_jobs
from tests import sample_jobs as jobs
from tests.fleets import wait_for
from tests.processes import marked
from tests.workers_kit import Worker, Workers, running_workers

POOLS = ("prefork", "threads", "solo")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with running_workers(tmp_path_factory.mktemp("shutdown"), soft_shutdown="1500ms") as workers:
        yield workers


@pytest.fixture
def workers(fleet: Workers) -> Iterator[Workers]:
    yield fleet
    try:
        wait_for(fleet.producer.is_quiet, "every claim, lock and parked job to be gone", 20)
    finally:
        fleet.stop()


class Held:
    """A keyless job that has begun, and ends when it is let go."""

    def __init__(self, folder: Path) -> None:
        self.traces = folder / uuid.uuid4().hex
        self.traces.mkdir()
        self.started, self.go = folder / f"{self.traces.name}-on", folder / f"{self.traces.name}-go"
        self.result: Any = jobs.keyless_once.delay(
            str(self.traces), str(self.started), str(self.go)
        )
        self.wait_for_start()

    def wait_for_start(self) -> None:
        wait_for(self.started.exists, "the run to begin", 20)
        self.started.unlink()

    @property
    def runs(self) -> int:
        return len(list(self.traces.iterdir()))

    def end(self) -> str:
        self.go.touch()
        return str(self.result.get(timeout=20))


def nothing_of(worker: Worker) -> bool:
    return worker.processes == set()


@pytest.mark.parametrize("pool", POOLS)
def test_warm(workers: Workers, tmp_path: Path, pool: str) -> None:
    leaving = workers.start("leaving", pool, cpus=1)
    held = Held(tmp_path)
    traces = tmp_path / "behind"
    traces.mkdir()
    behind = [jobs.keyless_once.delay(str(traces)) for _ in range(4)]
    workers.start("staying", pool, cpus=1)
    leaving.signal(signal.SIGTERM)
    # Whatever it had claimed ahead is done elsewhere, while it is still at its last one.
    assert {result.get(timeout=20) for result in behind} == {"staying"}
    assert held.end() == "leaving"
    assert leaving.wait() == 0
    assert nothing_of(leaving)
    assert (held.runs, len(list(traces.iterdir()))) == (1, 4)


def test_warm_with_a_job_that_is_on_its_way_to_its_process(
    workers: Workers, tmp_path: Path
) -> None:
    """It begins while the worker closes."""
    leaving = workers.start("leaving", "prefork", cpus=1)
    assert jobs.keyless_once.delay(str(tmp_path)).get(timeout=20) == "leaving"  # It is up.
    (child,) = leaving.processes - {leaving.pid}
    os.kill(child, signal.SIGSTOP)
    result = jobs.keyless_once.delay(str(tmp_path))
    wait_for(lambda: workers.producer.client.hget(keys.CLAIMED, result.id), "it to be claimed")
    leaving.signal(signal.SIGTERM)
    wait_for(lambda: "Warm shutdown" in leaving.log, "the worker to be told")
    time.sleep(0.3)  # It closes, and would have forgotten the job by now.
    os.kill(child, signal.SIGCONT)
    assert leaving.wait() == 0
    workers.start("staying", "prefork", cpus=1)
    assert result.get(timeout=20) == "leaving"
    assert jobs.keyless_once.delay(str(tmp_path)).get(timeout=20) == "staying"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_warm_with_a_claim_that_waits_behind_the_bell(
    workers: Workers, tmp_path: Path, pool: str
) -> None:
    """What rings for it at the last moment runs, here or elsewhere, and once."""
    leaving = workers.start("leaving", pool, cpus=2)
    held = Held(tmp_path)  # It has a place free, and waits for the bell.
    workers.start("staying", pool, cpus=1)
    traces = tmp_path / "late"
    traces.mkdir()
    leaving.signal(signal.SIGTERM)
    late: list[Any] = []
    deadline = time.monotonic() + 20
    while "Warm shutdown" not in leaving.log or len(late) < 50:
        assert time.monotonic() < deadline
        late.append(jobs.keyless_once.delay(str(traces)))
        time.sleep(0.01)
    assert {result.get(timeout=20) for result in late} >= {"staying"}
    assert held.end() == "leaving"
    assert leaving.wait() == 0
    assert (held.runs, len(list(traces.iterdir()))) == (1, len(late))


@pytest.mark.parametrize("pool", POOLS)
def test_soft_and_then_cold(workers: Workers, tmp_path: Path, pool: str) -> None:
    leaving = workers.start("leaving", pool, cpus=1 if pool == "solo" else 2)
    finished = jobs.keyless_once.delay(str(tmp_path))
    assert finished.get(timeout=20) == "leaving"
    lost = Held(tmp_path)
    # In `solo` the soft shutdown, which sleeps, stops the job as well.
    done = None if pool == "solo" else Held(tmp_path)
    workers.start("staying", pool)
    leaving.signal(signal.SIGQUIT)
    if done is not None:
        done.go.touch()
    lost.wait_for_start()
    leaving.wait()
    assert nothing_of(leaving)
    assert lost.end() == "staying"
    assert lost.runs == 2
    if done is not None:
        assert (done.end(), done.runs) == ("leaving", 1)
    assert len(list(tmp_path.glob("claim-*"))) == 1


def lose_connections(workers: Workers) -> None:
    """Every node's, and wait until one claims again."""
    assert jobs.add.delay(1, 1).get(timeout=20) == 2
    workers.producer.client.client_kill_filter(_type="normal", skipme=True)
    assert jobs.add.delay(1, 1).get(timeout=20) == 2


def test_cold_after_a_lost_connection(workers: Workers, tmp_path: Path) -> None:
    leaving = workers.start("leaving", "solo", cpus=1)
    lose_connections(workers)
    held = Held(tmp_path)
    workers.start("staying", "prefork")
    leaving.signal(signal.SIGQUIT)
    held.wait_for_start()
    assert held.end() == "staying"
    leaving.wait()


def test_what_ends_before_the_others_after_a_lost_connection(
    workers: Workers, tmp_path: Path
) -> None:
    leaving = workers.start("leaving", "prefork", cpus=2)
    lose_connections(workers)
    first, last = Held(tmp_path), Held(tmp_path)
    leaving.signal(signal.SIGTERM)
    assert first.end() == "leaving"
    known = workers.producer.client
    wait_for(
        lambda: any(i.pid == leaving.pid and i.running == 1 for i in list_nodes(known)),
        "its acknowledgement",
        20,
    )
    assert last.end() == "leaving"
    assert leaving.wait() == 0


def test_a_second_signal_makes_a_warm_shutdown_cold(workers: Workers, tmp_path: Path) -> None:
    leaving = workers.start("leaving", "prefork")
    lost = Held(tmp_path)
    workers.start("staying", "prefork")
    leaving.signal(signal.SIGTERM)
    wait_for(lambda: "Warm shutdown" in leaving.log, "the warm shutdown")
    leaving.signal(signal.SIGQUIT)
    lost.wait_for_start()
    leaving.wait()
    assert nothing_of(leaving)
    assert lost.end() == "staying"


def test_cold_with_a_key_and_a_family(workers: Workers, tmp_path: Path) -> None:
    leaving = workers.start("leaving", "prefork")
    mark = uuid.uuid4().hex
    started, go = tmp_path / "started", tmp_path / "go"
    result = family_jobs.hold_a_family.delay("cold", mark, str(started), str(go))
    wait_for(started.exists, "the run")
    started.unlink()
    workers.start("staying", "prefork")
    leaving.signal(signal.SIGQUIT)
    wait_for(started.exists, "the run to begin again", 20)
    leaving.wait()
    assert nothing_of(leaving)
    go.touch()
    assert result.get(timeout=20) == "staying"
    assert marked(mark) == set()
    assert workers.producer.states_of("hold-cold") == [(result.id, "SUCCESS")]
