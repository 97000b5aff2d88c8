"""Reads a few batches ahead in a thread, so that database and Parquet writer work at once."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import Empty, Full, Queue

import pyarrow as pa

_DEPTH = 2


def read_ahead(batches: Iterator[pa.RecordBatch]) -> Generator[pa.RecordBatch, None, None]:
    """The same batches. When this iterator ends or is closed, the thread has ended too."""
    ready: Queue[pa.RecordBatch | BaseException | None] = Queue(_DEPTH)
    stop = threading.Event()

    def hand_over(item: pa.RecordBatch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.2)
                return
            except Full:
                continue

    def read() -> None:
        try:
            for batch in batches:
                hand_over(batch)
                if stop.is_set():
                    return
            hand_over(None)
        except BaseException as error:
            hand_over(error)

    thread = threading.Thread(target=read, name="export-reader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        # What is still in the queue must not outlive the database's connection.
        while thread.is_alive():
            try:
                ready.get(timeout=0.01)
            except Empty:
                thread.join(0.01)
