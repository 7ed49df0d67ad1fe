# %% [markdown]
# # Lab 09: Distillation
#
# You have a good model that is too expensive to serve, and want a smaller one. Text alone tells the small model which
# token came next. The large one can tell it more: how likely **every** token was. Learning from such distributions is
# called distillation. The lecture's example is DistilBERT, and it adds two warnings in the same breath: it "can be
# expensive if the teacher is big", and it "still loses performance". In this lab you write every part of it, and then
# you put both warnings on a scale.
#
# | | exercise | points | minutes | difficulty |
# |---|---|---|---|---|
# | 1 | `soft_loss`: soft targets and temperature | 1.5 | 30 | 2 of 5 |
# | 2 | `distillation_loss`: the distillation loss | 2 | 45 | 3 of 5 |
# | 3 | `student_weights`: a student from alternate layers | 1.5 | 30 | 2 of 5 |
# | 4 | `chunked_loss`: a loss that never holds the logits | 3 | 75 | 4 of 5 |
# | 5 | `divergence`: forward against reverse KL | 2 | 40 | 3 of 5 |
# | stretch | `on_policy_step`: on-policy distillation | badge | 40 | 4 of 5 |
# | stretch | `width_masks`: width pruning masks | badge | 35 | 3 of 5 |
#
# **Time.** About four and a half hours: the core exercises, the reading and the measurements. Stretch exercises come on top.
#
# **You need** PyTorch's modules and autograd, softmax and cross-entropy. A laptop is enough: on a CPU the runs are
# short and memory is counted instead of measured.
#
# **How a check works.** Under each blank stands one call, `check(...)`. It runs your function on fresh random cases,
# compares value and gradients with a reference, and says what went wrong, by name where it recognises the slip. Run it
# as often as you like.
#
# {assistants} The five core blanks are 3 to 15 lines each, and nearly every slip in them trains without an error message,
# only towards something else.
#
# **Libraries.** `liger_kernel`, `trl`, `transformers` and this kit's own distillation are refused inside your answers; the
# demos compare with them. PyTorch's `kl_div` is allowed, and deserves a careful look at its documentation.

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

device = effnlp_lab.start("09_distillation", device=DEVICE, fast=FAST)

# %% [markdown]
# ## 1. Soft targets and temperature
#
# Our teacher is `course-base`, a Llama of seven million weights that was trained on Python source. Here is what it
# thinks may follow a piece of code, at three **temperatures** $T$:
#
# $$p_i = \frac{\exp(v_i / T)}{\sum_j \exp(v_j / T)}$$
#
# with $v$ the teacher's logits.

# %% tags=["demo"]
import copy
import json

from effnlp_lab.course.models import WEIGHTS, load_model, load_tokenizer
from effnlp_lab.course.text import load_text
from effnlp_lab.notebook import plots

if device.kind == "cpu" and device.fast:
    torch.set_num_threads(1)  # products this small: a second thread would mostly wait for the first
teacher = load_model("course-base", device=device, dtype="float32").requires_grad_(False)
tokenizer = load_tokenizer("course-base")

PIECE = "    except KeyError:\n        raise"
ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(PIECE)["input_ids"]]], device=device.torch)
with torch.no_grad():
    logits = teacher(input_ids=ids).logits[0, -1].double()
best = logits.topk(10).indices
figure, axes = plots.figure("What comes next, as the teacher sees it", "next token", "probability (%)",
                            caption="The ten likeliest tokens after 'except KeyError: raise', of 4,096.")
spoken = []
for T, look in zip((1, 2, 4), plots.looks(3)):
    probabilities = 100 * (logits / T).softmax(0)[best].cpu()
    axes.plot(range(10), probabilities, label=f"T = {T}", **look)
    spoken.append(f"from {probabilities[0]:.2g}% to {probabilities[-1]:.2g}% at T = {T}")
axes.set_yscale("log")
axes.set_xticks(range(10), [tokenizer.decode([i]).strip() for i in best.tolist()], rotation=35, ha="right")
axes.legend()
plots.show(figure, "Probabilities of the ten likeliest next tokens, falling from the first to the tenth: "
                   f"{'; '.join(spoken)}.")

# %% [markdown]
# A label would have told the student one token. Here it can see that many exceptions may be raised, and which. Hinton,
# Vinyals and Dean (2015) learn from exactly that: which of the other answers are nearly right. A higher temperature
# brings the tokens closer together, so that the unlikely ones are heard too. (The ten fall together because the other
# four thousand rise.)
#
# The student is to match the distribution. How far it is from that, the Kullback-Leibler divergence says, with $P$ the
# teacher's distribution and $Q$ the student's, **both** at temperature $T$:
#
# $$\mathcal{L}_\text{soft} = T^2 \cdot \frac{1}{N} \sum_{n=1}^{N} \mathrm{KL}(P_n \,\|\, Q_n), \qquad
# \mathrm{KL}(P \,\|\, Q) = \sum_i p_i \log \frac{p_i}{q_i}.$$
#
# **Why $T^2$?** The derivative of $\mathrm{KL}(P \| Q)$ with respect to a student's logit $z_i$ is $(q_i - p_i) / T$.
# When $T$ is high, $p_i \approx (1 + v_i / T) / V$ over a vocabulary of $V$ (for logits with mean 0), and the same for
# $q$, so that the difference shrinks as $1 / T$ once more:
#
# $$\frac{\partial\, \mathrm{KL}}{\partial z_i} \approx \frac{1}{V\, T^2} (z_i - v_i).$$
#
# Multiplied by $T^2$, the soft loss keeps its weight beside other losses when you change the temperature.
#
# ### Exercise 1: soft targets and temperature
#
# *1.5 points, about 30 minutes, difficulty 2 of 5.*
#
# <details><summary>Hint 1</summary>
#
# `F.kl_div(a, b)` computes $\sum b\,(\log b - a)$: its first argument is a **logarithm**, and its second is the
# distribution that weighs. So the student's logarithms come first, and the teacher's probabilities second.
# </details>
# <details><summary>Hint 2</summary>
#
# Look at `reduction`. `"mean"` divides by the number of all elements, the vocabulary's included; `"batchmean"` divides
# by the size of the first dimension. Neither is the number of positions unless the input is
# `[positions, vocabulary]`.
# </details>
# <details><summary>Hint 3</summary>
#
# Logits in half precision: `.float()` before anything else. And the teacher is a target: `.detach()`.
# </details>

