"""The nodes of the fleet, as their leases tell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis

from broker import keys


@dataclass(frozen=True)
class NodeInfo:
    """One incarnation of one node. Memory is in bytes, `lease_left` in seconds."""

    node: str
    incarnation: str
    cpus: int
    memory: int
    host: str
    pid: int
    nonce: str
    lease_left: float
    running: int
    """Claims that it holds."""
    life: str = ""
    """Names the segments that its process writes."""
    gpus: int = 0
    labels: tuple[str, ...] = ()
    spare: tuple[int, int, int] = (0, 0, 0)
    """CPUs, memory and GPUs that no claim of it needs."""

    @property
    def is_live(self) -> bool:
        """Whether its lease still runs."""
        return self.lease_left > 0


_TOLD = frozenset(("cpus", "memory", "host", "pid", "nonce", "life", "gpus"))
"""What of a node's description is read. A newer one may say more."""


def list_nodes(client: redis.Redis) -> list[NodeInfo]:
    """Every node with a lease, also one that has ended and wasn't reaped yet."""
    with client.pipeline() as pipeline:
        pipeline.zrange(keys.LEASES, 0, -1, withscores=True)
        pipeline.hgetall(keys.NODES)
        pipeline.hgetall(keys.SPARE)
        pipeline.time()
        leases, descriptions, spares, (seconds, micros) = pipeline.execute()
    now = seconds + micros / 1e6
    nodes = []
    for raw, ends in leases:
        described = descriptions.get(raw)
        if described is None:
            continue
        member, told = raw.decode(), json.loads(described)
        node, _, incarnation = member.rpartition(":")
        nodes.append(
            NodeInfo(
                node=node,
                incarnation=incarnation,
                lease_left=ends / 1000 - now,
                running=client.hlen(keys.claims(member)),
                spare=_spare_of(spares.get(raw), told),
                **{
                    **{name: told[name] for name in _TOLD & told.keys()},
                    "labels": tuple(told.get("labels", ())),
                },
            )
        )
    return sorted(nodes, key=lambda info: (info.node, info.incarnation))


def _spare_of(held: bytes | None, told: Mapping[str, Any]) -> tuple[int, int, int]:
    if held is None:  # It hasn't asked for anything yet.
        return told["cpus"], told["memory"], told.get("gpus", 0)
    # Below zero while something is claimed ahead.
    cpus, memory, gpus = (max(0, int(number)) for number in held.split())
    return cpus, memory, gpus
