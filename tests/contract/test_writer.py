"""The node's writer: what is written when, and what a failing disk or Redis may not change."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis

from broker.claimant import End
from errors import Unavailable
from storage import segments
from storage.segments import Entry, Place, SegmentWriter
from tasks.outcomes import Outcome
from tests.fleets import wait_for
from workers import writer as writers
from workers.writer import Writer


class Log:
    """Stands for Redis: what the writer said to it, in order; it may refuse for a while."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.refusals: dict[str, int] = {}
        self.can_be_told_ahead = False
        self.forgotten: set[str] = set()

    def knows(self, claim_id: str) -> bool:
        return False  # As while its node joins again.

    def claimed(self, claim_id: str) -> str | None:
        return None if claim_id in self.forgotten else claim_id

    def say(self, what: str) -> None:
        word = what.partition(" ")[0]
        if self.refusals.get(word, 0) > 0:
            self.refusals[word] -= 1
            raise ConnectionError(word)
        self.said.append(what)

    def announce(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        self.say("announce " + " ".join(outcome.task_id for outcome in outcomes))
        return list(outcomes)

    def announce_ahead(self, outcome: Outcome) -> Callable[[], list[Outcome]] | None:
        if not self.can_be_told_ahead:
            return None
        self.say(f"ahead {outcome.task_id}")

        def heard() -> list[Outcome]:
            try:
                self.say(f"heard {outcome.task_id}")
            except ConnectionError:
                raise redis.ConnectionError("lost") from None
            return [outcome]

        return heard

    def place(self, outcomes: Sequence[Outcome], places: Sequence[Place]) -> None:
        self.say("place " + " ".join(outcome.task_id for outcome in outcomes))

    def finish_now(self, claim_ids: Sequence[str], end: End = None) -> list[str]:
        how = "" if end is None else f" as {end}"
        self.say(f"finish {' '.join(claim_ids)}{how}")
        return ["finished" for _ in claim_ids]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "_PAUSE", 0.01)
    monkeypatch.setattr(writers, "NOTED_AFTER", 0.2)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def writer(tmp_path: Path, log: Log) -> Writer:
    untyped: Any = log
    return Writer(SegmentWriter(tmp_path, "n", "life"), untyped, log, 60.0)


def outcome(task_id: str) -> Outcome:
    return Outcome(task_id, "SUCCESS", f"celery-task-meta-{task_id}", b"{}", 60.0)


def on_disk(root: Path) -> list[tuple[str, str]]:
    found = sorted(segments.list_segments(root))
    return [(entry.kind, entry.id) for path in found for entry in segments.read(path)]


def begin(writer: Writer, task_id: str, *, durable: bool = False) -> None:
    writer.begin(
        f"claim-{task_id}", task_id, lambda: Entry("journal", task_id, 0, b"x"), durable=durable
    )


