# %% [markdown]
# # Lab 07: Paged KV cache
#
# A language model writes one token at a time, and each new token attends to all that came before. Their keys and values
# do not change any more, so one keeps them: the **key-value cache**. It makes generation affordable, and it is the
# reason why a server that holds one model can hold so few conversations: the cache is large, it grows by a token at
# a time, and nobody knows how long it will get.
#
# Operating systems met this problem sixty years ago and answered it with pages. vLLM's **paged attention** (Kwon et
# al., 2023), from the lecture, is the same answer for the cache. In this lab you write every part of it: the pages, the
# tables, the copies that are made only when somebody writes, and attention that reads its keys from wherever they are.
#
# | | exercise | points | minutes | difficulty |
# |---|---|---|---|---|
# | 1 | `cache_bytes`: the cache's size, and what is wasted | 1 | 25 | 1 of 5 |
# | 2 | `BlockManager`: pages with reference counts | 2 | 45 | 2 of 5 |
# | 3 | `PagedSequence`: append through the block table | 2 | 40 | 3 of 5 |
# | 4 | `SharedSequence`: fork, with copy on write | 2.5 | 55 | 4 of 5 |
# | 5 | `paged_attention`: attention over pages, for one query | 2.5 | 55 | 4 of 5 |
# | stretch | `PrefixCache`: share the beginnings of prompts | badge | 35 | 3 of 5 |
# | stretch | `Scheduler`: admit, run, preempt | badge | 50 | 4 of 5 |
# | stretch | `sink_attention`: sinks with a rolling window | badge | 35 | 3 of 5 |
#
# **Time.** About four and a half hours: the core exercises, the reading and the measurements. Stretch exercises come on top.
#
# **You need** softmax attention, the softmax in one pass from lab 06, and Python's classes. A laptop is enough: on a CPU
# the course's small model serves a handful of requests; on a GPU dozens at once.
#
# **How a check works.** Under each blank stands one call, `check(...)`. It drives your answer with fresh random
# inputs, long random sequences of steps among them, and compares what it finds with a model that keeps other books. It
# says what went wrong, by name where it recognises the slip. Run it as often as you like.
#
# {assistants} The five core blanks are 3 to 20 lines each, and what goes wrong in them (a page freed too early, a table
# shared by two) shows much later and somewhere else, which is exactly what one has to learn to see.
#
# **Libraries.** `transformers`, vLLM, flash-attn and this kit's own paged cache are refused inside your answers; the demos
# compare with them.

# %% tags=["parameters"]
DEVICE = "auto"
FAST = "auto"

# %%
import effnlp_lab
from effnlp_lab import check

import hashlib
import math
import random
import time
from array import array
from collections import deque

import torch
from torch import Tensor

device = effnlp_lab.start("07_paged_kv_cache", device=DEVICE, fast=FAST)

# %% [markdown]
# ## 1. How large is it?
#
# A decoder of $L$ layers keeps, for every token, one key and one value of $d$ numbers in each layer and for each of its
# $H_{kv}$ key heads. (With grouped-query attention several query heads share a key head; only key heads count here.)
# At $b$ bytes a number:
#
# $$\text{bytes per token} = 2 \cdot L \cdot H_{kv} \cdot d \cdot b$$
#
# That is the size of what is **there**. What is **set aside** depends on who allocates:
#
# ```
#  maximum       [A A A A A . . . . . . . . . . .]   room for the longest text
#                [B B B B B B B B B . . . . . . .]   that the model allows
#
#  padded batch  [A A A A A . . . .]                 as long as the longest
#                [B B B B B B B B B]                 of the batch
#
#  pages of 4    [A A A A][A . . .]                  whole pages: only the last
#                [B B B B][B B B B][B . . .]         one has empty places
# ```
#
# Kwon et al. call the dots **fragmentation**: memory that is taken and holds nothing. In the systems of 2022 that they
# measured, between a fifth and two fifths of the cache held tokens.
#
# ### Exercise 1: the cache's size, and what is wasted
#
# *1 point, about 25 minutes, difficulty 1 of 5.*
#
# <details><summary>Hint 1</summary>
#
# First count token slots, then multiply once by the bytes of a token.
# </details>
# <details><summary>Hint 2</summary>
#
# To round a quotient up in whole numbers: `-(-n // page_size)`. For `n = 32` and pages of 16 it is 2, not 3. Every
# sequence rounds up on its own.
# </details>

