"""Every script that runs in Redis, as a typed function that returns words.

The Lua is in `broker/lua/`; each file begins with a glossary of its keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import redis
from redis.commands.core import Script
from redis.exceptions import NoScriptError

from broker import keys
from broker.claims import Asking, Claims, Running
from broker.sources import sha_of, source

if TYPE_CHECKING:
    from broker.producing import Put

_A_SCRIPT = 200
"""Messages that one script touches, at most."""


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

    def claim_command(self, asking: Asking) -> list[Any]:
        """The command that claims. `Claims.of` reads the answer."""
        names = asking.keys
        return ["EVALSHA", self._claim_sha, len(names), *names, *asking.arguments]

    def claim(self, asking: Asking) -> Claims:
        """Claim over this client, waiting for the reply."""
        command = self.claim_command(asking)
        try:
            reply = self.client.execute_command(*command)  # type: ignore[no-untyped-call]
        except NoScriptError:
            self.load_claim()
            reply = self.client.execute_command(*command)  # type: ignore[no-untyped-call]
        return Claims.of(asking, reply)

    def put(
        self, list_name: str, queue: str, payload: str, due_ms: int | None
    ) -> Literal["queued", "delayed"]:
        """Put a message into a queue's list, or aside until it is due. Raises `BrokerFull`."""
        from broker.producing import Put, Putter

        (word,) = Putter(self.client).put([Put(list_name, queue, payload, "", due_ms)])
        return "delayed" if word == "delayed" else "queued"

    def purge_delayed(self, queue: str) -> int:
        """Remove what waits beside a queue until it is due. How many that was."""
        with self.client.pipeline() as pipeline:
            pipeline.zcard(keys.delayed(queue))
            pipeline.delete(keys.delayed(queue))
            count, _ = pipeline.execute()
        return int(count)

    @cached_property
    def _requalify(self) -> Script:
        return self._script("requalify")

    def requalify(
        self,
        member: str,
        claim_id: str,
        queue: str,
        key: str,
        due_ms: int | None,
        *,
        needs: str = "",
        conflict: str = "wait",
        fits: bool = True,
    ) -> Literal["locked", "settled", "parked", "delayed", "waiting", "superseded"]:
        """Give a claim what its producer hasn't said of it: key, needs or due time; `conflict` if
        that was a stock one. After 'locked' and 'settled' it is still this node's.
        """
        word: bytes = self._requalify(
            keys=[
                keys.claims(member),
                keys.LOCKS,
                keys.PARKED,
                keys.SEQUENCE,
                keys.delayed(queue),
                keys.READY,
                keys.BELL,
                keys.WAITING,
                keys.SHAPES,
                keys.CLAIMED,
            ],
            args=[
                claim_id,
                key,
                "" if due_ms is None else due_ms,
                needs,
                conflict,
                "1" if fits else "0",
            ],
        )
        return word.decode()  # type: ignore[return-value]

    @cached_property
    def _finish(self) -> Script:
        return self._script("finish")

    def finish(
        self, member: str, claim_ids: Sequence[str]
    ) -> list[Literal["finished", "superseded"]]:
        """Acknowledge claims and hand their locks on."""
        words: list[Any] = []
        for at in range(0, len(claim_ids), _A_SCRIPT):
            words += self._finish(
                keys=finish_keys(member), args=list(claim_ids[at : at + _A_SCRIPT])
            )
        return [word.decode() for word in words]

    @cached_property
    def _requeue(self) -> Script:
        return self._script("requeue")

    def requeue(self, member: str, claim_id: str, put: Put) -> Literal["finished", "superseded"]:
        """Acknowledge a claim and put its task's next try, in one step."""
        word: bytes = self._requeue(
            keys=[*_end_keys(member), put.list, keys.delayed(put.queue), keys.EXPIRING],
            args=[
                claim_id,
                put.payload,
                "" if put.due_ms is None else put.due_ms,
                put.expires[1] if put.expires else "",
            ],
        )
        return word.decode()  # type: ignore[return-value]

    @cached_property
    def _bury(self) -> Script:
        return self._script("bury")

    def bury(self, member: str, claim_id: str, reason: str) -> Literal["finished", "superseded"]:
        """Acknowledge a claim and keep its message among the dead letters."""
        word: bytes = self._bury(
            keys=[*_end_keys(member), keys.DEAD, keys.EXPIRING], args=[claim_id, reason]
        )
        return word.decode()  # type: ignore[return-value]

    @cached_property
    def _adopt(self) -> Script:
        return self._script("adopt")

    def adopt(
        self, member: str, running: Sequence[Running], *, emptied: bool
    ) -> list[Literal["adopted", "taken"]]:
        """Take up again what runs here since before the lease had ended, if nobody has it."""
        words: list[Any] = []
        for at in range(0, len(running), 50):
            arguments: list[Any] = ["1" if emptied else "0"]
            for one in running[at : at + 50]:
                arguments += [one.claimed.claim_id, one.task, one.facts, one.claimed.payload]
            words += self._adopt(
                keys=[keys.claims(member), keys.LOCKS, keys.READY, keys.CLAIMED], args=arguments
            )
        return [word.decode() for word in words]

    @cached_property
    def _settle(self) -> Script:
        return self._script("settle")

    def settle(self, task_id: str, reason: str) -> Literal["settled", "running"]:
        """From now on a task that waits anywhere isn't run: whoever comes by it says so."""
        word: bytes = self._settle(keys=[keys.CLAIMED, keys.SETTLED], args=[task_id, reason])
        return word.decode()  # type: ignore[return-value]

    @cached_property
    def _expired(self) -> Script:
        return self._script("expired")

    def expired(self, tasks: Sequence[tuple[str, int]]) -> int:
        """What expired then (ms) has been seen to, unless it was given more time. How many went."""
        arguments = [argument for task in tasks for argument in task]
        return int(self._expired(keys=[keys.EXPIRING], args=arguments))

    @cached_property
    def _retry_dead(self) -> Script:
        return self._script("retry_dead")

    def retry_dead(
        self, task_id: str, letter: bytes, list_name: str, message: str
    ) -> Literal["retried", "gone"]:
        """Put a dead letter's new message into its list, if that letter is still there."""
        word: bytes = self._retry_dead(
            keys=[keys.DEAD, list_name, keys.BELL], args=[task_id, letter, message]
        )
        return word.decode()  # type: ignore[return-value]

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

    def register(self, member: str, lease: float, description: str) -> str:
        """Begin an incarnation's lease of so many seconds. The name of this Redis, which is another
        one after it was emptied.
        """
        birth: bytes = self._register(
            keys=[keys.LEASES, keys.NODES, keys.BIRTH],
            args=[member, int(lease * 1000), description, member],
        )
        return birth.decode()

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
                keys=[
                    *_return_keys(member),
                    keys.LEASES,
                    keys.NODES,
                    keys.SPARE,
                    keys.RESERVED,
                    keys.own_bell(member),
                ],
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


def finish_keys(member: str) -> list[str]:
    """Every key that the script touches which acknowledges claims."""
    return [*_end_keys(member), keys.own_bell(member), keys.SETTLED, keys.EXPIRING, keys.SHAPES]


def _end_keys(member: str) -> list[str]:
    return [
        keys.claims(member),
        keys.LOCKS,
        keys.PARKED,
        keys.READY,
        keys.DELIVERIES,
        keys.BELL,
        keys.CLAIMED,
    ]


def _return_keys(member: str) -> list[str]:
    return [
        keys.claims(member),
        keys.LOCKS,
        keys.PARKED,
        keys.READY,
        keys.SEQUENCE,
        keys.DELIVERIES,
        keys.BELL,
        keys.CLAIMED,
    ]
