# %% [markdown]
# # Lab 02: Streaming datasets
#
# A GPU that waits for data costs as much as one that works. Between a disk and a GPU stands a **data loader**, and it
# has to do five things at once: read from files that are larger than memory, give every process its own part, shuffle,
# remember exactly where it was when the power went off, and put texts of different lengths into one rectangle. Each of
# the five has a classical bug that nobody notices for weeks, because training goes on, only a little worse: samples
# that are seen eight times, samples that are never seen, an end-of-text token that the model never learns.
#
# In this lab you write the whole path, piece by piece, and measure what each piece saves.
#
# | | exercise | points | minutes | difficulty |
# |---|---|---|---|---|
# | 1 | `write_shards`: write shards | 1.5 | 40 | 2 of 5 |
# | 2 | `read_document`: read one document, and nothing else | 1 | 25 | 2 of 5 |
# | 3 | `worker_batches`: split among ranks and workers | 2 | 40 | 3 of 5 |
# | 4 | `shuffle_buffer`: shuffle with a buffer | 1.5 | 30 | 2 of 5 |
# | 5 | `ResumableStream`: resume in the middle of an epoch | 2.5 | 60 | 4 of 5 |
# | 6 | `padded_batches`: pad to the batch, and batch by length | 1.5 | 45 | 3 of 5 |
# | stretch | `pack_documents`: pack without attending across documents | badge | 45 | 3 of 5 |
# | stretch | `prefetch`: overlap loading with compute | badge | 40 | 4 of 5 |
#
# **Time.** About four and a half hours: the core exercises, the reading and the measurements. Stretch exercises come on top.
#
# **You need** Python's lists, generators and classes, and tensors. No model is trained here, and no GPU is needed.
#
# **How a check works.** Under each blank stands one call, `check(...)`. It runs your code on fresh random cases,
# compares with a reference, and says what went wrong, by name where it recognises the slip. Run it as often as you like.
#
# {assistants} The six core blanks are 3 to 15 lines each, and the bugs of this lab are exactly the ones that look right at
# a glance, in a student's code and in an assistant's.
#
# **Libraries.** `torch.utils.data`, `datasets`, `transformers` and this kit's own loader are refused inside your
# answers, and are compared with them in the demos. NumPy and the rest of torch are yours to use.

# %% tags=["parameters"]
DEVICE = "auto"
FAST = "auto"

# %%
import effnlp_lab
from effnlp_lab import check

import itertools
import queue
import random
import threading
from collections import deque
from pathlib import Path

import numpy as np
import torch

device = effnlp_lab.start("02_streaming_datasets", device=DEVICE, fast=FAST)

# %% tags=["demo"]
import shutil
import tempfile

from effnlp_lab.notebook import bench, plots

batch_sizes = [1, 8, 64, 256]
torch.set_num_threads(1)  # the work here is small: threads would only wait for each other

# %% [markdown]
# ## 1. From a disk to a GPU
#
# Memory comes in storeys, and each is larger and slower than the one above it:
#
# ```
#                    size             bytes a second      what lives there
#   GPU memory       10 to 100 GB     1 to 3 TB           model, activations, one batch
#        ^
#   RAM              10 to 1000 GB    10 to 100 GB        a few batches that are ready
#        ^
#   disk             TB               0.1 to 10 GB        shards: all the tokens
#        ^
#   network          no end           less                the rest of the shards
# ```
#
# Rough figures; the order is what matters. A corpus does not fit on the storey where it is needed, so it has to
# **stream** through. For that it is stored in a form that can be read in pieces: **shards**, files of about equal size
# that hold the tokens of many documents, one after another, with an **index** that says where each document begins.
#
# Why tokens, and not text? Because tokenizing once is cheaper than in every epoch, and because a token of a small
# vocabulary takes two bytes: `uint16` holds ids up to 65,535. A Python list of the same ids takes 8 bytes for each
# reference alone.
#
# ```
#  documents       [5 1 7]  [2 2]  [9]  [4 4 4 4]        at most 6 tokens a shard
#
#  shard_00000.bin  5 1 7 2 2 9          offsets  0 3 5 6      3 documents, 4 offsets
#  shard_00001.bin  4 4 4 4              offsets  0 4          1 document,  2 offsets
# ```
#
# Document $d$ of a shard is the tokens from `offsets[d]` up to, and not including, `offsets[d + 1]`. You will
# meet the same $n + 1$ numbers at the end of this lab under the name `cu_seqlens`, in the hands of an attention kernel.

# %%
def shard_name(number: int) -> str:
    """The file of shard `number`, counted from 0: shard_00000.bin, shard_00001.bin, ..."""
    return f"shard_{number:05d}.bin"


# %% tags=["nbval-check-output"]
tokens = [5, 1, 7, 2, 2, 9]
stored = np.array(tokens, dtype="<u2")  # <: the little end first, u: unsigned, 2: two bytes
print(f"{len(tokens)} tokens, {stored.nbytes} bytes on disk: {stored.tobytes().hex(' ')}")
print(f"{shard_name(0)}, {shard_name(1)}")

# %% [markdown]
# ### Exercise 1: write shards
#
# *1.5 points, about 40 minutes, difficulty 2 of 5.*
#
# Fill a shard until the next document does not fit, write it, and begin the next one. With $T_s$ the tokens in the open
# shard, $n$ those of the next document and $M$ = `shard_tokens`:
#
# $$\text{close the shard before the document} \iff T_s > 0 \ \text{ and } \ T_s + n > M.$$
#
# A document is never cut. One that is longer than $M$ has a shard to itself, which is then larger than $M$.
#
# `documents` is a stream: it can be read once, and may be larger than memory. So a shard has to be on disk as soon as
# the next document does not fit into it; never hold more than the open shard and one document. The check breaks a
# stream off in the middle and looks at what is on disk.
#
# <details><summary>Hint 1</summary>
#
# Keep two lists for the open shard: its tokens, and its offsets, which begin as `[0]`. After adding a document the next
# offset is the number of tokens so far.
# </details>
# <details><summary>Hint 2</summary>
#
# `np.array(tokens, dtype="<u2").tofile(folder / shard_name(0))` writes one file. The number of the open shard is the number
# of shards that are closed already.
# </details>
# <details><summary>Hint 3</summary>
#
# Two places close a shard: a document that does not fit, and the end of the stream. If you have forgotten the second, the
# last shard is missing. If there were no documents at all, there is nothing to close.
# </details>

# %% exercise="write_shards"
def write_shards(documents, folder: Path, shard_tokens: int) -> list[list[int]]:
    """Write documents to shards, as they come.

    documents: an iterable that can be read once; each document is a list of at least one token,
        0 to 65535
    folder: an existing, empty folder. Shard s goes to folder / shard_name(s): two bytes a token,
        unsigned, little end first, the documents one after another and nothing else
    shard_tokens: a shard is closed before a document that would take it above so many tokens. It
        may be exactly full. A document with more tokens than that has a shard to itself
    Returns the index: for each shard the list of its offsets, counted in tokens from the beginning
        of the shard. The first offset is 0, the last is the number of tokens in the shard. No
        documents: no files, and [].
    When a document does not fit, the open shard is written before another document is drawn.
    """
    ### BEGIN SOLUTION
    index = []
    tokens, offsets = [], [0]

    def close():
        np.array(tokens, dtype="<u2").tofile(folder / shard_name(len(index)))
        index.append(offsets)

    for document in documents:
        if tokens and len(tokens) + len(document) > shard_tokens:
            close()
            tokens, offsets = [], [0]
        tokens.extend(document)
        offsets.append(len(tokens))
    if tokens:
        close()
    return index
    ### END SOLUTION


# %% check="write_shards"
check("write_shards", write_shards)

# %% tags=["demo", "nbval-check-output"] needs=["write_shards"]
with tempfile.TemporaryDirectory() as name:
    toy_index = write_shards(iter([[5, 1, 7], [2, 2], [9], [4, 4, 4, 4]]), Path(name), 6)
    for number, offsets in enumerate(toy_index):
        size = (Path(name) / shard_name(number)).stat().st_size
        print(f"{shard_name(number)}: {size} bytes, offsets {offsets}")