# %% exercise="soft_loss"
def soft_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T^2 times the mean over positions of KL(P || Q), both at temperature T.

    student_logits, teacher_logits: [..., vocabulary] of the same shape, with at least one dimension before
        the vocabulary (all of them count positions); float32, float16 or bfloat16, of any finite size
    temperature: T, above 0
    Returns a float32 tensor of no dimensions, in nats, computed in float32. Gradients flow to the student's
    logits and none to the teacher's.
    """
    ### BEGIN SOLUTION
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1).flatten(0, -2)
    p = F.softmax(teacher_logits.detach().float() / temperature, dim=-1).flatten(0, -2)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")
    ### END SOLUTION


# %% check="soft_loss"
check("soft_loss", soft_loss)

# %% [markdown]
# ### Measure it: does the factor do what it promises?
#
# Random logits of a student and a teacher, and the size of the gradient that reaches the student.

# %% tags=["demo"] needs=["soft_loss"]
generator = torch.Generator().manual_seed(0)
theirs = torch.randn(32, 50, generator=generator)
temperatures, sizes = (0.5, 1, 2, 4, 8, 16), {"with the factor": [], "without it": []}
for T in temperatures:
    mine = torch.randn(32, 50, generator=torch.Generator().manual_seed(1)).requires_grad_()
    soft_loss(mine, theirs, T).backward()
    sizes["with the factor"].append(mine.grad.norm().item())
    sizes["without it"].append(mine.grad.norm().item() / T**2)
figure, axes = plots.figure("The gradient of the soft loss by temperature", "temperature T", "norm of the gradient",
                            caption="Without the factor T squared it falls with the square of the temperature.")
for name, values in sizes.items():
    axes.plot(temperatures, values, label=name)
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.legend()
plots.show(figure, "Norm of the gradient against temperature. Between T = 2 and T = 16 it changes by a factor of "
                   f"{sizes['with the factor'][-1] / sizes['with the factor'][2]:.2f} with T squared, and of "
                   f"{sizes['without it'][-1] / sizes['without it'][2]:.4f} without.")

# %% [markdown]
# ## 2. The distillation loss
#
# DistilBERT (Sanh et al., 2019) adds three losses:
#
# - the **divergence** from the teacher, your `soft_loss`;
# - the **cross-entropy** of the labels, as in ordinary training, at temperature 1;
# - the **cosine** between the hidden states of both, $1 - \cos(h^{\text{student}}, h^{\text{teacher}})$: the student's
#   states shall point where the teacher's do. That needs equal widths.
#
# $$\mathcal{L} = \alpha_1 \mathcal{L}_\text{soft} + \alpha_2 \mathcal{L}_\text{hard} + \alpha_3 \mathcal{L}_\text{cos}$$
#
# Its published training script used 5, 2 and 1, at $T = 2$.
#
# **Where we depart from DistilBERT.** BERT is a masked model: its hard loss is over the 15% of the tokens that were
# masked, while its other two losses are over all tokens that are not padding (an option restricts the divergence to the
# masked ones). Ours is a causal model. Every position predicts its next token, so all three losses are means over the
# same positions. The paper also writes its soft loss as the cross-entropy $-\sum_i p_i \log q_i$; it exceeds the
# divergence by the teacher's entropy, which the student cannot change, and the gradient is the same.
#
# **Padding.** Sequences of different lengths are padded, and a label of $-100$ says that a position does not count.
# It must not count in the sum, **nor in the number that the sum is divided by**:
#
# ```
#  labels    17   4   9   0  52   |   8  31 -100 -100 -100
#  counts     x   x   x   x   x   |   x   x    .    .    .     7, not 10
# ```
#
# And what stands at such a position may be anything. A row whose attention was masked altogether holds NaN, and 0
# times NaN is NaN.
#
# ### Exercise 2: the distillation loss
#
# *2 points, about 45 minutes, difficulty 3 of 5.*
#
# You may call your `soft_loss`.
#
# <details><summary>Hint 1</summary>
#
# `logits[counts]`, with a boolean `counts` of shape `[batch, length]`, is `[positions that count, vocabulary]`. Choose
# first, and padding can do nothing any more.
# </details>
# <details><summary>Hint 2</summary>
#
# `F.cosine_similarity(a, b, dim=-1)` gives one number a position.
# </details>
# <details><summary>Hint 3</summary>
#
# The mean over no positions at all is 0 / 0. The sum over none is 0, and it still hangs on the graph.
# </details>

# %% exercise="distillation_loss"
def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    weights: tuple[float, float, float],
) -> torch.Tensor:
    """The weighted sum of divergence (T^2 KL(P || Q)), cross-entropy and cosine loss (1 - cos).

    student_logits, teacher_logits: [batch, length, vocabulary] float32
    student_hidden, teacher_hidden: [batch, length, hidden] float32
    labels: [batch, length] int64: the token that each position is to predict (they are shifted already), or
        -100 where the position does not count; there logits and hidden states may be anything, NaN included
    temperature: of the divergence alone
    weights: of divergence, cross-entropy and cosine, in this order
    Each of the three is a mean over the positions that count, in the whole batch. Returns a tensor of no
    dimensions; 0 where no position counts. Positions that do not count get a gradient of 0.
    """
    ### BEGIN SOLUTION
    counts = labels != -100
    if not counts.any():
        return student_logits[counts].sum()
    soft = soft_loss(student_logits[counts], teacher_logits[counts], temperature)
    hard = F.cross_entropy(student_logits[counts], labels[counts])
    cosine = (1 - F.cosine_similarity(student_hidden[counts], teacher_hidden[counts], dim=-1)).mean()
    return weights[0] * soft + weights[1] * hard + weights[2] * cosine
    ### END SOLUTION


# %% check="distillation_loss"
check("distillation_loss", distillation_loss)

# %% [markdown]
# ## 3. Where the student starts
#
# DistilBERT's student has its teacher's width and half of its layers, and it does not start from random numbers: "we
# initialize the student from the teacher by taking one layer out of two". Layers are residual, $x + f(x)$: each adds a
# little to a stream that all of them read. Take some out, and the stream still arrives.
#
# ```
#   teacher   embed -> [0] -> [1] -> [2] -> [3] -> [4] -> [5] -> [6] -> [7] -> norm -> head
#                       |             |             |             |
#   student   embed -> [0] --------> [1] --------> [2] --------> [3] --------> norm -> head
# ```
#
# A model's weights are a dict from names to tensors (`model.state_dict()`), and the layer's number is part of the
# name: `model.layers.6.mlp.up_proj.weight` becomes `model.layers.3.mlp.up_proj.weight`. Everything that is in no layer
# is taken as it is. Which half you keep depends on you:

# %%
effnlp_lab.variant("student_weights")

# %% [markdown]
# ### Exercise 3: a student from alternate layers
#
# *1.5 points, about 30 minutes, difficulty 2 of 5.*
#
# <details><summary>Hint 1</summary>
#
# Take a layer's name apart: what follows the prefix is a number, a dot, and the rest. `"12.mlp.weight".split(".", 1)`.
# </details>
# <details><summary>Hint 2</summary>
#
# Layers 0, 2, 4 become 0, 1, 2, and so do layers 1, 3, 5: either way the new number is the old one `// 2`.
# </details>

# %% exercise="student_weights"
def student_weights(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a student that keeps every other layer of its teacher.

    weights: the teacher's, by name, in any order. The names of a layer's weights are the prefix, the layer's
        number (counted from 0, without leading zeros), a dot, and the rest, which may hold dots and numbers.
        A name belongs to a layer if and only if it begins with the prefix.
    prefix: ends with a dot, such as "model.layers."
    Your variant says whether the even layers stay or the odd ones. They are numbered 0, 1, 2, ... in their
    old order. Returns a new dict, in any order, with the layers that stay and everything that is in no layer;
    the tensors are copies, in the same dtype.
    """
    ### BEGIN SOLUTION
    kept = {}
    for name, value in weights.items():
        if name.startswith(prefix):
            number, rest = name[len(prefix):].split(".", 1)
            number = int(number)
            if number % 2 == 1:
                continue
            name = f"{prefix}{number // 2}.{rest}"
        kept[name] = value.clone()
    return kept
    ### END SOLUTION


