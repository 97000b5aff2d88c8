"""SQLite, through Python's own module: one read transaction, column by column into Arrow.

SQLite lets any column hold any value, so each one is checked against its column's declared type.
The file is opened read-only and is never created. Times are text there; a watermark of times
must be written in one form throughout, since SQLite compares the texts.
"""

from __future__ import annotations

import datetime as dt
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import sqlalchemy as sa

from errors import Refused
from tasks.exporting import columns as col
from tasks.exporting.columns import Column, Mark
from tasks.exporting.sources import (
    BATCH_BYTES,
    Window,
    no_such_table,
    refuse_types,
    row_name,
    split_table,
)

_TYPES: tuple[tuple[str, Any], ...] = (
    (r"BOOL(EAN)?", pa.bool_()),
    (r"JSON", pa.json_()),
    (r"UUID|GUID|UNIQUEIDENTIFIER", pa.uuid()),
    (r"DATE", pa.date32()),
    (r"(DATETIME|TIMESTAMP) ?(WITH TIME ?ZONE)|TIMESTAMP_?TZ|DATETIMEOFFSET", col.TIMESTAMP_UTC),
    (r"DATETIME|TIMESTAMP( WITHOUT TIME ?ZONE)?", col.TIMESTAMP),
    (r"TIME( WITHOUT TIME ?ZONE)?", col.TIME),
    (r"REAL|FLOAT[48]?|DOUBLE( PRECISION)?", pa.float64()),
    (r"BLOB|BINARY|VARBINARY|BYTEA|BYTES", pa.binary()),
    (r"STRING", pa.string()),
)
_TIME_TEXT = re.compile(
    r"\d{4}-\d\d-\d\d([ T])\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:?\d\d)?", re.ASCII
)


class SqliteSource:
    """One SQLite file."""

    def __init__(self, name: str, url: sa.URL) -> None:
        self._name = name
        database = url.database
        if not database or database == ":memory:" or "mode=memory" in database:
            raise Refused(f"source {name!r}: a SQLite database in memory has nothing to export")
        self._uri = database if database.startswith("file:") else f"file:{quote(database)}?mode=ro"

    @contextmanager
    def snapshot(self, table: str, query: str | None) -> Iterator[SqliteSnapshot]:
        # The rows are read in a thread of their own, one thread at a time.
        connection = sqlite3.connect(
            self._uri, uri=True, timeout=30, isolation_level=None, check_same_thread=False
        )
        with closing(connection):
            connection.execute("BEGIN")
            # A read transaction's snapshot begins with its first read.
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            yield SqliteSnapshot(connection, self._name, table, query)


