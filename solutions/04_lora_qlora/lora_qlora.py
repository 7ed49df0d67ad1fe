# %% [markdown]
# # Lab 04: LoRA and QLoRA
#
# A model that was trained on one thing is to learn another. Training all of its weights works, and costs what
# training costs: a gradient and two optimizer states for each of them, and a whole new model for every task. In this
# lab the weights stay **frozen**. You train a few numbers beside them instead, and then you keep what is frozen in
# four bits. At the end a model of Python code has learned English prose, by eight methods, on your own machine.
#
# | | exercise | points | minutes | difficulty |
# |---|---|---|---|---|
# | 1 | `LoRALinear`: a linear layer with a low-rank update | 2.5 | 60 | 3 of 5 |
# | 2 | `inject`: adapt layers by name | 1.75 | 40 | 3 of 5 |
# | 3 | `Bottleneck`: a bottleneck adapter | 1 | 20 | 2 of 5 |
# | 4 | `affine_int8`: affine int8 with an exact zero | 1.5 | 40 | 3 of 5 |
# | 5 | `NF4`: 4-bit NormalFloat | 2 | 50 | 3 of 5 |
# | 6 | `double_quantize`: double quantization | 1.25 | 30 | 2 of 5 |
# | stretch | `qlora_linear`: dequantize again in backward | badge | 40 | 4 of 5 |
# | stretch | `serve_adapters`: many adapters, one base | badge | 25 | 2 of 5 |
# | stretch | `in_subspace`: the intrinsic dimension | badge | 30 | 3 of 5 |
#
# **Time.** About four and a half hours: the core exercises, the reading and the measurements. Stretch exercises come on top.
#
# **You need** PyTorch's modules and autograd, and what AdamW keeps for each weight (lab 03). A laptop is enough: on a
# CPU the runs are short and memory is counted instead of measured.
#
# **How a check works.** Under each blank stands one call, `check(...)`. It runs your function or class on fresh
# random cases, compares with a reference, and says what went wrong, by name where it recognises the slip. Run it as
# often as you like.
#
# {assistants} The six core blanks are 4 to 15 lines each, and a slip in them trains without an error message and learns
# nothing, or a little less.
#
# **Libraries.** `peft`, `bitsandbytes`, `transformers` and this kit's own adapters are refused inside your answers; the
# demos compare with them.

# %% tags=["parameters"]
DEVICE = "auto"
FAST = "auto"

# %%
import effnlp_lab
from effnlp_lab import check

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

device = effnlp_lab.start("04_lora_qlora", device=DEVICE, fast=FAST)

# %% [markdown]
# ## 1. A low-rank update
#
# Fine-tuning changes a weight matrix $W_0$ into $W_0 + \Delta W$. Aghajanyan et al. (2021) found that a large model
# can be fine-tuned by moving it in surprisingly few directions: its **intrinsic dimension** is low (stretch C measures
# it). Hu et al. (2022) took the hint and gave $\Delta W$ a low rank by construction:
#
# $$h = W_0 x + s\, B A x, \qquad A \in \mathbb{R}^{r \times d_{in}},\quad B \in \mathbb{R}^{d_{out} \times r},\quad
# r \ll \min(d_{in}, d_{out}).$$
#
# ```
#                      frozen
#             +----------------------+
#        +--> |     W0  [out, in]    | --------------------+
#        |    +----------------------+                     v
#  x ----+                                                (+)----> h
#        |    +-------------+    r     +-------------+     ^
#        +--> |  A [r, in]  | -------> |  B [out, r] | -- s+
#             +-------------+  numbers +-------------+
#              random at first          zero at first
# ```
#
# Only $A$ and $B$ are trained. For a matrix of 4096 by 4096 and $r = 8$:

# %% tags=["nbval-check-output"]
full, low_rank = 4096 * 4096, 8 * (4096 + 4096)
print(f"{full:,} weights, of which LoRA trains {low_rank:,} numbers: 1 in {full // low_rank}")

# %% [markdown]
# Four decisions make it work.
#
# - **The start.** With $B = 0$ the update is zero, and the model begins as it was. $A$ must not be zero too: the
#   gradient of $B$ is a product with $A$, the gradient of $A$ one with $B$. With both at zero neither ever moves.
# - **The scale** $s$ is set by a number $\alpha$ that you need not tune again when you change the rank. In the paper $s
#   = \alpha / r$. Kalajdzievski (2023) shows that this lets large ranks learn too slowly, and takes $s = \alpha /
#   \sqrt r$. The next cell says which is **yours**.
# - **Merging.** After training $W_0 + s B A$ can be written into the weight once, and inference costs nothing extra.
# - **Undoing it.** Without the update the base model is there again, for the next task. Adding and subtracting the
#   same matrix does **not** do that: both round.

# %%
effnlp_lab.variant("LoRALinear")

# %% tags=["nbval-check-output"]
weights, update = torch.tensor([0.1, 0.3, 1.0, 3.0]), 0.9
print((weights + update - update == weights).tolist())

# %% [markdown]
# ### Exercise 1: a linear layer with a low-rank update
#
# *2.5 points, about 60 minutes, difficulty 3 of 5.*
#
# Five methods are blank; none needs more than six lines.
#
# <details><summary>Hint 1: the start</summary>
#
# `base.requires_grad_(False)` freezes weight and bias. `base.weight.new_zeros(...)` and `base.weight.new_empty(...)`
# make a tensor with the weight's dtype, on its device; `.uniform_(low, high)` fills one with random numbers. A tensor
# is trained, moved and saved with the module if it is an `nn.Parameter` and an attribute.
# </details>
# <details><summary>Hint 2: the order of the products</summary>
#
# For a row `x` of `in` numbers, `x @ a.T` has `r` numbers and costs `r * in` multiplications. `b @ a` is as large as
# the weight.
# </details>
# <details><summary>Hint 3: merge and unmerge</summary>
#
# Keep a copy of the weight while it is merged, and `None` otherwise. Then one attribute says both whether the layer is
# merged and what to put back. A view or `.data` is no copy: `.clone()` is.
# </details>

# %% exercise="LoRALinear"
class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update: base(x) + s * x A^T B^T (Hu et al. 2022, eq. 3)."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        """Freeze `base` (its bias too, if it has one) and make the update's parameters.

        self.base: the layer
        self.a: nn.Parameter [r, in_features], uniform from -1 / sqrt(in_features) to 1 / sqrt(in_features)
        self.b: nn.Parameter [out_features, r], zero
        Both have the dtype of base.weight and are on its device, and are all that is trained. The scale s follows
        from alpha and r by the rule of your variant. A new layer is neither merged nor disabled.
        """
        super().__init__()
        ### BEGIN SOLUTION
        self.base = base.requires_grad_(False)
        self.scaling = alpha / r
        bound = 1 / math.sqrt(base.in_features)
        self.a = nn.Parameter(base.weight.new_empty(r, base.in_features).uniform_(-bound, bound))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, r))
        self.kept, self.enabled = None, True
        ### END SOLUTION

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features], without ever forming B A.

        The update is counted once, whether the layer is merged or not, and not at all while it is disabled.
        """
        ### BEGIN SOLUTION
        out = self.base(x)
        if self.enabled and self.kept is None:
            out = out + self.scaling * (x @ self.a.T) @ self.b.T
        return out
        ### END SOLUTION

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to base.weight. Merging a merged layer changes nothing. No disabled layer is merged."""
        ### BEGIN SOLUTION
        if self.kept is None:
            self.kept = self.base.weight.clone()
            self.base.weight.add_(self.scaling * self.b @ self.a)
        ### END SOLUTION

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give base.weight its old numbers back, bit for bit, whatever happened to a and b meanwhile.

        Unmerging a layer that is not merged changes nothing.
        """
        ### BEGIN SOLUTION
        if self.kept is not None:
            self.base.weight.copy_(self.kept)
            self.kept = None
        ### END SOLUTION

    def disable(self) -> None:
        """From now on the output is that of the base alone. A merged layer is unmerged first."""
        ### BEGIN SOLUTION
        self.unmerge()
        self.enabled = False
        ### END SOLUTION

    def enable(self) -> None:
        """Undo `disable`: the update counts again. The layer is not merged."""
        ### BEGIN SOLUTION
        self.enabled = True
        ### END SOLUTION


