"""The checker of chaos: a good history passes, each planted fault is found and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.chaos.checker import Kind, check
from deploy.chaos.history import (
    Answered,
    Committed,
    Ended,
    Fact,
    Files,
    Injected,
    Left,
    Ran,
    Recorded,
    Revoked,
    Submitted,
    load,
    save,
)

History = list[Fact]


def keyed(key: str, n: int, task: str, state: str, count: int | None = None) -> History:
    """All that a keyed job leaves."""
    error = "Planned" if state == "FAILURE" else ""
    return [
        Submitted(task, key, True),
        Committed(key, n, task, state, count),
        Recorded(task, state, f"{key} {n}", error),
        Answered(task, state),
    ]


def good() -> History:
    """Three successes of a key with a failure between, a revoked job, keyless ones, a lost put."""
    return [
        Injected(1.5, "kill -9 of a node", "node-1"),
        *keyed("a", 1, "a1", "SUCCESS", 1),
        *keyed("a", 2, "a2", "FAILURE"),
        *keyed("a", 3, "a3", "SUCCESS", 2),
        Revoked("a4"),
        *keyed("a", 4, "a4", "REVOKED"),
        *keyed("a", 5, "a5", "SUCCESS", 3),
        Files("a", 3, ("a1", "a3", "a5")),
        *keyed("b", 1, "b1", "SUCCESS", 1),
        Files("b", 1, ("b1",)),
        # Its first node died after it had written the outcome: it ran twice, and ends the same.
        Submitted("free", None, True),
        Ran("free", "claim-1"),
        Ran("free", "claim-2"),
        Recorded("free", "SUCCESS", "x"),
        Recorded("free", "SUCCESS", "x"),
        Answered("free", "SUCCESS"),
        # Revoked while it waited for the lock.
        Submitted("waited", "a", True),
        Revoked("waited"),
        Recorded("waited", "REVOKED", "x"),
        Answered("waited", "REVOKED"),
        # Its producer was told an error, and it is nowhere.
        Submitted("perhaps", "a", False),
        Answered("perhaps", "PENDING"),
        Submitted("dead", None, True),
        Recorded("dead", "FAILURE", "y", "DeadLettered"),
        Answered("dead", "FAILURE"),
    ]


def without(*facts: Fact) -> Callable[[History], History]:
    return lambda history: [fact for fact in history if fact not in facts]


def with_(*facts: Fact) -> Callable[[History], History]:
    return lambda history: [*history, *facts]


def instead(old: Fact, new: Fact) -> Callable[[History], History]:
    def replaced(history: History) -> History:
        assert old in history
        return [new if fact == old else fact for fact in history]

    return replaced


FILES = Files("a", 3, ("a1", "a3", "a5"))
A5 = Committed("a", 5, "a5", "SUCCESS", 3)
OUTCOME_5 = Recorded("a5", "SUCCESS", "a 5")

PLANTED: dict[str, tuple[Kind, Callable[[History], History]]] = {
    "an update is lost": ("lost update", instead(FILES, Files("a", 2, ("a1", "a5")))),
    "only its line is lost": ("lost update", instead(FILES, Files("a", 3, ("a1", "a5")))),
    "only the counter is behind": (
        "lost update",
        instead(FILES, dataclasses.replace(FILES, count=2)),
    ),
    "the files are gone": ("lost update", without(FILES)),
    "a success is counted twice": (
        "doubled success",
        instead(FILES, Files("a", 4, ("a1", "a3", "a5", "a5"))),
    ),
    "only its line is doubled": (
        "doubled success",
        instead(FILES, Files("a", 3, ("a1", "a3", "a5", "a5"))),
    ),
    "a failure is counted": (
        "doubled success",
        instead(FILES, Files("a", 4, ("a1", "a2", "a3", "a5"))),
    ),
    "a run read old files": ("stale file", instead(A5, dataclasses.replace(A5, count=2))),
    "a run read the files of a failure": (
        "stale file",
        instead(A5, dataclasses.replace(A5, count=4)),
    ),
    "an accepted job is nowhere": ("missing job", with_(Submitted("gone", "a", True))),
    "an accepted keyless job is nowhere": ("missing job", with_(Submitted("gone", None, True))),
    "it committed and nobody was told": ("missing job", without(OUTCOME_5)),
    "it was refused, committed, and nobody was told": (
        "missing job",
        with_(Submitted("r", "c", False), Committed("c", 1, "r", "REVOKED")),
    ),
    "a second outcome of a keyless job": (
        "two outcomes",
        with_(Recorded("free", "FAILURE", "z", "DeadLettered")),
    ),
    "another value of the same state": ("two outcomes", with_(Recorded("free", "SUCCESS", "z"))),
    "a second record": ("two outcomes", with_(Committed("a", 6, "a2", "FAILURE"))),
    "a second record under another key": (
        "two outcomes",
        with_(Committed("b", 2, "a2", "FAILURE")),
    ),
    "outcome and record differ": (
        "two outcomes",
        instead(A5, dataclasses.replace(A5, state="FAILURE", count=None)),
    ),
    "a record is missing from the log": (
        "two outcomes",
        without(Committed("a", 4, "a4", "REVOKED")),
    ),
    "an outcome without a record": ("wrong outcome", without(A5)),
    "revoked by nobody": ("wrong outcome", without(Revoked("a4"))),
    "a failure that was not planned": (
        "wrong outcome",
        instead(
            Recorded("dead", "FAILURE", "y", "DeadLettered"),
            Recorded("dead", "FAILURE", "y", "KeyError"),
        ),
    ),
    "a success that never ran": (
        "wrong outcome",
        without(Ran("free", "claim-1"), Ran("free", "claim-2")),
    ),
    "who asks is told otherwise": (
        "wrong outcome",
        instead(Answered("a5", "SUCCESS"), Answered("a5", "FAILURE")),
    ),
    "who asks is told nothing": ("wrong outcome", without(Answered("a5", "SUCCESS"))),
    "a state that ends nothing": (
        "wrong outcome",
        instead(Recorded("free", "SUCCESS", "x"), Recorded("free", "RETRY", "x")),
    ),
    "an outcome of nobody's job": ("unknown job", with_(Recorded("who", "SUCCESS", "x"))),
    "a record of nobody's job": (
        "unknown job",
        with_(Committed("c", 1, "who", "REVOKED")),
    ),
    "a lock is left": ("left behind", with_(Left("a lock of a"))),
    "a node ended": ("dead node", with_(Ended("node-1", 1))),
}


def test_a_good_history_passes() -> None:
    assert check(good()) == []
    assert check([]) == []


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str) -> None:
    kind, plant = PLANTED[fault]
    found = check(plant(good()))
    assert kind in {problem.kind for problem in found}, found


def test_every_kind_of_problem_is_planted() -> None:
    assert {kind for kind, _ in PLANTED.values()} == set(get_args(Kind))


def test_one_fault_is_one_kind() -> None:
    """What a person reads first shouldn't be a list of consequences."""
    for fault in ("an update is lost", "a success is counted twice", "a run read old files"):
        kind, plant = PLANTED[fault]
        assert {problem.kind for problem in check(plant(good()))} == {kind}


@given(st.randoms(use_true_random=False))
def test_the_order_of_the_facts_is_of_no_matter(random: object) -> None:
    history = good()
    random.shuffle(history)  # type: ignore[attr-defined]
    assert check(history) == []
    _, plant = PLANTED["an update is lost"]
    assert check(plant(history))


def test_it_can_be_kept_and_read_back(tmp_path: Path) -> None:
    history = [*good(), Left("x"), Ended("node-1", 1)]
    save(history, tmp_path / "history.jsonl")
    assert load(tmp_path / "history.jsonl") == history
