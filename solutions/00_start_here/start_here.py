# %% [markdown]
# # Lab 00: Start here
#
# Two hours, and nothing counts. This lab shows how the notebooks of this course work, and gives you five habits
# that all of them need:
#
# | part | habit | exercises |
# |---|---|---|
# | 1 | reading what a check says | `masked_mean` |
# | 2 | thinking in named axes | `attention_scores`, `split_heads` |
# | 3 | timing a device that works behind your back | `timed` |
# | 4 | knowing what fits into memory before it does not | `best_match` |
# | 5 | writing a kernel, tile by tile | `add_vectors`, `row_sum`, `tiled_matmul` |
#
# **Points.** Each exercise carries one *practice point*, so that you see how points and partial credit look. None of
# them counts towards a grade. Wrong answers cost nothing here or in any other lab, and you may check as often as you like.
#
# **How to work.** Run the cells from top to bottom. A cell that says `raise NotImplementedError("your answer goes
# here")` is yours: replace that line. The cell below it checks your answer. Cells that begin with `%%demo` measure
# something with your answer, and wait until you have one. Hints are folded under each exercise, from a nudge to nearly
# everything.
#
# **With or without a GPU.** Everything runs on a laptop. Where there is no GPU, kernels run in Triton's interpreter
# (slowly, and on small sizes), and what only a GPU can show is counted instead, or said.
#
# {assistants} The blanks are short because the thinking is the work, and the predictions below are worth something
# only if they are yours.

# %% tags=["parameters"]
DEVICE = "auto"
FAST = "auto"

# %%
import effnlp_lab
from effnlp_lab import check
from effnlp_lab.notebook.portable import tl, triton

import math
import statistics
import time

import torch

device = effnlp_lab.start("00_start_here", device=DEVICE, fast=FAST)

# %% [markdown]
# The line above says which device was found, how much memory it has, and whether Triton kernels are compiled, run in the
# interpreter, or cannot run here at all (Triton is made for Linux; elsewhere every kernel exercise has a twin in plain
# PyTorch, for the same points).

# %% [markdown]
# ## 1. How a check speaks
#
# Sentences in a batch have different lengths. To make one rectangular tensor of them, the short ones are filled up with
# **padding**, and a mask says which tokens are real:
#
# ```text
#               token 1   token 2   token 3   token 4      real
# sentence 1    [Who]     [is]      [Obama]   [?]          T T T T
# sentence 2    [Hi]      [!]       [pad]     [pad]        T T F F
# sentence 3    [pad]     [pad]     [pad]     [pad]        F F F F
# ```
#
# A common way to turn a sentence into one vector is the mean of its tokens' vectors. With $r_{st} = 1$ for a real token
# and $0$ for padding,
#
# $$\text{mean}_s = \frac{\sum_t r_{st}\, x_{st}}{\max\left(1, \sum_t r_{st}\right)} .$$
#
# The maximum keeps a sentence without any token from being 0/0: its mean is the zero vector.
#
# ### Exercise 1: the mean of the real tokens
#
# *1 point, about 8 minutes, difficulty 1 of 5.*
#
# Do this one wrong first. Write `return tokens.mean(dim=1)`, run the check, and read what it says: it names the slip,
# shows the first case that failed, and gives the points of the parts that do work. Then do it right.
#
# <details><summary>Hint 1</summary>
#
# `real[:, :, None]` has the shape `[sentences, length, 1]`, and multiplies every number of a token's vector.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The number of real tokens of each sentence is `real.sum(dim=1, keepdim=True)`, of shape `[sentences, 1]`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `.clamp(min=1)` turns a count of 0 into 1.
#
# </details>


# %% exercise="masked_mean"
def masked_mean(tokens, real):
    """The mean of each sentence's real tokens.

    tokens: float tensor [sentences, length, width], finite everywhere, padding included.
    real:   bool tensor [sentences, length], True for a token, False for padding (anywhere).
    Returns a tensor [sentences, width] of the same dtype; zeros for a sentence without tokens.
    """
    ### BEGIN SOLUTION
    count = real.sum(dim=1, keepdim=True).clamp(min=1)
    total = (tokens * real[:, :, None]).sum(dim=1)
    return total / count
    ### END SOLUTION


# %% check="masked_mean"
check("masked_mean", masked_mean)

# %% [markdown]
# A check draws fresh random cases each time and says one of seven things: *not attempted, correct, incorrect, crashed,
# timed out, over budget* (right, but with too much memory or work), or *not run here* (needs a GPU). The line that
# counts the cases unfolds to all of them, the part each belongs to, and the seed. When a check refuses an answer, its
# sentence is about your answer; when it names a likely mistake, that mistake gives what your answer gave.

# %% [markdown]
# ## 2. Shapes and einsum
#
# Most bugs in this course are two axes swapped, so we name axes. `torch.einsum` takes a name (one letter) for each axis of
# each input, and the names of the output after an arrow. Two rules are all there is:
#
# 1. an axis with the same letter in two inputs is multiplied element by element;
# 2. a letter that does not come back after the arrow is summed over.
#
# ```text
#   "mk,kn->mn"     sum over k of a[m,k] * b[k,n]     a matrix product
#   "bd,bd->b"      one dot product for every b
#   "ij->ji"        a transpose: nothing is summed
# ```

# %% tags=["nbval-check-output"]
left, right = torch.ones(2, 3), torch.ones(3, 5)
for rule, inputs in {
    "mk,kn->mn": (left, right),
    "mk,mk->m": (left, left),
    "ij->ji": (left,),
    "ij->": (left,),
}.items():
    print(
        f"{rule:10}",
        [list(t.shape) for t in inputs],
        "->",
        list(torch.einsum(rule, *inputs).shape),
    )

# %% [markdown]
# ### Exercise 2: attention scores
#
# *1 point, about 8 minutes, difficulty 1 of 5.*
#
# In attention every token asks (with its *query*) how well every token (with its *key*) answers. For batch $b$, head
# $h$, query $q$, key $k$ and head dimension $d$,
#
# $$\text{scores}_{bhqk} = \frac{1}{\sqrt{d}} \sum_{i=1}^{d} Q_{bhqi}\, K_{bhki} .$$
#
# Why the square root? If the entries of $Q$ and $K$ are independent with variance 1, the sum has variance $d$; dividing
# by $\sqrt d$ gives it variance 1 again, and keeps the softmax from picking one key and forgetting the rest.
#
# <details><summary>Hint 1</summary>
#
# Name the axes of the queries `bhqd` and those of the keys `bhkd`. Which letter is summed over?
#
# </details>
# <details><summary>Hint 2</summary>
#
# The output is `bhqk`. The head dimension is `queries.shape[-1]`.
#
# </details>


