# %% [markdown]
# # Lab 06: Flash attention
#
# Attention is two matrix products with a softmax between them, and for years it was the part of a transformer that
# would not scale: for a text of $n$ tokens it writes $n \times n$ scores to memory, reads them back, writes the
# weights, and reads those back. Nobody wants these numbers. **Flash attention** (Dao et al., 2022) computes the same
# output, exactly, without ever writing them: memory becomes linear in the length, and because memory was the
# bottleneck, it is several times faster too.
#
# Nothing in it is magic. It rests on one observation about softmax that you could have made yourself, and on
# patience with tiles. In this lab you build all of it: the observation, the tiles, the kernel and the backward pass.
#
# | | exercise | points | minutes | difficulty |
# |---|---|---|---|---|
# | 1 | `counted_attention`: standard attention and its bytes | 1.5 | 25 | 2 of 5 |
# | 2 | `online_softmax`: softmax in one pass | 1.5 | 40 | 3 of 5 |
# | 3 | `merge_partials`: merge two partial softmaxes | 1 | 20 | 2 of 5 |
# | 4 | `tiled_forward`: the forward pass in tiles | 2 | 50 | 3 of 5 |
# | 5 | `flash_kernel`: the same as a Triton kernel (or `flash_kernel_twin`) | 2 | 70 | 4 of 5 |
# | 6 | `flash_backward`: the backward pass by recomputation | 2 | 60 | 4 of 5 |
# | stretch | `tile_plan`: skip what the causal mask hides | badge | 20 | 2 of 5 |
# | stretch | `window_attention`: a sliding window | badge | 35 | 3 of 5 |
# | stretch | `chunked_attention`: memory-efficient attention by checkpoints | badge | 30 | 3 of 5 |
# | stretch | `backward_kernel`: the backward pass as a kernel (or `backward_kernel_twin`) | badge | 75 | 5 of 5 |
#
# **Time.** About five hours: the core exercises, the reading and the measurements. Stretch exercises come on top.
#
# **You need** PyTorch tensors and autograd, softmax attention, and for exercise 5 what a Triton kernel is (part 5 of
# lab 00). No GPU is needed: kernels then run in Triton's interpreter, on small sizes, and what only a GPU can show is
# counted or said.
#
# **How a check works.** Under each blank stands one call, `check(...)`. It runs your function on fresh random cases,
# compares with attention in float64, and says what went wrong, by name where it recognises the slip. Some cases also
# count the memory that you use: an answer that is right but builds the whole score matrix is *over budget*.
#
# {assistants} Flash attention is printed on half the internet, and what you are here for is to find out why each of its
# lines has to be there.
#
# **Libraries.** The fused functions (`scaled_dot_product_attention`, `flash_attn`, this kit's own attention) are refused
# inside your answers, and are what you are compared with in the demos.

# %% tags=["parameters"]
DEVICE = "auto"
FAST = "auto"

# %%
import effnlp_lab
from effnlp_lab import check
from effnlp_lab.notebook.portable import tl, triton

import math
from collections.abc import Iterator

import torch
from torch import Tensor

device = effnlp_lab.start("06_flash_attention", device=DEVICE, fast=FAST)

# %% [markdown]
# ## 1. Standard attention is slow for the wrong reason
#
# A GPU has a large memory that is far away and a small one that is close. These are the figures of an A100 (Dao et al.,
# 2022, figure 1):

# %% tags=["demo"]
from effnlp_lab.notebook import plots

levels = {"on the chip (SRAM)": (19_000, "20 MB"),
          "the GPU's memory (HBM)": (1_500, "40 GB"),
          "the machine's memory": (12.8, "more than 1 TB")}
figure, axes = plots.figure("Close memory is fast and small (A100)", "bandwidth (GB/s, logarithmic)",
                            "where a number lies", caption="Flash attention keeps the scores in the first row.")
bars = axes.barh(list(levels), [rate for rate, _ in levels.values()], color=list(plots.COLOURS.values())[:3])
axes.bar_label(bars, [f"{rate:,g} GB/s, {size}" for rate, size in levels.values()], padding=4, fontsize=9)
axes.set_xscale("log")
axes.set_xlim(1, 5e6)
axes.invert_yaxis()
axes.grid(axis="y", visible=False)
plots.show(figure, "Three kinds of memory of an A100: 20 MB on the chip at 19,000 GB/s, 40 GB of GPU memory at "
                   "1,500 GB/s, and the machine's memory at 12.8 GB/s.")

# %% [markdown]
# For one head with $n$ queries, $m$ keys and head dimension $d$,
#
# $$S = \frac{1}{\sqrt d}\, Q K^\top, \qquad P = \text{softmax}(S), \qquad O = P V,$$
#
# where the softmax runs over the keys. The factor $1/\sqrt d$ keeps the scores at a size of about 1 whatever $d$ is.
# Done in the plain way these are three steps, and each reads its inputs from the GPU's memory and writes its result
# there:
#
# | step | reads | writes | numbers moved, a head |
# |---|---|---|---|
# | 1. $S = QK^\top/\sqrt d$ | $Q, K$ | $S$ | $nd + md + nm$ |
# | 2. $P = \text{softmax}(S)$ | $S$ | $P$ | $nm + nm$ |
# | 3. $O = PV$ | $P, V$ | $O$ | $nm + md + nd$ |
#
# **Shapes in this lab.** Tensors are `[heads, length, dim]`. A batch is just more heads, because no head ever looks at
# another: fold it in, and the code loses an axis.
#
# **Causal, and where the mask is aligned.** A language model's token must not see later ones. The **last query stands
# beside the last key**: with $n$ queries and $m$ keys, query $i$ has position $i + m - n$ and sees the keys $0$ to
# $i + m - n$. When a model generates, $n$ is 1 and $m$ is all that was written so far: the one query sees everything.
#
# ```
#      4 queries, 4 keys        2 queries, 4 keys         4 queries, 2 keys
#        k0 k1 k2 k3              k0 k1 k2 k3               k0 k1
#   q0   x  .  .  .          q0   x  x  x  .           q0   .  .     sees nothing
#   q1   x  x  .  .          q1   x  x  x  x           q1   .  .     sees nothing
#   q2   x  x  x  .                                    q2   x  .
#   q3   x  x  x  x                                    q3   x  x
# ```
#
# (PyTorch's `is_causal=True` aligns its mask at the top left, and agrees with ours for $n = m$ alone; flash-attn
# aligns as we do.)
#
# ### Exercise 1: standard attention and its bytes
#
# *1.5 points, about 25 minutes, difficulty 2 of 5.*
#
# Write the three steps, with the causal mask where it is asked for, and count the bytes that they move by the table: a
# number takes 4 bytes in float32 and 2 in float16. Count exactly what the table lists, for all heads. A causal mask
# changes nothing in the count: the plain way computes the whole square and hides half of it.
#
# Libraries differ in one thing: some keep the scores between the steps in the dtype of the inputs, others in float32,
# which is safer and costs bytes. The next cell says which ones **you** count. (The tables further down count the former.)

