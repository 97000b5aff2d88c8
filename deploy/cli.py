"""The commands `up`, `nodes`, `doctor`, `submit`, `logs`, `why`, `dead`, `dir`, `gc` and those of
outcomes.

Exit codes: 0 done, 1 it failed (the reason is on stderr), 2 the command line is wrong,
130 interrupted.

`tasks` is imported late: its app reads the settings, and a wrong one must end in one line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import redis
from celery import Celery
from rich.console import Console
from rich.table import Table

from broker import server
from broker.nodes import list_nodes
from deploy import dead, directories, garbage, logs, outcomes, state, submit, why
from errors import CohortError, Refused, Unavailable
from storage.lateness import PATIENCE

if TYPE_CHECKING:
    from tasks.settings import Settings


def main(arguments: list[str] | None = None) -> int:
    """Run one command; every error that is foreseen becomes one line."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    # Like the Celery commands: modules of COHORT_JOBS may lie in the caller's folder.
    sys.path.append(os.getcwd())
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing more can be written to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except CohortError as error:
        print(f"cohort: {error}", file=sys.stderr)
        return 1
    return code


def _parse(arguments: list[str]) -> argparse.Namespace:
    """What follows `--` is a program and its arguments, whatever they look like."""
    words, program = arguments, None
    if arguments[:1] == ["submit"] and "--" in arguments:
        at = arguments.index("--")
        words, program = arguments[:at], arguments[at + 1 :]
    parser = _parser()
    options = parser.parse_args(words)
    if words[:1] == ["submit"]:
        submit.check_words(options, program, parser)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cohort", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser(
        "up",
        allow_abbrev=False,
        help="a fleet on this machine",
        description="Start a fleet on this machine: Redis, nodes, beat and Flower. Ctrl-C or "
        "SIGTERM ends all of it.",
    )
    up.add_argument("--nodes", type=int, default=3, metavar="N", help="how many nodes (3)")
    up.add_argument(
        "--root", type=Path, metavar="DIR", help="the shared folder (one in the state folder)"
    )
    up.add_argument(
        "--redis",
        default=os.environ.get("COHORT_REDIS"),
        metavar="URL",
        help="use this Redis ($COHORT_REDIS) instead of starting one",
    )
    up.add_argument("--cpus", default="2", metavar="N[,N...]", help="of every node or of each (2)")
    up.add_argument(
        "--memory", default="2 GiB", metavar="SIZE[,SIZE...]", help="of every node or of each"
    )
    up.add_argument(
        "--flower-port", type=int, metavar="N", help="Flower's port (5555 if free, else any)"
    )
    up.add_argument("--no-flower", action="store_true", help="without Flower")
    up.add_argument("--no-beat", action="store_true", help="without beat")
    up.add_argument(
        "--grace", type=float, default=10.0, metavar="S", help="seconds for jobs at the end (10)"
    )
    up.set_defaults(run=_up)

    nodes = commands.add_parser(
        "nodes", allow_abbrev=False, help="the nodes of the fleet", description="List the nodes."
    )
    nodes.add_argument("--json", action="store_true", help="as JSON")
    nodes.set_defaults(run=_nodes)

    doctor = commands.add_parser(
        "doctor",
        allow_abbrev=False,
        help="examine the shared folder",
        description="Examine the shared folder: how it is mounted, whether it keeps what Cohort "
        "builds on, how fast it is. Nothing is left behind.",
        epilog="The exit code is 1 if something is dangerous.",
    )
    doctor.add_argument(
        "--root", type=Path, metavar="DIR", help="the shared folder ($COHORT_ROOT, or the fleet's)"
    )
    doctor.add_argument(
        "--with", dest="other", metavar="NODE", help="together with the worker of that node"
    )
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.add_argument(
        "--patience",
        type=float,
        default=PATIENCE,
        metavar="S",
        help=f"seconds to wait for what the other node may see late ({PATIENCE:.0f})",
    )
    doctor.set_defaults(run=_doctor)

    submit.add_parser(commands).set_defaults(run=_submit)
    logs.add_parser(commands).set_defaults(run=_logs)
    why.add_parser(commands).set_defaults(run=_why)
    dead.add_parser(commands).set_defaults(run=_dead)
    directories.add_parser(commands).set_defaults(run=_dir)
    garbage.add_parser(commands).set_defaults(run=_gc)
    outcomes.add_commands(commands, _join_fleet)
    return parser


def _up(options: argparse.Namespace) -> int:
    from deploy import up
    from tasks.settings import Settings

    return up.run(options, Settings.read(os.environ), Console())