# %% check="LoRALinear"
check("LoRALinear", LoRALinear)

# %% [markdown]
# ## 2. Into a model, by name
#
# A model is a tree of modules, and `named_modules()` walks it. Here is the tree of a small one:

# %% tags=["nbval-check-output"]
class SmallBlock(nn.Module):
    """A block with the names that Llama gives its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 2)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


small = nn.ModuleDict({"layers": nn.ModuleList([SmallBlock(), SmallBlock()]), "head": nn.Linear(4, 9)})
for name, module in small.named_modules():
    if name.startswith(("layers.1", "head")):
        print(f"{name:18}{type(module).__name__}")

# %% [markdown]
# "Put LoRA on `q_proj`" means: every linear layer whose name is `q_proj` or **ends** in `.q_proj`. PEFT and this kit
# both read it so. The dot matters: `proj` is no name of `q_proj`. A target may have several parts, such as
# `mlp.2`, or be one layer's whole name.
#
# $$\text{a target } t \text{ names } n \iff n = t \ \text{ or } \ n \text{ ends in } \texttt{"."} + t$$
#
# ### Exercise 2: adapt layers by name
#
# *1.75 points, about 40 minutes, difficulty 3 of 5.*
#
# What a layer is replaced by is up to the caller, who passes a function: `inject(model, ["q_proj"], lambda layer:
# LoRALinear(layer, 8, 16))`. Two things go wrong silently if you let them: a misspelt target that changes nothing (so
# raise an error), and a parameter that is frozen or not frozen by the order of your steps.
#
# <details><summary>Hint 1</summary>
#
# First collect, then check, then freeze, then replace. If you make the new layers before you freeze the model, theirs
# are frozen as well.
# </details>
# <details><summary>Hint 2</summary>
#
# `"layers.0.q_proj".rpartition(".")` gives `("layers.0", ".", "q_proj")`, `model.get_submodule("layers.0")` the module
# that holds the layer (and the model itself for `""`), and `setattr(parent, "q_proj", new)` replaces it, in an
# `nn.ModuleList` or `nn.Sequential` too.
# </details>

# %% exercise="inject"
def inject(model: nn.Module, targets: list[str], make: Callable[[nn.Linear], nn.Module]) -> list[str]:
    """Freeze a model and replace the linear layers that `targets` name by `make(layer)`, in place.

    A target names a module whose full name (as of named_modules) is the target or ends in "." + target.
    Only instances of nn.Linear (of its subclasses too) are replaced; other modules stay, whatever they are
    called. A layer that several targets name is replaced once. make is called once for each layer.
    Every parameter that the model has is frozen; those that make adds are left as make gives them.
    Raises ValueError, with the target in its message, for a target that names no nn.Linear; the model is
    then what it was.
    Returns the names of the replaced layers, in the model's order.
    """
    ### BEGIN SOLUTION
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = set()
    for target in targets:
        hits = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not hits:
            raise ValueError(f"no linear layer is named {target!r}")
        found.update(hits)
    model.requires_grad_(False)
    chosen = [name for name in linear if name in found]
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, make(linear[name]))
    return chosen
    ### END SOLUTION


# %% check="inject"
check("inject", inject)

# %% [markdown]
# ## 3. Another method: a bottleneck adapter
#
# Adapters came first (Houlsby et al., 2019). Behind the last projection of attention and that of the feed-forward
# network stands a small network of its own, before the result is added to the stream:
#
# $$h \leftarrow h + W_{up}\, f(W_{down}\, h + b_{down}) + b_{up}, \qquad W_{down} \in \mathbb{R}^{m \times d},\
# W_{up} \in \mathbb{R}^{d \times m},\ m \ll d.$$
#
# ```
#   x --> [ base, frozen ] --> h --+--> [ down ] --> f --> [ up ] --(+)--> out
#                                  |      d to m        m to d      ^
#                                  +--------------------------------+
# ```
#
# It looks like LoRA and differs in two ways. It is applied **after** the layer and not beside it, one step later in
# the computation. And between its two matrices stands an activation: it can do what no low-rank matrix can, and for
# the same reason it can **never be merged**. The LoRA paper measures 20 to 30% more latency for a batch of one.
#
# ### Exercise 3: a bottleneck adapter
#
# *1 point, about 20 minutes, difficulty 2 of 5.*
#
# $f$ is **your** activation: the next cell says which.

# %%
effnlp_lab.variant("Bottleneck")

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# At the start the adapter has to be the identity, and it still has to learn. Which of the two matrices may be zero, and
# what about the biases?
# </details>
# <details><summary>Hint 2</summary>
#
# `nn.Linear(..., device=base.weight.device, dtype=base.weight.dtype)`. `nn.init.zeros_(parameter)` fills with zeros.
# </details>

# %% exercise="Bottleneck"
class Bottleneck(nn.Module):
    """A linear layer and an adapter after it: h + up(f(down(h))), h the layer's output (Houlsby et al. 2019)."""

    def __init__(self, base: nn.Linear, size: int) -> None:
        """Keep `base` as self.base, its parameters as they are (`inject` has frozen them).

        self.down: nn.Linear, out_features to size; self.up: nn.Linear, size to out_features; both with biases,
        in the dtype of base.weight and on its device. down starts as nn.Linear does, weight and bias of up at
        zero: at first the output is that of the base.
        """
        super().__init__()
        ### BEGIN SOLUTION
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.down = nn.Linear(base.out_features, size, **like)
        self.up = nn.Linear(size, base.out_features, **like)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        ### END SOLUTION

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]. The activation f is that of your variant."""
        ### BEGIN SOLUTION
        h = self.base(x)
        return h + self.up(F.relu(self.down(h)))
        ### END SOLUTION


# %% check="Bottleneck"
check("Bottleneck", Bottleneck)

# %% [markdown]
# ## From code to English
#
# Now let us adapt a model. `course-base` has seven million weights and has read nothing but Python source. The new
# domain is English prose: the language reference that `help()` shows. Every eighth page is held out for the test, and
# another eighth to choose learning rates by.

# %% tags=["demo"]
import copy
import time
from dataclasses import dataclass

from effnlp_lab.course.models import load_model, load_tokenizer
from effnlp_lab.course.text import load_text
from effnlp_lab.notebook import plots
from effnlp_lab.notebook.memory import measured_peak
from effnlp_lab.notebook.meter import measure
from effnlp_lab.notebook.replay import Replayed

if device.kind == "cpu" and device.fast:
    torch.set_num_threads(1)  # products this small: a second thread would mostly wait for the first
LENGTH, BATCH, STEPS, HELD_OUT = device.pick(fast=(40, 4, 8, 16), full=(256, 8, 100, 64))
base_model = load_model("course-base", device=device, dtype="float32")
tokenizer = load_tokenizer("course-base")


def rows_of(documents):
    """The tokens of some documents in rows of LENGTH, in a random order that is always the same."""
    tokens = torch.tensor(tokenizer("\n\n".join(documents))["input_ids"])
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].to(device.torch)


pages = list(load_text("course-english").texts())
training = rows_of([page for i, page in enumerate(pages) if i % 8 not in (0, 4)])
validation = rows_of([page for i, page in enumerate(pages) if i % 8 == 4])[:HELD_OUT]
test = rows_of([page for i, page in enumerate(pages) if i % 8 == 0])[:HELD_OUT]


def loss_of(model, rows):
    """Mean cross-entropy of the tokens after the first of each row."""
    logits = model(input_ids=rows).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model, rows):
    return math.exp(sum(loss_of(model, part).item() * len(part) for part in rows.split(16)) / len(rows))


before = perplexity(base_model, test)
print(f"{sum(p.numel() for p in base_model.parameters()):,} weights, {training.numel():,} tokens to train on")
print(f"perplexity of the base on held-out English: {before:.1f}")

# %% [markdown]
# Each method gets a fresh copy of the model, makes some parameters trainable, and trains them with AdamW for the same
# steps on the same batches. Yours are LoRA and the bottleneck; the other six come from the kit's own room:
#
# | method | what is trained |
# |---|---|
# | full fine-tuning | everything |
# | LoRA, **yours** | rank 8 on all linear layers |
# | bottleneck, **yours** | adapters of 16 numbers after attention and after the feed-forward network |
# | top layer | the last block and the norm after it |
# | BitFit (Ben Zaken et al., 2022) | the biases |
# | prompt tuning (Lester et al., 2021) | embeddings of 8 virtual tokens before the text |
# | (IA)³ (Liu et al., 2022) | a factor for each key, each value and each inner activation |
# | prefix tuning (Li and Liang, 2021) | keys and values of 8 virtual tokens in every layer |

# %% tags=["demo"] needs=["LoRALinear", "inject", "Bottleneck"]
from effnlp_lab import adapters as kit

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VIRTUAL = 8


def by_the_kit(config):
    return lambda model: kit.add_adapter(model, config)


def lora(r):
    return lambda model: inject(model, LINEAR, lambda layer: LoRALinear(layer, r, 16))


METHODS = {
    "full fine-tuning": lambda model: model.requires_grad_(True),
    "LoRA, r = 8": lora(8),
    "bottleneck": lambda model: inject(model, ["self_attn.o_proj", "mlp.down_proj"],
                                       lambda layer: Bottleneck(layer, 16)),
    "top layer": by_the_kit(kit.TopLayersConfig(layers=1)),
    "BitFit": by_the_kit(kit.BitFitConfig()),
    "prompt tuning": by_the_kit(kit.PromptTuningConfig(tokens=VIRTUAL)),
    "(IA)3": by_the_kit(kit.IA3Config()),
    "prefix tuning": by_the_kit(kit.PrefixTuningConfig(tokens=VIRTUAL)),
}
RATES = {  # learning rates to try: one that is known to be good, or several when there is time
    "full fine-tuning": device.pick(fast=(4e-4,), full=(1e-4, 3e-4, 1e-3)),
    "LoRA, r = 8": device.pick(fast=(6e-3,), full=(1e-3, 3e-3, 1e-2)),
    "bottleneck": device.pick(fast=(1e-2,), full=(1e-3, 3e-3, 1e-2)),
    "top layer": device.pick(fast=(3e-3,), full=(3e-4, 1e-3, 3e-3)),
    "BitFit": device.pick(fast=(1e-2,), full=(3e-3, 1e-2, 3e-2)),
    "prompt tuning": device.pick(fast=(1e-1,), full=(1e-2, 3e-2, 1e-1)),
    "(IA)3": device.pick(fast=(1e-1,), full=(1e-2, 3e-2, 1e-1)),
    "prefix tuning": device.pick(fast=(3e-1,), full=(3e-2, 1e-1, 3e-1)),
}


@dataclass
class Run:
    """What one training gave: perplexity on the test pages, numbers trained, optimizer bytes, seconds in all."""

    test: float
    trained: int
    optimizer: int
    seconds: float


def bytes_of(tensors):
    """Bytes in memory; storage that several share counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def prepared(prepare):
    """A fresh copy of the base, made ready to be trained; the same random numbers every time."""
    torch.manual_seed(0)
    model = copy.deepcopy(base_model)
    prepare(model)
    return model


