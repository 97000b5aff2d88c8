"""How messages travel: Celery's Redis transport, with claims where stock has a visibility timeout.

A producer's side and everything that isn't a task (events, broadcast, replies) is kombu's own
Redis transport. In a worker, which has called `consume_as`, a channel claims: message, claim and
lock move in one script. An idle worker blocks on the bell, at most for 100 ms, with its next claim
already sent behind it: Redis runs that in the moment in which the bell wakes it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from queue import Empty
from typing import Any

import redis
from kombu.asynchronous import set_event_loop
from kombu.log import get_logger
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.json import loads
from redis.exceptions import NoScriptError

from broker import keys
from broker.claimant import CLAIM_PREFIX, Claimant
from broker.claims import Asking, Claimed, Claims
from broker.needs import Needs
from broker.producing import ProducingChannel, due_ms
from broker.scripts import Scripts
from broker.turns import MOST_AT_ONCE
from errors import Refused

logger = get_logger(__name__)

_SAFETY_POLL = 0.1


_claimant: Claimant | None = None
_on_handed_over: Callable[[], object] | None = None
_is_ending: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Qualities:
    """What a message's task is, if its producer didn't say: a stock one knows nothing of it."""

    key: str = ""
    needs: Needs = Needs()
    conflict: str = "wait"


_qualities_of: Callable[[Mapping[str, Any]], Qualities] = lambda message: Qualities()  # noqa: E731


def consume_as(
    claimant: Claimant | None,
    on_handed_over: Callable[[], object] | None = None,
    is_ending: Callable[[], bool] | None = None,
) -> None:
    """From now on this process claims on behalf of that node; None: it is no worker.

    `on_handed_over` is called when what one look brought has been handed to the worker; to one that
    `is_ending` nothing is.
    """
    global _claimant, _on_handed_over, _is_ending
    _claimant, _on_handed_over, _is_ending = claimant, on_handed_over, is_ending


def current_claimant() -> Claimant | None:
    """On whose behalf this process claims."""
    return _claimant


def qualify_with(qualities_of: Callable[[Mapping[str, Any]], Qualities]) -> None:
    """How to find out what a message is that a stock producer wrote."""
    global _qualities_of
    _qualities_of = qualities_of


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
            virtual.QoS.ack(self, delivery_tag)
            _claimant.finish(delivery_tag)
            _claimant.end(delivery_tag)
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if _claimant is not None and self._is_claim(delivery_tag):
            if requeue:
                _claimant.give_back(delivery_tag)
            else:
                _claimant.finish(delivery_tag)
                _claimant.end(delivery_tag)
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().reject(delivery_tag, requeue=requeue)

    def release(self, delivery_tag: str) -> None:
        """Its place is free for another; how its claim ends is up to the node."""
        virtual.QoS.ack(self, delivery_tag)
        if _claimant is not None:
            _claimant.end(delivery_tag)

    def restore_unacked_once(self, stderr: Any = None) -> None:
        # What the pool runs goes on without its channel. The rest is forgotten, and the next
        # renewal of the lease (or leaving) gives it back: no round trip on a broken connection.
        if _claimant is not None:
            tags = [tag for tag in self._delivered if self._is_claim(tag)]
            for tag in tags:
                self._delivered.pop(tag, None)
            _claimant.forget_unbegun(tags)
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
        self._asked: Asking | None = None
        self._turns_asked = 0
        self._idle = False
        self._behind_bell = False
        """Whether the bell's answer comes before the claim's."""
        self._busy = (-1, 0.0)
        self._refused = False
        self._lists: dict[tuple[str, ...], tuple[list[tuple[str, str]], list[str]]] = {}
        self._scripts = Scripts(self._create_client())

    # The worker's half: ask, then read, on the event loop's own connection.

    def _claims(self) -> bool:
        return _claimant is not None and not self.auto_delete_queues.intersection(
            self.active_queues
        )

    def _brpop_start(self, timeout: float | None = None) -> None:
        self._drop_unanswered()
        if not self._claims():
            self._idle = False
            super()._brpop_start(timeout)
            return
        assert _claimant is not None
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        if not self._idle and (_claimant.has_enough() or self._is_busy(_claimant)):
            return  # Asked again at a later turn of the loop: few looks that bring many.
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        self._asked = self._ask(_claimant, queues)
        self._turns_asked, self._behind_bell = _claimant.turns, self._idle
        commands = [self._scripts.claim_command(self._asked)]
        if self._idle:
            # It claims what there is room for now. What ends while it waits isn't counted, which
            # makes it modest and never wrong; and it waits no longer than the safety poll.
            own = keys.own_bell(_claimant.member)
            commands.insert(0, ["BRPOP", keys.BELL, own, _SAFETY_POLL])
        connection.send_packed_command(connection.pack_commands(commands))

    def _ask(self, claimant: Claimant, queues: Sequence[str]) -> Asking:
        lists, tops = self._served(tuple(queues))
        most = self.qos.can_consume_max_estimate()
        return claimant.ask(MOST_AT_ONCE if most is None else most, queues, lists, tops)

    def _served(self, queues: tuple[str, ...]) -> tuple[list[tuple[str, str]], list[str]]:
        if queues not in self._lists:
            lists = [
                (self._q_for_pri(queue, priority), queue)
                for priority in self.priority_steps
                for queue in queues
            ]
            # The order goes round as they are served: only that of now is kept.
            self._lists = {queues: (lists, [top for top in self._tops for _ in queues])}
        return self._lists[queues]

    def _is_busy(self, claimant: Claimant) -> bool:
        """Whether no process was idle at the last look, and nothing has begun or ended since."""
        turns, until = self._busy
        return turns == claimant.turns and time.monotonic() < until

    @cached_property
    def _tops(self) -> list[str]:
        """For each step of priority the last priority that it serves."""
        after = [*self.priority_steps[1:], 10]
        return [str(min(9, step - 1)) for step in after]

    def _brpop_read(self, **options: Any) -> bool:
        if self._asked is None:
            if not self._in_poll:
                # Nothing was asked: the server has hung up, or we have, in this turn of the loop.
                # To read now would be to wait for ever.
                self._hang_up()
                raise Empty
            return bool(super()._brpop_read(**options))
        if self._behind_bell and not self._bell_has_rung(**options):
            raise Empty
        asked, self._asked = self._asked, None
        claims: Claims | None = None
        try:
            reply = self._read_reply(**options)
            if reply is None:
                self._idle = False
            else:
                claims = Claims.of(asked, reply)
                # Whatever is put after that look has rung the bell. If it brought nothing to a node
                # that has more room by now than it said, that room is worth a look of its own.
                same = _claimant is not None and _claimant.turns == self._turns_asked
                self._idle = claims.word in ("all", "expelled") and (same or bool(claims.claimed))
                if claims.word == "busy" and _claimant is not None:
                    self._busy = (_claimant.turns, time.monotonic() + _SAFETY_POLL)
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
            if _claimant is not None:
                if claims is None:
                    _claimant.unanswered(asked)
                elif not _claimant.answered(asked, claims):
                    claims = None
        if claims is None or not self._hand_over_all(claims.claimed):
            raise Empty
        return True

    def _bell_has_rung(self, **options: Any) -> bool:
        """Read the bell's answer. Whether the claim's is there as well, as it mostly is."""
        connection = self.client.connection
        try:
            self.client.parse_response(connection, "BRPOP", **options)
            self._behind_bell = False
            return bool(connection.can_read(0))
        except self.connection_errors:
            self._hang_up()
            raise
        except redis.ResponseError:
            self._behind_bell = False  # The claim behind it hears the same, and says so.
            return bool(connection.can_read(0))

    def _hand_over_all(self, claimed: Sequence[Claimed]) -> bool:
        """Whether there was one for the worker."""
        handed, left = 0, deque(claimed)
        if claimed and _claimant is not None and _is_ending is not None and _is_ending():
            # Its loop takes this turn to its end, and hears of nothing that begins now. What it
            # had asked for while it was idle may just have come: the next renewal returns it.
            for one in claimed:
                _claimant.forget(one.claim_id)
            return False
        try:
            while left:
                handed += self._hand_over(left.popleft())
        except BaseException:
            # Nobody would ever begin them: the next renewal returns them.
            for one in left:
                if _claimant is not None:
                    _claimant.forget(one.claim_id)
            raise
        if handed and _on_handed_over is not None:
            _on_handed_over()
        return handed > 0

    def _hang_up(self) -> None:
        # The next look connects anew; the claim, if there was one, goes back.
        self._idle = False
        self.client.connection.disconnect()

    def _read_reply(self, **options: Any) -> Any:
        try:
            reply = self.client.parse_response(self.client.connection, "EVALSHA", **options)
        except self.connection_errors:
            self._hang_up()
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
        self._refused = False
        return reply

    def _hand_over(self, claimed: Claimed) -> bool:
        """Give a claimed message to the worker, unless it turns out not to be for it now."""
        assert _claimant is not None
        try:
            message = self._qualified(claimed)
        except (redis.RedisError, OSError) as error:
            # Not the worker's yet: the next renewal returns it.
            _claimant.forget(claimed.claim_id)
            logger.error("queue %s: a claimed message goes back: %s", claimed.queue, error)
            return False
        if message is None:
            return False
        self._queue_cycle.rotate(claimed.queue)
        if _claimant.on_claim is not None:
            _claimant.on_claim(claimed, message["headers"])
        self.connection._deliver(message, claimed.queue)
        return True

    def _qualified(self, claimed: Claimed) -> dict[str, Any] | None:
        assert _claimant is not None
        message = self._read_message(claimed)
        if message is None:
            return None
        headers, settled = message["headers"], claimed.settled
        about = headers.get("cohort")
        if not isinstance(about, dict):
            about = {"key": claimed.key}
        _claimant.named(claimed.claim_id, headers.get("task") or "")
        due = due_ms(headers)
        late = due is not None and due > time.time() * 1000
        if not settled and (late or not claimed.qualified):
            qualities = (
                Qualities(claimed.key, Needs.parse(claimed.needs))
                if claimed.qualified
                else _qualities_of(message)
            )
            word = self._requalify(claimed, qualities, due if late else None)
            if word not in ("locked", "settled"):
                _claimant.forget(claimed.claim_id)
                return None
            settled = "skipped: its key was locked" if word == "settled" else ""
            if not claimed.qualified:
                about = {"key": qualities.key}
        # Redis has waited for it, on its own clock; the worker's needn't agree.
        headers["eta"] = None
        headers["cohort"] = about
        headers["cohort_claim"] = claimed.claim_id
        headers["cohort_lost"] = claimed.lost_deliveries
        if settled:
            headers["cohort_settled"] = settled
        message["properties"]["delivery_tag"] = claimed.claim_id
        return message

    def _requalify(self, claimed: Claimed, qualities: Qualities, due: int | None) -> str:
        """Tell Redis what the message of a stock producer is. 'locked': it may run."""
        assert _claimant is not None
        if due is None and qualities == Qualities():
            return "locked"
        # It is held already, as one that needs nothing.
        fits = claimed.qualified or _claimant.has_spare(qualities.needs)
        word = self._scripts.requalify(
            _claimant.member,
            claimed.claim_id,
            claimed.queue,
            qualities.key,
            due,
            needs=qualities.needs.text,
            conflict=qualities.conflict,
            fits=fits,
        )
        if word == "locked":
            _claimant.needs(claimed.claim_id, qualities.needs, qualities.key)
        return word

    def _read_message(self, claimed: Claimed) -> dict[str, Any] | None:
        assert _claimant is not None
        try:
            message: dict[str, Any] = loads(claimed.payload.decode())
            self.Message(message, channel=self)
        except Exception:
            # The server's JSON is laxer than ours.
            logger.exception("queue %s: not a task message, moved to %s", claimed.queue, keys.DEAD)
            _claimant.finish_now([claimed.claim_id], "it is no task message")
            return None
        return message

    def _basic_cancel(self, consumer_tag: str) -> Any:
        canceled = super()._basic_cancel(consumer_tag)
        if self._asked is not None:
            # It may name that queue, and nobody may read the answer: a worker that ends stops to
            # read now, and its claims are its own until its last job has ended. Redis drops what
            # a client has waiting when that hangs up; if it has been done, the renewal returns it.
            if self._in_poll:
                self._hang_up()
            self._drop_unanswered()
        return canceled

    def _drop_unanswered(self) -> None:
        # The connection broke between asking and reading. The renewal returns what was claimed.
        if self._asked is not None and _claimant is not None:
            _claimant.unanswered(self._asked)
        self._asked = None

    def _purge(self, queue: str) -> int:
        # With what waits beside it until it is due.
        delayed = self._scripts.purge_delayed(queue)
        return int(super()._purge(queue)) + delayed

    def close(self) -> None:
        super().close()
        self._drop_unanswered()


class Transport(stock.Transport):  # type: ignore[misc]
    """Kombu's Redis transport with Cohort's claims."""

    Channel = Channel

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """As kombu does it, except that a socket which the loop knows isn't told to it again at
        each of its turns: two system calls a turn, and a turn or two a job.
        """
        # Kombu forgets the loop that it resets after a lost connection. Celery asks for it when it
        # ends: what has ended is acknowledged by it while something else still runs.
        set_event_loop(loop)
        before = set(loop.on_tick)
        super().register_with_event_loop(connection, loop)
        (stocks,) = set(loop.on_tick) - before
        loop.on_tick.remove(stocks)
        cycle, told = self.cycle, dict[int, Any]()

        def on_poll_start() -> None:
            cycle.on_poll_start()
            # Known by the socket, not by its number, which another one may have by now.
            sockets = {sock.fileno(): sock for sock in cycle._chan_to_sock.values()}
            for number in cycle.fds:
                if number not in loop.readers or told.get(number) is not sockets.get(number):
                    loop.add_reader(number, self.on_readable, number)
                    told[number] = sockets.get(number)

        loop.on_tick.add(on_poll_start)
