# %% [markdown]
# # Lab 03: Accumulation and checkpointing
#
# Most training runs that fail, fail in the first second, with `OutOfMemoryError`. The model fits, and still it does
# not train: a training step keeps several times what inference keeps. In this lab you work out where the bytes go,
# and then take the savings one at a time. Each of them gives something up: time, exactness, or nothing at all. The
# lab ends with a table that says which, measured on your own machine.
#
# | | exercise | points | minutes | difficulty |
# |---|---|---|---|---|
# | 1 | `training_memory`: the memory of a training step | 1.5 | 25 | 2 of 5 |
# | 2 | `largest_batch`: the largest batch that fits | 1 | 25 | 2 of 5 |
# | 3 | `accumulate`: accumulate gradients | 2 | 45 | 3 of 5 |
# | 4 | `checkpoint`: checkpointing as an autograd function | 2.5 | 70 | 4 of 5 |
# | 5 | `mixed_loss`: half precision, where it is safe | 1 | 25 | 2 of 5 |
# | 6 | `scaled_step`: a step with a scaled loss | 2 | 45 | 3 of 5 |
# | stretch | `checkpoint_segments`: segments of $\sqrt L$ layers | badge | 30 | 3 of 5 |
# | stretch | `factored_update`: Adafactor's factored second moment | badge | 30 | 3 of 5 |
#
# **Time.** About four and a half hours: the core exercises, the reading and the measurements. Stretch exercises come on top.
#
# **You need** PyTorch's modules, optimizers and autograd, and the cross-entropy of a language model. A laptop is
# enough: on a CPU the bytes are counted instead of measured, and the models are small.
#
# **How a check works.** Under each blank stands one call, `check(...)`. It runs your function on fresh random cases,
# compares with a reference, and says what went wrong, by name where it recognises the slip. Run it as often as you
# like.
#
# {assistants} The six core blanks are 3 to 20 lines each, and the slips in them are the ones that cost real training
# runs.
#
# **Libraries.** `torch.utils.checkpoint`, `torch.amp.GradScaler`, `accelerate`, `transformers` and this kit's own
# training code are refused inside your answers; the demos compare with them.

# %% tags=["parameters"]
DEVICE = "auto"
FAST = "auto"

# %%
import effnlp_lab
from effnlp_lab import check

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

device = effnlp_lab.start("03_accumulation_checkpointing", device=DEVICE, fast=FAST)

# %% [markdown]
# ## 1. Where the bytes go
#
# One training step with AdamW, and what is in memory when:
#
# ```
#                     forward             backward            optimizer step
#  weights        ####################|####################|####################
#  Adam's states  ####################|####################|####################
#  hidden states          . - = # # # | # # # = - .        |
#  gradients                          |      . - = # # # # | ####################
#                                     ^ the peak, for all but the smallest batches
# ```
#
# - **Weights**: one number each.
# - **Gradients**: one number for each weight that is trained. Frozen weights have none.
# - **Optimizer states**: AdamW keeps two averages for each weight that is trained, of its gradient and of the
#   gradient's square.
# - **Hidden states**: whatever autograd saves in the forward pass because a derivative needs it. A linear layer saves
#   its input, a GELU its input, a softmax its output. This is the only part that grows with the batch.
#
# For a transformer of $L$ layers, width $h$ and $a$ heads, let a layer keep $c_1 h$ numbers for each token and $c_2$
# numbers for each head and each pair of tokens. With a batch of $B$ samples of $\ell$ tokens each, and $s$ bytes a
# number,
#
# $$\text{hidden states} = s \cdot B \cdot L\,\big(c_1\, h\, \ell + c_2\, a\, \ell^2\big), \qquad c_1 \approx 20,\ c_2 \approx 3.$$
#
# The lecture has this formula with $3\,\ell^2$ for the second term. That is a slip: **every head** has score matrices
# of its own.
#
# ### Exercise 1: the memory of a training step
#
# *1.5 points, about 25 minutes, difficulty 2 of 5.*
#
# Write the four parts in bytes. All numbers are $s$ bytes wide, with one exception that depends on you: the next cell
# says how wide **your** gradients are (some recipes keep them in float32 whatever the weights are).

# %%
effnlp_lab.variant("training_memory")

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Three of the four parts do not know the batch. Two of the four know only the weights that are trained.
# </details>
# <details><summary>Hint 2</summary>
#
# `per_token` is $c_1$, `per_pair` is $c_2$. Work out the numbers that one layer keeps for one sample, then multiply
# by the layers, the batch and the bytes of a number.
# </details>

# %% exercise="training_memory"
def training_memory(
    shape: dict[str, int], batch: int, length: int, size: int, per_token: int = 20, per_pair: int = 3
) -> dict[str, int]:
    """Bytes in memory in a training step with AdamW, by what they are for.

    shape: {"parameters": all weights, "trainable": those that are trained, "layers": L, "hidden": h,
        "heads": a}
    batch: samples; length: tokens of each sample
    size: bytes of one number (4 in float32, 2 in half precision)
    per_token, per_pair: a layer keeps per_token * h numbers for each token, and per_pair numbers for
        each head and each pair of tokens of the same sample
    Returns {"weights": ..., "gradients": ..., "optimizer": ..., "hidden states": ...} in bytes. Weights,
    optimizer states (two for each trained weight) and hidden states are `size` bytes a number;
    gradients are as wide as your variant says.
    """
    ### BEGIN SOLUTION
    per_layer = per_token * shape["hidden"] * length + per_pair * shape["heads"] * length**2
    return {
        "weights": size * shape["parameters"],
        "gradients": size * shape["trainable"],
        "optimizer": 2 * size * shape["trainable"],
        "hidden states": size * batch * shape["layers"] * per_layer,
    }
    ### END SOLUTION


# %% check="training_memory"
check("training_memory", training_memory)

# %% [markdown]
# ### Measure it: OPT-1.3B
#
# The lecture's example is OPT-1.3B in 16-bit numbers, one sample of 512 tokens: CUDA itself takes about 1 GB, weights
# 2.6, gradients 2.6, hidden states 1, optimizer states 5.2 GB. Estimated: 12.4 GB. Measured: 11.0 GB.

# %% tags=["demo"] needs=["training_memory"]
from effnlp_lab.notebook import plots

GB = 1e9
opt = {"parameters": 1_315_758_080, "trainable": 1_315_758_080, "layers": 24, "hidden": 2048,
       "heads": 32}
LOOKS = {"CUDA": ("black", ""), "weights": ("blue", "//"), "optimizer": ("orange", ".."),
         "gradients": ("green", "xx"), "hidden states": ("sky", "")}


def in_gb(**counts):
    memory = training_memory(opt, 1, 512, 2, **counts)
    return {"CUDA": 1.0, **{part: size / GB for part, size in memory.items()}}


def stacked(axes, stacks):
    """Draw one bar for each stack, a dict from part to size; returns the totals."""
    bottom = dict.fromkeys(stacks, 0.0)
    for part in (part for part in LOOKS if part in next(iter(stacks.values()))):
        colour, hatch = LOOKS[part]
        axes.bar(list(stacks), [stack[part] for stack in stacks.values()], bottom=list(bottom.values()),
                 width=0.5, label=part, hatch=hatch, color=plots.COLOURS[colour], edgecolor="white",
                 alpha=0.85)
        bottom = {name: bottom[name] + stack[part] for name, stack in stacks.items()}
    return bottom


stacks = {
    "the lecture": {"CUDA": 1.0, "weights": 2.6, "gradients": 2.6, "hidden states": 1.0, "optimizer": 5.2},
    "your formula": in_gb(),
    "your formula,\nno pairs kept": in_gb(per_pair=0),
}
figure, axes = plots.figure(
    "OPT-1.3B: one training step on one sample of 512 tokens", "estimate", "memory (GB)",
    caption="The dashed line is what the lecture measured, 11.0 GB.")
totals = stacked(axes, stacks)
for number, total in enumerate(totals.values()):
    axes.text(number, total + 0.2, f"{total:.1f} GB", ha="center")
axes.hlines(11.0, -0.4, 2.4, linestyle="--", color=plots.COLOURS["vermilion"])
axes.set_ylim(0, max(totals.values()) + 1.5)
axes.set_xlim(-0.5, 4.2)
axes.legend(*(side[::-1] for side in axes.get_legend_handles_labels()), loc="upper right")
spoken = ", ".join(" ".join(name.split()) + f" {total:.1f} GB" for name, total in totals.items())
plots.show(figure, "Stacked bars of CUDA, weights, optimizer states, gradients and hidden states. Totals: "
                   f"{spoken}. A dashed line at the measured 11.0 GB.")

