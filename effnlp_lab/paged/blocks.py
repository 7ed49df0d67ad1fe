"""Who owns which page: reference counts, the prefix cache, and what is evicted first.

Kwon et al. 2023, sections 4.2 to 4.4: physical blocks, here called pages, are handed out one at a time and shared by
counting references. A page whose tokens are known is filed under a key that depends on everything before it, so that a
later prompt with the same beginning finds it, even after its first owner has gone.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from effnlp_lab.errors import EffnlpError, UsageError

ROOT_KEY = b""
"""The key before the first page of a sequence."""


class OutOfPages(EffnlpError):
    """There are not as many free pages as were asked for. Nothing was allocated."""


def chain_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page: a digest of its tokens and of the key of the page before it.

    The same tokens after another beginning have other keys and values, so a key without `parent` would be wrong. 16
    bytes of BLAKE2b: nobody finds two prompts with the same key.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockManager:
    """Counts the references to `pages` pages of `page_size` tokens each. Knows nothing of tensors.

    A page is free when nothing refers to it. A free page that is in the prefix cache keeps its content until it is
    needed: pages without such content are handed out first, then the one that has been free longest (LRU).
    """

    def __init__(self, pages: int, page_size: int, *, prefix_caching: bool = True) -> None:
        if pages < 1 or page_size < 1:
            raise UsageError(f"{pages} pages of {page_size} tokens hold nothing: give at least 1 of each.")
        self.pages, self.page_size, self.prefix_caching = pages, page_size, prefix_caching
        self._references = [0] * pages
        self._keys: list[bytes | None] = [None] * pages
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(pages))
        self.evictions = 0

    @property
    def free_pages(self) -> int:
        """Pages that can be allocated, those in the prefix cache among them."""
        return len(self._free)

    def references(self, page: int) -> int:
        """How many sequences hold the page."""
        return self._references[page]

    def key(self, page: int) -> bytes | None:
        """The key under which the page is in the prefix cache, if it is."""
        return self._keys[page]

    def allocate(self, count: int = 1) -> list[int]:
        """Pages with one reference each. Raises OutOfPages, and allocates none, where fewer are free."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages were asked for and {len(self._free)} of {self.pages} are free.")
        return [self._take_oldest() for _ in range(count)]

    def share(self, page: int) -> None:
        """One more reference to a page in use."""
        self._check_in_use(page)
        self._references[page] += 1

    def release(self, page: int) -> None:
        """One reference less; at none the page is free. Raises UsageError for a page that is free already."""
        self._check_in_use(page)
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free[page] = None
            if self._keys[page] is None:  # nothing to keep: the first to be handed out again
                self._free.move_to_end(page, last=False)

    def find(self, key: bytes) -> int | None:
        """A page with this content, with one more reference, or None."""
        page = self._cached.get(key)
        if page is not None:
            self._free.pop(page, None)
            self._references[page] += 1
        return page

    def register(self, page: int, key: bytes) -> None:
        """File a full page in use under its key. Where another page has the same content, that one stays filed."""
        self._check_in_use(page)
        if self.prefix_caching and key not in self._cached and self._keys[page] is None:
            self._cached[key], self._keys[page] = page, key

    def forget(self, page: int) -> None:
        """Take a page out of the prefix cache, because its content is about to change."""
        key = self._keys[page]
        if key is not None:
            del self._cached[key]
            self._keys[page] = None

    def clear(self) -> None:
        """Empty the prefix cache. Pages in use stay in use."""
        for page in self._cached.values():
            self._keys[page] = None
        self._cached.clear()

    def _take_oldest(self) -> int:
        page, _ = self._free.popitem(last=False)
        self.evictions += self._keys[page] is not None
        self.forget(page)
        self._references[page] = 1
        return page

    def _check_in_use(self, page: int) -> None:
        if not 0 <= page < self.pages or self._references[page] == 0:
            raise UsageError(f"Page {page} is not in use: only a page that something holds can be shared or released.")
