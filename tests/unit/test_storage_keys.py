"""Which keys may name a directory, and how a wrong one is refused."""

from __future__ import annotations

import pytest

from errors import InvalidKey, Refused
from storage.keys import check_key, check_name

GOOD = ["export-customers", "a", "ü" * 100, "x" * 200, "a.b", "2026-01-01T00:00", "\U0001f989"]
BAD = {
    "": "empty",
    "a/b": "contains '/'",
    "/": "contains '/'",
    "a\0b": "NUL",
    ".": "starts with '.'",
    "..": "contains '..'",
    "a..b": "contains '..'",
    ".hidden": "starts with '.'",
    "a\nb": "control character",
    "a\x7f": "control character",
    "a\x85": "control character",
    "\udcff": "isn't valid Unicode",
    "x" * 201: "201 bytes",
    "x" * 300: "300 bytes",
    "ü" * 101: "202 bytes",
}


@pytest.mark.parametrize("key", GOOD)
def test_a_good_key_is_itself(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize("key", BAD, ids=ascii)
def test_a_bad_key_is_refused_by_name_with_the_reason(key: str) -> None:
    with pytest.raises(InvalidKey) as caught:
        check_key(key)
    message = str(caught.value)
    assert BAD[key] in message
    assert ascii(key)[:20].rstrip("'") in message
    assert "1 to 200 bytes of UTF-8" in message
    assert message.isprintable()
    assert len(message) < 250


def test_what_is_no_text_is_no_key() -> None:
    with pytest.raises(InvalidKey, match="of type int"):
        check_key(7)  # type: ignore[arg-type]


def test_other_names_follow_the_same_rule() -> None:
    with pytest.raises(Refused, match=r"task id '\.\./x' contains '/'"):
        check_name("task id", "../x")