# %% [markdown]
# With the heads, the hidden states are twice what the slide says, and the estimate moves further from the
# measurement. Two things bring it back. First, an attention that never stores its score matrices (flash attention,
# lab 06) keeps no pairs at all: the third bar. Second, look at the picture at the top of this section: gradients
# arrive as hidden states leave, so the two are never there in full at once. Take the larger of the two instead of
# their sum and the third bar ends at 11.5 GB.
#
# The formula adds up parts that do not all peak at once. For planning, an estimate that is somewhat too high is the right
# side to err on.
#
# ### Predict, then measure
#
# Now a model of our own, small enough to measure anywhere. It is a plain transformer; read the block once, you will
# meet it again.

# %% tags=["demo"]
import time

from effnlp_lab.course.text import load_text
from effnlp_lab.notebook import plots
from effnlp_lab.notebook.memory import counted_peak


class Block(nn.Module):
    """One layer: causal attention and a GELU network, each after a norm and beside a residual."""

    def __init__(self, width, heads, dropout=0.0, written_out=False):
        super().__init__()
        self.heads, self.p, self.written_out = heads, dropout, written_out
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def drop(self, x):
        return F.dropout(x, self.p, self.training) if self.p else x

    def forward(self, x):
        q, k, v = self.qkv(self.norm_1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = self.drop(torch.softmax(scores.masked_fill(future, -math.inf), dim=3))
        x = x + self.drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))
        hidden = self.up(self.norm_2(x))
        if self.written_out:  # GELU as it was written before there was an operation for it
            cubic = hidden + 0.044715 * hidden**3
            hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * cubic))
        else:
            hidden = F.gelu(hidden)
        return x + self.drop(self.down(hidden))


class SmallModel(nn.Module):
    """Bytes in, logits of the next byte out. `around(block, x)` is how a block is called."""

    def __init__(self, width, layers, heads, length, dropout=0.0, around=None):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.around = around or (lambda block, x: block(x))

    def forward(self, tokens):
        x = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = self.around(block, x)
        return self.norm(x) @ self.bytes.weight.T


WIDTH, LAYERS, HEADS, LENGTH = device.pick(fast=(96, 4, 4, 96), full=(512, 8, 8, 512))


def fresh_model(**changes):
    """A new model with the same random weights every time."""
    torch.manual_seed(3)
    sizes = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "length": LENGTH}
    return SmallModel(**{**sizes, **changes}).to(device.torch)


def batch_of(rows, length=None, start=0):
    """Tokens and next tokens: `rows` stretches of the course's English text, as bytes."""
    length = length or LENGTH
    cut = bytearray(course[start : start + rows * (length + 1)])
    stretches = torch.frombuffer(cut, dtype=torch.uint8).long().view(rows, length + 1).to(device.torch)
    return stretches[:, :-1], stretches[:, 1:]


