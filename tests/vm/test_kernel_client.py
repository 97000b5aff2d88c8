"""Linux's own NFSv4.1 client, on two machines: what it does to us, and that we are right on it.

The figures that `docs/filesystems.md` gives for it come from here (`-s` shows them). Kept work
trees aren't looked at: they lie on a node's own disk.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage import examination
from storage.lateness import Late
from tests.vm.lab import Guest, Lab

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

# Left out: runs of thousands of files that count system calls. They are as many anywhere, and
# take minutes in an emulated machine.
PYTEST = (
    "-m",
    "pytest",
    "--noconftest",
    "-c",
    "vm.ini",
    "-q",
    "-p",
    "no:cacheprovider",
    "-k",
    "not costs",
)

# Both guests commit to one log until each has had its share; a fenced one tries the next number.
COMMIT = """
import sys, time
from pathlib import Path
from errors import Fenced
from storage import durable
from storage.log import Log, Record

folder, guest, share = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
log, fenced, tries = Log(folder / "log", "k"), 0, 0
(folder / "started" / guest).mkdir()
while len(durable.entries(folder / "started")) < 2:
    time.sleep(0.01)
while share:
    head = log.head()
    n = head.n + 1 if head else 1
    tries += 1
    record = Record(n, n - 1, "k", f"{guest}-{tries}", "c", 1, "SUCCESS", None, None, guest, "now")
    written = folder / "runs" / f"{guest}-{tries}"
    durable.create(written, record.encode())
    try:
        log.append(written, record)
        share -= 1
    except Fenced:
        fenced += 1
print(fenced)
"""

READ = """
import json, sys
from pathlib import Path
from storage.log import Log

log = Log(Path(sys.argv[1]) / "log", "k")
print(json.dumps([log.read(n).task_id for n in range(1, log.head().n + 1)]))
"""

EXAMINE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from storage.examination import examination_folder, examine
from storage.halves import Half

root = Path(sys.argv[1])
with examination_folder(root) as folder:
    found = [asdict(f) for f in examine(root, Half(root, folder, "this node"), tries=30)]
print(json.dumps(found))
"""


def python_in(guest: Guest, script: str, *words: str) -> str:
    status, output = guest.python("-c", script, *words)
    assert status == 0, output
    return output


@pytest.mark.parametrize(
    ("names", "least"),
    [
        (("mount", "mount"), 20),
        (("log", "log"), 40),
        (("segments", "segments"), 120),
        (("directory", "garbage"), 25),
        (("storage_kill", "storage_kill"), 10),
    ],
    ids=lambda names: "-".join(names) if isinstance(names, tuple) else "",
)
def test_the_contract_holds_on_both_guests_at_once(
    names: tuple[str, str], least: int, guests: list[Guest]
) -> None:
    def run(guest: Guest, name: str) -> tuple[int, str]:
        base = f"/mnt/{guest.name}-{name}"
        words = (*PYTEST, "--basetemp", base, f"tests/contract/test_{name}.py")
        return guest.python(*words, timeout=600)

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(run, guests, names))
    for guest, name, (status, output) in zip(guests, names, ended, strict=True):
        last = output.strip().splitlines()[-1]
        print(f"{guest.name}: {name}: {last}")
        assert status == 0, output
        assert int(last.split()[0]) >= least, last


@pytest.mark.parametrize("how", list(examination.RACED_FOR))
def test_a_name_goes_to_one_guest(how: str, guests: list[Guest]) -> None:
    finding = examination.exclusive(guests[0], guests[1], how, how)
    print(f"{how}: {finding.found}")
    assert finding.verdict == "fine", finding.found


def test_two_guests_commit_to_one_log(guests: list[Guest]) -> None:
    folder = f"/mnt/{guests[0].folder}"
    for name in ("log", "runs", "started"):
        guests[0].do("make_folder", name=name)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(python_in, g, COMMIT, folder, g.name, "25") for g in guests]
        fenced = [int(run.result()) for run in runs]
    print(f"fenced: {fenced} of 25 commits each")
    seen = [json.loads(python_in(guest, READ, folder)) for guest in guests]
    assert seen[0] == seen[1]
    assert len(seen[0]) == len(set(seen[0])) == 50
    assert sum(name.startswith("guest-1") for name in seen[0]) == 25
    assert sum(fenced) > 0, "they never met, so nothing was shown"


def test_close_to_open(guests: list[Guest]) -> None:
    finding = examination.close_to_open(*guests)
    assert finding.verdict == "fine", finding.found


def test_what_is_seen_late_and_that_opening_the_folder_helps(guests: list[Guest]) -> None:
    found = {f.what: f for f in Late(*guests).findings(patience=70)}
    for finding in found.values():
        print(f"{finding.what}: {finding.found}")
        assert finding.verdict == "fine", finding.found
    # The real client does repeat what it saw: were it otherwise, nothing here would be tested.
    words = found["a name looked up too early"].found.split()
    assert words[-1] == "s" and float(words[-2]) > 5, words


def test_a_mount_without_close_to_open_is_found_out(guests: list[Guest]) -> None:
    guests[1].root = "/nocto"
    late = {f.what: f.verdict for f in Late(*guests).findings(patience=2)}
    assert "dangerous" in late.values()
    mounted = json.loads(python_in(guests[1], EXAMINE, "/nocto"))
    assert {f["what"]: f["verdict"] for f in mounted}["option nocto"] == "dangerous"


def test_one_guest_examines_its_mount(guests: list[Guest]) -> None:
    found = json.loads(python_in(guests[0], EXAMINE, "/mnt"))
    for finding in found:
        print(f"{finding['what']}: {finding['verdict']}: {finding['found']}")
    assert found[0]["found"].startswith("NFS: nfs4 from 10.0.2.2:/cohort on /mnt")
    # Emulated processors are slow; what counts is that nothing else is said against it.
    odd = [f for f in found if f["verdict"] != "fine" and not f["what"].startswith("time to ")]
    assert odd == []


def test_the_guests_come_up_in_good_time(running: Lab) -> None:
    print(f"two guests in {running.boot_seconds:.1f} s")
    assert running.boot_seconds < 120
