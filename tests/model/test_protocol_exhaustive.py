"""Every state that three writers can reach by the commit protocol is a good one.

And the same search finds what goes wrong when one rule of the protocol is left out.
"""

from __future__ import annotations

from typing import get_args

import pytest

from tests.model.protocol import Mutation, Protocol, State, Violation, Writer, explore, start


def run(task: str, name: str, tries: int = 0) -> Writer:
    return Writer(task, name, concludes=False, tries=tries)


def conclusion(task: str, name: str, tries: int = 0) -> Writer:
    return Writer(task, name, concludes=True, tries=tries)


WORLDS: dict[str, State] = {
    "two claims of a task, and another task": start(run("X", "a"), run("X", "b"), run("Y", "c")),
    "three tasks": start(run("X", "a"), run("Y", "b"), run("Z", "c")),
    "a run and its conclusion": start(run("X", "a"), conclusion("X", "b"), run("Y", "c")),
    "who is fenced or dies runs again": start(run("X", "a", tries=1), run("Y", "b", tries=1)),
}
LARGE_WORLDS: dict[str, State] = {
    "one of three runs again": start(run("X", "a", tries=1), run("X", "b"), run("Y", "c")),
    "a conclusion runs again": start(run("X", "a"), conclusion("X", "b", tries=1), run("Y", "c")),
}
FOUND: dict[Mutation, str] = {
    "names are used again": "version 1 names X, and there is",
    "the link is a rename": "a record that was committed has changed",
    "the base isn't checked": "an update was lost",
    "the files aren't fsynced": "state='torn'",
    "EEXIST isn't looked into": "was told that it lost, and it won",
    "the outcome isn't looked for": "a task has two outcomes",
    "the collector doesn't look at the base": "and there is None",
}


@pytest.mark.parametrize("collects", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_every_reachable_state_is_good(world: str, collects: bool) -> None:
    look_through(WORLDS[world], collects)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", LARGE_WORLDS)
def test_every_reachable_state_of_a_large_world_is_good(world: str) -> None:
    look_through(LARGE_WORLDS[world], collects=False)


def look_through(world: State, collects: bool) -> None:
    explored = explore(world, Protocol(collects=collects))
    tasks = {writer.task for writer in world.writers}
    assert explored.longest_log == len(tasks), "nothing was committed, so nothing was tested"
    print(explored)


@pytest.mark.parametrize("mutation", [m for m in get_args(Mutation) if m])
def test_without_one_of_its_rules_it_goes_wrong(mutation: Mutation) -> None:
    with pytest.raises(Violation, match=FOUND[mutation]) as caught:
        for world in WORLDS.values():
            explore(world, Protocol(mutation, collects="collector" in mutation))
    print(caught.value)
