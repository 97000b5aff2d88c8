"""`tests/contract/test_directory.py` on an adversarial NFS mount."""

from tests.contract.test_directory import *  # noqa: F403
from tests.nfs.contract.conftest import scratch  # noqa: F401
