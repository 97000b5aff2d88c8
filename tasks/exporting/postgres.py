"""PostgreSQL: described through psycopg, read through ADBC as record batches (COPY in binary).

The rows come from one REPEATABLE READ, READ ONLY transaction. Reading through ADBC is several
times as fast as a cursor of psycopg: no row becomes a Python object.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import adbc_driver_postgresql.dbapi as adbc
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
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

# By the type's own name: the Arrow type, and what the column is selected as.
_TYPES: dict[str, tuple[pa.DataType, str]] = {
    "bool": (pa.bool_(), "{}"),
    "int2": (pa.int16(), "{}"),
    "int4": (pa.int32(), "{}"),
    "int8": (pa.int64(), "{}"),
    "oid": (pa.int64(), "{}::bigint"),
    "float4": (pa.float32(), "{}"),
    "float8": (pa.float64(), "{}"),
    "text": (pa.string(), "{}"),
    "varchar": (pa.string(), "{}"),
    "bpchar": (pa.string(), "{}"),
    "name": (pa.string(), "{}::text"),
    "citext": (pa.string(), "{}::text"),
    "bytea": (pa.binary(), "{}"),
    "uuid": (pa.uuid(), "{}"),
    "json": (pa.json_(), "{}"),
    "jsonb": (pa.json_(), "{}"),
    "date": (pa.date32(), "{}"),
    "time": (col.TIME, "{}"),
    "timestamp": (col.TIMESTAMP, "{}"),
    "timestamptz": (col.TIMESTAMP_UTC, "{}"),
}


class PostgresSource:
    """One PostgreSQL database."""

    def __init__(self, name: str, url: sa.URL) -> None:
        self._name = name
        query = dict(url.query)
        query.setdefault("connect_timeout", "10")
        query.setdefault("application_name", "cohort-export")
        self._url = url.set(drivername="postgresql", query=query).render_as_string(
            hide_password=False
        )

    @contextmanager
    def snapshot(self, table: str, query: str | None) -> Iterator[PostgresSnapshot]:
        # Described first: ADBC alone can't tell a numeric's precision or an empty result's types.
        with psycopg.connect(self._url, autocommit=True) as catalog:
            described = _Description(catalog, self._name, table, query)
        options = {"adbc.postgresql.batch_size_hint_bytes": str(BATCH_BYTES)}
        with (
            adbc.connect(self._url, autocommit=True) as connection,
            connection.cursor(adbc_stmt_kwargs=options) as cursor,
        ):
            cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield PostgresSnapshot(cursor, described)


class _Description:
    """What the catalog says about a table or a query."""

    def __init__(
        self, catalog: psycopg.Connection[Any], source: str, table: str, query: str | None
    ) -> None:
        self._catalog = catalog
        self.primary_key: tuple[str, ...] = ()
        not_null: set[str] | None = None
        if query is None:
            parts = [part for part in split_table(table) if part is not None]
            self.relation = ".".join(map(_quoted, parts))
            not_null = self._table(source, table)
        else:
            self.relation = f"({query}\n) AS cohort_query"
        with catalog.transaction():
            # A query that writes is refused here, before its first row.
            catalog.execute("SET TRANSACTION READ ONLY")
            result = catalog.execute(f"SELECT * FROM {self.relation} LIMIT 0")
            described = result.description or []
            explained = catalog.execute(
                f"EXPLAIN (FORMAT JSON) SELECT * FROM {self.relation}"
            ).fetchone()
        assert explained is not None
        self.estimate = int(explained[0][0]["Plan"]["Plan Rows"])
        self._resolve(source, table, described, not_null)

    def _table(self, source: str, table: str) -> set[str] | None:
        row = self._catalog.execute(
            "SELECT c.oid, c.relkind FROM pg_class c WHERE c.oid = to_regclass(%s)",
            (self.relation,),
        ).fetchone()
        if row is None or row[1] not in ("r", "p", "v", "m", "f"):
            known = self._catalog.execute(
                "SELECT CASE WHEN pg_table_is_visible(oid) THEN relname ELSE"
                " relnamespace::regnamespace::text || '.' || relname END FROM pg_class"
                " WHERE relkind IN ('r', 'p', 'v', 'm', 'f') AND relnamespace::regnamespace::text"
                " NOT IN ('pg_catalog', 'information_schema', 'pg_toast')"
            )
            raise no_such_table(source, table, [name for (name,) in known])
        oid, kind = row
        self.primary_key = tuple(
            name
            for (name,) in self._catalog.execute(
                "SELECT a.attname FROM pg_index i JOIN pg_attribute a"
                " ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)"
                " WHERE i.indrelid = %s AND i.indisprimary"
                " ORDER BY array_position(i.indkey::int2[], a.attnum)",
                (oid,),
            )
        )
        if kind not in ("r", "p"):
            return None
        return {
            name
            for (name,) in self._catalog.execute(
                "SELECT attname FROM pg_attribute WHERE attrelid = %s AND attnotnull", (oid,)
            )
        }

    def _resolve(self, source: str, table: str, described: Any, not_null: set[str] | None) -> None:
        oids = [entry.type_code for entry in described]
        types = {
            oid: (name, kind, shown)
            for oid, name, kind, shown in self._catalog.execute(
                "SELECT oid, typname, typtype, format_type(oid, NULL) FROM pg_type"
                " WHERE oid = ANY (%s)",
                (oids,),
            )
        }
        columns, selected, problems = [], [], []
        names = [entry.name for entry in described]
        for entry in described:
            name, kind, shown = types[entry.type_code]
            declared = shown
            found = _TYPES.get(name)
            if name == "numeric":
                type_ = col.decimal_type(entry.precision, entry.scale)
                if entry.precision is not None:
                    declared = f"numeric({entry.precision},{entry.scale})"
                # Without zeros at the end, so that the length of a text tells if it fits.
                text = "{}::text" if entry.precision is not None else "trim_scale({})::text"
                found = (type_, text) if type_ is not None else None
            elif kind == b"e" or kind == "e":
                found = (pa.string(), "{}::text")
            if found is None:
                hint = f"export a query that casts it, as in {_quoted(entry.name)}::text"
                problems.append(col.unsupported(entry.name, declared, hint))
                continue
            if names.count(entry.name) > 1:
                problems.append(f'the query has several columns named "{entry.name}"')
                continue
            nullable = None if not_null is None else entry.name not in not_null
            columns.append(Column(entry.name, found[0], declared, nullable))
            selected.append(f"{found[1].format(_quoted(entry.name))} AS {_quoted(entry.name)}")
        refuse_types(source, table, problems)
        self.columns = tuple(columns)
        self.selected = ", ".join(selected)


class PostgresSnapshot:
    """A table or query in one REPEATABLE READ transaction."""

    def __init__(self, cursor: Any, described: _Description) -> None:
        self._cursor = cursor
        self._described = described
        self.columns = described.columns
        self.primary_key = described.primary_key

    def expected_rows(self, window: Window | None) -> int | None:
        """The planner's estimate: free, and near enough for a progress bar."""
        return self._described.estimate if window is None or window.low is None else None

    def highest(self, column: Column) -> Mark | None:
        name, relation = _quoted(column.name), self._described.relation
        null = f"SELECT 1 FROM {relation} WHERE {name} IS NULL LIMIT 1"
        if column.nullable is None and self._query(null).num_rows:
            raise Refused(f'column="{column.name}" holds NULL, so rows could be missed')
        top = f"max({name})" + ("::text" if pa.types.is_decimal(column.type) else "")
        array = self._query(f"SELECT {top} AS top FROM {relation}")["top"].combine_chunks()
        if array.null_count:
            return None
        mark = self._finished(column, array, lambda _: "the highest row")[0].as_py()
        if mark != mark:
            raise Refused(f'column="{column.name}" holds NaN, which is above every number')
        return mark  # type: ignore[no-any-return]

    def batches(self, window: Window | None, key: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
        described = self._described
        self._cursor.execute(
            f"SELECT {described.selected} FROM {described.relation}{_where(window)}"
        )
        schema = col.schema_of(self.columns)
        done = 0
        with self._cursor.fetch_record_batch() as reader:
            for raw in reader:

                def name_row(index: int, raw: pa.RecordBatch = raw, done: int = done) -> str:
                    names = key or self.primary_key
                    keys = {name: raw.column(name)[index].as_py() for name in names}
                    return row_name(names, keys, done + index + 1)

                arrays = [
                    self._finished(column, array, name_row)
                    for column, array in zip(self.columns, raw.columns, strict=True)
                ]
                done += raw.num_rows
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _query(self, sql: str) -> pa.Table:
        self._cursor.execute(sql)
        return self._cursor.fetch_arrow_table()

    def _finished(self, column: Column, array: pa.Array, name_row: Any) -> pa.Array:
        if array.type != column.type:
            try:
                array = _cast(array, column.type)
            except pa.ArrowInvalid:
                raise col.misfit(
                    column, name_row(_first_misfit(column, array)), "a value"
                ) from None
        outside = col.out_of_range(array)
        if outside is not None:
            raise col.misfit(column, name_row(outside), "a value outside the years 1 to 9999")
        return array


def _cast(array: pa.Array, type_: pa.DataType) -> pa.Array:
    if type_ == col.UNBOUNDED:
        longest = pc.max(pc.utf8_length(array)).as_py()
        # Arrow 26 makes 0 of 1e-60 without a word; 38 digits, a sign, "0." fit into 41.
        if longest is not None and longest > 41:
            raise pa.ArrowInvalid("more digits than the type has")
    return array.cast(type_)


def _first_misfit(column: Column, array: pa.Array) -> int:
    low, high = 0, len(array)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            _cast(array.slice(low, middle - low), column.type)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _where(window: Window | None) -> str:
    if window is None:
        return ""
    name = _quoted(window.column.name)
    above = "" if window.low is None else f"{name} >= {_literal(window.low, window.column)} AND "
    return f" WHERE {above}{name} <= {_literal(window.high, window.column)}"


def _literal(mark: Mark, column: Column) -> str:
    """A mark in SQL. Safe to write into a statement: it comes from a number or a time."""
    if isinstance(mark, dt.datetime):
        zoned = mark.tzinfo is not None
        return f"'{mark.isoformat()}'::timestamp{'tz' if zoned else ''}"
    if isinstance(mark, dt.date):
        return f"'{mark.isoformat()}'::date"
    if isinstance(mark, Decimal):
        return f"'{mark}'::numeric"
    if isinstance(mark, float):
        return f"'{mark!r}'::{'real' if column.type.bit_width == 32 else 'double precision'}"
    return str(mark)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
