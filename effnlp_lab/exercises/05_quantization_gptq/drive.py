"""How the answers of lab 05 are called. Runs beside the student's code."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Batches:
    """Hands out batches one at a time, and counts how many of them were still held when the next one was due."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.held, self.most_held = batches, [], 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            copy = torch.empty_strided(batch.shape, batch.stride(), dtype=batch.dtype, device=batch.device)
            copy.copy_(batch)
            self.held.append(weakref.ref(copy.untyped_storage()))
            self.most_held = max(self.most_held, sum(ref() is not None for ref in self.held))
            yield copy
            del copy


def calibration_hessian(answer, batches):
    given = Batches(batches)
    hessian = answer(iter(given))
    return {"hessian": hessian, "held": given.most_held}


class WideOperations(TorchDispatchMode):
    """Counts the operations, and those that write more than `limit` numbers, products of matrices apart."""

    FREE = frozenset("mm bmm addmm addmm_ baddbmm empty empty_like empty_strided new_empty zeros zeros_like".split())

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.count, self.wide = limit, 0, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch's compiler at the first operation: seconds, inside a time limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in self.FREE and not getattr(func, "is_view", False):
            sizes = (x.numel() for x in tree_iter(out) if isinstance(x, Tensor))
            self.count += 1
            self.wide += max(sizes, default=0) > self.limit
        return out


def gptq_blocks(answer, weight, hessian, scale, zero, bits, block, count_wide=False):
    """`count_wide`: also tell how many operations there were, and how many wrote more than two blocks of columns."""
    if not count_wide:
        return {"codes": answer(weight, hessian, scale, zero, bits, block)}
    with WideOperations(2 * len(weight) * block) as seen:
        codes = answer(weight, hessian, scale, zero, bits, block)
    return {"codes": codes, "wide": seen.wide, "operations": seen.count}


def Int4Weight(answer, codes, scale, zero, what, x=None):  # noqa: N802  named like the exercise
    """`what`: the part that a case is about."""
    weight = answer(codes.clone(), scale, zero)
    if what == "pack":
        return {"packed": weight.packed}
    if what == "product":
        return {"product": weight.matmul(x)}
    return {"codes": weight.codes(), "held": bytes_held(weight)}


def bytes_held(weight: object) -> int:
    """Bytes of the tensors that an object keeps, in lists, tuples and dicts too; tensors that share memory once."""
    found: dict[int, int] = {}
    waiting, seen = [dict(vars(weight))], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
    return sum(found.values())
