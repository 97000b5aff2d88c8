"""The result backend, with a node's writer, on a real Redis and a real folder; no workers."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult, GroupResult

from errors import Damaged, Unavailable
from storage.directory import Directory
from storage.segments import SegmentWriter, list_segments, read
from tasks import results
from tasks.application import configuration
from tasks.results import SharedResults, collected_outcomes
from tasks.settings import Settings
from tests.fleets import wait_for
from tests.redis_server import RedisServer
from workers.writer import Writer


class NoClaims:
    """Nothing is claimed here; claims have their own tests."""

    def finish_now(self, claim_id: str) -> str:
        return "finished"

    def give_back(self, claim_id: str, *, lost: bool) -> None:
        return None


@dataclass
class World:
    """A folder, a Redis, and as many nodes and clients as a test wants."""

    root: Path
    redis: RedisServer

    def app(self, root: Path | None = None, **settings: str) -> Celery:
        app = Celery("tests", set_as_current=False)
        environ = {"COHORT_REDIS": self.redis.url, **settings}
        if root is not None:
            environ["COHORT_ROOT"] = str(root)
        app.conf.update(configuration(Settings.read(environ)))
        return app

    @contextlib.contextmanager
    def node(self, name: str) -> Iterator[tuple[SharedResults, Writer]]:
        backend: SharedResults = self.app(self.root).backend
        writer = Writer(SegmentWriter(self.root, name, "life"), NoClaims(), backend)  # type: ignore[arg-type]
        writer.start()
        yield backend, writer
        assert writer.stop(10)

    def ends(self, name: str, act: Callable[[SharedResults], object]) -> None:
        """What a run on that node stores goes through its writer, as from a child."""
        with self.node(name) as (backend, writer), collected_outcomes() as outcomes:
            act(backend)
            for outcome in outcomes:
                writer.record(outcome)

    def cool(self) -> None:
        """Time passes: Redis holds no outcome itself any more."""
        with self.redis.connect() as client:
            for key in list(client.scan_iter("celery-task-meta-*")):
                client.delete(key)

    def kinds(self) -> list[str]:
        return [entry.kind for path in list_segments(self.root) for entry in read(path)]


@pytest.fixture
def world(tmp_path: Path, redis_server: RedisServer) -> Iterator[World]:
    yield World(tmp_path / "root", redis_server)
    gc.collect()  # results unsubscribe as they go, which needs their Redis


@pytest.fixture(autouse=True)
def a_folder(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()


def request(task_id: str, **fields: Any) -> Context:
    return Context(
        {"id": task_id, "task": "tests.job", "args": [1], "kwargs": {"b": 2}, "retries": 1}
        | {"hostname": "node-1", "delivery_info": {"routing_key": "celery"}, **fields}
    )


def test_an_outcome_is_read_from_the_folder_once_redis_has_let_it_go(world: World) -> None:
    child = AsyncResult("child", backend=None, app=world.app())
    about = request("t", group="g", parent_id="p", _children=[child])
    world.ends("n", lambda b: b.mark_as_done("t", {"x": [1, 2]}, request=about))
    client = world.app(world.root)
    hot = client.AsyncResult("t")._get_task_meta()
    world.cool()
    result = client.AsyncResult("t")
    fresh = world.app(world.root).AsyncResult("t")
    assert fresh.get(timeout=5) == {"x": [1, 2]}
    assert (fresh.state, fresh.name, fresh.args, fresh.kwargs) == (
        *("SUCCESS", "tests.job", [1]),
        {"b": 2},
    )
    assert (fresh.retries, fresh.worker, fresh.queue) == (1, "node-1", "celery")
    assert [kid.id for kid in fresh.children] == ["child"]
    cold = fresh._get_task_meta()
    assert {**cold, "children": 0} == {**hot, "children": 0}
    assert (cold["group_id"], cold["parent_id"]) == ("g", "p")
    assert result.date_done is not None


def test_a_failure_keeps_its_type_and_traceback(world: World) -> None:
    world.ends("n", lambda b: b.mark_as_failure("t", ValueError("no"), traceback="Traceback: no"))
    world.ends("n2", lambda b: b.mark_as_revoked("r", "why", request=request("r")))
    world.cool()
    app = world.app(world.root)
    with pytest.raises(ValueError, match="no"):
        app.AsyncResult("t").get(timeout=5)
    assert app.AsyncResult("t").traceback == "Traceback: no"
    assert app.AsyncResult("r").state == "REVOKED"
    with pytest.raises(TaskRevokedError):
        app.AsyncResult("r").get(timeout=5)


def test_without_the_folder_it_says_what_to_set(world: World) -> None:
    world.ends("n", lambda b: b.mark_as_done("t", 1, request=request("t")))
    without = world.app()
    assert without.AsyncResult("t").get(timeout=5) == 1  # Redis holds it for a while.
    world.cool()
    with pytest.raises(Unavailable, match=r"result of task t .* set COHORT_ROOT"):
        world.app().AsyncResult("t").get(timeout=5)


def test_the_first_final_outcome_stands_on_every_node_and_on_disk(world: World) -> None:
    with world.node("a") as (backend, writer), world.node("b") as (other, second):
        with collected_outcomes() as outcomes:
            backend.store_result("t", 1, "SUCCESS")
        # Announced, and then its node dies before it is written.
        assert backend.announce(outcomes) == outcomes
        with collected_outcomes() as late:
            other.store_result("t", RuntimeError("late"), "FAILURE")
        second.record(late[0])
        placed = wait_for(lambda: other.index.find("t"), "its entry")
        if placed is not None and placed.segment == 0:
            wait_for(lambda: other.index.find("t") != placed, "the other node to write it")
        writer.record(outcomes[0])
        other.store_result("t", {}, "STARTED")
    world.cool()
    result = world.app(world.root).AsyncResult("t")
    assert (result.state, result.result) == ("SUCCESS", 1)
    assert world.kinds().count("outcome") == 1


def test_a_keyed_outcome_is_a_pointer_to_its_commit_record(world: World) -> None:
    directory = Directory.open(world.root, "k")
    record = directory.conclude_for("t", "c", "FAILURE", {
        "exc_type": "ValueError", "exc_message": ["lost"], "exc_module": "builtins"
    }, attempt=1, node="n")  # fmt: skip

    def end(backend: SharedResults) -> None:
        results.committed_as("t", "k", record.n)
        backend.mark_as_failure("t", ValueError("lost"), traceback="tb", request=request("t"))

    world.ends("n", end)
    assert world.kinds() == ["pointer"]
    (path,) = list_segments(world.root)
    assert b"ValueError" not in path.read_bytes()
    world.cool()
    result = world.app(world.root).AsyncResult("t")
    with pytest.raises(ValueError, match="lost"):
        result.get(timeout=5)
    assert (result.state, result.traceback, result.name) == ("FAILURE", "tb", "tests.job")


@pytest.mark.parametrize("size", [200_000, 3_000_000])
def test_a_large_outcome_has_a_file_of_its_own(world: World, size: int) -> None:
    app = world.app(world.root)
    waiting = app.AsyncResult("t")
    waiting.then(lambda result: None)  # subscribes
    world.ends("n", lambda b: b.mark_as_done("t", "x" * size, request=request("t")))
    assert waiting.get(timeout=5) == "x" * size
    assert world.kinds() == ["large"]
    (path,) = list_segments(world.root)
    assert path.stat().st_size < 2000
    world.cool()
    assert world.app(world.root).AsyncResult("t").get(timeout=5) == "x" * size
    with world.redis.connect() as client:
        assert client.info("memory")["used_memory"] < 2_900_000 + min(size, 1 << 20)


def test_a_large_outcome_that_changed_is_not_believed(world: World) -> None:
    world.ends("n", lambda b: b.mark_as_done("t", "x" * 200_000, request=request("t")))
    world.cool()
    (path,) = (world.root / "segments/n/large").iterdir()
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match="large/life-1: length or checksum"):
        world.app(world.root).AsyncResult("t").get(timeout=5)


def test_a_reader_notices_that_segments_have_new_numbers(world: World) -> None:
    for name in ("a", "b"):
        world.ends(name, lambda b, name=name: b.mark_as_done(name, name, request=request(name)))  # type: ignore[misc]
    world.cool()
    app = world.app(world.root)
    assert [app.AsyncResult(name).get(timeout=5) for name in ("a", "b")] == ["a", "b"]
    world.redis.wipe()
    for name in ("b", "a"):  # the other way round
        (path,) = [path for path in list_segments(world.root) if path.parent.name == name]
        ((_, _, _, offset, length, _),) = read(path).scan()
        app.backend.index.place(f"{name}/life-1", [(name, offset, length, "SUCCESS", 0)])
    app.backend._cache.clear()
    assert [app.AsyncResult(name).get(timeout=5) for name in ("a", "b")] == ["a", "b"]


def test_waiting_is_pushed_also_when_nobody_had_subscribed_at_first(world: World) -> None:
    app = world.app(world.root)
    with world.node("n") as (backend, writer):
        with collected_outcomes() as outcomes:
            backend.mark_as_done("t", 5, request=request("t"))
        result = app.AsyncResult("t")
        told: list[Any] = []
        result.then(told.append)
        with world.redis.connect() as client:
            before = client.info("commandstats")["cmdstat_get"]["calls"]
            for outcome in outcomes:
                writer.record(outcome)
            assert result.get(timeout=5, on_interval=lambda: None) == 5
            asked = client.info("commandstats")["cmdstat_get"]["calls"] - before
    assert told == [result]
    assert asked <= 4


def test_forgetting(world: World) -> None:
    world.ends("n", lambda b: b.mark_as_done("t", 1, request=request("t")))
    app = world.app(world.root)
    assert app.AsyncResult("t").get(timeout=5) == 1
    app.AsyncResult("t").forget()
    assert world.app(world.root).AsyncResult("t").state == "PENDING"


def test_states_on_the_way_and_custom_ones(world: World) -> None:
    app = world.app(world.root)
    backend = app.backend
    backend.store_result("t", {"done": 1, "total": 3}, "PROGRESS")
    assert app.AsyncResult("t").state == "PROGRESS"
    assert app.AsyncResult("t").info == {"done": 1, "total": 3}
    world.ends("n", lambda b: b.mark_as_done("t", 1, request=request("t")))
    backend.store_result("t", {"done": 2, "total": 3}, "PROGRESS")
    assert world.app(world.root).AsyncResult("t").state == "SUCCESS"
    world.cool()
    backend.store_result("t", {"done": 3, "total": 3}, "PROGRESS")
    assert world.app(world.root).AsyncResult("t").state == "SUCCESS"


def test_groups_are_saved_and_restored_and_read_from_the_folder(world: World) -> None:
    def end(backend: SharedResults) -> None:
        for n in range(50):
            backend.mark_as_done(f"t{n}", n, request=request(f"t{n}"))

    world.ends("n", end)
    world.cool()
    app = world.app(world.root)
    GroupResult("g", [app.AsyncResult(f"t{n}") for n in range(50)], app=app).save()
    restored = GroupResult.restore("g", app=world.app(world.root))
    assert restored.get(timeout=5) == list(range(50))
    many = dict(world.app(world.root).backend.get_many([f"t{n}" for n in range(50)], timeout=5))
    assert {task_id: meta["result"] for task_id, meta in many.items()} == {
        f"t{n}": n for n in range(50)
    }


def test_a_header_task_that_runs_twice_counts_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = world.app(world.root)
    sent: list[Any] = []

    @app.task(name="tests.body")  # type: ignore[untyped-decorator]
    def body(numbers: list[int]) -> None: ...

    monkeypatch.setattr(type(body), "delay", None, raising=False)
    backend = app.backend
    backend.set_chord_size("g", 3)
    monkeypatch.setattr(
        app.amqp.__class__, "_retry_publish", lambda self, send, result: sent.append(result)
    )
    parts = [
        request(f"t{n}", group="g", group_index=n, chord=body.s().set(task_id="b"))
        for n in range(3)
    ]
    for part in (parts[0], parts[0], parts[1], parts[0], parts[1]):
        backend.mark_as_done(part.id, f"result {part.id}", request=part)
    assert sent == []
    backend.mark_as_done("t2", "result t2", request=parts[2])
    backend.mark_as_done("t2", "again", request=parts[2])
    assert sent == [["result t0", "result t1", "result t2"]]


def test_waiting_for_a_chord_isn_t_quadratic(world: World) -> None:
    count = 200
    app = world.app(world.root)
    header = GroupResult("g", [app.AsyncResult(f"t{n}") for n in range(count)], app=app)
    result = app.AsyncResult("b", parent=header)

    class Ends:
        """Celery looks at the parents at each message: here the next part ends then."""

        done = 0

        def __call__(self, *args: Any) -> None:
            if self.done < count:
                backend.store_result(f"t{self.done}", self.done, "SUCCESS")
            elif self.done == count:
                backend.store_result("b", "end", "SUCCESS")
            self.done += 1

    backend = world.app(world.root).backend
    ends = Ends()
    result.then(lambda _: None)

    def begin(*_: Any) -> None:
        if not ends.done:
            ends()

    with world.redis.connect() as client:
        client.get("one is counted")
        before = client.info("commandstats")["cmdstat_get"]["calls"]
        assert result.get(timeout=30, on_message=ends, on_interval=begin) == "end"
        asked = client.info("commandstats")["cmdstat_get"]["calls"] - before
    assert asked < 12 * count  # Stock: some 20,000.


def test_a_wrong_entry_is_reported_not_believed(world: World) -> None:
    world.ends("n", lambda b: b.mark_as_done("t", 1, request=request("t")))
    (path,) = list_segments(world.root)
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    world.cool()
    with pytest.raises(Damaged, match="no whole entry at byte 17"):
        world.app(world.root).AsyncResult("t").get(timeout=5)
    os.unlink(path)
    assert world.app(world.root).AsyncResult("t").state == "PENDING"


def test_what_a_client_revoked_reaches_the_disk(world: World) -> None:
    """Until then Redis alone knew of it, and a job put back after its loss would have run."""
    client: SharedResults = world.app().backend
    assert client.settle("t", "revoked")
    assert client.get_state("t") == "REVOKED"
    with world.node("n") as (backend, writer):
        results.record_with(writer.record)
        try:
            assert backend.write_down(["t", "nobody"]) == 1
            wait_for(lambda: backend.write_down(["t"]) == 0, "the outcome on disk")
        finally:
            results.record_with(None)
    world.cool()
    reader: SharedResults = world.app(world.root).backend
    assert isinstance(reader.app.AsyncResult("t").result, TaskRevokedError)
