"""The main job: a table or query of a relational database, to S3 as Parquet.

    export.delay("customers", to="s3://lake/raw")
    export.delay("orders", to="s3://lake/raw", mode="incremental", column="updated_at")

Promises: a reader of the manifests sees the rows of committed runs only; an incremental export
loses no row and doubles none; whatever can be refused is refused before anything is written.
See `docs/export.md` for every argument.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from tasks import job
from tasks.exporting import manifests
from tasks.exporting.job import run_export
from tasks.exporting.request import checked
from tasks.run import Run
from tasks.settings import current


def publish_manifest(result: dict[str, Any]) -> None:
    """Show a committed export to readers. Called after the commit, perhaps more than once."""
    manifests.publish(result)


@job(
    key="export-{source}-{table}",
    cpus=1,
    memory="2 GiB",
    retries=3,
    timeout="2h",
    after_commit=publish_manifest,
)
def export(
    run: Run,
    table: str,
    *,
    to: str,
    source: str = "main",
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
) -> dict[str, Any]:
    """Export `table` (or `query`, by the name `table`) of `source` to `to`; returns the manifest.

    `mode="incremental"` exports the rows that are new since the last run by `column`, again from
    `lookback` below it. Raises `errors.Refused` for what can't be done as asked,
    `errors.Unavailable` for a database or S3 that stays away longer than `patience`.
    """
    request = checked(
        table,
        source,
        to,
        query=query,
        mode=mode,
        column=column,
        primary_key=primary_key,
        lookback=lookback,
        on_schema_change=on_schema_change,
        rows_per_file=rows_per_file,
        part_size=part_size,
        compression=compression,
        patience=patience,
    )
    return run_export(run, request, current().sources)


@job(cpus=1)
def export_daily(run: Run) -> list[str]:
    """Submit one export for each `[[exports]]` of the settings; returns their task ids.

    The ids follow from this task's own, so a redelivered task submits the same exports again,
    not second ones.
    """
    ids = []
    for index, arguments in enumerate(current().exports):
        task_id = str(uuid.uuid5(uuid.NAMESPACE_OID, f"cohort-export:{run.task_id}:{index}"))
        export.apply_async(kwargs=dict(arguments), task_id=task_id)
        ids.append(task_id)
    return ids
