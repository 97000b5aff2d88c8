"""`tests/contract/test_storage_kill.py` on an adversarial NFS mount."""

from tests.contract.test_storage_kill import *  # noqa: F403