def gradient_of(model):
    """All gradients in one row."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def finish():
    """Wait until the device has done all that was asked of it, and only then read the clock."""
    if device.kind == "cuda":
        torch.cuda.synchronize()


course = "".join(load_text("course-english", limit_bytes=400_000).texts()).encode()
weights = sum(p.numel() for p in fresh_model().parameters())
small = {"parameters": weights, "trainable": weights, "layers": LAYERS, "hidden": WIDTH,
         "heads": HEADS}
print(f"{weights:,} weights in {LAYERS} layers of width {WIDTH}")

# %% [markdown]
# How much does **this** block keep? PyTorch tells: `saved_tensors_hooks` sees every tensor that autograd saves. Two
# lengths give two equations for $c_1$ and $c_2$. One more block is written as BERT's was in 2018, when GELU and
# dropout were put together from elementary operations, each of which saves its own input.

# %% tags=["demo"]
def kept_numbers(block, length, width=64):
    """How many numbers autograd keeps for one sample in `block`, its weights apart."""
    seen, own = {}, {p.untyped_storage().data_ptr() for p in block.parameters()}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        block(torch.randn(1, length, width, requires_grad=True))
    return sum(size for size, _ in seen.values()) / 4


def counts_of(block, heads=4, width=64):
    """per_token and per_pair of a block, from what it keeps at two lengths."""
    lengths = 64.0, 128.0
    equations = torch.tensor([[width * n, heads * n * n] for n in lengths], dtype=torch.float64)
    found = torch.tensor([kept_numbers(block, int(n)) for n in lengths], dtype=torch.float64)
    per_token, per_pair = torch.linalg.solve(equations, found).tolist()
    return {"per_token": round(per_token), "per_pair": round(per_pair)}


blocks = {
    "this block": Block(64, 4),
    "with dropout": Block(64, 4, dropout=0.1),
    "with dropout, GELU written out": Block(64, 4, dropout=0.1, written_out=True),
}
counted = {name: counts_of(block) for name, block in blocks.items()}
for name, found in counted.items():
    print(f"{name:32} c1 = {found['per_token']:2}, c2 = {found['per_pair']}")
print(f"{'the lecture':32} c1 = 20, c2 = 3")

# %% [markdown]
# **Predict first.** The model trains on batches of 1, 2, 4 and 8 samples. If you double the batch from 4 to 8, by
# what factor does the peak memory grow? Write your guess down before you run the cell after it.

# %% predict="doubled_batch"
my_factor_from_4_to_8 = None  # your guess

# %% tags=["demo"] needs=["training_memory"]
def plain_steps(rows, steps=2, **changes):
    """A fresh model and optimizer, and some steps: in the second one AdamW has its states."""
    model = fresh_model(**changes)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens, targets = batch_of(rows)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()


sizes = (1, 2, 4, 8)
measured = [counted_peak(lambda rows=rows: plain_steps(rows)) for rows in sizes]
predicted = [training_memory(small, rows, LENGTH, 4, **counted["this block"]) for rows in sizes]
totals = [sum(guess.values()) for guess in predicted]
print(f"{'batch':>6}{'predicted':>14}{'counted peak':>16}{'predicted / counted':>22}")
for rows, total, peak in zip(sizes, totals, measured):
    print(f"{rows:6}{total / 1e6:11.1f} MB{peak / 1e6:13.1f} MB{total / peak:22.2f}")
if my_factor_from_4_to_8 is not None:
    print(f"You predicted a factor of {my_factor_from_4_to_8}; counted: {measured[3] / measured[2]:.2f}.")

figure, axes = plots.figure(
    "Peak memory of a training step of the small model", "batch (samples)", "memory (MB)",
    caption="Bars: your formula with this block's own c1 and c2. Diamonds: counted.")
stacked(axes, {str(rows): {part: size / 1e6 for part, size in guess.items()}
               for rows, guess in zip(sizes, predicted)})
axes.plot([str(rows) for rows in sizes], [peak / 1e6 for peak in measured], "D",
          color=plots.COLOURS["vermilion"], label="counted peak", zorder=3)
axes.legend(loc="upper left")
spoken = ", ".join(f"batch {rows} predicted {total / 1e6:.1f}, counted {peak / 1e6:.1f} MB"
                   for rows, total, peak in zip(sizes, totals, measured))
plots.show(figure, f"Predicted memory as stacked bars, the counted peaks as points: {spoken}.")

# %% [markdown]
# The formula leaves out the logits and what an operation needs while it runs, and it adds gradients to hidden states
# although they do not peak together. The errors partly cancel; with larger batches the hidden states are nearly all
# there is.
#
# ## 2. The largest batch that fits
#
# Turned around, the formula answers the question that you actually have: how large may the batch be? In general
# memory is no straight line in the batch: allocators hand out blocks, and libraries switch algorithms. All that we
# know is that a larger batch never takes less. That is enough: **double** the batch until it does not fit, then
# **halve** the interval between what fits and what does not.
#
# ```
#  batch      1    2    4    8    16    12    14    13
#  fits?      yes  yes  yes  yes  no    yes   no    yes       largest: 13
#             |------ double ------|   |---- halve ----|
# ```
#
# A slide says that a batch size "has to be of size $2^N$". It does not have to be: in the picture, stopping at 8
# would waste a third of the card. (We test the claim about speed at the end of the lab.)
#
# ### Exercise 2: the largest batch that fits
#
# *1 point, about 25 minutes, difficulty 2 of 5.*
#
# `memory(batch)` tells the peak bytes of a step. It may be a formula or a trial run, so call it rarely: at most 64
# times. (For a batch of $n$, doubling and halving takes about $2 \log_2 n$ calls.) The answer is
#
# $$\max\,\{\, b : \text{memory}(b) \le \text{capacity} \,\}, \quad \text{and 0 where not even memory}(1)\text{ fits.}$$
#
# <details><summary>Hint 1</summary>
#
# Keep two numbers: `low`, of which you know that it fits (0 samples always do), and `high`, of which you will know
# that it does not. Never call `memory(0)`.
# </details>
# <details><summary>Hint 2</summary>
#
# While `high` fits, `low` becomes `high` and `high` doubles. Afterwards look at the middle of the two while they are
# not neighbours, and move one of them there.
# </details>

# %% exercise="largest_batch"
def largest_batch(memory: Callable[[int], int], capacity: int) -> int:
    """The largest batch whose training step fits.

    memory: peak bytes of a step for a batch of at least 1 (anything else raises ValueError). It never
        falls as the batch grows, exceeds any capacity in the end, and need not be a straight line. Call
        it at most 64 times.
    capacity: bytes; a step that takes exactly as many fits
    Returns the largest batch that fits, 0 if not even a batch of 1 does. There is no upper bound.
    """
    ### BEGIN SOLUTION
    low, high = 0, 1
    while memory(high) <= capacity:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if memory(middle) <= capacity:
            low = middle
        else:
            high = middle
    return low
    ### END SOLUTION


# %% check="largest_batch"
check("largest_batch", largest_batch)

# %% [markdown]
# ### Measure it: BERT's table
#
# BERT's authors published the largest batch that fitted a 12 GB card, by length. The lecture shows the table. We
# invert the formula twice: with the lecture's $c_1 = 20$, and with the counts of the block whose GELU is written out.

# %% tags=["demo"] needs=["training_memory", "largest_batch"]
base, large = 109_482_240, 335_141_888
bert = {
    "BERT-Base": {"parameters": base, "trainable": base, "layers": 12, "hidden": 768, "heads": 12},
    "BERT-Large": {"parameters": large, "trainable": large, "layers": 24, "hidden": 1024, "heads": 16},
}
lengths = (64, 128, 256, 320, 384, 512)
published = {"BERT-Base": (64, 32, 16, 14, 12, 6), "BERT-Large": (12, 6, 2, 1, 0, 0)}
old_block = counted["with dropout, GELU written out"]


def fitting(shape, length, counts):
    """The largest batch on a card of 12 GB, of which CUDA takes one."""
    return largest_batch(
        lambda batch: sum(training_memory(shape, batch, length, 4, **counts).values()), int(11e9))


estimates = {"c1 = 20": {}, f"c1 = {old_block['per_token']}": old_block}
inverted = {
    (name, label): [fitting(shape, length, counts) for length in lengths]
    for name, shape in bert.items() for label, counts in estimates.items()
}
print(f"{'tokens':28}" + "".join(f"{n:6}" for n in lengths))
for name in bert:
    print(f"{name + ', published':28}" + "".join(f"{b:6}" for b in published[name]))
    for (other, label), row in inverted.items():
        if other == name:
            print(f"{name + ', formula, ' + label:28}" + "".join(f"{b:6}" for b in row))

figure, axes = plots.figure("The largest batch on a 12 GB card", "length (tokens)", "batch (samples)",
                            caption="Full lines: published with BERT. Broken: your formula and search.")
for name, colour in (("BERT-Base", "blue"), ("BERT-Large", "orange")):
    colour = plots.COLOURS[colour]
    axes.plot(lengths, published[name], color=colour, marker="o", linestyle="-", label=f"{name}, published")
    for label, line in zip(estimates, (":", "--")):
        axes.plot(lengths, inverted[name, label], color=colour, marker="", linestyle=line,
                  label=f"{name}, {label}")
ticks = [0, *(2**i for i in range(8))]
axes.set_yscale("symlog", linthresh=1)
axes.set_yticks(ticks, labels=map(str, ticks))
axes.set_ylim(-0.2, 260)
axes.legend(ncols=2, fontsize=8)
plots.show(figure, "Largest batch against length on logarithmic axes, for BERT-Base and BERT-Large: the "
                   "formula's lines fall as the published ones do, about twice as high with c1 = 20 and "
                   "closer with the older block.")

# %% [markdown]
# The fall with the length is right, and the level is too high by a factor of two to three: the formula counts what a
# careful implementation keeps, and BERT's first one kept more. About half of the gap closes once GELU is counted as
# it was written then. What remains the formula does not see: what a framework keeps for itself, and memory lost
# between blocks of unequal size.
#
# ## 3. Accumulation: a large batch from small ones
#
# The gradient of a sum is the sum of the gradients. So a batch that does not fit can be taken in **micro-batches**,
# one after the other: each runs forward and backward, its gradient is added to `.grad`, its hidden states are freed,
# and only then comes the next. One optimizer step follows at the end.
#
# ```
#  one batch           F F F F B B B B  step      four samples' hidden states at once
#  accumulation        F B F B F B F B  step      one sample's at a time
#  backward at the end F F F F B B B B  step      four again: nothing is saved
# ```
#
# The third line is what two of the lecture's slides describe ("sum the gradients, backward once"). It computes the
# right gradient and saves nothing: a graph lives until its own backward.
#
# The other trap is the mean. PyTorch's cross-entropy is a **mean over tokens**, and micro-batches have unequal
# numbers of tokens. With $n_j$ tokens in micro-batch $j$, padding apart, and per-token losses $\ell_{ji}$,
#
# $$\text{loss} = \frac{\sum_j \sum_i \ell_{ji}}{\sum_j n_j} \quad\ne\quad \frac{1}{m} \sum_{j=1}^{m} \frac{\sum_i \ell_{ji}}{n_j}.$$
#
# On the right short micro-batches weigh too much. At equal lengths both sides agree, which is how the slip could stay
# in widely used training code until 2024.
#
# ### Exercise 3: accumulate gradients
#
# *2 points, about 45 minutes, difficulty 3 of 5.*
#
# Leave in `.grad` the gradient of the whole batch's mean loss, with one graph alive at a time.
#
# <details><summary>Hint 1</summary>
#
# The denominator $\sum_j n_j$ is known before the first forward pass: the targets are all there. Dividing each
# micro-batch's **sum** by it gives terms that simply add up.
# </details>
# <details><summary>Hint 2</summary>
#
# `F.cross_entropy(..., reduction="sum")` adds up the losses and skips targets of -100 by itself. It wants logits of
# shape [tokens, vocabulary] and targets of shape [tokens]: flatten both.
# </details>
# <details><summary>Hint 3</summary>
#
# `backward` adds to `.grad`, also to what an earlier step left there. Clear the gradients where that is right: once.
# </details>

# %% exercise="accumulate"
def accumulate(model: nn.Module, micro_batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Leave in every parameter's `.grad` the gradient of the mean loss of the whole batch.

    model: model(tokens) gives logits [rows, length, vocabulary] for tokens [rows, length]
    micro_batches: (tokens, targets) pairs, both [rows, length] of whole numbers; rows and length differ
        from pair to pair. A target of -100 is padding and has no loss. A micro-batch may be padding
        alone; the whole batch is not.
    The mean is over all targets of the whole batch that are not -100. Gradients from before are dropped;
    a parameter that needs no gradient gets none. Never are the graphs of two micro-batches alive at once.
    No optimizer step.
    Returns the mean loss of the whole batch, a float.
    """
    ### BEGIN SOLUTION
    model.zero_grad()
    tokens = sum((targets != -100).sum().item() for _, targets in micro_batches)
    total = 0.0
    for inputs, targets in micro_batches:
        logits = model(inputs).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    return total
    ### END SOLUTION


# %% check="accumulate"
check("accumulate", accumulate)

# %% [markdown]
# ### Measure it
#
# First: how wrong is the mean of means? There are two micro-batches, one of 64 tokens a row and one that is shorter
# by the factor on the axis. Then: what does accumulation save, and what with the backward after the loop?

# %% tags=["demo"] needs=["accumulate"]
def mean_of_means(model, micro_batches):
    model.zero_grad()
    for tokens, targets in micro_batches:
        (F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) / len(micro_batches)).backward()


def backward_after_the_loop(model, micro_batches):
    model.zero_grad()
    losses = [F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
              for tokens, targets in micro_batches]
    (sum(losses) / sum(targets.numel() for _, targets in micro_batches)).backward()


def whole_batch(model, micro_batches):
    """The right gradient in one pass: everything padded to the longest."""
    longest = max(tokens.shape[1] for tokens, _ in micro_batches)
    tokens = torch.cat([F.pad(x, (0, longest - x.shape[1])) for x, _ in micro_batches])
    targets = torch.cat([F.pad(y, (0, longest - y.shape[1]), value=-100) for _, y in micro_batches])
    model.zero_grad()
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100).backward()


