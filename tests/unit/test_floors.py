"""The floors of the house: the check that holds them works, also for what it doesn't look at."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
FLOORS = ("broker", "storage", "tasks", "workers", "scheduler", "deploy")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("broker/a.py", "import storage.b"),
        ("storage/a.py", "from broker import b"),
        ("storage/a.py", "import tasks.b"),
        ("tasks/a.py", "def later():\n    import workers.b"),
        ("workers/a.py", "import scheduler.b"),
        ("scheduler/a.py", "import deploy.b"),
        ("tasks/a.py", ""),
    ],
)
def test_an_import_upwards_or_across_is_found(tmp_path: Path, module: str, line: str) -> None:
    for floor in FLOORS:
        (tmp_path / floor).mkdir()
        for name in ("__init__.py", "b.py"):
            (tmp_path / floor / name).touch()
    (tmp_path / module).write_text(line + "\n")
    (tmp_path / "pyproject.toml").write_text((PROJECT / "pyproject.toml").read_text())
    linted = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert linted.returncode == (1 if line else 0), linted.stdout
    assert f"Imports point only downwards {'BROKEN' if line else 'KEPT'}" in linted.stdout


@pytest.mark.parametrize("module", ["errors.py", "crashpoints.py"])
def test_the_ground_below_the_floors_imports_nothing_of_ours(module: str) -> None:
    tree = ast.parse((PROJECT / module).read_text())
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not imported & {*FLOORS, "tests"}
