"""The guests, booted once for all these tests. Where they can't be had the tests fail, saying why.

They run only when asked for (`./cohort test --vm`): who asks wants to know.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator

import pytest

from tests.vm import packages
from tests.vm.lab import Guest, Lab, lab

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The server and two guests."""
    try:
        parts = packages.ready()
        entered = lab(parts, tmp_path_factory.mktemp("vm"))
        found = entered.__enter__()
    except packages.CantHave as error:
        pytest.fail(f"no guests here: {error}", pytrace=False)
    try:
        yield found
    finally:
        entered.__exit__(None, None, None)


@pytest.fixture
def guests(running: Lab) -> list[Guest]:
    """Both guests, with a fresh folder for the steps of a test."""
    folder = f".examination-{secrets.token_hex(8)}"
    (running.guests[0].export / folder).mkdir()
    for guest in running.guests:
        guest.folder = folder
        guest.root = "/mnt"
    return running.guests
