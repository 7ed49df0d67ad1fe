# %% [markdown]
# # Lab 05: Quantization and GPTQ
#
# A language model that writes one token reads every one of its weights, and multiplies each of them once. Reading is
# the slow part. So a weight of 4 bits in place of 16 saves three quarters of the memory, and, where the code that
# multiplies is good, nearly as much of the time. What it costs is exactness, and the whole art is to pay little: to
# choose the grid well, and to round in such a way that the errors of one weight are made up for by the others.
#
# The second idea is **GPTQ** (Frantar et al., 2022), which brought models of 175 billion weights onto one GPU. It is
# least squares, a matrix inverse, and a loop over columns. You build it twice: as it is derived, and as it is run.
#
# | | exercise | points | minutes | difficulty |
# |---|---|---|---|---|
# | 1 | `int8_product`: products of int8 codes | 1 | 25 | 2 of 5 |
# | 2 | `round_to_nearest`: round to nearest, by group | 1.5 | 40 | 2 of 5 |
# | 3 | `calibration_hessian`: the Hessian from calibration data | 1 | 25 | 2 of 5 |
# | 4 | `gptq_columns`: GPTQ, column by column | 2.5 | 60 | 4 of 5 |
# | 5 | `gptq_blocks`: GPTQ in blocks, with a Cholesky factor | 2.5 | 60 | 4 of 5 |
# | 6 | `Int4Weight`: two codes in a byte | 1.5 | 45 | 3 of 5 |
# | stretch | `act_order`: the order of the columns | badge | 30 | 3 of 5 |
# | stretch | `pack_int3`: eight codes in three bytes | badge | 30 | 3 of 5 |
# | stretch | `blockwise_state`: optimizer state in 8 bits | badge | 30 | 2 of 5 |
# | stretch | `find_outliers`: SpQR's outliers | badge | 40 | 4 of 5 |
#
# **Time.** About five hours: the core exercises, the reading and the measurements. Stretch exercises come on top.
#
# **You need** PyTorch's modules, least squares and matrix inverses, and what perplexity is. A laptop is enough: the
# model of this lab has 7 million weights. A GPU shows besides what low bits do for time.
#
# **How a check works.** Under each blank stands one call, `check(...)`. It runs your function on fresh random cases,
# compares with a reference that works in float64, and says what went wrong, by name where it recognises the slip.
# Codes are compared exactly: the cases leave room around the points where rounding could go either way, so the order
# in which you add things up does not matter.
#
# {assistants} GPTQ is an algorithm of which wrong versions still lower the error; an assistant hands them out too, and
# what you are here for is to be able to tell.
#
# **Libraries.** This kit's own quantization and bitsandbytes are refused inside your answers; the demos compare with
# them.

# %% tags=["parameters"]
DEVICE = "auto"
FAST = "auto"

# %%
import effnlp_lab
from effnlp_lab import check

import math
from collections.abc import Iterator

import torch
from torch import Tensor

device = effnlp_lab.start("05_quantization_gptq", device=DEVICE, fast=FAST)

# %% [markdown]
# ## 1. Integers that stand for numbers
#
# **Affine quantization** lets an integer code $q$ stand for the real number
#
# $$x = s\,(q - z),$$
#
# with a scale $s$, a float, and a zero point $z$, the integer that stands for 0. Both are shared by many codes: here
# by a row of a matrix. Zeros are common (padding, what ReLU leaves), and a zero point makes them exact.
#
# A product of two such matrices is a product of **integers**, and the scales come in at the end:
#
# $$\sum_k x_{ik}\, y_{jk} = s_i\, s_j \sum_k (q_{ik} - z_i)(q_{jk} - z_j).$$
#
# Integer units are small, so a chip has many of them: an H100 multiplies int8 at twice the rate of bf16. But where
# does the sum go? The lecture has this table:
#
# | data type | accumulates to |
# |---|---|
# | float16 | float16 |
# | bfloat16 | float32 |
# | int16 | int32 |
# | int8 | int32 |

# %% tags=["nbval-check-output"]
most = torch.tensor([127], dtype=torch.int8)
print("127 + 127 in int8: ", (most + most).item())
print("127 * 127 in int8: ", (most * most).item())
print("127 * 127 in int32:", (most.int() * most.int()).item())

# %% [markdown]
# PyTorch says nothing when an integer overflows. How much room is needed? A code minus its zero point needs 9 bits, a
# product of two of those 17 with its sign, and a sum of $k$ of them $\log_2 k$ more: even a short row overflows
# int16. Float16 ends at 65,504 and loses whole numbers from 2,048 on, float32 from $2^{24}$ on. Int32 is exact up to
# $2^{31} / 255^2$, a row of 33,000 codes. (The table's first row is what hardware **can** do, and not what
# one wants: libraries sum float16 products in float32.)
#
# ### Exercise 1: products of int8 codes
#
# *1 point, about 25 minutes, difficulty 2 of 5.*
#
# Sum in int32, then scale. PyTorch has no `@` for int32 matrices on a GPU: multiply with broadcasting, and sum. (Chips
# have an instruction for all of it, `torch._int_mm`; the point here is to see what it must do, so it is refused.)
#
# <details><summary>Hint 1</summary>
#
# Widen before you do anything else: `x.to(torch.int32)`, or an operation with an int32 tensor, which widens by itself.
# A difference in int8 may already be out of range: 127 - (-128) is 255.
# </details>
# <details><summary>Hint 2</summary>
#
# `x[:, None, :] * y[None, :, :]` is [m, n, k]: all products of all pairs of rows. `.sum(-1)` of int32 gives int64
# unless it is told `dtype=torch.int32`.
# </details>

# %% exercise="int8_product"
def int8_product(
    a: Tensor, zero_a: Tensor, scale_a: Tensor, b: Tensor, zero_b: Tensor, scale_b: Tensor
) -> tuple[Tensor, Tensor]:
    """The product of two matrices that are given as int8 codes, row by row of each.

    a: int8 [m, k], zero_a: int32 [m] in [-128, 127], scale_a: float32 [m]; row i stands for
        scale_a[i] * (a[i] - zero_a[i])
    b: int8 [n, k], zero_b: int32 [n] in [-128, 127], scale_b: float32 [n]; likewise. k is at most 30,000
    Returns (sums, product): sums int32 [m, n], the exact sums over k of
        (a[i] - zero_a[i]) * (b[j] - zero_b[j]); product float32 [m, n], the dot products of the rows that
        the codes stand for
    """
    ### BEGIN SOLUTION
    wide_a = a - zero_a[:, None]  # int8 and int32 make int32
    wide_b = b - zero_b[:, None]
    sums = (wide_a[:, None, :] * wide_b[None, :, :]).sum(-1, dtype=torch.int32)
    return sums, sums * scale_a[:, None] * scale_b
    ### END SOLUTION


# %% check="int8_product"
check("int8_product", int8_product)

# %% [markdown]
# ### Measure it
#
# Codes between 64 and 127, as in a layer whose inputs and weights all point one way, summed up one product after the
# other. How many of 1,024 sums are wrong after $k$ products, by the type of the accumulator?

# %% tags=["demo"]
import copy
import time

import numpy

from effnlp_lab import quantization as room
from effnlp_lab.course.models import load_model, load_tokenizer
from effnlp_lab.course.text import load_text
from effnlp_lab.notebook import bench, plots

generator = torch.Generator().manual_seed(0)

# %% tags=["demo"] needs=["int8_product"]
one, two = (torch.randint(64, 128, (32, 4096), generator=generator).to(torch.int8) for _ in range(2))
nothing, unit = torch.zeros(32, dtype=torch.int32), torch.ones(32)
lengths = [2**i for i in range(13)]
exact = {k: int8_product(one[:, :k], nothing, unit, two[:, :k], nothing, unit)[0] for k in lengths}
figure, axes = plots.figure("What an accumulator gets wrong", "products summed up, k", "wrong sums (%)",
                            caption="int32 stays at 0. Float32 fails from 2^24 on: 1,800 such products.")
ends = {}
for dtype in (torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.int32):
    total, wrong = torch.zeros(32, 32, dtype=dtype), []
    for k in range(4096):
        total += (one[:, None, k].to(torch.int32) * two[None, :, k]).to(dtype)
        if k + 1 in exact:
            wrong.append(100 * (total.double() != exact[k + 1]).double().mean().item())
    axes.plot(lengths, wrong, label=str(dtype)[6:])
    ends[str(dtype)[6:]] = next((k for k, share in zip(lengths, wrong) if share > 50), None)
axes.set_xscale("log", base=2)
axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
spoken = ", ".join(f"{name} at {k}" if k else f"{name} never" for name, k in ends.items())
plots.show(figure, f"Share of wrong sums against their length, by accumulator. Most sums are wrong: {spoken}.")

# %% [markdown]
# ### Where int8 alone is not enough: outlier columns
#
# From some billions of weights on, language models have a few hidden dimensions that are tens of times larger than
# the rest, in every token. One such number takes the whole range of its row, and everything else in the row is
# rounded to a handful of codes. **LLM.int8** (Dettmers et al., 2022) multiplies these columns, a tenth of a percent,
# in 16 bits, and the others in int8. The kit has it; here is what it is for.

# %% tags=["demo"]
from effnlp_lab.quantization.llm_int8 import quantize_int8_weight

x, weight = torch.randn(64, 512, generator=generator), torch.randn(128, 512, generator=generator) / 512**0.5
codes8, absmax = quantize_int8_weight(weight)
magnitudes = (1, 2, 4, 8, 16, 32, 64)
errors = {"int8 for all": [], "LLM.int8": []}
for magnitude in magnitudes:
    hot = x.clone()
    hot[:, 100] *= magnitude
    right = hot @ weight.T - hot[:, 100:101] * weight[:, 100]  # what the ordinary columns contribute
    for name, threshold in (("int8 for all", 0.0), ("LLM.int8", 6.0)):
        found = room.llm_int8_linear(hot, codes8, absmax, threshold=threshold, weight=weight)
        found -= hot[:, 100:101] * weight[:, 100]
        errors[name].append(((found - right).norm() / right.norm()).item())
