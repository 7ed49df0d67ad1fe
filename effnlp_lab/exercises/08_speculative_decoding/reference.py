"""Cases, right outputs and known mistakes of lab 08.

Everything random is decided by uniforms that are inputs. They are laid at a distance from whatever they are compared
with, and logits at a distance from where top-k and top-p cut: an answer that sums in another order decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.exercises.compare import Finding, compare
from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng, edit

from .drive import TableModel

Inputs = Mapping[str, Any]
Variant = Mapping[str, str]
SLACK = 1e-5  # of the largest number, for sums and softmaxes in float32
APART = 0.01  # how far logits and sums of probabilities stay from where a cut decides
TRIES = 2000


class NoSuchCase(RuntimeError):
    """No random input was found that has what a case is to show."""


def near(got: Any, want: Tensor, path: str) -> Finding | None:
    """Compare float32 numbers with exact ones, letting each be off by `SLACK` of the largest."""
    largest = want.abs().max().item()
    return compare(got, want, want + SLACK / 2 * largest, torch.float32, path=path)


def first_finding(outputs: Mapping[str, Any], expected: Mapping[str, Any], words: Mapping[str, str]) -> Finding | None:
    """The first output that is not the expected one, exactly, by its name in words."""
    for name, path in words.items():
        if name in expected and (found := compare(outputs[name], expected[name], path=path)):
            return found
    return None


def from_scripts(rng: Rng, scripts: Sequence[str], vocabulary: int = 7) -> dict[str, Tensor]:
    """p, q, drafts and uniforms of rows in which each draft is kept ("k") or rejected ("r").

    Capital letters: "K" is kept with a uniform of almost 1, its token being likelier under p than under q; "Z" is
    rejected with a uniform of exactly 0, its token having probability 0 under p.
    """
    rows = [[_one_draft(rng, letter, vocabulary) for letter in script] for script in scripts]
    p, q, drafts, uniforms = ([[one[i] for one in row] for row in rows] for i in range(4))
    return {
        "p": torch.stack([torch.stack(row) for row in p]),
        "q": torch.stack([torch.stack(row) for row in q]),
        "drafts": torch.tensor(drafts),
        "uniforms": torch.tensor(uniforms, dtype=torch.float32),
    }


def _one_draft(rng: Rng, letter: str, vocabulary: int) -> tuple[Tensor, Tensor, int, float]:
    for _ in range(TRIES):
        q = rng.randn(vocabulary).softmax(-1)
        p = rng.randn(vocabulary).softmax(-1)
        token = rng.int(0, vocabulary - 1)
        if letter == "Z":
            p[token] = 0.0
            p /= p.sum()
            return p, q, token, 0.0
        ratio = (p[token] / q[token]).item()
        if letter == "K" and ratio > 1.1:
            return p, q, token, rng.float(0.95, 0.999)
        if letter == "k" and 0.3 < ratio < 0.9:
            return p, q, token, ratio * rng.float(0.3, 0.9)
        if letter == "r" and ratio < 0.6:
            return p, q, token, ratio + (1 - ratio) * rng.float(0.1, 0.6)
    raise NoSuchCase(letter)


class AcceptDrafts(Reference):
    exercise = "accept_drafts"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, *scripts, wanted="accepted", single=False):
            inputs = from_scripts(rng, scripts)
            if single:
                inputs = {key: value[0] for key, value in inputs.items()}
            return Case(name, {**inputs, "wanted": wanted}, wanted)

        yield case("all drafts kept", "kkkk", single=True)
        yield case("the first draft rejected", "rrr", single=True)
        yield case("kept, rejected, then two that would be kept", "krkk", single=True)
        yield case("some likelier under the target", "KkKr", single=True)
        yield case("a batch", *rng.shuffled(["kkk", "krk", "rkk", "kkr"]))
        yield case("a batch of one draft each", *rng.shuffled(["k", "r", "K"]))
        yield case("probability 0 under the target, and a uniform of exactly 0", "kZk", single=True)
        batches = case("two batches", "kkr", "kkk", "rkr", "KKk", "krk", "kkk")
        for name in ("p", "q", "drafts", "uniforms"):
            batches.inputs[name] = batches.inputs[name].unflatten(0, (2, 3))
        yield batches
        greedy = case("greedy: all probability on one token", "kkkk", single=True)
        agreed = rng.int(1, 3)
        best = torch.tensor(rng.ints(4, 0, 6))
        drafts = torch.where(torch.arange(4) == agreed, (best + rng.int(1, 6)) % 7, best)
        greedy.inputs["p"] = torch.nn.functional.one_hot(best, 7).float()
        greedy.inputs["q"] = torch.nn.functional.one_hot(drafts, 7).float()
        greedy.inputs["drafts"] = drafts
        yield greedy
        yield case("tested: all were kept", "kkk", wanted="tested", single=True)
        yield case("tested: the first was rejected", "rkkk", wanted="tested", single=True)
        yield case("tested: the last was rejected", "kkr", wanted="tested", single=True)
        yield case("tested: a batch", *rng.shuffled(["kkkk", "krkk", "kkrk"]), wanted="tested")

    def expected(self, inputs, variant):
        p, q, drafts, uniforms = (inputs[name] for name in ("p", "q", "drafts", "uniforms"))
        gamma, size = drafts.shape[-1], p.shape[-1]
        accepted = []
        for rows in zip(
            p.double().reshape(-1, gamma, size).tolist(), q.double().reshape(-1, gamma, size).tolist(),
            drafts.reshape(-1, gamma).tolist(), uniforms.double().reshape(-1, gamma).tolist(), strict=True,
        ):  # fmt: skip
            kept = [bool(u < a[x] / b[x]) for a, b, x, u in zip(*rows, strict=True)]
            accepted.append((kept + [False]).index(False))
        accepted = torch.tensor(accepted, device=drafts.device).view(drafts.shape[:-1])
        if inputs["wanted"] == "accepted":
            return {"accepted": accepted}
        return {"accepted": accepted, "tested": torch.where(accepted == gamma, gamma, accepted + 1)}

    def verify(self, inputs, outputs, expected, variant):
        return first_finding(outputs, expected, {"accepted": "your accepted", "tested": "your tested"})

    _KEPT = "uniforms * at_q < at_p"
    _TESTED = "(accepted + 1).clamp(max=drafts.shape[-1])"
    mistakes = (
        Mistake(
            "inequality reversed",
            "The inequality is reversed: a draft is kept while u < p / q, and rejected where u is larger.",
            edit(_KEPT, "uniforms * at_q > at_p"),
        ),
        Mistake(
            "the ratio upside down",
            "Your ratio is upside down: a draft is kept with probability p / q, the target's over the drafter's.",
            edit(_KEPT, "uniforms * at_p < at_q"),
        ),
        Mistake(
            "p alone",
            "You compare with p alone: the draft came up with probability q, so it is kept with probability p / q.",
            edit(_KEPT, "uniforms < at_p"),
        ),
        Mistake(
            "no coin",
            "You keep a draft only where p >= q: where p is smaller it is still kept with probability p / q.",
            edit(_KEPT, "at_q <= at_p"),
        ),
        Mistake(
            "the target's best token",
            "You keep a draft where it is the target's likeliest token: that is greedy, whatever the uniforms say.",
            edit(_KEPT, "p.argmax(-1) == drafts"),
        ),
        Mistake(
            "kept at probability 0",
            "A draft to which the target gives probability 0 is never kept, not with a uniform of exactly 0 either: "
            "compare with <.",
            edit(_KEPT, "uniforms * at_q <= at_p"),
        ),
        Mistake(
            "kept after a rejection",
            "You count drafts behind a rejected one: they continue a text that was thrown away.",
            edit("kept.cumprod(-1).sum(-1)", "kept.sum(-1)"),
        ),
        Mistake(
            "nothing rejected",
            "Where no draft is rejected all gamma are accepted: argmax over nothing but zeros is 0.",
            edit("kept.cumprod(-1).sum(-1)", "(~kept).long().argmax(-1)"),
        ),
        Mistake(
            "never tested",
            "You count drafts that were never tested: what lies behind the first rejection was not looked at, and "
            "counting it lowers the acceptance rate.",
            edit(_TESTED, "torch.full_like(accepted, drafts.shape[-1])"),
        ),
        Mistake(
            "the rejected one left out",
            "The rejected draft was tested too: without it the acceptance rate is always 1.",
            edit(_TESTED, "accepted"),
        ),
        Mistake(
            "one too many",
            "Where all gamma drafts are kept, gamma were tested: there is no draft behind the last.",
            edit(_TESTED, "accepted + 1"),
        ),
    )


class AdjustedDistribution(Reference):
    exercise = "adjusted_distribution"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def pair(*shape, sharp=1.0):
            for _ in range(TRIES):
                p, q = rng.randn(*shape, 8).softmax(-1), rng.randn(*shape, 8, scale=sharp).softmax(-1)
                if ((p - q).clamp(min=0).sum(-1) > 0.1).all():
                    return {"p": p, "q": q}
            raise NoSuchCase("pair")

        yield Case("one distribution", pair(), "rest")
        yield Case("a batch", pair(rng.int(3, 5)), "rest")
        yield Case("a batch of sequences", pair(2, 3), "rest")
        yield Case("a drafter that is too sure", pair(3, sharp=3.0), "rest")
        cut = pair(3)
        for name in ("p", "q"):
            gone = rng.uniform(3, 8) < 0.4
            gone[:, rng.int(0, 7)] = False
            cut[name] = cut[name].masked_fill(gone, 0.0)
            cut[name] = cut[name] / cut[name].sum(-1, keepdim=True)
        cut["p"][0], cut["q"][0] = torch.eye(8)[0], torch.eye(8)[1]
        cut["p"][1:] = cut["p"][1:].flip(0)
        if ((cut["p"] - cut["q"]).clamp(min=0).sum(-1) < 1e-3).any():
            cut["p"] = torch.eye(8)[[0, 2, 3]]
            cut["q"] = torch.full((3, 8), 0.125)
        yield Case("tokens of probability 0", cut, "rest")
        same = pair()
        yield Case("p equals q", {"p": same["p"], "q": same["p"].clone()}, "nothing left")
        mixed = pair(4)
        at = rng.int(0, 3)
        mixed["q"][at] = mixed["p"][at]
        yield Case("p equals q in one row of a batch", mixed, "nothing left")
        less = pair(2)
        less["q"][0] = less["p"][0] * 1.0005  # as rounding may have it: nowhere is p above q
        yield Case("p nowhere above q", less, "nothing left")

    def expected(self, inputs, variant):
        p, q = inputs["p"].double(), inputs["q"].double()
        rest = torch.where(p > q, p - q, 0.0)
        totals = rest.sum(-1, keepdim=True)
        return torch.where(totals == 0, p, rest / totals.clamp(min=1e-30))

    def verify(self, inputs, outputs, expected, variant):
        return near(outputs, expected, "your answer")

    _REST = "(p - q).clamp(min=0)"
    _RETURN = "torch.where(total > 0, rest / total, p)"
    mistakes = (
        Mistake(
            "not normalized",
            "What is left of p does not add up to 1: divide by its sum.",
            edit(_RETURN, "torch.where(total > 0, rest, p)"),
        ),
        Mistake(
            "negative probabilities",
            "Where q is above p nothing is left: max(0, p - q), or probabilities become negative.",
            edit(_REST, "p - q"),
        ),
        Mistake(
            "the other difference",
            "You subtract p from q: what is missing from the accepted drafts is max(0, p - q).",
            edit(_REST, "(q - p).clamp(min=0)"),
        ),
        Mistake(
            "absolute difference",
            "You take |p - q|: tokens that the drafter gives too often would come up once more.",
            edit(_REST, "(p - q).abs()"),
        ),
        Mistake(
            "p itself",
            "You return p: after a rejection that gives tokens that the drafter likes too often; it is "
            "norm(max(0, p - q)).",
            edit(_RETURN, "p"),
        ),
        Mistake(
            "softmax",
            "To normalize is to divide by the sum: a softmax gives probability to tokens that have none left.",
            edit(_RETURN, "torch.where(total > 0, rest.softmax(-1), p)"),
        ),
        Mistake(
            "one sum for all rows",
            "You divide by the sum over all rows: each row is a distribution of its own.",
            edit("rest.sum(-1, keepdim=True)", "rest.sum()"),
        ),
        Mistake(
            "nothing left",
            "Where p is nowhere above q nothing is left, and 0 / 0 is NaN: return p there.",
            edit(_RETURN, "rest / total"),
        ),
        Mistake(
            "zeros",
            "Where p is nowhere above q you return zeros, of which no token can be drawn: return p there.",
            edit(_RETURN, "rest / total.clamp(min=1e-9)"),
        ),
    )


def shaped(
    logits: Tensor, temperature: float, top_k: int, top_p: float, slip: str = ""
) -> tuple[list[list[float]], float]:
    """The exact distribution of each row of logits [..., vocabulary], and how near a decision came to its threshold.

    slip: "plain top-p" takes top-p's sums before the temperature, "top-p of all" before top-k.
    """
    found, apart = [], math.inf
    for row in logits.detach().cpu().double().reshape(-1, logits.shape[-1]).tolist():
        order = sorted(range(len(row)), key=lambda i, row=row: -row[i])
        if temperature == 0:
            apart = min(apart, row[order[0]] - row[order[1]])
            found.append([float(i == order[0]) for i in range(len(row))])
            continue
        heated = [x / temperature for x in row]
        chances = softmax(heated)
        kept = set(order)
        if 0 < top_k < len(row):
            least = heated[order[top_k - 1]]
            kept = {i for i in order if heated[i] >= least}
            apart = min([apart, *(least - heated[i] for i in order if i not in kept)])
        weighed = softmax([x if i in kept else -math.inf for i, x in enumerate(heated)])
        if top_p < 1:
            seen = {"": weighed, "plain top-p": softmax(row), "top-p of all": chances}[slip]
            sums = list(accumulate(seen[i] for i in order if i in kept))
            apart = min([apart, *(abs(x - top_p) for x in sums)])
            reached = sum(x < top_p for x in sums)  # tokens before the one that reaches it
            kept = set([i for i in order if i in kept][: reached + 1])
            pairs = [(a, b) for a, b in zip(order, order[1:], strict=False)]
            apart = min([apart, *(row[a] - row[b] for a, b in pairs)])  # a tie would leave the order open
        total = sum(weighed[i] for i in kept)
        found.append([weighed[i] / total if i in kept else 0.0 for i in range(len(row))])
    return found, apart


def softmax(row: list[float]) -> list[float]:
    most = max(row)
    weights = [math.exp(x - most) for x in row]
    total = math.fsum(weights)
    return [x / total for x in weights]


class SamplingDistribution(Reference):
    exercise = "sampling_distribution"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, *shape, temperature=1.0, top_k=0, top_p=1.0, scale=1.5, dtype=torch.float32, telling=()):
            """telling: slips that have to show, in another distribution."""
            settings = (temperature, top_k, top_p)
            for _ in range(TRIES):
                logits = rng.randn(*shape, 9, scale=scale, dtype=dtype)
                right, apart = shaped(logits, *settings)
                if apart > APART and all(shaped(logits, *settings, slip)[0] != right for slip in telling):
                    given = {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p}
                    return Case(name, given, part)
            raise NoSuchCase(name)

        yield case("T = 1, nothing cut", "temperature", 3)
        yield case("T = 1.7, sequences", "temperature", 2, 3, temperature=1.7)
        yield case("one distribution", "temperature", temperature=0.8)
        yield case("greedy, sequences", "temperature", 2, 3, temperature=0.0)
        yield case("large logits", "temperature", 3, scale=300.0, temperature=1.3)
        half = rng.choice([torch.float16, torch.bfloat16])
        yield case("half precision", "temperature", 2, 3, dtype=half, temperature=0.7)
        yield case("top-k 1", "top-k", 2, top_k=1)
        yield case("top-k 4, sequences, T = 2", "top-k", 2, 2, top_k=4, temperature=2.0)
        yield case("top-k of the whole vocabulary", "top-k", 2, top_k=9)
        yield case("top-k beyond the vocabulary", "top-k", 2, top_k=rng.int(10, 50))
        tied = case("two equal logits at the k-th place", "top-k", top_k=4)
        order = tied.inputs["logits"].argsort(descending=True)
        tied.inputs["logits"][order[4]] = tied.inputs["logits"][order[3]].item()
        yield tied
        yield case("top-p 0.5, sequences", "top-p", 2, 3, top_p=0.5)
        yield case("top-p that one token reaches", "top-p", 2, top_p=0.05)
        yield case("top-p of one distribution", "top-p", top_p=0.8)
        yield case("top-p after T = 2", "top-p", 2, temperature=2.0, top_p=0.7, telling=["plain top-p"])
        yield case("top-p after top-k", "top-p", top_k=4, top_p=0.8, scale=0.7, telling=["top-p of all"])
        both = ["plain top-p", "top-p of all"]
        yield case("all three", "top-p", 2, temperature=0.6, top_k=5, top_p=0.75, scale=0.8, telling=both)

    def expected(self, inputs, variant):
        logits = inputs["logits"]
        rows, _ = shaped(logits, inputs["temperature"], inputs["top_k"], inputs["top_p"])
        return torch.tensor(rows, dtype=torch.float64, device=logits.device).view(logits.shape)

    def verify(self, inputs, outputs, expected, variant):
        return near(outputs, expected, "your distribution")

    _SOFTMAX = "p, order = logits.softmax(-1).sort(descending=True)"
    _BEFORE = "before = p.cumsum(-1) - p"
    _OTHERS = "seen = whole.gather(-1, order)\n    before = seen.cumsum(-1) - seen"
    mistakes = (
        Mistake(
            "multiplied",
            "You multiply by the temperature, which makes a low one flat: divide the logits.",
            edit("logits / temperature", "logits * temperature"),
        ),
        Mistake(
            "no temperature",
            "The temperature does nothing: divide the logits by it before all else.",
            edit("    logits = logits / temperature\n", ""),
        ),
        Mistake(
            "no greedy",
            "Temperature 0 divides by 0: it means greedy, all probability on the largest logit.",
            edit(
                "    if temperature == 0:\n        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()\n", ""
            ),
        ),
        Mistake(
            "half precision",
            "You compute in half precision: probabilities, and the sums of top-p above all, need float32.",
            edit("    logits = logits.float()\n", ""),
        ),
        Mistake(
            "over positions",
            "Your softmax runs over positions: a distribution is over the vocabulary, the last dimension.",
            edit("logits.softmax(-1)", "logits.softmax(0)"),
        ),
        Mistake(
            "top-k of none",
            "top_k = 0 means that nothing is cut: you ask for the 0-th largest.",
            edit("0 < top_k < logits.shape[-1]", "top_k < logits.shape[-1]"),
        ),
        Mistake(
            "top-k beyond the vocabulary",
            "top_k may exceed the vocabulary: then nothing is cut.",
            edit("0 < top_k < logits.shape[-1]", "0 < top_k"),
        ),
        Mistake(
            "one too few",
            "You keep only tokens above the k-th largest: the k-th stays, and what is equal to it.",
            edit("logits < least", "logits <= least"),
        ),
        Mistake(
            "cut to logit 0",
            "A logit of 0 is not a probability of 0: cut tokens get -inf.",
            edit("-math.inf", "0.0"),
        ),
        Mistake(
            "no top-k",
            "top_k does nothing in your answer.",
            edit("0 < top_k < logits.shape[-1]", "False"),
        ),
        Mistake(
            "no top-p",
            "top_p does nothing in your answer.",
            edit("before >= top_p", "before >= 2.0"),
        ),
        Mistake(
            "without the one that reaches it",
            "You cut the token that reaches top_p: it belongs to the set, which would not reach top_p without it.",
            edit("before >= top_p", "before + p >= top_p"),
        ),
        Mistake(
            "the unlikely ones",
            "You sort upwards, and keep the unlikely tokens: top-p keeps the likeliest.",
            edit("sort(descending=True)", "sort()"),
        ),
        Mistake(
            "left sorted",
            "Your probabilities are in the order of sorting: bring each back to its token.",
            edit("    p = torch.zeros_like(p).scatter(-1, order, p)\n", ""),
        ),
        Mistake(
            "not normalized",
            "After top-p the probabilities do not add up to 1: divide by their sum.",
            edit("p / p.sum(-1, keepdim=True)", "p"),
        ),
        Mistake(
            "top-p before temperature",
            "Your top-p sums probabilities at temperature 1: the temperature comes first, then top-k, then top-p.",
            (
                edit("    logits = logits / temp", "    whole = logits.softmax(-1)\n    logits = logits / temp"),
                edit(_BEFORE, _OTHERS),
            ),
        ),
        Mistake(
            "top-p before top-k",
            "Your top-p sums probabilities from before top-k: what top-k left is normalized first.",
            (
                edit("    if 0 < top_k", "    whole = logits.softmax(-1)\n    if 0 < top_k"),
                edit(_BEFORE, _OTHERS),
            ),
        ),
    )


def order_of(size: int, variant: Variant) -> list[int]:
    """The tokens in the order in which the variant adds up their weights."""
    up = list(range(size))
    return {"first": up, "last": up[::-1], "even": up[::2] + up[1::2], "odd": up[1::2] + up[::2]}[variant["draw_from"]]


def drawn(weights: Sequence[float], uniform: float, variant: Variant) -> int:
    """The first token whose cumulative weight, in the variant's order, exceeds uniform * total."""
    order = order_of(len(weights), variant)
    sums = list(accumulate(weights[token] for token in order))
    return order[next(i for i, x in enumerate(sums) if x > uniform * sums[-1])]


