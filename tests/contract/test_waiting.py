"""Waiting for many outcomes: in bounded batches, each heard of, on a real server."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from celery import states
from celery.exceptions import TimeoutError as WaitedTooLong

from tasks import waiting
from tasks.application import configuration
from tasks.batches import App
from tasks.settings import Settings
from tasks.waiting import OutcomeConsumer
from tests.fleets import wait_for
from tests.redis_server import RedisServer

COUNT = 1600


@pytest.fixture
def app(redis_server: RedisServer) -> Iterator[App]:
    """A client."""
    app = App("tests", task_cls="tasks.job:JobTask", set_as_current=False)
    app.conf.update(configuration(Settings.read({"COHORT_REDIS": redis_server.url})))
    yield app
    app.close()


@pytest.fixture
def elsewhere(redis_server: RedisServer) -> App:
    """Where tasks end."""
    app = App("elsewhere", task_cls="tasks.job:JobTask", set_as_current=False)
    app.conf.update(configuration(Settings.read({"COHORT_REDIS": redis_server.url})))
    return app


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many channels were listened to, each time that some were added."""
    seen: list[int] = []
    listen = OutcomeConsumer._listen_to

    def counted(self: Any, task_ids: Any) -> None:
        listen(self, task_ids)
        seen.append(len(self.subscribed_to))

    monkeypatch.setattr(OutcomeConsumer, "_listen_to", counted)
    return seen


def group_of(app: App, count: int = COUNT) -> Any:
    return app.GroupResult("g", [app.AsyncResult(f"t{n}") for n in range(count)])


def end(app: App, *numbers: int, state: str = states.SUCCESS, result: Any = None) -> None:
    for n in numbers:
        app.backend.store_result(f"t{n}", n if result is None else result, state)


def consumer_of(app: App) -> Any:
    return app.backend.result_consumer


def test_nothing_is_listened_to_before_somebody_waits(app: App, most: list[int]) -> None:
    results = [app.AsyncResult(f"t{n}") for n in range(COUNT)]
    for result in results:
        result.then(print, weak=True)  # as `group` does
    assert (most, len(consumer_of(app)._unheard)) == ([], COUNT)
    del results, result
    gc.collect()
    assert not consumer_of(app)._unheard


def test_all_that_have_ended_are_found_and_none_is_listened_to(
    app: App, elsewhere: App, most: list[int]
) -> None:
    end(elsewhere, *range(COUNT))
    assert group_of(app).get(timeout=20) == list(range(COUNT))
    assert most == []


def test_those_that_end_while_it_is_waited_are_heard_of(
    app: App, elsewhere: App, most: list[int], redis_server: RedisServer
) -> None:
    end(elsewhere, *range(0, COUNT, 2))
    group = group_of(app)
    others = range(1, COUNT, 2)

    def end_others() -> None:
        wait_for(lambda: most, "it to listen")
        end(elsewhere, *others)

    thread = threading.Thread(target=end_others)
    thread.start()
    assert group.get(timeout=30) == list(range(COUNT))
    thread.join()
    assert max(most) <= 1000 + waiting._AT_ONCE // 4
    with redis_server.connect() as client:
        left: Any = client.pubsub_channels("celery-task-meta-*")
    assert len(left) <= waiting._AT_ONCE // 4


