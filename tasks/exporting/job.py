"""The recipe of one export, from top to bottom.

Everything that can be refused is refused before anything is written to S3. What a run writes lies
in a folder that is its alone and counts for nothing until the run's commit; see `manifests`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from errors import Refused
from tasks.exporting import columns as col
from tasks.exporting import manifests
from tasks.exporting.ahead import read_ahead
from tasks.exporting.bucket import Bucket
from tasks.exporting.columns import Column
from tasks.exporting.parts import Parts
from tasks.exporting.reasons import patiently, stop_if
from tasks.exporting.request import Request
from tasks.exporting.sources import Snapshot, Source, Window, open_source
from tasks.exporting.state import Seen, State
from tasks.run import Run


def run_export(run: Run, request: Request, sources: Mapping[str, str]) -> dict[str, Any]:
    """Export what `request` says, leave the next state in the directory, return the manifest."""
    source = open_source(request.source, sources)
    state = State.read(run.directory, request)

    def checked_bucket() -> Bucket:
        bucket = Bucket(request.bucket)
        bucket.check()
        return bucket

    bucket = patiently(checked_bucket, request.patience, run.log, lambda: run.cancelled)

    def connected() -> None:
        with source.snapshot(request.table, request.query):
            pass

    patiently(connected, request.patience, run.log, lambda: run.cancelled)
    return _Export(run, request, bucket, state).from_source(source)


class _Export:
    """One export under way."""

    def __init__(self, run: Run, request: Request, bucket: Bucket, state: State) -> None:
        self._run = run
        self._request = request
        self._bucket = bucket
        self._state = state

    def from_source(self, source: Source) -> dict[str, Any]:
        with source.snapshot(self._request.table, self._request.query) as snapshot:
            self._check_columns(snapshot)
            if not self._request.incremental:
                self._tidy()
                return self._finish(snapshot, self._write(snapshot, None, None, ()), None)
            return self._incremental(snapshot)

    def _check_columns(self, snapshot: Snapshot) -> None:
        request, state = self._request, self._state
        if not snapshot.columns:
            raise Refused(f"source {request.source!r}, {request.table}: it has no columns")
        # What the table held before is replaced, unless this run adds to it.
        self._starts_over = not request.incremental or state.column is None
        if state.manifest is None:
            return
        if request.on_schema_change == "replace":
            old = [(c["name"], c["type"]) for c in state.columns]
            new = [(c["name"], c["type"]) for c in col.describe(snapshot.columns)]
            self._starts_over = self._starts_over or old != new
            return
        col.check_schema(
            state.columns, snapshot.columns, request.on_schema_change == "add", request.table
        )

    def _tidy(self) -> None:
        """Publish what the last run committed, if its node died before that; remove leftovers."""
        run, last = self._run, self._state.manifest
        manifests.check_lineage(self._bucket, self._request, run.version, last)
        if last is not None:
            manifests.publish(last)
        removed = manifests.clean_up(self._bucket, self._request, run.version)
        if removed:
            run.log.info("removed %d leftovers of earlier runs from S3", len(removed))

    def _incremental(self, snapshot: Snapshot) -> dict[str, Any]:
        request, state = self._request, self._state
        assert request.column is not None
        column = _named(snapshot, request.column, "column")
        col.check_watermark(column)
        key = self._key(snapshot)
        lookback = col.lookback_of(column, request.lookback)
        if state.column is not None and not self._starts_over:
            for name, before, now in (
                ("column", state.column, request.column),
                ("primary_key", state.primary_key, tuple(c.name for c in key)),
            ):
                if before != now:
                    raise Refused(
                        f"{name}={now!r}: the last run used {before!r}. To start over with the new "
                        'one, export once with mode="full"'
                    )
        last = low = None
        if not self._starts_over:
            last, low = state.mark("watermark", column), state.mark("edge", column)
        top = snapshot.highest(column)
        self._tidy()
        if top is None:
            # Without rows there is no bound: the watermark stays what it was.
            return self._finish(snapshot, self._empty(snapshot), (column, key, last, low))
        # Rows may have been deleted: the watermark never moves back.
        mark = top if last is None else max(last, top)
        edge = col.minus(mark, lookback)
        edge = edge if low is None else max(low, edge)
        seen = Seen(
            self._run.directory,
            key,
            column,
            fresh=self._starts_over,
            last=last,
            low=low,
            next_edge=edge,
        )
        names = tuple(c.name for c in key)
        parts = self._write(snapshot, Window(column, low, top), seen, names)
        seen.finish()
        return self._finish(snapshot, parts, (column, key, mark, edge))

    def _key(self, snapshot: Snapshot) -> tuple[Column, ...]:
        names = self._request.primary_key or snapshot.primary_key
        if not names:
            raise Refused(
                f"{self._request.table} has no primary key, which incremental exports need to know "
                'a row again: name its columns in primary_key=, or use mode="full"'
            )
        key = tuple(_named(snapshot, name, "primary_key") for name in names)
        for column in key:
            if col.type_name(column.type) == "json":
                raise Refused(
                    f'primary_key: "{column.name}" is {column.declared}; it can\'t be a key'
                )
        return key

    def _parts(self, snapshot: Snapshot) -> Parts:
        run, request = self._run, self._request
        folder = manifests.folder_of(request, run.version + 1, run.task_id, run.claim_id)
        return Parts(
            self._bucket,
            folder,
            col.schema_of(snapshot.columns),
            rows_per_file=request.rows_per_file,
            part_size=request.part_size,
            compression=request.compression,
        )

    def _empty(self, snapshot: Snapshot) -> Parts:
        return self._parts(snapshot)

    def _write(
        self, snapshot: Snapshot, window: Window | None, seen: Seen | None, key: tuple[str, ...]
    ) -> Parts:
        run = self._run
        total = snapshot.expected_rows(window)
        with (
            self._parts(snapshot) as parts,
            closing(read_ahead(snapshot.batches(window, key))) as batches,
        ):
            run.progress(0, total, "rows")
            for batch in batches:
                stop_if(run.cancelled)
                if seen is not None:
                    batch = seen.unseen(batch)
                    seen.note(batch)
                parts.write(batch)
                run.progress(parts.rows, total, "rows")
            stop_if(run.cancelled)
        run.progress(parts.rows, parts.rows, "rows")
        return parts

    def _finish(
        self, snapshot: Snapshot, parts: Parts, incremental: tuple[Any, ...] | None
    ) -> dict[str, Any]:
        run, request, state = self._run, self._request, self._state
        since = None if incremental is None or self._starts_over else state.edge
        state.columns = col.describe(snapshot.columns)
        state.column, state.primary_key, state.watermark, state.edge = None, (), None, None
        if incremental is not None:
            column, key, mark, edge = incremental
            state.column = column.name
            state.primary_key = tuple(c.name for c in key)
            state.watermark, state.edge = col.mark_to_json(mark), col.mark_to_json(edge)
        state.manifest = {
            "format": manifests.FORMAT,
            "source": request.source,
            "table": request.table,
            "to": request.to,
            "mode": request.mode,
            "replaces": self._starts_over,
            "version": run.version + 1,
            "base": run.version,
            "task_id": run.task_id,
            "claim_id": run.claim_id,
            "objects": parts.described(),
            "rows": parts.rows,
            "bytes": sum(done.bytes for done in parts.objects),
            "schema": state.columns,
            "column": state.column,
            "since": since,
            "watermark": state.watermark,
        }
        state.write(run.directory, request)
        return state.manifest


def _named(snapshot: Snapshot, name: str, argument: str) -> Column:
    for column in snapshot.columns:
        if column.name == name:
            return column
    names = ", ".join(column.name for column in snapshot.columns)
    raise Refused(f"{argument}={name!r}: there is no such column; there are {names}")
