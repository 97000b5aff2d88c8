"""Short jobs that go to a process of the pool together: each has the outcome that it would have had
by itself, whatever its neighbours do.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import sample_jobs as jobs
from tests.fleets import wait_for
from tests.workers_kit import Worker, Workers, running_workers

Calls = list[tuple[tuple[str, ...], dict[str, Any]]]

BEFORE = 40
"""Runs by which a node learns that they are short."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    with running_workers(tmp_path_factory.mktemp("bundles")) as workers:
        yield workers


@pytest.fixture(scope="module")
def worker(fleet: Workers) -> Worker:
    return fleet.start("one", "prefork", cpus=1)


@pytest.fixture
def folder(fleet: Workers, worker: Worker, tmp_path: Path) -> Iterator[Path]:
    """Where the jobs leave their traces; the node knows by then that they are short."""
    before = tmp_path / "before"
    before.mkdir()
    submit(before, dict.fromkeys(map(str, range(BEFORE)), ""))
    wait_for(lambda: len(list(before.iterdir())) == BEFORE, "the first ones", 20)
    wait_for(fleet.producer.is_quiet, "their ends", 20)
    yield tmp_path
    (tmp_path / "go").touch()
    wait_for(fleet.producer.is_quiet, "every claim, lock and parked job to be gone", 20)


def submit(folder: Path, jobs_of: dict[str, str]) -> dict[str, Any]:
    """So many at once that they are claimed together."""
    calls: Calls = [((str(folder), name, what), {}) for name, what in jobs_of.items()]
    return dict(zip(jobs_of, jobs.short.submit_many(calls), strict=True))


def runs_of(folder: Path, name: str) -> list[list[str]]:
    path = folder / name
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def names(prefix: str, count: int) -> dict[str, str]:
    return {f"{prefix}{number}": "" for number in range(count)}


def test_each_has_its_own_outcome(folder: Path) -> None:
    results = submit(folder, {**names("a", 10), "bad": "fail", **names("b", 10)})
    for name, result in results.items():
        if name == "bad":
            with pytest.raises(ValueError, match="bad"):
                result.get(timeout=20)
            assert "tests/sample_jobs.py" in result.traceback
        else:
            assert result.get(timeout=20) == name
        assert len(runs_of(folder, name)) == 1


def test_an_outcome_that_has_no_room_beside_the_others(folder: Path) -> None:
    results = submit(folder, {**names("a", 5), "large": "large", **names("b", 5)})
    for name, result in results.items():
        value = result.get(timeout=20)
        assert len(value) == 2 << 20 if name == "large" else value == name
        assert len(runs_of(folder, name)) == 1


def test_who_dies_takes_none_of_the_others_along(folder: Path) -> None:
    results = submit(folder, {**names("a", 10), "dies": "die", **names("b", 10)})
    for name, result in results.items():
        assert result.get(timeout=30) == name
    runs = {name: runs_of(folder, name) for name in results}
    assert {name: len(lines) for name, lines in runs.items() if len(lines) > 1} == {"dies": 2}
    assert [attempt for _, _, attempt in runs.pop("dies")] == ["1", "2"]
    # None of them counts as a delivery that was lost.
    assert {attempt for lines in runs.values() for _, _, attempt in lines} == {"1"}


@pytest.mark.parametrize("what", ["memory", "reject"])
@pytest.mark.parametrize("others", [0, 10], ids=["alone", "among others"])
def test_how_one_ends_is_no_end_of_its_worker(
    worker: Worker, folder: Path, what: str, others: int
) -> None:
    """Celery's own would end here: of a `MemoryError`, or for what can't be unpickled."""
    results = submit(folder, {**names("a", others), "odd": what, **names("b", others)})
    odd = results.pop("odd")
    for name, result in results.items():
        assert result.get(timeout=20) == name
    wait_for(odd.ready, "its end", 20)
    assert odd.state == "FAILURE"
    assert len(runs_of(folder, "odd")) == 1
    assert worker.pid in worker.processes


def test_nothing_waits_behind_one_that_turns_out_to_be_long(
    fleet: Workers, worker: Worker, folder: Path
) -> None:
    results = submit(folder, {**names("a", 5), "long": "wait", **names("b", 10)})
    wait_for((folder / "long").exists, "the long one", 20)
    other = fleet.start("two", "prefork", cpus=1)
    try:
        for name, result in results.items():
            if name != "long":
                assert result.get(timeout=20) == name
        assert not results["long"].ready()
        (folder / "go").touch()
        assert results["long"].get(timeout=20) == "long"
    finally:
        other.signal(signal.SIGTERM)
        other.wait()
    assert {name: len(runs_of(folder, name)) for name in results} == dict.fromkeys(results, 1)
    assert {runs_of(folder, name)[0][0] for name in names("b", 10)} == {"two"}


def test_one_of_them_is_terminated(folder: Path) -> None:
    results = submit(folder, {**names("a", 5), "long": "wait", **names("b", 5)})
    wait_for((folder / "long").exists, "the long one", 20)
    results["long"].revoke(terminate=True)
    for name, result in results.items():
        if name != "long":
            assert result.get(timeout=30) == name
            assert len(runs_of(folder, name)) == 1
    wait_for(results["long"].ready, "its end", 20)
    assert results["long"].state == "REVOKED"


def test_without_outcomes(folder: Path) -> None:
    calls: Calls = [((str(folder), name), {}) for name in names("q", 50)]
    jobs.short_without_outcome.submit_many(calls)
    wait_for(lambda: len(list(folder.glob("q*"))) == 50, "all of them", 20)
    assert {len(path.read_text().splitlines()) for path in folder.glob("q*")} == {1}


def test_plain_tasks_too(fleet: Workers, worker: Worker, folder: Path) -> None:
    plain = [jobs.short_plain.delay(str(folder), name) for name in names("p", 60)]
    assert [result.get(timeout=20) for result in plain] == list(names("p", 60))
    held = jobs.short_plain.delay(str(folder), "held", "wait")
    wait_for((folder / "held").exists, "the long one", 20)
    behind = [jobs.short_plain.delay(str(folder), name) for name in names("r", 20)]
    (folder / "go").touch()
    assert [result.get(timeout=20) for result in [held, *behind]] == ["held", *names("r", 20)]
    wait_for(fleet.producer.is_quiet, "every claim, lock and parked job to be gone", 20)
    assert {len(path.read_text().splitlines()) for path in folder.glob("[pr]*")} == {1}
