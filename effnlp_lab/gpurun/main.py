"""The verb `gpu`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effnlp_lab.device import resolve
from effnlp_lab.errors import DeviceError, UsageError
from effnlp_lab.gpurun import expected, recorded, report
from effnlp_lab.gpurun.execute import commit_of, execute, tree_keys
from effnlp_lab.gpurun.steps import Step, all_steps, choose
from effnlp_lab.notebook.bench import machine
from effnlp_lab.notebook.book import write as write_book
from effnlp_lab.runner import source_root


def main(only: Sequence[str] = (), force: bool = False, out: Path | None = None, listed: bool = False,
         record: bool = False, go_on: bool = False) -> int:  # fmt: skip
    """Run what is not done on this tree and card; return 0 when nothing of it failed, was skipped, died or fell back.

    record: write what was measured into benchmarks/ instead. go_on: what is recorded there counts as done.
    Raises UsageError outside of a checkout, DeviceError without a GPU.
    """
    root = source_root()
    if root is None:
        raise UsageError("The GPU run needs the tests, which are not installed: run it in a checkout of the course.")
    if record:
        kept = recorded.keep((out or root / "build" / "gpu").resolve(), root / "benchmarks")
        for path in filter(None, (expected.record(root / "benchmarks"), kept)):
            print(f"wrote {path.relative_to(root)}")
        return 0
    if listed:
        print("\n".join(f"{step.part:<11}{step.name}" for step in all_steps(root, resolve("auto", "0"))))
        return 0
    device = resolve("cuda", "0")
    if device.kind != "cuda":  # EFFNLP_DEVICE holds for notebooks, and would send this to the CPU for hours
        raise DeviceError("The GPU run is for a CUDA device, and EFFNLP_DEVICE asks for the CPU: unset it.")
    steps = all_steps(root, device)
    out = (out or root / "build" / "gpu").resolve()
    return run(steps, choose(steps, only), out, root, machine(device), force, go_on)


def run(steps: Sequence[Step], chosen: Sequence[Step], out: Path, root: Path, on: Mapping[str, Any],
        force: bool = False, go_on: bool = False) -> int:  # fmt: skip
    """Run `chosen` of all `steps` on the machine `on`, the report written anew after each. Returns 0 or 1."""
    records = expected.load(root / "benchmarks" / expected.NAME)
    keys, commit = tree_keys(root, on["device"], steps), commit_of(root)

    def tell(_: Any = None) -> dict[str, Any]:
        told = report.gather(steps, chosen, out, keys, on, commit, records)
        report.write(told, out)
        return told

    out.mkdir(parents=True, exist_ok=True)
    if go_on and (names := recorded.restore(root / "benchmarks", out, steps, keys)):
        print(f"recorded for this tree and card: {', '.join(names)}")
    execute(chosen, out, root, keys, force, tell)
    told = tell()
    if any(step.part == "bench" for step in chosen):
        _book(chosen, out, root)
    for sentence in told["problems"]:
        print(f"WRONG: {sentence}")
    state = "failed" if not told["ok"] else "passed" if told["whole"] else "ok so far"
    rest = f"; not run yet: {', '.join(told['not_run'])}" if told["not_run"] else ""
    print(f"GPU run {state} on {on['device']}{rest}. The report: {out / 'report.html'}")
    return 0 if told["ok"] else 1


def _book(chosen: Sequence[Step], out: Path, root: Path) -> None:
    """Gather what the benchmarks wrote into a benchmark book of this run."""
    folder = out / "benchmarks"
    folder.mkdir(exist_ok=True)
    for step in chosen:
        if step.part == "bench":
            name = step.name.removeprefix("bench-")
            for path in (root / "benchmarks" / f"{name}.py", *(out / step.name).glob(f"{name}.*")):
                if path.is_file():
                    shutil.copy(path, folder)
    if any(folder.glob("*.json")):
        write_book(folder)
