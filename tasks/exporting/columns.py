"""What a column is, and how its values become Arrow's.

A value that doesn't fit its column is refused with the column's name and the row's key. The
value itself isn't shown: it may be private.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from errors import Refused
from tasks.settings import parse_span

Mark = int | float | Decimal | dt.date | dt.datetime
"""A value of a watermark column."""

TIMESTAMP = pa.timestamp("us")
TIMESTAMP_UTC = pa.timestamp("us", "UTC")
TIME = pa.time64("us")
_EXACTLY = Context(prec=400, traps=[Inexact, InvalidOperation])
UNBOUNDED = pa.decimal128(38, 18)
"""Of a numeric without precision: 20 digits before the point and 18 after it, or refused."""

# What Python, and most readers of Parquet, can represent: the years 1 to 9999.
_TEMPORAL_RANGE = {
    "date": (-719162, 2932896),
    "timestamp": (-62135596800000000, 253402300799999999),
    "time": (0, 86399999999),
}


@dataclass(frozen=True)
class Column:
    """One column of a table or query."""

    name: str
    type: pa.DataType
    declared: str
    """What the database calls its type."""
    nullable: bool | None
    """None where the database can't say: a view's or a query's column."""

    @property
    def field(self) -> pa.Field:
        return pa.field(self.name, self.type)


def type_name(type_: pa.DataType) -> str:
    """How manifests and messages name an Arrow type."""
    if isinstance(type_, pa.UuidType):
        return "uuid"
    if isinstance(type_, pa.JsonType):
        return "json"
    return str(type_)


def decimal_type(precision: int | None, scale: int | None) -> pa.DataType | None:
    """The Arrow type of numeric(precision, scale); None if there is none."""
    if precision is None:
        return UNBOUNDED
    scale = scale or 0
    # Parquet wants 0 <= scale <= precision; PostgreSQL allows numeric(3, -2) and numeric(2, 5).
    precision, scale = (precision - scale, 0) if scale < 0 else (max(precision, scale), scale)
    if precision <= 38:
        return pa.decimal128(precision, scale)
    return pa.decimal256(precision, scale) if precision <= 76 else None


def schema_of(columns: Iterable[Column]) -> pa.Schema:
    return pa.schema([column.field for column in columns])


def unsupported(name: str, declared: str, hint: str) -> str:
    """One line about a column whose type can't be carried."""
    return f'column "{name}" has the type {declared or "(none)"}, which can\'t be exported: {hint}'


# -- values to Arrow ------------------------------------------------------------------------------


def array_of(column: Column, values: Sequence[Any], row_key: Callable[[int], str]) -> pa.Array:
    """The values of one column, as Python objects from a database driver, in Arrow's form.

    `row_key(i)` names the row of value `i` in an error.
    """
    convert = _converter(column.type)
    try:
        return convert(column.type, values)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        row = next(i for i, value in enumerate(values) if not _converts(convert, column, value))
    raise misfit(column, row_key(row), f"a value of type {type(values[row]).__name__}")


def misfit(column: Column, row: str, value: str) -> Refused:
    return Refused(
        f'column "{column.name}" ({column.declared or "no declared type"}), {row}: it holds '
        f"{value} that isn't a {type_name(column.type)}; nothing was published. Correct the row, "
        "or export a query that converts it"
    )


def _converts(convert: Callable[..., pa.Array], column: Column, value: Any) -> bool:
    try:
        convert(column.type, [value])
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return False
    return True


def _only(values: Sequence[Any], *kinds: type) -> None:
    if not set(map(type, values)) <= {*kinds, type(None)}:
        raise TypeError


def _plain(*kinds: type) -> Callable[[pa.DataType, Sequence[Any]], pa.Array]:
    def convert(type_: pa.DataType, values: Sequence[Any]) -> pa.Array:
        _only(values, *kinds)  # Arrow alone would take bytes for text and 1.0 for 1
        return pa.array(values, type_)

    return convert


def _booleans(type_: pa.DataType, values: Sequence[Any]) -> pa.Array:
    _only(values, bool, int)
    if not set(values) <= {0, 1, None}:
        raise ValueError
    return pa.array([None if value is None else bool(value) for value in values], type_)


def _temporals(type_: pa.DataType, values: Sequence[Any]) -> pa.Array:
    if not set(map(type, values)) <= {str, type(None)}:
        zoned = pa.types.is_timestamp(type_) and type_.tz is not None
        for value in values:
            if isinstance(value, dt.datetime) and (value.tzinfo is not None) != zoned:
                raise ValueError
        _only(values, dt.datetime if pa.types.is_timestamp(type_) else dt.date)
        return pa.array(values, type_)
    return pa.array(values, pa.string()).cast(type_)


