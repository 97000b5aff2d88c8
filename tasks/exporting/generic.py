"""Every other database that SQLAlchemy reaches: a table or view through a streaming cursor.

Slower than the ways for SQLite and PostgreSQL, and only for databases that are known to give
one consistent snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine.interfaces import IsolationLevel

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

# What gives one snapshot over several statements, by dialect.
_ISOLATION = {
    "mysql": "REPEATABLE READ",
    "mariadb": "REPEATABLE READ",
    "mssql": "SNAPSHOT",
    "oracle": "SERIALIZABLE",
    "postgresql": "REPEATABLE READ",
}


class GenericSource:
    """One database, through its SQLAlchemy dialect."""

    def __init__(self, name: str, url: sa.URL) -> None:
        self._name = name
        dialect = url.get_backend_name()
        if dialect not in _ISOLATION:
            raise Refused(
                f"source {name!r}: no consistent snapshot is known for {dialect}; there are "
                f"sqlite, {', '.join(sorted(_ISOLATION))}"
            )
        self._isolation = _ISOLATION[dialect]
        self._engine = sa.create_engine(url, poolclass=sa.NullPool, hide_parameters=True)

    @contextmanager
    def snapshot(self, table: str, query: str | None) -> Iterator[GenericSnapshot]:
        if query is not None:
            raise Refused(
                f"source {self._name!r}: query= works on SQLite and PostgreSQL; here, make a view"
            )
        with self._engine.connect() as connection:
            level = cast(IsolationLevel, self._isolation)
            connection = connection.execution_options(isolation_level=level)
            with connection.begin():
                yield GenericSnapshot(connection, self._name, table)


class GenericSnapshot:
    """A table or view in one transaction."""

    def __init__(self, connection: sa.Connection, source: str, table: str) -> None:
        self._connection = connection
        inspector = sa.inspect(connection)
        schema, name = split_table(table)
        if not inspector.has_table(name, schema):
            views = inspector.get_view_names(schema)
            if name not in views:
                raise no_such_table(source, table, inspector.get_table_names(schema) + views)
        self._table = sa.Table(name, sa.MetaData(), schema=schema, autoload_with=connection)
        is_view = name in inspector.get_view_names(schema)
        columns, problems = [], []
        for column in self._table.columns:
            type_ = arrow_type(column.type)
            declared = str(column.type) if not isinstance(column.type, sa.types.NullType) else ""
            if type_ is None:
                problems.append(col.unsupported(column.name, declared, "make a view that casts it"))
                continue
            nullable = None if is_view else bool(column.nullable)
            columns.append(Column(column.name, type_, declared, nullable))
        refuse_types(source, table, problems)
        self.columns = tuple(columns)
        self.primary_key = tuple(column.name for column in self._table.primary_key)

    def highest(self, column: Column) -> Mark | None:
        source = self._table.columns[column.name]
        if column.nullable is None:
            null = sa.select(source).where(source.is_(None)).limit(1)
            if self._connection.execute(null).first() is not None:
                raise Refused(f'column="{column.name}" holds NULL, so rows could be missed')
        top = self._connection.execute(sa.select(sa.func.max(source))).scalar()
        if top is None:
            return None
        return cast(Mark, col.array_of(column, [top], lambda _: "the highest row")[0].as_py())

    def expected_rows(self, window: Window | None) -> int | None:
        return None

    def batches(self, window: Window | None, key: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
        statement = sa.select(*(self._table.columns[column.name] for column in self.columns))
        if window is not None:
            source = self._table.columns[window.column.name]
            statement = statement.where(source <= window.high)
            if window.low is not None:
                statement = statement.where(source >= window.low)
        schema = col.schema_of(self.columns)
        done, size = 0, 16
        with self._connection.execution_options(stream_results=True, max_row_buffer=4096).execute(
            statement
        ) as result:
            while rows := result.fetchmany(size):

                def name_row(index: int, rows: Any = rows, done: int = done) -> str:
                    values = dict(zip(schema.names, rows[index], strict=True))
                    return row_name(key or self.primary_key, values, done + index + 1)

                vectors = zip(self.columns, zip(*rows, strict=True), strict=True)
                arrays = [col.array_of(column, values, name_row) for column, values in vectors]
                batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
                done += len(rows)
                budget = BATCH_BYTES * len(rows) // (4 * (batch.nbytes + 1))
                size = max(1, min(4096, budget, size * 4))
                yield batch


def arrow_type(type_: sa.types.TypeEngine[Any]) -> pa.DataType | None:
    """The Arrow type of a SQLAlchemy type, or None if it can't be carried."""
    if isinstance(type_, sa.Boolean):
        return pa.bool_()
    if isinstance(type_, sa.Integer):
        return pa.int64()
    if isinstance(type_, sa.Float):
        return pa.float64()
    if isinstance(type_, sa.Numeric):
        return col.decimal_type(type_.precision, type_.scale)
    if isinstance(type_, sa.Uuid):
        return pa.uuid()
    if isinstance(type_, sa.JSON):
        return pa.json_()
    if isinstance(type_, sa.DateTime):
        return col.TIMESTAMP_UTC if type_.timezone else col.TIMESTAMP
    if isinstance(type_, sa.Date):
        return pa.date32()
    if isinstance(type_, sa.Time):
        return None if type_.timezone else col.TIME
    if isinstance(type_, (sa.LargeBinary, sa.types._Binary)):
        return pa.binary()
    return pa.string() if isinstance(type_, sa.String) else None
