"""The contract tests of storage, word for word, on an adversarial NFS mount.

They take their folder from `tmp_path`: here that is a folder of a mount. With two nodes every
`Directory` that a test opens belongs to the other node than the one before it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from storage.directory import Directory
from tests.nfs.conftest import Pair


@pytest.fixture(params=["one node", pytest.param("two nodes", marks=pytest.mark.long)])
def tmp_path(request: pytest.FixtureRequest, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "two nodes":
        take_turns(pair, monkeypatch)
    return pair.on_a


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node's own disk is no NFS mount."""
    return tmp_path_factory.mktemp("disk") / "scratch"


def take_turns(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = itertools.cycle([pair.on_b, pair.on_a])
    real = Directory.open.__func__  # type: ignore[attr-defined]

    def on_the_next_node(cls: type[Directory], root: Path, *args: Any, **kwargs: Any) -> Directory:
        if root.is_relative_to(pair.on_a):
            root = next(turns) / root.relative_to(pair.on_a)
        opened: Directory = real(cls, root, *args, **kwargs)
        return opened

    monkeypatch.setattr(Directory, "open", classmethod(on_the_next_node))
