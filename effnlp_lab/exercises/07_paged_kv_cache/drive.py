"""How the answers of lab 07 are called. Runs beside the student's code.

What has state gets a script, and answers with a line for each of its steps. Sequences get pages from `Pool`, a manager
with the interface of the lab's BlockManager that hands pages out in an order of its own.
"""

from __future__ import annotations

import types

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

REFUSALS = ("OutOfPages", "ValueError")  # what an answer may raise where the lab says so


class OutOfPages(Exception):
    """The lab's own, where an answer does not say which it knows."""


class Pool:
    """A right BlockManager, whose free pages come in a given order, those that were given back last."""

    def __init__(self, order: list[int], out_of_pages: type[Exception] = OutOfPages) -> None:
        self.free, self.counts, self.out_of_pages = list(order), {}, out_of_pages

    @property
    def free_pages(self) -> int:
        return len(self.free)

    def references(self, page: int) -> int:
        return self.counts.get(page, 0)

    def allocate(self, count: int) -> list[int]:
        if count < 0:
            raise RuntimeError(f"{count} pages were asked for")
        if count > len(self.free):
            raise self.out_of_pages(f"{count} pages were asked for and {len(self.free)} are free")
        taken, self.free = self.free[:count], self.free[count:]
        self.counts.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, page: int) -> None:
        self._look_up(page)
        self.counts[page] += 1

    def release(self, page: int) -> None:
        self._look_up(page)
        self.counts[page] -= 1
        if not self.counts[page]:
            del self.counts[page]
            self.free.append(page)

    def _look_up(self, page: int) -> None:
        if page not in self.counts:
            raise RuntimeError(f"page {page} is not in use, and was to be shared or released")


def attempt(act) -> dict:
    """What an action told, or the name of the refusal that it raised."""
    try:
        return {"raised": "", **(act() or {})}
    except Exception as error:
        if type(error).__name__ not in REFUSALS:
            raise
        return {"raised": type(error).__name__}


def BlockManager(answer, pages, script):
    """Run a script. ["allocate", name, count]; ["share", name, index]; ["release", name, index], where `index` is of
    the pages that `name` was given; ["share", page], ["release", page] with a number as it is. A line for each step:
    the pages, what was raised, how many are free then, and the references of every page."""
    manager, given, trace = answer(pages), {}, []
    for what, *which in script:
        if what == "allocate":
            line = attempt(lambda which=which: {"pages": list(manager.allocate(which[1]))})
            given[which[0]] = line.get("pages", [])
        else:
            mine = given.get(which[0]) if len(which) == 2 else None
            page = which[0] if mine is None else mine[which[1]] if which[1] < len(mine) else -1
            line = attempt(lambda what=what, page=page: no_more(getattr(manager, what)(page)))
        line["free"] = manager.free_pages
        line["references"] = [manager.references(page) for page in range(pages)]
        trace.append(line)
    return trace


def no_more(told) -> dict:
    """What is returned by what has nothing to return is not looked at."""
    return {}


def PagedSequence(answer, order, script, k, v, page_size):
    """Run a script on named sequences over one pool of pages.

    ["new", name]; ["append", name, count]: the next `count` rows of k and v, which are used up even where it is
    refused; ["free", name]; ["fork", name, child]. A line for each step: what was raised, how many pages are free, how
    many numbers have changed in pages that nobody holds, of every sequence its length and number of pages, and what all
    of them hold, one after the other: keys and values [2, tokens, kv_heads, dim].
    """
    shape = (len(order), k.shape[1], page_size, k.shape[2])
    both = torch.stack([torch.full(shape, 7.5 - 2 * i, dtype=k.dtype, device=k.device) for i in (0, 1)])
    pages = tuple(both)
    manager = Pool(order, known_refusal(answer))
    sequences, trace, used = {}, [], 0
    for what, name, *rest in script:
        before = both.clone()
        if what == "new":
            line = attempt(lambda name=name: sequences.update({name: answer(manager, *pages)}))
        elif what == "append":
            rows = slice(used, used + rest[0])
            used += rest[0]
            line = attempt(lambda name=name, rows=rows: no_more(sequences[name].append(k[rows], v[rows])))
        elif what == "free":
            line = attempt(lambda name=name: no_more(sequences[name].free()))
        else:
            line = attempt(lambda name=name, rest=rest: sequences.update({rest[0]: sequences[name].fork()}))
        free = sorted(manager.free)
        line["free"] = len(free)
        line["stray"] = int((both[:, free] != before[:, free]).sum())
        line["sizes"] = {one: [int(x.length), len(x.pages)] for one, x in sequences.items()}
        line["held"] = contents(sequences.values(), both)
        trace.append(line)
    return trace


SharedSequence = PagedSequence


def known_refusal(answer) -> type[Exception]:
    """The OutOfPages of the answer's own notebook, so that it can catch what is raised here."""
    for method in vars(answer).values():
        known = method.__globals__.get("OutOfPages") if isinstance(method, types.FunctionType) else None
        if isinstance(known, type) and issubclass(known, Exception):
            return known
    return OutOfPages


def contents(sequences, both: Tensor) -> Tensor:
    """Keys and values [2, tokens, kv_heads, dim] of all sequences, as their block tables find them."""
    size, rows, places = both.shape[3], [], []
    for one in sequences:
        table, length = [int(page) for page in one.pages], int(one.length)
        if not 0 <= length <= len(table) * size or any(not 0 <= page < both.shape[1] for page in table):
            raise RuntimeError(f"a sequence of {length} tokens has the block table {table} of pages of {size} tokens")
        rows += [table[t // size] for t in range(length)]
        places += [t % size for t in range(length)]
    at = torch.tensor([rows, places], dtype=torch.long, device=both.device)
    return both.transpose(2, 3)[:, at[0], at[1]]


class Sizes(TorchDispatchMode):
    """Notes the numbers of the largest tensor that an operation made; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch's compiler at the first operation: seconds, inside a time limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            sizes = [t.numel() for t in tree_iter(out) if isinstance(t, Tensor)]
            self.largest = max(self.largest, *sizes, 0)
        return out


def paged_attention(answer, q, k_pages, v_pages, block_table, length, allowed=None):
    """`allowed`: how many numbers a tensor that the answer makes may have; None where that is not asked."""
    with Sizes() as sizes:
        out = answer(q, k_pages, v_pages, block_table, length)
    return {"out": out, "large": allowed is not None and sizes.largest > allowed}


def PrefixCache(answer, page_size, script):
    """Run a script: ["commit", tokens, pages]; ["match", prompt]; ["forget", page]. The pages of each match."""
    cache, trace = answer(page_size), []
    for what, *arguments in script:
        told = getattr(cache, what)(*(list(x) if isinstance(x, (list, tuple)) else x for x in arguments))
        if what == "match":
            trace.append([int(page) for page in told])
    return trace


def Scheduler(answer, pages, page_size, max_batch, script):
    """Run a script: ["submit", name, prompt, new]; ["step"]. A line for each: who ran, how many pages are free, and
    how many preemptions there were so far."""
    scheduler, trace = answer(pages, page_size, max_batch), []
    for what, *arguments in script:
        if what == "submit":
            line = attempt(lambda arguments=arguments: no_more(scheduler.submit(*arguments)))
        else:
            line = attempt(lambda: {"ran": [str(name) for name in scheduler.step()]})
        trace.append({**line, "free": int(scheduler.free_pages), "preemptions": int(scheduler.preemptions)})
    return trace


def sink_attention(answer, q, k, v, window, sinks):
    return answer(q, k, v, window, sinks)
