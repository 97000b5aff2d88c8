"""`./cohort submit --many`: what a file of jobs may say."""

from __future__ import annotations

import pytest

from deploy.submit_many import read_calls
from errors import Refused


def test_a_line_is_a_list_by_position_or_an_object_by_name() -> None:
    lines = ['["acme", 3]\n', "\n", '{"customer": "größe"}\n', "[]"]
    assert read_calls(lines, "jobs") == [(["acme", 3], {}), ([], {"customer": "größe"}), ([], {})]


@pytest.mark.parametrize(
    ("line", "says"),
    [("[1", "jobs, line 2: no JSON"), ("7", "jobs, line 2: 7; expected"), ('"x"', "line 2: 'x'")],
)
def test_a_line_that_is_wrong_is_named(line: str, says: str) -> None:
    with pytest.raises(Refused, match=says):
        read_calls(["[1]", line, "[2]"], "jobs")
