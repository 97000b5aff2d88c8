"""Two nodes for the tests: mounted once, wiped of their beliefs and their script before each test.

Without FUSE these tests are skipped, unless COHORT_TEST_FUSE=required says that it must be there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.nfs.node import CantMount, Node, nodes
from tests.nfs.script import Settings

_NUMBERS = itertools.count(1)


@dataclass
class Pair:
    """Two nodes, and one fresh folder as each of them and the server see it."""

    a: Node
    b: Node
    on_a: Path
    on_b: Path
    backing: Path


@pytest.fixture(scope="session")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    work = tmp_path_factory.mktemp("nfs")
    try:
        entered = nodes(work, 2)
        found = entered.__enter__()
    except (CantMount, FileNotFoundError, PermissionError) as error:
        if os.environ.get("COHORT_TEST_FUSE") == "required":
            raise
        pytest.skip(f"no FUSE here (Debian: apt install fuse3): {str(error).splitlines()[-1]}")
    try:
        yield found
    finally:
        entered.__exit__(None, None, None)


@pytest.fixture
def pair(mounted: list[Node]) -> Iterator[Pair]:
    a, b = mounted
    name = f"test-{next(_NUMBERS)}"
    (a.backing / name).mkdir()
    for node in mounted:
        reset(node)
    yield Pair(a, b, a.root / name, b.root / name, a.backing / name)
    for node in mounted:
        reset(node)


def reset(node: Node) -> None:
    node.script(settings=Settings())
    node.wake()
    node.release()
    node.forget()