# %% exercise="cache_bytes"
def cache_bytes(model: dict[str, int], lengths: list[int], page_size: int) -> dict[str, int]:
    """Bytes of a key-value cache: of one token, and what each allocator sets aside for all sequences.

    model: "layers", "heads" (query heads), "kv_heads", "head_dim", "itemsize" (bytes a number) and
        "max_length"
    lengths: the tokens of each sequence, 0 to max_length; there may be no sequences
    page_size: tokens of a page, at least 1
    Returns a dict of five whole numbers, in bytes:
        "token": what one token keeps, in all layers
        "used": what all tokens of all sequences keep
        "maximum": where every sequence gets room for max_length tokens
        "padded": where every sequence gets room for as many tokens as the longest of them has
        "paged": where every sequence gets whole pages, as few as hold it (none for no tokens)
    """
    ### BEGIN SOLUTION
    token = 2 * model["layers"] * model["kv_heads"] * model["head_dim"] * model["itemsize"]
    slots = {
        "used": sum(lengths),
        "maximum": model["max_length"] * len(lengths),
        "padded": max(lengths, default=0) * len(lengths),
        "paged": sum(-(-n // page_size) for n in lengths) * page_size,
    }
    return {"token": token, **{name: count * token for name, count in slots.items()}}
    ### END SOLUTION


# %% check="cache_bytes"
check("cache_bytes", cache_bytes)

# %% tags=["demo", "nbval-check-output"] needs=["cache_bytes"]
shapes = {
    "OPT-13B (2022)": {"layers": 40, "heads": 40, "kv_heads": 40, "head_dim": 128},
    "Llama 2 7B": {"layers": 32, "heads": 32, "kv_heads": 32, "head_dim": 128},
    "Llama 3 8B": {"layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128},
    "course-base": {"layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 64},
}
shapes = {name: shape | {"itemsize": 2, "max_length": 2048} for name, shape in shapes.items()}
for name, shape in shapes.items():
    sizes = cache_bytes(shape, [2048], 16)
    print(f"{name:16}{sizes['token'] / 1024:5.0f} KiB a token{sizes['used'] / 2**20:7.0f} MiB for 2,048 tokens")

# %% [markdown]
# The paper's example is the first line: 800 KB a token, 1.6 GB for one request. Grouped-query attention divided this by
# four for Llama 3, and nothing more can be taken from what the tokens need. From what they do **not** need, much can.
#
# ### Predict, then measure: how many requests fit?
#
# **Predict first.** A server of Llama 3 8B has 16 GiB for its cache. Requests come with lengths like those of a chat,
# prompt and answer together: half of them shorter than about 300 tokens, a few as long as 2,048, which is the limit.
# How many fit at once if each reserves 2,048 tokens? How many if they get pages of 16? Write two numbers down; the
# first one you can compute.

# %% predict="requests_that_fit"
my_requests_with_reservations = None  # your number
my_requests_with_pages = None  # your guess

# %% tags=["demo"] needs=["cache_bytes"]
from effnlp_lab import paged
from effnlp_lab.notebook import plots

generator = torch.Generator().manual_seed(7)
spread = torch.randn(400, generator=generator)
lengths = (300 * (0.8 * spread).exp()).long().clamp(8, 2048).tolist()
llama = shapes["Llama 3 8B"]
sizes = cache_bytes(llama, lengths, 16)
by_kit = paged.waste(lengths, max_length=2048, page_size=16)
reserved = {name: sizes[ours] for name, ours in
            (("maximum", "maximum"), ("padded batch", "padded"), ("paged", "paged"))}
assert all(reserved[name] == by_kit[name].reserved * sizes["token"] for name in reserved)
reserved["powers of two"] = by_kit["powers of two"].reserved * sizes["token"]
order = ["maximum", "padded batch", "powers of two", "paged"]

figure, axes = plots.figure("What each allocator sets aside for 400 requests", "allocator", "cache (GiB)",
                            caption="Llama 3 8B. The dark part holds tokens; a buddy allocator gives powers of two.")
held = sizes["used"] / 2**30
axes.bar(order, [held] * 4, color=plots.COLOURS["blue"], label="tokens")
axes.bar(order, [reserved[name] / 2**30 - held for name in order], bottom=held, color="#D8D8D8", label="nothing")
for place, name in enumerate(order):
    empty = 1 - sizes["used"] / reserved[name]
    axes.annotate(f"{empty:.0%} empty", (place, reserved[name] / 2**30), (0, 3), textcoords="offset points",
                  ha="center", fontsize=9)
axes.legend()
spoken = ", ".join(f"{name} {1 - sizes['used'] / reserved[name]:.1%}" for name in order)
plots.show(figure, f"Bars of reserved memory by allocator; the share that holds nothing: {spoken}.")

capacity, fit = 16 * 2**30, {}
for name in ("maximum", "paged"):
    total, fit[name] = 0, 0
    for n in lengths:
        total += cache_bytes(llama, [n], 16)[name]
        fit[name] += total <= capacity
print(f"In 16 GiB: {fit['maximum']} requests with reservations, {fit['paged']} with pages.")
if my_requests_with_pages is not None:
    print(f"You predicted {my_requests_with_reservations} and {my_requests_with_pages}.")

# %% [markdown]
# "Padded batch" looks no better than the maximum here, as one long request sets the length for all. And the powers of
# two are told each length in advance, which a server does not know: a real one guesses, or moves sequences when they
# outgrow their room.
#
# How large should a page be? Small pages leave little empty. But each has an entry in a table, and a kernel that reads
# whole pages wants them long enough to be read at full speed.

# %% tags=["demo"] needs=["cache_bytes"]
page_sizes = [2**i for i in range(11)]
empty = [100 * (1 - sizes["used"] / cache_bytes(llama, lengths, size)["paged"]) for size in page_sizes]
figure, axes = plots.figure("Waste by page size", "page size (tokens)", "of the memory, empty (%)",
                            caption="The same 400 requests. Dashed: page_size / 2 empty places a request.")
axes.plot(page_sizes, empty, label="measured")
mean = sum(lengths) / len(lengths)
expected_waste = [100 * (size - 1) / 2 / (mean + (size - 1) / 2) for size in page_sizes]
axes.plot(page_sizes, expected_waste, "--", marker="", color="#888888", label="half a page each")
axes.set_xscale("log", base=2)
axes.set_xticks(page_sizes, [str(size) for size in page_sizes])
axes.legend()
plots.show(figure, f"Empty share against page size: {empty[4]:.1f}% at 16 tokens, {empty[8]:.1f}% at 256.")

# %% [markdown]
# ## 2. Pages
#
# The cache of the whole server is one tensor of `pages` pages, made once. A **block manager** (the paper calls pages
# blocks) says who owns which. It knows nothing of tensors: it hands out numbers.
#
# ```
#   page          0     1     2     3     4     5
#   references    1     2     0     1     0     0          free: 2, 4, 5
#                 A    A,B          B
# ```
#
# Why count references, and not just mark pages as taken? Because two sequences can hold the same page (here 1), as
# soon as they have a beginning in common. A page is free when the **last** of them lets go. The slips are those of
# every allocator: freed while still referenced, freed twice, handed out in part and then refused.
#
# Which free page comes first is a matter of taste, and here of your variant:

# %%
effnlp_lab.variant("BlockManager")

# %% [markdown]
# ### Exercise 2: pages with reference counts
#
# *2 points, about 45 minutes, difficulty 2 of 5.*
#
# <details><summary>Hint 1</summary>
#
# A dict from pages in use to their references says all that has to be known of them: a page that is not in the dict
# is free, or does not exist.
# </details>
# <details><summary>Hint 2</summary>
#
# The newest-first rule wants a list used as a stack (`append` and `pop`), the oldest-first rule a queue
# (`collections.deque`), the other two a heap (`heapq`) or a list that you take the minimum or maximum of.
# </details>
# <details><summary>Hint 3</summary>
#
# Check everything first, then change. An operation that is refused must leave no trace.
# </details>

# %%
class OutOfPages(Exception):
    """There are not as many free pages as were asked for."""


# %% exercise="BlockManager"
class BlockManager:
    """Hands out the pages 0 to pages - 1 and counts the references to each. At first all are free."""

    def __init__(self, pages: int) -> None:
        ### BEGIN SOLUTION
        self.free = list(range(pages))[::-1]
        self.counts = {}
        ### END SOLUTION

    @property
    def free_pages(self) -> int:
        """How many pages are free."""
        ### BEGIN SOLUTION
        return len(self.free)
        ### END SOLUTION

    def references(self, page: int) -> int:
        """How many references a page has: 0 for one that is free."""
        ### BEGIN SOLUTION
        return self.counts.get(page, 0)
        ### END SOLUTION

    def allocate(self, count: int) -> list[int]:
        """`count` free pages (0 or more), one after the other in the order of your variant.

        Each has one reference then. Raises OutOfPages where fewer are free, and hands out none.
        """
        ### BEGIN SOLUTION
        if count > len(self.free):
            raise OutOfPages(f"{count} pages were asked for, and {len(self.free)} are free")
        taken = [self.free.pop() for _ in range(count)]
        self.counts.update(dict.fromkeys(taken, 1))
        return taken
        ### END SOLUTION

    def share(self, page: int) -> None:
        """One more reference to a page in use. Raises ValueError for any other, and changes nothing."""
        ### BEGIN SOLUTION
        if page not in self.counts:
            raise ValueError(f"page {page} is not in use: it cannot be shared")
        self.counts[page] += 1
        ### END SOLUTION

    def release(self, page: int) -> None:
        """One reference less; at none the page is free. Raises ValueError as share does."""
        ### BEGIN SOLUTION
        if page not in self.counts:
            raise ValueError(f"page {page} is not in use: it cannot be released")
        self.counts[page] -= 1
        if self.counts[page] == 0:
            del self.counts[page]
            self.free.append(page)
        ### END SOLUTION


# %% check="BlockManager"
check("BlockManager", BlockManager)

# %% [markdown]
# ## 3. The block table
#
# A sequence sees its cache as one long row of tokens. Its **block table** says where the row really lies: token $t$ is
# in page `pages[t // page_size]`, at place `t % page_size`.
#
# ```
#   the sequence       t = 0 1 2 3 | 4 5 6 7 | 8 9
#   its block table           6    |    1    |  4       pages = [6, 1, 4], length = 10
#
#   the cache
#   page      0        1        2        3        4        5        6
#         [. . . .][4 5 6 7][. . . .][. . . .][8 9 . .][. . . .][0 1 2 3]
# ```
#
# This is an operating system's page table with one level. Nothing has to lie side by side, so no free page is ever
# useless, and a sequence grows without being moved.
#
# Keys and values of one layer lie in two tensors, `k_pages` and `v_pages`, of shape
# `[pages, kv_heads, page_size, head_dim]`. All sequences write into the same two. In this layout the keys of one head
# within one page are one contiguous block, which is how a kernel wants to read them.
#
# ### Exercise 3: append through the block table
#
# *2 points, about 40 minutes, difficulty 3 of 5.*
#
# `manager` has the interface of your `BlockManager`. In this exercise no page is shared.
#
# <details><summary>Hint 1</summary>
#
# How many pages does a sequence of `length + tokens` need, and how many does it have? Ask for all that are missing **at
# once**: then either all come, or `OutOfPages` is raised before anything has changed.
# </details>
# <details><summary>Hint 2</summary>
#
# A prompt of exactly $k$ pages needs $k$ pages. The next token needs another, and asks for it when it comes.
# </details>
# <details><summary>Hint 3</summary>
#
# A loop over the new tokens is fine. Without a loop: with `page` and `place` as tensors of one number a token,
# `k_pages[page, :, place] = k` writes all of them.
# </details>

# %% exercise="PagedSequence"
class PagedSequence:
    """The block table of one sequence, over pages that many sequences write into.

    manager: allocate(count), share(page), release(page), references(page), free_pages, as in exercise 2
    k_pages, v_pages: [pages, kv_heads, page_size, head_dim], of one dtype
    Token t is in page pages[t // page_size] at place t % page_size. The table holds no more pages than
    `length` tokens need.
    """

    def __init__(self, manager, k_pages: Tensor, v_pages: Tensor) -> None:
        self.manager, self.k_pages, self.v_pages = manager, k_pages, v_pages
        self.page_size = k_pages.shape[2]
        self.pages: list[int] = []
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write the keys and values of the next tokens, and grow by as many.

        k, v: [tokens, kv_heads, head_dim], of the pages' dtype, any strides; 0 tokens or more
        Raises OutOfPages where too few pages are free: then nothing changes, here or in the manager.
        """
        ### BEGIN SOLUTION
        end = self.length + len(k)
        missing = -(-end // self.page_size) - len(self.pages)
        self.pages += self.manager.allocate(missing)
        for row, position in enumerate(range(self.length, end)):
            page = self.pages[position // self.page_size]
            place = position % self.page_size
            self.k_pages[page, :, place] = k[row]
            self.v_pages[page, :, place] = v[row]
        self.length = end
        ### END SOLUTION

    def free(self) -> None:
        """Give back all pages. The sequence is empty afterwards, and can be used again."""
        ### BEGIN SOLUTION
        for page in self.pages:
            self.manager.release(page)
        self.pages, self.length = [], 0
        ### END SOLUTION


# %% check="PagedSequence"
check("PagedSequence", PagedSequence)

# %% [markdown]
# Let us see it. Three sequences grow in turns, the second ends, a fourth comes. Each square is a page; the number in it
# is the page's place in its sequence.

# %% tags=["demo"] needs=["BlockManager", "PagedSequence"]
def draw_pages(title, manager, tables, alt, caption=""):
    """One square a page of the cache, coloured by the sequence that holds it; shared pages are hatched."""
    total = manager.free_pages + len({page for table in tables.values() for page in table})
    figure, axes = plots.figure(title, "page of the cache", "sequence", caption=caption)
    figure.set_size_inches(6.4, 0.5 * len(tables) + 1.6)
    for row, (table, look) in enumerate(zip(tables.values(), plots.looks(len(tables)))):
        for place, page in enumerate(table):
            shared = manager.references(page) > 1
            axes.barh(row, 0.9, left=page - 0.45, height=0.8, color=look["color"], alpha=0.5 if shared else 0.85,
                      hatch="///" if shared else None, edgecolor="white")
            axes.annotate(str(place), (page, row), ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(tables)), list(tables))
    axes.set_xticks(range(0, total, 2))
    axes.set_xlim(-0.6, total - 0.4)
    axes.set_ylim(len(tables) - 0.5, -0.5)
    plots.show(figure, alt)


def nothing(tokens):
    """Keys or values of so many tokens, for one key head of four numbers."""
    return torch.zeros(tokens, 1, 4)


pool, small_cache = BlockManager(20), torch.zeros(2, 20, 1, 4, 4)
growing = {name: PagedSequence(pool, *small_cache) for name in "ABC"}
for _ in range(6):
    for name, tokens in (("A", 3), ("B", 2), ("C", 4)):
        growing[name].append(nothing(tokens), nothing(tokens))
growing.pop("B").free()
growing["D"] = PagedSequence(pool, *small_cache)
growing["D"].append(nothing(17), nothing(17))
tables = {name: one.pages for name, one in growing.items()}
draw_pages("Where three sequences lie", pool, tables, "Pages of 4 tokens by sequence: "
           + "; ".join(f"{name} holds {len(table)} pages, scattered" for name, table in tables.items()),
           "The number is the page's place in its sequence. D took over what B had given back.")

# %% [markdown]
# ## 4. Fork, with copy on write
#
# Often several texts have a beginning in common. Parallel sampling writes four answers to one prompt; beam search drops
# and doubles its hypotheses at every step. To copy the prompt's cache for each would be a waste: nobody changes it. So a
# fork copies the block **table** and shares the pages.
#
# Until somebody writes. The last page is perhaps only half full, and both have their next token to put there:
#
# ```
#   before                  B appends "red"                    A appends "blue"
#
#   A: [0, 1]               A: [0, 1]                          A: [0, 1]
#   B: [0, 1]               B: [0, 5]                          B: [0, 5]
#
#   page 1 (A, B)           page 1 (A)      page 5 (B)         page 1 (A)        page 5 (B)
#   [the sky . .]           [the sky . .]   [the sky red .]    [the sky blue .]  [the sky red .]
# ```
#
# **Copy on write**: a sequence that is to write into a page which others hold too takes a page of its own, copies what
# is there, lets go of the old page, and writes. The last holder writes in place. Full pages are never written into, so
# they stay shared for ever. This is what a Unix process does with its memory after `fork`.
#
# If you write without looking, nothing crashes: the **sibling's** history changes, and its text goes astray some
# tokens later.
#
# ### Exercise 4: fork, with copy on write
#
# *2.5 points, about 55 minutes, difficulty 4 of 5.*
#
# `SharedSequence` inherits what you wrote: `super().append(k, v)` appends once the last page may be written into.
#
# <details><summary>Hint 1</summary>
#
# Three questions decide whether to copy: is anything written? Is the last page partly filled? Does somebody else hold it?
# </details>
# <details><summary>Hint 2</summary>
#
# `list(self.pages)` is a new list; `self.pages` would be the same list under two names.
# </details>
# <details><summary>Hint 3</summary>
#
# The copy needs a page, and the tokens may need more behind it. Ask for all of them in one call, before anything
# changes. If the block table then holds enough pages, `super().append` asks for none.
# </details>

# %% exercise="SharedSequence"
class SharedSequence(PagedSequence):
    """A sequence that can be forked. What it appends is never seen by another."""

    def fork(self) -> "SharedSequence":
        """Another sequence with the same tokens. Takes no page: all pages are shared."""
        ### BEGIN SOLUTION
        child = SharedSequence(self.manager, self.k_pages, self.v_pages)
        for page in self.pages:
            self.manager.share(page)
        child.pages, child.length = list(self.pages), self.length
        return child
        ### END SOLUTION

    def append(self, k: Tensor, v: Tensor) -> None:
        """As PagedSequence.append; a page that others hold too is not written into: it is copied first.

        A page is copied only if something is written into it, and only while it has more than one
        reference. Raises OutOfPages where too few pages are free for all of it, the copy included: then
        nothing changes.
        """
        ### BEGIN SOLUTION
        if len(k) and self.length % self.page_size and self.manager.references(self.pages[-1]) > 1:
            end, old = self.length + len(k), self.pages[-1]
            missing = -(-end // self.page_size) - len(self.pages) + 1
            fresh = self.manager.allocate(missing)
            self.k_pages[fresh[0]] = self.k_pages[old]
            self.v_pages[fresh[0]] = self.v_pages[old]
            self.manager.release(old)
            self.pages[-1:] = fresh
        super().append(k, v)
        ### END SOLUTION


# %% check="SharedSequence"
check("SharedSequence", SharedSequence)

# %% [markdown]
# Four samples from one prompt of 30 tokens, in pages of 4. Shared pages are pale and hatched.

# %% tags=["demo"] needs=["BlockManager", "PagedSequence", "SharedSequence"]
pool, small_cache = BlockManager(40), torch.zeros(2, 40, 1, 4, 4)
prompt = SharedSequence(pool, *small_cache)
prompt.append(nothing(30), nothing(30))
samples = {"sample 1": prompt, **{f"sample {i}": prompt.fork() for i in (2, 3, 4)}}
held, alone = [], []
for _ in range(12):
    for sample in samples.values():
        sample.append(nothing(1), nothing(1))
    held.append(40 - pool.free_pages)
    alone.append(sum(len(sample.pages) for sample in samples.values()))
draw_pages("Four samples of one prompt", pool, {name: one.pages for name, one in samples.items()},
           f"The first pages are shared by all four samples; {held[-1]} pages in use in all.",
           f"{held[-1]} pages in use; without sharing {alone[-1]}.")
for sample in samples.values():
    sample.free()
print(f"{pool.free_pages} of 40 pages are free at the end.")

# %% [markdown]
# ## 5. Attention over pages
#
# Now the keys lie scattered. One could gather them into one tensor and attend as usual. That reads the cache, writes
# it, and reads it again, for every new token of every sequence, when the reading alone is all that decoding has to do:
# one query meets all keys, a product that waits for memory and not for arithmetic. So attention has to read the pages
# where they are, each once. From lab 06 you have all that this needs: a softmax in one pass, with a page as its tile.
#
# $$\mu' = \max(\mu, \max_j s_j), \qquad
# \ell' = e^{\mu - \mu'}\, \ell + \sum_j e^{s_j - \mu'}, \qquad
# a' = e^{\mu - \mu'}\, a + \sum_j e^{s_j - \mu'}\, v_j$$
#
# for the scores $s_j = q \cdot k_j / \sqrt d$ of a page's keys, and $a / \ell$ at the end.
#
# Three things want care.
#
# - **The end.** The last page is rarely full. Behind `length` it holds what its last owner left there, or nothing that
#   was ever written; NaN is possible, and a weight of 0 does not help against NaN.
# - **The heads.** With $H$ query heads on $H_{kv}$ key heads, query head $h$ reads key head $h // (H / H_{kv})$: heads
#   group by division. For $H_{kv} = 1$ and $H_{kv} = H$ the remainder $h \bmod H_{kv}$ gives the same, so test with 8
#   on 2.
# - **The mask.** There is none. The query is the newest token, its own key is in the cache, and all that is in the cache
#   came before it.
#
# ### Exercise 5: attention over pages, for one query
#
# *2.5 points, about 55 minutes, difficulty 4 of 5.*
#
# <details><summary>Hint 1</summary>
#
# `k_pages[page, :, :filled]` is `[kv_heads, filled, dim]`. Give the query the shape `[kv_heads, group, dim]`, and one
# batched product makes the scores of all heads.
# </details>
# <details><summary>Hint 2</summary>
#
# `filled` is `page_size` in every page but the last. With it you never touch what lies behind the end.
# </details>
# <details><summary>Hint 3</summary>
#
# Start with $\mu = -\infty$, $\ell = 0$, $a = 0$. Every page has at least one key, so that $\mu'$ is finite and
# $e^{-\infty - \mu'} = 0$ makes the first page come out right.
# </details>

# %% exercise="paged_attention"
def paged_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, length: int) -> Tensor:
    """Attention of one query to the first `length` tokens of its sequence, page by page.

    q: [heads, dim], float32 or float16
    k_pages, v_pages: [pages, kv_heads, page_size, dim] in q's dtype; kv_heads divides heads, and query
        head h reads key head h // (heads // kv_heads)
    block_table: [columns] int64: the page of tokens 0 to page_size - 1, then of the next, and so on;
        entries behind the last page say nothing
    length: tokens of the sequence, at least 1, the query's own among them
    Places behind `length`, and pages that are not in the table, may hold anything, NaN included.
    Returns [heads, dim] in q's dtype, computed in float32. All scores may be held at once (one number a
    head and token); beside them no tensor is made that has more than 4 * heads * page_size * dim numbers,
    as many as four pages repeated for all query heads.
    """
    ### BEGIN SOLUTION
    heads, dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    query = q.float().reshape(kv_heads, heads // kv_heads, dim) / math.sqrt(dim)
    peak = torch.full((kv_heads, heads // kv_heads, 1), -math.inf, device=q.device)
    total, out = torch.zeros_like(peak), torch.zeros_like(query)
    for start in range(0, length, page_size):
        page, filled = block_table[start // page_size], min(page_size, length - start)
        k, v = k_pages[page, :, :filled].float(), v_pages[page, :, :filled].float()
        scores = query @ k.transpose(1, 2)
        higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
        weights, shrink = torch.exp(scores - higher), torch.exp(peak - higher)
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + weights @ v
        peak = higher
    return (out / total).reshape(heads, dim).to(q.dtype)
    ### END SOLUTION


# %% check="paged_attention"
check("paged_attention", paged_attention)

# %% [markdown]
# ### Use it: generate from pages
#
# Everything together, on the course's model. `transformers` lets us register an attention function: it is handed the
# queries, keys and values of the new tokens in each layer. Ours appends keys and values to **your** sequence of that
# layer and lets **your** attention read the pages. (The kit's engine has one block table for all layers, as all look
# alike; here each layer has its own, to keep the demo short.)
#
# Two requests take turns, token by token, over the same pages. Each must get what `transformers` gives it alone.

# %% tags=["demo"] needs=["BlockManager", "PagedSequence", "SharedSequence", "paged_attention"]
from effnlp_lab.course.models import load_model, load_tokenizer
from transformers import AttentionInterface

if device.kind == "cpu" and device.fast:
    torch.set_num_threads(1)  # products this small: a second thread would mostly wait for the first
tokenizer = load_tokenizer("course-base")
model = load_model("course-base", device=device, dtype="float32")


def attend_in_pages(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Appends the new tokens to the text that is being served, and attends to all of its pages, query by query."""
    sequence, new = serving.sequences[module.layer_idx], query.shape[2]
    sequence.append(key[0].transpose(0, 1), value[0].transpose(0, 1))
    table = torch.tensor(sequence.pages, device=query.device)
    rows = [paged_attention(query[0, :, i], sequence.k_pages, sequence.v_pages, table, sequence.length - new + 1 + i)
            for i in range(new)]
    return torch.stack(rows)[None], None


AttentionInterface.register("yours_in_pages", attend_in_pages)
in_pages = load_model("course-base", device=device, dtype="float32", attn_implementation="yours_in_pages")


class Text:
    """A request: its tokens, and a sequence in the pages of each layer."""

    def __init__(self, tokens, sequences):
        self.tokens, self.sequences = list(tokens), sequences

    def fork(self):
        return Text(self.tokens, [one.fork() for one in self.sequences])

    @torch.no_grad()
    def logits(self):
        """Of the next token. Reads the tokens that are not in the cache yet."""
        global serving
        serving, known = self, self.sequences[0].length
        ids = torch.tensor([self.tokens[known:]], device=device.torch)
        positions = torch.arange(known, len(self.tokens), device=device.torch)[None]
        return in_pages(input_ids=ids, position_ids=positions, use_cache=False).logits[0, -1]


PAGE, PAGES, NEW = 16, 64, device.pick(fast=12, full=64)
config = model.config
layers = [(BlockManager(PAGES), *torch.zeros(2, PAGES, config.num_key_value_heads, PAGE, config.head_dim,
                                             device=device.torch)) for _ in range(config.num_hidden_layers)]
pieces = ["import os\nimport sys\n\n\ndef main(", "class Tree:\n    def __init__(self, left, right):\n        self."]
texts = [Text(tokenizer(piece)["input_ids"], [SharedSequence(*layer) for layer in layers]) for piece in pieces]
for _ in range(NEW):
    for text in texts:
        text.tokens.append(text.logits().argmax().item())
for text, piece in zip(texts, pieces):
    ids = torch.tensor([tokenizer(piece)["input_ids"]], device=device.torch)
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)[0].tolist()
    print("equal to transformers" if text.tokens[: len(alone)] == alone else "different from transformers",
          repr(tokenizer.decode(text.tokens)))

# %% [markdown]
# And parallel sampling: one prompt is read once, forked, and continued three times at a temperature of 1.

# %% tags=["demo"] needs=["BlockManager", "PagedSequence", "SharedSequence", "paged_attention"]
for text in texts:
    for one in text.sequences:
        one.free()
prompt = Text(tokenizer("def read_lines(path):\n    with open(path) as file:\n        for line in")["input_ids"],
              [SharedSequence(*layer) for layer in layers])
first, manager = prompt.logits(), layers[0][0]
samples = [prompt, prompt.fork(), prompt.fork()]
generator = torch.Generator().manual_seed(3)
for step in range(NEW):
    for sample in samples:
        logits = first if step == 0 else sample.logits()
        sample.tokens.append(torch.multinomial(logits.softmax(0).cpu(), 1, generator=generator).item())
for sample in samples:
    print(repr(tokenizer.decode(sample.tokens)))
print(f"pages in use in each layer: {PAGES - manager.free_pages}; without sharing: "
      f"{sum(len(sample.sequences[0].pages) for sample in samples)}")

# %% [markdown]
# ### What an engineer changes
#
# Your attention goes through the pages one after the other, for one sequence. On a GPU that would leave most of the card
# idle. The kit's kernel (`effnlp_lab/paged/kernels.py`) does three things more:
#
# - all sequences in one launch, each program looking up its own row of the block tables;
# - the query heads that share a key head are the rows of one tile, so that every key is read once for all of them;
# - **flash decoding**: the keys of a long sequence are split among many programs, and the partial results merged by
#   their log-sum-exps, lab 06's exercise 3. With a batch of one this is what fills the card.
#
# ## 6. Serving: what the pages are for
#
# Padded generation has a fixed batch. It waits until the batch is full, pads every prompt to the longest, and runs until
# the last request is done: rows that have ended are computed along, for nothing. The kit's `Engine` does **continuous
# batching** (Yu et al., 2022): at every step requests leave and others join, as pages allow. Long prompts are read in
# chunks, so that those who are writing do not wait for them.
#
# ### Predict, then measure: throughput
#
# **Predict first.** Requests of mixed length, in and out, are served with 1, some, and many at a time. How many times the
# tokens per second of padded `generate` does the engine reach with the largest batch? The kernels' part in it is small on
# a CPU: think of the padding. On a GPU think of what starting a step costs as well: the engine records its steps, as CUDA
# graphs.

# %% predict="times_padded"
my_times_faster_than_padded = None  # your guess

# %% tags=["demo"] needs=["cache_bytes", "BlockManager", "PagedSequence", "SharedSequence", "paged_attention"]
from effnlp_lab.course.text import load_text
from effnlp_lab.paged import Engine, SamplingParams

REQUESTS, SHORTEST, LONGEST = device.pick(fast=(12, 2, 32), full=(48, 16, 200))
BATCHES = device.pick(fast=(1, 2, 4), full=(1, 4, 16, 48))
dice = random.Random(5)
stream = tokenizer("".join(load_text("course-heldout", limit_bytes=device.pick(fast=20_000, full=800_000)).texts()))
stream = stream["input_ids"]


def some_tokens():
    """So many tokens, many requests being short and few long."""
    return round(SHORTEST * (LONGEST / SHORTEST) ** dice.random())


prompts, wanted = [], []
for _ in range(REQUESTS):
    start, count = dice.randrange(len(stream) - LONGEST), some_tokens()
    prompts.append(stream[start : start + count])
    wanted.append(some_tokens())
asked = [SamplingParams(max_new_tokens=count, stop_token_ids=()) for count in wanted]
model.generation_config.eos_token_id = None  # every request gets all the tokens that it asks for


def by_engine(batch):
    engine = Engine(model, max_batch=batch, max_length=2 * LONGEST, prefix_caching=False)
    if device.kind == "cuda":
        engine.warm_up()
    begin = time.perf_counter()
    outputs = engine.generate(prompts, asked)
    return [output.tokens for output in outputs], time.perf_counter() - begin


def by_padding(batch):
    """Batches of so many requests, left-padded, each generating until its longest is done."""
    tokens = []
    begin = time.perf_counter()
    for i in range(0, REQUESTS, batch):
        rows, new = prompts[i : i + batch], wanted[i : i + batch]
        longest = max(map(len, rows))
        ids = torch.tensor([[config.pad_token_id] * (longest - len(row)) + row for row in rows], device=device.torch)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device.torch)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=max(new), do_sample=False).tolist()
        tokens += [row[longest : longest + count] for row, count in zip(out, new)]
    return tokens, time.perf_counter() - begin