# %%
effnlp_lab.variant("counted_attention")

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `q @ k.transpose(-2, -1)` is [heads, queries, keys]. A hidden key must get the weight 0, and softmax gives exactly 0
# to a score of minus infinity, so mask the scores, not the weights.
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.ones(n, m, dtype=torch.bool).tril(x)` is True up to the diagonal that begins in column x: query 0 sees
# key 0 to key m - n. `scores.masked_fill(~visible, -math.inf)` hides the rest.
# </details>
# <details><summary>Hint 3</summary>
#
# Add up the last column of the table: $2nd + 2md + 4nm$ numbers a head. `x.numel()` counts the numbers of a tensor
# with all its heads, and `x.element_size()` is the bytes of one.
# </details>

# %% exercise="counted_attention"
def counted_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, int]:
    """Standard attention, and the bytes that its three steps move.

    q: [heads, queries, dim]; k, v: [heads, keys, dim], with keys >= queries; float32 or float16
    causal: whether query i sees only the keys 0 to i + keys - queries
    Returns (output, moved): the output is [heads, queries, dim] in the dtype of q; moved is an int, the bytes read and
    written by the three steps of the table above, with scores and weights of the size that your variant says.
    """
    ### BEGIN SOLUTION
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        queries, keys = scores.shape[-2:]
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        scores = scores.masked_fill(~visible, -math.inf)
    weights = torch.softmax(scores, dim=-1)
    out = weights @ v
    elements = q.numel() + k.numel() + v.numel() + out.numel() + 4 * scores.numel()
    return out, elements * q.element_size()
    ### END SOLUTION


# %% check="counted_attention"
check("counted_attention", counted_attention)

# %% [markdown]
# ### Measure it
#
# What would have to move? $Q$, $K$ and $V$ in, $O$ out: $2nd + 2md$ numbers a head. The rest, $4nm$, is traffic that
# exists because the steps are separate.
#
# **Predict first.** Head dimension 64, float16, 4,096 tokens: how many times as many bytes does standard attention
# move as it would have to? Write your guess in the next cell before you run the one after it.

# %% predict="wasted_traffic"
my_times_too_many = None  # your guess, for example 3

# %% tags=["demo", "nbval-check-output"] needs=["counted_attention"]
def standard_bytes(length, dim=64, number=2):
    """Bytes that one head of standard attention moves, by the table."""
    return (4 * length * dim + 4 * length * length) * number


def necessary_bytes(length, dim=64, number=2):
    """Bytes of reading Q, K and V and writing O once."""
    return 4 * length * dim * number


own = counted_attention(*[torch.ones(1, 32, 64).half()] * 3, False)[1]
print(f"length 32: {own:,} bytes by your formula, {standard_bytes(32):,} by the table")
print(f"{'length':>8}{'standard':>14}{'necessary':>12}{'ratio':>8}{'operations a byte':>20}")
for length in (128, 512, 2048, 4096, 8192):
    standard, necessary = standard_bytes(length), necessary_bytes(length)
    operations = 4 * length * length * 64
    print(f"{length:8,}{standard / 1e6:11,.2f} MB{necessary / 1e6:9,.2f} MB{standard / necessary:8.0f}"
          f"{operations / standard:20.0f}")

# %% tags=["demo"] needs=["counted_attention"]
if my_times_too_many is not None:
    print(f"You predicted {my_times_too_many}; by the table it is "
          f"{standard_bytes(4096) / necessary_bytes(4096):.0f} times.")

# %% [markdown]
# The last column is what decides. The A100 of the picture does 312 trillion operations a second in half precision, and
# moves 1.5 TB in the same second: about 200 operations for every byte. Standard attention offers it about 30. So the
# arithmetic units wait for memory most of the time, and to save bytes is to save time, even where it costs operations.
#
# The table is a lower bound for PyTorch, too. Scaling and masking are steps of their own there, and each reads and
# writes the whole square once more. The kit's `meter` counts the bytes of every operation that PyTorch runs:

# %% tags=["demo"] needs=["counted_attention"]
from effnlp_lab.notebook.meter import measure

for causal in (False, True):
    q, k, v = (torch.randn(4, 512, 64) for _ in range(3))
    (_, table), usage = measure(counted_attention, q, k, v, causal)
    print(f"4 heads, 512 tokens, {'causal' if causal else 'full  '}: {table / 1e6:5.1f} MB by the table, "
          f"{usage.bytes_moved / 1e6:5.1f} MB by the meter in {usage.launches} launches")

# %% [markdown]
# ## 2. Softmax in one pass
#
# To keep the scores on the chip we must finish with a few of them before the next ones arrive. The two matrix
# products are happy with that: they are sums, and a sum can be taken piece by piece. Softmax is not, at first sight.
# For the scores $s_1, \dots, s_m$ of one query,
#
# $$o = \frac{\sum_j e^{s_j - \mu}\, v_j}{\sum_j e^{s_j - \mu}}, \qquad \mu = \max_j s_j,$$
#
# and the maximum is not known before the last score is. Why not leave it out? It cancels, and one lecture slide on
# memory-efficient attention indeed writes $e^{s_j}$ alone. On paper that is the same number. In float32 $e^{89}$ is
# infinite and $e^{-104}$ is 0, in float16 $e^{12}$ is infinite; then $\infty/\infty$ or $0/0$ is what you get.
# Trained models do have such scores.
#
# Here is the observation. Suppose that we have seen a part of the scores, with maximum $\mu$, sum
# $\ell = \sum e^{s_j - \mu}$ and unnormalised output $a = \sum e^{s_j - \mu} v_j$. Now come more, and the maximum
# grows to $\mu'$. Everything so far was measured in units of $e^{\mu}$, and all that is wrong with it is the unit:
#
# $$\sum e^{s_j - \mu'} = e^{\mu - \mu'} \sum e^{s_j - \mu} = e^{\mu - \mu'}\, \ell .$$
#
# So we carry three things, $\mu$, $\ell$ and $a$, and for each new block of scores $s$ with values $V$:
#
# $$\mu' = \max(\mu, \max s), \qquad \ell' = e^{\mu-\mu'}\,\ell + \sum e^{s - \mu'}, \qquad
# a' = e^{\mu-\mu'}\,a + e^{s - \mu'}\, V .$$
#
# At the end the output is $a/\ell$. This is the **online softmax** (Milakov and Gimelshein, 2018). Worked out on one
# row, with blocks of two scores and $v_j = j$:
#
# ```
#  scores  max  factor     weights       sum                    output, not yet divided
#  1, 3    3               0.135, 1      1.135                  2.135
#  2, 0    3    e^0 =1     0.368, 0.050  1.135 + 0.418 = 1.553  2.135 + 1.303 = 3.438
#  5, 4    5    e^-2=0.135 1, 0.368      0.210 + 1.368 = 1.578  0.465 + 7.207 = 7.673
#                                                               7.673 / 1.578 = 4.862
# ```
#
# Besides the output we keep one number a query, the **log-sum-exp** $\lambda = \ln \sum_j e^{s_j} = \mu + \ln \ell$.
# With it any single weight can be had again later: $p_j = e^{s_j - \lambda}$. The merge below and the backward pass
# live on it.
#
# ### Exercise 2: softmax in one pass
#
# *1.5 points, about 40 minutes, difficulty 3 of 5.*
#
# The scores arrive in blocks of any width, each once: `blocks` is an iterator, and to collect all the blocks first
# would be over budget. A hidden key has the score $-\infty$. Beware of a query that has seen only hidden keys so far:
# its maximum is $-\infty$, and $-\infty - (-\infty)$ is not a number. Such a query, if no key ever appears, gets
# output 0 and log-sum-exp $-\infty$.
#
# <details><summary>Hint 1</summary>
#
# In the loop: the new maximum, the factor $e^{\mu - \mu'}$, the weights of the block, then the two sums. The order
# matters: the factor needs the old maximum and the new one.
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.maximum(peak, scores.amax(dim=1))` is the new maximum, one per query. `peak`, `total` and `out` start as single
# numbers and grow to their shapes by broadcasting; `x[:, None]` turns one number per query into a column.
# </details>
# <details><summary>Hint 3</summary>
#
# Subtract not the new maximum itself but `safe`, which is 0 where the maximum is $-\infty$:
# `higher.masked_fill(higher == -math.inf, 0.0)`. Then $e^{-\infty - 0} = 0$, which is right for the weights and for the
# factor. At the end replace a sum of 0 by 1 before you divide.
# </details>

# %% exercise="online_softmax"
def online_softmax(blocks: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Softmax-weighted sum of values, with every block of scores seen once.

    blocks: an iterator of (scores, values), at least one: scores [queries, some keys], values [some keys, dim], float32,
        the same queries and dim in every block and at least one key; a hidden key has the score -inf
    Returns (output, lse): output [queries, dim], the sum over all keys of softmax(scores) * value; lse [queries], the
    natural logarithm of the sum of e^score over all keys. A query that sees no key has output 0 and lse -inf.
    """
    peak, total, out = torch.tensor(-math.inf), torch.tensor(0.0), torch.tensor(0.0)  # they broadcast to [queries]
    ### BEGIN SOLUTION
    for scores, values in blocks:
        higher = torch.maximum(peak, scores.amax(dim=1))
        safe = higher.masked_fill(higher == -math.inf, 0.0)
        weights = torch.exp(scores - safe[:, None])
        shrink = torch.exp(peak - safe)
        total = total * shrink + weights.sum(dim=1)
        out = out * shrink[:, None] + weights @ values
        peak = higher
    out = out / total.masked_fill(total == 0, 1.0)[:, None]
    return out, peak + torch.log(total)
    ### END SOLUTION


# %% check="online_softmax"
check("online_softmax", online_softmax)

# %% [markdown]
# The next picture follows one query over 40 blocks of 16 scores. The running maximum climbs like a
# staircase, and the log-sum-exp stays above it. See what becomes of $e^s$ without a maximum, in float16.

# %% tags=["demo"] needs=["online_softmax"]
generator = torch.Generator().manual_seed(4)
scores = 2 * torch.randn(1, 640, generator=generator) + torch.linspace(0, 12, 640)
values = torch.randn(640, 1, generator=generator)
steps = range(1, 41)
yours = [online_softmax(iter([(scores[:, : 16 * t], values[: 16 * t])]))[1].item() for t in steps]
peaks = [scores[0, : 16 * t].max().item() for t in steps]
naive = [scores[0, : 16 * t].half().exp().sum(dtype=torch.float16).log().item() for t in steps]
figure, axes = plots.figure("One query, block after block", "blocks seen (16 keys each)", "logarithm of the sum of e^s",
                            caption="Where the dotted line ends, e^s has overflowed float16.")
axes.plot(steps, yours, label="yours: running maximum + ln of the running sum", marker="")
axes.step(steps, peaks, where="post", label="the running maximum", marker="", linestyle="--")
axes.plot(steps, naive, label="e^s without the maximum, float16", marker="", linestyle=":", linewidth=3)
axes.legend(fontsize=8)
lost = next((t for t, x in zip(steps, naive) if math.isinf(x)), None)
plots.show(figure, f"The log-sum-exp of a growing number of scores rises with the running maximum; without the "
                   f"maximum it is infinite in float16 from block {lost} on.")

# %% [markdown]
# ## 3. Merge two partial softmaxes
#
# The loop above adds a block to what came before. But the old and the new need not be so unequal: given attention
# over one set of keys, $(o_a, \lambda_a)$, and over another, $(o_b, \lambda_b)$, both finished and divided, attention
# over the union follows from these four alone. With the sums $Z_a = e^{\lambda_a}$ and $Z_b = e^{\lambda_b}$,
#
# $$o = \frac{Z_a\, o_a + Z_b\, o_b}{Z_a + Z_b}, \qquad \lambda = \ln (Z_a + Z_b).$$
#
# So the keys may be dealt out to several cores, or to several GPUs, in any way and merged in any order: this is how a
# single query is spread over a whole GPU (flash decoding, lab 07) and how a text too long for one GPU is spread over
# many (ring attention).
#
# ### Exercise 3: merge two partial softmaxes
#
# *1 point, about 20 minutes, difficulty 2 of 5.*
#
# The danger is the same as before: $e^{\lambda}$ overflows, and an empty half has $\lambda = -\infty$. One half may
# be empty, or both, for each query separately.
#
# <details><summary>Hint 1</summary>
#
# Take the larger of $\lambda_a$ and $\lambda_b$ out of both, as you took the maximum out of the scores. Then the
# larger share is 1 and nothing overflows.
# </details>
# <details><summary>Hint 2</summary>
#
# Where both are $-\infty$, take 0 out instead: both shares are then $e^{-\infty} = 0$, and their sum is 0. Divide by
# 1 there. `x[..., None]` makes one number per query multiply a whole row.
# </details>

# %% exercise="merge_partials"
def merge_partials(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each set.

    out_a, out_b: [heads, queries, dim], outputs that are normalised already; lse_a, lse_b: [heads, queries], their
        log-sum-exps (natural); all float32. An empty set has output 0 and lse -inf
    Returns (out, lse) of the union, of the same shapes. Where both sets are empty: output 0 and lse -inf.
    """
    ### BEGIN SOLUTION
    peak = torch.maximum(lse_a, lse_b)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    share_a, share_b = torch.exp(lse_a - peak), torch.exp(lse_b - peak)
    total = share_a + share_b
    out = share_a[..., None] * out_a + share_b[..., None] * out_b
    return out / total.masked_fill(total == 0, 1.0)[..., None], peak + torch.log(total)
    ### END SOLUTION


# %% check="merge_partials"
check("merge_partials", merge_partials)

# %% tags=["demo", "nbval-check-output"] needs=["online_softmax", "merge_partials"]
from functools import reduce

generator = torch.Generator().manual_seed(0)
scores, values = 3 * torch.randn(5, 100, generator=generator), torch.randn(100, 8, generator=generator)
whole = torch.softmax(scores.double(), dim=1) @ values.double()
pieces = [online_softmax(iter([block])) for block in zip(scores.split(17, dim=1), values.split(17))]
pieces = [(out[None], lse[None]) for out, lse in pieces]
forwards = reduce(lambda a, b: merge_partials(*a, *b), pieces)
backwards = reduce(lambda a, b: merge_partials(*a, *b), reversed(pieces))
print(len(pieces), "pieces of 17 keys, the last one shorter")
print("merged from left to right, right:", torch.allclose(forwards[0][0].double(), whole, atol=1e-5))
print("merged from right to left, right:", torch.allclose(backwards[0][0].double(), whole, atol=1e-5))

# %% [markdown]
# ## 4. The forward pass in tiles
#
# Now put the two together. Cut the queries into tiles of `block_q` rows and the keys into tiles of `block_k`. For one
# tile of queries walk over the tiles of keys; compute that small rectangle of scores, feed it to the online softmax,
# and drop it. At no time does more than one rectangle of scores exist.
#
# ```
#                 k tile 0     k tile 1     k tile 2   (ragged)
#              +------------+------------+------+
#  q tile 0    |  scores    |            |      |     for each q tile:
#              +------------+------------+------+         running maximum, sum, output  <- empty
#  q tile 1    |    1  ->   |   2  ->    |  3   |         for each k tile:
#              +------------+------------+------+             scores of this rectangle
#  q tile 2    |            |            |      |             mask them, update the three
#   (ragged)   +------------+------------+------+         divide, write output and log-sum-exp
# ```
#
# Three things need care. The last tiles are **ragged** when the blocks do not divide the lengths (a slice that runs
# past the end is simply shorter). The **causal mask** has to know where the rectangle lies: row $r$ of the tile that
# begins at query $i$ is query $i + r$. And a rectangle may be hidden **entirely**, for one query or for all.
#
# Work in float32 inside, whatever the inputs are: sums of thousands of terms lose too much in half precision. That
# costs nothing on the chip.
#
# ### Exercise 4: the forward pass in tiles
#
# *2 points, about 50 minutes, difficulty 3 of 5.*
#
# A matter of convention: kernels often compute with $2^x$ instead of $e^x$, because the hardware has it, and then
# return the log-sum-exp in base 2. One of the two conventions is yours; the next cell says which.
#
# <details><summary>Hint 1</summary>
#
# The inside of the inner loop is your `online_softmax`, with one axis more: [heads, rows, columns]. You may also call
# `merge_partials` on finished tiles, if you like that better.
# </details>
# <details><summary>Hint 2</summary>
#
# Positions: `torch.arange(i, i + rows) + keys - queries` for the queries of the tile and
# `torch.arange(j, j + columns)` for its keys. A key is hidden where `key > position[:, None]`. Take `rows` from the
# slice, which may be short.
# </details>
# <details><summary>Hint 3</summary>
#
# Budget: allocate `out` and `lse` once and write slices into them. A list of all weights, a whole mask [queries,
# keys] or `q @ k.transpose(1, 2)` outside the loops is quadratic. To convert, `lse / math.log(2)` is in base 2.
# </details>

