"""What a job's function is handed: where it runs, on what version, and how to report.

A `Run` is one attempt of one job. Its directory belongs to it alone; what the function
leaves there becomes the next version when the function returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from logging import Logger
from pathlib import Path
from typing import Any, NoReturn

from errors import Refused
from storage.logs import OutputLog
from storage.manifest import LeftOut
from tasks.leaving import is_leaving


@dataclass(frozen=True)
class Progress:
    """How far a run has come. `total` is None while it isn't known."""

    done: float
    total: float | None
    unit: str


def _cannot() -> NoReturn:
    raise Refused("this run came from no queue: there is nobody to hand it over to")


@dataclass
class Run:
    """One attempt of one job, as its function sees it."""

    _place: Callable[[], Path] = field(repr=False)
    version: int
    """The version of the directory that this attempt started from; 0 before the first commit."""
    task_id: str
    claim_id: str
    """Names this attempt and no other, also among redeliveries of the same task."""
    attempt: int
    """1 for the first try; counts retries and deliveries that were lost with their node."""
    node: str
    deadline: datetime | None
    """When the job's timeout ends this attempt (UTC), or None."""
    _log: Callable[[], Logger] = field(repr=False)
    _report: Callable[[Progress], None] = field(repr=False)
    _is_cancelled: Callable[[], bool] = field(repr=False)
    output: OutputLog = field(default_factory=OutputLog.nowhere, repr=False)
    """What any terminal can follow while the run lasts: `./cohort logs -f ID`."""

    _locks: tuple[int, ...] = field(default=(), repr=False)
    """Who holds these descriptors keeps the directory from being used by another run."""
    _give_back: Callable[[], NoReturn] = field(default=_cannot, repr=False)
    _checkpoint: Callable[[], object] = field(default=lambda: None, repr=False)
    _complete: Callable[[Any, Sequence[LeftOut]], Any] | None = field(default=None, repr=False)
    """Makes the result of what the function returned and what the commit left out."""
    _version_to_commit: int | None = field(default=None, repr=False)

    @cached_property
    def directory(self) -> Path:
        """The job directory: this attempt's own work tree, as the last successful run left it.

        A job without a key finds an empty one, which goes with the run.
        """
        return self._place()

    @cached_property
    def log(self) -> Logger:
        """Its messages are for `./cohort logs` as well."""
        return self._log()

    def progress(self, done: float, total: float | None = None, unit: str = "") -> None:
        """Show how far the run is. Cheap to call often: reports are thinned out on the way."""
        self._report(Progress(done, total, unit))

    @property
    def cancelled(self) -> bool:
        """True once somebody asked this run to end; what it does from then on is discarded."""
        return self._is_cancelled()

    def checkpoint(self) -> None:
        """Keep the directory as it is now for the next attempt of this task, on whichever node.

        Nobody else sees it. If another run commits before that attempt begins, it starts from the
        newest version instead. Costs what has changed since the last one. Without a key there is
        no directory to be kept, and nothing happens.
        """
        self._checkpoint()

    @property
    def leaving(self) -> bool:
        """True once this run's node was asked to end. Whoever asked may not wait for long."""
        return is_leaving()

    def hand_over(self) -> NoReturn:
        """End this attempt here, without an outcome: another node takes the task, at no cost to
        its retries, and goes on from the last checkpoint.
        """
        self._give_back()

    def commit_version(self, n: int) -> None:
        """When the function returns, version n becomes the next one instead of the directory."""
        self._version_to_commit = n