def uniform_for(weights: Sequence[float], token: int, variant: Variant) -> float:
    """The uniform in the middle of those that draw the token."""
    order = order_of(len(weights), variant)
    before = sum(weights[x] for x in order[: order.index(token)])
    return (before + weights[token] / 2) / sum(weights)


def rest_of(p: Sequence[float], q: Sequence[float]) -> list[float]:
    left = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
    return left if sum(left) > 0 else list(p)


class SpeculativeStep(Reference):
    exercise = "speculative_step"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, script, **more):
            return Case(name, step_inputs(rng, variant, script, **more), part)

        yield case("three drafts, all kept", "accepted", "kkk")
        yield case("one draft, kept", "accepted", "k")
        yield case("the first of four rejected", "rejected", "rkkk")
        yield case("rejected in the middle", "rejected", "kkrk")
        yield case("the last one rejected", "rejected", "kkr", length=1)
        yield case("one draft, rejected", "rejected", "r", length=rng.int(2, 6))
        yield case("T = 0.4", "sampling", "kkr", settings=(0.4, 0, 1.0), telling=True)
        yield case("T = 2, top-k 4, top-p 0.9", "sampling", "krk", settings=(2.0, 4, 0.9), telling=True)
        yield case("top-p 0.8", "sampling", "krk", settings=(1.0, 0, 0.8))
        yield case("greedy, all agreed", "sampling", "kkk", settings=(0.0, 0, 1.0))
        yield case("greedy, the second differs", "sampling", "krkk", settings=(0.0, 0, 1.0))

    def expected(self, inputs, variant):
        large, small = TableModel(*inputs["target"]), TableModel(*inputs["drafter"])
        settings = (inputs["temperature"], inputs["top_k"], inputs["top_p"])
        uniforms, gamma, tokens = inputs["uniforms"].double().tolist(), inputs["gamma"], inputs["prefix"]
        q = []
        for u in uniforms[:gamma]:
            q.append(shaped(small(tokens)[-1], *settings)[0][0])
            tokens = torch.cat([tokens, tokens.new_tensor([drawn(q[-1], u, variant)])])
        p = shaped(large(tokens)[-gamma - 1 :], *settings)[0]
        drafts = tokens[-gamma:].tolist()
        accepted, token = outcome(p, q, drafts, uniforms[gamma : 2 * gamma], uniforms[2 * gamma], variant)
        return {
            "drafts": tokens[-gamma:],
            "new": tokens.new_tensor([*drafts[:accepted], token]),
            "tested": min(accepted + 1, gamma),
        }

    def verify(self, inputs, outputs, expected, variant):
        words = {"drafts": "your drafts", "new": "your new tokens", "tested": "your tested"}
        found = first_finding(outputs, expected, words)
        if found is None and outputs["target calls"] != 1:
            found = Finding(
                f"the tokens are right, and the target ran {outputs['target calls']} times: one pass over the prefix "
                "and all drafts gives every distribution that is needed, and that is what makes it fast"
            )
        return found

    _DRAW = "        q.append(shaped(drafter(tokens)[-1]))\n        tokens = torch.cat([tokens, draw(q[-1], u)])"
    _P = "shaped(target(tokens)[-gamma - 1 :])"
    _REST = "    if accepted < gamma:\n        last = adjusted_distribution(p[accepted], q[accepted])\n"
    mistakes = (
        Mistake(
            "resampled from p",
            "After a rejection you draw from p: then tokens that the drafter likes come too often. "
            "Draw from norm(max(0, p - q)).",
            edit(_REST, "    if accepted < gamma:\n        last = p[accepted]\n"),
        ),
        Mistake(
            "bonus token lost",
            "Where all drafts are kept you return gamma tokens: the target's pass has given a distribution for one "
            "more, so draw it.",
            edit(
                "    token = draw(last,",
                "    if accepted == gamma:\n        return drafts, drafts, tested\n    token = draw(last,",
            ),
        ),
        Mistake(
            "q before temperature",
            "You test with a q from before temperature, top-k and top-p: q is the distribution that the drafts were "
            "drawn from.",
            edit(
                _DRAW,
                "        q.append(drafter(tokens)[-1].softmax(-1))\n"
                "        tokens = torch.cat([tokens, draw(shaped(drafter(tokens)[-1]), u)])",
            ),
        ),
        Mistake(
            "drafts before temperature",
            "Your drafts are drawn before temperature, top-k and top-p: that keeps the target's distribution, and is "
            "rarely accepted. Shape the drafter's logits as the target's.",
            edit(
                _DRAW,
                "        q.append(drafter(tokens)[-1].float().softmax(-1))\n"
                "        tokens = torch.cat([tokens, draw(q[-1], u)])",
            ),
        ),
        Mistake(
            "p before temperature",
            "Your p is from before temperature, top-k and top-p: the output would have that distribution.",
            edit(_P, "target(tokens)[-gamma - 1 :].softmax(-1)"),
        ),
        Mistake(
            "gamma parallel paths",
            "You draw gamma tokens side by side after the prefix: each draft continues the one before it. It is one "
            "path of gamma tokens, not gamma parallel paths.",
            edit("drafter(tokens)[-1]", "drafter(prefix)[-1]"),
        ),
        Mistake(
            "one place late",
            "Your p is shifted by one: the target's logits at a token say what follows it, so the first draft is "
            "tested with those at the last token of the prefix.",
            edit(_P, "shaped(target(tokens)[-gamma - 1 :].roll(-1, 0))"),
        ),
        Mistake(
            "a pass for each draft",
            "You run the target once for each draft, which costs what plain decoding costs: one pass reads them all.",
            edit(
                _P,
                "torch.stack([shaped(target(tokens[: len(tokens) - gamma + i])[-1]) for i in range(gamma + 1)])",
            ),
        ),
        Mistake(
            "uniforms used twice",
            "You test drafts with the uniforms that they were drawn with: what came up and what is kept would hang "
            "together. The next gamma uniforms are for that.",
            edit("uniforms[gamma : 2 * gamma]", "uniforms[:gamma]"),
        ),
        Mistake(
            "last uniform",
            "The token after the drafts is drawn with the last uniform, and you take another.",
            edit("uniforms[-1]", "uniforms[gamma]"),
        ),
        Mistake(
            "rejected token stays",
            "The rejected draft is still in your output: the token drawn in its place replaces it.",
            edit("drafts[:accepted], token", "drafts[: accepted + 1], token"),
        ),
        Mistake(
            "behind the last draft",
            "After a rejection you draw from the distribution behind the last draft: it continues a text that was "
            "thrown away.",
            edit(_REST, ""),
        ),
        Mistake(
            "likeliest drafts",
            "You draft the drafter's likeliest token: the test with p / q is right only for drafts that are drawn "
            "from q.",
            edit("draw(q[-1], u)", "q[-1].argmax().view(1)"),
        ),
        Mistake(
            "never tested",
            "You return gamma as tested: drafts behind the first rejection were never looked at.",
            edit("token]), drafts, tested", "token]), drafts, gamma"),
        ),
    )


