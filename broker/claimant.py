"""One worker's claims: what it has asked for, holds, and is running.

A lease covers all of them. Its rules:

- *Authority* to claim comes from a lease on Redis time; the scripts check it.
- *Trust*: from the worker's side the lease counts from the moment when the last successful
  renewal was **sent**. A slow reply never extends it.
- *Known* claims are named in each renewal, from before they are asked for until they have ended.
  What Redis holds for this incarnation and the worker doesn't know is a lost reply: it goes back.
  Claims are numbered, so that a renewal doesn't speak of those asked for after it was sent.
- *Room*: it claims what fits beside what it holds, and ahead of that no more than a moment's work.
  What it holds begins when it fits beside what runs.
- *Failure*: a node that can't renew claims nothing. When its lease has ended its claims go back to
  the queues, and what it still finishes is told `superseded`.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from broker.claims import Asking, Claimed, Claims, Running
from broker.needs import NONE, Needs, Room
from broker.producing import Put
from broker.scripts import Scripts

CLAIM_PREFIX = "claim-"
"""What tells a claim id from a stock delivery tag, which is a UUID."""

AHEAD = 0.1
"""Seconds of work that may be claimed before there is room for it."""
SHORT = 0.005
"""Seconds of work that one process may be handed at once."""
MOST_AT_ONCE = 64
MOST_TOGETHER = 32
_NEW_WEIGHT = 0.3
"""Of the last run in a task's recent run time."""


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


@dataclass
class _Held:
    """One claim that brought a message."""

    claimed: Claimed
    needs: Needs
    since: float
    begun: float = 0.0
    name: str = ""
    key: str = ""
    """Its job key, if the message didn't say it."""
    runs: bool = False
    """Whether it is the pool's."""
    together: bool = False
    """Whether others go with it to its process."""
    follows: bool = False
    """Whether it takes its turn in the room of another one."""


@dataclass
class _Waiting:
    """A claim that is to begin when there is room."""

    claim_id: str
    job: Any = field(repr=False)
    may_share: bool