class SqliteSnapshot:
    """A table or query in one read transaction."""

    def __init__(
        self, connection: sqlite3.Connection, source: str, table: str, query: str | None
    ) -> None:
        self._connection = connection
        self._source = source
        self._name = table
        self._separator = " "
        self._suffix = ""
        self._top: Any = None
        if query is None:
            schema, name = split_table(table)
            self._relation = f"{_quoted(schema or 'main')}.{_quoted(name)}"
            described = self._describe(schema or "main", name)
        else:
            # The types of a query's columns are those of a view of it.
            self._relation = "temp.cohort_query"
            connection.execute(f"CREATE TEMP VIEW cohort_query AS {query}\n")
            described = self._describe("temp", "cohort_query")
            if not all(row[1] for row in described):
                described = self._with_affinities(described)
        if not described:
            known = connection.execute(
                "SELECT name FROM sqlite_master WHERE type IN ('table','view')"
            )
            raise no_such_table(source, table, [row[0] for row in known])
        self.columns, self.primary_key = self._columns(described, query is not None)

    def _describe(self, schema: str, name: str) -> list[tuple[Any, ...]]:
        schemas = {row[1] for row in self._connection.execute("PRAGMA database_list")} | {"temp"}
        if schema not in schemas:
            return []
        rows = self._connection.execute(
            'SELECT name, type, "notnull", pk FROM pragma_table_xinfo(?, ?) WHERE hidden != 1',
            (name, schema),
        ).fetchall()
        kind = self._connection.execute(
            f"SELECT type FROM {_quoted(schema)}.sqlite_master WHERE name = ? COLLATE NOCASE",
            (name,),
        ).fetchone()
        self._is_view = kind is not None and kind[0] == "view"
        return rows

    def _with_affinities(self, described: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """A view knows the types of plain columns only; a table made of it, those of CAST too."""
        self._connection.execute(
            f"CREATE TEMP TABLE cohort_affinities AS SELECT * FROM {self._relation} LIMIT 0"
        )
        made = self._describe("temp", "cohort_affinities")
        self._is_view = True
        return [
            (row[0], row[1] or other[1], row[2], row[3])
            for row, other in zip(described, made, strict=True)
        ]

    def _columns(
        self, described: list[tuple[Any, ...]], is_query: bool
    ) -> tuple[tuple[Column, ...], tuple[str, ...]]:
        columns, problems = [], []
        key = [row for row in described if row[3]]
        for name, declared, not_null, in_key in described:
            type_ = arrow_type(declared)
            if type_ is None:
                hint = (
                    f"write CAST(... AS INTEGER) AS {name}, or REAL or TEXT, in the query"
                    if is_query
                    else "export a query that casts it to INTEGER, REAL or TEXT"
                )
                problems.append(col.unsupported(name, declared, hint))
                continue
            # An INTEGER PRIMARY KEY is the row's own number, which is never NULL.
            row_id = bool(in_key) and len(key) == 1 and declared.upper() == "INTEGER"
            nullable = None if self._is_view else not (not_null or row_id)
            columns.append(Column(name, type_, declared, nullable))
        refuse_types(self._source, self._name, problems)
        return tuple(columns), tuple(row[0] for row in sorted(key, key=lambda row: int(row[3])))

    # -- watermark --------------------------------------------------------------------------------

    def highest(self, column: Column) -> Mark | None:
        name = _quoted(column.name)
        null = f"SELECT 1 FROM {self._relation} WHERE {name} IS NULL LIMIT 1"
        if column.nullable is None and self._connection.execute(null).fetchone():
            raise Refused(f'column="{column.name}" holds NULL, so rows could be missed')
        (top,) = self._connection.execute(
            f"SELECT max({self._ordered(column)}) FROM {self._relation}"
        ).fetchone()
        if top is None:
            return None
        if isinstance(top, str) and not pa.types.is_integer(column.type):
            self._learn_form(column, top)
        self._top = top
        mark = col.array_of(column, [top], lambda _: "the highest row")[0].as_py()
        assert mark is not None
        return mark  # type: ignore[no-any-return]

    def _ordered(self, column: Column) -> str:
        """The column as it is compared: by its bytes, whatever collation it has."""
        return f"{_quoted(column.name)} COLLATE BINARY"

    def _learn_form(self, column: Column, top: str) -> None:
        """How this column writes its times; refuses a column that writes them in several ways.

        SQLite compares the texts: '2024-01-01T09' comes after '2024-01-01 23'.
        """
        if pa.types.is_date(column.type):
            glob, tail = "[0-9]" * 4 + "-[0-9][0-9]-[0-9][0-9]", None
        else:
            match = _TIME_TEXT.fullmatch(top)
            if match is None:
                raise Refused(
                    f'column="{column.name}": its highest value isn\'t written as '
                    "YYYY-MM-DD HH:MM:SS, which a watermark of times in SQLite must be"
                )
            self._separator, self._suffix = match[1], match[3] or ""
            day = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]"
            glob, tail = f"{day}{match[1]}[0-9][0-9]:[0-9][0-9]:[0-9][0-9]*", 20
        name = _quoted(column.name)
        strange = f"typeof({name}) != 'text' OR {name} NOT GLOB '{glob}'"
        values: list[Any] = []
        if tail and self._suffix:
            # With a zone at the end, texts sort as times only if all have one length.
            strange += f" OR length({name}) != ? OR substr({name}, ?) != ?"
            values = [len(top), -len(self._suffix), self._suffix]
        elif tail:
            strange += f" OR substr({name}, {tail}) GLOB '*[^.0-9]*'"
        key = ", ".join(map(_quoted, self.primary_key)) or "1"
        found = self._connection.execute(
            f"SELECT {key} FROM {self._relation} WHERE {strange} LIMIT 1", values
        ).fetchone()
        if found is not None:
            row = row_name(self.primary_key, dict(zip(self.primary_key, found, strict=True)), 0)
            where = f" ({row})" if self.primary_key else ""
            raise Refused(
                f'column="{column.name}" is written in several forms{where}, so SQLite can\'t '
                f"order it: use one form throughout, such as {top!r}"
            )

    def _literal(self, mark: Mark) -> Any:
        """A mark as this column writes it, in its shortest and so lowest form."""
        if isinstance(mark, dt.datetime):
            if mark.tzinfo is not None:
                zone = dt.datetime.fromisoformat(f"2000-01-01T00:00:00{self._suffix}").tzinfo
                mark = mark.astimezone(zone).replace(tzinfo=None)
            text = mark.isoformat(self._separator, "seconds")
            if self._suffix:
                # Cut to the column's digits; the rows between are filtered out after reading.
                digits = len(str(self._top)) - len(text) - len(self._suffix) - 1
                fraction = f".{mark.microsecond:06d}"[: digits + 1] if digits > 0 else ""
                return f"{text}{fraction}{self._suffix}"
            return text + (f".{mark.microsecond:06d}".rstrip("0") if mark.microsecond else "")
        if isinstance(mark, dt.date):
            return mark.isoformat()
        if isinstance(mark, Decimal):
            return int(mark) if mark == int(mark) else float(mark)
        return mark

    def _where(self, window: Window | None) -> tuple[str, list[Any]]:
        if window is None:
            return "", []
        ordered = self._ordered(window.column)
        low = [] if window.low is None else [self._literal(window.low)]
        above = f"{ordered} >= ? AND " if low else ""
        # The bound is the highest value as it is written, since a form may have several lengths.
        return f" WHERE {above}{ordered} <= ?", [*low, self._top]

    # -- rows -------------------------------------------------------------------------------------

    def expected_rows(self, window: Window | None) -> int | None:
        where, values = self._where(window)
        steps = 0

        def enough() -> bool:
            nonlocal steps
            steps += 1
            return steps > 400

        # Counting is cheap up to some millions of rows; a longer count is given up.
        self._connection.set_progress_handler(enough, 100_000)
        try:
            counted = self._connection.execute(
                f"SELECT count(*) FROM {self._relation}{where}", values
            )
            return int(counted.fetchone()[0])
        except sqlite3.OperationalError as error:
            if "interrupted" not in str(error):
                raise
            return None
        finally:
            self._connection.set_progress_handler(None, 0)

    def batches(self, window: Window | None, key: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
        where, values = self._where(window)
        names = ", ".join(_quoted(column.name) for column in self.columns)
        cursor = self._connection.execute(f"SELECT {names} FROM {self._relation}{where}", values)
        schema = col.schema_of(self.columns)
        done, size = 0, 16
        while rows := cursor.fetchmany(size):
            batch = self._batch(rows, schema, key, done)
            done += len(rows)
            # Python's objects take some times the room of Arrow's: a quarter of the budget.
            budget = BATCH_BYTES * len(rows) // (4 * (batch.nbytes + 1))
            size = max(1, min(2048, budget, size * 4))
            yield batch

    def _batch(
        self, rows: Sequence[tuple[Any, ...]], schema: pa.Schema, key: tuple[str, ...], done: int
    ) -> pa.RecordBatch:
        def name_row(index: int) -> str:
            values = dict(zip(schema.names, rows[index], strict=True))
            return row_name(key or self.primary_key, values, done + index + 1)

        vectors = zip(self.columns, zip(*rows, strict=True), strict=True)
        arrays = [col.array_of(column, values, name_row) for column, values in vectors]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def arrow_type(declared: str) -> Any:
    """The Arrow type of a declared type, by its name and then by SQLite's rules of affinity."""
    text = " ".join(declared.upper().split())
    bare = re.sub(r" ?\([^)]*\)", "", text)
    for pattern, type_ in _TYPES:
        if re.fullmatch(pattern, bare):
            return type_
    if re.fullmatch(r"NUMERIC|DECIMAL|NUM", bare):
        numbers = re.search(r"\((\d+)(?: ?, ?(\d+))?\)", text)
        if numbers is None:
            return col.UNBOUNDED
        return col.decimal_type(int(numbers[1]), int(numbers[2] or 0))
    if "INT" in bare:
        return pa.int64()
    if re.search(r"CHAR|CLOB|TEXT", bare):
        return pa.string()
    return None


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