def outcome(p, q, drafts, tests, final, variant: Variant) -> tuple[int, int]:
    """How many drafts are accepted, and the token that follows them."""
    accepted, gamma = 0, len(drafts)
    while accepted < gamma and tests[accepted] < p[accepted][drafts[accepted]] / q[accepted][drafts[accepted]]:
        accepted += 1
    last = p[gamma] if accepted == gamma else rest_of(p[accepted], q[accepted])
    return accepted, drawn(last, final, variant)


def step_inputs(
    rng: Rng,
    variant: Variant,
    script: str,
    *,
    length: int = 3,
    settings: tuple[float, int, float] = (1.0, 0, 1.0),
    telling: bool = False,
    vocabulary: int = 9,
) -> dict[str, Any]:
    """Models and uniforms for a step whose drafts are kept ("k") or rejected ("r") one after another.

    After a rejection the last uniform gives another token from p, and from the distribution behind the last draft.
    telling: the first draft, the test and the last token tell whether distributions were shaped by the settings.
    """
    for _ in range(TRIES):
        try:
            return _step_inputs(rng, variant, script, length, settings, telling, vocabulary)
        except NoSuchCase:
            continue
    raise NoSuchCase(script)


def _step_inputs(rng, variant, script, length, settings, telling, size) -> dict[str, Any]:
    gamma, greedy = len(script), settings[0] == 0
    tables = [[rng.randn(size, size, scale=0.5), rng.randn(size, size, scale=0.5), None] for _ in range(2)]
    places = [rng.randn(length + gamma, size) for _ in range(2)]
    tables[0][2], tables[1][2] = places
    large, small = (TableModel(*each) for each in tables)
    prefix = torch.tensor(rng.ints(length, 0, size - 1))
    tokens, draws, tests = prefix, [], []
    p, q, raw_p, raw_q, drafts = [], [], [], [], []
    for letter in script:
        for _ in range(60):
            at = len(tokens) - 1
            places[1][at] = rng.randn(size)
            places[0][at] = places[1][at] + rng.randn(size, scale=0.2 if greedy and letter == "k" else 1.2)
            large_logits, small_logits = large(tokens)[-1], small(tokens)[-1]
            (p_here,), p_apart = shaped(large_logits, *settings)
            (q_here,), q_apart = shaped(small_logits, *settings)
            fit = [x for x in range(size) if q_here[x] > 0.05 and _fits(letter, p_here[x] / q_here[x])]
            if telling:
                raw_p.append(softmax(large_logits.tolist()))
                raw_q.append(softmax(small_logits.tolist()))
            if telling and not drafts:
                fit = [x for x in fit if drawn(raw_q[-1], uniform_for(q_here, x, variant), variant) != x]
            if fit and min(p_apart, q_apart) > APART:
                break
            del raw_p[len(drafts) :], raw_q[len(drafts) :]
        else:
            raise NoSuchCase(letter)
        token = rng.choice(fit)
        ratio = min(1.0, p_here[token] / q_here[token])
        tests.append(ratio * rng.float(0.3, 0.8) if letter == "k" else ratio + (1 - ratio) * rng.float(0.3, 0.8))
        draws.append(uniform_for(q_here, token, variant))
        p.append(p_here)
        q.append(q_here)
        drafts.append(token)
        tokens = torch.cat([tokens, torch.tensor([token])])
    last_logits = large(tokens)[-1]
    (p_here,), apart = shaped(last_logits, *settings)
    if apart <= APART:
        raise NoSuchCase("last")
    p.append(p_here)
    accepted = (script + "r").index("r")
    last = p[gamma] if accepted == gamma else rest_of(p[accepted], q[accepted])
    for token in rng.shuffled([x for x in range(size) if last[x] > 0.05 * sum(last)]):
        final = uniform_for(last, token, variant)
        if accepted < gamma and not greedy and token in (drawn(p[i], final, variant) for i in (accepted, gamma)):
            continue
        if telling:
            slips = ([*raw_p, softmax(last_logits.tolist())], q), (p, raw_q)
            if (accepted, token) in (outcome(*slip, drafts, tests, final, variant) for slip in slips):
                continue
        break
    else:
        raise NoSuchCase("the last token does not tell")
    temperature, top_k, top_p = settings
    return {
        "target": tables[0], "drafter": tables[1], "prefix": prefix, "gamma": gamma,
        "uniforms": torch.tensor([*draws, *tests, final]),
        "temperature": temperature, "top_k": top_k, "top_p": top_p,
    }  # fmt: skip


