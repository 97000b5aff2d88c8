"""A worker that can't do right doesn't start: one line that names the thing, and no worker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import OverQuota
from storage import mount
from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    with running_fleet(tmp_path_factory.mktemp("start"), nodes=1) as running:
        yield running


def start_worker(producer: Producer, **settings: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **producer.fleet.environ, "COHORT_NODE": "late", **settings}
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-n", "late@test"],
        env=environ,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refusal(producer: Producer, **settings: str) -> str:
    """The one line that it ends with."""
    ended = start_worker(producer, **settings)
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if line.startswith("cohort: ")]
    assert len(lines) == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    return lines[0]


def test_an_unknown_setting(producer: Producer) -> None:
    line = refusal(producer, COHORT_LEESE="3s")
    assert "COHORT_LEESE" in line
    assert "lease" in line


def test_a_malformed_setting(producer: Producer) -> None:
    line = refusal(producer, COHORT_LEASE="soon")
    assert "COHORT_LEASE" in line
    assert '"30s"' in line


def test_no_shared_folder(producer: Producer, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert str(missing) in refusal(producer, COHORT_ROOT=str(missing))


def test_a_file_for_a_shared_folder(producer: Producer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file" in refusal(producer, COHORT_ROOT=str(tmp_path / "file"))


def test_another_shared_folder_than_the_fleet_s(producer: Producer, tmp_path: Path) -> None:
    assert "fleet id" in refusal(producer, COHORT_ROOT=str(tmp_path))


def test_a_copy_of_the_shared_folder(producer: Producer, tmp_path: Path) -> None:
    """The same fleet id, as a restored snapshot has it: only the live node's nonce tells."""
    identity = (producer.fleet.root / "cohort.json").read_bytes()
    (tmp_path / "cohort.json").write_bytes(identity)
    assert mount.prove(tmp_path, "late").fleet_id == mount.prove(producer.fleet.root, "x").fleet_id
    line = refusal(producer, COHORT_ROOT=str(tmp_path))
    assert "node-1" in line
    assert "nonce" in line


def test_a_redis_that_may_evict(producer: Producer) -> None:
    producer.client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        assert "noeviction" in refusal(producer)
    finally:
        producer.client.config_set("maxmemory-policy", "noeviction")


def test_no_redis_and_no_password_in_the_line(producer: Producer) -> None:
    line = refusal(producer, COHORT_REDIS="redis://user:secret@127.0.0.1:1/0")
    assert "127.0.0.1:1" in line
    assert "secret" not in line


def test_a_directory_over_its_quota(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not a start, but a setting all the same: the run is refused, the last version untouched."""
    home = tmp_path_factory.mktemp("quota")
    with running_fleet(home, nodes=1, COHORT_QUOTA="100 KiB") as producer:
        assert jobs.grow.delay("q", 50_000).get(timeout=30) == 0
        before = producer.files_of("grow-q", home / "look")
        with pytest.raises(OverQuota, match="102,400"):
            jobs.grow.delay("q", 200_000).get(timeout=30)
        assert producer.files_of("grow-q", home / "look") == before
