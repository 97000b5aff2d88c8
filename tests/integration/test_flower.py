"""Flower in a real browser shows the nodes, and the tasks with their states."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests import sample_jobs as jobs
from tests.fleets import Producer, running_fleet

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: CI must have one (Debian: apt install chromium)")
        pytest.skip("no Chromium here (Debian: apt install chromium)")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=[*ARGUMENTS, *QUIET])
        yield browser.new_page(viewport={"width": 1400, "height": 800})
        browser.close()


@pytest.fixture(scope="module")
def producer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Producer]:
    with running_fleet(tmp_path_factory.mktemp("flower"), nodes=2, flower=True) as running:
        yield running


def test_nodes_and_states(producer: Producer, page: Page, tmp_path: Path) -> None:
    succeeded = jobs.count.delay("flower")
    refused = jobs.refuse.delay("flower")
    for result in (succeeded, refused):
        result.get(timeout=30, propagate=False)

    page.goto(f"{producer.fleet.flower_url}/workers")
    for node in ("worker@node-1", "worker@node-2"):
        expect(page.get_by_role("row", name=node)).to_contain_text("Online")

    page.goto(f"{producer.fleet.flower_url}/tasks")
    expect(page.get_by_role("row", name=succeeded.id)).to_contain_text("SUCCESS")
    expect(page.get_by_role("row", name=refused.id)).to_contain_text("FAILURE")

    page.goto(f"{producer.fleet.flower_url}/broker")
    expect(page.get_by_role("row", name="celery")).to_contain_text("0")
