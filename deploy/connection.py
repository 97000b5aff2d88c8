"""A command's own connection to the fleet's Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import redis

from broker import server
from errors import Unavailable

if TYPE_CHECKING:  # `tasks` reads the settings when it is imported: only in a command that runs.
    from tasks.settings import Settings


@contextmanager
def connected(settings: Settings) -> Iterator[redis.Redis]:
    """A client of a server that may be used; `Unavailable` if it goes away."""
    client = server.connect(settings.redis)
    try:
        server.check(client, settings.redis)
        yield client
    except redis.ConnectionError as error:
        raise Unavailable(
            f"Redis at {server.without_password(settings.redis)} doesn't answer: "
            f"{type(error).__name__}"
        ) from None
    finally:
        client.close()
