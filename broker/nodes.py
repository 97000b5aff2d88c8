"""The nodes of the fleet, as their leases tell."""

from __future__ import annotations

import json
from dataclasses import dataclass

import redis

from broker import keys
from broker.needs import NONE, Needs


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
    spare: Needs = NONE
    """What no claim of it needs."""

    @property
    def is_live(self) -> bool:
        """Whether its lease still runs."""
        return self.lease_left > 0


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
                spare=Needs.parse(spares.get(raw, b"").decode()),
                **{**told, "labels": tuple(told.get("labels", ()))},
            )
        )
    return sorted(nodes, key=lambda info: (info.node, info.incarnation))
