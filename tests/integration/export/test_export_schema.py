"""Columns that change between runs: an error by default, accepted when asked for."""

from __future__ import annotations

from typing import Any

import pytest

from errors import Refused

INCREMENTAL: dict[str, Any] = {"mode": "incremental", "column": "n"}


@pytest.fixture
def source(export: Any, database: Any) -> Any:
    export.sources["main"] = database.url
    database.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, n INTEGER NOT NULL, old TEXT)")
    database.execute("INSERT INTO t VALUES (1, 1, 'a')")
    return database


@pytest.mark.parametrize("mode", [INCREMENTAL, {"mode": "full"}])
def test_a_new_column_is_refused_by_default(export: Any, source: Any, mode: Any) -> None:
    export.run(**mode)
    source.execute("ALTER TABLE t ADD COLUMN fresh DOUBLE PRECISION")
    with pytest.raises(Refused, match=r'added "fresh" \(double\).*on_schema_change="add"'):
        export.run(**mode)
    assert len(export.rows()) == 1


def test_a_new_column_is_taken_when_asked(export: Any, source: Any) -> None:
    export.run(**INCREMENTAL)
    source.execute("ALTER TABLE t ADD COLUMN fresh DOUBLE PRECISION")
    source.execute("INSERT INTO t VALUES (2, 2, 'b', 0.5)")
    assert export.run(**INCREMENTAL, on_schema_change="add")["rows"] == 1
    assert sorted(export.rows(), key=lambda row: int(row["id"])) == [
        {"id": 1, "n": 1, "old": "a", "fresh": None},
        {"id": 2, "n": 2, "old": "b", "fresh": 0.5},
    ]
    assert export.run(**INCREMENTAL)["rows"] == 0


@pytest.mark.parametrize("policy", ["error", "add"])
def test_a_removed_or_changed_column_is_refused(export: Any, source: Any, policy: str) -> None:
    export.run(**INCREMENTAL)
    source.execute("DROP TABLE t")
    source.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, n DECIMAL(9,1) NOT NULL)")
    with pytest.raises(
        Refused, match=r'removed "old"; changed "n" from int.* to decimal128\(9, 1\)'
    ):
        export.run(**INCREMENTAL, on_schema_change=policy)


def test_replace_starts_over_with_the_new_columns(export: Any, source: Any) -> None:
    export.run(**INCREMENTAL)
    source.execute("ALTER TABLE t DROP COLUMN old")
    source.execute("INSERT INTO t VALUES (2, 2)")
    result = export.run(**INCREMENTAL, on_schema_change="replace")
    assert (result["rows"], result["replaces"]) == (2, True)
    assert [list(row) for row in export.rows()] == [["id", "n"]] * 2
    result = export.run(**INCREMENTAL, on_schema_change="replace")
    assert (result["rows"], result["replaces"]) == (0, False)


@pytest.mark.parametrize("change", [{"column": "id"}, {"primary_key": "n"}])
def test_another_watermark_or_key_is_refused(export: Any, source: Any, change: Any) -> None:
    export.run(**INCREMENTAL)
    with pytest.raises(Refused, match=f"{next(iter(change))}=.*the last run used"):
        export.run(**{**INCREMENTAL, **change})
    export.run(mode="full")
    assert export.run(**{**INCREMENTAL, **change})["replaces"]


@pytest.mark.parametrize("name", ["source", "table", "to"])
def test_a_directory_belongs_to_one_export(export: Any, source: Any, name: str) -> None:
    export.run(**INCREMENTAL)
    other = {"source": "other", "table": "u", "to": f"{export.to}/elsewhere"}[name]
    export.sources["other"] = export.sources["main"]
    with pytest.raises(Refused, match=f"holds the export of {name}="):
        export.run(**INCREMENTAL, **{name: other})