# %% [markdown]
# ### Exercise 2: read one document, and nothing else
#
# *1 point, about 25 minutes, difficulty 2 of 5.*
#
# Now the way back. Documents are numbered over all shards: with $n_s$ documents in shard $s$, document $i$ lies in
#
# $$s = \min\Big\{s : i < \sum_{t \le s} n_t\Big\}, \qquad \text{at place} \quad d = i - \sum_{t < s} n_t.$$
#
# A **memory map** makes a file look like an array without reading it. `np.memmap(path, dtype="<u2", mode="r")` returns at
# once, whatever the size; touching an element makes the system fetch its page (4 KB, with some neighbours) into the
# file cache, where it stays until somebody needs the memory more. So: open the one shard that you need, slice, and only
# then convert the slice to `int64`, which is what an embedding layer wants. Converting copies; to convert before you
# slice would copy the whole shard. The check has a shard of four million tokens and takes shards away that you should not
# touch.
#
# <details><summary>Hint 1</summary>
#
# Walk over the shards. While the number is not below the documents of this shard, subtract them and go on.
# </details>
# <details><summary>Hint 2</summary>
#
# `len(index[s])` is the number of *offsets* of shard s. How many documents is that?
# </details>
# <details><summary>Hint 3</summary>
#
# `tokens[first:last].astype(np.int64)` copies the slice alone; `torch.from_numpy` makes a tensor of it.
# </details>

# %% exercise="read_document"
def read_document(folder: Path, index: list[list[int]], number: int) -> torch.Tensor:
    """One document from the shards, without reading the others.

    folder, index: as write_shards fills and returns them
    number: counts the documents of all shards, from 0; always a document that exists
    Returns an int64 tensor [tokens], on the CPU. Opens the shard of this document alone, and takes
        memory for this document and not for the shard.
    """
    ### BEGIN SOLUTION
    shard = 0
    while number >= len(index[shard]) - 1:
        number -= len(index[shard]) - 1
        shard += 1
    first, last = index[shard][number], index[shard][number + 1]
    tokens = np.memmap(folder / shard_name(shard), dtype="<u2", mode="r")
    return torch.from_numpy(tokens[first:last].astype(np.int64))
    ### END SOLUTION


# %% check="read_document"
check("read_document", read_document)

# %% [markdown]
# ### Measure it: memory that does not grow
#
# What "fits into memory" means is worth a look. Linux counts two kinds of pages to a process. **Anonymous** pages
# (`RssAnon`) are its own: arrays, lists, tensors. They have to stay in RAM, and when there are too many the
# process is killed. **File** pages (`RssFile`) are windows into the file cache, which the system takes back whenever it
# likes. The figure that most tools show, `VmRSS`, is the sum of both and so looks alarming for a memory map that does no
# harm.
#
# The demo makes files of growing size (they are *sparse*: the zeros take no room on the disk), reads all documents
# of each with your `read_document`, and watches the anonymous pages. Beside it a loader reads the whole file into an
# array first, and a third one keeps one map open and reads all of it.
#
# **Predict first.** By how many megabytes will the process's own (anonymous) memory grow while your function reads
# through the largest file, 128 MB (at full size 10,000 MB), one document after another?

# %% predict="memory_growth"
my_growth_in_mb = None  # your guess, in megabytes

# %% tags=["demo"] needs=["read_document"]
MB = 1_000_000
DOCUMENT = 32_768  # tokens of each document in this demo


