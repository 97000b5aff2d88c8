"""Which faults a run has, and when: a list drawn from its seed.

What a fault is done to is drawn here too, as a number from 0 to 1; which node or connection that is
depends on what there is by then, so two runs of one seed are alike and not the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "kill -9 of a node",
    "kill -9 of a pool child",
    "SIGSTOP past the lease",
    "connections cut",
    "network slow",
    "network silent",
    "Redis killed",
    "a node leaves",
    "a node joins",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

LEASE = 2.0
"""Seconds; of every node of a run."""
SLOW = 0.2
"""Seconds that a slow network adds to each round trip."""

_FIRST = 1.5
_QUIET_END = 2.0
_LASTS: dict[Kind, tuple[float, float]] = {
    "kill -9 of a node": (0.2, 4.0),
    "kill -9 of a pool child": (0.0, 0.0),
    "SIGSTOP past the lease": (1.3 * LEASE, 2.5 * LEASE),
    "connections cut": (0.0, 0.0),
    "network slow": (1.0, 5.0),
    "network silent": (0.3, 1.6 * LEASE),
    "Redis killed": (0.1, 3.0),
    "a node leaves": (0.5, 5.0),
    "a node joins": (4.0, 10.0),
}


@dataclass(frozen=True)
class Fault:
    """At so many seconds it begins; it is undone after it has lasted. `draw` picks its target."""

    at: float
    kind: Kind
    lasts: float
    draw: float


def plan(seed: int, seconds: float) -> list[Fault]:
    """The faults of a run, in their order. Nine in a row are of nine kinds."""
    rng = random.Random(seed)
    faults: list[Fault] = []
    bag: list[Kind] = []
    at = _FIRST
    while at < seconds - _QUIET_END:
        if not bag:
            bag = list(KINDS)
            rng.shuffle(bag)
        kind = bag.pop()
        faults.append(Fault(round(at, 3), kind, rng.uniform(*_LASTS[kind]), rng.random()))
        # Some meet, and some come after the dust has settled.
        at += rng.choice((0.3, 1.5, 3.0, 5.0)) * rng.uniform(0.6, 1.4)
    return faults