def by_generate_batch():
    """The continuous batching of transformers, all requests at once: new tokens a second."""
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=max(wanted), do_sample=False, eos_token_id=-1,
                                pad_token_id=config.pad_token_id)
    model.set_attn_implementation("paged|sdpa")  # by itself it would take flash-attn, which has no float32
    with model.continuous_batching_context_manager(generation_config=settings) as manager:
        for warm in (True, False):
            begin = time.perf_counter()
            left = {manager.add_request(row, max_new_tokens=2 if warm else count, eos_token_id=-1)
                    for row, count in list(zip(prompts, wanted))[: 4 if warm else REQUESTS]}
            while left:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    left.discard(result.request_id)
                elif not manager.is_running() or time.perf_counter() > begin + 60:
                    raise RuntimeError("it stopped, or gave no answer within a minute")
    return sum(wanted) / (time.perf_counter() - begin)


ids = torch.tensor([prompts[0]], device=device.torch)
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)  # sets up what is set up once
rates, answers = {"continuous batching": [], "padded generate": []}, {}
for batch in BATCHES:
    for name, serve in (("continuous batching", by_engine), ("padded generate", by_padding)):
        answers[name, batch], seconds = serve(batch)
        rates[name].append(sum(wanted) / seconds)
print(f"{'tokens a second, at a time':27}" + "".join(f"{batch:>9}" for batch in BATCHES))
for name, values in rates.items():
    print(f"{name:27}" + "".join(f"{value:9,.0f}" for value in values))
