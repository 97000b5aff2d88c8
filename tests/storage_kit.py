"""What the storage tests share: a run in one line, and a look at a version as plain data."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from storage import durable
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


def changing_calls(work: Callable[[], object], root: Path) -> list[str]:
    """The system calls below `root` that change something or read contents; not look-ups."""
    calls: list[str] = []

    def below(path: Any) -> bool:
        name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        return str(name).startswith(str(root))

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if below(args[0]) and not (name == "open" and not args[1] & os.O_CREAT):
                is_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}")
                calls.append("fsyncdir" if is_folder else name)
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "read", "pread", "write", "fsync", "link", "mkdir", "rename"):
            patch.setattr(os, name, noting(name, getattr(os, name)))

        def new_file(path: Path, mode: str) -> FileIO:
            calls.append("create")
            return FileIO(path, mode)

        patch.setattr(durable, "FileIO", new_file)
        work()
    return calls