@pytest.fixture
def appends_are_noted(writer: Writer, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    append = writer._segment.append

    def noting(entries: Sequence[Entry]) -> list[Place]:
        log.say("append")
        return append(entries)

    monkeypatch.setattr(writer._segment, "append", noting)


@pytest.mark.usefixtures("appends_are_noted")
def test_who_waits_is_told_before_the_disk_and_redis_acknowledges_after_it(
    writer: Writer, log: Log, tmp_path: Path
) -> None:
    for task_id in ("a", "b"):
        writer.record(outcome(task_id))
        writer.finish(task_id)
    writer.start()
    assert writer.stop(10)
    assert log.said == ["announce a b", "append", "place a b", "finish a b"]
    assert on_disk(tmp_path) == [("outcome", "a"), ("outcome", "b")]


@pytest.mark.parametrize("word", ["announce", "append", "place", "finish"])
def test_what_fails_for_a_while_is_done_once_all_the_same(
    writer: Writer, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    append = writer._segment.append

    def failing(entries: Sequence[Entry]) -> list[Place]:
        try:
            log.say("append")
        except ConnectionError:
            raise Unavailable("the disk is full") from None
        return append(entries)

    monkeypatch.setattr(writer._segment, "append", failing)
    log.refusals[word] = 3
    writer.record(outcome("a"))
    writer.finish("a")
    writer.start()
    wait_for(lambda: "finish a" in log.said, "its end", 10)
    assert writer.stop(10)
    assert log.said == ["announce a", "append", "place a", "finish a"]
    assert on_disk(tmp_path) == [("outcome", "a")]


@pytest.mark.parametrize("word", ["announce", "append", "place"])
def test_a_node_that_leaves_acknowledges_nothing_that_isn_t_on_disk(
    writer: Writer, log: Log, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    append = writer._segment.append

    def failing(entries: Sequence[Entry]) -> list[Place]:
        log.say("append")
        return append(entries)

    monkeypatch.setattr(writer._segment, "append", failing)
    log.refusals[word] = 10**9
    writer.record(outcome("a"))
    writer.finish("a")
    writer.start()
    assert not writer.stop(0.2)
    wait_for(lambda: not writer._thread.is_alive(), "the writer to give up", 10)
    assert "finish a" not in log.said


def test_a_job_that_runs_for_a_while_is_noted_and_a_short_one_isn_t(
    writer: Writer, tmp_path: Path
) -> None:
    writer.start()
    begun = time.monotonic()
    begin(writer, "long")
    begin(writer, "short")
    writer.finish("claim-short")
    wait_for(lambda: on_disk(tmp_path), "the note", 10)
    assert time.monotonic() - begun >= writers.NOTED_AFTER
    begin(writer, "ends")
    writer.end("claim-ends")
    writer.finish("claim-ends")
    writer.end("claim-long")
    writer.finish("claim-long")
    assert writer.stop(10)
    # What wasn't noted needs no end.
    assert on_disk(tmp_path) == [("journal", "long"), ("ended", "long")]


def test_what_has_gone_back_is_not_noted(writer: Writer, log: Log, tmp_path: Path) -> None:
    begin(writer, "stays")
    begin(writer, "gone")
    log.forgotten.add("claim-gone")
    writer.start()
    wait_for(lambda: on_disk(tmp_path), "the note", 10)
    assert writer.stop(10)
    assert on_disk(tmp_path) == [("journal", "stays")]
    assert not writer._unnoted


def test_a_durable_job_was_noted_by_its_producer(writer: Writer, tmp_path: Path) -> None:
    writer.start()
    begin(writer, "t", durable=True)
    writer.end("claim-t")
    writer.finish("claim-t")
    assert writer.stop(10)
    assert on_disk(tmp_path) == [("ended", "t")]


def test_notes_cause_no_writes_while_jobs_end(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    append = writer._segment.append

    def counting(entries: Sequence[Entry]) -> list[Place]:
        writes.append(len(entries))
        return append(entries)

    monkeypatch.setattr(writer._segment, "append", counting)
    monkeypatch.setattr(writers, "NOTED_AFTER", 60.0)
    writer.start()
    for n in range(50):
        begin(writer, str(n))
    assert writer.stop(10)
    assert writes == []


class TestAhead:
    """A single outcome is announced by who hears of it."""

    @pytest.fixture(autouse=True)
    def ahead(self, log: Log) -> None:
        log.can_be_told_ahead = True

    @pytest.mark.usefixtures("appends_are_noted")
    def test_before_any_other_thread_wakes(self, writer: Writer, log: Log) -> None:
        writer.record(outcome("a"))
        assert log.said == ["ahead a"]
        writer.finish("a")
        writer.start()
        assert writer.stop(10)
        # What became of it is heard before it is written, and it is written before it is finished.
        assert log.said == ["ahead a", "heard a", "append", "place a", "finish a"]

    def test_what_was_not_heard_is_announced_again(
        self, writer: Writer, log: Log, tmp_path: Path
    ) -> None:
        log.refusals = {"heard": 1, "announce": 2}
        writer.record(outcome("a"))
        writer.finish("a")
        writer.start()
        wait_for(lambda: "finish a" in log.said, "its end", 10)
        assert writer.stop(10)
        assert log.said == ["ahead a", "announce a", "place a", "finish a"]
        assert on_disk(tmp_path) == [("outcome", "a")]

    def test_one_of_many_goes_with_the_others(
        self, writer: Writer, log: Log, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writers, "_APART", 60.0)
        for task_id in ("a", "b", "c"):
            writer.record(outcome(task_id))
        writer.start()
        assert writer.stop(10)
        assert log.said[0] == "ahead a"
        assert "announce b c" in log.said

    def test_nothing_overtakes_what_is_on_its_way(
        self, writer: Writer, log: Log, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writers, "_APART", 0.0)
        log.can_be_told_ahead = False
        log.refusals["announce"] = 20
        writer.start()
        writer.record(outcome("a"))
        writer.finish("a")
        log.can_be_told_ahead = True
        writer.record(outcome("b"))
        writer.finish("b")
        wait_for(lambda: log.said and log.said[-1].startswith("finish"), "their ends", 10)
        assert writer.stop(10)
        said = " | ".join(log.said)
        assert "ahead" not in said
        assert said.index("announce a") < said.index("place a") < said.index("finish a")

    def test_a_node_that_leaves_acknowledges_nothing_that_was_not_heard(
        self, writer: Writer, log: Log
    ) -> None:
        log.refusals = {"heard": 1, "announce": 10**9}
        writer.record(outcome("a"))
        writer.finish("a")
        writer.start()
        assert not writer.stop(0.2)
        wait_for(lambda: not writer._thread.is_alive(), "the writer to give up", 10)
        assert log.said == ["ahead a"]


@pytest.mark.parametrize(("keyed", "gathers"), [(True, 60.0), (False, 0.5)])
def test_the_end_of_a_key_s_claim_waits_for_no_others(
    writer: Writer, log: Log, monkeypatch: pytest.MonkeyPatch, keyed: bool, gathers: float
) -> None:
    monkeypatch.setattr(writers, "_WRITTEN_AFTER", gathers)
    writer.start()
    writer.begin("claim", "a", lambda: Entry("journal", "a", 0, b"x"), durable=False, keyed=keyed)
    begun = time.monotonic()
    writer.record(outcome("a"))
    writer.finish("claim")
    wait_for(lambda: "finish claim" in log.said, "its end", 30)
    assert keyed or time.monotonic() - begun >= gathers
    assert writer.stop(10)
    assert not writer._awaited


def test_very_many_wait_for_no_others(
    writer: Writer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be all that there are: as many as the node runs at once."""
    monkeypatch.setattr(writers, "_GATHER", 60.0)
    monkeypatch.setattr(writers, "_WRITTEN_AFTER", 60.0)
    for number in range(writers._MANY):
        writer.record(outcome(str(number)))
        writer.finish(str(number))
    writer.start()
    wait_for(lambda: len(log.said) == 3, "their ends", 10)
    assert writer.stop(10)
