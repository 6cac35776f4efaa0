"""Every run of the tests draws the same examples and random numbers, and ends with what it did not check."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile("batchshaping", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("batchshaping")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # torch.manual_seed would write a traceback for each kind of accelerator that is not in use.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser without a window. Where there is none, its tests are skipped; under CI that is an error."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        complain = pytest.fail if in_ci else pytest.skip
        complain("there is no chromium with chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield window
    finally:
        window.quit()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: opens a browser; set by the fixture of this name")
    config.addinivalue_line("markers", "signals: kills or interrupts processes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What trains longest is begun first, so that no worker is left alone with it at the end.
    items.sort(key=lambda item: item.path.name not in ("test_notebooks.py", "test_readme.py"))
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Say as the very last line what was not checked."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")  # the workers of xdist have none
    skipped = reporter.stats.get("skipped", []) if reporter else []
    unchecked = sum("browser" in report.keywords for report in skipped)
    if unchecked:
        reporter.write_line(
            f"Not checked: the report in a browser ({unchecked} tests). To check it, install chromium and "
            "chromedriver (apt-get install chromium chromium-driver), then make test"
        )
