"""What becomes of jobs that share a process, when its pool speaks late, twice or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, cast

import pytest
from celery.exceptions import TaskRevokedError

from broker.transport import consume_as
from tasks import bundle
from tasks.bundle import Bundle, Tray, Trays, trace_bundle
from tasks.request import JobRequest, Traced


class Request:
    """A request that writes down what is done with it."""

    def __init__(self, name: str, revoked: bool = False) -> None:
        self.id = self.name = self.claim_id = name
        self.revoked = revoked
        self.acknowledged = False
        self.child: Any = None
        self.worker_pid: int | None = None
        self.took: float | None = None
        self.done: list[str] = []
        self.pool_arguments = (name,)
        self._terminate_on_ack: Any = ("pool", 15)
        self._apply_result: Any = None
        self.task = self
        self.acks_late = True
        self.chord = None

    def check(self) -> None:
        if self.revoked:
            raise TaskRevokedError(self.id)

    def hand_to(self, pool: Any) -> None:
        self.done.append("handed over alone")

    def on_accepted(self, pid: int, at: float) -> None:
        self.worker_pid = pid
        self.done.append("accepted" if self._terminate_on_ack is None else "accepted, killed")

    def on_success(self, traced: Traced) -> None:
        self.acknowledged = True
        self.done.append(f"ended {traced[1]}")

    def on_failure(self, exc_info: Any) -> None:
        self.acknowledged = True
        self.done.append(f"failed {exc_info}")

    def give_back(self) -> None:
        self.acknowledged = True
        self.done.append("given back")


class Result:
    """What the pool keeps of a job until it forgets it."""


class Pool:
    """A pool whose process is the test."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.bundle: Any = None

    def apply_async(self, function: Any, args: Any, **callbacks: Any) -> Result:
        assert function is trace_bundle
        self.bundle = callbacks["callback"].__self__
        self.results.append(Result())
        return self.results[-1]


class Process:
    """A bundle in the hands of a process."""

    def __init__(self, trays: Trays, *requests: Request) -> None:
        self.pool = Pool()
        self.requests = requests
        self.bundle = Bundle(
            cast(list[JobRequest], list(requests)), trays, lambda r: cast(Any, r).give_back()
        )
        self.bundle.execute_using_pool(self.pool)

    @property
    def tray(self) -> Tray:
        assert self.bundle._tray is not None
        return self.bundle._tray

    def accept(self) -> None:
        self.bundle.on_accepted(1, 0.0)

    def end(self, request: Request) -> None:
        """The process has run it, and found that it may go on to the next."""
        assert self.tray.put((0, request.name, 0.1, [], None), 0.1)
        self.tray.take_turn()


@pytest.fixture
def trays() -> Trays:
    return Trays(1)


def done(*requests: Request) -> list[list[str]]:
    return [request.done for request in requests]


def test_all_of_them_end(trays: Trays) -> None:
    a, b = Request("a"), Request("b")
    process = Process(trays, a, b)
    process.accept()
    process.end(a)
    process.end(b)
    process.bundle.on_success(None)
    # Who has ended is terminated no more: its process is at another one.
    assert done(a, b) == [["accepted, killed", "ended a"], ["accepted", "ended b"]]
    assert (a.took, b.took) == (0.1, 0.1)
    assert not trays.under_way


def test_nothing_is_told_before_it_is_accepted(trays: Trays) -> None:
    a, b = Request("a"), Request("b")
    process = Process(trays, a, b)
    process.end(a)
    process.bundle.withdraw()
    assert done(a, b) == [[], []]
    process.accept()
    process.end(b)
    process.bundle.on_success(None)
    assert [words[-1] for words in done(a, b)] == ["ended a", "ended b"]


def test_only_what_is_forgotten_is_recalled(trays: Trays) -> None:
    process = Process(trays, Request("a"), Request("b"))
    process.bundle.recall()
    assert process.tray.take_turns_back() == 1


def test_looked_at_while_one_takes_long(trays: Trays) -> None:
    a, b, c, d = (Request(name) for name in "abcd")
    process = Process(trays, a, b, c, d)
    process.accept()
    process.end(a)
    process.bundle.withdraw()
    process.bundle.withdraw()
    assert done(a, b, c, d) == [
        ["accepted, killed", "ended a"],
        ["accepted, killed"],  # To terminate it means it, and its process.
        ["given back"],
        ["given back"],
    ]
    assert not process.tray.take_turn()
    process.end(b)
    process.bundle.on_success(None)
    assert b.done[1:] == ["ended b"]
    assert (len(c.done), len(d.done)) == (1, 1)


