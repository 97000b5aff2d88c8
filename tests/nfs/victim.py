"""A process that dies at its Nth call to the file system, however that comes."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

from tests.nfs.node import Node
from tests.nfs.script import Action, Rule, Settings


def dies_at(
    n: int,
    node: Node,
    do: Action,
    work: Callable[[], object],
    *,
    settings: Settings | None = None,
    op: str = "*",
) -> bool:
    """Do `work` in a process of its own that dies at its n-th call; whether it came that far.

    If it didn't, it has ended well. The node is back afterwards, with nothing to be believed.
    """
    node.script(settings=settings or Settings())
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.read(reading, 1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    node.script(Rule(do, op, at=n, pid=child), settings=settings or Settings())
    os.write(writing, b"g")
    _, status = os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)
    (rule,) = node.rules()
    node.script()
    if do == "power" and not rule.fired:
        node.lose_power()  # what it returned from must be there all the same
    node.forget()
    if rule.fired:
        assert os.WIFSIGNALED(status), "it was to be killed and wasn't"
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "it failed although nothing happened to it"
    return False
