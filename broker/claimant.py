"""One worker's claims: what it has asked for, holds, and is running.

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
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from broker.scripts import Claimed, Scripts

CLAIM_PREFIX = "claim-"
"""What tells a claim id from a stock delivery tag, which is a UUID."""


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


class Claimant:
    """The claims of one incarnation of one node. Safe to use from any thread."""

    def __init__(
        self,
        scripts: Scripts,
        node: str,
        lease: float,
        describe: Callable[[str], NodeDescription],
    ) -> None:
        self.scripts = scripts
        self.node = node
        self.lease = lease
        self.on_finish: Callable[[str], object] | None = None
        """Who acknowledges: the node's writer, once the outcome is on disk."""
        self.on_claim: Callable[[str, Claimed, str, Mapping[str, Any]], object] | None = None
        """Who notes what was claimed: claim id, what it brought, its Redis list, its headers."""
        self._describe = describe
        self._guard = threading.Lock()
        self._known: set[str] = set()
        self._begun: set[str] = set()
        self._sequence = 0
        self._begin_incarnation()

    def _begin_incarnation(self) -> None:
        self.incarnation = uuid.uuid4().hex[:12]
        self.trusted_until = 0.0

    @property
    def member(self) -> str:
        """`<node>:<incarnation>`, as the scripts know it."""
        return f"{self.node}:{self.incarnation}"

    def register(self) -> None:
        """Begin the lease of this incarnation."""
        description = self._describe(self.incarnation)
        sent = time.monotonic()
        self.scripts.register(self.member, self.lease, json.dumps(asdict(description)))
        self.trusted_until = sent + self.lease

    def renew(self) -> Literal["renewed", "expelled"]:
        """Renew the lease. After 'expelled', `rejoin`."""
        with self._guard:
            asked, known = self._sequence, sorted(self._known)
        sent = time.monotonic()
        word = self.scripts.renew(self.member, self.lease, asked, known)
        if word == "renewed":
            self.trusted_until = sent + self.lease
        return word

    def rejoin(self) -> None:
        """Begin a new incarnation. What the old one still runs has been given to others."""
        with self._guard:
            self._known.clear()
            self._begun.clear()
        self._begin_incarnation()
        self.register()

    def leave(self) -> int:
        """End the lease and return what is left of its claims. How many went back."""
        return self.scripts.leave(self.member)

    def expect(self) -> str:
        """A new claim id. It is known from now on: the reply may be lost, the claim may not."""
        with self._guard:
            self._sequence += 1
            claim_id = f"{CLAIM_PREFIX}{self.incarnation}-{self._sequence}"
            self._known.add(claim_id)
        return claim_id

    def begin(self, claim_id: str) -> None:
        """The pool runs it: it outlives a lost connection."""
        with self._guard:
            self._begun.add(claim_id)

    def forget(self, claim_id: str) -> None:
        """It isn't ours, or no longer; if Redis thinks otherwise, the next renewal returns it."""
        with self._guard:
            self._known.discard(claim_id)
            self._begun.discard(claim_id)

    def knows(self, claim_id: str) -> bool:
        """Whether this claim is asked for or held."""
        return claim_id in self._known

    def has_begun(self, claim_id: str) -> bool:
        """Whether the pool runs it."""
        return claim_id in self._begun

    def running(self) -> int:
        """How many claims the pool runs."""
        return len(self._begun)

    def finish(self, claim_id: str) -> None:
        """It has ended: acknowledge, after whatever has to be written first."""
        if self.on_finish is not None:
            self.on_finish(claim_id)
        else:
            self.finish_now(claim_id)

    def finish_now(self, claim_id: str) -> Literal["finished", "superseded"]:
        """Acknowledge at once, and forget it."""
        # The incarnation that claimed it is in its id: after a rejoin the old one's is gone.
        word = self.scripts.finish(self.member, claim_id)
        self.forget(claim_id)
        return word

    def give_back(self, claim_id: str, *, lost: bool = False) -> None:
        """Return it to the front; `lost` counts against its limit of deliveries."""
        self.scripts.give_back(self.member, claim_id, lost=lost)
        self.forget(claim_id)