def _nodes(options: argparse.Namespace) -> int:
    settings = _join_fleet()
    with contextlib.closing(server.connect(settings.redis)) as client:
        try:
            known = list_nodes(client)
        except redis.RedisError as error:
            raise Unavailable(
                f"Redis at {server.without_password(settings.redis)} doesn't answer: "
                f"{type(error).__name__}"
            ) from None
    if options.json:
        rows = [
            {
                **dataclasses.asdict(info),
                "spare": dict(zip(("cpus", "memory", "gpus"), info.spare, strict=True)),
                "state": "live" if info.is_live else "lost",
            }
            for info in known
        ]
        print(json.dumps(rows, indent=2))
        return 0
    table = Table(box=None, pad_edge=False)
    for heading in ("node", "incarnation", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("cpus", "memory", "gpus", "running", "lease left"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("labels")
    for info in known:
        cpus, memory, gpus = info.spare
        table.add_row(
            info.node,
            info.incarnation,
            "live" if info.is_live else "lost",
            f"{cpus} of {info.cpus}",
            f"{memory / 2**30:.1f} of {info.memory / 2**30:.1f} GiB",
            f"{gpus} of {info.gpus}",
            str(info.running),
            f"{max(info.lease_left, 0):.1f} s",
            ", ".join(info.labels),
        )
    console = Console()
    if not console.is_terminal:
        # Into a file or pipe every column comes whole, whatever width is assumed.
        console = Console(width=200)
    console.print(table)
    if not known:
        print("no node has a lease", file=sys.stderr)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    app = None
    if options.other:
        settings = _join_fleet_anew()
        from tasks import app
    else:
        settings = _settings_with_root()
    if options.root is not None:
        settings = dataclasses.replace(settings, root=options.root.absolute())
    from deploy import doctor

    console = Console()
    if not console.is_terminal:
        # Into a file or pipe every finding comes on as few lines as it can.
        console = Console(width=250)
    return doctor.run(options, settings, app, console)


def _submit(options: argparse.Namespace) -> int:
    settings, app = _join_with_app()
    with contextlib.closing(server.connect(settings.redis)) as client:
        server.check(client, settings.redis)
    return submit.run(options, app, settings.root, Console(), Console(stderr=True))


def _logs(options: argparse.Namespace) -> int:
    settings, app = _join_with_app()
    if settings.root is None:
        raise Refused("COHORT_ROOT isn't set: logs are on the shared folder")
    return logs.run(options, settings.root, app)


def _why(options: argparse.Namespace) -> int:
    settings = _join_fleet_anew()
    from tasks import app

    return why.run(options, settings, app, Console(stderr=True))


def _dead(options: argparse.Namespace) -> int:
    return dead.run(options, _join_fleet_anew(), Console(stderr=True))


def _dir(options: argparse.Namespace) -> int:
    if options.act in directories.NEEDS_FLEET:
        settings, app = _join_with_app()
    else:
        # Reading takes no Redis, and no fleet that runs.
        settings, app = _settings_with_root(), None
    if settings.root is None:
        raise Refused("COHORT_ROOT isn't set: job directories are on the shared folder")
    return directories.run(options, settings.root, app)


def _gc(options: argparse.Namespace) -> int:
    settings = _settings_with_root()
    if settings.root is None or not settings.root.is_dir():
        raise Refused("COHORT_ROOT: job directories are on the shared folder; give its path")
    return garbage.run(options, settings.root, Console(), Console(stderr=True))


def _settings_with_root() -> Settings:
    from tasks.settings import Settings

    settings = Settings.read(os.environ)
    fleet = state.find(settings.state)
    if settings.root is None and fleet is not None:
        return dataclasses.replace(settings, root=Path(fleet.root))
    return settings


def _join_with_app() -> tuple[Settings, Celery]:
    settings = _join_fleet_anew()
    from tasks import app

    app.loader.import_default_modules()
    return settings, app


def _join_fleet_anew() -> Settings:
    """Like `_join_fleet`, for commands that use the app, which reads its settings only once."""
    before = dict(os.environ)
    settings = _join_fleet()
    if os.environ != before:
        # A new start is the one sure way to change them.
        os.execv(sys.executable, sys.orig_argv)
    return settings


def _join_fleet() -> Settings:
    from tasks.settings import Settings

    settings = Settings.read(os.environ)
    if "COHORT_REDIS" in os.environ or settings.redis != Settings.redis:
        return settings
    fleet = state.find(settings.state)
    if fleet is None:
        raise Unavailable(
            "no fleet is running here: start one with `./cohort up`, or set COHORT_REDIS to the "
            "Redis of one elsewhere"
        )
    os.environ["COHORT_REDIS"] = fleet.redis
    if settings.root is None:
        os.environ["COHORT_ROOT"] = fleet.root
    return Settings.read(os.environ)


if __name__ == "__main__":
    sys.exit(main())