def _times(type_: pa.DataType, values: Sequence[Any]) -> pa.Array:
    _only(values, str, dt.time)
    times = [dt.time.fromisoformat(v) if isinstance(v, str) else v for v in values]
    if any(time is not None and time.tzinfo is not None for time in times):
        raise ValueError
    return pa.array(times, type_)


def _decimals(type_: pa.DataType, values: Sequence[Any]) -> pa.Array:
    _only(values, int, float, str, Decimal)
    fast = _decimals_of_reals(type_, values)
    if fast is not None:
        return fast
    # Rounding is looked for here: Arrow 26 makes 0.00 of 6.1e-60 without a word.
    return pa.array([_decimal(value, type_.scale) for value in values], type_)


def _decimals_of_reals(type_: pa.DataType, values: Sequence[Any]) -> pa.Array | None:
    """The same for REALs and integers, all at once; None where that can't be exact.

    A REAL has 15 decimal digits. So one that lies within 5e-16 of a decimal with no more digits
    than that is this decimal: it prints as it.
    """
    if type_.bit_width != 128 or not set(map(type, values)) <= {int, float, type(None)}:
        return None
    try:
        reals = pa.array(values, pa.float64())
    except pa.ArrowInvalid:
        return None  # an integer above 2**53
    power = 10.0**type_.scale
    whole = pc.round(pc.multiply(reals, power))
    if not len(reals) - reals.null_count:
        return pa.nulls(len(reals), type_)
    largest = pc.max(pc.abs(whole)).as_py()
    if not largest < min(1e15, 10.0**type_.precision):
        return None
    error = pc.abs(pc.subtract(pc.divide(whole, power), reals))
    if not pc.all(pc.less_equal(error, pc.multiply(pc.abs(reals), 5e-16))).as_py():
        return None
    wide = whole.cast(pa.int64()).cast(pa.decimal128(38, 0))
    # The same integers, read with the point where it belongs.
    return pa.Array.from_buffers(type_, len(wide), wide.buffers(), wide.null_count, wide.offset)


def _decimal(value: Any, scale: int) -> Decimal | None:
    if value is None:
        return None
    try:
        number = Decimal(str(value))
        if isinstance(value, float) and number.as_tuple().exponent < -scale:  # type: ignore[operator]
            # A REAL keeps 15 digits of what was written; its shortest form may show more.
            number = Decimal(f"{value:.15g}")
    except (ArithmeticError, TypeError):
        number = Decimal("NaN")
    if not number.is_finite():
        raise ValueError("not a finite number")
    try:
        return number.quantize(Decimal((0, (1,), -scale)), context=_EXACTLY)
    except ArithmeticError:
        raise ValueError("it has more digits") from None


def _jsons(type_: pa.DataType, values: Sequence[Any]) -> pa.Array:
    texts = [None if value is None else _json_text(value) for value in values]
    return pa.ExtensionArray.from_storage(type_, pa.array(texts, pa.string()))


def _json_text(value: Any) -> str:
    if isinstance(value, bytes):
        raise TypeError
    if isinstance(value, str):
        json.loads(value)
        return value
    return json.dumps(value, allow_nan=False)


def _uuids(type_: pa.DataType, values: Sequence[Any]) -> pa.Array:
    _only(values, str, bytes, uuid.UUID)
    raw = [None if value is None else _uuid_bytes(value) for value in values]
    return pa.ExtensionArray.from_storage(type_, pa.array(raw, pa.binary(16)))


def _uuid_bytes(value: str | bytes | uuid.UUID) -> bytes:
    if isinstance(value, uuid.UUID):
        return value.bytes
    return (uuid.UUID(value) if isinstance(value, str) else uuid.UUID(bytes=value)).bytes


def _converter(type_: pa.DataType) -> Callable[[pa.DataType, Sequence[Any]], pa.Array]:
    if isinstance(type_, pa.UuidType):
        return _uuids
    if isinstance(type_, pa.JsonType):
        return _jsons
    if pa.types.is_decimal(type_):
        return _decimals
    if pa.types.is_time(type_):
        return _times
    if pa.types.is_date(type_) or pa.types.is_timestamp(type_):
        return _temporals
    if pa.types.is_boolean(type_):
        return _booleans
    if pa.types.is_integer(type_):
        return _plain(int)
    if pa.types.is_floating(type_):
        return _plain(float, int)
    return _plain(bytes) if pa.types.is_binary(type_) else _plain(str)


# -- checks on finished arrays --------------------------------------------------------------------


