"""Whether this node has been asked to end, as a job in any process of its pool sees it.

Celery tells only the main process. A warm shutdown then waits for what runs; but who sent the
SIGTERM may not, so a long run had better keep what it has done.
"""

from __future__ import annotations

import mmap
from typing import Any

from celery.signals import worker_shutting_down

# Shared with the pool's processes, which are forked after this.
_flag = mmap.mmap(-1, 1)


def is_leaving() -> bool:
    """True from the first SIGTERM or SIGINT to this worker on."""
    return _flag[0] != 0


@worker_shutting_down.connect(weak=False)  # type: ignore[untyped-decorator]
def _leave(**_: Any) -> None:
    _flag[0] = 1
