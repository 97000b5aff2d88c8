"""`./cohort demo`: the main job for four days on three nodes, and the verdict.

Exit codes: 0 no row was lost or doubled and no run read anything stale, 1 it is otherwise,
2 the command line is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

from rich.console import Console

from deploy.demonstration import verify as verification
from deploy.demonstration.runs import Runs
from deploy.demonstration.screen import Screen
from deploy.demonstration.story import Story
from deploy.demonstration.table import draw, lines
from deploy.demonstration.world import NODES, World
from deploy.ending import AskedToEnd, end_by_signals, ignore_signals
from errors import CohortError


def main(arguments: list[str] | None = None) -> int:
    """Run the demo."""
    options = _parser().parse_args(arguments)
    out = Console()
    if not out.is_terminal:
        # Into a file or pipe every column comes whole, whatever width is assumed.
        out = Console(width=120)
    end_by_signals()
    world: World | None = None
    code, keep_files = 1, False
    try:
        # Flower shows what it has seen: it must be there from the start.
        world = World(options.root, flower=options.keep)
        code = _demo(world, options.keep, out)
        keep_files = code != 0
    except AskedToEnd:
        code = 130
    except CohortError as error:
        keep_files = world is not None and world.has_logs
        print(f"demo: {error}", file=sys.stderr, flush=True)
    except Exception:
        keep_files = world is not None and world.has_logs
        raise
    finally:
        # From here on nothing interrupts: whatever happened above, nothing stays.
        ignore_signals()
        if world is not None:
            world.end()
            if keep_files:
                print(f"demo: logs and files are kept in {world.home}", file=sys.stderr)
            else:
                world.remove()
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cohort demo",
        allow_abbrev=False,
        description="Run the export of several tables for four days on three nodes of this "
        "machine, with a killed node and a lost lock on the way, and compare what is on S3 with "
        "the database.",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the fleet up until Ctrl-C, with Flower"
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="where to make the shared folder (a temporary folder)",
    )
    return parser


def _demo(world: World, keep: bool, out: Console) -> int:
    began = time.monotonic()
    with Screen(out) as screen:
        screen.say(f"starting {NODES} nodes, Redis, S3 and a database: {world.home}")
        world.start()
        screen.say(f"      done in {time.monotonic() - began:.1f} s")
        runs = Runs(world, screen)
        told = Story(world, runs, screen).tell()
        screen.say("reading all Parquet back from S3 and comparing it with the database")
        verdict = verification.verify(world.database, runs, told)
    found = lines(runs, told)
    out.print()
    out.print(draw(found))
    out.print()
    for problem in verdict.problems:
        print(f"demo: {problem}")
    nodes = {line.node for line in found}
    if len(nodes) != NODES:
        print(f"demo: only {', '.join(sorted(nodes))} ran anything")
    print(
        f"{verdict.compared:,} rows of the database compared with {verdict.objects} Parquet "
        f"objects, in {time.monotonic() - began:.0f} s from the start"
    )
    print(
        f"demo: {verdict.lost:,} rows lost, {verdict.doubled:,} rows doubled, "
        f"{verdict.stale:,} stale reads, {len(found)} runs on {len(nodes)} nodes",
        flush=True,
    )
    if keep:
        _keep(world, out)
    return 0 if verdict.is_good and len(nodes) == NODES else 1


def _keep(world: World, out: Console) -> None:
    for line in (
        "the fleet stays up until Ctrl-C. Look at it from another terminal:",
        f"  Flower           {world.fleet.flower_url}",
        f"  the nodes        COHORT_REDIS={world.fleet.redis_url} ./cohort nodes",
        f"  a job directory  {world.root / 'jobs' / 'export-ny-flights'}",
        f"  logs             {world.home / 'logs'}",
    ):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    out.file.flush()
    with contextlib.suppress(AskedToEnd):
        while True:
            world.check()
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
