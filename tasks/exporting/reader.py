"""What a reader of an export sees: the newest full export and the incremental ones after it.

Nothing but the manifests decides what is there; objects that none of them names are ignored.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from errors import Damaged
from tasks.exporting.bucket import Bucket
from tasks.exporting.manifests import published_versions, read_manifest
from tasks.exporting.request import table_folder


def read_manifests(to: str, table: str) -> list[dict[str, Any]]:
    """The manifests that make up the table now, oldest first; empty before the first export."""
    name, prefix = table_folder(to, table)
    bucket = Bucket(name)
    wanted: list[dict[str, Any]] = []
    for version in reversed(published_versions(bucket, prefix)):
        manifest = read_manifest(bucket, prefix, version)
        wanted.insert(0, manifest)
        if manifest["replaces"]:
            break
    return wanted


def read_rows(to: str, table: str) -> pa.Table:
    """All rows, with the newest columns; a column that an old file lacks is NULL there.

    Every object is checked against its manifest: `Damaged` names one that differs.
    """
    manifests = read_manifests(to, table)
    tables = list(read_objects(to, manifests))
    if not tables:
        return pa.table({})
    newest = pa.unify_schemas([tables[-1].schema, *(table.schema for table in tables)])
    return pa.concat_tables([_with_schema(table, newest) for table in tables])


def read_objects(to: str, manifests: list[dict[str, Any]]) -> Iterator[pa.Table]:
    """The tables of the objects that these manifests name, one at a time."""
    bucket = Bucket(table_folder(to, "any")[0])
    for manifest in manifests:
        for entry in manifest["objects"]:
            body = bucket.get(entry["key"])
            if hashlib.sha256(body).hexdigest() != entry["sha256"]:
                raise Damaged(f"s3://{bucket.name}/{entry['key']} isn't what its manifest says")
            yield pq.read_table(io.BytesIO(body))


def _with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    arrays = [
        table[field.name]
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(arrays, schema=schema)
