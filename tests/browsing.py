"""Chromium and JupyterLab for tests, and axe-core: what keeps people from reading a page, by WCAG 2.1 A and AA."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from effnlp_lab.doctor import chromium_path
from effnlp_lab.runner import kill_tree

RULES = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]},
         "resultTypes": ["violations"]}  # fmt: skip
SETTINGS = {  # every cell is in the page, seen or not; nothing is fetched; no dialog about news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"checkForUpdates": False, "doNotDisturbMode": True, "fetchNews": "false"},
    "docmanager-extension/plugin": {"autosave": False},
}
SECONDS = 60.0
"""For any one step in JupyterLab, on a machine that does much else."""
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


@contextlib.contextmanager
def jupyterlab(folder: Path, scratch: Path, **environment: str | None) -> Iterator[str]:
    """The address of a JupyterLab of its own over `folder`, with settings and log in `scratch`; ends with its kernels.

    A variable that is None is not set there. Skips where there is no browser to open it in.
    """
    if chromium_path() is None:
        pytest.skip(NO_CHROMIUM)
    for name, values in SETTINGS.items():
        path = scratch / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
           "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    changed = {**os.environ, **{name: str(scratch / place) for name, place in own.items()}, **environment}
    changed = {name: value for name, value in changed.items() if value is not None}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0",
               "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=",
               "--LabApp.expose_app_in_browser=True"]
    with (scratch / "jupyter.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=changed, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield _address(server, scratch / "jupyter.log")
        finally:
            kill_tree(server)


def _address(server: subprocess.Popen, log: Path) -> str:
    """Where the server listens: the system chose the port."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and server.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", log.read_text())
        if found and found.group(1) != "0":
            return found.group(0)
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()}")


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