# %% exercise="attention_scores"
def attention_scores(queries, keys):
    """Scaled dot products of every query with every key.

    queries: float tensor [batch, heads, query, dim].
    keys: float tensor [batch, heads, key, dim].
    Returns a tensor [batch, heads, query, key] of the same dtype, divided by sqrt(dim).
    """
    ### BEGIN SOLUTION
    return torch.einsum("bhqd,bhkd->bhqk", queries, keys) / math.sqrt(queries.shape[-1])
    ### END SOLUTION


# %% check="attention_scores"
check("attention_scores", attention_scores)

# %% [markdown]
# ### Exercise 3: cut a vector into heads
#
# *1 point, about 8 minutes, difficulty 2 of 5.*
#
# Where do the heads come from? A model's hidden vector of `width` numbers is cut into `heads` pieces, each
# `dim = width / heads` long, and the heads' axis moves before the length's, so that each head sees a sequence:
#
# ```text
#   one token:   [ a a a | b b b ]          runs: width 6, two heads of three
#                [ a b a b a b ]            turns: the same heads, dealt out like cards
#
#   [batch, length, width]  ->  [batch, length, heads, dim]  ->  [batch, heads, length, dim]
#                        cut                              swap
# ```
#
# Both layouts are in use, and nothing in a checkpoint tells which. Here, as in the other labs, one detail of the task
# is **yours**: a cell prints it, and the check asks for it. In a course it depends on your name.
# %%
effnlp_lab.variant("split_heads")

# %% [markdown]
# Beware of doing both steps at once. `reshape` never moves a number: it deals the numbers out in the order in which they lie,
# and straight to `[batch, heads, length, dim]` it would mix tokens into heads without a word of complaint.
#
# <details><summary>Hint 1</summary>
#
# Two steps: `reshape` to four axes, then `transpose(1, 2)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# For runs, the four axes of the first step are `batch, length, heads, width // heads`. (With einops, both steps are
# `rearrange(hidden, "b l (h d) -> b h l d", h=heads)`.) For turns, the last two axes of the first step trade places.
#
# </details>


# %% exercise="split_heads"
def split_heads(hidden, heads):
    """Cut the last axis into heads and put the heads before the length.

    hidden: tensor [batch, length, width], of any strides;  heads: int, divides width.
    Returns a tensor [batch, heads, length, dim] (a view or a copy) with dim = width // heads. By your variant
    head h holds the numbers h * dim to (h + 1) * dim - 1 of each token's vector (runs), or the numbers
    h, h + heads, h + 2 * heads, ... (turns).
    """
    ### BEGIN SOLUTION
    batch, length, width = hidden.shape
    return hidden.reshape(batch, length, heads, width // heads).transpose(1, 2)
    ### END SOLUTION


# %% check="split_heads"
check("split_heads", split_heads)

# %% [markdown]
# ### Who may look at whom: autoregressive and autoencoding models
#
# One architecture, two ways to train it. What differs is the **mask** on the attention scores and the question asked:
#
# | | autoregressive (GPT, Llama) | autoencoding (BERT) |
# |---|---|---|
# | a token sees | itself and what is on its left (causal mask) | the whole sentence |
# | learns to | say the next token, at every position | restore tokens that were blanked out |
# | "After practice she went to the ____" | its home ground | possible: a blank at the end |
# | "Steve loved his previous ____, he had a great team and ____ his work." | must say the first blank before it has read the rest | fills both, from both sides |
# | used for | generating text, one token after another | classification, semantic search |
#
# A mask is a picture that you will meet again in every lab on attention. Row: the token that looks. Column: the token that
# is looked at.


# %% tags=["nbval-check-output"]
def masks(length):
    """The causal and the full mask, bool [length, length]: True where row may look at column."""
    full = torch.ones(length, length, dtype=torch.bool)
    return {"autoregressive": full.tril(), "autoencoding": full}


def picture(mask):
    """One line of text for each row of a mask: # where it may look."""
    return [" ".join("#" if seen else "." for seen in row) for row in mask]


words = "after practice she went to the ____".split()
causal, full = masks(len(words)).values()
print(f"{'':9}  autoregressive  autoencoding")
for word, left_only, everything in zip(words, picture(causal), picture(full), strict=True):
    print(f"{word:>9}  {left_only:14}  {everything}")
print(f"{int(causal.sum())} of {causal.numel()} pairs, and all of them")

# %% [markdown]
# The next cell trains two tiny models of the same architecture (2 layers, width 64, well under a million parameters) on
# the same few thousand made-up sentences, one in each way, and asks both for the blanks. The first blank of Steve's
# sentence can only be told from what comes *after* it: there were a job with a great team, a school with a great teacher
# and a band with a great drummer, each as often. **Before you run it:** which probabilities will the autoregressive
# model give to "job", "school" and "band"? Which will the other model give?

# %% tags=["demo"]
import itertools
import random

from effnlp_lab.notebook import plots

EVENTS = {
    "practice": "showers",
    "lunch": "office",
    "class": "library",
    "work": "station",
    "dinner": "cinema",
}
STORIES = [
    ("job", "team", "enjoyed", "work"),
    ("school", "teacher", "missed", "lessons"),
    ("band", "drummer", "sang", "songs"),
]
NAMES = ["she", "he", "steve", "ana", "lee"]


def sentence(rng):
    """One made-up sentence, as a list of words."""
    name = rng.choice(NAMES)
    if rng.random() < 0.5:
        event, place = rng.choice(list(EVENTS.items()))
        return f"after {event} {name} went to the {place} .".split()
    thing, mate, did, what = rng.choice(STORIES)
    return f"{name} loved his previous {thing} , he had a great {mate} and {did} his {what} .".split()


class TinyTransformer(torch.nn.Module):
    """Two layers of attention. The same for both ways of training: only the mask differs."""

    def __init__(self, vocabulary, length, width=64):
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.position = torch.nn.Parameter(torch.randn(length, width))
        layer = torch.nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, vocabulary)

    def forward(self, ids, mask):
        """ids [batch, length], mask [length, length] (True: may look) -> logits."""
        hidden = self.embed(ids) + self.position[: ids.shape[1]]
        return self.head(self.layers(hidden, mask=~mask))


rng = random.Random(0)
corpus = [sentence(rng) for _ in range(4000)]
vocabulary = ["[pad]", "[blank]", *sorted(set(itertools.chain(*corpus)))]
number = {word: i for i, word in enumerate(vocabulary)}
longest = max(map(len, corpus))
ids = torch.tensor([[number[w] for w in s] + [0] * (longest - len(s)) for s in corpus])