def _fits(letter: str, ratio: float) -> bool:
    return ratio > 0.3 if letter == "k" else ratio < 0.6


class RollBack(Reference):
    exercise = "roll_back"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, accepted, gamma, *, before=4, holes=False, layers=2):
            batch, columns = len(accepted), before + gamma + 1
            held = torch.ones(batch, columns, dtype=torch.bool)
            if holes:
                held[:, :before] = rng.uniform(batch, before) < 0.6
                held[:, before - 2] = False  # a column that no row holds any more
                held[0, 0], held[-1, 1] = False, True
            cache = [
                (rng.randn(batch, 2, columns, 3), rng.randn(batch, 2, columns, 3)) for _ in range(layers)
            ]  # fmt: skip
            inputs = {"cache": cache, "held": held, "accepted": torch.tensor(accepted), "gamma": gamma}
            return Case(name, inputs, part)

        yield case("one of four accepted", "one row", [1], 4)
        yield case("none accepted", "one row", [0], 3, before=rng.int(2, 5))
        yield case("one draft, rejected", "one row", [0], 1, layers=3)
        yield case("nothing before the newest token", "one row", [2], 3, before=0)
        yield case("rows accept differently", "ragged", rng.shuffled([0, 2, 3]), 4)
        yield case("one row accepts all", "ragged", [4, *rng.shuffled([0, 1])], 4)
        yield case("one draft each", "ragged", rng.shuffled([0, 1]), 1, layers=1)
        yield case("holes from earlier steps", "ragged", rng.shuffled([0, 1, 2]), 3, before=6, holes=True)
        yield case("nobody accepts", "ragged", [0, 0, 0], 2, before=5, holes=True)

    def expected(self, inputs, variant):
        gamma, accepted = inputs["gamma"], inputs["accepted"].tolist()
        rows = inputs["held"].tolist()
        start = len(rows[0]) - gamma
        kept = [row[:start] + [i < n for i in range(gamma)] for row, n in zip(rows, accepted, strict=True)]
        width = start + max(accepted)
        held = torch.tensor([row[:width] for row in kept], device=inputs["held"].device)
        cache = [tuple(x[:, :, :width].clone() for x in layer) for layer in inputs["cache"]]
        return {"held": held, "positions": held.sum(1), "cache": cache}

    def verify(self, inputs, outputs, expected, variant):
        words = {
            "held": "your held", "positions": "your next positions", "cache": "your cache (layer, keys or values)",
        }  # fmt: skip
        return first_finding(outputs, expected, words)

    _KEPT = "torch.arange(gamma, device=held.device) < accepted[:, None]"
    _COLUMNS = "held.shape[1] - gamma + int(accepted.max())"
    _LAYER = "(keys[:, :, :columns], values[:, :, :columns])"
    mistakes = (
        Mistake(
            "nothing forgotten",
            "Rejected tokens still count as held: later tokens would attend to a text that was thrown away.",
            edit(f"    kept[:, -gamma:] = {_KEPT}\n", ""),
        ),
        Mistake(
            "the rejected one stays",
            "You hold one draft too many, the rejected one: the token that took its place has not been read yet.",
            edit(_KEPT, "torch.arange(gamma, device=held.device) <= accepted[:, None]"),
        ),
        Mistake(
            "the newest token forgotten",
            "You hold one token too few: the pass has read the newest token and then the drafts, so 1 + accepted stay.",
            (
                edit("kept[:, -gamma:]", "kept[:, -gamma - 1 :]"),
                edit(_KEPT, "torch.arange(gamma + 1, device=held.device) < accepted[:, None]"),
            ),
        ),
        Mistake(
            "the first row decides",
            "You treat all rows as the first: each row accepts its own number.",
            edit("< accepted[:, None]", "< accepted[0]"),
        ),
        Mistake(
            "cut to the shortest",
            "You cut the columns that the row with the fewest accepted drafts does not hold: other rows lose tokens.",
            edit("accepted.max()", "accepted.min()"),
        ),
        Mistake(
            "no column cut",
            "Columns at the end that no row holds are still there: they are read in every pass, and the cache grows "
            "by gamma + 1 a step whatever is accepted.",
            edit(_COLUMNS, "held.shape[1]"),
        ),
        Mistake(
            "values left whole",
            "You cut the keys and leave the values as long as they were.",
            edit(_LAYER, "(keys[:, :, :columns], values)"),
        ),
        Mistake(
            "heads cut",
            "You cut along the heads: the columns are the third dimension, [batch, heads, column, dim].",
            edit(_LAYER, "(keys[:, :columns], values[:, :columns])"),
        ),
        Mistake(
            "columns as positions",
            "The next position of a row is the number of tokens that it holds: columns that it does not hold do not "
            "count, or its rotary angles run ahead.",
            edit("kept.sum(1)", "torch.full_like(accepted, columns)"),
        ),
        Mistake(
            "positions of before",
            "Your next positions count the rejected tokens too.",
            edit("kept.sum(1)", "held.sum(1)"),
        ),
        Mistake(
            "columns as tokens",
            "You take the number of a column for the number of a token: a row with holes from earlier steps holds "
            "fewer tokens than columns.",
            edit(
                f"    kept[:, -gamma:] = {_KEPT}\n",
                "    kept &= torch.arange(held.shape[1]) < (held.sum(1) - gamma + accepted)[:, None]\n",
            ),
        ),
        Mistake(
            "holes filled",
            "You mark columns as held that a row gave up in an earlier step: only the last gamma columns change.",
            edit("    kept = held.clone()\n", "    kept = torch.ones_like(held)\n"),
        ),
        Mistake(
            "in place",
            "You change the caller's held: work on a copy.",
            edit("held.clone()", "held"),
        ),
    )


