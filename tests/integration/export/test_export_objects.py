"""Killed and late runs change nothing for a reader, and what they left behind goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from errors import Damaged, Refused, StandAside
from tasks.exporting import manifests, reader

INCREMENTAL: dict[str, Any] = {"mode": "incremental", "column": "n"}


@pytest.fixture
def source(export: Any, sqlite: Any) -> Any:
    export.sources["main"] = sqlite.url
    sqlite.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, n INTEGER NOT NULL)")
    sqlite.execute("INSERT INTO t VALUES (?, ?)", *((i, i) for i in range(5)))
    return sqlite


def add(source: Any, *numbers: int) -> None:
    source.execute("INSERT INTO t VALUES (?, ?)", *((n, n) for n in numbers))


def ids(export: Any) -> list[int]:
    return sorted(row["id"] for row in export.rows())


def test_names_hold_version_task_and_claim(
    export: Any, source: Any, keys: Callable[[], list[str]]
) -> None:
    result = export.run(rows_per_file=2)
    folder = "raw/t/v00000001-task-1-claim-1/"
    assert keys() == [
        "raw/t/_manifest/v00000001.json",
        *(f"{folder}part-0000{n}.parquet" for n in range(3)),
    ]
    assert [entry["rows"] for entry in result["objects"]] == [2, 2, 1]
    assert reader.read_manifests(export.to, "t") == [json.loads(json.dumps(result))]
    manifests.publish(result)  # once more: a redelivered task does so


def test_a_killed_run_is_invisible_and_its_objects_go(
    export: Any, source: Any, keys: Callable[[], list[str]]
) -> None:
    export.run(**INCREMENTAL)
    add(source, 10)
    export.attempt(**INCREMENTAL)  # ends without a commit: its node died
    assert ids(export) == [0, 1, 2, 3, 4]
    orphans = [key for key in keys() if "-claim-2/" in key]
    assert len(orphans) == 1
    export.run(**INCREMENTAL)
    assert ids(export) == [0, 1, 2, 3, 4, 10]
    # At that time the killed run could still have been alive, and the first to commit.
    assert orphans[0] in keys()
    export.run(**INCREMENTAL)
    assert orphans[0] not in keys()
    assert ids(export) == [0, 1, 2, 3, 4, 10]


def test_a_late_run_removes_nothing_that_others_may_commit(export: Any, source: Any) -> None:
    """Two runs from one version: whichever commits, its objects are there."""
    export.run(**INCREMENTAL)
    add(source, 10)
    first = export.attempt(**INCREMENTAL)
    second = export.attempt(**INCREMENTAL)
    export.commit(*first)
    manifests.publish(first[1])
    assert ids(export) == [0, 1, 2, 3, 4, 10]
    del second  # it is fenced: never committed


def test_a_late_run_sees_that_it_is_late(export: Any, source: Any, s3: Any, bucket: str) -> None:
    export.run(**INCREMENTAL)
    old = export.directory.with_name("old")
    export.checkout(old)
    add(source, 10)
    export.run(**INCREMENTAL)
    with pytest.raises(Refused, match=r"v00000002\.json is newer"):
        export.attempt(version=1, tree=old, **INCREMENTAL)
    assert ids(export) == [0, 1, 2, 3, 4, 10]


def test_a_run_that_dies_before_publishing_is_published_by_the_next(
    export: Any, source: Any
) -> None:
    export.run(**INCREMENTAL)
    add(source, 10)
    export.commit(*export.attempt(**INCREMENTAL))
    assert ids(export) == [0, 1, 2, 3, 4]
    add(source, 11)
    export.run(**INCREMENTAL)
    assert ids(export) == [0, 1, 2, 3, 4, 10, 11]


def test_unfinished_uploads_go_when_their_version_is_decided(
    export: Any, source: Any, s3: Any, bucket: str
) -> None:
    export.run(**INCREMENTAL)
    for key in (
        "raw/t/v00000001-x-y/part-00000.parquet",
        "raw/t/v00000002-x-y/part-00000.parquet",
        "raw/t2/v00000001-x-y/part-00000.parquet",
    ):
        s3.create_multipart_upload(Bucket=bucket, Key=key)
    export.run(**INCREMENTAL)

    def uploads() -> set[str]:
        return {
            u["Key"].split("/p")[0] for u in s3.list_multipart_uploads(Bucket=bucket)["Uploads"]
        }

    assert uploads() == {"raw/t/v00000002-x-y", "raw/t2/v00000001-x-y"}
    export.run(**INCREMENTAL)
    assert uploads() == {"raw/t2/v00000001-x-y"}


def test_a_failure_in_the_middle_leaves_no_upload(
    export: Any, sqlite: Any, s3: Any, bucket: str, keys: Callable[[], list[str]]
) -> None:
    export.sources["main"] = sqlite.url
    sqlite.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, s BLOB, n INTEGER)")
    sqlite.execute(
        "WITH RECURSIVE g(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM g WHERE i < 90)"
        " INSERT INTO t SELECT i, randomblob(1000000), 1 FROM g"
    )
    sqlite.execute("INSERT INTO t VALUES (1000, NULL, 'no number')")
    begun = []

    def look(progress: Any) -> None:
        begun.extend(s3.list_multipart_uploads(Bucket=bucket).get("Uploads", ()))

    with pytest.raises(Refused, match=r'"n".* row id=1000'):
        export.attempt(on_progress=look)
    assert begun
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)
    assert keys() == []


def test_a_cancelled_run_stops(export: Any, source: Any, keys: Callable[[], list[str]]) -> None:
    with pytest.raises(StandAside, match="cancelled"):
        export.attempt(cancelled=lambda: True)
    assert keys() == []


def test_large_files_are_uploaded_in_parts(export: Any, sqlite: Any, s3: Any, bucket: str) -> None:
    export.sources["main"] = sqlite.url
    sqlite.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, s BLOB)")
    sqlite.execute(
        "WITH RECURSIVE g(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM g WHERE i < 80)"
        " INSERT INTO t SELECT i, randomblob(500000) FROM g"
    )
    result = export.run(part_size=5 * 2**20)
    (entry,) = result["objects"]
    assert entry["bytes"] > 39_000_000
    head = s3.head_object(Bucket=bucket, Key=entry["key"])
    assert head["ETag"].strip('"').endswith("-8")
    assert len(export.rows()) == 80


def test_a_damaged_object_is_found(export: Any, source: Any, s3: Any, bucket: str) -> None:
    (entry,) = export.run()["objects"]
    s3.put_object(Bucket=bucket, Key=entry["key"], Body=b"PAR1")
    with pytest.raises(Damaged, match=r"part-00000\.parquet"):
        export.rows()


def test_objects_without_a_manifest_dont_exist(
    export: Any, source: Any, s3: Any, bucket: str
) -> None:
    (entry,) = export.run()["objects"]
    body = s3.get_object(Bucket=bucket, Key=entry["key"])["Body"].read()
    s3.put_object(Bucket=bucket, Key="raw/t/v00000001-task-1-other/part-00000.parquet", Body=body)
    s3.put_object(Bucket=bucket, Key="raw/t/notes.txt", Body=b"not ours")
    assert ids(export) == [0, 1, 2, 3, 4]
    export.run()
    assert ids(export) == [0, 1, 2, 3, 4]
    found = [o["Key"] for o in s3.list_objects_v2(Bucket=bucket)["Contents"]]
    assert "raw/t/v00000001-task-1-other/part-00000.parquet" not in found
    assert "raw/t/notes.txt" in found


def test_another_exports_prefix_is_left_alone(export: Any, source: Any) -> None:
    export.run()
    export.directory = export.directory.with_name("stranger")
    export.directory.mkdir()
    export.version = 7
    with pytest.raises(Refused, match=r"s3://.*/raw/t/_manifest/v00000001\.json exists"):
        export.run()
    assert ids(export) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', "\x00\x00"])
def test_a_damaged_state_is_named(export: Any, source: Any, content: str) -> None:
    export.run(**INCREMENTAL)
    (export.directory / "state.json").write_text(content)
    with pytest.raises(Damaged, match=r"state\.json"):
        export.run(**INCREMENTAL)


def test_a_damaged_memory_of_rows_is_named(export: Any, source: Any) -> None:
    export.run(**INCREMENTAL)
    (export.directory / "seen.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(Damaged, match=r"seen\.parquet"):
        export.run(**INCREMENTAL)
