"""One worker's claims: what it has asked for, and what becomes of it. What it holds and when that
begins is the other half, broker/turns.py.

A lease covers all of them. Its rules:

- *Authority* to claim comes from a lease on Redis time; the scripts check it.
- *Trust*: from the worker's side the lease counts from the moment when the last successful
  renewal was **sent**. A slow reply never extends it.
- *Known* claims are named in each renewal, from before they are asked for until they have ended.
  What Redis holds for this incarnation and the worker doesn't know is a lost reply: it goes back.
  Claims are numbered, so that a renewal doesn't speak of those asked for after it was sent.
- *Failure*: a node that can't renew claims nothing. When its lease has ended its claims go back to
  the queues, and what it still finishes is told `superseded`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from broker.claims import Asking, Claimed, Claims, Running
from broker.needs import Room
from broker.producing import Put
from broker.scripts import Scripts
from broker.turns import MOST_AT_ONCE, Held, Turns

CLAIM_PREFIX = "claim-"
_LOST_AFTER = 5.0
"""Seconds after which an answer isn't waited for; an idle node's comes after 0.1 s."""
"""What tells a claim id from a stock delivery tag, which is a UUID."""

End = Put | str | None
"""How a claim ends: a retry to be put with it, why it is a dead letter, or neither."""


@dataclass(frozen=True)
class NodeDescription:
    """What a node tells of itself when it registers. Memory is in bytes."""

    cpus: int
    memory: int
    host: str
    pid: int
    nonce: str
    life: str = ""
    """Names the segments that its process writes, through all its incarnations."""
    gpus: int = 0
    labels: tuple[str, ...] = ()


class Claimant(Turns):
    """The claims of one incarnation of one node. Safe to use from any thread."""

    def __init__(
        self,
        scripts: Scripts,
        node: str,
        lease: float,
        describe: Callable[[str], NodeDescription],
        *,
        slots: Callable[[], int] = lambda: 1 << 20,
        patience: float = 30.0,
    ) -> None:
        """`slots`: how many processes the pool has. `patience`: after so many seconds a job that
        fits no node at once gets one kept free for it.
        """
        super().__init__(slots, patience)
        self.scripts = scripts
        self.node = node
        self.lease = lease
        self.on_finish: Callable[[str, End], object] | None = None
        """Who acknowledges: the node's writer, once the outcome is on disk."""
        self.on_claim: Callable[[Claimed, Mapping[str, Any]], object] | None = None
        """Who notes what was claimed, and the headers of its message."""
        self._describe = describe
        self._known: set[str] = set()
        self._asked: dict[int, tuple[Asking, float]] = {}
        """What isn't answered yet, and since when, by its first number."""
        self._ends: dict[str, End] = {}
        self._sequence = 0
        self._birth = ""
        self._begin_incarnation()

    def _begin_incarnation(self) -> None:
        self.incarnation = uuid.uuid4().hex[:12]
        self.trusted_until = 0.0

    @property
    def member(self) -> str:
        """`<node>:<incarnation>`, as the scripts know it."""
        return f"{self.node}:{self.incarnation}"

    # The lease.

    def register(self) -> None:
        """Begin the lease of this incarnation."""
        description = self._describe(self.incarnation)
        with self._guard:
            self._measure(
                Room(description.cpus, description.memory, description.gpus, description.labels)
            )
        sent = time.monotonic()
        told = json.dumps(asdict(description))
        self._birth = self.scripts.register(self.member, self.lease, told)
        self.trusted_until = sent + self.lease

    def renew(self) -> Literal["renewed", "expelled"]:
        """Renew the lease. After 'expelled', `rejoin`."""
        with self._guard:
            for asking, at in list(self._asked.values()):
                if time.monotonic() > at + _LOST_AFTER:
                    # A connection that has died without a word. Should it speak yet, `answered`
                    # will find that they aren't ours.
                    self._known.difference_update(_ids(asking))
            asked, known = self._sequence, sorted(self._known)
        sent = time.monotonic()
        word = self.scripts.renew(self.member, self.lease, asked, known)
        if word == "renewed":
            self.trusted_until = sent + self.lease
        return word

    def rejoin(self) -> None:
        """Begin a new incarnation. What it still runs is its again, unless another has it; that
        goes on taking room here until it ends, and is told `superseded` then.
        """
        with self._guard:
            self._known.clear()
            for claim_id in [c for c, held in self._held.items() if not held.runs]:
                self._let_go(claim_id)
            running = [_running(held) for held in self._held.values() if held.runs]
        self._begin_incarnation()
        birth = self._birth
        self.register()
        words = self.scripts.adopt(self.member, running, emptied=birth != self._birth)
        with self._guard:
            adopted = [
                one.claimed.claim_id
                for one, word in zip(running, words, strict=True)
                if word == "adopted" and one.claimed.claim_id in self._held
            ]
            self._known.update(adopted)
            early = [claim_id for claim_id in adopted if claim_id in self._early]
        if early:
            # They have begun, so they are acknowledged. Nobody else would do it: that was told the
            # Redis, or the incarnation, that is gone.
            self.finish_now(early)

    def leave(self) -> int:
        """End the lease and return what is left of its claims. How many went back."""
        return self.scripts.leave(self.member)

    # Claiming.

    def ask(
        self,
        most: int,
        queues: Sequence[str],
        lists: Sequence[tuple[str, str]],
        tops: Sequence[str],
    ) -> Asking:
        """Claims to be asked for. They are known from now on: the reply may be lost, they may not.
        `answered` says what came of it, or `unanswered`.
        """
        most = max(1, min(most, MOST_AT_ONCE))
        with self._guard:
            first = self._sequence + 1
            self._sequence += most
            asking = Asking(
                self.member,
                f"{CLAIM_PREFIX}{self.incarnation}-",
                first,
                most,
                self._what_fits(),
                queues,
                lists,
                tops,
            )
            self._known.update(_ids(asking))
            self._asked[first] = asking, time.monotonic()
        return asking

    def answered(self, asking: Asking, claims: Claims) -> bool:
        """What it brought is held; the rest is nothing. False if that comes too late: the lease may
        have ended since, or it was given up. Then nobody here may begin it.
        """
        now, ids = time.monotonic(), _ids(asking)
        with self._guard:
            self._asked.pop(asking.first, None)
            in_time = now < self.trusted_until and self._known.issuperset(ids)
            self._known.difference_update(ids)
            if in_time:
                for claimed in claims.claimed:
                    self._known.add(claimed.claim_id)
                    self._hold(claimed, now)
        return in_time

    def unanswered(self, asking: Asking) -> None:
        """The connection broke. If Redis claimed something, the next renewal returns it."""
        with self._guard:
            self._asked.pop(asking.first, None)
            self._known.difference_update(_ids(asking))

    def forget(self, claim_id: str) -> None:
        """It isn't ours, or no longer; if Redis thinks otherwise, the next renewal returns it."""
        with self._guard:
            self._known.discard(claim_id)
            self._let_go(claim_id)
        self._start_waiting()

    def forget_unbegun(self, claim_ids: Iterable[str]) -> None:
        """Forget those of them that the pool hasn't begun. One that has ended stays known until it
        is acknowledged: a renewal in between would return it, and it would run again.
        """
        with self._guard:
            for claim_id in claim_ids:
                held = self._held.get(claim_id)
                if held is not None and not held.begun:
                    self._known.discard(claim_id)
                    self._let_go(claim_id)
        self._start_waiting()

    def knows(self, claim_id: str) -> bool:
        """Whether this claim is asked for or held."""
        return claim_id in self._known

    def take_back(self, claim_id: str) -> bool:
        """Forget one that isn't the pool's yet; False if it is, or has ended. Its turn can't come
        any more.
        """
        with self._guard:
            held = self._held.get(claim_id)
            if held is None or held.runs:
                return False
            self._known.discard(claim_id)
            self._let_go(claim_id)
        self._start_waiting()
        return True

    # Ending.

    def ends_as(self, claim_id: str, end: End) -> None:
        """Its end is to be more than an acknowledgement: a retry, or why it is a dead letter."""
        self._ends[claim_id] = end

    def finish(self, claim_id: str) -> None:
        """It has ended: acknowledge, after whatever has to be written first."""
        end = self._ends.pop(claim_id, None)
        if self.on_finish is not None:
            self.on_finish(claim_id, end)
        else:
            self.finish_now([claim_id], end)

    def finish_now(
        self, claim_ids: Sequence[str], end: End = None
    ) -> list[Literal["finished", "superseded"]]:
        """Acknowledge at once, and forget them."""
        # The incarnation that claimed it is in its id: after a rejoin the old one's is gone.
        if end is None:
            words = self.scripts.finish(self.member, claim_ids)
        elif isinstance(end, str):
            words = [self.scripts.bury(self.member, claim_id, end) for claim_id in claim_ids]
        else:
            words = [self.scripts.requeue(self.member, claim_id, end) for claim_id in claim_ids]
        for claim_id in claim_ids:
            self.forget(claim_id)
        return words

    def give_back(self, claim_id: str, *, lost: bool = False) -> None:
        """Return it to the front; `lost` counts against its limit of deliveries."""
        self.scripts.give_back(self.member, claim_id, lost=lost)
        self.forget(claim_id)


def _running(held: Held) -> Running:
    message = json.loads(held.claimed.payload)
    priority = message["properties"].get("priority")
    return Running(
        held.as_known,
        message["headers"]["id"],
        held.name,
        priority if isinstance(priority, int) and 0 <= priority <= 9 else 0,
    )


def _ids(asking: Asking) -> list[str]:
    return [f"{asking.prefix}{asking.first + n}" for n in range(asking.most)]