LECTURE = (
    ("T5-small, T = 0", 7, 0.75, 3.4), ("T5-base, T = 0", 7, 0.8, 2.8), ("T5-large, T = 0", 7, 0.82, 1.7),
    ("T5-small, T = 1", 7, 0.62, 2.6), ("T5-base, T = 1", 5, 0.68, 2.4), ("T5-large, T = 1", 3, 0.71, 1.4),
)  # fmt: skip


class SpeedModel(Reference):
    exercise = "SpeedModel"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, alpha, cost_ratio, *questions):
            inputs = {"alpha": alpha, "cost_ratio": cost_ratio, "questions": [list(q) for q in questions]}
            return Case(name, inputs, part)

        def tokens(*gammas):
            return [("expected_tokens", gamma) for gamma in gammas]

        yield case("some gammas", "tokens", rng.float(0.3, 0.9), 0.1, *tokens(1, 2, rng.int(3, 9)))
        yield case("no drafts", "tokens", rng.float(0.2, 0.8), 0.1, *tokens(0))
        yield case("nothing is ever accepted", "tokens", 0.0, 0.1, *tokens(0, 1, 5))
        yield case("everything is accepted", "tokens", 1.0, 0.1, *tokens(0, 1, 6))
        for _ in range(2):
            gammas = rng.shuffled(range(1, 8))[:2]
            alpha, cost = rng.float(0.3, 0.95), rng.float(0.02, 0.5)
            yield case("speed-ups", "speed-up", alpha, cost, *(("speedup", gamma) for gamma in gammas), ("speedup", 0))
        yield case("a free drafter", "speed-up", rng.float(0.4, 0.8), 0.0, ("speedup", 4))
        yield case("everything is accepted, and costs", "speed-up", 1.0, 0.25, ("speedup", 4), ("best_gamma", 9))
        for name, bounds in {"a cheap drafter": (0.02, 0.1), "a dear drafter": (0.2, 0.4)}.items():
            alpha, cost = _clear(rng, (0.55, 0.9), bounds, 12, lambda best: 0 < best < 12)
            yield case(f"the best gamma, {name}", "speed-up", alpha, cost, ("best_gamma", 12))
        alpha, cost = _clear(rng, (0.85, 0.95), (0.01, 0.03), 3, lambda best: best == 3)
        yield case("the best gamma is the most allowed", "speed-up", alpha, cost, ("best_gamma", 3))
        alpha, cost = _clear(rng, (0.1, 0.4), (0.5, 0.9), 8, lambda best: best == 0)
        yield case("better not to draft at all", "speed-up", alpha, cost, ("best_gamma", 8))
        yield case("none allowed", "speed-up", 0.7, 0.1, ("best_gamma", 0))
        yield case("equal speed-ups: acceptance equals cost", "speed-up", 0.5, 0.5, ("best_gamma", 5))
        yield case("equal speed-ups: nothing accepted, at no cost", "speed-up", 0.0, 0.0, ("best_gamma", 6))
        name, gamma, alpha, measured = rng.choice(LECTURE)
        yield case(f"the lecture's {name}", "inverted", alpha, 0.5, ("implied_cost_ratio", gamma, measured))
        _, gamma, alpha, measured = LECTURE[3]
        yield case(
            "a row that no cost explains", "inverted", alpha, rng.float(0.1, 0.9),
            ("implied_cost_ratio", gamma, measured),
        )  # fmt: skip
        for alpha in (rng.float(0.4, 0.9), 1.0):
            gamma, cost = rng.int(2, 7), rng.float(0.05, 0.4)
            measured = exact_speedup(alpha, cost, gamma)
            yield case("back to the cost", "inverted", alpha, 0.9, ("implied_cost_ratio", gamma, measured))

    def expected(self, inputs, variant):
        alpha, cost = inputs["alpha"], inputs["cost_ratio"]
        found: list[float | int] = []
        for name, *arguments in inputs["questions"]:
            if name == "expected_tokens":
                found.append(exact_tokens(alpha, arguments[0]))
            elif name == "speedup":
                found.append(exact_speedup(alpha, cost, arguments[0]))
            elif name == "best_gamma":
                speeds = [exact_speedup(alpha, cost, gamma) for gamma in range(arguments[0] + 1)]
                found.append(speeds.index(max(speeds)))
            else:
                gamma, measured = arguments
                found.append((exact_tokens(alpha, gamma) / measured - 1) / gamma)
        return found

    def verify(self, inputs, outputs, expected, variant):
        for (name, *arguments), got, want in zip(inputs["questions"], outputs, expected, strict=True):
            told = f"{name}({', '.join(f'{x:g}' for x in arguments)}) at alpha = {inputs['alpha']:.3g}"
            if found := compare(got, want, path=told):
                return found
        return None

    _TOKENS = "sum(self.alpha**i for i in range(gamma + 1))"
    _SPEED = "self.expected_tokens(gamma) / (gamma * self.cost_ratio + 1)"
    _BEST = "max(range(most + 1), key=self.speedup)"
    _IMPLIED = "(self.expected_tokens(gamma) / measured - 1) / gamma"
    mistakes = (
        Mistake(
            "one step too few",
            "Your sum ends at alpha^(gamma - 1): the token after gamma accepted drafts comes on top.",
            edit("range(gamma + 1)", "range(gamma)"),
        ),
        Mistake(
            "accepted drafts alone",
            "You count accepted drafts alone: every step gives one more token, from the target.",
            edit("range(gamma + 1)", "range(1, gamma + 1)"),
        ),
        Mistake(
            "every draft by itself",
            "You give every draft the same chance: the i-th is accepted only where all before it were, alpha^i.",
            edit(_TOKENS, "1 + gamma * self.alpha"),
        ),
        Mistake(
            "everything accepted",
            "At alpha = 1 your formula divides by 0: then a step gives gamma + 1 tokens.",
            edit(_TOKENS, "(1 - self.alpha ** (gamma + 1)) / (1 - self.alpha)"),
        ),
        Mistake(
            "the target is free",
            "The target's own pass is missing from the time of a step: gamma c + 1.",
            edit("(gamma * self.cost_ratio + 1)", "max(gamma * self.cost_ratio, 1e-9)"),
        ),
        Mistake(
            "gamma parallel paths",
            "You count one pass of the drafter a step: drafts are made one after another, each from the one before. "
            "They are not gamma parallel paths, and cost gamma c.",
            edit("gamma * self.cost_ratio + 1", "self.cost_ratio + 1"),
        ),
        Mistake(
            "a pass more",
            "You count gamma + 1 passes of the drafter: the token after the drafts is the target's.",
            edit("gamma * self.cost_ratio + 1", "(gamma + 1) * self.cost_ratio + 1"),
        ),
        Mistake(
            "drafts at any price",
            "gamma = 0 may be the best: where drafts cost more than they bring, do not draft.",
            edit("range(most + 1)", "range(min(most, 1), most + 1)"),
        ),
        Mistake(
            "the most left out",
            "gamma may be as large as `most`, and your search ends below it.",
            edit("range(most + 1)", "range(max(most, 1))"),
        ),
        Mistake(
            "most tokens",
            "You take the gamma with the most tokens a step, which is always the largest: drafts cost time.",
            edit("key=self.speedup", "key=self.expected_tokens"),
        ),
        Mistake(
            "the largest of equals",
            "Of equal speed-ups the smallest gamma is asked for.",
            edit(_BEST, "max(reversed(range(most + 1)), key=self.speedup)"),
        ),
        Mistake(
            "the target's pass",
            "Your cost has the target's own pass in it: subtract the 1 of gamma c + 1.",
            edit(_IMPLIED, "self.expected_tokens(gamma) / measured / gamma"),
        ),
        Mistake(
            "of all drafts",
            "You return the cost of all gamma drafts: divide by gamma.",
            edit(_IMPLIED, "self.expected_tokens(gamma) / measured - 1"),
        ),
        Mistake(
            "upside down",
            "Your quotient is upside down: gamma c + 1 = expected tokens / speed-up.",
            edit("self.expected_tokens(gamma) / measured - 1", "measured / self.expected_tokens(gamma) - 1"),
        ),
        Mistake(
            "never negative",
            "You cut the implied cost at 0: a negative one says that the model does not explain the measurement.",
            edit(_IMPLIED, "max(0.0, (self.expected_tokens(gamma) / measured - 1) / gamma)"),
        ),
    )


