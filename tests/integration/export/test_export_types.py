"""Every type arrives as it left; what can't is refused by name before anything is written."""

from __future__ import annotations

import datetime as dt
import json
import math
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import psycopg
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errors import Refused
from tasks.exporting import reader
from tasks.exporting.generic import GenericSource
from tasks.exporting.sources import Source

ID = uuid.UUID("12345678-9abc-def0-1234-56789abcdef0")
PLANES = "".join(chr(plane * 0x10000 + 0x61) for plane in range(17)) + "\x00\x01\ufffd\u200f é"
MOMENT = dt.datetime(2024, 2, 29, 23, 59, 59, 999999)


def test_postgres_types_round_trip(export: Any, postgres: Any) -> None:
    export.sources["main"] = postgres.url
    postgres.execute("CREATE TYPE mood AS ENUM ('glad', 'sad')")
    postgres.execute("CREATE DOMAIN price AS numeric(10, 2)")
    postgres.execute(
        "CREATE TABLE t (id int PRIMARY KEY, i2 int2, i8 int8, f4 float4, f8 float8, b bool,"
        " n numeric(12, 4), nn numeric(3, -2), big numeric(60, 30), free numeric, p price,"
        ' s text, v varchar(10), c char(4), by bytea, u uuid, j json, jb jsonb, "from" date,'
        ' ts timestamp, tz timestamptz, ti time, m mood, "odd "" name" int, o oid)'
    )
    text = PLANES.replace("\x00", "") + "x" * 300_000
    row = (
        *(1, -32768, 2**63 - 1, 0.5, -math.inf, True, Decimal("12345678.1234"), Decimal(12300)),
        *(
            Decimal("9" * 30 + "." + "1" * 30),
            Decimal("-12345678901234567890.000000000000000001"),
            Decimal("1.10"),
        ),
        *(text, "ten", "ab", b"\x00\xff", ID, '{"a":  1}', '{"b": [null]}'),
        *(dt.date(1, 1, 1), MOMENT, MOMENT.replace(tzinfo=dt.UTC), dt.time(23, 59, 59, 1)),
        *("sad", 7, 4294967295),
    )
    with psycopg.connect(postgres.url) as connection:
        marks = ", ".join(["%s"] * len(row))
        connection.execute(f"INSERT INTO t VALUES ({marks})", row)
        connection.execute("INSERT INTO t (id, f8, f4) VALUES (2, 'NaN', 'NaN')")
        connection.execute("SET TIME ZONE 'Asia/Kathmandu'")
        connection.execute("INSERT INTO t (id, tz) VALUES (3, '9999-12-31 00:00:00')")
    export.run()
    table = reader.read_rows(export.to, "t").sort_by("id")
    first, second, third = table.to_pylist()
    expected = list(row)
    expected[13] = "ab  "  # char(4) is padded, as PostgreSQL's drivers return it
    assert list(first.values()) == expected
    assert math.isnan(second["f8"]) and math.isnan(second["f4"])
    assert {value for name, value in second.items() if name not in ("id", "f8", "f4")} == {None}
    assert third["tz"] == dt.datetime(9999, 12, 30, 18, 15, tzinfo=dt.UTC)
    types = {field.name: field.type for field in table.schema}
    assert types["n"] == pa.decimal128(12, 4)
    assert types["nn"] == pa.decimal128(5, 0)
    assert types["big"] == pa.decimal256(60, 30)
    assert types["p"] == pa.decimal128(10, 2)
    assert (types["u"], types["j"], types["jb"]) == (pa.uuid(), pa.json_(), pa.json_())
    assert types["tz"] == pa.timestamp("us", "UTC")


