"""The Redis server itself: reaching it, and refusing one that would lose jobs."""

from __future__ import annotations

import re

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from broker import keys
from errors import Refused, Unavailable, WrongMount


def connect(url: str, *, timeout: float = 5.0) -> redis.Redis:
    """A client that gives up after `timeout` seconds and tries a dropped connection again."""
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        health_check_interval=25,
        # One more try, on a fresh connection: every script may safely run twice.
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.05), retries=1),
    )


def without_password(url: str) -> str:
    """A Redis URL that may be shown."""
    # Up to the last @: a password may hold any character. It may stand in the query as well.
    return re.sub(r"\?.*", "?***", re.sub(r"//.*@", "//***@", url, flags=re.S), flags=re.S)


def check(client: redis.Redis, url: str) -> None:
    """Refuse a server that is away, or that may evict what it has accepted."""
    try:
        info = client.info("memory")
    except redis.RedisError as error:
        raise Unavailable(
            f"Redis at {without_password(url)} doesn't answer: {type(error).__name__}"
        ) from None
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise Refused(
            f"Redis at {without_password(url)} has maxmemory-policy {policy}: it would throw "
            "accepted jobs away. Set it to noeviction"
        )


def belongs_to(client: redis.Redis, fleet_id: str) -> None:
    """Refuse a shared folder that isn't the one which this Redis's fleet uses."""
    client.set(keys.FLEET, fleet_id, nx=True)
    known = client.get(keys.FLEET) or fleet_id
    name = known.decode() if isinstance(known, bytes) else known
    if name != fleet_id:
        raise WrongMount(
            f"the shared folder has the fleet id {fleet_id}, but the nodes on this Redis use "
            f"{name}: mount the same folder, or use another Redis"
        )