figure, axes = plots.figure("One column of 512 is larger than the others", "how many times as large",
                            "relative error of the rest",
                            caption="LLM.int8 takes out columns with a number of 6 or more.")
for name, row in errors.items():
    axes.plot(magnitudes, row, label=name)
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(magnitudes, labels=map(str, magnitudes))
axes.legend()
spoken = ", ".join(f"{name} goes from {row[0]:.1%} to {row[-1]:.1%}" for name, row in errors.items())
plots.show(figure, "Relative error of the other columns' product against the size of one outlier column: "
                   f"{spoken}.")

# %% [markdown]
# From here on only **weights** are quantized. They are at rest, so there is time to do it well, and inputs stay in 16
# bits. The literature calls it W4A16: weights in 4 bits, activations in 16.
#
# ## 2. Round to nearest, by group
#
# With $b$ bits there are $2^b$ codes, $0$ to $2^b - 1$, and the question is which stretch of the real line they
# cover. Take a **group** of weights that share scale and zero point. Its grid is to span its weights and 0:
#
# $$\ell = c \cdot \min(0, \min_i w_i), \quad h = c \cdot \max(0, \max_i w_i), \quad
# s = \frac{h - \ell}{2^b - 1}, \quad z = \text{round}(-\ell / s),$$
#
# $$q_i = \text{clip}\big(\text{round}(w_i / s) + z,\ 0,\ 2^b - 1\big), \qquad \hat w_i = s\,(q_i - z).$$
#
# $c$ is 1, usually. With $c < 1$ the grid is finer and the largest weights are cut off; with few bits that can pay.
#
# A group is a run of neighbouring **input columns of one row**: those are what a dot product adds up, so within a
# group the scale can be taken out of the sum. A column further, another row: another group.
#
# ```
#            columns 0..3   4..7   8..11          a weight of 2 rows and 12 columns, groups of 4
#   row 0     [ s00 z00 ] [s01..] [s02..]         scale and zero are [2, 3]
#   row 1     [ s10 z10 ] [s11..] [s12..]         column j belongs to group j // 4
# ```
#
# A small group fits its grid tightly, and has a scale and a zero point to pay for: with a 16-bit scale and an 8-bit
# zero point, groups of 64 make 4 bits into 4.375.
#
# (A word on two slides. One says that 8 bits are "$[-127, 127]$, 256 values": those are 255, and $-128$ makes it 256.
# Another lays out 16 levels from -1.0 to 1.0 and stores 0.42 as "integer 12": in its list 0.46 is number 11, counted
# from 0 as codes are. And note what that list lacks: 0 itself.)
#
# ### Exercise 2: round to nearest, by group
#
# *1.5 points, about 40 minutes, difficulty 2 of 5.*
#
# Work in float32, whatever the weights come in. A group that is 0 throughout gets the scale 1 and the zero point 0.
#
# <details><summary>Hint 1</summary>
#
# `weight.reshape(rows, -1, group_size)` is [rows, groups, group_size]: minimum and maximum over the last axis are
# [rows, groups], one a group.
# </details>
# <details><summary>Hint 2</summary>
#
# The grid has to contain 0: `.clamp(max=0)` for the minimum, `.clamp(min=0)` for the maximum. Then a constant group
# has a grid of its own, and only a group of zeros has a scale of 0 to mend.
# </details>
# <details><summary>Hint 3</summary>
#
# Clip while the codes are still floats. A float of 17 or -1 that is turned into uint8 ends up somewhere, but not at
# 15 or 0.
# </details>

