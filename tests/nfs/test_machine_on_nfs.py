"""The rules of the protocol on the real code, over two nodes that cache, lose replies and die.

Hypothesis chooses who does what on which node; the truth is read from the backing folder. After
every step: the log only grows; each version is exactly what its run made of the version before;
a task has one record; whoever was told something was told the truth.
"""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import crashpoints
from errors import CohortError, Fenced, SnapshotExpired, Unavailable
from storage import durable, log
from storage.directory import Attempt, Directory, Version, conclude_for
from storage.garbage import Garbage, Retention
from storage.log import Record
from storage.worktree import WorkTree
from tests.nfs.conftest import reset
from tests.nfs.node import Node
from tests.nfs.script import CHANGES, Rule, Settings
from tests.storage_kit import contents

# Only a failure takes long: then the shortest history that shows it is searched for.
pytestmark = pytest.mark.timeout(600)

NODES: list[Node] = []
NUMBERS = itertools.count(1)
KEEP = 3
TASKS = st.sampled_from(["t1", "t2", "t3", "t4"])
EVERYTHING = "|".join([*CHANGES, "getattr", "open", "read", "opendir", "flush", "readlink"])
ACCIDENTS = st.one_of(
    st.just(("none", 0)),
    st.sampled_from([("lost", errno.EEXIST), ("lost", errno.EIO), ("failed", errno.EIO)]),
    st.tuples(st.just("full"), st.integers(1, 12)),
    st.tuples(st.sampled_from(["dies", "power"]), st.integers(1, 60)),
    st.tuples(st.just("overtaken"), st.integers(0, 3)),
)
POINTS = [
    "commit:files-written",
    "commit:record-written",
    "commit:before-link",
    "commit:after-link",
]


