"""`./cohort chaos` as a user starts it: it holds, says what was, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from deploy.chaos import command, harvest
from deploy.chaos.checker import Problem
from deploy.chaos.faults import KINDS, plan
from deploy.chaos.history import Left, Submitted, load
from deploy.chaos.world import World
from tests.processes import marked, wait_until

PROJECT = Path(__file__).resolve().parents[2]


class Chaos:
    """One run, in its own folder for temporary files."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.output = folder / "output"
        self.errors = folder / "errors"
        self.mark = uuid.uuid4().hex
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "deploy.chaos", *words],
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": str(PROJECT),
                    "TMPDIR": str(self.temporary),
                    "TEST_MARK": self.mark,
                    # What the user has set for fleets of their own isn't for this one.
                    "COHORT_REDIS": "redis://127.0.0.1:1/0",
                    "COHORT_LEASE": "1h",
                },
                stdout=output,
                stderr=errors,
            )

    def end(self, timeout: float) -> int:
        return self.process.wait(timeout)

    def said(self) -> str:
        return self.output.read_text("utf-8") + self.errors.read_text("utf-8")

    def left(self) -> list[Path]:
        return list(self.temporary.glob("cohort-*"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def hold(folder: Path, *words: str) -> dict[str, object]:
    """A run that has to hold; what it says as JSON."""
    run = Chaos(folder, "--json", *words)
    try:
        code = run.end(float(words[words.index("--minutes") + 1]) * 60 + 240)
    finally:
        run.kill()
    assert code == 0, run.said()
    told: dict[str, object] = json.loads(run.output.read_text())
    assert told["ok"] and told["problems"] == [] and told["kept"] is None
    assert "\x1b" not in run.said(), "no colours without a terminal"
    assert run.left() == []
    assert marked(run.mark) == set()
    return told


@pytest.mark.timeout(400)
def test_a_minute_of_it(folder: Path) -> None:
    told = hold(folder, "--minutes", "1")
    faults, jobs, outcomes = told["faults"], told["jobs"], told["outcomes"]
    assert isinstance(faults, dict) and isinstance(jobs, dict) and isinstance(outcomes, dict)
    # On a busy machine a fault may have found no node to be done to.
    assert sum(faults.values()) >= 9 and len(faults) >= 6
    assert jobs["submitted"] > 100
    assert outcomes["SUCCESS"] > jobs["submitted"] / 2


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ten_minutes_of_it(folder: Path) -> None:
    told = hold(folder, "--minutes", "10", "--nodes", "4")
    assert isinstance(told["faults"], dict)
    assert set(told["faults"]) == set(KINDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(folder: Path, number: int) -> None:
    run = Chaos(folder, "--seed", "7", "--minutes", "5")
    try:
        wait_until(lambda: " s  " in run.said() or run.process.poll() is not None, 60)
        assert run.said().startswith("seed 7: 3 nodes")
        run.process.send_signal(number)
        assert run.end(60) == 130, run.said()
    finally:
        run.kill()
    assert marked(run.mark) == set()
    assert run.left() == []


@pytest.mark.parametrize(
    "words",
    [
        ["--minutes", "0"],
        ["--minutes", "nan"],
        ["--minutes", "soon"],
        ["--seed", "-1"],
        ["--seed", "x"],
        ["--nodes", "0"],
        ["--nodes", "99"],
        ["--jason"],
    ],
)
def test_a_wrong_word_starts_nothing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == 2
    assert words[-1] in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_what_was_not_kept_is_said_and_its_traces_stay(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(World, "_isolate", lambda self, environ: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(self: command.Run) -> list[Problem]:
        self.world.home.mkdir()
        self.history.append(Submitted("t", None, True))
        return [Problem("missing job", "t was accepted and has no outcome")]

    monkeypatch.setattr(command.Run, "run", run)
    assert command.main(["--seed", "5", *(["--json"] if as_json else [])]) == 1
    said = capsys.readouterr()
    (home,) = tmp_path.iterdir()
    assert f"seed 5; logs, files and history.jsonl are kept in {home}" in said.err
    assert load(home / "history.jsonl") == [Submitted("t", None, True)]
    if as_json:
        told = json.loads(said.out)
        assert (told["ok"], told["kept"], told["seed"]) == (False, str(home), 5)
        assert told["problems"][0]["kind"] == "missing job"
    else:
        assert "chaos: missing job: t was accepted and has no outcome" in said.out
        assert said.out.endswith("1 problems\n")


def test_a_seed_is_a_plan() -> None:
    assert plan(3, 60) == plan(3, 60) != plan(4, 60)
    for seed in range(20):
        faults = plan(seed, 60)
        assert {fault.kind for fault in faults} == set(KINDS)
        assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
        assert faults[-1].at < 60
    assert plan(1, 1) == []


class Emptied:
    """A Redis that is empty after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def keys(self, pattern: str) -> list[bytes]:
        self.looks -= 1
        return [b"{cohort}locks", b"celery", b"{cohort}leases"] if self.looks >= 0 else []

    def hgetall(self, name: bytes) -> dict[bytes, bytes]:
        return {b"chaos-1": b"claim-1"}

    def lrange(self, name: bytes, first: int, last: int) -> list[bytes]:
        return [b"message"]


def test_draining_waits_and_tells_what_stays() -> None:
    tended: list[None] = []
    assert harvest.drain(Emptied(3), lambda: tended.append(None), 60) == []
    assert len(tended) == 3
    left = harvest.drain(Emptied(1000), lambda: None, 0.0)
    assert [type(one) for one in left] == [Left, Left]
    assert "claim-1" in left[1].what and "message" in left[0].what
