"""Outcomes, beside Celery's own result backends in the same run, in alternating rounds.

    .venv/bin/python -m benchmarks.results [store] [get] [wait] [hold]

`store`  256 jobs in flight end on one node; the folder is a FUSE mount (tests/nfs) that adds 2 ms
         to every write and fsync. Beside it Celery's `file://` backend on the same mount. Encoding
         is left out on both sides: the children do it.
`get`    `.get()` of a job that has ended: pushed lately (in Redis), and long ago (on the folder, a
         plain directory). Beside it Celery's Redis backend on the same Redis.
`wait`   from `.delay()` to the end of `.get()` of an idle fleet of one node, beside stock Celery.
`hold`   a million outcomes (--outcomes): bytes of Redis each, and how fast they are known again.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from celery import Celery
from celery.app.task import Context

from broker.index import Index
from deploy.fleet import Fleet
from storage.segments import SegmentWriter
from tasks.application import configuration
from tasks.outcomes import Outcome
from tasks.recovery import reindex
from tasks.results import SharedResults, collected_outcomes
from tasks.settings import Settings
from tests.nfs.node import CantMount, Node
from tests.nfs.script import Rule
from tests.nfs.script import Settings as Nfs
from tests.redis_server import RedisServer, running_redis
from workers.writer import Writer

IN_FLIGHT = 256


def main() -> None:
    """Run what was asked for; everything by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", help="store, get, wait, hold (all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--outcomes", type=int, default=1_000_000)
    options = parser.parse_args()
    what = options.what or ["store", "get", "wait", "hold"]
    with tempfile.TemporaryDirectory() as home, running_redis(Path(home, "redis")) as redis:
        if "store" in what:
            bench_store(Path(home), redis, options.rounds)
        if "get" in what:
            bench_get(Path(home), redis, options.rounds)
        if "hold" in what:
            bench_hold(Path(home), redis, options.outcomes)
    if "wait" in what:
        bench_wait(options.rounds)


def backend_of(redis: RedisServer, root: Path, url: str | None = None) -> Any:
    """Ours, or the one that Celery finds under an address."""
    app = Celery("bench", set_as_current=False)
    environ = {"COHORT_REDIS": redis.url, "COHORT_ROOT": str(root)}
    app.conf.update(configuration(Settings.read(environ)))
    if url is not None:
        app.conf.result_backend = url
    return app.backend


def request(task_id: str) -> Context:
    """What Celery keeps of a task beside its result."""
    return Context(
        {"id": task_id, "task": "tests.add", "args": [1, 2], "kwargs": {}, "retries": 0}
        | {"hostname": "node-1", "delivery_info": {"routing_key": "celery"}}
    )


def shown(name: str, figures: list[float], unit: str) -> str:
    """Median and range."""
    middle = statistics.median(figures)
    return f"{name:34} {middle:>10,.2f} {unit}  ({min(figures):,.2f} to {max(figures):,.2f})"


# --- 256 jobs end ---


class Claims:
    """What the writer acknowledges; here the next job ends then."""

    def __init__(self, next_one: Callable[[], object]) -> None:
        self._next_one = next_one

    def finish_now(self, claim_ids: Sequence[str], end: object = None) -> list[str]:
        for _ in claim_ids:
            self._next_one()
        return ["finished" for _ in claim_ids]


def store_ours(redis: RedisServer, root: Path, count: int) -> float:
    """Outcomes a second that are on disk, in the index, announced and acknowledged."""
    backend: SharedResults = backend_of(redis, root)
    with collected_outcomes() as outcomes:
        for _ in range(count):
            task_id = str(uuid.uuid4())
            backend.mark_as_done(task_id, 3, request=request(task_id))
    waiting = iter(outcomes)
    all_done, left = threading.Event(), count

    def end_one() -> None:
        outcome = next(waiting, None)
        if outcome is not None:
            writer.record(outcome)
            writer.finish(outcome.task_id)

    def acknowledged() -> None:
        nonlocal left
        left -= 1
        end_one()
        if left == 0:
            all_done.set()

    claims: Any = Claims(acknowledged)
    writer = Writer(SegmentWriter(root, "node", uuid.uuid4().hex[:8]), claims, backend)
    begun = time.perf_counter()
    writer.start()
    for _ in range(IN_FLIGHT):
        end_one()
    all_done.wait()
    taken = time.perf_counter() - begun
    writer.stop(10)
    return count / taken


def store_files(redis: RedisServer, root: Path, count: int) -> float:
    """Outcomes a second of Celery's `file://` backend, 256 at a time."""
    folder = root / "files"
    folder.mkdir(exist_ok=True)
    backend = backend_of(redis, root, f"file://{folder}")
    ids = [str(uuid.uuid4()) for _ in range(count)]
    metas = [
        backend.encode(backend._get_result_meta(3, "SUCCESS", None, request(task_id)))
        for task_id in ids
    ]

    def end_one(task_id: str, meta: str) -> None:
        # What its `_store_result` does once the meta is encoded.
        if backend._get_task_meta_for(task_id)["status"] != "SUCCESS":
            backend._set_with_state(backend.get_key_for_task(task_id), meta, "SUCCESS")

    begun = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        for _ in pool.map(end_one, ids, metas):
            pass
    return count / (time.perf_counter() - begun)


def bench_store(home: Path, redis: RedisServer, rounds: int) -> None:
    """Row 4."""
    backing, work = home / "backing", home / "mounts"
    backing.mkdir()
    work.mkdir()
    try:
        node = Node(backing, work, "node", Nfs())
    except (CantMount, OSError) as error:
        print(f"store: no FUSE here: {error}", file=sys.stderr)
        return
    ours, files, writes = [], [], []
    try:
        for _ in range(rounds):
            node.script(
                Rule("delay", "write", times=None, seconds=0.002),
                Rule("delay", "fsync", times=None, seconds=0.002),
            )
            files.append(store_files(redis, node.root, 512))
            before = sum(rule.fired for rule in node.rules())
            ours.append(store_ours(redis, node.root, 8192))
            writes.append((sum(rule.fired for rule in node.rules()) - before) / 8192)
    finally:
        node.close()
    print(shown("store: Celery's file://", files, "outcomes/s"))
    print(shown("store: ours", ours, "outcomes/s"))
    print(shown("store: ours", writes, "writes and fsyncs an outcome"))
    print(f"store: {statistics.median(ours) / statistics.median(files):.1f} times\n")


# --- .get() of what has ended ---


def bench_get(home: Path, redis: RedisServer, rounds: int) -> None:
    """Row 5."""
    root = home / "plain"
    root.mkdir()
    ours, stock = backend_of(redis, root), backend_of(redis, root, redis.url)
    ids = [str(uuid.uuid4()) for _ in range(300)]
    with collected_outcomes() as outcomes:
        for task_id in ids:
            ours.mark_as_done(task_id, 3, request=request(task_id))
    claims: Any = Claims(lambda: None)
    writer = Writer(SegmentWriter(root, "node", "life"), claims, ours)
    writer.start()
    for outcome in outcomes:
        writer.record(outcome)
    writer.stop(10)
    theirs = [str(uuid.uuid4()) for _ in ids]
    for task_id in theirs:
        stock.mark_as_done(task_id, 3, request=request(task_id))

    def p50(backend: Any, some: list[str]) -> float:
        taken = []
        backend._cache.clear()
        for task_id in some:
            result = backend.app.AsyncResult(task_id)
            begun = time.perf_counter()
            assert result.get(timeout=10) == 3
            taken.append(time.perf_counter() - begun)
        return statistics.median(taken) * 1e6

    figures: dict[str, list[float]] = {"stock": [], "lately": [], "long ago": []}
    client: Any = redis.connect()
    with client:
        held = {name: client.get(name) for name in client.scan_iter("celery-task-meta-*")}
        mine = [f"celery-task-meta-{task_id}".encode() for task_id in ids]
        for _ in range(rounds):
            figures["stock"].append(p50(stock, theirs))
            figures["lately"].append(p50(ours, ids))
            for key in mine:
                client.delete(key)
            figures["long ago"].append(p50(ours, ids))
            for key in mine:
                client.set(key, held[key], ex=300)
    for name, taken in figures.items():
        print(shown(f"get: {name}", taken, "us p50"))
    middle = {name: statistics.median(taken) for name, taken in figures.items()}
    print(
        f"get: lately {middle['lately'] / middle['stock']:.2f}, long ago "
        f"{middle['long ago'] / middle['stock']:.2f} of Celery's Redis backend\n"
    )


# --- .delay().get() of an idle fleet ---


def bench_wait(rounds: int) -> None:
    """Each side in a process of its own: an app per process, as in life."""
    script = (
        "import statistics, sys, time\n"
        "from benchmarks import bench_jobs\n"
        "task = bench_jobs.stock_noop if sys.argv[1] == 'stock' else bench_jobs.noop\n"
        "taken = []\n"
        "for n in range(110):\n"
        "    begun = time.perf_counter()\n"
        "    task.delay(n).get(timeout=30)\n"
        "    taken.append(time.perf_counter() - begun)\n"
        "    time.sleep(0.005)\n"
        "print(statistics.median(taken[10:]) * 1e3)\n"
    )
    with tempfile.TemporaryDirectory() as home:
        settings = {"COHORT_JOBS": "benchmarks.bench_jobs"}
        with Fleet(Path(home), nodes=1, cpus=(2,), environ=settings) as fleet:
            from benchmarks.contenders import stock_worker

            environ = fleet.environ
            figures: dict[str, list[float]] = {"stock": [], "ours": []}
            with stock_worker(environ):
                for _ in range(rounds):
                    for side, taken in figures.items():
                        ran = subprocess.run(
                            [sys.executable, "-c", script, side],
                            env={**environ, "BENCH": side},
                            capture_output=True,
                            text=True,
                            check=True,
                        )
                        taken.append(float(ran.stdout))
    for name, taken in figures.items():
        print(shown(f"wait: {name}", taken, "ms p50"))
    ratio = statistics.median(figures["ours"]) / statistics.median(figures["stock"])
    print(f"wait: {ratio:.2f} of stock Celery\n")


# --- A million held ---


def bench_hold(home: Path, redis: RedisServer, count: int) -> None:
    """Row 6."""
    root = home / "million"
    root.mkdir()
    backend: SharedResults = backend_of(redis, root)
    meta = backend._encoded(
        backend._get_result_meta(3, "SUCCESS", None, request(str(uuid.uuid4())))
        | {"task_id": str(uuid.uuid4())}
    )
    writer = SegmentWriter(root, "node", "life")
    for _ in range(count // 1000):
        writer.append(
            [Outcome(str(uuid.uuid4()), "SUCCESS", "", meta, 86_400.0).entry() for _ in range(1000)]
        )
    redis.wipe()
    with redis.connect() as client:
        before = client.info("memory")["used_memory"]
        cpu = time.process_time() + server_cpu(client)
        report = reindex(root, Index(client))
        cpu = time.process_time() + server_cpu(client) - cpu
        used = client.info("memory")["used_memory"] - before
    assert report.outcomes == report.placed == count
    print(f"hold: {used / count:.1f} bytes of Redis each, {count:,} outcomes of {len(meta)} bytes")
    print(
        f"hold: {count / report.seconds:,.0f} outcomes/s known again: {report.seconds:.1f} s, in "
        f"which reader and Redis, side by side, had {cpu:.1f} s of processor together\n"
    )


def server_cpu(client: Any) -> float:
    """Seconds that the server has worked."""
    info = client.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"])


if __name__ == "__main__":
    main()
