"""How messages travel: Celery's Redis transport, with claims where stock has a visibility timeout.

A producer's side and everything that isn't a task (events, broadcast, replies) is kombu's own
Redis transport. In a worker, which has called `consume_as`, a channel claims: message, claim and
lock move in one script. An idle worker blocks on the bell and looks again every 100 ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from queue import Empty
from typing import Any

import redis
from kombu.log import get_logger
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.json import loads
from redis.exceptions import NoScriptError

from broker import journal, keys
from broker.claimant import CLAIM_PREFIX, Claimant
from broker.journal import Note
from broker.producing import ProducingChannel, due_ms
from broker.scripts import Claimed, Scripts
from errors import Refused

logger = get_logger(__name__)

_SAFETY_POLL = 0.1


def _nowhere(note: Note) -> float:
    raise Refused("a durable job can't be submitted here: nobody makes notes of jobs")


_claimant: Claimant | None = None
_write_down: Callable[[Note], float] = _nowhere
_key_of: Callable[[Mapping[str, Any]], str] = lambda message: ""  # noqa: E731


def consume_as(claimant: Claimant | None) -> None:
    """From now on this process claims on behalf of that node; None: it is no worker."""
    global _claimant
    _claimant = claimant


def current_claimant() -> Claimant | None:
    """On whose behalf this process claims."""
    return _claimant


def qualify_with(key_of: Callable[[Mapping[str, Any]], str]) -> None:
    """How to find the job key of a message that a stock producer wrote ('' for none)."""
    global _key_of
    _key_of = key_of


def note_with(write_down: Callable[[Note], float]) -> None:
    """How a producer makes a note of a durable job; it returns for how long, in seconds."""
    global _write_down
    _write_down = write_down


class ClaimQoS(stock.QoS):  # type: ignore[misc]
    """Acknowledging ends a claim; what hasn't begun when a channel closes goes back."""

    channel: Channel

    def append(self, message: Any, delivery_tag: str) -> None:
        if self._is_claim(delivery_tag):
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        if _claimant is not None and self._is_claim(delivery_tag):
            _claimant.finish(delivery_tag)
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if _claimant is not None and self._is_claim(delivery_tag):
            if requeue:
                _claimant.give_back(delivery_tag)
            else:
                _claimant.finish(delivery_tag)
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().reject(delivery_tag, requeue=requeue)

    def release(self, delivery_tag: str) -> None:
        """Its place is free for another; how its claim ends is up to the node."""
        virtual.QoS.ack(self, delivery_tag)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        # What the pool runs goes on without its channel. The rest is forgotten, and the next
        # renewal of the lease (or leaving) gives it back: no round trip on a broken connection.
        if _claimant is not None:
            for tag in list(self._delivered):
                if self._is_claim(tag):
                    if not _claimant.has_begun(tag):
                        _claimant.forget(tag)
                    self._delivered.pop(tag, None)
        super().restore_unacked_once(stderr)

    @staticmethod
    def _is_claim(tag: str) -> bool:
        return _claimant is not None and tag.startswith(CLAIM_PREFIX)


