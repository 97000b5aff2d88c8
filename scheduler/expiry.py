"""What waits past its `expires` gets its outcome, wherever it waits: queued, parked, delayed.

And what was settled by somebody without the shared folder (who revoked it, say) is written down:
until then Redis alone knows of that outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from broker import settled
from broker.leader import Leadership
from broker.scripts import Scripts

PACE = 0.5
_LEASE = 2.0
"""Seconds. Short: when the leader dies, another must go on within moments."""


class Expiry:
    """One candidate for the duty."""

    def __init__(
        self,
        scripts: Scripts,
        settle: Callable[[str, str], object],
        write_down: Callable[[Sequence[str]], object],
    ) -> None:
        """`settle` records that a task which runs nowhere is over, and why; `write_down` has those
        of these outcomes written that aren't on disk.
        """
        self._scripts = scripts
        self._settle = settle
        self._write_down = write_down
        self._cursor = 0
        self._leadership = Leadership(scripts, "expiry", _LEASE)

    def run_once(self) -> int:
        """Settle what is due. How many tasks were looked at."""
        looked = 0
        while self._leadership.campaign():
            due = settled.due(self._scripts.client)
            for task_id, _ in due:
                # One that runs is left alone; its node looks at the time when it is tried again.
                self._settle(task_id, "expired")
            # Only now: if this process dies before, another one does it again.
            settled.seen_to(self._scripts, due)
            looked += len(due)
            if len(due) < settled.A_STEP:
                self._write_some()
                break
        return looked

    def _write_some(self) -> None:
        self._cursor, some = settled.some(self._scripts.client, self._cursor)
        if some:
            self._write_down(some)