def train(kind, steps=200):
    """Train a tiny model on the next word (autoregressive), or on blanks (autoencoding)."""
    torch.manual_seed(0)
    model = TinyTransformer(len(vocabulary), longest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (32,))]
        if kind == "autoregressive":
            seen, wanted = batch[:, :-1], batch[:, 1:]
        else:
            blank = (torch.rand(batch.shape) < 0.25) & (batch != 0)
            seen, wanted = (
                batch.masked_fill(blank, number["[blank]"]),
                batch.masked_fill(~blank, 0),
            )
        logits = model(seen, masks(seen.shape[1])[kind])
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=0
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def guesses(model, kind, text, at, count=3):
    """The likeliest words for the blank at `at`; the autoregressive model sees what is left of it."""
    words = text.split()
    padded = words + ["[pad]"] * (longest - len(words))
    shown = words[:at] if kind == "autoregressive" else padded
    seen = torch.tensor([[number.get(w, number["[blank]"]) for w in shown]])
    row = at - 1 if kind == "autoregressive" else at
    chances = model(seen, masks(len(shown))[kind])[0, row].softmax(-1)
    return [(vocabulary[i], chances[i].item()) for i in chances.topk(count).indices]


models = {kind: train(kind) for kind in ("autoregressive", "autoencoding")}
questions = [
    ("after practice she went to the ____ .", 6),
    ("steve loved his previous ____ , he had a great team and ____ his work .", 4),
    ("steve loved his previous ____ , he had a great team and ____ his work .", 12),
]
for text, at in questions:
    print(" ".join(w if i != at else "[____]" for i, w in enumerate(text.split())))
    for kind, model in models.items():
        print(
            f"  {kind:15}",
            ", ".join(
                f"{word} {chance:.0%}" for word, chance in guesses(model, kind, text, at)
            ),
        )

# %% [markdown]
# The autoregressive model is not worse: it was asked a question that its mask forbids it to answer. At the second blank
# it does read "great team" on its left, though the first blank still stands unfilled there, which it never saw in training, so it
# is less sure than it could be.
# In exchange, its mask lets it generate: what it computed for the first tokens stays valid when a token is added, which
# is what makes caching keys and values possible.

# %% [markdown]
# ## 3. Honest timing
#
# A GPU works through a queue. When Python calls `a @ b`, it puts a kernel into the queue and goes on at once; the result is
# computed later. A clock that is read right after the call measures how fast you can *ask*.
#
# Two more things spoil a measurement. The first calls compile kernels, allocate memory and fill caches. And now and then
# the machine does something else: one slow run moves a mean, and leaves a **median** where it was.
#
# So: warm up, synchronize, then for every run start the clock, work, synchronize, stop the clock; and take the median.
# Below is a pretend GPU to play with, on which every clock reading is exact and the same on every machine.


# %%
class PretendGpu:
    """A device with a queue. Asking takes `launch` seconds of the host's time; run i takes
    `durations[i]` seconds of the device's (the last one from then on). Nothing else takes time."""

    def __init__(self, launch, durations):
        self.launch, self.durations = launch, durations
        self.now, self.busy_until, self.runs = 0.0, 0.0, []

    def work(self):
        self.now += self.launch
        begin = max(self.busy_until, self.now)
        self.busy_until = begin + self.durations[min(len(self.runs), len(self.durations) - 1)]
        self.runs.append(
            (self.now - self.launch, begin, self.busy_until)
        )  # asked at, begun at, done at

    def synchronize(self):
        self.now = max(self.now, self.busy_until)

    def clock(self):
        return self.now


# %% [markdown]
# **Predict first.** The pretend GPU below needs 5 ms for one run, and asking takes 0.5 ms. Someone times four runs without
# synchronizing. What does the clock say after the four calls, in milliseconds? Write it down here, then run the cell under
# it.

# %% predict="unsynchronized"
my_naive_milliseconds = None  # your prediction

# %% tags=["demo"]
from effnlp_lab.notebook import plots

gpu = PretendGpu(launch=0.0005, durations=[0.005])
for _ in range(4):
    gpu.work()
asked = gpu.clock()
gpu.synchronize()
done = gpu.clock()
if my_naive_milliseconds is not None:
    print(f"you said {my_naive_milliseconds} ms")
print(f"the clock after four calls: {1000 * asked:.1f} ms")
print(f"the clock after synchronize(): {1000 * done:.1f} ms")

fig, ax = plots.figure(
    "Four runs on the pretend GPU",
    "time (ms)",
    "who works",
    "The host has asked for everything before the device has finished the first run.",
)
for run, (called, begun, ended) in enumerate(gpu.runs):
    ax.broken_barh(
        [(1000 * called, 0.5)],
        (1.1, 0.6),
        facecolors=plots.COLOURS["orange"],
        edgecolor="black",
    )
    ax.broken_barh(
        [(1000 * begun, 1000 * (ended - begun))],
        (0.1, 0.6),
        facecolors=plots.COLOURS["sky"],
        edgecolor="black",
    )
    ax.text(1000 * (begun + ended) / 2, 0.4, f"run {run + 1}", ha="center", va="center")
ax.axvline(1000 * asked, color=plots.COLOURS["vermilion"], linestyle="--")
ax.text(1000 * asked + 0.2, 1.85, "clock read here: naive", color=plots.COLOURS["vermilion"])
ax.axvline(1000 * done, color=plots.COLOURS["green"], linestyle="-")
ax.text(1000 * done - 0.2, 1.85, "here: honest", color=plots.COLOURS["green"], ha="right")
ax.set_yticks([0.4, 1.4], ["device", "host"])
ax.set_ylim(0, 2.15)
ax.grid(axis="y", visible=False)
fig.set_size_inches(7.2, 2.6)
plots.show(
    fig,
    "A timeline: the host asks four times within 2 ms, the device works through the four runs one "
    "after the other until about 20 ms. A clock read after the last call shows 2 ms, after "
    "synchronizing 20 ms.",
)

# %% [markdown]
# ### Exercise 4: an honest stopwatch
#
# *1 point, about 15 minutes, difficulty 2 of 5.*
#
# Write the stopwatch that you will use in the rest of this lab. The device's `synchronize` and the `clock` are arguments,
# so that the same function serves a GPU, a CPU and the pretend GPU.
#
# <details><summary>Hint 1</summary>
#
# After the warm-up something may still be in the queue. Whose time would it be added to?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Each run needs a stopwatch of its own: without single times there is no median.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `warmup` times `work()`; `synchronize()`; then `repeats` times: `start = clock()`, `work()`, `synchronize()`, and append
# `clock() - start` to a list. `statistics.median` takes the mean of the two middle ones when their number is even;
# `torch.median` takes the lower one.
#
# </details>


