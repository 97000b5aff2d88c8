"""The same no-op as a job of Cohort and as a stock Celery task, for `benchmarks/results.py`."""

from __future__ import annotations

import os

from celery import Celery

stock = Celery("stock", broker=os.environ["COHORT_REDIS"], backend=os.environ["COHORT_REDIS"])
stock.conf.update(task_acks_late=True, task_track_started=True, task_default_queue="stock")


@stock.task(name="noop")  # type: ignore[untyped-decorator]
def stock_noop(number: int) -> int:
    return number


if os.environ.get("BENCH") != "stock":
    from tasks import Run, job

    @job
    def noop(run: Run, number: int) -> int:
        return number

    @job(key="bench-{lane}")
    def keyed(run: Run, lane: int, number: int) -> int:
        (run.directory / "number").write_text(str(number))
        return number
