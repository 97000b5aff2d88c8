"""Bad input gets an error that names the thing, before anything is written."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from errors import Refused, Unavailable

PASSWORD = "hunter2/s3cr3t"


@pytest.fixture(autouse=True)
def nothing_written(export: Any, keys: Callable[[], list[str]]) -> Iterator[None]:
    yield
    assert keys() == []
    assert list(export.directory.iterdir()) == []


@pytest.fixture
def source(export: Any, database: Any) -> Any:
    export.sources["main"] = database.url
    database.execute(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, at TIMESTAMP NOT NULL, maybe INTEGER,"
        " s TEXT NOT NULL, flag BOOLEAN NOT NULL, j JSON NOT NULL)"
    )
    database.execute("CREATE TABLE keyless (n INTEGER NOT NULL)")
    return database


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "mian"}, "source='mian'.* there are: main"),
        ({"table": "tt"}, "source 'main' has no table or view 'tt'"),
        ({"table": "nowhere.t"}, "nowhere.t"),
        ({"query": "SELECT * FROM missing"}, "missing"),
        ({"query": "SELEC 1"}, "syntax error"),
        ({"mode": "incremental"}, "needs column="),
        ({"mode": "incremental", "column": "nosuch"}, "column='nosuch'.*there are id, at, maybe"),
        ({"mode": "incremental", "column": "maybe"}, '"maybe" may be NULL'),
        ({"mode": "incremental", "column": "s"}, '"s" .*has no order'),
        ({"mode": "incremental", "column": "flag"}, '"flag" .*has no order'),
        ({"mode": "incremental", "column": "j"}, '"j" .*has no order'),
        ({"mode": "incremental", "column": "n", "table": "keyless"}, "keyless has no primary key"),
        ({"mode": "incremental", "column": "at", "primary_key": "uid"}, "primary_key='uid'"),
        ({"mode": "incremental", "column": "id", "lookback": "15m"}, "lookback='15m'"),
    ],
)
def test_what_the_source_doesnt_have(
    export: Any, source: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        export.run(**arguments)


def test_a_query_with_null_in_its_watermark(export: Any, source: Any) -> None:
    source.execute("INSERT INTO t VALUES (1, '2024-01-01 00:00:00', NULL, '', ?, '1')", (True,))
    with pytest.raises(Refused, match='"maybe" holds NULL'):
        export.run(
            mode="incremental", column="maybe", primary_key=["id"], query="SELECT id, maybe FROM t"
        )


def test_a_bucket_that_isnt_there(export: Any, source: Any) -> None:
    with pytest.raises(Refused, match="s3://no-such-lake: there is no such bucket"):
        export.run(to="s3://no-such-lake/raw")


def test_a_query_cant_write(export: Any, source: Any) -> None:
    queries = {
        "sqlite": "SELECT 1; DROP TABLE t",
        "postgresql": "WITH gone AS (DELETE FROM t RETURNING id) SELECT id FROM gone",
    }
    with pytest.raises(Refused):
        export.run("q", query=queries[source.dialect])


def test_s3_that_is_away(export: Any, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"S3 doesn't answer.*\(tried \d+ times in 1 s\)"):
            export.run(patience="1s")
        assert time.monotonic() - began >= 1


def test_s3_that_comes_back(
    export: Any, source: Any, monkeypatch: pytest.MonkeyPatch, s3: Any, bucket: str
) -> None:
    tried = []

    def check(self: Any) -> None:
        tried.append(self.name)
        if len(tried) < 3:
            raise Unavailable("away")

    monkeypatch.setattr("tasks.exporting.bucket.Bucket.check", check)
    with pytest.raises(Refused, match="no table"):
        export.run("after_s3_was_back", patience="30s")
    assert len(tried) == 3


def test_a_sqlite_file_that_isnt_there(export: Any, tmp_path: Path) -> None:
    path = tmp_path / "missing.db"
    export.sources["main"] = f"sqlite:///{path}"
    with pytest.raises(Unavailable, match=r"source 'main'.*unable to open"):
        export.run()
    assert not path.exists()


def test_a_file_that_is_no_database(export: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.db"
    path.write_text("This is text, and more than a header's length of it. " * 20)
    export.sources["main"] = f"sqlite:///{path}"
    with pytest.raises(Refused, match="source 'main': file is not a database"):
        export.run()


def test_a_postgres_that_is_away(export: Any) -> None:
    export.sources["main"] = f"postgresql://me:{PASSWORD.replace('/', '%2F')}@127.0.0.1:1/db"
    with pytest.raises(Unavailable, match="refused") as refusal:
        export.run()
    assert_secret(refusal.value)


@pytest.mark.parametrize("where", ["password", "query"])
def test_a_wrong_password_stays_secret(
    export: Any, postgres: Any, postgres_server: Any, where: str
) -> None:
    rules = Path(postgres_server.pgdata) / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"local all locked scram-sha-256\n{before}")
    try:
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            connection.execute("SELECT pg_reload_conf()")
            if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'locked'").fetchall():
                connection.execute("CREATE ROLE locked LOGIN PASSWORD 'right'")
        url = sa.make_url(postgres.url).set(username="locked")
        if where == "password":
            url = url.set(password=PASSWORD)
        else:
            url = url.set(password=None).update_query_dict({"password": PASSWORD})
        export.sources["main"] = url.render_as_string(hide_password=False)
        with pytest.raises(Refused, match=r"source 'main': .*password authentication failed") as it:
            export.run()
        assert_secret(it.value)
    finally:
        rules.write_text(before)


def assert_secret(error: BaseException) -> None:
    chain: list[BaseException | None] = [error, error.__cause__, error.__context__]
    text = "".join(traceback.format_exception(error)) + repr(chain) + str(chain)
    for form in (PASSWORD, PASSWORD.replace("/", "%2F"), "s3cr3t"):
        assert form not in text


def test_a_url_that_is_none(export: Any) -> None:
    export.sources["main"] = f"not a url {PASSWORD}://"
    with pytest.raises(Refused, match="source 'main': its URL") as refusal:
        export.run()
    assert_secret(refusal.value)


def test_a_dialect_without_a_known_snapshot(export: Any) -> None:
    export.sources["main"] = "firebird://host/db"
    with pytest.raises(Refused, match=r"source 'main': .*firebird"):
        export.run()
