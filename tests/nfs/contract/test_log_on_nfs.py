"""`tests/contract/test_log.py` on an adversarial NFS mount."""

from tests.contract.test_log import *  # noqa: F403
