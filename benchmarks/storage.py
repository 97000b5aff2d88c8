"""What job directories cost on a shared file system, each figure beside its target.

    .venv/bin/python -m benchmarks.storage [--on FOLDER] [--files 20000] [--gigabytes 0.5]
                                           [--rounds 3] [--rows 1,2,3,7]

    row 1  operations of a run that changed k small files: those below the shared folder that
           change something or read contents; look-ups, attributes and fsyncs of folders left out
    row 2  warm: a run on a directory whose tree this node last had 3 changes ago: open it, bring
           the tree to the head, change 3 files, commit; beside `cp -a` of the same files
    row 3  cold: a checkout on a node without a tree, beside a parallel copy (`cp -a` x 8)
    row 7  opening the newest of 10,000 versions (and of 9,999: a full folder of the log), beside 10

The directory of rows 2 and 3 has `--files` files of 1 to 9 KB; what is left to `--gigabytes` is in
files of 20 MB. Rounds alternate between what is measured and what it is compared with. The targets
are for `--files 100000 --gigabytes 10`, which takes long; a warm run costs by the number of files.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from storage.directory import Directory
from storage.log import Record
from storage.worktree import WorkTree
from tests.storage_kit import changing_calls, run, write

A_FOLDER = 100
LARGE = 20 << 20


def main() -> None:
    """Measure the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--on", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", default="1,2,3,7")
    options = parser.parse_args()
    rows = set(options.rows.split(","))
    print(f"file system: {file_system(options.on)}; {os.cpu_count()} CPUs")
    with tempfile.TemporaryDirectory(prefix="cohort-bench-", dir=options.on) as name:
        home = Path(name)
        if "1" in rows:
            operations(home / "row1")
        if "7" in rows:
            many_versions(home / "row7", max(options.rounds, 3))
        if rows & {"2", "3"}:
            warm_and_cold(home / "row2", options.files, options.gigabytes, options.rounds, rows)


def file_system(folder: Path) -> str:
    """Its type and where it is mounted."""
    found = subprocess.run(
        ["df", "--output=fstype,source", folder], capture_output=True, text=True, check=True
    )
    return found.stdout.splitlines()[-1]


def operations(home: Path) -> None:
    """Row 1."""
    for files in (10, 1_000, 100_000):
        root, node = home / f"root{files}", home / f"node{files}"
        root.mkdir(parents=True)
        run(root, node, "t1", partial(make_small_files, files))
        run(root, node, "t2", write("other", "1"))
        for k in (1, 3, 10):
            if k * 3 > files:
                continue  # so much that the whole manifest is written
            act = partial(run, root, node, f"k{k}", partial(change, k))
            calls = changing_calls(act, root)
            folders = calls.count("fsyncdir")
            print(
                f"row 1  {files:>7,} files, {k:>2} changed: {len(calls) - folders:>3} operations "
                f"(and {folders} fsyncs of folders); reach <= {3 * k + 12}"
            )


def many_versions(home: Path, rounds: int) -> None:
    """Row 7."""
    homes = {}
    for count in (10, 9_999, 10_000):
        root = homes[count] = home / f"{count}"
        root.mkdir(parents=True)
        node = home / f"node{count}"
        for n in range(1, 6):
            run(
                root,
                node,
                f"t{n}",
                partial(make_small_files, 100) if n == 1 else write("a", f"{n}"),
            )
        add_versions(root, count)
    times: dict[int, list[float]] = {count: [] for count in homes}
    for _ in range(rounds * 20):
        for count, root in homes.items():
            times[count].append(timed(lambda root=root: opened(root)))  # type: ignore[misc]
    few = statistics.median(times[10])
    for count in (9_999, 10_000):
        growth = statistics.median(times[count]) / few
        print(
            f"row 7  open the newest of {count:,} versions: {shown(times[count], 1000)} ms, of 10: "
            f"{shown(times[10], 1000)} ms: {growth:.2f} x; reach < 1.5 x"
        )


def opened(root: Path) -> int:
    """What a reader does first: the newest version and everything in it."""
    return len(Directory.open(root, "k").head().entries)


