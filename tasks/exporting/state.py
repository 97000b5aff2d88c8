"""What the job directory remembers between runs: two files, committed with the run.

`state.json`     whose state it is, the columns, the watermark, and the last manifest.
`seen.parquet`   key and watermark of the exported rows at or above the edge: those that the next
                 run reads again. No more than one window of rows.

The edge is the watermark minus the lookback. A row counts as seen by its key *and* its watermark,
so an update that moves the watermark is exported again, as a new version of the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from errors import Damaged, Refused
from tasks.exporting import columns as col
from tasks.exporting.columns import Column, Mark
from tasks.exporting.request import Request

FORMAT = 1
_STATE = "state.json"
_SEEN = "seen.parquet"


@dataclass
class State:
    """What the last successful run left."""

    manifest: dict[str, Any] | None = None
    columns: list[dict[str, str]] = field(default_factory=list)
    column: str | None = None
    primary_key: tuple[str, ...] = ()
    watermark: Any = None
    edge: Any = None

    @classmethod
    def read(cls, directory: Path, request: Request) -> State:
        """The state in this directory; a fresh one if there is none."""
        path = directory / _STATE
        try:
            found = json.loads(path.read_text("utf-8"))
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']}")
            state = cls(
                manifest=dict(found["manifest"]),
                columns=[{**column} for column in found["columns"]],
                column=found["column"],
                primary_key=tuple(found["primary_key"]),
                watermark=found["watermark"],
                edge=found["edge"],
            )
            identity = [found[name] for name in ("source", "table", "to")]
            int(state.manifest["version"])  # type: ignore[index]
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError) as error:
            damage = f"{type(error).__name__}: {error}"
        else:
            ours = [request.source, request.table, request.to]
            for name, theirs, mine in zip(("source", "table", "to"), identity, ours, strict=True):
                if theirs != mine:
                    raise Refused(
                        f"this job's directory holds the export of {name}={theirs!r}, not "
                        f"{mine!r}: give the other export a job key of its own"
                    )
            return state
        raise Damaged(f"{_STATE} in the job directory isn't what an export wrote ({damage})")

    def write(self, directory: Path, request: Request) -> None:
        content = {
            "format": FORMAT,
            "source": request.source,
            "table": request.table,
            "to": request.to,
            "columns": self.columns,
            "column": self.column,
            "primary_key": list(self.primary_key),
            "watermark": self.watermark,
            "edge": self.edge,
            "manifest": self.manifest,
        }
        (directory / _STATE).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        if self.watermark is None:
            (directory / _SEEN).unlink(missing_ok=True)

    def mark(self, name: str, column: Column) -> Mark | None:
        """`watermark` or `edge`, as a value of the column."""
        try:
            return col.mark_from_json(getattr(self, name), column.type)
        except (ValueError, TypeError):
            pass
        raise Damaged(
            f'{_STATE} in the job directory: its {name} isn\'t a value of "{column.name}"'
        )


class Seen:
    """The rows that earlier runs exported at or above the edge, and those that this run does."""

    def __init__(
        self,
        directory: Path,
        key: tuple[Column, ...],
        column: Column,
        *,
        fresh: bool,
        last: Mark | None,
        low: Mark | None,
        next_edge: Mark,
    ) -> None:
        self._path = directory / _SEEN
        self._column = column
        names = list(dict.fromkeys([*(c.name for c in key), column.name]))
        self._names = names
        self._last = None if last is None else pa.scalar(last, column.type)
        self._low = None if low is None else pa.scalar(low, column.type)
        self._edge = pa.scalar(next_edge, column.type)
        self._before = None if fresh else self._read()
        self._writer: Any = None
        self._new = directory / f"{_SEEN}.new"

    def _read(self) -> pa.Table | None:
        try:
            table = pq.read_table(self._path)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError):
            table = None
        if table is None or table.schema.names != self._names:
            raise Damaged(f"{_SEEN} in the job directory isn't what an export wrote")
        return table

    def unseen(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The rows of a batch that no earlier run exported. Refuses a row whose key is NULL."""
        for name in self._names:
            if batch.column(name).null_count:
                raise Refused(f'column "{name}" is NULL in a row: a key or watermark can\'t be')
        marks = batch.column(self._column.name)
        if self._low is not None:
            # A source may hand out a little too much, where it writes marks less finely.
            wanted = pc.greater_equal(marks, self._low)
            if not pc.all(wanted).as_py():
                batch = batch.filter(wanted)
                marks = batch.column(self._column.name)
        if self._before is None or self._last is None or not self._before.num_rows:
            return batch
        maybe = pc.indices_nonzero(pc.less_equal(marks, self._last))
        if not len(maybe):
            return batch
        numbered = self._pairs(batch.take(maybe)).append_column("#row", maybe)
        fresh = numbered.join(self._before, keys=self._names, join_type="left anti")["#row"]
        later = pc.indices_nonzero(pc.greater(marks, self._last))
        rows = pa.chunked_array([*fresh.chunks, later], pa.uint64()).combine_chunks()
        return batch.take(rows.take(pc.array_sort_indices(rows)))

    def note(self, batch: pa.RecordBatch) -> None:
        """Remember the rows of a batch that the next run will read again."""
        again = batch.filter(pc.greater_equal(batch.column(self._column.name), self._edge))
        if again.num_rows:
            self._write(self._pairs(again))

    def _pairs(self, batch: pa.RecordBatch) -> pa.Table:
        arrays = [col.storage(batch.column(name)) for name in self._names]
        return pa.table(arrays, names=self._names)

    def _write(self, pairs: pa.Table) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._new, pairs.schema, compression="zstd")
        self._writer.write_table(pairs)

    def finish(self) -> None:
        """Replace the remembered rows; the directory is committed by whoever runs the job."""
        for kept in self._kept():
            self._write(kept)
        if self._writer is None:
            self._path.unlink(missing_ok=True)
            return
        self._writer.close()
        self._new.replace(self._path)

    def _kept(self) -> Iterator[pa.Table]:
        if self._before is not None:
            kept = self._before.filter(
                pc.greater_equal(self._before[self._column.name], self._edge)
            )
            if kept.num_rows:
                yield kept
