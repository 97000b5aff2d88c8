"""Jobs that wait, on a real fleet: revoked, expired, skipped, unknown, too big, retried."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.exceptions import NotRegistered, TaskRevokedError
from celery.result import AsyncResult

from broker import keys
from broker.deadletters import find
from tests import newer_jobs, waiting_jobs
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for

KNOWN = "tests.sample_jobs,tests.waiting_jobs"
FAR = 3600


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    """One node of two CPUs; tests add a second one."""
    home = tmp_path_factory.mktemp("waiting")
    with running_fleet(home, nodes=1, COHORT_JOBS=KNOWN, COHORT_UNKNOWN_GRACE="2s") as running:
        yield running


@pytest.fixture(autouse=True)
def as_before(producer: Producer) -> Iterator[None]:
    """One node that lives, before each test; nothing that is left, after it."""
    if not producer.fleet.node("node-1").is_running:
        producer.fleet.start_node("node-1")
    yield
    for node in producer.fleet.nodes:
        if node.name != "node-1":
            node.terminate()
            node.wait(30)
    wait_for(producer.is_quiet, "every claim, lock and parked job to be gone", 20)
    assert not producer.client.exists(keys.EXPIRING)


class Holder:
    """A job that holds a key of its own until it is let go."""

    def __init__(self, producer: Producer, folder: Path, name: str) -> None:
        self.name = name
        self._go = folder / f"go-{name}"
        started = folder / f"started-{name}"
        self.result = waiting_jobs.hold.delay(name, str(started), str(self._go))
        wait_for(started.exists, f"the holder of {name}")

    def let_go(self) -> None:
        self._go.touch()
        self.result.get(timeout=20)


def wait_for_parked(producer: Producer, count: int) -> None:
    wait_for(lambda: producer.client.zcard(keys.PARKED) == count, f"{count} parked jobs")


def reason_of(result: AsyncResult, timeout: float = 20) -> str:
    """Why it was revoked."""
    error = result.get(timeout=timeout, propagate=False)
    assert isinstance(error, TaskRevokedError), error
    assert result.state == "REVOKED"
    return str(error)


def second_node(producer: Producer, cpus: int = 2, modules: str = KNOWN) -> None:
    fleet = producer.fleet
    fleet.capacities["node-2"] = (cpus, 2 << 30)
    fleet._given["COHORT_JOBS"] = modules
    try:
        fleet.start_node("node-2")
    finally:
        fleet._given["COHORT_JOBS"] = KNOWN


def test_revoked_with_no_worker_alive(producer: Producer, tmp_path: Path) -> None:
    holder = Holder(producer, tmp_path, "revoke")
    parked = waiting_jobs.replace.delay("revoke")
    wait_for_parked(producer, 1)
    node = producer.fleet.node("node-1")
    node.kill()
    node.wait(30)
    traces = tmp_path / "traces"
    traces.mkdir()
    queued = jobs.keyless_once.delay(str(traces))
    delayed = jobs.keyless_once.apply_async((str(traces),), countdown=6)
    for result in (queued, parked, delayed):
        begun = time.monotonic()
        result.revoke()
        assert reason_of(result, 1) == "revoked"
        assert time.monotonic() - begun < 1
    assert producer.client.hlen(keys.SETTLED) == 3
    producer.fleet.start_node("node-1")
    holder.let_go()
    wait_for(lambda: not producer.client.exists(keys.SETTLED), "the messages to be dropped")
    wait_for(producer.is_quiet, "the end of it")
    assert [result.state for result in (queued, parked, delayed)] == ["REVOKED"] * 3
    assert not list(traces.iterdir())


def test_a_running_one_hears_of_it_within_a_second(producer: Producer, tmp_path: Path) -> None:
    started, ended = tmp_path / "started", tmp_path / "ended"
    result = waiting_jobs.note_the_end.delay(str(started), str(ended))
    wait_for(started.exists, "the run")
    told = time.time()
    result.revoke(terminate=True)
    heard = float(wait_for(lambda: ended.exists() and ended.read_text(), "the job to be told"))
    assert heard - told < 1
    assert reason_of(result) == "terminated"


def test_one_that_runs_is_left_alone_unless_it_is_to_be_terminated(
    producer: Producer, tmp_path: Path
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    result = waiting_jobs.hold.delay("alone", str(started), str(go))
    wait_for(started.exists, "the run")
    result.revoke()
    assert result.state == "PENDING"
    go.touch()
    assert result.get(timeout=20) == "node-1"
    assert not producer.client.exists(keys.SETTLED)


def test_skipped(producer: Producer, tmp_path: Path) -> None:
    holder = Holder(producer, tmp_path, "skip")
    skipped = waiting_jobs.skip.delay("skip")
    assert reason_of(skipped) == "skipped: its key was locked"
    holder.let_go()
    # Its outcome is known a moment before its lock is free.
    wait_for(lambda: not producer.client.hexists(keys.LOCKS, "held-skip"), "the lock to be free")
    ran = waiting_jobs.skip.delay("skip")
    assert ran.get(timeout=20) == ran.id


def test_replaced(producer: Producer, tmp_path: Path) -> None:
    holder = Holder(producer, tmp_path, "replace")
    first = waiting_jobs.replace.delay("replace")
    wait_for_parked(producer, 1)
    second = waiting_jobs.replace.delay("replace")
    assert reason_of(first) == f"replaced by {second.id}"
    holder.let_go()
    assert second.get(timeout=20) == second.id


def test_what_no_node_knows_is_dead_lettered_after_a_grace(producer: Producer) -> None:
    begun = time.monotonic()
    result = producer.app.send_task("nobody.knows.this")
    with pytest.raises(NotRegistered, match="nobody"):
        result.get(timeout=20)
    assert time.monotonic() - begun >= 2
    letter = wait_for(lambda: find(producer.client, result.id), "the dead letter")
    assert letter is not None
    assert letter.reason == "no node knows the task nobody.knows.this"
    producer.client.hdel(keys.DEAD, result.id)


def test_what_only_a_newer_node_knows_runs_there(producer: Producer, tmp_path: Path) -> None:
    result = newer_jobs.newer.delay()
    wait_for(lambda: producer.client.zcard(keys.delayed("celery")), "it to be offered again")
    # The old one would end it now if it met it again: its grace is as long as its pause.
    holders = [Holder(producer, tmp_path, name) for name in ("one", "two")]
    second_node(producer, modules=f"{KNOWN},tests.newer_jobs")
    assert result.get(timeout=20) == "node-2"
    for holder in holders:
        holder.let_go()


def test_one_too_big_for_its_nodes_waits_for_a_bigger_one(
    producer: Producer, tmp_path: Path
) -> None:
    result = waiting_jobs.big.delay(str(tmp_path))
    wait_for(lambda: producer.client.zcard(keys.WAITING), "it to wait for a node")
    assert jobs.add.delay(1, 2).get(timeout=20) == 3  # It is in nobody's way.
    assert result.state == "PENDING"
    second_node(producer, cpus=4)
    assert result.get(timeout=20) == "node-2"
    assert [path.name for path in tmp_path.iterdir()] == [result.id]


def test_what_expires_while_it_waits_ends_within_a_second(
    producer: Producer, tmp_path: Path
) -> None:
    holders = [Holder(producer, tmp_path, name) for name in ("one", "two")]
    traces = tmp_path / "traces"
    traces.mkdir()
    ends = time.time() + 2
    waiting = [
        jobs.keyless_once.apply_async((str(traces),), expires=2),
        waiting_jobs.replace.apply_async(("one",), expires=2),
        jobs.keyless_once.apply_async((str(traces),), expires=2, countdown=6),
        waiting_jobs.big.apply_async((str(traces),), expires=2),
    ]
    late = jobs.keyless_once.apply_async((str(traces),), expires=FAR)
    for result in waiting:
        assert reason_of(result) == "expired"
        assert ends - 0.1 < time.time() < ends + 1.5
    for holder in holders:
        holder.let_go()
    assert late.get(timeout=20) == "node-1"
    assert len(list(traces.iterdir())) == 1
    second_node(producer, cpus=4)  # Only such a node meets what waits for one, and drops it.
    wait_for(lambda: not producer.client.exists(keys.SETTLED), "the messages to be dropped")
    assert not producer.client.exists(keys.WAITING)
    assert len(list(traces.iterdir())) == 1


def test_one_that_runs_does_not_expire(producer: Producer, tmp_path: Path) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    result = waiting_jobs.hold.apply_async(("runs", str(started), str(go)), expires=1)
    wait_for(started.exists, "the run")
    wait_for(lambda: not producer.client.exists(keys.EXPIRING), "its time to be up")
    go.touch()
    assert result.get(timeout=20) == "node-1"


def test_a_retry_is_one_step_with_the_end_of_its_try(producer: Producer, tmp_path: Path) -> None:
    second_node(producer)
    result = waiting_jobs.try_again.delay(str(tmp_path))
    assert result.get(timeout=30) == 1
    wait_for(producer.is_quiet, "every claim to be gone")
    runs = Counter(path.name.split("-")[0] for path in tmp_path.iterdir())
    # The killed try was begun anew when its node's lease had ended; one retry came of both.
    assert runs == {"killed": 1, "0": 2, "1": 1}
    for name in ("node-1", "node-2"):
        if not producer.fleet.node(name).is_running:
            producer.fleet.start_node(name)