# %% exercise="timed"
def timed(work, synchronize, clock, warmup, repeats):
    """The median time of one run of `work`, in the clock's unit, as a float.

    work: called without arguments, exactly warmup + repeats times; may return before the device
        is done.
    synchronize: called without arguments, returns when the device has done all that it was asked.
    clock: called without arguments, returns the time as a float.
    warmup: int >= 0, calls that are not measured.
    repeats: int >= 1, calls that are measured one by one.
    A measured run begins on an idle device, and ends when the device is done. Of an even number of
    runs the median is the mean of the two middle ones.
    """
    ### BEGIN SOLUTION
    for _ in range(warmup):
        work()
    synchronize()
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        synchronize()
        times.append(clock() - start)
    return statistics.median(times)
    ### END SOLUTION


# %% check="timed"
check("timed", timed)

# %% [markdown]
# Now on the real device: a matrix product, timed naively (one call, no synchronization) and honestly. On a CPU, PyTorch
# has done the work when it returns, so waiting changes nothing there; what shows is how much single runs differ.


# %% tags=["demo"] needs=["timed"]
def settle():
    """Wait for the device; a CPU has nothing to wait for."""
    if device.kind == "cuda":
        torch.cuda.synchronize()


side = 512 if device.kind == "cpu" else device.pick(fast=4096, full=8192)
matrix = torch.randn(side, side, device=device.torch).to(device.dtype)
settle()
singles = []
for _ in range(5):
    asked = time.perf_counter()
    matrix @ matrix
    singles.append(time.perf_counter() - asked)
honest = timed(lambda: matrix @ matrix, settle, time.perf_counter, 3, 11)
flops = 2 * side**3
print(f"{side} x {side} matrix product, {device.dtype}, on {device.name}")
print("five naive readings:", ", ".join(f"{1e3 * s:.3f} ms" for s in singles))
print(
    f"honest median:       {1e3 * honest:.3f} ms, that is {flops / honest / 1e12:.3g} TFLOP/s"
)
if device.kind == "cuda":
    print(
        f"the last naive reading would mean {flops / singles[-1] / 1e12:.3g} TFLOP/s: "
        "compare with the card's data sheet"
    )
else:
    print(
        "On a GPU the naive readings would be a few hundredths of a millisecond, "
        "whatever the size of the matrices."
    )

# %% [markdown]
# ## 4. Peak memory
#
# A program runs out of memory at its worst moment, so the figure that counts is the **peak**: the most bytes that were
# alive at once. A tensor lives as long as something refers to it: a Python variable, an expression that is being computed,
# or the autograd graph, which keeps what the backward pass will need.
#
# The kit counts peak memory with a *meter* that watches every PyTorch operation. It counts bytes of tensors and times
# nothing, so it gives the same figure on every machine; that is how checks hold you to a memory budget.
#
# **Predict first.** Below, `x` is a float32 matrix of 2,048 x 2,048 (16 MiB), and so is each of the weights. Three
# functions compute the same numbers. How many MiB does each hold at its peak, *beyond* its inputs? Write three numbers
# down, then run the cell under them.

# %% predict="peaks"
my_peaks_in_mib = {"chained": None, "named": None, "with gradients": None}  # your predictions


# %% tags=["nbval-check-output"]
from effnlp_lab.notebook import memory


def chained(x, w1, w2):
    return torch.sigmoid(x @ w1) @ w2


def named(x, w1, w2):
    hidden = x @ w1
    active = torch.sigmoid(hidden)
    return active @ w2


x = torch.empty(
    2048, 2048, device="meta"
)  # "meta": a tensor with a shape and no numbers; counting needs no more
plain_weights = [torch.empty(2048, 2048, device="meta") for _ in range(2)]
trained_weights = [torch.empty(2048, 2048, device="meta", requires_grad=True) for _ in range(2)]
for name, function, weights in (
    ("chained", chained, plain_weights),
    ("named", named, plain_weights),
    ("with gradients", named, trained_weights),
):
    peak = memory.counted_peak(lambda: function(x, *weights))
    print(f"{name:15} {peak / memory.MIB:.0f} MiB at its peak")
kept = (
    memory.counted_peak(lambda: [chained(x, *trained_weights) for _ in range(4)]) / memory.MIB
)
print(f"four results kept in a list, with gradients: {kept:.0f} MiB")

# %% [markdown]
# `chained` holds two matrices at its worst moments (the product and its sigmoid, then the sigmoid and the result): the
# product is dropped as soon as nothing refers to it. In `named` the variable `hidden` keeps it alive to the end, so there
# are three. Gradients add nothing to these three, because what autograd keeps (`active`, for the backward pass of both the
# sigmoid and the product) is alive anyway. But a result *with a graph* drags its graph along: each of the four kept results
# costs 32 MiB and not 16. A list of losses that were never turned into numbers with `.item()` fills a GPU this way.

# %% [markdown]
# ### Exercise 5: the best match, in blocks
#
# *1 point, about 12 minutes, difficulty 2 of 5.*
#
# Semantic search: for each of $n$ queries, how similar is the best of $m$ documents? With the vectors as rows of $Q$ and
# $D$,
#
# $$\text{best}_i = \max_j \sum_k Q_{ik} D_{jk} .$$
#
# The obvious way computes the whole $n \times m$ matrix of similarities to keep one number of each row. A million queries
# against a million documents would be 4 TB of it. But a row needs no other row:
#
# ```text
#             documents                            documents
#           +-----------+                        +-----------+
#   queries |###########|  all at once    rows { |###########|  -> best of these rows,
#           |###########|                        |           |     then forget them
#           |###########|                        |           |
#           +-----------+                        +-----------+
# ```
#
# Compute it in blocks of `rows` queries, so that you never hold much more than one block of similarities. Part of the
# point is for the values; the other part is for the peak, which the meter counts.
#
# <details><summary>Hint 1</summary>
#
# `queries.split(rows)` gives the blocks; the last one may be shorter.
#
# </details>
# <details><summary>Hint 2</summary>
#
# For one block, `(block @ documents.T).amax(dim=1)`. `torch.cat` joins the results.
#
# </details>


# %% exercise="best_match"
def best_match(queries, documents, rows):
    """The similarity (dot product) of each query with its best document.

    queries: float tensor [n, dim];  documents: float tensor [m, dim];  rows: int; n, m, rows >= 1.
    Returns a tensor [n] of the same dtype. Holds at most two blocks of rows x m similarities at
    once (an intermediate of rows x m x dim numbers would be too much).
    """
    ### BEGIN SOLUTION
    return torch.cat([(block @ documents.T).amax(dim=1) for block in queries.split(rows)])
    ### END SOLUTION


# %% check="best_match"
check("best_match", best_match)