# %%
effnlp_lab.variant("tiled_forward")

# %% exercise="tiled_forward"
def tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, block_q: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """Attention that holds one tile of scores at a time.

    q: [heads, queries, dim]; k, v: [heads, keys, dim]; float32 or float16, any strides, any lengths of at least 1
    causal: whether query i sees only the keys 0 to i + keys - queries (none at all where that is negative)
    block_q, block_k: rows and columns of a tile, at least 1; they need not divide the lengths
    Returns (output, lse): output [heads, queries, dim] in the dtype of q; lse [heads, queries] in float32, in the base
    that `effnlp_lab.variant("tiled_forward")` tells you. A query that sees no key has output 0 and lse -inf. Scores,
    sums and running outputs are float32.
    """
    ### BEGIN SOLUTION
    heads, queries, dim = q.shape
    keys = k.shape[1]
    out = torch.empty_like(q)
    lse = torch.empty(heads, queries, device=q.device)
    for i in range(0, queries, block_q):
        q_tile = q[:, i : i + block_q].float() / math.sqrt(dim)
        position = torch.arange(i, i + q_tile.shape[1], device=q.device) + keys - queries
        peak = q_tile.new_full(q_tile.shape[:2], -math.inf)
        total, acc = torch.zeros_like(peak), torch.zeros_like(q_tile)
        for j in range(0, keys, block_k):
            k_tile, v_tile = k[:, j : j + block_k].float(), v[:, j : j + block_k].float()
            scores = q_tile @ k_tile.transpose(1, 2)
            if causal:
                key = torch.arange(j, j + k_tile.shape[1], device=q.device)
                scores = scores.masked_fill(key > position[:, None], -math.inf)
            higher = torch.maximum(peak, scores.amax(dim=2))
            safe = higher.masked_fill(higher == -math.inf, 0.0)
            weights = torch.exp(scores - safe[..., None])
            shrink = torch.exp(peak - safe)
            total = total * shrink + weights.sum(dim=2)
            acc = acc * shrink[..., None] + weights @ v_tile
            peak = higher
        out[:, i : i + block_q] = acc / total.masked_fill(total == 0, 1.0)[..., None]
        lse[:, i : i + block_q] = peak + torch.log(total)
    return out, lse
    ### END SOLUTION


# %% check="tiled_forward"
check("tiled_forward", tiled_forward)

# %% [markdown]
# ### Measure it: memory against length
#
# **Predict first.** Twice the length: by how much does the peak of memory grow for standard attention, and by how
# much for your tiles (in the limit of long texts)? Write both factors down.

# %% predict="memory_growth_by_length"
my_growth = {"standard": None, "tiled": None}  # your guesses, for example 3

# %% tags=["demo"]
from effnlp_lab import attention as room
from effnlp_lab.notebook import memory

HEADS, DIM = 4, 64
DTYPE = str(device.dtype).removeprefix("torch.")


def inputs(length, dtype=device.dtype, heads=HEADS, dim=DIM):
    return [torch.randn(heads, length, dim, device=device.torch, dtype=dtype) for _ in range(3)]


def peak_bytes(attention, length):
    """Bytes above the inputs: counted by the meter on a CPU, as PyTorch gave them out on a GPU."""
    q, k, v = inputs(length)
    if device.kind == "cpu":
        return memory.counted_peak(lambda: attention(q, k, v))
    memory.release()
    before = torch.cuda.memory_allocated()
    with memory.sized(length, items="tokens"):
        return memory.measured_peak(lambda: attention(q, k, v)) - before


# %% tags=["demo"] needs=["counted_attention", "tiled_forward"]
block = 128 if device.kind == "cuda" else 32
ways = {"standard": lambda q, k, v: counted_attention(q, k, v, True),
        "your tiles": lambda q, k, v: tiled_forward(q, k, v, True, block, block)}
if device.triton != "absent":
    ways["the kit's kernel"] = lambda q, k, v: room.flash_attention(q[None], k[None], v[None], causal=True)
lengths = [512, 1024, 2048, 4096, 8192, 16384] if device.kind == "cuda" else [128, 256, 512, 1024]
peaks = {name: [] for name in ways}
for name, attention in ways.items():
    for length in lengths:
        if name == "the kit's kernel" and device.triton != "compiled" and length > 256:
            break  # the interpreter computes what it counts, and takes seconds
        try:
            peaks[name].append(peak_bytes(attention, length))
        except memory.OutOfMemory as error:
            print(f"{name}: {error}")
            break

figure, axes = plots.figure("Memory of the forward pass, without the inputs", "length (tokens)", "peak (MiB)",
                            caption=f"{HEADS} heads of {DIM}, {DTYPE}, causal, blocks of {block}; "
                                    + ("counted" if device.kind == "cpu" else "as PyTorch gave it out"))
for (name, sizes), look in zip(peaks.items(), plots.looks(3)):
    axes.loglog(lengths[: len(sizes)], [size / 2**20 for size in sizes], label=name, **look)
axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
axes.minorticks_off()
axes.legend()
growth = {name: sizes[-1] / sizes[-2] for name, sizes in peaks.items()}
plots.show(figure, f"Peak memory against length on logarithmic axes: at the last doubling standard attention grows "
                   f"{growth['standard']:.1f} times, your tiles {growth['your tiles']:.1f} times.")
print(f"At the last doubling: standard x{growth['standard']:.2f}, your tiles x{growth['your tiles']:.2f}.")
if None not in my_growth.values():
    print(f"You predicted x{my_growth['standard']} and x{my_growth['tiled']}.")

