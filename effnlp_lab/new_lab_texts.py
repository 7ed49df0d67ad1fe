"""What `effnlp new-lab` writes, with $names to be filled in."""

SPEC = '''\
"""Lab $number: $title."""

from effnlp_lab.exercises.spec import Exercise, Guess, Lab, Prediction, Written

LAB = Lab(
    name="$name",
    title="$title",
    hours=1.0,
    graded=False,  # True once it has four to six core exercises, whose variants combine to four or more
    room=$room,
    summary="What the lab is about, in one sentence.",
    prerequisites="PyTorch tensors",
    exercises=(
        Exercise(
            "$exercise",
            points=1.0,
            minutes=10,
            difficulty=1,
            title="Shares of a whole",
            signature='(counts: Float[Tensor, "kinds"]) -> Float[Tensor, "kinds"]',
            parts={"shares": 0.6, "nothing": 0.4},
            seconds=5.0,
            forbidden=$forbidden,
            variants={"nothing": ("zeros", "equal")},
            variant_text={
                "zeros": "Your rule where nothing was counted: every share is 0.",
                "equal": "Your rule where nothing was counted: all shares are the same, and add up to 1.",
            },
        ),
    ),
    predictions=(
        Prediction("kinds", (Guess("my_kinds", 26.0, 26.0),), reach=3.0),
        Prediction("commonest", (Guess("my_percent_of_the_commonest", 9.0, 14.0),), reach=30.0, scale="difference"),
    ),
    written=(Written("small_samples"),),
)
'''

DRIVE = '''\
"""How the answers of lab $number are called: by position, so that a student may rename the arguments."""


def $exercise(answer, counts):
    return answer(counts)
'''

REFERENCE = '''\
"""Judges the answers of lab $number: cases, right outputs, known mistakes."""

from __future__ import annotations

import torch

from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng, edit

EARLIER: dict = {}  # right versions of exercises that later ones call


class $reference_class(Reference):
    exercise = "$exercise"
    mistakes = (
        Mistake("counts for shares", "Those are the counts: divide each by the sum of all.",
                edit("return counts / total", "return counts")),
        Mistake("largest for sum", "A share is of the sum of all counts, and not of the largest.",
                edit("counts.sum()", "counts.max()")),
        Mistake("nothing forgotten", "Where nothing was counted the sum is 0, and 0 / 0 is nan: look for it first.",
                edit("total == 0", "total < 0")),
    )

    def cases(self, rng: Rng, variant):
        yield self._case(rng, "a few kinds", 5)
        yield self._case(rng, "many kinds", rng.int(20, 40))
        yield Case("one kind", {"counts": torch.tensor([float(rng.int(2, 9))])}, part="shares")
        counts = torch.zeros(rng.int(3, 9))
        counts[rng.int(0, 2)] = rng.int(2, 9)
        yield Case("all of one kind", {"counts": counts}, part="shares")
        yield Case("nothing was counted", {"counts": torch.zeros(rng.int(2, 9))}, part="nothing")

    def expected(self, inputs, variant):
        return self._shares(inputs["counts"], variant, torch.float64)

    def plain(self, inputs, variant):
        return self._shares(inputs["counts"], variant, torch.float32)

    def _case(self, rng: Rng, name: str, kinds: int) -> Case:
        return Case(name, {"counts": torch.tensor(rng.ints(kinds, 1, 50), dtype=torch.float32)}, part="shares")

    def _shares(self, counts: torch.Tensor, variant, dtype: torch.dtype) -> torch.Tensor:
        if counts.any():
            return counts.to(dtype) / counts.to(dtype).sum()
        return torch.full(counts.shape, 1 / len(counts) if variant["nothing"] == "equal" else 0.0, dtype=dtype)


REFERENCES = {cls.exercise: cls() for cls in ($reference_class,)}
'''