# %% check="student_weights"
check("student_weights", student_weights)

# %% [markdown]
# ### Predict, then measure: half a model, before any training
#
# **Predict first.** Guessing among 4,096 tokens with no knowledge at all costs $\ln 4096 = 8.3$ nats a token. The
# teacher's loss on held-out code is printed below. Where in between will the student be that has half of its layers,
# and has not been trained for a single step? And is it better to keep every other layer, or the first half? Write a
# number and a word down.

# %% tags=["nbval-check-output"]
print(f"{math.log(4096):.2f} nats")

# %% predict="untrained_half"
my_loss_of_the_untrained_half = None  # your guess, in nats a token
my_better_half = None  # "every other" or "first half"

# %% tags=["demo"] needs=["student_weights"]
LENGTH, BATCH, HELD_OUT = device.pick(fast=(48, 4, 16), full=(256, 16, 192))
STEPS = device.pick(fast=12, full=600)


def rows_of(name, limit, seed):
    """Stretches of LENGTH + 1 tokens of a course text, in a random order that is always the same."""
    texts = [text + "<|endoftext|>" for text in load_text(name, limit_bytes=limit).texts()]
    tokens = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])
    rows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))].to(device.torch)


training = rows_of("course-train", device.pick(fast=200_000, full=35_000_000), 0)
held_out = rows_of("course-heldout", device.pick(fast=100_000, full=None), 1)[:HELD_OUT]


def student_from(weights, layers):
    """A model of so many layers with the teacher's width and these weights."""
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    torch.manual_seed(9)
    model = type(teacher)(config).to(device.torch)
    if weights is not None:
        model.load_state_dict(weights)
    return model


@torch.no_grad()
def held_out_loss(model):
    """Mean cross-entropy of a held-out token, in nats."""
    model.eval()
    total = sum(model(input_ids=part[:, :-1]).logits.float().flatten(0, 1).log_softmax(-1)
                .gather(1, part[:, 1:].reshape(-1, 1)).sum() for part in held_out.split(16))
    return -total.item() / (len(held_out) * LENGTH)


prefix, half = "model.layers.", teacher.config.num_hidden_layers // 2
first_half = {name: value for name, value in teacher.state_dict().items()
              if not name.startswith(prefix) or int(name[len(prefix):].split(".")[0]) < half}
starts = {
    "from layers": student_weights(teacher.state_dict(), prefix),
    "the first half": first_half,
    "from scratch": None,
}
teacher_loss = held_out_loss(teacher)
print(f"{'the teacher':18}{teacher_loss:6.2f} nats")
at_start = {}
for name, weights in starts.items():
    at_start[name] = held_out_loss(student_from(weights, half))
    print(f"{name:18}{at_start[name]:6.2f} nats")
if my_loss_of_the_untrained_half is not None:
    print(f"You predicted {my_loss_of_the_untrained_half} nats, and {my_better_half}.")

# %% [markdown]
# With half of its layers gone the model is neither the teacher nor noise. How good a start is for **training** need
# not follow from how good it is untouched; the next measurement tells.
#
# ## 4. What distillation costs, and what it gains
#
# Now the comparison that the lecture's two warnings call for. Four students of the same shape, with the same batches,
# optimizer and learning rate:
#
# | run | starts from | learns from |
# |---|---|---|
# | scratch | random numbers | text |
# | layers | your `student_weights` | text |
# | scratch, distilled | random numbers | your `distillation_loss` (5, 2, 1, $T = 2$) |
# | layers, distilled | your `student_weights` | your `distillation_loss` |
#
# A step costs $6S$ operations a token for a student of $S$ weights (2 forward, 4 backward; Kaplan et al., 2020), and
# distillation adds the teacher's forward pass, $2 \cdot \text{teacher}$. So at the same number of steps a distilled run
# has cost more. To be fair, the runs on text go on until they have cost as much.
#
# **Predict first.** (a) How much more does a distilled step cost, in percent? You have the sizes: print them. (b) At
# the same **compute**, teacher included, which of the four runs ends lowest?

# %% predict="cost_of_a_step"
my_extra_cost_in_percent = None  # your guess
my_winner_at_the_same_compute = None  # the name of a run

# %% tags=["demo"] needs=["soft_loss", "distillation_loss", "student_weights"]
import time


