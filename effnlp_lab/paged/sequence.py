"""The block table of one sequence: logical pages in order, each mapped to a physical page (Kwon et al. 2023, 4.2)."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from effnlp_lab.errors import UsageError
from effnlp_lab.paged.blocks import ROOT_KEY, BlockManager, chain_key
from effnlp_lab.paged.sizes import pages_for

NO_PAGE = -1
"""Stands in a block table where a page was given back because a window has moved past it."""


class Sequence:
    """How many tokens a sequence holds, and in which pages: token t is in `pages[t // page_size]`.

    Only pages change hands here. Whoever owns the tensors carries out the copies that `append` asks for, and writes
    the keys and values.
    """

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.pages: list[int] = []
        self.length = 0
        self._keys: list[bytes] = []
        self._rolled = 0  # pages before this one may have been given back
        self._floor = 0

    def append(self, count: int) -> list[tuple[int, int]]:
        """Make room for `count` more tokens; returns the pages to copy first, as (source, destination).

        A page that others hold too is not written into: the sequence gets a page of its own, and the copy is asked for
        (copy on write). Raises OutOfPages and changes nothing where there is no room; UsageError for a negative count.
        """
        if count < 0:
            raise UsageError(f"append({count}) makes no sense: give 0 or more tokens, or use truncate.")
        partial = count > 0 and self.length % self.manager.page_size > 0
        last = self.pages[-1] if partial else NO_PAGE
        shared = partial and self.manager.references(last) > 1
        missing = self.pages_to_append(count) - len(self.pages) + shared
        fresh = self.manager.allocate(missing) if missing else []
        copies = []
        if shared:
            copies.append((last, fresh[0]))
            self.manager.release(last)
            self.pages[-1] = fresh.pop(0)
        elif partial:
            self.manager.forget(last)  # it was full once, and is about to say something else
        self.pages += fresh
        self.length += count
        return copies

    @property
    def committed(self) -> int:
        """Pages at the beginning whose tokens are known to the prefix cache."""
        return len(self._keys)

    def pages_to_append(self, count: int) -> int:
        """How long the block table is after `append(count)`."""
        return pages_for(self.length + count, self.manager.page_size)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens and give back the pages of the rest. Raises UsageError outside 0..length."""
        if not 0 <= length <= self.length:
            raise UsageError(f"truncate({length}) is outside the {self.length} tokens of the sequence.")
        if length < self._floor:
            raise UsageError(f"truncate({length}) needs tokens that the window left behind at length {self._floor}.")
        keep = pages_for(length, self.manager.page_size)
        self._release(self.pages[keep:])
        del self.pages[keep:], self._keys[length // self.manager.page_size :]
        self.length = length

    def fork(self) -> Sequence:
        """Another sequence with the same tokens, sharing every page until one of the two writes."""
        child = Sequence(self.manager)
        for page in self.pages:
            if page != NO_PAGE:
                self.manager.share(page)
        child.pages, child.length, child._keys = list(self.pages), self.length, list(self._keys)
        child._rolled, child._floor = self._rolled, self._floor
        return child

    def free(self) -> None:
        """Give back all pages. The sequence is empty afterwards."""
        self._release(self.pages)
        self.pages, self.length, self._keys, self._rolled, self._floor = [], 0, [], 0, 0

    def match(self, tokens: Tokens[int]) -> int:
        """Take over the cached pages of the longest known beginning of `tokens`; returns how many tokens they hold.

        For an empty sequence. Whole pages only. To compute the next token a model must see at least one: pass all
        tokens of a prompt but the last.
        """
        if self.pages:
            raise UsageError("match is for an empty sequence: free it first.")
        size, key = self.manager.page_size, ROOT_KEY
        for end in range(size, len(tokens) + 1, size):
            key = chain_key(key, tokens[end - size : end])
            page = self.manager.find(key)
            if page is None:
                break
            self.pages.append(page)
            self._keys.append(key)
        self.length = len(self.pages) * size
        return self.length

    def commit(self, tokens: Tokens[int]) -> None:
        """Register the full pages that hold these first tokens in the prefix cache; keys and values are written."""
        size = self.manager.page_size
        for index in range(len(self._keys), min(len(tokens), self.length) // size):
            parent = self._keys[-1] if self._keys else ROOT_KEY
            self._keys.append(chain_key(parent, tokens[index * size : (index + 1) * size]))
            if self.pages[index] != NO_PAGE:
                self.manager.register(self.pages[index], self._keys[-1])

    def roll(self, window: int, sinks: int, position: int) -> None:
        """Give back the pages that no query at `position` or after it sees, with a window and sinks.

        This is how a window rolls over a cache (Xiao et al. 2023, section 3.2). What is given back does not return, so
        that the sequence cannot be truncated to less than `position` afterwards.
        """
        size = self.manager.page_size
        first, end = max(pages_for(sinks, size), self._rolled), (position - window + 1) // size
        if first < end:
            self._release(self.pages[first:end])
            self.pages[first:end] = [NO_PAGE] * (end - first)
            self._rolled, self._floor = end, position

    def _release(self, pages: Tokens[int]) -> None:
        """The last page first: what is evicted first should be the end of a prefix, not its beginning."""
        for page in reversed(pages):
            if page != NO_PAGE:
                self.manager.release(page)
