"""Commands that one thread sends and another reads the replies to, on a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from broker import ahead
from broker.ahead import Ahead
from tests.redis_server import RedisServer


@pytest.fixture
def line(redis_server: RedisServer) -> Ahead:
    line = Ahead(redis_server.connect())
    line.open()
    return line


def sent(line: Ahead, *command: Any) -> Callable[[], Any]:
    reply = line.send(command)
    assert reply is not None
    return reply


def kill_connections(server: RedisServer) -> None:
    with server.connect() as client:
        client.client_kill_filter(_type="normal", skipme=True)


def test_it_is_done_before_anybody_reads(redis_server: RedisServer, line: Ahead) -> None:
    replies = [sent(line, "RPUSH", "ahead", n) for n in range(3)]
    with redis_server.connect() as client:
        deadline = time.monotonic() + 10
        while client.llen("ahead") < 3:
            assert time.monotonic() < deadline
        client.delete("ahead")
    assert [reply() for reply in replies] == [1, 2, 3]


def test_what_the_server_refuses_is_heard_and_the_next_isn_t_mixed_up(line: Ahead) -> None:
    wrong, right = sent(line, "EVALSHA", "0" * 40, 0), sent(line, "ECHO", "b")
    with pytest.raises(redis.ResponseError):
        wrong()
    assert right() == b"b"


def test_a_lost_connection_is_heard_of_for_each_and_never_used_again(
    redis_server: RedisServer, line: Ahead
) -> None:
    first, second = sent(line, "BLPOP", "nothing", 0), sent(line, "ECHO", "b")
    kill_connections(redis_server)
    for reply in (first, second):
        with pytest.raises(redis.ConnectionError):
            reply()
    assert line.send(["ECHO", "c"]) is None
    line.open()
    assert sent(line, "ECHO", "c")() == b"c"


def test_nothing_is_sent_that_might_not_fit_the_socket(line: Ahead) -> None:
    assert line.send(["ECHO", "x" * 5000]) is None
    replies = [sent(line, "ECHO", n) for n in range(ahead._UNREAD)]
    assert line.send(["ECHO", "one more"]) is None
    assert [reply() for reply in replies] == [str(n).encode() for n in range(ahead._UNREAD)]
    assert sent(line, "ECHO", "again")() == b"again"


def test_who_sends_waits_for_nobody(line: Ahead) -> None:
    with line._guard:  # Whoever has it, maybe this very thread further up.
        assert line.send(["ECHO", "a"]) is None


def test_one_thread_sends_while_another_reads(line: Ahead) -> None:
    replies: list[Callable[[], Any]] = []
    more = threading.Event()

    def send() -> None:
        for n in range(300):
            while (reply := line.send(["ECHO", n])) is None:
                more.wait(0.001)
            replies.append(reply)

    sending = threading.Thread(target=send)
    sending.start()
    heard: list[int] = []
    deadline = time.monotonic() + 20
    while len(heard) < 300:
        assert time.monotonic() < deadline
        if len(replies) > len(heard):
            heard.append(int(replies[len(heard)]()))
    sending.join()
    assert heard == list(range(300))