# %% [markdown]
# ### The lecture's out-of-memory error, and its cures
#
# The lecture's notebook loads TinyLlama (1.1 billion parameters) in float32 onto a card of 14.75 GiB, tokenizes 100
# prompts, and calls `model(input_ids)` once:
#
# ```text
# OutOfMemoryError: CUDA out of memory. Tried to allocate 18.00 MiB.
# GPU 0 has a total capacity of 14.75 GiB of which 11.06 MiB is free. ...
# Of the allocated memory 14.18 GiB is allocated by PyTorch ...
# ```
#
# Such a message can be read. The 18 MiB belong to one hidden state of 100 prompts x length x 2,048 numbers of 4 bytes:
# 0.78 MiB a token, rounded up to whole 2 MiB, so the prompts were padded to 22 or 23 tokens. A tiny request failed; what
# filled the card were the weights and everything that autograd had kept.
#
# We build a model of TinyLlama's shape (random weights: memory does not care) and count. On the "meta" device it
# takes a second and no memory, at full size, on any machine.

# %% tags=["nbval-check-output"]
SHAPE = dict(
    hidden_size=2048,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    intermediate_size=5632,
    vocab_size=32000,
)


def parameters(
    hidden_size,
    num_hidden_layers,
    num_attention_heads,
    num_key_value_heads,
    intermediate_size,
    vocab_size,
):
    """How many parameters a Llama of this shape has (embedding and output layer apart)."""
    keys_and_values = 2 * hidden_size * hidden_size * num_key_value_heads // num_attention_heads
    layer = (
        2 * hidden_size**2
        + keys_and_values
        + 3 * hidden_size * intermediate_size
        + 2 * hidden_size
    )
    return num_hidden_layers * layer + 2 * vocab_size * hidden_size + hidden_size


count = parameters(**SHAPE)
print(f"TinyLlama: {count:,} parameters")
print(f"weights: {memory.gib(4 * count)} in float32, {memory.gib(2 * count)} in half precision")
print(f"one hidden state of 100 prompts of 23 tokens: {memory.gib(100 * 23 * 2048 * 4)}")

# %% [markdown]
# **Predict first.** How many GiB does one forward pass of 100 prompts of 23 tokens need in float32 with gradients on,
# weights included? And what happens when the cell is run a second time, while `model_out` still holds the first result?

# %% predict="lecture_cell"
my_first_run_in_gib = None  # your prediction
my_second_run_in_gib = None  # your prediction

# %% tags=["demo"]
from transformers import LlamaConfig, LlamaForCausalLM

CARD = int(14.75 * memory.GIB)  # the lecture's card
LENGTH = 23


def llama(where, dtype):
    """A Llama of TinyLlama's shape with random weights on the device `where`."""
    config = LlamaConfig(**SHAPE, max_position_embeddings=2048, attn_implementation="eager")
    with torch.device(where):
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def forward(model, prompts, gradients, runs=1):
    """Call the model `runs` times on a batch, each time while the result of the last is still held,
    like a cell that assigns `model_out` and is run again."""
    ids = torch.zeros(prompts, LENGTH, dtype=torch.long, device=model.device)
    model_out = None
    with torch.set_grad_enabled(gradients):
        for _ in range(runs):
            model_out = model(ids)
    return model_out


