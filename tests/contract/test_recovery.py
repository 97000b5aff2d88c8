"""Redis lost, and what reading the shared folder brings back: outcomes, and jobs, each once."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from broker import keys
from broker.index import Index
from broker.journal import Note, note_of, put_once
from broker.scripts import Scripts
from scheduler.recovery import Recovery
from storage import segments
from storage.segments import Entry, SegmentWriter
from tasks import recovery
from tasks.journal import entry_of
from tasks.outcomes import Outcome
from tests.broker_kit import QUEUE, Broker, message
from tests.fleets import wait_for
from tests.redis_server import RedisServer

KEEP = 3600.0
ABOUT = {"cpus": 1, "memory": 1, "host": "h", "pid": 1, "nonce": "x"}


class Lost:
    """A folder, and a Redis that knows nothing of it."""

    def __init__(self, root: Path, broker: Broker) -> None:
        self.root = root
        self.broker = broker
        self.index = Index(broker.client)

    def node(self, name: str, life: str = "life") -> SegmentWriter:
        return SegmentWriter(self.root, name, life)

    def outcome(self, task_id: str, state: str = "SUCCESS", expires: float = 3600) -> Entry:
        meta = json.dumps({"status": state, "result": task_id, "task_id": task_id}).encode()
        return Outcome(task_id, state, "", meta, expires).entry()

    def note(self, task: str, *, retries: int = 0, durable: bool = False) -> Entry:
        text = message(task, "k", retries=retries)
        note = note_of(QUEUE, QUEUE, text)
        return entry_of(Note(**{**vars(note), "durable": durable}), KEEP)

    def reindex(self) -> recovery.Reindexed:
        return recovery.reindex(self.root, self.index)

    def recover(self, *, dry_run: bool = False) -> recovery.Recovered:
        return recovery.recover(self.root, self.broker.scripts, KEEP, dry_run=dry_run)

    def queued(self) -> list[str]:
        found = self.broker.client.lrange(QUEUE, 0, -1)
        return sorted(json.loads(one)["headers"]["id"] for one in found)


@pytest.fixture
def lost(tmp_path: Path, redis_server: RedisServer) -> Iterator[Lost]:
    with redis_server.connect() as client:
        yield Lost(tmp_path, Broker(client))


def test_every_outcome_is_known_again(lost: Lost) -> None:
    for name in ("a", "b"):
        writer = lost.node(name)
        for batch in range(5):
            writer.append([lost.outcome(f"{name}-{batch}-{n}") for n in range(300)])
    lost.node("b", "next").append(
        [lost.outcome("failed", "FAILURE"), lost.outcome("over", expires=-5)]
    )
    report = lost.reindex()
    assert (report.segments, report.outcomes, report.placed) == (3, 3001, 3001)
    assert (report.torn, report.damaged) == ([], [])
    for task_id in ("a-0-0", "b-4-299", "failed"):
        placed = lost.index.find(task_id)
        assert placed is not None
        segment = lost.index.segment(placed.segment)
        assert segment is not None
        place = segments.Place(segment, placed.offset, placed.length)
        entry = segments.read_at(lost.root, place)
        assert entry is not None and entry.id == task_id
    assert lost.index.find("over") is None
    assert lost.reindex().placed == 0


def test_what_stands_in_redis_isn_t_changed(lost: Lost) -> None:
    lost.node("a").append([lost.outcome("t")])
    lost.index.place("elsewhere/s-1", [("t", 5, 5, "FAILURE", 0)])
    lost.reindex()
    placed = lost.index.find("t")
    assert placed is not None and lost.index.segment(placed.segment) == "elsewhere/s-1"


def test_of_two_outcomes_the_one_in_the_segment_written_last_stands(lost: Lost) -> None:
    first, second = lost.node("z"), lost.node("a")
    first.append([lost.outcome("t", "FAILURE")])
    second.append([lost.outcome("t")])
    assert first.path is not None
    os.utime(first.path, (1, 1))
    lost.reindex()
    placed = lost.index.find("t")
    assert placed is not None and placed.state == 1


def test_torn_and_damaged_segments_are_reported_and_read_as_far_as_they_go(lost: Lost) -> None:
    for name in ("torn", "damaged", "whole"):
        writer = lost.node(name)
        writer.append([lost.outcome(f"{name}-{n}") for n in range(3)])
        assert writer.path is not None
        data = bytearray(writer.path.read_bytes())
        if name == "torn":
            writer.path.write_bytes(data[:-7])
        if name == "damaged":
            data[len(data) // 2] ^= 1
            writer.path.write_bytes(data)
    report = lost.reindex()
    assert report.outcomes == 2 + 1 + 3
    assert [where.split(" at byte ")[0] for where in report.torn] == ["torn/life-1"]
    assert len(report.damaged) == 1 and "damaged/life-1" in report.damaged[0]


def test_a_job_comes_back_once_unless_it_has_an_outcome(lost: Lost) -> None:
    producer, node, other = lost.node("producer-1"), lost.node("n"), lost.node("o")
    producer.append([lost.note(task, durable=True) for task in ("queued", "ended", "failed")])
    node.append([lost.note(task) for task in ("ran", "done", "ignored")])
    # An outcome ends its job though it has expired itself.
    other.append([lost.outcome("ended"), lost.outcome("failed", "FAILURE", expires=-5)])
    node.append([lost.outcome("done"), Entry("ended", "ignored", 0, b"")])
    lost.reindex()
    before = lost.recover(dry_run=True)
    assert sorted(before.put_back) == ["queued", "ran"]
    assert lost.queued() == []
    report = lost.recover()
    assert sorted(report.put_back) == ["queued", "ran"] == lost.queued()
    assert (report.noted, report.ended, report.running, report.waiting) == (5, 3, 0, 0)
    again = lost.recover()
    assert (again.put_back, again.waiting) == ([], 2)
    lost.broker.scripts.register("x:1", 60, json.dumps(ABOUT))
    assert sorted(lost.broker.drain("x:1")) == ["queued", "ran"]
    lost.broker.audit()


def test_what_is_in_redis_somewhere_isn_t_put_there_again(lost: Lost) -> None:
    broker = lost.broker
    broker.scripts.register("x:1", 60, json.dumps({**ABOUT, "life": "another"}))
    tasks = ("claimed", "parked", "given back", "queued", "delayed")
    broker.put("claimed", "k")
    broker.take("x:1")
    broker.put("parked", "k")
    broker.put("given back", "j")
    claim_id, _ = broker.take("x:1")
    broker.put("delayed", due_ms=broker.now_ms() + 60_000)
    broker.put("queued")
    broker.scripts.give_back("x:1", claim_id)
    lost.node("n").append([lost.note(task) for task in tasks])
    report = lost.recover()
    assert (report.waiting, report.put_back) == (5, [])
    broker.audit()


def test_what_runs_on_a_node_that_lives_stays_there(lost: Lost) -> None:
    lost.node("n", "life").append([lost.note("runs")])
    lost.node("n", "before").append([lost.note("ran")])
    lost.broker.scripts.register("n:incarnation", 60, json.dumps({**ABOUT, "life": "life"}))
    assert lost.recover().put_back == ["ran"]
    lost.broker.expire("n:incarnation")
    assert lost.recover().put_back == ["runs"]


def test_the_last_try_is_the_one_that_comes_back(lost: Lost) -> None:
    lost.node("a").append([lost.note("t", retries=1)])
    lost.node("b").append([lost.note("t", retries=0)])
    lost.recover()
    (queued,) = lost.broker.client.lrange(QUEUE, 0, -1)
    assert json.loads(queued)["headers"]["retries"] == 1


def test_a_producer_and_the_recovery_put_one_copy_between_them(lost: Lost) -> None:
    """The note is on disk before the message is in Redis; in between it may be found."""
    lost.node("producer-1").append([lost.note("t", durable=True)])
    words = []
    note = replace(note_of(QUEUE, QUEUE, message("t", "k")), durable=True)
    barrier = threading.Barrier(2)

    def put() -> None:
        barrier.wait()
        words.append(put_once(lost.broker.scripts, note, KEEP))

    other = threading.Thread(target=put)
    other.start()
    barrier.wait()
    lost.recover()
    other.join()
    assert lost.queued() == ["t"]


def test_segments_go_when_nobody_may_ask_for_them_any_more(lost: Lost) -> None:
    old, young, lasting = lost.node("old"), lost.node("young"), lost.node("lasting")
    large = old.store_large(b"x" * 100_000)
    payload = b"S" + json.dumps({"path": large}).encode()
    old.append([lost.outcome("t", expires=-5), Entry("large", "u", 5, payload)])
    young.append([lost.outcome("v", expires=-5)])
    lasting.append([lost.outcome("w", expires=3600)])
    lost.index.place("old/life-1", [("t", 17, 1, "SUCCESS", 1)])
    month = time.time() - 30 * 86_400
    for writer in (old, lasting):
        assert writer.path is not None
        os.utime(writer.path, (month, month))
    assert recovery.drop_expired(lost.root, lost.index, KEEP) == ["old/life-1"]
    assert {path.parent.name for path in segments.list_segments(lost.root)} == {"young", "lasting"}
    assert segments.read_large(lost.root, large) is None
    assert lost.broker.client.hget(keys.SEGMENTS, "sold/life-1") is None


def test_an_empty_redis_is_found_and_filled_by_one_of_the_candidates(lost: Lost) -> None:
    lost.node("n").append([lost.outcome("done"), lost.note("ran")])
    client = lost.broker.client
    candidates = [Recovery(Scripts(client), lost.root, 0.2, KEEP) for _ in range(3)]
    listener = client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe(keys.REFILLED)

    def all_look() -> bool:
        for one in candidates:
            one.run_once()
        return lost.index.generation() is not None

    wait_for(all_look, "the recovery", 20)
    assert lost.index.find("done") is not None
    assert lost.queued() == ["ran"]
    told = [listener.get_message(timeout=1) for _ in range(3)]
    assert sum(one is not None for one in told) == 1
    listener.close()
    client.flushdb()
    wait_for(all_look, "the recovery after another loss", 20)
    assert lost.queued() == ["ran"]