def test_its_process_is_lost(trays: Trays) -> None:
    a, b, c = (Request(name) for name in "abc")
    process = Process(trays, a, b, c)
    process.accept()
    process.end(a)
    process.bundle.on_failure("lost")
    assert done(a, b, c) == [
        ["accepted, killed", "ended a"],
        ["accepted, killed", "failed lost"],
        ["given back"],
    ]
    assert not trays.under_way


def test_its_process_is_lost_before_it_began(trays: Trays) -> None:
    a, b = Request("a"), Request("b")
    Process(trays, a, b).bundle.on_failure("lost")
    assert done(a, b) == [["failed lost"], ["given back"]]


def test_one_that_the_pool_answers_for_has_no_process(trays: Trays) -> None:
    """It was to be terminated, and the process that it was on its way to has died."""
    a, b = Request("a"), Request("b")
    bundle = Process(trays, a, b).bundle
    bundle.on_accepted(os.getpid(), 0.0)
    bundle.on_failure("terminated")
    assert done(a, b) == [["accepted, killed", "failed terminated"], ["given back"]]
    assert a.child is None  # Or this process would be ended.


def test_a_tray_is_used_again(trays: Trays) -> None:
    a, b = Request("a"), Request("b")
    first = Process(trays, a, b)
    tray = first.tray
    first.accept()
    first.end(a)
    first.bundle.on_failure("lost")
    c, d = Request("c"), Request("d")
    second = Process(trays, c, d)
    assert second.tray is tray
    second.accept()
    second.end(c)
    second.end(d)
    second.bundle.on_success(None)
    assert [words[-1] for words in done(c, d)] == ["ended c", "ended d"]


def test_one_that_the_pool_forgot_has_its_tray_for_good(trays: Trays) -> None:
    a, b = Request("a"), Request("b")
    process = Process(trays, a, b)
    tray = process.tray
    process.bundle.recall()
    process.pool.results.clear()
    process.bundle.recall()
    assert tray.take_turns_back() == 0  # Before the loop comes round to it.
    process.bundle.withdraw()
    assert done(a, b) == [[], ["given back"]]
    assert not trays.under_way
    c, d = Request("c"), Request("d")
    Process(trays, c, d)
    assert done(c, d) == [["handed over alone"], ["given back"]]
    assert not trays  # So none are put together from now on.


def test_who_is_revoked_does_not_go_along(trays: Trays) -> None:
    a, b, c = Request("a"), Request("b", revoked=True), Request("c", revoked=True)
    Process(trays, a, b)
    assert done(a, b) == [["handed over alone"], []]
    with pytest.raises(TaskRevokedError):
        Process(trays, b, c)


def test_an_outcome_of_any_size(trays: Trays) -> None:
    a, b = Request("a"), Request("b")
    process = Process(trays, a, b)
    process.accept()
    process.end(a)
    large: Traced = (0, "x" * (1 << 20), 0.1, [], None)
    assert not process.tray.put(large, 0.1)
    process.bundle.on_success((large, 0.1))
    assert a.done[-1] == "ended a"
    assert len(b.done[-1]) > 1 << 20


@pytest.fixture
def passed() -> Iterator[list[tuple[list[str], str]]]:
    """Whose room is passed on to whom."""

    class Room:
        def pass_room(self, ended: list[str], heir: str) -> None:
            rooms.append((ended, heir))

    rooms: list[tuple[list[str], str]] = []
    consume_as(cast(Any, Room()))
    yield rooms
    consume_as(None)


def test_who_does_not_go_along_leaves_its_room(
    trays: Trays, passed: list[tuple[list[str], str]]
) -> None:
    a, b, c = Request("a", revoked=True), Request("b"), Request("c")
    Process(trays, a, b, c)
    assert passed == [(["a"], "b")]


class TestInTheProcess:
    """`trace_bundle`, called here."""

    def test_it_stops_where_its_turns_end(self, trays: Trays) -> None:
        process = Process(trays, Request("a"), Request("b"))
        process.tray.take_turns_back()
        ran: list[str] = []

        def trace(name: str) -> Traced:
            ran.append(name)
            return 0, name, 0.0, [], None

        assert (
            trace_bundle(process.tray.number, [(trace, ("a",), False), (trace, ("b",), False)])
            is None
        )
        assert ran == ["a"]

    def test_it_stops_where_a_chord_is_complete(
        self, trays: Trays, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process = Process(trays, *(Request(name) for name in "abc"))
        puts = 0

        def trace(name: str) -> Traced:
            nonlocal puts
            puts += 1
            return 0, name, 0.0, [], None

        monkeypatch.setattr(bundle, "puts_of_this_thread", lambda: puts)
        jobs = [(trace, (name,), name == "b") for name in "abc"]
        assert trace_bundle(process.tray.number, jobs) is None
        assert [traced[1] for traced, _ in process.tray.take()] == ["a", "b"]
