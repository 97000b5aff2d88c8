"""Jobs for tests: each leaves traces that tell how often and on what it ran."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from celery.exceptions import Ignore, Reject

from errors import Refused
from tasks import Run, app, job


def wait_for_file(path: str, timeout: float = 60.0) -> None:
    """A job that waits for the test to say 'go on' waits for a file."""
    ends = time.monotonic() + timeout
    while not Path(path).exists():
        if time.monotonic() > ends:
            raise TimeoutError(path)
        time.sleep(0.02)


@job
def add(run: Run, a: int, b: int) -> int:
    return a + b


@app.task(name="tests.sample_jobs.plain_add")  # type: ignore[untyped-decorator]
def plain_add(a: int, b: int) -> int:
    """A plain Celery task: no job at all."""
    return a + b


@app.task(name="tests.sample_jobs.total")  # type: ignore[untyped-decorator]
def total(numbers: list[int]) -> int:
    return sum(numbers)


@job(key="count-{name}", retries=2)
def count(run: Run, name: str, started: str = "", go: str = "", crash: bool = False) -> Any:
    """Counts its runs in a file, and appends to a history."""
    file = run.directory / "count.json"
    n = json.loads(file.read_text())["n"] if file.exists() else 0
    if started:
        Path(started).touch()
    if go:
        wait_for_file(go)
    if crash:
        os.kill(os.getpid(), signal.SIGKILL)
    file.write_text(json.dumps({"n": n + 1, "task": run.task_id}))
    with (run.directory / "history").open("a") as history:
        history.write(f"{run.task_id} {run.version} {run.node} {run.attempt}\n")
    return {"n": n + 1, "version": run.version, "attempt": run.attempt, "node": run.node}


@job(key="turn-{name}", directory=False)
def take_turns(run: Run, name: str, at_work: str, seconds: float = 0.05) -> dict[str, Any]:
    """Its key is a lock: nobody else may be at work, and nothing of an earlier run is left."""
    Path(at_work).mkdir()
    time.sleep(seconds)
    found = sorted(entry.name for entry in run.directory.iterdir())
    (run.directory / "left").touch()
    Path(at_work).rmdir()
    return {"found": found, "version": run.version}


@job(key="fail-{name}", retries=1)
def fail(run: Run, name: str, times: int) -> int:
    """Fails for so many attempts, having soiled its directory."""
    (run.directory / f"soiled-{run.attempt}").touch()
    if run.attempt <= times:
        raise ValueError(f"attempt {run.attempt} fails")
    return run.attempt


@job(retries=1)
def fail_keyless(run: Run, times: int) -> int:
    if run.attempt <= times:
        raise ValueError(f"attempt {run.attempt} fails")
    return run.attempt


@job(key="refuse-{name}", retries=5)
def refuse(run: Run, name: str) -> None:
    raise Refused("no such thing")


@job(key="slow-{name}", timeout="1s")
def slow(run: Run, name: str, stubborn: bool = False) -> str:
    """Outlives its timeout; a stubborn one ignores being told."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            time.sleep(0.05)
        except Exception:
            if not stubborn:
                raise
    return "never"


@job(key="wait-{name}")
def wait_until_cancelled(run: Run, name: str, started: str) -> str:
    Path(started).touch()
    while not run.cancelled:
        time.sleep(0.02)
    return "discarded"


@job(key="deaf-{name}")
def deaf_to_termination(run: Run, name: str, started: str, heard: str, go: str) -> str:
    """Isn't stopped by SIGTERM, and comes to a good end: as one that is committing just then."""
    before = signal.signal(signal.SIGTERM, lambda *_: Path(heard).touch())
    Path(started).touch()
    wait_for_file(go)
    signal.signal(signal.SIGTERM, before)
    return "heard nothing"


@job(key="steps-{name}")
def report_steps(run: Run, name: str, steps: int, go: str = "") -> int:
    for step in range(steps):
        run.progress(step, steps, "steps")
    if go:
        wait_for_file(go)
    run.progress(steps, steps, "steps")
    return steps


