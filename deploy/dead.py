"""`./cohort dead`: what was given up, looked at, tried again or dropped by a person."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import redis
from rich.console import Console
from rich.table import Table

from broker import deadletters
from broker.deadletters import DeadLetter, Retry
from broker.journal import note_of
from broker.scripts import Scripts
from deploy.connection import connected
from errors import Refused

if TYPE_CHECKING:  # `tasks` reads the settings when it is imported: only in a command that runs.
    from tasks.settings import Settings


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """The command line of `dead`."""
    dead = commands.add_parser(
        "dead",
        allow_abbrev=False,
        help="jobs that were given up",
        description="Dead letters: jobs that took their node or process with them each time, that "
        "no node knows, and what isn't a task's message at all.",
    )
    acts = dead.add_subparsers(required=True, metavar="ACTION", dest="act")
    about = {
        "list": "what there is",
        "show": "one of them, with its message",
        "retry": "back into their queues, as new tasks",
        "drop": "remove them for good",
    }
    for act, text in about.items():
        parser = acts.add_parser(act, allow_abbrev=False, help=text, description=text)
        parser.add_argument("--json", action="store_true", help="as JSON")
        if act == "show":
            parser.add_argument("ids", nargs=1, metavar="ID", help="the task id, or element-...")
        elif act != "list":
            parser.add_argument("ids", nargs="*", metavar="ID", help="task ids, or element-...")
            parser.add_argument("--all", action="store_true", help="every one of them")
        if act == "drop":
            parser.add_argument("--yes", action="store_true", help="without asking")
    return dead


def run(options: argparse.Namespace, settings: Settings, err: Console) -> int:
    """Do what the options say."""
    if options.act in ("retry", "drop") and bool(options.ids) == options.all:
        raise Refused(f"dead {options.act}: give task ids, or --all and none")
    with connected(settings) as client:
        if options.act == "list":
            return _list(options, client)
        if options.act == "show":
            return _show(options, *_named(client, options.ids))
        letters = list(deadletters.each(client)) if options.all else _named(client, options.ids)
        if options.act == "retry":
            return _retry(options, client, letters, err)
        return _drop(options, client, letters, err)


def _named(client: redis.Redis, names: Sequence[str]) -> list[DeadLetter]:
    letters = []
    for name in dict.fromkeys(names):
        letter = deadletters.find(client, name)
        if letter is None:
            raise Refused(f"{name} is no dead letter; `./cohort dead list` names them")
        letters.append(letter)
    return letters


def _told(letter: DeadLetter) -> dict[str, Any]:
    when = datetime.fromtimestamp(letter.time_ms // 1000, UTC).isoformat()
    return {
        "id": letter.name,
        "task": letter.task or None,
        "reason": letter.reason,
        "time": when.replace("+00:00", "Z"),
        "queue": letter.about["queue"],
        "lost_deliveries": int(letter.about.get("lost") or 0),
        "bytes": len(letter.payload),
    }


def _list(options: argparse.Namespace, client: redis.Redis) -> int:
    rows = sorted(map(_told, deadletters.each(client)), key=lambda row: (row["time"], row["id"]))
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table(box=None, pad_edge=False)
    for heading in ("id", "task", "queue", "since"):
        table.add_column(heading, no_wrap=True)
    table.add_column("reason", overflow="fold")
    for row in rows:
        table.add_row(
            *(_plain(row[name] or "-") for name in ("id", "task", "queue", "time", "reason"))
        )
    console = Console(markup=False)
    if not console.is_terminal:
        console = Console(markup=False, width=250)
    console.print(table)
    if not rows:
        print("there are no dead letters", file=sys.stderr)
    return 0


def _show(options: argparse.Namespace, letter: DeadLetter) -> int:
    told, message = _told(letter), letter.message
    text = letter.payload.decode("utf-8", "backslashreplace")
    headers = {} if message is None else dict(message["headers"])
    if options.json:
        print(json.dumps({**told, "headers": headers or None, "message": text}, indent=2))
        return 0
    for name, value in told.items():
        if value is not None:
            print(f"{name:16}{_plain(str(value))}")
    if message is None:
        print(f"{'content':16}{_plain(text[:4096])}")
        return 0
    for name in ("root_id", "parent_id", "retries", "origin", deadletters.RETRY_OF):
        if headers.get(name):
            print(f"{name:16}{_plain(str(headers[name]))}")
    print(f"{'arguments':16}{_plain(_body_of(message)[:4096])}")
    return 0


def _body_of(message: dict[str, Any]) -> str:
    body = str(message.get("body") or "")
    if message["properties"].get("body_encoding") != "base64":
        return body
    return base64.b64decode(body).decode("utf-8", "backslashreplace")


def _retry(
    options: argparse.Namespace, client: redis.Redis, letters: Sequence[DeadLetter], err: Console
) -> int:
    # All of them are looked at before the first one is put back.
    retries = list(_retries(letters, skip=options.all, err=err))
    scripts, gone, done = Scripts(client), [], []
    for retry in retries:
        _note(retry)
        if retry.put(scripts):
            done.append({"id": retry.letter.name, "new_id": retry.task_id})
        else:
            gone.append(retry.letter.name)
    if options.json:
        print(json.dumps({"retried": done, "gone": gone}, indent=2))
    else:
        for one in done:
            print(f"{one['id']} is tried again as {one['new_id']}")
    for name in gone:
        err.print(
            f"cohort: {name} was retried or dropped by another just now",
            highlight=False,
            soft_wrap=True,
        )
    return 1 if gone else 0


def _retries(letters: Sequence[DeadLetter], *, skip: bool, err: Console) -> Iterator[Retry]:
    for letter in letters:
        if skip and letter.message is None:
            err.print(
                f"cohort: {letter.name} isn't a task's message: it stays",
                highlight=False,
                soft_wrap=True,
            )
        else:
            yield deadletters.retry_of(letter)


def _note(retry: Retry) -> None:
    """A durable job's promise is the new task's too: on disk before it is in Redis."""
    note = note_of(retry.queue, retry.list, retry.message)
    if note.durable:
        from tasks import app
        from tasks.journal import write_down

        write_down(app, note)


def _drop(
    options: argparse.Namespace, client: redis.Redis, letters: Sequence[DeadLetter], err: Console
) -> int:
    count = f"{len(letters):,} dead letter{'' if len(letters) == 1 else 's'}"
    if letters and not options.yes:
        if not sys.stdin.isatty():
            raise Refused(f"drop removes {count} for good: add --yes")
        err.print(f"Drop {count} for good? [y/N] ", end="", highlight=False, markup=False)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            err.print("nothing is dropped", highlight=False, soft_wrap=True)
            return 1
    gone = deadletters.drop(client, letters)
    if options.json:
        print(json.dumps({"dropped": gone}))
    else:
        print(f"{gone:,} dropped")
    return 0


def _plain(text: str) -> str:
    """Whatever a producer wrote, on one line of a terminal and without its control characters."""
    return text if text.isprintable() else ascii(text)[1:-1]
