"""Reading the trace of a mount, and counting what a piece of work cost.

Usable by a benchmark: `with counting(node) as cost: ...; cost.operations`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.nfs.node import Node

# Round trips that change something or read contents. Left out: look-ups, attributes, listings;
# fsync of a directory, which an NFS client answers by itself; write, flush and release, of which
# only the `store` that they lead to reaches the server; open, which here is a look-up.
COSTS = frozenset(
    {
        *("create", "store", "fsync", "read", "truncate", "mkdir", "rmdir", "link", "symlink"),
        *("rename", "unlink", "chmod", "chown", "utimens"),
    }
)

Call = dict[str, Any]


def calls(lines: Iterable[str]) -> list[Call]:
    return [json.loads(line) for line in lines]


def succeeded(call: Call) -> bool:
    return isinstance(call["result"], int)


@dataclass
class Cost:
    """What a piece of work asked of the file server, by kind."""

    by_kind: Counter[str] = field(default_factory=Counter)
    calls: list[Call] = field(default_factory=list)

    @property
    def operations(self) -> int:
        """Those that change something or read contents."""
        return sum(count for kind, count in self.by_kind.items() if kind in COSTS)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(self.by_kind.items()))
        return f"{self.operations} operations ({kinds})"


def cost_of(made: list[Call]) -> Cost:
    """A read that found nothing more, the end of a file, isn't counted: clients know the size."""
    counted = [call for call in made if call["op"] != "read" or call["result"] != 0]
    return Cost(Counter(call["op"] for call in counted), made)


@contextmanager
def counting(node: Node) -> Iterator[Cost]:
    """The cost of what is done inside, filled in at the end."""
    before = node.calls_so_far()
    cost = Cost()
    yield cost
    found = cost_of(node.trace(since=before))
    cost.by_kind, cost.calls = found.by_kind, found.calls
