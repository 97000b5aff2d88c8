"""A network that can be made bad: a TCP proxy that cuts, pauses, delays and turns away.

    with Proxy(port_of_redis) as proxy:
        client = redis.Redis(port=proxy.port)
        proxy.delay = 0.2                  # a round trip takes 200 ms longer
        proxy.cut(1)                       # one connection is reset

It has a thread with an event loop of its own; its methods may be called from any thread and return
when what they do is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
_CHUNK = 1 << 16
_LAST = 5.0


class _Link:
    """One connection through the proxy."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.ends = (client, server)

        self.delay = 0.0

    def cut(self) -> None:
        for end in self.ends:
            end.transport.abort()


class Proxy:
    """Listens on a port of its own on 127.0.0.1 and forwards to another one."""

    def __init__(self, to_port: int) -> None:
        self.delay = 0.0
        """Seconds that what a client sends is on its way; replies come at once."""
        self.port = 0
        self.refused = 0
        """How many have been since `refuse`."""
        self._to_port = to_port
        self._refuses = False
        self._links: list[_Link] = []
        self._loop = asyncio.new_event_loop()
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(self._listen(), self._loop)
        self.port = listening.result(_LAST)

    def close(self) -> None:
        """Cut everything and end."""
        if not self._thread.is_alive():
            return

        async def end() -> None:
            for link in self._links:
                link.cut()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(_LAST)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_LAST)
        self._loop.close()

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._links)

    def cut(self, count: int | None = None, random: random.Random | None = None) -> int:
        """Reset so many connections, the oldest or drawn ones; all by default. How many."""

        def reset() -> int:
            links = list(self._links)
            if random is not None:
                random.shuffle(links)
            chosen = links[:count]
            for link in chosen:
                link.cut()
            return len(chosen)

        return self._do(reset)

    def slow_down_these(self, delay: float) -> None:
        """Delay what is sent on the connections that there are now; later ones are as ever."""

        def slow_down() -> None:
            for link in self._links:
                link.delay = delay

        self._do(slow_down)

    def pause(self) -> None:
        """Forward nothing from now on, and don't say so: a network that swallows."""
        self._do(self._goes_on.clear)

    def resume(self) -> None:
        """Forward again, first what came meanwhile."""
        self._do(self._goes_on.set)

    def refuse(self) -> None:
        """Reset all connections, and each new one at once."""
        self._refuses, self.refused = True, 0
        self.cut()

    def accept(self) -> None:
        """Let connections come again."""
        self._refuses = False

    def _do(self, act: Callable[[], T]) -> T:
        done: Future[T] = Future()

        def call() -> None:
            try:
                done.set_result(act())
            except BaseException as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        return done.result(_LAST)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._refuses:
                self.refused += 1
                raise ConnectionRefusedError
            onwards, back = await asyncio.open_connection("127.0.0.1", self._to_port)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, back)
        self._links.append(link)
        try:
            # Who connected while all were being cut is cut as well.
            if not self._refuses:
                await asyncio.gather(
                    self._forward(reader, back, lambda: max(self.delay, link.delay)),
                    self._forward(onwards, writer, lambda: 0.0),
                )
        except asyncio.CancelledError:
            pass  # The end of the proxy. Who waits for this task isn't to be told by a traceback.
        finally:
            self._links.remove(link)
            link.cut()

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        delay: Callable[[], float],
    ) -> None:
        """One direction of one connection, in order, also when the delay shrinks on the way."""
        last_due = 0.0
        while True:
            chunk = b""
            with contextlib.suppress(OSError):
                chunk = await reader.read(_CHUNK)
            await self._goes_on.wait()
            last_due = max(last_due + 1e-6, self._loop.time() + delay())
            if last_due - self._loop.time() > 1e-3:
                self._loop.call_at(last_due, self._send, writer, chunk)
            else:
                self._send(writer, chunk)
            if not chunk:
                return

    @staticmethod
    def _send(writer: asyncio.StreamWriter, chunk: bytes) -> None:
        if writer.is_closing():
            return
        if chunk:
            writer.write(chunk)
        else:
            # Neither Redis nor its clients go on with half a connection.
            writer.close()
