"""Chromium for tests, and axe-core in it: what keeps people from reading a page, by WCAG 2.1 A and AA."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from effnlp_lab.doctor import chromium_path

RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]},
         "resultTypes": ["violations"]}  # fmt: skip
LAID_OUT_SECONDS = 20.0
"""How long a page may take to lay itself out anew, after a change of theme on a busy machine for example."""
NO_CHROMIUM = "NOT RUN: there is no Chromium here to open pages in (apt-get install chromium; see `effnlp doctor`)"


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser, closed at the end: Playwright's event loop is not to run on into other tests. Skips without one."""
    from playwright.sync_api import sync_playwright

    program = chromium_path()
    if program is None:
        pytest.skip(NO_CHROMIUM)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


def barriers(page: Any, inside: Sequence[str] = (), outside: Sequence[str] = ()) -> list[str]:
    """A line for each element that axe-core finds at fault: in the whole page, or inside and outside of selectors."""
    from axe_playwright_python.sync_playwright import Axe

    context = {"include": [[one] for one in inside]} if inside else {}
    context |= {"exclude": [[one] for one in outside]} if outside else {}
    until = time.monotonic() + LAID_OUT_SECONDS
    while True:
        found = Axe().run(page, context or None, RULES).response
        seen = {rule["id"] for outcome in ("passes", "violations", "incomplete") for rule in found[outcome]}
        if "color-contrast" in seen:
            break
        assert time.monotonic() < until, "axe-core saw no text: where an ancestor has no height, all counts as hidden"
        time.sleep(0.5)
    return [f"{rule['id']} ({rule['help']}): {node['html'][:200]}" for rule in found["violations"]
            for node in rule["nodes"]]  # fmt: skip


def barriers_of(*files: Path, inside: Sequence[str] = (), outside: Sequence[str] = ()) -> dict[str, list[str]]:
    """The same for HTML files: name -> lines; files without a fault are left out. What is folded is opened first."""
    found = {}
    with chromium() as browser:
        page = browser.new_page()
        page.route(lambda address: not address.startswith("file:"), lambda route: route.abort())  # MathJax, say
        for file in files:
            page.goto(file.resolve().as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            if faults := barriers(page, inside, outside):
                found[str(file)] = faults
    return found
