"""The bad network: it forwards faithfully, and cuts, pauses, delays and refuses when told to."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from deploy.chaos.proxy import Proxy
from tests.processes import wait_until


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that says everything back."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    port: int = server.getsockname()[1]
    yield port
    server.shutdown(socket.SHUT_RDWR)
    server.close()


@pytest.fixture
def proxy(echo: int) -> Iterator[Proxy]:
    with Proxy(echo) as running:
        yield running


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def say(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return hear(connection, len(data))


def hear(connection: socket.socket, size: int) -> bytes:
    heard = b""
    while len(heard) < size:
        more = connection.recv(size - len(heard))
        if not more:
            return heard
        heard += more
    return heard


def is_cut(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"?")
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_it_forwards_everything_both_ways(proxy: Proxy) -> None:
    data = random.Random(1).randbytes(3_000_000)
    with connect(proxy) as connection:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        assert hear(connection, len(data)) == data
        sender.join()
        assert proxy.connections == 1
    wait_until(lambda: proxy.connections == 0)


def test_one_connection_is_cut_and_the_other_goes_on(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        assert say(one, b"a") == say(other, b"a") == b"a"
        assert proxy.cut(1) == 1
        assert is_cut(one)
        assert say(other, b"b") == b"b"
        assert proxy.cut() == 1
        assert is_cut(other)


def test_what_is_drawn_is_cut(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as other:
        say(one, b"a")
        say(other, b"a")
        seeds = {proxy.cut(0, random.Random(seed)) for seed in range(3)}
        assert seeds == {0}
        assert proxy.cut(2, random.Random(1)) == 2
        assert is_cut(one) and is_cut(other)


def test_a_delay_makes_round_trips_longer_and_keeps_the_order(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        say(connection, b"a")
        proxy.delay = 0.2
        began = time.monotonic()
        assert say(connection, b"b") == b"b"
        assert time.monotonic() - began >= 0.2
        data = [bytes([n]) * 100 for n in range(50)]
        for chunk in data[:25]:
            connection.sendall(chunk)
        proxy.delay = 0.0  # what comes now mustn't overtake
        for chunk in data[25:]:
            connection.sendall(chunk)
        assert hear(connection, 5000) == b"".join(data)


def test_one_connection_may_be_slower_than_another(proxy: Proxy) -> None:
    with connect(proxy) as slow:
        say(slow, b"a")
        proxy.slow_down_these(0.3)
        with connect(proxy) as fast:
            slow.sendall(b"b")
            assert say(fast, b"c") == b"c"
            slow.settimeout(0.05)
            with pytest.raises(TimeoutError):
                slow.recv(1)
            slow.settimeout(10)
            assert hear(slow, 1) == b"b"


def test_what_is_paused_comes_later(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        say(connection, b"a")
        proxy.pause()
        connection.sendall(b"b")
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        proxy.resume()
        assert hear(connection, 1) == b"b"


def test_who_is_refused_comes_in_later(proxy: Proxy) -> None:
    with connect(proxy) as before:
        say(before, b"a")
        proxy.refuse()
        assert is_cut(before)
        with connect(proxy) as during:
            assert is_cut(during)
        proxy.accept()
        with connect(proxy) as after:
            assert say(after, b"c") == b"c"


def test_nobody_behind_it_is_a_reset() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with Proxy(unused.getsockname()[1]) as proxy, connect(proxy) as connection:
            assert is_cut(connection)