def train(model, rate, steps):
    """Some steps of AdamW on what is trainable; the rate rises for the first steps and falls to zero."""
    now = torch.tensor(rate, device=device.torch)  # a tensor, so that a recorded step sees it change
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=now, weight_decay=0.0,
                                  capturable=device.kind == "cuda")

    def learn(rows):
        optimizer.zero_grad()
        loss_of(model, rows).backward()
        optimizer.step()

    learn = Replayed(learn)  # a GPU records the kernels of a step once, and then starts them without Python
    for step in range(steps):
        now.fill_(rate * min(1, (step + 1) / (0.1 * STEPS)) * (1 - step / STEPS))
        at = step * BATCH % (len(training) - BATCH + 1)
        learn(training[at : at + BATCH])
    return optimizer


def adapt(prepare, rate):
    """Train a fresh copy of the base with one learning rate: what it gave, and the model."""
    model = prepared(prepare)
    begin = time.perf_counter()
    optimizer = train(model, rate, STEPS)
    if device.kind == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Run(perplexity(model, test), trained, bytes_of(states), seconds), model


def best_of(prepare, rates):
    """The run with the best perplexity on the validation pages, and its rate."""
    tried = [(*adapt(prepare, rate), rate) for rate in rates]
    if len(rates) > 1:
        tried.sort(key=lambda one: perplexity(one[1], validation))
    return tried[0][0], tried[0][2]


def step_costs(prepare):
    """Bytes at the peak of two steps, weights included, and operations of one.

    In the second step the optimizer's states are there.
    """
    model = prepared(prepare)
    weights = bytes_of([*model.parameters(), *model.buffers()])
    _, usage = measure(lambda: train(model, 0.0, 2))
    if device.kind == "cpu":
        return weights + usage.peak_bytes, usage.flops // 2
    model.zero_grad(set_to_none=True)
    there = torch.cuda.memory_allocated()
    return weights + measured_peak(lambda: train(model, 0.0, 2)) - there, usage.flops // 2


# %% [markdown]
# **Predict first.** Full fine-tuning lowers the perplexity by some amount; call that 100%. How much of it does LoRA of
# rank 8 reach, which trains one number for every twenty-four weights? And prompt tuning, which trains one for every three
# and a half thousand? Write two numbers down before you run the cell after it.

# %% predict="share_of_gain"
my_share_of_lora = None  # your guess, in percent of what full fine-tuning gains
my_share_of_prompt_tuning = None

# %% tags=["demo"] needs=["LoRALinear", "inject", "Bottleneck"]
runs, rate_of, costs = {}, {}, {}
print(f"{'method':18}{'rate':>9}{'trained':>12}{'optimizer':>12}{'peak':>10}{'perplexity':>12}{'gain':>8}")
for name, prepare in METHODS.items():
    runs[name], rate_of[name] = best_of(prepare, RATES[name])
    costs[name] = step_costs(prepare)
    run, full = runs[name], runs["full fine-tuning"]
    share = math.log(before / run.test) / math.log(before / full.test)
    print(f"{name:18}{rate_of[name]:9.0e}{run.trained:12,}{run.optimizer / 1e6:9.2f} MB"
          f"{costs[name][0] / 1e6:7.0f} MB{run.test:12.2f}{share:8.0%}")
gains = {name: math.log(before / run.test) / math.log(before / runs["full fine-tuning"].test)
         for name, run in runs.items()}
for guess, name in ((my_share_of_lora, "LoRA, r = 8"), (my_share_of_prompt_tuning, "prompt tuning")):
    if guess is not None:
        print(f"{name}: you predicted {guess}%, measured: {gains[name]:.0%}.")

figure, axes = plots.figure(
    "What is trained, and what it gains", "trained numbers", "perplexity on held-out English",
    caption=f"After {STEPS} steps of {BATCH} x {LENGTH} tokens; the dashed line is the base.")
look = plots.looks(len(runs))
for (name, run), one in zip(runs.items(), look):
    axes.plot([run.trained], [run.test], label=name, **{**one, "linestyle": ""}, markersize=8)
axes.axhline(before, linestyle="--", color="#888888", marker="")
axes.set_xscale("log")
axes.legend(bbox_to_anchor=(1.0, 1.0), loc="upper left")
spoken = ", ".join(f"{name}: {run.trained:,} and {run.test:.1f}" for name, run in runs.items())
plots.show(figure, f"Perplexity against the numbers that are trained, by method: {spoken}. The base is at "
                   f"{before:.1f}.")

