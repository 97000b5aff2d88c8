"""The demo itself, as a user starts it: what it shows, how it ends, and that nothing stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(300)


class Demo:
    """One demo under test, in its own folder for temporary files."""

    def __init__(self, folder: Path) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.output = folder / "output"
        self._mark = f"DEMO_MARK={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "deploy.demo"],
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": str(PROJECT),
                    "TMPDIR": str(self.temporary),
                    # What the user has set for fleets of their own isn't for the demo.
                    "COHORT_REDIS": "redis://127.0.0.1:1/0",
                    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
                    name: value,
                },
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self) -> str:
        return self.output.read_text("utf-8")

    def wait_for(self, words: str) -> None:
        ends = time.monotonic() + 120
        while words not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < ends, self.text
            time.sleep(0.05)

    def end(self) -> int:
        return self.process.wait(240)

    def processes(self, word: str = "") -> list[int]:
        """What carries this demo's mark in its environment and the word in its command line."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self._mark.encode() in (folder / "environ").read_bytes().split(b"\0")
                if marked and word.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def left_files(self) -> list[Path]:
        return list(self.temporary.glob("cohort-*"))


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path)
    try:
        yield demo
    finally:
        demo.process.kill()
        demo.process.wait()


def test_four_days(demo: Demo) -> None:
    assert demo.end() == 0, demo.text
    last = demo.text.splitlines()[-1]
    verdict = r"demo: 0 rows lost, 0 rows doubled, 0 stale reads, (\d+) runs on 3 nodes"
    told = re.fullmatch(verdict, last)
    assert told, demo.text
    assert "\x1b" not in demo.text, "no colours without a terminal"

    runs = re.findall(
        r"^export-ny-(\w+) +(\d) +node-(\d) +(\d+) +(\d+) +(\w+)", demo.text, re.MULTILINE
    )
    assert len(runs) == int(told[1]) >= 23
    nodes = {(job, day): node for job, day, node, _, _, _ in runs}
    for job in ("flights", "weather", "planes", "airports", "airlines"):
        assert nodes[job, "1"] != nodes[job, "2"], f"{job} was on the same node on day 2"
    # On a busy machine a node may lose its lease as well, and another run be fenced.
    fates = {(job, day, fate) for job, day, _, _, _, fate in runs if not fate.isdigit()}
    assert fates >= {("flights", "3", "killed"), ("flights", "4", "fenced")}
    versions = [(read, written) for job, _, _, _, read, written in runs if job == "flights"]
    assert sorted(pair for pair in versions if pair[1].isdigit()) == [
        (str(n), str(n + 1)) for n in range(5)
    ]
    assert demo.processes() == []
    assert demo.left_files() == []


def test_interrupted_it_leaves_nothing(demo: Demo) -> None:
    demo.wait_for("day 1")
    assert demo.processes("deploy.run_celery")
    demo.process.send_signal(signal.SIGINT)
    assert demo.end() == 130
    assert demo.processes() == []
    assert demo.left_files() == []


def test_a_failure_keeps_the_logs_and_says_where(demo: Demo) -> None:
    demo.wait_for("day 1")
    for pid in demo.processes("moto.server"):
        os.kill(pid, signal.SIGKILL)
    assert demo.end() == 1
    (home,) = demo.left_files()
    assert f"demo: logs and files are kept in {home}" in demo.text
    assert re.search(r"^demo: s3 ended", demo.text, re.MULTILINE), demo.text
    assert (home / "logs" / "node-1.log").exists()
    assert demo.processes() == []
