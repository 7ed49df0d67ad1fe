"""Triton where it is installed, else stand-ins with which a notebook's kernels can be defined and not run.

Triton has Linux wheels only. `from effnlp_lab.notebook.portable import tl, triton` works everywhere: without Triton
the cells of a lab still run, and launching a kernel says in one sentence to solve the PyTorch twin.
"""

from __future__ import annotations

from typing import Any

from effnlp_lab.errors import DeviceError


class _Kernel:
    """Stands for a kernel that cannot run here."""

    def __init__(self, function: Any) -> None:
        self.fn = function
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __getitem__(self, grid: Any) -> Any:
        raise DeviceError(
            f"{self.__name__} needs Triton, which is not installed here (it has Linux wheels only): "
            "solve its PyTorch twin, or open the lab in WSL, a dev container or Colab."
        )


class _AbsentTriton:
    @staticmethod
    def jit(function: Any = None, **options: Any) -> Any:
        return _Kernel(function) if function is not None else _Kernel

    @staticmethod
    def cdiv(count: int, size: int) -> int:
        return -(-count // size)

    @staticmethod
    def next_power_of_2(count: int) -> int:
        return 1 << max(0, count - 1).bit_length()


class _AbsentLanguage:
    class constexpr:
        """The annotation of a kernel's compile-time arguments."""


try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = _AbsentTriton(), _AbsentLanguage()

__all__ = ["tl", "triton"]
