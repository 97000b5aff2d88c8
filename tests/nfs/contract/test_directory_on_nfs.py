"""`tests/contract/test_directory.py` on an adversarial NFS mount."""

from tests.contract.test_directory import *  # noqa: F403
from tests.nfs.contract.conftest import scratch  # noqa: F401

# It counts calls below one folder, and two nodes have two. test_cost.py counts in the trace.
del test_a_run_costs_what_it_changed  # noqa: F821