right = answers["padded generate", 1]
same = sum(one == other for one, other in zip(answers["continuous batching", BATCHES[-1]], right))
print(f"{same} of {REQUESTS} answers of the engine are those of transformers, one at a time")
figure, axes = plots.figure("Throughput by load", "requests at a time", "new tokens a second",
                            caption=f"{REQUESTS} requests, {SHORTEST} to {LONGEST} tokens in and out.")
for name, values in rates.items():
    axes.plot(BATCHES, values, label=name)
if device.kind == "cuda":  # on a CPU it takes longer than all the rest of the lab
    try:
        all_at_once = by_generate_batch()
        axes.axhline(all_at_once, linestyle=":", marker="", color="#555555", label="generate_batch")
        print(f"generate_batch of transformers: {all_at_once:,.0f} new tokens a second")
    except Exception as error:  # it differs between versions of transformers
        print(f"generate_batch did not run: {type(error).__name__}: {error}")
    model.set_attn_implementation("sdpa")
axes.set_xscale("log", base=2)
axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
axes.set_ylim(0)
axes.legend()
ratio = rates["continuous batching"][-1] / rates["padded generate"][-1]
plots.show(figure, f"Tokens a second against requests at a time; at {BATCHES[-1]} continuous batching makes "
                   f"{rates['continuous batching'][-1]:,.0f}, padded generate {rates['padded generate'][-1]:,.0f}.")
