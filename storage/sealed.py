"""One file format for what must not be believed when damaged: records and manifests.

    cohort <kind> <format> <length> <sha256>\n
    <JSON, `length` bytes, whose SHA-256 stands above>

Anything else is `Damaged` with the path and what is wrong with it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

from errors import Damaged, Refused


def seal(kind: str, version: int, body: object) -> bytes:
    """The file's bytes. A body that JSON can't carry is `Refused`."""
    return seal_bytes(kind, version, to_json(body).encode("ascii") + b"\n")


def seal_bytes(kind: str, version: int, payload: bytes) -> bytes:
    """The file's bytes for JSON that the caller has written."""
    return _head(kind, version, payload) + payload


def unseal(data: bytes, kind: str, version: int, path: Path) -> Any:
    """What was sealed; `path` only for the error."""
    head, newline, payload = data.partition(b"\n")
    words = head.split(b" ")
    if not newline or len(words) != 5 or words[:2] != [b"cohort", kind.encode()]:
        damaged(path, f"this is no {kind} of Cohort")
    if words[2] != str(version).encode():
        damaged(path, f"format {words[2].decode('ascii', 'replace')} isn't known here")
    if head + newline != _head(kind, version, payload):
        damaged(path, f"length or checksum of the {kind} is wrong")
    return from_json(payload, path)


def from_json(payload: bytes, path: Path) -> Any:
    """What the JSON says; `path` only for the error."""
    try:
        return json.loads(payload)
    except ValueError:
        damaged(path, "what is in it isn't JSON")


def to_json(value: object) -> str:
    """JSON in ASCII, so that text which isn't valid Unicode survives too."""
    try:
        return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"JSON can't carry this value: {error}") from None


def damaged(path: Path, what: str) -> NoReturn:
    raise Damaged(f"{path}: {what}")


def _head(kind: str, version: int, payload: bytes) -> bytes:
    digest = hashlib.sha256(payload).hexdigest()
    return f"cohort {kind} {version} {len(payload)} {digest}\n".encode()