def exact_tokens(alpha: float, gamma: int) -> float:
    return math.fsum(alpha**i for i in range(gamma + 1))


def exact_speedup(alpha: float, cost: float, gamma: int) -> float:
    return exact_tokens(alpha, gamma) / (gamma * cost + 1)


def _clear(rng: Rng, alphas, costs, most: int, wanted) -> tuple[float, float]:
    """An acceptance and a cost whose best gamma is wanted, and ahead of all others."""
    for _ in range(TRIES):
        alpha, cost = rng.float(*alphas), rng.float(*costs)
        speeds = [exact_speedup(alpha, cost, gamma) for gamma in range(most + 1)]
        first, second = sorted(speeds, reverse=True)[:2]
        if first > 1.001 * second and wanted(speeds.index(first)):
            return alpha, cost
    raise NoSuchCase("a clear best gamma")


class LookupDraft(Reference):
    exercise = "lookup_draft"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, tokens, gamma, most):
            shift = rng.int(0, 50)
            inputs = {"tokens": torch.tensor([t + shift for t in tokens], dtype=torch.long)}
            return Case(name, {**inputs, "gamma": gamma, "most": most}, part)

        a, b, c, d, e, f, g, h = rng.shuffled(range(1, 40))[:8]
        yield case("three tokens came before", "found", [a, b, c, d, e, f, a, b, c], 3, 3)
        yield case("nothing came before", "found", [a, b, c, d], 3, 3)
        yield case("one token alone", "found", [a], 2, 3)
        yield case("no more than gamma", "found", [a, b, c, d, e, f, g, a], 2, 1)
        yield case("fewer than gamma follow", "found", [c, a, b, d, b], 4, 2)
        yield case("only the last token came before", "found", [a, b, c, d, e, b], 2, 3)
        yield case("a text that begins with what it ends with", "found", [a, b, c, a, b], 1, 2)
        yield case("the longest n-gram decides", "choice", [a, b, c, d, e, c, f, g, b, c], 2, 3)
        yield case("not longer than most", "choice", [a, b, c, d, e, e, b, c, f, f, a, b, c], 2, 2)
        yield case("the latest of two", "choice", [a, b, c, d, a, b, e, f, a, b], 2, 2)
        yield case("the latest that gamma tokens follow", "choice", [a, b, c, d, e, a, b, a, b], 3, 2)
        yield case("the latest that exactly gamma tokens follow", "choice", [b, c, d, b, e, b], 2, 1)
        yield case("one token again and again", "choice", [h, a, a, a, a, a], 3, 3)
        yield case("no occurrence has gamma followers", "choice", [b, a, c, a, a], 6, 1)
        few = [rng.int(0, 2) for _ in range(rng.int(18, 24))]
        yield case("few different tokens", "choice", few, rng.int(2, 5), rng.int(1, 4))

    def expected(self, inputs, variant):
        words, gamma = inputs["tokens"].tolist(), inputs["gamma"]
        best: tuple[tuple[int, int, int], int] | None = None
        for start in range(1, len(words)):  # where a draft could start
            n = 0
            while n < inputs["most"] and start - n - 1 >= 0 and words[start - n - 1] == words[len(words) - n - 1]:
                n += 1
            rank = (n, int(start + gamma <= len(words)), start)
            if n and (best is None or rank > best[0]):
                best = (rank, start)
        return inputs["tokens"][:0] if best is None else inputs["tokens"][best[1] : best[1] + gamma].clone()

    def verify(self, inputs, outputs, expected, variant):
        return compare(outputs, expected, path="your draft")

    _ENDS = "[end for end in range(n, size) if words[end - n : end] == words[size - n :]]"
    mistakes = (
        Mistake(
            "finds itself",
            "The n-gram at the very end finds itself, and nothing follows it: look at earlier places alone.",
            edit("range(n, size) if", "range(n, size + 1) if"),
        ),
        Mistake(
            "the n-gram itself",
            "You draft the n-gram that was found: draft what follows it.",
            edit("tokens[start : start + gamma]", "tokens[start - n : start - n + gamma]"),
        ),
        Mistake(
            "the shortest first",
            "You begin with the shortest n-gram: the longest decides, for it says most about what follows.",
            edit("range(most, 0, -1)", "range(1, most + 1)"),
        ),
        Mistake(
            "the earliest",
            "You take the earliest occurrence: the latest decides.",
            edit("(whole or ends)[-1]", "(whole or ends)[0]"),
        ),
        Mistake(
            "the latest with little behind it",
            "You take the latest occurrence, though fewer than gamma tokens follow it: an earlier one gives more.",
            edit("(whole or ends)[-1]", "ends[-1]"),
        ),
        Mistake(
            "all that follows",
            "You draft more than gamma tokens.",
            edit("tokens[start : start + gamma]", "tokens[start:]"),
        ),
        Mistake(
            "only with gamma behind it",
            "Where no occurrence has gamma tokens behind it you draft nothing: draft what there is.",
            (edit("        if ends:\n", "        if any(end + gamma <= size for end in ends):\n"),),
        ),
    )


