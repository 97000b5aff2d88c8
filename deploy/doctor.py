"""`./cohort doctor`: examine the shared folder on this node, or on this one and another at once."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery import Celery
from rich.console import Console
from rich.table import Table

from broker import server
from broker.nodes import list_nodes
from errors import Refused, Unavailable
from storage.examination import examination_folder, examine
from storage.finding import Finding, worst
from storage.halves import Half, Side
from tasks.settings import Settings

ANSWER_SECONDS = 10.0
_COLOURS = {"fine": "green", "slow": "yellow", "dangerous": "bold red"}


class Elsewhere:
    """A live worker that takes steps when it is asked to."""

    def __init__(self, app: Celery, node: str, folder: str) -> None:
        self.name = node
        self._app, self._folder = app, folder
        self._address: str | None = None

    def find(self, nodes: int) -> None:
        """Learn under which name the node's worker listens; a new one may not listen yet."""
        ends = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < ends:
            for address, reply in self._ask(None, "is_there", wait=1.0, limit=nodes).items():
                if isinstance(reply, dict) and reply.get("node") == self.name:
                    self._address = address
                    return
        raise Unavailable(
            f"the worker of node {self.name} doesn't answer; does it run this version of Cohort?"
        )

    def do(self, step: str, **arguments: Any) -> Any:
        """One step over there."""
        wait = ANSWER_SECONDS
        replies = self._ask(self._address, step, wait, limit=1, **arguments)
        reply = replies.get(self._address or "", {})
        if "error" in reply:
            raise Unavailable(f"node {self.name}: {reply['error']}")
        if "saw" not in reply:
            raise Unavailable(f"node {self.name} didn't answer within {wait:.0f} s ({step})")
        return reply["saw"]

    def _ask(
        self, address: str | None, step: str, wait: float, limit: int, **arguments: Any
    ) -> dict[str, Any]:
        replies = self._app.control.broadcast(
            "examine",
            {"node": self.name, "folder": self._folder, "step": step, **arguments},
            destination=[address] if address else None,
            reply=True,
            timeout=wait,
            limit=limit,
        )
        return {name: found for reply in replies or [] for name, found in reply.items()}


def run(options: Namespace, settings: Settings, app: Celery | None, console: Console) -> int:
    """Examine, show what was found; 1 if something is dangerous."""
    if settings.root is None:
        raise Refused("which folder? Give --root DIR or set COHORT_ROOT")
    root = settings.root
    if not root.is_dir():
        raise Refused(f"{root}: it isn't a folder")
    with examination_folder(root) as folder:
        here = Half(root, folder, "this node")
        there = _other_node(options.other, settings, app, folder) if app else None
        found = list(_shown(_examined(root, here, there, options.patience), console, options.json))
    if options.json:
        rows = [dataclasses.asdict(finding) for finding in found]
        print(json.dumps({"verdict": worst(found), "findings": rows}, indent=2, ensure_ascii=False))
    else:
        _print(found, root, options.other, console)
    return 1 if worst(found) == "dangerous" else 0


def _examined(root: Path, here: Half, there: Side | None, patience: float) -> Iterator[Finding]:
    try:
        yield from examine(root, here, there, patience=patience)
    except OSError as error:
        raise Unavailable(f"{error.filename or root}: {error.strerror or error}") from error


def _other_node(node: str, settings: Settings, app: Celery, folder: str) -> Elsewhere:
    with contextlib.closing(server.connect(settings.redis)) as client:
        server.check(client, settings.redis)
        live = sorted(info.node for info in list_nodes(client) if info.is_live)
    if node not in live:
        others = f"; live are {', '.join(live)}" if live else "; no node is live"
        raise Refused(f"there is no live node {node}{others}")
    other = Elsewhere(app, node, folder)
    other.find(len(live))
    return other


def _shown(findings: Iterator[Finding], console: Console, quiet: bool) -> Iterator[Finding]:
    """The findings; on a terminal with a line that tells what it is at."""
    if quiet or not console.is_terminal:
        yield from findings
        return
    began = time.monotonic()
    with console.status("examining the shared folder") as status:
        for finding in findings:
            status.update(f"examined: {finding.what} ({time.monotonic() - began:.0f} s)")
            yield finding


def _print(found: list[Finding], root: Path, other: str | None, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("what", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in found:
        text = f"{finding.found}\n-> {finding.advice}" if finding.advice else finding.found
        table.add_row(finding.what, f"[{_COLOURS[finding.verdict]}]{finding.verdict}[/]", text)
    console.print(table, highlight=False)
    where = f"{root} on this node" + (f" and {other}" if other else "")
    verdict = worst(found)
    console.print(f"\n{where}: [{_COLOURS[verdict]}]{verdict}[/]", highlight=False, soft_wrap=True)
    if other is None:
        hint = "what two nodes see of each other: `./cohort doctor --with NODE`"
        console.print(hint, highlight=False, soft_wrap=True)