@pytest.mark.parametrize(
    "declared",
    ["interval", "int4range", "text[]", "point", "inet", "timetz", "money", "numeric(1000, 2)"],
)
def test_postgres_types_that_cant_be_carried(
    export: Any, postgres: Any, declared: str, keys: Callable[[], list[str]]
) -> None:
    export.sources["main"] = postgres.url
    postgres.execute(f"CREATE TABLE t (id int PRIMARY KEY, fine text, strange {declared})")
    shown = {"timetz": "time with time zone"}.get(declared, declared.split("(")[0])
    with pytest.raises(Refused, match='"strange"') as refusal:
        export.run()
    assert shown in str(refusal.value)
    assert "fine" not in str(refusal.value)
    assert keys() == []


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("numeric", "'NaN'"),
        ("numeric(5,2)", "'NaN'"),
        ("numeric", "1e-19"),
        ("numeric", "1e-60"),
        ("numeric", "1e-400"),
        ("numeric", "1e20"),
        ("numeric", "1e400"),
        ("timestamp", "'infinity'"),
        ("timestamptz", "'-infinity'"),
        ("timestamp", "'294276-12-31'"),
        ("date", "'infinity'"),
        ("date", "'0044-03-15 BC'"),
        ("time", "'24:00'"),
    ],
)
def test_postgres_values_that_cant_be_carried(
    export: Any, postgres: Any, declared: str, value: str
) -> None:
    export.sources["main"] = postgres.url
    postgres.execute(f"CREATE TABLE t (id int PRIMARY KEY, odd {declared})")
    postgres.execute("INSERT INTO t SELECT g, NULL FROM generate_series(1, 70) g")
    postgres.execute(f"INSERT INTO t VALUES (77, {value})")
    with pytest.raises(Refused, match=r'"odd".* row id=77'):
        export.run()


def test_sqlite_types_round_trip(export: Any, sqlite: Any) -> None:
    export.sources["main"] = sqlite.url
    sqlite.execute(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, i BIGINT, f REAL, b BOOLEAN, n DECIMAL(12,4),"
        " s TEXT, v VARCHAR(10), by BLOB, u UUID, j JSON, d DATE, ts DATETIME,"
        " tz TIMESTAMP WITH TIME ZONE, ti TIME, big NUMERIC(20,0), g INTEGER AS (i + 1))"
    )
    columns = "id, i, f, b, n, s, v, by, u, j, d, ts, tz, ti, big"
    marks = ", ".join("?" * 15)
    sqlite.execute(
        f"INSERT INTO t ({columns}) VALUES ({marks})",
        (
            *(1, -(2**63), 0.1, 1, 12345678.1234, PLANES, "ten", b"\x00\xff", str(ID), '{"a": 1}'),
            *("2024-02-29", "2024-02-29T23:59:59.999999", "2024-03-01 05:44:59+05:45"),
            *("23:59:59.000001", 12345678901234567),
        ),
        (2, *[None] * 14),
        (
            *(3, 5, math.inf, 0, "0.1", "x" * 300_000, "", b"", ID.bytes, "17", "0001-01-01"),
            *("2024-01-01", "2024-01-01T00:00:00Z", "00:00", 0.0),
        ),
    )
    export.run()
    table = reader.read_rows(export.to, "t").sort_by("id")
    first, second, third = table.to_pylist()
    assert list(first.values()) == [
        *(1, -(2**63), 0.1, True, Decimal("12345678.1234"), PLANES, "ten", b"\x00\xff", ID),
        *('{"a": 1}', dt.date(2024, 2, 29), MOMENT),
        *(dt.datetime(2024, 2, 29, 23, 59, 59, tzinfo=dt.UTC), dt.time(23, 59, 59, 1)),
        *(Decimal(12345678901234567), -(2**63) + 1),
    ]
    assert set(list(second.values())[1:]) == {None}
    assert third["f"] == math.inf and third["n"] == Decimal("0.1") and third["u"] == ID
    assert json.loads(third["j"]) == 17 and third["by"] == b"" and third["v"] == ""
    assert table.schema.field("n").type == pa.decimal128(12, 4)


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        ("INTEGER", "many"),
        ("INTEGER", 1.5),
        ("REAL", "fast"),
        ("BOOLEAN", 2),
        ("TEXT", b"\x00"),
        ("BLOB", "text"),
        ("DECIMAL(5,2)", 1.005),
        ("DECIMAL(5,2)", 1000),
        ("DATE", "2024-02-30"),
        ("DATE", "2024-02-01 10:00:00"),
        ("DATETIME", 1704103200),
        ("DATETIME", "2024-01-01 10:00:00+01:00"),
        ("TIMESTAMPTZ", "2024-01-01 10:00:00"),
        ("TIME", "25:00"),
        ("UUID", "not-a-uuid"),
        ("JSON", "{'a': 1}"),
    ],
)
def test_sqlite_values_that_dont_fit_their_column(
    export: Any, sqlite: Any, declared: str, value: Any, keys: Callable[[], list[str]]
) -> None:
    export.sources["main"] = sqlite.url
    sqlite.execute(f"CREATE TABLE t (id INTEGER PRIMARY KEY, odd {declared})")
    sqlite.execute("INSERT INTO t VALUES (?, ?)", (1, None), (41, value), (42, None))
    with pytest.raises(Refused, match=r'"odd".* row id=41') as refusal:
        export.run()
    assert str(value) not in str(refusal.value).replace("id=41", "")
    assert keys() == []


