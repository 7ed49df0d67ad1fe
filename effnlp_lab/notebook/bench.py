"""Timing beside the peers: contestants in turns in one process, medians, and the ratio to the production library.

A time alone says little: the machine's clock, its neighbours and its caches move. So all contestants do the same work
in turns, and the figure to read is the ratio. On a GPU the caller rotates several copies of the inputs, larger together
than the L2 cache, where a real run would find them in memory.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from effnlp_lab.device import Device, cpu_name, resolve
from effnlp_lab.errors import UsageError

# Units, and how a time in seconds becomes a figure: work is in bytes, floating-point operations or submissions.
UNITS = {"s": 0.0, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "submissions/min": 1 / 60}
PACKAGES = (
    "torch", "triton", "numpy", "transformers", "tokenizers", "tiktoken", "datasets", "peft", "bitsandbytes",
    "flash_attn", "liger_kernel", "scipy",
)
FOLDER = "benchmarks"
NO_CUDNN_NOTE = "transformers' generate runs without cuDNN's attention, which would prepare a plan for each length."
QUEUED_NOTE = "The GPU's time alone: the host starts each run while the GPU is still busy with something else."


@dataclass
class Comparison:
    """The times of each contestant in seconds, and what to make of them.

    `unit` is the unit of the figures and `work` what one run does, in bytes or operations. `limit` is the hardware's
    limit in that unit. `missing` names peers that could not run, and why. `checks` says what was verified in the run.
    `cpu_seconds`, on a CPU, is the time of all threads and children on a core: what is left when others took turns.
    """

    title: str
    seconds: dict[str, list[float]]
    ours: str
    peer: str
    unit: str = "s"
    work: float | None = None
    limit: float | None = None
    missing: dict[str, str] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[name])

    def figure(self, name: str) -> float:
        """The median in `unit`: seconds, or work a second."""
        return self.median(name) if self.unit == "s" else self.work / self.median(name) / UNITS[self.unit]

    @property
    def ratio(self) -> float | None:
        """How many times faster ours is than the peer (below 1: slower); None where the peer is missing."""
        return self.median(self.peer) / self.median(self.ours) if self.peer in self.seconds else None

    def rows(self) -> list[list[str]]:
        """Name, figure, spread, ratio to the peer: one row a contestant, and one each for the limit and the missing."""
        base = self.median(self.peer) if self.peer in self.seconds else None
        rows = []
        for name, times in self.seconds.items():
            ratio = f"{base / self.median(name):.2f}x" if base else "-"
            spread = f"{number(min(times))} to {number(max(times))} s"
            row = [self._role(name), f"{number(self.figure(name))} {self.unit}", spread, ratio]
            if self.cpu_seconds:
                row.append(f"{number(statistics.median(self.cpu_seconds[name]))} s")
            rows.append(row)
        rows += [[self._role(name), "not run", reason, "-"] for name, reason in self.missing.items()]
        if self.limit is not None:
            best = self.limit / self.figure(self.ours) if self.unit == "s" else self.figure(self.ours) / self.limit
            rows.append(["hardware limit", f"{number(self.limit)} {self.unit}", f"ours reaches {best:.0%}", "-"])
        return [row + [""] * (len(self.header()) - len(row)) for row in rows]

    def header(self) -> list[str]:
        """The names of the columns of `rows`."""
        names = ["contestant", "median", "range or reason", f"vs {self.peer}"]
        return [*names, "CPU time"] if self.cpu_seconds else names

    def table(self) -> str:
        """Plain text for a terminal."""
        return "\n".join([self.title, *_columns([self.header(), *self.rows()]), *self._remarks()])

    def markdown(self) -> str:
        """The same as a block of Markdown."""
        lines = [f"### {self.title}", "", "| " + " | ".join(self.header()) + " |", "|" + "---|" * len(self.header())]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        remarks = self._remarks()
        return "\n".join(lines + ([""] + [f"- {remark}" for remark in remarks] if remarks else []))

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        content["median_seconds"] = {name: self.median(name) for name in self.seconds}
        content["ratio"] = self.ratio
        return content

    def save(self, path: str | Path) -> Path:
        """Write this comparison alone as JSON to `path`."""
        return write_json(Path(path), self.to_json())

    def _role(self, name: str) -> str:
        return f"{name} (ours)" if name == self.ours else f"{name} (peer)" if name == self.peer else name

    def _remarks(self) -> list[str]:
        return [f"Verified: {check}." for check in self.checks] + list(self.notes)


def compare(
    title: str,
    contestants: Mapping[str, Callable[[], Any]],
    *,
    ours: str,
    peer: str,
    unit: str = "s",
    work: float | None = None,
    repeats: int = 7,
    warmup: int = 2,
    device: Device,
    limit: float | None = None,
    missing: Mapping[str, str] | None = None,
    queued: bool | float = False,
    in_a_row: int = 1,
) -> Comparison:
    """Run every contestant `warmup` times, then `repeats` rounds of one run each, in turns.

    unit: "s", or a rate ("MB/s", "TFLOP/s", ...) for which `work` is the bytes or operations of one run. Times are CUDA
    events on a GPU, else the clock. On a GPU the host's part is included, as a caller waits for it when a kernel is
    short; `queued` leaves it out for all alike (see `timed`), and a note says so. in_a_row: runs between two events,
    for kernels so short that the events themselves would count; what is kept is the time of one. Raises UsageError for
    an unknown unit, a rate without work, and an unknown contestant.
    """
    missing = dict(missing or {})
    if unit not in UNITS:
        raise UsageError(f"Unknown unit {unit!r}: expected one of {', '.join(UNITS)}.")
    if unit != "s" and not work:
        raise UsageError(f"A rate in {unit} needs work: the bytes or operations of one run.")
    if ours not in contestants:
        raise UsageError(f"{ours!r} is not among the contestants: {', '.join(contestants)}.")
    if peer not in contestants and peer not in missing:
        raise UsageError(f"The peer {peer!r} is neither a contestant nor named in missing: add it to one of them.")
    if repeats < 1:
        raise UsageError(f"repeats={repeats} measures nothing: give at least 1.")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contestants} if device.kind == "cpu" else {}
    for round_number in range(warmup + repeats):
        for name, contestant in contestants.items():
            before = _cpu_time()
            elapsed = timed(contestant, device, queued=queued, in_a_row=in_a_row)
            if round_number >= warmup:
                seconds[name].append(elapsed)
                if cpu_seconds:
                    cpu_seconds[name].append(_cpu_time() - before)
    notes = [QUEUED_NOTE] if queued and device.kind == "cuda" else []
    if in_a_row > 1:
        notes.append(f"Each measurement is of {in_a_row} runs in a row, and a {in_a_row}th of their time.")
    return Comparison(title, seconds, ours, peer, unit, work, limit, missing, notes=notes, cpu_seconds=cpu_seconds)


def _cpu_time() -> float:
    """Seconds on a core, of this process and of those that it has waited for."""
    return time.process_time() + sum(os.times()[2:4])


def timed(work: Callable[[], Any], device: Device, *, queued: bool | float = False, in_a_row: int = 1) -> float:
    """Seconds of one run, the mean of `in_a_row`: between CUDA events on a GPU, by the clock elsewhere.

    With `queued` the GPU is kept busy for about a millisecond (or so many seconds) before the first event, while the
    host starts the work: what is timed is then the GPU alone, as in a program that keeps it fed. Work that waits for
    the GPU must not use it.
    """
    if device.kind != "cuda":
        start = time.perf_counter()
        for _ in range(in_a_row):
            work()
        return (time.perf_counter() - start) / in_a_row
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if queued:
        busy = 1e-3 * (1 + in_a_row // 4) if queued is True else queued
        torch.cuda._sleep(int(busy * 2e9))  # clock cycles
    begin.record()
    for _ in range(in_a_row):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / in_a_row


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN out of PyTorch's attention, for a peer whose text grows.

    On a recent GPU PyTorch prefers cuDNN, which prepares a plan for every new shape, some tenths of a second each; a
    cache that grows has a new shape at every token, and a peer would be timed making plans.
    """
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def machine(device: Device) -> dict[str, Any]:
    """What the figures were measured on: device, driver, CPU, cores, how busy they are, and versions of the peers."""
    found: dict[str, Any] = {
        "device": device.name,
        "kind": device.kind,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }
    if device.kind == "cuda":
        found["driver"] = _driver()
    return found


