"""Looks at a session from outside: its processes, the time they have worked, and the memory they hold."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from effnlp_lab.runner import named_gpus

TICKS = os.sysconf("SC_CLK_TCK")
GPU_INTERVAL = 0.25
GPU_BACK = 3.0
"""Seconds that the card is given to have an ended session's memory back."""


@dataclass(frozen=True)
class Usage:
    """Processes of a session, seconds they worked, and bytes of memory that are not files'."""

    processes: int
    worked: float
    memory: int


def usage(root: int, baseline: int = 0) -> Usage:
    """What process `root` and its descendants use; `baseline` bytes a process are the warm parent's, and shared."""
    count, worked, memory = 0, 0.0, 0
    for process in tree(root):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            worked += sum(map(int, fields[11:15])) / TICKS
            memory += max(0, held(process) - baseline)
            count += 1
    return Usage(count, worked, memory)


def shared_out(root: int) -> int:
    """Bytes of memory that a process and its descendants hold, what they share being counted once. Slow, and exact."""
    total = 0
    for process in tree(root):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += int(line.split()[1]) * 1024
    return total


def held(process: int) -> int:
    """Bytes of anonymous and shared memory that a process holds."""
    total = 0
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            total += int(line.split()[1]) * 1024
    return total


def tree(root: int) -> list[int]:
    """A process and its descendants, as far as they can be seen."""
    found, waiting = [], [root]
    while waiting:
        process = waiting.pop()
        found.append(process)
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{process}/task"):
                with contextlib.suppress(OSError):
                    waiting += map(int, Path(f"/proc/{process}/task/{task}/children").read_text().split())
    return found


class GpuWatch:
    """Memory on the card, from outside: NVML's word on our processes, or `nvidia-smi`'s.

    In a container both may know processes by other numbers than ours: then what the whole card has gained since the
    watch began counts, which is right where nobody else uses the card. Once a session was seen by its own number, only
    such numbers count: one that is not named holds nothing yet. Cards that CUDA_VISIBLE_DEVICES leaves out, as for a
    worker that was given one of several, are not looked at. Nothing but MIG or MPS enforces a limit; a session above it
    is ended, after up to a quarter of a second.
    """

    numbered = False
    """Whether the card's processes are known to bear our numbers: found out once, for all watches."""

    def __init__(self) -> None:
        self._nvml = _nvml()
        self._next = 0.0
        self._last = 0
        self._before = self._card() if self.works else 0

    @property
    def works(self) -> bool:
        return self._nvml is not None or shutil.which("nvidia-smi") is not None

    def begin(self) -> None:
        """A session begins: what the one before it held is forgotten, once the card has it back."""
        until = time.monotonic() + (0.0 if self.numbered else GPU_BACK)
        while self._last and time.monotonic() < until and self._card() > self._before + self._last // 2:
            time.sleep(0.05)
        self._last, self._next = 0, 0.0

    def used(self, root: int) -> int:
        """Bytes that the processes under `root` hold on the card; looks at most four times a second."""
        if not self.works or time.monotonic() < self._next:
            return self._last
        self._next = time.monotonic() + GPU_INTERVAL
        ours, known = set(tree(root)), self._by_process()
        mine = [used for process, used in known.items() if process in ours]
        if any(mine):
            GpuWatch.numbered = True
        self._last = sum(mine) if self.numbered else max(0, self._card() - self._before)
        return self._last

    def _card(self) -> int:
        if self._nvml is not None:
            with contextlib.suppress(Exception):
                return sum(int(self._nvml.nvmlDeviceGetMemoryInfo(h).used) for h in self._handles())
        return sum(row[0] for row in _smi("--query-gpu=memory.used")) << 20

    def _by_process(self) -> dict[int, int]:
        found: dict[int, int] = {}
        if self._nvml is not None:
            with contextlib.suppress(Exception):
                for handle in self._handles():
                    for one in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                        found[one.pid] = found.get(one.pid, 0) + int(one.usedGpuMemory or 0)
                return found
        for row in _smi("--query-compute-apps=pid,used_memory"):
            if len(row) == 2:
                found[row[0]] = found.get(row[0], 0) + (row[1] << 20)
        return found

    def _handles(self) -> list:
        shown = named_gpus()
        if shown is None:
            return [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]
        return [self._nvml.nvmlDeviceGetHandleByIndex(int(one)) if one.isdecimal() else
                self._nvml.nvmlDeviceGetHandleByUUID(one) for one in shown]  # fmt: skip


def _nvml():
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    except Exception:  # not installed, or no driver
        return None


def _smi(query: str) -> list[list[int]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    shown = named_gpus()
    chosen = [] if shown is None else ["-i", ",".join(shown)]
    try:
        said = subprocess.run([program, query, "--format=csv,noheader,nounits", *chosen], capture_output=True,
                              text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = []
    for line in said.splitlines():
        with contextlib.suppress(ValueError):
            rows.append([int(part) for part in line.split(",")])
    return rows
