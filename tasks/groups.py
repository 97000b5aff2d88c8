"""Control groups, version 2: the kernel holds a run's memory to its limit.

    <this worker's own group>/node/           the worker: main process and pool
                             /run-<claim id>/ a run with a limit, and all that it starts

Used where the worker has a group of its own that it may write in; with systemd that is
`Delegate=memory` for its service. A run's pool process goes into the run's group before the job's
function is called, and back when that has ended. If the limit is exceeded, the kernel ends all of
the group. Standard library only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def delegated(proc: Path = Path("/proc/self")) -> Path | None:
    """This worker's own group, made ready for runs; None where it has none or may not."""
    try:
        own = _own(proc)
        if own is None or "memory" not in (own / "cgroup.controllers").read_text().split():
            return None
        if (own / "cgroup.procs").read_text().split() != [str(os.getpid())]:
            return None  # Somebody else lives in it: a shell, a terminal's other programs.
        node = own / "node"
        node.mkdir(exist_ok=True)
        if not (node / "cgroup.procs").read_text():
            _end_what_is_left(own)
        # A group that hands a controller on has no members: they move into one below it.
        (node / "cgroup.procs").write_text(str(os.getpid()))
        try:
            (own / "cgroup.subtree_control").write_text("+memory")
        except OSError:
            (own / "cgroup.procs").write_text(str(os.getpid()))
            return None
    except OSError:
        return None
    return own


def _own(proc: Path) -> Path | None:
    """Where the version 2 group of this process lies."""
    lines = (proc / "cgroup").read_text().splitlines()
    name = next((line[3:] for line in lines if line.startswith("0::")), None)
    for line in (proc / "mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if name is not None and after.split()[0] == "cgroup2":
            root, mount = before.split()[3:5]
            inside = os.path.relpath(name, root)
            return None if inside.startswith("..") else Path(mount, inside)
    return None


def _end_what_is_left(own: Path) -> None:
    """The runs of a worker that was killed: nobody else is in its group."""
    for group in own.glob("run-*"):
        with suppress(OSError):
            (group / "cgroup.kill").write_text("1")
        with suppress(OSError):
            group.rmdir()


def _of(own: Path, claim_id: str) -> Path:
    return own / f"run-{claim_id}"


@contextmanager
def limited(own: Path, claim_id: str, memory: int) -> Iterator[None]:
    """This process, and what it starts inside, may take so many bytes."""
    group = _of(own, claim_id)
    group.mkdir()
    (group / "memory.max").write_text(str(memory))
    # The whole run goes, not the one process that happened to ask for the last page.
    (group / "memory.oom.group").write_text("1")
    with suppress(OSError):  # A kernel without swap.
        (group / "memory.swap.max").write_text("0")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (own / "node" / "cgroup.procs").write_text(str(os.getpid()))
        remove(own, claim_id)


def remove(own: Path, claim_id: str) -> None:
    """A run's processes have ended, or have left its group."""
    for _ in range(50):
        try:
            _of(own, claim_id).rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)  # What was killed takes a moment to die.


def exceeded(own: Path, claim_id: str) -> int | None:
    """How many bytes a run had when the kernel ended it for its limit; None if it didn't."""
    group = _of(own, claim_id)
    try:
        events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
        if int(events.get("oom_kill", 0)) == 0:
            return None
        peak = group / "memory.peak"  # Since Linux 5.19.
        return int((peak if peak.exists() else group / "memory.max").read_text())
    except (OSError, ValueError):
        return None
