"""What every test shares: the device option, and loud words about tests that did not run.

Tests under tests/gpu need a CUDA device. Without one they are not collected into the run, and the summary says so; with
`--device cuda` they run, and any test that skips is a failure.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

import effnlp_lab  # noqa: F401  settles Triton's mode before a test imports it
from effnlp_lab.device import cuda_available

ROOT = Path(__file__).parent.parent
GPU_TESTS = Path(__file__).parent / "gpu"
NOTEBOOK_TESTS = Path(__file__).parent / "notebooks"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="auto", choices=("auto", "cpu", "cuda"), help="what the tests run on")


def pytest_configure(config: pytest.Config) -> None:
    config.gpu_not_run = set()
    paths = [str(ROOT), str(ROOT / "grading"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # for the processes that tests start
    device = config.getoption("--device")
    if device == "cpu":
        os.environ["EFFNLP_DEVICE"] = device  # on a GPU machine too; with "cuda", a test may still ask for the CPU
    if device == "cuda" and not cuda_available():
        raise pytest.UsageError("--device cuda was asked for and torch finds no CUDA device: see `effnlp doctor`.")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker("gpu")
    if not _on_gpu(config):
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.gpu_not_run.update(item.nodeid for item in left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    for item in items:
        if item.get_closest_marker("xdist_group") is None and _shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    # The longest first, so that processes end together: whole notebooks, then what stays on one process.
    items.sort(key=lambda item: (NOTEBOOK_TESTS not in item.path.parents, not item.get_closest_marker("xdist_group")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    return _refuse_skip(report, item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    return _refuse_skip(report, collector.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """From a worker of pytest-xdist: which GPU tests it left out."""
    node.config.gpu_not_run.update(getattr(node, "workeroutput", {}).get("gpu_not_run", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["gpu_not_run"] = sorted(session.config.gpu_not_run)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = len(config.gpu_not_run)
    if left_out:
        why = "no CUDA device here" if config.getoption("--device") == "auto" else "--device cpu"
        terminalreporter.section("GPU TESTS NOT RUN", yellow=True, bold=True)
        terminalreporter.line(f"{left_out} GPU tests were NOT RUN ({why}). On a GPU machine: make gpu")


def _shares_a_fixture(item: pytest.Item) -> bool:
    """Whether a fixture of this test is made once for its module: on one process, that is, and not on each of them."""
    fixtures = getattr(item, "_fixtureinfo", None)
    return fixtures is not None and any(f[-1].scope == "module" for f in fixtures.name2fixturedefs.values())


def pytest_collection_finish():
    """What was collected stays to the end: the garbage collector, and children that are forked, may leave it alone."""
    gc.collect()
    gc.freeze()


def _on_gpu(config: pytest.Config) -> bool:
    return config.getoption("--device") != "cpu" and cuda_available()


def _refuse_skip(report, config: pytest.Config):
    """On a run that was asked to be on a GPU, a test that skips has failed."""
    if config.getoption("--device") == "cuda" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"Not run, on a run with --device cuda, where every test must run: {reason}"
    return report
