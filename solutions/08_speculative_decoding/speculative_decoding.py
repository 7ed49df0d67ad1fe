# %% [markdown]
# # Lab 08: Speculative decoding
#
# A language model writes one token after another, and each token costs a pass through all of its weights. Reading is
# another matter: one pass over ten tokens that are there already costs hardly more than a pass over one, because the
# weights come from memory once either way. So let a small model **guess** a few tokens, and let the large one **check**
# them all in one pass. What fits is kept, the rest is thrown away, and the text that comes out has exactly the
# distribution that the large model alone would have given it. In this lab you build that, and find out when it pays.
#
# | | exercise | points | minutes | difficulty |
# |---|---|---|---|---|
# | 1 | `accept_drafts`: accept or reject | 1.5 | 30 | 2 of 5 |
# | 2 | `adjusted_distribution`: what a rejected token is replaced by | 1 | 20 | 2 of 5 |
# | 3 | `sampling_distribution`: temperature, top-k and top-p | 2 | 40 | 3 of 5 |
# | 4 | `speculative_step`: one full step | 2.5 | 60 | 4 of 5 |
# | 5 | `roll_back`: roll the cache back | 1.5 | 40 | 3 of 5 |
# | 6 | `SpeedModel`: what it gives, and the best gamma | 1.5 | 35 | 2 of 5 |
# | stretch | `lookup_draft`: draft by n-gram lookup | badge | 25 | 2 of 5 |
# | stretch | `early_exit`: leave early by confidence | badge | 25 | 2 of 5 |
# | stretch | `DraftTree`: several drafts as a tree | badge | 40 | 3 of 5 |
#
# **Time.** About four and a half hours: the core exercises, the reading and the measurements. Stretch exercises come on top.
#
# **You need** PyTorch's tensors, softmax attention and its cache of keys and values (lab 07), and a little probability. A
# laptop is enough: the models are small.
#
# **How a check works.** Under each blank stands one call, `check(...)`. It runs your function on fresh random cases,
# compares with a reference, and says what went wrong, by name where it recognises the slip. Sampling is random, and a
# check is not: wherever a random number is needed, it is an input (a **uniform**, a number in $[0, 1)$), so that there
# is exactly one right output.
#
# {assistants} The six core blanks are 3 to 20 lines each, and the slips in them produce fluent text with a slightly wrong
# distribution, which no reader will ever notice.
#
# **Libraries.** `transformers` and this kit's own speculative decoding are refused inside your answers; the demos compare
# with them.

# %% tags=["parameters"]
DEVICE = "auto"
FAST = "auto"

# %%
import effnlp_lab
from effnlp_lab import check

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch.nn import functional as F

device = effnlp_lab.start("08_speculative_decoding", device=DEVICE, fast=FAST)

# %% [markdown]
# ## 1. Accept or reject
#
# Two models with one vocabulary: the **target** $M_p$, whose text we want, and the **drafter** $M_q$, which is quick.
# Ours are `course-base`, a Llama of seven million weights trained on Python source, and `course-draft`, of one million.
# After the same text they give two distributions over the next token, $p$ and $q$:

# %% tags=["demo"]
import html
import statistics
import time

import transformers

from effnlp_lab import speculative as room
from effnlp_lab.course.models import load_model, load_tokenizer
from effnlp_lab.course.text import load_text
from effnlp_lab.notebook import plots

one_thread = device.kind == "cpu" and device.fast
if one_thread:
    torch.set_num_threads(1)  # products this small: a second thread would mostly wait for the first
clock = time.process_time if one_thread else time.perf_counter  # of one thread: while it worked
transformers.logging.set_verbosity_error()  # assisted generation remarks on its own settings
target = load_model("course-base", device=device).requires_grad_(False)
drafter = load_model("course-draft", device=device).requires_grad_(False)
for model in (target, drafter):
    model.generation_config.eos_token_id = None  # every run below makes the same number of tokens
tokenizer = load_tokenizer("course-base")
PROMPT, COUNT = device.pick(fast=(64, 3), full=(128, 24))  # tokens, and texts
GENERATE, TEXTS = device.pick(fast=(24, 2), full=(128, 4))


@torch.no_grad()
def all_logits(model, ids):
    """Logits [length, vocabulary] of ids [length], in float32."""
    return model(input_ids=ids[None]).logits[0].float()


def shown(token):
    """A token as text, with its white space visible."""
    return tokenizer.decode([int(token)]).replace("\n", "⏎").replace(" ", "·") or "∅"


def beginnings(count, length):
    """The first `length` tokens of `count` held-out modules of Python's library, each [length]."""
    found = []
    for text in load_text("course-heldout").texts():
        ids = tokenizer(text[: 20 * length])["input_ids"]
        if len(ids) >= length:
            found.append(torch.tensor(ids[:length], device=device.torch))
        if len(found) == count:
            break
    return found


def decoder_of(large, small, temperature, gamma=1):
    """The kit's own."""
    return room.SpeculativeDecoder(large, small, gamma=gamma, sampling=room.Sampling(temperature), ends=())


prompts = beginnings(COUNT, PROMPT)
PIECE = "    def close(self):\n        if self."
ids = torch.tensor(tokenizer(PIECE)["input_ids"], device=device.torch)
p, q = (all_logits(model, ids)[-1].softmax(-1).cpu() for model in (target, drafter))
best = torch.maximum(p, q).topk(10).indices
figure, axes = plots.figure("What follows 'if self.', as both models see it", "next token", "probability (%)",
                            caption="The ten likeliest tokens of 4,096. The hatched part is common to both.")
places = torch.arange(10)
axes.bar(places - 0.2, 100 * p[best], 0.4, label="target p", color=plots.COLOURS["blue"])
axes.bar(places + 0.2, 100 * q[best], 0.4, label="drafter q", color=plots.COLOURS["orange"])
axes.bar(places, 100 * torch.minimum(p, q)[best], 0.8, label="min(p, q)", facecolor="none", edgecolor="black",
         hatch="///", linewidth=0.6)
axes.set_xticks(range(10), [shown(token) for token in best], rotation=35, ha="right")
axes.legend()
overlap = torch.minimum(p, q).sum().item()
plots.show(figure, "Probabilities of the ten likeliest next tokens under target and drafter; what they have in common, "
                   f"added up over the whole vocabulary, is {overlap:.0%}.")
print(f"p and q have {overlap:.0%} in common.")

# %% [markdown]
# The drafter draws a token $x$ from $q$. When may we keep it? Leviathan, Kalman and Matias (2023), and Chen et al. (2023)
# at the same time, keep it with probability
#
# $$\min\!\left(1, \frac{p(x)}{q(x)}\right):$$
#
# always where the target likes it at least as much, and otherwise as often as makes up for the drafter's liking it too
# much. So the token $x$ comes up **and** is kept with probability $q(x) \min(1, p(x) / q(x)) = \min(p(x), q(x))$: the
# hatched part of the picture. Added up over the vocabulary, that is the probability that a draft is kept, the
# **acceptance rate** $\alpha = \sum_x \min(p(x), q(x))$.
#
# With a uniform $u \in [0, 1)$ the coin is thrown by comparing: keep $x$ where $u < p(x) / q(x)$.
#
# Now $\gamma$ drafts in a row. Each continues the one before it, so the first that is rejected takes all that follow with
# it, whatever their coins say:
#
# ```
#   draft              x1     x2     x3     x4     x5         gamma = 5
#   u < p(x)/q(x)      yes    yes    no     yes    yes
#                      kept   kept   rejected
#                                           never looked at
#
#   accepted = 2       tested = 3
# ```
#
# `tested` is what an acceptance rate is divided by. Drafts behind a rejection were not compared with anything that
# matters; whoever counts them too reports a rate that is too low.
#
# ### Exercise 1: accept or reject
#
# *1.5 points, about 30 minutes, difficulty 2 of 5.*
#
# <details><summary>Hint 1</summary>
#
# `p.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)` is the probability of each draft.
# </details>
# <details><summary>Hint 2</summary>
#
# $u < p / q$ without a division is $u\,q < p$. With `<` a draft of probability 0 is rejected whatever the uniform is;
# with `<=` a uniform of exactly 0 would let it pass.
# </details>
# <details><summary>Hint 3</summary>
#
# How many ones lead a row of ones and zeros? The cumulative product stays 1 until the first 0, so its sum is the answer.
# </details>