SETTINGS = {  # label: dtype, gradients, prompts at once, runs
    "the lecture's cell": (torch.float32, True, 100, 1),
    "the same cell, run again": (torch.float32, True, 100, 2),
    "cure 1: no_grad": (torch.float32, False, 100, 2),
    "cure 2: half precision": (torch.float16, True, 100, 2),
    "cure 3: 25 prompts at once": (torch.float32, True, 25, 2),
    "all three": (torch.float16, False, 25, 2),
}
counted = {}
for label, (dtype, gradients, prompts, runs) in SETTINGS.items():
    model = llama("meta", dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    counted[label] = (
        weights,
        memory.counted_peak(lambda: forward(model, prompts, gradients, runs)),
    )

once, again = list(SETTINGS)[:2]
for mine, label in ((my_first_run_in_gib, once), (my_second_run_in_gib, again)):
    print(
        f"{label}: {memory.gib(sum(counted[label]))}"
        + (f" (you said {mine} GiB)" if mine is not None else "")
    )

# %% tags=["demo"]
fig, ax = plots.figure(
    "A forward pass of TinyLlama's shape, counted",
    "peak memory (GiB)",
    "setting",
    "Settings below the first are run twice, with the first result still held.",
)
labels = list(counted)[::-1]
for height, label in enumerate(labels):
    weights, working = (size / memory.GIB for size in counted[label])
    ax.barh(
        height, weights, color=plots.COLOURS["blue"], label="weights" if height == 0 else None
    )
    ax.barh(
        height,
        working,
        left=weights,
        color=plots.COLOURS["orange"],
        hatch="//",
        edgecolor="white",
        label="activations and results" if height == 0 else None,
    )
    ax.text(weights + working + 0.2, height, f"{weights + working:.1f}", va="center")
ax.axvline(
    CARD / memory.GIB,
    color=plots.COLOURS["vermilion"],
    linestyle="--",
    label="the lecture's card",
)
ax.set_yticks(range(len(labels)), labels)
ax.set_xlim(0, 24.5)
ax.legend(loc="lower right")
ax.grid(axis="y", visible=False)
fig.set_size_inches(8, 3.8)
plots.show(
    fig,
    "Bars of peak memory: "
    + "; ".join(f"{label} {sum(counted[label]) / memory.GIB:.1f} GiB" for label in counted)
    + "; the card has 14.75 GiB.",
)

# %% [markdown]
# By this count the first call fits, if only just, and the second cannot: the name `model_out` is bound to the new result
# only when the new result is there, so for a moment two autograd graphs are alive. The lecture's cell carries the number 31,
# so it may well have been run before (and its libraries, of 2023, may have held more than ours; the message does not say).
#
# The cures, and what each costs:
#
# 1. **`torch.no_grad()`** (or `inference_mode`): nothing is kept for a backward pass that never comes. For inference it is
#    free, and here it does nearly everything.
# 2. **Half precision** halves weights and activations alike. It costs accuracy, of which the labs on training and on
#    quantization have more to say. Here it makes room for both graphs, with little to spare.
# 3. **A smaller batch** divides the activations and leaves the weights. It costs throughput: the weights are read once a batch.
#
# Since activations grow in proportion to the batch and weights do not grow, peak memory is a straight line. Two tiny runs
# give the line, and the line says beforehand what fits. This is what the kit's own error message is made of:

# %% tags=["demo"]
model = llama("meta", torch.float32)
weights = counted[once][0]
line = memory.memory_line(
    lambda prompts: weights + memory.counted_peak(lambda: forward(model, prompts, True))
)
print(
    f"from 1 and 2 prompts: {memory.gib(line.fixed)}, and {memory.gib(line.each)} for each prompt"
)
print("predicted:", memory.fits(100, line, CARD, "prompts"))
print("predicted:", memory.fits(200, line, CARD, "prompts"))
print(f"counted at 100: {memory.gib(sum(counted[once]))}")

# %% [markdown]
# With a GPU, the next cell lets PyTorch use 14.75 GiB of it at most and runs all of this for real. Without one, it says what
# it would do, and reads the lecture's own error message the way the kit would.

# %% tags=["demo"]
MESSAGE = (
    "CUDA out of memory. Tried to allocate 18.00 MiB. GPU 0 has a total capacity of 14.75 GiB of "
    "which 11.06 MiB is free. Of the allocated memory 14.18 GiB is allocated by PyTorch, and "
    "437.93 MiB is reserved by PyTorch but unallocated."
)
if device.kind == "cuda" and device.memory_bytes >= CARD:
    with memory.card_of(CARD):
        for label, (dtype, gradients, prompts, runs) in SETTINGS.items():
            model = llama("cuda", dtype)
            twice = line if runs == 1 else memory.MemoryLine(line.fixed, 2 * line.each)
            try:
                with memory.sized(prompts, twice, CARD, "prompts"):
                    peak = memory.measured_peak(
                        lambda: forward(model, prompts, gradients, runs)
                    )
                said = f"measured {memory.gib(peak)}"
            except memory.OutOfMemory as error:
                said = str(error)
            print(f"{label:27} counted {memory.gib(sum(counted[label]))}; {said}")
            del model
            memory.release()
else:
    print("No GPU of 14.75 GiB or more here. On one, this cell would cap PyTorch at 14.75 GiB,")
    print("run the six settings, and print measured beside counted.")
    print("The lecture's error, in the kit's words:")
    print(
        " ",
        memory.explain(
            MESSAGE, 100, memory.MemoryLine(line.fixed, 2 * line.each), CARD, "prompts"
        ),
    )

# %% [markdown]
# ## 5. Three kernels
#
# A GPU runs many copies of one small **program** at once. Each copy works on one **tile** of the data and learns from
# `tl.program_id` which. In [Triton](https://triton-lang.org) such a program is a Python function under `@triton.jit`:
#
# ```text
#   x    [ . . . . | . . . . | . . . . | . . ]          count = 14, BLOCK = 4
#          program 0  program 1  program 2  program 3
#
#   offsets of program 3:   3 * 4 + [0 1 2 3] = [12 13 14 15]
#   inside  (offsets < 14):                     [ T  T  F  F]   <- the mask
# ```
#
# - Tensors arrive as *pointers* to their first number. `tl.load(pointer + offsets, mask=inside, other=0.0)` reads a tile,
#   and gives 0.0 where the mask is False; `tl.store(pointer + offsets, values, mask=inside)` writes one.
# - What a program does not mask it really reads or writes: the memory of someone else. The check puts NaN around the
#   inputs and watches the surroundings of the output, so it can tell you.
# - `BLOCK` is a `tl.constexpr`, known when the kernel is compiled; `tl.arange(0, BLOCK)` needs that, and a power of two.
# - The **launcher** is ordinary Python. `kernel[(programs,)](arguments)` starts that many copies; `triton.cdiv(a, b)`
#   is a / b rounded up.
#
# **Two ways to the point.** Each kernel has a PyTorch **twin**: the same tiles, one after another, as tensor operations in a
# loop. Solve either, and the check takes the better one. Where Triton is not to be had, write the twin. Where it is, the twin
# is a good first draft: once its slices are right, so are the kernel's offsets. Both write into `out`, which the caller
# hands over; that is the way of kernels, which cannot allocate.
#
# A twin may not compute with more numbers at once than its programs see, and in the Triton version PyTorch may not compute
# at all (allocating and copying are fine).

# %% [markdown]
# ### Exercise 6: add two vectors
#
# *1 point, about 12 minutes, difficulty 2 of 5.*
#
# $$\text{out}_i = x_i + y_i \qquad i = 0, \ldots, n - 1$$
#
# <details><summary>Hint 1</summary>
#
# Program `p` works on the numbers `p * BLOCK` to `p * BLOCK + BLOCK - 1`: `offsets = tl.program_id(0) * BLOCK +
# tl.arange(0, BLOCK)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `inside = offsets < count` masks both loads and the store.
#
# </details>
# <details><summary>Hint 3</summary>
#
# The launcher: `add_kernel[(triton.cdiv(x.numel(), block),)](x, y, out, x.numel(), BLOCK=block)`.
#
# </details>


# %% exercise="add_vectors"
@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """Program p adds tile p: BLOCK numbers, of which those at `count` and beyond do not exist."""
    ### BEGIN SOLUTION
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    x = tl.load(x_ptr + offsets, mask=inside)
    y = tl.load(y_ptr + offsets, mask=inside)
    tl.store(out_ptr + offsets, x + y, mask=inside)
    ### END SOLUTION


def add_vectors(x, y, out, block):
    """Launch add_kernel so that out = x + y.

    x, y, out: contiguous tensors [n] of one dtype, n >= 1;  block: int, a power of two.
    """
    ### BEGIN SOLUTION
    add_kernel[(triton.cdiv(x.numel(), block),)](x, y, out, x.numel(), BLOCK=block)
    ### END SOLUTION


# %% exercise="add_vectors_twin"
def add_vectors_twin(x, y, out, block):
    """The same without Triton: tile after tile, out = x + y (at most `block` numbers at once)."""
    ### BEGIN SOLUTION
    for start in range(0, x.numel(), block):
        end = start + block
        out[start:end] = x[start:end] + y[start:end]
    ### END SOLUTION


# %% check="add_vectors"
check("add_vectors", add_vectors, twin=add_vectors_twin)

# %% [markdown]
# ### Exercise 7: sum the rows
#
# *1 point, about 15 minutes, difficulty 3 of 5.*
#
# $$\text{out}_r = \sum_{c} x_{rc}$$
#
# One program for each row. A row may be longer than a tile, so the program walks along it with a loop and a running total.
# Two things to get right:
#
# - Row $r$ begins `r * row_stride` numbers after the first row. The stride may be more than the number of columns, when `x` is
#   a slice of a wider matrix: take it from `x.stride(0)`.
# - **The total is float32, whatever the inputs.** float16 has 11 significant bits: from 2,048 on it counts in twos, from
#   4,096 on in fours, and adding 1 to it changes nothing.
#
# <details><summary>Hint 1</summary>
#
# `for start in range(0, columns, BLOCK):` works inside a kernel.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Keep a tile of totals, `total = tl.zeros([BLOCK], tl.float32)`, add each loaded tile to it (`other=0.0` adds nothing), and
# sum it once at the end: `tl.sum(total, axis=0)`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# The pointer to a tile is `x_ptr + row * row_stride + offsets`, with `offsets = start + tl.arange(0, BLOCK)` and the mask
# `offsets < columns`. The launcher starts `x.shape[0]` programs.
#
# </details>


# %% exercise="row_sum"
@triton.jit
def row_sum_kernel(x_ptr, out_ptr, row_stride, columns, BLOCK: tl.constexpr):
    """Program r sums row r, tile by tile, in float32."""
    ### BEGIN SOLUTION
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row * row_stride + offsets, mask=offsets < columns, other=0.0)
    tl.store(out_ptr + row, tl.sum(total, axis=0))
    ### END SOLUTION


