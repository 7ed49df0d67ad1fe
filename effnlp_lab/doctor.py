"""`effnlp doctor`: one line for each thing the kit uses, with its state in words and the remedy where it is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from effnlp_lab.device import GIB, cuda_available, machine_memory_bytes, triton_mode

State = Literal["ok", "missing", "not needed here"]

NEEDED_DISK_BYTES = 5 * GIB
NEEDED_MEMORY_BYTES = 6 * GIB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `essential` means that no lab runs without it."""

    name: str
    state: State
    detail: str
    remedy: str = ""
    essential: bool = False

    def line(self) -> str:
        remedy = f" -> {self.remedy}" if self.remedy and self.state == "missing" else ""
        return f"{self.name:<14}{self.state:<17}{self.detail}{remedy}"


def main(as_json: bool = False) -> int:
    """Print the findings. Returns 0 unless something essential is missing."""
    findings = examine()
    broken = [finding.name for finding in findings if finding.essential and finding.state == "missing"]
    if as_json:
        print(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in findings]}, indent=1))
        return 2 if broken else 0
    for finding in findings:
        print(finding.line())
    print(f"Missing and needed: {', '.join(broken)}." if broken else "Ready: everything essential is here.")
    return 2 if broken else 0


def examine() -> list[Finding]:
    """Look at this machine and this environment."""
    on_gpu = _torch_works() and cuda_available()
    return [
        _python(),
        _torch(),
        _gpu(on_gpu),
        _triton(on_gpu),
        _package("transformers", essential=True),
        _package("tokenizers", essential=True),
        _bitsandbytes(on_gpu),
        _flash_attention(on_gpu),
        _package("jupyterlab", "pip install 'effnlp-lab[notebooks]'"),
        _package("papermill", "pip install 'effnlp-lab[notebooks]'"),
        _package("nbval", "pip install 'effnlp-lab[notebooks]'"),
        _package("jupytext", "pip install 'effnlp-lab[notebooks]'"),
        _nbgrader(),
        _bubblewrap(),
        _chromium(),
        _disk(),
        _memory(),
    ]


