"""Redis comes back empty under a real fleet: nothing that was promised is lost or run twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.result import AsyncResult

from broker import keys
from broker.nodes import list_nodes
from deploy.parts import Part
from errors import SettingsError
from storage import segments
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet, wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture
def producer(tmp_path: Path) -> Iterator[Producer]:
    with running_fleet(tmp_path, nodes=2, COHORT_RESULTS_IN_REDIS="200ms") as running:
        yield running


def is_noted(producer: Producer, result: AsyncResult) -> bool:
    return any(
        entry.kind == "journal" and entry.id == result.id
        for path in segments.list_segments(producer.fleet.root)
        if not path.parent.name.startswith("producer-")
        for entry in segments.read(path)
    )


def recovered(producer: Producer) -> None:
    wait_for(lambda: producer.client.get(keys.GENERATION), "the recovery", 30)


def test_outcomes_are_known_again_and_who_waits_is_told(producer: Producer) -> None:
    keyless = [jobs.add.delay(n, n) for n in range(20)]
    keyed = jobs.count.delay("known")
    failed = jobs.refuse.delay("it")
    assert [result.get(timeout=30) for result in keyless] == [2 * n for n in range(20)]
    assert keyed.get(timeout=30)["n"] == 1
    producer.end_of(failed)
    recovered(producer)
    producer.client.flushall()
    # These ask while nothing is known, and are pushed the answer.
    fresh = [AsyncResult(result.id, app=producer.app) for result in (*keyless, keyed)]
    assert [result.get(timeout=30) for result in fresh[:-1]] == [2 * n for n in range(20)]
    assert fresh[-1].get(timeout=30)["n"] == 1
    again = AsyncResult(failed.id, app=producer.app)
    assert "no such thing" in str(producer.end_of(again))
    assert (again.state, again.name) == ("FAILURE", jobs.refuse.name)
    recovered(producer)


def test_durable_jobs_come_back_and_run_once(producer: Producer, tmp_path: Path) -> None:
    recovered(producer)
    go, started = tmp_path / "go", tmp_path / "started"
    holds = jobs.count.delay("durable", started=str(started), go=str(go))
    wait_for(started.exists, "the run that holds the key")
    queued = [
        jobs.count.apply_async(("durable",), durable=True),
        jobs.keyless_once.apply_async((str(tmp_path / "traces"),), durable=True, countdown=5),
    ]
    (tmp_path / "traces").mkdir()
    producer.client.flushall()
    # It has no lock any more: it is to commit before what waited for it is put back.
    go.touch()
    wait_for(lambda: len(producer.states_of("count-durable")) == 1, "its commit")
    recovered(producer)
    assert queued[0].get(timeout=30)["n"] == 2
    assert queued[1].get(timeout=30) in {"node-1", "node-2"}
    assert holds.get(timeout=30)["n"] == 1
    wait_for(producer.is_quiet, "nothing to be left")
    assert len(list((tmp_path / "traces").iterdir())) == 1
    assert len(producer.states_of("count-durable")) == 2
    producer.client.flushall()
    recovered(producer)
    wait_for(producer.is_quiet, "nothing to come back: all of it has ended")
    assert len(list((tmp_path / "traces").iterdir())) == 1


def test_durable_jobs_that_ended_in_other_ways_stay_ended(
    producer: Producer, tmp_path: Path
) -> None:
    recovered(producer)
    tried_again = jobs.fail.apply_async(("durable", 1), durable=True)
    traces = tmp_path / "traces"
    traces.mkdir()
    jobs.keyless_once.apply_async((str(traces),), durable=True, ignore_result=True)
    ignored = jobs.ignored.apply_async(durable=True)
    assert tried_again.get(timeout=30) == 2
    wait_for(lambda: len(list(traces.iterdir())) == 1, "the one without a result")
    wait_for(producer.is_quiet, "all of them to end")
    producer.client.flushall()
    recovered(producer)
    # Whatever had come back would run before this.
    assert jobs.add.delay(1, 1).get(timeout=30) == 2
    wait_for(producer.is_quiet, "nothing to be left")
    assert len(list(traces.iterdir())) == 1
    assert producer.states_of("fail-durable") == [(tried_again.id, "SUCCESS")]
    assert ignored.state == "PENDING"


def test_a_job_that_ran_comes_back_when_its_node_is_lost_as_well(
    producer: Producer, tmp_path: Path
) -> None:
    recovered(producer)
    traces, go, started = tmp_path / "traces", tmp_path / "go", tmp_path / "started"
    traces.mkdir()
    result = jobs.keyless_once.delay(str(traces), started=str(started), go=str(go))
    wait_for(started.exists, "the run")
    wait_for(lambda: is_noted(producer, result), "its note")
    busy = [info.node for info in list_nodes(producer.client) if info.running]
    node: Part = producer.fleet.node(busy[0])
    producer.client.flushall()
    recovered(producer)
    # Its node lives: the run goes on, and isn't put back.
    assert len(list(traces.iterdir())) == 1
    node.kill()
    wait_for(lambda: len(list(traces.iterdir())) == 2, "the run to begin on the other node", 30)
    go.touch()
    assert result.get(timeout=30) != node.name
    wait_for(producer.is_quiet, "nothing to be left")


def test_a_durable_job_needs_the_folder_where_it_is_submitted(
    producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(producer.app.conf, "cohort_root", None)
    with pytest.raises(SettingsError, match=r"durable=True .* set COHORT_ROOT"):
        jobs.add.apply_async((1, 2), durable=True)
    assert producer.client.llen("celery") == 0


def command(producer: Producer, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *words],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "COHORT_REDIS": producer.fleet.redis_url,
            "COHORT_ROOT": str(producer.fleet.root),
        },
        capture_output=True,
        text=True,
    )


def test_the_commands(producer: Producer) -> None:
    results = [jobs.add.delay(n, n) for n in range(5)]
    assert [result.get(timeout=30) for result in results] == [0, 2, 4, 6, 8]
    recovered(producer)
    for node in producer.fleet.nodes:  # Else they would be faster.
        node.pause()
    try:
        durable = jobs.add.apply_async((1, 1), durable=True)
        producer.client.flushall()
        report = json.loads(command(producer, "results", "reindex", "--json").stdout)
        assert (report["outcomes"], report["placed"]) == (5, 5)
        told = command(producer, "recover", "--dry-run")
        assert (told.stdout, told.returncode) == (f"{durable.id}\n", 0)
        assert "1 jobs would be put back; of 1 noted 0 have ended" in told.stderr
        assert json.loads(command(producer, "recover", "--json").stdout)["put_back"] == [durable.id]
        assert json.loads(command(producer, "recover", "--json").stdout)["put_back"] == []
    finally:
        for node in producer.fleet.nodes:
            node.resume()
    assert durable.get(timeout=30) == 2
