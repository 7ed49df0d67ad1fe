"""Which device, dtype and size we run on, in which mode Triton runs, and how fast the device can be at best.

This module alone decides. `EFFNLP_DEVICE` ("auto", "cpu", "cuda") and `EFFNLP_FAST` ("auto", "0", "1", "true", "false")
override what a notebook asks for, because nbval cannot inject parameters. torch is imported late, so that
`import effnlp_lab` stays quick and can settle Triton's mode before anything imports Triton.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from effnlp_lab.errors import DeviceError
from effnlp_lab.interpreter import mend_interpreter

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
TritonMode = Literal["compiled", "interpreted", "absent"]

GIB = 1024**3
_FAST_WORDS = {"auto": None, "1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True)
class Device:
    """What a notebook runs on.

    `dtype` is the half precision that the device computes in at full speed: bfloat16 from compute capability 8.0,
    float16 from 7.0, else float32. `triton` is "compiled" on a GPU, "interpreted" in Triton's interpreter, and "absent"
    where this process cannot run a Triton kernel on this device: use the PyTorch twin. `fast` asks for small sizes.
    `memory_bytes` is the memory of the card, or what this process may use of the machine.
    """

    kind: Literal["cpu", "cuda"]
    fast: bool
    name: str
    dtype: torch.dtype
    triton: TritonMode
    capability: tuple[int, int] | None
    memory_bytes: int

    @property
    def torch(self) -> torch.device:
        """The `torch.device` to put tensors on."""
        import torch

        return torch.device(self.kind)

    def pick(self, *, fast: Value, full: Value) -> Value:
        """`fast` in fast mode, else `full`: the two sizes of an experiment side by side."""
        return fast if self.fast else full

    def describe(self) -> str:
        """One line for a notebook's first output."""
        card = f", compute capability {self.capability[0]}.{self.capability[1]}" if self.capability else ""
        size = "fast (small) sizes" if self.fast else "full sizes"
        dtype = str(self.dtype).removeprefix("torch.")
        memory = f"{self.memory_bytes / GIB:.1f} GiB"
        return f"{self.kind}: {self.name}{card}, {memory}, {dtype}, {size}, Triton {self.triton}"

    def can(self) -> str:
        """What a lab can do here, in a sentence or two for a student."""
        if self.triton == "absent":
            kernels = "There is no Triton for this device: its exercises have PyTorch twins for the same points."
        elif self.triton == "interpreted":
            kernels = "Triton kernels run in Triton's interpreter: right, and slow."
        else:
            kernels = "Triton kernels are compiled for this card."
        if self.kind == "cpu":
            colab = " On Colab a GPU is under Runtime, Change runtime type." if "google.colab" in sys.modules else ""
            return f"On a CPU every lab runs, at small sizes. {kernels}{colab}"
        if self.capability and self.capability < (8, 0):
            half = str(self.dtype).removeprefix("torch.")
            return f"{kernels} This card computes in {half}, not in bfloat16; flash-attn does not serve it."
        return kernels


@dataclass(frozen=True)
class Ceilings:
    """The best rates this device reached: bytes read plus written by a copy, 2mnk operations of a matrix product."""

    copy_bytes_per_second: float
    matmul_flops_per_second: float


def resolve(device: str = "auto", fast: str | bool | int = "auto") -> Device:
    """Decide what to run on.

    `EFFNLP_DEVICE` and `EFFNLP_FAST`, where set, replace the arguments. "auto" means the GPU if there is one, and fast
    sizes on a CPU. Raises DeviceError for an unknown word, and for "cuda" where there is no CUDA device.
    """
    kind = _kind(os.environ.get("EFFNLP_DEVICE") or device)
    wanted = _fast(os.environ.get("EFFNLP_FAST") or fast)
    small = kind == "cpu" if wanted is None else wanted
    return _cuda_device(small) if kind == "cuda" else _cpu_device(small)


def cuda_available() -> bool:
    """Whether torch can use a CUDA device here. Creates no CUDA context, so that the process may still fork."""
    if not _driver_present():
        return False
    import torch

    return torch.cuda.is_available() if torch.cuda.is_initialized() else torch.cuda.device_count() > 0


