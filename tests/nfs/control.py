"""The control socket of a mount: a JSON object a line, one answer a line."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any


def serve(path: str, answer: Callable[[dict[str, Any]], Any]) -> None:
    """Answer, in a thread, whoever connects; an error is an answer too."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(path)
    listening.listen()

    def speak(connection: socket.socket) -> None:
        with connection, connection.makefile("rw") as lines:
            for line in lines:
                try:
                    reply = {"answer": answer(json.loads(line))}
                except Exception as error:
                    reply = {"error": repr(error)}
                lines.write(json.dumps(reply) + "\n")
                lines.flush()

    def accept() -> None:
        while True:
            connection, _ = listening.accept()
            threading.Thread(target=speak, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


class Control:
    """The test's end."""

    def __init__(self, path: str):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rw")

    def ask(self, what: str, **more: Any) -> Any:
        self._lines.write(json.dumps({"do": what, **more}) + "\n")
        self._lines.flush()
        reply = json.loads(self._lines.readline())
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["answer"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