class Channel(ProducingChannel):
    """A channel that claims when its process is a worker."""

    QoS = ClaimQoS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.global_keyprefix:
            raise Refused(
                "broker_transport_options: global_keyprefix isn't supported; "
                "give each fleet a Redis database of its own"
            )
        self._asked: str | None = None
        self._idle = False
        self._refused = False
        self._scripts = Scripts(self._create_client())

    def keep_note(self, queue: str, list_name: str, text: str, due: int | None) -> float:
        """Before a durable job is put: make a note of it. For how long it is kept, in seconds."""
        return _write_down(journal.note_of(queue, list_name, text, due))

    # The worker's half: ask, then read, on the event loop's own connection.

    def _claims(self) -> bool:
        return _claimant is not None and not self.auto_delete_queues.intersection(
            self.active_queues
        )

    def _brpop_start(self, timeout: float | None = None) -> None:
        if not self._claims():
            self._idle = False  # What is read next is a message, not the bell.
            super()._brpop_start(timeout)
            return
        assert _claimant is not None
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        self._drop_unanswered()
        self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        if self._idle:
            command: list[Any] = ["BRPOP", keys.BELL, _SAFETY_POLL]
        else:
            lists = [
                (self._q_for_pri(queue, priority), queue)
                for priority in self.priority_steps
                for queue in queues
            ]
            self._asked = _claimant.expect()
            command = self._scripts.claim_command(_claimant.member, self._asked, queues, lists)
        self.client.connection.send_command(*command)

    def _brpop_read(self, **options: Any) -> bool:
        if self._asked is None and not self._idle:
            return bool(super()._brpop_read(**options))
        asked, self._asked = self._asked, None
        claimed: Claimed | None = None
        try:
            reply = self._read_reply("BRPOP" if asked is None else "EVALSHA", **options)
            if asked is None or reply is None:
                self._idle = False
            else:
                answer = Scripts.claim_reply(reply)
                if isinstance(answer, Claimed):
                    claimed = answer
                else:
                    self._idle = answer != "again"
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
            if asked is not None and claimed is None and _claimant is not None:
                _claimant.forget(asked)
        if claimed is None or asked is None or not self._hand_over(asked, claimed):
            raise Empty
        return True

    def _read_reply(self, command: str, **options: Any) -> Any:
        try:
            reply = self.client.parse_response(self.client.connection, command, **options)
        except self.connection_errors:
            # Disconnected, the next look connects anew; the claim, if there was one, goes back.
            self._idle = False
            self.client.connection.disconnect()
            raise
        except NoScriptError:
            self._scripts.load_claim()
            return None
        except redis.ResponseError as error:
            # A failover says READONLY or LOADING for a while. That is no reason to end a worker.
            # Said once; and a pause, since the bell is refused as well.
            if not self._refused:
                logger.error("Redis refuses claims, asking on: %s", error)
            self._refused = True
            time.sleep(_SAFETY_POLL)
            return None
        if command == "EVALSHA":
            self._refused = False
        return reply

    def _hand_over(self, claim_id: str, claimed: Claimed) -> bool:
        """Give a claimed message to the worker, unless it turns out not to be due or free."""
        assert _claimant is not None
        try:
            message = self._qualified(claim_id, claimed)
        except redis.RedisError as error:
            # Not the worker's yet: the next renewal returns it.
            _claimant.forget(claim_id)
            if isinstance(error, self.connection_errors):
                raise
            logger.error("queue %s: a claimed message goes back: %s", claimed.queue, error)
            return False
        if message is None:
            return False
        self._queue_cycle.rotate(claimed.queue)
        if _claimant.on_claim is not None:
            priority = self._get_message_priority(message, reverse=False)
            list_name = self._q_for_pri(claimed.queue, priority)
            _claimant.on_claim(claim_id, claimed, list_name, message["headers"])
        self.connection._deliver(message, claimed.queue)
        return True

    def _qualified(self, claim_id: str, claimed: Claimed) -> dict[str, Any] | None:
        assert _claimant is not None
        message = self._read_message(claim_id, claimed)
        if message is None:
            return None
        headers = message["headers"]
        due = due_ms(headers)
        key = claimed.key if claimed.qualified else _key_of(message)
        not_due = due is not None and due > time.time() * 1000
        if not_due or (key and not claimed.qualified):
            word = self._scripts.requalify(
                _claimant.member, claim_id, claimed.queue, key, due if not_due else None
            )
            if word != "locked":
                _claimant.forget(claim_id)
                return None
        # Redis has waited for it, on its own clock; the worker's needn't agree.
        headers["eta"] = None
        if not isinstance(headers.get("cohort"), dict):
            headers["cohort"] = {"key": key}
        headers["cohort_claim"] = claim_id
        headers["cohort_lost"] = claimed.lost_deliveries
        message["properties"]["delivery_tag"] = claim_id
        return message

    def _read_message(self, claim_id: str, claimed: Claimed) -> dict[str, Any] | None:
        assert _claimant is not None
        try:
            message: dict[str, Any] = loads(claimed.payload.decode())
            self.Message(message, channel=self)
        except Exception:
            # The server's JSON is laxer than ours. Kept aside first: twice there beats nowhere.
            logger.exception("queue %s: not a task message, moved to %s", claimed.queue, keys.DEAD)
            self._scripts.client.lpush(keys.DEAD, claimed.payload)
            _claimant.finish_now(claim_id)
            return None
        return message

    def _drop_unanswered(self) -> None:
        # The connection broke between asking and reading. The renewal returns what was claimed.
        if self._asked is not None and _claimant is not None:
            _claimant.forget(self._asked)
        self._asked = None

    def close(self) -> None:
        super().close()
        self._drop_unanswered()


class Transport(stock.Transport):  # type: ignore[misc]
    """Kombu's Redis transport with Cohort's claims."""

    Channel = Channel
