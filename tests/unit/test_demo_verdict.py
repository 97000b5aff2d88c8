"""The demo's verdict: it must see each fault that it is there to see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from deploy.demonstration.database import TABLES, WATERMARK, Database, comparable
from deploy.demonstration.runs import Job
from deploy.demonstration.verify import Verdict
from storage.log import Record

ROWS = Counter({(1, "a"): 1, (2, "b"): 1})


def record(n: int, *, base: int | None = None, since: Any = None, task: str = "") -> Record:
    base = n - 1 if base is None else base
    return Record(
        n=n,
        base=n - 1,
        key="k",
        task_id=task or f"task-{n}",
        claim_id=f"claim-{n}",
        attempt=1,
        state="SUCCESS",
        manifest=None,
        result={"base": base, "since": since, "watermark": f"mark-{n}"},
        node="node-1",
        time="",
    )


LINEAGE = [record(1), record(2, since="mark-1"), record(3, since="mark-2")]


def jobs(*task_ids: str) -> list[Job]:
    class Result:
        def __init__(self, task_id: str) -> None:
            self.id = task_id

    return [Job(1, TABLES[0], Result(task_id)) for task_id in task_ids]


def test_equal_rows_are_good() -> None:
    verdict = Verdict()
    verdict.compare("t", ROWS, Counter(ROWS))
    assert verdict.is_good
    assert verdict.compared == 2


@pytest.mark.parametrize(
    ("exported", "lost", "doubled"),
    [
        (Counter({(1, "a"): 1}), 1, 0),
        (Counter({(1, "a"): 2, (2, "b"): 1}), 0, 1),
        (Counter({(1, "a"): 1, (2, "c"): 1}), 1, 1),
        (Counter(), 2, 0),
    ],
    ids=["lost", "doubled", "changed", "nothing"],
)
def test_each_difference_is_counted(exported: Any, lost: int, doubled: int) -> None:
    verdict = Verdict()
    verdict.compare("t", ROWS, exported)
    assert (verdict.lost, verdict.doubled) == (lost, doubled)
    assert not verdict.is_good
    assert verdict.problems


def test_a_whole_lineage_is_good() -> None:
    verdict = Verdict()
    verdict.check_lineage("t", LINEAGE)
    assert verdict.is_good


@pytest.mark.parametrize(
    "stale",
    [
        [LINEAGE[0], record(2, base=0, since="mark-1"), LINEAGE[2]],
        [LINEAGE[0], record(2), LINEAGE[2]],
        [LINEAGE[0], LINEAGE[1], record(3, since="mark-1")],
    ],
    ids=["older version", "no watermark", "older watermark"],
)
def test_each_stale_read_is_counted(stale: list[Record]) -> None:
    verdict = Verdict()
    verdict.check_lineage("t", stale)
    assert verdict.stale == 1
    assert not verdict.is_good


def test_a_missing_or_foreign_manifest_is_a_problem() -> None:
    wrong: list[dict[int, Any]] = [{1: LINEAGE[0].result}, {n: {} for n in (1, 2, 3)}]
    for published in wrong:
        verdict = Verdict()
        verdict.check_manifests("t", LINEAGE, published)
        assert not verdict.is_good
    verdict = Verdict()
    verdict.check_manifests("t", LINEAGE, {one.n: one.result for one in LINEAGE})
    assert verdict.is_good


def test_a_second_outcome_is_a_problem() -> None:
    for ids in (["task-1", "task-2"], ["task-1", "task-2", "task-3", "task-4"]):
        verdict = Verdict()
        verdict.check_outcomes("t", LINEAGE, jobs(*ids))
        assert not verdict.is_good
    verdict = Verdict()
    verdict.check_outcomes("t", [*LINEAGE, record(4, task="task-3")], jobs("task-1", "task-2"))
    assert not verdict.is_good
    verdict = Verdict()
    verdict.check_outcomes("t", LINEAGE, jobs("task-1", "task-2", "task-3"))
    assert verdict.is_good


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    yield Database(tmp_path_factory.mktemp("demo") / "flights.db")


def test_the_days_hold_what_an_incremental_export_gets_wrong(database: Database) -> None:
    weather = TABLES[1]
    place = sorted(database.columns(weather)).index(WATERMARK)
    tops: list[str] = []
    versions: Counter[Any] = Counter()
    for day in (1, 2, 3, 4):
        database.begin_day(day)
        new = database.all_versions(weather) - versions
        versions += new
        marks = sorted(row[place] for row in new.elements())
        if tops:
            assert marks[0] == tops[-1], "rows arrive with the value at the edge"
            assert marks.count(marks[-1]) > 40, "old rows were updated"
        tops.append(marks[-1])
    assert database.rows(weather).total() == 26_115
    assert versions == database.all_versions(weather)
    assert versions.total() == 26_115 + 3 * 40
    assert set(versions.values()) == {1}, "no two versions of rows are alike"


def test_exported_rows_compare_with_the_databases() -> None:
    table = pa.table(
        {
            "name": pa.array(["Endeavor Air Inc.", None]),
            "at": pa.array([0, None], pa.timestamp("us")),
            "carrier": ["9E", "XX"],
        }
    )
    assert list(comparable(table)) == [
        ("1970-01-01 00:00:00", "9E", "Endeavor Air Inc."),
        (None, "XX", None),
    ]
