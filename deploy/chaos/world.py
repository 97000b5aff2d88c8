"""The fleet of a run of chaos, and how each fault is done to it and undone.

Redis stands behind a proxy: nodes and producers only know the proxy's address. Everything lies in a
folder of its own, and nothing outlives the process that holds the world.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import random
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import redis

from deploy import leash
from deploy.chaos.faults import KINDS, LEASE, SLOW, Fault, Kind
from deploy.chaos.history import Ended, Fact, Injected
from deploy.chaos.load import TRACES
from deploy.chaos.proxy import Proxy
from deploy.fleet import Fleet
from deploy.parts import Part
from errors import Unavailable

T = TypeVar("T")
Condition = Literal["starting", "up", "stopped", "dead", "leaving", "gone"]
_OURS = ("COHORT_VENV", "COHORT_PYTHON")
_CPUS = 2
_STARTS = 5
_FIRST_STEPS = 3.0
"""Seconds in which Celery ends a worker, on purpose, whose pool loses a process."""


class World:
    """The parts, and what is being done to them. `start` it, and `end` it whatever happens."""

    def __init__(self, nodes: int, note: Callable[[Fact], object]) -> None:
        self.home = Path(tempfile.gettempdir()).absolute() / f"cohort-chaos-{secrets.token_hex(4)}"
        self.root = self.home / "shared"
        self.traces = self.home / "traces"
        self._note = note
        self._nodes = nodes
        self._isolate(os.environ)
        self._redis_fleet = Fleet(self.home / "redis", nodes=0, root=self.root)
        port = int(self._redis_fleet.redis_url.rpartition(":")[2].partition("/")[0])
        self.redis = redis.Redis(port=port, socket_timeout=5, socket_connect_timeout=5)
        """Past the proxy, for the run itself to look at."""
        self.proxy = Proxy(port)
        self._conditions: dict[str, Condition] = {}
        self._up_since: dict[str, float] = {}
        self._numbers = itertools.count(nodes + 1)
        self._lives = itertools.count(1)
        self._starter = ThreadPoolExecutor(1, "chaos-start")
        self._starts: list[Future[None]] = []
        self._undo: list[tuple[float, int, Callable[[], None]]] = []
        self._undo_order = itertools.count()
        self._slow = 0
        self._silent = 0
        self._redis_is_down = False
        self.counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)

    def _isolate(self, environ: MutableMapping[str, str]) -> None:
        """This run's own settings, for this process and all that it starts."""
        for name in list(environ):
            if name.startswith("COHORT_") and name not in _OURS:
                del environ[name]
        environ.update(
            COHORT_SETTINGS=str(self.home / "cohort.toml"),
            COHORT_JOBS="deploy.chaos.jobs",
            COHORT_LEASE=f"{LEASE}s",
            COHORT_STOP_GRACE="1s",
        )
        environ[TRACES] = str(self.traces)

    # --- Beginning and end ---

    def start(self) -> None:
        """Start Redis, the network and the nodes, and point this process's producers at them."""
        for folder in (self.home, self.root, self.traces):
            folder.mkdir(mode=0o700)
        (self.home / "cohort.toml").touch()
        self._start_redis()
        self.proxy.start()
        self.began = time.monotonic()
        self.fleet = Fleet(
            self.home / "fleet",
            nodes=self._nodes,
            root=self.root,
            redis=f"redis://127.0.0.1:{self.proxy.port}/0",
            cpus=(_CPUS,),
            grace=20.0,
        )
        self.fleet.start()
        self._conditions = dict.fromkeys(self.fleet.capacities, "up")
        # The producers' half of the settings, before `tasks` is first imported.
        ours = self.fleet.environ.items()
        os.environ.update({name: value for name, value in ours if name.startswith("COHORT_")})
        self.began = time.monotonic()

    def _start_redis(self) -> None:
        if self._redis_fleet.redis is None:
            self._redis_fleet.start()
        else:
            self._redis_fleet.start_redis()
        # Each write before its reply: with `everysec` one may wait for an fsync that is under way.
        self.redis.config_set("appendfsync", "no")

    def end(self) -> None:
        """End every part at once."""
        self._starter.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(AttributeError):
            self.fleet.kill()
        self._redis_fleet.kill()
        self.proxy.close()
        self._starter.shutdown(wait=True)
        with contextlib.suppress(AttributeError):
            self.fleet.kill()  # what was just being started

    def remove(self) -> None:
        """Remove all that was written."""
        shutil.rmtree(self.home, ignore_errors=True)

    @property
    def has_logs(self) -> bool:
        """Whether anything was started that may have said why it failed."""
        return (self.home / "fleet" / "logs").exists()

    # --- Faults ---

    def inject(self, fault: Fault) -> str | None:
        """Do it, and have it undone when it has lasted. What it was done to; None: nothing fits."""
        acts: dict[Kind, Callable[[Fault], str | None]] = {
            "kill -9 of a node": self._kill_node,
            "kill -9 of a pool child": self._kill_child,
            "SIGSTOP past the lease": self._stop_node,
            "connections cut": self._cut,
            "network slow": self._slow_down,
            "network silent": self._silence,
            "Redis killed": self._kill_redis,
            "a node leaves": self._leave,
            "a node joins": self._join,
        }
        to = acts[fault.kind](fault)
        if to is not None:
            self.counts[fault.kind] += 1
            self._note(Injected(round(time.monotonic() - self.began, 1), fault.kind, to))
        return to

    def tend(self) -> None:
        """Undo what has lasted, and look after nodes that ended. Call it often."""
        while self._undo and self._undo[0][0] <= time.monotonic():
            heapq.heappop(self._undo)[2]()
        for start in [start for start in self._starts if start.done()]:
            self._starts.remove(start)
            start.result()
        for name, condition in list(self._conditions.items()):
            if condition == "starting" or condition == "gone":
                continue
            code = self.fleet.node(name).exit_code
            if code is None:
                continue
            if condition == "leaving":
                self._conditions[name] = "gone"
            elif condition in ("up", "stopped"):
                self._note(Ended(name, code))
                self._start_node(name)

    def calm(self) -> None:
        """Undo everything now, and wait until all nodes that belong here are up."""
        lasting, self._undo = self._undo, []
        for _, _, undo in sorted(lasting, key=lambda one: one[:2]):
            undo()
        while self._undo or self._starts or set(self._conditions.values()) - {"up", "gone"}:
            self.tend()
            time.sleep(0.05)

    def _later(self, after: float, act: Callable[[], None]) -> None:
        due = time.monotonic() + after
        heapq.heappush(self._undo, (due, next(self._undo_order), act))

    def _pick(self, draw: float, among: Sequence[T]) -> T | None:
        return among[int(draw * len(among))] if among else None

    def _pick_node(self, draw: float) -> Part | None:
        up = sorted(name for name, condition in self._conditions.items() if condition == "up")
        name = self._pick(draw, up)
        return None if name is None else self.fleet.node(name)

    def _kill_node(self, fault: Fault) -> str | None:
        node = self._pick_node(fault.draw)
        if node is None:
            return None
        self._conditions[node.name] = "dead"
        with contextlib.suppress(ProcessLookupError):
            os.kill(node.pid, signal.SIGKILL)
        self._later(fault.lasts, lambda: self._start_node(node.name))
        return node.name

    def _kill_child(self, fault: Fault) -> str | None:
        node = self._pick_node(fault.draw)
        if node is None:
            return None
        if time.monotonic() - self._up_since.get(node.name, 0.0) < _FIRST_STEPS:
            return None
        # The draw has picked the node; its digits behind that pick the child.
        pid = self._pick(fault.draw * 1000 % 1, sorted(leash.descendants(node.pid)))
        if pid is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return node.name

    def _stop_node(self, fault: Fault) -> str | None:
        node = self._pick_node(fault.draw)
        if node is None:
            return None
        self._conditions[node.name] = "stopped"
        node.pause()

        def go_on() -> None:
            if self._conditions[node.name] == "stopped":
                self._conditions[node.name] = "up"
            node.resume()

        self._later(fault.lasts, go_on)
        return f"{node.name}, {fault.lasts:.1f} s"

    def _cut(self, fault: Fault) -> str | None:
        rng = random.Random(fault.draw)
        cut = self.proxy.cut(rng.choice((1, 1, 1, 3)), rng)
        return f"{cut} of {self.proxy.connections + cut}" if cut else None

    def _slow_down(self, fault: Fault) -> str:
        self._slow += 1
        self.proxy.delay = SLOW

        def faster() -> None:
            self._slow -= 1
            if not self._slow:
                self.proxy.delay = 0.0

        self._later(fault.lasts, faster)
        return f"{SLOW * 1000:.0f} ms, {fault.lasts:.1f} s"

    def _silence(self, fault: Fault) -> str:
        self._silent += 1
        self.proxy.pause()

        def speak() -> None:
            self._silent -= 1
            if not self._silent:
                self.proxy.resume()

        self._later(fault.lasts, speak)
        return f"{fault.lasts:.1f} s"

    def _kill_redis(self, fault: Fault) -> str | None:
        if self._redis_is_down:
            return None
        self._redis_is_down = True
        assert self._redis_fleet.redis is not None
        self._redis_fleet.redis.kill()
        self.proxy.refuse()

        def come_back() -> None:
            self._start_redis()
            self._redis_is_down = False
            self.proxy.accept()

        self._later(fault.lasts, come_back)
        return f"{fault.lasts:.1f} s"

    def _leave(self, fault: Fault) -> str | None:
        if sum(condition == "up" for condition in self._conditions.values()) < 2:
            return None
        node = self._pick_node(fault.draw)
        if node is None:
            return None
        self._conditions[node.name] = "leaving"
        node.terminate()

        def come_back() -> None:
            # Not before it has gone: a name is one node's at a time.
            if self._conditions[node.name] == "leaving":
                self._later(0.2, come_back)
            else:
                self._start_node(node.name)

        self._later(fault.lasts, come_back)
        return node.name

    def _join(self, fault: Fault) -> str:
        name = f"node-{next(self._numbers)}"
        self.fleet.capacities[name] = next(iter(self.fleet.capacities.values()))
        self._start_node(name)

        def leave() -> None:
            if self._conditions[name] == "up":
                self._conditions[name] = "leaving"
                self.fleet.node(name).terminate()
            elif self._conditions[name] != "leaving":
                self._later(0.5, leave)

        self._later(fault.lasts, leave)
        return name

    # --- Nodes ---

    def _start_node(self, name: str) -> None:
        """In the background: it waits for its lease, perhaps without a Redis."""
        self._conditions[name] = "starting"
        self._starts.append(self._starter.submit(self._start_node_now, name))

    def _start_node_now(self, name: str) -> None:
        log = self.fleet.home / "logs" / f"{name}.log"
        for tries_left in reversed(range(_STARTS)):
            with contextlib.suppress(Unavailable, StopIteration):
                next(part for part in self.fleet.nodes if part.name == name).wait(60)
            if log.exists():
                log.rename(log.with_name(f"{name}.{next(self._lives)}.log"))
            try:
                self.fleet.start_node(name)
            except Unavailable:
                # Without a Redis a worker doesn't start; whoever keeps it running tries again.
                if not tries_left:
                    raise
                time.sleep(1.0)
            else:
                self._up_since[name] = time.monotonic()
                self._conditions[name] = "up"
                return
