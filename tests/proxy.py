"""A fleet whose network can be made bad: nodes and producers reach Redis through a proxy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from broker import keys
from broker.nodes import list_nodes
from deploy.chaos.proxy import Proxy
from tests.fleets import Producer, running_fleet, wait_for
from tests.redis_server import RedisServer, running_redis


@dataclass
class Behind:
    """A fleet, the network before its Redis, and the server itself."""

    producer: Producer
    proxy: Proxy
    server: RedisServer

    def incarnations(self) -> set[tuple[str, str]]:
        """Every node with a lease that runs, and which of its lives; seen past the network."""
        with self.server.connect() as client:
            return {(info.node, info.incarnation) for info in list_nodes(client) if info.is_live}

    def resume_until_renewed(self) -> None:
        """Forward again, until every node has renewed its lease."""
        before = self._leases()
        self.proxy.resume()
        wait_for(
            lambda: all(end > before[member] for member, end in self._leases().items()),
            "the leases to be renewed",
        )

    def _leases(self) -> dict[bytes, float]:
        with self.server.connect() as client:
            return dict(client.zrange(keys.LEASES, 0, -1, withscores=True))


@contextmanager
def fleet_behind_proxy(home: Path, nodes: int) -> Iterator[Behind]:
    """A fleet with short leases behind a proxy."""
    with running_redis(home / "redis") as server, Proxy(server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        with running_fleet(home, nodes, redis_url=url) as producer:
            try:
                yield Behind(producer, proxy, server)
            finally:
                # The fleet ends in good order, whatever a test has left the network in.
                proxy.delay = 0.0
                proxy.resume()
                proxy.accept()
