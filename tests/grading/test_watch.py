"""The watch on the card's memory, on a card that is made up: what one session took is not held against the next."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest
from effnlp_grading import watch

GIB = 1 << 30


@pytest.fixture
def card(monkeypatch):
    """(used bytes by moment, a watch that sees nothing but the whole card's memory, as in a container)"""
    held = {"bytes": GIB}
    monkeypatch.setattr(watch.GpuWatch, "works", True)
    monkeypatch.setattr(watch.GpuWatch, "numbered", False)
    monkeypatch.setattr(watch.GpuWatch, "_card", lambda self: held["bytes"])
    monkeypatch.setattr(watch.GpuWatch, "_by_process", lambda self: {})
    return held, watch.GpuWatch()


def test_a_session_does_not_pay_for_the_one_before(card):
    held, gpu = card
    gpu.begin()
    held["bytes"] = 6 * GIB
    assert gpu.used(os.getpid()) == 5 * GIB
    held["bytes"] = GIB  # the first session was ended
    gpu.begin()
    assert gpu.used(os.getpid()) == 0  # at once, not a quarter of a second later


def test_a_session_begins_when_the_card_has_its_memory_back(card, monkeypatch):
    held, gpu = card
    held["bytes"] = 6 * GIB
    assert gpu.used(os.getpid()) == 5 * GIB
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            held["bytes"] = GIB

    monkeypatch.setattr(watch.time, "sleep", sleep)
    gpu.begin()
    assert len(waits) == 3 and gpu.used(os.getpid()) == 0


def test_a_card_that_stays_full_is_not_waited_for(card, monkeypatch):
    held, gpu = card
    held["bytes"] = 6 * GIB
    assert gpu.used(os.getpid()) == 5 * GIB
    monkeypatch.setattr(watch, "GPU_BACK", 0.2)
    begun = time.monotonic()
    gpu.begin()
    assert 0.2 <= time.monotonic() - begun < 2 and gpu.used(os.getpid()) == 5 * GIB


def test_a_session_does_not_pay_for_its_neighbours(card, monkeypatch):
    """Before it has begun to use the card, either: NVML does not name it then."""
    held, gpu = card
    named = {}
    monkeypatch.setattr(watch, "GPU_INTERVAL", 0.0)
    monkeypatch.setattr(watch.GpuWatch, "_by_process", lambda self: named)
    held["bytes"] = 20 * GIB
    assert gpu.used(os.getpid()) == 19 * GIB  # nobody is named: a container's processes are not
    named |= {1: 17 * GIB, os.getpid(): 2 * GIB}
    assert gpu.used(os.getpid()) == 2 * GIB
    del named[os.getpid()]
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: pytest.fail("waited for what neighbours hold"))
    for later in (gpu, watch.GpuWatch()):
        held["bytes"] += 17 * GIB
        later.begin()
        assert later.used(os.getpid()) == 0


@pytest.mark.parametrize("shown, bytes_seen", [(None, 7 * GIB), ("0", 5 * GIB), ("GPU-one", 2 * GIB), ("1,0", 7 * GIB)])
def test_cards_of_other_workers_do_not_count(monkeypatch, shown, bytes_seen):
    monkeypatch.setattr(watch.GpuWatch, "numbered", False)
    held, cards = {0: 0, 1: 0}, {"GPU-zero": 0, "GPU-one": 1}
    monkeypatch.setattr(watch, "_nvml", lambda: SimpleNamespace(
        nvmlDeviceGetCount=lambda: 2, nvmlDeviceGetHandleByIndex=lambda number: [0, 1][number],
        nvmlDeviceGetHandleByUUID=cards.__getitem__, nvmlDeviceGetComputeRunningProcesses=lambda handle: [],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=held[handle])))  # fmt: skip
    if shown is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    gpu = watch.GpuWatch()
    held.update({0: 5 * GIB, 1: 2 * GIB})
    assert gpu.used(os.getpid()) == bytes_seen
