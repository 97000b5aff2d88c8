"""Databases to export from: each opens one consistent, read-only snapshot at a time."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import sqlalchemy as sa

from errors import Refused
from tasks.exporting.columns import Column, Mark
from tasks.exporting.reasons import Secrets, database_errors

BATCH_BYTES = 4 * 2**20
"""About how much a batch of rows takes. A few of them are in memory at once."""


@dataclass(frozen=True)
class Window:
    """The rows with `low <= column <= high`. Without `low`, from the first on."""

    column: Column
    low: Mark | None
    high: Mark


class Snapshot(Protocol):
    """A table or query, as it is at one moment; it stays so until the snapshot is closed."""

    @property
    def columns(self) -> tuple[Column, ...]: ...

    @property
    def primary_key(self) -> tuple[str, ...]:
        """As the database declares it; empty if it doesn't."""
        ...

    def highest(self, column: Column) -> Mark | None:
        """The column's maximum; None without rows. Refuses a column that holds NULL."""
        ...

    def expected_rows(self, window: Window | None) -> int | None:
        """About how many rows to expect, if that is cheap to know."""
        ...

    def batches(self, window: Window | None, key: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
        """The rows, in no order, a few MiB at a time. `key` names rows in errors."""
        ...


class Source(Protocol):
    """One database."""

    def snapshot(self, table: str, query: str | None) -> AbstractContextManager[Snapshot]: ...


def open_source(name: str, sources: Mapping[str, str]) -> Source:
    """The source of this name; nothing is connected yet."""
    if name not in sources:
        known = ", ".join(sorted(sources)) or "none"
        raise Refused(
            f"source={name!r}: there is no such source in the settings; there are: {known}"
        )
    try:
        url = sa.make_url(sources[name])
    except (sa.exc.ArgumentError, ValueError):
        url = None
    if url is None:
        raise Refused(f"source {name!r}: its URL in the settings isn't a SQLAlchemy URL")
    secrets = Secrets(url)
    with database_errors(name, secrets):
        return _Guarded(name, secrets, _kind(url)(name, url))


def _kind(url: sa.URL) -> Callable[[str, sa.URL], Source]:
    # Imported here, so that a node needs only the drivers of the sources that it reads.
    match url.get_backend_name():
        case "sqlite":
            from tasks.exporting.sqlite import SqliteSource

            return SqliteSource
        case "postgresql":
            from tasks.exporting.postgres import PostgresSource

            return PostgresSource
    from tasks.exporting.generic import GenericSource

    return GenericSource


class _Guarded:
    """A source or snapshot whose drivers' errors become Cohort's, without secrets.

    Only calls into the database are guarded: what fails in the body of the `with` (a full disk,
    S3) isn't the database's fault.
    """

    def __init__(self, name: str, secrets: Secrets, source: Source) -> None:
        self._name = name
        self._secrets = secrets
        self._source = source

    @contextmanager
    def snapshot(self, table: str, query: str | None) -> Iterator[Snapshot]:
        with ExitStack() as stack:
            with database_errors(self._name, self._secrets):
                snapshot = stack.enter_context(self._source.snapshot(table, query))
            yield _GuardedSnapshot(self._name, self._secrets, snapshot)


class _GuardedSnapshot:
    def __init__(self, name: str, secrets: Secrets, snapshot: Snapshot) -> None:
        self._errors = partial(database_errors, name, secrets)
        self._snapshot = snapshot
        self.columns = snapshot.columns
        self.primary_key = snapshot.primary_key

    def highest(self, column: Column) -> Mark | None:
        with self._errors():
            return self._snapshot.highest(column)

    def expected_rows(self, window: Window | None) -> int | None:
        with self._errors():
            return self._snapshot.expected_rows(window)

    def batches(self, window: Window | None, key: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
        batches = self._snapshot.batches(window, key)
        while True:
            with self._errors():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def split_table(table: str) -> tuple[str | None, str]:
    """Schema and name of `table` or `schema.table`."""
    schema, dot, name = table.partition(".")
    return (schema, name) if dot else (None, table)


def no_such_table(source: str, table: str, known: Iterable[str]) -> Refused:
    close = difflib.get_close_matches(table, list(known), n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return Refused(f"source {source!r} has no table or view {table!r}{hint}")


def refuse_types(source: str, table: str, problems: list[str]) -> None:
    if problems:
        raise Refused(f"source {source!r}, {table}: {'; '.join(problems)}")


def row_name(key: tuple[str, ...], values: Mapping[str, Any], number: int) -> str:
    """How an error names a row: by its key, else by its number in this export."""
    if key and all(name in values for name in key):
        return "row " + ", ".join(f"{name}={values[name]!r}" for name in key)
    return f"row number {number}"
