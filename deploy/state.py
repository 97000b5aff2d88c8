"""Which fleet runs on this machine: `up` writes it down, `nodes` and `submit` find it.

A fleet is known by the file fleet.json in the state folder, and runs as long as somebody holds
the lock beside it: a crash drops the lock, so a file left behind misleads nobody.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from errors import Refused


@dataclass(frozen=True)
class RunningFleet:
    """What a producer needs to know of a fleet."""

    pid: int
    redis: str
    root: str


@contextmanager
def only_fleet(state: Path) -> Iterator[None]:
    """Be the one fleet of this state folder; another one that runs is an error."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = os.open(state / "fleet.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused(f"the state folder {state}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _read(state)
            who = f" as process {other.pid}" if other else ""
            raise Refused(
                f"a fleet is running already{who}: end it, or set COHORT_STATE to another folder "
                "for a second one"
            ) from None
        try:
            yield
        finally:
            (state / "fleet.json").unlink(missing_ok=True)
    finally:
        os.close(lock)


def announce(state: Path, fleet: RunningFleet) -> None:
    """Write down where the running fleet is. Call it as `only_fleet`."""
    new = state / "fleet.json.new"
    # The Redis URL may hold a password: for the owner only.
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(fleet), file)
    new.replace(state / "fleet.json")


def find(state: Path) -> RunningFleet | None:
    """The fleet that runs on this machine, if one does."""
    try:
        with (state / "fleet.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(state)
    except OSError:
        return None
    return None


def _read(state: Path) -> RunningFleet | None:
    try:
        return RunningFleet(**json.loads((state / "fleet.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
