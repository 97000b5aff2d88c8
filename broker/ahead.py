"""Commands that one thread sends and another one reads the replies to, over a connection of their
own: who sends doesn't wait for the server, and wakes nobody in between.

Whatever goes wrong is heard by who reads, for every command that hasn't its reply yet; so only what
may be said twice is said this way. It is the reader who connects, as that may take a while.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import redis

_UNREAD = 8
"""Commands without their reply, at most. They fit into the socket, so that sending never blocks."""
_LARGEST = 4096
"""Bytes of such a command."""
_PATIENCE = 5.0
"""Seconds for a reply."""

Reply = Callable[[], Any]


class Ahead:
    """One connection, one thread that sends at a time and one that reads, in the same order."""

    def __init__(self, client: redis.Redis) -> None:
        self._client: Any = client
        self._connection: Any = None
        self._unread = 0
        self._guard = threading.Lock()

    def open(self) -> None:
        """Connect, unless that is done. Raises what the client raises."""
        pool = self._client.connection_pool
        if self._connection is None and not issubclass(pool.connection_class, redis.SSLConnection):
            # (An SSL socket can't be read by one thread while another one writes to it.)
            connection = pool.connection_class(
                **{**pool.connection_kwargs, "socket_timeout": _PATIENCE}
            )
            connection.connect()
            with self._guard:
                self._connection, self._unread = connection, 0

    def send(self, command: Sequence[Any]) -> Reply | None:
        """Send it, and return who reads the reply: each is to be called, in this order. None, and
        nothing sent: it is to be said in the ordinary way.
        """
        # A signal's handler must neither wait for what it interrupted, nor send amid its bytes.
        if not self._guard.acquire(blocking=False):
            return None
        try:
            connection = self._connection
            if connection is None or self._unread == _UNREAD:
                return None
            packed = connection.pack_command(*command)
            if sum(map(len, packed)) > _LARGEST:
                return None
            try:
                connection.send_packed_command(packed, check_health=False)
            except (redis.RedisError, OSError):
                self._drop(connection)
                return None
            self._unread += 1
        finally:
            self._guard.release()
        return lambda: self._read(connection)

    def _read(self, connection: Any) -> Any:
        if connection is not self._connection:
            raise redis.ConnectionError("the connection was lost before the reply")
        try:
            reply = connection.read_response()
        except redis.ResponseError:
            self._count_read()
            raise
        except BaseException:
            with self._guard:
                self._drop(connection)
            raise
        self._count_read()
        return reply

    def _count_read(self) -> None:
        with self._guard:
            self._unread -= 1

    def _drop(self, connection: Any) -> None:
        # Never used again: it would connect anew, and mix up whose reply is whose.
        self._connection = None
        connection.disconnect()
