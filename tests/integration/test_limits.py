"""A job's time, its memory, and the processes that it starts: what it may take, and how it ends."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.exceptions import TimeLimitExceeded

from errors import MemoryExceeded
from tasks.family import everybody, look_at
from tests import family_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for
from tests.processes import marked


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    home = tmp_path_factory.mktemp("limits")
    with running_fleet(home, nodes=1, COHORT_JOBS="tests.family_jobs") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(producer: Producer) -> Iterator[None]:
    yield
    wait_for(producer.is_quiet, "every claim, lock and parked job to be gone", 20)


@pytest.fixture
def mark() -> Iterator[str]:
    mark = uuid.uuid4().hex
    yield mark
    for pid in marked(mark):
        os.kill(pid, signal.SIGKILL)


def test_too_much_memory_ends_a_job_and_the_outcome_says_so(
    producer: Producer, tmp_path: Path
) -> None:
    result = jobs.eat.delay("much", 2000, str(tmp_path))
    error = producer.end_of(result)
    assert isinstance(error, MemoryExceeded)
    assert "tests.family_jobs.eat: it took " in str(error)
    assert "its limit is 300 MiB" in str(error)
    assert len(list(tmp_path.iterdir())) == 1  # Of its three attempts one.
    assert producer.states_of("eat-much") == [(result.id, "FAILURE")]
    assert producer.files_of("eat-much", tmp_path / "look") == {}
    assert jobs.eat.delay("much", 10, str(tmp_path)).get(timeout=20) == 1


def test_what_a_job_starts_counts_and_ends_with_it(producer: Producer, mark: str) -> None:
    error = producer.end_of(jobs.eat_in_a_program.delay(mark))
    assert isinstance(error, MemoryExceeded)
    assert "in 5 processes" in str(error)
    assert marked(mark) == set()


def test_what_processes_share_counts_once(producer: Producer) -> None:
    assert jobs.share.delay(100).get(timeout=20) == 100
    assert isinstance(producer.end_of(jobs.share.delay(250)), MemoryExceeded)


def test_who_gave_no_memory_is_held_to_none(producer: Producer) -> None:
    assert jobs.eat_without_a_limit.delay().get(timeout=20) == 600 << 20


def test_a_hard_time_limit_ends_the_whole_family(
    producer: Producer, mark: str, tmp_path: Path
) -> None:
    file = tmp_path / "stray"
    result = jobs.outlive.apply_async(("time", mark, str(file)), time_limit=2)
    stray = int(wait_for(lambda: file.exists() and file.read_text(), "the family"))
    assert len(marked(mark)) == jobs.FAMILY
    assert isinstance(producer.end_of(result), TimeLimitExceeded)
    assert marked(mark) == set()
    process = look_at(stray)
    assert process is None or not process.lives
    assert producer.states_of("family-time") == [(result.id, "FAILURE")]


def test_the_same_without_a_key(producer: Producer, mark: str) -> None:
    result = jobs.outlive_keyless.apply_async((mark,), time_limit=2)
    wait_for(lambda: len(marked(mark)) == jobs.FAMILY, "the family")
    assert isinstance(producer.end_of(result), TimeLimitExceeded)
    wait_for(lambda: not marked(mark), "the family to have ended", 10)


@pytest.mark.parametrize("how", ["return", "fail"])
def test_what_a_run_left_behind_is_ended_before_its_outcome_is_known(
    producer: Producer, mark: str, how: str
) -> None:
    ended = producer.end_of(jobs.leave_a_family.delay(how, mark, how))
    assert isinstance(ended, ValueError) if how == "fail" else ended == 1
    assert marked(mark) == set()


def test_a_run_that_dies_takes_its_family_with_it(producer: Producer, mark: str) -> None:
    result = jobs.leave_a_family.delay("die", mark, "die")
    assert producer.end_of(result) == 2
    assert marked(mark) == set()


def test_a_revoked_run_takes_its_family_with_it(producer: Producer, mark: str) -> None:
    result = jobs.outlive.apply_async(("revoke", mark), soft_time_limit=50, time_limit=60)
    wait_for(lambda: len(marked(mark)) == jobs.FAMILY, "the family")
    result.revoke(terminate=True)
    producer.end_of(result)
    assert result.state == "REVOKED"
    assert marked(mark) == set()


def test_what_a_plain_task_leaves_running_is_left_alone(producer: Producer, mark: str) -> None:
    process = jobs.plain_family.delay(mark).get(timeout=20)
    # Two at once: the same process of the pool runs one of them.
    later = [jobs.my_process.delay(0.5) for _ in range(2)]
    assert process in [result.get(timeout=20) for result in later]
    assert len(marked(mark)) == jobs.FAMILY


def test_a_pool_process_keeps_no_dead_children(producer: Producer, mark: str) -> None:
    # What a plain task left behind is its process's own, dead or alive.
    before = {process.pid for process in everybody()}
    # The daemon's parent had ended before, and became the pool process's own.
    producer.end_of(jobs.leave_a_family.delay("zombies", mark))
    pool = [jobs.my_process.delay(0.5) for _ in range(2)]
    processes = {result.get(timeout=20) for result in pool}

    def none_is_dead() -> bool:
        new = [process for process in everybody() if process.pid not in before]
        return all(process.lives for process in new if process.parent in processes)

    wait_for(none_is_dead, "the dead to be seen to", 10)
