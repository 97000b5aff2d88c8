"""What runs in a guest: it mounts the export, then does what the tests ask for, one line each.

When the tests are gone the connection ends, and so does the guest.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from storage.halves import Half

HOST = "10.0.2.2"
MOUNTS = {"/mnt": "hard", "/nocto": "hard,nosharecache,nocto"}
"""The export as it should be mounted, and as it shouldn't, each with caches of its own."""


def main() -> None:
    """Serve until the connection ends."""
    words = Path("/proc/cmdline").read_text().split()
    given = dict(word.split("=", 1) for word in words if "=" in word)
    for point, options in MOUNTS.items():
        _mount(int(given["nfs"]), point, options)
    connection = socket.create_connection((HOST, int(given["agent"])))
    lock = threading.Lock()
    with connection, connection.makefile("r") as requests:
        _answer(connection, lock, {"guest": given["guest"]})
        for line in requests:
            request = json.loads(line)
            threading.Thread(target=_serve, args=(connection, lock, request)).start()


def _mount(port: int, point: str, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    data = (
        f"vers=4.1,addr={HOST},clientaddr=10.0.2.15,port={port},proto=tcp,timeo=600,retrans=2,"
        f"rsize=1048576,wsize=1048576,noresvport,{options}"
    )
    if libc.mount(f"{HOST}:/cohort".encode(), point.encode(), b"nfs4", 0, data.encode()):
        sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")


def _serve(connection: socket.socket, lock: threading.Lock, request: dict[str, Any]) -> None:
    try:
        do = _run if request["what"] == "run" else _step
        answer = {"id": request["id"], "answer": do(**request["arguments"])}
    except Exception as error:
        answer = {"id": request["id"], "error": f"{type(error).__name__}: {error}"}
    _answer(connection, lock, answer)


def _answer(connection: socket.socket, lock: threading.Lock, answer: dict[str, Any]) -> None:
    with lock:
        connection.sendall(json.dumps(answer).encode() + b"\n")


def _run(words: list[str], timeout: float) -> dict[str, Any]:
    """A Python program in the guest: its exit status and the end of what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-B", *words],
        cwd="/cohort",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    output = process.communicate()[0]
    timer.cancel()
    return {"status": process.returncode, "output": output[-100_000:]}


_halves: dict[tuple[str, str, str], Half] = {}


def _step(root: str, folder: str, name: str, step: str, arguments: dict[str, Any]) -> Any:
    half = _halves.setdefault((root, folder, name), Half(Path(root), folder, name))
    return half.do(step, **arguments)


if __name__ == "__main__":
    main()
