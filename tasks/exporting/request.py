"""What an export was asked to do, checked before anything is opened or written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from errors import Refused
from tasks.settings import parse_span

MODES = ("full", "incremental")
ON_SCHEMA_CHANGE = ("error", "add", "replace")
COMPRESSIONS = ("zstd", "snappy", "gzip", "lz4", "none")


@dataclass(frozen=True)
class Request:
    """The checked arguments of one export."""

    table: str
    source: str
    bucket: str
    prefix: str
    """Of the table's objects: begins without and ends with a slash."""
    to: str
    """As it was asked for, without a slash at its end."""
    query: str | None = None
    mode: str = "full"
    column: str | None = None
    primary_key: tuple[str, ...] | None = None
    lookback: str | float | None = None
    """A span or seconds for a time column, units of the column for a number."""
    on_schema_change: str = "error"
    rows_per_file: int = 5_000_000
    part_size: int = 8 * 2**20
    compression: str = "zstd"
    patience: float = 60.0

    @property
    def where(self) -> str:
        """The table's folder, as a URL without a slash at its end."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def incremental(self) -> bool:
        return self.mode == "incremental"


def table_folder(to: object, table: object) -> tuple[str, str]:
    """Bucket and prefix of the objects of `table` under `to` (`s3://bucket/prefix`)."""
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", str(to))
    if match is None:
        raise Refused(f"to={to!r}: expected s3://bucket or s3://bucket/prefix")
    prefix = (match[2] or "").strip("/")
    if prefix and any(part in ("", ".", "..") for part in prefix.split("/")):
        raise Refused(f"to={to!r}: the prefix has an empty part, '.' or '..'")
    if not isinstance(table, str) or not re.fullmatch(r"[^/\x00-\x1f\x7f]{1,200}", table):
        raise Refused(f"table={table!r}: expected a name without '/' of at most 200 characters")
    if table.strip(".") == "" or table != table.strip():
        raise Refused(f"table={table!r}: a name can't be dots only, nor begin or end with a space")
    return match[1], f"{prefix}/{table}/" if prefix else f"{table}/"


def checked(
    table: str,
    source: str,
    to: str,
    *,
    query: str | None = None,
    mode: str = "full",
    column: str | None = None,
    primary_key: str | Sequence[str] | None = None,
    lookback: str | float | None = None,
    on_schema_change: str = "error",
    rows_per_file: int = 5_000_000,
    part_size: int = 8 * 2**20,
    compression: str = "zstd",
    patience: str | float = "1m",
) -> Request:
    """A `Request` of these arguments; `Refused` names the first one that can't be."""
    bucket, prefix = table_folder(to, table)
    _one_of("mode", mode, MODES)
    _one_of("on_schema_change", on_schema_change, ON_SCHEMA_CHANGE)
    _one_of("compression", compression, COMPRESSIONS)
    if mode == "incremental" and not column:
        raise Refused('mode="incremental" needs column=, the column that grows with new rows')
    if mode == "full" and (column or lookback is not None):
        raise Refused('column= and lookback= belong to mode="incremental"')
    if not _whole(rows_per_file) or rows_per_file < 1:
        raise Refused(f"rows_per_file={rows_per_file!r}: expected a whole number of at least 1")
    if not _whole(part_size) or not 5 * 2**20 <= part_size <= 512 * 2**20:
        raise Refused(f"part_size={part_size!r}: S3 takes parts of 5 MiB to 512 MiB, in bytes")
    if query is not None and not query.strip().rstrip(";").strip():
        raise Refused("query=: it is empty")
    key = (primary_key,) if isinstance(primary_key, str) else primary_key
    if key is not None and not (key and all(_text(name) for name in key)):
        raise Refused(f"primary_key={primary_key!r}: expected a column name or a list of them")
    return Request(
        table=table,
        source=source,
        bucket=bucket,
        prefix=prefix,
        to=to.rstrip("/"),
        query=query.strip().rstrip(";").strip() if query is not None else None,
        mode=mode,
        column=column,
        primary_key=tuple(key) if key is not None else None,
        lookback=_lookback(lookback),
        on_schema_change=on_schema_change,
        rows_per_file=rows_per_file,
        part_size=part_size,
        compression=compression,
        patience=_span("patience", patience),
    )


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise Refused(f"{name}={value!r}: expected one of {', '.join(known)}")


def _text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _span(name: str, value: object) -> float:
    try:
        return parse_span(value)
    except ValueError as error:
        raise Refused(f"{name}={value!r}: expected {error}") from None


def _lookback(value: str | float | None) -> str | float | None:
    if value is None or value == 0 or (not isinstance(value, str) and value > 0):
        return value
    _span("lookback", value)
    return value
