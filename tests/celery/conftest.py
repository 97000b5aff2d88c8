"""The sides on which each behaviour of Celery's manual is tried."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.celery.sides import Gate, Side, Sides


@pytest.fixture(scope="session")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    """Started once each."""
    started = Sides(tmp_path_factory.mktemp("sides"))
    yield started
    started.close()


@pytest.fixture(params=["stock", "ours"])
def side(sides: Sides, request: pytest.FixtureRequest) -> Iterator[Side]:
    """Stock Celery, then ours."""
    yield from _current(sides, request)


@pytest.fixture(params=["stock", "ours", "stock producer"])
def caller(sides: Sides, request: pytest.FixtureRequest) -> Iterator[Side]:
    """The same, and a stock producer that feeds our worker."""
    yield from _current(sides, request)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """Holds tasks until the test lets them go."""
    return Gate(tmp_path)


def _current(sides: Sides, request: pytest.FixtureRequest) -> Iterator[Side]:
    from tasks import app

    yield sides.side(request.param)
    app.set_current()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """`wrong_on`: a strict xfail on the sides that it names, and on no other."""
    for item in items:
        sides, reason = getattr(getattr(item, "function", None), "wrong_on", ((), ""))
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if sides and params.get("side", params.get("caller")) in sides:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any) -> Generator[None, Any, Any]:
    """What the main worker said last, beside a failure."""
    report = yield
    side = item.funcargs.get("side") or item.funcargs.get("caller")
    if report.failed and isinstance(side, Side):
        report.sections.append(("Worker", side.workers.parts["main"].log_tail(40)))
    return report
