"""The app's time is Celery's, in whatever zone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from celery import Celery

from tasks.batches import App


@pytest.mark.parametrize(
    "zone",
    [
        {"timezone": "UTC"},
        {"timezone": "Asia/Kathmandu"},
        {"timezone": "America/New_York", "enable_utc": False},
        {"timezone": None, "enable_utc": False},
    ],
)
def test_it_is_celerys(zone: dict[str, object]) -> None:
    ours, stock = App("ours", set_as_current=False), Celery("stock", set_as_current=False)
    for app in (ours, stock):
        app.conf.update(zone)
    assert ours.now().utcoffset() == stock.now().utcoffset()
    assert abs(ours.now() - stock.now()) < timedelta(seconds=1)
    assert abs(ours.now() - datetime.now(UTC)) < timedelta(seconds=1)