print(f"{ratio:.1f} times the tokens a second of padded generate, with {BATCHES[-1]} at a time")
parts = [wanted[i : i + BATCHES[-1]] for i in range(0, REQUESTS, BATCHES[-1])]
useful = sum(wanted) / sum(len(part) * max(part) for part in parts)
print(f"of the tokens that padded generate computed there, {useful:.0%} had been asked for")
if my_times_faster_than_padded is not None:
    print(f"You predicted {my_times_faster_than_padded}.")
shape = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads, "head_dim": config.head_dim,
         "kv_heads": config.num_key_value_heads, "itemsize": model.dtype.itemsize, "max_length": 2 * LONGEST}
ends = cache_bytes(shape, [len(row) + count for row, count in zip(prompts, wanted)], 16)
print("cache of all requests at their full length: " + ", ".join(
    f"{name} {ends[name] / 2**20:.1f} MiB" for name in ("used", "paged", "padded", "maximum")))

# %% [markdown]
# With one request at a time nothing is padded, and the two differ only by what a step costs. (On a CPU a step of the
# engine costs more: there is no paged kernel, and it gathers the pages. On a GPU it costs less: a recorded graph is started
# at once, where `generate` starts every operation from Python. With a model this small that is more than half of what the
# engine gains.) With more, the lines move apart by the padding: rows that have ended are computed along until the longest
# of their batch is done, where the engine puts the next request in their place. The printed share says how much of it was
# for nothing; the more the lengths differ, the more.
#
# The answers are equal token for token where both compute in float32. In half precision two logits may tie, and then
# batches of different shapes may break the tie differently. The dotted line, on a GPU, is the continuous batching of
# `transformers`, with all requests at once. `effnlp bench paged` compares them on a model of Llama 1B's shape.
#
# ### Latency
#
# A server has two promises to keep: the **time to first token**, which is the wait in the queue and the reading of the
# prompt, and the **time between tokens**, by which a reader feels whether it flows. First all requests come at
# once, which tells how many a second the engine serves at most. Then they come at random, at a part of that rate.

# %% tags=["demo"] needs=["cache_bytes", "BlockManager", "PagedSequence", "SharedSequence", "paged_attention"]
LOADS = device.pick(fast=(0.5, 1.0, 2.0), full=(0.25, 0.5, 0.75, 1.0, 1.5, 2.0))
COUNT, SEATS = device.pick(fast=16, full=192), BATCHES[-2]
engine = Engine(model, max_batch=SEATS, max_length=2 * LONGEST, prefix_caching=False)
if device.kind == "cuda":
    engine.warm_up()


def served_at(rate):
    """Requests come at random times, so many a second; for each the seconds from its arrival to its tokens."""
    dice = random.Random(1)
    due, requests = [], []
    for _ in range(COUNT):
        due.append((due[-1] if due else 0.0) + dice.expovariate(rate))
    begin = time.perf_counter()
    while len(requests) < COUNT or engine.unfinished:
        now = time.perf_counter() - begin
        while len(requests) < COUNT and due[len(requests)] <= now:
            i = len(requests) % REQUESTS
            requests.append((engine.submit(prompts[i], asked[i]), now - due[len(requests)]))
        if engine.unfinished:
            engine.step()
        else:
            time.sleep(max(0.0, due[len(requests)] - now))
    return [[late + t for t in engine.output(request).times] for request, late in requests]


capacity = COUNT / max(times[-1] for times in served_at(math.inf))  # requests a second, when all come at once
print(f"{SEATS} at a time: at most {capacity:.1f} requests a second")


def quantile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


