"""The tensors of a paged cache: one for all layers, so that a page is copied for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effnlp_lab.errors import UsageError
from effnlp_lab.paged.sizes import cache_bytes_per_token

SMALLEST_PAGE = 16


class PagedCache:
    """Keys and values of all layers: [layers, 2, pages, kv_heads, page_size, head_dim].

    A page of one head is a contiguous [page_size, head_dim] block, which a kernel reads in whole lines. page_size is a
    power of two from 16. Raises UsageError for another.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, pages: int, page_size: int = 16, *,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        check_page_size(page_size)
        self.page_size, self.pages = page_size, pages
        self.data = torch.zeros(layers, 2, pages, kv_heads, page_size, head_dim, dtype=dtype, device=device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [pages, kv_heads, page_size, head_dim] each."""
        return self.data[index, 0], self.data[index, 1]

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Carry out the copies that `Sequence.append` asked for, in all layers."""
        if copies:
            sources, destinations = (torch.tensor(x, device=self.data.device) for x in zip(*copies, strict=True))
            self.data[:, :, destinations] = self.data[:, :, sources]

    @property
    def bytes_per_token(self) -> int:
        """Of all layers together."""
        layers, _, _, kv_heads, _, head_dim = self.data.shape
        return cache_bytes_per_token(layers, kv_heads, head_dim, self.data.element_size())


def check_page_size(page_size: int) -> None:
    """Raise UsageError unless it is a power of two from 16."""
    whole = isinstance(page_size, int) and not isinstance(page_size, bool)
    if not whole or page_size < SMALLEST_PAGE or page_size & (page_size - 1):
        raise UsageError(f"page_size is {page_size!r}: it must be a power of two, {SMALLEST_PAGE} or more.")