def resident():
    """Bytes of this process's own pages, and of all its pages (Linux; None elsewhere)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")}


def growth(work, kind):
    """The largest growth of `kind` while `work`, a generator, runs; at least 0.1 MB, for the plot."""
    before = resident()[kind]
    return max([0.1 * MB, *(resident()[kind] - before for _ in work)])


def read_all(folder, index):
    for number in range(len(index[0]) - 1):
        read_document(folder, index, number)
        if number % 16 == 0:
            yield


def load_first(folder, index):
    array = np.fromfile(folder / shard_name(0), dtype="<u2")
    for first, last in zip(index[0], index[0][1:]):
        torch.from_numpy(array[first:last].astype(np.int64))
    yield array


def one_map(folder, index):
    array = np.memmap(folder / shard_name(0), dtype="<u2", mode="r")
    for first, last in zip(index[0], index[0][1:]):
        torch.from_numpy(array[first:last].astype(np.int64))
    yield array


sizes_mb = device.pick(fast=[8, 32, 128], full=[10, 100, 1000, 10_000])
free = shutil.disk_usage(tempfile.gettempdir()).free  # a disk in memory has no room for holes
sizes_mb = [size for size in sizes_mb if 2 * size * MB < free]
measured = {"load first, own pages": [], "one map, all pages": [], "yours, own pages": []}
if resident() is None:
    print("Not measured: this system does not tell a process's own pages from the file cache's.")
else:
    for megabytes in sizes_mb:
        with tempfile.TemporaryDirectory() as name:
            place, shard_length = Path(name), megabytes * MB // 2
            with open(place / shard_name(0), "wb") as file:
                file.truncate(2 * shard_length)
            offsets = [[*range(0, shard_length, DOCUMENT), shard_length]]
            measured["yours, own pages"].append(growth(read_all(place, offsets), "RssAnon"))
            measured["one map, all pages"].append(growth(one_map(place, offsets), "VmRSS"))
            if megabytes <= 1000:  # loading the largest would fill the memory of many machines
                grown = growth(load_first(place, offsets), "RssAnon")
                measured["load first, own pages"].append(grown)
    figure, axes = plots.figure(
        "What reading costs in memory",
        "data (MB)",
        "growth of the process (MB)",
        caption="Own pages have to stay in RAM; the pages of a map belong to the file cache.",
    )
    for (label, bytes_grown), look in zip(measured.items(), plots.looks(3)):
        axes.plot(sizes_mb[: len(bytes_grown)], [b / MB for b in bytes_grown], label=label, **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes_mb, [f"{size:,}" for size in sizes_mb])
    axes.minorticks_off()
    axes.legend()
    rows = {label: [f"{b / MB:,.1f}" for b in grown] for label, grown in measured.items()}
    spoken = "; ".join(f"{label}: {', '.join(row)}" for label, row in rows.items())
    plots.show(figure, f"Growth of memory in MB for files of {sizes_mb} MB. {spoken}.")
    print(f"{'growth in MB, data of':26}" + "".join(f"{size:7,} MB" for size in sizes_mb))
    for label, row in rows.items():
        print(f"{label:26}" + "".join(f"{cell:>10}" for cell in row))
    if my_growth_in_mb is not None:
        print(
            f"You predicted {my_growth_in_mb} MB; measured: {rows['yours, own pages'][-1]} MB "
            "(0.1 stands for anything below)."
        )

# %% [markdown]
# Your reader's own memory is that of one document, whatever the file. The open map shows as many pages as the file
# has, and yet could read a file ten times the RAM: those pages are the cache's. When you watch a training job, watch
# `RssAnon`.
#
# ## 2. Nothing lost, nothing twice
#
# A training job is many processes. Each GPU has one, its **rank** says which, and each rank starts several **workers** that
# prepare its batches. All of them run the same code on the same shards, and they do not talk to each other. So the split
# has to be computed, by everyone, alike.
#
# Two rules make this safe.
#
# **Shuffle by (seed, epoch), then slice.** One permutation of all samples, the same in every process, and each takes its
# part. If each rank shuffles for itself and then takes "its part", the parts overlap: some samples come several
# times in an epoch, and others never: with $R$ ranks a share of $(1 - 1/R)^R$ of them, a quarter for two ranks, and $1/e$,
# more than a third, for many.
#
# **Slice the steps, not the epoch.** At step $t$ the job as a whole consumes the global batch $b_t$, the samples from
# $tB$ on. Ranks cut $b_t$ among themselves. Then what the model sees at step $t$ does not depend on the number of
# ranks, and a job that began on 8 GPUs can go on with 6. MosaicML's streaming library calls this *elastic determinism*.
#
# ```
#  epoch's order     | 7  3 11  0  6 | 2  9  1 10  4 | 8  5 |    12 samples, batches of 5
#                      step 0          step 1          step 2
#  2 ranks   rank 0    7  3 11         2  9  1         8         remainder: first ranks
#            rank 1    0  6            10 4            5
#
#  workers   w 0       step 0                          step 2    steps 0, 2, 4, ...
#  of a rank w 1                       step 1                    steps 1, 3, 5, ...
# ```
#
# Why do workers take whole steps, in turn? Because that is how PyTorch's `DataLoader` asks: batch 0 from worker 0, batch 1
# from worker 1, and round again. With this split a rank receives the steps in order, however many workers it has.

# %%
def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The samples 0 to count - 1 in the order of one epoch: the same on every rank and worker."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


# %% tags=["nbval-check-output"]
print(sorted(epoch_order(12, seed=1, epoch=0)))
print(epoch_order(12, seed=1, epoch=0) == epoch_order(12, seed=1, epoch=0))
print(epoch_order(12, seed=1, epoch=0) == epoch_order(12, seed=1, epoch=1))

# %% [markdown]
# What remains to be settled is who gets the remainder when a batch does not divide. Your rule is printed by the next
# cell. It may differ from your neighbour's.

# %%
effnlp_lab.variant("worker_batches")

# %% [markdown]
# ### Exercise 3: split among ranks and workers
#
# *2 points, about 40 minutes, difficulty 3 of 5.*
#
# A batch of $n$ samples among $R$ ranks: with $q = \lfloor n / R \rfloor$ and $x = n \bmod R$, exactly $x$ ranks get $q + 1$
# neighbouring samples and the others $q$. With the rule "first" these are the ranks $0$ to $x - 1$, so that
#
# $$\text{rank } r \text{ begins at } \ r q + \min(r, x) \quad \text{and takes} \quad q + [r < x].$$
#
# If your rule is "last", think which ranks are the last $x$, and how many of them stand before rank $r$.
#
# A rank that gets no sample in a step (a last batch with fewer samples than ranks) delivers an empty list: all ranks make the
# same number of steps, or they would wait for each other forever in the next collective operation.
#
# <details><summary>Hint 1</summary>
#
# Forget the ranks first. The steps of worker w begin at w · B, (w + workers) · B, and so on, below `count`: that is one
# `range` with three arguments.
# </details>
# <details><summary>Hint 2</summary>
#
# `order[begin : begin + global_batch]` is short at the end all by itself: a slice stops where the list ends. Use its real
# length in `divmod`.
# </details>
# <details><summary>Hint 3</summary>
#
# In Python `True` counts as 1: `size + (rank < extra)`. Where do the pieces of rank 0, 1, 2 begin if 7 samples go to 3
# ranks? With "first" at 0, 3, 5; with "last" at 0, 2, 4.
# </details>

# %% exercise="worker_batches"
def worker_batches(
    count: int, global_batch: int, seed: int, epoch: int,
    rank: int, ranks: int, worker: int, workers: int,
) -> list[list[int]]:
    """What one worker of one rank delivers in one epoch.

    count: samples in the data set, 0 or more; global_batch: samples in a step over all ranks, 1 or
        more
    rank, ranks: this process, from 0, and how many there are; worker, workers: the same inside
        the rank
    Step t consumes epoch_order(count, seed, epoch)[t * global_batch : (t + 1) * global_batch]; the
    last step may have fewer. A step's samples are cut into `ranks` runs of neighbours, in the order
    of the ranks, whose lengths differ by at most one; your remainder rule says which ranks get the
    longer runs. Worker w makes the steps w, w + workers, w + 2 * workers, ...
    Returns the runs of this rank for the steps of this worker, in order: lists of sample numbers.
    A run may be empty, and is in the list all the same.
    """
    ### BEGIN SOLUTION
    order = epoch_order(count, seed, epoch)
    batches = []
    for begin in range(worker * global_batch, count, workers * global_batch):
        batch = order[begin : begin + global_batch]
        size, extra = divmod(len(batch), ranks)
        first = rank * size + min(rank, extra)
        batches.append(batch[first : first + size + (rank < extra)])
    return batches
    ### END SOLUTION


# %% check="worker_batches"
check("worker_batches", worker_batches)

# %% [markdown]
# Three splits of the same 1,000 samples among 3 ranks of 2 workers. The first is yours. The second is what happens when a
# program forgets that workers exist. The third is PyTorch's `DistributedSampler` with its defaults: to make all ranks
# equally long it repeats a few samples, which is harmless for training and wrong for an evaluation.

# %% tags=["demo", "nbval-check-output"] needs=["worker_batches"]
from collections import Counter

from torch.utils.data import DistributedSampler


def tally(samples):
    times = Counter(samples)
    return f"{len(times):5} different samples, {sum(n - 1 for n in times.values()):5} repeats"


def job(ranks, workers, workers_know=True):
    """All that a job delivers, step by step: DataLoader asks the workers of each rank in turn."""
    steps = {}
    for rank in range(ranks):
        for worker in range(workers):
            place = (worker, workers) if workers_know else (0, 1)
            for number, run in enumerate(worker_batches(1000, 64, 1, 0, rank, ranks, *place)):
                steps.setdefault(number * workers + worker, []).extend(run)
    return [steps[number] for number in sorted(steps)]


print("yours                ", tally(sum(job(3, 2), [])))
print("workers not told     ", tally(sum(job(3, 2, workers_know=False), [])))
samplers = [DistributedSampler(range(1000), num_replicas=3, rank=rank, seed=1) for rank in range(3)]
print("DistributedSampler   ", tally(n for sampler in samplers for n in sampler))
print(
    "3 ranks and 8 ranks see the same samples at every step:",
    [sorted(step) for step in job(3, 2)] == [sorted(step) for step in job(8, 4)],
)

# %% [markdown]
# ## 3. Shuffle what you can only read forwards
#
# A permutation needs random access: sample 7,031,554 next, please. A network stream, a compressed file or a spinning disk do
# not have it, or only at a price. There one keeps a **shuffle buffer** of $k$ items: deliver one of them at random, put the
# next item of the stream in its place.
#
# ```
#  stream  ... 9 8 7 6 -->  [ 3 | 1 | 5 | 4 ]  -->  2 0          buffer of 4
#                                 ^
#                     u = 0.3:  int(0.3 * 4) = 1, deliver 1, and 6 takes its place
#
#  stream  ... 9 8 7   -->  [ 3 | 6 | 5 | 4 ]  -->  1 2 0
# ```
#
# An item in a full buffer is chosen with probability $1/k$ at each step, so that it waits
#
# $$P(\text{wait} = w) = \frac{1}{k}\Big(1 - \frac{1}{k}\Big)^{w-1}, \qquad \mathbb{E}[\text{wait}] = k$$
#
# steps. As the buffer itself holds back $k$ items, an item comes out $w - k$ places from where it was: on average where it
# was, at most $k - 1$ places earlier, sometimes several $k$ later. So a buffer does *not* shuffle the data set: if the
# stream is sorted by language, a buffer of 1,000 leaves it sorted. The cure is to shuffle the order of the shards as
# well, which is cheap.
#
# So that your answer can be checked exactly, the random numbers are an input: `uniforms` yields floats in $[0, 1)$, and
# each delivery takes the next one. One detail is yours, how the buffer empties at the end:

# %%
effnlp_lab.variant("shuffle_buffer")

# %% [markdown]
# ### Exercise 4: shuffle with a buffer
#
# *1.5 points, about 30 minutes, difficulty 2 of 5.*
#
# 1. Fill the buffer with the first `size` items, without delivering any.
# 2. For each further item: draw $u$, deliver the one at place $\lfloor u \cdot \text{size} \rfloor$, and put the new item there.
# 3. When the stream has ended: draw $u$, deliver the one at place $\lfloor u \cdot m \rfloor$ of the $m$ that are left, and
#    close the gap by your rule, until the buffer is empty. With `shift`, `[a, b, c, d]` without `b` becomes `[a, c, d]`; with
#    `swap`, `[a, d, c]`.
#
# The function is a generator: it delivers with `yield`, and never holds more than `size` items, apart from the one that
# is just changing hands.
#
# <details><summary>Hint 1</summary>
#
# One `for item in stream:` does steps 1 and 2: while the buffer is not full, append and go on; otherwise exchange.
# </details>
# <details><summary>Hint 2</summary>
#
# `next(uniforms)` is the next random number, and `int(u * n)` rounds down. In step 3 the buffer shrinks, so multiply by
# its length and not by `size`.
# </details>
# <details><summary>Hint 3</summary>
#
# `buffer.pop(place)` takes an item out and shifts the ones behind it. For `swap`, move the last item to the place first.
# </details>

# %% exercise="shuffle_buffer"
def shuffle_buffer(stream, size: int, uniforms):
    """Items of a stream in shuffled order, with a buffer of `size` items.

    stream: an iterable that is read once, possibly shorter than the buffer or empty
    size: at least 1
    uniforms: an iterator of floats in [0, 1); each delivered item takes the next one, in order
    Yields every item of the stream once. With a full buffer and another item to come, the item at
    place int(u * size) is delivered and the new one takes its place. When the stream has ended, the
    item at place int(u * len(buffer)) is delivered, and your drain rule closes the gap. Draws an
    item from the stream only when the buffer has room for it, or is about to.
    """
    ### BEGIN SOLUTION
    buffer = []
    for item in stream:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(next(uniforms) * size)
        yield buffer[place]
        buffer[place] = item
    while buffer:
        yield buffer.pop(int(next(uniforms) * len(buffer)))
    ### END SOLUTION


# %% check="shuffle_buffer"
check("shuffle_buffer", shuffle_buffer)

# %% [markdown]
# Here is what a buffer does to the order: each dot is an item, where it was and where it came out. A full shuffle would fill
# the square.

# %% tags=["demo"] needs=["shuffle_buffer"]
dice = random.Random(0)
length = 2000
figure, axes = plots.figure(
    "Where the items of a stream come out",
    "place in the stream",
    "place after shuffling",
    caption="A buffer blurs the diagonal by about its own size; it does not fill the square.",
)
waits = {}
for size, name in ((1500, "yellow"), (200, "sky"), (20, "blue")):
    out = list(shuffle_buffer(iter(range(length)), size, iter(dice.random, 2.0)))
    axes.plot(
        out,
        range(length),
        marker=".",
        linestyle="",
        markersize=2,
        color=plots.COLOURS[name],
        label=f"buffer of {size:,}",
    )
    middle = [
        place - item + size for place, item in enumerate(out) if size < item < length - 4 * size
    ]
    waits[size] = sum(middle) / len(middle) if middle else None
axes.legend(markerscale=6, loc="upper left")
plots.show(
    figure,
    "Three clouds around the diagonal, one for each buffer: 20 items make a thin line, 200 a "
    "band, 1,500 of 2,000 nearly fill the square.",
)
for size in (20, 200):
    print(
        f"buffer of {size:4}: an item waits {waits[size]:6.1f} steps on average; in theory {size}"
    )

# %% [markdown]
# ## 4. Resume in the middle of an epoch, exactly
#
# Jobs die: a node fails, a queue's time is over. The model's weights come back from a checkpoint, and the data loader
# has to come back with them, to the very next sample. If it starts the epoch again, the first half of the data is seen twice
# as often as the second.
#
# What should be in the state? Here is a stream with `prefetch` 3 after 4 deliveries:
#
# ```
#  position    0   1   2   3   4   5   6   7   8   9  10 ...
#              |-- delivered --|-- queue ---|-- not yet read
#                              ^            ^
#                     state: 4 samples      not here: nobody has received 4, 5 and 6
# ```
#
# The most natural thing to save, how far the reader has read, is wrong. **The state counts what was delivered.** What
# waits in the queue is lost with the process, and is fetched again.
#
# The second question is what the count counts. A rank that says "I have delivered 100 samples" says nothing to a job with
# another number of ranks. Count the samples of the **whole job**: with $R$ ranks, each of which has delivered as many, the
# position in the endless sequence of all epochs moves by $R$ at each step,
#
# $$p = \text{samples} + r + jR \quad \text{is the } j\text{-th sample that rank } r \text{ delivers from here}, \qquad
# (\text{epoch}, \text{place}) = \operatorname{divmod}(p, \text{count}).$$
#
# The sequence is one epoch's order after the other, so a step may take its last samples from the next epoch: that is
# fine, since nothing is lost and nothing comes twice.
#
# ### Exercise 5: resume in the middle of an epoch
#
# *2.5 points, about 60 minutes, difficulty 4 of 5.*
#
# Complete the class. Its constructor is given, and you may change it, but not its arguments. `fetch(number)` reads a sample
# and is the expensive part. The check runs your class by scripts: it asks for samples, saves, goes on, loads into new
# streams (also into one that was used before, and into jobs with another number of ranks), and counts how often `fetch` was
# called.
#
# <details><summary>Hint 1</summary>
#
# Begin with `__next__` and without ranks. Fill the queue to `prefetch + 1` samples, deliver the leftmost. Which position
# comes next when `samples` are delivered and `len(queue)` wait?
# </details>
# <details><summary>Hint 2</summary>
#
# One number is enough for the state. It has to be the same on every rank, so neither the rank nor the queue may enter it.
# </details>
# <details><summary>Hint 3</summary>
#
# `load_state_dict` may be called on a stream whose queue is full of samples from another place. And it must not call `fetch`
# for what was delivered before: compute the place, do not replay the way to it.
# </details>

# %% exercise="ResumableStream"
class ResumableStream:
    """One rank's samples, epoch after epoch without end; resumes on any number of ranks.

    fetch: sample number -> sample; count: samples in the data set, at least 1; seed: of the order
    of each epoch, epoch_order(count, seed, epoch) for the epochs 0, 1, 2, ...; rank, ranks: this
    process, from 0, and how many there are; prefetch: samples fetched ahead, 0 or more.
    """

    def __init__(self, fetch, count: int, seed: int, rank: int, ranks: int, prefetch: int) -> None:
        self.fetch, self.count, self.seed = fetch, count, seed
        self.rank, self.ranks, self.prefetch = rank, ranks, prefetch
        self.samples = 0  # delivered by the whole job
        self.queue = deque()  # fetched and not yet delivered

    def __iter__(self):
        return self

    def __next__(self):
        """The next sample of this rank, as `fetch` returned it.

        Lay the orders of all epochs end to end. Step j of a new job delivers the positions
        j * ranks to (j + 1) * ranks - 1; rank r takes the r-th of them, from 0. When this returns,
        exactly `prefetch` further samples of this rank have been fetched and wait, in order.
        """
        ### BEGIN SOLUTION
        while len(self.queue) <= self.prefetch:
            position = self.samples + len(self.queue) * self.ranks + self.rank
            epoch, place = divmod(position, self.count)
            self.queue.append(self.fetch(epoch_order(self.count, self.seed, epoch)[place]))
        self.samples += self.ranks
        return self.queue.popleft()
        ### END SOLUTION

    def state_dict(self):
        """The place in the stream, for json.dumps: at most 500 characters, equal on all ranks."""
        ### BEGIN SOLUTION
        return {"samples": self.samples}
        ### END SOLUTION

    def load_state_dict(self, state) -> None:
        """Continue after the last sample that the job had delivered when `state` was made.

        Any rank of that job may have made it. The job had the same samples and seed, and perhaps
        another number of ranks, each of which had delivered equally many. Rank 0 takes the position
        right behind the last one delivered. Delivered samples are not fetched again, and what
        waited in the queue of this stream, which may have been used before, is dropped.
        """
        ### BEGIN SOLUTION
        self.samples = state["samples"]
        self.queue.clear()
        ### END SOLUTION


# %% check="ResumableStream"
check("ResumableStream", ResumableStream)

# %% [markdown]
# A job of four ranks saves its state every ten steps, as JSON, and is killed at step 37, with five samples waiting in each
# queue. Two ranks take over. Do they continue the undisturbed stream?

# %% tags=["demo", "nbval-check-output"] needs=["ResumableStream"]
import json

SAMPLES, SEED = 150, 7


def start_job(ranks, state=None):
    streams = [
        ResumableStream(str, SAMPLES, SEED, rank, ranks, prefetch=5) for rank in range(ranks)
    ]
    for stream in streams:
        if state is not None:
            stream.load_state_dict(json.loads(state))
    return streams


def run_job(streams, steps):
    return [next(stream) for _ in range(steps) for stream in streams]


undisturbed = run_job(start_job(1), 300)  # two epochs
job_of_four = start_job(4)
before, saved = [], None
for step in range(37):
    if step % 10 == 0:
        saved, saved_at = json.dumps(job_of_four[0].state_dict()), step
    before += run_job(job_of_four, 1)
del job_of_four  # killed
after = run_job(start_job(2, saved), 60)
kept = 4 * saved_at  # the model's weights go back to the same step
print(f"saved at step {saved_at}, after {kept} samples; killed at step 37, after {len(before)}")
print("the state is small:", len(saved) < 100)
print(
    "two ranks continue the undisturbed stream:",
    before[:kept] + after == undisturbed[: kept + len(after)],
)

# %% [markdown]
# ## 5. Texts of different lengths in one rectangle
#
# A batch is a rectangle, and texts are not equally long. So the short ones are filled up with **padding**, and all
# operations run over the padding too. The lecture's picture has 12 samples in batches of 4, and three ways:
#
# - pad everything to the longest sample **of the data set**: one rectangle for all;
# - **dynamic padding**: pad each batch to the longest sample in *it*;
# - **uniform-length batching**: sort by length first, so that neighbours are equally long, and then pad dynamically.
#
# $$\text{padding waste} = 1 - \frac{\sum_i \ell_i}{\sum_{b} |b| \cdot \max_{i \in b} \ell_i}.$$
#
# Sorting the whole data set has a price: the order is no longer random, and every epoch has the same batches. The common
# compromise sorts **windows** of some batches each: `window = batch_size` is plain dynamic padding, a window as long as
# the data set sorts everything.
#
# And then the trap of this section. Many tokenizers have no padding token, and everybody pads with the **end-of-text** token.
# If the attention mask is then computed as `ids != pad_id`, the real end-of-text at the end of each document is masked as
# well, and if its label is ignored too, the model never learns to stop. The mask comes from the *lengths*.

# %%
effnlp_lab.variant("padded_batches")

# %% [markdown]
# ### Exercise 6: pad to the batch, and batch by length
#
# *1.5 points, about 45 minutes, difficulty 3 of 5.*
#
# The result is what models of the `transformers` library take: `input_ids`, an `attention_mask` that is 1 on real tokens and
# 0 on padding, and `labels`, equal to the ids on real tokens and -100 on padding, the value that PyTorch's cross-entropy
# ignores. Labels are not moved by one place: the models do that themselves.
#
# <details><summary>Hint 1</summary>
#
# Two nested loops: over windows, and over the batches of the sorted window. `sorted(..., key=len)` keeps the order of
# equally long samples; so does `sorted(..., key=len, reverse=True)`.
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.full((rows, longest), pad_id)` and `torch.zeros_like(ids)` make the rectangles. Then fill row by row:
# `ids[row, : len(sample)] = torch.tensor(sample)`, and the same slice of the mask with 1.
# </details>
# <details><summary>Hint 3</summary>
#
# `ids.masked_fill(mask == 0, -100)` gives the labels in one line, because the mask knows what is padding.
# </details>

# %% exercise="padded_batches"
def padded_batches(
    samples: list[list[int]], batch_size: int, window: int, pad_id: int
) -> list[dict[str, torch.Tensor]]:
    """Batches of samples of similar length, padded to the longest of the batch.

    samples: lists of at least one token each; without any the result is []
    batch_size, window: at least 1. Samples 0 to window - 1 are the first window, and so on; the
        last one may be shorter. Each window is sorted by length, by your order rule; of equally
        long samples the earlier comes first. Then the window is cut into batches of batch_size;
        its last batch may be smaller. No batch spans two windows
    pad_id: the token to pad with; it may occur in samples too, as a real token
    Returns the batches in order, each a dict of int64 tensors [rows, longest of the batch]:
        "input_ids", with padding on the right; "attention_mask", 1 on the sample's tokens and 0 on
        padding; "labels", the sample's tokens and -100 on padding.
    """
    ### BEGIN SOLUTION
    batches = []
    for begin in range(0, len(samples), window):
        pool = sorted(samples[begin : begin + window], key=len)
        for first in range(0, len(pool), batch_size):
            rows = pool[first : first + batch_size]
            longest = max(map(len, rows))
            ids = torch.full((len(rows), longest), pad_id)
            mask = torch.zeros_like(ids)
            for row, sample in enumerate(rows):
                ids[row, : len(sample)] = torch.tensor(sample)
                mask[row, : len(sample)] = 1
            labels = ids.masked_fill(mask == 0, -100)
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches
    ### END SOLUTION


# %% check="padded_batches"
check("padded_batches", padded_batches)

# %% [markdown]
# The lecture's picture, drawn from your batches:

# %% tags=["demo"] needs=["padded_batches"]
twelve = [6, 2, 9, 3, 12, 4, 1, 10, 5, 8, 2, 7]


def real_and_padded(batches):
    """For every row of every batch: its real tokens, and the width of its batch."""
    return [(int(row.sum()), len(row)) for batch in batches for row in batch["attention_mask"]]


ways = {
    "to the longest of all": [(n, max(twelve)) for n in twelve],
    "to the longest of the batch": real_and_padded(
        padded_batches([[1] * n for n in twelve], 4, 4, 0)
    ),
    "the same, sorted by length": real_and_padded(
        padded_batches([[1] * n for n in twelve], 4, 12, 0)
    ),
}
figure, axes = plots.figure(
    "12 samples in batches of 4",
    "tokens, three ways side by side",
    "sample",
    caption="Blue: tokens. Hatched: padding, which is computed like the rest.",
)
for panel, (way, rows) in enumerate(ways.items()):
    left = panel * 15
    for place, (real, wide) in enumerate(rows):
        y = place + 0.7 * (place // 4)
        axes.barh(y, real, left=left, height=0.82, color=plots.COLOURS["blue"])
        axes.barh(
            y,
            wide - real,
            left=left + real,
            height=0.82,
            color="#FFE5B8",
            edgecolor=plots.COLOURS["orange"],
            hatch="////",
            linewidth=0.5,
        )
    slots, used = sum(wide for _, wide in rows), sum(real for real, _ in rows)
    axes.text(
        left,
        -1.15,
        f"{way}\n{slots - used} of {slots} slots wasted, {1 - used / slots:.0%}",
        fontsize=8.5,
        va="bottom",
    )
axes.set_ylim(14, -3.2)
axes.set_xlim(-0.5, 43)
axes.set_xticks([panel * 15 + n for panel in range(3) for n in (0, 4, 8, 12)], [0, 4, 8, 12] * 3)
axes.set_yticks([n + 0.7 * (n // 4) for n in range(12)], [str(n + 1) for n in range(12)])
axes.grid(visible=False)
shares = ", ".join(
    f"{way} {1 - sum(r for r, _ in rows) / sum(w for _, w in rows):.0%}"
    for way, rows in ways.items()
)
plots.show(
    figure,
    f"Twelve rows of tokens and padding, padded in three ways; the share of padding is: {shares}.",
)

# %% [markdown]
# Now with real text: Python source that is on your machine already, cut at blank lines into pieces, each tokenized by the
# course's tokenizer (byte-level BPE with 4,096 tokens, trained here on a part of the same text) and closed by an end-of-text
# token, which is also what we pad with. Your `write_shards` puts them on disk, your `read_document` reads them back.

# %% tags=["demo"]
from effnlp_lab.course.text import load_text, text_version
from effnlp_lab.tokenization import Tokenizer

text_bytes, most = device.pick(fast=(1_500_000, 5000), full=(6_000_000, 20_000))
pieces = [
    piece
    for text in load_text("course-train", limit_bytes=text_bytes).texts()
    for piece in text.split("\n\n")
    if len(piece) >= 20
]
tokenizer = Tokenizer.train("\n\n".join(pieces)[:500_000], 4096, special_tokens=["<|end|>"])
end_of_text = tokenizer.special_tokens["<|end|>"]
texts = [tokenizer.encode(piece, special=False)[:511] + [end_of_text] for piece in pieces[:most]]
total_tokens = sum(map(len, texts))
lengths = sorted(map(len, texts))
print(f"{len(texts):,} texts, {total_tokens:,} tokens ({text_version()})")
print(f"shortest {lengths[0]}, median {lengths[len(lengths) // 2]}, longest {lengths[-1]} tokens")

# %% tags=["demo"] needs=["write_shards", "read_document"]
corpus = tempfile.TemporaryDirectory()
folder = Path(corpus.name)
index = write_shards(iter(texts), folder, 100_000)
on_disk = sum(file.stat().st_size for file in folder.iterdir())
back = all(read_document(folder, index, n).tolist() == texts[n] for n in range(0, len(texts), 50))
print(f"{len(index)} shards, {on_disk:,} bytes; as lists the references alone take {8 * total_tokens:,}")
print(f"every 50th text comes back unchanged: {back}")

# %% [markdown]
# **Predict first.** These texts go into batches of 64, in their order of arrival, each batch padded to its own longest text.
# Of 100 slots in those rectangles, how many hold padding?

# %% predict="padding_share"
my_padding_of_100_slots = None  # your guess, a number from 0 to 100

# %% tags=["demo"] needs=["padded_batches"]
def waste_of(samples, batch_size, window):
    slots = sum(
        batch["input_ids"].numel()
        for batch in padded_batches(samples, batch_size, window, end_of_text)
    )
    return 1 - sum(map(len, samples)) / slots


curves = {
    "to the longest of all": [1 - total_tokens / (len(texts) * lengths[-1])] * len(batch_sizes),
    "to the batch, order of arrival": [waste_of(texts, size, size) for size in batch_sizes],
    "sorted in windows of 8 batches": [waste_of(texts, size, 8 * size) for size in batch_sizes],
    "all sorted": [waste_of(texts, size, len(texts)) for size in batch_sizes],
}
figure, axes = plots.figure(
    "Padding waste",
    "batch size (texts)",
    "slots that are padding (%)",
    caption="Lower is better. Larger batches meet longer texts, unless they are sorted.",
)
for (label, shares), look in zip(curves.items(), plots.looks(4)):
    axes.plot(batch_sizes, [100 * share for share in shares], label=label, **look)
axes.set_xscale("log", base=2)
axes.set_xticks(batch_sizes, [str(size) for size in batch_sizes])
axes.set_ylim(-3, 100)
axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
spoken = "; ".join(
    f"{label}: " + ", ".join(f"{100 * s:.0f}" for s in shares) for label, shares in curves.items()
)
plots.show(figure, f"Percentage of padding at batch sizes 1, 8, 64 and 256. {spoken}.")
print(f"{'batch size':34}" + "".join(f"{size:>8}" for size in batch_sizes))
for label, shares in curves.items():
    print(f"{label:34}" + "".join(f"{share:8.1%}" for share in shares))
if my_padding_of_100_slots is not None:
    measured_share = 100 * curves["to the batch, order of arrival"][2]
    print(f"You predicted {my_padding_of_100_slots} of 100; measured: {measured_share:.0f}.")

# %% [markdown]
# ### A ladder: is a larger batch always faster?
#
# Batching pays because a device does many equal operations faster than one after another. Padding eats it up again. This
# ladder sends 5,000 copies of a short text through a small network at batch sizes 1, 8, 64 and 256, first all
# alike (**uniform**), then with every 64th text many times as long (**ragged**), as it happens in a real queue: one
# long text makes its whole batch long. The third row is your `padded_batches` with the same ragged texts, sorted.

# %% tags=["demo"] needs=["padded_batches"]
stretch = device.pick(fast=20, full=100)  # how many times as long every 64th text is
uniform = [[11, 12, 13, 14]] * 5000  # "This is a test"
ragged = [[11, 12, 13, 14] * (stretch if n % 64 == 0 else 1) for n in range(5000)]
torch.manual_seed(0)
width = device.pick(fast=32, full=1024)  # wide enough that a GPU is not done before the host has asked
network = torch.nn.Sequential(
    torch.nn.Embedding(4096, width),
    torch.nn.Linear(width, 4 * width),
    torch.nn.ReLU(),
    torch.nn.Linear(4 * width, width),
).to(device.torch)


@torch.no_grad()
def send(batches):
    for batch in batches:
        network(batch)


def seconds_for(samples, size, window):
    """Seconds in the network alone: the batches are made and moved before the clock starts."""
    batches = [
        batch["input_ids"].to(device.torch) for batch in padded_batches(samples, size, window, 0)
    ]
    send(batches[:3])
    return min(bench.timed(lambda: send(batches), device) for _ in range(2))


ladder = {
    "uniform": [seconds_for(uniform, size, size) for size in batch_sizes],
    "ragged, order of arrival": [seconds_for(ragged, size, size) for size in batch_sizes],
    "ragged, sorted": [seconds_for(ragged, size, 5000) for size in batch_sizes],
}
print(f"{'texts a second, batch size':30}" + "".join(f"{size:>12}" for size in batch_sizes))
for label, row in ladder.items():
    print(f"{label:30}" + "".join(f"{5000 / seconds:12,.0f}" for seconds in row))
figure, axes = plots.figure(
    f"5,000 texts; in the ragged ones every 64th is {stretch} times as long",
    "batch size (texts)",
    "texts a second",
    caption="Higher is better.",
)
for (label, row), look in zip(ladder.items(), plots.looks(3)):
    axes.plot(batch_sizes, [5000 / seconds for seconds in row], label=label, **look)
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(batch_sizes, [str(size) for size in batch_sizes])
axes.legend()
spoken = "; ".join(
    f"{label}: " + ", ".join(f"{5000 / s:,.0f}" for s in row) for label, row in ladder.items()
)
plots.show(figure, f"Texts a second at batch sizes 1, 8, 64 and 256. {spoken}.")

# %% [markdown]
# Uniform texts climb the ladder. Of the ragged ones in the order of arrival, every batch of 64 or more has its long text and
# pays for it in every row, which ends the climb at 8. Sorted, there is next to nothing to pay for: what still lies between
# the two upper lines are the tokens of the long texts themselves. (Small batches on a GPU take as long as starting their
# operations, whatever is in them.)
#
# ### All of it together: tokens a second
#
# One epoch over the texts on disk, in shuffled batches of 32 padded to the batch, by four loaders in turn: your functions; the
# kit's loader; Hugging Face's `datasets`, streaming from Parquet with a shuffle buffer; and PyTorch's `DataLoader` over a
# list of tensors in memory, which is the easy case that streaming has to compete with.

# %% tags=["demo"] needs=["write_shards", "read_document", "worker_batches", "padded_batches"]
import inspect

from torch.utils.data import DataLoader

from effnlp_lab.streaming import Documents, StreamLoader, pad_batch
from effnlp_lab.streaming import write_shards as kit_write_shards

count = device.pick(fast=2000, full=len(texts))
epoch_texts = texts[:count]
epoch_tokens = sum(map(len, epoch_texts))
kit_documents = Documents(kit_write_shards(folder / "kit", epoch_texts, vocab_size=4096))


def collate(rows):
    return pad_batch(rows, end_of_text)


def read_yours():
    for numbers in worker_batches(count, 32, 1, 0, 0, 1, 0, 1):
        rows = [read_document(folder, index, number).tolist() for number in numbers]
        yield padded_batches(rows, 32, 32, end_of_text)[0]


def read_kit():
    yield from StreamLoader(kit_documents, 32, seed=1, collate=collate)


def read_memory():
    yield from DataLoader(in_memory, batch_size=32, shuffle=True, collate_fn=collate)


def read_datasets():
    # one file: without threads that interleave several, which datasets 5 ends with a pause of 5 s
    known = inspect.signature(streamed.shuffle).parameters
    single = {name: 1 for name in ("max_buffer_input_shards",) if name in known}
    rows = streamed.shuffle(seed=1, buffer_size=1000, **single)
    for batch in rows.iter(batch_size=32):
        yield collate(batch["ids"])


def consume(batches):
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


in_memory = [torch.tensor(text) for text in epoch_texts]
loaders, missing = (
    {"yours": read_yours, "the kit": read_kit, "DataLoader, in memory": read_memory},
    {},
)
try:
    import datasets
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"ids": epoch_texts}), folder / "texts.parquet", row_group_size=500
    )
    streamed = datasets.load_dataset(
        "parquet", data_files=str(folder / "texts.parquet"), split="train", streaming=True
    )
    loaders["datasets, streaming"] = read_datasets
except ImportError:
    missing["datasets, streaming"] = "not installed: pip install datasets"
for name, loader in loaders.items():
    print(f"{name:24} delivers every token: {consume(loader()) == epoch_tokens}")
rates = bench.compare(
    f"One epoch of {count:,} texts",
    {name: (lambda read=read: consume(read())) for name, read in loaders.items()},
    ours="yours",
    peer="datasets, streaming",
    repeats=3,
    warmup=0,
    device=device,
    missing=missing,
)
print()
for name in loaders:
    print(f"{name:24}{epoch_tokens / rates.median(name):14,.0f} tokens a second")

# %% [markdown]
# Do not mind if yours is the last of the four: it is written to be read. What separates it from the kit's is overhead for
# each sample: opening a map, a list in between, a tensor for each row. Production loaders keep their maps open, fill rows
# with NumPy, and run several workers beside the GPU. `datasets` turns every row into Python objects, and in return reads
# any format. Whether a rate is enough depends on the consumer. A GPU of $F$ useful operations a second trains a model of $P$ weights at about
# $F / 6P$ tokens a second: with $F = 4 \cdot 10^{14}$ and a billion weights, 67,000. The loader has to be faster
# than that, and no more.
#
# ## Stretch A: pack without attending across documents
#
# *A badge, about 45 minutes, difficulty 3 of 5.*
#
# There is a way to have almost no padding: put several documents into one row, one behind the other. Pre-training does
# this everywhere. But a row of three documents is not one text. Left alone, the second document attends to the first,
# its positions continue where the first one ended, and its first token is predicted from the last token of another text.
#
# ```
#  tokens        a0 a1 a2 | b0 b1 | c0 c1 c2           cu_seqlens   0 3 5 8
#  position_ids   0  1  2 |  0  1 |  0  1  2
#  labels         -  a1 a2|  -  b1|  -  c1 c2          - is -100
#
#  mask (row: query, column: key)      a0 a1 a2 b0 b1 c0 c1 c2
#                                  a0   x
#                                  a1   x  x
#                                  a2   x  x  x
#                                  b0            x
#                                  b1            x  x
#                                  c0                  x
#                                  c1                  x  x
#                                  c2                  x  x  x
# ```
#
# With $s(i)$ the document of token $i$: $\ \text{mask}_{ij} = [s(i) = s(j)] \cdot [j \le i]$. Attention kernels do not take this mask,
# which has a row's length squared entries: they take `cu_seqlens`, the boundaries, as int32, and skip the empty blocks.
#
# Rows are filled in order: a document goes into the last row if it still fits, and begins a new row if not. A document
# longer than a row is first cut into pieces of `length` tokens (the last may be shorter), each of which then counts as a
# document.
#
# <details><summary>Hint 1</summary>
#
# Fill the rows first, as lists of pieces. The rule is that of your shards. Then make the tensors of each row.
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.arange(len(row)).repeat_interleave(lengths)` says for each token which document of the row it belongs to. From it,
# the positions are `arange - start of the document`, and the mask is one comparison of a column with a row.
# </details>

# %% exercise="pack_documents"
def pack_documents(documents: list[list[int]], length: int) -> list[dict[str, torch.Tensor]]:
    """Documents packed into rows of at most `length` tokens, kept apart from each other.

    documents: at least one, of at least one token each; length: at least 1
    A document of more than `length` tokens is cut into pieces of `length`, the last one perhaps
    shorter, which count as documents. In order, a document is appended to the last row if the row
    then has at most `length` tokens, and begins a new row otherwise. Rows are not padded.
    Returns a dict for each row of n tokens and d documents:
        input_ids, int64 [n]; position_ids, int64 [n], from 0 in every document; cu_seqlens, int32
        [d + 1], the boundaries from 0 to n; labels, int64 [n], the ids with -100 at the first token
        of every document; mask, bool [n, n], true where the query (row) may attend to the key
        (column): itself and what comes before it in its own document.
    """
    ### BEGIN SOLUTION
    rows = [[]]
    for document in documents:
        for begin in range(0, len(document), length):
            piece = document[begin : begin + length]
            if sum(map(len, rows[-1])) + len(piece) > length:
                rows.append([])
            rows[-1].append(piece)
    packed = []
    for row in rows:
        ids = torch.tensor([token for piece in row for token in piece])
        starts = torch.tensor([0, *itertools.accumulate(map(len, row))], dtype=torch.int32)
        owner = torch.arange(len(row)).repeat_interleave(starts.diff())
        positions = torch.arange(len(ids)) - starts[owner]
        labels = ids.masked_fill(positions == 0, -100)
        same = owner[:, None] == owner
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        packed.append({
            "input_ids": ids, "position_ids": positions, "cu_seqlens": starts, "labels": labels,
            "mask": same & causal,
        })
    return packed
    ### END SOLUTION


# %% check="pack_documents"
check("pack_documents", pack_documents)

# %% [markdown]
# Is it really as if each document were alone? One layer of attention with learned positions, on a packed row and on each
# document by itself. Then the same without the mask, as it happens when somebody just concatenates.

# %% tags=["demo", "nbval-check-output"] needs=["pack_documents"]
torch.manual_seed(0)
embed, places, width = torch.nn.Embedding(100, 16), torch.nn.Embedding(64, 16), 16
three = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]]


@torch.no_grad()
def attend(ids, positions, mask):
    x = embed(ids) + places(positions)
    return torch.nn.functional.scaled_dot_product_attention(
        x[None], x[None], x[None], attn_mask=mask
    )[0]


row = pack_documents(three, 12)[0]
together = attend(row["input_ids"], row["position_ids"], row["mask"])
alone = torch.cat(
    [
        attend(
            torch.tensor(one), torch.arange(len(one)), torch.ones(len(one), len(one)).tril().bool()
        )
        for one in three
    ]
)
causal = torch.ones(12, 12).tril().bool()
print("boundaries:", row["cu_seqlens"].tolist())
print("packed, as if alone:          ", torch.allclose(together, alone, atol=1e-6))
print(
    "with positions that run on:   ",
    torch.allclose(attend(row["input_ids"], torch.arange(12), row["mask"]), alone, atol=1e-3),
)
print(
    "with attention that runs on:  ",
    torch.allclose(attend(row["input_ids"], row["position_ids"], causal), alone, atol=1e-3),
)

# %% tags=["demo"] needs=["padded_batches", "pack_documents"]
from effnlp_lab.streaming import best_fit

row_length = 512
some = texts[:1000]
some_tokens = sum(map(len, some))
slots = {
    f"packed into rows of {row_length}": len(pack_documents(some, row_length)) * row_length,
    "the same by the kit, best fit": len(best_fit(list(map(len, some)), row_length)) * row_length,
}
empty = {way: 1 - some_tokens / number for way, number in slots.items()}
for way, window in (("all sorted", 1000), ("windows of 8", 256), ("order of arrival", 32)):
    empty[f"batches of 32, {way}"] = waste_of(some, 32, window)
print("slots without a token, the first 1,000 texts:")
for way, share in empty.items():
    print(f"  {way:34}{share:6.1%}")

# %% [markdown]
# Packing in order leaves a row as soon as the next document does not fit, and its end stays empty. The kit looks for a
# document that does fit (best fit), and leaves hardly a slot empty; what it gives up is the order.
#
# ## Stretch B: overlap loading with compute
#
# *A badge, about 40 minutes, difficulty 4 of 5.*
#
# A loop that loads a batch, computes, loads the next and so on takes the sum of both times. While the GPU computes, the CPU is
# idle, so let a thread load the next batches meanwhile:
#
# ```
#  in turn     load 0 | compute 0 | load 1 | compute 1 | load 2 | compute 2
#
#  overlapped  load 0 | load 1 | load 2  | ...
#                     | compute 0 | compute 1 | compute 2
# ```
#
# $$t_{\text{in turn}} = n\,(t_{\text{load}} + t_{\text{compute}}), \qquad
# t_{\text{overlapped}} \approx n \max(t_{\text{load}},\, t_{\text{compute}}).$$
#
# Between the two stands a queue with a **bound**. Without one, a loader that is faster than the model fills the memory. Python
# threads do overlap here, in spite of the interpreter's lock, because waiting for a disk, copying and computing in
# torch release it.
#
# The delicate parts are the two ends. The consumer must learn that the source has ended; any value might be a real item, `None`
# too, so the kit gives you an object of its own, `END`. And if the source raises, the error has to arrive in the consumer,
# after the items that came before it; an exception in a thread otherwise vanishes, and the epoch just seems short.

# %%
END = object()  # marks the end in a queue: no source can yield it

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `queue.Queue(depth)` blocks in `put` when it is full and in `get` when it is empty. A thread is started by
# `threading.Thread(target=work, daemon=True).start()`, where `work` is a function inside yours.
# </details>
# <details><summary>Hint 2</summary>
#
# Put pairs into the queue, an item and an error of which one is nothing. The last pair is `(END, None)`, or `(END, error)`
# from an `except Exception as error:` around the loop.
# </details>

# %% exercise="prefetch"
def prefetch(source, depth: int):
    """The items of `source`, in order, read ahead by a thread.

    source: an iterable, read in a daemon thread that this function starts (a daemon ends with the
        program, even when the loop was left early)
    depth: at least 1. While the consumer is busy the thread goes on until `depth` items are
        waiting; it may hold one more in its hand, and reads no further
    Yields every item once, in order; None is an item like any other. An exception of the source is
    raised here, with its own type and message, after the items that came before it.
    """
    ### BEGIN SOLUTION
    box = queue.Queue(depth)

    def work():
        try:
            for item in source:
                box.put((item, None))
            box.put((END, None))
        except Exception as error:
            box.put((END, error))

    threading.Thread(target=work, daemon=True).start()
    while True:
        item, error = box.get()
        if error is not None:
            raise error
        if item is END:
            return
        yield item
    ### END SOLUTION


# %% check="prefetch"
check("prefetch", prefetch)

# %% [markdown]
# In the measurement the disk is a `sleep` (so that it is the same on every machine), and the computation is real on a GPU and
# another sleep on a CPU, which stands for a device that is not your processor.

# %% tags=["demo"] needs=["prefetch"]
import time

LOAD, COMPUTE, BATCHES = 0.010, 0.012, 20


def timeline(overlapped):
    """Seconds of the loop, and (what, batch, begin, end) of all its parts."""
    parts, zero = [], time.perf_counter()

    def source():
        for batch in range(BATCHES):
            begin = time.perf_counter()
            time.sleep(LOAD)
            parts.append(("load", batch, begin - zero, time.perf_counter() - zero))
            yield batch

    for batch in prefetch(source(), 2) if overlapped else source():
        begin = time.perf_counter()
        if device.kind == "cuda":
            while time.perf_counter() - begin < COMPUTE:
                square @ square
                torch.cuda.synchronize()
        else:
            time.sleep(COMPUTE)
        parts.append(("compute", batch, begin - zero, time.perf_counter() - zero))
    return time.perf_counter() - zero, parts


if device.kind == "cuda":
    square = torch.randn(4096, 4096, device="cuda", dtype=device.dtype)
    (square @ square).sum().item()
in_turn, parts_in_turn = timeline(False)
overlapping, parts_overlapping = timeline(True)
figure, axes = plots.figure(
    "Six batches, loaded and computed",
    "time (ms)",
    "what runs",
    caption="Dark: loading. Light: computing. Above in turn, below overlapped.",
)
for base, parts in ((0, parts_in_turn), (3, parts_overlapping)):
    for what, batch, begin, end in parts:
        if batch < 6:
            loading = what == "load"
            axes.barh(
                base + (not loading),
                1000 * (end - begin),
                left=1000 * begin,
                height=0.8,
                edgecolor="black",
                color=plots.COLOURS["blue"] if loading else "#FFE5B8",
                linewidth=0.6,
            )
            axes.text(
                500 * (begin + end),
                base + (not loading),
                str(batch),
                ha="center",
                va="center",
                fontsize=9,
                color="white" if loading else "black",
            )
axes.set_yticks([0, 1, 3, 4], ["load", "compute", "load", "compute"])
axes.grid(axis="y", visible=False)
axes.invert_yaxis()
plots.show(
    figure,
    "Two timelines of six batches. In turn, each computation waits for its load. Overlapped, "
    "loads run while the batch before is computed, and the end comes earlier.",
)
at_best = (LOAD + COMPUTE) / max(LOAD, COMPUTE)
print(
    f"{BATCHES} batches in turn {in_turn:.3f} s, overlapped {overlapping:.3f} s: "
    f"{in_turn / overlapping:.2f} times as fast; at best {at_best:.2f} times"
)

# %% [markdown]
# On a GPU there is one more step to overlap, the copy from RAM to the card. It runs beside the kernels when the batch lies in
# *pinned* memory (pages that the system promises not to move) and the copy has a CUDA stream of its own. The kit's
# `effnlp_lab/streaming/prefetch.py` does both; its comments say what goes wrong without them.
#
# ## The receipt
#
# What has it all saved? The same texts go through the same small network once. The baseline pads everything to the longest
# text; the library is what `DataLoader` with a padding collator does, batches in the order of a shuffle, padded to
# the batch; yours and the kit's sort by length in windows of 8 batches; the limit has no padding at all. Quality is the share of
# slots that are padding. Time is that of the network, and follows the FLOPs. Peak memory counts the network's tensors at the
# largest batch, and sorting does not
# lower it: a batch of 32 long texts is still a batch of 32 long texts. (Who has to lower it makes batches of so many *tokens*
# instead of so many texts, or packs.)

# %% tags=["demo"] needs=["padded_batches"]
from torch.utils.data import DataLoader

from effnlp_lab.notebook.memory import counted_peak
from effnlp_lab.notebook.receipt import Receipt
from effnlp_lab.streaming import Documents, StreamLoader, pad_batch
from effnlp_lab.streaming import write_shards as kit_write_shards

SIZE = 32
receipt_texts = texts[: device.pick(fast=2000, full=len(texts))]
real_tokens = sum(map(len, receipt_texts))
shuffled = [receipt_texts[n] for n in epoch_order(len(receipt_texts), 1, 0)]
longest_text = max(map(len, receipt_texts))


def collate(rows):
    return pad_batch(rows, end_of_text)


receipt_folder = tempfile.TemporaryDirectory()
kit_shards = kit_write_shards(Path(receipt_folder.name) / "shards", receipt_texts, vocab_size=4096)
rows_of = {
    ("baseline", "pad to the longest of all"): [
        pad_batch(shuffled[n : n + SIZE], end_of_text, length=longest_text)
        for n in range(0, len(shuffled), SIZE)
    ],
    ("yours", "windows of 8 batches"): padded_batches(shuffled, SIZE, 8 * SIZE, end_of_text),
    ("reference", "the kit, by length"): list(
        StreamLoader(Documents(kit_shards), SIZE, seed=1, by_length=8, collate=collate)
    ),
    ("library", "DataLoader, pad to the batch"): list(
        DataLoader(
            [torch.tensor(text) for text in receipt_texts], SIZE, shuffle=True, collate_fn=collate
        )
    ),
    ("limit", "no padding"): [
        {"input_ids": torch.tensor(sum(shuffled[n : n + SIZE], []))}
        for n in range(0, len(shuffled), SIZE)
    ],
}
receipt = Receipt(
    "02",
    quality="padding",
    device=device,
    title=f"{len(receipt_texts):,} texts, {real_tokens:,} tokens, once through a small network",
)
wide = network[0].embedding_dim
for (role, way), batches in rows_of.items():
    ids = [batch["input_ids"].to(device.torch) for batch in batches]
    slots = sum(batch.numel() for batch in ids)
    send(ids[:3])
    receipt.add(
        role,
        way,
        quality=f"{1 - real_tokens / slots:.1%}",
        flops=float(slots * 2 * 2 * wide * 4 * wide),
        peak_bytes=counted_peak(lambda: send([max(ids, key=torch.numel)])),
        seconds=min(bench.timed(lambda: send(ids), device) for _ in range(2)),
    )
receipt.show()
print(f"saved as {receipt.save().name}")

# %% [markdown]
# ## In your own words
#
# A training run stopped in the middle of epoch 2 and was resumed on half as many GPUs. From there on the loss is lower
# than before, too low to be true. What may have happened to the data, and how would you find out?
#
# Write 60 to 120 words. A person reads and grades them.

# %% [markdown] written="resumed_run"
# **Rubric, for whoever grades** (shares of the points; another answer as good earns them too)
#
# - 0.4: samples come twice (or a part is never seen): order or place was not kept, and the run reads what it
#   has read already.
# - 0.3: why: the place was stored for each rank or worker, or the order depends on the number of ranks; with an
#   order of (seed, epoch) and one global place it would not.
# - 0.3: a test that would tell: log the ids of the samples, before and after, and look for ids that come twice
#   or not at all in the epoch.

# %% [markdown]
# ## What you have learned
#
# - Tokens on disk take two bytes each, and a memory map reads them without owning them: watch anonymous memory, not the sum.
# - One order for everybody, computed from (seed, epoch), and then slices: of steps for ranks, of turns for workers. Nothing
#   has to be communicated, and nothing is lost or comes twice.
# - A shuffle buffer moves items by about its own size. It is what you have when you can only read forwards.
# - A state counts what was delivered, by the whole job. What was prefetched is fetched again.
# - Padding is computed like everything else. Sort within windows, or pack; and take the mask from lengths, never from ids.
#
# ## Read on
#
# - A. Aizman, G. Maltby, T. Breuel, "High Performance I/O For Large Scale Deep Learning", 2019: shards, and why many small files
#   are slow (WebDataset).
# - D. Murray, J. Šimša, A. Klimovic, I. Indyk, "tf.data: A Machine Learning Data Processing Framework", 2021: a pipeline that
#   tunes its own prefetching.
# - J. Mohan, A. Phanishayee, A. Raniwala, V. Chidambaram, "Analyzing and Mitigating Data Stalls in DNN Training", 2021: how
#   much GPU time is lost to waiting, measured.
# - M. M. Krell, M. Kosec, S. P. Perez, A. Fitzgibbon, "Efficient Sequence Packing without Cross-contamination", 2021: packing,
#   and the masks and positions that keep documents apart.
# - In the kit: `effnlp_lab/streaming/order.py` has a permutation that needs no list, `stream.py` counts what workers have really
#   delivered, `packing.py` fills rows better than in order.