first_token, between = {}, {}
for load in LOADS:
    times = served_at(load * capacity)
    first_token[load] = [one[0] for one in times]
    between[load] = [b - a for one in times for a, b in zip(one, one[1:])]
for title, measured in (("Time to first token", first_token), ("Time between tokens", between)):
    figure, axes = plots.figure(f"{title} by load", "load (share of the most that the engine serves)", "time (ms)",
                                caption=f"{COUNT} requests at random times, {SEATS} served at once.")
    for name, share in (("median", 0.5), ("95% are faster", 0.95)):
        axes.plot(LOADS, [1e3 * quantile(measured[load], share) for load in LOADS], label=name)
    axes.set_ylim(0)
    axes.legend()
    spoken = ", ".join(f"{1e3 * quantile(measured[load], 0.5):.1f} ms at {load:g}" for load in LOADS)
    plots.show(figure, f"{title} against load; medians: {spoken}.")

# %% [markdown]
# Beyond a load of 1 the queue grows for as long as requests keep coming, and the time to first token with it, without
# limit. The time between tokens grows with the batch, and then no more: who is in the batch is served at every step,
# and the batch has a largest size. A step that reads prompts takes longer than one that only writes; that is the
# difference between the two curves, and what reading in chunks keeps small.
#
# ## Stretch A: share the beginnings of prompts
#
# *A badge, about 35 minutes, difficulty 3 of 5.*
#
# A fork shares what two sequences had in common from the start. But requests of different people have beginnings in
# common too: the same instructions, the same document, the conversation so far. A **prefix cache** finds pages by
# their content. What is the content of a page? Not its tokens alone! Keys and values of a layer depend on all tokens
# **before** them, through the layers below. The same sixteen tokens after another beginning are not the same keys.
# So the key of a page is a digest of its tokens **and of the key of the page before**:
#
# $$\text{key}_0 = h(\text{""}, t_0 \dots t_{p-1}), \qquad
# \text{key}_i = h(\text{key}_{i-1}, t_{ip} \dots t_{(i+1)p-1})$$
#
# One number then stands for a whole beginning, and finding the longest known one takes a step a page.
#
# <details><summary>Hint 1</summary>
#
# Two dicts: from keys to pages, and back from pages to keys, for `forget`.
# </details>
# <details><summary>Hint 2</summary>
#
# The last token of a prompt is never taken from the cache, even if it is known: somebody has to compute the logits of
# what comes next. So look for `prompt[:-1]`.
# </details>

