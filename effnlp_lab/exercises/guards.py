"""What drives of kernels share: marks around their tensors, and a watch on what PyTorch does for them.

Imports torch alone, for it runs beside the student's code.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GUARD = 1 << 16  # numbers that belong to nobody, before and after each tensor
UNWRITTEN = -12288.0  # what an output holds before the answer runs: exact in every dtype


class Operations(TorchDispatchMode):
    """Notes the largest tensor that one PyTorch operation computed with, and the operation's name.

    Views, allocations, copies and joins compute nothing; of a load by index only what was loaded counts.
    """

    FREE = frozenset(
        """empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros ones new_ones full
        full_like new_full fill_ zero_ copy_ _to_copy clone cat stack set_ lift_fresh _local_scalar_dense index_put_
        _index_put_impl_ scatter_ arange item detach alias contiguous resize_""".split()
    )
    LOADS = frozenset("index gather index_select take masked_select".split())

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.name = 0, ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch's compiler at the first operation: seconds, inside a time limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.FREE and not getattr(func, "is_view", False):
            seen = out if name in self.LOADS else (out, args, kwargs)
            size = max((t.numel() for t in tree_iter(seen) if isinstance(t, torch.Tensor)), default=0)
            if size > self.largest:
                self.largest, self.name = size, name
        return out
