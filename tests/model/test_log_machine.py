"""A model of a job directory, driven beside the real one: several writers with old views, crashes
at every crash point, other writers amid a commit, lost replies, full disks, wrong hints.

What must hold after every step: the versions are contiguous; each is exactly what one attempt made
of the version that it read; a task has at most one record; nothing that was committed ever changes.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import crashpoints
from errors import Fenced, StandAside, Unavailable
from storage import log
from storage.directory import Attempt, Directory, Version, conclude_for
from storage.log import Record
from storage.worktree import WorkTree
from tests.storage_kit import Crash, contents

# Only a failure takes long: then the shortest history that shows it is searched for.
pytestmark = pytest.mark.timeout(600)

NAMES = [f"t{n}" for n in range(8)]
TASKS = st.sampled_from(NAMES)
POINTS = [
    "commit:file-written",
    "commit:files-written",
    "commit:manifest-written",
    "commit:record-written",
    "commit:before-link",
    "commit:after-link",
    "commit:head-written",
]
AFTER_LINK = POINTS[POINTS.index("commit:after-link") :]
REPLIES = ["lost, says EEXIST", "lost, says EIO", "failed, says EIO", "full"]
ACCIDENTS = st.one_of(
    st.just(("none", "")),
    st.sampled_from([("crash", point) for point in POINTS]),
    st.sampled_from([("overtaken", point) for point in POINTS]),
    st.sampled_from([("reply", reply) for reply in REPLIES]),
)


@dataclass
class Open:
    """An attempt whose job has run and that hasn't committed yet."""

    attempt: Attempt
    tree: WorkTree
    files: dict[str, bytes]


@dataclass
class Happened:
    """What an accident did so far."""

    once: bool = False
    link_prevented: bool = False


