"""Control groups on a kernel that has version 2: the limit is held, and who broke it known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vm.lab import Guest

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

GROUPS = Path(__file__).resolve().parents[2] / "tasks" / "groups.py"

# As a service manager would: a group for the worker alone, with memory handed on to it.
DELEGATE = """
import json, signal, subprocess, sys, time
top = Path("/sys/fs/cgroup")
if not (top / "cgroup.procs").exists():
    subprocess.run(["mount", "-t", "cgroup2", "none", str(top)], check=True)
(top / "cgroup.subtree_control").write_text("+memory")
service = top / "worker"
service.mkdir(exist_ok=True)
(service / "cgroup.subtree_control").write_text("-memory")  # A group with members has none.
(service / "cgroup.procs").write_text(str(os.getpid()))
own = delegated()
said = {"own": str(own)}
EAT = "eaten = [bytearray(10 << 20) for _ in range({})]; import time; time.sleep({})"

def run(claim, tens, seconds):
    pid = os.fork()
    if pid == 0:
        nothing = os.open(os.devnull, os.O_RDWR)  # The guest's agent waits for the end of output.
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        with limited(own, claim, 100 << 20):
            subprocess.run([sys.executable, "-c", EAT.format(tens, seconds)])
        os._exit(7)
    return pid
"""

LIMITS = """
pid = run("greedy", 40, 60)
said["greedy"] = os.waitpid(pid, 0)[1]
said["used"] = exceeded(own, "greedy")
remove(own, "greedy")
pid = run("modest", 2, 0)
said["modest"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
said["no"] = exceeded(own, "modest")
said["groups"] = sorted(path.name for path in own.glob("run-*"))
print(json.dumps(said))
"""

KILLED = """
pid = run("orphan", 2, 600)
members = own / "run-orphan" / "cgroup.procs"
while not members.exists() or len(members.read_text().split()) < 2:
    time.sleep(0.05)
print(json.dumps(members.read_text().split()), flush=True)
os._exit(0)
"""

NEXT = """
end = time.monotonic() + 30
while time.monotonic() < end and any(Path("/proc", pid, "exe").exists() for pid in orphans):
    time.sleep(0.05)
said["left"] = [pid for pid in orphans if Path("/proc", pid, "exe").exists()]
print(json.dumps(said))
"""


def in_guest(guest: Guest, *parts: str) -> Any:
    source = "\n".join([GROUPS.read_text(), DELEGATE, *parts])
    status, output = guest.python("-c", source)
    assert status == 0, output
    return json.loads(output.splitlines()[-1])


def test_the_kernel_holds_a_run_to_its_memory(guests: list[Guest]) -> None:
    said = in_guest(guests[0], LIMITS)
    assert said["own"] == "/sys/fs/cgroup/worker"
    assert said["greedy"] == 9  # All of it: also the process that only waited.
    assert 90 << 20 < said["used"] <= 101 << 20
    assert (said["modest"], said["no"], said["groups"]) == (7, None, [])


def test_the_next_worker_in_a_group_ends_what_a_killed_one_left(guests: list[Guest]) -> None:
    orphans = in_guest(guests[1], KILLED)
    assert len(orphans) == 2
    said = in_guest(guests[1], f"orphans = {orphans!r}", NEXT)
    assert said["own"] == "/sys/fs/cgroup/worker"
    assert said["left"] == []
