"""What a job says is followed on another node, whatever that node believes."""

from __future__ import annotations

import errno

from storage.logs import LogReader, OutputLog
from tests.nfs.conftest import Pair
from tests.nfs.script import Rule
from tests.processes import wait_until


def test_a_follower_on_another_node_sees_each_batch_soon(pair: Pair) -> None:
    reader = LogReader(pair.on_b, "task")
    seen = b""

    def look() -> bytes:
        nonlocal seen
        seen += b"".join(data for _, data in reader.news())
        return seen

    assert look() == b""  # From now on this node believes that there is no such folder.
    log = OutputLog(pair.on_a, "task", 1, "claim")
    for number in range(5):
        log.write(b"line %d\n" % number)
        expected = b"".join(b"line %d\n" % n for n in range(number + 1))
        wait_until(lambda expected=expected: look() == expected, 5)  # type: ignore[misc]
    log.close()
    later = OutputLog(pair.on_a, "task", 2, "another")
    later.write(b"again\n")
    later.close()
    assert look().endswith(b"line 4\nagain\n")


def test_a_write_that_the_server_refuses_costs_output_only(pair: Pair) -> None:
    pair.a.script(Rule(do="fail", op="write|store|fsync", error=errno.ENOSPC))
    log = OutputLog(pair.on_a, "task", 1, "claim")
    log.write(b"lost\n")
    wait_until(lambda: log._lost > 0, 5)
    log.write(b"kept\n")
    log.close()
    said = b"".join(data for _, data in LogReader(pair.on_b, "task").news())
    assert said.endswith(b"kept\n")
    assert b"bytes of output were lost here" in said
