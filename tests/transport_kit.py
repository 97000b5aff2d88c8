"""A process with a connection through the transport, as Celery has one: publishes, consumes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kombu import Connection, Consumer, Exchange, Producer, Queue

from broker.transport import Transport
from tests.broker_kit import QUEUE
from tests.redis_server import RedisServer

PATIENCE = 10.0


class Client:
    """A process with a connection: it publishes, and consumes what it isn't told to leave."""

    def __init__(self, server: RedisServer, *, prefetch: int = 0, **options: Any) -> None:
        options.setdefault("transport", Transport)
        self.server = server
        self._options = options
        self._prefetch = prefetch
        self.got: list[Any] = []
        self._seen = 0
        self.consumer: Any = None
        self._connect()

    def _connect(self) -> None:
        self.connection: Any = Connection(
            hostname="127.0.0.1", port=self.server.port, virtual_host="0", **self._options
        )
        self.channel: Any = self.connection.channel()

    def publish(
        self, task: str, key: str | None = None, *, stock: bool = False, **options: Any
    ) -> None:
        """Send a task's message as Celery does."""
        about: dict[str, Any] = {} if stock else {"cohort": {} if key is None else {"key": key}}
        headers = {"id": task, "task": "tests.job", **about, **options.pop("headers", {})}
        Producer(self.channel).publish(
            [[task], {}, {}],
            headers=headers,
            routing_key=QUEUE,
            declare=[Queue(QUEUE, Exchange(QUEUE), routing_key=QUEUE)],
            exchange=QUEUE,
            **options,
        )

    def consume(self) -> None:
        """Begin to consume."""
        queue = Queue(QUEUE, Exchange(QUEUE), routing_key=QUEUE)
        self.consumer = Consumer(self.channel, [queue], on_message=self.got.append)
        if self._prefetch:
            self.consumer.qos(prefetch_count=self._prefetch)
        self.consumer.consume()

    def drain(self, until: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Run the loop until something is so."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, "it didn't come to pass"
            self.turn(0.05)

    def turn(self, seconds: float) -> None:
        """Run the loop for so long."""
        try:
            self.connection.drain_events(timeout=seconds)
        except TimeoutError:
            return

    def next(self) -> Any:
        """The next message that is delivered."""
        self.drain(lambda: len(self.got) > self._seen)
        self._seen += 1
        return self.got[self._seen - 1]

    def nothing_comes(self) -> bool:
        """Whether several looks at the queues bring nothing."""
        deadline = time.monotonic() + 0.4
        while time.monotonic() < deadline:
            self.turn(0.1)
        return len(self.got) == self._seen

    def come_back(self) -> None:
        """What Celery does after a lost connection: close what there was, connect anew."""
        self.close()
        self._connect()
        self.consume()

    def close(self) -> None:
        """End the connection."""
        self.connection.close()


def task_of(delivered: Any) -> str:
    """The task id of a delivered message."""
    return str(delivered.headers["id"])