def chromium_path() -> str | None:
    """A Chromium or Chrome on PATH, or the one that playwright installed."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"):
        if path := shutil.which(name):
            return path
    cache = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    found = sorted(cache.glob("chromium-*/chrome-*/chrome"))
    return str(found[-1]) if found else None


def bubblewrap_error() -> str | None:
    """Why bubblewrap cannot start a sandbox here; None when it can."""
    program = shutil.which("bwrap")
    if program is None:
        return "bwrap is not on PATH"
    command = [program, "--ro-bind", "/", "/", "--unshare-net", "--unshare-pid", "--dev", "/dev", "true"]
    try:
        trial = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = trial.stderr.strip().splitlines() or [f"exit code {trial.returncode}"]
    return None if trial.returncode == 0 else lines[-1]


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info >= (3, 11):  # noqa: UP036 (a source tree can meet an older Python)
        return Finding("Python", "ok", f"{version} ({sys.executable})", essential=True)
    return Finding("Python", "missing", f"{version} is too old", "install Python 3.11 or 3.12", essential=True)


def _torch_works() -> bool:
    try:
        import torch  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def _torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("torch", "missing", str(error), "pip install 'torch>=2.11'", essential=True)
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        old = f"{torch.__version__} is too old"
        return Finding("torch", "missing", old, "pip install 'torch>=2.11'", essential=True)
    return Finding("torch", "ok", f"{torch.__version__} ({built})", essential=True)


def _gpu(on_gpu: bool) -> Finding:
    if not on_gpu:
        driver = _driver_version()
        if driver and _torch_works():
            found = f"NVIDIA driver {driver}, but torch finds no GPU"
            return Finding("GPU", "missing", found, "install a torch with CUDA")
        return Finding("GPU", "not needed here", "none found: the labs run on the CPU with small sizes")
    import torch

    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        half = "bf16" if card.major >= 8 else "no bf16, fp16 instead"
        cards.append(f"{card.name}, capability {card.major}.{card.minor}, {half}, {card.total_memory / GIB:.0f} GiB")
    return Finding("GPU", "ok", f"{'; '.join(cards)}; driver {_driver_version() or 'unknown'}")


def _driver_version() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def _triton(on_gpu: bool) -> Finding:
    version = _version("triton")
    if version is None:
        if platform.system() != "Linux":
            return Finding("Triton", "not needed here", "Linux only: every Triton exercise has a PyTorch twin")
        return Finding("Triton", "missing", "not installed", "pip install triton")
    words = {
        "compiled": "compiles for the GPU",
        "interpreted": "in its interpreter, on the CPU",
        "absent": "installed; kernels do not run in this process, the PyTorch twins do",
    }
    return Finding("Triton", "ok", f"{version}, {words[triton_mode('cuda' if on_gpu else 'cpu')]}")


def _package(name: str, remedy: str = "", essential: bool = False) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "missing", "not installed", remedy or f"pip install {name}", essential)
    return Finding(name, "ok", version, essential=essential)


def _bitsandbytes(on_gpu: bool) -> Finding:
    version = _version("bitsandbytes")
    if version is not None:
        return Finding("bitsandbytes", "ok", version)
    if not on_gpu:
        return Finding("bitsandbytes", "not needed here", "not installed; a peer that some measurements compare with")
    return Finding("bitsandbytes", "missing", "not installed", "pip install bitsandbytes")


def _flash_attention(on_gpu: bool) -> Finding:
    version = _version("flash_attn")
    if version is not None:
        return Finding("flash-attn", "ok", version)
    if not on_gpu:
        return Finding("flash-attn", "not needed here", "needs a GPU; a peer in attention benchmarks")
    remedy = "pip install --no-build-isolation flash-attn"
    return Finding("flash-attn", "missing", "not installed; attention benchmarks compare with SDPA alone", remedy)


def _nbgrader() -> Finding:
    version = _version("nbgrader")
    if version is None:
        return Finding("nbgrader", "not needed here", "not installed; instructors: pip install 'effnlp-lab[grading]'")
    beside = str(Path(sys.executable).parent)  # where the course's configuration looks, too
    if shutil.which("alembic") is None and shutil.which("alembic", path=beside) is None:
        return Finding("nbgrader", "missing", f"{version}, but `alembic`, which it calls, is not here",
                       "pip install alembic")
    return Finding("nbgrader", "ok", version)


def _bubblewrap() -> Finding:
    if platform.system() != "Linux":
        return Finding("bubblewrap", "not needed here", "Linux only; grading needs it, the labs do not")
    error = bubblewrap_error()
    if error is None:
        return Finding("bubblewrap", "ok", "starts a sandbox")
    if shutil.which("bwrap") is None:
        return Finding("bubblewrap", "missing", f"{error}; grading needs it", "apt-get install bubblewrap")
    remedy = "allow user namespaces (`sysctl user.max_user_namespaces`; on Ubuntu " \
        "`sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`), or grade as root"
    return Finding("bubblewrap", "missing", f"cannot start a sandbox: {error}", remedy)


def _chromium() -> Finding:
    path = chromium_path()
    if path:
        return Finding("Chromium", "ok", path)
    return Finding("Chromium", "not needed here", "not found; only the browser tests use it: apt-get install chromium")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    if free >= NEEDED_DISK_BYTES:
        return Finding("disk", "ok", f"{free / GIB:.0f} GiB free")
    return Finding("disk", "missing", f"{free / GIB:.1f} GiB free", f"free {NEEDED_DISK_BYTES / GIB:.0f} GiB")


def _memory() -> Finding:
    try:
        total = machine_memory_bytes()
    except ImportError as error:
        return Finding("memory", "missing", str(error), "pip install psutil")
    if total >= NEEDED_MEMORY_BYTES:
        return Finding("memory", "ok", f"{total / GIB:.0f} GiB, {os.cpu_count()} cores")
    remedy = f"use a machine with {NEEDED_MEMORY_BYTES / GIB:.0f} GiB, or run one notebook at a time"
    return Finding("memory", "missing", f"{total / GIB:.1f} GiB", remedy)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
