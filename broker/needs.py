"""What a job needs of a node, and what a node has.

As text, which is how it travels and how it names a shape: `<cpus> <memory> <gpus> <label>,<label>`,
memory in bytes; nothing for a task that needs no more than a process of the pool.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """Memory is in bytes; labels are those that the node must have."""

    cpus: int = 0
    memory: int = 0
    gpus: int = 0
    labels: frozenset[str] = frozenset()

    @property
    def text(self) -> str:
        """As it travels: the same for the same needs."""
        if self == NONE:
            return ""
        labels = f" {','.join(sorted(self.labels))}" if self.labels else ""
        return f"{self.cpus} {self.memory} {self.gpus}{labels}"

    @classmethod
    def parse(cls, text: str) -> Needs:
        """What `text` said. What was never a need's text is no need."""
        fields = text.split(" ", 3)
        try:
            cpus, memory, gpus = (int(field) for field in fields[:3])
        except ValueError:
            return NONE
        labels = fields[3].split(",") if len(fields) == 4 else ()
        return cls(cpus, memory, gpus, frozenset(filter(None, labels)))


NONE = Needs()


class Room:
    """What a node has in all, and what of it is spare. To be guarded by who shares it."""

    def __init__(self, cpus: int, memory: int, gpus: int = 0, labels: Iterable[str] = ()) -> None:
        self.total = (cpus, memory, gpus)
        self.labels = sorted(labels)
        self._held = [0, 0, 0]
        self._running = [0, 0, 0]

    @property
    def spare(self) -> list[int]:
        """What no claim needs; below zero if some were claimed ahead."""
        return [total - held for total, held in zip(self.total, self._held, strict=True)]

    def hold(self, needs: Needs, times: int = 1) -> None:
        """It is claimed; -1: it has ended, or isn't ours."""
        _add(self._held, needs, times)

    def run(self, needs: Needs, times: int = 1) -> None:
        """It has begun; -1: it has ended."""
        _add(self._running, needs, times)

    def fits_now(self, needs: Needs) -> bool:
        """Whether it can begin beside what runs."""
        return all(
            wanted == 0 or used + wanted <= total
            for wanted, used, total in zip(_three(needs), self._running, self.total, strict=True)
        )

    def could_fit(self, needs: Needs) -> bool:
        """Whether this node could run it if it ran nothing else."""
        return needs.labels.issubset(self.labels) and all(
            wanted <= total for wanted, total in zip(_three(needs), self.total, strict=True)
        )

    def has_spare(self, needs: Needs) -> bool:
        """Whether it fits beside everything that is claimed."""
        return self.could_fit(needs) and all(
            wanted == 0 or wanted <= left
            for wanted, left in zip(_three(needs), self.spare, strict=True)
        )


def _three(needs: Needs) -> tuple[int, int, int]:
    return needs.cpus, needs.memory, needs.gpus


def _add(to: list[int], needs: Needs, times: int) -> None:
    for at, wanted in enumerate(_three(needs)):
        to[at] += times * wanted
