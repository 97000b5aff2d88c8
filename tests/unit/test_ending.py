"""A command that is told to end does, also if it was told within a destructor."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

_COMMAND = """
import os, signal, sys, time
from deploy.ending import AskedToEnd, end_by_signals, ignore_signals

class Forgotten:
    def __del__(self):
        os.kill(os.getpid(), {number})
        time.sleep(0)  # It is raised here, and swallowed.
        self.went_on = True

end_by_signals()
try:
    Forgotten()
    print("swallowed", flush=True)
    time.sleep(20)
except AskedToEnd:
    ignore_signals()
    os.kill(os.getpid(), {number})
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_that_was_swallowed_is_made_again(number: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _COMMAND.format(number=int(number))],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=15,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "swallowed\n", "")
