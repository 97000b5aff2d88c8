"""What an adversarial mount is told to do: settings, and rules for single calls.

A rule waits for the `at`-th call of a kind (by a process, on a path) and then does one thing to it,
`times` times over. Everything here travels as JSON, so a test can change the script while mounted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

Action = Literal[
    "fail",  # the call isn't made and says `error`
    "lose_reply",  # the call is made and says `error` all the same
    "kill",  # the caller dies by SIGKILL, the call isn't made
    "kill_after",  # the caller dies by SIGKILL, the call is made
    "power",  # as kill, and the machine goes with it: what wasn't durable is gone
    "torn",  # of what goes to the server only `bytes` arrive, then it says `error`
    "delay",  # `seconds` pass first
    "hold",  # the call waits until the test releases it
]

# What changes something that others may see or that must survive. A call of these is a crash point.
CHANGES = frozenset(
    {
        *("create", "write", "store", "fsync", "fsyncdir", "truncate", "mkdir", "rmdir", "link"),
        *("symlink", "rename", "unlink", "chmod", "chown", "utimens"),
    }
)


@dataclass
class Rule:
    do: Action
    op: str = "*"
    """A kind of call; several with "|"; "*" is every one of CHANGES."""
    at: int = 1
    times: int | None = 1
    path: str = "*"
    pid: int | None = None
    error: int = errno.EIO
    bytes: int = 0
    seconds: float = 0.0
    seen: int = 0
    fired: int = 0

    def wants(self, op: str, path: str, pid: int) -> bool:
        """Count this call; whether the rule takes effect on it."""
        if op not in (CHANGES if self.op == "*" else self.op.split("|")):
            return False
        if self.pid not in (None, pid) or not fnmatchcase(path, self.path):
            return False
        self.seen += 1
        if self.seen < self.at or (self.times is not None and self.fired >= self.times):
            return False
        self.fired += 1
        return True


@dataclass
class Settings:
    """How this client caches. The default is the worst that was measured on a real one."""

    cache_seconds: float = 30.0
    """How long names (also missing ones), attributes and listings are believed unasked."""
    stale_listings: bool = False
    """Opening a directory doesn't ask the server for a new listing (a mount with `nocto`)."""
    believes_after_eexist: bool = False
    """Also after the server said EEXIST the name is believed missing. Linux isn't that bad: its
    mkdir, link and exclusive create drop what they knew of the name."""
    buffered: bool = True
    """What is written stays in the client's memory until fsync or close."""
    is_disk: bool = False
    """A local disk instead: only fsync makes bytes durable, only fsync of a directory names."""
    seed: int = 0
    """Chooses what of the undurable is lost with the power; 0: all of it."""


@dataclass
class Script:
    settings: Settings = field(default_factory=Settings)
    rules: list[Rule] = field(default_factory=list)

    def meant_for(self, op: str, path: str, pid: int) -> list[Rule]:
        return [rule for rule in self.rules if rule.wants(op, path, pid)]


def to_json(rule: Rule) -> dict[str, Any]:
    return asdict(rule)


def from_json(rules: Iterable[dict[str, Any]]) -> list[Rule]:
    return [Rule(**rule) for rule in rules]


def fail_with(code: int, path: str) -> OSError:
    return OSError(code, os.strerror(code), path)
