"""What a run of chaos records: facts, in the order in which they became known.

A history can be kept as a file of JSON lines and read back; the checker needs nothing else.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Submitted:
    """A producer handed a job in. Not `accepted`: it was told an error, and can't know."""

    task_id: str
    key: str | None
    accepted: bool
    durable: bool = False
    stock: bool = False
    """By a producer that doesn't know Cohort."""


@dataclass(frozen=True)
class Revoked:
    """Somebody asked for the job's end."""

    task_id: str


@dataclass(frozen=True)
class Ran:
    """A keyless job came to the end of its function, under that claim."""

    task_id: str
    claim_id: str


@dataclass(frozen=True)
class Committed:
    """Record `n` in the log of a key. `count` is what a success said that the counter became."""

    key: str
    n: int
    task_id: str
    state: str
    count: int | None = None


@dataclass(frozen=True)
class Recorded:
    """An outcome in a segment on the shared folder. `detail` tells two of one task apart."""

    task_id: str
    state: str
    detail: str
    error: str = ""
    """The type of a failure's exception."""


@dataclass(frozen=True)
class Answered:
    """What a producer that asks is told at the end."""

    task_id: str
    state: str


@dataclass(frozen=True)
class Files:
    """A key's directory at the end: its counter, and the task ids in its log, in order."""

    key: str
    count: int
    log: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """Something that should have gone from Redis and is there when all is over."""

    what: str


@dataclass(frozen=True)
class Ended:
    """A node ended that nobody had ended."""

    node: str
    exit_code: int


@dataclass(frozen=True)
class Injected:
    """A fault was done, so many seconds after the start."""

    at: float
    what: str
    to: str


Fact = Submitted | Revoked | Ran | Committed | Recorded | Answered | Files | Left | Ended | Injected
_KINDS = {
    kind.__name__: kind
    for kind in (
        *(Submitted, Revoked, Ran, Committed, Recorded, Answered, Files, Left, Ended, Injected),
    )
}
FINAL: frozenset[str] = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
"""The states that end a task."""


def save(history: Iterable[Fact], path: Path) -> None:
    """Write it down, a fact a line."""
    with path.open("w", encoding="utf-8") as file:
        for fact in history:
            file.write(json.dumps({"fact": type(fact).__name__, **dataclasses.asdict(fact)}) + "\n")


def load(path: Path) -> list[Fact]:
    """Read back what `save` wrote."""
    history: list[Fact] = []
    for line in path.read_text("utf-8").splitlines():
        fields = json.loads(line)
        kind = _KINDS[fields.pop("fact")]
        if kind is Files:
            fields["log"] = tuple(fields["log"])
        history.append(kind(**fields))
    return history
