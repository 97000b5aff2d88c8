"""`tests/contract/test_mount.py` on an adversarial NFS mount."""

from tests.contract.test_mount import *  # noqa: F403
