"""A retry is no second publication: what a run puts for its own task goes back with its claim.

While a run is under way, a message under its own task id isn't sent to Redis but kept; its worker
acknowledges the claim and puts the message in one step (`requeue.lua`). So a worker that dies in
between leaves either the claim or the retry, never both and never neither.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.producing import Put


class _Kept(threading.local):
    task_id: str | None = None
    put: Put | None = None


_kept = _Kept()


@contextmanager
def kept_retry(task_id: str) -> Iterator[_Kept]:
    """Keep what this thread puts under that task id."""
    _kept.task_id, _kept.put = task_id, None
    try:
        yield _kept
    finally:
        _kept.task_id = None


def keep(task_id: str, put: Put) -> bool:
    """Whether it was kept; it is to be sent if not."""
    if task_id != _kept.task_id or _kept.put is not None:
        return False
    _kept.put = put
    return True
