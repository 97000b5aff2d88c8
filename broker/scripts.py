"""Every script that runs in Redis, as a typed function that returns words.

The Lua is in `broker/lua/`; each file begins with a glossary of its keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import redis
from redis.commands.core import Script
from redis.exceptions import NoScriptError

from broker import keys

_LUA = Path(__file__).parent / "lua"

# At the memory limit new jobs are refused; those already accepted go on to their end.
_EVEN_WHEN_FULL = "#!lua flags=allow-oom\n"
_WHEN_ROOM = "#!lua\n"


def source(name: str) -> str:
    """The whole text of one script, with what it shares with the others."""
    header = _WHEN_ROOM if name == "put" else _EVEN_WHEN_FULL
    prelude = (_LUA / "prelude.lua").read_text("utf-8")
    return header + prelude + (_LUA / f"{name}.lua").read_text("utf-8")


def sha_of(text: str) -> str:
    """How Redis names a script: SHA-1 of its text (EVALSHA in the Redis manual)."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Claimed:
    """What a claim brought."""

    queue: str
    payload: bytes
    lost_deliveries: int
    key: str
    qualified: bool
    """Whether its key is known; for a stock producer's message the worker must find it."""


ClaimReply = Claimed | Literal["nothing", "again", "expelled"]


class Scripts:
    """The scripts on one Redis. Safe to share between threads."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client

    def _script(self, name: str) -> Script:
        return self.client.register_script(source(name))

    # Claiming is sent over the event loop's own connection, in two halves.

    @cached_property
    def _claim_sha(self) -> str:
        return sha_of(source("claim"))

    def load_claim(self) -> None:
        """Make the claim script known to a server that has forgotten it."""
        self.client.script_load(source("claim"))

    def claim_command(
        self, member: str, claim_id: str, queues: Sequence[str], lists: Sequence[tuple[str, str]]
    ) -> list[Any]:
        """The command that claims. `lists` are (Redis list, queue), the first served first."""
        names = [
            keys.claims(member),
            keys.LOCKS,
            keys.PARKED,
            keys.READY,
            keys.SEQUENCE,
            keys.DELIVERIES,
            keys.BELL,
            keys.LEASES,
            keys.DEAD,
            *(keys.delayed(queue) for queue in queues),
            *(name for name, _ in lists),
        ]
        arguments = [member, claim_id, len(queues), *queues, *(queue for _, queue in lists)]
        return ["EVALSHA", self._claim_sha, len(names), *names, *arguments]

    @staticmethod
    def claim_reply(reply: Sequence[bytes]) -> ClaimReply:
        """What the server said to `claim_command`."""
        word = reply[0]
        if word == b"claimed":
            _, queue, payload, lost, key, ours = reply
            return Claimed(queue.decode(), payload, int(lost), key.decode(), ours == b"1")
        if word == b"again":
            return "again"
        return "expelled" if word == b"expelled" else "nothing"

    def claim(
        self, member: str, claim_id: str, queues: Sequence[str], lists: Sequence[tuple[str, str]]
    ) -> ClaimReply:
        """Claim over this client, waiting for the reply."""
        command = self.claim_command(member, claim_id, queues, lists)
        try:
            reply = self.client.execute_command(*command)  # type: ignore[no-untyped-call]
        except NoScriptError:
            self.load_claim()
            reply = self.client.execute_command(*command)  # type: ignore[no-untyped-call]
        return self.claim_reply(reply)

    def put(
        self, list_name: str, queue: str, payload: str, due_ms: int | None
    ) -> Literal["queued", "delayed"]:
        """Put a message into a queue's list, or aside until it is due. Raises `BrokerFull`."""
        from broker.producing import Put, Putter

        (word,) = Putter(self.client).put([Put(list_name, queue, payload, "", due_ms)])
        return "delayed" if word == "delayed" else "queued"

    @cached_property
    def _requalify(self) -> Script:
        return self._script("requalify")

    def requalify(
        self, member: str, claim_id: str, queue: str, key: str, due_ms: int | None
    ) -> Literal["locked", "parked", "delayed", "superseded"]:
        """Give a bare claim its key or its due time. Only 'locked' leaves it with this node."""
        word: bytes = self._requalify(
            keys=[
                keys.claims(member),
                keys.LOCKS,
                keys.PARKED,
                keys.SEQUENCE,
                keys.delayed(queue),
                keys.READY,
                keys.BELL,
            ],
            args=[claim_id, key, "" if due_ms is None else due_ms],
        )
        return word.decode()  # type: ignore[return-value]

    @cached_property
    def _finish(self) -> Script:
        return self._script("finish")

    def finish(self, member: str, claim_id: str) -> Literal["finished", "superseded"]:
        """Acknowledge a claim and hand its lock on."""
        word = self._finish(
            keys=[
                keys.claims(member),
                keys.LOCKS,
                keys.PARKED,
                keys.READY,
                keys.DELIVERIES,
                keys.BELL,
            ],
            args=[claim_id],
        )
        return "finished" if word == b"finished" else "superseded"

    @cached_property
    def _give_back(self) -> Script:
        return self._script("give_back")

    def give_back(
        self, member: str, claim_id: str, *, lost: bool = False
    ) -> Literal["given back", "superseded"]:
        """Return a claim to the front; `lost` counts against its limit of deliveries."""
        word = self._give_back(keys=_return_keys(member), args=[claim_id, "1" if lost else "0"])
        return "given back" if word == b"given back" else "superseded"

    @cached_property
    def _register(self) -> Script:
        return self._script("register")

    def register(self, member: str, lease: float, description: str) -> None:
        """Begin an incarnation's lease of so many seconds."""
        self._register(
            keys=[keys.LEASES, keys.NODES], args=[member, int(lease * 1000), description]
        )

    @cached_property
    def _renew(self) -> Script:
        return self._script("renew")

    def renew(
        self, member: str, lease: float, asked: int, known: Iterable[str]
    ) -> Literal["renewed", "expelled"]:
        """Renew a lease; claims up to the one numbered `asked` that aren't `known` go back."""
        word = self._renew(
            keys=[*_return_keys(member), keys.LEASES],
            args=[member, int(lease * 1000), asked, *known],
        )
        return "renewed" if word == b"renewed" else "expelled"

    @cached_property
    def _reap(self) -> Script:
        return self._script("reap")

    def reap(self, member: str) -> int | None:
        """Return the claims of an expired incarnation. How many, or None if it lives."""
        return self._return_all(member, leaves=False)

    def leave(self, member: str) -> int:
        """Return this node's claims and end its lease."""
        return self._return_all(member, leaves=True) or 0

    def _return_all(self, member: str, *, leaves: bool) -> int | None:
        returned = 0
        while True:
            reply = self._reap(
                keys=[*_return_keys(member), keys.LEASES, keys.NODES],
                args=[member, "1" if leaves else "0"],
            )
            if reply[0] == b"alive":
                return None
            returned += int(reply[1])
            if reply[0] == b"reaped":
                return returned

    @cached_property
    def _lead(self) -> Script:
        return self._script("lead")

    def lead(self, duty: str, token: str, lease: float) -> bool:
        """Take or keep the lead of a duty for so many seconds."""
        word: bytes = self._lead(keys=[keys.leader(duty)], args=[token, int(lease * 1000)])
        return word == b"leading"

    @cached_property
    def _announce(self) -> Script:
        return self._script("announce")

    def announce(
        self, name: str, meta: bytes | str, expires: float | None
    ) -> Literal["announced", "kept"]:
        """Publish a task's state under a key, unless a final one stands there."""
        reply = self._announce(keys=[name], args=[1, int((expires or 0) * 1000), meta])
        return "announced" if reply[0] == b"announced" else "kept"


def _return_keys(member: str) -> list[str]:
    return [
        keys.claims(member),
        keys.LOCKS,
        keys.PARKED,
        keys.READY,
        keys.SEQUENCE,
        keys.DELIVERIES,
        keys.BELL,
    ]