def row_sum(x, out, block):
    """Launch row_sum_kernel so that out[r] is the sum of row r.

    x: tensor [rows, columns], float32, float16 or bfloat16, both at least 1, of stride (any, 1);
    out: contiguous float32 tensor [rows];  block: int, a power of two.
    """
    ### BEGIN SOLUTION
    row_sum_kernel[(x.shape[0],)](x, out, x.stride(0), x.shape[1], BLOCK=block)
    ### END SOLUTION


# %% exercise="row_sum_twin"
def row_sum_twin(x, out, block):
    """The same without Triton: row by row, tile by tile, in float32 (at most `block` numbers at once)."""
    ### BEGIN SOLUTION
    rows, columns = x.shape
    for row in range(rows):
        total = torch.zeros((), device=x.device)
        for start in range(0, columns, block):
            total += x[row, start : start + block].float().sum()
        out[row] = total
    ### END SOLUTION


# %% check="row_sum"
check("row_sum", row_sum, twin=row_sum_twin)

# %% [markdown]
# ### Exercise 8: a product in tiles
#
# *1 point, about 25 minutes, difficulty 3 of 5.*
#
# $$\text{out}_{ij} = \sum_{l=0}^{k-1} a_{il}\, b_{lj}$$
#
# One program for each tile of `out`. It walks along the inner dimension, multiplies a tile of `a` with a tile of `b` and
# adds up:
#
# ```text
#                    b  [k, n]                    total  = 0
#                  +---+---+---+                  total += a-tile 1  @  b-tile 1
#                  |   | 1 |   |                  total += a-tile 2  @  b-tile 2
#                  +---+---+---+                  total += a-tile 3  @  b-tile 3
#                  |   | 2 |   |                  out-tile = total
#                  +---+---+---+
#                  |   | 3 |   |
#                  +---+---+---+
#    +---+---+---+ +---+---+---+
#    |   |   |   | |   |   |   |
#    +---+---+---+ +---+---+---+
#    | 1 | 2 | 3 | |   |out|   |
#    +---+---+---+ +---+---+---+
#      a  [m, k]      out [m, n]
# ```
#
# Why tiles? A program that computed one number of `out` would read a whole row and a whole column for it. A tile of
# 64 x 64 numbers reads 64 rows and 64 columns for 4,096 numbers: each number that is loaded is used 64 times. Nearly every
# kernel of this course is this picture with something added.
#
# - Neither $m$, $n$ nor $k$ need be a multiple of `block`. An edge of `out` is masked when it is stored; the **inner** edge has to
#   be loaded as zeros, because what is read there is added in.
# - `a` and `b` may be transposed, so all four strides are arguments. `out` is contiguous.
# - Keep the total in float32 and round once, at the end.
# - Write `tl.dot(a, b, input_precision="ieee")`. On a GPU the default for float32 rounds the inputs to TF32 (10 bits of
#   mantissa instead of 23). The interpreter does not, so this slip shows only on a GPU.
#
# <details><summary>Hint 1</summary>
#
# A tile of pointers comes from two vectors of offsets: `a_ptr + rows[:, None] * a_row + inner[None, :] * a_column`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The loop: `for start in range(0, k, BLOCK): inner = start + tl.arange(0, BLOCK)`, two loads, one `tl.dot`. The mask of
# `a` is `(rows[:, None] < m) & (inner[None, :] < k)`; that of `b` has `inner[:, None] < k` and `columns[None, :] < n`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# The grid has two axes: `(triton.cdiv(m, block), triton.cdiv(n, block))`. `out` is contiguous, so row $i$ begins at `i * n`.
#
# </details>


