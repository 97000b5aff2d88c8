"""After every test with a Redis: each key that is left is one that somebody knows and ends.

The table is in `broker/keys.py`. `audited` looks when its block ends and, for a server that several
tests share, after each of them (a fixture of tests/conftest.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import redis

from broker import keys

_SEPARATOR = b"\x06\x16"
_watched: dict[str, Collection[str]] = {}
_told: set[tuple[str, str]] = set()


def strangers(client: Any, queues: Collection[str] = ("celery",)) -> list[str]:
    """What is wrong with each key that the table doesn't know, or knows otherwise.

    `queues` are those that no binding names, since a test fills them by hand.
    """
    names = sorted(client.scan_iter(count=1000))
    with client.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.type(name)
            pipeline.pttl(name)
        facts = pipeline.execute()
    found = [
        (name, kind.decode(), lives)
        for name, kind, lives in zip(names, facts[::2], facts[1::2], strict=True)
        if kind != b"none"  # it went in between
    ]
    bound = {*(queue.encode() for queue in queues), *_bound(client, [name for name, *_ in found])}
    complaints = [_complaint(name, kind, lives, bound) for name, kind, lives in found]
    return [complaint for complaint in complaints if complaint]


def _bound(client: Any, names: list[bytes]) -> Iterator[bytes]:
    """The queues that an exchange knows."""
    for name in names:
        if name.startswith(b"_kombu.binding."):
            with contextlib.suppress(redis.ResponseError):
                yield from (member.rsplit(_SEPARATOR, 1)[-1] for member in client.smembers(name))


def _complaint(name: bytes, type_: str, lives: int, queues: Collection[bytes]) -> str | None:
    text = name.decode("utf-8", "backslashreplace")
    kind = keys.kind_of(text)
    if kind is None:
        if name.partition(_SEPARATOR)[0] not in queues:
            return f"{text!r}, a {type_}: no key of the table in broker/keys.py, no known queue"
        if type_ != "list":
            return f"{text!r} is a {type_}; a queue is a list"
        return f"{text!r}: a queue has no time to live" if lives != -1 else None
    if type_ != kind.type:
        return f"{text!r} is a {type_}; {kind.pattern} is a {kind.type}"
    if kind.expires and lives == -1:
        return f"{text!r} stays for ever; {kind.pattern} goes by {kind.ends}"
    if not kind.expires and lives != -1:
        return f"{text!r} goes by itself; of {kind.pattern} that is up to: {kind.ends}"
    return None


def audit(url: str, queues: Collection[str] = ("celery",)) -> None:
    """Look now. A server that a test has ended says nothing."""
    with redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5) as client:
        try:
            complaints = strangers(client, queues)
        except redis.ConnectionError:
            return
    # Said by the test that did it, and not by each one after it.
    complaints = [said for said in complaints if (url, said) not in _told]
    _told.update((url, said) for said in complaints)
    assert not complaints, "left in Redis:\n" + "\n".join(complaints)


@contextlib.contextmanager
def audited(url: str, queues: Collection[str] = ("celery",)) -> Iterator[None]:
    """Look after each test while the block lasts, and at its end."""
    _watched[url] = queues
    try:
        yield
        audit(url, queues)
    finally:
        del _watched[url]


def audit_watched() -> None:
    """Look at every server that is watched."""
    for url, queues in list(_watched.items()):
        audit(url, queues)
