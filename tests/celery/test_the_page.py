"""`docs/celery.md` names every test of this folder, and nothing that isn't there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "celery.md"


def all_tests() -> dict[str, bool]:
    """Every test, and whether one side is known to fail it."""
    found = {}
    for path in sorted(HERE.glob("test_*.py")):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [ast.unparse(mark) for mark in node.decorator_list]
                found[f"{path.stem}.{node.name}"] = any("wrong_on" in mark for mark in marks)
    return found


def test_every_test_is_on_the_page() -> None:
    rows = re.findall(r"^\| .* \| `(\S+)` \| (.*) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert sorted({test for test, _, _ in rows}) == sorted(all_tests())


def test_what_one_side_fails_is_said_on_the_page() -> None:
    rows = re.findall(r"^\| .* \| `(\S+)` \| (.*) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    said = {test for test, stock, ours in rows if "**" in stock + ours}
    assert said == {test for test, fails in all_tests().items() if fails}
