"""The tests are tested: with one rule of the protocol broken, they must fail.

The same mutations of the model are in `tests/model/test_protocol_exhaustive.py`, in every run.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.nfs.conftest import Pair
from tests.nfs.mutations import MUTATIONS
from tests.nfs.node import PROJECT

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

CRASHES = "tests/nfs/test_crash_calls.py"
MACHINE = "tests/nfs/test_machine_on_nfs.py"
# Which tests see it: of each of these at least one must fail.
SEEN_BY: dict[str, tuple[str, ...]] = {
    "names_are_used_again": (
        MACHINE,
        "tests/nfs/contract/test_directory_on_nfs.py::test_a_task_never_gets_a_second_record",
    ),
    "the_link_is_a_rename": (MACHINE, "tests/nfs/contract/test_directory_on_nfs.py"),
    "the_base_isn_t_checked": (MACHINE, "tests/nfs/contract/test_directory_on_nfs.py"),
    "eexist_isn_t_looked_into": (MACHINE, "tests/nfs/contract/test_log_on_nfs.py"),
    "the_outcome_isn_t_looked_for": (MACHINE,),
    "files_aren_t_fsynced": (f"{CRASHES}::test_a_commit_is_whole_or_nothing",),
    "directories_aren_t_fsynced": (f"{CRASHES}::test_a_commit_is_whole_or_nothing",),
    "segments_aren_t_fsynced": (
        f"{CRASHES}::test_a_segment_holds_what_was_said_and_no_more_than_was_tried",
    ),
    "missing_names_are_believed": (MACHINE,),
}


def test_every_mutation_is_tried() -> None:
    assert set(SEEN_BY) == set(MUTATIONS)


def exit_code(tests: str, *, mutation: str | None) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not long", "--no-header", tests]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    if mutation:
        command += ["-p", "tests.nfs.mutations"]
        environment["COHORT_TEST_MUTATION"] = mutation
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("mutation", "tests"), [(name, tests) for name, seen in SEEN_BY.items() for tests in seen]
)
def test_a_broken_rule_is_seen(mutation: str, tests: str, pair: Pair) -> None:
    """`pair` only to be skipped where there is no FUSE: skipped tests don't fail."""
    code, output = exit_code(tests, mutation=mutation)
    assert code == pytest.ExitCode.TESTS_FAILED, output
    assert " passed" in output or "1 failed" in output, output


@pytest.mark.parametrize("tests", [CRASHES, MACHINE])
def test_with_every_rule_they_pass(tests: str, pair: Pair) -> None:
    code, output = exit_code(tests, mutation=None)
    assert code == pytest.ExitCode.OK, output
