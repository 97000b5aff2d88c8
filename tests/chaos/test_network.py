"""A network that cuts, dawdles and swallows: a healthy job is started once and ends once."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError

from tests import sample_jobs as jobs
from tests.fleets import running_fleet, wait_for
from tests.proxy import Behind, fleet_behind_proxy

LEASE = 2.0


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[Behind]:
    with fleet_behind_proxy(tmp_path, nodes=2) as running:
        yield running


@pytest.mark.parametrize("at_once", [1, None], ids=["one by one", "all at once"])
def test_a_healthy_job_outlives_its_connections(
    behind: Behind, tmp_path: Path, at_once: int | None
) -> None:
    go, traces = tmp_path / "go", tmp_path / "traces"
    traces.mkdir()
    started = [tmp_path / "keyed", tmp_path / "keyless"]
    keyed = jobs.count.delay("cut", str(started[0]), str(go))
    parked = jobs.count.delay("cut")
    keyless = jobs.keyless_once.delay(str(traces), str(started[1]), str(go))
    wait_for(lambda: all(path.exists() for path in started), "both runs to begin")
    lives = behind.incarnations()
    rng, ends, cuts = random.Random(7), time.monotonic() + 3 * LEASE, 0
    # For many leases, and as fast as they come back.
    while time.monotonic() < ends or cuts < 10:
        cuts += behind.proxy.cut(at_once, rng)
        wait_for(lambda: behind.proxy.connections >= 4, "connections to come back")
        # Each node has a word with Redis between two cuts: this is no outage.
        time.sleep(0.15)
    assert behind.incarnations() == lives
    go.touch()
    outcome = keyed.get(timeout=30)
    assert (outcome["n"], outcome["attempt"]) == (1, 1)
    assert parked.get(timeout=30)["n"] == 2
    assert keyless.get(timeout=30) in {"node-1", "node-2"}
    assert len(list(traces.iterdir())) == 1
    wait_for(behind.producer.is_quiet, "nothing to be left")


def test_a_producer_outlives_its_connections(behind: Behind) -> None:
    """Whoever shares them may be the first to find them lost, and closes what submitting holds."""
    for number in range(3):
        behind.proxy.refuse()
        with suppress(OperationalError):
            behind.producer.app.send_task(jobs.plain_add.name, (1, 1), exchange="celery")
        behind.proxy.accept()
        assert jobs.add.delay(number, 1).get(timeout=30) == number + 1


def test_a_slow_redis_is_slow_and_nothing_else(behind: Behind, tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    traces.mkdir()
    lives = behind.incarnations()
    behind.proxy.delay = 0.2
    counts = [jobs.count.delay("slow") for _ in range(3)]
    tried_again = jobs.fail.delay("slow", 1)
    failed = jobs.refuse.delay("slow")
    once = [jobs.keyless_once.delay(str(traces)) for _ in range(2)]
    outcomes = [result.get(timeout=60) for result in counts]
    assert sorted(outcome["n"] for outcome in outcomes) == [1, 2, 3]
    assert {outcome["attempt"] for outcome in outcomes} == {1}
    assert tried_again.get(timeout=60) == 2
    assert "no such thing" in str(behind.producer.end_of(failed))
    assert all(result.get(timeout=60) for result in once)
    assert len(list(traces.iterdir())) == 2
    # The leases were renewed in time.
    assert behind.incarnations() == lives
    behind.proxy.delay = 0.0
    wait_for(behind.producer.is_quiet, "nothing to be left")


def test_a_silence_shorter_than_a_lease_changes_nothing(behind: Behind, tmp_path: Path) -> None:
    go, traces, started = tmp_path / "go", tmp_path / "traces", tmp_path / "started"
    traces.mkdir()
    keyless = jobs.keyless_once.delay(str(traces), str(started), str(go))
    wait_for(started.exists, "the run to begin")
    lives = behind.incarnations()
    for _ in range(3):
        behind.proxy.pause()
        time.sleep(0.3 * LEASE)
        behind.resume_until_renewed()
    assert behind.incarnations() == lives
    go.touch()
    assert keyless.get(timeout=30) in {"node-1", "node-2"}
    assert len(list(traces.iterdir())) == 1
    wait_for(behind.producer.is_quiet, "nothing to be left")


def test_a_silence_longer_than_a_lease_costs_work_and_no_outcome(
    behind: Behind, tmp_path: Path
) -> None:
    """Cut off, a node stops what has no log to fence it, and lets the rest run on."""
    go, traces = tmp_path / "go", tmp_path / "traces"
    traces.mkdir()
    started = [tmp_path / "keyed", tmp_path / "keyless"]
    keyed = jobs.count.delay("silence", str(started[0]), str(go))
    keyless = jobs.keyless_once.delay(str(traces), str(started[1]), str(go))
    wait_for(lambda: all(path.exists() for path in started), "both runs to begin")
    behind.proxy.pause()
    wait_for(lambda: not behind.incarnations(), "both leases to end", 30)
    go.touch()  # The keyed run commits without a Redis.
    wait_for(lambda: behind.producer.states_of("count-silence"), "its commit")
    behind.proxy.resume()
    assert keyed.get(timeout=60)["n"] == 1
    assert keyless.get(timeout=60) in {"node-1", "node-2"}
    assert jobs.count.delay("silence").get(timeout=60)["n"] == 2
    wait_for(behind.producer.is_quiet, "nothing to be left")
    assert [state for _, state in behind.producer.states_of("count-silence")] == ["SUCCESS"] * 2
    assert len(list(traces.iterdir())) in (1, 2)


def test_a_node_outlives_an_absent_redis_with_outcomes_to_tell(behind: Behind) -> None:
    results = [jobs.add.delay(n, n) for n in range(600)]
    wait_for(results[20].ready, "outcomes to flow")
    for _ in range(6):
        behind.proxy.refuse()
        wait_for(lambda: behind.proxy.refused >= 4, "who had an outcome to tell to have tried")
        behind.proxy.accept()
        waiting = [result for result in results if not result.ready()]
        if not waiting:
            break
        wait_for(waiting[0].ready, "outcomes to flow again", 20)
    assert [result.get(timeout=30) for result in results] == [2 * n for n in range(600)]
    assert all(node.is_running for node in behind.producer.fleet.nodes)
    wait_for(behind.producer.is_quiet, "nothing to be left")


def test_a_keyless_run_that_was_stopped_begins_again(behind: Behind, tmp_path: Path) -> None:
    """Its node thought its lease lost, and stopped it; then the lease was renewed after all."""
    go, traces, started = tmp_path / "go", tmp_path / "traces", tmp_path / "started"
    traces.mkdir()
    keyless = jobs.keyless_once.delay(str(traces), str(started), str(go))
    wait_for(started.exists, "the run to begin")
    started.unlink()
    logs = [node.log for node in behind.producer.fleet.nodes]
    behind.proxy.pause()
    wait_for(
        lambda: any("stopped, the lease is lost" in log.read_text() for log in logs),
        "the run to be stopped",
    )
    behind.proxy.resume()
    wait_for(started.exists, "the run to begin again", 20)
    go.touch()
    assert keyless.get(timeout=30) in {"node-1", "node-2"}
    assert len(list(traces.iterdir())) == 2
    wait_for(behind.producer.is_quiet, "nothing to be left")


def test_a_plain_task_that_has_begun_is_not_stopped(behind: Behind, tmp_path: Path) -> None:
    """It was acknowledged as it began: nobody would run it again."""
    traces, go = tmp_path / "traces", tmp_path / "go"
    traces.mkdir()
    plain = jobs.short_plain.delay(str(tmp_path), "plain", "wait")
    wait_for((tmp_path / "plain").exists, "the run to begin")
    wait_for(behind.producer.is_quiet, "it to be acknowledged")
    # So many that each node has one that is stopped.
    keyless = [jobs.keyless_once.delay(str(traces), go=str(go)) for _ in range(3)]
    wait_for(lambda: len(list(traces.iterdir())) == 3, "all of them to begin")
    logs = [node.log for node in behind.producer.fleet.nodes]
    behind.proxy.pause()
    wait_for(
        lambda: all("stopped, the lease is lost" in log.read_text() for log in logs),
        "what is keyless to be stopped",
    )
    behind.proxy.resume()
    go.touch()
    assert plain.get(timeout=20) == "plain"
    assert all(result.get(timeout=30) for result in keyless)
    assert len((tmp_path / "plain").read_text().splitlines()) == 1
    wait_for(behind.producer.is_quiet, "nothing to be left")


def test_what_a_lost_connection_cancels_begins_again(tmp_path: Path) -> None:
    """A setting of Celery's; here the lease lives on."""
    go, traces, started = tmp_path / "go", tmp_path / "traces", tmp_path / "started"
    traces.mkdir()
    modules = "tests.sample_jobs,tests.cancelling_jobs"
    with running_fleet(tmp_path / "home", nodes=1, COHORT_JOBS=modules) as producer:
        result = jobs.keyless_once.delay(str(traces), str(started), str(go))
        wait_for(started.exists, "the run to begin")
        started.unlink()
        producer.client.client_kill_filter(_type="normal", skipme=True)
        wait_for(started.exists, "the run to begin again", 20)
        go.touch()
        assert result.get(timeout=20) == "node-1"
        wait_for(producer.is_quiet, "nothing to be left")