def text_loss(student, rows):
    logits = student(input_ids=rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def taught_loss(student, rows):
    """Your distillation loss; hidden states are those that the head reads."""
    seen, wanted = rows[:, :-1], rows[:, 1:]
    with torch.no_grad():
        theirs = teacher.model(input_ids=seen).last_hidden_state
        target = teacher.lm_head(theirs)
    mine = student.model(input_ids=seen).last_hidden_state
    return distillation_loss(student.lm_head(mine), target, mine, theirs, wanted, 2.0, (5.0, 2.0, 1.0))


def train(student, loss, steps, evaluations=4, start=0):
    """Held-out losses by step. The learning rate rises over the first tenth of STEPS and then stays, so that every
    point of the curve is what a run of that length reaches."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.01)
    points = {0: held_out_loss(student)}
    marks = {STEPS, *(round(steps * i / evaluations) for i in range(1, evaluations + 1))}
    for step in range(start, start + steps):
        student.train()
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step - start + 1) / (STEPS / 10))
        rows = training[torch.arange(step * BATCH, (step + 1) * BATCH, device=device.torch) % len(training)]
        optimizer.zero_grad(set_to_none=True)
        loss(student, rows).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        if step - start + 1 in marks:
            points[step - start + 1] = held_out_loss(student)
    return points


RATE = 1e-3
size = {"student": sum(p.numel() for p in student_from(None, half).parameters()),
        "teacher": sum(p.numel() for p in teacher.parameters())}
per_token = {"text": 6 * size["student"], "taught": 6 * size["student"] + 2 * size["teacher"]}
extra = per_token["taught"] / per_token["text"] - 1
LONGER = round(STEPS * (1 + extra))
RUNS = {
    "scratch": (None, text_loss, "text", LONGER),
    "layers": (starts["from layers"], text_loss, "text", LONGER),
    "scratch, distilled": (None, taught_loss, "taught", STEPS),
    "layers, distilled": (starts["from layers"], taught_loss, "taught", STEPS),
}
print(f"{size['student']:,} weights in the student, {size['teacher']:,} in the teacher: "
      f"a distilled step costs {extra:.0%} more")
curves, seconds = {}, {}
for name, (weights, loss, _, steps) in RUNS.items():
    student = student_from(weights, half)
    begin = time.perf_counter()
    curves[name] = train(student, loss, steps)
    seconds[name] = time.perf_counter() - begin
    if name == "layers, distilled":
        distilled = student.eval()


def drawn(title, xlabel, place, caption):
    figure, axes = plots.figure(title, xlabel, "held-out loss (nats a token)", caption=caption)
    for name, points in curves.items():
        axes.plot([place(name, step) for step in points], list(points.values()), label=name)
    axes.axhline(teacher_loss, linestyle="--", color="#888888", marker="")
    axes.annotate("teacher", (1, teacher_loss), (0, 3), ("axes fraction", "data"), "offset points",
                  ha="right", color="#555555", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=xlabel == "steps")
    axes.legend()
    return figure


at_steps = {name: points[STEPS] for name, points in curves.items()}
at_compute = {name: points[max(points)] for name, points in curves.items()}
spoken = ", ".join(f"{name} {loss:.2f}" for name, loss in at_steps.items())
plots.show(drawn("Loss against steps", "steps", lambda name, step: step,
                 f"A step is {BATCH * LENGTH:,} tokens. The runs on text go on to the same compute."),
           f"Held-out loss against steps, four runs. After {STEPS} steps: {spoken}.")
flops = {name: per_token[kind] * BATCH * LENGTH for name, (_, _, kind, _) in RUNS.items()}
spoken = ", ".join(f"{name} {loss:.2f}" for name, loss in at_compute.items())
plots.show(drawn("Loss against compute, the teacher's forward passes included", "compute (TFLOP)",
                 lambda name, step: step * flops[name] / 1e12, "All four curves end at the same compute."),
           f"Held-out loss against operations, four runs that end at the same place: {spoken}.")

# %% tags=["demo"] needs=["soft_loss", "distillation_loss", "student_weights"]
print(f"{'run':22}{'same steps':>12}{'same compute':>14}{'seconds':>9}")
for name in RUNS:
    print(f"{name:22}{at_steps[name]:12.3f}{at_compute[name]:14.3f}{seconds[name]:9.1f}")
print(f"{'the teacher':22}{teacher_loss:26.3f}")
best_of_steps, best_of_compute = min(at_steps, key=at_steps.get), min(at_compute, key=at_compute.get)
print(f"\nLowest at the same steps: {best_of_steps}. Lowest at the same compute: {best_of_compute}.")
gains = {start: at_compute[start] - at_compute[f"{start}, distilled"] for start in ("scratch", "layers")}
for start, gain in gains.items():
    print(f"From {start}, at the same compute, distillation {'gains' if gain > 0 else 'loses'} {abs(gain):.3f} nats.")
if my_winner_at_the_same_compute is not None:
    print(f"You predicted {my_extra_cost_in_percent}% and {my_winner_at_the_same_compute}.")
tokens = json.loads((WEIGHTS / "training.json").read_text())["curves"]["base"]["tokens"]
spent = 6.0 * size["teacher"] * tokens
here = per_token["taught"] * BATCH * LENGTH * STEPS
print(f"The teacher itself was trained on {tokens:,} tokens: {spent:.1e} operations, "
      f"{spent / here:,.0f} times one run here.")

# %% [markdown]
# Read the table in three ways.
#
# - **Same steps.** This is how distillation is usually shown, and where it looks its best: nobody asks who paid for the
#   teacher's forward passes. Compare the two rows of each start. From the teacher's layers the soft targets help. From
#   random numbers they may not even do that in so few steps: most of this loss asks for the teacher's probabilities and
#   hidden states, which a student that has hardly read anything is far from.
# - **Same compute.** A teacher of less than twice the student's size adds more than half a step. With a teacher of ten
#   times the student's size a distilled step costs more than four ordinary ones: what the lecture means by "expensive
#   if the teacher is big". (The teacher's logits can be computed once and stored if many students are trained on the same text. With
#   a vocabulary of a hundred thousand one keeps the largest few.)
# - **The teacher's own training.** The last line. If the teacher exists anyway, it is free; if you train one in order
#   to distil it, it is the largest item of the bill, and you might have trained the student on more text instead.
#
# At the fast size these runs see a few thousand tokens, and a random start is still learning which tokens are frequent:
# then the **start** decides, and the loss hardly matters. The ranking of the losses is a question for the full size, on
# a GPU. What holds at every size is that the student "still loses performance": no curve reaches the dashed line.
# DistilBERT reports the same honestly: it retains 97% of BERT's score on GLUE with 40% fewer weights. And where its
# authors took their design apart, the start from layers turned out to be worth more than any single term of the loss.
#
# ### Sheared Llama: cut, then go on
#
# Xia et al. (2023) took the other lesson from this. If the start is what matters, find a better one: not every other
# layer, but the layers, heads and dimensions that hurt least when they are missing. Masks over a Llama of 7 billion
# weights **learn** what to cut, down to 1.3 or 2.7 billion; then ordinary training on text goes on, without a teacher.
# They report better models than others of that size for about 3% of the compute of training them from scratch. That
# again leaves out the 7 billion's own training, which somebody else had paid for.
#
# The kit's room has this method. We give it the compute of the runs above, and let it choose layers and dimensions of
# the MLPs, two of its four kinds of masks. Pruning runs the **whole** teacher forward and backward, so each of its
# steps is dear; what is left goes to training the cut model.

# %% tags=["demo"] needs=["soft_loss", "distillation_loss", "student_weights"]
from effnlp_lab.distillation import PrunableModel, TargetShape, cut, pruning_loss, pruning_parameters

torch.manual_seed(0)
whole = copy.deepcopy(teacher).requires_grad_(True)
shape = TargetShape(layers=5, intermediate=480)  # of 8 and 768
budget = per_token["taught"] * STEPS  # operations for each token of a batch
prune_steps = max(4, STEPS // 8)
masked = PrunableModel(whole, shape, warmup_steps=prune_steps // 2)
optimizer = torch.optim.AdamW(pruning_parameters(masked, RATE / 3))
for step in range(prune_steps):
    rows = training[torch.arange(step * BATCH, (step + 1) * BATCH, device=device.torch) % len(training)]
    total, count = pruning_loss(masked.train(), {"input_ids": rows})
    optimizer.zero_grad(set_to_none=True)
    (total / count).backward()
    nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
    optimizer.step()
sheared = cut(masked).requires_grad_(True)
sheared_size = sum(p.numel() for p in sheared.parameters())
after_cut = held_out_loss(sheared)
left = round((budget - 6 * size["teacher"] * prune_steps) / (6 * sheared_size))
sheared_points = train(sheared, text_loss, left, evaluations=2, start=prune_steps)
at_compute["sheared"] = sheared_points[max(sheared_points)]
print(f"{prune_steps} steps of pruning, then {left} of training")
print(f"{sheared_size:,} weights, beside {size['student']:,} in the students above")
print(f"held-out loss: {after_cut:.2f} after the cut, {at_compute['sheared']:.3f} at the end")
for name, loss in sorted(at_compute.items(), key=lambda pair: pair[1]):
    print(f"{name:22}{loss:8.3f}")

# %% [markdown]
# Two cautions when you read such a table, here or in a paper. A cut model has been spared the training that its teacher
# had, so "a good model with much less data and compute", as the lecture puts it, counts from where the teacher stopped.
# And masks need steps to decide: at the fast size they have hardly begun to move, and the cut is nearly a random one. In
# the full size they get an eighth of the steps.
#
# ## 5. The logits are the largest tensor
#
# Your `distillation_loss` was handed whole logits. For our 4,096 tokens that is fine. For a batch of 8,192 tokens and
# a vocabulary of 128,256 (Llama 3's):

# %% tags=["nbval-check-output"]
logits_bytes = 8192 * 128_256 * 4
print(f"logits in float32: {logits_bytes / 2**30:.1f} GiB; student's and teacher's, log-probabilities of both,")
print(f"and a gradient: {5 * logits_bytes / 2**30:.1f} GiB. The states they come from, 2048 wide: "
      f"{8192 * 2048 * 4 / 2**30:.2f} GiB")

# %% [markdown]
# All of it only to end in one number. But the loss is a sum over rows, and each row needs its own logits alone:
#
# ```
#  hidden             weight.T
#  +---------+        +------------+
#  | chunk 0 | -----> |            | --> logits 0 --> loss 0, gradients 0
#  +---------+        | vocabulary |       (then forgotten)
#  | chunk 1 | -----> |            | --> logits 1 --> loss 1, gradients 1
#  +---------+        +------------+
#  |   ...   |
# ```
#
# There is a catch: autograd keeps each chunk's probabilities until backward, and then all chunks are in memory after
# all. So the gradients are made **at once**, while the chunk's logits are there, and only they are kept: one of
# `[rows, width]` and one of `[vocabulary, width]`. The derivative needs no autograd. With $N$ rows that count,
# $z = W h$ the student's logits of a row and $P$, $Q$ at temperature $T$,
#
# $$\mathcal{L} = \frac{T^2}{N} \sum_n \mathrm{KL}(P_n \| Q_n), \qquad
# \frac{\partial \mathcal{L}}{\partial z_n} = \frac{T}{N}\,(Q_n - P_n), \qquad
# \frac{\partial \mathcal{L}}{\partial h_n} = W^\top \frac{\partial \mathcal{L}}{\partial z_n}, \qquad
# \frac{\partial \mathcal{L}}{\partial W} = \sum_n \frac{\partial \mathcal{L}}{\partial z_n}\, h_n^\top.$$
#
# **Divide once.** The mean of the chunks' means is not the mean: the last chunk may be shorter, and padding falls where
# it falls. Count the rows of **all** chunks first.
#
# ### Exercise 4: a loss that never holds the logits
#
# *3 points, about 75 minutes, difficulty 4 of 5.*
#
# <details><summary>Hint 1</summary>
#
# A slice may end beyond the last row: `x[8:12]` of ten rows has two. So `range(0, rows, chunk)` needs no special case.
# </details>
# <details><summary>Hint 2</summary>
#
# The gradient of the logits of a chunk is `[chunk rows, vocabulary]`, call it `g`. Then `g @ student_weight` goes to the
# chunk's rows of the hidden states, and `g.T @ student_hidden[rows]` is **added** to the weight's gradient.
# </details>
# <details><summary>Hint 3</summary>
#
# Rows that do not count: multiply their rows of `g` by 0, `counts[rows, None]`, and leave them out of the value. Where
# no row counts at all, divide by 1 instead of by 0.
# </details>

# %% exercise="chunked_loss"
def chunked_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """T^2 times the mean of KL(P || Q) over the rows that count, and its gradients, `chunk` rows at a time.

    student_hidden: [rows, width], student_weight: [vocabulary, width]; the logits are hidden @ weight.T
    teacher_hidden: [rows, wide], teacher_weight: [vocabulary, wide]; `wide` may be another width
    labels: [rows] int64; rows with -100 do not count, other labels are not used
    temperature: T, above 0
    chunk: rows whose logits may be held at once, at least 1; the last chunk may be shorter, and `chunk` may
        exceed the rows
    All tensors but the labels are float32 and finite, and none asks for a gradient.
    Returns (loss of no dimensions, its gradient with respect to student_hidden, and to student_weight). All
    three are 0 where no row counts. No tensor of [rows, vocabulary] is made, and what is held beside inputs
    and gradients does not grow with the number of chunks.
    """
    ### BEGIN SOLUTION
    counts = labels != -100
    share = 1 / counts.sum().clamp(min=1)
    loss = torch.zeros((), device=labels.device)
    to_hidden, to_weight = torch.zeros_like(student_hidden), torch.zeros_like(student_weight)
    for first in range(0, len(labels), chunk):
        rows = slice(first, first + chunk)
        log_q = F.log_softmax(student_hidden[rows] @ student_weight.T / temperature, dim=-1)
        log_p = F.log_softmax(teacher_hidden[rows] @ teacher_weight.T / temperature, dim=-1)
        p = log_p.exp()
        kl = (p * (log_p - log_q)).sum(-1)
        loss += temperature**2 * share * kl[counts[rows]].sum()
        slope = temperature * share * (log_q.exp() - p) * counts[rows, None]
        to_hidden[rows] = slope @ student_weight
        to_weight += slope.T @ student_hidden[rows]
    return loss, to_hidden, to_weight
    ### END SOLUTION


# %% check="chunked_loss"
check("chunked_loss", chunked_loss)

# %% [markdown]
# ### Measure it: memory
#
# A few lines make an autograd function of it: the gradients are ready when the forward ends, and backward hands them
# out, times whatever factor arrives.

# %% tags=["demo"] needs=["soft_loss", "chunked_loss"]
from effnlp_lab.notebook.memory import counted_peak, measured_peak, release


class Chunked(torch.autograd.Function):
    """Your chunked loss as an operation that autograd can differentiate, once."""

    @staticmethod
    def forward(ctx, student_hidden, student_weight, *rest):
        loss, *ctx.gradients = chunked_loss(student_hidden, student_weight, *rest)
        return loss

    @staticmethod
    def backward(ctx, factor):
        return *(factor * gradient for gradient in ctx.gradients), None, None, None, None, None


ROWS, WIDTH, VOCABULARY = device.pick(fast=(512, 64, 4096), full=(4096, 2048, 65_536))
generator = torch.Generator().manual_seed(2)
states = [torch.randn(ROWS, WIDTH, generator=generator).to(device.torch) for _ in range(2)]
heads = [(torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5).to(device.torch) for _ in range(2)]
row_labels = torch.zeros(ROWS, dtype=torch.long, device=device.torch)
row_labels[ROWS // 2 : ROWS // 2 + ROWS // 16] = -100


def by_autograd(h, w):
    """All logits at once, and your soft_loss."""
    counts = row_labels != -100
    with torch.no_grad():
        theirs = (states[1] @ heads[1].T)[counts]
    return soft_loss((h @ w.T)[counts], theirs, 2.0)


def by_chunks(chunk):
    return lambda h, w: Chunked.apply(h, w, states[1], heads[1], row_labels, 2.0, chunk)


def step_of(loss):
    """Forward and backward; the loss and both gradients."""
    h, w = (x.detach().requires_grad_() for x in (states[0], heads[0]))
    value = loss(h, w)
    value.backward()
    return value.detach(), h.grad, w.grad


def peak_of(loss):
    if device.kind != "cuda":
        return counted_peak(lambda: step_of(loss))
    release()
    there = torch.cuda.memory_allocated()
    return measured_peak(lambda: step_of(loss)) - there


CHUNKS = [c for c in (8, 32, 128, 512, 2048) if c <= ROWS]
plain_peak = peak_of(by_autograd)
chunk_peaks = {chunk: peak_of(by_chunks(chunk)) for chunk in CHUNKS}
gradients = 4 * (ROWS * WIDTH + VOCABULARY * WIDTH)
figure, axes = plots.figure(
    f"Forward and backward of {ROWS:,} rows over {VOCABULARY:,} tokens", "rows of a chunk", "peak memory (MiB)",
    caption="Beyond inputs. Dashed: all logits at once. Dotted: the two gradients alone.")
axes.plot(CHUNKS, [peak / 2**20 for peak in chunk_peaks.values()], label="your chunked loss")
axes.axhline(plain_peak / 2**20, linestyle="--", color=plots.COLOURS["vermilion"], marker="", label="plain")
axes.axhline(gradients / 2**20, linestyle=":", color="#555555", marker="", label="gradients")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(CHUNKS, [str(chunk) for chunk in CHUNKS])
axes.legend()
spoken = ", ".join(f"{peak / 2**20:.1f} MiB at {chunk}" for chunk, peak in chunk_peaks.items())
plots.show(figure, f"Peak memory against the rows of a chunk: {spoken}; {plain_peak / 2**20:.1f} MiB with all logits "
                   "at once.")
print(f"{plain_peak / chunk_peaks[CHUNKS[0]]:.0f} times less with chunks of {CHUNKS[0]} rows")

# %% [markdown]
# Small chunks cost memory traffic: the weight of $[V, d]$ is read once for every chunk, and its gradient read and
# written. So an engineer takes the largest chunk that fits, not the smallest. The kit's `chunked_linear_loss` chooses
# it by bytes, and turns each chunk's logits into their gradient in place; on a GPU a single Triton kernel does that.
# The receipt at the end compares.
#
# ## 6. Forward against reverse KL
#
# KL is not symmetric. **Forward** KL, $\mathrm{KL}(P \| Q)$, is an average over what the **teacher** would say: where
# $P$ is large and $Q$ is small it is punished hard, so the student spreads out to **cover** all that the teacher may
# say. **Reverse** KL, $\mathrm{KL}(Q \| P)$, is an average over what the **student** would say: it is punished for
# saying what the teacher would not, and may leave things out, so it **seeks** a mode. A small student cannot do
# everything that its teacher does, and then it matters which.
#
# Between the two lie the generalized **Jensen-Shannon** divergences (Agarwal et al., 2024), through a mixture:
#
# $$M = \beta P + (1 - \beta) Q, \qquad
# \mathrm{JSD}_\beta = \beta\, \mathrm{KL}(P \| M) + (1 - \beta)\, \mathrm{KL}(Q \| M).$$
#
# $M$ is nowhere 0 where $P$ or $Q$ is not, so JSD is always finite. KL is not: a token that the student **never** takes
# (logit $-\infty$, as after top-k) and the teacher may take makes the forward one infinite. And by convention
# $0 \log 0 = 0$, which floating point does not know. Your $\beta$:

# %%
effnlp_lab.variant("divergence")

# %% [markdown]
# ### Exercise 5: forward against reverse KL
#
# *2 points, about 40 minutes, difficulty 3 of 5.*
#
# This time there is no temperature and no mean: one number a position.
#
# <details><summary>Hint 1</summary>
#
# Write one function of two logarithms, `kl(log_a, log_b)`, and call it three times.
# </details>
# <details><summary>Hint 2</summary>
#
# $-\infty - (-\infty)$ and $0 \cdot \infty$ are NaN. `torch.where(log_a == -math.inf, 0.0, ...)` takes the terms out
# that are 0 by convention, and leaves those alone that are truly infinite.
# </details>
# <details><summary>Hint 3</summary>
#
# $\log(e^a + e^b)$ without underflow is `torch.logaddexp(a, b)`; a factor $\beta$ in front of a probability is
# $\log \beta$ added to its logarithm.
# </details>

# %% exercise="divergence"
def divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str
) -> torch.Tensor:
    """A divergence of each position, in nats, with P = softmax(teacher_logits) and Q = softmax(student_logits).

    student_logits, teacher_logits: [..., vocabulary] float32, of the same shape. A logit may be -inf (a
        token that is never taken); every position has finite ones in both.
    kind: "forward", KL(P || Q); "reverse", KL(Q || P); or "jsd", beta KL(P || M) + (1 - beta) KL(Q || M) with
        M = beta P + (1 - beta) Q and the beta of your variant
    Terms where the first distribution is 0 are 0; a KL is inf where the second is 0 and the first is not.
    Returns [...], float32. Gradients flow to the student's logits (where all logits are finite they are
    exact; elsewhere they are not asked for).
    """
    ### BEGIN SOLUTION
    beta = 0.25
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)

    def kl(log_a, log_b):
        return torch.where(log_a == -math.inf, 0.0, log_a.exp() * (log_a - log_b)).sum(-1)

    if kind == "forward":
        return kl(log_p, log_q)
    if kind == "reverse":
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    ### END SOLUTION


# %% check="divergence"
check("divergence", divergence)

# %% [markdown]
# ### See it: a student that is too simple
#
# The teacher has two modes over 60 tokens in a row; the student can have one, a bell of any place and width. Each
# divergence is minimised from the same start.

# %% tags=["demo"] needs=["divergence"]
places = torch.arange(60.0)


def bell(middle, width):
    return -0.5 * ((places - middle) / width) ** 2


def log_of_mixture(first, second, share):
    return torch.logaddexp(first.log_softmax(0) + math.log(share), second.log_softmax(0) + math.log(1 - share))


two_modes = log_of_mixture(bell(14, 3), bell(42, 5), 0.6)


def fitted(kind):
    """The student's probabilities where the divergence is least, and their middle and width."""
    form = torch.tensor([2.2, math.log(6.0)], requires_grad=True)  # middle / 10, log of the width
    optimizer = torch.optim.Adam([form], lr=0.05)
    for _ in range(250):
        optimizer.zero_grad()
        divergence(bell(10 * form[0], form[1].exp()), two_modes, kind).backward()
        optimizer.step()
    return bell(10 * form[0], form[1].exp()).softmax(0).detach(), 10 * form[0].item(), form[1].exp().item()


