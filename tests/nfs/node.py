"""A node of the tests: one adversarial mount, started, told what to do, and taken away again."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.nfs.control import Control
from tests.nfs.script import Rule, Settings, from_json, to_json
from tests.nfs.trace import Call, calls

PROJECT = Path(__file__).parents[2]
# A mount of Python on a busy machine. Nothing waits that long unless it is broken.
PATIENCE = 30.0


class CantMount(Exception):
    """There is no FUSE here."""


class Node:
    """A mount over a backing folder. `root` is the folder as this node sees it."""

    def __init__(self, backing: Path, work: Path, name: str, settings: Settings):
        self.name = name
        self.backing = backing
        self.root = work / f"{name}.mnt"
        self.root.mkdir()
        self._trace = work / f"{name}.trace"
        self._log = work / f"{name}.log"
        self._offsets = {0: 0}
        # A socket's path may not be long, and a test's folder often is.
        self._short = tempfile.mkdtemp(prefix="nfs-")
        socket = os.path.join(self._short, "s")
        arguments = (backing, self.root, socket, self._trace)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.nfs.adversary", *map(str, arguments)],
                cwd=PROJECT,
                env={"FUSE_LIBRARY_NAME": "fuse3", **os.environ, "PYTHONPATH": str(PROJECT)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        try:
            self._until(lambda: os.path.ismount(self.root), "to be mounted")
            self._control = Control(socket)
        except BaseException:
            self.close()
            raise
        self.script(settings=settings)

    def script(self, *rules: Rule, settings: Settings | None = None) -> None:
        """What happens from now on; it replaces the rules that were there."""
        self._control.ask(
            "script",
            rules=[to_json(rule) for rule in rules],
            settings=asdict(settings) if settings else None,
        )

    def rules(self) -> list[Rule]:
        """The rules, with how often each has seen its call and acted."""
        return from_json(self._control.ask("rules"))

    def forget(self) -> None:
        """As if everything that this client believes had expired."""
        self._control.ask("forget")

    def lose_power(self) -> None:
        """What this machine had only in its memory is gone."""
        self._control.ask("power")

    def pause(self) -> None:
        """Whoever calls from now on waits; the clock doesn't."""
        self._control.ask("pause")

    def wake(self) -> None:
        self._control.ask("wake")

    def wait_until_held(self, count: int = 1) -> None:
        """Until a rule `hold` has stopped that many calls."""
        self._until(lambda: self._control.ask("held") >= count, "to hold a call")

    def release(self) -> None:
        self._control.ask("release")

    def calls_so_far(self) -> int:
        count = int(self._control.ask("trace"))
        self._offsets[count] = self._trace.stat().st_size
        return count

    def trace(self, since: int = 0) -> list[Call]:
        """Every call after the first `since`, in order."""
        known = max(count for count in self._offsets if count <= since)
        self._control.ask("trace")
        with self._trace.open() as lines:
            lines.seek(self._offsets[known])
            # The last line may be half written: more calls than those asked for go on meanwhile.
            whole = [line for line in lines if line.endswith("\n")]
        return calls(whole[since - known :])

    def close(self) -> None:
        with suppress(AttributeError, OSError):
            self._control.ask("wake")
            self._control.ask("release")
            self._control.close()
        unmount(self.root)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            unmount(self.root)
        for name in os.listdir(self._short):
            os.unlink(os.path.join(self._short, name))
        os.rmdir(self._short)
        with suppress(OSError):
            self.root.rmdir()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _until(self, fact: Any, what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not fact():
            if self._process.poll() is not None:
                raise CantMount(f"the mount ended before it came {what}:\n{self.log()}")
            if time.monotonic() > end:
                raise TimeoutError(f"waited {PATIENCE} s for {self.name} {what}:\n{self.log()}")
            time.sleep(0.005)


def unmount(path: Path) -> None:
    """Lazily: whoever still has a file open there doesn't keep the test from ending."""
    for command in (["fusermount3", "-u", "-z", "-q"], ["umount", "-l"]):
        if not os.path.ismount(path):
            return
        with suppress(FileNotFoundError):
            subprocess.run([*command, str(path)], capture_output=True, check=False)


@contextmanager
def nodes(work: Path, count: int = 1, **settings: Any) -> Iterator[list[Node]]:
    """So many nodes that share one folder, `work/shared`."""
    backing = work / "shared"
    backing.mkdir(parents=True, exist_ok=True)
    made: list[Node] = []
    try:
        for n in range(1, count + 1):
            made.append(Node(backing, work, f"node-{n}", Settings(**settings)))
        yield made
    finally:
        for node in made:
            node.close()
        for node in made:
            assert "Traceback" not in node.log(), node.log()
