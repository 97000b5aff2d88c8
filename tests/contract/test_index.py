"""The index of outcomes on a real server: who stands first, where it lies, and how small it is."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator

import pytest

from broker import keys
from broker.index import Announcement, Index, Standing
from errors import Unavailable
from tests.fleets import wait_for
from tests.redis_server import RedisServer

NAME = "celery-task-meta-t"
NEVER = 0
LONG_AGO = 1_000_000_000
LATER = int(time.time()) + 86_400


@pytest.fixture
def index(redis_server: RedisServer) -> Iterator[Index]:
    with redis_server.connect() as client:
        yield Index(client)


def meta(state: str, number: int = 0) -> bytes:
    return json.dumps({"status": state, "result": number, "task_id": "t"}).encode()


def announce(
    index: Index, state: str, number: int = 0, *, seconds: float = 60, expires: int = LATER
) -> Standing:
    final = (state, expires) if state in ("SUCCESS", "FAILURE", "REVOKED") else None
    about = Announcement("t", NAME, meta(state, number), final)
    return index.announce([about], seconds)[0]


def test_many_are_announced_each_on_its_own(index: Index) -> None:
    def some(number: int) -> list[Announcement]:
        return [
            Announcement(str(n), f"celery-task-meta-{n}", meta("SUCCESS", number), final)
            for n in range(100)
            for final in [("SUCCESS", LATER)]
        ]

    assert [s.word for s in index.announce(some(1)[::2], 60)] == ["announced"] * 50
    index.place("node/start-1", [(str(n), 1, 1, "SUCCESS", LATER) for n in range(0, 100, 4)])
    words = [standing.word for standing in index.announce(some(2), 60)]
    assert words == ["kept", "announced", "adopt", "announced"] * 25


def test_the_first_final_outcome_stands_before_and_after_it_is_on_disk(index: Index) -> None:
    assert announce(index, "STARTED").word == "announced"
    assert announce(index, "SUCCESS", 1).word == "announced"
    # A second run, whose node must write the first one's outcome: its own may never get there.
    assert announce(index, "FAILURE", 2) == ("adopt", meta("SUCCESS", 1))
    assert announce(index, "STARTED").word == "adopt"
    index.place("node/start-1", [("t", 17, 300, "SUCCESS", LATER)])
    assert announce(index, "FAILURE", 2).word == "kept"
    assert index.client.get(NAME) == meta("SUCCESS", 1)
    index.client.delete(NAME)
    for state in ("STARTED", "SUCCESS", "REVOKED"):
        assert announce(index, state, 3).word == "kept"
    assert index.client.get(NAME) is None


@pytest.mark.parametrize("final", ["SUCCESS", "FAILURE", "REVOKED"])
def test_states_on_the_way_replace_each_other_and_no_final_one(index: Index, final: str) -> None:
    for state in ("STARTED", "PROGRESS", "RETRY", "STARTED", final):
        assert announce(index, state).word == "announced"
    for state in ("SUCCESS", "FAILURE", "REVOKED", "STARTED"):
        assert announce(index, state, 1) == ("adopt", meta(final))
    assert index.client.get(NAME) == meta(final)


def test_who_waits_is_told_once(index: Index) -> None:
    with index.client.pubsub() as listener:
        listener.subscribe(NAME)
        assert (listener.get_message(timeout=5) or {})["type"] == "subscribe"
        announce(index, "SUCCESS")
        announce(index, "FAILURE")
        listener.subscribe("the end")
        told = [listener.get_message(timeout=5) or {} for _ in range(2)]
    assert told[0]["data"] == meta("SUCCESS")
    assert told[1]["type"] == "subscribe"


@pytest.mark.parametrize(
    ("seconds", "least", "most"), [(60, 50_000, 60_000), (0.5, 1, 500), (0, -1, -1)]
)
def test_it_lives_as_long_as_it_was_told(
    index: Index, seconds: float, least: int, most: int
) -> None:
    announce(index, "SUCCESS", seconds=seconds)
    assert least <= index.client.pttl(NAME) <= most
    index.client.delete(NAME)  # By the settings, every outcome expires.


@pytest.mark.parametrize("held", [b"", b"nonsense", b"7", b"null", b'{"status": null}'])
def test_what_is_no_outcome_is_replaced(index: Index, held: bytes) -> None:
    index.client.set(NAME, held)
    assert announce(index, "SUCCESS").word == "announced"


def test_a_lost_reply_is_no_second_outcome(index: Index) -> None:
    assert [announce(index, "SUCCESS", 1).word for _ in range(2)] == ["announced"] * 2


def test_what_nobody_wrote_down_in_time_is_open_again(index: Index) -> None:
    announce(index, "SUCCESS", 1, seconds=0.001)
    wait_for(lambda: index.client.get(NAME) is None, "it to lapse")
    found = index.find("t")
    assert found is not None and found.segment == 0
    assert announce(index, "FAILURE", 2).word == "announced"


def test_an_expired_outcome_makes_room_for_another(index: Index) -> None:
    index.place("node/start-1", [("t", 17, 300, "SUCCESS", LONG_AGO)])
    assert announce(index, "FAILURE", 2).word == "announced"
    index.place("node/start-1", [("t", 400, 300, "FAILURE", LATER)])
    found = index.find("t")
    assert found is not None and found[1:] == (400, 300, 2, LATER)


def test_outcomes_are_found_where_they_were_placed(index: Index) -> None:
    ids = [str(uuid.uuid4()) for _ in range(3000)] + ["any text", "ü", "x" * 200]
    for segment in (1, 2):
        entries = [
            (i, n, n + 1, "FAILURE", NEVER) for n, i in enumerate(ids) if n % 2 == segment - 1
        ]
        assert index.place(f"node/start-{segment}", entries) == len(entries)
        assert index.place(f"node/start-{segment}", entries) == 0
    for n, (task_id, found) in enumerate(zip(ids, index.find_many(ids), strict=True)):
        assert found == index.find(task_id)
        assert found is not None and found[1:] == (n, n + 1, 2, NEVER)
        assert index.segment(found.segment) == f"node/start-{1 + n % 2}"
    assert index.find("unknown") is None
    index.forget(ids[7])
    assert index.find(ids[7]) is None and index.find(ids[8]) is not None


def test_segments_get_new_numbers_after_a_loss(index: Index, redis_server: RedisServer) -> None:
    index.place("a/s-1", [("one", 1, 1, "SUCCESS", NEVER)])
    index.place("b/s-1", [("two", 1, 1, "SUCCESS", NEVER)])
    assert [index.segment(n) for n in (1, 2, 3)] == ["a/s-1", "b/s-1", None]
    redis_server.wipe()
    index.place("b/s-1", [("two", 1, 1, "SUCCESS", NEVER)])
    assert index.segment(1, again=True) == "b/s-1"
    index.drop("b/s-1")
    assert index.segment(1, again=True) is None


def test_sweeping_takes_what_has_expired_and_nothing_else(index: Index) -> None:
    ids = [str(n) for n in range(2000)]
    index.place("a/s-1", [(i, 1, 1, "SUCCESS", LONG_AGO) for i in ids[:900]])
    index.place("a/s-1", [(i, 1, 1, "SUCCESS", LATER) for i in ids[900:1500]])
    index.place("a/s-1", [(i, 1, 1, "SUCCESS", NEVER) for i in ids[1500:]])
    assert sum(index.sweep()) == 900
    assert [found is None for found in index.find_many(ids)] == [True] * 900 + [False] * 1100
    assert sum(index.sweep()) == 0


def test_an_outcome_held_takes_less_than_150_bytes(index: Index) -> None:
    # Fewer than the million of the benchmark: then a bucket's own cost weighs more, not less.
    count = 200_000
    before = index.client.info("memory")["used_memory"]
    index.place("a/s-1", ((str(n), n, 600, "SUCCESS", LATER) for n in range(count)))
    used = (index.client.info("memory")["used_memory"] - before) / count
    assert used < 150, used
    assert index.client.object("encoding", keys.outcomes(0)) == b"listpack"


def test_a_filling_that_lost_its_redis_says_so(index: Index, redis_server: RedisServer) -> None:
    filling = index.fill()
    filling.add("a/s-1", [(b"t", 17, 300, 1, 0)])
    redis_server.wipe()
    index.place("b/s-1", [("u", 1, 1, "SUCCESS", NEVER)])
    # The number that the entry has would be another segment's now.
    with pytest.raises(Unavailable, match="emptied"):
        filling.end()
    assert index.find("t") is None
    assert not index.is_filled()


def test_it_knows_whether_it_was_filled(index: Index, redis_server: RedisServer) -> None:
    assert index.generation() is None
    index.now_known("g")
    assert index.generation() == b"g"
    redis_server.wipe()
    assert index.generation() is None
