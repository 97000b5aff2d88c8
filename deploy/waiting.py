"""What a waiting job waits for, in words and as facts: needs and nodes, keys and places."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from broker.needs import Needs, Room
from broker.nodes import NodeInfo
from broker.whereabouts import Found, Holder


def offers(needs: Needs, nodes: Sequence[NodeInfo]) -> tuple[list[str], list[dict[str, Any]]]:
    """What each live node has of it: lines, and facts."""
    says, facts = [], []
    for node in nodes:
        if not node.is_live:
            continue
        room = Room(node.cpus, node.memory, node.gpus, node.labels)
        missing = sorted(needs.labels.difference(node.labels))
        could = room.could_fit(needs)
        spare = Needs(*node.spare)
        what = [f"{_amounts(needs, spare)} to spare of {_amounts(needs, node)}"]
        what += [f"no label {label}" for label in missing]
        says.append(f"  node {node.node} {'has' if could else 'never can:'} {', '.join(what)}")
        facts.append(
            {
                "node": node.node,
                "could": could,
                "total": {"cpus": node.cpus, "memory": node.memory, "gpus": node.gpus},
                "spare": {"cpus": spare.cpus, "memory": spare.memory, "gpus": spare.gpus},
                "missing_labels": missing,
            }
        )
    if not facts:
        says.append("no node is alive: none has a lease")
    elif not any(offer["could"] for offer in facts):
        says.insert(0, f"no node of the fleet can give it {wanted(needs)}: start one that can")
    return says, facts


def _amounts(needs: Needs, has: Needs | NodeInfo) -> str:
    """Of what is needed, how much there is."""
    told = [f"{has.cpus} CPUs"] if needs.cpus else []
    told += [_size(has.memory)] if needs.memory else []
    told += [f"{has.gpus} GPUs"] if needs.gpus else []
    return " and ".join(told) or f"{has.cpus} CPUs"


def wanted(needs: Needs) -> str:
    """What is needed, in words."""
    told = [f"{needs.cpus} CPU{'s' * (needs.cpus != 1)}"] if needs.cpus else []
    told += [_size(needs.memory)] if needs.memory else []
    told += [f"{needs.gpus} GPU{'s' * (needs.gpus != 1)}"] if needs.gpus else []
    told += [f"the label {label}" for label in sorted(needs.labels)]
    return ", ".join(told) or "a free process"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.0f} MiB"


def told_of(holder: Holder | None) -> str:
    """Who has a key, as a clause."""
    if holder is None:
        return "which nobody holds now: it is about to go on"
    if holder.member:
        node = holder.member.rpartition(":")[0]
        return f"which claim {holder.claim_id} of node {node} holds (task {holder.task_id})"
    if holder.claim_id:
        return f"which claim {holder.claim_id} holds, whose node has just left it"
    return f"which is kept for task {holder.task_id}, the next to be taken"


def place(found: Found, among: str) -> str:
    """Where in its line it is."""
    if among == "parked":
        among = "jobs that wait for it"
    return f"{found.before:,} before it, of {found.of:,} {among}"


def facts_of(needs: Needs) -> dict[str, Any]:
    """Needs as JSON has them."""
    return {
        "cpus": needs.cpus,
        "memory": needs.memory,
        "gpus": needs.gpus,
        "labels": sorted(needs.labels),
    }


def facts_of_holder(holder: Holder | None) -> dict[str, Any] | None:
    """The same of who has a key."""
    if holder is None:
        return None
    return {
        "task": holder.task_id or None,
        "claim": holder.claim_id or None,
        "node": holder.member.rpartition(":")[0] or None,
    }


def facts_of_place(found: Found) -> dict[str, int]:
    """The same of a place in a line."""
    return {"before": found.before, "of": found.of}


def when(ms: int) -> str:
    """A time in ms as text, UTC."""
    return datetime.fromtimestamp(ms // 1000, UTC).isoformat().replace("+00:00", "Z")