# %% [markdown]
# Read the table by columns. The **optimizer's** bytes are two float32 numbers for each number that is trained, so they
# all but vanish. The **peak** falls by less: hidden states are the same for every method that has to send gradients
# through the whole network, and they are what is left (lab 03 shrinks those). Only the top layer escapes that: below
# it nothing is trained, so nothing is kept. The "gain" is measured in nats, as losses are.
#
# ### The lecture's table
#
# Hu et al. compared on the E2E challenge, where tables about restaurants become sentences. From their table, as the
# lecture shows it:
#
# | GPT-2 medium | trained | BLEU | NIST | METEOR | ROUGE-L | CIDEr |
# |---|---|---|---|---|---|---|
# | full fine-tuning | 354.92M | 68.2 | 8.62 | 46.2 | 71.0 | 2.47 |
# | bottleneck (Lin et al.) | 0.37M | 66.3 | 8.41 | 45.0 | 69.8 | 2.40 |
# | bottleneck (Lin et al.) | 11.09M | 68.9 | 8.71 | 46.1 | 71.3 | 2.47 |
# | bottleneck (Houlsby et al.) | 11.09M | 67.3 | 8.50 | 46.0 | 70.7 | 2.44 |
# | top 2 layers | 25.19M | 68.1 | 8.59 | 46.0 | 70.8 | 2.41 |
# | prefix-like ("PreLayer") | 0.35M | 69.7 | 8.81 | 46.1 | 71.4 | 2.49 |
# | LoRA | 0.35M | **70.4** | **8.85** | **46.8** | **71.8** | **2.53** |
#
# LoRA beats full fine-tuning there with a thousandth of the trained weights. Before you conclude that it always does,
# look closer. The task is **near** what GPT-2 had read, and the data are few: with 355 million free weights one can
# also overfit. The next best row has as few numbers and is 0.7 BLEU behind, where LoRA's own runs scatter by 0.1: more
# than chance, and less than the columns make it look. And the bottleneck of 0.37 million is far behind full
# fine-tuning while that of 11 million is ahead of it. A method is not a number but a curve over its size.
#
# Your own table asks for more: from code to English is a long way, and the perplexity has to fall by much. Compare
# the order of the rows: does a method that wins there win here? With few steps, methods that may take a large step at
# once look good (prompt tuning learns a better context in a moment); with many, those with more capacity do. Prefix
# tuning begins behind the base: its random keys take attention away from the first step on.
#
# ### By rank
#
# How much rank does it take?

# %% tags=["demo"] needs=["LoRALinear", "inject", "Bottleneck"]
ranks = device.pick(fast=(1, 8, 32), full=(1, 2, 4, 8, 16, 32, 64))
by_rank = {8: runs["LoRA, r = 8"]}
for r in ranks:
    if r not in by_rank:
        by_rank[r], _ = adapt(lora(r), rate_of["LoRA, r = 8"])
print(f"{'rank':>5}{'trained':>12}{'perplexity':>12}")
for r in ranks:
    print(f"{r:5}{by_rank[r].trained:12,}{by_rank[r].test:12.2f}")

# %% [markdown]
# Many times the numbers, and little to show for it: the update that the task needs has a low rank. (With the scale
# $\alpha / r$ and one learning rate for all, a larger rank also moves each direction less. That is the flaw that
# $\alpha / \sqrt r$ repairs.)
#
# ### By learning rate: is LoRA more stable?
#
# "Better and more stable results across hyper-parameters", says the lecture. Let us vary the learning rate by the same
# factors around each method's own best.

# %% tags=["demo"] needs=["LoRALinear", "inject", "Bottleneck"]
factors = device.pick(fast=(0.25, 1, 4), full=(1 / 16, 1 / 4, 1, 4, 16))
compared = device.pick(fast=("full fine-tuning", "LoRA, r = 8"),
                       full=("full fine-tuning", "bottleneck", "LoRA, r = 8"))
swept = {name: [runs[name].test if factor == 1 else adapt(METHODS[name], factor * rate_of[name])[0].test
                for factor in factors] for name in compared}
figure, axes = plots.figure("How exactly must the learning rate be right?",
                            "learning rate over that of the table", "perplexity on held-out English",
                            caption="The dashed line is the base; what is far above it is drawn at the upper edge.")
for name, values in swept.items():
    axes.plot(factors, [min(value, 1.25 * before) for value in values], label=name)
axes.axhline(before, linestyle="--", color="#888888", marker="")
axes.set_xscale("log", base=2)
axes.set_xticks(factors, labels=[f"{factor:g}" for factor in factors])
axes.legend()
spoken = "; ".join(f"{name}: " + ", ".join(f"{v:.1f}" for v in values) for name, values in swept.items())
plots.show(figure, "Perplexity against the learning rate, in multiples of the table's: "
                   f"{spoken}. The base is at {before:.1f}.")
for name, values in swept.items():
    print(f"{name:18}{min(values):8.2f} at best, {max(values):8.2f} at worst")

# %% [markdown]
# What does your picture say? LoRA wants rates that are ten times those of full fine-tuning or more: what moves the
# weight is a product of two matrices, one of which begins at zero. But around the best rate, too small a one and above
# all too large a one hurts LoRA as well. A method may be stable in one respect (how many numbers are trained, which
# layers) and not in another. "Stable" is a claim to test on your own task, as you just did.
#
# ## 4. Numbers in eight bits
#
# LoRA leaves one large thing in memory: the frozen weights. Nobody trains them, so they may be stored coarsely. The
# plainest way is a **grid**: a step width (the scale), and one whole number for each weight.
#
# ```
#     low                        0                                          high
#      |----|----|----|----|----|0---|----|----|----|----|----|----|----|----|
#    -128 -127  ...              ^                                    ...   127      code
#                           the zero point: the code that stands for 0
# ```
#
# $$\text{scale} = \frac{high - low}{255}, \qquad zero = \text{round}\Big(-128 - \frac{low}{\text{scale}}\Big), \qquad
# code = \text{clamp}\Big(\text{round}\Big(\frac{x}{\text{scale}}\Big) + zero\Big), \qquad
# \hat x = \text{scale} \cdot (code - zero).$$
#
# Two details decide whether it is right. **Zero has to be exact**: padding, masks and the output of a ReLU are zeros,
# and an error there is not noise but a shift. So the zero point is rounded by itself, and the range always holds 0:
# $low = \min(0, \min x)$ and $high = \max(0, \max x)$. And eight bits hold **256** values, with **255** steps between
# them. A slide says "8-bit $\in [-127, 127]$ (256 values)": that range has 255. It is a fine choice for a symmetric
# grid, whose zero point is 0 (you will use it in exercise 6), and one value of 256 is then left over.
#
# One outlier stretches the grid for everybody, so a tensor is cut into **blocks** of neighbours in memory, each with
# its own scale and zero point.
#
# ### Exercise 4: affine int8 with an exact zero
#
# *1.5 points, about 40 minutes, difficulty 3 of 5.*
#
# The formulas above are for codes from -128 to 127. The next cell says which codes are **yours**; with uint8 they go
# from 0 to 255, and 0 takes the place of -128.

# %%
effnlp_lab.variant("affine_int8")

# %% [markdown]
# <details><summary>Hint 1: blocks of neighbours</summary>
#
# `F.pad(flat, (0, -len(flat) % block)).view(-1, block)` has one block in each row, the last one filled up with zeros.
# Does that change the last block's range?
# </details>
# <details><summary>Hint 2: three traps</summary>
#
# `.to(torch.int8)` cuts off and does not round, and a number outside of int8's range wraps around there: round, clamp,
# convert. In a block of zeros the scale would be 0.
# </details>

