"""A message that is written many times, with little that differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kombu.utils.json import dumps

_plain = json.JSONEncoder().encode
_quoted = json.encoder.encode_basestring_ascii


class Template:
    """A text in which some JSON strings, the marks, are replaced by other JSON. Safe to share."""

    def __init__(self, text: str, marks: Mapping[str, str]) -> None:
        places = sorted(
            (at, len(json.dumps(mark)), name)
            for name, mark in marks.items()
            for at in _occurrences(text, json.dumps(mark))
        )
        self._pieces: list[str] = []
        self._fields: list[tuple[int, str]] = []
        end = 0
        for at, length, name in places:
            self._fields.append((len(self._pieces) + 1, name))
            self._pieces += [text[end:at], ""]
            end = at + length
        self._pieces.append(text[end:])

    def filled(self, values: Mapping[str, str]) -> str:
        """The text with these values, which are JSON, in place of the marks by their names."""
        pieces = self._pieces.copy()
        for at, name in self._fields:
            pieces[at] = values[name]
        return "".join(pieces)


def _occurrences(text: str, part: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + len(part))


def encoded(value: Any) -> str:
    """JSON, as Celery's serializer makes it; faster where there is nothing out of the ordinary."""
    if type(value) is str:
        return _quoted(value)
    try:
        return _plain(value)
    except TypeError:
        text: str = dumps(value)
        return text