@pytest.fixture(autouse=True)
def on_the_nodes(mounted: list[Node], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(durable, "PAUSES", (0.0,))
    NODES[:] = mounted
    yield
    for node in mounted:
        reset(node)


@dataclass
class Open:
    """An attempt whose job has run and that hasn't committed yet."""

    node: Node
    attempt: Attempt
    tree: WorkTree


class TwoNodes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.name = f"machine-{next(NUMBERS)}"
        (NODES[0].backing / self.name).mkdir()
        for node in NODES:
            reset(node)
        self.disk = tempfile.TemporaryDirectory()
        self.truth = Directory.open(NODES[0].backing / self.name, "k")
        self.views: list[tuple[Node, Version]] = []
        self.open: list[Open] = []
        self.count = 0
        self.meant: dict[str, tuple[int, dict[str, bytes]]] = {}
        """By claim: the base that its run read, and the files that it left."""
        self.records: list[Record] = []
        self.versions: list[dict[str, bytes]] = [{}]

    def teardown(self) -> None:
        crashpoints.on_reach = None
        for node in NODES:
            reset(node)
        self.disk.cleanup()

    # What the nodes do.

    @rule(node=st.sampled_from([0, 1]))
    def look(self, node: int) -> None:
        view = Directory.open(NODES[node].root / self.name, "k").head()
        assert view.n == len(self.records), "a node doesn't see the head"
        self.views.append((NODES[node], view))

    @precondition(lambda self: self.views and len(self.open) < 4)
    @rule(task=TASKS, same=st.booleans(), data=st.data())
    def run(self, task: str, same: bool, data: st.DataObject) -> None:
        node, base = data.draw(st.sampled_from(self.views[-4:]), "view")
        self._run(node, base, task, "shared" if same else f"of-{task}")

    @precondition(lambda self: 0 < len(self.open) < 4)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        """A second claim reads what the first one read. That wasn't dead: it ends before it."""
        first = data.draw(st.integers(0, len(self.open) - 1), "first")
        attempt = self.open[first].attempt
        (other,) = (node for node in NODES if node is not self.open[first].node)
        base = Directory.open(other.root / self.name, "k").version(attempt.base.n)
        self._run(other, base, attempt.task_id, "shared")
        self._end(first, fails=False, accident=("none", 0))

    def _run(self, node: Node, base: Version, task: str, name: str) -> Open | None:
        self.count += 1
        claim_id = f"c{self.count}"
        directory = Directory.open(node.root / self.name, "k")
        attempt = directory.begin(task, claim_id, base)
        tree = WorkTree(Path(self.disk.name) / f"{node.name}-{self.count}", "k", claim_id)
        try:
            tree.checkout(directory, base)
        except SnapshotExpired:
            assert base.n < self.truth.floor()
            tree.release()
            return None
        files = {path.name: path.read_bytes() for path in tree.path.iterdir()}
        assert files == self.versions[base.n], "a run doesn't find the version that it reads"
        files[name] = files.get(name, b"") + f"{claim_id};".encode()
        (tree.path / name).write_bytes(files[name])
        self.meant[claim_id] = base.n, files
        opened = Open(node, attempt, tree)
        self.open.append(opened)
        return opened

    @precondition(lambda self: self.open)
    @rule(accident=ACCIDENTS, fails=st.booleans(), data=st.data())
    def end(self, accident: tuple[str, int], fails: bool, data: st.DataObject) -> None:
        self._end(data.draw(st.integers(0, len(self.open) - 1), "which"), fails, accident)

    def _end(self, which: int, fails: bool, accident: tuple[str, int]) -> None:
        opened = self.open.pop(which)
        attempt = opened.attempt

        def act() -> Record:
            if fails:
                return attempt.conclude("FAILURE", "boom", attempt=1, node="n")
            return attempt.commit(opened.tree, attempt.claim_id, attempt=1, node="n")

        self._do(opened.node, attempt.task_id, attempt.claim_id, act, accident)
        opened.tree.release()

    @rule(node=st.sampled_from([0, 1]), task=TASKS, accident=ACCIDENTS)
    def conclude_for_a_dead_child(self, node: int, task: str, accident: tuple[str, int]) -> None:
        self.count += 1
        claim_id, root = f"c{self.count}", NODES[node].root / self.name
        self._do(
            NODES[node],
            task,
            claim_id,
            lambda: conclude_for(root, "k", task, claim_id, "REVOKED", None, 1, "n"),
            accident,
        )

    @rule(node=st.sampled_from([0, 1]))
    def collect(self, node: int) -> None:
        garbage = Garbage(NODES[node].root / self.name, Retention(keep=KEEP, max_age=0))
        garbage.run_once()
        assert garbage.troubles == {}

    @rule(node=st.sampled_from([0, 1]))
    def time_passes(self, node: int) -> None:
        NODES[node].forget()

    # What must hold.

    @invariant()
    def the_truth_is_good(self) -> None:
        records = list(self.truth.versions())
        assert records[: len(self.records)] == self.records, "a record has changed or is gone"
        for record in records[len(self.records) :]:
            before = self.versions[-1]
            if record.state == "SUCCESS":
                base, files = self.meant[record.claim_id]
                assert base == record.n - 1, "a run was committed on a version that it didn't read"
                self.versions.append(files)
            else:
                self.versions.append(before)
        self.records = records
        tasks = [record.task_id for record in records]
        assert len(set(tasks)) == len(tasks), "a task has two records"
        for n in range(max(1, self.truth.floor()), len(records) + 1):
            assert contents(self.truth.version(n)) == self.versions[n], f"version {n} has changed"

    @invariant()
    def every_node_finds_every_outcome(self) -> None:
        for node in NODES:
            directory = Directory.open(node.root / self.name, "k")
            for record in self.records[-2:]:
                if not record.task_id.startswith("other"):
                    assert directory.outcome_of(record.task_id) == record

    # How it is driven.

    def _do(
        self,
        node: Node,
        task: str,
        claim_id: str,
        act: Callable[[], Record],
        accident: tuple[str, int],
    ) -> None:
        kind, number = accident
        told: Record | CohortError | OSError
        self._prepare(node, kind, number)
        try:
            told = act()
        except (CohortError, OSError) as error:
            told = error
        finally:
            crashpoints.on_reach = None
            node.script(settings=Settings())
        if kind == "power":
            node.lose_power()
        if kind in ("dies", "power"):
            self.open = [opened for opened in self.open if opened.node is not node]
            return  # nobody is left to be told anything
        self.the_truth_is_good()
        claims = (claim_id, f"{claim_id}-end")
        mine = [record for record in self.records if record.claim_id in claims]
        if isinstance(told, Record):
            assert self.records[told.n - 1] == told, "it was told an outcome that isn't"
            assert told.task_id == task
        elif isinstance(told, Fenced):
            assert mine == [], "it was told that it lost, and it won"
        else:
            assert isinstance(told, Unavailable), told
            assert kind in ("full", "failed", "lost"), told

    def _prepare(self, node: Node, kind: str, number: int) -> None:
        if kind == "lost":
            node.script(Rule("lose_reply", "link", error=number))
        elif kind == "failed":
            node.script(Rule("fail", "link", error=number))
        elif kind == "full":
            node.script(
                Rule("fail", "create|store|mkdir", at=number, times=None, error=errno.ENOSPC)
            )
        elif kind in ("dies", "power"):
            node.script(Rule("fail", EVERYTHING, at=number, times=None, error=errno.EIO))
        elif kind == "overtaken":
            crashpoints.on_reach = self._overtaking(POINTS[number])

    def _overtaking(self, where: str) -> Callable[[str], None]:
        def reached(point: str) -> None:
            if point == where:
                crashpoints.on_reach = None
                self.the_truth_is_good()
                other = NODES[1]
                directory = Directory.open(other.root / self.name, "k")
                opened = self._run(other, directory.head(), f"other-{self.count}", "shared")
                assert opened is not None
                self.open.remove(opened)
                opened.attempt.commit(opened.tree, None, attempt=1, node="n")
                opened.tree.release()
                self.the_truth_is_good()

        return reached


UNDER_A_MUTATION = "COHORT_TEST_MUTATION" in os.environ
TestTwoNodes = TwoNodes.TestCase
TestTwoNodes.settings = settings(
    max_examples=400 if UNDER_A_MUTATION else 30,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    # Under a mutation it is enough to fail; the shortest way to fail takes minutes to find.
    phases=[Phase.generate] if UNDER_A_MUTATION else list(Phase),
)


@pytest.mark.long
class TestMoreOfTwoNodes(TestTwoNodes):  # type: ignore[valid-type,misc]
    # A failure is told as it was found: with so many steps the shortest one takes an hour to find.
    settings = settings(
        TestTwoNodes.settings,
        max_examples=60,
        stateful_step_count=25,
        phases=[Phase.reuse, Phase.generate],
    )