def describe(found: Mapping[str, Any]) -> str:
    """`machine` as one line."""
    card = f"{found['device']} (driver {found['driver']}), " if found["kind"] == "cuda" else ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    load = f" (load average {found['load_average']})" if found["load_average"] is not None else ""
    return f"{card}{found['cpu']}, {found['cores']} cores{load}, Python {found['python']}, {versions}"


def save_suite(name: str, comparisons: Iterable[Comparison], folder: Path, command: str, device: Device) -> Path:
    """Write `folder/name.json` and `folder/name.md`: the figures, the command that made them and the machine."""
    comparisons = list(comparisons)
    found = machine(device)
    content = {
        "suite": name,
        "command": command,
        "machine": found,
        "comparisons": [comparison.to_json() for comparison in comparisons],
    }
    head = [f"## {name}", "", f"Made by `{command}` on {describe(found)}.", "", ""]
    blocks = "\n\n".join(comparison.markdown() for comparison in comparisons)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(head) + blocks + "\n", encoding="utf-8")
    return write_json(folder / f"{name}.json", content)


def suites(folder: Path | None = None) -> dict[str, Path]:
    """The benchmarks that there are: `benchmarks/<name>.py`, with `run(device, folder)`, which gives comparisons."""
    folder = suite_folder() if folder is None else folder
    return {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}


