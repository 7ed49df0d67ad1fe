"""Counts what an answer costs on any machine: peak live bytes, bytes moved, floating-point operations, launches.

Nothing here is timed. A dispatch mode sees every PyTorch operation: the storages that its outputs open are live until
they are freed, its inputs are read and its outputs written. Triton kernels are counted as they are launched; the
meter pauses inside Triton's interpreter, whose copies are not the kernel's.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


@dataclass
class Usage:
    """What ran under a meter. `peak_bytes` counts live bytes above those that were live at the start."""

    peak_bytes: int = 0
    bytes_moved: int = 0
    flops: int = 0
    launches: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Meter(TorchDispatchMode):
    """`with Meter() as meter: ...` then read `meter.usage`. One meter measures one thread's work, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.usage = Usage()
        self._live = 0
        self._known: dict[int, weakref.ref] = {}
        self._paused = 0
        self._patches = ExitStack()

    def __enter__(self) -> Meter:
        self._patches = ExitStack()
        for owner, name in _triton_launchers():
            self._patches.enter_context(mock.patch.object(owner, name, self._counting(getattr(owner, name))))
        return super().__enter__()

    def __exit__(self, *exc_info) -> None:
        super().__exit__(*exc_info)
        self._patches.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def _counting(self, launch):
        def counted(launcher, *args, **kwargs):
            if kwargs.get("warmup"):
                return launch(launcher, *args, **kwargs)
            self.usage.launches += 1
            with self.paused():
                return launch(launcher, *args, **kwargs)

        return counted

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch's compiler at the first operation: seconds, inside a time limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        inputs = _tensors((*args, *kwargs.values()))
        for tensor in inputs:
            self._open(tensor, count=False)  # was live before the meter saw it
        out = func(*args, **kwargs)
        outputs = _tensors((out,))
        for tensor in outputs:
            self._open(tensor, count=True)
        if not getattr(func, "is_view", False):
            self.usage.launches += 1
            self.usage.bytes_moved += sum(map(_visible_bytes, inputs)) + sum(map(_visible_bytes, outputs))
            formula = _formula_of(getattr(func, "overloadpacket", func))
            if formula is not None:
                self.usage.flops += int(formula(*args, **kwargs, out_val=out))
        return out

    def _open(self, tensor: torch.Tensor, count: bool) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, meta or wrapped tensors own no storage
            return
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None and known() is storage:
            return
        charged = size if count else 0

        def freed(_, key=key, charged=charged):
            self._known.pop(key, None)
            self._live -= charged

        self._known[key] = weakref.ref(storage, freed)
        self._live += charged
        self.usage.peak_bytes = max(self.usage.peak_bytes, self._live)


def measure(function, *args, **kwargs) -> tuple[Any, Usage]:
    """Run `function` under a meter; return its result and its usage."""
    with Meter() as meter:
        result = function(*args, **kwargs)
    return result, meter.usage


@functools.cache
def _formula_of(operation: Any) -> Callable | None:
    """How many operations it makes; in place as many as otherwise (torch lists `addmm`, and not `addmm_`)."""
    name = getattr(operation, "__name__", "")
    plain = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
    return flop_registry.get(operation) or flop_registry.get(plain)


def _tensors(values: tuple) -> list[torch.Tensor]:
    """The tensors among an operation's arguments or results, in lists of them too."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple, dict)):
            found += [t for t in tree_iter(value) if isinstance(t, torch.Tensor)]
    return found


def _visible_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor shows, counting an expanded dimension once."""
    if tensor.layout != torch.strided:
        return 0
    count = 1
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= n if stride or n == 0 else 1
    return count * tensor.element_size()


def _triton_launchers() -> list[tuple[type, str]]:
    """The methods through which kernels are launched, of the Triton that is already imported (none otherwise)."""
    if "triton" not in sys.modules:
        return []
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    return [(JITFunction, "run"), (GridExecutor, "__call__")]
