"""A crash point kills its own process, once, and only where it was armed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import crashpoints

REACH = "import crashpoints; crashpoints.reach('commit:before-link'); print('alive')"


def reach_in_a_process(armed: Path | None) -> subprocess.CompletedProcess[str]:
    root = str(Path(crashpoints.__file__).parent)
    env = {"PYTHONPATH": root} | ({"COHORT_CRASH": str(armed)} if armed else {})
    return subprocess.run(
        [sys.executable, "-c", REACH], env=env, capture_output=True, text=True, check=False
    )


def test_an_armed_point_kills_once(tmp_path: Path) -> None:
    (tmp_path / "commit:before-link").touch()
    assert reach_in_a_process(tmp_path).returncode == -signal.SIGKILL
    assert reach_in_a_process(tmp_path).stdout == "alive\n"


def test_another_point_is_passed(tmp_path: Path) -> None:
    (tmp_path / "commit:after-link").touch()
    assert reach_in_a_process(tmp_path).stdout == "alive\n"
    assert (tmp_path / "commit:after-link").exists()


def test_without_a_folder_nothing_happens() -> None:
    assert reach_in_a_process(None).stdout == "alive\n"


def test_a_name_that_isn_t_listed_is_an_error() -> None:
    with pytest.raises(AssertionError, match="commit:befor-link"):
        crashpoints.reach("commit:befor-link")