# %%
def page_key(parent: bytes, tokens: list[int]) -> bytes:
    """16 bytes that depend on `parent` and on the tokens: a digest, so that no two contents have the same."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


# %% exercise="PrefixCache"
class PrefixCache:
    """Finds the pages that hold the beginning of a prompt. References are counted elsewhere."""

    def __init__(self, page_size: int) -> None:
        ### BEGIN SOLUTION
        self.page_size = page_size
        self.page_of, self.key_of = {}, {}
        ### END SOLUTION

    def _keys(self, tokens: list[int]) -> list[bytes]:
        """The key of every full page of a text: yours to use or to delete."""
        ### BEGIN SOLUTION
        key, keys = b"", []
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            key = page_key(key, tokens[end - self.page_size : end])
            keys.append(key)
        return keys
        ### END SOLUTION

    def commit(self, tokens: list[int], pages: list[int]) -> None:
        """File the full pages of a text: pages[i] holds tokens i * page_size to (i + 1) * page_size - 1.

        pages: the block table of the text; a page at its end that is not full is not filed. Content that
        is filed already stays filed under the page it had. No page is filed for two contents: it is
        forgotten in between.
        """
        ### BEGIN SOLUTION
        for key, page in zip(self._keys(tokens), pages):
            if key not in self.page_of:
                self.page_of[key], self.key_of[page] = page, key
        ### END SOLUTION

    def match(self, prompt: list[int]) -> list[int]:
        """The pages of the longest beginning of the prompt that is filed, in order.

        Whole pages only, and never the prompt's last token: a page that it fills is not among them.
        """
        ### BEGIN SOLUTION
        found = []
        for key in self._keys(prompt[:-1]):
            if key not in self.page_of:
                break
            found.append(self.page_of[key])
        return found
        ### END SOLUTION

    def forget(self, page: int) -> None:
        """The page's content is about to change: no later match gives it for what it held.

        All others stay filed, those behind it too, and are found again once its content is filed again.
        Nothing happens for a page that is not filed.
        """
        ### BEGIN SOLUTION
        if page in self.key_of:
            del self.page_of[self.key_of.pop(page)]
        ### END SOLUTION


# %% check="PrefixCache"
check("PrefixCache", PrefixCache)

# %% tags=["demo"] needs=["cache_bytes", "BlockManager", "PagedSequence", "SharedSequence", "paged_attention", "PrefixCache"]
header = stream[: device.pick(fast=160, full=512)]
questions = [header + stream[1000 + 40 * i : 1000 + 40 * i + dice.randint(3, 20)] for i in range(6)]
book, by_book, times = PrefixCache(16), [], {}
for number, question in enumerate(questions):
    by_book.append(16 * len(book.match(question)))
    book.commit(question, [1000 * number + i for i in range(len(question) // 16 + 1)])
for caching in (False, True):
    engine = Engine(model, max_batch=4, max_length=1024, prefix_caching=caching)
    if device.kind == "cuda":
        engine.warm_up()
    outputs = [engine.generate([one], SamplingParams(max_new_tokens=2))[0] for one in questions]
    times[caching] = quantile([output.times[0] for output in outputs[1:]], 0.5)
print("prompt tokens that need not be computed, by your cache: ", by_book)
print("and by the kit's engine:                                ", [output.cached for output in outputs])
print(f"median time to first token: {1e3 * times[False]:.1f} ms without a prefix cache, {1e3 * times[True]:.1f} with it")

# %% [markdown]
# The tokens that need not be computed are saved for sure. How much time that is depends on the model: a GPU reads a few
# hundred tokens of one as small as ours about as fast as a few, and there the two times are nearly the same. With a large
# model and a long prompt, reading it is most of the time to the first token.
#
# ## Stretch B: admit, run, preempt
#
# *A badge, about 50 minutes, difficulty 4 of 5.*
#
# Pages are handed out as they are needed, so the pages of all running requests together may one day not suffice. Then
# somebody has to give way. The rules of Kwon et al. (section 4.5), and yours:
#
# - **First come, first served.** Nobody overtakes.
# - At each step those who run get the page that their next token needs, in order of arrival. Where none is free, the
#   **latest** arrival is preempted: it gives back all of its pages, and goes to the front of the queue. What it has
#   written so far is not lost: it is read again, together with its prompt, when it is admitted again
#   (**recomputation**).
# - Then the queue is admitted, as long as the first in it fits.
#
# A request of $n$ tokens, prompt and output so far, needs the pages of $n$ tokens for its next step, which writes token
# $n + 1$. The last token that a request writes is never read, so it needs no place.
#
# <details><summary>Hint 1</summary>
#
# `_grow` is the heart: "pages for all tokens, or nothing". Admission and running both ask it. The order matters: a
# newcomer admitted first would be preempted at once by those that grow, and its prompt be read for nothing.
# </details>
# <details><summary>Hint 2</summary>
#
# While a request cannot grow, preempt the last of `running`. That may be the request itself, and then it does not run.
# Loop over a copy of the list, `list(self.running)`, as it changes meanwhile.
# </details>

# %%
class Request:
    """tokens: of prompt and output so far; left: how many are still to be written; pages: held."""

    def __init__(self, name: str, tokens: int, left: int) -> None:
        self.name, self.tokens, self.left = name, tokens, left
        self.pages = 0


# %% exercise="Scheduler"
class Scheduler:
    """Says which requests run in each step, over `pages` pages, at most `max_batch` at once.

    free_pages: pages that nobody holds. running: requests in order of arrival. waiting: the queue.
    preemptions: how often a request was preempted so far. The methods whose names begin with an underscore
    are yours to use or to delete.
    """

    def __init__(self, pages: int, page_size: int, max_batch: int) -> None:
        self.total, self.page_size, self.max_batch = pages, page_size, max_batch
        self.free_pages, self.preemptions = pages, 0
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()

    def submit(self, name: str, prompt: int, new: int) -> None:
        """Queue a request of `prompt` tokens that is to write `new` more, both at least 1.

        Raises ValueError, and queues nothing, for one whose last step, with prompt + new - 1 tokens in
        the cache, needs more pages than there are.
        """
        ### BEGIN SOLUTION
        if -(-(prompt + new - 1) // self.page_size) > self.total:
            raise ValueError(f"{prompt + new - 1} tokens do not fit into {self.total} pages")
        self.waiting.append(Request(name, prompt, new))
        ### END SOLUTION

    def step(self) -> list[str]:
        """Run one step and return the names of those that wrote a token, in order of arrival.

        1. Each running request, in order of arrival, gets the pages that its tokens need. While too few
           are free, the latest arrival that runs is preempted; it may be the request itself.
        2. Requests are admitted from the front of the queue, with the pages that their tokens need, while
           the first one fits and the batch has room.
        3. Each running request writes a token. One that has none left to write ends, and gives back its
           pages.
        """
        ### BEGIN SOLUTION
        for request in list(self.running):
            while request in self.running and not self._grow(request):
                self._preempt(self.running[-1])
        while self.waiting and len(self.running) < self.max_batch and self._grow(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        ran = [request.name for request in self.running]
        for request in list(self.running):
            request.tokens += 1
            request.left -= 1
            if request.left == 0:
                self._give_back(request)
                self.running.remove(request)
        return ran
        ### END SOLUTION

    def _grow(self, request: Request) -> bool:
        """Give a request the pages that its tokens need; False, and no change, where too few are free."""
        ### BEGIN SOLUTION
        missing = -(-request.tokens // self.page_size) - request.pages
        if missing > self.free_pages:
            return False
        request.pages += missing
        self.free_pages -= missing
        return True
        ### END SOLUTION

    def _give_back(self, request: Request) -> None:
        """Take all pages from a request."""
        ### BEGIN SOLUTION
        self.free_pages += request.pages
        request.pages = 0
        ### END SOLUTION

    def _preempt(self, request: Request) -> None:
        """Take a running request out, put it at the front of the queue, and count it."""
        ### BEGIN SOLUTION
        self._give_back(request)
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.preemptions += 1
        ### END SOLUTION


# %% check="Scheduler"
check("Scheduler", Scheduler)

# %% tags=["demo"] needs=["Scheduler"]
dice = random.Random(2)
jobs = {f"r{i}": (dice.randint(5, 60), dice.randint(5, 70)) for i in range(12)}
scheduler = Scheduler(20, 16, 6)
for name, (tokens, new) in jobs.items():
    scheduler.submit(name, tokens, new)
ran = {name: [] for name in jobs}
step, full = 0, []
while scheduler.running or scheduler.waiting:
    for name in scheduler.step():
        ran[name].append(step)
    full.append(1 - scheduler.free_pages / 20)
    step += 1
figure, axes = plots.figure("Who runs when", "step", "request",
                            caption="A gap in a bar: preempted, and read again later.")
for row, name in enumerate(jobs):
    starts = [at for at in ran[name] if at - 1 not in ran[name]]
    ends = [at for at in ran[name] if at + 1 not in ran[name]]
    for first, last in zip(starts, ends):
        axes.barh(row, last - first + 1, left=first, height=0.75, color=plots.COLOURS["blue"])
axes.set_yticks(range(len(jobs)), list(jobs))
axes.set_ylim(len(jobs) - 0.5, -0.5)
rows = list(jobs.values())
static = sum(max(new for _, new in rows[i : i + 6]) for i in range(0, len(rows), 6))
plots.show(figure, f"Bars of the steps in which each of 12 requests ran: {step} steps, "
                   f"{scheduler.preemptions} preemptions.")
print(f"{step} steps, {scheduler.preemptions} preemptions; pages in use, on average: {sum(full) / len(full):.0%}")
print(f"fixed batches of 6 that run until the last is done: {static} steps, if all their pages fit at once")

# %% [markdown]
# ## Stretch C: attention sinks
#
# *A badge, about 35 minutes, difficulty 3 of 5.*
#
# The lecture's next slide: what if the text is longer than any cache? Keep a window of the newest tokens, roll it over
# the pages, and give back what it leaves behind. Xiao et al. (2023) found that this breaks most models the moment the
# **first** tokens leave the window. Softmax weights add up to 1, and a head that has nothing to look at must put its
# weight somewhere: trained models put it on the first tokens, which every later token sees. They are **sinks**. Keep a
# few of them for ever, beside the window, and the model goes on as if nothing had happened (StreamingLLM).
#
# ```
#   the text         0  1  2  3  4  5  6  7  8  9  10  11    sinks = 2
#   in the cache     0  1                    8  9  10  11    window = 4
#   position         0  1                    2  3   4   5    (its place in the cache)
# ```
#
# One thing is easily missed: **positions**. A rotary embedding turns a key by an angle that grows with its position, and
# the score depends on the distance to the query. At its position in the text a sink would soon be further away than
# any distance the model was trained on. So positions are those in the cache, and the distances stay within it.
#
# <details><summary>Hint 1</summary>
#
# First make the list of the tokens that are kept, in order. While the text is short, window and sinks overlap, and no
# token may be in the list twice.
# </details>
# <details><summary>Hint 2</summary>
#
# The query belongs to the newest token. That is the last one in the cache, so its position is the last place.
# </details>

# %%
def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding, as in Llama. x: [..., length, dim], positions: [length]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None] * frequencies
    low, high = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


# %% exercise="sink_attention"
def sink_attention(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    """Attention of the newest token to the rolling cache: the first `sinks` tokens and the newest `window`.

    q: [heads, dim] float32, the newest token's query, not rotated yet
    k, v: [heads, length, dim] float32, of all tokens of the text so far, the newest included; keys not rotated yet
    window: at least 1, counts the newest token too; sinks: 0 or more
    The cache holds the kept tokens in the order of the text, each once; the position of a token is its
    place there, from 0. Query and keys are turned by `rotate`. Returns [heads, dim].
    """
    ### BEGIN SOLUTION
    length = k.shape[1]
    kept = [*range(min(sinks, length)), *range(max(sinks, length - window), length)]
    places = torch.arange(len(kept), device=q.device)
    keys, query = rotate(k[:, kept], places), rotate(q[:, None], places[-1:])
    weights = (query @ keys.transpose(1, 2) / math.sqrt(q.shape[1])).softmax(-1)
    return (weights @ v[:, kept])[:, 0]
    ### END SOLUTION


# %% check="sink_attention"
check("sink_attention", sink_attention)

# %% [markdown]
# You turned all kept keys anew for this one query. A server would have to do that for every new token. The kit turns
# each key **once**, to its position in the text, and the query **twice**: between the window's tokens distances are the
# same in the text as in the cache, and only the sinks need a query that stands nearer. Is it the same?

# %% tags=["demo"] needs=["sink_attention"]
generator = torch.Generator().manual_seed(6)
LENGTH, WINDOW, SINKS = 100, 20, 4
k, v = torch.randn(2, 2, LENGTH, 16, generator=generator)
q = torch.randn(2, 16, generator=generator)
last = torch.tensor([LENGTH - 1])
pages = [x.unflatten(1, (LENGTH // 4, 4)).transpose(0, 1) for x in (rotate(k, torch.arange(LENGTH)), v)]
by_kit = paged.gathered_attention(
    rotate(q[:, None], last).transpose(0, 1)[None], *pages, torch.arange(LENGTH // 4)[None], torch.tensor([LENGTH]),
    window=WINDOW, sinks=SINKS,
    q_sink=rotate(q[:, None], paged.cache_position(last, WINDOW, SINKS)).transpose(0, 1)[None])
mine = sink_attention(q, k, v, WINDOW, SINKS)
print("the same" if torch.allclose(mine, by_kit[0, 0], atol=1e-4) else "different")

# %% [markdown]
# And the model? The course's model reads held-out code with a full cache, with a window alone, and with a window of the
# same size of which four places are sinks.

# %% tags=["demo"] needs=["cache_bytes", "BlockManager", "PagedSequence", "SharedSequence", "paged_attention", "sink_attention"]
from effnlp_lab.paged import Batch, PagedModel, Sequence

LONG, ROOM, STEP = device.pick(fast=(400, 16, 80), full=(1000, 32, 100))
TEXTS = device.pick(fast=1, full=16)


def losses(window, sinks):
    """Mean loss of the next token by its position in the text, for a cache that keeps so much."""
    served, total = PagedModel(model, max_length=LONG, window=window, sinks=sinks), 0
    for number in range(TEXTS):
        row = [tokenizer.eos_token_id, *stream[number * LONG : (number + 1) * LONG]]
        manager = paged.BlockManager(paged.pages_for(LONG, 16), 16)
        sequence = Sequence(manager)
        sequence.append(LONG)
        hidden = served.forward(Batch.of([sequence], [row[:LONG]], device.torch), served.cache(manager.pages))
        chances = served.logits(hidden).float().log_softmax(-1)
        total = total - chances.gather(1, torch.tensor(row[1:], device=device.torch)[:, None])[:, 0]
    return total.cpu() / TEXTS


kinds = {"everything kept": (None, 0), f"window {ROOM}": (ROOM, 0), f"window {ROOM - 4}, 4 sinks": (ROOM - 4, 4)}
figure, axes = plots.figure("Loss along a long text", "position in the text (tokens)", "loss (nats a token)",
                            caption=f"Means over {STEP} positions.")
after = {}
for name, kind in kinds.items():
    values = losses(*kind)
    after[name] = values[STEP:].mean().item()
    axes.plot([i + STEP / 2 for i in range(0, LONG, STEP)], [part.mean().item() for part in values.split(STEP)],
              label=name)
axes.margins(y=0.25)
axes.legend(loc="lower center", ncols=3, fontsize=8)
spoken = ", ".join(f"{name}: {value:.2f}" for name, value in after.items())
plots.show(figure, f"Loss against position, three curves; means from {STEP} tokens on: {spoken}.")
print(spoken)

# %% [markdown]
# Four places of the window are given to tokens that say nothing about what comes next, and the model reads **better**
# for it. In the paper's models of billions of weights the window alone was not a little worse but useless, with
# perplexities in the thousands. What sinks do not do is bring back what has left the window: the curve of a full cache
# stays below. StreamingLLM promises no endless memory; it promises a model that does not fall apart.
#
# ## The receipt
#
# One step of decoding: one query for each of many sequences of mixed length, by everybody. What is compared is the
# memory that the cache takes, and the time. On a GPU the times are those of the card alone, as in an engine that records its
# steps and starts them without Python; only yours is timed as it runs, because a loop over sequences waits for Python.

# %% tags=["demo"] needs=["cache_bytes", "paged_attention"]
from effnlp_lab.device import ceilings
from effnlp_lab.notebook import bench
from effnlp_lab.notebook.receipt import Receipt
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, DIM = device.pick(fast=(8, 2, 64), full=(32, 8, 128))
BATCH, LONGEST = device.pick(fast=(8, 400), full=(32, 4000))
dtype = device.pick(fast=torch.float32, full=device.dtype)
generator = torch.Generator().manual_seed(8)
counts = (LONGEST * torch.rand(BATCH, generator=generator) ** 2).long().clamp(1, LONGEST)
counts[0] = LONGEST
counts = counts.tolist()
needed = [-(-n // 16) for n in counts]
order = torch.randperm(sum(needed), generator=generator).split(needed)
tables = [one.to(device.torch) for one in order]
k_pages, v_pages = torch.randn(2, sum(needed), KV_HEADS, 16, DIM, generator=generator).to(device.torch, dtype)
q = torch.randn(BATCH, HEADS, DIM, generator=generator).to(device.torch, dtype)
rows = [[x[table].transpose(0, 1).flatten(1, 2)[:, :n] for x in (k_pages, v_pages)] for table, n in zip(tables, counts)]
padded_k, padded_v = (torch.zeros(BATCH, KV_HEADS, LONGEST, DIM, dtype=dtype, device=device.torch) for _ in range(2))
seen = torch.zeros(BATCH, 1, 1, LONGEST, dtype=torch.bool, device=device.torch)
for i, (n, (k, v)) in enumerate(zip(counts, rows)):
    padded_k[i, :, :n], padded_v[i, :, :n], seen[i, ..., :n] = k, v, True
block_tables = torch.zeros(BATCH, max(needed), dtype=torch.int32, device=device.torch)
for i, table in enumerate(tables):
    block_tables[i, : len(table)] = table
count_tensor = torch.tensor(counts, dtype=torch.int32, device=device.torch)


def by_padding():
    return scaled_dot_product_attention(q[:, :, None], padded_k, padded_v, attn_mask=seen, enable_gqa=True)[:, :, 0]


def by_yours():
    return torch.stack([paged_attention(q[i], k_pages, v_pages, tables[i], n) for i, n in enumerate(counts)])


def by_kit():
    run = paged.paged_attention if device.triton == "compiled" else paged.gathered_attention
    return run(q[:, None], k_pages, v_pages, block_tables, count_tensor)[:, 0]


def by_library():
    return torch.stack([scaled_dot_product_attention(q[i, :, None], k, v, enable_gqa=True)[:, 0]
                        for i, (k, v) in enumerate(rows)])


exact = paged.gathered_attention(q[:, None].double(), k_pages.double(), v_pages.double(), block_tables, count_tensor)[:, 0]
own = {"layers": 1, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "itemsize": dtype.itemsize,
       "max_length": LONGEST}
memory = cache_bytes(own, counts, 16)


def costs(run, cache, queued=True):
    """queued: the time of the GPU alone, as in an engine that records its steps."""
    off = (run().double() - exact).abs().max().item()
    times = [bench.timed(run, device, queued=queued) for _ in range(5 if queued else 1)]
    seconds = sorted(times)[len(times) // 2]
    return {"quality": off, "peak_bytes": memory[cache], "seconds": seconds}


receipt = Receipt("07", quality="largest error", device=device,
                  title=f"A step of decoding: {BATCH} sequences of 1 to {LONGEST:,} tokens, {HEADS} heads on {KV_HEADS} "
                        f"of {DIM}, {dtype}; memory is what the cache takes")
receipt.add("baseline", "padded batch, SDPA", **costs(by_padding, "padded"))
receipt.add("yours", "paged_attention, one sequence after the other", **costs(by_yours, "paged", queued=False))
receipt.add("reference", "the kit's kernel" if device.triton == "compiled" else "the kit's definition",
            **costs(by_kit, "paged"))
receipt.add("library", "SDPA, a contiguous cache for each", **costs(by_library, "used"))
receipt.add("limit", "every key and value read once", peak_bytes=memory["used"],
            seconds=memory["used"] / ceilings(device).copy_bytes_per_second)
receipt.show()
print(f"saved as {receipt.save().name}")

# %% [markdown]
# The contiguous cache of the library's row takes least memory only because the lengths are known here and nothing grows.
#
# ## In your own words
#
# You run a chat service. A colleague proposes pages of 256 tokens in place of 16, "because large pages are simpler and faster
# to read". What would you win, what would you lose, and what would you measure before deciding? Use what you saw in this lab.
#
# Write 60 to 120 words. A person reads and grades them.

# %% [markdown] written="page_size"
# **Rubric, for whoever grades** (shares of the points; another answer as good earns them too)
#
# - 0.3: on average half a page of each sequence holds nothing, so the waste grows with the page; how much that is depends
#   on how long the requests are.
# - 0.3: fewer requests fit at once, so the batch and with it the tokens per second fall; prefixes are shared by whole pages
#   only, and copying a shared page costs more.
# - 0.2: what is won: shorter block tables, fewer addresses to look up, longer contiguous reads; the bytes of keys and values
#   that attention reads are the same.
# - 0.2: a measurement that decides: the lengths of real requests, tokens per second at the service's load, time between
#   tokens.

# %% [markdown]
# ## What you have learned
#
# - A token's cache is $2 L H_{kv} d b$ bytes. Reserving for the longest possible text leaves most of it empty; pages leave
#   half a page a sequence.
# - A block manager counts references; a block table maps tokens to pages. All or nothing: what is refused leaves no trace.
# - A fork shares, and copies a page only when one of several holders writes into it.
# - Attention reads scattered pages as well as contiguous rows, with the softmax in one pass. Behind the end lies anything.
# - With pages a server takes in requests as they come, and its throughput no longer depends on the longest one.
#
# ## Read on
#
# - W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023: vLLM.
# - G.-I. Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", 2022: continuous
#   batching, there called iteration-level scheduling.
# - A. Agrawal et al., "SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills", 2023.
# - L. Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs", 2024: prefixes in a radix tree.
# - T. Dao, D. Haziza, F. Massa, G. Sizov, "Flash-Decoding for long-context inference", 2023: split the keys.
# - G. Xiao, Y. Tian, B. Chen, S. Han, M. Lewis, "Efficient Streaming Language Models with Attention Sinks", 2023.
# - J. Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023.
# - In the kit: `effnlp_lab/paged` holds all of this as an engineer would use it: `blocks.py` and `sequence.py` (your
#   exercises 2 to 4, with the prefix cache), `kernels.py`, `scheduler.py` and `engine.py`. Lab 08 speculates on top of
#   it.