figure, axes = plots.figure("One bell for two modes", "token", "probability",
                            caption="Forward KL covers both modes, reverse KL takes one.")
axes.fill_between(places, two_modes.exp(), color="#DDDDDD", label="teacher")
spoken = []
for kind, one in zip(("forward", "reverse", "jsd"), plots.looks(3)):
    chances, middle, width = fitted(kind)
    axes.plot(places, chances, label=kind, **{**one, "marker": ""})
    spoken.append(f"{kind} has its middle at {middle:.0f} and a width of {width:.0f}")
axes.legend()
plots.show(figure, f"A teacher with modes at 14 and 42, and three fitted bells: {'; '.join(spoken)}.")

# %% [markdown]
# Forward KL puts much of its mass where the teacher has little: between the modes. A language model that does this
# writes tokens that the teacher would not. Reverse KL gives one mode up and fits the other. JSD may do either, by its
# $\beta$ and by where it starts. Which one you want depends on the task: for a model that is to be sampled from,
# sentence after sentence, seeking is often the better vice.
#
# ## Stretch A: on-policy distillation
#
# *A badge, about 40 minutes, difficulty 4 of 5.*
#
# Trained on texts of others alone, a student meets its own mistakes only when it is used: after a token that the
# teacher would never have written it stands where it has never been. Agarwal et al. (2024) let the **student** write,
# and the teacher comment: at each position of the student's text the teacher's distribution is the target, by reverse
# KL. No gradient passes through the sampling.
#
# To sample from $q$ with a uniform number $u \in [0, 1)$, take the first token whose cumulative probability **exceeds**
# $u$. So that your answer can be checked, the uniforms are given.
#
# <details><summary>Hint 1</summary>
#
# The first index where `cumulative > u` is the number of entries where `cumulative <= u`. In float32 the last cumulative
# sum may end below the largest $u$; `.double()` before the softmax avoids that.
# </details>
# <details><summary>Hint 2</summary>
#
# The logits at position $i$ predict the token at position $i + 1$. So the tokens that the student wrote were predicted
# from the last token of the prompt on, up to the last but one of the whole.
# </details>