model = fresh_model()
factors = (1, 2, 4, 8, 16)
errors = {"mean of means": [], "yours": []}
for factor in factors:
    pair = [batch_of(4, 64), batch_of(4, 64 // factor, start=50_000)]
    whole_batch(model, pair)
    right = gradient_of(model)
    for name, way in (("mean of means", mean_of_means), ("yours", accumulate)):
        way(model, pair)
        errors[name].append(((gradient_of(model) - right).norm() / right.norm()).item())
print("relative error of the gradient")
for name, row in errors.items():
    print(f"  {name:16}" + "".join(f"{error:12.2e}" for error in row))

eight = [batch_of(1, start=1000 * i) for i in range(8)]
ways = {"one batch of 8": whole_batch, "8 x 1, backward\nafter the loop": backward_after_the_loop,
        "8 x 1,\nyours": accumulate}
peaks = {name: counted_peak(lambda way=way: way(fresh_model(), eight)) / 1e6
         for name, way in ways.items()}

figure, axes = plots.figure("The error of the mean of means", "length of the one micro-batch over the other's",
                            "relative error of the gradient",
                            caption="At equal lengths the slip does not show.")
axes.plot(factors, errors["mean of means"], label="mean of means")
axes.plot(factors, errors["yours"], label="yours")
axes.set_xscale("log", base=2)
axes.set_xticks(factors, labels=map(str, factors))
axes.legend()
plots.show(figure, "Relative error of the gradient against the ratio of lengths: the mean of means goes "
                   f"from 0 to {errors['mean of means'][-1]:.0%}, yours stays at {max(errors['yours']):.0e}.")
figure, axes = plots.figure("Peak memory of one gradient of 8 samples", "way", "counted peak (MB)",
                            caption="Accumulation saves memory only where each graph is freed before the next one.")
drawn = axes.bar(list(peaks), list(peaks.values()), width=0.5, color=plots.COLOURS["blue"])
axes.bar_label(drawn, [f"{peak:.1f} MB" for peak in peaks.values()])
axes.margins(y=0.15)
spoken = ", ".join(" ".join(name.split()) + f" {peak:.1f} MB" for name, peak in peaks.items())
plots.show(figure, f"Peak memory of three ways to one gradient: {spoken}.")

# %% [markdown]
# ## 4. Checkpointing: compute again instead of keeping
#
# Accumulation ends at one sample. If a single long sample does not fit, keep less of it: **gradient checkpointing**
# (Chen et al., 2016) runs a layer without recording, keeps only the layer's input, and when backward arrives, runs
# the layer again, this time with recording, to have the hidden states for a moment.
#
# ```
#  forward    x0 --[layer 1]--> x1 --[layer 2]--> x2 --[layer 3]--> x3     kept: x0, x1, x2
#
#  backward                                       x2 ==[layer 3]==> x3     run again, recorded
#                                                dx2 <=============dx3     differentiated, freed
#                              x1 ==[layer 2]==> x2                        run again, recorded
#                             dx1 <=============dx2                        differentiated, freed
#                                ...
# ```
#
# The price is one more forward pass. A backward pass costs about two forward passes, so
#
# $$\text{memory: } L \cdot (c_1 h \ell + c_2 a \ell^2)\ \longrightarrow\ L \cdot h \ell + (c_1 h \ell + c_2 a \ell^2),
# \qquad \text{operations: } 3 \longrightarrow 4 \text{ forward passes.}$$
#
# Three things make it harder than it looks.
#
# 1. **Randomness.** The second run has to draw the same dropout mask as the first, or the gradient belongs to another
#    network. So we note the random state before the first run, set it for the second, and afterwards put back the
#    state that we found.
# 2. **The border.** The second run must not continue the old graph: it starts from **detached** inputs, and the
#    gradients that arrive at those are what our backward returns. Some inputs have no gradient: ids, masks, numbers,
#    `None`.
# 3. **Parameters.** The function's own weights are not among its inputs, and they need their gradients too.
#    `torch.autograd.backward(outputs, gradients)` reaches every leaf of the new graph: detached inputs and weights
#    alike.
#
# Given: the random state of all generators, and PyTorch's own way to take a nested output apart.

# %%
def random_state() -> list[torch.Tensor]:
    """The state of the random generators: the CPU's, and the current GPU's if there is one."""
    on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *on_gpu]


def set_random_state(state: list[torch.Tensor]) -> None:
    """Put the generators back where they were when `random_state` was called."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


# %% tags=["nbval-check-output"]
leaves, spec = tree_flatten({"logits": 1.5, "cache": [2, (3, None)]})
print(leaves)
print(tree_unflatten(leaves, spec))

# %% [markdown]
# ### Exercise 4: checkpointing as an autograd function
#
# *2.5 points, about 70 minutes, difficulty 4 of 5.*
#
# A `torch.autograd.Function` has a `forward`, which runs without recording, and a `backward`, which gets the
# gradients of the outputs and returns one value for each input of `forward` (`None` where there is no gradient).
# There are three blanks:
#
# - `forward(ctx, run, anchor, *inputs)`: note what the second run will need on `ctx`, call `run(*inputs)`, return its
#   result. Tensors belong in `ctx.save_for_backward(...)`, everything else in attributes of your choice.
# - `backward(ctx, *gradients)`: the second run, and the gradients. `gradients` has one entry for each output.
# - `checkpoint(function, *inputs)`: `forward` has to return a flat tuple. Take the function's outputs apart, call
#   `Recompute.apply`, and put them together again.
#
# Why the **anchor**? Autograd calls our `backward` only if some input of `apply` requires a gradient. The first layer
# of a language model gets ids, which never do, and its weights would be left without. So we pass one more input that
# does, a number that nobody uses.
#
# <details><summary>Hint 1: forward</summary>
#
# Note the random state before you call `run`. Remember which inputs are tensors (their positions), save those with
# `save_for_backward`, and keep the others in a list.
# </details>
# <details><summary>Hint 2: backward</summary>
#
# In this order: rebuild the list of inputs, tensors as `x.detach().requires_grad_(x.requires_grad)`; note the present
# random state; set the old one; call `run` under `torch.enable_grad()`; put the present state back.
# </details>
# <details><summary>Hint 3: backward, the gradients</summary>
#
# Some outputs are no tensors, or depend on nothing that requires a gradient: leave them out, with their gradients.
# After `torch.autograd.backward(outputs, gradients)` the gradient of a detached input `x` lies in `x.grad`. Return
# `None` for `run` and `anchor` first.
# </details>
# <details><summary>Hint 4: checkpoint</summary>
#
# `run` can be a function inside of `checkpoint` that calls `tree_flatten(function(*inputs))`, appends the spec to a
# list that you read later, and returns `tuple(leaves)`.
# </details>

# %% exercise="checkpoint"
class Recompute(torch.autograd.Function):
    """Runs `run(*inputs)`, a flat tuple, without recording it, and again in the backward pass."""

    @staticmethod
    def forward(ctx, run, anchor, *inputs):
        ### BEGIN SOLUTION
        ctx.run, ctx.state = run, random_state()
        ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
        ctx.others = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))
        return run(*inputs)
        ### END SOLUTION

    @staticmethod
    def backward(ctx, *gradients):
        ### BEGIN SOLUTION
        inputs = list(ctx.others)
        for i, x in zip(ctx.places, ctx.saved_tensors):
            inputs[i] = x.detach().requires_grad_(x.requires_grad)
        now = random_state()
        set_random_state(ctx.state)
        with torch.enable_grad():
            outputs = ctx.run(*inputs)
        set_random_state(now)
        pairs = [(out, g) for out, g in zip(outputs, gradients)
                 if isinstance(out, torch.Tensor) and out.requires_grad]
        torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
        return None, None, *(x.grad if isinstance(x, torch.Tensor) else None for x in inputs)
        ### END SOLUTION


def checkpoint(function: Callable, *inputs: Any) -> Any:
    """function(*inputs), of which only the inputs are kept until the backward pass runs it again.

    function: may draw random numbers and use parameters of its own; returns a tensor, or tensors and other
        values in nested tuples, lists and dicts
    inputs: tensors of any dtype, with or without requires_grad, and other values; not nested
    Outputs, gradients of inputs and parameters, and the random state after forward and after backward are
    those of function(*inputs). It runs once in the forward pass and once more in the backward pass, if
    there is one (under no_grad there is none). Between the two nothing that it made on its way is kept.
    """
    ### BEGIN SOLUTION
    nesting = []

    def run(*inputs):
        leaves, spec = tree_flatten(function(*inputs))
        nesting.append(spec)
        return tuple(leaves)

    leaves = Recompute.apply(run, torch.zeros((), requires_grad=True), *inputs)
    return tree_unflatten(leaves, nesting[0])
    ### END SOLUTION


# %% check="checkpoint"
check("checkpoint", checkpoint)

# %% [markdown]
# ### Measure it
#
# The same model with dropout, plainly and with every block checkpointed, from the same random state. Is the gradient
# the same, bit by bit? And what do memory and operations say to the formula above?

# %% tags=["demo"] needs=["checkpoint"]
from effnlp_lab.notebook.meter import measure


def one_gradient(around=None, rows=4, model=None):
    """The gradient of a model, or of a fresh one, dropout included."""
    if model is None:
        model = fresh_model(dropout=0.1, around=around)
    model.zero_grad()
    tokens, targets = batch_of(rows)
    torch.manual_seed(7)
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    return gradient_of(model)


plain, plain_usage = measure(one_gradient)
again, again_usage = measure(one_gradient, around=checkpoint)
print(f"the gradients are equal, bit by bit: {torch.equal(plain, again)}")
print(f"{'':16}{'peak':>12}{'operations':>18}")
for name, usage in (("plain", plain_usage), ("checkpointed", again_usage)):
    print(f"{name:16}{usage.peak_bytes / 1e6:9.1f} MB{usage.flops / 1e9:12.2f} GFLOP")
memory_ratio = again_usage.peak_bytes / plain_usage.peak_bytes
print(f"{'ratio':16}{memory_ratio:12.2f}{again_usage.flops / plain_usage.flops:18.2f}")

# %% [markdown]
# ## 5. Mixed precision: which operations stay in float32
#
# Numbers of 16 bits take half the memory and run several times faster on tensor cores. But 16 bits have to be spent
# on range or on precision:
#
# | | bits (exponent, fraction) | smallest | largest | next number after 1 |
# |---|---|---|---|---|
# | float32 | 8, 23 | 1.4e-45 | 3.4e38 | 1.0000001 |
# | float16 | 5, 10 | 6.0e-8 | 65,504 | 1.001 |
# | bfloat16 | 8, 7 | 9.2e-41 | 3.4e38 | 1.008 |
#
# A **matrix product** is safe in half precision: its factors have similar sizes, and tensor cores add the products up
# in float32. Three kinds of operations are not:
#
# - **Powers and exponentials** leave the range: the square of 256 is beyond float16, and so is $e^{12}$; the square
#   of 0.0001 is 0.
# - **Long sums** stand still: in float16 2048 + 1 is 2048, because the next number is 2050.
# - **Small updates** get lost: the weight 1 plus an update of 0.0004 is 1. So the weights that the optimizer changes,
#   the **master weights**, stay in float32.
#
# `torch.autocast` keeps such a list: products in half precision; norms, softmax, losses, powers and sums in float32.
# You are about to do by hand what it does, for the last layer of a language model: an RMS norm, the product with the
# output weights, the cross-entropy.

# %% tags=["nbval-check-output"]
small_step = torch.tensor(4e-4, dtype=torch.float16)
print("float16: 256 squared   ", torch.tensor(256.0, dtype=torch.float16).square().item())
print("float16: 1e-4 squared  ", torch.tensor(1e-4, dtype=torch.float16).square().item())
print("float16: 2048 + 1      ", (torch.tensor(2048.0, dtype=torch.float16) + 1).item())
print("float16: 1 + 0.0004    ", (torch.tensor(1.0, dtype=torch.float16) + small_step).item())

# %% [markdown]
# ### Exercise 5: half precision, where it is safe
#
# *1 point, about 25 minutes, difficulty 2 of 5.*
#
# $$\hat x_t = \frac{x_t}{\sqrt{\frac{1}{d} \sum_i x_{ti}^2 + 10^{-6}}} \odot \text{gain}, \qquad
# z = \hat x\, W^\top, \qquad \text{loss} = \frac1n \sum_t \Big(\log \sum_v e^{z_{tv}} - z_{t, y_t}\Big)$$
#
# `x` comes in half precision, from the layer before. The norm and the cross-entropy run in float32, the product in
# the dtype of `x`, both factors rounded to it.
#
# <details><summary>Hint 1</summary>
#
# There are two borders to cross: into float32 before the first square, into half precision just before the product,
# and back into float32 just after it. `x.float()`, `tensor.to(x.dtype)`.
# </details>
# <details><summary>Hint 2</summary>
#
# PyTorch promotes: half times float32 gives float32. Check with `.dtype` what enters the product. `F.cross_entropy`
# takes a mean by itself.
# </details>

# %% exercise="mixed_loss"
def mixed_loss(
    x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of an RMS norm and an output layer, in mixed precision.

    x: [tokens, dim], float16 or bfloat16; targets: [tokens], ids
    gain: [dim] and weight: [vocabulary, dim], float32
    The RMS norm (1e-6 is added to the mean of squares, under the root) and the cross-entropy are computed
    in float32. The matrix product takes both factors in the dtype of x.
    Returns the mean loss over the tokens, a float32 tensor of no dimensions.
    """
    ### BEGIN SOLUTION
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + 1e-6) * gain
    logits = normed.to(x.dtype) @ weight.to(x.dtype).T
    return F.cross_entropy(logits.float(), targets)
    ### END SOLUTION


