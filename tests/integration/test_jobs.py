"""What a job's author and a producer may rely on, on a fleet of two real nodes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import chain, chord, group
from celery.exceptions import TaskRevokedError, TimeLimitExceeded
from kombu import Connection, Exchange, Queue

from errors import DeadLettered, InvalidKey, Refused
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    with running_fleet(tmp_path_factory.mktemp("jobs"), nodes=2) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(producer: Producer) -> Iterator[None]:
    yield
    wait_for(producer.is_quiet, "every claim, lock and parked job to be gone", 20)


def test_results_groups_chords_and_chains(producer: Producer) -> None:
    assert jobs.add.delay(2, 3).get(timeout=20) == 5
    assert jobs.plain_add.delay(2, 3).get(timeout=20) == 5
    header = [jobs.add.s(i, i) for i in range(6)]
    assert group(header).apply_async().get(timeout=20) == [0, 2, 4, 6, 8, 10]
    assert chord(header)(jobs.total.s()).get(timeout=20) == 30
    chained = chain(jobs.add.s(1, 2), jobs.add.s(10), jobs.plain_add.s(100))
    assert chained.apply_async().get(timeout=20) == 113


def test_each_run_finds_what_the_last_one_left(producer: Producer, tmp_path: Path) -> None:
    results = [jobs.count.delay("chain") for _ in range(6)]
    outcomes = [result.get(timeout=30) for result in results]
    assert [outcome["n"] for outcome in outcomes] == [1, 2, 3, 4, 5, 6]
    assert [outcome["version"] for outcome in outcomes] == [0, 1, 2, 3, 4, 5]
    files = producer.files_of("count-chain", tmp_path)
    assert json.loads(files["count.json"])["n"] == 6
    assert len(files["history"].splitlines()) == 6
    assert producer.states_of("count-chain") == [(result.id, "SUCCESS") for result in results]


def test_runs_of_one_key_take_turns_and_other_keys_pass_them(
    producer: Producer, tmp_path: Path
) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    first = jobs.count.delay("turns", started=str(started), go=str(go))
    wait_for(started.exists, "the first run")
    waiting = [jobs.count.delay("turns") for _ in range(8)]
    # Eight parked jobs take no slot: four processes are enough for these.
    assert [jobs.count.delay(f"passes-{i}").get(timeout=20)["n"] for i in range(4)] == [1] * 4
    assert all(result.state == "PENDING" for result in waiting)
    go.touch()
    assert first.get(timeout=20)["n"] == 1
    assert [result.get(timeout=20)["n"] for result in waiting] == list(range(2, 10))


def test_a_key_that_is_only_a_lock_has_no_directory(producer: Producer, tmp_path: Path) -> None:
    at_work = str(tmp_path / "at-work")
    outcomes = [jobs.take_turns.delay("it", at_work) for _ in range(4)]
    assert [outcome.get(timeout=20) for outcome in outcomes] == [{"found": [], "version": 0}] * 4
    hard = jobs.take_turns.apply_async(("hard", at_work, 60.0), time_limit=1)
    assert isinstance(producer.end_of(hard), TimeLimitExceeded)
    # A log would be a promise of files.
    assert not list((producer.fleet.root / "jobs").glob("turn-*"))


def test_a_failed_attempt_leaves_no_trace_and_is_tried_again(
    producer: Producer, tmp_path: Path
) -> None:
    result = jobs.fail.delay("once", times=1)
    assert result.get(timeout=20) == 2
    assert list(producer.files_of("fail-once", tmp_path)) == ["soiled-2"]
    assert producer.states_of("fail-once") == [(result.id, "SUCCESS")]


def test_the_last_failure_is_recorded_with_the_directory_as_before(
    producer: Producer, tmp_path: Path
) -> None:
    good = jobs.fail.delay("last", times=0)
    good.get(timeout=20)
    before = producer.files_of("fail-last", tmp_path)
    bad = jobs.fail.delay("last", times=9)
    with pytest.raises(ValueError, match="attempt 2 fails"):
        bad.get(timeout=20)
    assert bad.state == "FAILURE"
    assert producer.files_of("fail-last", tmp_path) == before
    assert producer.states_of("fail-last") == [(good.id, "SUCCESS"), (bad.id, "FAILURE")]


def test_what_is_refused_is_not_tried_again(producer: Producer) -> None:
    begun = time.monotonic()
    with pytest.raises(Refused, match="no such thing"):
        jobs.refuse.delay("it").get(timeout=20)
    assert time.monotonic() - begun < 10  # five retries would take half a minute


def test_a_bad_key_is_refused_before_anything_is_sent(producer: Producer) -> None:
    for name in ("a/b", "..", "nul\0", "x" * 300):
        with pytest.raises(InvalidKey):
            jobs.count.delay(name)
    with pytest.raises(TypeError, match="name"):
        jobs.count.delay()
    assert producer.client.llen("celery") == 0


def test_a_timeout_ends_a_job(producer: Producer) -> None:
    result = jobs.slow.delay("soft")
    assert "SoftTimeLimitExceeded" in repr(producer.end_of(result))
    assert producer.states_of("slow-soft") == [(result.id, "FAILURE")]


def test_a_hard_time_limit_is_recorded_for_a_killed_child(producer: Producer) -> None:
    result = jobs.slow.apply_async(("hard", True), time_limit=2)
    assert isinstance(producer.end_of(result), TimeLimitExceeded)
    assert producer.states_of("slow-hard") == [(result.id, "FAILURE")]
    after = jobs.slow.delay("hard")
    assert "SoftTimeLimitExceeded" in repr(producer.end_of(after))


def test_a_lost_process_costs_a_delivery_and_too_many_end_it(producer: Producer) -> None:
    result = jobs.count.delay("lost", crash=True)
    assert isinstance(producer.end_of(result), DeadLettered)
    assert producer.states_of("count-lost") == [(result.id, "FAILURE")]
    assert jobs.count.delay("lost").get(timeout=20)["n"] == 1


def test_a_keyless_job_that_kills_its_process_ends_too(producer: Producer, tmp_path: Path) -> None:
    result = jobs.keyless_crash.delay(str(tmp_path))
    assert isinstance(producer.end_of(result), DeadLettered)
    assert len(list(tmp_path.iterdir())) == 5  # COHORT_DELIVERIES


def test_revoked_before_it_starts(producer: Producer, tmp_path: Path) -> None:
    started, go = tmp_path / "started", tmp_path / "go"
    first = jobs.count.delay("revoke", started=str(started), go=str(go))
    wait_for(started.exists, "the first run")
    second = jobs.count.delay("revoke")
    second.revoke()
    assert isinstance(producer.end_of(second), TaskRevokedError)
    go.touch()
    # Its record would have fenced the run that had the lock.
    assert first.get(timeout=20)["n"] == 1
    assert producer.states_of("count-revoke") == [(first.id, "SUCCESS")]


def test_terminated_while_it_runs(producer: Producer, tmp_path: Path) -> None:
    started = tmp_path / "started"
    result = jobs.wait_until_cancelled.delay("terminate", str(started))
    wait_for(started.exists, "the run")
    result.revoke(terminate=True)
    assert isinstance(producer.end_of(result), TaskRevokedError)
    assert result.state == "REVOKED"
    assert producer.states_of("wait-terminate") == [(result.id, "REVOKED")]
    assert producer.files_of("wait-terminate", tmp_path) == {}


def test_eta_waits_in_redis_without_the_lock(producer: Producer) -> None:
    begun = time.monotonic()
    later = jobs.count.apply_async(("eta",), countdown=2)
    assert jobs.count.delay("eta").get(timeout=20)["n"] == 1
    assert later.get(timeout=20)["n"] == 2
    assert time.monotonic() - begun >= 2


def test_progress_is_seen_while_it_runs(producer: Producer, tmp_path: Path) -> None:
    go = tmp_path / "go"
    result = jobs.report_steps.delay("p", steps=3, go=str(go))
    wait_for(lambda: result.state == "PROGRESS", "progress")
    assert result.info["total"] == 3
    assert result.info["unit"] == "steps"
    go.touch()
    assert result.get(timeout=20) == 3


def test_a_stock_producer_can_feed_it(producer: Producer) -> None:
    """Kombu's own Redis transport, protocol 2, no header of ours: key and lock all the same."""
    from celery import Celery

    stock = Celery("stock", broker=producer.fleet.redis_url, backend=producer.fleet.redis_url)
    sent = []
    with Connection(
        producer.fleet.redis_url, transport="kombu.transport.redis:Transport"
    ) as connection:
        queue = Queue("celery", Exchange("celery"), routing_key="celery")
        for number in range(3):
            task_id = f"stock-{number}-{time.monotonic_ns()}"
            message = stock.amqp.as_task_v2(task_id, "tests.sample_jobs.count", ("stock",))
            with connection.Producer() as stock_producer:
                stock_producer.publish(
                    message.body,
                    exchange=queue.exchange,
                    routing_key="celery",
                    declare=[queue],
                    serializer="json",
                    headers=message.headers,
                    **message.properties,
                )
            sent.append(producer.app.AsyncResult(task_id))
    outcomes = [result.get(timeout=20) for result in sent]
    assert sorted(outcome["n"] for outcome in outcomes) == [1, 2, 3]
    # One at a time: each has its one folder, none was fenced and run again.
    runs = producer.fleet.root / "jobs" / "count-stock" / "runs"
    assert [len(list((runs / result.id).iterdir())) for result in sent] == [1, 1, 1]


