"""`tests/contract/test_segments.py` on an adversarial NFS mount."""

from tests.contract.test_segments import *  # noqa: F403
