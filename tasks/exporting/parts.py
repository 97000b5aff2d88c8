"""Writes record batches as Parquet files on S3, in bounded memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.exporting.bucket import Bucket, Upload

_GROUP_BYTES = 16 * 2**20
_GROUP_ROWS = 1_000_000
_FILE_BYTES = 2**30


@dataclass(frozen=True)
class Object:
    """One Parquet file as the manifest names it."""

    key: str
    bytes: int
    rows: int
    sha256: str


class Parts:
    """Parquet files `<folder>part-00000.parquet` and so on, a new one every so many rows or 1 GiB.

    Leaving the `with` without an error finishes the last file; with one, it abandons it.
    """

    def __init__(
        self,
        bucket: Bucket,
        folder: str,
        schema: pa.Schema,
        *,
        rows_per_file: int,
        part_size: int,
        compression: str,
    ) -> None:
        self._bucket = bucket
        self._folder = folder
        self._schema = schema
        self._rows_per_file = rows_per_file
        self._part_size = part_size
        self._compression = compression
        self._group: list[pa.RecordBatch] = []
        self._group_bytes = self._group_rows = 0
        self._file_rows = 0
        self._upload: Upload | None = None
        self._writer: Any = None
        self.objects: list[Object] = []
        self.rows = 0

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._finish_file()
        elif self._upload is not None:
            self._upload.abandon()

    def write(self, batch: pa.RecordBatch) -> None:
        while batch.num_rows:
            room = self._rows_per_file - self._file_rows - self._group_rows
            head, batch = batch.slice(0, room), batch.slice(room)
            self._group.append(head)
            self._group_bytes += head.nbytes
            self._group_rows += head.num_rows
            self.rows += head.num_rows
            full = head.num_rows == room
            if full or self._group_bytes >= _GROUP_BYTES or self._group_rows >= _GROUP_ROWS:
                self._write_group()
            if full or (self._upload is not None and self._upload.bytes >= _FILE_BYTES):
                self._finish_file()

    def _write_group(self) -> None:
        if not self._group:
            return
        if self._upload is None:
            key = f"{self._folder}part-{len(self.objects):05d}.parquet"
            self._upload = self._bucket.open(key, self._part_size)
            self._key = key
            self._writer = pq.ParquetWriter(
                pa.PythonFile(self._upload, mode="w"),
                self._schema,
                compression=self._compression,
            )
        table = pa.Table.from_batches(self._group, self._schema)
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._file_rows += self._group_rows
        self._group, self._group_bytes, self._group_rows = [], 0, 0

    def _finish_file(self) -> None:
        self._write_group()
        if self._upload is None:
            return
        self._writer.close()
        self._upload.finish()
        done = Object(self._key, self._upload.bytes, self._file_rows, self._upload.sha256)
        self.objects.append(done)
        self._upload, self._writer, self._file_rows = None, None, 0

    def described(self) -> list[dict[str, Any]]:
        return [asdict(done) for done in self.objects]