# %% check="mixed_loss"
check("mixed_loss", mixed_loss)

# %% [markdown]
# ## 6. Loss scaling: small gradients in float16
#
# bfloat16 has float32's range and trains as it is. float16 does not: gradients are small numbers, and below 6e-8
# there is nothing but 0. How many gradients are that small? The loss is a mean over the batch's tokens, so a token's
# gradient falls with their number. We measure our model on a small batch; in the batch of half a million tokens of a
# real run the same gradients are smaller by the ratio of the two numbers, a shift to the left.

# %% tags=["demo"]
model, seen_gradients = fresh_model(), []
for block in model.blocks:
    block.register_full_backward_hook(lambda module, into, out: seen_gradients.append(into[0].flatten()))
tokens, targets = batch_of(8)
F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
magnitudes = torch.cat(seen_gradients).abs().cpu()
exponents = magnitudes[magnitudes > 0].log2()
shares = torch.histogram(exponents, torch.arange(-60, 21).float()).hist / len(magnitudes)
few, many = targets.numel(), 2**19
batches = {
    f"{few} tokens": 0.0,
    f"{many:,} tokens": math.log2(few / many),
    f"{many:,} tokens, loss times 65,536": math.log2(few / many) + 16,
}
figure, axes = plots.figure("Gradients of the hidden states, by size", "size, as a power of two",
                            "share of the gradients",
                            caption="Left of -25 float16 rounds to 0; left of -14 it loses bits.")
lost = {}
for (name, shift), look in zip(batches.items(), plots.looks(3)):
    axes.plot(torch.arange(-60, 20) + 0.5 + shift, shares, label=name, **{**look, "marker": ""})
    lost[name] = (magnitudes * 2.0**shift < 2.0**-25).float().mean().item()
for place in (-25, -14):
    axes.axvline(place, color=plots.COLOURS["black"], linewidth=0.8)
axes.set_xlim(-45, 10)
axes.set_ylim(0, 1.5 * shares.max().item())
axes.legend(loc="upper left")
spoken = "; ".join(f"{name}: {share:.0%}" for name, share in lost.items())
plots.show(figure, "Three distributions of the sizes of gradients, as powers of two. Below 2 to the -25 lie: "
                   f"{spoken}.")
for name, share in lost.items():
    print(f"{name:34} rounded to 0 in float16: {share:6.1%}")

# %% [markdown]
# The cure (Micikevicius et al., 2018) is one multiplication: scale the **loss** by $S$ before backward, and by the
# chain rule every gradient is $S$ times larger. Divide before anybody looks at them. What is a good $S$? As large as
# possible without overflow, and that changes during training, so the scale looks for itself:
#
# ```
#  backward on S * loss
#     |
#  divide the gradients by S
#     |
#  all finite? --no--> skip the step, S <- S / 2, count <- 0
#     | yes
#  clip, optimizer step, count <- count + 1
#     |
#  count = interval? --yes--> S <- 2 S, count <- 0
# ```
#
# Note the order. Clipping compares the gradient's norm with a threshold, so it has to come **after** unscaling. And
# after a step with a single infinity in it the weights are NaN, and so are Adam's averages, for good.
#
# ### Exercise 6: a step with a scaled loss
#
# *2 points, about 45 minutes, difficulty 3 of 5.*
#
# Real scalers wait for 2000 good steps before they grow. In your exercise the interval is much shorter:

# %%
effnlp_lab.variant("scaled_step")


@dataclass
class Scaler:
    """The scale of the loss, and how many good steps there were in a row since it last changed."""

    scale: float = 2.0**16
    good_steps: int = 0