class EarlyExit(Reference):
    exercise = "early_exit"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, layers, *shape, threshold=0.4, least=1, scale=2.5):
            logits = rng.randn(layers, *shape, 6, scale=scale)
            for _ in range(TRIES):
                top = logits.double().topk(2, dim=-1).values
                chances = logits.double().softmax(-1).topk(2, dim=-1).values
                gaps = (chances[..., 0] - chances[..., 1] - threshold).abs()
                unclear = (gaps < APART) | (top[..., 0] - top[..., 1] < APART)
                if not unclear.any():
                    return Case(name, {"logits": logits, "threshold": threshold, "least": least}, part)
                logits = torch.where(unclear[..., None], rng.randn(*logits.shape, scale=scale), logits)
            raise NoSuchCase(name)

        def rising(name, part, place, layers=5, **more):
            """Sure from the layer `place` (counted from 0) on, and not before, but that the one after is unsure."""
            one = case(name, part, layers, 3, **more)
            flat, sure = torch.linspace(0, 0.1, 6), torch.zeros(6)
            for layer in range(layers):
                for row in range(3):
                    mixed = torch.tensor(rng.shuffled(range(6)))
                    if layer == place or layer > place + 1:
                        one.inputs["logits"][layer, row] = sure.scatter(0, mixed[:1], 6.0) + flat
                    else:
                        one.inputs["logits"][layer, row] = flat[mixed]
            return one

        yield case("five layers, some positions", "exits", 5, 8)
        yield case("a batch of sequences", "exits", 4, 2, 5, threshold=0.6)
        yield rising("sure after the second layer, unsure after the third", "exits", 1)
        yield case("one position", "exits", 6, threshold=0.3)
        yield rising("sure after the first layer", "exits", 0)
        yield case("never sure enough", "limits", 4, 6, threshold=1.5)
        yield case("least 3 of 5", "limits", 5, 8, threshold=0.2, least=3)
        yield rising("sure before `least`, and not at it", "limits", 1, least=3)
        yield case("least is the last layer", "limits", 3, 4, threshold=0.1, least=3)
        yield case("one layer", "limits", 1, 4)
        certain = case("a threshold of exactly 1, and a layer that is certain", "limits", 3, 4, threshold=0.5)
        certain.inputs["logits"] *= 0.2
        certain.inputs["logits"][1] = torch.eye(6)[torch.tensor(rng.ints(4, 0, 5))] * 500.0
        yield Case(certain.name, {**certain.inputs, "threshold": 1.0}, "limits")

    def expected(self, inputs, variant):
        logits, threshold = inputs["logits"].double(), inputs["threshold"]
        layers, size = logits.shape[0], logits.shape[-1]
        exits, tokens = [], []
        for rows in logits.reshape(layers, -1, size).transpose(0, 1).tolist():
            for layer, row in enumerate(rows, start=1):
                likely = sorted(softmax(row))[-2:]
                if layer == layers or (layer >= inputs["least"] and likely[1] - likely[0] >= threshold):
                    exits.append(layer)
                    tokens.append(row.index(max(row)))
                    break
        found = {"exits": exits, "tokens": tokens}
        return {name: torch.tensor(x, device=logits.device).view(logits.shape[1:-1]) for name, x in found.items()}

    def verify(self, inputs, outputs, expected, variant):
        return first_finding(outputs, expected, {"exits": "your layers passed", "tokens": "your tokens"})

    _SURE = "top[..., 0] - top[..., 1] >= threshold"
    mistakes = (
        Mistake(
            "the likeliest alone",
            "You look at the likeliest token's probability alone: the confidence is its lead over the second.",
            edit(_SURE, "top[..., 0] >= threshold"),
        ),
        Mistake(
            "logits",
            "Your lead is one of logits: take the probabilities, or the threshold means something else in every layer.",
            edit("logits.softmax(-1).topk", "logits.topk"),
        ),
        Mistake(
            "unsure ones leave",
            "Your comparison is reversed: a position leaves where it is sure.",
            edit(_SURE, "top[..., 0] - top[..., 1] < threshold"),
        ),
        Mistake(
            "counted from 0",
            "You return the number of the layer, counted from 0: what is asked for is how many layers were passed.",
            edit("exits + 1", "exits"),
        ),
        Mistake(
            "the last layer's tokens",
            "Your tokens are the last layer's: a position that leaves early takes what it sees there.",
            edit("logits.argmax(-1).gather(0, exits[None])[0]", "logits[-1].argmax(-1)"),
        ),
        Mistake(
            "nobody is sure",
            "A position that is never sure passes all layers: yours leaves after the first.",
            edit("    sure[-1] = True\n", ""),
        ),
        Mistake(
            "least ignored",
            "Every position passes at least `least` layers.",
            edit("    sure[: least - 1] = False\n", ""),
        ),
        Mistake(
            "one layer more",
            "A position may leave after `least` layers, and yours passes one more.",
            edit("sure[: least - 1]", "sure[:least]"),
        ),
    )