def test_the_lock_is_taken_away_and_two_runs_overlap(producer: Producer, tmp_path: Path) -> None:
    """As after a failover of Redis: both read version 0, one commits, the other runs again."""
    files = {name: tmp_path / name for name in ("started-1", "go-1", "started-2", "go-2")}
    first = jobs.count.delay("stolen", str(files["started-1"]), str(files["go-1"]))
    wait_for(files["started-1"].exists, "the first run")
    producer.client.hdel("{cohort}locks", "count-stolen")
    second = jobs.count.delay("stolen", str(files["started-2"]), str(files["go-2"]))
    wait_for(files["started-2"].exists, "a second run beside it")
    files["go-2"].touch()
    assert second.get(timeout=20) | {"node": ""} == {
        "n": 1,
        "version": 0,
        "attempt": 1,
        "node": "",
    }
    files["go-1"].touch()
    outcome = first.get(timeout=20)
    assert (outcome["n"], outcome["version"], outcome["attempt"]) == (2, 1, 1)
    assert producer.states_of("count-stolen") == [
        (second.id, "SUCCESS"),
        (first.id, "SUCCESS"),
    ]
    history = producer.files_of("count-stolen", tmp_path)["history"].decode().splitlines()
    assert [line.split()[0] for line in history] == [second.id, first.id]
