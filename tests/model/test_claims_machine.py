"""Claims as a state machine on a real server: nodes that lose replies, leases and locks.

Whatever happens, in whichever order: a message is in exactly one place until it has ended; at most
one claim holds a key; and once all is quiet, one node that lives brings everything to its end.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from broker import keys
from broker.claimant import Claimant, NodeDescription
from broker.claims import Asking, Claimed, Claims
from broker.needs import Needs
from broker.producing import Put
from tests.broker_kit import Broker, list_of, lists_of, look, message, tops_of
from tests.redis_server import RedisServer, running_redis

QUEUES = ("a", "b")
# Most of them meet in one key and one queue: what is to be found needs several of a key at once.
SOME_KEY = st.sampled_from(["k", "k", "k", "k-2", None])
SOME_QUEUE = st.sampled_from(["a", "a", "a", "b"])
CPUS, MEMORY = 3, 10
SOME_NEEDS = st.sampled_from(
    [
        Needs(),
        Needs(1, 1),
        Needs(1, 1),
        Needs(1, 9),
        Needs(3, 1),
        Needs(1, 1, 0, frozenset({"big"})),
    ]
)
"""All of them fit a node that has the label; the last node has it."""


class Counted(Claimant):
    """A claimant whose incarnations are numbered, so that a failure can be run again."""

    numbers: Iterator[int]

    def _begin_incarnation(self) -> None:
        self.incarnation = f"{next(self.numbers):012x}"
        self.trusted_until = 0.0


@dataclass
class Worker:
    """One node, as its main process sees it."""

    claimant: Claimant
    running: dict[str, str] = field(default_factory=dict)
    """Claim id -> delivery tag of what its pool runs."""
    serves: tuple[str, ...] = QUEUES


class Machine(RuleBasedStateMachine):
    """The nodes, the messages, and what has become of them."""

    server: RedisServer

    def __init__(self) -> None:
        super().__init__()
        self.server.wipe()
        self.client: Any = self.server.connect()
        self.broker = Broker(self.client)
        self.broker.queues = QUEUES
        Counted.numbers = itertools.count(1)
        self.workers = [self._join(f"node-{n}") for n in range(3)]
        self.workers[2].serves = ("b",)
        self.numbers = itertools.count(1)
        self.put_tags: set[str] = set()
        self.finished: set[str] = set()
        self.key_of: dict[str, str] = {}
        self.running_key: dict[str, str] = {}
        """Claim id -> the key that it runs."""
        self.superseded: set[str] = set()
        """Claims that went elsewhere: ending them must change nothing."""

    def _join(self, name: str) -> Worker:
        labels = ("big",) if name in ("node-1", "last") else ()

        def describe(nonce: str) -> NodeDescription:
            return NodeDescription(CPUS, MEMORY, "here", 1, nonce, labels=labels)

        # Whoever waits gets a node reserved at once: it is to be seen here.
        claimant = Counted(self.broker.scripts, name, 3600, describe, patience=0)
        claimant.register()
        return Worker(claimant)

    @initialize(keys=st.lists(SOME_KEY, min_size=2, max_size=6))
    def all_have_work(self, keys: list[str | None]) -> None:
        """Nothing is found in an empty fleet."""
        for key in keys:
            self.put(key, 0, "a", False, Needs(), "wait")
        self.claim(0, 1, 1)
        self.claim(1, 2, 1)

    def _busy(self, number: int) -> Worker | None:
        """That worker if it runs something, else the next one that does."""
        for worker in self.workers[number:] + self.workers[:number]:
            if worker.running:
                return worker
        return None

    # Producers.

    @rule(
        key=SOME_KEY,
        priority=st.sampled_from([0, 5, 9]),
        queue=SOME_QUEUE,
        later=st.sampled_from([False, False, False, True]),
        needs=SOME_NEEDS,
        conflict=st.sampled_from(["wait", "wait", "wait", "skip", "replace"]),
    )
    def put(
        self, key: str | None, priority: int, queue: str, later: bool, needs: Needs, conflict: str
    ) -> None:
        """Our producer."""
        number = next(self.numbers)
        self.put_tags.add(f"tag-of-t{number}")
        due = self.broker.now_ms() + 3_600_000 if later else None
        about = {"needs": needs.text, "conflict": conflict} | ({"key": key} if key else {})
        options: dict[str, Any] = {
            "priority": priority,
            "queue": queue,
            "due_ms": due,
            "cohort": about,
        }
        self.broker.put(f"t{number}", key, **options)

    @rule(key=SOME_KEY, queue=SOME_QUEUE)
    def put_as_stock(self, key: str | None, queue: str) -> None:
        """A stock producer, which knows nothing of keys."""
        number = next(self.numbers)
        tag = f"tag-of-t{number}"
        self.put_tags.add(tag)
        if key is not None:
            self.key_of[tag] = key
        self.client.lpush(list_of(queue), message(f"t{number}", stock=True))

    @rule()
    def time_passes(self) -> None:
        """What was to come later is due."""
        for queue in QUEUES:
            for waiting in self.client.zrange(keys.delayed(queue), 0, -1):
                self.client.zadd(keys.delayed(queue), {waiting: 1})

    # Nodes.

    workers_by_number = st.integers(0, 2)

    def _asking(self, worker: Worker, most: int) -> Asking:
        lists, tops = lists_of(*worker.serves), tops_of(*worker.serves)
        return worker.claimant.ask(most, worker.serves, lists, tops)

    def _serve(self, worker: Worker, asking: Asking, claims: Claims) -> str:
        """What the transport does with a reply."""
        assert len(claims.claimed) <= asking.most
        worker.claimant.answered(asking, claims)
        for claimed in claims.claimed:
            self._serve_one(worker, claimed)
        used = [0, 0]
        for held in worker.claimant._held.values():
            used[0] += held.needs.cpus
            used[1] += held.needs.memory
        assert used[0] <= CPUS and used[1] <= MEMORY, "more was claimed than there is"
        return claims.word if claims.claimed or claims.word == "again" else "nothing"

    def _serve_one(self, worker: Worker, claimed: Claimed) -> None:
        claim_id = claimed.claim_id
        tag = str(json.loads(claimed.payload)["properties"]["delivery_tag"])
        if not claimed.qualified and tag in self.key_of and not claimed.settled:
            word = self.broker.scripts.requalify(
                worker.claimant.member, claim_id, claimed.queue, self.key_of[tag], None
            )
            if word != "locked":
                assert word == "parked"
                worker.claimant.forget(claim_id)
                return
            worker.claimant.needs(claim_id, Needs(), self.key_of[tag])
        elif tag in self.key_of and not claimed.settled:
            assert claimed.key == self.key_of[tag], "it runs without its lock"
        worker.running[claim_id] = tag
        worker.claimant.start(claim_id, None)
        key = self.key_of.get(tag) or claimed.key
        if key and not claimed.settled:
            self.running_key[claim_id] = key

    @rule(number=workers_by_number, times=st.integers(1, 3), most=st.sampled_from([1, 1, 3]))
    def claim(self, number: int, times: int, most: int) -> None:
        """Claim and begin."""
        worker = self.workers[number]
        for _ in range(times):
            asking = self._asking(worker, most)
            self._serve(worker, asking, self.broker.scripts.claim(asking))

    @rule(number=workers_by_number, most=st.sampled_from([1, 3]))
    def claim_with_the_reply_lost(self, number: int, most: int) -> None:
        """The claim happened, the worker doesn't know."""
        worker = self.workers[number]
        asking = self._asking(worker, most)
        self.broker.scripts.claim(asking)
        worker.claimant.unanswered(asking)

    @rule(number=workers_by_number, most=st.sampled_from([1, 3]))
    def claim_asked_twice(self, number: int, most: int) -> None:
        """The client library tried again."""
        worker = self.workers[number]
        asking = self._asking(worker, most)
        first = self.broker.scripts.claim(asking)
        again = self.broker.scripts.claim(asking)
        assert not first.claimed or again.claimed == first.claimed
        self._serve(worker, asking, again)

    @rule(number=st.integers(1, 40))
    def settle(self, number: int) -> None:
        """It is revoked, wherever it waits."""
        had = look(self.client, QUEUES).claimed
        word = self.broker.scripts.settle(f"t{number}", "revoked")
        assert word == ("running" if f"t{number}" in had else "settled")

    @precondition(lambda self: self._busy(0))
    @rule(number=workers_by_number, which=st.integers(0, 9), later=st.booleans())
    def retry(self, number: int, which: int, later: bool) -> None:
        """A run ends and is to be tried again."""
        worker = self._busy(number)
        assert worker is not None
        claim_id = list(worker.running)[which % len(worker.running)]
        tag = worker.running.pop(claim_id)
        task = tag.removeprefix("tag-of-").rstrip("+")
        new = f"{tag}+"
        due = self.broker.now_ms() + 3_600_000 if later else None
        put = Put(list_of("a"), "a", message(task, self.key_of.get(tag), tag=new), "", due)
        (word,) = worker.claimant.finish_now([claim_id], put)
        assert word == ("superseded" if claim_id in self.superseded else "finished")
        if word == "finished":
            self.finished.add(tag)
            self.put_tags.add(new)
            if tag in self.key_of:
                self.key_of[new] = self.key_of[tag]

    @precondition(lambda self: self._busy(0))
    @rule(number=workers_by_number, which=st.integers(0, 9))
    def bury(self, number: int, which: int) -> None:
        """A run ends as a dead letter."""
        worker = self._busy(number)
        assert worker is not None
        claim_id = list(worker.running)[which % len(worker.running)]
        tag = worker.running.pop(claim_id)
        (word,) = worker.claimant.finish_now([claim_id], "it is dead")
        assert word == ("superseded" if claim_id in self.superseded else "finished")
        if word == "finished":
            self.finished.add(tag)
            kept = self.client.hget(keys.DEAD, tag.removeprefix("tag-of-").rstrip("+"))
            assert tag.encode() in kept

    @rule(number=workers_by_number, claims_meanwhile=st.booleans())
    def renew(self, number: int, claims_meanwhile: bool) -> None:
        """The lease's thread, with the loop claiming while the renewal is on its way."""
        worker = self.workers[number]
        scripts = worker.claimant.scripts
        if claims_meanwhile:
            renew = scripts.renew

            def late(*arguments: Any) -> Any:
                self.claim(number, 1, 1)
                return renew(*arguments)

            replaced: Any = _With(scripts, renew=late)
            worker.claimant.scripts = replaced
        try:
            word = worker.claimant.renew()
        finally:
            worker.claimant.scripts = scripts
        if word == "expelled":
            self._rejoin(worker)

    def _rejoin(self, worker: Worker) -> None:
        """What nobody took meanwhile is its again."""
        self.superseded.update(worker.running)
        worker.claimant.rejoin()
        self.superseded -= {c for c in worker.running if worker.claimant.knows(c)}

    @precondition(lambda self: self._busy(0))
    @rule(number=workers_by_number, which=st.integers(0, 9))
    def finish(self, number: int, which: int) -> None:
        """A run ends."""
        worker = self._busy(number)
        assert worker is not None
        claim_id = list(worker.running)[which % len(worker.running)]
        tag = worker.running.pop(claim_id)
        (word,) = worker.claimant.finish_now([claim_id])
        if claim_id in self.superseded:
            assert word == "superseded"
        else:
            assert word == "finished"
            assert tag not in self.finished, "a second end of the same message"
            self.finished.add(tag)

    @precondition(lambda self: self._busy(0))
    @rule(number=workers_by_number, which=st.integers(0, 9), lost=st.booleans())
    def give_back(self, number: int, which: int, lost: bool) -> None:
        """A run never began, or its process died."""
        worker = self._busy(number)
        assert worker is not None
        claim_id = list(worker.running)[which % len(worker.running)]
        del worker.running[claim_id]
        worker.claimant.give_back(claim_id, lost=lost)

    @rule(number=workers_by_number)
    def lease_ends(self, number: int) -> None:
        """The node was silent for too long."""
        self.broker.expire(self.workers[number].claimant.member)

    @rule(number=workers_by_number)
    def reap(self, number: int) -> None:
        """Somebody looks after a node."""
        worker = self.workers[number]
        if self.broker.scripts.reap(worker.claimant.member) is not None:
            self.superseded.update(worker.running)

    @rule(number=workers_by_number)
    def dies_and_comes_anew(self, number: int) -> None:
        """`kill -9`; its successor has another incarnation, and its lease ends in time."""
        old = self.workers[number].claimant
        self.workers[number] = self._join(old.node)
        self.workers[number].serves = ("b",) if number == 2 else QUEUES
        self.broker.expire(old.member)
        self.broker.scripts.reap(old.member)

    @rule(number=workers_by_number)
    def leaves_and_rejoins(self, number: int) -> None:
        """In good order, with runs that it didn't wait for."""
        worker = self.workers[number]
        worker.claimant.leave()
        self._rejoin(worker)

    @rule(key=st.sampled_from(["k", "k", "k-2"]))
    def lock_is_taken_away(self, key: str) -> None:
        """A failover lost it."""
        self.broker.steal_lock(key)

    @precondition(lambda self: self._busy(0))
    @rule(number=workers_by_number, other=workers_by_number, parks=st.booleans())
    def run_is_overtaken(self, number: int, other: int, parks: bool) -> None:
        """Its lock is lost, with one parked behind it or not, and a newcomer takes it or not."""
        worker = self._busy(number)
        assert worker is not None
        keyed = [c for c in worker.running if c in self.running_key]
        if not keyed:
            return
        key = self.running_key[keyed[-1]]
        if parks:
            self.put(key, 0, "a", False, Needs(), "wait")
            self.claim(other, 2, 1)
        self.broker.steal_lock(key)
        if not parks:
            self.put(key, 0, "a", False, Needs(), "wait")
            self.claim(other, 2, 1)

    # What holds at all times.

    @invariant()
    def all_is_in_order(self) -> None:
        """One place for each message, one claim for each key."""
        picture = self.broker.audit()
        assert set(picture.places()) == self.put_tags - self.finished

    def teardown(self) -> None:
        """Then nothing more happens, and one node is left."""
        try:
            self._ends()
        finally:
            self.client.close()

    def _ends(self) -> None:
        for worker in self.workers:
            self.broker.expire(worker.claimant.member)
            self.broker.scripts.reap(worker.claimant.member)
        self.time_passes()
        last = self._join("last")
        idle = 0
        while idle < 2:
            asking = self._asking(last, 5)
            word = self._serve(last, asking, self.broker.scripts.claim(asking))
            idle = idle + 1 if word == "nothing" else 0
            for held, tag in last.running.items():
                assert last.claimant.finish_now([held]) == ["finished"]
                assert tag not in self.finished, "a second end of the same message"
                self.finished.add(tag)
            last.running.clear()
        assert self.finished == self.put_tags
        picture = look(self.client, QUEUES)
        assert not picture.places()
        assert not picture.locks
        assert not picture.deliveries


class _With:
    """An object with something of it replaced."""

    def __init__(self, whole: Any, **replaced: Any) -> None:
        self._whole = whole
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One server for all examples."""
    with running_redis(tmp_path_factory.mktemp("redis")) as Machine.server:
        yield


def _run(examples: int, steps: int, *phases: Phase) -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            phases=phases,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_claims() -> None:
    """Enough to find what has been wrong here before."""
    # Making a failure small takes longer than this test may: the first one found is shown.
    _run(80, 40, Phase.generate)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_claims_for_long() -> None:
    """Longer lives, and more of them."""
    _run(1000, 80, Phase.generate, Phase.shrink)