class DraftTree(Reference):
    exercise = "DraftTree"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, parents, best=None):
            tokens = distinct_children(rng, parents)
            if part == "path":
                best = best(tokens)
            return Case(name, {"parents": parents, "tokens": tokens, "best": best}, part)

        chain, star = [-1, 0, 1, 2], [-1, 0, 0, 0]
        bushy = [-1, 0, 0, 1, 1, 2, 2, 3, 5]
        grown = [-1, *(rng.int(0, i - 1) for i in range(1, rng.int(7, 10)))]
        yield case("a chain", "mask", chain)
        yield case("a star", "mask", star)
        yield case("two, then two each", "mask", bushy)
        yield case("any tree", "mask", grown)
        yield case("nothing drafted", "mask", [-1])

        def along(parents, path):
            """What the target would take: along `path`, then a token that no node has; elsewhere anything."""

            def best(tokens):
                likes = [rng.choice([*tokens[1:], 90]) if len(tokens) > 1 else 90 for _ in tokens]
                nodes = [0, *path]
                for node, after in zip(nodes, path, strict=False):
                    likes[node] = tokens[after]
                likes[nodes[-1]] = 91
                return likes

            return best

        yield case("the whole chain", "path", chain, along(chain, [1, 2, 3]))
        yield case("the first child is wrong", "path", chain, along(chain, []))
        yield case("the last of three", "path", star, along(star, [3]))
        yield case("down one branch", "path", bushy, along(bushy, [2, 5, 8]))
        yield case("half way down", "path", bushy, along(bushy, [1, 4]))
        yield case("nothing drafted, one token given", "path", [-1], along([-1], []))

        def elsewhere(tokens):
            """The root's favourite is the token of a grandchild, not of a child."""
            likes = [93] * len(tokens)
            likes[0] = tokens[5]
            return likes

        odd = case("a token that only a deeper node has", "path", bushy, lambda tokens: [0] * len(tokens))
        odd.inputs["tokens"][:] = [0, 11, 12, 13, 14, 15, 16, 17, 18]
        odd.inputs["best"] = elsewhere(odd.inputs["tokens"])
        yield odd

        twins = case("two branches with the same token", "path", bushy, lambda tokens: [0] * len(tokens))
        twins.inputs["tokens"][:] = [0, 11, 12, 13, 14, 13, 16, 17, 18]  # nodes 3 and 5 under 1 and 2
        twins.inputs["best"] = [12, 94, 13, 17, 95, 96, 97, 98, 99]
        yield twins

    def expected(self, inputs, variant):
        parents, tokens, best = inputs["parents"], inputs["tokens"], inputs["best"]
        lines = []  # of each node: itself and its ancestors
        for node, parent in enumerate(parents):
            lines.append({node} | (lines[parent] if parent >= 0 else set()))
        if best is None:
            mask = torch.tensor([[other in line for other in range(len(parents))] for line in lines])
            return {"mask": mask.tolist(), "depths": (mask.sum(1) - 1).tolist()}
        path: list[int] = []
        at = 0
        while found := [i for i, parent in enumerate(parents) if parent == at and tokens[i] == best[at]]:
            at = found[0]
            path.append(at)
        return {"path": path, "token": best[at]}

    def verify(self, inputs, outputs, expected, variant):
        words = {"mask": "your mask", "depths": "your depths", "path": "your path", "token": "the token after it"}
        return first_finding(outputs, expected, words)

    mistakes = (
        Mistake(
            "not itself",
            "A node does not see itself in your mask: its own key is among those that it attends to.",
            edit("            seen[node, node] = True\n", ""),
        ),
        Mistake(
            "the parent alone",
            "A node sees its parent alone: it sees all of its ancestors, up to node 0.",
            edit("seen[node] = seen[parent]", "seen[node, parent] = True"),
        ),
        Mistake(
            "all before",
            "Your mask is that of a plain text: nodes of other branches are no part of a node's text.",
            edit("return seen\n", "return torch.ones_like(seen).tril()\n"),
        ),
        Mistake(
            "descendants",
            "Your mask is transposed: a row says what a node sees, its ancestors, and not who sees it.",
            edit("return seen\n", "return seen.T\n"),
        ),
        Mistake(
            "numbers as depths",
            "You number the nodes: siblings stand at the same position, as many tokens after node 0 as they are deep.",
            edit("self.mask().sum(1) - 1", "torch.arange(len(self.parents))"),
        ),
        Mistake(
            "depth from 1",
            "Node 0 has depth 0.",
            edit("self.mask().sum(1) - 1", "self.mask().sum(1)"),
        ),
        Mistake(
            "any node",
            "You follow any node with the right token: only a child of the node where you stand continues its text.",
            edit("self.parents[child] == node and ", ""),
        ),
        Mistake(
            "one level",
            "You stop after one node: go on from there as long as a child has the target's token.",
            edit("                node = child\n", "                node = child\n                break\n"),
        ),
        Mistake(
            "node 0 in the path",
            "Node 0 is in your path: it belongs to the text already.",
            edit("path, node = [], 0", "path, node = [0], 0"),
        ),
        Mistake(
            "the root's token",
            "The token after the path is the target's at the last node of the path, not at node 0.",
            edit("path, best[node]", "path, best[0]"),
        ),
    )


def distinct_children(rng: Rng, parents: list[int]) -> list[int]:
    """Random tokens for a tree's nodes; the children of one node differ."""
    tokens: list[int] = []
    for node, parent in enumerate(parents):
        taken = {tokens[i] for i in range(node) if parents[i] == parent}
        tokens.append(rng.choice([token for token in range(10, 30) if token not in taken]))
    return tokens


def _accept_drafts(p: Tensor, q: Tensor, drafts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """A right `accept_drafts`, for the exercise that builds on it."""
    ratio = (p / q).gather(-1, drafts[..., None])[..., 0]
    rejected = (uniforms >= ratio).long().cumsum(-1) > 0
    accepted = (~rejected).sum(-1)
    return accepted, (accepted + 1).clamp(max=drafts.shape[-1])


def _adjusted_distribution(p: Tensor, q: Tensor) -> Tensor:
    """A right `adjusted_distribution`."""
    left = torch.relu(p - q)
    left = torch.where((left == 0).all(-1, keepdim=True), p, left)
    return left / left.sum(-1, keepdim=True)


def _sampling_distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """A right `sampling_distribution`."""
    rows, _ = shaped(logits, temperature, top_k, top_p)
    return torch.tensor(rows, dtype=torch.float32, device=logits.device).view(logits.shape)


EARLIER = {
    "accept_drafts": _accept_drafts,
    "adjusted_distribution": _adjusted_distribution,
    "sampling_distribution": _sampling_distribution,
}
REFERENCES = {
    cls.exercise: cls()
    for cls in (
        AcceptDrafts, AdjustedDistribution, SamplingDistribution, SpeculativeStep, RollBack, SpeedModel, LookupDraft,
        EarlyExit, DraftTree,
    )
}  # fmt: skip