def out_of_range(array: pa.Array) -> int | None:
    """The first row with a date or time outside the years 1 to 9999 (such as 'infinity')."""
    kind = next(
        (
            name
            for name, is_it in (
                ("date", pa.types.is_date),
                ("timestamp", pa.types.is_timestamp),
                ("time", pa.types.is_time),
            )
            if is_it(array.type)
        ),
        None,
    )
    if kind is None:
        return None
    low, high = _TEMPORAL_RANGE[kind]
    numbers = array.view(pa.int32() if kind == "date" else pa.int64())
    extremes = pc.min_max(numbers).as_py()
    if extremes["min"] is None or (low <= extremes["min"] and extremes["max"] <= high):
        return None
    outside = pc.or_(pc.less(numbers, low), pc.greater(numbers, high))
    return int(pc.index(outside, True).as_py())


def storage(array: pa.Array) -> pa.Array:
    """The array without its extension type: what joins and comparisons understand."""
    return array.storage if isinstance(array, pa.ExtensionArray) else array


# -- watermarks -----------------------------------------------------------------------------------


def check_watermark(column: Column) -> None:
    """Refuse a column that can't tell new rows from old ones."""
    type_ = column.type
    ordered = (
        pa.types.is_integer(type_)
        or pa.types.is_floating(type_)
        or pa.types.is_decimal(type_)
        or pa.types.is_date(type_)
        or pa.types.is_timestamp(type_)
    )
    if not ordered:
        raise Refused(
            f'column="{column.name}" ({column.declared}) has no order that new rows follow: a '
            "watermark is a whole number, a decimal, a float, a date or a timestamp"
        )
    if column.nullable:
        raise Refused(
            f'column="{column.name}" may be NULL, so rows could be missed: a watermark is NOT NULL'
        )


def lookback_of(column: Column, value: str | float | None) -> float:
    """The lookback in the column's own measure: seconds for times, units for numbers."""
    if value is None:
        return 0
    if not isinstance(value, str):
        return value
    if pa.types.is_temporal(column.type):
        return parse_span(value)
    raise Refused(
        f'lookback={value!r}: column="{column.name}" is a number ({column.declared}), so its '
        "lookback is a number too"
    )


def minus(mark: Mark, lookback: float) -> Mark:
    """`lookback` below `mark`: seconds for times (whole days for dates), units for numbers."""
    if not lookback:
        return mark
    try:
        if isinstance(mark, dt.datetime):
            return mark - dt.timedelta(seconds=lookback)
        if isinstance(mark, dt.date):
            return mark - dt.timedelta(days=math.ceil(lookback / 86400))
    except OverflowError:
        if isinstance(mark, dt.datetime):
            return dt.datetime.min.replace(tzinfo=mark.tzinfo)
        return dt.date.min
    if isinstance(mark, Decimal):
        return mark - Decimal(str(lookback))
    return mark - (math.ceil(lookback) if isinstance(mark, int) else lookback)


def mark_to_json(mark: Mark | None) -> Any:
    if mark is None or isinstance(mark, (int, float)):
        return mark
    return mark.isoformat() if isinstance(mark, dt.date) else str(mark)


def mark_from_json(value: Any, type_: pa.DataType) -> Mark | None:
    """The mark that `mark_to_json` wrote; raises ValueError or TypeError for anything else."""
    if value is None:
        return None
    if pa.types.is_integer(type_):
        return int(value)
    if pa.types.is_floating(type_):
        return float(value)
    if pa.types.is_decimal(type_):
        return Decimal(value) if re.fullmatch(r"-?[\d.]+(E[+-]?\d+)?", value) else _bad()
    if pa.types.is_date(type_):
        return dt.date.fromisoformat(value)
    return dt.datetime.fromisoformat(value)


def _bad() -> Decimal:
    raise ValueError("not a decimal")


# -- comparing schemas ----------------------------------------------------------------------------


def describe(columns: Iterable[Column]) -> list[dict[str, str]]:
    """The schema as manifests and the state hold it."""
    return [{"name": c.name, "type": type_name(c.type), "declared": c.declared} for c in columns]


def check_schema(
    before: Sequence[Mapping[str, str]], now: Sequence[Column], may_add: bool, table: str
) -> None:
    """Refuse columns that came, went or changed since the last run; `may_add` lets them come."""
    old = {column["name"]: column["type"] for column in before}
    new = {column.name: type_name(column.type) for column in now}
    added = [f'"{name}" ({new[name]})' for name in new if name not in old]
    removed = [f'"{name}"' for name in old if name not in new]
    changed = [
        f'"{name}" from {old[name]} to {new[name]}'
        for name in new
        if name in old and old[name] != new[name]
    ]
    if not removed and not changed and (may_add or not added):
        return
    parts = [
        f"{what} {', '.join(names)}"
        for what, names in (("added", added), ("removed", removed), ("changed", changed))
        if names
    ]
    way_out = (
        'on_schema_change="add" takes new columns'
        if added and not removed and not changed
        else 'on_schema_change="replace" exports everything anew, with the new columns'
    )
    raise Refused(
        f"the columns of {table} changed since the last run: {'; '.join(parts)}. {way_out}"
    )