class JobDirectory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="cohort-model-"))
        self.root, self.scratch = self.folder / "root", self.folder / "scratch"
        self.root.mkdir()
        self.directory = Directory.open(self.root, "k")
        self.views: list[Version] = [self.directory.head()]
        self.open: list[Open] = []
        self.count = 0
        # The model: what each version holds, and which task made it.
        self.versions: list[dict[str, bytes]] = [{}]
        self.winners: list[str] = [""]

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    # What the nodes do.

    @rule()
    def look(self) -> None:
        """A node takes a view, and may use it much later."""
        self.views.append(self.directory.head())

    @precondition(lambda self: len(self.open) < 4)
    @rule(task=TASKS, data=st.data())
    def run(self, task: str, data: st.DataObject) -> None:
        base = data.draw(st.sampled_from(self.views[-3:]), "base")
        opened = self._opened(task, base)
        assert {p.name: p.read_bytes() for p in opened.tree.path.iterdir()} == self.versions[base.n]
        what = data.draw(st.sampled_from(["mine", "shared", "remove"]), "what")
        files = dict(self.versions[base.n])
        if what == "remove" and files:
            name = sorted(files)[0]
            del files[name]
            (opened.tree.path / name).unlink()
        else:
            name = "shared" if what == "shared" else f"of-{task}"
            files[name] = files.get(name, b"") + f"{opened.attempt.claim_id};".encode()
            (opened.tree.path / name).write_bytes(files[name])
        opened.files = files
        self.open.append(opened)

    @precondition(lambda self: self.open)
    @rule(accident=ACCIDENTS, data=st.data())
    def commit(self, accident: tuple[str, str], data: st.DataObject) -> None:
        opened = self.open.pop(data.draw(st.integers(0, len(self.open) - 1), "which"))
        attempt = opened.attempt
        self._end(
            lambda: attempt.commit(opened.tree, attempt.claim_id, attempt=1, node="n"),
            attempt.task_id,
            attempt.base.n,
            opened.files,
            accident,
        )
        opened.tree.release()

    @precondition(lambda self: self.open)
    @rule(accident=ACCIDENTS, data=st.data())
    def fail(self, accident: tuple[str, str], data: st.DataObject) -> None:
        opened = self.open.pop(data.draw(st.integers(0, len(self.open) - 1), "which"))
        attempt = opened.attempt
        self._end(
            lambda: attempt.conclude("FAILURE", "boom", attempt=1, node="n"),
            attempt.task_id,
            attempt.base.n,
            self.versions[attempt.base.n],
            accident,
        )
        opened.tree.release()

    @rule(task=TASKS, accident=ACCIDENTS)
    def conclude_for_a_dead_child(self, task: str, accident: tuple[str, str]) -> None:
        self.count += 1
        self._end(
            lambda: conclude_for(self.root, "k", task, f"c{self.count}", "REVOKED", None, 1, "n"),
            task,
            None,
            None,
            accident,
        )

    @rule(hint=st.sampled_from([b"", b"0", b"1", b"2", b"1000", b"-1", b"x", None]))
    def spoil_the_hint(self, hint: bytes | None) -> None:
        head = self.root / "jobs/k/HEAD"
        head.unlink(missing_ok=True)
        if hint is not None:
            head.write_bytes(hint)

    # What must hold.

    @invariant()
    def the_log_is_the_model(self) -> None:
        records = list(self.directory.versions())
        assert [r.n for r in records] == list(range(1, len(self.versions)))
        assert [r.task_id for r in records] == self.winners[1:]
        assert len(set(self.winners)) == len(self.winners)
        for record in records:
            assert contents(self.directory.version(record.n)) == self.versions[record.n]
            assert os.stat(self.directory.log.path(record.n)).st_nlink == 2

    @invariant()
    def every_outcome_is_found(self) -> None:
        for task in NAMES:
            outcome = self.directory.outcome_of(task)
            assert (outcome.n if outcome else None) == self._outcome(task)

    # How it is driven.

    def _opened(self, task: str, base: Version) -> Open:
        self.count += 1
        attempt = self.directory.begin(task, f"c{self.count}", base)
        with pytest.raises(StandAside):
            self.directory.begin(task, f"c{self.count}", base)
        tree = WorkTree(self.scratch, "k", f"c{self.count}")
        tree.checkout(self.directory, base)
        return Open(attempt, tree, {})

    def _outcome(self, task: str) -> int | None:
        return self.winners.index(task) if task in self.winners else None

    def _end(
        self,
        act: Callable[[], Record],
        task: str,
        base: int | None,
        files: dict[str, bytes] | None,
        accident: tuple[str, str],
    ) -> None:
        """Do what ends a task, under an accident; check that what came of it had to come of it.

        Without a base and files of its own (`conclude_for`) it takes those of the head.
        """
        before = self._outcome(task)
        kind, where = accident

        def linked() -> None:
            if self._outcome(task) is None and base in (None, self._head()):
                self.versions.append(self.versions[-1] if files is None else files)
                self.winners.append(task)

        result: Record | None = None
        raised: BaseException | None = None
        with self._accident(kind, where, linked) as happened:
            try:
                result = act()
            except (Crash, Fenced, Unavailable) as error:
                raised = error
        if not happened.link_prevented:
            linked()
        n = self._outcome(task)
        if result is not None:
            assert (result.n, result.task_id) == (n, task)
        elif isinstance(raised, Fenced):
            assert n is None
            assert base is not None and base < self._head()
        elif isinstance(raised, Unavailable):
            assert n is None
            assert where == "full"
        else:
            assert kind == "crash"
        assert before in (None, n)

    def _head(self) -> int:
        return len(self.versions) - 1

    def _overtake(self) -> None:
        """Another writer commits, start to end, in the middle of what somebody else does."""
        other = f"other-{self.count}"
        opened = self._opened(other, self.directory.head())
        (opened.tree.path / "shared").write_text(other)
        opened.attempt.commit(opened.tree, None, attempt=1, node="n")
        opened.tree.release()
        self.versions.append({**self.versions[-1], "shared": other.encode()})
        self.winners.append(other)

    @contextmanager
    def _accident(self, kind: str, where: str, linked: Callable[[], None]) -> Iterator[Happened]:
        happened, real_link = Happened(), os.link

        def reached(point: str) -> None:
            if point != where or happened.once:
                return
            happened.once = True
            if kind == "crash":
                happened.link_prevented = where not in AFTER_LINK
                raise Crash
            if where in AFTER_LINK:
                linked()
            self._overtake()

        def link(source: Path, target: Path, **kwargs: Any) -> None:
            if where == "full" and not os.path.exists(target):
                happened.link_prevented = True
                raise OSError(errno.ENOSPC, "No space left on device")
            if where == "failed, says EIO" and not happened.once:
                happened.once = True
                raise OSError(errno.EIO, "Input/output error")
            real_link(source, target, **kwargs)
            if where == "lost, says EEXIST":
                raise FileExistsError(errno.EEXIST, "File exists")
            if where == "lost, says EIO":
                raise OSError(errno.EIO, "Input/output error")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log, "PAUSES", (0.0, 0.0, 0.0))
            patch.setattr(os, "link", link)
            patch.setattr(crashpoints, "on_reach", reached)
            yield happened


TestJobDirectory = JobDirectory.TestCase
TestJobDirectory.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is lost in here, and an fsync takes longer than everything else together."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
