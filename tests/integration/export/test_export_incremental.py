"""Incremental exports lose no row and double none, over runs, late rows, updates and kills."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import Refused

INCREMENTAL: dict[str, Any] = {"mode": "incremental", "column": "at"}
TABLE = "CREATE TABLE t (id INTEGER PRIMARY KEY, at TIMESTAMP NOT NULL, note TEXT)"


def insert(database: Any, *rows: tuple[int, str]) -> None:
    database.execute("INSERT INTO t (id, at) VALUES (?, ?)", *rows)


def at(second: int) -> str:
    return f"2024-05-01 10:{second // 60:02d}:{second % 60:02d}"


@pytest.fixture
def source(export: Any, database: Any) -> Any:
    export.sources["main"] = database.url
    database.execute(TABLE)
    return database


def ids(export: Any) -> list[int]:
    return sorted(row["id"] for row in export.rows())


def test_equal_values_at_the_edge_are_neither_lost_nor_doubled(export: Any, source: Any) -> None:
    insert(source, (1, at(1)), (2, at(2)), (3, at(2)))
    assert export.run(**INCREMENTAL)["rows"] == 3
    assert export.run(**INCREMENTAL)["rows"] == 0
    insert(source, (4, at(2)), (5, at(2)))
    assert export.run(**INCREMENTAL)["rows"] == 2
    insert(source, (6, at(2)), (7, at(3)))
    assert export.run(**INCREMENTAL)["rows"] == 2
    assert export.run(**INCREMENTAL)["watermark"] == "2024-05-01T10:00:03"
    assert ids(export) == [1, 2, 3, 4, 5, 6, 7]


def test_rows_that_arrive_while_runs_go_on_are_exported_once(export: Any, source: Any) -> None:
    stop = threading.Event()
    inserted = 0

    def keep_inserting() -> None:
        nonlocal inserted
        engine = sa.create_engine(source.url, poolclass=sa.NullPool)
        sql = "INSERT INTO t (id, at) VALUES (?, ?)"
        if source.dialect == "postgresql":
            sql = sql.replace("?", "%s")
        with engine.connect() as connection:
            while not stop.is_set():
                # Seven rows share each value, in transactions of their own.
                connection.exec_driver_sql(sql, (inserted, at(inserted // 7 % 3600)))
                connection.commit()
                inserted += 1

    writer = threading.Thread(target=keep_inserting)
    writer.start()
    try:
        grown = [export.run(**INCREMENTAL)["rows"] for _ in range(8)]
    finally:
        stop.set()
        writer.join()
    export.run(**INCREMENTAL)
    assert sum(rows > 0 for rows in grown) >= 2
    assert ids(export) == list(range(inserted))


def test_a_run_reads_one_snapshot(export: Any, source: Any) -> None:
    insert(source, *((n, at(n // 50)) for n in range(3000)))
    late: list[int] = []

    def insert_below_the_bound(progress: Any) -> None:
        if not late:
            late.append(9000)
            insert(source, (9000, at(59)), (9001, at(70)))

    result = export.run(on_progress=insert_below_the_bound, **INCREMENTAL)
    assert result["rows"] == 3000
    assert export.run(**INCREMENTAL)["rows"] == 2
    assert ids(export) == [*range(3000), 9000, 9001]


def test_lookback_finds_rows_that_commit_later_with_older_values(export: Any, source: Any) -> None:
    insert(source, (1, at(0)), (2, at(600)))
    lookback = {**INCREMENTAL, "lookback": "5m"}
    assert export.run(**lookback)["rows"] == 2
    insert(source, (3, at(301)), (4, at(300)))  # exactly at the lookback's end
    assert export.run(**lookback)["rows"] == 2
    insert(source, (5, at(299)))  # below it: past what was asked for
    assert export.run(**lookback)["rows"] == 0
    insert(source, (6, at(900)))
    assert export.run(**lookback)["rows"] == 1
    assert ids(export) == [1, 2, 3, 4, 6]


def test_another_lookback_counts_from_the_next_run_on(export: Any, source: Any) -> None:
    insert(source, (1, at(0)), (2, at(60)), (3, at(120)))
    export.run(**INCREMENTAL)
    # What the last run didn't remember can't be told from what it exported.
    assert export.run(**INCREMENTAL, lookback="2m")["rows"] == 0
    insert(source, (4, at(240)))
    assert export.run(**INCREMENTAL, lookback="2m")["rows"] == 1
    insert(source, (5, at(121)), (6, at(240)))
    assert export.run(**INCREMENTAL)["rows"] == 2
    assert export.run(**INCREMENTAL)["rows"] == 0
    assert ids(export) == [1, 2, 3, 4, 5, 6]


def test_an_update_that_moves_the_watermark_is_a_new_version(export: Any, source: Any) -> None:
    insert(source, (1, at(1)), (2, at(2)))
    lookback = {**INCREMENTAL, "lookback": "1h"}
    export.run(**lookback)
    source.execute("UPDATE t SET at = ?, note = 'moved' WHERE id = 1", (at(3),))
    assert export.run(**lookback)["rows"] == 1
    assert export.run(**lookback)["rows"] == 0
    assert [row["note"] for row in export.rows() if row["id"] == 1] == [None, "moved"]


def test_deleting_the_highest_rows_moves_nothing_back(export: Any, source: Any) -> None:
    insert(source, (1, at(1)), (2, at(9)))
    export.run(**INCREMENTAL)
    source.execute("DELETE FROM t WHERE id = 2")
    assert export.run(**INCREMENTAL)["watermark"] == "2024-05-01T10:00:09"
    source.execute("DELETE FROM t")
    assert export.run(**INCREMENTAL)["watermark"] == "2024-05-01T10:00:09"
    insert(source, (2, at(9)), (3, at(9)))  # the first of them was exported already
    assert export.run(**INCREMENTAL)["rows"] == 1
    assert ids(export) == [1, 2, 3]


def test_an_empty_table_then_rows(export: Any, source: Any) -> None:
    assert export.run(**INCREMENTAL)["rows"] == 0
    assert export.rows() == []
    insert(source, (1, at(1)))
    assert export.run(**INCREMENTAL)["rows"] == 1
    assert export.run(**INCREMENTAL)["rows"] == 0
    assert ids(export) == [1]


def test_numbers_dates_and_decimals_as_watermarks(export: Any, database: Any) -> None:
    export.sources["main"] = database.url
    database.execute(
        "CREATE TABLE n (a BIGINT NOT NULL, b DATE NOT NULL, c DECIMAL(12,3) NOT NULL,"
        " d DOUBLE PRECISION NOT NULL, PRIMARY KEY (a))"
    )
    sql = "INSERT INTO n VALUES (?, ?, ?, ?)"
    for column, lookback in (("a", 2), ("b", "1d"), ("c", 0.5), ("d", 0)):
        export.directory = export.directory.with_name(f"job-{column}")
        export.directory.mkdir()
        export.version, export.to = 0, f"{export.to}/{column}"
        database.execute("DELETE FROM n")
        database.execute(sql, (1, "2024-01-01", "0.125", 0.1), (9, "2024-01-09", "2.000", 0.3))
        arguments = {"mode": "incremental", "column": column, "lookback": lookback}
        assert export.run("n", **arguments)["rows"] == 2
        database.execute(sql, (8, "2024-01-08", "1.500", 0.3), (11, "2024-01-11", "2.001", 0.4))
        assert export.run("n", **arguments)["rows"] == 2
        assert export.run("n", **arguments)["rows"] == 0
        assert len(export.rows("n")) == 4


def test_a_query_with_a_key_that_is_named(export: Any, source: Any) -> None:
    insert(source, (1, at(1)), (2, at(2)))
    query = {
        **INCREMENTAL,
        "query": "SELECT id, at FROM t WHERE id <> 2 -- without the second;",
        "primary_key": "id",
    }
    assert export.run("some", **query)["rows"] == 1
    insert(source, (3, at(3)))
    assert export.run("some", **query)["rows"] == 1
    assert sorted(row["id"] for row in export.rows("some")) == [1, 3]


def test_full_after_incremental_and_back(export: Any, source: Any) -> None:
    insert(source, (1, at(1)), (2, at(2)))
    export.run(**INCREMENTAL)
    source.execute("DELETE FROM t WHERE id = 1")
    assert export.run(mode="full")["replaces"]
    assert ids(export) == [2]
    insert(source, (3, at(3)))
    assert export.run(**INCREMENTAL)["replaces"]  # it can't know what the full run exported
    assert ids(export) == [2, 3]
    insert(source, (4, at(3)))
    assert not export.run(**INCREMENTAL)["replaces"]
    assert ids(export) == [2, 3, 4]


def test_many_rows_of_one_value_are_remembered(export: Any, source: Any) -> None:
    """The edge itself can be most of the table."""
    insert(source, *((n, at(5)) for n in range(2500)))
    export.run(**INCREMENTAL)
    insert(source, *((n, at(5)) for n in range(2500, 2600)))
    assert export.run(**INCREMENTAL)["rows"] == 100
    insert(source, (1_000_000, at(6)))
    assert export.run(**INCREMENTAL)["rows"] == 1
    assert export.run(**INCREMENTAL)["rows"] == 0
    assert ids(export) == [*range(2600), 1_000_000]
    assert (export.directory / "seen.parquet").stat().st_size < 2000  # one row: the state shrank


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("2024-01-01 10:00:00", "2024-01-01T09:00:00"),
        ("2024-01-01 10:00:00", "2024-01-02"),
        ("2024-01-01 10:00:00", 1704103200),
        ("2024-01-01 10:00:00.5", "2024-01-01 10:00:00Z"),
    ],
)
def test_sqlite_times_in_two_forms_have_no_order(
    export: Any, sqlite: Any, first: Any, second: Any
) -> None:
    export.sources["main"] = sqlite.url
    sqlite.execute(TABLE)
    insert(sqlite, (1, first), (2, second))
    with pytest.raises(Refused, match='"at"'):
        export.run(**INCREMENTAL)


@pytest.mark.parametrize(
    "form", ["2024-01-01 10:00:{:02d}.{:06d}", "2024-01-01T10:00:{:02d}.{:03.0f}Z"]
)
def test_sqlite_times_with_fractions_and_zones(export: Any, sqlite: Any, form: str) -> None:
    zoned = form.endswith("Z")
    export.sources["main"] = sqlite.url
    sqlite.execute(TABLE.replace("TIMESTAMP", "TIMESTAMPTZ" if zoned else "TIMESTAMP"))
    lookback = {**INCREMENTAL, "lookback": "1500ms"}
    insert(sqlite, *((n, form.format(n // 4, n % 4 * 250)) for n in range(40)))
    assert export.run(**lookback)["rows"] == 40
    assert export.run(**lookback)["rows"] == 0
    insert(sqlite, (100, form.format(8, 250)), (101, form.format(9, 750)))
    assert export.run(**lookback)["rows"] == 2
    assert export.run(**lookback)["rows"] == 0


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.integers(-3, 4)),
        st.tuples(st.just("touch"), st.integers(0, 30)),
        st.tuples(st.just("run"), st.just(0)),
        st.tuples(st.just("killed"), st.just(0)),
    ),
    min_size=3,
    max_size=14,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS, lookback=st.integers(0, 3))
def test_any_history_is_exported_exactly_once(
    export: Any, sqlite: Any, steps: Any, lookback: int
) -> None:
    """Inserts not older than the lookback, updates that move the watermark, runs, killed runs."""
    number = export.claims
    export.directory = export.directory.with_name(f"history-{number}")
    export.directory.mkdir()
    export.version, export.to = 0, f"{export.to.split('/h-')[0]}/h-{number}"
    export.sources["main"] = sqlite.url
    sqlite.execute("DROP TABLE IF EXISTS t")
    sqlite.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, at INTEGER NOT NULL)")
    arguments = {**INCREMENTAL, "lookback": lookback}
    highest_run: int | None = None
    top = 0
    rows: dict[int, int] = {}
    history: Counter[tuple[int, int]] = Counter()
    for step, value in [*steps, ("run", 0)]:
        if step == "insert":
            low = 0 if highest_run is None else highest_run - lookback
            mark = max(low, top + value)
            rows[len(rows)] = mark
            insert(sqlite, (len(rows) - 1, str(mark)))
            top = max(top, mark)
        elif step == "touch" and rows:
            key = value % len(rows)
            top += 1
            rows[key] = top
            sqlite.execute("UPDATE t SET at = ? WHERE id = ?", (top, key))
        elif step == "killed":
            export.attempt(**arguments)
        elif step == "run":
            export.run(**arguments)
            if rows:
                highest_run = max(highest_run or 0, *rows.values())
            for pair in rows.items():
                history[pair] = 1
    seen = Counter((row["id"], row["at"]) for row in export.rows())
    assert seen == history
