"""What holds for all tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests import redis_audit

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would every
# process that they start: those that are to be interrupted would never know.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def audited_redis() -> Iterator[None]:
    """What is left in a Redis that outlives the test is known. Others are audited as they end."""
    yield
    redis_audit.audit_watched()
