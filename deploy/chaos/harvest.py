"""When all is over: what the shared folder, the index and Redis say, as facts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from broker import keys
from deploy.chaos.history import (
    Answered,
    Committed,
    Fact,
    Files,
    Left,
    Ran,
    Recorded,
)
from deploy.chaos.load import NAMES, key_of
from errors import CohortError
from storage import segments
from storage.directory import Directory

QUEUE = "celery"


def what_is_left(client: Any) -> list[str]:
    """Keys in Redis that are there only while a job waits or runs."""
    left = []
    # All names at one moment: a job moves from key to key, and a scan may miss it on its way.
    for raw in client.keys("*"):
        name = raw.decode("utf-8", "backslashreplace")
        kind = keys.kind_of(name)
        if kind.of_jobs if kind is not None else name.partition("\x06")[0] == QUEUE:
            left.append(f"{name!r}: {_glance(client, raw, kind.type if kind else 'list')}")
    return sorted(left)


def _glance(client: Any, name: bytes, type_: str) -> str:
    try:
        if type_ == "list":
            held = client.lrange(name, 0, 2)
        elif type_ == "zset":
            held = client.zrange(name, 0, 2)
        elif type_ == "hash":
            held = [b"=".join(pair) for pair in list(client.hgetall(name).items())[:3]]
        else:
            held = [client.get(name)]
    except redis.ResponseError as error:
        return str(error)
    return " ".join(repr(one)[2:200] for one in held if one is not None)


def drain(client: Any, tend: Callable[[], object], patience: float) -> list[Left]:
    """Wait until Redis holds no job any more; what is still there after so many seconds."""
    ends = time.monotonic() + patience
    while left := what_is_left(client):
        tend()
        if time.monotonic() > ends:
            return [Left(what) for what in left]
        time.sleep(0.1)
    return []


def facts_of_keys(root: Path) -> Iterator[Fact]:
    """The log of each key, and the files that its newest version has."""
    from deploy.chaos.jobs import COUNTER, LOG

    for name in NAMES:
        key = key_of(name)
        directory = Directory(root, key)
        if not directory.path.is_dir():
            continue
        try:
            for record in directory.versions():
                count = record.result if record.state == "SUCCESS" else None
                yield Committed(key, record.n, record.task_id, record.state, count)
            head = directory.head()
            if COUNTER in head.entries:
                log = head.read(LOG).decode().splitlines()
                yield Files(key, int(head.read(COUNTER)), tuple(log))
            else:
                yield Files(key, 0, ())
        except CohortError as error:
            yield Left(f"{key} can't be read: {error}")


def facts_of_outcomes(root: Path) -> Iterator[Fact]:
    """Every outcome in every segment, those that were written twice included."""
    from tasks.outcomes import LETTERS, meta_of

    states = {letter[0]: state for state, letter in LETTERS.items()}
    for path in segments.list_segments(root):
        try:
            for entry in segments.read(path):
                if entry.kind not in ("outcome", "pointer", "large"):
                    continue
                meta = meta_of(
                    root, entry.kind, entry.payload, json.loads, lambda it: json.dumps(it).encode()
                )
                result = json.loads(meta)["result"] if meta is not None else None
                error = result.get("exc_type", "") if isinstance(result, dict) else ""
                detail = hashlib.sha256(json.dumps(result).encode()).hexdigest()[:12]
                yield Recorded(entry.id, states[entry.payload[0]], detail, error)
        except CohortError as error:
            yield Left(f"a segment can't be read: {error}")


def facts_of_traces(traces: Path) -> Iterator[Fact]:
    """The keyless runs that came to their end."""
    for path in sorted(traces.iterdir()):
        task_id, _, claim_id = path.name.partition(".")
        yield Ran(task_id, claim_id)


def answers(task_ids: list[str]) -> Iterator[Fact]:
    """What whoever asks is told."""
    from tasks import app

    for task_id in task_ids:
        yield Answered(task_id, app.backend.get_task_meta(task_id)["status"])
