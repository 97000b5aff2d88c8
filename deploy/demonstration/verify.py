"""The verdict: everything that is on S3, read back through the manifests, against the database.

`lost`     rows of the database that no committed manifest holds.
`doubled`  rows that the manifests hold once too often, or that the database never had.
`stale`    runs that didn't begin with exactly what the run before them had committed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.demonstration.database import TABLES, Database, Rows, Table, comparable
from deploy.demonstration.runs import Job, Runs
from deploy.demonstration.story import Told
from deploy.demonstration.world import TO
from storage.log import Record


@dataclass
class Verdict:
    """What was found; `problems` says it in words."""

    lost: int = 0
    doubled: int = 0
    stale: int = 0
    compared: int = 0
    objects: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether all is as promised."""
        return not (self.lost or self.doubled or self.stale or self.problems)

    def compare(self, what: str, expected: Rows, exported: Rows) -> None:
        """Count what is on one side only: rows as often as they are there."""
        self.compared += expected.total()
        if dict.__eq__(expected, exported):  # much faster than the two differences
            return
        lost, doubled = expected - exported, exported - expected
        self.lost += lost.total()
        self.doubled += doubled.total()
        for rows, fault in ((lost, "not on S3"), (doubled, "too often on S3")):
            if rows:
                example = next(iter(rows))
                self.problems.append(f"{what}: {rows.total():,} rows are {fault}: {example}")

    def check_lineage(self, what: str, records: Sequence[Record]) -> None:
        """Each record's run began with the version before it, and with its watermark."""
        before: Record | None = None
        for n, record in enumerate(records, start=1):
            read = (record.result["base"], record.result["since"])
            wanted = (n - 1, before.result["watermark"] if before else None)
            if (record.n, record.base) != (n, n - 1) or read != wanted:
                self.stale += 1
                self.problems.append(
                    f"{what}, version {record.n}: it began with version and watermark {read}, "
                    f"not with {wanted}"
                )
            before = record

    def check_manifests(
        self, what: str, records: Sequence[Record], published: Mapping[int, Any]
    ) -> None:
        """What readers see is what was committed, no more and no less."""
        if published != {record.n: record.result for record in records}:
            self.problems.append(
                f"{what}: the manifests {sorted(published)} on S3 aren't those of the commit "
                f"records {[record.n for record in records]}"
            )

    def check_outcomes(self, what: str, records: Sequence[Record], jobs: Sequence[Job]) -> None:
        """Every job has one success, and nothing else has any."""
        ended = Counter(record.task_id for record in records if record.state == "SUCCESS")
        if ended != Counter(job.task_id for job in jobs):
            self.problems.append(f"{what}: {len(jobs)} jobs, but {ended.total()} outcomes")


def verify(database: Database, runs: Runs, told: Told) -> Verdict:
    """Read all Parquet back and compare it with the database, row for row."""
    verdict = Verdict()
    for table in TABLES:
        records = list(runs.directory(table).versions())
        jobs = [job for job in told.jobs if job.table == table]
        published = _published(table)
        verdict.check_outcomes(table.name, records, jobs)
        verdict.check_lineage(table.name, records)
        verdict.check_manifests(table.name, records, published)
        if table.is_incremental:
            exported = _exported(table, list(published.values()), verdict)
            verdict.compare(table.name, database.all_versions(table), exported)
            continue
        days = {job.task_id: job.day for job in jobs}
        for record in records:
            exported = _exported(table, [published.get(record.n)], verdict)
            held = told.full_tables[table.name, days[record.task_id]]
            verdict.compare(f"{table.name}, version {record.n}", held, exported)
    return verdict


def _published(table: Table) -> dict[int, Any]:
    from tasks.exporting.bucket import Bucket
    from tasks.exporting.manifests import published_versions, read_manifest
    from tasks.exporting.request import table_folder

    name, prefix = table_folder(TO, table.name)
    bucket = Bucket(name)
    return {
        version: read_manifest(bucket, prefix, version)
        for version in published_versions(bucket, prefix)
    }


def _exported(table: Table, manifests: Sequence[Any], verdict: Verdict) -> Rows:
    """All rows of these manifests. A checksum that differs raises `Damaged`."""
    from tasks.exporting.reader import read_objects

    rows: Rows = Counter()
    for part in read_objects(TO, [manifest for manifest in manifests if manifest]):
        verdict.objects += 1
        rows.update(comparable(part))
    return rows
