"""The other node's half of `./cohort doctor --with NODE`: a remote-control command of its worker.

It takes one step of an examination in the node's shared folder and answers what it saw. Each is a
few calls in a folder made for it: the worker's loop waits no longer than for one job's message.
"""

from __future__ import annotations

from typing import Any

from celery.worker.control import inspect_command

from errors import CohortError
from storage.halves import Half
from tasks.settings import current


@inspect_command(visible=False, default_timeout=5.0)  # type: ignore[untyped-decorator]
def examine(state: Any, node: str = "", folder: str = "", step: str = "", **arguments: Any) -> Any:
    """Take one step of `./cohort doctor` on the node of that name."""
    settings = current()
    if node != settings.node or settings.root is None:
        return {"node": settings.node}
    try:
        half = Half(settings.root, folder, node)
        return {"node": node, "saw": half.do(step, **arguments)}
    except (CohortError, OSError, TypeError) as error:
        return {"node": node, "error": f"{type(error).__name__}: {error}"}
