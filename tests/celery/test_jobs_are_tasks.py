"""What holds for a plain task on our side holds for a job as well, with a key or without.

There is no stock Celery to compare with: only who calls differs, our app or a stock producer that
knows no more than the job's name.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import chain, chord, group, signature
from celery.canvas import Signature
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from tests import sample_jobs as jobs
from tests.celery import tasks_of_tests as tasks
from tests.celery.sides import Side, Sides, lines_of, wait_for

PATIENCE = 15


@pytest.fixture(params=["ours", "stock producer"])
def producer(sides: Sides, request: pytest.FixtureRequest) -> Iterator[Side]:
    from tasks import app

    yield sides.side(request.param)
    app.set_current()


@pytest.fixture
def name() -> str:
    return uuid.uuid4().hex[:8]


def sig(producer: Side, job: object, *args: object, **kwargs: object) -> Signature:
    """A signature by name, bound to the app of who calls."""
    return signature(job.name, args=args, kwargs=kwargs, app=producer.app)  # type: ignore[attr-defined]


def test_chains_groups_and_chords_of_jobs(producer: Side, name: str) -> None:
    add = jobs.add
    assert chain(sig(producer, add, 1, 1), sig(producer, add, 3))().get(timeout=PATIENCE) == 5
    many = group(sig(producer, add, number, 1) for number in range(5))
    assert many().get(timeout=PATIENCE) == [1, 2, 3, 4, 5]
    keyed = [sig(producer, jobs.count, f"{name}-{number}") for number in range(3)]
    found = chord(keyed)(tasks.same.s()).get(timeout=PATIENCE)
    assert [one["n"] for one in found] == [1, 1, 1]


def test_one_key_in_a_group_runs_one_by_one(producer: Side, name: str) -> None:
    result = group(sig(producer, jobs.count, name) for _ in range(4))()
    assert sorted(one["n"] for one in result.get(timeout=PATIENCE)) == [1, 2, 3, 4]


def test_links_and_errbacks(producer: Side, name: str, tmp_path: Path) -> None:
    called, new, old = tmp_path / "called", tmp_path / "new", tmp_path / "old"
    producer.calls(jobs.add, 2, 2, link=tasks.note.s(path=str(called)))
    failed = producer.calls(
        jobs.refuse,
        name,
        link_error=[tasks.note_error.s(path=str(new)), tasks.note_failed_id.s(path=str(old))],
    )
    wait_for(lambda: lines_of(called) == ["[4]"], "the callback")
    wait_for(lambda: lines_of(new) and lines_of(old), "both errbacks")
    assert lines_of(new) == [f"{failed.id} Refused no such thing"]
    assert lines_of(old) == [failed.id]


def test_its_retries(producer: Side, name: str) -> None:
    result = producer.calls(jobs.fail, name, 1)
    assert result.get(timeout=PATIENCE) == 2
    assert result.retries == 1


@pytest.mark.parametrize("option", ["countdown", "task_id", "ignore_result", "priority"])
def test_options(producer: Side, name: str, option: str) -> None:
    given = {"countdown": 0.3, "task_id": f"own-{name}", "ignore_result": True, "priority": 6}
    result = producer.calls(jobs.count, name, **{option: given[option]})
    if option == "ignore_result":
        assert result.get(timeout=PATIENCE) is None
        return
    assert result.get(timeout=PATIENCE)["n"] == 1
    if option == "task_id":
        assert result.id == f"own-{name}"


def test_expired(producer: Side, name: str) -> None:
    result = producer.calls(jobs.count, name, expires=-1)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=PATIENCE)


def test_revoked_while_it_runs(producer: Side, name: str, tmp_path: Path) -> None:
    result = producer.calls(jobs.count, name, str(tmp_path / "started"), str(tmp_path / "go"))
    wait_for((tmp_path / "started").exists, "it to begin")
    result.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=PATIENCE)
    assert producer.calls(jobs.count, name).get(timeout=PATIENCE)["n"] == 1


def test_a_time_limit_for_one_call(producer: Side, name: str, tmp_path: Path) -> None:
    result = producer.calls(
        jobs.count, name, str(tmp_path / "started"), str(tmp_path / "go"), time_limit=1
    )
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=PATIENCE)


def test_a_job_is_called_by_a_task(producer: Side) -> None:
    result = tasks.call.delay(sig(producer, jobs.add, 20, 22))
    inner = producer.app.AsyncResult(result.get(timeout=PATIENCE))
    assert inner.get(timeout=PATIENCE) == 42


def test_stamps(producer: Side, name: str) -> None:
    made = sig(producer, jobs.count, name)
    made.stamp(customer="acme")
    result = made.apply_async()
    result.get(timeout=PATIENCE)
    assert producer.app.backend.get_task_meta(result.id)["customer"] == "acme"
