"""`./cohort why`: what a job waits for, and who could give it; or what became of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery import Celery
from rich.console import Console

from broker import deadletters, keys
from broker.deadletters import DeadLetter
from broker.nodes import NodeInfo, list_nodes
from broker.whereabouts import Found, find, holder_of
from deploy.connection import connected
from deploy.waiting import (
    facts_of,
    facts_of_holder,
    facts_of_place,
    offers,
    place,
    told_of,
    wanted,
    when,
)
from errors import CohortError

if TYPE_CHECKING:  # `tasks` reads the settings when it is imported: only in a command that runs.
    from tasks.settings import Settings

_ASKING = 1.0
"""Seconds that the nodes have for an answer."""
_FINAL = frozenset({"SUCCESS", "FAILURE", "REVOKED"})


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse.ArgumentParser:
    """The command line of `why`."""
    why = commands.add_parser(
        "why",
        allow_abbrev=False,
        help="what a job waits for",
        description="Say what a job waits for, and who could give it; or what became of it.",
        epilog="The exit code is 1 if nobody knows the job.",
    )
    why.add_argument("--json", action="store_true", help="as JSON")
    why.add_argument("id", metavar="ID", help="the task id that `submit` has printed")
    return why


@dataclass
class Answer:
    """What is told: one word for where it is, sentences, and their facts."""

    where: str
    says: list[str]
    facts: dict[str, Any]


def run(options: argparse.Namespace, settings: Settings, app: Celery, err: Console) -> int:
    """Look, and tell."""
    with connected(settings) as client, err.status("looking") as status:
        answer = _Question(
            app, client, options.id, lambda count: status.update(f"{count:,} messages looked at")
        ).answer()
    known = answer.where != "nowhere"
    if options.json:
        print(json.dumps({"id": options.id, "where": answer.where, **answer.facts}, indent=2))
        return 0 if known else 1
    for line in answer.says:
        if known:
            print(line)
        else:
            err.print(f"cohort: {line}", highlight=False, markup=False, soft_wrap=True)
    return 0 if known else 1


class _Question:
    def __init__(self, app: Celery, client: Any, task_id: str, looked: Any) -> None:
        self._app = app
        self._client = client
        self._id = task_id
        self._looked = looked

    def answer(self) -> Answer:
        state, result = self._state()
        letter = deadletters.find(self._client, self._id)
        if state in _FINAL or letter is not None:
            return self._ended(state, result, letter)
        found = find(self._client, self._id, self._looked)
        if found is None:
            # It may have ended while we looked.
            state, result = self._state()
            if state in _FINAL:
                return self._ended(state, result, None)
            return self._acknowledged(state) or self._nowhere(state)
        nodes = list_nodes(self._client)
        tell = getattr(self, f"_{found.where}")
        says, facts = tell(found, nodes)
        common = {
            "state": state,
            "task": found.task,
            "queue": found.queue,
            "priority": found.priority,
            "key": found.key or None,
            "needs": facts_of(found.needs),
        }
        if found.settled:
            says.append(f"it won't run: {found.settled}")
            facts["settled"] = found.settled
        since = found.headers.get(deadletters.UNKNOWN_SINCE)
        if since is not None:
            says.append(
                f"a node that doesn't know the task {found.task} has put it back; it is offered to "
                f"the others from {when(int(since))} on, for COHORT_UNKNOWN_GRACE"
            )
        return Answer(found.where, says, {**common, **facts, "says": says})

    def _state(self) -> tuple[str, Any]:
        try:
            meta = self._app.backend.get_task_meta(self._id)
        except CohortError as error:
            # It lies on a shared folder that this machine doesn't have.
            return ("SUCCESS" if self._app.backend.index.find(self._id) else "PENDING"), error
        return str(meta["status"]), meta.get("result")

    # What is over, and what isn't there.

    def _ended(self, state: str, result: Any, letter: DeadLetter | None) -> Answer:
        says: list[str] = []
        facts: dict[str, Any] = {"state": state, "reason": None, "dead_letter": letter is not None}
        if isinstance(result, BaseException):
            facts["reason"] = f"{type(result).__name__}: {result}"
        if state == "REVOKED":
            facts["reason"] = str(result)
            says.append(f"it was ended, or never ran: REVOKED, {result}")
        elif isinstance(result, CohortError) and state == "SUCCESS":
            facts["state"] = None
            says.append(f"it has ended; of its outcome: {result}")
        elif state in _FINAL:
            told = f": {facts['reason']}" if facts["reason"] else ""
            says.append(f"it ran: {state}{told}")
        if letter is not None:
            facts["reason"] = letter.reason
            says.append(
                f"it is a dead letter since {when(letter.time_ms)}: {letter.reason}; see "
                f"`./cohort dead show {self._id}`"
            )
        mark = self._client.hget(keys.SETTLED, self._id.encode("utf-8", "surrogateescape"))
        facts["message_waits"] = mark is not None
        if mark is not None:
            says.append("its message still waits; the node that meets it drops it")
        return Answer("dead" if letter else "ended", says, {**facts, "says": says})

    def _acknowledged(self, state: str) -> Answer | None:
        """A plain task is acknowledged when it begins: Redis knows nothing of it any more."""
        for worker, info in self._known_to(list_nodes(self._client)):
            node, since = worker.rpartition("@")[2], _since(info)
            says = [f"it runs on {worker}" + (f" since {since}" if since else "")]
            says.append("it was acknowledged when it began: if that node dies, it is lost")
            facts = {"state": state, "task": info.get("name"), "node": node, "since": since}
            return Answer("running", says, {**facts, "says": says})
        return None

    def _nowhere(self, state: str) -> Answer:
        says = [f"nobody knows {self._id}: it was never submitted here, or its outcome has expired"]
        if state != "PENDING":
            says = [
                f"{self._id} was {state}, and is nowhere now: Redis may have lost it. "
                "`./cohort recover` puts back what was noted"
            ]
        return Answer("nowhere", says, {"state": state, "says": says})

    # What it waits for.

    def _claimed(self, found: Found, nodes: Sequence[NodeInfo]) -> tuple[list[str], dict[str, Any]]:
        node = found.member.rpartition(":")[0]
        live = any(f"{n.node}:{n.incarnation}" == found.member and n.is_live for n in nodes)
        since = None
        for _, info in self._known_to(nodes) if live else ():
            since = _since(info)
        facts = {
            "node": node,
            "claim": found.claim_id,
            "node_is_live": live,
            "since": since,
        }
        if not live:
            says = [f"node {node} has it, but its lease has ended: it goes back within a lease"]
        elif since is None:
            says = [f"node {node} has claimed it (claim {found.claim_id}) and is about to begin"]
        else:
            says = [f"it runs on node {node} since {since}"]
        return says, facts

    def _known_to(self, nodes: Sequence[NodeInfo]) -> list[tuple[str, dict[str, Any]]]:
        """Which workers say that they run it, and what else they say of it."""
        live = sum(node.is_live for node in nodes)
        if not live:
            return []
        asked = self._app.control.inspect(timeout=_ASKING, limit=live).query_task(self._id) or {}
        found = [(worker, told[self._id]) for worker, told in asked.items() if self._id in told]
        return [(worker, info) for worker, (state, info) in found if state == "active"]

    def _parked(self, found: Found, nodes: Sequence[NodeInfo]) -> tuple[list[str], dict[str, Any]]:
        holder = holder_of(self._client, found.key)
        says = [f"it waits for the key {found.key}, {told_of(holder)}", place(found, "parked")]
        return says, {"holder": facts_of_holder(holder), **facts_of_place(found)}

    def _waiting(self, found: Found, nodes: Sequence[NodeInfo]) -> tuple[list[str], dict[str, Any]]:
        says = [f"it waits for a node with {wanted(found.needs)}"]
        lines, offered = offers(found.needs, nodes)
        says += lines
        keeper = found.kept_by.rpartition(":")[0]
        if keeper:
            says.append(f"node {keeper} keeps room for it, and takes nothing else until then")
        says.append(place(found, "jobs that need the same"))
        return says, {"nodes": offered, "kept_by": keeper or None, **facts_of_place(found)}

    def _ready(self, found: Found, nodes: Sequence[NodeInfo]) -> tuple[list[str], dict[str, Any]]:
        why = f"the lock of {found.key} is its own" if found.key else "it came back from a node"
        says = [f"it is served before the queues, {why}; it waits for a node to take it"]
        says.append(place(found, "jobs that are served first"))
        lines, facts = self._who_serves(found, nodes)
        return says + lines, {**facts, **facts_of_place(found)}

    def _delayed(self, found: Found, nodes: Sequence[NodeInfo]) -> tuple[list[str], dict[str, Any]]:
        seconds, _ = self._client.time()
        left = max(0, found.due_ms // 1000 - seconds)
        says = [f"it waits until {when(found.due_ms)}, {left:,} s from now"]
        lines, facts = self._ahead(found, nodes)
        return says + lines, {"due": when(found.due_ms), "seconds": left, **facts}

    def _queued(self, found: Found, nodes: Sequence[NodeInfo]) -> tuple[list[str], dict[str, Any]]:
        says = [
            f"it waits in the queue {found.queue} at priority {found.priority}: "
            f"{found.before:,} before it"
        ]
        served, facts = self._who_serves(found, nodes)
        lines, more = self._ahead(found, nodes)
        return says + served + lines, {**facts_of_place(found), **facts, **more}

    def _ahead(self, found: Found, nodes: Sequence[NodeInfo]) -> tuple[list[str], dict[str, Any]]:
        """What it will wait for then, as things are."""
        says: list[str] = []
        facts: dict[str, Any] = {}
        holder = holder_of(self._client, found.key) if found.key else None
        if holder is not None and holder.task_id != self._id:
            says.append(f"then for the key {found.key}, {told_of(holder)}")
            facts["holder"] = facts_of_holder(holder)
        lines, offered = offers(found.needs, nodes)
        if nodes and not any(offer["could"] for offer in offered):
            says += lines
            facts["nodes"] = offered
        return says, facts

    def _who_serves(
        self, found: Found, nodes: Sequence[NodeInfo]
    ) -> tuple[list[str], dict[str, Any]]:
        """Whether anybody alive takes from its queue."""
        live = [node.node for node in nodes if node.is_live]
        if not live:
            return ["no node is alive: none has a lease"], {"served_by": []}
        asked = self._app.control.inspect(timeout=_ASKING, limit=len(live)).active_queues() or {}
        serving = [
            worker
            for worker, queues in asked.items()
            if any(queue["name"] == found.queue for queue in queues)
        ]
        if serving or len(asked) < len(live):
            return [], {"served_by": sorted(serving)}
        return [f"no node takes from the queue {found.queue}"], {"served_by": []}


def _since(info: dict[str, Any]) -> str | None:
    begun = info.get("time_start")
    return None if begun is None else when(int(begun * 1000))
