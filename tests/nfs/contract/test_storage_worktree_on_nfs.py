"""`tests/contract/test_storage_worktree.py` on an adversarial NFS mount."""

from tests.contract.test_storage_worktree import *  # noqa: F403
from tests.nfs.contract.conftest import scratch  # noqa: F401