# %% [markdown]
# Twice the length is four times the memory for the one and (once the few tiles that are alive no longer count) twice
# for the other: quadratic and linear. The smaller the blocks, the less memory, and the more steps.
#
# What about bytes? One tile of queries reads all the keys and values that it sees. So $K$ and $V$ are read once for
# each tile of queries, and the traffic is $2nd + 2md \cdot \lceil n / \text{block}_q \rceil$ numbers a head: still
# quadratic in the length, but $2\,\text{block}_q / d$ times less than $4nm$, and most of it never reaches the GPU's
# memory: the keys and values of one head (1 MiB for 4,096 tokens of dimension 64 in float16) stay in the cache while
# the head's tiles are worked on. The taller the tile, the less traffic; its height is limited by what fits on the
# chip.
#
# Your loops are not fast yet. Every operation in them is a launch of its own and writes its little result to the GPU's
# memory. The gain comes when one program holds a tile from beginning to end on the chip. That is a kernel.
#
# ## 5. The kernel
#
# A Triton kernel is written for one **program**, and launched on a grid of them, all at once. Here the grid is
# (tiles of queries, heads), and program (tile, head) does what one turn of your outer loop did:
#
# ```
#   tl.program_id(0) = tile    ->  rows   tile * BLOCK_Q ... tile * BLOCK_Q + BLOCK_Q - 1   of the queries
#   tl.program_id(1) = head    ->  q, out, lse of this head;  k, v of key head  head // group
# ```
#
# What changes is how data is named. A kernel has no tensors and no slices, only the address of a tensor's first
# number, and offsets that you compute:
#
# $$\text{address of } q[h, i, c] = q_\text{ptr} + h \cdot \text{stride}_0 + i \cdot \text{stride}_1 + c \cdot \text{stride}_2 .$$
#
# - **Strides.** In a model $q$, $k$ and $v$ are views of one projection's output, with rows that do not touch. Use
#   the strides.
# - **Masks.** A tile has always BLOCK rows. Where it runs past the end, `tl.load(..., mask=..., other=0.0)` reads 0
#   instead of someone else's memory, and `tl.store(..., mask=...)` writes nothing. A key past the end was loaded as
#   0, so its **score** is 0, and $e^0 = 1$ would be added to the sum: it has to be hidden, like any other key that is
#   not seen.
# - **Grouped heads.** In most models several query heads share a key head (grouped-query attention). Neighbours
#   share: with 6 query heads and 2 key heads, query heads 0, 1, 2 read key head 0, and 3, 4, 5 read key head 1.
# - **Precision.** `tl.dot` accumulates in float32. But if its *inputs* are float32, tensor cores round them to TF32,
#   with 10 bits of fraction, unless you say `input_precision="ieee"`. (`"tf32x3"` makes three products of one and comes
#   close, but not close enough where scores lie in the hundreds.) A GPU does so, the interpreter by itself does not; the
#   check makes it, so that you see the same on both.
#
# ### Exercise 5: the same as a Triton kernel
#
# *2 points, about 70 minutes, difficulty 4 of 5.*
#
# Fill in both blanks, the kernel and its launcher. Where Triton cannot run (it is made for Linux), solve the twin below
# instead: the same programs, offsets and masks, with PyTorch operations, for the same points. The better of the two
# counts. `dim` is a power of two here, so that `tl.arange(0, DIM)` covers a row.
#
# <details><summary>Hint 1</summary>
#
# Begin with the launcher: a grid of `(triton.cdiv(queries, block_q), heads)`, and then the kernel's arguments in
# order; `*q.stride()` gives three of them. Then write the kernel for one tile that is whole, without masks, and run
# the check: it says which part already passes.
# </details>
# <details><summary>Hint 2</summary>
#
# Offsets of a tile are an outer sum: `row[:, None] * q_row + dims[None, :] * q_dim`, with
# `row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)`. Their mask is `row[:, None] < queries`. Running values start as
# `tl.full([BLOCK_Q], float("-inf"), tl.float32)` and `tl.zeros(...)`.
# </details>
# <details><summary>Hint 3</summary>
#
# Inside the loop over `range(0, keys, BLOCK_K)` the names are those of exercise 4:
# `tl.dot(q, tl.trans(k), input_precision="ieee") * scale`, `tl.where(visible, scores, float("-inf"))`,
# `tl.max(scores, 1)`, `tl.exp`, `tl.sum(weights, 1)`. `visible` is `key[None, :] < keys`, and if CAUSAL also
# `key[None, :] <= row[:, None] + keys - queries`. Before the second product convert the weights:
# `weights.to(v.dtype)`.
# </details>

# %% exercise="flash_kernel"
@triton.jit
def flash_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,  # where each tensor begins
    q_head, q_row, q_dim, k_head, k_row, k_dim, v_head, v_row, v_dim, out_head, out_row, out_dim,  # strides
    queries, keys, group, scale,  # lengths, query heads per key head, 1/sqrt(dim)
    CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Program (tile, head): BLOCK_Q queries of one head against all the keys that they see, BLOCK_K at a time."""
    ### BEGIN SOLUTION
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, DIM)
    q_at = q_ptr + head * q_head + row[:, None] * q_row + dims[None, :] * q_dim
    q = tl.load(q_at, mask=row[:, None] < queries, other=0.0)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, DIM], tl.float32)
    for start in range(0, keys, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        inside = key[:, None] < keys
        k_at = k_ptr + (head // group) * k_head + key[:, None] * k_row + dims[None, :] * k_dim
        v_at = v_ptr + (head // group) * v_head + key[:, None] * v_row + dims[None, :] * v_dim
        k = tl.load(k_at, mask=inside, other=0.0)
        v = tl.load(v_at, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = key[None, :] < keys
        if CAUSAL:
            visible = visible & (key[None, :] <= row[:, None] + keys - queries)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(peak - safe)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = higher
    total = tl.where(total == 0.0, 1.0, total)
    out_at = out_ptr + head * out_head + row[:, None] * out_row + dims[None, :] * out_dim
    tl.store(out_at, acc / total[:, None], mask=row[:, None] < queries)
    tl.store(lse_ptr + head * queries + row, peak + tl.log(total), mask=row < queries)
    ### END SOLUTION


def flash_kernel(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, block_q: int, block_k: int
) -> None:
    """Launch one program for each tile of block_q queries of each head; they write `out` and `lse`.

    q, out: [heads, queries, dim]; k, v: [kv_heads, keys, dim], kv_heads divides heads, and query head h reads key head
        h // (heads // kv_heads); one dtype; any strides, any lengths of at least 1; dim a power of two, at least 16
    lse: [heads, queries], float32, contiguous; natural logarithm
    causal: whether query i sees only the keys 0 to i + keys - queries (none at all where that is negative)
    block_q, block_k: powers of two, at least 16; they need not divide the lengths
    A query that sees no key has output 0 and lse -inf. Products are accumulated in float32, and a product of float32
    numbers is exact: input_precision="ieee".
    """
    ### BEGIN SOLUTION
    heads, queries, dim = q.shape
    grid = (triton.cdiv(queries, block_q), heads)
    flash_forward_kernel[grid](
        q, k, v, out, lse,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        queries, k.shape[1], heads // k.shape[0], 1 / math.sqrt(dim),
        causal, dim, block_q, block_k,
    )
    ### END SOLUTION

# %% [markdown]
# ### The twin: the kernel's programs in PyTorch
#
# Skip this if you solved the kernel. `load` and `store` do what `tl.load` and `tl.store` do: they take offsets from a
# tensor's first number, and a mask. Arithmetic on the tiles is PyTorch's. `flash_forward_program` is one program; the
# function below it runs the whole grid.

# %%
def load(tensor: Tensor, offsets: Tensor, mask: Tensor, other: float = 0.0) -> Tensor:
    """tl.load: the numbers that lie `offsets` numbers after the first one of `tensor`; `other` where mask is False."""
    memory, positions = _memory(tensor, offsets, mask)
    return torch.where(mask, memory[positions], other)


def store(tensor: Tensor, offsets: Tensor, values: Tensor, mask: Tensor) -> None:
    """tl.store: write `values` where mask is True."""
    memory, positions = _memory(tensor, offsets, mask)
    mask = mask.expand_as(positions)
    memory[positions[mask]] = values.to(tensor.dtype)[mask]


def add(tensor: Tensor, offsets: Tensor, values: Tensor, mask: Tensor) -> None:
    """tl.atomic_add: add `values` to what is there, where mask is True."""
    store(tensor, offsets, load(tensor, offsets, mask) + values, mask)


def _memory(tensor: Tensor, offsets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The stretch of memory in which a tensor lies, as one long row, and positions in it."""
    numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((numbers,), (1,), 0), torch.where(mask, offsets + tensor.storage_offset(), 0)

# %% exercise="flash_kernel_twin"
def flash_forward_program(
    tile: int, head: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
    block_q: int, block_k: int,
) -> None:
    """Program (tile, head) of the kernel: block_q queries of one head against the keys that they see."""
    heads, queries, dim = q.shape
    keys, group, scale = k.shape[1], heads // k.shape[0], 1 / math.sqrt(dim)
    ### BEGIN SOLUTION
    row = tile * block_q + torch.arange(block_q, device=q.device)
    dims = torch.arange(dim, device=q.device)
    q_at = head * q.stride(0) + row[:, None] * q.stride(1) + dims * q.stride(2)
    q_tile = load(q, q_at, row[:, None] < queries).float()
    peak = torch.full([block_q], -math.inf, device=q.device)
    total = torch.zeros([block_q], device=q.device)
    acc = torch.zeros([block_q, dim], device=q.device)
    for start in range(0, keys, block_k):
        key = start + torch.arange(block_k, device=q.device)
        inside = key[:, None] < keys
        k_at = head // group * k.stride(0) + key[:, None] * k.stride(1) + dims * k.stride(2)
        v_at = head // group * v.stride(0) + key[:, None] * v.stride(1) + dims * v.stride(2)
        scores = q_tile @ load(k, k_at, inside).float().T * scale
        visible = key < keys
        if causal:
            visible = visible & (key <= row[:, None] + keys - queries)
        scores = torch.where(visible, scores, -math.inf)
        higher = torch.maximum(peak, scores.amax(dim=1))
        safe = torch.where(higher == -math.inf, 0.0, higher)
        weights = torch.exp(scores - safe[:, None])
        shrink = torch.exp(peak - safe)
        total = total * shrink + weights.sum(dim=1)
        acc = acc * shrink[:, None] + weights @ load(v, v_at, inside).float()
        peak = higher
    total = torch.where(total == 0, 1.0, total)
    out_at = head * out.stride(0) + row[:, None] * out.stride(1) + dims * out.stride(2)
    store(out, out_at, acc / total[:, None], row[:, None] < queries)
    store(lse, head * queries + row, peak + torch.log(total), row < queries)
    ### END SOLUTION


