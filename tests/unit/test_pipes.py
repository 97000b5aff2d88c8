"""What is written to a pool's processes at once, and in one piece."""

from __future__ import annotations

import os
import pickle
import select
import struct
import threading
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.request import in_one_write
from workers import pipes
from workers.pipes import hear_who_speaks


def payload(size: int) -> Any:
    """As Celery's pool prepares it."""
    body = pickle.dumps(b"x" * size)
    header = struct.pack(">I", len(body))
    return SimpleNamespace(_payload=(memoryview(header), memoryview(body), len(body)))


def pieces(result: Any) -> list[bytes]:
    """What Celery writes, call by call."""
    header, body, size = result._payload
    written = [bytes(header)]
    assert len(header) >= 4
    if size:
        written.append(bytes(body))
    return written


@pytest.mark.parametrize("size", [0, 1, 1000, 4000])
def test_a_small_job_is_one_piece(size: int) -> None:
    before = b"".join(pieces(payload(size)))
    (whole,) = pieces(in_one_write(payload(size)))
    assert whole == before


def test_it_goes_into_a_pipe_whole_or_not_at_all() -> None:
    for size in range(select.PIPE_BUF - 40, select.PIPE_BUF + 40):
        first = pieces(in_one_write(payload(size)))[0]
        assert len(first) <= select.PIPE_BUF
        reader, writer = os.pipe2(os.O_NONBLOCK)
        try:
            assert os.write(writer, first) == len(first)
        finally:
            os.close(reader)
            os.close(writer)


def test_a_large_one_stays_as_it_is() -> None:
    large = payload(5000)
    before = large._payload
    assert in_one_write(large)._payload == before


@pytest.mark.parametrize("result", [None, SimpleNamespace()])
def test_other_pools_have_no_pipes(result: Any) -> None:
    assert in_one_write(result) is result


class Told:
    """Stands for a worker with a prefork pool, and its loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, waiting: int, busy: set[int]) -> None:
        self.did: list[Any] = []
        self.pool = SimpleNamespace(
            outbound_buffer=deque(range(waiting)),
            _all_inqueues={1, 2, 3, 4},
            _active_writes={4},
            _busy_workers=busy,
        )
        dispatcher = SimpleNamespace(flush=lambda: self.did.append("events"))
        worker = SimpleNamespace(
            pool=SimpleNamespace(_pool=self.pool),
            consumer=SimpleNamespace(event_dispatcher=dispatcher),
        )
        hub = SimpleNamespace(consolidate_callback=self.did.append)
        monkeypatch.setattr(pipes, "has_processes", lambda pool: True)
        monkeypatch.setattr(pipes, "get_event_loop", lambda: hub)
        write = pipes.writing_at_once(worker)
        assert write is not None
        write()


@pytest.mark.parametrize(
    ("waiting", "busy", "written"),
    [(0, set(), 0), (1, set(), 1), (5, set(), 3), (5, {1}, 2), (2, {1, 2, 3}, 0)],
)
def test_idle_processes_get_what_waits(
    monkeypatch: pytest.MonkeyPatch, waiting: int, busy: set[int], written: int
) -> None:
    told = Told(monkeypatch, waiting, busy)
    if not written:
        assert told.did == []
        return
    # What is told of a job goes first: a job that runs already must be one that can be stopped.
    events, to = told.did
    assert events == "events"
    assert len(to) == written
    assert not set(to) & (busy | {4})


def test_a_pool_without_processes_has_no_pipes() -> None:
    assert pipes.writing_at_once(SimpleNamespace(pool=object())) is None


class TestAnEndingPool:
    """It hears at once of a job that has ended, and looks at nobody else before."""

    @pytest.fixture
    def made(self) -> Iterator[list[tuple[int, int]]]:
        pipes = [os.pipe() for _ in range(3)]
        yield pipes
        for pipe in pipes:
            for end in pipe:
                os.close(end)

    def pool(self, hub: Any = None) -> tuple[Any, list[int]]:
        read: list[int] = []
        handler = SimpleNamespace(_hub=hub, _flush_outqueue=lambda pipe, *_: read.append(pipe))
        return SimpleNamespace(_pool=SimpleNamespace(_result_handler=handler)), read

    def look(self, pool: Any, made: list[tuple[int, int]]) -> None:
        index = {reader: None for reader, _ in made}
        for reader in index:
            pool._pool._result_handler._flush_outqueue(reader, None, index, None)

    def test_it_reads_who_speaks(self, made: list[tuple[int, int]]) -> None:
        pool, read = self.pool()
        hear_who_speaks(pool)
        os.write(made[2][1], b"x")
        self.look(pool, made)
        assert read == [made[2][0]]

    def test_it_waits_for_all_of_them(
        self, made: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pipes, "_A_LOOK", 600.0)
        pool, read = self.pool()
        hear_who_speaks(pool)
        speaks = threading.Timer(0.1, os.write, (made[1][1], b"x"))
        speaks.start()
        self.look(pool, made)
        speaks.join()
        assert read == [made[1][0]]

    def test_what_is_half_read_and_who_is_gone_are_celerys(
        self, made: list[tuple[int, int]]
    ) -> None:
        def half() -> Iterator[None]:
            yield

        hub = SimpleNamespace(readers={made[0][0]: (half(), ())})
        pool, read = self.pool(hub)
        hear_who_speaks(pool)
        flush = pool._pool._result_handler._flush_outqueue
        flush(made[0][0], None, {made[0][0]: None}, None)
        flush(made[1][0], None, {}, None)
        assert read == [made[0][0], made[1][0]]

    def test_a_pool_without_processes_is_left_alone(self) -> None:
        hear_who_speaks(SimpleNamespace())