class Claimant:
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
        self.scripts = scripts
        self.node = node
        self.lease = lease
        self.on_finish: Callable[[str, End], object] | None = None
        """Who acknowledges: the node's writer, once the outcome is on disk."""
        self.on_claim: Callable[[Claimed, Mapping[str, Any]], object] | None = None
        """Who notes what was claimed, and the headers of its message."""
        self.on_start: Callable[[Sequence[Any]], object] = lambda jobs: None
        """Who hands to the pool what may begin: one, or several short ones for one process."""
        self._describe = describe
        self._slots = slots
        self._patience_ms = int(patience * 1000)
        self._guard = threading.RLock()
        self._known: set[str] = set()
        self._held: dict[str, _Held] = {}
        self._waiting: deque[_Waiting] = deque()
        self._starting = False
        self._running = 0
        self.turns = 0
        """Counts what has begun or ended: there may be room again."""
        self._takes: dict[str, float] = {}
        self._early: set[str] = set()
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
            held = list(self._held.values())
            self._room = Room(
                description.cpus, description.memory, description.gpus, description.labels
            )
            for one in held:
                self._room.hold(one.needs)
                if one.runs and not one.follows:
                    self._room.run(one.needs)
        sent = time.monotonic()
        told = json.dumps(asdict(description))
        self._birth = self.scripts.register(self.member, self.lease, told)
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
        for one, word in zip(running, words, strict=True):
            if word == "adopted":
                with self._guard:
                    if one.claimed.claim_id in self._held:
                        self._known.add(one.claimed.claim_id)

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
        return asking

    def has_enough(self) -> bool:
        """Whether so much waits its turn here that it needn't ask for more yet."""
        return len(self._waiting) >= MOST_AT_ONCE // 2

    def answered(self, asking: Asking, claims: Claims) -> None:
        """What it brought is held; the rest is nothing."""
        now = time.monotonic()
        with self._guard:
            self._known.difference_update(_ids(asking))
            for claimed in claims.claimed:
                self._known.add(claimed.claim_id)
                # What is settled already takes no room.
                needs = NONE if claimed.settled else Needs.parse(claimed.needs)
                self._held[claimed.claim_id] = _Held(claimed, needs, now)
                self._room.hold(needs)

    def unanswered(self, asking: Asking) -> None:
        """The connection broke. If Redis claimed something, the next renewal returns it."""
        with self._guard:
            self._known.difference_update(_ids(asking))

    def named(self, claim_id: str, name: str) -> None:
        """Which task it is."""
        with self._guard:
            held = self._held.get(claim_id)
            if held is not None:
                held.name = name

    def needs(self, claim_id: str, needs: Needs, key: str) -> None:
        """What it needs, and its key, have turned out only now."""
        with self._guard:
            held = self._held.get(claim_id)
            if held is not None:
                self._room.hold(held.needs, -1)
                held.needs, held.key = needs, key
                self._room.hold(needs)

    def has_spare(self, needs: Needs) -> bool:
        """Whether it fits beside everything that is claimed."""
        with self._guard:
            return self._room.has_spare(needs)

    def _what_fits(self) -> str:
        now, ahead = time.monotonic(), AHEAD
        for held in self._held.values():
            if held.begun:
                # One that runs for longer than its like did: they may take as long.
                least = AHEAD if held.together else self._takes.get(held.name, 0.0)
                if now - held.begun > least and not held.follows:
                    self._takes[held.name] = now - held.begun
            else:
                ahead -= self._takes.get(held.name, AHEAD)
        ahead = max(0.0, ahead)
        takes = {n: int(t * 1e6) + 1 for n, t in self._takes.items() if t <= ahead}
        return json.dumps(
            {
                "total": self._room.total,
                "spare": self._room.spare,
                "labels": self._room.labels,
                "slots": self._slots() - len(self._held),
                "ahead": int(ahead * 1e6),
                "takes": takes,
                "patience": self._patience_ms,
            }
        )

    # Running.

    def start(self, claim_id: str, job: Any, *, may_share: bool = False) -> None:
        """Give `job` to `on_start` when there is room beside what runs: now, or when something has
        ended. If it `may_share` and is short, others may go with it to the same process.
        """
        with self._guard:
            self._waiting.append(_Waiting(claim_id, job, may_share))
        self._start_waiting()

    def begin(self, claim_id: str) -> None:
        """The pool runs it: it outlives a lost connection."""
        with self._guard:
            held = self._held.get(claim_id)
            if held is not None:
                held.begun = time.monotonic()
                self.turns += 1

    def acknowledged_early(self, claim_id: str) -> None:
        """It is acknowledged when it begins; its room is taken until `ended`."""
        self._early.add(claim_id)

    def ended(self, claim_id: str, took: float | None = None) -> None:
        """The pool is done with it, whenever it was acknowledged. `took`: its seconds, if known."""
        self._early.discard(claim_id)
        self.end(claim_id, took)

    def end(self, claim_id: str, took: float | None = None) -> None:
        """The pool is done with it: its room is another's, though it isn't acknowledged yet."""
        with self._guard:
            if claim_id in self._early:
                return
            held = self._held.get(claim_id)
            if held is None:
                return
            if held.begun and not (held.together and took is None):
                took = time.monotonic() - held.begun if took is None else took
                before = self._takes.get(held.name, took)
                self._takes[held.name] = before + _NEW_WEIGHT * (took - before)
            self._let_go(claim_id)
        self._start_waiting()

    def pass_room(self, ended: Sequence[str], heir: str) -> None:
        """These end, and the process that they shared is still at another one."""
        with self._guard:
            to = self._held.get(heir)
            for claim_id in ended:
                held = self._held.get(claim_id)
                if to is not None and held is not None and held.runs and not held.follows:
                    held.follows, to.follows = True, False

    def forget(self, claim_id: str) -> None:
        """It isn't ours, or no longer; if Redis thinks otherwise, the next renewal returns it."""
        with self._guard:
            self._known.discard(claim_id)
            self._let_go(claim_id)
        self._start_waiting()

    def knows(self, claim_id: str) -> bool:
        """Whether this claim is asked for or held."""
        return claim_id in self._known

    def claimed(self, claim_id: str) -> Claimed | None:
        """What that claim brought, until it has ended."""
        held = self._held.get(claim_id)
        return None if held is None else held.claimed

    def has_begun(self, claim_id: str) -> bool:
        """Whether the pool runs it."""
        held = self._held.get(claim_id)
        return held is not None and bool(held.begun)

    def running(self) -> int:
        """How many claims the pool runs."""
        with self._guard:
            return sum(bool(held.begun) for held in self._held.values())

    def overdue(self, seconds: float) -> list[str]:
        """What was claimed so long ago and isn't the pool's yet."""
        before = time.monotonic() - seconds
        with self._guard:
            return [c for c, held in self._held.items() if not held.runs and held.since < before]

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

    def _let_go(self, claim_id: str) -> None:
        if claim_id in self._early:
            return
        held = self._held.pop(claim_id, None)
        if held is not None:
            self.turns += 1
            self._room.hold(held.needs, -1)
            if held.runs and not held.follows:
                self._running -= 1
                self._room.run(held.needs, -1)

    def _start_waiting(self) -> None:
        with self._guard:
            if self._starting:
                return  # Whoever is at it, maybe this thread further up, looks once more.
            self._starting = True
        while jobs := self._next_to_start():
            try:
                self.on_start(jobs)
            except BaseException:
                self._starting = False
                raise

    def _next_to_start(self) -> list[Any]:
        with self._guard:
            if self._waiting:
                held = self._held.get(self._waiting[0].claim_id)
                if held is None or self._may_start(held):
                    first = self._waiting.popleft()
                    if held is None:
                        return [first.job]  # Given back meanwhile, as it will find out.
                    held.runs = True
                    self._running += 1
                    self._room.run(held.needs)
                    followers = self._followers(held) if first.may_share else []
                    return [first.job, *followers]
            self._starting = False
            return []

    def _followers(self, first: _Held) -> list[Any]:
        """Those that wait next and are short enough to take their turns behind it."""
        idle = max(0, self._slots() - self._running)
        most = min(MOST_TOGETHER - 1, len(self._waiting) // (idle + 1))
        left = SHORT - self._takes.get(first.name, SHORT)
        followers: list[Any] = []
        while self._waiting and len(followers) < most:
            held = self._held.get(self._waiting[0].claim_id)
            if held is None or not self._waiting[0].may_share or held.claimed.settled:
                break
            left -= self._takes.get(held.name, SHORT)
            if left < 0 or held.needs != first.needs:
                break
            held.runs = held.follows = held.together = first.together = True
            followers.append(self._waiting.popleft().job)
        return followers

    def _may_start(self, held: _Held) -> bool:
        if held.claimed.settled:
            return True
        return self._running < self._slots() and self._room.fits_now(held.needs)

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


def _running(held: _Held) -> Running:
    message = json.loads(held.claimed.payload)
    priority = message["properties"].get("priority")
    return Running(
        # A stock producer's message whose key has turned out since is known by it.
        held.claimed._replace(key=held.key or held.claimed.key, needs=held.needs.text),
        message["headers"]["id"],
        held.name,
        priority if isinstance(priority, int) and 0 <= priority <= 9 else 0,
    )


def _ids(asking: Asking) -> list[str]:
    return [f"{asking.prefix}{asking.first + n}" for n in range(asking.most)]
