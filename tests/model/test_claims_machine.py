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
from broker.scripts import Claimed
from tests.broker_kit import Broker, list_of, lists_of, look, message
from tests.redis_server import RedisServer, running_redis

QUEUES = ("a", "b")
# Most of them meet in one key and one queue: what is to be found needs several of a key at once.
SOME_KEY = st.sampled_from(["k", "k", "k", "k-2", None])
SOME_QUEUE = st.sampled_from(["a", "a", "a", "b"])


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


class Claims(RuleBasedStateMachine):
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
        claimant = Counted(
            self.broker.scripts, name, 3600, lambda nonce: NodeDescription(1, 1, "here", 1, nonce)
        )
        claimant.register()
        return Worker(claimant)

    @initialize(keys=st.lists(SOME_KEY, min_size=2, max_size=6))
    def all_have_work(self, keys: list[str | None]) -> None:
        """Nothing is found in an empty fleet."""
        for key in keys:
            self.put(key, 0, "a", False)
        self.claim(0, 1)
        self.claim(1, 2)

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
    )
    def put(self, key: str | None, priority: int, queue: str, later: bool) -> None:
        """Our producer."""
        number = next(self.numbers)
        self.put_tags.add(f"tag-of-t{number}")
        due = self.broker.now_ms() + 3_600_000 if later else None
        self.broker.put(f"t{number}", key, priority=priority, queue=queue, due_ms=due)

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

    def _ask(self, worker: Worker, claim_id: str) -> Any:
        return self.broker.scripts.claim(
            worker.claimant.member, claim_id, worker.serves, lists_of(*worker.serves)
        )

    def _serve(self, worker: Worker, claim_id: str, reply: Any) -> str:
        """What the transport does with a reply. Whether anything was there."""
        if not isinstance(reply, Claimed):
            worker.claimant.forget(claim_id)
            return str(reply)
        tag = str(json.loads(reply.payload)["properties"]["delivery_tag"])
        if not reply.qualified and tag in self.key_of:
            word = self.broker.scripts.requalify(
                worker.claimant.member, claim_id, reply.queue, self.key_of[tag], None
            )
            if word != "locked":
                assert word == "parked"
                worker.claimant.forget(claim_id)
                return "again"
        elif tag in self.key_of:
            assert reply.key == self.key_of[tag], "it runs without its lock"
        worker.running[claim_id] = tag
        key = self.key_of.get(tag) or reply.key
        if key:
            self.running_key[claim_id] = key
        return "claimed"

    @rule(number=workers_by_number, times=st.integers(1, 3))
    def claim(self, number: int, times: int) -> None:
        """Claim and begin."""
        worker = self.workers[number]
        for _ in range(times):
            claim_id = worker.claimant.expect()
            self._serve(worker, claim_id, self._ask(worker, claim_id))

    @rule(number=workers_by_number)
    def claim_with_the_reply_lost(self, number: int) -> None:
        """The claim happened, the worker doesn't know."""
        worker = self.workers[number]
        claim_id = worker.claimant.expect()
        self._ask(worker, claim_id)
        worker.claimant.forget(claim_id)

    @rule(number=workers_by_number)
    def claim_asked_twice(self, number: int) -> None:
        """The client library tried again."""
        worker = self.workers[number]
        claim_id = worker.claimant.expect()
        first = self._ask(worker, claim_id)
        again = self._ask(worker, claim_id)
        assert not isinstance(first, Claimed) or again == first
        self._serve(worker, claim_id, again)

    @rule(number=workers_by_number, claims_meanwhile=st.booleans())
    def renew(self, number: int, claims_meanwhile: bool) -> None:
        """The lease's thread, with the loop claiming while the renewal is on its way."""
        worker = self.workers[number]
        scripts = worker.claimant.scripts
        if claims_meanwhile:
            renew = scripts.renew

            def late(*arguments: Any) -> Any:
                self.claim(number, 1)
                return renew(*arguments)

            replaced: Any = _With(scripts, renew=late)
            worker.claimant.scripts = replaced
        try:
            word = worker.claimant.renew()
        finally:
            worker.claimant.scripts = scripts
        if word == "expelled":
            self.superseded.update(worker.running)
            worker.claimant.rejoin()

    @precondition(lambda self: self._busy(0))
    @rule(number=workers_by_number, which=st.integers(0, 9))
    def finish(self, number: int, which: int) -> None:
        """A run ends."""
        worker = self._busy(number)
        assert worker is not None
        claim_id = list(worker.running)[which % len(worker.running)]
        tag = worker.running.pop(claim_id)
        word = worker.claimant.finish_now(claim_id)
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
        self.superseded.update(worker.running)
        worker.claimant.rejoin()

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
            self.put(key, 0, "a", False)
            self.claim(other, 2)
        self.broker.steal_lock(key)
        if not parks:
            self.put(key, 0, "a", False)
            self.claim(other, 2)

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
        word = "claimed"
        while word in ("claimed", "again"):
            claim_id = last.claimant.expect()
            word = self._serve(last, claim_id, self._ask(last, claim_id))
            for held, tag in last.running.items():
                assert last.claimant.finish_now(held) == "finished"
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
    with running_redis(tmp_path_factory.mktemp("redis")) as Claims.server:
        yield


def _run(examples: int, steps: int, *phases: Phase) -> None:
    run_state_machine_as_test(
        Claims,
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
