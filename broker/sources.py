"""The text of the scripts that run in Redis, and the names by which Redis knows them."""

from __future__ import annotations

import hashlib
from pathlib import Path

_LUA = Path(__file__).parent / "lua"

# At the memory limit new jobs are refused; those already accepted go on to their end.
_EVEN_WHEN_FULL = "#!lua flags=allow-oom\n"
_WHEN_ROOM = "#!lua\n"


def source(name: str) -> str:
    """The whole text of one script, with what it shares with the others."""
    header = _WHEN_ROOM if name == "put" else _EVEN_WHEN_FULL
    prelude = (_LUA / "prelude.lua").read_text("utf-8")
    return header + prelude + (_LUA / f"{name}.lua").read_text("utf-8")


def sha_of(text: str) -> str:
    """How Redis names a script: SHA-1 of its text (EVALSHA in the Redis manual)."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