def needs(suite: Path) -> str | None:
    """The device that a benchmark names in `NEEDS = "cuda"`, read from its text."""
    for node in ast.parse(suite.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "NEEDS" for t in node.targets):
            return ast.literal_eval(node.value)
    return None


def suite_folder() -> Path:
    """`benchmarks/` here or beside the package; it is not installed with it. Raises UsageError where it is absent."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / FOLDER).is_dir():
            return root / FOLDER
    raise UsageError(f"There is no folder {FOLDER}/ here: run this in a checkout of the repository.")


def main(names: Iterable[str], device: str | Device = "auto", folder: Path | None = None,
         out: Path | None = None, book: bool = False) -> int:  # fmt: skip
    """Run the named suites (all when none is named), print their tables and write their files. Returns 0.

    The files go to `out`, by default into the folder of the suites, where they are gathered into the benchmark book.
    With `book` nothing is measured: the book is written from the files that are there.

    A suite may name the device that it needs in `NEEDS = "cuda"`: elsewhere it is reported as not run.
    Raises UsageError for an unknown name.
    """
    known = suites(folder)
    names = list(names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"There is no benchmark {unknown[0]!r}: choose one of {', '.join(known) or '(none)'}.")
    device = device if isinstance(device, Device) else resolve(device)
    out = Path(out or (folder if folder else suite_folder()))
    for name in () if book else names or known:
        suite = _load(name, known[name])
        if getattr(suite, "NEEDS", device.kind) != device.kind:
            print(f"{name}: not run, needs {suite.NEEDS} and this is {device.kind}.\n")
            continue
        comparisons = []
        for comparison in suite.run(device, known[name].parent):
            comparisons.append(comparison)
            print(comparison.table() + "\n", flush=True)
        command = f"python3 -m effnlp_lab bench {shlex.quote(name)}"
        save_suite(name, comparisons, out, command, device)
    if book or out == (folder or suite_folder()):
        from effnlp_lab.notebook.book import write as write_book

        readme = out.parent / "README.md"
        for path in write_book(out, readme if readme.is_file() and out.name == FOLDER else None):
            print(f"wrote {path}")
    return 0


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is readable."""
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2e}"


def write_json(path: Path, content: Any) -> Path:
    """Write JSON beside `path` and rename, so that an interruption leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"effnlp_benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not callable(getattr(module, "run", None)):
        raise UsageError(f"{path.name} is no benchmark: it needs a function run(device, folder).")
    return module


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else version
    except Exception:  # no NVML binding, or no driver library: the figure stands without it
        pass
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return "unknown"
