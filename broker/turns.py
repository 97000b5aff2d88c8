"""What a node holds, and whose turn it is to run.

- *Room*: it claims what fits beside what it holds, and ahead of that no more than a moment's work.
- What it holds begins when it fits beside what runs, in the order in which it came.
- Short ones that wait for a process go to it together, and take their turns in the room of the
  first of them.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.claims import Claimed
from broker.needs import NONE, Needs, Room

AHEAD = 0.1
"""Seconds of work that may be claimed before there is room for it."""
SHORT = 0.005
"""Seconds of work that one process may be handed at once."""
MOST_AT_ONCE = 64
MOST_TOGETHER = 32
_NEW_WEIGHT = 0.3
"""Of the last run in a task's recent run time."""


@dataclass
class Held:
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

    @property
    def as_known(self) -> Claimed:
        """What it brought, with the key and the needs that have turned out since."""
        return self.claimed._replace(key=self.key or self.claimed.key, needs=self.needs.text)


@dataclass
class _Waiting:
    """A claim that is to begin when there is room."""

    claim_id: str
    job: Any = field(repr=False)
    may_share: bool


class Turns:
    """The claims that one node holds. Safe to use from any thread."""

    def __init__(self, slots: Callable[[], int], patience: float) -> None:
        """`slots`: how many processes the pool has. `patience`: after so many seconds a job that
        fits no node at once gets one kept free for it.
        """
        self.on_start: Callable[[Sequence[Any]], object] = lambda jobs: None
        """Who hands to the pool what may begin: one, or several short ones for one process."""
        self.turns = 0
        """Counts what has begun or ended: there may be room again."""
        self._slots = slots
        self._patience_ms = int(patience * 1000)
        self._guard = threading.RLock()
        self._room = Room(0, 0, 0, ())
        self._held: dict[str, Held] = {}
        self._waiting: deque[_Waiting] = deque()
        self._starting = False
        self._begins_no_more = False
        self._running = 0
        self._takes: dict[str, float] = {}
        self._early: set[str] = set()

    def _measure(self, room: Room) -> None:
        """What the node has; what it holds and runs is taken off."""
        for one in self._held.values():
            room.hold(one.needs)
            if one.runs and not one.follows:
                room.run(one.needs)
        self._room = room

    def _hold(self, claimed: Claimed, now: float) -> None:
        # What is settled already takes no room.
        needs = NONE if claimed.settled else Needs.parse(claimed.needs)
        self._held[claimed.claim_id] = Held(claimed, needs, now)
        self._room.hold(needs)

    def has_enough(self) -> bool:
        """Whether so much waits its turn here that it needn't ask for more yet."""
        return len(self._waiting) >= MOST_AT_ONCE // 2

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

    def claimed(self, claim_id: str) -> Claimed | None:
        """What that claim brought, and what has turned out since; None if it has ended."""
        held = self._held.get(claim_id)
        return None if held is None else held.as_known

    def overdue(self, seconds: float) -> list[str]:
        """What was claimed so long ago and isn't the pool's yet."""
        before = time.monotonic() - seconds
        with self._guard:
            return [c for c, held in self._held.items() if not held.runs and held.since < before]

    def start(self, claim_id: str, job: Any, *, may_share: bool = False) -> None:
        """Give `job` to `on_start` when there is room beside what runs: now, or when something has
        ended. If it `may_share` and is short, others may go with it to the same process.
        """
        with self._guard:
            self._waiting.append(_Waiting(claim_id, job, may_share))
        self._start_waiting()

    def begin_no_more(self) -> None:
        """The node ends: what waits for its turn won't get it."""
        with self._guard:
            self._begins_no_more = True

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
            if self._waiting and not self._begins_no_more:
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

    def _followers(self, first: Held) -> list[Any]:
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

    def _may_start(self, held: Held) -> bool:
        if held.claimed.settled:
            return True
        return self._running < self._slots() and self._room.fits_now(held.needs)