# %% exercise="tiled_matmul"
@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, out_ptr, m, n, k, a_row, a_column, b_row, b_column, BLOCK: tl.constexpr
):
    """Program (p, q) computes the tile of out whose rows begin at p * BLOCK and columns at q * BLOCK.

    a_row, a_column: how far apart neighbouring rows and columns of a lie (its strides).
    b_row, b_column: the strides of b.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ### BEGIN SOLUTION
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        a = tl.load(
            a_ptr + rows[:, None] * a_row + inner[None, :] * a_column,
            mask=(rows[:, None] < m) & (inner[None, :] < k),
            other=0.0,
        )
        b = tl.load(
            b_ptr + inner[:, None] * b_row + columns[None, :] * b_column,
            mask=(inner[:, None] < k) & (columns[None, :] < n),
            other=0.0,
        )
        total += tl.dot(a, b, input_precision="ieee")
    tl.store(
        out_ptr + rows[:, None] * n + columns[None, :],
        total,
        mask=(rows[:, None] < m) & (columns[None, :] < n),
    )
    ### END SOLUTION


def tiled_matmul(a, b, out, block):
    """Launch matmul_kernel so that out = a @ b.

    a: tensor [m, k] and b: tensor [k, n], of any strides; out: contiguous tensor [m, n]; all of one
    dtype (float32, float16 or bfloat16), all sizes at least 1.  block: int, 16, 32 or 64.
    """
    ### BEGIN SOLUTION
    (m, k), n = a.shape, b.shape[1]
    grid = (triton.cdiv(m, block), triton.cdiv(n, block))
    matmul_kernel[grid](
        a, b, out, m, n, k, a.stride(0), a.stride(1), b.stride(0), b.stride(1), BLOCK=block
    )
    ### END SOLUTION


# %% exercise="tiled_matmul_twin"
def tiled_matmul_twin(a, b, out, block):
    """The same without Triton: for every tile of out, add up products of tiles in float32 (at most
    block * block numbers at once), and write the total."""
    ### BEGIN SOLUTION
    (m, k), n = a.shape, b.shape[1]
    for i in range(0, m, block):
        for j in range(0, n, block):
            total = 0.0
            for start in range(0, k, block):
                left, right = (
                    a[i : i + block, start : start + block],
                    b[start : start + block, j : j + block],
                )
                total = total + left.float() @ right.float()
            out[i : i + block, j : j + block] = total
    ### END SOLUTION


# %% check="tiled_matmul"
check("tiled_matmul", tiled_matmul, twin=tiled_matmul_twin)

# %% [markdown]
# What are your kernels worth? On a GPU the next cell times each beside PyTorch's own, in turns, and beside what the card can do
# at best. In the interpreter a time means nothing, so there it counts instead what a kernel moves.

# %% tags=["demo"] needs=["add_vectors", "row_sum", "tiled_matmul"]
from effnlp_lab.device import ceilings
from effnlp_lab.notebook.bench import compare

if device.triton == "compiled":
    best = ceilings(device)
    n = device.pick(fast=1 << 24, full=1 << 27)
    x, y = (torch.randn(n, device="cuda", dtype=device.dtype) for _ in range(2))
    out = torch.empty_like(x)
    print(
        compare(
            f"add {n:,} numbers",
            {
                "add_vectors": lambda: add_vectors(x, y, out, 1024),
                "torch.add": lambda: torch.add(x, y, out=out),
            },
            ours="add_vectors",
            peer="torch.add",
            unit="GB/s",
            work=3 * n * x.element_size(),
            device=device,
            limit=best.copy_bytes_per_second / 1e9,
        ).table(),
        "\n",
    )
    matrix, sums = x.view(-1, 4096), torch.empty(n // 4096, device="cuda")
    print(
        compare(
            "sum rows of 4,096",
            {
                "row_sum": lambda: row_sum(matrix, sums, 1024),
                "torch.sum": lambda: matrix.sum(1, dtype=torch.float32),
            },
            ours="row_sum",
            peer="torch.sum",
            unit="GB/s",
            work=n * x.element_size(),
            device=device,
            limit=best.copy_bytes_per_second / 1e9,
        ).table(),
        "\n",
    )
    side = device.pick(fast=2048, full=4096)
    a, b = (torch.randn(side, side, device="cuda").to(device.dtype) for _ in range(2))
    product = torch.empty_like(a)
    print(
        compare(
            f"multiply {side} x {side}",
            {
                "tiled_matmul": lambda: tiled_matmul(a, b, product, 64),
                "torch.mm": lambda: torch.mm(a, b, out=product),
            },
            ours="tiled_matmul",
            peer="torch.mm",
            unit="TFLOP/s",
            work=2 * side**3,
            device=device,
            limit=best.matmul_flops_per_second / 1e12,
        ).table()
    )
else:
    m = n = k = 4096
    print(f"numbers loaded for a {m} x {n} x {k} product, by the size of the tile:")
    for block in (1, 16, 64, 128):
        loaded = (m // block) * (n // block) * (k // block) * 2 * block * block
        times = loaded / (m * k + k * n)
        print(f"  {block:4} x {block:<4} {loaded / 1e9:8.2f} billion ({times:,.0f} times each)")
    print(
        "On a GPU this cell would time your kernels beside torch.add, torch.sum and torch.mm."
    )

# %% [markdown]
# On a GPU, adding and summing come near PyTorch's own: both wait for memory, and beyond reading each number once there is
# little to do better. The product is another matter. It computes, and yours is right and still well behind `torch.mm`, which
# takes larger tiles and fetches the next ones while it multiplies these. Lab 06 says more of what makes a kernel fast.
#
# ## The receipt
#
# Every lab ends with a receipt: the same work done in the plain way, by your answer and by a reference, and what each costs.
# Here it is the search of Part 4. Memory and traffic are counted; time is measured with your own stopwatch.

# %% tags=["demo"] needs=["timed", "best_match"]
from effnlp_lab import exercises
from effnlp_lab.notebook.meter import measure
from effnlp_lab.notebook.receipt import Receipt


def wait():
    if device.kind == "cuda":
        torch.cuda.synchronize()


many = device.pick(fast=2048, full=16384)
torch.manual_seed(0)
case = {
    "queries": torch.randn(many, 64, device=device.torch),
    "documents": torch.randn(many, 64, device=device.torch),
    "rows": 128,
}
loop = exercises.reference_of("best_match").frugal
ways = {
    ("baseline", "whole matrix"): lambda: (case["queries"] @ case["documents"].T).amax(dim=1),
    ("yours", "best_match"): lambda: best_match(**case),
    ("reference", "loop into one result"): lambda: loop(case, {}),
}
receipt = Receipt(
    "00_start_here",
    title=f"Best of {many:,} documents for {many:,} queries",
    quality="largest difference",
    device=device,
)
right = (case["queries"].double() @ case["documents"].double().T).amax(dim=1)
for (role, name), way in ways.items():
    values, usage = measure(way)
    receipt.add(
        role,
        name,
        quality=(values - right).abs().max().item(),
        peak_bytes=usage.peak_bytes,
        bytes_moved=usage.bytes_moved,
        flops=usage.flops,
        seconds=timed(way, wait, time.perf_counter, 1, 5),
    )
receipt.show()
path = receipt.save()

# %% [markdown]
# The work (FLOPs) is the same and the peak is not: that is the kind of saving this course is about. What the receipt also shows
# is the price. Blocks move no fewer bytes, since each similarity is still written once and read once; and on a GPU many
# small operations, each with a launch of its own, take longer than a few large ones. To save that traffic too, product and
# maximum have to happen in one kernel, on tiles that never leave the chip. That idea, applied to softmax attention, is
# FlashAttention, and you have just written its outer loops.

# %% [markdown]
# ## In your own words
#
# A colleague puts `time.time()` around one call of a new kernel, reads 0.02 ms, and reports that it is fifty times as
# fast as PyTorch. What do you ask, and what do you let the colleague measure instead?
#
# Write 60 to 120 words. A person reads and grades them.

# %% [markdown] written="stopwatch"
# **Rubric, for whoever grades** (shares of the points; another answer as good earns them too)
#
# - 0.4: the call only hands work to the device; one has to wait for it (synchronize) before the clock is read.
# - 0.2: the first calls compile and allocate, so there is a warm-up; each run is timed by itself, and the
#   median counts.
# - 0.2: the same work for both: shapes, dtype, device, and results that agree.
# - 0.2: a check against what the hardware can do (bytes over bandwidth, operations over peak), or another
#   reason to doubt the number.

# %% [markdown]
# ## What you have learned
#
# - A check says what is wrong, where it shows first, and often why; partial credit comes from the parts.
# - Name axes. Reshape cuts, transpose moves; never do both in one reshape.
# - Autoregressive and autoencoding models differ in the mask and in the question.
# - Warm up, synchronize, time each run, take the median.
# - Peak memory is about what is alive at once: variables, graphs, whole matrices of which you need one number a row. It is
#   a line in the batch size, so two small runs say what fits.
# - A kernel is a program for one tile; masks guard the edges, strides find the rows, and totals are kept in float32.
#
# ## Read on
#
# - A. Vaswani et al., *Attention Is All You Need*, 2017: scaled dot products and heads.
# - J. Devlin et al., *BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding*, 2018, and
#   A. Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019: the two ways to train.
# - P. Tillet, H. T. Kung and D. Cox, *Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations*,
#   2019.
# - P. Zhang et al., *TinyLlama: An Open-Source Small Language Model*, 2024.
# - T. Dao et al., *FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness*, 2022: where this leads.
