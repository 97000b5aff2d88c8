"""Types, decimals, watermarks and secrets: the parts of an export that need no server."""

from __future__ import annotations

import datetime as dt
import logging
import threading
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import Refused, Unavailable
from tasks.exporting import columns as col
from tasks.exporting.ahead import read_ahead
from tasks.exporting.columns import Column
from tasks.exporting.reasons import Secrets, database_errors, patiently
from tasks.exporting.sqlite import arrow_type


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("INTEGER", pa.int64()),
        ("unsigned big int", pa.int64()),
        ("varchar(20)", pa.string()),
        ("DECIMAL(10, 2)", pa.decimal128(10, 2)),
        ("numeric", pa.decimal128(38, 18)),
        ("NUMERIC(50,3)", pa.decimal256(50, 3)),
        ("NUMERIC(100,3)", None),
        ("timestamp(6)", pa.timestamp("us")),
        ("TIMESTAMP WITH TIME ZONE", pa.timestamp("us", "UTC")),
        ("double precision", pa.float64()),
        ("GEOMETRY", None),
        ("", None),
    ],
)
def test_declared_types_of_sqlite(declared: str, expected: Any) -> None:
    assert arrow_type(declared) == expected


@pytest.mark.parametrize(
    ("precision", "scale", "expected"),
    [(3, -2, pa.decimal128(5, 0)), (2, 5, pa.decimal128(5, 5)), (None, None, col.UNBOUNDED)],
)
def test_odd_decimals(precision: Any, scale: Any, expected: Any) -> None:
    assert col.decimal_type(precision, scale) == expected


@settings(deadline=None)
@given(st.lists(st.none() | st.decimals(-(10**9), 10**9, places=3), max_size=30))
def test_reals_become_the_decimals_they_were_written_as(values: list[Decimal | None]) -> None:
    column = Column("n", pa.decimal128(13, 3), "DECIMAL(13,3)", True)
    reals = [None if value is None else float(value) for value in values]
    assert col.array_of(column, reals, str).to_pylist() == values


@settings(deadline=None)
@given(st.floats(-1e9, 1e9))
def test_a_real_is_never_rounded_to_its_column(value: float) -> None:
    column = Column("n", pa.decimal128(13, 2), "DECIMAL(13,2)", True)
    shown = Decimal(f"{value:.15g}")
    if shown == shown.quantize(Decimal("0.01")):
        assert col.array_of(column, [value], str).to_pylist() == [shown]
    else:
        with pytest.raises(Refused, match='"n"'):
            col.array_of(column, [value], str)


@pytest.mark.parametrize(
    ("mark", "lookback", "expected"),
    [
        (10, 3, 7),
        (10, 2.5, 7),
        (Decimal("1.5"), 0.5, Decimal("1.0")),
        (dt.date(2024, 1, 10), 3600, dt.date(2024, 1, 9)),
        (dt.datetime(2024, 1, 1), 60, dt.datetime(2023, 12, 31, 23, 59)),
        (dt.datetime(1, 1, 1), 60, dt.datetime.min),
    ],
)
def test_below_a_mark(mark: Any, lookback: float, expected: Any) -> None:
    assert col.minus(mark, lookback) == expected


@pytest.mark.parametrize(
    ("type_", "mark"),
    [
        (pa.int64(), 2**62),
        (pa.float64(), 0.1),
        (pa.decimal128(10, 2), Decimal("-1.10")),
        (pa.date32(), dt.date(2024, 2, 29)),
        (col.TIMESTAMP, dt.datetime(2024, 2, 29, 1, 2, 3, 4)),
        (col.TIMESTAMP_UTC, dt.datetime(2024, 2, 29, tzinfo=dt.UTC)),
    ],
)
def test_marks_survive_the_state(type_: Any, mark: Any) -> None:
    assert col.mark_from_json(col.mark_to_json(mark), type_) == mark


def test_secrets_are_hidden_in_every_form() -> None:
    url = sa.make_url("postgresql://me:p%2Fw+d@h/db?sslpassword=tiny&x=1")
    hidden = Secrets(url).hidden("p/w+d p%2Fw%2Bd tiny x")
    assert hidden == "*** *** *** x"


def test_a_drivers_error_doesnt_travel_along() -> None:
    url = sa.make_url("postgresql://me:hunter2@h/db")
    with pytest.raises(Unavailable) as caught, database_errors("main", Secrets(url)):
        raise OSError("could not reach me:hunter2@h")
    error = caught.value
    assert "hunter2" not in str(error)
    assert error.__cause__ is None and error.__context__ is None


def test_patience_ends() -> None:
    tries = []

    def away() -> None:
        tries.append(1)
        raise Unavailable("the lake is frozen")

    with pytest.raises(Unavailable, match=r"the lake is frozen \(tried \d+ times in 0\.4 s\)"):
        patiently(away, 0.4, logging.getLogger("test"), lambda: False)
    assert len(tries) >= 2


def batches(number: int, error: Exception | None = None) -> Iterator[Any]:
    for n in range(number):
        yield pa.record_batch({"n": [n]})
    if error is not None:
        raise error


def test_reading_ahead_keeps_order_and_errors() -> None:
    assert [b["n"][0].as_py() for b in read_ahead(batches(20))] == list(range(20))
    with pytest.raises(Refused, match="odd"):
        list(read_ahead(batches(5, Refused("odd"))))


def test_reading_ahead_ends_with_its_reader() -> None:
    before = threading.active_count()
    ahead = read_ahead(batches(1000))
    next(ahead)
    ahead.close()
    assert threading.active_count() == before