MASTER = '''\
# %% [markdown]
# # Lab $number: $title
#
# What the technique is for, in a paragraph: which cost it lowers, by how much, and what it is paid with.
#
# | | exercise | points | minutes | difficulty |
# |---|---|---|---|---|
# | 1 | `$exercise`: shares of a whole | 1 | 10 | 1 of 5 |
#
# **Time.** About one hour: the core exercises, the reading and the measurements.
#
# **You need** PyTorch tensors.
#
# **How a check works.** Under each blank stands one call, `check(...)`. It runs your function on fresh random cases,
# compares with a reference, and says what went wrong. Run it as often as you like.
#
# {assistants} The blanks are short because the thinking is the work.

# %% tags=["parameters"]
DEVICE = "auto"
FAST = "auto"

# %%
import effnlp_lab
from effnlp_lab import check

import torch

device = effnlp_lab.start("$name", device=DEVICE, fast=FAST)

# %% [markdown]
# ## 1. Shares
#
# Of counts $$n_1, \\dots, n_k$$ the shares are $$n_i / \\sum_j n_j$$. One thing is left to a rule: what they are where
# nothing was counted. Yours:

# %%
effnlp_lab.variant("$exercise")

# %% [markdown]
# ### Exercise 1: shares of a whole
#
# *1 point, about 10 minutes, difficulty 1 of 5.*
#
# <details><summary>Hint 1</summary>
#
# One sum, one division. What is the sum where nothing was counted?
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.zeros_like(counts)` has the shape, the dtype and the device of the counts.
# </details>

# %% exercise="$exercise"
def $exercise(counts: torch.Tensor) -> torch.Tensor:
    """The share of each kind.

    counts: float32 [kinds], 0 or more each, at least one kind
    Returns float32 [kinds]: shares that add up to 1; where nothing was counted, what your rule says.
    """
    ### BEGIN SOLUTION
    total = counts.sum()
    if total == 0:
        return torch.zeros_like(counts)
    return counts / total
    ### END SOLUTION


# %% check="$exercise"
check("$exercise", $exercise)

# %% [markdown]
# ### Measure it
#
# **Predict first.** Of the 26 letters, how many occur in the sentence below? And how many of a hundred letters are
# the commonest one?

# %% predict="kinds"
my_kinds = None  # your guess, a number from 1 to 26

# %% predict="commonest"
my_percent_of_the_commonest = None  # your guess, a number from 0 to 100

# %% tags=["demo"] needs=["$exercise"]
from collections import Counter

from effnlp_lab.notebook import plots

SENTENCE = "A quick brown fox jumps over the lazy dog, and a language model is paid for every token that it says of it."
letters = Counter(letter for letter in SENTENCE.lower() if letter.isalpha())
shares = $exercise(torch.tensor(list(letters.values()), dtype=torch.float32))
figure, axes = plots.figure("Letters of a sentence", "letter", "share (%)", "A few letters make up most of a text.")
axes.bar(list(letters), [100 * share for share in shares.tolist()])
plots.show(figure, alt=f"Bars of the shares of {len(letters)} letters, the largest {100 * shares.max():.0f} percent.")
if my_kinds is not None and my_percent_of_the_commonest is not None:
    print(f"You predicted {my_kinds} letters and {my_percent_of_the_commonest}%; "
          f"measured: {len(letters)} and {100 * shares.max():.0f}%.")

# %% tags=["nbval-check-output"]
print("Shares add up to 1, and where nothing was counted a rule decides.")

# %% [markdown]
# ## In your own words
#
# Two texts give shares of the same letters, one of a hundred letters and one of a million. When would you call them
# different? Write 60 to 120 words. A person reads and grades them.

# %% [markdown] written="small_samples"
# **Rubric, for whoever grades** (shares of the points; another answer as good earns them too)
#
# - 0.5: a share of few counts varies from sample to sample, by about the square root of its count.
# - 0.5: names how to tell: an interval, a test, or drawing again.

# %% [markdown]
# ## What you have learned
#
# - Shares need a rule for the case in which there is nothing to share.
#
# ## Read on
#
# - Author, "Title", year: what to read it for.
'''

ANSWERS = '''\
"""Right answers of lab $number that are written differently from the solution: no check may refuse one."""

ANSWERS = {
    "$exercise": [
        \'\'\'
def $exercise(counts):
    return counts / max(1.0, counts.sum().item())
\'\'\',
        \'\'\'
def $exercise(counts):
    whole = sum(counts.tolist())
    return torch.tensor([count / whole if whole else 0.0 for count in counts.tolist()])
\'\'\',
    ],
}

VARIANT_ANSWERS = {
    "$exercise": {
        "nothing=equal": \'\'\'
def $exercise(counts):
    counts = counts if counts.any() else torch.ones_like(counts)
    return counts / counts.sum()
\'\'\',
    },
}
'''

MUTANTS = '''\
# Mutants of the solutions of lab $number that are the same function.
'''

ROOM = '''\
"""$title: the plain definitions of the technique and its kernels. Imports no check, no exercise and no plot."""

from __future__ import annotations

import torch


def shares(counts: torch.Tensor) -> torch.Tensor:
    """The share of each kind in float32 counts [kinds]; zeros where nothing was counted."""
    total = counts.sum()
    return counts / total if total > 0 else torch.zeros_like(counts)
'''