# %% exercise="on_policy_step"
def on_policy_step(
    student: Callable[[torch.Tensor], torch.Tensor],
    teacher: Callable[[torch.Tensor], torch.Tensor],
    prompt: torch.Tensor,
    uniforms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The student continues the prompt; the loss is the reverse KL on what it wrote.

    student, teacher: functions from ids [batch, n] to logits [batch, n, vocabulary], float32
    prompt: [batch, length] int64, length at least 1
    uniforms: [batch, new] float32 in [0, 1): the number that decides each new token, new at least 1. The
        token is the first whose cumulative probability under the student, at temperature 1, exceeds it
        (the last token if rounding leaves none).
    Returns (tokens [batch, length + new], the mean over the batch * new positions that predict new tokens
    of KL(Q || P), Q the student's distribution). The loss is differentiable in the student's weights, with
    the tokens as constants; the teacher gets no gradient.
    """
    ### BEGIN SOLUTION
    tokens = prompt
    with torch.no_grad():
        for u in uniforms.T:
            probabilities = student(tokens)[:, -1].double().softmax(-1)
            token = (probabilities.cumsum(-1) <= u[:, None]).sum(-1)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
        theirs = teacher(tokens)
    written = slice(prompt.shape[1] - 1, -1)
    log_q = student(tokens)[:, written].log_softmax(-1)
    log_p = theirs[:, written].log_softmax(-1)
    return tokens, (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    ### END SOLUTION


# %% check="on_policy_step"
check("on_policy_step", on_policy_step)

# %% tags=["demo"] needs=["soft_loss", "distillation_loss", "student_weights", "on_policy_step"]
PROMPT, NEW, ROUNDS = device.pick(fast=(16, 8, 3), full=(32, 64, 40))
generator = torch.Generator().manual_seed(4)
learner = copy.deepcopy(distilled)
optimizer = torch.optim.AdamW(learner.parameters(), lr=RATE / 5, weight_decay=0.0)
history = []
begin = time.perf_counter()
for step in range(ROUNDS):
    prompt = training[(step * BATCH + torch.arange(BATCH)) % len(training), :PROMPT]
    uniforms = torch.rand(BATCH, NEW, generator=generator).to(device.torch)
    written, loss = on_policy_step(lambda ids: learner(input_ids=ids).logits,
                                   lambda ids: teacher(input_ids=ids).logits, prompt, uniforms)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
    optimizer.step()
    history.append(loss.item())
each = (time.perf_counter() - begin) / ROUNDS
tenth = max(1, ROUNDS // 10)
print(f"reverse KL on the student's own text: {sum(history[:tenth]) / tenth:.3f} in the first steps, "
      f"{sum(history[-tenth:]) / tenth:.3f} in the last of {ROUNDS}")
print(f"{each:.2f} s a step, for {NEW} new tokens a sequence; held-out loss now {held_out_loss(learner):.3f}")
print(repr(tokenizer.decode(written[0].tolist())))

# %% [markdown]
# Writing is what makes a step slow: every new token is a forward pass of its own. (Yours reads the whole text again for
# each; the kit's `OnPolicyDistillation` keeps keys and values.) So one distils from texts first, and on-policy at the
# end. Every step draws other prompts, and their losses scatter by more than a few dozen steps can gain: this shows
# what a step is and what it costs, and not yet what it is worth.
#
# ## Stretch B: width pruning masks
#
# *A badge, about 35 minutes, difficulty 3 of 5.*
#
# How did the masks of Sheared Llama decide? Each entry (a dimension of an MLP, say) has a parameter $\log \alpha$, and
# its mask is a random number that is **exactly** 0 or 1 most of the time and has a gradient all the same: the
# **hard-concrete** distribution of Louizos, Welling and Kingma (2018). With $u$ uniform, $b = 2/3$, $l = -0.1$ and
# $r = 1.1$,
#
# $$s = \sigma\!\left(\frac{\log u - \log(1 - u) + \log \alpha}{b}\right), \qquad
# \text{mask} = \min(1, \max(0,\ s\,(r - l) + l)), \qquad
# \Pr[\text{mask} \neq 0] = \sigma\!\left(\log \alpha - b \log \tfrac{-l}{r}\right).$$
#
# How many entries stay is not left to a penalty whose weight one would have to tune. It is a **constraint** with
# Lagrange multipliers: with $k_i$ the mean of that probability in layer $i$, and $t$ the share that is to stay,
#
# $$\text{constraint} = \sum_i \lambda_i (k_i - t) + \phi_i (k_i - t)^2.$$
#
# The masks go down this slope and the multipliers up, so that any difference that remains becomes dearer and dearer.
#
# <details><summary>Hint 1</summary>
#
# Two different formulas for two different things: the drawn mask has noise, the probability has none.
# </details>
# <details><summary>Hint 2</summary>
#
# $-l / r = 0.1 / 1.1$, whose logarithm is negative: the probability is higher than $\sigma(\log \alpha)$.
# </details>

# %% exercise="width_masks"
def width_masks(
    log_alpha: torch.Tensor,
    uniforms: torch.Tensor,
    target: float,
    linear: torch.Tensor,
    square: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hard-concrete masks of the dimensions in each layer, and the constraint on how many stay.

    log_alpha: [layers, width] float32, the masks' parameters
    uniforms: [layers, width] float32 in (0, 1), one for each entry
    target: t, the share of the width that each layer is to keep
    linear, square: [layers] float32, the multipliers lambda and phi
    Returns (mask [layers, width] in [0, 1], the constraint as a tensor of no dimensions: the SUM over
    layers). Both are differentiable in log_alpha, the constraint also in the multipliers.
    """
    ### BEGIN SOLUTION
    low, high, temperature = -0.1, 1.1, 2 / 3
    noise = torch.log(uniforms) - torch.log1p(-uniforms)
    soft = torch.sigmoid((noise + log_alpha) / temperature)
    mask = (soft * (high - low) + low).clamp(0, 1)
    share = torch.sigmoid(log_alpha - temperature * math.log(-low / high)).mean(-1)
    apart = share - target
    return mask, (linear * apart + square * apart**2).sum()
    ### END SOLUTION


# %% check="width_masks"
check("width_masks", width_masks)

# %% [markdown]
# A small world to try it in: 32 dimensions, of which some are needed more than others. What is cut hurts by its need;
# half of them are to stay.

# %% tags=["demo"] needs=["width_masks"]
generator = torch.Generator().manual_seed(5)
need = torch.linspace(0.0, 1.0, 32)[torch.randperm(32, generator=generator)]
log_alpha = torch.full((1, 32), 3.0, requires_grad=True)
multipliers = [torch.zeros(1, requires_grad=True), torch.full((1,), 20.0, requires_grad=True)]
optimizer = torch.optim.Adam([{"params": [log_alpha], "lr": 0.2},
                              {"params": multipliers, "lr": 0.2, "maximize": True}])
shares = []
for _ in range(300):
    uniforms = torch.rand(1, 32, generator=generator).clamp(1e-6, 1 - 1e-6)
    mask, constraint = width_masks(log_alpha, uniforms, 0.5, *multipliers)
    optimizer.zero_grad()
    (0.3 * (need * (1 - mask)).sum() + constraint).backward()
    optimizer.step()
    shares.append((mask != 0).float().mean().item())
chance = torch.sigmoid(log_alpha.detach() - 2 / 3 * math.log(0.1 / 1.1))[0]
figure, axes = plots.figure("Which dimensions stay", "need of the dimension (loss if it is cut)", "P(mask is not 0)",
                            caption="Half of 32 dimensions are to stay.")
axes.plot(need, chance, "o", color=plots.COLOURS["blue"])
inside = ((mask > 0) & (mask < 1)).sum().item()
right = (chance[need > 0.5].mean() - chance[need < 0.5].mean()).item()
plots.show(figure, f"The probability to stay against need: on average {right:.2f} higher for the needed half.")
print(f"share that stays: {sum(shares[-50:]) / 50:.2f} in the last 50 draws; {inside} of 32 entries of the last mask "
      "lie strictly between 0 and 1")

# %% [markdown]
# The constraint holds, and what stays is mostly what is needed. Luck has a part: where the probability has come close
# to 0, no gradient is left that could bring a dimension back. So one begins with everything kept, and lets the target
# fall slowly from the whole model to its shape, as `PrunableModel(warmup_steps=...)` did above.
#
# ## The receipt
#
# One divergence of many rows over a large vocabulary, value and gradients, by everybody: what it holds, how long it
# takes, and whether it is the same.

# %% tags=["demo"] needs=["soft_loss", "chunked_loss"]
from effnlp_lab.device import ceilings
from effnlp_lab.distillation import fused_linear_kl
from effnlp_lab.notebook import bench
from effnlp_lab.notebook.receipt import Receipt

CHUNK = device.pick(fast=64, full=512)


def by_kit(h, w):
    return fused_linear_kl(h, w, states[1], heads[1], row_labels, temperature=2.0,
                           chunk_rows=device.pick(fast=CHUNK, full=None))  # None: as its own budget says


contestants = {"plain": by_autograd, "yours": by_chunks(CHUNK), "kit": by_kit}
try:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, temperature=2.0,
                                    compiled=False)
    contestants["liger"] = lambda h, w: 4.0 * liger(h, w, states[1], heads[1], row_labels)
except ImportError:
    print("liger-kernel is not installed, and so was not compared")
exact, costs = step_of(by_autograd), {}
for name, loss in contestants.items():
    found = step_of(loss)
    off = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact))
    costs[name] = {"quality": "equal" if off < 1e-3 else f"off by {off:.1e}", "peak_bytes": peak_of(loss),
                   "seconds": bench.timed(lambda loss=loss: step_of(loss), device)}
