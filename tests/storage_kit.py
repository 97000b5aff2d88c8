"""What the storage tests share: a run in one line, and a look at a version as plain data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.directory import Directory, Version
from storage.log import Record
from storage.worktree import WorkTree

Body = Callable[[Path], object]


class Crash(BaseException):
    """The process dies here, as far as the code under test can tell."""


def run(
    root: Path,
    scratch: Path,
    task_id: str,
    body: Body,
    *,
    key: str = "k",
    claim_id: str | None = None,
    base: Version | None = None,
    result: Any = None,
) -> Record:
    """One whole attempt: snapshot, checkout, the job's own code, commit."""
    directory = Directory.open(root, key)
    base = base or directory.head()
    claim_id = claim_id or f"claim-of-{task_id}"
    attempt = directory.begin(task_id, claim_id, base)
    tree = WorkTree(scratch, key, claim_id)
    try:
        tree.checkout(directory, base)
        body(tree.path)
        return attempt.commit(tree, result, attempt=1, node="node-1")
    finally:
        tree.release()


def write(name: str, text: str) -> Body:
    """A body that writes one file."""
    return lambda tree: (tree / name).write_text(text)


def both(*bodies: Body) -> Body:
    """A body that does one thing after the other."""

    def body(tree: Path) -> None:
        for each in bodies:
            each(tree)

    return body


def contents(version: Version) -> dict[str, bytes]:
    """The files of a version, read from where they lie."""
    return {file.path: version.read(file.path) for file in version.manifest.files}


def files_below(root: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes: to show that nothing changed."""
    return {
        os.path.join(folder, name): Path(folder, name).read_bytes()
        for folder, _, names in os.walk(root)
        for name in names
    }