# %% [markdown]
# <details><summary>Hint 1</summary>
#
# The parameters are in `optimizer.param_groups`, a list of dicts, each with a list under `"params"`. A parameter
# whose `.grad` is `None` took no part in the step.
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.isfinite(x).all()` is False for infinity of both signs and for NaN. Dividing infinity by the scale leaves
# infinity, so you may look before or after.
# </details>
# <details><summary>Hint 3</summary>
#
# `torch.nn.utils.clip_grad_norm_(parameters, max_norm)` takes the norm over all of them together, as it should.
# </details>

# %% exercise="scaled_step"
def scaled_step(scaler: Scaler, optimizer: torch.optim.Optimizer, max_norm: float) -> bool:
    """One optimizer step on gradients of scaler.scale * loss.

    scaler: has `scale`, a float, and `good_steps`, an int that starts at 0; both are yours to update
    optimizer: its parameters' `.grad` hold the scaled gradients, or None; there may be several groups
    max_norm: the norm of all unscaled gradients together is clipped to it (clip_grad_norm_)
    If a gradient is infinite or NaN: no step, the scale is halved, good_steps is 0 again.
    Otherwise: clip and step. With the last good step of your interval in a row the scale doubles, and
    good_steps is 0 again.
    Returns whether the optimizer stepped.
    """
    ### BEGIN SOLUTION
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = [p for p in listed if p.grad is not None]
    for p in parameters:
        p.grad /= scaler.scale
    if not all(torch.isfinite(p.grad).all() for p in parameters):
        scaler.scale /= 2
        scaler.good_steps = 0
        return False
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    scaler.good_steps += 1
    if scaler.good_steps == 3:
        scaler.scale *= 2
        scaler.good_steps = 0
    return True
    ### END SOLUTION


# %% check="scaled_step"
check("scaled_step", scaled_step)

# %% [markdown]
# ### Measure it
#
# A tiny model under `torch.autocast` in float16, with your step. The scale begins far too high. Watch it find its
# place: it falls until nothing overflows, and then tries a doubling every few steps.

# %% tags=["demo"] needs=["scaled_step"]
model = fresh_model(width=32, layers=1, heads=2, length=64)
optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=3e-3), Scaler(scale=2.0**24)
history = []
for step in range(40):
    tokens, targets = batch_of(4, 64, start=300 * step)
    optimizer.zero_grad()
    with torch.autocast(device.kind, dtype=torch.float16):
        loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())
    (loss * scaler.scale).backward()
    before = scaler.scale
    history.append((before, scaled_step(scaler, optimizer, max_norm=1.0), loss.item()))

skipped = [i for i, (_, stepped, _) in enumerate(history) if not stepped]
figure, axes = plots.figure("A loss scale finds its place", "step", "loss scale",
                            caption="Crosses: the step overflowed and was skipped.")
scales = [scale for scale, _, _ in history]
axes.step(range(len(history)), scales, where="post", marker="", label="scale")
axes.plot(skipped, [scales[i] for i in skipped], "X", color=plots.COLOURS["vermilion"], label="skipped")
axes.set_yscale("log", base=2)
axes.legend()
told = f"{len(skipped)} of {len(history)} steps were skipped"
plots.show(figure, "Loss scale against the step on a logarithmic axis: it falls from 2 to the 24 by "
                   f"halving, then goes up and down; {told}.")
print(f"{told}; the loss went from {history[0][2]:.2f} to {history[-1][2]:.2f}")

# %% [markdown]
# ## 7. One saving at a time
#
# Now all of them side by side. Each row of the table starts from a **fresh** model with the same weights, sees the
# same samples in the same order, and changes **one** thing against the first row. The samples are lines (at full
# size, sentences) of the course's English text, in batches; the first row pads all of them to the longest that the
# model reads.
#
# **Predict first.** Which of the six savings make a step slower? How many times as long as a plain step does one with
# checkpointing take? And which saving saves most memory? Write your guesses down.

# %% predict="cost_of_savings"
my_cost_of_checkpointing = None  # for example 3: three times as long
my_slower_ones = None  # for example ["accumulation"]
my_best_saver = None  # accumulation, checkpointing, bf16, dynamic padding, 8-bit state or compile

# %% tags=["demo"] needs=["accumulate", "checkpoint"]
import itertools
import re
import statistics

from effnlp_lab.notebook.memory import release

ROWS, STEPS = device.pick(fast=(8, 8), full=(32, 20))
lines, sentences = course.split(b"\n"), re.split(rb"(?<=[.:;])\s+", course)
pieces = [piece for piece in device.pick(fast=lines, full=sentences) if len(piece) > 16]


def padded(texts, longest):
    """Tokens and next tokens of texts, padded to `longest` positions, or to the longest of them."""
    rows = [torch.tensor(list(text[: LENGTH + 1])) for text in texts]
    longest = longest or max(len(row) for row in rows) - 1
    tokens = torch.stack([F.pad(row[:-1], (0, longest - len(row) + 1)) for row in rows])
    targets = torch.stack([F.pad(row[1:], (0, longest - len(row) + 1), value=-100) for row in rows])
    return tokens.to(device.torch), targets.to(device.torch)


def training(rows=ROWS, micro=ROWS, around=None, half=False, dynamic=False,
             optimizer_of=torch.optim.AdamW, compiled=False):
    """Train a fresh model; yields the loss and the seconds of each step."""
    model = fresh_model(around=around)
    optimizer = optimizer_of(model.parameters(), lr=3e-3)
    call = torch.compile(model) if compiled else model
    for step in itertools.count():
        texts = pieces[step * rows : (step + 1) * rows]
        longest = None if dynamic else LENGTH
        batches = [padded(texts[i : i + micro], longest) for i in range(0, rows, micro)]
        finish()
        begin = time.perf_counter()
        with torch.autocast(device.kind, dtype=torch.bfloat16, enabled=half):
            loss = accumulate(call, batches)
        optimizer.step()
        finish()
        yield loss, time.perf_counter() - begin


def two_steps(**changes):
    for _ in itertools.islice(training(**changes), 2):
        pass


def peak_of(**changes):
    """Peak bytes of two steps on a fresh model: measured on a GPU, counted on a CPU."""
    release()
    if device.kind == "cpu":
        return counted_peak(lambda: two_steps(**changes))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    two_steps(**changes)
    return torch.cuda.max_memory_allocated() - before


savings = {
    "vanilla": {},
    "accumulation": {"micro": ROWS // 4},
    "checkpointing": {"around": checkpoint},
    "bf16": {"half": True},
    "dynamic padding": {"dynamic": True},
}
not_measured = {}
try:
    from effnlp_lab.training import AdamW8bit

    savings["8-bit state"] = {"optimizer_of": AdamW8bit}
except ImportError as error:
    not_measured["8-bit state"] = f"AdamW8bit could not be loaded: {error}"
if device.kind == "cuda":
    savings["compile"] = {"compiled": True}
else:
    not_measured["compile"] = "measured on a GPU alone: compiling takes longer here than the whole lab"

peaks = {name: peak_of(**changes) for name, changes in savings.items()}
runs = {name: training(**changes) for name, changes in savings.items()}
runs["batch of 1"] = training(rows=1, micro=1)
seen = {name: [] for name in runs}
for _ in range(STEPS):  # in turns: whatever else the machine does, it does to all of them
    for name, run in runs.items():
        seen[name].append(next(run))
runs.clear()
step_seconds = {name: statistics.median(seconds for _, seconds in steps[1:]) for name, steps in seen.items()}
rows_of_table = {name: {"seconds": step_seconds[name], "peak": peak, "loss": seen[name][-1][0]}
                 for name, peak in peaks.items()}

vanilla = rows_of_table["vanilla"]
how = "counted" if device.kind == "cpu" else "measured"
print(f"{'':20}{'time a step':>14}{'':>8}{'peak, ' + how:>18}{'':>8}{'loss of the last step':>24}")
for name, row in rows_of_table.items():
    slower, larger = row["seconds"] / vanilla["seconds"], row["peak"] / vanilla["peak"]
    print(f"{'+ ' * (name != 'vanilla') + name:20}{1e3 * row['seconds']:11.1f} ms{slower:7.2f}x"
          f"{row['peak'] / 1e6:15.1f} MB{larger:7.2f}x{row['loss']:24.5f}")
for name, reason in not_measured.items():
    print(f"+ {name}: not measured ({reason})")
if my_slower_ones is not None:
    slower = [name for name, row in rows_of_table.items() if row["seconds"] > 1.05 * vanilla["seconds"]]
    print(f"You predicted as slower: {my_slower_ones}; measured: {slower}.")
if my_best_saver is not None:
    print(f"You predicted as the best saver: {my_best_saver}; {how}: "
          f"{min(rows_of_table, key=lambda name: rows_of_table[name]['peak'])}.")

# %% tags=["demo"] needs=["accumulate", "checkpoint"]
figure, axes = plots.figure("One saving at a time", "time a step, relative to vanilla",
                            "peak memory, relative to vanilla",
                            caption="Left is faster, down is smaller; vanilla stands at (1, 1).")
spoken = []
for (name, row), look in zip(rows_of_table.items(), plots.looks(len(rows_of_table))):
    slower, larger = row["seconds"] / vanilla["seconds"], row["peak"] / vanilla["peak"]
    axes.plot(slower, larger, markersize=9, label=name, **{**look, "linestyle": ""})
    spoken.append(f"{name} {slower:.2f} times the time and {larger:.2f} times the memory")
axes.axhline(1, color="#888888", linewidth=0.8)
axes.axvline(1, color="#888888", linewidth=0.8)
axes.set_ylim(0, 1.15)
axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
plots.show(figure, f"Peak memory against time of a step, both relative to vanilla: {', '.join(spoken)}.")

# %% [markdown]
# Look at the losses first. Accumulation and checkpointing change nothing but rounding: they are **exact**. Dynamic
# padding is exact as well, since padding has no loss. bf16 and the 8-bit state are approximations, and the loss says
# how good ones.
#
# Then the memory: accumulation and checkpointing cut hidden states, which are nearly everything here; the 8-bit state
# cuts the optimizer's part, which is small in this small model and the largest part of OPT-1.3B at one sample. Dynamic
# padding lowers the peak only where **no** batch has a long text: the peak is that of the worst batch. Which saving pays
# depends on what your memory is full of, and that is what your formula tells you.
#
# And the time. Operations are not seconds: checkpointing does a third more of them (section 4), and the clock may charge
# more or less for it, since not all of a step is products. Dynamic padding saves time first, and so does bf16 where the
# hardware has units for it.
#
# ### The lecture's table, filled in
#
# The lecture lists eight methods and says of each whether it improves speed and whether it saves memory. Here is what
# we can say from our own measurements; a change of less than 5% counts as none. What needs several GPUs or a slow
# disk is worked out or left to another lab.

# %% tags=["demo"] needs=["training_memory", "accumulate", "checkpoint"]
def verdict(now, before):
    change = now / before
    return f"{'yes' if change < 0.95 else 'no' if change <= 1.05 else 'no, worse'} ({change:.2f}x)"


def measured_row(name):
    if name not in rows_of_table:
        return "not measured here", "not measured here"
    row = rows_of_table[name]
    return verdict(row["seconds"], vanilla["seconds"]), verdict(row["peak"], vanilla["peak"])


batch_speed = verdict(vanilla["seconds"] / ROWS, step_seconds["batch of 1"])
batch_memory = verdict(peak_of(rows=1, micro=1), vanilla["peak"])
states = training_memory(opt, 1, 512, 2)
alone = sum(states.values())
sharded = alone - states["optimizer"] * 3 / 4
table = [
    ("Batch size choice", "yes / yes", f"{ROWS}, not 1, a sample: {batch_speed}",
     f"1, not {ROWS}: {batch_memory}"),
    ("Gradient accumulation", "no / yes", *measured_row("accumulation")),
    ("Gradient checkpointing", "no / yes", *measured_row("checkpointing")),
    ("Mixed precision training", "yes / (no)", *measured_row("bf16")),
    ("Optimizer choice (8-bit)", "yes / yes", *measured_row("8-bit state")),
    ("Data preloading", "yes / no", "lab 02 measures it", "lab 02 measures it"),
    ("DeepSpeed ZeRO, stage 1", "no / yes", "needs several GPUs",
     f"worked out, OPT-1.3B on 4: {verdict(sharded, alone)}"),
    ("torch.compile", "yes / no", *measured_row("compile")),
]
print(f"{'method':26}{'lecture':12}{'faster?':36}{'less memory?'}")
for row in table:
    print(f"{row[0]:26}{row[1]:12}{row[2]:36}{row[3]}")

# %% [markdown]
# Two rows deserve a second look. **Mixed precision** under autocast saves memory here although the lecture says
# "(no)": hidden states are halved, while weights exist twice. With a large batch the first wins, with a large model
# and a small batch the second. And whether it is faster depends on the hardware: without units for bfloat16 it is
# not. **Optimizer choice**: the lecture gives, for a model of 3B weights, AdamW 24 GB, Adafactor 12 GB and 8-bit Adam
# 6 GB. The first and the last are two states of 4 bytes and of 1 byte; Adafactor's own state is next to nothing, as
# you can see in stretch B, and 12 GB is what the weights or gradients take in float32.
#
# ## Must batch sizes be powers of two?
#
# The slide says so. The reason given is usually that the hardware works in tiles of 16 or 32 or 64. But the batch is
# not what the tiles see: a product's height is batch times length, and that is a multiple of 16 already whenever the
# length is. We measure.

# %% tags=["demo"]
candidates = device.pick(fast=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16),
                         full=(1, 2, 4, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33))
model = fresh_model()
best = dict.fromkeys(candidates, math.inf)
clock = time.perf_counter if device.kind == "cuda" else time.process_time  # on a CPU: what we were given of it
threads = torch.get_num_threads()
torch.set_num_threads(1)  # threads that wait for each other would count as time
for _ in range(4):  # in turns, and the best of each: what disturbs a run makes it slower, never faster
    for rows in candidates:
        tokens, targets = batch_of(rows)
        finish()
        begin = clock()
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        finish()
        best[rows] = min(best[rows], clock() - begin)
torch.set_num_threads(threads)
rates = {rows: rows / seconds for rows, seconds in best.items()}
powers = [rows for rows in candidates if rows & (rows - 1) == 0]
others = [rows for rows in candidates if rows & (rows - 1)]

unit = "samples a second" if device.kind == "cuda" else "samples a second of CPU time"
figure, axes = plots.figure("Samples a second by batch size", "batch (samples)", unit,
                            caption="Forward and backward, the best of four runs.")
axes.plot(candidates, rates.values(), color="#888888", marker="", linewidth=1)
for name, chosen, colour, marker in (("powers of two", powers, "blue", "s"),
                                     ("other sizes", others, "orange", "o")):
    axes.plot(chosen, [rates[rows] for rows in chosen], color=plots.COLOURS[colour], marker=marker,
              linestyle="", markersize=7, label=name)
axes.set_ylim(bottom=0)
axes.legend(loc="lower right")
spoken = ", ".join(f"{rows}: {rate:.0f}" for rows, rate in rates.items())
plots.show(figure, f"Samples a second against the batch: {spoken}.")
for rows, left, right in zip(candidates[1:], candidates, candidates[2:]):
    if right - left == 2:  # one less, itself, one more
        between = (rates[left] + rates[right]) / 2
        print(f"batch {rows:2} runs at {rates[rows] / between:.2f} times the mean of its neighbours")

# %% [markdown]
# If powers of two were special, every square would stand above the circles on both sides of it, in every run. Run the cell
# a second time before you believe a difference between neighbours: the points move. What matters is that the dimensions
# of the **matrices** are multiples of 8 or 16 (the width, the heads' width, the vocabulary), and that the batch fills the
# machine. Take the largest batch that fits or that learns well, 13 if it is 13.
#
# ## Stretch A: segments of $\sqrt L$ layers
#
# *A badge, about 30 minutes, difficulty 3 of 5.*
#
# With every layer checkpointed, the $L$ inputs are what is kept. For a deep model that is a lot again. Checkpoint
# **segments** of several layers instead: $k$ segments keep $k$ inputs, and while one of them is run again, its $L /
# k$ layers are all in memory. If a layer's hidden states weigh as much as its input, the sum $k + L / k$ is least at
# $k = \sqrt L$ (Chen et al., 2016): training $L$ layers in $2 \sqrt L$ of memory, still for one more forward pass.
#
# Use $k = \text{round}(\sqrt L)$ segments of neighbouring layers whose sizes differ by at most one. Where $k$ does
# not divide $L$, some are one layer longer; the next cell says where yours go.

# %%
effnlp_lab.variant("checkpoint_segments")

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `size, longer = divmod(L, k)`: there are `longer` segments of `size + 1` layers, and the rest have `size`.
# </details>
# <details><summary>Hint 2</summary>
#
# A function that is defined in a loop looks up the loop's variables when it **runs**, and yours runs again in the
# backward pass, when the loop is long over. `def run(x, part=part):` binds the value at once.
# </details>

# %% exercise="checkpoint_segments"
def checkpoint_segments(
    layers: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor
) -> torch.Tensor:
    """Apply the layers one after the other, in round(sqrt(L)) checkpointed segments.

    layers: L of them, at least one; each takes a tensor and returns one. x requires a gradient.
    Every segment is run through `checkpoint`. Sizes differ by at most one layer; your variant says whether
    the longer segments come first or last.
    Returns the last layer's output.
    """
    ### BEGIN SOLUTION
    count = round(math.sqrt(len(layers)))
    size, longer = divmod(len(layers), count)
    first = 0
    for segment in range(count):
        part = layers[first : first + size + (segment < longer)]

        def run(x, part=part):
            for layer in part:
                x = layer(x)
            return x

        x = checkpoint(run, x)
        first += len(part)
    return x
    ### END SOLUTION


# %% check="checkpoint_segments"
check("checkpoint_segments", checkpoint_segments)

# %% tags=["demo"] needs=["checkpoint", "checkpoint_segments"]
def peak_of_stack(depth, way):
    """Counted peak of forward and backward through `depth` light layers."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(depth)]
    x = torch.randn(1024, 32, requires_grad=True)

    def work():
        out = x
        if way == "segments of sqrt(L)":
            out = checkpoint_segments(layers, x)
        else:
            for layer in layers:
                out = checkpoint(layer, out) if way == "every layer" else layer(out)
        out.sum().backward()

    return counted_peak(work)


depths = (4, 9, 16, 36, 64, 100)
figure, axes = plots.figure("Depth against memory", "layers", "counted peak (MB)",
                            caption="Two lines grow with the depth, the third with its root.")
ends = {}
for way in ("plain", "every layer", "segments of sqrt(L)"):
    peaks = [peak_of_stack(depth, way) / 1e6 for depth in depths]
    ends[way] = peaks[-1]
    axes.plot(depths, peaks, label=way)
axes.legend()
spoken = ", ".join(f"{way} {peak:.1f} MB" for way, peak in ends.items())
plots.show(figure, "Peak memory against depth: plain and every layer grow in proportion to depth, segments "
                   f"with its root. At 100 layers: {spoken}.")

# %% [markdown]
# These layers keep no more than what they hand on, so a checkpoint around each of them saves nothing at all: its
# input is what was kept anyway. Segments do save, and their line bends.
#
# ## Stretch B: Adafactor's factored second moment
#
# *A badge, about 30 minutes, difficulty 3 of 5.*
#
# Adam's average of squared gradients is a matrix as large as the weight. Adafactor (Shazeer and Stern, 2018) keeps
# only its means over rows and over columns: for a 4096 x 4096 weight 8,192 numbers instead of 16.8 million. From them
# the matrix is rebuilt as if it had rank one. With $G$ the gradient and $\beta$ the decay,
#
# $$R \leftarrow \beta R + (1-\beta)\, \operatorname{mean}_j (G_{ij}^2 + 10^{-30}), \quad
# C \leftarrow \beta C + (1-\beta)\, \operatorname{mean}_i (G_{ij}^2 + 10^{-30}), \quad
# V_{ij} = \frac{R_i}{\operatorname{mean}(R)}\, C_j, \quad U = \frac{G}{\sqrt V}.$$
#
# A gradient with more than two dimensions is a stack of matrices: the last two dimensions are rows and columns, and
# each matrix has its own $R$ and $C$.
#
# <details><summary>Hint 1</summary>
#
# The mean over the columns of each row is `.mean(-1)`: counting dimensions from the end works for stacks too.
# </details>
# <details><summary>Hint 2</summary>
#
# `a[..., :, None] * b[..., None, :]` is the outer product, for every matrix of the stack. Divide by the mean before
# you multiply: where gradients are 0 the averages are near 1e-30, and 1e-30 times 1e-30 is 0 in float32.
# </details>

# %% exercise="factored_update"
def factored_update(
    gradient: torch.Tensor, row: torch.Tensor, column: torch.Tensor, decay: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of Adafactor's factored second moment.

    gradient: [..., rows, columns]
    row: [..., rows] and column: [..., columns], the averages so far; they are left as they are
    decay: the share of the old averages that stays, from 0 (the first step) to below 1
    Returns (row, column, update): the new averages of gradient^2 + 1e-30, and the gradient divided by the
    root of the second moment V that they stand for, before clipping and learning rate. Where all
    gradients are 0 the update is 0.
    """
    ### BEGIN SOLUTION
    squared = gradient**2 + 1e-30
    row = decay * row + (1 - decay) * squared.mean(-1)
    column = decay * column + (1 - decay) * squared.mean(-2)
    share = row / row.mean(-1, keepdim=True)
    second = share[..., :, None] * column[..., None, :]
    return row, column, gradient / second.sqrt()
    ### END SOLUTION


# %% check="factored_update"
check("factored_update", factored_update)

# %% tags=["demo"] needs=["factored_update"]
parameter = nn.Parameter(torch.zeros(8, 6))
library = torch.optim.Adafactor([parameter], lr=1.0, d=1e9, eps=(1e-30, 1e-3))
row, column = torch.zeros(8), torch.zeros(6)
for step in range(1, 4):
    parameter.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    library.step()
    row, column, _ = factored_update(parameter.grad, row, column, 1 - step**-0.8)
state = library.state[parameter]
same = (torch.allclose(row, state["row_var"].flatten(), rtol=1e-4)
        and torch.allclose(column, state["col_var"].flatten(), rtol=1e-4))
print(f"After three steps your averages are those of torch.optim.Adafactor: {same}")
print(f"{'optimizer':24}{'state of a model with 3B weights':>36}")
matrices = 3e9 / 4096**2  # as many 4096 x 4096 matrices as make 3 billion weights
sizes = {"AdamW, float32": 3e9 * 8, "8-bit AdamW": 3e9 * 2, "Adafactor, factored": matrices * 2 * 4096 * 4}
for name, size in sizes.items():
    print(f"{name:24}{size / 1e9:33.3f} GB")

# %% [markdown]
# ## The receipt
#
# One gradient of the same batch, dropout included, by everybody's checkpointing: what it costs, and whether it is
# exact. The time is the median of five gradients of one model.

# %% tags=["demo"] needs=["accumulate", "checkpoint"]
from effnlp_lab.device import ceilings
from effnlp_lab.notebook import bench
from effnlp_lab.notebook.receipt import Receipt
from torch.utils.checkpoint import checkpoint as torch_checkpoint

contestants = {"plain": None, "yours": checkpoint,
               "torch": lambda block, x: torch_checkpoint(block, x, use_reentrant=False)}
try:
    from effnlp_lab.training import checkpoint as kit_checkpoint

    contestants["kit"] = lambda block, x: kit_checkpoint(block, x)
except ImportError:
    print("the kit's own checkpoint is not there, and so was not compared")
costs = {}
for name, around in contestants.items():
    gradient, usage = measure(one_gradient, around=around)
    model = fresh_model(dropout=0.1, around=around)
    seconds = sorted(bench.timed(lambda model=model: one_gradient(model=model), device) for _ in range(5))[2]
    exact = torch.equal(gradient, plain)
    quality = "equal" if exact else f"off by {(gradient - plain).abs().max():.1e}"
    costs[name] = {"quality": quality, "seconds": seconds, "peak_bytes": usage.peak_bytes, "flops": usage.flops}
receipt = Receipt("03", quality="gradient", device=device,
                  title=f"One gradient of 4 samples of {LENGTH} tokens, {weights:,} weights, with dropout")
receipt.add("baseline", "everything kept", **costs["plain"])
receipt.add("yours", "checkpoint", **costs["yours"])
if "kit" in costs:
    receipt.add("reference", "the kit", **costs["kit"])
receipt.add("library", "torch.utils.checkpoint", **costs["torch"])
flops = costs["plain"]["flops"]
receipt.add("limit", "matrix products alone", flops=flops,
            seconds=flops / ceilings(device).matmul_flops_per_second, note="at the rate of a large product")
receipt.show()
print(f"saved as {receipt.save().name}")

# %% [markdown]
# ## In your own words
#
# A fine-tuning run needs 30 GB, and your card has 16. Name the two savings that you would try first, in their order. Why
# these, what does each cost, and what would you look at to see whether the result is still the same?
#
# Write 60 to 120 words. A person reads and grades them.

# %% [markdown] written="first_savings"
# **Rubric, for whoever grades** (shares of the points; another answer as good earns them too)
#
# - 0.3: asks first what fills the memory (states of the model, or hidden states), by the formula or by
#   measuring.
# - 0.4: two savings that cut that part, each with its price: time for checkpointing and accumulation, precision
#   for bf16 and 8-bit states.
# - 0.3: says which are exact and which are not, and compares loss (or gradients) with a run without them.

# %% [markdown]
# ## What you have learned
#
# - A training step keeps weights, gradients, optimizer states and hidden states. The first three depend on the model,
#   the last on the batch, the length and how the layers are written; every head has its own score matrices.
# - Turned around, the estimate gives the largest batch. It need not be a power of two.
# - Accumulation is exact if sums are divided by the tokens of the whole batch, and saves memory only if every
#   micro-batch has its own backward.
# - Checkpointing is exact if the second run draws the same random numbers, starts from detached inputs and puts the
#   random state back. It costs one forward pass.
# - Half precision is for matrix products. Powers, exponentials, sums, losses and master weights stay in float32, and
#   float16 needs a loss scale: unscale, look, clip, step.
# - Measure one change at a time, on a fresh model. What helps depends on what your memory is full of.
#
# ## Read on
#
# - T. Chen, B. Xu, C. Zhang, C. Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016: checkpointing and
#   $\sqrt L$.
# - V. Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022: the count of hidden
#   states, term by term, and which of them to recompute.
# - P. Micikevicius et al., "Mixed Precision Training", 2018: master weights and loss scaling.
# - N. Shazeer, M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018.
# - T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", 2022.
# - S. Rajbhandari, J. Rasley, O. Ruwase, Y. He, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
#   Models", 2020.
# - In the kit: `effnlp_lab/training` holds the same techniques as an engineer would use them, with a memory model
#   that counts operation by operation.
