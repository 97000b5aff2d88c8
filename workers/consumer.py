"""Celery's consumer, which forgets no job that runs, and leaves a task that it doesn't know to
those that may.

While a fleet is upgraded, old workers meet tasks that only the new ones know. Such a message waits
for a moment and is offered again; after a grace it is dead-lettered, which is an outcome.
"""

from __future__ import annotations

import json
import time
from typing import Any

import redis
from celery.exceptions import NotRegistered
from celery.utils.log import get_logger
from celery.utils.objects import Bunch
from celery.worker.consumer import Consumer

from broker.claimant import Claimant
from broker.claims import Claimed
from broker.deadletters import UNKNOWN_SINCE
from broker.producing import Put
from broker.transport import current_claimant
from tasks.settings import current
from workers.pipes import hear_what_has_begun

logger = get_logger(__name__)

_OFFERED_AGAIN_MS = 2000


class FleetConsumer(Consumer):  # type: ignore[misc]
    """The consumer of a node of the fleet."""

    def on_close(self) -> None:
        """Its connection is lost, or the worker ends."""
        hear_what_has_begun(self.pool)
        super().on_close()

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Offer it again until its grace has passed."""
        claimant = current_claimant()
        claim_id = str(message.delivery_tag)
        if claimant is None or not claimant.knows(claim_id):
            super().on_unknown_task(body, message, exc)
            return
        now = int(time.time() * 1000)
        since = int(message.headers.get(UNKNOWN_SINCE) or now)
        if now - since < current().unknown_grace * 1000:
            logger.warning("task %s isn't known here; it is offered again", message.headers["task"])
            claimed = claimant.claimed(claim_id)
            if claimed is not None:
                message.channel.qos.release(claim_id)
                self._offer_again(claimant, claimed, since, now + _OFFERED_AGAIN_MS)
            return
        self._bury(message, exc)

    def _offer_again(self, claimant: Claimant, claimed: Claimed, since: int, due_ms: int) -> None:
        message = json.loads(claimed.payload)
        message["headers"][UNKNOWN_SINCE] = since
        put = Put(claimed.list_name, claimed.queue, json.dumps(message), "", due_ms)
        try:
            claimant.finish_now([claimed.claim_id], put)
        except (redis.RedisError, OSError) as error:
            logger.error("task %s goes back with the lease: %s", message["headers"]["task"], error)
            claimant.forget(claimed.claim_id)

    def _bury(self, message: Any, exc: Exception) -> None:
        headers, claimant = message.headers, current_claimant()
        assert claimant is not None
        name, task_id = headers["task"], headers["id"]
        logger.error("task %s[%s] isn't known to any node; dead-lettered", name, task_id)
        request = Bunch(
            id=task_id,
            name=name,
            chord=None,
            root_id=headers.get("root_id"),
            correlation_id=message.properties.get("correlation_id"),
            reply_to=message.properties.get("reply_to"),
            errbacks=None,
        )
        self.app.backend.mark_as_failure(task_id, NotRegistered(name), request=request)
        if self.event_dispatcher:
            self.event_dispatcher.send(
                "task-failed", uuid=task_id, exception=f"NotRegistered({name!r})"
            )
        claimant.ends_as(str(message.delivery_tag), f"no node knows the task {name}")
        message.reject_log_error(logger, self.connection_errors)
