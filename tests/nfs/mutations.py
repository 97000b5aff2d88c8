"""A pytest plugin that breaks one rule of storage/, named by COHORT_TEST_MUTATION.

`test_mutations.py` runs other tests under it and expects them to fail: a test that passes with the
rule broken tests nothing. The code under test isn't touched, and knows nothing of this.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from errors import Fenced
from storage import attempt, durable, log, segments
from storage.directory import Directory


def names_are_used_again() -> None:
    """A claim's folder may be there already, and a file is written over the one there."""

    @contextmanager
    def over_the_old_one(path: Path) -> Iterator[int]:
        with durable.reporting(path):
            target = FileIO(path, "w")
            try:
                yield target.fileno()
            finally:
                target.close()

    def make_or_take(self: Directory, task_id: str, claim_id: str, name: str, base: Any) -> Any:
        folder = self.runs_of(task_id) / "always the same"
        durable.make_directory(folder.parent)
        durable.make_directory(folder)
        return attempt.Attempt(self, task_id, claim_id, folder, base)

    durable._new_file = over_the_old_one
    Directory._begin = make_or_take  # type: ignore[method-assign]


def the_link_is_a_rename() -> None:
    def rename(source: Path, target: Path) -> bool:
        os.rename(source, target)
        durable.sync_directory(target.parent)
        return True

    durable.link_or_fail = rename


def the_base_isn_t_checked() -> None:
    """The record goes where there is room, whatever its run has read."""
    real = attempt.Attempt.record

    def on_the_head(self: attempt.Attempt, *args: Any) -> Any:
        while True:
            self.base = self.directory.head()
            try:
                return real(self, *args)
            except Fenced:
                continue

    attempt.Attempt.record = on_the_head  # type: ignore[method-assign,assignment]


def eexist_isn_t_looked_into() -> None:
    def believing(self: log.Log, written: Path, record: log.Record) -> log.Record:
        if durable.link_or_fail(written, self.path(record.n)):
            return record
        raise Fenced(f"{self.path(record.n)} exists")

    log.Log._link = believing  # type: ignore[method-assign]


def the_outcome_isn_t_looked_for() -> None:
    Directory.outcome_of = lambda self, task_id: None  # type: ignore[method-assign]


def files_aren_t_fsynced() -> None:
    _without_fsync(stat.S_ISREG)


def directories_aren_t_fsynced() -> None:
    _without_fsync(stat.S_ISDIR)


def segments_aren_t_fsynced() -> None:
    real = segments.SegmentWriter.append

    def append(self: segments.SegmentWriter, entries: Any) -> Any:
        fsync = os.fsync
        if self.path is not None:
            os.fsync = lambda fd: None
        try:
            return real(self, entries)
        finally:
            os.fsync = fsync

    segments.SegmentWriter.append = append  # type: ignore[method-assign]


def missing_names_are_believed() -> None:
    """What the client's cache says is missing is missing."""
    durable.reopen = lambda folder: None


def _without_fsync(of: Callable[[int], bool]) -> None:
    real = os.fsync

    def fsync(fd: Any) -> None:
        if not of(os.fstat(fd).st_mode):
            real(fd)

    os.fsync = fsync


MUTATIONS: dict[str, Callable[[], None]] = {
    mutation.__name__: mutation
    for mutation in (
        names_are_used_again,
        the_link_is_a_rename,
        the_base_isn_t_checked,
        eexist_isn_t_looked_into,
        the_outcome_isn_t_looked_for,
        files_aren_t_fsynced,
        directories_aren_t_fsynced,
        segments_aren_t_fsynced,
        missing_names_are_believed,
    )
}


def pytest_configure() -> None:
    MUTATIONS[os.environ["COHORT_TEST_MUTATION"]]()
