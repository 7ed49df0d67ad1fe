"""Mends Triton 3.6's interpreter under numpy 2.4, and makes it stricter and faster, without importing Triton too early.

A kernel's loop whose bound is known only at run time, `for start in range(0, length, BLOCK)`, asks the interpreter to
turn an array of one number into a Python int, which numpy refuses since 2.4 ("only 0-dimensional arrays can be
converted").
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULE = "triton.runtime.interpreter"


def mend_interpreter() -> None:
    """Mend the interpreter now where it is loaded, else when it is. Does nothing the second time."""
    if MODULE in sys.modules:
        _mend(sys.modules[MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Waits for the interpreter to be imported, steps aside, and mends it once it is there."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_mend(module: ModuleType) -> None:
                load(module)
                _mend(module)

            spec.loader.exec_module = load_and_mend
        return spec


def _mend(module: ModuleType) -> None:
    patch = getattr(module, "_patch_lang_tensor", None)
    if patch is None or getattr(patch, "mended", False):  # another Triton than we know: leave it as it is
        return

    def mended(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    mended.mended = True
    module._patch_lang_tensor = mended
    _patch_once(module)
    _watch_memory(module)


def _patch_once(module: ModuleType) -> None:
    """Exchange the language's functions once a launch: every call of `tl.cdiv` or `tl.sum` would do it again."""
    patch, launch, nothing = module._patch_lang, module.GridExecutor.__call__, module._LangPatchScope
    patched: set[int] = set()  # the globals, by their ids, of what runs in this launch

    def patch_once(fn):
        if id(fn.__globals__) in patched:
            return nothing()
        scope = patch(fn)
        patched.add(id(fn.__globals__))
        return scope

    def launch_afresh(self, *args, **named):
        patched.clear()
        try:
            return launch(self, *args, **named)
        finally:
            patched.clear()

    module._patch_lang, module.GridExecutor.__call__ = patch_once, launch_afresh


def _watch_memory(module: ModuleType) -> None:
    """Make the interpreter as strict as a card can be: see the two paragraphs above."""
    import numpy as np

    executor, builder = module.GridExecutor, module.InterpreterBuilder
    prepare, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    spans: list[tuple[int, int]] = []

    def note_spans(self, args_dev, kwargs):
        args, named = prepare(self, args_dev, kwargs)
        spans[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in _storages([*args, *named.values()])]
        return args, named

    def check(verb, pointers, mask):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, end in spans:
            inside |= (addresses >= first) & (addresses < end)
        if spans and not inside.all():
            raise IndexError(
                f"the kernel {verb} outside its tensors at {int((~inside).sum())} of {addresses.size} addresses: "
                "is a mask missing, or a stride or an offset wrong?"
            )

    def checked_load(self, ptrs, mask, other, *rest, **named):  # named: from a tensor descriptor's load
        check("reads", ptrs, mask)
        if other is None:
            kind = ptrs.get_element_ty()
            dtype = module._get_np_dtype(kind)
            poison = np.nan if np.issubdtype(dtype, np.floating) else 0x7FC0 if kind.is_bf16() else np.iinfo(dtype).max
            other = module.TensorHandle(np.full_like(ptrs.data, poison, dtype=dtype), kind)
        return load(self, ptrs, mask, other, *rest, **named)

    def checked_store(self, ptrs, value, mask, *rest, **named):
        check("writes", ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **named)

    executor._init_args_hst = note_spans
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store


def _storages(values):
    """The storages of the tensors among a launch's arguments."""
    for value in values:
        if isinstance(value, tuple):
            yield from _storages(value)
        else:
            value = getattr(value, "base", value)
            if hasattr(value, "untyped_storage"):
                yield value.untyped_storage()
