"""One leader for a duty of which the fleet needs one: whoever holds its lease in Redis."""

from __future__ import annotations

import time
import uuid

from broker.scripts import Scripts


class Leadership:
    """A candidate. It leads only while its lease is sure, counted from when it was asked for."""

    def __init__(self, scripts: Scripts, duty: str, lease: float) -> None:
        self._scripts = scripts
        self._duty = duty
        self._lease = lease
        self._token = uuid.uuid4().hex
        self._trusted_until = 0.0

    def campaign(self) -> bool:
        """Take or renew the lead; whether this candidate leads now."""
        sent = time.monotonic()
        leads = self._scripts.lead(self._duty, self._token, self._lease)
        self._trusted_until = sent + self._lease if leads else 0.0
        return self.leads

    @property
    def leads(self) -> bool:
        """Whether it may still act."""
        return time.monotonic() < self._trusted_until
