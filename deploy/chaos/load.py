"""Producers: they hand jobs in while the fleet is ill, and note what they were told."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import redis
from celery import Celery
from celery.exceptions import CeleryError
from kombu.exceptions import KombuError

from deploy.chaos.history import Fact, Revoked, Submitted
from errors import CohortError

TRACES = "CHAOS_TRACES"
"""The environment variable that names the folder of the keyless jobs' traces."""
KEYS = 8
NAMES = tuple(f"{number}" for number in range(1, KEYS + 1))
_TROUBLES = (KombuError, CeleryError, CohortError, redis.RedisError, OSError)


def key_of(name: str) -> str:
    """The job key of a counter."""
    return f"chaos-{name}"


class Producer:
    """A thread that submits jobs until it is told to stop. What it does is drawn from the seed."""

    def __init__(
        self,
        number: int,
        seed: int,
        redis_url: str,
        note: Callable[[Fact], object],
        may_submit: Callable[[], bool],
        rate: float,
    ) -> None:
        self._rng = random.Random(f"{seed}/{number}")
        self._note = note
        self._may_submit = may_submit
        self._pause = 1.0 / rate
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"producer-{number}", daemon=True)
        # A Celery of somebody who never heard of Cohort.
        self._stock = Celery("elsewhere", broker=redis_url, set_as_current=False)
        self.error: BaseException | None = None
        """What ended it before its time."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Submit no more."""
        self._stopped.set()

    def join(self, timeout: float) -> bool:
        """Wait for its last submission; whether it has come to its end."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self._pause * self._rng.uniform(0.2, 1.8)):
                if self._may_submit():
                    self.submit()
        except BaseException as error:
            self.error = error

    def submit(self) -> None:
        """Hand one job in, and sometimes think better of it."""
        from deploy.chaos import jobs  # `tasks` reads the settings of this run when it is imported.

        rng = self._rng
        # As many numbers for each job, whatever becomes of it: else the first error changes all.
        draws = [rng.random() for _ in range(9)]
        task_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        name = rng.choice(NAMES) if draws[0] < 0.75 else None
        arguments: dict[str, Any] = {
            "pause": 1.0 + 2.0 * draws[2] if draws[1] < 0.04 else 0.1 * draws[2],
            "failures": 0 if draws[3] < 0.86 else 1 if draws[3] < 0.95 else 9,
        }
        if name is not None:
            arguments["name"] = name
        options: dict[str, Any] = {"task_id": task_id}
        if draws[4] < 0.12:
            options["countdown"] = 0.3 + 2.5 * draws[2]
        stock, durable = draws[5] < 0.12, draws[5] > 0.7
        if not stock:
            options["priority"] = rng.choice((0, 0, 3, 9))
            options["durable"] = durable
        task = jobs.leave_trace if name is None else jobs.increment
        accepted = True
        try:
            if stock:
                self._stock.send_task(task.name, kwargs=arguments, **options)
            else:
                task.apply_async(kwargs=arguments, **options)
        except _TROUBLES:
            accepted = False
        key = None if name is None else key_of(name)
        self._note(Submitted(task_id, key, accepted, durable, stock))
        if draws[6] < 0.06:
            self._revoke(task_id, terminate=draws[7] < 0.5, after=draws[8] * 0.5)

    def _revoke(self, task_id: str, *, terminate: bool, after: float) -> None:
        from tasks import app

        time.sleep(after)
        # Noted first: who is told an error can't know whether it was heard.
        self._note(Revoked(task_id))
        with contextlib.suppress(*_TROUBLES):
            app.control.revoke(task_id, terminate=terminate)