receipt = Receipt("09", quality="loss and gradients", device=device,
                  title=f"Forward KL of {ROWS:,} rows over {VOCABULARY:,} tokens, width {WIDTH:,}, T = 2")
receipt.add("baseline", "all logits, autograd", **costs["plain"])
receipt.add("yours", f"chunked_loss, {CHUNK} rows", **costs["yours"])
receipt.add("reference", "the kit's fused_linear_kl", **costs["kit"])
if "liger" in costs:
    receipt.add("library", "liger-kernel", **costs["liger"])
products = 2 * ROWS * VOCABULARY * WIDTH * 4  # forward of both, and two products backward
receipt.add("limit", "four products, two gradients", peak_bytes=gradients,
            seconds=products / ceilings(device).matmul_flops_per_second, note="at the rate of a large product")
receipt.show()
print(f"saved as {receipt.save().name}")

# %% [markdown]
# ## In your own words
#
# You may spend a fixed number of GPU hours on a small model. When would you distil it from a large one, and when would you
# rather train it on more text? Use what you measured, and say what your measurement cannot tell.
#
# Write 60 to 120 words. A person reads and grades them.

# %% [markdown] written="worth_it"
# **Rubric, for whoever grades** (shares of the points; another answer as good earns them too)
#
# - 0.3: the teacher's forward pass has to be paid for in every step (or its logits stored), so the comparison
#   is at the same compute.
# - 0.3: whose teacher it is: one that exists is free, one that is trained for the purpose is most of the bill.
# - 0.2: the start (layers of the teacher) and the loss are two things, and their gains were measured apart.
# - 0.2: limits: small models, short runs, one kind of text; at the fast size the ranking of the losses says
#   little.

