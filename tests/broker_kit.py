"""What the broker tests share: messages as producers write them, nodes, and an audit of Redis.

The audit reads every key and says what must not be: a lock of nobody, a job that waits for a free
lock, a message in two places, a key that nobody knows.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis

from broker import keys
from broker.claimant import Claimant, NodeDescription
from broker.claims import Asking, Claimed, Claims
from broker.scripts import Scripts

QUEUE = "celery"
STEPS = (0, 3, 6, 9)
SEPARATOR = "\x06\x16"


def list_of(queue: str, priority: int = 0) -> str:
    """The Redis list of a queue for this priority, as kombu names it."""
    step = max(step for step in STEPS if step <= priority)
    return f"{queue}{SEPARATOR}{step}" if step else queue


def lists_of(*queues: str) -> list[tuple[str, str]]:
    """What a worker of these queues asks for."""
    return [(list_of(queue, step), queue) for step in STEPS for queue in queues]


def message(
    task: str,
    key: str | None = None,
    *,
    priority: int = 0,
    stock: bool = False,
    tag: str | None = None,
    name: str = "tests.job",
    **headers: Any,
) -> str:
    """A message as a producer puts it into a list."""
    about: dict[str, Any] = {} if stock else {"cohort": {} if key is None else {"key": key}}
    return json.dumps(
        {
            "body": json.dumps([[], {}, {}]),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"id": task, "task": name, **about, **headers},
            "properties": {
                "delivery_tag": tag or f"tag-of-{task}",
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
                "priority": priority,
                "body_encoding": None,
            },
        }
    )


def task_of(claimed: Claimed) -> str:
    """The task id that a claim brought."""
    return str(json.loads(claimed.payload)["headers"]["id"])


def node_json(
    total: Sequence[int] = (64, 1 << 40, 8),
    spare: Sequence[int] | None = None,
    *,
    labels: Sequence[str] = (),
    slots: int = 1000,
    ahead: int = 0,
    takes: dict[str, int] | None = None,
    patience: int = 30_000,
) -> str:
    """What a node tells when it claims: room for everything, unless a test says otherwise."""
    return json.dumps(
        {
            "total": list(total),
            "spare": list(total if spare is None else spare),
            "labels": list(labels),
            "slots": slots,
            "ahead": ahead,
            "takes": takes or {},
            "patience": patience,
        }
    )


TOPS = ("2", "5", "8", "9")


def tops_of(*queues: str) -> list[str]:
    """For each of `lists_of` the last priority that it serves."""
    return [top for top in TOPS for _ in queues]


def describe(incarnation: str) -> NodeDescription:
    """A node as small as can be."""
    return NodeDescription(cpus=1, memory=1 << 30, host="here", pid=1, nonce=incarnation)


_WORDS = {"all": "nothing"}


class Broker:
    """The scripts on one server, with what tests do to it in one line each."""

    def __init__(self, client: redis.Redis) -> None:
        self.client: Any = client
        """Untyped: redis-py's types allow for every protocol and encoding."""
        self.scripts = Scripts(client)
        self.queues: tuple[str, ...] = (QUEUE,)
        self.robbed: set[str] = set()
        """Holders whose lock a test took away: another may overlap with them."""
        self._numbers = itertools.count(1)

    def put(
        self,
        task: str,
        key: str | None = None,
        *,
        queue: str = QUEUE,
        priority: int = 0,
        due_ms: int | None = None,
        **options: Any,
    ) -> str:
        """Put a message. What became of it."""
        payload = message(task, key, priority=priority, **options)
        return self.scripts.put(list_of(queue, priority), queue, payload, due_ms)

    def join(self, member: str, lease: float = 60.0) -> str:
        """Register a node."""
        self.scripts.register(member, lease, json.dumps({"cpus": 1}))
        return member

    def asking(
        self,
        member: str,
        *queues: str,
        most: int = 1,
        node: str | None = None,
        first: int | None = None,
    ) -> Asking:
        """What a worker asks for."""
        queues = queues or self.queues
        if first is None:
            first, *_ = (next(self._numbers) for _ in range(most))
        node = node or node_json()
        lists, tops = lists_of(*queues), tops_of(*queues)
        return Asking(member, "claim-", first, most, node, queues, lists, tops)

    def ask_for(self, most: int, member: str, *queues: str, node: str | None = None) -> Claims:
        """Claim several."""
        return self.scripts.claim(self.asking(member, *queues, most=most, node=node))

    def ask(self, member: str, *queues: str) -> tuple[str, Claimed | str]:
        """Claim once: the claim id, and what it brought or the word."""
        asking = self.asking(member, *queues)
        claims = self.scripts.claim(asking)
        reply = claims.claimed[0] if claims.claimed else _WORDS.get(claims.word, claims.word)
        return f"claim-{asking.first}", reply

    def claim(self, member: str, *queues: str) -> tuple[str, Claimed]:
        """Claim once, which must bring a message."""
        claim_id, reply = self.ask(member, *queues)
        assert isinstance(reply, Claimed), reply
        return claim_id, reply

    def take(self, member: str, *queues: str) -> tuple[str, str]:
        """Claim once, which must bring a message: the claim id and the task id."""
        claim_id, claimed = self.claim(member, *queues)
        return claim_id, task_of(claimed)

    def drain(self, member: str, *queues: str) -> list[str]:
        """Claim and finish until there is nothing: the task ids in the order of their runs."""
        ran = []
        while True:
            claim_id, reply = self.ask(member, *queues)
            if isinstance(reply, Claimed):
                ran.append(task_of(reply))
                assert self.finish(member, claim_id) == "finished"
            elif reply != "again":
                return ran

    def finish(self, member: str, claim_id: str) -> str:
        """Acknowledge one."""
        (word,) = self.scripts.finish(member, [claim_id])
        return word

    def expire(self, member: str) -> None:
        """Let a lease end now."""
        self.client.zadd(keys.LEASES, {member: 1}, xx=True)

    def steal_lock(self, key: str) -> None:
        """Take a lock away, as a failover that lost a write would."""
        holder = self.lock_of(key)
        if holder is not None:
            self.robbed.add(holder)
            self.client.hdel(keys.LOCKS, key)

    def lock_of(self, key: str) -> str | None:
        """Who has it."""
        holder = self.client.hget(keys.LOCKS, key)
        return None if holder is None else holder.decode()

    def lost(self, task: str) -> int:
        """How many of its deliveries were lost."""
        return int(self.client.hget(keys.DELIVERIES, task) or 0)

    def now_ms(self) -> int:
        """The server's clock."""
        seconds, micros = self.client.time()
        return int(seconds * 1000 + micros // 1000)

    def claimant(self, node: str, lease: float = 60.0) -> Claimant:
        """A worker's half, registered."""
        claimant = Claimant(self.scripts, node, lease, describe)
        claimant.register()
        return claimant

    def audit(self) -> Picture:
        """Everything in Redis, after it was found in order."""
        picture = look(self.client, self.queues)
        complaints = list(complain(picture, self.robbed))
        assert not complaints, "\n".join(complaints)
        # Who has found its place again is robbed no more.
        self.robbed = {one for one in self.robbed if any(complain(picture, self.robbed - {one}))}
        return picture


@dataclass
class Picture:
    """All that is in Redis, decoded."""

    unknown: list[str] = field(default_factory=list)
    lists: dict[str, list[bytes]] = field(default_factory=dict)
    delayed: dict[str, list[bytes]] = field(default_factory=dict)
    claims: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    parked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    waiting: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Shape, claim."""
    shapes: dict[str, int] = field(default_factory=dict)
    ready: list[dict[str, str]] = field(default_factory=list)
    locks: dict[str, str] = field(default_factory=dict)
    deliveries: dict[str, int] = field(default_factory=dict)
    claimed: dict[str, str] = field(default_factory=dict)
    leases: set[str] = field(default_factory=set)
    nodes: set[str] = field(default_factory=set)

    def places(self) -> Counter[str]:
        """Delivery tag -> in how many places its message is."""
        payloads: list[bytes | str] = []
        for waiting in (*self.lists.values(), *self.delayed.values()):
            payloads += waiting
        payloads += [claim["payload"] for claim in self.all_claims()]
        payloads += [claim["payload"] for _, claim in (*self.parked, *self.waiting)]
        payloads += [claim["payload"] for claim in self.ready]
        return Counter(tag for payload in payloads if (tag := _tag_of(payload)) is not None)

    def all_claims(self) -> list[dict[str, str]]:
        """The claims of every node."""
        return [claim for held in self.claims.values() for claim in held.values()]


def _tag_of(payload: bytes | str) -> str | None:
    try:
        return str(json.loads(payload)["properties"]["delivery_tag"])
    except (ValueError, TypeError, LookupError):
        return None  # A test's garbage.


def _claim(raw: bytes) -> dict[str, str]:
    facts, _, payload = raw.partition(b"\0")
    claim: dict[str, str] = json.loads(facts)
    return {**claim, "payload": payload.decode("utf-8", "surrogateescape")}


def look(client: Any, queues: Sequence[str]) -> Picture:
    """Read every key."""
    picture = Picture()
    lists = {name for name, _ in lists_of(*queues)}
    delayed = {keys.delayed(queue) for queue in queues}
    others = {keys.SEQUENCE, keys.DEAD, keys.BELL, keys.FLEET, keys.SEGMENTS, keys.GENERATION}
    others |= {keys.SPARE, keys.RESERVED, keys.SETTLED, keys.BIRTH, keys.EXPIRING}
    # Kombu's own: bindings of exchanges, and what a stock consumer holds.
    # The index of outcomes, and marks of what was put once, have tests of their own.
    elsewhere = (keys.outcomes(0)[:-4], keys.submitted(0)[:-4])
    stock = ("_kombu.", "unacked", "celery-task-meta-")
    foreign = (*stock, keys.leader(""), keys.own_bell(""), *elsewhere)
    for raw in list(client.scan_iter(count=1000)):
        name = raw.decode()
        if name in lists:
            picture.lists[name] = client.lrange(name, 0, -1)
        elif name in delayed:
            picture.delayed[name] = [
                member.partition(b"\0")[2] for member in client.zrange(name, 0, -1)
            ]
        elif name.startswith(keys.claims("")):
            picture.claims[name.removeprefix(keys.claims(""))] = {
                claim_id.decode(): _claim(claim) for claim_id, claim in client.hgetall(name).items()
            }
        elif name == keys.PARKED:
            for member in client.zrange(name, 0, -1):
                key, _, claim = member.split(b"\0", 2)
                picture.parked.append((key.decode(), _claim(claim)))
        elif name == keys.WAITING:
            for member in client.zrange(name, 0, -1):
                shape, _, claim = member.split(b"\0", 2)
                picture.waiting.append((shape.decode(), _claim(claim)))
        elif name == keys.SHAPES:
            picture.shapes = {k.decode(): int(v) for k, v in client.hgetall(name).items()}
        elif name == keys.READY:
            picture.ready = [_claim(claim) for claim in client.lrange(name, 0, -1)]
        elif name == keys.LOCKS:
            picture.locks = {k.decode(): v.decode() for k, v in client.hgetall(name).items()}
        elif name == keys.DELIVERIES:
            picture.deliveries = {k.decode(): int(v) for k, v in client.hgetall(name).items()}
        elif name == keys.CLAIMED:
            picture.claimed = {k.decode(): v.decode() for k, v in client.hgetall(name).items()}
        elif name == keys.LEASES:
            picture.leases = {member.decode() for member in client.zrange(name, 0, -1)}
        elif name == keys.NODES:
            picture.nodes = {member.decode() for member in client.hkeys(name)}
        elif name not in others and not name.startswith(foreign):
            picture.unknown.append(name)
    return picture


def complain(picture: Picture, robbed: set[str]) -> Iterator[str]:
    """What must not be."""
    for name in picture.unknown:
        yield f"nobody knows the key {name}"
    for key, holder in picture.locks.items():
        if holder.startswith("owed:"):
            first = [*picture.ready, *(c for _, c in picture.waiting)]
            heirs = [c for c in first if not c["settled"]]
            heirs = [c for c in heirs if c["key"] == key and f"owed:{c['task']}" == holder]
            if len(heirs) != 1:
                yield f"the lock of {key} is {holder}, which is {len(heirs)} times in ready"
        else:
            held = [held[holder] for held in picture.claims.values() if holder in held]
            if [claim["key"] for claim in held] != [key]:
                yield f"the lock of {key} is claimed by {holder}, which is {held}"
    for claim_id, claim in (item for held in picture.claims.values() for item in held.items()):
        key = claim["key"]
        if claim["settled"]:
            continue
        if key and claim_id not in robbed and picture.locks.get(key) != claim_id:
            yield f"{claim_id} runs {key}, but its lock is {picture.locks.get(key)}"
    for claim in picture.ready:
        key, owed = claim["key"], f"owed:{claim['task']}"
        if claim["settled"]:
            continue
        if key and owed not in robbed and picture.locks.get(key) != owed:
            yield f"{claim['task']} is ready for {key}, but its lock is {picture.locks.get(key)}"
    # Their end hands the lock on, though they have it no more.
    expected = {
        claim["key"]
        for held in picture.claims.values()
        for claim_id, claim in held.items()
        if claim_id in robbed
    } | {
        claim["key"]
        for claim in (*picture.ready, *(claim for _, claim in picture.waiting))
        if f"owed:{claim['task']}" in robbed
    }
    for key, claim in picture.parked:
        if claim["key"] != key:
            yield f"{claim['task']} is parked under {key}, but its key is {claim['key']}"
        if key not in picture.locks and key not in expected:
            yield f"{claim['task']} is parked for {key}, whose lock is free"
    running = {c["task"]: i for held in picture.claims.values() for i, c in held.items()}
    said = {task: holder for task, holder in picture.claimed.items() if holder != "back"}
    if running != said:
        yield f"claimed are {running}, but {said} are said to be"
    counted = Counter(shape for shape, _ in picture.waiting)
    if counted != picture.shapes:
        yield f"{counted} wait, but {picture.shapes} are counted"
    for tag, places in picture.places().items():
        if places != 1:
            yield f"the message {tag} is in {places} places"
    alive = {c["task"] for c in (*picture.all_claims(), *picture.ready)}
    alive |= {claim["task"] for _, claim in (*picture.parked, *picture.waiting)}
    for payload in (m for waiting in picture.lists.values() for m in waiting):
        if _tag_of(payload) is not None:
            alive.add(json.loads(payload)["headers"]["id"])
    for payload in (m for waiting in picture.delayed.values() for m in waiting):
        alive.add(json.loads(payload)["headers"]["id"])
    for task in picture.claimed.keys() - alive:
        yield f"{task} is said to have come back, and is nowhere"
    for task in picture.deliveries.keys() - alive:
        yield f"lost deliveries are counted of {task}, which is nowhere"
    if picture.claims.keys() - picture.leases:
        yield f"claims without a lease: {picture.claims.keys() - picture.leases}"
    if picture.leases != picture.nodes:
        yield f"leases of {picture.leases}, but descriptions of {picture.nodes}"