@job
def ignored(run: Run) -> None:
    raise Ignore


@job(retries=3)
def keyless_crash(run: Run, traces: str) -> None:
    """Dies with its process each time; leaves a trace of each delivery."""
    (Path(traces) / run.claim_id).touch()
    os.kill(os.getpid(), signal.SIGKILL)


@job
def keyless_once(run: Run, traces: str, started: str = "", go: str = "") -> str:
    (Path(traces) / run.claim_id).touch()
    if started:
        Path(started).touch()
    if go:
        wait_for_file(go)
    return run.node


@job
def short(run: Run, folder: str, name: str, what: str = "") -> Any:
    """Leaves a line in its file at each run, and is over at once, unless it is to be otherwise."""
    runs = Path(folder) / name
    again = runs.exists()
    with runs.open("a") as file:
        file.write(f"{run.node} {os.getpid()} {run.attempt}\n")
    if what == "wait":
        wait_for_file(f"{folder}/go")
    if what == "die" and not again:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail":
        raise ValueError(name)
    if what == "memory":
        raise MemoryError(name)
    if what == "reject":
        raise Reject(TwoWords(name, "no"), requeue=False)
    return "x" * (2 << 20) if what == "large" else name


@job(ignore_result=True)
def short_without_outcome(run: Run, folder: str, name: str) -> None:
    with (Path(folder) / name).open("a") as file:
        file.write(f"{os.getpid()}\n")


@app.task(name="tests.sample_jobs.short_plain")  # type: ignore[untyped-decorator]
def short_plain(folder: str, name: str, what: str = "") -> str:
    """A plain task, acknowledged when it begins."""
    with (Path(folder) / name).open("a") as file:
        file.write(f"{os.getpid()}\n")
    if what == "wait":
        wait_for_file(f"{folder}/go")
    return name


class TwoWords(Exception):
    """As many are that were never meant to be pickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


@job
def talk(run: Run, words: list[str]) -> None:
    for word in words:
        run.log.info("%s", word)


@job(key="talk-{name}", retries=2)
def talk_and_fail(run: Run, name: str, times: int) -> None:
    run.log.info("attempt %d", run.attempt)
    if run.attempt <= times:
        raise ValueError(f"attempt {run.attempt} fails")


@job(key="steps-kept-{name}", retries=2)
def keep_steps(run: Run, name: str, started: str = "", go: str = "") -> list[str]:
    """Does step after step, keeping each; the first attempt that isn't let go on ends after one."""
    done = run.directory / "done"
    before = done.read_text().split() if done.exists() else []
    for step in ("one", "two", "three"):
        if step in before:
            continue
        with done.open("a") as file:
            file.write(f"{step} {run.attempt}\n")
        run.checkpoint()
        if started:
            Path(started).touch()
            wait_for_file(go)
        elif run.attempt == 1:
            raise ValueError("after one step")
    return done.read_text().splitlines()


@job(key="polite-{name}")
def leave_politely(run: Run, name: str, started: str) -> list[str]:
    """Works until its node is asked to end; keeps what it has, and lets another go on."""
    done = run.directory / "done"
    if not done.exists():
        done.write_text(run.node)
        Path(started).touch()
        while not run.leaving:
            time.sleep(0.02)
        run.checkpoint()
        run.hand_over()
    return [*done.read_text().split(), run.node, str(run.attempt)]


@job(key="cancelled-{name}")
def talk_when_cancelled(run: Run, name: str, started: str) -> None:
    Path(started).touch()
    while not run.cancelled:
        time.sleep(0.02)
    for number in range(100):
        run.log.info("%d", number)


@job(key="grow-{name}")
def grow(run: Run, name: str, size: int) -> int:
    """Leaves a file of that size."""
    (run.directory / "data").write_bytes(os.urandom(size))
    return run.version
