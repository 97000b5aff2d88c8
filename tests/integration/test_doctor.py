"""`./cohort doctor` as its user sees it: on this node alone, and with a worker's half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleets import Producer, running_fleet

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    with running_fleet(tmp_path_factory.mktemp("doctor"), nodes=2) as running:
        yield running


def doctor(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "doctor", *words],
        env={**os.environ, "PYTHONPATH": str(PROJECT), **environ},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def report(ended: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert ended.stderr == ""
    parsed: dict[str, Any] = json.loads(ended.stdout)
    return {finding["what"]: finding for finding in parsed["findings"]}


def test_with_another_node(producer: Producer) -> None:
    before = sorted(os.listdir(producer.fleet.root))
    ended = doctor("--with", "node-2", "--json", **producer.fleet.environ)
    found = report(ended)
    # The tests' folder may lie in memory or in a container's layer, and says so.
    kind = found.pop("file system")["verdict"]
    assert ended.returncode == (1 if kind == "dangerous" else 0)
    assert {f["what"]: f["found"] for f in found.values() if f["verdict"] == "dangerous"} == {}
    assert "node-2 sees" in found["the same folder"]["found"]
    assert "none twice" in found["link-or-fail"]["found"]
    assert found["clock of node-2"]["verdict"] == "fine"
    assert sorted(os.listdir(producer.fleet.root)) == before


def test_the_other_node_works_on_meanwhile(producer: Producer) -> None:
    """It has taken its steps in the worker's loop; that must be none the worse for it."""
    ended = doctor("--with", "node-1", "--json", **producer.fleet.environ)
    assert report(ended)["mkdir"]["verdict"] == "fine"
    assert producer.app.control.ping(timeout=5, limit=2)
    assert producer.end_of(producer.app.send_task("tests.sample_jobs.plain_add", (1, 2))) == 3


def test_another_folder_than_the_other_node_s(producer: Producer, tmp_path: Path) -> None:
    ended = doctor("--with", "node-2", "--root", str(tmp_path), **producer.fleet.environ)
    assert ended.returncode == 1
    assert "node-2 doesn't see what this node made" in ended.stdout
    assert "Traceback" not in ended.stderr
    assert os.listdir(tmp_path) == []


def test_a_node_that_isn_t_there(producer: Producer) -> None:
    ended = doctor("--with", "node-7", **producer.fleet.environ)
    assert ended.returncode == 1
    assert ended.stderr == ("cohort: there is no live node node-7; live are node-1, node-2\n")


def test_alone_without_a_fleet(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    ended = doctor("--root", str(tmp_path / "root"), COHORT_STATE=str(tmp_path / "none"))
    assert ended.stderr == ""
    lines = ended.stdout.splitlines()
    assert any(line.startswith("link-or-fail ") and " fine " in line for line in lines)
    assert any(line.startswith("time to link ") and "p99" in line for line in lines)
    assert "\x1b" not in ended.stdout
    assert os.listdir(tmp_path / "root") == []


@pytest.mark.parametrize("words", [(), ("--root", "/nowhere")])
def test_no_folder_is_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    ended = doctor(*words, COHORT_STATE=str(tmp_path))
    assert ended.returncode == 1
    assert ended.stderr.startswith("cohort: ")
    assert len(ended.stderr.splitlines()) == 1