def test_one_that_ends_between_the_look_and_the_subscription(
    app: App, elsewhere: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen = OutcomeConsumer._listen_to

    def too_late(self: Any, task_ids: Any) -> None:
        end(elsewhere, *range(20))
        listen(self, task_ids)

    monkeypatch.setattr(OutcomeConsumer, "_listen_to", too_late)
    assert group_of(app, 20).get(timeout=5) == list(range(20))


def test_one_behind_all_that_take_long_is_heard_of(
    app: App, elsewhere: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "_GLANCE", 0.05)
    group = group_of(app)
    with pytest.raises(WaitedTooLong):
        group.get(timeout=0.1)
    assert "t1599" in consumer_of(app)._unheard
    end(elsewhere, 1599, state=states.FAILURE, result=ValueError("the last one"))
    with pytest.raises(ValueError, match="the last one"):
        group.get(timeout=20)


def test_one_result_is_waited_for_before_a_group(app: App, elsewhere: App) -> None:
    group = group_of(app)
    end(elsewhere, COUNT + 1)
    assert app.AsyncResult(f"t{COUNT + 1}").get(timeout=5) == COUNT + 1
    thread = threading.Timer(0.2, lambda: end(elsewhere, COUNT + 2))
    thread.start()
    assert app.AsyncResult(f"t{COUNT + 2}").get(timeout=5) == COUNT + 2
    assert not group.ready()


def test_who_waits_for_a_chord_hears_little_of_its_header(
    app: App, elsewhere: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = 0
    hear = OutcomeConsumer._hear

    def counted(self: Any) -> int:
        nonlocal heard
        heard += 1
        return hear(self)

    monkeypatch.setattr(OutcomeConsumer, "_hear", counted)
    monkeypatch.setattr(waiting, "_SHARE", 1_000_000)
    group = group_of(app)
    body = app.AsyncResult(f"t{COUNT}", parent=group)
    thread = threading.Thread(target=end, args=(elsewhere, *range(COUNT + 1)))
    thread.start()
    assert body.get(timeout=20) == COUNT
    thread.join()
    assert heard == 1
    assert group.get(timeout=20) == list(range(COUNT))


def test_parents_are_asked_about_together(
    app: App, elsewhere: App, redis_server: RedisServer
) -> None:
    end(elsewhere, *range(0, COUNT, 2))
    group = group_of(app)
    with redis_server.connect() as client:
        client.config_resetstat()
        group.maybe_throw()
        calls = {name: stat["calls"] for name, stat in client.info("commandstats").items()}
    assert calls["cmdstat_mget"] == 4
    assert "cmdstat_get" not in calls
    assert sum(one._cache is not None for one in group) == COUNT // 2
    end(elsewhere, 3, state=states.FAILURE, result=KeyError("three"))
    with pytest.raises(KeyError, match="three"):
        app.AsyncResult("body", parent=group).get(timeout=5)


def test_a_lost_connection_loses_no_outcome(
    app: App, elsewhere: App, most: list[int], redis_server: RedisServer
) -> None:
    group = group_of(app, 50)

    def cut_and_end() -> None:
        wait_for(lambda: most, "it to listen")
        with redis_server.connect() as client:
            client.client_kill_filter(_type="pubsub")
        end(elsewhere, *range(50))

    thread = threading.Thread(target=cut_and_end)
    thread.start()
    assert group.get(timeout=20) == list(range(50))
    thread.join()


@pytest.mark.parametrize("just_now", [True, False])
def test_who_waits_for_what_it_has_just_submitted_listens_before_it_looks(
    app: App, elsewhere: App, monkeypatch: pytest.MonkeyPatch, just_now: bool
) -> None:
    did: list[str] = []
    listen, look = OutcomeConsumer._listen_to, app.backend.get_task_meta

    def listening(self: Any, task_ids: Any) -> None:
        did.append("listen")
        listen(self, task_ids)
        end(elsewhere, 0, result="told")

    def looking(task_id: str, **kwargs: Any) -> Any:
        did.append("look")
        return look(task_id, **kwargs)

    monkeypatch.setattr(OutcomeConsumer, "_listen_to", listening)
    monkeypatch.setattr(app.backend, "get_task_meta", looking)
    result = app.AsyncResult("t0")
    result.submitted = time.monotonic() - (0.0 if just_now else 60.0)
    assert result.get(timeout=10) == "told"
    # It has ended since it listens: the look after that sees it.
    assert did == (["listen", "look"] if just_now else ["look", "listen", "look"])


def test_a_submission_says_when_it_was(app: App) -> None:
    @app.task(name="tests.noop")  # type: ignore[untyped-decorator]
    def noop() -> None:
        return None

    before = time.monotonic()
    assert before <= noop.delay().submitted <= time.monotonic()


def test_a_word_that_came_too_late_is_no_answer_to_the_next_question(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = app.backend.result_consumer
    consumer.start("t0")
    monkeypatch.setattr("tasks.waiting._LAST_WORD", 0.0)
    consumer._listen_to(["t1"])
    assert consumer._unsure
    asked: list[bytes] = []
    ping = consumer._pubsub.ping

    def noted(word: bytes) -> None:
        asked.append(word)
        ping(word)

    monkeypatch.setattr(consumer._pubsub, "ping", noted)
    monkeypatch.setattr("tasks.waiting._LAST_WORD", 10.0)
    for name in ("t2", "t3"):
        consumer._listen_to([name])
        assert not consumer._unsure
    assert len(asked) == 1
