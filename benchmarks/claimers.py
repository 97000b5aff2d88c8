"""64 nodes that claim from one Redis, and nothing else: how long does a claim take?

Of a node there is only what Redis sees of it: a connection of its own, a lease, an incarnation, and
the commands of a worker that has nothing to do, byte for byte as `Claimant.ask` and `Scripts` make
them. It claims; what came is finished at once; when the queues are empty it waits for the bells as
`broker.transport` does, 100 ms at most. What would run the jobs is left out. All live in one
thread, on sockets and one selector: 64 threads with redis-py clients would measure Python. The
producer puts what is due every millisecond: messages as `.delay()` makes them, each with a mark.

*Claim*: from when it is sent (behind the acknowledgement of what came before, if something came)
until its reply has been read; also a claim that finds nothing counts. *Put to read*: from before a
message is put until the reply that brings it has been read.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
import selectors
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import redis

from benchmarks.contenders import PREFORK, Arena
from broker import keys
from broker.claimant import Claimant, NodeDescription
from broker.producing import Put, Putter
from broker.scripts import Scripts, finish_keys
from broker.sources import sha_of, source
from broker.turns import MOST_AT_ONCE

_CLAIMERS = 64
_RATE = 5000
_SECONDS = 6.0
_LISTS = [("celery", "celery"), *((f"celery\x06\x16{step}", "celery") for step in (3, 6, 9))]
_TOPS = ["2", "5", "8", "9"]
_STAMP = "put-at-0000000.000000"
_STAMPED = re.compile(rb"put-at-(\d{7}\.\d{6})")


def bench_claimers(arena: Arena, rounds: int) -> None:
    """Print a line for each round."""
    for _ in range(rounds):
        arena.empty(PREFORK)
        _round(arena)


def _round(arena: Arena) -> None:
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    over = context.Event()
    process = context.Process(target=_claim, args=(f"{arena.url}/0", over, told))
    make = _maker_of_noops(arena)
    with arena.client() as client:
        process.start()
        while client.zcard(keys.LEASES) < _CLAIMERS:
            time.sleep(0.01)
        client.config_resetstat()
        put = _produce(client, make)
        time.sleep(0.2)
        commands: Any = client.info("commandstats")
        over.set()
        claims, ways, found = told.get(timeout=30)
        process.join()
        if len(ways) != put or client.exists(keys.DEAD, "celery"):
            raise RuntimeError(f"of {put} messages {len(ways)} came")
    scripts = commands["cmdstat_evalsha"]
    share = (scripts["usec"] + commands["cmdstat_brpop"]["usec"]) / _SECONDS / 1e4
    print(
        f"  {put / _SECONDS:,.0f} messages/s, {len(claims) / _SECONDS:,.0f} claims/s, of which "
        f"{found / _SECONDS:,.0f} bring something: claim {_shown(claims)}; put to read "
        f"{_shown(ways)}; {scripts['usec_per_call']:.0f} us a script in Redis, {share:.0f} % of "
        "a core",
        flush=True,
    )


def _shown(seconds: Sequence[float]) -> str:
    cuts = statistics.quantiles(seconds, n=1000)
    return f"p50 {cuts[499] * 1000:.2f} ms, p99 {cuts[989] * 1000:.2f} ms"


# The producer.


def _maker_of_noops(arena: Arena) -> Callable[[], tuple[str, str]]:
    """Makes messages as `.delay()` does, (task id, text), each with the time in its arguments."""
    from benchmarks.queues import of_cohort

    sample = of_cohort.noop.delay(_STAMP).id
    with arena.client() as client:
        raw: Any = client.rpop("celery")
    text, number = raw.decode(), 0

    def make() -> tuple[str, str]:
        nonlocal number
        number += 1
        task_id = f"{sample[:-8]}{number:08d}"
        stamp = f"put-at-{time.monotonic():014.6f}"
        return task_id, text.replace(sample, task_id).replace(_STAMP, stamp)

    return make


def _produce(client: redis.Redis, make: Callable[[], tuple[str, str]]) -> int:
    putter = Putter(client)
    begun, put = time.monotonic(), 0
    while (passed := time.monotonic() - begun) < _SECONDS:
        made = [make() for _ in range(int(passed * _RATE) - put)]
        putter.put([Put("celery", "celery", text, f"{task_id}:0") for task_id, text in made])
        put += len(made)
        time.sleep(0.001)
    return put


# The claimers.


@dataclasses.dataclass
class _Found:
    """What they tell: how long claims and messages took, and how many claims brought any."""

    claims: list[float] = dataclasses.field(default_factory=list)
    ways: list[float] = dataclasses.field(default_factory=list)
    brought: int = 0


class _Node:
    """What Redis sees of a node."""

    def __init__(self, client: redis.Redis, number: int, url: str, found: _Found) -> None:
        scripts = Scripts(client)
        claimant = Claimant(scripts, f"bench-{number}", 60.0, _described, slots=lambda: 8)
        claimant.register()
        asking = claimant.ask(MOST_AT_ONCE, ["celery"], _LISTS, _TOPS)
        # From claim to claim only the number of the first one differs.
        mark = 10**12
        whole = _packed(scripts.claim_command(dataclasses.replace(asking, first=mark)))
        self._before, self._after = whole.split(_bulk(mark))
        self._wait = _packed(["BRPOP", keys.BELL, keys.own_bell(claimant.member), 0.1])
        names = finish_keys(claimant.member)
        self._finish = ["EVALSHA", sha_of(source("finish")), len(names), *names]
        self._prefix, self._next = asking.prefix, asking.first
        self._found = found
        self._unread = b""
        self._sent = 0.0
        self._expected: list[str] = []
        host, port = urlsplit(url).hostname, urlsplit(url).port
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.claimant = claimant

    def claim(self, first: bytes = b"") -> None:
        """Ask for more, behind the commands in `first`."""
        number, self._next = _bulk(self._next), self._next + MOST_AT_ONCE
        self._expected.append("claim")
        self._sent = time.monotonic()
        self.socket.sendall(first + self._before + number + self._after)

    def take(self) -> None:
        """Something has arrived: go on as a worker would."""
        self._unread += self.socket.recv(1 << 18)
        while self._unread:
            try:
                reply, end = _parsed(self._unread, 0)
            except (IndexError, ValueError):
                return  # There is more to come.
            self._unread = self._unread[end:]
            expected = self._expected.pop(0)
            if expected == "claim":
                self._answered(reply[0], reply[1:])
            elif expected == "bell":
                self.claim()
            elif reply.count(b"finished") < len(reply):
                raise RuntimeError(f"the ends of {self.claimant.member}: {reply}")

    def _answered(self, word: bytes, claimed: list[Any]) -> None:
        now = time.monotonic()
        self._found.claims.append(now - self._sent)
        finish = b""
        if claimed:
            self._found.brought += 1
            for _, _, payload, *_ in claimed:
                self._found.ways.append(now - float(_STAMPED.findall(payload)[0]))
            ids = [f"{self._prefix}{one[0]}" for one in claimed]
            finish = _packed([*self._finish, *ids])
            self._expected.append("finish")
        if word == b"all":
            self._expected.append("bell")
            self.socket.sendall(finish + self._wait)
        else:
            self.claim(finish)


def _described(nonce: str) -> NodeDescription:
    return NodeDescription(8, 1 << 33, "here", 1, nonce)


def _bulk(word: Any) -> bytes:
    raw = str(word).encode()
    return b"$%d\r\n%b\r\n" % (len(raw), raw)


def _packed(words: Sequence[Any]) -> bytes:
    """As Redis reads a command."""
    return b"*%d\r\n" % len(words) + b"".join(map(_bulk, words))


def _parsed(raw: bytes, at: int) -> tuple[Any, int]:
    """What Redis replied, and where that ends. IndexError or ValueError: it isn't all there."""
    kind, end = raw[at : at + 1], raw.index(b"\r\n", at)
    if kind == b"-":
        raise RuntimeError(raw[at + 1 : end].decode())
    if kind == b"+":
        return raw[at + 1 : end], end + 2
    number, at = int(raw[at + 1 : end]), end + 2
    if kind == b":" or number < 0:
        return (number if kind == b":" else None), at
    if kind == b"$":
        if len(raw) < at + number + 2:
            raise IndexError
        return raw[at : at + number], at + number + 2
    several = []
    for _ in range(number):
        one, at = _parsed(raw, at)
        several.append(one)
    return several, at


def _claim(url: str, over: Any, told: Any) -> None:
    """The process of the claimers."""
    client, found = redis.Redis.from_url(url), _Found()
    client.script_load(source("claim"))
    client.script_load(source("finish"))
    nodes = [_Node(client, number, url, found) for number in range(_CLAIMERS)]
    with selectors.DefaultSelector() as selector:
        for node in nodes:
            selector.register(node.socket, selectors.EVENT_READ, node)
            node.claim()
        while not over.is_set():
            for key, _ in selector.select(0.1):
                key.data.take()
    for node in nodes:
        node.socket.close()
        node.claimant.leave()
    told.put((found.claims, found.ways, found.brought))