def add_versions(root: Path, count: int) -> None:
    """More records of the newest version's manifest, written as a commit would, but not synced."""
    directory = Directory.open(root, "k")
    last = directory.head().record
    assert last is not None
    for n in range(last.n + 1, count + 1):
        record = Record(
            **{**last.__dict__, "n": n, "base": n - 1, "task_id": f"x{n}", "claim_id": "c"}
        )
        path = directory.log.path(n)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(record.encode())
        if n % 16 == 0:
            (directory.path / "HEAD").write_text(f"{n}\n")


def warm_and_cold(home: Path, files: int, gigabytes: float, rounds: int, rows: set[str]) -> None:
    """Rows 2 and 3."""
    root, plain, here, other = home / "root", home / "plain", home / "here", home / "other"
    root.mkdir(parents=True)
    run(root, other, "t0", partial(make_directory, files, gigabytes))
    directory = Directory.open(root, "k")
    directory.head().copy_to(plain)
    held = sum(f.length for f in directory.head().manifest.files)
    print(f"rows 2, 3: {files:,} small files and large ones, {held / 1e9:.1f} GB")
    times: dict[str, list[float]] = {"warm": [], "cp": [], "cold": [], "parallel": []}
    run(root, here, "begin", partial(change, 1))
    for number in range(rounds):
        if "2" in rows:
            for n in range(3):
                run(root, other, f"other{number}-{n}", partial(change, 1))
            act = partial(run, root, here, f"here{number}", partial(change, 3))
            times["warm"].append(timed(act))
            times["cp"].append(timed(partial(copy, plain, home / "copy", 1)))
            shutil.rmtree(home / "copy")
        if "3" in rows:
            times["cold"].append(timed(partial(checked_out, root, home / "cold")))
            shutil.rmtree(home / "cold")
            times["parallel"].append(timed(partial(copy, plain, home / "copy", 8)))
            shutil.rmtree(home / "copy")
    for row, name, against, reach in (
        ("2", "warm", "cp", "< 3 %"),
        ("3", "cold", "parallel", "<= 120 %"),
    ):
        if row in rows:
            share = statistics.median(times[name]) / statistics.median(times[against]) * 100
            print(
                f"row {row}  {name}: {shown(times[name])} s, a {against} copy: "
                f"{shown(times[against])} s: {share:.1f} %; reach {reach}"
            )


def checked_out(root: Path, scratch: Path) -> None:
    """What a run finds, on a node that never had it."""
    directory = Directory.open(root, "k")
    tree = WorkTree(scratch, "k", "cold")
    tree.checkout(directory, directory.head())
    tree.release()


def copy(source: Path, target: Path, at_once: int) -> None:
    """`cp -a`, of so many parts at a time."""
    if at_once == 1:
        subprocess.run(["cp", "-a", source, target], check=True)
        return
    target.mkdir()
    names = b"\0".join(os.fsencode(path) for path in sorted(source.iterdir()))
    command = ["xargs", "-0", "-P", str(at_once), "-n", "20", "cp", "-a", "-t", os.fspath(target)]
    subprocess.run(command, input=names, check=True)


def make_small_files(count: int, tree: Path) -> None:
    """So many files of 1 to 9 KB."""
    source = random.Random(5)
    data = source.randbytes(20_000)
    for n in range(count):
        folder = tree / f"d{n // A_FOLDER:04}"
        if n % A_FOLDER == 0:
            folder.mkdir()
        begin = source.randrange(10_000)
        (folder / f"f{n:06}").write_bytes(data[begin : begin + source.randrange(1_000, 9_000)])


def make_directory(files: int, gigabytes: float, tree: Path) -> None:
    """The directory of rows 2 and 3."""
    make_small_files(files, tree)
    rest = gigabytes * 1e9 - files * 5_000
    for n in range(max(0, int(rest / LARGE))):
        (tree / f"large{n}").write_bytes(os.urandom(LARGE))


def change(count: int, tree: Path) -> None:
    """Rewrite so many files, others each time."""
    names = [path for path in sorted(tree.iterdir()) if path.is_dir()]
    for n in range(count):
        folder = names[time.monotonic_ns() // 1000 % len(names)]
        (folder / sorted(os.listdir(folder))[n]).write_bytes(os.urandom(2_000))


def timed(act: Callable[[], object]) -> float:
    """Seconds; what was written before is on the disk, so that nobody pays for another."""
    os.sync()
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def shown(seconds: list[float], unit: float = 1) -> str:
    """The median and the range."""
    values = [value * unit for value in seconds]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