# %% exercise="accept_drafts"
def accept_drafts(
    p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many drafts are accepted, and how many were tested.

    p, q: [..., gamma, vocabulary] float32, the distributions of target and drafter at the place of each
        draft; "..." is any number of batch dimensions, also none. gamma is at least 1
    drafts: [..., gamma] int64; each q is above 0 at its draft, and p may be 0 there
    uniforms: [..., gamma] float32 in [0, 1), the coin of each draft: it is kept where the uniform is
        below p / q
    Returns (accepted, tested), both int64 [...]: how many drafts are kept before the first that is not
    (gamma where all are); and these with the first rejected one, if there is one.
    """
    ### BEGIN SOLUTION
    at_p = p.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    at_q = q.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    kept = uniforms * at_q < at_p
    accepted = kept.cumprod(-1).sum(-1)
    tested = (accepted + 1).clamp(max=drafts.shape[-1])
    return accepted, tested
    ### END SOLUTION


# %% check="accept_drafts"
check("accept_drafts", accept_drafts)

# %% [markdown]
# ## 2. The adjusted distribution
#
# Where a draft is rejected, another token takes its place. Drawn from what? Look at the picture again: kept drafts give
# token $x$ with probability $\min(p(x), q(x))$. What is missing from $p(x)$ is
#
# $$p(x) - \min(p(x), q(x)) = \max(0,\ p(x) - q(x)),$$
#
# the blue that sticks out of the hatched part. So the replacement is drawn from exactly that, made into a distribution:
#
# $$p'(x) = \mathrm{norm}(\max(0,\ p(x) - q(x))) = \frac{\max(0,\ p(x) - q(x))}{\sum_y \max(0,\ p(y) - q(y))}.$$
#
# It is tempting to draw from $p$ itself: is that not the distribution we want? But a rejection is news. It happens only
# where the drafter liked a token too much, and those tokens have had their chance already. In whole numbers:

# %% tags=["nbval-check-output"]
P = [Fraction(n, 10) for n in (6, 3, 1)]
Q = [Fraction(n, 10) for n in (2, 5, 3)]
kept = [min(a, b) for a, b in zip(P, Q)]
rest = [max(Fraction(0), a - b) for a, b in zip(P, Q)]
rejected = 1 - sum(kept)
print("target p          ", *P)
print("drafter q         ", *Q)
print("drafted and kept  ", *kept, "  rejected:", rejected)
print("and norm(max(0, p - q)):", *(k + rejected * r / sum(rest) for k, r in zip(kept, rest)))
print("and p, the mistake:     ", *(k + rejected * a for k, a in zip(kept, P)))

# %% [markdown]
# One case is left: where $p$ is nowhere above $q$, nothing is left to draw from. In exact arithmetic then $p = q$, and
# nothing is ever rejected. In floating-point numbers it does happen, and 0 / 0 is NaN.
#
# ### Exercise 2: the adjusted distribution
#
# *1 point, about 20 minutes, difficulty 2 of 5.*
#
# <details><summary>Hint 1</summary>
#
# `.clamp(min=0)`, and `.sum(-1, keepdim=True)` for a sum that each row can be divided by.
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.where(total > 0, a, b)` chooses row by row. What it does not choose may be NaN.
# </details>

# %% exercise="adjusted_distribution"
def adjusted_distribution(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """norm(max(0, p - q)): what a token that replaces a rejected one is drawn from.

    p, q: [..., vocabulary] float32, distributions
    Returns [..., vocabulary] float32; each row adds up to 1. A row where p is nowhere above q is p.
    """
    ### BEGIN SOLUTION
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)
    ### END SOLUTION


# %% check="adjusted_distribution"
check("adjusted_distribution", adjusted_distribution)

# %% [markdown]
# ### Measure it: does the output have the target's distribution?
#
# One draft, many times over, by your two functions; beside it the tempting version, which draws from $p$.

# %% tags=["demo"] needs=["accept_drafts", "adjusted_distribution"]
DRAWS = device.pick(fast=50_000, full=2_000_000)
generator = torch.Generator().manual_seed(0)
small_p, small_q = torch.tensor([0.35, 0.3, 0.2, 0.1, 0.05]), torch.tensor([0.1, 0.45, 0.1, 0.1, 0.25])
drafts = torch.multinomial(small_q, DRAWS, replacement=True, generator=generator)
accepted, _ = accept_drafts(small_p.expand(DRAWS, 1, 5), small_q.expand(DRAWS, 1, 5), drafts[:, None],
                            torch.rand(DRAWS, 1, generator=generator))
came = {}
for name, weights in (("yours", adjusted_distribution(small_p, small_q)), ("replaced from p", small_p)):
    replacement = torch.multinomial(weights, DRAWS, replacement=True, generator=generator)
    came[name] = torch.where(accepted == 1, drafts, replacement).bincount(minlength=5) / DRAWS
figure, axes = plots.figure(f"{DRAWS:,} tokens, each drafted, tested and kept or replaced", "token",
                            "share of the tokens (%)", caption="Bars: the target's distribution.")
axes.bar(range(5), 100 * small_p, color="#DDDDDD", label="target p")
for (name, share), look in zip(came.items(), plots.looks(2)):
    axes.plot(range(5), 100 * share, label=name, **{**look, "linestyle": ""})
axes.legend()
off = {name: (share - small_p).abs().max().item() for name, share in came.items()}
plots.show(figure, f"Shares of five tokens. Yours are within {off['yours']:.2%} of the target's; replaced from p they are "
                   f"off by up to {off['replaced from p']:.0%}.")
print(f"accepted: {(accepted == 1).float().mean():.3f}; the sum of min(p, q) is "
      f"{torch.minimum(small_p, small_q).sum():.3f}")

# %% [markdown]
# ## 3. Which distribution is the target's?
#
# Nobody samples from a model's plain softmax. There is a **temperature** $T$, often a **top-k** (only the $k$ likeliest
# tokens) and a **top-p** (only the likeliest tokens, as few as have a given probability together; Holtzman et al.,
# 2020). Speculative decoding keeps whatever distribution it is given. So the rule is: whatever shapes the
# target's logits comes **first**, and "$p$" in the two exercises above is what comes out. The same for the drafter:
# $q$ is the distribution that the draft was really drawn from, shaped and all.
#
# The order is that of `transformers`: temperature, then top-k, then top-p on what top-k left, made into a distribution
# again each time.
#
# ```
#   logits        2.0   1.6   1.1   0.3  -0.5       T = 1, top_k = 4, top_p = 0.8
#   softmax      0.43  0.29  0.17  0.08  0.04
#   top-k 4      0.44  0.30  0.18  0.08   0
#   sums before     0  0.44  0.74  0.92             from 0.8 on a token goes
#   top-p 0.8    0.48  0.32  0.20   0     0
# ```
#
# Temperature 0 is **greedy**: all probability on the largest logit. With greedy distributions on both sides, the test
# $u < p(x) / q(x)$ turns into "is the draft the target's best token?", and the same code serves.
#
# ### Exercise 3: temperature, top-k and top-p
#
# *2 points, about 40 minutes, difficulty 3 of 5.*
#
# <details><summary>Hint 1</summary>
#
# Top-k: find the k-th largest logit (`topk`), and set what is below it to `-math.inf`. Its softmax is then exactly 0.
# </details>
# <details><summary>Hint 2</summary>
#
# Top-p: sort the probabilities downwards. `p.cumsum(-1) - p` is the sum **before** each token; where it has reached
# `top_p`, the token is not needed any more. The first token has a sum of 0 before it and always stays.
# </details>
# <details><summary>Hint 3</summary>
#
# `sort` also returns where each number came from, and `torch.zeros_like(p).scatter(-1, order, p)` puts it back there.
# </details>

# %% exercise="sampling_distribution"
def sampling_distribution(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """The distribution that a token is sampled from.

    logits: [..., vocabulary], float32, float16 or bfloat16, all finite; "..." may be nothing
    temperature: divides the logits; 0 is greedy: probability 1 on the largest logit (there is one
        largest), and top_k and top_p change nothing
    top_k: only tokens whose logit is at least the k-th largest stay (what equals the k-th largest stays
        too); 0: all; may be larger than the vocabulary
    top_p: in (0, 1]; of what top-k left, made into a distribution, only the likeliest tokens stay, as few
        as reach a sum of top_p; 1: all
    Returns [..., vocabulary] float32, computed in float32: 0 at tokens that do not stay, and a sum of 1.
    """
    ### BEGIN SOLUTION
    logits = logits.float()
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    p, order = logits.softmax(-1).sort(descending=True)
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= top_p, 0.0)
    p = torch.zeros_like(p).scatter(-1, order, p)
    return p / p.sum(-1, keepdim=True)
    ### END SOLUTION


# %% check="sampling_distribution"
check("sampling_distribution", sampling_distribution)

# %% [markdown]
# ### Predict, then measure: acceptance and temperature
#
# The acceptance rate of one place in a text is $\sum_x \min(p(x), q(x))$, so it can be computed without drawing
# anything: run both models over held-out text, and average.
#
# **Predict first.** (a) Our drafter is seven times smaller than the target. At temperature 1, what share of its drafts
# will be accepted? (b) Is the rate highest at temperature 0, at 1, or far above? Write both down.

# %% predict="acceptance"
my_acceptance_at_1 = None  # your guess, a share between 0 and 1
my_best_temperature = None  # your guess: 0, 1 or 4, say

# %% tags=["demo"] needs=["sampling_distribution"]
seen = [(all_logits(target, ids), all_logits(drafter, ids)) for ids in prompts]


def overlap_at(temperature, top_k=0, top_p=1.0):
    """The mean of sum min(p, q) over all places of the prompts."""
    shaped = ([sampling_distribution(x, temperature, top_k, top_p) for x in pair] for pair in seen)
    return torch.cat([torch.minimum(*pair).sum(-1) for pair in shaped]).mean().item()


temperatures = (0.0, 0.5, 1.0, 2.0, 8.0)
curves = {"all tokens": [overlap_at(T) for T in temperatures],
          "top-k 20": [overlap_at(T, top_k=20) for T in temperatures],
          "top-p 0.9": [overlap_at(T, top_p=0.9) for T in temperatures]}
figure, axes = plots.figure("How often a draft is kept", "temperature", "acceptance rate",
                            caption=f"{COUNT} beginnings of held-out modules, {PROMPT} tokens each.")
for name, values in curves.items():
    axes.plot(range(len(temperatures)), values, label=name)
axes.set_xticks(range(len(temperatures)), [f"{T:g}" for T in temperatures])
axes.set_ylim(0, 1)
axes.legend()
points = zip(temperatures, curves["all tokens"])
said = ", ".join(f"{value:.2f} at T = {T:g}" for T, value in points if T in (0, 1, 8))
plots.show(figure, f"Acceptance rate against temperature, three ways to cut. Nothing cut: {said}.")
print(f"nothing cut: {said}")
if my_acceptance_at_1 is not None:
    print(f"You predicted {my_acceptance_at_1} at T = 1, and the highest at T = {my_best_temperature}.")

# %% [markdown]
# A small model is wrong about rare things and right about common ones, and most tokens are common: a name that was just
# used, a bracket, an indentation. Far above temperature 1 both distributions are nearly flat, and two flat
# distributions are the same. (What they agree on then is noise. With top-k it is another matter: whether the twenty
# likeliest tokens are the same twenty does not depend on the temperature.)
#
# ## 4. One full step
#
# The algorithm as the lecture shows it (Leviathan et al., algorithm 1), with $\gamma$ drafts:
#
# 1. The drafter writes $x_1, \dots, x_\gamma$, **one after another**: $x_i$ is drawn from
#    $q_i = M_q(\text{prefix}, x_1, \dots, x_{i-1})$.
# 2. The target reads prefix and drafts in **one** pass, and gives $p_1, \dots, p_{\gamma+1}$.
# 3. Test the drafts; $n$ are accepted.
# 4. One more token: from $\mathrm{norm}(\max(0, p_{n+1} - q_{n+1}))$ where a draft was rejected, and from
#    $p_{\gamma+1}$ where none was. It is there for nothing, since the target has read the last draft too.
#
# The slide beside the algorithm says "generate $\gamma$ parallel paths with $M_q$". That is a slip worth stumbling over.
# It is **one** path of $\gamma$ tokens, each needing the one before it. What runs in parallel is the check.
#
# ```
#   prefix                          drafts
#   def   close   (    self         )      :      ⏎      ⏎
#                       |           |      |      |      |
#                       p1 tests    p2     p3     p4     p5: one more, if all are kept
#                       the first
#                       draft
# ```
#
# Where do indices go wrong? Logits at a token say what comes **after** it: $p_1$, which tests the first draft, stands at
# the last token of the prefix.
#
# Tokens are drawn with given uniforms, by inverting the cumulative distribution. This function is given:

# %%
def draw(weights: torch.Tensor, uniform: torch.Tensor | float) -> torch.Tensor:
    """The first token whose cumulative weight, from token 0 upwards, exceeds uniform * total.

    weights: [vocabulary], not negative, not all 0; uniform: one number in [0, 1)
    Returns int64 [1], so that it can be joined to a text with torch.cat.
    """
    sums = weights.double().cumsum(0)
    return (sums <= float(uniform) * sums[-1]).sum().view(1)


# %% [markdown]
# In which order the weights are added up makes no difference to the distribution, and all the difference to which token
# a uniform gives. Yours:

# %%
effnlp_lab.variant("speculative_step")

# %% [markdown]
# ### Exercise 4: one full step
#
# *2.5 points, about 60 minutes, difficulty 4 of 5.*
#
# You may call your three functions from above, and `draw`.
#
# <details><summary>Hint 1</summary>
#
# Keep the list of the $q_i$ while you draft: they are needed twice, in the test and after a rejection. After drafting,
# `torch.stack(q)` is `[gamma, vocabulary]`.
# </details>
# <details><summary>Hint 2</summary>
#
# `target(tokens)[-gamma - 1 :]`, with `tokens` the prefix and all drafts, are the logits of $p_1$ to $p_{\gamma+1}$.
# The first `gamma` of them test.
# </details>
# <details><summary>Hint 3</summary>
#
# If your order is another than `draw`'s: with `order` a tensor of all tokens in it, `order[draw(weights[order], uniform)]`.
# It holds for all draws of the step.
# </details>

# %% exercise="speculative_step"
def speculative_step(
    target: Callable[[torch.Tensor], torch.Tensor],
    drafter: Callable[[torch.Tensor], torch.Tensor],
    prefix: torch.Tensor,
    gamma: int,
    uniforms: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Draft gamma tokens, test them, and add the one that follows.

    target, drafter: functions from token ids [length] to logits [length, vocabulary]; the logits at a
        token are those of the token after it. Call the target once
    prefix: [length] int64, the text so far, at least one token
    gamma: how many tokens to draft, at least 1
    uniforms: [2 * gamma + 1] float32 in [0, 1): the first gamma draw the drafts, the next gamma test them
        (as in accept_drafts), the last draws the token that follows
    temperature, top_k, top_p: of sampling_distribution, for both models
    Tokens are drawn by inverting the cumulative distribution, added up in the order of your variant: the
    first token in that order whose cumulative weight exceeds uniform * total.
    Returns (new, drafts, tested): the accepted drafts and the token that follows, int64 [accepted + 1];
    all drafts, int64 [gamma]; and how many drafts were tested.
    """
    ### BEGIN SOLUTION
    def shaped(logits):
        return sampling_distribution(logits, temperature, top_k, top_p)

    tokens, q = prefix, []
    for u in uniforms[:gamma]:
        q.append(shaped(drafter(tokens)[-1]))
        tokens = torch.cat([tokens, draw(q[-1], u)])
    drafts = tokens[len(prefix) :]
    p = shaped(target(tokens)[-gamma - 1 :])
    accepted, tested = accept_drafts(p[:gamma], torch.stack(q), drafts, uniforms[gamma : 2 * gamma])
    last = p[gamma]
    if accepted < gamma:
        last = adjusted_distribution(p[accepted], q[accepted])
    token = draw(last, uniforms[-1])
    return torch.cat([drafts[:accepted], token]), drafts, tested
    ### END SOLUTION


# %% check="speculative_step"
check("speculative_step", speculative_step)

# %% [markdown]
# ### See it at work
#
# The lecture's picture: each line is one step. Kept drafts are green and underlined, the rejected one is red and struck
# through, the target's own token is blue and boxed. What was never tested is grey and slanted.

# %% tags=["demo"] needs=["accept_drafts", "adjusted_distribution", "sampling_distribution", "speculative_step"]
LOOKS = {
    "kept": ("+{}", "background:#D5F0E3;color:#00503A;text-decoration:underline"),
    "rejected": ("x{}", "background:#FBDDCB;color:#7A2E00;text-decoration:line-through"),
    "the target's own": ("={}", "background:#D6E8F7;color:#003A5C;border:1px solid #0072B2;font-weight:bold"),
    "never tested": ("({})", "color:#666666;font-style:italic"),
}


class Trace:
    """Steps as a table of tokens, which grows while the text does."""

    def __init__(self):
        self.rows = []

    def add(self, drafts, new, tested):
        """One step: all drafts, the new tokens, how many drafts were tested."""
        kept = len(new) - 1
        states = ["kept"] * kept + ["rejected"] * (tested - kept) + ["never tested"] * (len(drafts) - tested)
        row = list(zip(drafts, states))
        self.rows.append(row[:tested] + [(new[-1], "the target's own")] + row[tested:])

    def _repr_mimebundle_(self, include=None, exclude=None):
        plain = "\n".join(" ".join(LOOKS[state][0].format(shown(token)) for token, state in row)
                          for row in self.rows)
        cell = '<span style="padding:0 3px;margin-right:3px;white-space:pre;font-family:monospace;{}">{}</span>'
        legend = " ".join(cell.format(look, name) for name, (_, look) in LOOKS.items())
        lines = []
        for row in self.rows:
            spans = [cell.format(LOOKS[state][1], html.escape(shown(token))) for token, state in row]
            count = sum(state == "kept" for _, state in row)
            lines.append(f'<tr><td style="text-align:right">{count} kept</td>'
                         f'<td style="text-align:left">{"".join(spans)}</td></tr>')
        return {"text/html": f"<p>{legend}</p><table>{''.join(lines)}</table>", "text/plain": plain}


def speculate(large, small, prompt, new, gamma, settings=(0.0, 0, 1.0), seed=0, on_step=None):
    """Your step until `new` tokens have come. Returns the text, and (drafts, new, tested) of each step."""
    generator, text, steps = torch.Generator().manual_seed(seed), prompt, []
    while len(text) < len(prompt) + new:
        uniforms = torch.rand(2 * gamma + 1, generator=generator).to(prompt.device)
        fresh, drafts, tested = speculative_step(large, small, text, gamma, uniforms, *settings)
        text = torch.cat([text, fresh])
        steps.append((drafts.tolist(), fresh.tolist(), int(tested)))
        if on_step:
            on_step(*steps[-1])
    return text[: len(prompt) + new], steps


def rereading(model):
    """A model that reads the whole text again at every call."""
    return lambda ids: all_logits(model, ids)


def acceptance(steps):
    """Accepted of tested drafts."""
    return sum(len(new) - 1 for _, new, _ in steps) / sum(tested for _, _, tested in steps)


from IPython.display import display

trace, NEW = Trace(), device.pick(fast=36, full=64)
live = display(trace, display_id=True)


def grow(*step):
    trace.add(*step)
    live.update(trace)


WRITTEN = '''class Stack:
    """A list of items."""

    def __init__(self, items):
        self.items = items

    def push('''
prompt = torch.tensor(tokenizer(WRITTEN)["input_ids"], device=device.torch)
text, steps = speculate(rereading(target), rereading(drafter), prompt, NEW, 5, on_step=grow)
alone = prompt
for _ in range(NEW):
    alone = torch.cat([alone, all_logits(target, alone)[-1:].argmax(-1)])
print(WRITTEN + tokenizer.decode(text[len(prompt):].tolist()))
print(f"\n{NEW} tokens in {len(steps)} passes of the target, acceptance rate {acceptance(steps):.2f}")
print("the target alone writes", "the same" if torch.equal(text, alone) else "something else")

# %% [markdown]
# Greedy decoding shows exactness in its simplest form: the text is the target's, token for token, however bad the
# drafts are. (In half precision it can happen that two logits are nearly equal, and a pass over five tokens rounds them
# otherwise than a pass over one. That is rounding, and either text is greedy.) At temperature 1 the same holds for the
# distribution. Try it: `settings=(1.0, 0, 1.0)`.
#
# ## 5. Roll the cache back
#
# So far both models read the whole text in every pass. In earnest each keeps the keys and values of what it has read, a
# **cache** of shape `[batch, heads, column, dim]` for each layer, and a pass reads only what is new: the newest token
# and the drafts. But then the cache also holds what was rejected, and the next token would attend to it.
#
# One text alone is simple: cut the last columns off. A batch is not, for every row rejects at another place, and a
# tensor has one length. The way out is a mask: `held[row, column]` says whether a column counts for a row. Here
# $\gamma = 3$, and the rows accept 1 and 2 drafts:
#
# ```
#   column           0    1    2    3    4    5    6    7
#                    |-- before --|  newest  d1   d2   d3
#   row 0, held      x    x    .    x    x    x    x    x      accepts 1
#   row 1, held      x    x    x    x    x    x    x    x      accepts 2
#
#   row 0, after     x    x    .    x    x    x    .           next position: 5
#   row 1, after     x    x    x    x    x    x    x           next position: 7
# ```
#
# Three things to see:
#
# - The pass has read the **newest** token and then the drafts. The newest stays, and so do the accepted drafts. The
#   token that replaces a rejected one is not in the cache: nothing has read it yet.
# - Columns at the end that **no** row holds are cut off. Holes inside stay, like column 2 above, from an earlier step.
# - The position of a row's next token, which its rotary angles depend on, is the number of tokens that it **holds**,
#   which is not the number of columns.
#
# ### Exercise 5: roll the cache back
#
# *1.5 points, about 40 minutes, difficulty 3 of 5.*
#
# <details><summary>Hint 1</summary>
#
# Only the last `gamma` columns of `held` change: draft `i` (from 0) stays in the rows with `i < accepted`. Compare
# `torch.arange(gamma)` with `accepted[:, None]`.
# </details>
# <details><summary>Hint 2</summary>
#
# Which row decides how many columns are left? The one that accepted most.
# </details>
# <details><summary>Hint 3</summary>
#
# `held[:, -gamma:] = ...` writes into the caller's tensor. Write into `held.clone()`.
# </details>

# %% exercise="roll_back"
def roll_back(
    cache: list[tuple[torch.Tensor, torch.Tensor]],
    held: torch.Tensor,
    accepted: torch.Tensor,
    gamma: int,
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Forget the drafts that were not accepted.

    cache: of each layer (keys, values), both [batch, heads, column, dim]
    held: [batch, column] bool, the columns that count for each row. Every row holds the last gamma + 1 of
        them, which are its newest token and then its gamma drafts; before them any may be held or not
    accepted: [batch] int64, from 0 to gamma: of each row, how many of its drafts stay
    gamma: at least 1
    Returns (cache, held, positions). Columns at the end that no row holds any more are cut off, from keys,
    values and held alike; all others stay where they are. positions: [batch] int64, how many tokens each
    row holds, which is the position of its next one. The inputs stay as they are; what is returned may be
    views of them.
    """
    ### BEGIN SOLUTION
    kept = held.clone()
    kept[:, -gamma:] = torch.arange(gamma, device=held.device) < accepted[:, None]
    columns = held.shape[1] - gamma + int(accepted.max())
    cache = [(keys[:, :, :columns], values[:, :, :columns]) for keys, values in cache]
    return cache, kept[:, :columns], kept.sum(1)
    ### END SOLUTION


# %% check="roll_back"
check("roll_back", roll_back)

# %% [markdown]
# ### Measure it: is what is left of the cache as good as new?
#
# A ragged batch: three texts, one pass over the newest token and four drafts, your `roll_back`, and one more token in
# each row. The logits are compared with those of each text alone, read from scratch.

# %% tags=["demo"] needs=["roll_back"]
exact_target = load_model("course-base", device=device, dtype="float32").requires_grad_(False)
cached = room.DynamicCachedModel(exact_target)  # the model with its cache and mask; rolling back is yours
rows = torch.stack([ids[:40] for ids in prompts[:3]])
cached.reset(3, 64)
cached.extend(rows[:, :30])
columns, texts = [cached.held.shape[1]], [row[:30] for row in rows]
for counts in ([0, 4, 2], [3, 1, 0]):
    cached.extend(rows[:, 30:35])
    layers = [(layer.keys, layer.values) for layer in cached.cache.layers]
    accepted = torch.tensor(counts, device=device.torch)
    layers, cached.held, cached.lengths = roll_back(layers, cached.held, accepted, 4)
    for layer, (keys, values) in zip(cached.cache.layers, layers):
        layer.keys, layer.values = keys, values
    texts = [torch.cat([text, row[30 : 31 + count]]) for text, row, count in zip(texts, rows, counts)]
    columns.append(cached.held.shape[1])
after = cached.extend(rows[:, 35:36])[:, -1]
fresh = torch.stack([all_logits(exact_target, torch.cat([text, row[35:36]]))[-1]
                     for text, row in zip(texts, rows)])
print(f"columns: {columns}; tokens held: {[len(text) for text in texts]}")
print(f"largest difference of a logit: {(after - fresh).abs().max():.1e}, of logits up to {fresh.abs().max():.0f}")

# %% [markdown]
# With it, your step gets a memory. The class below is a model as the step wants it, ids to logits, that finds out how
# much of a text it has read already, rolls its cache back to there, and reads the rest.

# %% tags=["demo"] needs=["accept_drafts", "adjusted_distribution", "sampling_distribution", "speculative_step", "roll_back"]
class Remembering:
    """ids [length] to logits [length, vocabulary]; reads only what it has not read."""

    def __init__(self, model):
        self.model, self.cache = model, transformers.DynamicCache()
        self.ids, self.logits = torch.empty(0, dtype=torch.long, device=model.device), None
        self.held = torch.ones(1, 0, dtype=torch.bool, device=model.device)

    @torch.no_grad()
    def __call__(self, ids):
        common = min(len(ids), len(self.ids))
        same = int((ids[:common] == self.ids[:common]).long().cumprod(0).sum())
        if forget := len(self.ids) - same:
            layers = [(layer.keys, layer.values) for layer in self.cache.layers]
            nothing = torch.zeros(1, dtype=torch.long, device=ids.device)
            layers, self.held, _ = roll_back(layers, self.held, nothing, forget)
            for layer, (keys, values) in zip(self.cache.layers, layers):
                layer.keys, layer.values = keys, values
            self.logits = self.logits[:same]
        if same < len(ids):
            new = self.model(input_ids=ids[None, same:], past_key_values=self.cache, use_cache=True)
            new = new.logits[0].float()
            self.logits = new if self.logits is None else torch.cat([self.logits, new])
            self.held = torch.ones(1, len(ids), dtype=torch.bool, device=ids.device)
        self.ids = ids
        return self.logits


def seconds_of(work):
    if device.kind == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    found = work()
    if device.kind == "cuda":
        torch.cuda.synchronize()
    return clock() - begin, found


for name, kind in (("reading again", rereading), ("remembering", Remembering)):
    speculate(kind(target), kind(drafter), prompt, NEW, 5)  # on a recent GPU cuDNN makes a plan for each new shape
    spent, (again, _) = seconds_of(lambda: speculate(kind(target), kind(drafter), prompt, NEW, 5))
    same = "the same text" if torch.equal(again, text) else "another text: rounding, or roll_back?"
    print(f"{name:15}{1000 * spent / NEW:7.1f} ms a token; {same}")

# %% [markdown]
# Does remembering pay? The longer the text, the more. On a CPU it does here already. On a GPU a text as short as this one is
# read again in about the time of one token, and there is less to gain. (Each way runs once before it is timed. On a
# recent GPU PyTorch leaves attention to cuDNN, which prepares a plan for every new shape and keeps it, and a cache that
# grows has a new shape in each pass: the first run would be mostly plans.)
#
# ## 6. What it gives
#
# How many tokens does a step give? One, and one more if the first draft is accepted (probability $\alpha$), and one
# more if the second is accepted as well ($\alpha^2$), and so on up to $\gamma$. If acceptances are independent (they are
# not quite: hard places come in groups),
#
# $$E(\alpha, \gamma) = 1 + \alpha + \alpha^2 + \dots + \alpha^\gamma = \frac{1 - \alpha^{\gamma+1}}{1 - \alpha}.$$
#
# And how long does it take? With $c$ the time of a pass of the drafter over that of a pass of the target, $\gamma c + 1$
# passes of the target, if a pass over $\gamma + 1$ tokens takes as long as one over a single token. So the speed-up
# is (Leviathan et al., theorem 3.8)
#
# $$S = \frac{E(\alpha, \gamma)}{\gamma c + 1}.$$
#
# More drafts give more tokens, ever fewer per draft, at the same price each: there is a best $\gamma$, which may be 0.
#
# Read backwards, the formula tells what $c$ somebody's table implies: $c = (E / S - 1) / \gamma$. If it comes out
# negative, not even a free drafter would explain the speed-up, and the formula's assumptions or the table's rounding are
# to blame. A negative number is the right answer then.
#
# ### Exercise 6: what it gives, and the best gamma
#
# *1.5 points, about 35 minutes, difficulty 2 of 5.*
#
# Four methods of one or two lines each.
#
# <details><summary>Hint 1</summary>
#
# At $\alpha = 1$ the closed form is 0 / 0. The sum is not: `alpha**i` for `i` from 0 to gamma.
# </details>
# <details><summary>Hint 2</summary>
#
# `max(candidates, key=f)` returns the first of equals.
# </details>

# %% exercise="SpeedModel"
class SpeedModel:
    """What speculative decoding gives where each tested draft is accepted with probability alpha.

    alpha: from 0 to 1, both included
    cost_ratio: c, the time of a pass of the drafter over that of a pass of the target, 0 or more
    """

    def __init__(self, alpha: float, cost_ratio: float = 0.0) -> None:
        self.alpha, self.cost_ratio = alpha, cost_ratio

    def expected_tokens(self, gamma: int) -> float:
        """Tokens a step, 1 + alpha + ... + alpha^gamma; gamma is 0 or more."""
        ### BEGIN SOLUTION
        return sum(self.alpha**i for i in range(gamma + 1))
        ### END SOLUTION

    def speedup(self, gamma: int) -> float:
        """Over decoding with the target alone: expected tokens over gamma c + 1."""
        ### BEGIN SOLUTION
        return self.expected_tokens(gamma) / (gamma * self.cost_ratio + 1)
        ### END SOLUTION

    def best_gamma(self, most: int) -> int:
        """The gamma from 0 to `most` (included) with the largest speed-up; of equals the smallest."""
        ### BEGIN SOLUTION
        return max(range(most + 1), key=self.speedup)
        ### END SOLUTION

    def implied_cost_ratio(self, gamma: int, measured: float) -> float:
        """The c at which the speed-up with this gamma (at least 1) would be `measured`; may be negative."""
        ### BEGIN SOLUTION
        return (self.expected_tokens(gamma) / measured - 1) / gamma
        ### END SOLUTION


# %% check="SpeedModel"
check("SpeedModel", SpeedModel)

# %% [markdown]
# ### The lecture's table, read backwards
#
# Leviathan et al. translate English to German with a T5 of 11 billion weights, and smaller T5s as drafters. The lecture
# shows these rows. Which cost ratio does each imply?

# %% tags=["demo", "nbval-check-output"] needs=["SpeedModel"]
LECTURE = [("T5-small", 0, 7, 0.75, 3.4), ("T5-base", 0, 7, 0.80, 2.8), ("T5-large", 0, 7, 0.82, 1.7),
           ("T5-small", 1, 7, 0.62, 2.6), ("T5-base", 1, 5, 0.68, 2.4), ("T5-large", 1, 3, 0.71, 1.4)]
print("M_q        T  gamma  alpha  speed  tokens/step  implied c  c for alpha 0.005 lower to 0.005 higher")
for name, T, gamma, alpha, speed in LECTURE:
    c, low, high = (SpeedModel(alpha + d).implied_cost_ratio(gamma, speed) for d in (0, -0.005, 0.005))
    print(f"{name:10} {T}  {gamma:5}  {alpha:5.2f}  {speed:4.1f}x  {SpeedModel(alpha).expected_tokens(gamma):11.2f}  "
          f"{c:9.3f}  {low:.3f} to {high:.3f}")

# %% [markdown]
# The order is as it should be: a larger drafter costs more. And yet $c$ belongs to two models and a machine, and should
# not care about the temperature. For T5-base it halves between the two halves of the table, and the row of T5-small at
# $T = 1$ asks for a drafter that costs less than nothing. Rounding $\alpha$ to two digits moves $c$ by about as much as
# you see in the last column, which explains that row, but not the one of T5-base. What remains are the assumptions:
# acceptances that come in groups, and a speed that was measured on other texts, or other steps, than $\alpha$ was. Such a
# formula is good for choosing $\gamma$. To trust its second digit would be too much.
#
# ### Predict, then measure: our two models
#
# First the cost ratio, on this machine: what a step's drafts take, for each of them, over a step of the target alone.
# Then the lecture's table for our models, by the kit's own decoder (which does what yours does, with caches of fixed
# size, and on a GPU a whole step as one CUDA graph).
#
# **Predict first.** (a) The drafter has a seventh of the target's weights, and two layers where the target has eight. What
# will $c$ be? (b) With your acceptance rates from above, which $\gamma$ is best, and how large is the speed-up? Your
# `SpeedModel` will tell you, given $c$.

# %% predict="cost_ratio"
my_cost_ratio = None  # your guess
my_gamma, my_speedup = None, None  # your guesses

# %% tags=["demo"] needs=["SpeedModel"]
TEMPERATURES, GAMMAS = device.pick(fast=((0.0, 1.0), (1, 2, 4)), full=((0.0, 0.5, 1.0, 1.5), (1, 2, 3, 4, 6)))


def measure(decoders):
    """Of each decoder (seconds a step, acceptance rate, tokens a step): in turns, so that what disturbs one
    disturbs all. The time is the median of all steps but the first of each text."""
    times, found = {name: [] for name in decoders}, {name: [] for name in decoders}
    for i, ids in enumerate(prompts[:TEXTS]):
        for name, decoder in decoders.items():
            marks = []
            found[name].append(decoder.generate([ids], GENERATE, seed=i,
                                                on_tokens=lambda row, new: marks.append(clock())).statistics)
            times[name] += [after - before for before, after in zip(marks, marks[1:])]
    total = {name: [sum(getattr(x, field) for x in each) for field in ("accepted", "tested", "tokens", "steps")]
             for name, each in found.items()}
    return {name: (statistics.median(times[name]), accepted / max(tested, 1), tokens / steps)
            for name, (accepted, tested, tokens, steps) in total.items()}


decoder_of(target, drafter, 1.0).generate([prompts[0]], 4, seed=0)  # warm-up
plain, cost, table = {}, {}, []
for T in TEMPERATURES:
    decoders = {0: decoder_of(target, None, T), **{gamma: decoder_of(target, drafter, T, gamma) for gamma in GAMMAS}}
    found = measure(decoders)
    plain[T] = found[0][0]
    cost[T] = decoders[GAMMAS[-1]].seconds_of_drafts() / GAMMAS[-1] / plain[T]
    for gamma in GAMMAS:
        step, alpha, per_step = found[gamma]
        table.append({"T": T, "gamma": gamma, "alpha": alpha, "per step": per_step,
                      "speed": plain[T] * per_step / step,
                      "predicted": SpeedModel(alpha, cost[T]).speedup(gamma)})
sizes = [sum(p.numel() for p in model.parameters()) for model in (drafter, target)]
print(f"weights: {sizes[0]:,} and {sizes[1]:,}, a ratio of {sizes[0] / sizes[1]:.2f}")
for T in TEMPERATURES:
    print(f"T = {T:g}: {1000 * plain[T]:.2f} ms a token for the target alone, c = {cost[T]:.2f}")
print("\nM_q           T    gamma  alpha  tokens/step  speed  predicted  implied c")
for row in table:
    implied = SpeedModel(row["alpha"]).implied_cost_ratio(row["gamma"], row["speed"])
    print(f"course-draft  {row['T']:<4g} {row['gamma']:5}  {row['alpha']:5.2f}  {row['per step']:11.2f}  "
          f"{row['speed']:4.2f}x  {row['predicted']:8.2f}x  {implied:9.2f}")
if my_cost_ratio is not None:
    print(f"You predicted c = {my_cost_ratio}, gamma = {my_gamma}, a speed-up of {my_speedup}.")

# %% tags=["demo"] needs=["SpeedModel"]
figure, axes = plots.figure("Speed-up over the target alone", "gamma (drafted tokens a step)", "speed-up",
                            caption="Markers: measured. Lines without markers: predicted from alpha and c.")
spoken = []
for T, look in zip(TEMPERATURES, plots.looks(len(TEMPERATURES))):
    rows_here = [row for row in table if row["T"] == T]
    alpha = sum(row["alpha"] for row in rows_here) / len(rows_here)
    everywhere = range(max(GAMMAS) + 3)
    axes.plot(everywhere, [SpeedModel(alpha, cost[T]).speedup(g) for g in everywhere], **{**look, "marker": ""})
    axes.plot([row["gamma"] for row in rows_here], [row["speed"] for row in rows_here],
              **{**look, "linestyle": ""}, label=f"T = {T:g}")
    fastest = max(rows_here, key=lambda row: row["speed"])
    spoken.append(f"at T = {T:g} the fastest is gamma {fastest['gamma']} with {fastest['speed']:.2f}")
    print(f"T = {T:g}: your model would choose gamma = {SpeedModel(alpha, cost[T]).best_gamma(16)}, "
          f"measured best: {fastest['gamma']}")
axes.axhline(1.0, color="#888888", linestyle="--", marker="")
axes.legend()
plots.show(figure, f"Speed-up against gamma, measured and predicted; {'; '.join(spoken)}.")

# %% [markdown]
# How near is the prediction? Two things stand between it and the clock. A pass over $\gamma + 1$ tokens is not quite
# as cheap as one over a single token, least of all on a CPU, which has no idle arithmetic to spare. And distributions
# have to be made and drawn from, at $\gamma + 1$ places for every step. The last column shows both, if the machine was
# quiet: read backwards, the clock asks for a larger $c$ than the drafter's passes take, most so at a small $\gamma$,
# where what the target's pass costs more is charged to few drafts.
#
# Compare $c$ itself with the ratio of the weights. In models this small a pass is mostly the overhead of starting its
# operations, and that goes by the number of **layers**, two of eight. So a drafter wants to be shallow rather than
# narrow, and a large target makes everything easier: its drafter's $c$ can be a few hundredths. For our pair on a CPU
# speculation is nearly an even trade; on a GPU, where a whole step is one graph, it gains about a half at the better
# $\gamma$. A batch makes it worse, for then the target's pass is no longer bound by memory, and the arithmetic that drafts
# need is not free any more.
#
# ## Stretch A: draft by n-gram lookup
#
# *A badge, about 25 minutes, difficulty 2 of 5.*
#
# The cheapest drafter is no model at all. Code repeats itself: find where the last few tokens occurred before, and draft
# what followed them there (Saxena, 2023: prompt lookup). $c$ is nearly 0, the drafts are certain ($q = 1$), and where
# nothing is found nothing is drafted.
#
# ```
#   tokens      7   3   9   4   1   5   7   3   9           gamma = 2, most = 3
#               ---------                   ---------
#               found here  4   1           the last three tokens:  draft 4, 1
# ```
#
# <details><summary>Hint 1</summary>
#
# From `n = most` down to 1: all places `end` with `words[end - n : end] == words[size - n :]`. The text's own end is not
# among them.
# </details>
# <details><summary>Hint 2</summary>
#
# Of those places, the last with `end + gamma <= size`; if there is none, the last.
# </details>

# %% exercise="lookup_draft"
def lookup_draft(tokens: torch.Tensor, gamma: int, most: int) -> torch.Tensor:
    """What followed the last tokens where they occurred before.

    tokens: [length] int64, at least one token
    gamma: the most tokens to draft, at least 1
    most: the longest n-gram to look for, at least 1
    The last n tokens are looked for at earlier places (which may overlap with the end), with the largest n
    from `most` down to 1 that occurs. Of its occurrences the latest that at least gamma tokens follow
    decides; if there is none, the latest. Returns the tokens that follow there, int64 [count] with count
    from 0 (nothing occurs) to gamma.
    """
    ### BEGIN SOLUTION
    words = tokens.tolist()
    size = len(words)
    for n in range(most, 0, -1):
        ends = [end for end in range(n, size) if words[end - n : end] == words[size - n :]]
        if ends:
            whole = [end for end in ends if end + gamma <= size]
            start = (whole or ends)[-1]
            return tokens[start : start + gamma]
    return tokens[:0]
    ### END SOLUTION


# %% check="lookup_draft"
check("lookup_draft", lookup_draft)

# %% [markdown]
# For greedy text it takes no model to see what lookup would give: the text is what the target wrote, and a draft is
# accepted as far as it agrees.

# %% tags=["demo"] needs=["lookup_draft"]
def lookup_steps(text, start, gamma, most):
    """Steps that it takes to write text[start:], and how many drafts were accepted and tested."""
    at, steps, accepted, tested = start, 0, 0, 0
    while at < len(text):
        draft = lookup_draft(text[:at], gamma, most).tolist()
        right = [a == b for a, b in zip(draft, text[at:].tolist())]
        count = right.index(False) if False in right else len(right)
        at, steps = at + count + 1, steps + 1
        accepted, tested = accepted + count, tested + min(count + 1, len(draft))
    return steps, accepted, tested


written = [decoder_of(target, None, 0.0).generate([ids], 2 * GENERATE).sequences[0] for ids in prompts[:TEXTS]]
for gamma, most in ((2, 3), (4, 3), (8, 3), (4, 1)):
    each = [lookup_steps(text, PROMPT, gamma, most) for text in written]
    steps, accepted, tested = (sum(counts) for counts in zip(*each))
    print(f"gamma {gamma}, n-grams up to {most}: {2 * GENERATE * TEXTS / steps:.2f} tokens a step, "
          f"{accepted} of {tested} tested drafts accepted")

# %% [markdown]
# Greedy text of a small model goes round in circles, which flatters a lookup. Where text really is copied (editing,
# summaries, answers that quote), it is the method to try first.
#
# ## Stretch B: leave early by confidence
#
# *A badge, about 25 minutes, difficulty 2 of 5.*
#
# The lecture's other idea, "adaptive language modeling": make predictions from earlier layers **when it is safe to do
# so**. Confident adaptive language modelling (CALM; Schuster et al., 2022) asks the head after every layer. Where the
# likeliest token leads the second by enough probability, the token is taken and the upper layers are left out.
#
# <details><summary>Hint 1</summary>
#
# `logits.softmax(-1).topk(2).values` has both probabilities of the lead.
# </details>
# <details><summary>Hint 2</summary>
#
# `argmax` over the layers finds the first True of a boolean tensor (as `.long()`). Make sure that there is one.
# </details>

# %% exercise="early_exit"
def early_exit(
    logits: torch.Tensor, threshold: float, least: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each position leaves the network, and the token that it leaves with.

    logits: [layers, ..., vocabulary] float32, what the head says after each layer; "..." may be nothing
    threshold: of the confidence, the likeliest token's probability less the second's
    least: layers that every position passes, from 1 to layers
    A position leaves after the first layer, the `least`-th or a later one, with a confidence of at least
    the threshold; after the last layer in any case. Returns (tokens, exits), both int64 [...]: the
    likeliest token after that layer, and how many layers were passed, from `least` to layers.
    """
    ### BEGIN SOLUTION
    top = logits.softmax(-1).topk(2).values
    sure = top[..., 0] - top[..., 1] >= threshold
    sure[: least - 1] = False
    sure[-1] = True
    exits = sure.long().argmax(0)
    tokens = logits.argmax(-1).gather(0, exits[None])[0]
    return tokens, exits + 1
    ### END SOLUTION


# %% check="early_exit"
check("early_exit", early_exit)

# %% [markdown]
# Which threshold is safe? CALM does not guess. It takes texts like those to come, measures at each threshold how often
# the early token differs from the full model's, and walks from the safest threshold down as long as a statistical test
# can rule out that the true rate is above $\delta$. With probability $1 - \epsilon$ the promise then holds, on texts
# like these.

# %% tags=["demo"] needs=["early_exit"]
PIECES = device.pick(fast=24, full=400)
DELTA, EPSILON = device.pick(fast=0.25, full=0.1), 0.05
THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2)


@torch.no_grad()
def logits_by_layer(ids):
    """[layers, length, vocabulary]: the model's norm and head after every layer."""
    base, states = target.model, []
    hooks = [layer.register_forward_hook(lambda module, given, out: states.append(out)) for layer in base.layers]
    base(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    return torch.stack([target.lm_head(base.norm(state))[0].float() for state in states])


losses, passed = [], []
for ids in beginnings(PIECES, 32):
    logits = logits_by_layer(ids)
    full = logits[-1].argmax(-1)
    both = [early_exit(logits, threshold, 2) for threshold in THRESHOLDS]
    losses.append([(tokens != full).float().mean().item() for tokens, _ in both])
    passed.append([exits.float().mean().item() for _, exits in both])
losses, passed = torch.tensor(losses), torch.tensor(passed)
safe = room.calibrate_threshold(THRESHOLDS, losses, delta=DELTA, epsilon=EPSILON)
print(f"{'threshold':>9}  layers passed (of {len(target.model.layers)})  tokens that differ")
for i, threshold in enumerate(THRESHOLDS):
    print(f"{threshold:9g}  {passed[:, i].mean():20.2f}  {losses[:, i].mean():18.1%}")
print(f"lowest threshold that keeps the rate below {DELTA:g} with probability {1 - EPSILON:g}, shown on {len(losses)} "
      f"texts: {safe if safe is not None else 'none'}")

# %% [markdown]
# Nobody has taught this model to speak after its third layer, so it does so badly: CALM trains with a loss at every
# layer. One more catch is not in the exercise. Later tokens attend to the upper layers of this one, which were left
# out; CALM hands the early state up to them as it is, and pays for a key and a value in each. (In the kit:
# `EarlyExitDecoder`. And a model's own first layers make a drafter as well: `early_exit_draft`, whose mistakes the full
# model then corrects, exactly.)
#
# ## Stretch C: several drafts as a tree
#
# *A badge, about 40 minutes, difficulty 3 of 5.*
#
# "What kind of generation 'paths' should we use?", asks the lecture's last line. Where the drafter hesitates between two
# tokens, draft both, and let each go on: a **tree** (Miao et al., 2024). The target checks all of it in one pass, for a
# mask can tell every node what its text is: node 0, which is the newest token of the text, its ancestors, and itself.
#
# ```
#               0: "self"                       node   parent   depth   sees
#              /         \                       0       -1       0     0
#        1: "."           2: ","                 1        0       1     0 1
#        /    \             \                    2        0       1     0 2
#   3: "host" 4: "port"      5: "host"           3        1       2     0 1 3
#                                                4        1       2     0 1 4
#                                                5        2       2     0 2 5
# ```
#
# Greedily, the path is found by walking down: from node 0, to the child that has the token which the target puts
# after the node where you stand, as long as there is one. What the target puts after the last node of the path comes on
# top, as ever. (Sampling works too: each child is tested in turn, and after each rejection $p$ becomes
# $\mathrm{norm}(\max(0, p - q))$. The kit's `TreeDecoder` does that.)
#
# <details><summary>Hint 1</summary>
#
# A node sees what its parent sees, and itself. Parents come before their children.
# </details>
# <details><summary>Hint 2</summary>
#
# The depth of a node is the number of nodes that it sees, less one.
# </details>

# %% exercise="DraftTree"
class DraftTree:
    """Drafts that share beginnings.

    parents: of each node the number of its parent, which is smaller than its own; -1 for node 0, the only
        root
    tokens: of each node its token; node 0 is the newest token of the text, the others are drafts. The
        children of one node have different tokens
    """

    def __init__(self, parents: list[int], tokens: list[int]) -> None:
        self.parents, self.tokens = parents, tokens

    def mask(self) -> torch.Tensor:
        """bool [nodes, nodes]: whether node a sees node b, at [a, b]: itself and its ancestors."""
        ### BEGIN SOLUTION
        seen = torch.zeros(len(self.parents), len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] = seen[parent]
            seen[node, node] = True
        return seen
        ### END SOLUTION

    def depths(self) -> torch.Tensor:
        """int64 [nodes]: how many tokens behind node 0 each node stands; 0 for node 0."""
        ### BEGIN SOLUTION
        return self.mask().sum(1) - 1
        ### END SOLUTION

    def accept(self, best: list[int]) -> tuple[list[int], int]:
        """The path that the target takes, and the token after it.

        best: of each node, the token that the target puts after it. Returns the numbers of the accepted
        nodes from the top down, without node 0 (an empty list where no child of node 0 fits), and the
        target's token after the last of them (after node 0 where there is none).
        """
        ### BEGIN SOLUTION
        path, node = [], 0
        for child in range(1, len(self.parents)):
            if self.parents[child] == node and self.tokens[child] == best[node]:
                path.append(child)
                node = child
        return path, best[node]
        ### END SOLUTION


# %% check="DraftTree"
check("DraftTree", DraftTree)

# %% [markdown]
# A chain of three drafts beside trees of the drafter's likeliest tokens. More nodes are checked in one pass; do they
# give more tokens?

# %% tags=["demo"] needs=["DraftTree"]
@torch.no_grad()
def grown_tree(text, branching):
    """The drafter's likeliest tokens, so many children at each depth."""
    parents, tokens, level = [-1], [int(text[-1])], [(0, [])]
    for width in branching:
        texts = torch.stack([torch.cat([text, text.new_tensor(path)]) for _, path in level])
        likely = drafter(input_ids=texts).logits[:, -1].topk(width).indices.tolist()
        below = []
        for (node, path), children in zip(level, likely):
            for token in children:
                below.append((len(parents), [*path, token]))
                parents.append(node)
                tokens.append(token)
        level = below
    return DraftTree(parents, tokens)


@torch.no_grad()
def tree_step(text, branching):
    """New tokens of one step: the text is read again, with the tree in place of its newest token."""
    tree = grown_tree(text, branching)
    size, before = len(tree.parents), len(text) - 1
    sees = torch.ones(before + size, before + size, dtype=torch.bool, device=text.device).tril()
    sees[before:, before:] = tree.mask().to(text.device)
    mask = torch.zeros(sees.shape, dtype=target.dtype, device=text.device).masked_fill(~sees, -math.inf)
    places = torch.cat([torch.arange(before, device=text.device), before + tree.depths().to(text.device)])
    ids = torch.cat([text[:-1], text.new_tensor(tree.tokens)])
    logits = target(input_ids=ids[None], attention_mask=mask[None, None], position_ids=places[None]).logits[0]
    path, token = tree.accept(logits[before:].argmax(-1).tolist())
    return [*(tree.tokens[node] for node in path), token], size - 1


TREE_NEW = device.pick(fast=14, full=64)
for branching in ((1, 1, 1), (2, 1, 1), (3, 2, 1)):
    made = passes = nodes = 0
    for ids in prompts[:TEXTS]:
        text = ids
        while len(text) < PROMPT + TREE_NEW:
            new, drafted = tree_step(text, branching)
            text = torch.cat([text, text.new_tensor(new)])
            made, passes, nodes = made + len(new), passes + 1, drafted
    print(f"{' x '.join(map(str, branching)):9} {nodes:3} drafts a step: {made / passes:.2f} tokens a step")

# %% [markdown]
# ## The receipt
#
# The same greedy tokens by everybody. On a small model the time is mostly what Python and PyTorch need to start
# operations; the kit's decoder keeps that low with caches of fixed size, and on a GPU with CUDA graphs. So compare like with
# like: the kit's decoder with the kit's target alone, and assisted generation with `transformers`' own. Where starting
# operations is most of the time, a drafter's passes are not cheap, and assistance may lose. In half precision (on a GPU) a
# text may leave the target's at a near tie, as in section 4.

# %% tags=["demo"] needs=["accept_drafts", "adjusted_distribution", "sampling_distribution", "speculative_step", "roll_back", "SpeedModel"]
from effnlp_lab.device import ceilings
from effnlp_lab.notebook.receipt import Receipt

greedy_rows = [row for row in table if row["T"] == 0]
BEST = max(greedy_rows, key=lambda row: row["speed"])["gamma"]
drafter.generation_config.num_assistant_tokens = BEST
drafter.generation_config.num_assistant_tokens_schedule = "constant"
drafter.generation_config.assistant_confidence_threshold = 0.0


def by_transformers(**more):
    return [target.generate(ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=GENERATE,
                            do_sample=False, pad_token_id=0, **more)[0].cpu() for ids in prompts[:TEXTS]]


def by_kit(small):
    decoder = decoder_of(target, small, 0.0, BEST)
    return lambda: [decoder.generate([ids], GENERATE).sequences[0] for ids in prompts[:TEXTS]]


contestants = {
    "alone": by_kit(None),
    "yours": lambda: [speculate(Remembering(target), Remembering(drafter), ids, GENERATE, BEST)[0].cpu()
                      for ids in prompts[:TEXTS]],
    "kit": by_kit(drafter),
    "generate": by_transformers,
    "assisted": lambda: by_transformers(assistant_model=drafter),
}
texts, times = {}, {name: [] for name in contestants}
for _ in range(2):  # in turns; the first makes graphs and buffers
    for name, work in contestants.items():
        spent, texts[name] = seconds_of(work)
        times[name].append(spent / (GENERATE * TEXTS))
costs = {}
for name in contestants:
    same = sum(torch.equal(a, b) for a, b in zip(texts[name], texts["alone"]))
    costs[name] = {"quality": f"{same} of {TEXTS}", "seconds": min(times[name])}
receipt = Receipt("08", quality="texts equal to the target's", device=device,
                  title=f"A greedy token of course-base: {PROMPT} tokens in, {GENERATE} out, one text at a time")
receipt.add("baseline", "the target alone, kit", **costs["alone"])
receipt.add("yours", f"speculative_step with roll_back, gamma {BEST}", **costs["yours"])
receipt.add("reference", f"the kit's SpeculativeDecoder, gamma {BEST}", **costs["kit"])
receipt.add("library", "transformers, the target alone", **costs["generate"])
receipt.add("library", f"transformers, assisted, gamma {BEST}", **costs["assisted"])
weights = [sum(p.numel() * p.element_size() for p in model.parameters()) for model in (target, drafter)]
per_step = next(row["per step"] for row in greedy_rows if row["gamma"] == BEST)
bytes_a_token = (weights[0] + BEST * weights[1]) / per_step
receipt.add("limit", "weights read once a pass", bytes_moved=bytes_a_token,
            seconds=bytes_a_token / ceilings(device).copy_bytes_per_second, note="at the rate of a large copy")
receipt.show()
print(f"saved as {receipt.save().name}")

# %% [markdown]
# ## In your own words
#
# A friend serves a large model to many users at once, in batches of 64, and wants to add a drafter that is a tenth of its
# size, "because speculative decoding is free: the output is the same". What would you answer? Say what stays the same, what
# it costs, and when it pays, with what you measured.
#
# Write 60 to 120 words. A person reads and grades them.

# %% [markdown] written="when_it_pays"
# **Rubric, for whoever grades** (shares of the points; another answer as good earns them too)
#
# - 0.3: what stays the same is the distribution (at temperature 0 the text), whatever the drafter does; rejected drafts are
#   work thrown away.
# - 0.3: the gain hangs on the acceptance rate and the cost ratio, $E / (\gamma c + 1)$, and both have to be measured on the
#   texts and at the temperature that are served.
# - 0.2: one sequence at a time a pass is bound by reading weights, so more tokens in it are nearly free; in a batch of 64 it
#   is bound by arithmetic, and they are not.
# - 0.2: what the formula leaves out: the drafter's memory and cache, rows of a batch that accept different numbers, sampling.

# %% [markdown]
# ## What you have learned
#
# - A draft is kept with probability $\min(1, p / q)$, and replaced from $\mathrm{norm}(\max(0, p - q))$: together that is $p$,
#   whatever $q$ is. A bad drafter costs time, never quality.
# - $p$ and $q$ are what is really sampled from: temperature, top-k and top-p come first.
# - A step is one path of $\gamma$ drafts, one pass of the target, and always one token more than was accepted.
# - The cache holds what was read. After a rejection it is rolled back, in every row to another place, and positions
#   count tokens, not columns.
# - $E / (\gamma c + 1)$ says what to expect. What it leaves out is on the clock: passes of several tokens, sampling, and the
#   overhead of a drafter that is not free.
#
# ## Read on
#
# - Y. Leviathan, M. Kalman, Y. Matias, "Fast Inference from Transformers via Speculative Decoding", 2023: algorithm 1,
#   theorem 3.8 and the table.
# - C. Chen et al., "Accelerating Large Language Model Decoding with Speculative Sampling", 2023.
# - A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020: top-p.
# - A. Saxena, "Prompt Lookup Decoding", 2023.
# - T. Schuster et al., "Confident Adaptive Language Modeling", 2022; A. N. Angelopoulos et al., "Learn then Test", 2021:
#   the guarantee.
# - X. Miao et al., "SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative Inference and
#   Verification", 2024.
# - T. Cai et al., "Medusa", 2024, and Y. Li et al., "EAGLE", 2024: drafters that grow on the target itself.
# - In the kit: `effnlp_lab/speculative` holds all of this as an engineer would use it: ragged batches, CUDA graphs, drafts
#   from a model, from the target's first layers or from the text, trees, adaptive gamma, and the paged cache.