# %% exercise="affine_int8"
def affine_int8(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize to eight bits on an affine grid for each block, on which 0 is exact.

    x: float32, any shape, at least one number. Its numbers, row by row (x.flatten()), are cut into blocks of
        `block` neighbours; the last block may be shorter.
    block: at least 1
    Returns (codes, scales, zero_points):
        codes: int8 or uint8, as your variant says, in the shape of x
        scales: float32 [blocks], (high - low) / 255 where low = min(0, smallest) and high = max(0, largest) of
            the block; 1 for a block of zeros
        zero_points: whole numbers [blocks] of any integer dtype, the codes that stand for 0
    so that scale * (code - zero_point) is within half a step of each number.
    """
    ### BEGIN SOLUTION
    flat = x.flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    low = blocks.amin(1).clamp(max=0)
    high = blocks.amax(1).clamp(min=0)
    scales = (high - low) / 255
    scales[scales == 0] = 1
    zeros = torch.round(-128 - low / scales)
    codes = torch.round(blocks / scales[:, None]) + zeros[:, None]
    codes = codes.clamp(-128, 127).flatten()[: len(flat)].view(x.shape)
    return codes.to(torch.int8), scales, zeros.to(torch.int32)
    ### END SOLUTION


# %% check="affine_int8"
check("affine_int8", affine_int8)

# %% [markdown]
# ## 5. Sixteen levels
#
# Four bits have sixteen codes, and where the sixteen values lie now matters. Trained weights are nearly normally
# distributed: many near zero, few far out. Evenly spaced levels spend half of their codes where hardly a weight is.
# NormalFloat (Dettmers et al., 2023) puts them at **quantiles** of the normal distribution, so that about equally many
# weights fall to each. The slide's recipe, "evenly spaced bins", with -0.06 and 0.06 next to zero, is not NF4: it has
# neither the spacing nor a zero.
#
# Quantiles that are symmetric about zero have no zero among them, an even number of them at least. So the positive side
# gets eight levels and the negative side seven, and zero is added:
#
# ```
#   probability  0.5 ......................... 0.9677    9 points, evenly spaced
#                 |   |   |   |   |   |   |   |   |      the first is the zero, 8 are positive levels
#   level         0  .08 .16 .25 .34 .44 .56 .72  1      their quantiles, over the largest
# ```
#
# With $Q$ the quantile function of the standard normal distribution (`torch.special.ndtri`) and $p$ = `OUTERMOST`:
#
# $$\text{positive} = Q(\text{8 points from } p \text{ down towards } 0.5),\qquad
# \text{negative} = -Q(\text{7 points from } p \text{ down towards } 0.5),$$
#
# where $k$ points from $p$ towards 0.5 are the first $k$ of $k + 1$ evenly spaced ones that end at 0.5. Everything is
# divided by $Q(p)$, so that the levels run from -1 to 1. (Why $p$? The outermost of 16 cells of equal probability has
# its middle at $1 - \frac1{32}$, that of 15 at $1 - \frac1{30}$; $p$ is the mean of the two. $Q(1)$ would be infinite.)

# %% tags=["nbval-check-output"]
OUTERMOST = 0.9677083  # the mean of 1 - 1/32 and 1 - 1/30
for probability in (0.5, 0.75, OUTERMOST):
    print(f"Q({probability:.4f}) = {torch.special.ndtri(torch.tensor(probability)).item():.4f}")

# %% [markdown]
# To quantize, a block of weights is divided by its **absmax**, the largest magnitude in it, and each weight becomes the
# number of the level that is nearest to it:
#
# $$code_i = \arg\min_k \Big|\frac{w_i}{absmax} - level_k\Big|, \qquad \hat w_i = level_{code_i} \cdot absmax.$$
#
# ### Exercise 5: 4-bit NormalFloat
#
# *2 points, about 50 minutes, difficulty 3 of 5.*
#
# Three functions, gathered in a class. `quantize` and `dequantize` are given the levels, so that you can compare
# others with NF4's in a moment. (A code takes a whole byte here. Packing two into one is shifting by four bits; lab 05
# does that.)
#
# <details><summary>Hint 1: the levels</summary>
#
# `torch.linspace(OUTERMOST, 0.5, 9)[:8]` are the eight probabilities of the positive side. They descend, and so do
# their quantiles: `.flip(0)` turns them round. Minus the quantiles of the negative side ascend already.
# </details>
# <details><summary>Hint 2: the nearest level</summary>
#
# Between two neighbouring levels the border is their middle. `torch.bucketize(x, middles)` says for each number how
# many middles lie below it, which is the code. (Or take `argmin` over the distances to all levels.)
# </details>
# <details><summary>Hint 3: a block of zeros</summary>
#
# 0 / 0 is NaN. `torch.nan_to_num` turns NaN into 0 (or divide by 1 where absmax is 0).
# </details>

# %% exercise="NF4"
class NF4:
    """4-bit NormalFloat (Dettmers et al. 2023, section 3 and appendix E)."""

    @staticmethod
    def levels() -> torch.Tensor:
        """The sixteen levels, float32, ascending from -1 to 1, with an exact 0 at index 7."""
        ### BEGIN SOLUTION
        positive = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9)[:8])
        negative = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8)[:7])
        levels = torch.cat([negative, torch.zeros(1), positive.flip(0)])
        return levels / positive[0]
        ### END SOLUTION

    @staticmethod
    def quantize(x: torch.Tensor, levels: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest level to each number over the absmax of its block.

        x: float32, any shape; its numbers, row by row, are cut into blocks of `block` neighbours, the last of
            which may be shorter
        levels: float32 [at most 256], ascending, from -1 to 1, with a 0 among them or not
        Returns (codes, absmax): codes uint8 [numbers of x], the indices of the levels (of two that are equally
        near, either); absmax float32 [blocks]. A block of zeros has absmax 0 and the codes of the level nearest
        to 0.
        """
        ### BEGIN SOLUTION
        flat = x.flatten()
        blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
        absmax = blocks.abs().amax(1)
        scaled = torch.nan_to_num(blocks / absmax[:, None])
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(scaled, middles).to(torch.uint8)
        return codes.flatten()[: len(flat)], absmax
        ### END SOLUTION

    @staticmethod
    def dequantize(
        codes: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, block: int
    ) -> torch.Tensor:
        """The numbers that codes and absmax of `quantize` stand for: float32 [numbers]."""
        ### BEGIN SOLUTION
        return levels[codes.int()] * absmax.repeat_interleave(block)[: len(codes)]
        ### END SOLUTION


# %% check="NF4"
check("NF4", NF4)

# %% [markdown]
# **Predict first.** Take a trained weight matrix, sixteen levels and blocks of 64. By what factor is the mean squared
# error of evenly spaced levels larger than NF4's? And with one absmax for the whole matrix instead of blocks, by what
# factor does NF4's error grow? Write both down.

# %% predict="level_errors"
my_factor_even_over_nf4 = None  # your guess
my_factor_whole_over_blocks = None

# %% tags=["demo"] needs=["affine_int8", "NF4"]
weight = base_model.get_submodule("model.layers.4.mlp.down_proj").weight.detach().cpu().float()
levels, even = NF4.levels(), torch.linspace(-1, 1, 16)


def through_levels(x, table, block):
    """A tensor as it comes back from codes."""
    codes, absmax = NF4.quantize(x, table, block)
    return NF4.dequantize(codes, absmax, table, block).view(x.shape)


def through_int8(x, block):
    codes, scales, zeros = affine_int8(x, block)
    scale, zero = (part.repeat_interleave(block)[: x.numel()].view(x.shape) for part in (scales, zeros))
    return scale * (codes.float() - zero)


ways = {
    "int8, one range": (lambda x: through_int8(x, x.numel()), 8.0),
    "int8, blocks of 64": (lambda x: through_int8(x, 64), 8 + 40 / 64),
    "even 4-bit, one absmax": (lambda x: through_levels(x, even, x.numel()), 4.0),
    "even 4-bit, blocks of 64": (lambda x: through_levels(x, even, 64), 4 + 32 / 64),
    "NF4, one absmax": (lambda x: through_levels(x, levels, x.numel()), 4.0),
    "NF4, blocks of 64": (lambda x: through_levels(x, levels, 64), 4 + 32 / 64),
}
errors = {name: (way(weight) - weight).square().mean().item() / weight.square().mean().item()
          for name, (way, _) in ways.items()}
for guess, pair in ((my_factor_even_over_nf4, ("even 4-bit, blocks of 64", "NF4, blocks of 64")),
                    (my_factor_whole_over_blocks, ("NF4, one absmax", "NF4, blocks of 64"))):
    told = f"{pair[0]} over {pair[1]}: {errors[pair[0]] / errors[pair[1]]:.2f}"
    print(told + (f", and you predicted {guess}" if guess is not None else ""))

blocks = weight.flatten().view(-1, 64)
scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()
figure, axes = plots.figure("Weights of one layer over their block's absmax, and the levels",
                            "weight / absmax", "share of the weights (%)",
                            caption="Upper marks: NF4's levels. Lower marks: evenly spaced ones.")
axes.hist(scaled.numpy(), bins=80, weights=[100 / len(scaled)] * len(scaled), color=plots.COLOURS["sky"])
top = 1.25 * axes.get_ylim()[1]
axes.set_ylim(0, top)
axes.plot(levels, [0.95 * top] * 16, "D", color=plots.COLOURS["vermilion"], label="NF4")
axes.plot(even, [0.87 * top] * 16, "s", color=plots.COLOURS["blue"], label="evenly spaced")
axes.legend(loc="center right")
plots.show(figure, "A histogram of weights over their block's absmax: a bell about zero, and the blocks' largest "
                   "weights at -1 and 1. NF4's sixteen levels lie densely about zero, evenly spaced ones do not.")

# %% [markdown]
# And what does it do to the model? Every linear layer but the one that gives the logits goes through codes and back.

# %% tags=["demo"] needs=["affine_int8", "NF4"]
def through(way):
    """A copy of the base whose linear weights went through codes and back."""
    model = copy.deepcopy(base_model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(way(module.weight.cpu()))
    return model


print(f"{'':26}{'bits a weight':>14}{'relative error':>16}{'perplexity':>12}")
print(f"{'float32':26}{32:14.2f}{0:16.5f}{before:12.2f}")
for name, (way, bits) in ways.items():
    print(f"{name:26}{bits:14.2f}{errors[name]:16.5f}{perplexity(through(way), test):12.2f}")

# %% [markdown]
# Eight bits cost next to nothing. At four, the blocks matter most, then the levels. What is left to save stands in
# the column of bits: the blocks' scales cost half a bit for each weight.
#
# ## 6. Quantize the scales
#
# One float32 absmax for 64 weights is $32 / 64 = 0.5$ bits a weight. **Double quantization** stores the absmax values
# themselves in eight bits, in groups of 256 that share one float32 magnitude:
#
# $$\frac{8}{64} + \frac{32}{64 \cdot 256} = 0.127 \text{ bits a weight}.$$
#
# ```
#  weights   [ 64 ][ 64 ][ 64 ] ... [ 64 ]     4 bits each
#  absmax      a1    a2    a3   ...  a256      float32  ->  minus their mean  ->  int8 codes
#  magnitude  +------------- one ---------+    float32
# ```
#
# Absmax values are all positive, and for neighbouring blocks close to each other. A signed code would never use its
# negative half, and spend most of the other half on the way up from zero. So their **mean** is taken away first:
#
# $$m = \text{mean}(absmax), \qquad M_g = \max_{j \in g} |absmax_j - m|, \qquad
# code_j = \text{round}\Big(127\, \frac{absmax_j - m}{M_g}\Big), \qquad
# \widehat{absmax}_j = \frac{code_j}{127} M_g + m.$$
#
# Here the symmetric range from -127 to 127 is right: 0 has the code 0, and $\pm M_g$ have codes of their own. (The
# paper has an 8-bit float in this place, `bitsandbytes` a table of 256 values that are denser near zero; the idea is
# the same.)
#
# ### Exercise 6: double quantization
#
# *1.25 points, about 30 minutes, difficulty 2 of 5.*
#
# <details><summary>Hint 1</summary>
#
# Take the mean away before you pad the last group: padding is to mean "no distance from the mean".
# </details>
# <details><summary>Hint 2</summary>
#
# You wrote nearly all of it in exercise 5: blocks, their absmax, and what to do where it is 0. The codes are rounded
# numbers now, and no indices.
# </details>

# %% exercise="double_quantize"
def double_quantize(absmax: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The absmax values of blocks, centred and in eight bits.

    absmax: float32 [blocks], at least one; group: how many neighbours share a magnitude, the last group may be
        shorter
    Returns (codes, magnitudes, mean):
        codes: int8 [blocks], from -127 to 127, the nearest to 127 * (absmax - mean) / magnitude; 0 in a group
            whose magnitude is 0 (without converting NaN, which becomes another number on another machine)
        magnitudes: float32 [groups], the largest |absmax - mean| of each group
        mean: float32, no dimensions, the mean of all absmax
    """
    ### BEGIN SOLUTION
    mean = absmax.mean()
    rest = absmax - mean
    groups = F.pad(rest, (0, -len(rest) % group)).view(-1, group)
    magnitudes = groups.abs().amax(1)
    scaled = torch.nan_to_num(groups / magnitudes[:, None])
    codes = torch.round(127 * scaled).flatten()[: len(rest)]
    return codes.to(torch.int8), magnitudes, mean
    ### END SOLUTION


# %% check="double_quantize"
check("double_quantize", double_quantize)

# %% [markdown]
# ## QLoRA
#
# Put together: the frozen weights in NF4 with double-quantized scales, $4 + 0.127$ bits each, and LoRA beside them in
# float32. The four-bit numbers are for storage only. For each product a layer's weight is dequantized, used and thrown
# away; in the backward pass it is dequantized again (stretch A writes that function).
#
# $$h = \text{dequantize}(codes, scales)\; x + s\, B A x$$
#
# Quality first, with your quantizer: does LoRA learn as well beside rounded weights?

# %% tags=["demo"] needs=["LoRALinear", "inject", "Bottleneck", "affine_int8", "NF4", "double_quantize"]
def through_qlora(x, block=64, group=256):
    """NF4 with double-quantized scales, and back."""
    codes, absmax = NF4.quantize(x, levels, block)
    small, magnitudes, mean = double_quantize(absmax, group)
    absmax = small.float() / 127 * magnitudes.repeat_interleave(group)[: len(small)] + mean
    return NF4.dequantize(codes, absmax, levels, block).view(x.shape)


def yours_in_nf4(model):
    model.load_state_dict(through(through_qlora).state_dict())
    lora(8)(model)


def kit_in_nf4(model):
    kit.quantize_model(model)
    kit.add_adapter(model, kit.LoRAConfig(targets=tuple(LINEAR), r=8, alpha=16))


rate = rate_of["LoRA, r = 8"]
quantized = perplexity(through(through_qlora), test)
your_qlora, _ = adapt(yours_in_nf4, rate)
kit_qlora, kit_model = adapt(kit_in_nf4, rate)
with kit.adapters_disabled(kit_model):
    kit_before = perplexity(kit_model, test)
small_layers = [module for module in kit_model.modules() if isinstance(module, kit.NF4Linear)]
stored = sum(layer.nf4().nbytes for layer in small_layers)
numbers = sum(layer.nf4().shape.numel() for layer in small_layers)
print(f"{'':34}{'before':>10}{'after':>10}")
print(f"{'LoRA on float32':34}{before:10.2f}{runs['LoRA, r = 8'].test:10.2f}")
print(f"{'LoRA on your NF4 (dequantized)':34}{quantized:10.2f}{your_qlora.test:10.2f}")
print(f"{'QLoRA by the kit (stays in NF4)':34}{kit_before:10.2f}{kit_qlora.test:10.2f}")
print(f"The kit's NF4 takes {stored * 8 / numbers:.3f} bits a weight: {stored / 1e6:.2f} MB")
print(f"for {numbers:,} weights, where float32 takes {numbers * 4 / 1e6:.2f} MB.")

# %% [markdown]
# On seven million weights that is a curiosity. On seven **billion** it decides where a model can be adapted at all.
# Weights, gradients and AdamW's states, worked out (hidden states come on top, the same for all four):

# %% tags=["demo"] needs=["double_quantize"]
GB, BASE, LORA = 1e9, 7e9, 40e6  # LoRA of rank 16 on all linear layers of a 7B model: about 40 million numbers
parts = {
    "full, float32": {"weights": 4 * BASE, "gradients": 4 * BASE, "optimizer": 8 * BASE},
    "full, bfloat16\nand float32 states": {"weights": 2 * BASE, "gradients": 2 * BASE, "optimizer": 12 * BASE},
    "LoRA on\nbfloat16": {"weights": 2 * BASE + 4 * LORA, "gradients": 4 * LORA, "optimizer": 8 * LORA},
    "QLoRA": {"weights": (4 + 8 / 64 + 32 / (64 * 256)) / 8 * BASE + 4 * LORA, "gradients": 4 * LORA,
              "optimizer": 8 * LORA},
}
figure, axes = plots.figure("A model of 7 billion weights: what training keeps", "method", "memory (GB)",
                            caption="Hidden states and CUDA itself are not counted. Dashed: a card of 24 GB.")
bottom = dict.fromkeys(parts, 0.0)
looks = (("weights", "blue", "//"), ("gradients", "green", "xx"), ("optimizer", "orange", ".."))
for part, colour, hatch in looks:
    heights = [sizes[part] / GB for sizes in parts.values()]
    axes.bar(list(parts), heights, bottom=list(bottom.values()), width=0.55, label=part, hatch=hatch,
             color=plots.COLOURS[colour], edgecolor="white", alpha=0.85)
    bottom = {name: bottom[name] + height for name, height in zip(parts, heights)}
for number, total in enumerate(bottom.values()):
    axes.text(number, total + 1.5, f"{total:.1f} GB", ha="center")
axes.axhline(24, linestyle="--", color=plots.COLOURS["vermilion"], marker="")
axes.set_ylim(0, 128)
axes.legend()
spoken = ", ".join(" ".join(name.split()) + f" {total:.1f} GB" for name, total in bottom.items())
plots.show(figure, f"Stacked bars of weights, gradients and optimizer states: {spoken}. A dashed line at 24 GB.")

# %% [markdown]
# ## Stretch A: dequantize again in backward
#
# *A badge, about 40 minutes, difficulty 4 of 5.*
#
# If you write `x @ dequantize().T` and leave the rest to autograd, it keeps the dense weight of **every** layer until
# the backward pass, because the gradient of $x$ needs it, and four bits have saved nothing. The cure is that of
# checkpointing (lab 03): compute it again. The frozen weight itself gets no gradient. With $g$ the gradient of the
# output, tokens in rows:
#
# $$dx = g\, W + s\,(g B)\, A, \qquad dA = s\,(g B)^\top x, \qquad dB = s\, g^\top (x A^\top).$$
#
# <details><summary>Hint 1</summary>
#
# Save `x`, `a` and `b` with `ctx.save_for_backward`, and the function `dequantize` and the scale as attributes of
# `ctx`. `backward` returns one value for each argument of `forward`, `None` for the last two.
# </details>
# <details><summary>Hint 2</summary>
#
# For $dA$ and $dB$ all tokens have to stand in rows, whatever the leading dimensions: `t.flatten(0, -2)`. For $dx$ they
# need not.
# </details>

# %% exercise="qlora_linear"
class QLoRA(torch.autograd.Function):
    """A product with a frozen weight that is dense only while it is used, and a low-rank update beside it."""

    @staticmethod
    def forward(ctx, x, a, b, scaling, dequantize):
        ### BEGIN SOLUTION
        ctx.save_for_backward(x, a, b)
        ctx.scaling, ctx.dequantize = scaling, dequantize
        return x @ dequantize().T + scaling * (x @ a.T) @ b.T
        ### END SOLUTION

    @staticmethod
    def backward(ctx, gradient):
        ### BEGIN SOLUTION
        x, a, b = ctx.saved_tensors

        def rows(t):
            return t.flatten(0, -2)

        low = ctx.scaling * gradient @ b
        grad_x = gradient @ ctx.dequantize() + low @ a
        grad_b = ctx.scaling * rows(gradient).T @ (rows(x) @ a.T)
        return grad_x, rows(low).T @ rows(x), grad_b, None, None
        ### END SOLUTION


def qlora_linear(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dequantize: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """x W^T + scaling * x A^T B^T with W = dequantize(), which is called once forward and at most once backward.

    x: [..., in], at least two dimensions; a: [r, in]; b: [out, r]
    dequantize: gives a new dense tensor [out, in] at each call
    No dense weight is in memory between the two passes. Gradients go to x, a and b (those that ask for one).
    Returns [..., out].
    """
    ### BEGIN SOLUTION
    return QLoRA.apply(x, a, b, scaling, dequantize)
    ### END SOLUTION


# %% check="qlora_linear"
check("qlora_linear", qlora_linear)

# %% tags=["demo"] needs=["affine_int8", "NF4", "qlora_linear"]
def peak_of_layers(depth, product, width=256):
    """Counted peak of forward and backward through layers in NF4, of 8 tokens."""
    torch.manual_seed(0)
    codes, absmax = NF4.quantize(torch.randn(width, width) / 16, levels, 64)
    a, b = (torch.randn(*shape).mul_(0.01).requires_grad_() for shape in ((8, width), (width, 8)))
    x = torch.randn(8, width, requires_grad=True)

    def dequantize():
        return NF4.dequantize(codes, absmax, levels, 64).view(width, width)

    def work():
        out = x
        for _ in range(depth):
            out = product(out, a, b, 2.0, dequantize)
        out.sum().backward()

    return measure(work)[1].peak_bytes / 1e6


def left_to_autograd(x, a, b, scaling, dequantize):
    return x @ dequantize().T + scaling * (x @ a.T) @ b.T


depths = (1, 2, 4, 8, 16, 32)
peaks = {name: [peak_of_layers(depth, product) for depth in depths]
         for name, product in (("left to autograd", left_to_autograd), ("yours", qlora_linear))}
figure, axes = plots.figure("Layers in four bits: what one step keeps", "layers", "counted peak (MB)",
                            caption="Autograd keeps each layer's weight in full width until the backward pass.")
for name, values in peaks.items():
    axes.plot(depths, values, label=name)
axes.legend()
spoken = ", ".join(f"{name} {values[-1]:.1f} MB" for name, values in peaks.items())
plots.show(figure, "Peak memory against the number of layers: left to autograd it grows with each layer, yours "
                   f"hardly. At {depths[-1]} layers: {spoken}.")

# %% [markdown]
# ## Stretch B: many adapters, one base
#
# *A badge, about 25 minutes, difficulty 2 of 5.*
#
# "LoRA weights for fast model switching", says the lecture: keep the big model in memory, load what a task needs. One
# step further: customers with different adapters stand in the **same batch**. The product with the large weight is the
# same for all, so it is computed once; each row then gets its own small update (S-LoRA, Sheng et al., 2024, serves
# thousands of adapters this way).
#
# <details><summary>Hint</summary>
#
# For each adapter that somebody asks for: the list of the samples that do. `out[rows] += ...` adds to those.
# </details>

# %% exercise="serve_adapters"
def serve_adapters(
    x: torch.Tensor,
    base: Callable[[torch.Tensor], torch.Tensor],
    adapters: dict[str, tuple[torch.Tensor, torch.Tensor, float]],
    names: list[str | None],
) -> torch.Tensor:
    """One batch, in which each sample has an adapter of its own.

    x: [batch, length, in]; base(x) gives [..., out], and is called once
    adapters: name -> (a [r, in], b [out, r], scaling), with ranks that may differ
    names: the adapter of each sample, or None for the base alone
    Returns [batch, length, out], for each sample base(x) + scaling * x A^T B^T of its adapter.
    """
    ### BEGIN SOLUTION
    out = base(x)
    for name in set(names) - {None}:
        rows = [i for i, own in enumerate(names) if own == name]
        a, b, scaling = adapters[name]
        out[rows] += scaling * (x[rows] @ a.T) @ b.T
    return out
    ### END SOLUTION


# %% check="serve_adapters"
check("serve_adapters", serve_adapters)

# %% tags=["demo"] needs=["LoRALinear", "inject", "Bottleneck", "serve_adapters"]
width, count, r = device.pick(fast=(512, 8, 8), full=(4096, 64, 16))
dense = torch.randn(width, width, device=device.torch) / width**0.5
store = {f"customer {i}": (torch.randn(r, width, device=device.torch) / width**0.5,
                           torch.randn(width, r, device=device.torch), 2.0) for i in range(count)}
names = [f"customer {i}" for i in range(count)]
x = torch.randn(count, 4, width, device=device.torch)
merged = {name: dense + s * b @ a for name, (a, b, s) in store.items()}
one_by_one = torch.stack([row @ merged[name].T for row, name in zip(x, names)])
together = serve_adapters(x, lambda rows: rows @ dense.T, store, names)
gap = (together - one_by_one).abs().max().item() / one_by_one.abs().max().item()
print(f"{count} customers, one layer of {width} x {width}; the outputs agree within {gap:.0e} of the largest")
print(f"a merged weight for each: {bytes_of(merged.values()) / 1e6:9.1f} MB")
small = [t for a, b, _ in store.values() for t in (a, b)]
print(f"one base and adapters:    {bytes_of([dense, *small]) / 1e6:9.1f} MB")

# %% [markdown]
# ## Stretch C: the intrinsic dimension
#
# *A badge, about 30 minutes, difficulty 3 of 5.*
#
# How many numbers does a task need at all? Li et al. (2018) measure it so: draw $d$ random directions $u_1, \dots, u_d$
# in the space of all weights $\theta$, and train nothing but how far to go in each:
#
# $$\theta = \theta_0 + \sum_{i=1}^{d} z_i\, \frac{u_i}{\lVert u_i \rVert}, \qquad z \in \mathbb{R}^d
# \text{ trained, beginning at } 0.$$
#
# The $d$ at which this reaches 90% of what full fine-tuning reaches is the task's **intrinsic dimension**. A direction
# goes through **all** the weights at once: its length is that over all tensors together.
#
# <details><summary>Hint</summary>
#
# `directions[name].flatten(1)` has one row for each direction. `torch.tensordot(z, directions[name], 1)` is the sum of
# the directions, weighed by `z`, in the shape of the tensor.
# </details>

# %% exercise="in_subspace"
def in_subspace(
    start: dict[str, torch.Tensor], directions: dict[str, torch.Tensor], z: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A point in the random subspace through `start`.

    start: name -> weights, of any shape
    directions: name -> [d, *shape of the weights], each direction's part of that tensor, not yet of length 1
    z: [d], which requires a gradient
    Returns name -> start + the sum over i of z_i times direction i, divided by its length over all tensors
    together. Gradients flow to z.
    """
    ### BEGIN SOLUTION
    squares = sum(part.flatten(1).square().sum(1) for part in directions.values())
    length = squares.sqrt()
    return {name: value + torch.tensordot(z / length, directions[name], 1) for name, value in start.items()}
    ### END SOLUTION


# %% check="in_subspace"
check("in_subspace", in_subspace)

# %% tags=["demo"] needs=["LoRALinear", "inject", "Bottleneck", "in_subspace"]
dimensions = device.pick(fast=(8, 64, 512), full=(8, 32, 128, 512, 2048))
biases = {name: p.detach() for name, p in base_model.named_parameters() if name.endswith("bias")}
count = sum(p.numel() for p in biases.values())
print(f"{count:,} biases; BitFit trains all of them")
print(f"{'directions':>10}{'perplexity':>12}{'of the gain of BitFit':>24}")
for d in dimensions:
    torch.manual_seed(d)
    directions = {name: torch.randn(d, *p.shape, device=p.device) for name, p in biases.items()}
    z = torch.zeros(d, device=device.torch, requires_grad=True)
    length = rate_of["BitFit"] * math.sqrt(count / d)  # AdamW's steps in d numbers as long as BitFit's in all
    now = torch.tensor(length, device=device.torch)
    optimizer = torch.optim.AdamW([z], lr=now, weight_decay=0.0, capturable=device.kind == "cuda")

    def learn(rows, z=z, directions=directions, optimizer=optimizer):
        logits = torch.func.functional_call(base_model, in_subspace(biases, directions, z),
                                            kwargs={"input_ids": rows}).logits[:, :-1]
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()

    learn = Replayed(learn)
    for step in range(STEPS):
        now.fill_(length * min(1, (step + 1) / 2) * (1 - step / STEPS))
        learn(training[step * BATCH % (len(training) - BATCH + 1) :][:BATCH])
    moved = copy.deepcopy(base_model)
    moved.load_state_dict(in_subspace(biases, directions, z.detach()), strict=False)
    reached = perplexity(moved, test)
    share = math.log(before / reached) / math.log(before / runs["BitFit"].test)
    print(f"{d:10}{reached:12.2f}{share:24.0%}")

# %% [markdown]
# The directions run through the biases alone, so that many of them fit into memory: what they can reach is what BitFit
# reaches. A few do nothing; some hundreds, of twenty thousand, get a good part of the way. How far are they from the 90%
# of the definition? At full size even two thousand are far from it: for this model and this text the intrinsic dimension
# is not so low. Aghajanyan et al. found that it falls as models grow, and ours is small. Besides, the directions are
# random and know nothing of the task: a method that may choose its own, as LoRA does, needs fewer.
#
# ## The receipt
#
# The same training, by everybody. LoRA does a quarter fewer operations than full fine-tuning, since frozen weights need no
# gradients. Whether that is time depends on the size: products as small as ours take a GPU the same few microseconds
# however little they multiply, and LoRA makes three of one, so that there the frozen model trains **slower**. What it
# saves at any size is memory.

# %% tags=["demo"] needs=["LoRALinear", "inject", "Bottleneck", "affine_int8", "NF4", "double_quantize"]
from effnlp_lab.device import ceilings
from effnlp_lab.notebook.receipt import Receipt


def row(run, costs):
    peak, flops = costs
    return {"quality": run.test, "peak_bytes": peak, "flops": flops * STEPS, "seconds": run.seconds}


def by_peft(model):
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it reports what it lacks
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR)
    inject_adapter_in_model(config, model.requires_grad_(False))


by_kit = by_the_kit(kit.LoRAConfig(targets=tuple(LINEAR), r=8, alpha=16))
receipt = Receipt("04", quality="perplexity (lower is better)", device=device,
                  title=f"From code to English: {STEPS} steps of {BATCH} x {LENGTH} tokens, from {before:.1f}")
for role, name, method in (("baseline", "full fine-tuning", "full fine-tuning"),
                           ("yours", "LoRALinear and inject", "LoRA, r = 8"),
                           ("yours", "Bottleneck", "bottleneck")):
    receipt.add(role, name, **row(runs[method], costs[method]))
receipt.add("reference", "the kit's LoRA", **row(adapt(by_kit, rate)[0], step_costs(by_kit)))
receipt.add("reference", "the kit's QLoRA", **row(kit_qlora, step_costs(kit_in_nf4)))
try:
    receipt.add("library", "peft", **row(adapt(by_peft, rate)[0], step_costs(by_peft)))
except ImportError:
    print("peft is not installed, and so was not compared")
flops = costs["LoRA, r = 8"][1] * STEPS
receipt.add("limit", "products of LoRA alone", flops=flops,
            seconds=flops / ceilings(device).matmul_flops_per_second, note="at the rate of a large product")
receipt.show()
print(f"saved as {receipt.save().name}")

# %% [markdown]
# ## In your own words
#
# A hospital wants one language model adapted to each of its forty wards, on one machine with one GPU. Full fine-tuning,
# LoRA or something smaller? Decide, and say which measurement of this lab your decision rests on, and what it leaves open.
#
# Write 60 to 120 words. A person reads and grades them.

# %% [markdown] written="forty_wards"
# **Rubric, for whoever grades** (shares of the points; another answer as good earns them too)
#
# - 0.3: one frozen base and forty small adapters: storage and memory of forty whole models against it, with
#   numbers.
# - 0.3: what is given up: the share of full fine-tuning's gain that LoRA reaches here, and that it depends on
#   the task.
# - 0.2: serving: adapters change with the request, and merging one loses that.
# - 0.2: what is open: our text is one domain and our model is small; a test for each ward on text of its own.

# %% [markdown]
# ## What you have learned
#
# - A frozen model is adapted by few numbers: low-rank updates, adapters, factors, biases or virtual tokens. They save
#   optimizer states and gradients first, storage for each task second, hidden states hardly.
# - LoRA starts as the base ($B = 0$, $A$ random), is scaled by $\alpha / r$ or $\alpha / \sqrt r$, merges into the
#   weight, and comes out again only from a copy.
# - Freeze first, then add; refuse a target that names nothing.
# - A grid of 256 values has 255 steps, holds zero exactly, and belongs to a block.
# - NF4's levels are normal quantiles with an exact zero, seven below it and eight above. Its scales are quantized
#   again, about their mean.
# - Four bits save memory only if nobody keeps the dense weight: dequantize, use, drop, and dequantize again.
# - A table of one task says little about the next. Measure on yours.
#
# ## Read on
#
# - N. Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019: bottleneck adapters.
# - C. Li, H. Farkhoor, R. Liu, J. Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", 2018; A.
#   Aghajanyan, S. Gupta, L. Zettlemoyer, "Intrinsic Dimensionality Explains the Effectiveness of Language Model
#   Fine-Tuning", 2021.
# - E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022.
# - D. Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
# - X. Li, P. Liang, "Prefix-Tuning", 2021; B. Lester, R. Al-Rfou, N. Constant, "The Power of Scale for
#   Parameter-Efficient Prompt Tuning", 2021; E. Ben Zaken, Y. Goldberg, S. Ravfogel, "BitFit", 2022; H. Liu et al.,
#   "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022: (IA)³.
# - T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
# - V. Lialin, V. Deshpande, A. Rumshisky, "Scaling Down to Scale Up: A Guide to Parameter-Efficient Fine-Tuning", 2023:
#   the lecture's pseudo-code is from here.
# - Y. Sheng et al., "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", 2024.
# - In the kit: `effnlp_lab/adapters` holds all of these methods as an engineer would use them, saved in PEFT's format,
#   with kernels that multiply NF4 weights as they are.