def test_sqlite_columns_without_a_type(
    export: Any, sqlite: Any, keys: Callable[[], list[str]]
) -> None:
    export.sources["main"] = sqlite.url
    sqlite.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, fine TEXT, loose, odd GEOMETRY)")
    with pytest.raises(Refused, match=r'"loose".*"odd" has the type GEOMETRY'):
        export.run()
    assert keys() == []
    sqlite.execute("INSERT INTO t VALUES (1, 'a', 5, NULL)")
    with pytest.raises(Refused, match=r'"twice".*CAST'):
        export.run(query="SELECT id, loose * 2 AS twice FROM t")
    export.run(query="SELECT id, CAST(loose * 2 AS INTEGER) AS twice FROM t")
    assert export.rows() == [{"id": 1, "twice": 10}]


ROWS = st.lists(
    st.tuples(
        st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
        st.none() | st.floats(allow_nan=False),
        st.none() | st.integers(-(2**63), 2**63 - 1),
        st.none() | st.binary(max_size=50),
        st.none() | st.datetimes(),
        st.none() | st.dates(),
    ),
    min_size=1,
    max_size=20,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=ROWS)
def test_any_values_round_trip(export: Any, database: Any, rows: Any) -> None:
    number = export.claims
    export.directory = export.directory.with_name(f"values-{number}")
    export.directory.mkdir()
    export.version, export.to = 0, f"{export.to.split('/h-')[0]}/h-{number}"
    export.sources["main"] = database.url
    blob = "BLOB" if database.dialect == "sqlite" else "BYTEA"
    database.execute("DROP TABLE IF EXISTS t")
    database.execute(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, s TEXT, f DOUBLE PRECISION, i BIGINT,"
        f" b {blob}, ts TIMESTAMP, d DATE)"
    )
    isoformat = database.dialect == "sqlite"
    stored = [
        (n, *(v.isoformat() if isoformat and isinstance(v, dt.date) else v for v in row))
        for n, row in enumerate(rows)
    ]
    database.execute("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?, ?)", *stored)
    export.run()
    found = sorted(tuple(row.values()) for row in export.rows())
    assert found == [(n, *row) for n, row in enumerate(rows)]


def test_the_way_for_other_databases(
    export: Any, postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generic way, proven on a database whose rows are known from the fast one."""
    postgres.execute(
        "CREATE TABLE t (id int PRIMARY KEY, n numeric(10, 2), f float8, s text, b bytea, u uuid,"
        " j jsonb, d date, ts timestamp, tz timestamptz, ti time, x bool, at bigint NOT NULL)"
    )
    postgres.execute(
        "INSERT INTO t SELECT g, g * 0.01, g / 3.0, 'r' || g, '\\x00ff', gen_random_uuid(),"
        " '{\"a\": 1}', '2024-01-01', now(), now(), '10:00', mod(g, 2) = 0, g / 10"
        " FROM generate_series(1, 5000) g"
    )
    postgres.execute("INSERT INTO t (id, at) VALUES (0, 0)")
    export.sources["main"] = postgres.url
    export.run()
    fast = sorted(export.rows(), key=lambda row: int(row["id"]))

    def generic(url: Any) -> Callable[[str, Any], Source]:
        return GenericSource

    monkeypatch.setattr("tasks.exporting.sources._kind", generic)
    export.directory = export.directory.with_name("generic")
    export.directory.mkdir()
    export.version, export.to = 0, export.to + "/generic"
    incremental = {"mode": "incremental", "column": "at", "lookback": 5}
    export.run(**incremental)
    postgres.execute("INSERT INTO t (id, at) VALUES (6000, 495), (6001, 600)")
    assert export.run(**incremental)["rows"] == 2
    slow = sorted(export.rows(), key=lambda row: int(row["id"]))
    assert slow[:5001] == fast
    export.directory = export.directory.with_name("empty")
    export.directory.mkdir()
    with pytest.raises(Refused, match="no table or view 'nosuch'"):
        export.run("nosuch")