def flash_kernel_twin(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, block_q: int, block_k: int
) -> None:
    """Run the programs of `flash_kernel`'s grid one after the other, each by `flash_forward_program`.

    Arguments as in `flash_kernel`. A program computes with one tile at a time: no operation of PyTorch sees more
    numbers than a tile of scores or of keys has.
    """
    ### BEGIN SOLUTION
    for head in range(q.shape[0]):
        for tile in range(-(-q.shape[1] // block_q)):
            flash_forward_program(tile, head, q, k, v, out, lse, causal, block_q, block_k)
    ### END SOLUTION


# %% check="flash_kernel"
check("flash_kernel", flash_kernel, twin=flash_kernel_twin)

# %% [markdown]
# ### Measure it: how fast?
#
# The work of attention, forward, is $4\,h\,n\,m\,d$ operations (two products, a multiplication and an addition each),
# and half of it under a causal mask. Work divided by time is a rate that can be compared over lengths, and with the
# rate of a plain matrix product, which nothing on this device exceeds. The rivals are PyTorch's
# `scaled_dot_product_attention` with two of its backends, and the package flash-attn where it is installed. On a CPU
# there is no race to run: the next cell then checks your kernel against PyTorch in the interpreter, and says what a
# GPU would run.

# %% tags=["demo"] needs=["flash_kernel"]
from torch.nn.functional import scaled_dot_product_attention

from effnlp_lab.notebook.setting import unsolved

flash = flash_kernel_twin if unsolved("flash_kernel", globals()) or device.triton == "absent" else flash_kernel


def your_flash(q, k, v, causal, block_q=64, block_k=64):
    """Your kernel (or its twin) on [heads, length, dim], with outputs allocated."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=q.device)
    flash(q, k, v, out, lse, causal, block_q, block_k)
    return out


q, k, v = inputs(device.pick(fast=100, full=1000), dtype=torch.float32)
library = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
print(f"{flash.__name__}: largest difference from PyTorch in float64, {q.shape[1]} tokens, float32: "
      f"{(your_flash(q, k, v, True) - library).abs().max().item():.1e}")

# %% tags=["demo"] needs=["flash_kernel"]
import importlib.util

from effnlp_lab.device import ceilings
from effnlp_lab.notebook import bench


def contestants(q, k, v, causal):
    """name -> function, for [heads, length, dim] on a GPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch = [x[None] for x in (q, k, v)]

    def library(backend):
        def run():
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(*batch, is_causal=causal)
        return run

    found = {"the kit's kernel": lambda: room.flash_attention(*batch, causal=causal),
             "PyTorch, flash": library(SDPBackend.FLASH_ATTENTION),
             "PyTorch, cuDNN": library(SDPBackend.CUDNN_ATTENTION)}
    if flash is flash_kernel and device.triton == "compiled":
        found["your kernel"] = lambda: your_flash(q, k, v, causal)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        rows = [x.transpose(1, 2).contiguous() for x in batch]
        found["flash-attn"] = lambda: flash_attn_func(*rows, causal=causal)
    usable = {}
    for name, run in found.items():
        try:
            run()
            usable[name] = run
        except Exception as error:  # a backend that this card lacks, or a tile too large for it
            print(f"{name} cannot run here: {(str(error) or type(error).__name__).splitlines()[0]}")
    return usable


def race(lengths, heads, dim):
    """TFLOP/s by length, causal and full, in one process, in turns."""
    for causal in (True, False):
        rates = {}
        for length in lengths:
            runs = contestants(*inputs(length, heads=heads, dim=dim), causal)
            work = 4 * heads * length * length * dim / (2 if causal else 1)
            missing = {} if "PyTorch, flash" in runs else {"PyTorch, flash": "cannot run here"}
            result = bench.compare(f"length {length}", runs, ours="the kit's kernel", peer="PyTorch, flash",
                                   unit="TFLOP/s", work=work, device=device, missing=missing, queued=True)
            for name in runs:
                rates.setdefault(name, {})[length] = result.figure(name)
        limit = ceilings(device).matmul_flops_per_second / 1e12
        kind = "causal" if causal else "full"
        figure, axes = plots.figure(f"Attention forward, {kind}", "length (tokens)", "TFLOP/s",
                                    caption=f"{heads} heads of {dim}, {DTYPE}; "
                                            f"a plain matrix product reaches {limit:.0f}")
        for (name, line), look in zip(rates.items(), plots.looks(len(rates))):
            axes.semilogx(list(line), list(line.values()), label=name, **look)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
        last = ", ".join(f"{name} {list(line.values())[-1]:.0f}" for name, line in rates.items())
        plots.show(figure, f"TFLOP/s of attention by length; at {lengths[-1]:,} tokens: {last}.")


if device.kind == "cuda" and device.triton == "compiled":
    race(device.pick(fast=[512, 1024, 2048], full=[512, 1024, 2048, 4096, 8192, 16384]), heads=16, dim=128)
else:
    print("No race on this device: Triton's interpreter checks a kernel and does not time it.\n"
          "On a GPU this cell plots TFLOP/s by length, causal and full, for your kernel, the kit's,\n"
          "PyTorch's flash and cuDNN backends, and flash-attn.")

# %% [markdown]
# The card is kept busy while Python starts the calls, so that they are timed as in a program that keeps it fed: alone, a
# short text would be over before Python had started the next call. But a short text has few tiles and leaves part of the
# card idle, so look at the right end of the plots. Where does the rest of the speed lie? Your kernel is complete and its
# memory traffic is right. The kit's kernel (`effnlp_lab/attention/kernels_forward.py`) does the same arithmetic and wins
# by scheduling: it computes `exp2` with the scale folded in, masks only the tiles that need it (stretch A), gives out the
# long tiles first, copies tiles while it computes, and has tile shapes for each architecture.
#
# ## 6. The backward pass
#
# For training we need $dQ, dK, dV$ from $dO$. Through the two products that is the usual rule; through the softmax,
# row by row, a weight's gradient $dP$ becomes
#
# $$dS = P \circ (dP - D), \qquad D_i = \sum_j P_{ij}\, dP_{ij},$$
#
# since raising one score takes weight from all the others. All five products:
#
# $$dV = P^\top dO, \qquad dP = dO\, V^\top, \qquad dQ = \tfrac{1}{\sqrt d}\, dS\, K, \qquad dK = \tfrac{1}{\sqrt d}\, dS^\top Q,
# \qquad S = \tfrac{1}{\sqrt d}\, Q K^\top .$$
#
# Autograd would have kept $P$, the $n \times m$ matrix that we took such pains not to write. Two remarks save us:
#
# 1. **Recompute.** $P_{ij} = e^{S_{ij} - \lambda_i}$, with the log-sum-exp that the forward pass returned. No
#    maximum, no running sum: one exponential, and the rectangle of weights is there again. (That is why flash
#    attention's backward pass makes five products where autograd makes four.)
# 2. **$D$ without $P$.** $D_i = \sum_j P_{ij}\, (dO_i \cdot V_j) = dO_i \cdot \sum_j P_{ij} V_j = dO_i \cdot O_i$. A
#    sum over all the keys has become a sum over $d$ numbers that we have.
#
# ### Exercise 6: the backward pass by recomputation
#
# *2 points, about 60 minutes, difficulty 4 of 5.*
#
# Two nested loops over tiles again. Each rectangle adds its share to one tile of $dQ$, one of $dK$ and one of $dV$.
# Here `lse` is natural for everybody. A query that saw nothing has `lse` $-\infty$ and gets gradient 0.
#
# <details><summary>Hint 1</summary>
#
# Before the loops: `delta = (out * d_out).sum(dim=2)` and three tensors of zeros, in float32. In the inner loop:
# weights, then `d_weights`, then `d_scores`, then three lines with `+=`.
# </details>
# <details><summary>Hint 2</summary>
#
# With rows `i : i + block_q` and columns `j : j + block_k`: the weights are `torch.exp(scores - lse[:, rows, None])`,
# and $dV$ of these columns gets `weights.transpose(1, 2) @ do_tile`. Which of the other two needs a transpose?
# </details>
# <details><summary>Hint 3</summary>
#
# Put the mask **after** the exponential, as `masked_fill(hidden, 0.0)`. Before it, a query that sees nothing would
# compute $-\infty - (-\infty)$. After it, $e^{s + \infty} = \infty$ is simply replaced by 0.
# </details>

# %% exercise="flash_backward"
def flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, causal: bool, block_q: int, block_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, one tile of scores at a time, the weights computed again from `lse`.

    q, out, d_out: [heads, queries, dim]; k, v: [heads, keys, dim]; float32 or float16; any lengths of at least 1
    lse: [heads, queries], float32: the natural logarithm of the sum of e^s over the keys that a query sees, -inf for none
    d_out: the gradient of the loss with respect to `out`, the output of the forward pass
    causal, block_q, block_k: as in `tiled_forward`
    Returns (dq, dk, dv), in the shapes and dtypes of q, k, v. A query that sees no key has gradient 0. Products and sums
    are float32.
    """
    ### BEGIN SOLUTION
    queries, keys, scale = q.shape[1], k.shape[1], 1 / math.sqrt(q.shape[2])
    delta = (out.float() * d_out.float()).sum(dim=2)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for j in range(0, keys, block_k):
        columns = slice(j, j + block_k)
        k_tile, v_tile = k[:, columns].float(), v[:, columns].float()
        key = torch.arange(j, j + k_tile.shape[1], device=q.device)
        for i in range(0, queries, block_q):
            rows = slice(i, i + block_q)
            q_tile, do_tile = q[:, rows].float(), d_out[:, rows].float()
            weights = torch.exp(q_tile @ k_tile.transpose(1, 2) * scale - lse[:, rows, None])
            if causal:
                position = torch.arange(i, i + q_tile.shape[1], device=q.device) + keys - queries
                weights = weights.masked_fill(key > position[:, None], 0.0)
            d_weights = do_tile @ v_tile.transpose(1, 2)
            d_scores = weights * (d_weights - delta[:, rows, None]) * scale
            dv[:, columns] += weights.transpose(1, 2) @ do_tile
            dk[:, columns] += d_scores.transpose(1, 2) @ q_tile
            dq[:, rows] += d_scores @ k_tile
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    ### END SOLUTION


# %% check="flash_backward"
check("flash_backward", flash_backward)

# %% [markdown]
# ### Measure it: what training keeps
#
# Between forward and backward pass autograd holds what it will need. For standard attention that includes the
# weights; for yours it is $Q, K, V, O$ and one number a query. Joined into one autograd function, your two halves are
# flash attention:

# %% tags=["demo"] needs=["tiled_forward", "flash_backward"]
from effnlp_lab import exercises
from effnlp_lab.notebook import setting

LSE_UNIT = math.log(2) if setting.variant_of(exercises.find("tiled_forward")[1])["lse"] == "base 2" else 1.0


class YourAttention(torch.autograd.Function):
    """Your forward and your backward pass, causal, for [heads, length, dim]."""

    @staticmethod
    def forward(ctx, q, k, v, block):
        out, lse = tiled_forward(q, k, v, True, block, block)
        ctx.save_for_backward(q, k, v, out, lse * LSE_UNIT)
        ctx.block = block
        return out

    @staticmethod
    def backward(ctx, d_out):
        return *flash_backward(*ctx.saved_tensors, d_out, True, ctx.block, ctx.block), None


# %% tags=["demo"] needs=["counted_attention", "tiled_forward", "flash_backward"]
def saved_bytes(attention, length):
    """Bytes that autograd keeps for the backward pass, inputs left out."""
    q, k, v = (x.requires_grad_() for x in inputs(length))
    mine = {x.untyped_storage().data_ptr() for x in (q, k, v)}
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attention(q, k, v)
    return sum(size for address, size in kept.items() if address not in mine)


print(f"{'length':>8}{'standard keeps':>18}{'yours keeps':>15}")
for length in device.pick(fast=[128, 256, 512], full=[512, 1024, 2048, 4096]):
    standard = saved_bytes(lambda q, k, v: counted_attention(q, k, v, True)[0], length)
    yours = saved_bytes(lambda q, k, v: YourAttention.apply(q, k, v, 128), length)
    print(f"{length:8,}{standard / 2**20:14.2f} MiB{yours / 2**20:11.2f} MiB")

# %% [markdown]
# ### Does a model learn the same?
#
# Exact means exact up to rounding, so a model trained with your attention must follow the same loss curve as one with
# PyTorch's, until many steps have made differences of rounding grow. The next cell trains a small model of Llama's shape
# on bytes of Python source, from the same weights and on the same batches: with `scaled_dot_product_attention`, with
# your two functions, and on a GPU with the kit's kernel as well.

# %% tags=["demo"] needs=["tiled_forward", "flash_backward"]
import statistics
import time

from effnlp_lab.course.text import load_text
from tqdm.auto import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

LENGTH, BATCH, STEPS = device.pick(fast=(64, 8, 25), full=(1024, 16, 200))
text = "".join(load_text("course-train", limit_bytes=device.pick(fast=300_000, full=8_000_000)).texts()).encode()
data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def your_interface(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Your attention as `transformers` calls it: batch and heads folded into one axis, key heads repeated."""
    batch, heads, length, dim = query.shape
    key, value = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (key, value))
    with torch.autocast(device.kind, enabled=False):  # float32 inside stays float32
        out = YourAttention.apply(*(x.flatten(0, 1) for x in (query, key, value)), max(64, length // 2))
    return out.unflatten(0, (batch, heads)).transpose(1, 2), None


def train(attention):
    """The loss after each step, and the seconds of a step: the median, as kernels are compiled in the first."""
    torch.manual_seed(0)
    hidden, layers = device.pick(fast=(64, 2), full=(256, 4))
    config = LlamaConfig(vocab_size=256, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
                         attn_implementation=attention)
    model = LlamaForCausalLM(config).to(device.torch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(1)
    losses, times = [], [time.perf_counter()]
    for _ in tqdm(range(STEPS), desc=attention, leave=False):
        starts = torch.randint(len(data) - LENGTH, (BATCH, 1), generator=order)
        tokens = data[starts + torch.arange(LENGTH)].to(device.torch)
        with torch.autocast(device.kind, dtype=torch.bfloat16, enabled=device.kind == "cuda" and not device.fast):
            loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter())
    return losses, statistics.median(after - before for before, after in zip(times, times[1:]))


AttentionInterface.register("yours", your_interface)
names = {"PyTorch": "sdpa", "yours": "yours"}
if device.triton == "compiled":
    from effnlp_lab import attention as room

    names["the kit's kernel"] = room.register_with_transformers()
curves = {label: train(name) for label, name in names.items()}

first, last = curves["PyTorch"][0][0], curves["PyTorch"][0][-1]
apart = max(abs(a - b) for label in curves for a, b in zip(curves["PyTorch"][0], curves[label][0]))
figure, axes = plots.figure("Training with either attention", "step", "loss (nats a byte)",
                            caption=f"At most {apart:.1g} nats apart ({LENGTH} tokens, batch {BATCH}).")
for number, ((label, (losses, _)), look) in enumerate(zip(curves.items(), plots.looks(len(curves)))):
    axes.plot(range(1, STEPS + 1), losses, label=label, **{**look, "marker": ""}, linewidth=5 - 1.7 * number)
axes.legend()
plots.show(figure, f"Loss against step for {' and '.join(curves)}: at most {apart:.1g} nats apart, "
                   f"from {first:.2f} to {last:.2f}.")
print(f"Loss {first:.3f} -> {last:.3f}; the curves are at most {apart:.1e} apart.")
for label, (_, seconds) in curves.items():
    print(f"  {label:18} {1000 * seconds:7.1f} ms a step")

# %% [markdown]
# ## Stretch A: skip what the causal mask hides
#
# *A badge, about 20 minutes, difficulty 2 of 5.*
#
# Under a causal mask nearly half of the rectangles are hidden altogether, and of the rest most are seen altogether:
# only those on the diagonal need a mask. A kernel that knows this does half the work, and spares the comparison in
# most of what remains.

# %% tags=["demo"]
from matplotlib.patches import Patch, Rectangle

from effnlp_lab import attention as room


def draw_tiles(queries, keys, block):
    """A picture of the tiles of a causal pass: full, masked, skipped."""
    seen = room.visible(queries, keys, causal=True)
    kinds = [[2 if tile.all() else 1 if tile.any() else 0 for tile in rows.split(block, dim=1)]
             for rows in seen.split(block)]
    shown = [(plots.COLOURS["blue"], "full: no mask needed"), (plots.COLOURS["orange"], "on the diagonal: masked"),
             ("#EEEEEE", "hidden: skipped")]
    figure, axes = plots.figure(f"{queries} queries, {keys} keys, tiles of {block} x {block}", "tile of keys",
                                "tile of queries", caption="Only the orange tiles need a mask.")
    for i, row in enumerate(kinds):
        for j, kind in enumerate(row):
            axes.add_patch(Rectangle((j, i), 1, 1, facecolor=shown[2 - kind][0], edgecolor="white", linewidth=2))
            axes.text(j + 0.5, i + 0.5, ("skip", "mask", "full")[kind], ha="center", va="center", fontsize=8,
                      color="white" if kind == 2 else "black")
    axes.set_xlim(0, len(kinds[0]))
    axes.set_ylim(len(kinds), 0)
    axes.set_aspect("equal")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(handles=[Patch(color=colour, label=label) for colour, label in shown], fontsize=8, loc="center left",
                bbox_to_anchor=(1.02, 0.5))
    count = [sum(row.count(kind) for row in kinds) for kind in (2, 1, 0)]
    plots.show(figure, f"A grid of tiles, lower left half computed: {count[0]} tiles are full, {count[1]} on the "
                       f"diagonal are masked, {count[2]} are skipped.")


draw_tiles(512, 512, 64)

# %% [markdown]
# For each tile of queries say how many tiles of keys are full and how many are visited. A kernel then loops twice:
# from 0 to `full` without a mask, from `full` to `visited` with it. Mind the two positions that matter: the **first**
# query of the tile sees the least, the **last** one (of those that exist) sees the most.
#
# <details><summary>Hint 1</summary>
#
# Query $i$ sees $i + m - n + 1$ keys, counted from key 0 (none if that is negative). How many whole tiles is that,
# and how many when a part counts too?
# </details>
# <details><summary>Hint 2</summary>
#
# `count // block_k` rounds down, `-(-count // block_k)` rounds up. The last query of a ragged tile is `queries - 1`.
# </details>

# %% exercise="tile_plan"
def tile_plan(queries: int, keys: int, block_q: int, block_k: int) -> list[tuple[int, int]]:
    """Which tiles a causal pass visits.

    queries, keys: lengths of at least 1, in any relation; query i sees the keys 0 to i + keys - queries
    Returns one pair (full, visited) for each tile of block_q queries, in order (the last may be ragged):
    visited: how many tiles of block_k keys, counted from key 0, hold a key that at least one query of the tile sees
    full: how many tiles of block_k keys, counted from key 0, need no mask: all their block_k keys exist, and every query
        of the tile sees all of them
    """
    ### BEGIN SOLUTION
    plan = []
    for first in range(0, queries, block_q):
        last = min(first + block_q, queries) - 1
        all_see = max(0, first + keys - queries + 1)
        one_sees = max(0, last + keys - queries + 1)
        plan.append((all_see // block_k, -(-one_sees // block_k)))
    return plan
    ### END SOLUTION


# %% check="tile_plan"
check("tile_plan", tile_plan)

# %% tags=["demo", "nbval-check-output"] needs=["tile_plan"]
print(f"{'length':>8}{'tiles':>8}{'visited':>9}{'masked':>8}{'work saved':>12}")
for length in (512, 2048, 8192):
    plan = tile_plan(length, length, 64, 64)
    tiles, visited, full = (length // 64) ** 2, sum(v for _, v in plan), sum(f for f, _ in plan)
    print(f"{length:8,}{tiles:8,}{visited:9,}{visited - full:8,}{1 - visited / tiles:12.1%}")

# %% [markdown]
# ## Stretch B: a sliding window
#
# *A badge, about 35 minutes, difficulty 3 of 5.*
#
# Flash attention made memory linear; time is still quadratic. A **sliding window** (Beltagy et al., 2020; Mistral 7B)
# makes both linear: every query sees the last $W$ keys alone. Layers stacked on each other still reach far back, $W$
# tokens a layer.
#
# Off-by-one errors live here, because libraries count differently. In this kit, as in Mistral's code, a window of $W$
# holds **$W$ keys, the query's own included**: query at position $p$ sees $p - W + 1$ to $p$. In flash-attn,
# `window_size=(W, 0)` counts the keys to the left of the own one, and so shows $W + 1$ keys: say `(W - 1, 0)` there.

# %% tags=["demo"]
from effnlp_lab import attention as room

patterns = {"full, causal": {}, "sliding window": {"window": 6}, "dilated window": {"window": 4, "dilation": 3},
            "window and global tokens": {"window": 5, "global_tokens": 2}}
figure, axes = plots.figure("Which keys a query sees (Beltagy et al., 2020)", "key", "query",
                            caption="Dark: seen. Every pattern has 20 queries and 20 keys.")
figure.set_size_inches(7.4, 2.9)
picture = torch.ones(20, 23 * len(patterns) - 3)
for number, pattern in enumerate(patterns.values()):
    picture[:, 23 * number : 23 * number + 20] = 0.85 - 0.7 * room.visible(20, 20, causal=True, **pattern).float()
axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
axes.grid(visible=False)
axes.set_xticks([23 * number + 10 for number in range(len(patterns))], list(patterns))
axes.set_yticks([])
plots.show(figure, "Four causal patterns of 20 queries and 20 keys: the full triangle, a band along the diagonal, "
                   "a band with gaps, and a band with two columns that everybody sees.")

# %% [markdown]
# Take `block` queries at a time. They need a stretch of at most `block + window - 1` keys: slice it out, mask its
# corners, and use a plain softmax on it. The check counts operations: to compute the whole square and mask it is over
# budget.
#
# <details><summary>Hint 1</summary>
#
# The queries `i` to `i + block - 1` stand at positions `i + offset` and on, with `offset = keys - queries`. The first
# of them sees back to `i + offset - window + 1`, the last one up to its own position. A slice must not begin below 0.
# </details>
# <details><summary>Hint 2</summary>
#
# With `distance = position[:, None] - key`, hidden is `(distance < 0) | (distance >= window)`. The numbers of the
# keys in the slice begin where the slice begins.
# </details>

# %% exercise="window_attention"
def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, block: int) -> Tensor:
    """Causal attention in which every query sees `window` keys: its own and the window - 1 before it.

    q: [heads, queries, dim]; k, v: [heads, keys, dim], with keys >= queries; float32
    window: at least 1, possibly more than there are keys; query i stands at position p = i + keys - queries and sees
        the keys from max(0, p - window + 1) to p
    block: queries to take at a time; the keys of a step are at most block + window - 1
    Returns [heads, queries, dim].
    """
    ### BEGIN SOLUTION
    out = torch.empty_like(q)
    offset = k.shape[1] - q.shape[1]
    for i in range(0, q.shape[1], block):
        q_tile = q[:, i : i + block]
        position = torch.arange(i, i + q_tile.shape[1], device=q.device) + offset
        near = slice(max(0, i + offset - window + 1), i + offset + q_tile.shape[1])
        distance = position[:, None] - torch.arange(near.start, near.stop, device=q.device)
        scores = q_tile @ k[:, near].transpose(1, 2) / math.sqrt(q.shape[2])
        scores = scores.masked_fill((distance < 0) | (distance >= window), -math.inf)
        out[:, i : i + block] = torch.softmax(scores, dim=2) @ v[:, near]
    return out
    ### END SOLUTION


# %% check="window_attention"
check("window_attention", window_attention)

# %% tags=["demo", "nbval-check-output"] needs=["window_attention"]
from effnlp_lab.notebook.meter import measure

print("operations in millions, one head of 16, window 64")
for length in (256, 512, 1024):
    q, k, v = (torch.ones(1, length, 16) for _ in range(3))
    usage = measure(window_attention, q, k, v, 64, 64)[1]
    print(f"{length:6,} tokens: window {usage.flops / 1e6:6.2f}, full square {4 * length * length * 16 / 1e6:7.2f}")

# %% [markdown]
# ## Stretch C: memory-efficient attention by checkpoints
#
# *A badge, about 30 minutes, difficulty 3 of 5.*
#
# Before flash attention's kernels there was a way to linear memory with no kernel at all (Rabe and Staats, 2021; the
# memory-efficient attention of xFormers grew out of it). Take a chunk of queries, do standard attention for it, and
# keep nothing for the backward pass but the inputs: `torch.utils.checkpoint` runs the chunk again when its gradient
# is asked for. It is the idea of exercise 6 with autograd doing the algebra.
#
# Two blanks: attention of one chunk, and the loop that checkpoints each chunk. Here softmax is PyTorch's own, maximum
# included.
#
# <details><summary>Hint 1</summary>
#
# `checkpoint(attend, q_chunk, k, v, first, use_reentrant=False)` is like `attend(q_chunk, k, v, first)`, but keeps
# only the arguments. Join the chunks with `torch.cat`.
# </details>
# <details><summary>Hint 2</summary>
#
# Anything quadratic that is made **outside** `attend` stays alive, a mask [queries, keys] too: make the chunk's mask
# inside, from `first`.
# </details>

# %% exercise="chunked_attention"
def chunked_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, chunk: int) -> Tensor:
    """Attention whose forward and whose backward pass both hold at most chunk x keys scores a head.

    q: [heads, queries, dim]; k, v: [heads, keys, dim], with keys >= queries; float32; they may require gradients
    causal: whether query i sees only the keys 0 to i + keys - queries
    chunk: queries to take at a time, at least 1
    Returns [heads, queries, dim], through which autograd computes the gradients of q, k and v.
    """
    from torch.utils.checkpoint import checkpoint

    offset = k.shape[1] - q.shape[1]

    def attend(q_chunk: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        """Standard attention of the queries from number `first` on."""
        ### BEGIN SOLUTION
        scores = q_chunk @ k.transpose(1, 2) / math.sqrt(q_chunk.shape[2])
        if causal:
            position = torch.arange(first, first + q_chunk.shape[1], device=q.device) + offset
            key = torch.arange(k.shape[1], device=q.device)
            scores = scores.masked_fill(key > position[:, None], -math.inf)
        return torch.softmax(scores, dim=2) @ v
        ### END SOLUTION

    ### BEGIN SOLUTION
    firsts = range(0, q.shape[1], chunk)
    chunks = [checkpoint(attend, q[:, i : i + chunk], k, v, i, use_reentrant=False) for i in firsts]
    return torch.cat(chunks, dim=1)
    ### END SOLUTION


# %% check="chunked_attention"
check("chunked_attention", chunked_attention)

# %% tags=["demo"] needs=["counted_attention", "chunked_attention"]
from effnlp_lab.notebook.memory import counted_peak


def forward_and_backward(attention, length):
    q, k, v = (torch.randn(2, length, 32, requires_grad=True) for _ in range(3))
    return lambda: attention(q, k, v).sum().backward()


print(f"{'length':>8}{'standard':>14}{'chunks of 64':>16}   (forward and backward, counted)")
for length in (256, 512, 1024):
    standard = counted_peak(forward_and_backward(lambda q, k, v: counted_attention(q, k, v, True)[0], length))
    chunked = counted_peak(forward_and_backward(lambda q, k, v: chunked_attention(q, k, v, True, 64), length))
    print(f"{length:8,}{standard / 2**20:10.2f} MiB{chunked / 2**20:12.2f} MiB")

# %% [markdown]
# ## Stretch D: the backward pass as a kernel
#
# *A badge, about 75 minutes, difficulty 5 of 5.*
#
# Who adds up what? A program that owns a tile of **keys** can sum $dK$ and $dV$ on the chip while it walks over the
# queries, but then every program of a head has a share of each $dQ$. One way is to let them add to memory with
# `tl.atomic_add`, which does one addition at a time. It is short, and the order of the additions, and with it the
# last bit of $dQ$, changes from run to run. The other is two passes, the second one by tiles of queries:
# deterministic, with the products $S$ and $dP$ computed twice. The kit's kernel does the latter.
#
# Write the one-pass kernel, a program for each tile of keys and each head. $D$ comes in as `delta`; `dq` is float32
# and starts as zeros. All tensors are contiguous, so that the offset of $k[h, j, c]$ is
# $(h \cdot m + j) \cdot d + c$. Two passes are right as well, with kernels of your own.
#
# <details><summary>Hint 1</summary>
#
# Turn the loops of exercise 6 around in your mind: the program's tile of keys is fixed, and
# `range(0, queries, BLOCK_Q)` walks over the queries. Load k and v once, before the loop.
# </details>
# <details><summary>Hint 2</summary>
#
# Rows past the end are loaded as 0, `lse` and `delta` too: then their weights are 1, but `d_out` and `q` are 0 there,
# and so are all their shares. Keys past the end need the mask in the weights.
# </details>
# <details><summary>Hint 3</summary>
#
# Products of half-precision tiles want both factors in that dtype: `d_scores.to(q.dtype)`, `weights.to(d_out.dtype)`.
# The transposes: `tl.trans(weights)` for dv, `tl.trans(d_scores)` for dk, none for dq.
# </details>

# %% exercise="backward_kernel"
@triton.jit
def flash_backward_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    queries, keys, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Program (tile, head): BLOCK_K keys of one head against all queries; its shares of dq are added to memory."""
    ### BEGIN SOLUTION
    tile, head = tl.program_id(0), tl.program_id(1)
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, DIM)
    k_at = (head * keys + key[:, None]) * DIM + dims[None, :]
    k = tl.load(k_ptr + k_at, mask=key[:, None] < keys, other=0.0)
    v = tl.load(v_ptr + k_at, mask=key[:, None] < keys, other=0.0)
    dk = tl.zeros([BLOCK_K, DIM], tl.float32)
    dv = tl.zeros([BLOCK_K, DIM], tl.float32)
    for start in range(0, queries, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        q_at = (head * queries + row[:, None]) * DIM + dims[None, :]
        q = tl.load(q_ptr + q_at, mask=row[:, None] < queries, other=0.0)
        d_out = tl.load(d_out_ptr + q_at, mask=row[:, None] < queries, other=0.0)
        lse = tl.load(lse_ptr + head * queries + row, mask=row < queries, other=0.0)
        delta = tl.load(delta_ptr + head * queries + row, mask=row < queries, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        visible = key[None, :] < keys
        if CAUSAL:
            visible = visible & (key[None, :] <= row[:, None] + keys - queries)
        weights = tl.where(visible, tl.exp(scores - lse[:, None]), 0.0)
        d_weights = tl.dot(d_out, tl.trans(v), input_precision="ieee")
        d_scores = (weights * (d_weights - delta[:, None]) * scale).to(q.dtype)
        dv += tl.dot(tl.trans(weights).to(d_out.dtype), d_out, input_precision="ieee")
        dk += tl.dot(tl.trans(d_scores), q, input_precision="ieee")
        tl.atomic_add(dq_ptr + q_at, tl.dot(d_scores, k, input_precision="ieee"), mask=row[:, None] < queries)
    tl.store(dk_ptr + k_at, dk, mask=key[:, None] < keys)
    tl.store(dv_ptr + k_at, dv, mask=key[:, None] < keys)
    ### END SOLUTION


def backward_kernel(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    causal: bool, block_q: int, block_k: int,
) -> None:
    """Launch one program for each tile of block_k keys of each head; they write `dk` and `dv` and add to `dq`.

    q, d_out: [heads, queries, dim]; k, v, dk, dv: [heads, keys, dim], one dtype; lse, delta: [heads, queries], float32,
        lse natural, delta the sum of d_out * out over dim; dq: [heads, queries, dim], float32, zeros when you get it
    All contiguous. causal, block_q, block_k and dim as in `flash_kernel`.
    """
    ### BEGIN SOLUTION
    heads, queries, dim = q.shape
    grid = (triton.cdiv(k.shape[1], block_k), heads)
    flash_backward_kernel[grid](
        q, k, v, d_out, lse, delta, dq, dk, dv,
        queries, k.shape[1], 1 / math.sqrt(dim), causal, dim, block_q, block_k,
    )
    ### END SOLUTION

# %% [markdown]
# ### The twin of the backward kernel
#
# As before: the same programs with `load`, `store` and, for `tl.atomic_add`, `add`. Skip it if you solved the kernel.

# %% exercise="backward_kernel_twin"
def flash_backward_program(
    tile: int, head: int, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, causal: bool, block_q: int, block_k: int,
) -> None:
    """Program (tile, head) of the kernel: block_k keys of one head against all queries."""
    queries, keys, dim, scale = q.shape[1], k.shape[1], q.shape[2], 1 / math.sqrt(q.shape[2])
    ### BEGIN SOLUTION
    key = tile * block_k + torch.arange(block_k, device=q.device)
    dims = torch.arange(dim, device=q.device)
    k_at = (head * keys + key[:, None]) * dim + dims
    inside = key[:, None] < keys
    k_tile, v_tile = load(k, k_at, inside).float(), load(v, k_at, inside).float()
    dk_tile, dv_tile = torch.zeros_like(k_tile), torch.zeros_like(v_tile)
    for start in range(0, queries, block_q):
        row = start + torch.arange(block_q, device=q.device)
        there = row[:, None] < queries
        q_at = (head * queries + row[:, None]) * dim + dims
        q_tile, do_tile = load(q, q_at, there).float(), load(d_out, q_at, there).float()
        lse_tile = load(lse, head * queries + row[:, None], there)
        delta_tile = load(delta, head * queries + row[:, None], there)
        visible = key < keys
        if causal:
            visible = visible & (key <= row[:, None] + keys - queries)
        weights = torch.where(visible, torch.exp(q_tile @ k_tile.T * scale - lse_tile), 0.0)
        d_scores = weights * (do_tile @ v_tile.T - delta_tile) * scale
        dv_tile += weights.T @ do_tile
        dk_tile += d_scores.T @ q_tile
        add(dq, q_at, d_scores @ k_tile, there)
    store(dk, k_at, dk_tile, inside)
    store(dv, k_at, dv_tile, inside)
    ### END SOLUTION


def backward_kernel_twin(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    causal: bool, block_q: int, block_k: int,
) -> None:
    """Run the programs of `backward_kernel`'s grid one after the other, each by `flash_backward_program`.

    Arguments as in `backward_kernel`. No operation of PyTorch sees more numbers than a tile of scores or of keys has.
    """
    ### BEGIN SOLUTION
    for head in range(q.shape[0]):
        for tile in range(-(-k.shape[1] // block_k)):
            flash_backward_program(
                tile, head, q, k, v, d_out, lse, delta, dq, dk, dv, causal, block_q, block_k
            )
    ### END SOLUTION


# %% check="backward_kernel"
check("backward_kernel", backward_kernel, twin=backward_kernel_twin)

# %% tags=["demo"] needs=["flash_kernel", "backward_kernel"]
by_twin = unsolved("backward_kernel", globals()) or device.triton == "absent"
backward = backward_kernel_twin if by_twin else backward_kernel
q, k, v = (x.requires_grad_() for x in inputs(device.pick(fast=70, full=500), dtype=torch.float32, heads=2, dim=32))
d_out = torch.randn_like(q)
plain = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
library = torch.autograd.grad(plain, (q, k, v), d_out.double())
with torch.no_grad():
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=q.device)
    flash(q, k, v, out, lse, True, 32, 32)
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    backward(q, k, v, d_out, lse, (out * d_out).sum(dim=2), dq, dk, dv, True, 32, 32)
for name, mine, theirs in zip(("dq", "dk", "dv"), (dq, dk, dv), library):
    print(f"{name}: largest difference from PyTorch's autograd in float64: {(mine - theirs).abs().max().item():.1e}")

# %% [markdown]
# ## The receipt
#
# One and the same work for all: causal attention, forward. Quality is the largest error against float64. Bytes moved
# are counted by the meter for what PyTorch's operations move, and by the formulas of this lab for kernels, which the
# meter does not see into: every tile of 64 queries (128 in the kit's) reads its keys and values once. What skips
# hidden tiles reads and computes half of the square, and your kernel is taken to walk over all of it. The limit is
# what this device cannot beat: the work at the rate of a plain matrix product, or the necessary bytes at the rate of
# a copy, whichever takes longer. Times are of single calls, with what it takes to start them from Python. On a fast GPU
# that is most of the time of a kernel: who is faster, the plots of section 5 tell at their longer lengths.

# %% tags=["demo"] needs=["counted_attention", "tiled_forward", "flash_kernel"]
from effnlp_lab.device import ceilings
from effnlp_lab.notebook.meter import measure
from effnlp_lab.notebook.receipt import Receipt

length, heads, dim = device.pick(fast=(256, 2, 32), full=(4096, 16, 64))
q, k, v = inputs(length, heads=heads, dim=dim)
right = scaled_dot_product_attention(q[:2].double(), k[:2].double(), v[:2].double(), is_causal=True)
square = 4 * heads * length * length * dim  # operations over the whole square; a causal pass needs half of them


def flash_bytes(block_q, skips):
    """Q and O once, K and V once for each tile of queries, or half of that on average where hidden tiles are skipped."""
    tiles = math.ceil(length / block_q)
    return (2 * length + (tiles + 1 if skips else 2 * tiles) * length) * dim * heads * q.element_size()


def costs(run, bytes_moved=None, flops=None):
    """What one way costs: by the meter, or as given for a kernel, whose time is then that of the GPU alone."""
    run()  # compiles
    seconds = sorted(bench.timed(run, device, queued=bytes_moved is not None) for _ in range(3))[1]
    out, usage = measure(run)
    peak = peak_bytes(lambda *_: run(), length) if device.kind == "cuda" else usage.peak_bytes
    error = (out[:2].double() - right).abs().max().item()
    return {"quality": error, "peak_bytes": peak, "bytes_moved": bytes_moved or usage.bytes_moved,
            "flops": flops or usage.flops, "seconds": seconds}


batch = [x[None] for x in (q, k, v)]
receipt = Receipt("06", quality="largest error", device=device,
                  title=f"Causal attention forward: {heads} heads of {dim}, {length:,} tokens, {DTYPE}")
receipt.add("baseline", "standard", **costs(lambda: counted_attention(q, k, v, True)[0]))
receipt.add("yours", "tiles in PyTorch", **costs(lambda: tiled_forward(q, k, v, True, 128, 128)[0]))
interpreted = "" if device.triton == "compiled" else "Triton's interpreter, not a time"
by_kernel = flash is flash_kernel
yours = costs(lambda: your_flash(q, k, v, True), *((flash_bytes(64, False), square) if by_kernel else ()))
receipt.add("yours", "kernel" if by_kernel else "twin", **yours,
            note=interpreted if by_kernel else "PyTorch operations")
if device.triton != "absent":
    reference = costs(lambda: room.flash_attention(*batch, causal=True)[0], flash_bytes(128, True), square / 2)
    receipt.add("reference", "the kit's kernel", **reference, note=interpreted)
library = costs(lambda: scaled_dot_product_attention(*batch, is_causal=True)[0], flash_bytes(128, True), square / 2)
receipt.add("library", "PyTorch", **library)
if device.kind == "cuda" and importlib.util.find_spec("flash_attn"):
    from flash_attn import flash_attn_func

    rows = [x.transpose(1, 2).contiguous() for x in batch]
    library = costs(lambda: flash_attn_func(*rows, causal=True)[0].transpose(0, 1), flash_bytes(128, True), square / 2)
    receipt.add("library", "flash-attn", **library)
best = ceilings(device)
necessary = 4 * length * dim * heads * q.element_size()
receipt.add("limit", "matrix product or copy", bytes_moved=necessary, flops=square / 2,
            seconds=max(square / 2 / best.matmul_flops_per_second, necessary / best.copy_bytes_per_second))
receipt.show()
print("Saved as", receipt.save().name)

# %% [markdown]
# ## In your own words
#
# Flash attention does more arithmetic than the standard way, and is faster. Explain this to somebody who compares
# algorithms by their FLOPs. Then name a case in which it would gain nothing, or hardly anything.
#
# Write 60 to 120 words. A person reads and grades them.

# %% [markdown] written="more_operations"
# **Rubric, for whoever grades** (shares of the points; another answer as good earns them too)
#
# - 0.4: the time goes into moving scores and weights to the GPU's memory and back; arithmetic waits for it.
# - 0.3: tiles and the running maximum keep the scores on the chip; the backward pass computes them again, which
#   costs operations and saves bytes.
# - 0.3: a sound case: short sequences, where the square is small; decoding with one query, which reads K and V
#   once anyway; a step whose time is in the linear layers.

# %% [markdown]
# ## What you have learned
#
# - Standard attention moves $4nm$ numbers a head that nobody wants, and waits for memory. Fewer bytes is less time,
#   even at the price of more operations.
# - A softmax can be taken piece by piece: carry the maximum, the sum and the output, and change the unit when the
#   maximum grows. Two finished pieces merge by their log-sum-exps, in any order.
# - In tiles, memory is linear in the length, and the answer is the same: flash attention is exact.
# - The backward pass keeps one number a query and computes the weights again. $D = dO \cdot O$ replaces a sum over
#   all keys.
# - The edges are where attention goes wrong without a word: the alignment of the mask, ragged tiles scored 0, rows
#   that see nothing, windows off by one, TF32.
#
# ## Read on
#
# - M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018: algorithm 3 is the heart of
#   your `online_softmax`.
# - M. Rabe, C. Staats, "Self-attention Does Not Need O(n²) Memory", 2021: stretch C, with the keys in chunks too.
# - T. Dao, D. Fu, S. Ermon, A. Rudra, C. Ré, "FlashAttention: Fast and Memory-Efficient Exact Attention with
#   IO-Awareness", 2022: the paper, with the traffic in theorem 2. Its loops run over the keys outside and the queries
#   inside.
# - T. Dao, "FlashAttention-2", 2023: the loops turned around, as you wrote them; algorithms 1 and 2 are exercises 4
#   and 6.
# - J. Shah et al., "FlashAttention-3", 2024: what Hopper's asynchronous hardware adds.
# - I. Beltagy, M. Peters, A. Cohan, "Longformer", 2020: windows, dilated windows and global tokens.
# - H. Liu, M. Zaharia, P. Abbeel, "Ring Attention with Blockwise Transformers", 2023: exercise 3 between GPUs.
# - In the kit: `effnlp_lab/attention/standard.py` is the definition, `tiled.py` the forward and backward pass in
#   PyTorch, `kernels_forward.py` and `kernels_backward.py` the fast ones. Lab 07 goes on with one query and a cache
#   in pages.
