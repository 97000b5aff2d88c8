"""Which names may become a folder on the shared file system: of keys, tasks, claims, nodes."""

import re

from errors import InvalidKey, Refused

MOST_BYTES = 200  # a file name holds 255; the rest is for what we append to it
RULE = (
    f"1 to {MOST_BYTES} bytes of UTF-8, not starting with '.', "
    "without '/', '..' and control characters"
)


def check_key(key: str) -> str:
    """The key itself if it can name a job directory; otherwise `InvalidKey`, saying why."""
    reason = _what_is_wrong(key)
    if reason:
        raise InvalidKey(f"job key {_shortened(key)} {reason}; a key is {RULE}")
    return key


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def check_name(kind: str, name: str) -> str:
    """The same for a task id, claim id or node name; `kind` says which in the error."""
    reason = _what_is_wrong(name)
    if reason:
        raise Refused(f"{kind} {_shortened(name)} {reason}; it is {RULE}")
    return name


def _what_is_wrong(name: str) -> str | None:
    if not isinstance(name, str):
        return f"is of type {type(name).__name__}, not str"
    if not name:
        return "is empty"
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "isn't valid Unicode"
    if length > MOST_BYTES:
        return f"is {length} bytes long"
    if "/" in name:
        return "contains '/'"
    if "\0" in name:
        return "contains NUL"
    if ".." in name:
        return "contains '..'"
    if name.startswith("."):
        return "starts with '.'"
    if _CONTROL.search(name):
        return "contains a control character"
    return None


def _shortened(name: object) -> str:
    shown = ascii(name)
    return shown if len(shown) <= 60 else f"{shown[:40]}...{shown[-10:]}"