# %% exercise="round_to_nearest"
def round_to_nearest(
    weight: Tensor, bits: int, group_size: int, clip: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes for a weight, each the nearest on its group's grid.

    weight: [rows, columns] in float32, float16 or bfloat16; bits: 2, 3, 4 or 8
    group_size: neighbouring columns of a row that share a grid; it divides the columns
    clip: the grid spans clip times the range of the group's weights and 0, from 0.5 to 1
    Returns (codes, scale, zero): codes uint8 [rows, columns]; scale float32 and zero uint8, both
    [rows, columns / group_size]. A code q stands for scale * (q - zero). A group of zeros has the scale 1.
    """
    ### BEGIN SOLUTION
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, -1, group_size)
    low = clip * groups.amin(-1).clamp(max=0)
    high = clip * groups.amax(-1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = scale.masked_fill(scale == 0, 1.0)
    zero = (-low / scale).round()
    codes = ((groups / scale[:, :, None]).round() + zero[:, :, None]).clamp(0, 2**bits - 1)
    return codes.reshape(rows, columns).to(torch.uint8), scale, zero.to(torch.uint8)
    ### END SOLUTION


# %% check="round_to_nearest"
check("round_to_nearest", round_to_nearest)

# %% [markdown]
# Given: the way back.

# %%
def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weights that codes stand for, float32 [rows, columns]; scale and zero are [rows, groups]."""
    group_size = codes.shape[1] // scale.shape[1]
    each_scale, each_zero = (part.repeat_interleave(group_size, dim=1) for part in (scale, zero.float()))
    return each_scale * (codes.float() - each_zero)


# %% [markdown]
# ### Measure it: course-base
#
# Our model is `course-base`: a Llama of 7 million weights that was trained on Python source. Its linear layers have
# 256 or 768 input columns. First a look at one row of a weight, and at the grids of its groups.

# %% tags=["demo"] needs=["round_to_nearest"]
model = load_model("course-base", device=device)
GROUP = 64


def linears(of):
    """The linear layers that are quantized, by name: all but the embedding, which is the output layer too."""
    return {name: module for name, module in of.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"}


name, row = "model.layers.4.self_attn.v_proj", 19
values = linears(model)[name].weight.detach().float()
codes, scale, zero = round_to_nearest(values, 3, GROUP)
figure, axes = plots.figure(f"256 weights and their grids of 8 levels, in groups of {GROUP}", "input column",
                            "weight", caption="Each group has its own scale; every grid has a level at 0.")
for group in range(scale.shape[1]):
    levels = scale[row, group].item() * (torch.arange(8) - zero[row, group].item())
    axes.hlines(levels.tolist(), group * GROUP, (group + 1) * GROUP - 1, color=plots.COLOURS["orange"],
                linewidth=1)
axes.plot(values[row].cpu(), ".", color=plots.COLOURS["blue"], markersize=4)
axes.grid(visible=False)
plots.show(figure, "The weights of one row as points, and for each of four groups eight horizontal levels "
                   "that span them; the spacing differs from group to group.")

# %% [markdown]
# The yardstick is perplexity on held-out modules of Python's library: $e$ to the mean loss a token.
#
# **Predict first.** In 16 bits the perplexity is about 12 on the short stretches of text that a CPU gets, and about 7.5
# on the longer ones for a GPU. What will it be when every weight of the layers is rounded to nearest in 4, 3 and 2
# bits, in groups of 64? Write your guesses down before you run the cell after the next.

# %% predict="perplexity_by_bits"
my_perplexity = {4: None, 3: None, 2: None}  # your guesses

# %% tags=["demo"] needs=["round_to_nearest"]
tokenizer = load_tokenizer("course-base")


def pieces_of(text, pieces, length, spread):
    """`pieces` stretches of `length` tokens from all over the first `spread` tokens of a text."""
    ids = []
    for document in load_text(text):
        beginning = document.text[: device.pick(fast=8_000, full=100_000)]  # in fast mode many, not long ones
        ids += tokenizer(beginning, verbose=False).input_ids
        if len(ids) >= spread:
            break
    starts = torch.linspace(0, min(len(ids), spread) - length, pieces).long().tolist()
    return torch.stack([torch.tensor(ids[start : start + length]) for start in starts]).to(device.torch)


def with_all_weights(quantize):
    """quantize(name, weight) for every layer's weight: perplexity of the result, and the seconds it took."""
    weights = {name: module.weight.detach().float() for name, module in linears(model).items()}
    begin = time.perf_counter()
    made = {name: quantize(name, weight) for name, weight in weights.items()}
    if device.kind == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in linears(changed).items():
            module.weight.copy_(made[name])
    return room.perplexity(changed, heldout), seconds


heldout = pieces_of("course-heldout", *device.pick(fast=(12, 128, 40_000), full=(256, 512, 240_000)))
full_perplexity = room.perplexity(model, heldout)
BITS = (8, 4, 3, 2)
rounded = {}
for size in (None, GROUP):
    for bits in BITS:
        rounded[size, bits] = with_all_weights(
            lambda _, w: dequantize(*round_to_nearest(w, bits, size or w.shape[1])))
print(f"16 bits: {full_perplexity:.2f}")
for size, label in ((None, "one group a row"), (GROUP, f"groups of {GROUP}")):
    print(f"{label:16}" + "".join(f"{bits:4} bits: {rounded[size, bits][0]:8.2f}" for bits in BITS))
if my_perplexity[2] is not None:
    print("you predicted   " + "".join(f"{bits:4} bits: {guess or math.nan:8.2f}"
                                       for bits, guess in {8: None, **my_perplexity}.items()))

# %% [markdown]
# Eight bits are free, four are cheap, three hurt and two are ruin. Groups are what keeps it together at the lower
# end. The lecture's table for OPT shows the same in models up to 175 billion weights, all in one group a row: round to
# nearest at 4 bits takes OPT-1.3B from 14.63 to 48.17, and OPT-66B from 9.34 to 110. Larger models are easier to
# quantize as a rule, and these two show how far one may rely on it.
#
# ## 3. What a layer's error is
#
# Does a layer care how far its weights are off? It has no view of its weights. It sees inputs $x$, and what counts is
# how far its **outputs** are off. GPTQ asks, for each layer by itself, for the codes that solve
#
# $$\min_{\hat W}\ \|W X - \hat W X\|_2^2,$$
#
# where the columns of $X$ are inputs that the layer really receives: run some text through the model and write them
# down (**calibration**). With $\delta$ for one row of $\hat W - W$,
#
# $$\|\delta X\|^2 = \delta\, X X^\top \delta^\top = \tfrac12\, \delta H \delta^\top, \qquad H = 2 X X^\top.$$
#
# $H$ is the second derivative of the error, its **Hessian**. Three things make it pleasant. It is the same for every
# row of $W$. It has the size of the inputs squared, however much text it has seen. And it may be multiplied by
# anything: $2 X X^\top$, the mean over $n$ inputs $\frac2n X X^\top$, or without the 2, all have the same minimum.
#
# ### Exercise 3: the Hessian from calibration data
#
# *1 point, about 25 minutes, difficulty 2 of 5.*
#
# Inputs come in batches, as rows (so $X^\top X$ in PyTorch's convention), and there may be more of them than fit into
# memory: take a batch, add what it has to say, let it go. Every token counts the same, whichever batch it is in. Sum
# in float32: a float16 sum of squares is soon at its end.
#
# <details><summary>Hint 1</summary>
#
# `batch.reshape(-1, batch.shape[-1])` makes one list of tokens of whatever shape a batch has.
# </details>
# <details><summary>Hint 2</summary>
#
# The sum over a batch's tokens of $x x^\top$ is one matrix product, `x.T @ x`. If you divide by the number of tokens,
# divide once, at the end: batches may differ in size.
# </details>

# %% exercise="calibration_hessian"
def calibration_hessian(batches: Iterator[Tensor]) -> Tensor:
    """The Hessian of a linear layer's squared error, from the inputs that the layer receives.

    batches: an iterator of inputs [..., columns], at least one, in float32, float16 or bfloat16; the shapes
        differ from batch to batch but for the columns. Never hold more than two batches at once.
    Returns float32 [columns, columns]: the sum over all tokens x of x x', times any positive number that you
    like (1, or the 2 of the formula, or 2/n for n tokens).
    """
    ### BEGIN SOLUTION
    total = 0.0
    for batch in batches:
        x = batch.reshape(-1, batch.shape[-1]).float()
        total = total + x.T @ x
    return total
    ### END SOLUTION


# %% check="calibration_hessian"
check("calibration_hessian", calibration_hessian)

# %% [markdown]
# Now the Hessians of course-base, from some sequences of training text. What they have in common is that the inputs
# are **correlated**: most of what a layer receives lies in a few directions. That is what GPTQ lives on. Were the
# inputs independent, $H$ would be diagonal, no weight could make up for another, and rounding to nearest would be best.

# %% tags=["demo"] needs=["round_to_nearest", "calibration_hessian"]
calibration = pieces_of("course-train", *device.pick(fast=(16, 256, 50_000), full=(256, 512, 400_000)))
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def recorded_inputs(of, ids, batch_size=8):
    """The inputs of every linear layer, a list of batches for each name."""
    seen = {name: [] for name in linears(of) if name.split(".")[-1] not in SAME_INPUT}
    hooks = []
    for name, inputs in seen.items():
        def keep(module, args, inputs=inputs):
            inputs.append(args[0].detach())

        hooks.append(linears(of)[name].register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in ids.split(batch_size):
            of(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def layer_error(weight, quantized, hessian):
    """The squared error of a layer's outputs, as a share of the outputs' squares."""
    difference = (weight - quantized).double()
    square = hessian.double()
    return (((difference @ square) * difference).sum() / ((weight.double() @ square) * weight).sum()).item()


hessians = {}
for name, batches in recorded_inputs(model, calibration).items():
    hessians[name] = calibration_hessian(iter(batches))
for name in linears(model):
    stem, last = name.rsplit(".", 1)
    hessians[name] = hessians[f"{stem}.{SAME_INPUT.get(last, last)}"]

figure, axes = plots.figure("Inputs lie in few directions", "directions, the largest first (%)",
                            "share of the inputs' squares (%)",
                            caption="Layer 4. Independent inputs of one size would be the diagonal.")
told = []
for last in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
    values = torch.linalg.eigvalsh(hessians[f"model.layers.4.{last}"].double()).flip(0).clamp(min=0).cpu()
    share = 100 * values.cumsum(0) / values.sum()
    places = 100 * torch.arange(1, len(share) + 1) / len(share)
    axes.plot(places, share, label=last, marker="")
    told.append(f"{last} {share[len(share) // 10].item():.0f}%")
axes.plot([0, 100], [0, 100], color="#888888", marker="", linestyle=":", linewidth=1)
axes.legend(loc="lower right")
plots.show(figure, "Share of the inputs' squares in the largest directions: all curves rise steeply. In a "
                   f"tenth of the directions lie: {', '.join(told)}.")

# %% [markdown]
# With fewer tokens than columns, or with inputs that are always 0, $H$ has no inverse. The usual cure is **damping**:
# add one percent of the mean of the diagonal to the diagonal. Given:

# %%
def damped(hessian: Tensor, share: float = 0.01) -> Tensor:
    """A copy of the Hessian that has an inverse; an input that was always 0 gets a 1 on the diagonal."""
    diagonal = hessian.diagonal()
    return hessian + torch.diag(share * diagonal.mean() + (diagonal == 0).float())


# %% [markdown]
# ## 4. GPTQ, column by column
#
# Take one row $w$, and suppose that weight $j$ is rounded, so that it moves by $\delta_j = \hat w_j - w_j$. The others
# are free for now. How should they move to make up for it? Minimise $\frac12 \delta H \delta^\top$ with $\delta_j$
# held fixed. With a Lagrange multiplier the answer is one line (it is the "optimal brain surgeon" of Hassibi and
# Stork, 1993):
#
# $$\delta = \frac{\delta_j}{[H^{-1}]_{jj}}\; H^{-1}_{j,:}\,, \qquad
# \text{at the cost of } \tfrac12\, \frac{\delta_j^2}{[H^{-1}]_{jj}} .$$
#
# Two weights, two inputs that nearly always come together, and a grid of whole numbers:

# %% tags=["nbval-check-output"]
hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
weights = torch.tensor([0.6, 0.6], dtype=torch.float64)


def cost(rounded):
    return ((rounded - weights) @ hessian @ (rounded - weights) / 2).item()


inverse = torch.linalg.inv(hessian)
moved = weights + (1 - weights[0]) / inverse[0, 0] * inverse[0]
print(f"both rounded to nearest:  {weights.round().tolist()}, cost {cost(weights.round()):.3f}")
print(f"the first rounded to 1, the second moves to {moved[1]:.2f}: cost {cost(moved):.3f}")
print(f"then the second rounded:  {moved.round().tolist()}, cost {cost(moved.round()):.3f}")

# %% [markdown]
# The second weight is rounded the "wrong" way, and the layer's output is better for it.
#
# After that, weight $j$ is fixed for good, and the next one has fewer partners. Its cost is that of the **remaining**
# weights, so its inverse is that of $H$ without row and column $j$. This is not what is left of $H^{-1}$ when row and
# column $j$ are struck out! But it can be had from it, by one step of Gaussian elimination:
#
# $$\big[(H_{\text{without } j})^{-1}\big] = H^{-1} - \frac{1}{[H^{-1}]_{jj}}\; H^{-1}_{:,j}\, H^{-1}_{j,:}
# \qquad (\text{its row and column } j \text{ are } 0).$$
#
# The paper before GPTQ (OBQ) chose for each row the weight that is cheapest next. GPTQ's first insight is on your
# lecture's slide: "*empirical*: update order does not matter". If all rows go from left to right, they all share the
# same inverse, and one step treats a whole **column** of $W$:
#
# ```
#   for every column j, from left to right:
#     round column j                         all rows at once, each on its grid
#     error = (w_j - rounded) / [H^-1]_jj    one number a row
#     w     = w - error * [H^-1]_j,:         columns to come move; column j lands on its grid
#     H^-1  = eliminate j from H^-1          so that nothing flows back
# ```
#
# (The sign is the formula's: $w_j - \hat w_j = -\delta_j$.) The grids are given here, as rounding to nearest finds
# them. The original code finds a group's grid when its first column is reached, from the weights as they are by then,
# which is a little better, and what the kit's own does.
#
# ### Exercise 4: GPTQ, column by column
#
# *2.5 points, about 60 minutes, difficulty 4 of 5.*
#
# Beware: wrong versions of this loop still do better than rounding to nearest, so a lower error proves nothing. The
# check compares codes with those of the derivation, worked out in float64.
#
# <details><summary>Hint 1</summary>
#
# Work on a copy of the weight. What is rounded in step $j$ is column $j$ **of the copy**, as the steps before have
# left it. Its grid is that of group `j // group_size`, and `group_size` follows from the shapes of `weight` and
# `scale`.
# </details>
# <details><summary>Hint 2</summary>
#
# The nearest code of a column of weights `w` is `((w / s).round() + z).clamp(0, 2**bits - 1)`, as in exercise 2, with
# `s = scale[:, group]` and `z = zero[:, group]`, one number a row. What it stands for is `s * (code - z)`.
# </details>
# <details><summary>Hint 3</summary>
#
# `torch.outer(error, inverse[j])` is the change of all columns at once; earlier columns get 0, because the
# elimination has left 0 there. `torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]` is what is taken from the
# inverse.
# </details>

# %% exercise="gptq_columns"
def gptq_columns(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes for a weight, column after column, each error made up for by the columns to its right.

    weight: float32 [rows, columns]; hessian: float32 [columns, columns], symmetric and positive definite
    scale: float32 [rows, groups] and zero: uint8 [rows, groups], the grids, which stay as they are; column j
        belongs to group j // (columns / groups)
    bits: codes are 0 to 2**bits - 1
    Returns codes, uint8 [rows, columns]. The inputs are left as they are.
    """
    ### BEGIN SOLUTION
    group_size = weight.shape[1] // scale.shape[1]
    work = weight.clone()
    inverse = torch.linalg.inv(hessian)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for j in range(weight.shape[1]):
        s, z = scale[:, j // group_size], zero[:, j // group_size]
        code = ((work[:, j] / s).round() + z).clamp(0, 2**bits - 1)
        codes[:, j] = code
        error = (work[:, j] - s * (code - z)) / inverse[j, j]
        work -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes
    ### END SOLUTION


# %% check="gptq_columns"
check("gptq_columns", gptq_columns)

# %% [markdown]
# ### Measure it: the error of one layer

# %% tags=["demo"] needs=["round_to_nearest", "calibration_hessian", "gptq_columns"]
name = "model.layers.4.mlp.gate_proj"
weight, hessian = linears(model)[name].weight.detach().float(), hessians[name]
found = {"round to nearest": {}, "GPTQ, by columns": {}}
for bits in BITS:
    nearest, scale, zero = round_to_nearest(weight, bits, GROUP)
    chosen = gptq_columns(weight, damped(hessian), scale, zero, bits)
    for label, codes in zip(found, (nearest, chosen)):
        found[label][bits] = layer_error(weight, dequantize(codes, scale, zero), hessian)
    other = (nearest != chosen).float().mean().item()
    found.setdefault("weights that it rounds the other way", {})[bits] = other
print(f"{name}: error of the outputs, as a share of their squares")
print(f"{'bits':38}" + "".join(f"{bits:>10}" for bits in BITS))
for label, row in found.items():
    print(f"{label:38}" + "".join(f"{value:10.2%}" for value in row.values()))

# %% [markdown]
# GPTQ moves the weights **further** from where they were: about a tenth are not at their nearest codes, whatever the bits.
# The outputs, which are what counts, are closer.
#
# ## 5. In blocks, with a Cholesky factor
#
# The loop works, and does not scale. Each step rewrites the whole inverse ($n$ steps of $n^2$ numbers), and each step
# rewrites all of $W$: for a few operations a number, everything goes through memory once a column. And as the
# eliminations pile up in float32, the inverse loses its accuracy; for large layers it ends up with negative numbers
# on the diagonal. GPTQ's second and third insight:
#
# **All rows of all inverses, at once.** Step $j$ needs nothing but row $j$ of the inverse as it is by then. These rows
# come from eliminating one column after the other, and eliminating is what a **Cholesky** factorization does. With the
# upper triangular $U$ for which $U^\top U = H^{-1}$,
#
# $$\text{row } j \text{ of the inverse in step } j \;=\; U_{jj}\, U_{j,:}\,, \qquad \text{its diagonal} = U_{jj}^2,$$
#
# so that the step becomes
#
# $$e_j = \frac{w_j - \hat w_j}{U_{jj}}, \qquad w_{j:} \leftarrow w_{j:} - e_j\, U_{j, j:}.$$
#
# One factorization by a library, which is stable, and no elimination in the loop.
#
# **Late updates.** The columns far to the right need not hear of every error at once, as long as they have heard of
# all of them when their turn comes. So go in blocks of, say, 128 columns. Within a block, update only the block. When
# it is done, tell all the columns behind it in one matrix product:
#
# ```
#     done         block             behind
#   |........|e e e e w w w w|w w w w w w w w w w|    inside: only up to the block's end
#             ^start          ^end
#   then:     w[:, end:] -= E @ U[start:end, end:]    E: the block's errors, [rows, block]
# ```
#
# ### Exercise 5: GPTQ in blocks
#
# *2.5 points, about 60 minutes, difficulty 4 of 5.*
#
# The codes are the same as those of exercise 4. The difference is the traffic, and a part of the points is for that:
# one case counts how many of your operations write more than two blocks of columns. Products of matrices are not
# counted; a handful for each block is fine, one for each column is not.
#
# <details><summary>Hint 1</summary>
#
# `torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)` is $U$: its rows are 0 left of the diagonal.
# </details>
# <details><summary>Hint 2</summary>
#
# Two loops: `for start in range(0, columns, block)`, and inside `for j in range(start, end)`, where `end` is
# `start + block` or the last column's, whichever comes first. Groups have nothing to do with blocks: column $j$ still
# belongs to group `j // group_size`.
# </details>
# <details><summary>Hint 3</summary>
#
# Keep the errors $e_j$ of the block, already divided by $U_{jj}$, as the columns of a matrix. The update of
# the rest is then $E\, U_{\text{block rows},\ \text{columns behind}}$.
# </details>

# %% exercise="gptq_blocks"
def gptq_blocks(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int, block: int
) -> Tensor:
    """The codes of `gptq_columns`, in blocks of columns and with one Cholesky factor.

    weight, hessian, scale, zero, bits: as in gptq_columns
    block: columns of a block; the last block may be shorter. A column's error reaches the columns behind its
        block only when the block is done, by one matrix product for the whole block.
    Returns codes, uint8 [rows, columns]. The inputs are left as they are.
    """
    ### BEGIN SOLUTION
    columns = weight.shape[1]
    group_size = columns // scale.shape[1]
    work = weight.clone()
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty_like(work[:, start:end])
        for j in range(start, end):
            s, z = scale[:, j // group_size], zero[:, j // group_size]
            code = ((work[:, j] / s).round() + z).clamp(0, 2**bits - 1)
            codes[:, j] = code
            error = (work[:, j] - s * (code - z)) / upper[j, j]
            work[:, j:end] -= torch.outer(error, upper[j, j:end])
            errors[:, j - start] = error
        work[:, end:] -= errors @ upper[start:end, end:]
    return codes
    ### END SOLUTION


# %% check="gptq_blocks"
check("gptq_blocks", gptq_blocks)

# %% [markdown]
# ### Measure it: seconds a layer
#
# The same square weights by your two functions and by the kit's own. (On a GPU the kit's holds a few rows of a block
# in registers while it goes through all of its columns, in one Triton kernel. The rows do not see each other, so
# nothing has to leave the chip in between.)

# %% tags=["demo"] needs=["round_to_nearest", "gptq_columns", "gptq_blocks"]
def correlated(columns, tokens, rank=4):
    """A Hessian of inputs that lie in a quarter of the directions, with a little noise."""
    mix = torch.randn(columns // rank, columns, device=device.torch, dtype=device.dtype)
    found = room.Hessian(columns)
    for first in range(0, tokens, 16384):
        count = min(16384, tokens - first)
        hidden = torch.randn(count, columns // rank, device=device.torch, dtype=device.dtype)
        noise = torch.randn(count, columns, device=device.torch, dtype=device.dtype)
        found.add(hidden @ mix / columns**0.5 + 0.1 * noise)
    return found.matrix


torch.manual_seed(0)
widths = device.pick(fast=(64, 128, 256), full=(256, 512, 1024, 2048, 4096))
seconds = {"by columns": [], "in blocks": [], "the kit": []}
for width in widths:
    weight = torch.randn(width, width, device=device.torch)
    hessian = damped(correlated(width, 4 * width))
    _, scale, zero = round_to_nearest(weight, 4, GROUP)
    ways = {"by columns": lambda: gptq_columns(weight, hessian, scale, zero, 4),
            "in blocks": lambda: gptq_blocks(weight, hessian, scale, zero, 4, 128),
            "the kit": lambda: room.gptq_quantize(weight, hessian, 4, GROUP)}
    for way, run in ways.items():
        if way != "by columns" or width <= 2048:
            run()
            seconds[way].append(min(bench.timed(run, device) for _ in range(2)))
figure, axes = plots.figure("GPTQ of one square layer, its Hessian given", "columns (and rows)", "seconds",
                            caption="Both axes are logarithmic.")
for way, times in seconds.items():
    axes.plot(widths[: len(times)], times, label=way)
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(widths, labels=map(str, widths))
axes.legend()
spoken = ", ".join(f"{way} {times[-1]:.2g} s at {widths[len(times) - 1]}" for way, times in seconds.items())
plots.show(figure, f"Seconds to quantize a square layer against its width: {spoken}.")

# %% [markdown]
# ### "A matter of minutes"
#
# The paper's runtimes on one A100, from the lecture:
#
# | OPT | 13B | 30B | 66B | 175B | | BLOOM | 1.7B | 3B | 7.1B | 176B |
# |---|---|---|---|---|---|---|---|---|---|---|
# | runtime | 20.9 min | 44.9 min | 1.6 h | 4.2 h | | | 2.9 min | 5.2 min | 10.0 min | 3.8 h |
#
# On a GPU the next cell takes layers of OPT's shapes, with 128 sequences of 2,048 tokens for the Hessians as in the
# paper, and multiplies one layer's time by the number of layers. The model's own passes over the calibration text,
# which the paper's figures include, are not in it. On a CPU it takes one small layer, and multiplies nothing.

# %% tags=["demo"] needs=["round_to_nearest", "gptq_columns", "gptq_blocks"]
torch.manual_seed(1)
SHAPES = {"OPT-1.3B": (2048, 24), "OPT-2.7B": (2560, 32), "OPT-6.7B": (4096, 32), "OPT-13B": (5120, 40)}
chosen = device.pick(fast={"a layer 192 wide": (192, 1)}, full=SHAPES)
calibration_tokens = device.pick(fast=2048, full=128 * 2048)


def layer_seconds(hidden):
    """Seconds for one layer: all Hessians; then its weights by the kit, and by you."""
    spent = {"Hessians": 0.0, "the kit": 0.0, "yours": 0.0}
    for rows, columns, count in ((hidden, hidden, 4), (4 * hidden, hidden, 1), (hidden, 4 * hidden, 1)):
        kept = []
        spent["Hessians"] += bench.timed(lambda: kept.append(correlated(columns, calibration_tokens)), device)
        hessian, weight = damped(kept.pop()), torch.randn(rows, columns, device=device.torch)
        grid = round_to_nearest(weight, 4, GROUP)[1:]
        for way, run in (("the kit", lambda: room.gptq_quantize(weight, hessian, 4, GROUP)),
                         ("yours", lambda: gptq_blocks(weight, hessian, *grid, 4, 128))):
            if (rows, columns) == (hidden, hidden):
                run()  # the first run compiles and loads libraries
            spent[way] += count * bench.timed(run, device)
    return spent


print(f"{'':20}{'layers':>8}{'Hessians':>12}{'the kit':>12}{'yours':>12}")
for name, (hidden, layers) in chosen.items():
    if 16 * (4 * hidden) ** 2 * 4 > device.memory_bytes:
        print(f"{name:20} left out: a layer {hidden} wide needs more memory than there is here")
        continue
    spent = {way: layers * time for way, time in layer_seconds(hidden).items()}
    print(f"{name:20}{layers:8}" + "".join(f"{time:10.1f} s" for time in spent.values()))

# %% [markdown]
# On a GPU the kit needs about as long for the weights as for their Hessians, and the paper's minutes have become seconds (on
# a newer card, and without the model's passes). Your blocks are the same algorithm, and take ten times as long: several
# launches for every column, each with little to do.
#
# ## 6. Perplexity again
#
# Now all layers of course-base, with your `gptq_blocks` in place of rounding to nearest, on the same grids. The kit's
# own goes one step further: it takes the layers in order, and calibrates each with the inputs that the layers before
# it give **as quantized**, and it finds a group's grid when it gets there.

# %% tags=["demo"] needs=["round_to_nearest", "calibration_hessian", "gptq_blocks"]
def by_gptq(bits):
    """What `with_all_weights` calls for each weight."""
    def quantize(name, weight):
        _, scale, zero = round_to_nearest(weight, bits, GROUP)
        return dequantize(gptq_blocks(weight, damped(hessians[name]), scale, zero, bits, 128), scale, zero)

    return quantize


def by_the_kit(bits):
    """The perplexity of the kit's own GPTQ, and the seconds that it took."""
    changed, begin = copy.deepcopy(model), time.perf_counter()
    room.quantize_model(changed, calibration, bits=bits, group_size=GROUP, batch_size=8, progress=False)
    seconds = time.perf_counter() - begin
    return room.perplexity(changed, heldout), seconds


perplexities = {
    "round to nearest": {bits: rounded[GROUP, bits] for bits in BITS},
    "GPTQ, yours": {bits: with_all_weights(by_gptq(bits)) for bits in device.pick(fast=BITS[1:], full=BITS)},
    "GPTQ, the kit": {bits: by_the_kit(bits) for bits in device.pick(fast=(4,), full=BITS)},
}
print(f"groups of {GROUP}; 16 bits: {full_perplexity:.3f}")
print(f"{'bits':24}" + "".join(f"{bits:>10}" for bits in BITS))
for way, row in perplexities.items():
    print(f"{way:24}" + "".join(f"{row[bits][0]:10.3f}" if bits in row else f"{'-':>10}" for bits in BITS))

figure, axes = plots.figure("Perplexity of course-base by bits a weight", "bits a weight, scales included",
                            "held-out perplexity", caption="Towards the lower left is better.")
for way, row in perplexities.items():
    axes.plot([bits + 24 / GROUP for bits in row], [value for value, _ in row.values()], label=way)
axes.axhline(full_perplexity, color="#888888", linestyle=":", linewidth=1)
axes.text(8.4, full_perplexity * 0.985, "16 bits", ha="right", va="top", fontsize=9, color="#555555")
axes.set_yscale("log")
highest = max(value for row in perplexities.values() for value, _ in row.values())
ticks = [tick for tick in (6, 7, 8, 10, 12, 15, 20, 30, 40, 60, 100)
         if 0.9 * full_perplexity < tick < 1.2 * highest]
axes.set_yticks(ticks, labels=map(str, ticks))
axes.minorticks_off()
axes.set_ylim(bottom=0.92 * full_perplexity)
axes.legend()
spoken = ", ".join(f"{way} {row[min(row)][0]:.2f} at {min(row)} bits" for way, row in perplexities.items())
plots.show(figure, f"Perplexity against bits a weight, falling towards {full_perplexity:.2f} in 16 bits: "
                   f"{spoken}.")

# %% [markdown]
# Beside it, the lecture's table of OPT's perplexity at 4 bits, one group a row:
#
# | OPT | bits | 125M | 350M | 1.3B | 2.7B | 6.7B | 13B | 30B | 66B | 175B |
# |---|---|---|---|---|---|---|---|---|---|---|
# | full | 16 | 27.65 | 22.00 | 14.63 | 12.47 | 10.86 | 10.13 | 9.56 | 9.34 | 8.34 |
# | RTN | 4 | 37.28 | 25.94 | 48.17 | 16.92 | 12.10 | 11.32 | 10.98 | 110 | 10.54 |
# | GPTQ | 4 | 31.12 | 24.24 | 15.47 | 12.87 | 11.39 | 10.31 | 9.63 | 9.55 | 8.37 |
#
# The same picture: GPTQ takes most of the damage away, and most where there is most. Read the row of GPTQ against the
# full model's, and the rule of thumb appears: the larger the model, the less four bits cost. And read with care what
# "performance is maintained" means: perplexity on text like the calibration text. A model may keep its perplexity and
# lose at arithmetic, or in languages that calibration never saw.
#
# ## 7. Four bits in memory
#
# So far our codes lie in uint8, a byte each. Two of them fit into a byte:
#
# ```
#   columns        0     1     2     3     4
#   codes          5     12    0     9     3        5 columns: the last byte is half empty
#   low first      0xC5        0x90        0x03     byte = first | second << 4
#   high first     0x5C        0x09        0x30     byte = first << 4 | second
#   low half       0x95        0x3C        0x00     byte i = column i | column i + 3 << 4
#   high half      0x59        0xC3        0x00     byte i = column i << 4 | column i + 3
# ```
#
# All of them are in use. GPTQ's checkpoints fill int32 words from the low end, which on the disk is "low first";
# bitsandbytes and PyTorch's own int4 kernels take "high first"; kernels that unpack a whole register at a time put
# columns that lie half a row (or half a tile) apart into a byte. Nothing in the bytes tells, so a file format has to.
#
# ### Exercise 6: two codes in a byte
#
# *1.5 points, about 45 minutes, difficulty 3 of 5.*
#
# A class with three blanks: pack, unpack, and multiply. To multiply is to unpack, to dequantize (with the function
# that is given above) and to use `@`: this is the definition that a fast kernel has to meet. The next cell says which
# order is **yours**.

# %%
effnlp_lab.variant("Int4Weight")

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `codes[:, ::2]` are the even columns and `codes[:, 1::2]` the odd ones. With an odd number of columns the second has
# one fewer: `torch.nn.functional.pad(codes, (0, columns % 2))` adds a column of zeros at the right.
# </details>
# <details><summary>Hint 2</summary>
#
# `x & 15` keeps the low four bits, `x >> 4` brings the high ones down. `torch.stack([first, second], dim=-1)` followed
# by `.flatten(1)` puts two sequences into turns: first, second, first, second; `torch.cat` puts one after the other.
# </details>
# <details><summary>Hint 3</summary>
#
# `dequantize` gives float32. Turn the weights into the dtype of `x` before the product, and transpose them: `x` has
# columns at the end, and so has the weight.
# </details>

# %% exercise="Int4Weight"
class Int4Weight:
    """A weight in 4 bits a code, and products with it.

    codes: uint8 [rows, columns], 0 to 15; scale: float32 [rows, groups] and zero: uint8 [rows, groups],
        where groups divides columns
    `packed` is uint8 [rows, ceil(columns / 2)]: byte i of a row holds the codes of columns 2i and 2i + 1 (or i
    and i + ceil(columns / 2), where your variant speaks of halves), in the order that your variant says; without a
    second column its half is 0. The object keeps packed, scale and zero, and no other copy of the codes.
    """

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        self.columns, self.scale, self.zero = codes.shape[1], scale, zero
        ### BEGIN SOLUTION
        codes = torch.nn.functional.pad(codes, (0, self.columns % 2))
        self.packed = codes[:, ::2] | (codes[:, 1::2] << 4)
        ### END SOLUTION

    def codes(self) -> Tensor:
        """The codes again, uint8 [rows, columns], from `packed`."""
        ### BEGIN SOLUTION
        pairs = torch.stack([self.packed & 15, self.packed >> 4], dim=-1)
        return pairs.flatten(1)[:, : self.columns]
        ### END SOLUTION

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., columns] times the transpose of the weights that the codes stand for: [..., rows].

        The product is taken in x's dtype, and is in it. It uses `codes()`.
        """
        ### BEGIN SOLUTION
        weight = dequantize(self.codes(), self.scale, self.zero)
        return x @ weight.to(x.dtype).T
        ### END SOLUTION


# %% check="Int4Weight"
check("Int4Weight", Int4Weight)

# %% [markdown]
# NumPy packs bits too, and knows both orders. Do your bytes agree with NumPy's?

# %% tags=["demo"] needs=["Int4Weight"]
sample = torch.randint(16, (4, 10), generator=generator, dtype=torch.uint8)
mine = Int4Weight(sample, torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.uint8))
single = (sample.numpy()[:, :, None] >> numpy.arange(4)) & 1  # the bits of each code, the lowest first
low = numpy.packbits(single.reshape(4, -1), axis=1, bitorder="little")
high = numpy.packbits(single[:, :, ::-1].reshape(4, -1), axis=1, bitorder="big")
print("low first, as NumPy's bitorder='little':", numpy.array_equal(mine.packed.numpy(), low))
print("high first, as NumPy's bitorder='big':  ", numpy.array_equal(mine.packed.numpy(), high))

# %% [markdown]
# ### Measure it: the product
#
# A layer's product with $m$ input rows reads the whole weight whatever $m$ is. For $m = 1$, a single stream of text
# being written, reading is all there is to it, and 4 bits are a quarter of the bytes. For large $m$, a long prompt, it
# is the arithmetic that takes time, and that is the same.
#
# **Predict first.** How many times as fast as a 16-bit product is a 4-bit one, for 1 row, and for the largest number
# of rows in the table? Write it down. (On a CPU the question is another: there the codes are unpacked by plain PyTorch
# at every call. Is it faster at all?)

# %% predict="product_speedup"
my_speedup = {"one row": None, "many rows": None}  # your guesses

# %% tags=["demo"] needs=["Int4Weight"]
size = device.pick(fast=512, full=8192)
input_rows = device.pick(fast=(1, 16, 128), full=(1, 4, 16, 64, 256, 2048))
torch.manual_seed(0)
dense = torch.randn(size, size, device=device.torch, dtype=device.dtype) / size**0.5
copies = 1 if device.kind == "cpu" else math.ceil(200e6 / (size * size / 2)) + 1  # larger than the cache
four = room.round_to_nearest(dense, 4, 128, scale_dtype=torch.float16)
three = room.round_to_nearest(dense, 3, 128, scale_dtype=torch.float16)


def in_turns(run, weights):
    """Each call takes the next weight, as a model's layers do."""
    weights, place = list(weights), [0]

    def call():
        place[0] += 1
        return run(weights[place[0] % len(weights)])

    return call


def codes_again(quantized):
    return room.QuantizedWeight(quantized.codes.clone(), quantized.scale, quantized.zero, quantized.bits, 128)


packed = {bits: [room.pack(codes_again(one)) for _ in range(copies)] for bits, one in ((4, four), (3, three))}
denses = [dense.clone() for _ in range(copies)]
own = Int4Weight(four.codes, four.scale.float(), four.zero)
speedups, figures = {}, {}
for count in input_rows:
    x = torch.randn(count, size, device=device.torch, dtype=device.dtype)
    contest = {
        "dense": in_turns(lambda w: torch.nn.functional.linear(x, w), denses),
        "yours, 4 bits": lambda: own.matmul(x),
        "the kit, 4 bits": in_turns(lambda w: room.quantized_matmul(x, w), packed[4]),
        "the kit, 3 bits": in_turns(lambda w: room.quantized_matmul(x, w), packed[3]),
    }
    found = bench.compare(f"{count} rows", contest, ours="the kit, 4 bits", peer="dense", device=device,
                          repeats=7, queued=True)
    figures[count] = {name: 1e6 * found.median(name) for name in contest}
    speedups[count] = found.ratio
    checked = x[:2].double() @ four.dequantize(torch.float64).T
    assert ((own.matmul(x[:2]).double() - checked).norm() / checked.norm()).item() < 0.02
dense_name = str(device.dtype)[6:]
print(f"a weight of {size} x {size}: {dense.numel() * dense.element_size() / 1e6:.2f} MB in {dense_name}, "
      f"{own.packed.numel() / 1e6 + 5 * own.scale.numel() / 1e6:.2f} MB in 4 bits with scales and zero points")
print(f"{'µs for input rows':20}" + "".join(f"{count:>10}" for count in input_rows))
for name in contest:
    shown = f"dense, {dense_name}" if name == "dense" else name
    print(f"{shown:20}" + "".join(f"{figures[count][name]:10.0f}" for count in input_rows))
print(f"{'kit, dense / 4 bits':20}" + "".join(f"{speedups[count]:9.2f}x" for count in input_rows))
if my_speedup["one row"] is not None:
    print(f"You predicted {my_speedup['one row']} for one row and {my_speedup['many rows']} for many.")

remark = "" if device.kind == "cuda" else " On a CPU: unpacked by plain PyTorch each time."
figure, axes = plots.figure(f"One product with a weight of {size} x {size}", "input rows", "microseconds",
                            caption="Both axes are logarithmic." + remark)
for name in contest:
    axes.plot(input_rows, [figures[count][name] for count in input_rows],
              label=f"dense, {dense_name}" if name == "dense" else name)
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(input_rows, labels=map(str, input_rows))
axes.legend(fontsize=8)
plots.show(figure, "Time of one product against input rows, dense and in 4 and 3 bits. The kit's 4-bit product "
                   f"is {speedups[input_rows[0]]:.2f} times as fast as the dense one at one row and "
                   f"{speedups[input_rows[-1]]:.2f} times at {input_rows[-1]}.")

# %% [markdown]
# Saving memory is a property of the format; saving time is a property of the kernel. Your class is a definition: it
# writes the whole weight in 16 bits before it multiplies, so it moves **more** bytes than the dense product. A kernel
# unpacks in registers, right where it multiplies. For many rows it pays to unpack once and to multiply with the
# library's product, and the kit switches at 128. The unpacking then comes on top: with some hundreds of rows a product
# with 4 bits takes longer than the dense one, and only with thousands does the arithmetic hide it.
#
# ### Measure it: a token
#
# The lecture's latencies a token, of OPT-175B writing 128 tokens:
#
# | GPU | FP16 | 3 bits | speedup | GPUs |
# |---|---|---|---|---|
# | A6000, 48 GB | 589 ms | 130 ms | 4.53x | 8 to 2 |
# | A100, 80 GB | 230 ms | 71 ms | 3.24x | 5 to 1 |
#
# Ours: one token through layers with random weights. On a GPU they have the shape of Llama-7B's, and run as a CUDA
# graph so that the host does not count; on a CPU it is one layer of a quarter of the width.

# %% tags=["demo"]
from transformers import LlamaConfig, LlamaForCausalLM

hidden, inner, layers, heads = device.pick(fast=(1024, 2048, 1, 8), full=(4096, 11008, 8, 32))
shape = LlamaConfig(vocab_size=512, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                    num_attention_heads=heads, num_key_value_heads=heads)


def random_model(bits):
    """The same random weights each time, rounded to nearest in groups of 128."""
    torch.manual_seed(0)
    with torch.device(device.torch):
        made = LlamaForCausalLM(shape).to(device.dtype).eval()
    if bits < 16:
        room.quantize_model(made, method="rtn", bits=bits, group_size=128, progress=False)
    return made


def one_token(of):
    """A function that runs one token through the model; on a GPU captured as a graph."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device.torch)

    def forward():
        with torch.no_grad():
            return of(input_ids=ids, position_ids=ids, use_cache=False).logits

    if device.kind == "cpu":
        return forward
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = forward()

    def replay():
        graph.replay()
        return kept

    replay.uses = of, ids  # the graph knows their addresses only
    return replay


tokens, sizes = {}, {}
for bits in (16, 4, 3):
    built = random_model(bits)
    sizes[bits] = sum(t.numel() * t.element_size() for t in (*built.model.layers.parameters(),
                                                             *built.model.layers.buffers()))
    tokens[bits] = one_token(built)
names = {16: str(device.dtype)[6:], 4: "4 bits", 3: "3 bits"}
found = bench.compare("One token", {names[bits]: run for bits, run in tokens.items()}, ours="4 bits",
                      peer=names[16], device=device, repeats=7, queued=True)
print(f"{layers} layer{'s' * (layers > 1)} {hidden} wide")
for bits, name in names.items():
    median = found.median(name)
    print(f"{name:10}{1000 * median:9.2f} ms a token{found.median(names[16]) / median:8.2f}x"
          f"{sizes[bits] / 1e6:10.1f} MB of weights")
tokens.clear()

# %% [markdown]
# On a GPU this is the lecture's table in small, and the factors are smaller as well. Part of its speedup comes from the
# GPUs that are no longer there, and from what they no longer have to tell each other. And fewer bytes are not always less
# time: a code of 3 bits takes more work to unpack than one of 4, so that our product with 3 bits reads less and gains less.
# On a CPU with plain PyTorch low bits save memory and cost time. (Embeddings stay as they were. They are a small part of a
# large model, and a seventh of course-base.)
#
# ## Stretch A: the order of the columns
#
# *A badge, about 30 minutes, difficulty 3 of 5.*
#
# Does the order matter? The slide says no, and the paper that it cites had compared left to right with OBQ's greedy
# order. But later the authors' own code gained an option, `act-order`: begin with the columns whose inputs are
# **largest**, $H_{jj}$ descending. They are rounded while there are still many others to make up for them; the last
# column has nobody left. Each column keeps the grid of its group, and in the end all codes stand where their weights
# stood.
#
# <details><summary>Hint 1</summary>
#
# You may call `gptq_columns`. Permute the columns of the weight, and rows **and** columns of the Hessian.
# </details>
# <details><summary>Hint 2</summary>
#
# After the permutation, neighbours no longer belong to the same group. But `gptq_columns` takes any number of groups,
# as many as there are columns, too: give every column its own scale and zero point, and permute those as well.
# </details>
# <details><summary>Hint 3</summary>
#
# If `order` says which column comes first, second, ..., then `torch.argsort(order)` says where each has gone.
# </details>

# %% exercise="act_order"
def act_order(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes of GPTQ with the columns taken in the order of falling hessian[j, j].

    weight, hessian, scale, zero, bits: as in gptq_columns; no two numbers on the Hessian's diagonal are equal
    Returns codes, uint8 [rows, columns], in the weight's own order; each on the grid of its column's group.
    """
    ### BEGIN SOLUTION
    group_size = weight.shape[1] // scale.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True)
    each_scale, each_zero = (part.repeat_interleave(group_size, dim=1)[:, order] for part in (scale, zero))
    codes = gptq_columns(weight[:, order], hessian[order][:, order], each_scale, each_zero, bits)
    return codes[:, torch.argsort(order)]
    ### END SOLUTION


# %% check="act_order"
check("act_order", act_order)

# %% tags=["demo"] needs=["round_to_nearest", "calibration_hessian", "gptq_columns", "act_order"]
def in_order(weight, hessian, scale, zero, bits, order):
    """GPTQ with the columns in any given order, each on the grid of its own group."""
    size = weight.shape[1] // scale.shape[1]
    each = [part.repeat_interleave(size, dim=1)[:, order] for part in (scale, zero)]
    return gptq_columns(weight[:, order], hessian[order][:, order], *each, bits)[:, torch.argsort(order)]


bits, orders = 3, {}
for last in ("self_attn.q_proj", "self_attn.o_proj"):
    name = f"model.layers.1.{last}"
    weight, hessian = linears(model)[name].weight.detach().float(), hessians[name]
    nearest, scale, zero = round_to_nearest(weight, bits, GROUP)
    arguments = (weight, damped(hessian), scale, zero, bits)
    count = weight.shape[1]
    falling = torch.argsort(hessian.diagonal(), descending=True)
    ways = {"left to right": gptq_columns(*arguments), "act-order": act_order(*arguments),
            "the reverse of it": in_order(*arguments, falling.flip(0))}
    for seed in range(3):
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(device.torch)
        ways[f"random {seed}"] = in_order(*arguments, shuffled)
    base = layer_error(weight, dequantize(nearest, scale, zero), hessian)
    orders[last] = {way: layer_error(weight, dequantize(codes, scale, zero), hessian) / base
                    for way, codes in ways.items()}
figure, axes = plots.figure(f"Layer 1, {bits} bits: GPTQ's error by the order of the columns",
                            "error of the outputs, as a share of round to nearest's", "order",
                            caption="Left is better. Random orders differ little from each other.")
for look, (last, row) in zip(plots.looks(2), orders.items()):
    axes.plot(list(row.values()), range(len(row)), **{**look, "linestyle": ""}, label=last)
axes.set_yticks(range(len(row)), labels=list(row))
axes.invert_yaxis()
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
spoken = "; ".join(f"{last}: " + ", ".join(f"{way} {value:.2f}" for way, value in row.items())
                   for last, row in orders.items())
plots.show(figure, f"Error relative to round to nearest for six orders and two weights. {spoken}.")

# %% [markdown]
# So the slide is right about orders that know nothing, and not about those that do. What act-order gains grows with
# the differences between the inputs' sizes; in course-base they are small.
#
# ## Stretch B: eight codes in three bytes
#
# *A badge, about 30 minutes, difficulty 3 of 5.*
#
# Three does not divide eight, so some codes lie across the edge of a byte. Eight codes of 3 bits are 24 bits, three
# bytes; here are the two orders for the codes $a$ to $h$, with $a_2 a_1 a_0$ the bits of $a$ from high to low:
#
# ```
#               byte 0             byte 1             byte 2
#  low first    c1c0b2b1b0a2a1a0   f0e2e1e0d2d1d0c2   h2h1h0g2g1g0f2f1
#  high first   a2a1a0b2b1b0c2c1   c0d2d1d0e2e1e0f2   f1f0g2g1g0h2h1h0
# ```
#
# Bytes are written as numbers are, from the high bit to the low one.
#
# The next cell says which is yours. Where the columns are no multiple of eight, the last bytes are filled with zero
# bits, and there are no more of them than needed: 5 codes are 15 bits, 2 bytes.

# %%
effnlp_lab.variant("pack_int3")

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# Take every code apart into its three bits, in the order of the stream: [rows, columns, 3], then flatten. `(x >> 2) & 1`
# is bit 2 of x.
# </details>
# <details><summary>Hint 2</summary>
#
# Pad the stream to a multiple of eight, view it as [rows, bytes, 8], shift each of the eight bits to its place and
# add them up. A sum of uint8 is int64 unless it is told `dtype=torch.uint8`.
# </details>

# %% exercise="pack_int3"
def pack_int3(codes: Tensor) -> Tensor:
    """Codes of 3 bits as a stream without gaps, a stream for each row.

    codes: uint8 [rows, columns], 0 to 7
    Returns uint8 [rows, ceil(3 * columns / 8)], in the order of bits that your variant says; what is left of
    the last byte is 0.
    """
    ### BEGIN SOLUTION
    places = torch.arange(8, device=codes.device)
    stream = ((codes[:, :, None] >> places[:3]) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8))
    return (stream.unflatten(1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)
    ### END SOLUTION


# %% check="pack_int3"
check("pack_int3", pack_int3)

# %% tags=["demo"] needs=["pack_int3"]
sample = torch.randint(8, (64, 1000), generator=generator, dtype=torch.uint8)
stream = pack_int3(sample)
single = (sample.numpy()[:, :, None] >> numpy.arange(3)) & 1
low = numpy.packbits(single.reshape(64, -1), axis=1, bitorder="little")
high = numpy.packbits(single[:, :, ::-1].reshape(64, -1), axis=1, bitorder="big")
print(f"64,000 codes in {stream.numel():,} bytes: {8 * stream.numel() / sample.numel():.3f} bits each")
print("as NumPy packs them:", numpy.array_equal(stream.numpy(), low) or numpy.array_equal(stream.numpy(), high))

# %% [markdown]
# A kernel does not like this layout: to get at code $c$ or $f$ it needs two bytes. Fast 3-bit products keep two bits
# of every code in one plane and the third bit in another (see `effnlp_lab/quantization/packing.py`), which is the same
# number of bytes, and every word comes apart with shifts alone.
#
# ## Stretch C: optimizer state in 8 bits
#
# *A badge, about 30 minutes, difficulty 2 of 5.*
#
# Not only weights: AdamW keeps two numbers a weight, and in 8 bits they are a quarter of the size. Two ideas make it
# work (Dettmers et al., 2022). **Blocks**: each 256 numbers, in the order in which they lie in memory, are divided by
# their own largest magnitude, so that an outlier spoils its own block alone. **Uneven values**: the 256 codes stand
# for values that are close together near 0 and far apart near 1, since the averages of squares span many powers of
# ten. A code is the index of the nearest value.
#
# The slide in another of your lectures has "evenly spaced bins" for NF4; it is a code of this kind, and its bins are
# not even.
#
# <details><summary>Hint 1</summary>
#
# Flatten, pad with zeros to a multiple of the block, view as [blocks, block]. Zeros do not change a largest magnitude.
# </details>
# <details><summary>Hint 2</summary>
#
# The nearest of ascending values: the borders are halfway between neighbours, and `torch.bucketize(x, borders)` says
# between which two borders x lies.
# </details>

# %% exercise="blockwise_state"
def blockwise_state(x: Tensor, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """8-bit codes of a tensor, block by block.

    x: float32 of any shape with at least one number; a block is `block` neighbours in memory order, and the
        last block may be shorter
    values: float32 [256], ascending, what the codes stand for; 0 and 1 are among them, all are in [-1, 1]
    Returns (codes, absmax): codes uint8 of the shape of x, each the index of the value nearest to x / absmax
    of its block; absmax float32 [blocks], the largest magnitude of each. A block of zeros has absmax 0 and
    the code of 0.
    """
    ### BEGIN SOLUTION
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % block)).view(-1, block)
    absmax = flat.abs().amax(1)
    shares = flat / absmax.masked_fill(absmax == 0, 1.0)[:, None]
    codes = torch.bucketize(shares, (values[:-1] + values[1:]) / 2)
    return codes.flatten()[: x.numel()].view(x.shape).to(torch.uint8), absmax
    ### END SOLUTION


# %% check="blockwise_state"
check("blockwise_state", blockwise_state)

# %% [markdown]
# A small model of bytes (the next byte from the last one), trained three times: with Adam's states in float32, in your
# 8 bits, and in 8 bits with one evenly spaced grid for the whole tensor.

# %% tags=["demo"] needs=["blockwise_state"]
from effnlp_lab.training.blockwise import dynamic_map

cut = b"".join(document.text.encode() for document in load_text("course-english", limit_bytes=60_000))
text = torch.frombuffer(bytearray(cut), dtype=torch.uint8).long()
even = {True: torch.linspace(-1, 1, 255), False: torch.linspace(0, 1, 256)}
even[True] = torch.cat([even[True], torch.ones(1)])  # 255 steps around 0, so that 0 is one of them


def there_and_back(x, values, block):
    codes, absmax = blockwise_state(x, values, block)
    return values[codes.long()] * absmax.repeat_interleave(block)[: x.numel()].view(x.shape)


def trained(keep):
    """Losses of 60 steps of Adam; keep(state, signed) is what a state is like after it was stored."""
    table, losses = torch.zeros(256, 256), []
    mean, square = torch.zeros(256, 256), torch.zeros(256, 256)
    rows = torch.Generator().manual_seed(0)
    for step in range(1, 61):
        at = torch.randint(len(text) - 1, (2048,), generator=rows)
        losses.append(torch.nn.functional.cross_entropy(table[text[at]], text[at + 1]).item())
        shares = torch.softmax(table[text[at]], 1) - torch.nn.functional.one_hot(text[at + 1], 256)
        gradient = torch.zeros(256, 256).index_add_(0, text[at], shares / len(at))
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
        table = table - 0.1 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-8)
        mean, square = keep(mean, True), keep(square, False)
    return losses


curves = {"float32": trained(lambda x, signed: x),
          "8 bits, blocks, uneven": trained(lambda x, signed: there_and_back(x, dynamic_map(signed), 256)),
          "8 bits, one grid, even": trained(lambda x, signed: there_and_back(x, even[signed], x.numel()))}
figure, axes = plots.figure("Adam with its states in 8 bits", "step", "loss (nats a byte)",
                            caption="Small averages of squares that are rounded to 0 make steps of any size.")
for name, losses in curves.items():
    axes.plot(losses, label=name, marker="")
axes.set_ylim(2.0, 9)
axes.legend(loc="upper right")
spoken = ", ".join(f"{name} {losses[-1]:.2f}" for name, losses in curves.items())
plots.show(figure, f"Loss against steps for three kinds of optimizer state. After 60 steps: {spoken}.")

# %% [markdown]
# ## Stretch D: SpQR's outliers
#
# *A badge, about 40 minutes, difficulty 4 of 5.*
#
# At 3 bits and fewer, a few weights do most of the damage. The workshop's slide on **SpQR** (Dettmers et al., 2023)
# says that 1% of the weights make 75% of the error, and its cure is to keep those in 16 bits, in a sparse matrix beside
# the codes. Which ones? Those whose absence helps most. A weight that is taken out of its group takes its own error
# with it, and besides the group's grid need not reach for it any more:
#
# $$\text{gain}_i = \sum_{k \in \text{group}} c_k\,(w_k - \hat w_k)^2 \;-\;
# \sum_{k \in \text{group},\, k \ne i} c_k\,(w_k - \hat w_k^{\text{without } i})^2,$$
#
# where $\hat w^{\text{without } i}$ is on the grid of the group without weight $i$, and $c_k = 1 / U_{kk}^2$ is how much
# an error in column $k$ costs GPTQ.
#
# <details><summary>Hint 1</summary>
#
# A weight of 0 has no say in a grid that always spans 0, and no error. So "without weight i" is "with a 0 in its
# place", and `round_to_nearest` and `dequantize` do the rest.
# </details>
# <details><summary>Hint 2</summary>
#
# One loop over the places in a group will do: `weight[:, place::group_size]` is that place in every group of every row.
# </details>
# <details><summary>Hint 3</summary>
#
# `gain.flatten().topk(count).indices` are the places of the largest, in a flat tensor of booleans.
# </details>

# %% exercise="find_outliers"
def find_outliers(weight: Tensor, importance: Tensor, bits: int, group_size: int, count: int) -> Tensor:
    """The weights whose absence lowers the error of their group most.

    weight: float32 [rows, columns]
    importance: float32 [columns], positive, what a squared error in a column costs
    bits, group_size: of the grids, as in round_to_nearest with its usual clip of 1
    count: how many outliers to find in the whole weight, at least 1
    Returns bool [rows, columns], True for the `count` weights with the largest gain.
    """
    ### BEGIN SOLUTION
    def error(kept: Tensor) -> Tensor:
        restored = dequantize(*round_to_nearest(kept, bits, group_size))
        return ((kept - restored) ** 2 * importance).unflatten(1, (-1, group_size)).sum(-1)

    gain = torch.empty_like(weight)
    for place in range(group_size):
        without = weight.clone()
        without[:, place::group_size] = 0
        gain[:, place::group_size] = error(weight) - error(without)
    outliers = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    outliers[gain.flatten().topk(count).indices] = True
    return outliers.view(weight.shape)
    ### END SOLUTION


# %% check="find_outliers"
check("find_outliers", find_outliers)

# %% tags=["demo"] needs=["round_to_nearest", "calibration_hessian", "find_outliers"]
name, size = "model.layers.1.self_attn.q_proj", 16
weight, hessian = linears(model)[name].weight.detach().float(), hessians[name]
upper = torch.linalg.cholesky(torch.linalg.inv(damped(hessian).double()), upper=True)
importance = (upper.diagonal() ** -2).float()
shares, outlier_errors = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04), {2: [], 3: []}
for bits, row in outlier_errors.items():
    for share in shares:
        count = int(share * weight.numel())
        keep = torch.zeros_like(weight, dtype=torch.bool)
        if count:
            keep = find_outliers(weight, importance, bits, size, count)
        rest = dequantize(*round_to_nearest(weight.masked_fill(keep, 0), bits, size))
        row.append(layer_error(weight, torch.where(keep, weight, rest), hessian))
figure, axes = plots.figure("The error with some weights kept in 16 bits", "weights kept (%)",
                            "error, as a share of that without outliers",
                            caption=f"{name}, groups of {size}, rounded to nearest.")
for bits, row in outlier_errors.items():
    axes.plot([100 * share for share in shares], [value / row[0] for value in row], label=f"{bits} bits")
axes.set_ylim(0, 1.05)
axes.legend()
spoken = ", ".join(f"{bits} bits {row[3] / row[0]:.0%}" for bits, row in outlier_errors.items())
plots.show(figure, "Remaining error against the share of weights kept. At 1%: "
                   f"{spoken} of the error without outliers.")
nearest = dequantize(*round_to_nearest(weight, 3, size))
each = ((weight - nearest) ** 2 * importance).flatten().sort(descending=True).values
worst = each[: len(each) // 100].sum() / each.sum()
print(f"the worst 1% of the weights make {worst:.0%} of the error at 3 bits")

# %% [markdown]
# Compare with the slide's 75%: its models are a thousand times larger, and outliers are a thing of large models. The
# idea holds, the figure does not carry over. An outlier costs 32 bits, 16 for the value and 16 for its column, so that
# 1% of them is a third of a bit a weight.
#
# ## The receipt
#
# course-base with 4 bits a weight, in groups of 64. Bytes are those of the layers' weights, with a 16-bit scale and an
# 8-bit zero point a group; that is what a token has to read. Seconds are those of quantizing. NF4 in bitsandbytes is
# what most people use, needs no data, and has an uneven code, made for weights that are distributed like a bell, with
# one 32-bit scale for 64 weights. (The two ideas do not exclude each other: GPTQ can round to any code.) The limit is 4
# bits and nothing else.

# %% tags=["demo"] needs=["round_to_nearest", "calibration_hessian", "gptq_blocks"]
import contextlib
import importlib.util
import io
import logging

from effnlp_lab.notebook.receipt import Receipt

count = sum(module.weight.numel() for module in linears(model).values())
receipt = Receipt("05", quality="perplexity", device=device,
                  title=f"course-base, {count:,} weights of its layers in 4 bits, groups of {GROUP}")
receipt.add("baseline", "16 bits", quality=full_perplexity, bytes_moved=2 * count)
four_bits = count * (4 + 24 / GROUP) / 8
for role, name, way, note in (("yours", "round to nearest", "round to nearest", ""),
                              ("yours", "GPTQ", "GPTQ, yours", "Hessians apart"),
                              ("reference", "the kit's GPTQ", "GPTQ, the kit", "with the model's passes")):
    quality, seconds = perplexities[way][4]
    receipt.add(role, name, quality=quality, seconds=seconds, bytes_moved=four_bits, note=note)
if importlib.util.find_spec("bitsandbytes"):
    logging.disable(logging.WARNING)  # it remarks on kernels that it does not find
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    logging.disable(logging.NOTSET)
    quality, seconds = with_all_weights(
        lambda _, w: dequantize_4bit(*quantize_4bit(w, blocksize=GROUP, quant_type="nf4")))
    receipt.add("library", "bitsandbytes NF4", quality=quality, seconds=seconds,
                bytes_moved=count * (4 + 32 / GROUP) / 8)
else:
    print("bitsandbytes is not installed, and so was not compared")
receipt.add("limit", "4 bits alone", bytes_moved=count / 2)
receipt.show()
print(f"saved as {receipt.save().name}")

# %% [markdown]
# ## In your own words
#
# A product manager wants a model of 7 billion weights on laptops, in 3 bits. What do you promise, what do you refuse to
# promise, and what do you measure before it ships?
#
# Write 60 to 120 words. A person reads and grades them.

# %% [markdown] written="laptop_model"
# **Rubric, for whoever grades** (shares of the points; another answer as good earns them too)
#
# - 0.3: bytes: about 3 bits a weight and the groups' scales on top, so about 3 GB instead of 14.
# - 0.3: quality: round to nearest hurts at 3 bits, GPTQ with groups hurts less; it depends on the model and has
#   to be measured on text (or tasks) of the product's own, not on the calibration data.
# - 0.2: speed is a property of the kernel, not of the format: no promise without one, and it pays for single
#   streams of text.
# - 0.2: a fallback: 4 bits, smaller groups, or outliers kept.

# %% [markdown]
# ## What you have learned
#
# - A code stands for $s\,(q - z)$. Products of int8 codes are summed in int32, because everything narrower overflows
#   and floats lose whole numbers.
# - A group is a run of input columns of one row. Small groups fit tightly and cost scales.
# - What counts is the error of a layer's outputs, $\frac12 \delta H \delta^\top$, with $H$ from calibration data.
#   Inputs are correlated, so weights can make up for each other.
# - GPTQ rounds a column, divides the error by the diagonal of the **inverse** of what is left, and moves the columns to
#   come. All those inverses are in one Cholesky factor, and updates of far columns can wait for the end of a block.
# - A lower error does not show that the loop is right; the same codes as the derivation's do.
# - Bytes are saved by the format, time by the kernel, and only where reading weights is what takes the time.
#
# ## Read on
#
# - E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
#   Pre-trained Transformers", 2022: algorithm 1 is your `gptq_blocks`.
# - E. Frantar, D. Alistarh, "Optimal Brain Compression", 2022: OBQ, and the elimination.
# - B. Hassibi, D. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993.
# - B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
#   2018: affine codes and integer products.
# - T. Dettmers, M. Lewis, Y. Belkada, L. Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
#   Scale", 2022.
# - T. Dettmers et al., "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression", 2023.
# - T. Dettmers, M. Lewis, S. Shleifer, L. Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", 2022.
# - J. Lin et al., "AWQ: Activation-aware Weight Quantization", 2023: another way to use the same calibration data.
# - In the kit: `effnlp_lab/quantization/gptq.py` is the same loop with grids found on the way, `kernel_gptq.py` its
#   Triton kernel, and `kernel_product.py` the 4-bit product. NF4 is in lab 04.