# %% [markdown]
# ## What you have learned
#
# - Soft targets say how likely every token is. Temperature makes the unlikely ones louder, and $T^2$ keeps the weight of
#   the loss.
# - KL is a sum over the vocabulary and a mean over the positions that count. `kl_div` wants $\log Q$ first and $P$
#   second; its `"mean"` divides by the vocabulary as well.
# - A student starts well from its teacher's layers. At the same compute, teacher included, the start is worth at least
#   as much as the loss; and the teacher's own training belongs on the bill unless somebody else has paid it.
# - Logits are the largest tensor of all and need never be whole: chunk, make the gradients at once, divide once.
# - Forward KL covers, reverse KL seeks, and JSD is finite in between. On the student's own text one uses the latter two.
#
# ## Read on
#
# - G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015.
# - V. Sanh, L. Debut, J. Chaumond, T. Wolf, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and
#   lighter", 2019.
# - M. Xia, T. Gao, Z. Zeng, D. Chen, "Sheared LLaMA: Accelerating Language Model Pre-training via Structured Pruning",
#   2023.
# - C. Louizos, M. Welling, D. P. Kingma, "Learning Sparse Neural Networks through L0 Regularization", 2018.
# - R. Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", 2024.
# - Y. Gu, L. Dong, F. Wei, M. Huang, "MiniLLM: Knowledge Distillation of Large Language Models", 2024: reverse KL.
# - P.-L. Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024: fused losses in chunks.
# - J. Kaplan et al., "Scaling Laws for Neural Language Models", 2020: where 6 operations a weight and token come from.
# - In the kit: `effnlp_lab/distillation` holds all of this as an engineer would use it: fused losses with a Triton
#   kernel, a trainer that resumes, on-policy distillation and structured pruning.
