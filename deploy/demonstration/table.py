"""The table at the end: a line a run, also of those that were killed or fenced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table as RichTable

from deploy.demonstration.runs import Job, Runs
from deploy.demonstration.story import Told
from storage.log import Record


@dataclass(frozen=True)
class Line:
    """One run: what it read and what became of it."""

    job: str
    day: int
    node: str
    attempt: int
    read: int
    written: str
    rows: str
    watermark: str


def lines(runs: Runs, told: Told) -> list[Line]:
    """Every run that began, by what the shared folder tells of it."""
    found = []
    for job in told.jobs:
        record = runs.outcome(job)
        folders = sorted(
            runs.directory(job.table).runs_of(job.task_id).iterdir(),
            key=lambda folder: folder.stat().st_mtime_ns,
        )
        for folder in folders:
            if folder.name == record.claim_id:
                continue
            found.append(_without_outcome(runs, told, job, folder, record))
        found.append(
            Line(
                job=job.key,
                day=job.day,
                node=record.node,
                attempt=record.attempt,
                read=record.base,
                written=str(record.n),
                rows=f"{record.result['rows']:,}",
                watermark=str(record.result["watermark"] or ""),
            )
        )
    return found


def _without_outcome(runs: Runs, told: Told, job: Job, folder: Path, ended: Record) -> Line:
    incarnation = _incarnation(folder.name)
    base, attempt, fate = ended.base, max(1, ended.attempt - 1), "lost"
    for path in folder.glob("record-*"):
        # It came as far as its record, which then found another's in its place.
        written = Record.decode(path.read_bytes(), path)
        base, attempt, fate = written.base, written.attempt, "fenced"
    if told.killed is not None and incarnation == _incarnation(told.killed.id):
        fate = "killed"
    return Line(
        job=job.key,
        day=job.day,
        node=runs.nodes.get(incarnation, "?"),
        attempt=attempt,
        read=base,
        written=fate,
        rows="",
        watermark="",
    )


def _incarnation(claim_id: str) -> str:
    """`claim-<incarnation>-<number>`."""
    return claim_id.split("-")[1]


def draw(lines: list[Line]) -> RichTable:
    """The lines for people."""
    table = RichTable(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("job", "day", "node", "attempt"):
        table.add_column(heading, no_wrap=True)
    for heading in ("version\nread", "version\nwritten", "rows"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("watermark", overflow="fold")
    for line in lines:
        table.add_row(
            line.job,
            str(line.day),
            line.node,
            str(line.attempt),
            str(line.read),
            line.written,
            line.rows,
            line.watermark,
        )
    return table