def settle_triton() -> None:
    """Turn on Triton's interpreter where kernels will run on the CPU. Called by `import effnlp_lab`.

    Triton decides when it is imported, so this must come first: raises DeviceError when Triton was imported before,
    compiled, and there is no CUDA device. A `TRITON_INTERPRET` that is already set is respected ("0" serves to compile
    kernels for a card that is not here). Does nothing where Triton is not installed.
    """
    mend_interpreter()
    if _interpreter_setting() is False or importlib.util.find_spec("triton") is None or not _runs_on_cpu():
        return
    if _imported_compiled():
        raise DeviceError(
            "Triton was imported before effnlp_lab, and without a CUDA device it has to start in its interpreter: "
            "put `import effnlp_lab` above the imports of triton, transformers, peft and bitsandbytes, then restart."
        )
    os.environ["TRITON_INTERPRET"] = "1"


def triton_mode(kind: str) -> TritonMode:
    """How Triton kernels run on a device of this kind in this process."""
    if importlib.util.find_spec("triton") is None:
        return "absent"
    if _interpreter_setting() and not _imported_compiled():
        return "interpreted"
    return "compiled" if kind == "cuda" else "absent"


def ceilings(device: Device) -> Ceilings:
    """The rates of a large copy and of a large matrix product in `device.dtype`, measured once a process and kind."""
    return _measured_ceilings(device.kind, device.dtype)


def _kind(word: str) -> str:
    word = str(word).strip().lower()
    if word not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"Unknown device {word!r}: expected 'auto', 'cpu' or 'cuda' (in DEVICE or EFFNLP_DEVICE).")
    if word == "auto":
        return "cuda" if cuda_available() else "cpu"
    if word == "cuda" and not cuda_available():
        raise DeviceError(
            "A CUDA device was asked for and torch finds none: use DEVICE = 'auto' or 'cpu', or see `effnlp doctor`."
        )
    return word


def _fast(word: str | bool | int) -> bool | None:
    key = str(word).strip().lower()
    if key not in _FAST_WORDS:
        raise DeviceError(f"Unknown value {key!r} for fast: expected 'auto', '0', '1', 'true' or 'false'.")
    return _FAST_WORDS[key]


def _interpreter_setting() -> bool | None:
    """What TRITON_INTERPRET says, as Triton reads it; None where it is not set."""
    word = os.environ.get("TRITON_INTERPRET", "").strip().lower()
    return word in ("1", "true", "yes", "on", "y") if word else None


def _runs_on_cpu() -> bool:
    return os.environ.get("EFFNLP_DEVICE", "").strip().lower() == "cpu" or not cuda_available()


@functools.cache
def _driver_present() -> bool:
    """Whether NVIDIA's driver library loads: without it no torch finds a GPU, and we need not import torch to know."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _imported_compiled() -> bool:
    """Whether Triton was imported in this process with its interpreter off."""
    language = sys.modules.get("triton.language")
    probe = getattr(language, "sum", None)  # a jit function of Triton's own library shows the mode of its import
    return probe is not None and type(probe).__name__ != "InterpretedFunction"


def _cpu_device(fast: bool) -> Device:
    import torch

    return Device("cpu", fast, cpu_name(), torch.float32, triton_mode("cpu"), None, machine_memory_bytes())


def _cuda_device(fast: bool) -> Device:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (properties.major, properties.minor)
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16 if capability >= (7, 0) else torch.float32
    return Device("cuda", fast, properties.name, dtype, triton_mode("cuda"), capability, properties.total_memory)


def cpu_name() -> str:
    """The processor's name, as Linux gives it, or what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_memory_bytes() -> int:
    """The memory that this process may use: the machine's, or its control group's limit where that is less."""
    import psutil

    limits = [psutil.virtual_memory().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits)


@functools.cache
def _measured_ceilings(kind: str, dtype: torch.dtype) -> Ceilings:
    import torch

    copied, side = (GIB, 8192) if kind == "cuda" else (GIB // 8, 1024)
    source = torch.ones(copied, dtype=torch.uint8, device=kind)
    target = torch.empty_like(source)
    left = torch.randn(side, side, device=kind).to(dtype)
    product = torch.empty_like(left)
    copy_seconds = _best_seconds(lambda: target.copy_(source), kind)
    matmul_seconds = _best_seconds(lambda: torch.mm(left, left, out=product), kind)
    return Ceilings(2 * copied / copy_seconds, 2 * side**3 / matmul_seconds)


def _best_seconds(work, kind: str, repeats: int = 7) -> float:
    """The least time of `repeats` runs after two to warm up: CUDA events on a GPU, else the clock."""
    import torch

    def once() -> float:
        if kind == "cpu":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return min([once() for _ in range(repeats + 2)][2:])
