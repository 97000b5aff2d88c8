"""Which claimed jobs a node hands to one process together, and what room they take there."""

from __future__ import annotations

from typing import Any

import pytest

import broker.turns
from broker.claimant import Claimant
from broker.needs import Needs
from broker.turns import MOST_TOGETHER, SHORT
from tests.broker_kit import QUEUE, Broker, describe, lists_of, tops_of


class Node:
    """A node of two CPUs whose pool is the test."""

    def __init__(self, broker: Broker, slots: int = 1) -> None:
        self.broker = broker
        self.begun: list[list[str]] = []
        self.slots = slots
        self._asks = False
        self.claimant = Claimant(broker.scripts, "n", 60.0, describe, slots=self._slots)
        self.claimant.on_start = lambda jobs: self.begun.append(list(jobs))
        self.claimant.register()
        self.ids: dict[str, str] = {}
        self._number = 0

    def _slots(self) -> int:
        return 1000 if self._asks else self.slots  # What it claims ahead isn't the matter here.

    def takes(self, name: str, seconds: float) -> None:
        """A job of that name has taken so long."""
        self.claimant._takes[name] = seconds

    def get(self, *names: str, may_share: bool = True, cpus: int = 0) -> list[str]:
        """Jobs of these task names come one after another; what they are called."""
        called = []
        for name in names:
            self._number += 1
            task = f"{name}{self._number}"
            needs = Needs(cpus).text if cpus else ""
            self.broker.put(task, name=name, cohort={"needs": needs})
            self._asks = True
            asking = self.claimant.ask(1, (QUEUE,), lists_of(QUEUE), tops_of(QUEUE))
            self._asks = False
            claims = self.claimant.scripts.claim(asking)
            self.claimant.answered(asking, claims)
            (claimed,) = claims.claimed
            self.ids[task] = claimed.claim_id
            self.claimant.named(claimed.claim_id, name)
            self.claimant.start(claimed.claim_id, task, may_share=may_share)
            called.append(task)
        return called

    def end(self, task: str, took: float | None = None) -> None:
        self.claimant.ended(self.ids[task], took)


@pytest.fixture
def node(broker: Broker) -> Node:
    node = Node(broker)
    node.takes("short", SHORT / 10)
    node.takes("long", 10 * SHORT)
    return node


def test_the_first_goes_at_once_and_the_others_together(node: Node) -> None:
    first, *others = node.get("short", "short", "short", "short")
    assert node.begun == [[first]]
    node.end(first, 0.0)
    assert node.begun == [[first], others]


def test_their_room_is_taken_once_and_until_the_first_ends(node: Node) -> None:
    first, *together = node.get("short", "short", "short")
    node.end(first, 0.0)
    (behind,) = node.get("short")
    assert node.begun[-1] == together
    node.end(together[1], 0.0)
    assert node.begun[-1] == together
    node.end(together[0], 0.0)
    assert node.begun[-1] == [behind]
    node.end(behind)
    assert node.claimant._running == 0
    assert tuple(node.claimant._room.spare) == node.claimant._room.total


def test_room_is_passed_on_to_the_one_that_runs(node: Node) -> None:
    first, *together = node.get("short", "short", "short")
    node.end(first, 0.0)
    (behind,) = node.get("short")
    node.claimant.pass_room([node.ids[together[0]]], node.ids[together[1]])
    node.end(together[0], 0.0)
    assert node.begun[-1] == together
    node.end(together[1], 0.0)
    assert node.begun[-1] == [behind]


def test_together_they_are_short(node: Node) -> None:
    first, *others = node.get(*["short"] * 15)
    node.end(first, SHORT / 10)
    assert len(node.begun[-1]) == 10
    node.takes("short", SHORT / 1000)
    node.get(*["short"] * MOST_TOGETHER)
    node.end(others[0], SHORT / 1000)
    assert len(node.begun[-1]) == MOST_TOGETHER


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("long", {}),
        ("never seen", {}),
        ("short", {"may_share": False}),
        ("short", {"cpus": 1}),
    ],
)
def test_who_goes_alone(node: Node, name: str, how: dict[str, Any]) -> None:
    first, second = node.get("short", "short")
    (alone,) = node.get(name, **how)
    (last,) = node.get("short")
    node.end(first, 0.0)
    assert node.begun[-1] == [second]  # Nobody overtakes.
    node.end(second, 0.0)
    assert node.begun[-1] == [alone]
    node.end(alone, 0.0)
    assert node.begun[-1] == [last]


def test_a_node_that_ends_begins_nothing(node: Node) -> None:
    first, second = node.get("short", "short")
    node.claimant.begin_no_more()
    node.end(first, 0.0)
    assert node.begun == [[first]]
    assert node.claimant.overdue(0.0) == [node.ids[second]]


def test_idle_processes_get_their_share(broker: Broker) -> None:
    node = Node(broker, slots=3)
    node.takes("short", SHORT / 100)
    alone = node.get("long", "long", "long")
    node.get(*["short"] * 9)
    node.slots = 6
    node.end(alone[0])
    assert [len(jobs) for jobs in node.begun[3:]] == [3, 2, 2, 2]


def test_one_that_ended_within_a_bundle_is_known_by_its_own_time(node: Node) -> None:
    first, *_ = node.get("short", "short", "short")
    node.end(first, SHORT / 10)
    for task in node.begun[-1]:
        node.claimant.begin(node.ids[task])
    for task in node.begun[-1]:
        node.end(task)  # Lost: how long it took isn't known.
    assert node.claimant._takes["short"] == pytest.approx(SHORT / 10)


def test_a_bundle_that_takes_long_says_so_of_its_first(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = node.get("short", "short", "short")
    node.end(first, 0.0)
    for task in node.begun[-1]:
        node.claimant.begin(node.ids[task])
    begun = node.claimant._held[node.ids[node.begun[-1][0]]].begun

    class Later:
        @staticmethod
        def monotonic() -> float:
            return begun + 1.0

    monkeypatch.setattr(broker.turns, "time", Later)
    node.claimant._what_fits()
    assert node.claimant._takes["short"] == pytest.approx(1.0)
