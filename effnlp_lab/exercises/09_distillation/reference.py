"""Cases, right outputs and known mistakes of lab 09.

The right losses are torch's own kl_div and cross_entropy in float64, and their gradients are autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effnlp_lab.exercises.compare import Finding, compare
from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng, edit

from .drive import SmallModel, weighed_sum

Inputs = Mapping[str, Any]
Variant = Mapping[str, str]
IGNORED = -100
SLACK, FLOOR = 2e-5, 0.05  # of the largest number, or of FLOOR where all are smaller: for sums of float32 terms


def near(got: Any, want: Tensor, path: str, dtype: torch.dtype = torch.float32, floor: float = FLOOR) -> Finding | None:
    """Compare with exact numbers, letting each be off by `SLACK` of the largest, or of `floor`."""
    finite = want[torch.isfinite(want)]
    largest = max(finite.abs().max().item() if finite.numel() else 0.0, floor)
    return compare(got, want, want + SLACK / 2 * largest, dtype, path=path)


def all_near(
    outputs: Any,
    expected: Mapping[str, Any],
    words: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] | None = None,
    floor: float = FLOOR,
) -> Finding | None:
    """The first output that is not what was expected, by its name in words."""
    for name, path in words.items():
        found = near(outputs[name], expected[name], path, (dtypes or {}).get(name, torch.float32), floor)
        if found:
            return found
    return None


def floor_of(logits: Tensor) -> float:
    """Gradients of divergences are differences of logarithms, which are as large as the logits."""
    return max(FLOOR, 0.05 * logits[torch.isfinite(logits)].abs().max().item())


def exact_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) of each row by torch's kl_div, from logarithms."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


class SoftLoss(Reference):
    exercise = "soft_loss"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, *shape, temperature=1.0, scale=1.5, dtype=torch.float32):
            student, teacher = (rng.randn(*shape, scale=scale, dtype=dtype) for _ in range(2))
            return Case(name, {"student_logits": student, "teacher_logits": teacher, "temperature": temperature}, part)

        yield case("some positions, T = 1", "divergence", rng.int(5, 8), 11)
        yield case("sequences, T = 1", "divergence", 3, rng.int(4, 6), 9)
        yield case("one position", "divergence", 1, 7)
        same = case("a student like its teacher", "divergence", 4, 6)
        same.inputs["student_logits"].copy_(same.inputs["teacher_logits"])
        yield same
        yield case("T = 2", "temperature", 2, 5, 8, temperature=2.0)
        yield case("T = 5", "temperature", 6, 10, temperature=5.0, scale=3.0)
        yield case("T = 0.5", "temperature", 4, 9, temperature=0.5, scale=1.0)
        yield case("sequences of sequences", "temperature", 2, 3, 2, 5, temperature=rng.choice([1.5, 3.0]))
        yield case("large logits", "range", 5, 12, scale=400.0, temperature=2.0)
        yield case("half precision", "range", 2, 4, 30, dtype=torch.float16, temperature=2.0)
        yield case("bfloat16", "range", 2, 4, 30, dtype=torch.bfloat16, temperature=1.5)

    def expected(self, inputs, variant):
        student = inputs["student_logits"].double().requires_grad_()
        temperature = inputs["temperature"]
        log_q = (student / temperature).log_softmax(-1)
        log_p = (inputs["teacher_logits"].double() / temperature).log_softmax(-1)
        with torch.enable_grad():
            loss = exact_kl(log_p, log_q).mean() * temperature**2
        loss.backward()
        return {"loss": loss.detach(), "gradient": student.grad, "teacher learns": False}

    def verify(self, inputs, outputs, expected, variant):
        words = {"loss": "your loss", "gradient": "the gradient of the student's logits"}
        floor = max(floor_of(inputs["student_logits"]), floor_of(inputs["teacher_logits"]))
        found = all_near(outputs, expected, words, {"gradient": inputs["student_logits"].dtype}, floor)
        if found is None and outputs["teacher learns"]:
            found = Finding("the loss is right, and a gradient flows to the teacher's logits too: the teacher is fixed")
        return found

    mistakes = (
        Mistake(
            "arguments swapped",
            "Your arguments are swapped: that is reverse KL. KL(P || Q) weighs with the "
            "teacher's P, and kl_div takes log Q first and P second.",
            (
                edit("log_softmax(student_logits.float()", "log_softmax(teacher_logits.detach().float()"),
                edit("F.softmax(teacher_logits.detach().float()", "F.softmax(student_logits.float()"),
            ),
        ),
        Mistake(
            "mean",
            'reduction="mean" divided by the vocabulary as well: KL is a sum over the vocabulary, and the '
            "mean is over positions alone.",
            edit('reduction="batchmean"', 'reduction="mean"'),
        ),
        Mistake(
            "batchmean of three dimensions",
            "batchmean divides by the first dimension alone, which is the number "
            "of sequences here: flatten to [positions, vocabulary] first.",
            (
                edit("dim=-1).flatten(0, -2)\n    p =", "dim=-1)\n    p ="),
                edit("dim=-1).flatten(0, -2)\n    return", "dim=-1)\n    return"),
            ),
        ),
        Mistake(
            "summed",
            "You add up the positions: the loss is their mean.",
            edit('reduction="batchmean"', 'reduction="sum"'),
        ),
        Mistake(
            "T squared missing",
            "The factor T² is missing: gradients of softened distributions shrink as 1 / T².",
            edit("temperature**2 * ", ""),
        ),
        Mistake(
            "T once",
            "You multiply by T: gradients shrink as 1 / T², so the factor is T².",
            edit("temperature**2 * ", "temperature * "),
        ),
        Mistake(
            "divided by T squared",
            "You divide by T²: the factor makes up for gradients that shrink, so multiply.",
            edit("temperature**2 * ", "temperature**-2 * "),
        ),
        Mistake(
            "student not softened",
            "You soften the teacher alone: both distributions are at temperature T.",
            edit("student_logits.float() / temperature", "student_logits.float()"),
        ),
        Mistake(
            "teacher not softened",
            "You soften the student alone: both distributions are at temperature T.",
            edit("teacher_logits.detach().float() / temperature", "teacher_logits.detach().float()"),
        ),
        Mistake(
            "multiplied by T",
            "You multiply logits by T, which sharpens: divide.",
            (
                edit("student_logits.float() / temperature", "student_logits.float() * temperature"),
                edit("teacher_logits.detach().float() / temperature", "teacher_logits.detach().float() * temperature"),
            ),
        ),
        Mistake(
            "logarithm of a softmax",
            "softmax(...).log() is log 0 where a probability underflows: use log_softmax.",
            edit(
                "F.log_softmax(student_logits.float() / temperature, dim=-1)",
                "F.softmax(student_logits.float() / temperature, dim=-1).log()",
            ),
        ),
        Mistake(
            "softmax over positions",
            "Your softmax runs over positions: a distribution is over the vocabulary, the last dimension.",
            (
                edit("student_logits.float() / temperature, dim=-1", "student_logits.float() / temperature, dim=0"),
                edit(
                    "teacher_logits.detach().float() / temperature, dim=-1",
                    "teacher_logits.detach().float() / temperature, dim=0",
                ),
            ),
        ),
        Mistake(
            "cross-entropy",
            "That is the cross-entropy with soft targets: it has the same gradient, and is larger "
            "by the teacher's entropy, so that it never reaches 0.",
            edit('F.kl_div(log_q, p, reduction="batchmean")', "-(p * log_q).sum(-1).mean()"),
        ),
        Mistake(
            "half precision",
            "You compute in half precision: a softmax over a vocabulary and its logarithm need float32.",
            (
                edit("student_logits.float() /", "student_logits /"),
                edit("teacher_logits.detach().float() /", "teacher_logits.detach() /"),
            ),
        ),
        Mistake(
            "the teacher learns",
            "A gradient flows to the teacher: its logits are targets, so detach them.",
            edit("teacher_logits.detach()", "teacher_logits"),
        ),
    )


class DistillationLoss(Reference):
    exercise = "distillation_loss"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, counts, *, length=6, temperature=2.0, weights=(5.0, 2.0, 1.0), spoiled=False):
            """counts: how many tokens of each sequence count, from its beginning."""
            batch, vocabulary, width = len(counts), 10, 7
            labels = torch.tensor([rng.ints(length, 0, vocabulary - 1) for _ in counts])
            labels[0, 0] = 0
            padded = torch.arange(length) >= torch.tensor(counts)[:, None]
            labels[padded] = IGNORED
            inputs = {
                "student_logits": rng.randn(batch, length, vocabulary, scale=1.5),
                "teacher_logits": rng.randn(batch, length, vocabulary, scale=1.5),
                "student_hidden": rng.randn(batch, length, width),
                "teacher_hidden": rng.randn(batch, length, width),
            }
            if spoiled:
                for value, name_of in (
                    (math.nan, "student_logits"),
                    (math.inf, "teacher_logits"),
                    (math.nan, "student_hidden"),
                    (math.nan, "teacher_hidden"),
                ):
                    inputs[name_of][padded] = value
            return Case(name, {**inputs, "labels": labels, "temperature": temperature, "weights": list(weights)}, part)

        yield case("divergence alone", "terms", [6, 6], weights=(1.0, 0.0, 0.0))
        yield case("cross-entropy alone", "terms", [6, 6], weights=(0.0, 1.0, 0.0))
        yield case("cosine alone", "terms", [6, 6], weights=(0.0, 0.0, 1.0))
        yield case("all three, T = 3", "terms", [5, 5, 5], length=5, temperature=3.0)
        yield case("one sequence, T = 1", "terms", [6], temperature=1.0, weights=(0.5, 1.5, 3.0))
        yield case("the last tokens are padding", "padding", [4, 4])
        yield case("unequal lengths", "padding", rng.shuffled([6, 3, 1]), weights=(1.0, 2.0, 4.0))
        yield case("an empty sequence", "padding", rng.shuffled([5, 0]), temperature=rng.choice([1.5, 4.0]))
        yield case("one token counts", "padding", [1, 0, 0])
        yield case("NaN and infinity under the padding", "padding", [5, 2], spoiled=True)
        scattered = case("labels left out here and there", "padding", [6, 6, 6])
        scattered.inputs["labels"][rng.int(0, 2), 1:4] = IGNORED
        scattered.inputs["labels"][1, 0] = IGNORED
        yield scattered
        yield case("nothing counts", "padding", [0, 0])

    def expected(self, inputs, variant):
        counts = inputs["labels"] != IGNORED
        temperature, (soft, hard, cosine) = inputs["temperature"], inputs["weights"]
        logits, hidden = (inputs[name].double().requires_grad_() for name in ("student_logits", "student_hidden"))
        if not counts.any():
            zeros = torch.zeros((), dtype=torch.float64, device=logits.device)
            return {
                "loss": zeros,
                "logits": torch.zeros_like(logits).detach(),
                "hidden": torch.zeros_like(hidden).detach(),
            }
        with torch.enable_grad():
            z, h = logits[counts], hidden[counts]
            log_p = (inputs["teacher_logits"][counts].double() / temperature).log_softmax(-1)
            kl = exact_kl(log_p, (z / temperature).log_softmax(-1)).mean()
            target = torch.ones(len(h), dtype=torch.float64, device=h.device)
            apart = F.cosine_embedding_loss(h, inputs["teacher_hidden"][counts].double(), target)
            loss = soft * temperature**2 * kl + hard * F.cross_entropy(z, inputs["labels"][counts]) + cosine * apart
        loss.backward()
        return {"loss": loss.detach(), "logits": logits.grad, "hidden": hidden.grad}

    def verify(self, inputs, outputs, expected, variant):
        words = {
            "loss": "your loss",
            "logits": "the gradient of the student's logits",
            "hidden": "the gradient of the student's hidden states",
        }
        return all_near(outputs, expected, words)

    _CHOSEN = "soft_loss(student_logits[counts], teacher_logits[counts], temperature)"
    _HARD = "F.cross_entropy(student_logits[counts], labels[counts])"
    _COSINE = "F.cosine_similarity(student_hidden[counts], teacher_hidden[counts], dim=-1)"
    mistakes = (
        Mistake(
            "padding in the mean",
            "You divide by all positions, the padding too: the mean is over the positions that count.",
            edit(
                "    return weights[0] * soft",
                "    soft, hard, cosine = (x * counts.float().mean() for x in (soft, "
                "hard, cosine))\n    return weights[0] * soft",
            ),
        ),
        Mistake(
            "padding in the divergence",
            "Padding takes part in the divergence: leave its positions out.",
            edit(_CHOSEN, "soft_loss(student_logits, teacher_logits, temperature)"),
        ),
        Mistake(
            "padding in the cosine",
            "Padding takes part in the cosine: leave its positions out.",
            edit(_COSINE, "F.cosine_similarity(student_hidden, teacher_hidden, dim=-1)"),
        ),
        Mistake(
            "padding times zero",
            "You multiply what padding gives by 0, and 0 times NaN is NaN: choose the "
            "positions that count first, then compute.",
            (
                edit(
                    _CHOSEN,
                    "sum(soft_loss(z[None], t[None], temperature) * c for z, t, c in zip(student_logits.flatten"
                    "(0, 1), teacher_logits.flatten(0, 1), counts.flatten())) / counts.sum()",
                ),
                edit(
                    _HARD,
                    "(F.cross_entropy(student_logits.flatten(0, 1), labels.flatten().clamp(min=0), "
                    'reduction="none") * counts.flatten()).sum() / counts.sum()',
                ),
                edit(
                    f"(1 - {_COSINE}).mean()",
                    "((1 - F.cosine_similarity(student_hidden, teacher_hidden, dim=-1)) * counts).sum() / counts.sum()",
                ),
            ),
        ),
        Mistake(
            "means of sequences",
            "You average within each sequence, and then the sequences: in a short one a token "
            "weighs more. Every token that counts weighs the same.",
            (
                edit(
                    "    soft = ",
                    "    losses = []\n    for row in range(len(labels)):\n        at = counts[row]\n"
                    "        if at.any():\n            losses.append(weights[0] * soft_loss(student_logits[row][at], "
                    "teacher_logits[row][at], temperature)\n"
                    "                          + weights[1] * F.cross_entropy(student_logits[row][at], "
                    "labels[row][at])\n"
                    "                          + weights[2] * (1 - F.cosine_similarity(student_hidden[row][at], "
                    "teacher_hidden[row][at], dim=-1)).mean())\n"
                    "    return sum(losses) / len(losses)\n    soft = ",
                ),
            ),
        ),
        Mistake(
            "token 0 left out",
            "You leave out the label 0, which is a token like any other: -100 alone does not count.",
            edit("labels != -100", "labels > 0"),
        ),
        Mistake(
            "nothing counts",
            "Where no position counts your loss is NaN, a mean of nothing: return 0.",
            edit("    if not counts.any():\n        return student_logits[counts].sum()\n", ""),
        ),
        Mistake(
            "softened labels",
            "The temperature softens the divergence alone: the cross-entropy is of the plain logits.",
            edit(_HARD, "F.cross_entropy(student_logits[counts] / temperature, labels[counts])"),
        ),
        Mistake(
            "T squared missing",
            "The factor T² of the divergence is missing: beside the cross-entropy it would weigh less the higher T is.",
            edit(_CHOSEN, f"{_CHOSEN} / temperature**2"),
        ),
        Mistake(
            "T squared on all",
            "T² belongs to the divergence alone: cross-entropy and cosine know no temperature.",
            (
                edit("weights[1] * hard", "weights[1] * temperature**2 * hard"),
                edit("weights[2] * cosine", "weights[2] * temperature**2 * cosine"),
            ),
        ),
        Mistake(
            "arguments swapped",
            "Student and teacher are swapped in the divergence: that is reverse KL.",
            edit(
                f"    soft = {_CHOSEN}",
                "    log_q = (student_logits[counts] / temperature).log_softmax(-1)\n"
                "    log_p = (teacher_logits[counts] / temperature).log_softmax(-1)\n"
                "    soft = temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()",
            ),
        ),
        Mistake(
            "vocabulary",
            "The divergence is divided by the vocabulary as well: its mean is over positions alone.",
            edit(_CHOSEN, f"{_CHOSEN} / student_logits.shape[-1]"),
        ),
        Mistake(
            "cosine itself",
            "The loss is 1 - cos: the cosine itself would be driven down, and the hidden states apart.",
            edit(f"(1 - {_COSINE})", _COSINE),
        ),
        Mistake(
            "cosine over positions",
            "Your cosine runs over positions: compare the hidden states of each position, along the last dimension.",
            edit(_COSINE, "F.cosine_similarity(student_hidden[counts], teacher_hidden[counts], dim=0)"),
        ),
        Mistake(
            "weights swapped",
            "The weights are in the order divergence, cross-entropy, cosine: you have swapped the first two.",
            (edit("weights[0] * soft", "weights[1] * soft"), edit("weights[1] * hard", "weights[0] * hard")),
        ),
        Mistake(
            "weights missing",
            "The three losses are added without their weights.",
            (
                edit("weights[0] * soft", "soft"),
                edit("weights[1] * hard", "hard"),
                edit("weights[2] * cosine", "cosine"),
            ),
        ),
        Mistake(
            "shifted once more",
            "The labels are shifted already: labels[b, i] is what position i is to predict.",
            edit("    counts = ", "    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]\n    counts = "),
        ),
    )


class StudentWeights(Reference):
    exercise = "student_weights"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(
            name,
            part,
            total,
            *,
            prefix="model.layers.",
            rest=("attention.weight", "mlp.weight"),
            outer=None,
            backwards=False,
            dtype=torch.float32,
        ):
            outer = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight") if outer is None else outer
            names = [*outer[:1], *(f"{prefix}{i}.{end}" for i in range(total) for end in rest), *outer[1:]]
            names = names[::-1] if backwards else names
            return Case(
                name, {"weights": {name: rng.randn(2, 3, dtype=dtype) for name in names}, "prefix": prefix}, part
            )

        yield case("four layers", "layers", 4)
        yield case("six layers, the last one first", "layers", 6, backwards=True)
        yield case("an odd number of layers", "layers", rng.choice([5, 7]))
        yield case("twelve layers: numbers of two digits", "layers", 12, rest=("weight",))
        yield case("two layers, in half precision", "layers", 2, dtype=torch.float16)
        yield case("another prefix", "names", 4, prefix="transformer.h.", outer=("transformer.wte", "transformer.ln_f"))
        yield case("numbers within a layer", "names", 4, rest=("mlp.experts.1.weight", "mlp.experts.2.layers.3.bias"))
        yield case(
            "the prefix within other names",
            "names",
            4,
            outer=("model.embed_tokens.weight", "draft.model.layers.1.weight", "draft.model.layers.2.weight"),
        )
        yield case(
            "names like the prefix",
            "names",
            6,
            prefix="layers.",
            outer=("embedding", "layers_norm.3.weight", "other.layers.0.weight"),
            rest=("a.layers.3.b", "layers.1"),
        )

    def expected(self, inputs, variant):
        prefix, first = inputs["prefix"], 1 if variant["layers"] == "odd" else 0
        kept = {}
        for name, value in inputs["weights"].items():
            if not name.startswith(prefix):
                kept[name] = value
                continue
            number, rest = name[len(prefix) :].split(".", 1)
            if int(number) % 2 == first:
                kept[f"{prefix}{int(number) // 2}.{rest}"] = value
        return kept

    def verify(self, inputs, outputs, expected, variant):
        if not isinstance(outputs, dict):
            return compare(outputs, expected)
        return compare(
            {name: outputs[name] for name in sorted(outputs, key=str)},
            {name: expected[name] for name in sorted(expected)},
            path="your dict",
        )

    def same_slip(self, outputs, wrong):
        kinds = [
            {name: x.dtype for name, x in one.items() if isinstance(x, Tensor)} if isinstance(one, dict) else one
            for one in (outputs, wrong)
        ]
        return kinds[0] == kinds[1] and super().same_slip(outputs, wrong)

    mistakes = (
        Mistake(
            "not renumbered",
            "The layers keep their old numbers: a student of half the layers looks for 0, 1, 2, ...",
            edit("{number // 2}", "{number}"),
        ),
        Mistake(
            "other layers",
            'You keep the other half: see effnlp_lab.variant("student_weights").',
            edit("number % 2 == 1", "number % 2 == 0"),
        ),
        Mistake(
            "the first half",
            "You keep the first half of the layers, which lie side by side: keep every other one.",
            (
                edit("number % 2 == 1", "number >= total / 2"),
                edit("{number // 2}", "{number}"),
                edit(
                    "    kept = {}\n",
                    "    kept = {}\n    total = 1 + max(int(n[len(prefix):].split('.')[0]) for n in "
                    "weights if n.startswith(prefix))\n",
                ),
            ),
        ),
        Mistake(
            "the first digit",
            "You read the first digit of the layer's number: from layer 10 on there are two.",
            edit(
                'number, rest = name[len(prefix):].split(".", 1)\n            number = int(number)',
                'rest = name[len(prefix):].split(".", 1)[1]\n            number = int(name[len(prefix)])',
            ),
        ),
        Mistake(
            "counted in order of the names",
            "You number the layers in the order of their names, in which 10 comes "
            "before 2: the new number is half the old one.",
            (
                edit(
                    "    kept = {}\n",
                    "    kept = {}\n    order = sorted({n[len(prefix):].split('.')[0] for n in weights "
                    "if n.startswith(prefix)})[::2]\n",
                ),
                edit("if number % 2 == 1:", "if str(number) not in order:"),
                edit("{number // 2}", "{order.index(str(number))}"),
            ),
        ),
        Mistake(
            "numbered as they come",
            "You number the layers as they come: the dict may hold them in any order, so go by their numbers.",
            (
                edit("    kept = {}\n", "    kept, seen = {}, {}\n"),
                edit("{number // 2}", "{seen.setdefault(number, len(seen))}"),
            ),
        ),
        Mistake(
            "every number replaced",
            "You replace a layer's number wherever it stands in the name: only the one "
            "after the prefix is the layer's.",
            edit(
                'name = f"{prefix}{number // 2}.{rest}"',
                'name = name.replace(f".{number}.", f".{number // 2}.").replace(f"{prefix}{number}.", '
                'f"{prefix}{number // 2}.")',
            ),
        ),
        Mistake(
            "prefix anywhere",
            "You take names for layers that have the prefix further inside: a layer's name begins with it.",
            (
                edit("if name.startswith(prefix):", "if prefix in name:"),
                edit(
                    'number, rest = name[len(prefix):].split(".", 1)',
                    'before, _, after = name.partition(prefix)\n            number, rest = after.split(".", 1)',
                ),
                edit('name = f"{prefix}{number // 2}.{rest}"', 'name = f"{before}{prefix}{number // 2}.{rest}"'),
            ),
        ),
        Mistake(
            "the rest left out",
            "Embeddings, last norm and head are missing: the student takes everything that is in no layer as it is.",
            edit("        kept[name] = value.clone()", "            kept[name] = value.clone()"),
        ),
        Mistake(
            "not copied",
            "The student shares its teacher's memory: trained, it would change the teacher. Copy.",
            edit("value.clone()", "value"),
        ),
        Mistake(
            "all in float32", "The weights are to keep their dtype.", edit("value.clone()", "value.float().clone()")
        ),
    )


class ChunkedLoss(Reference):
    exercise = "chunked_loss"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, rows, chunk, *, vocabulary=13, width=6, wide=9, temperature=2.0, left_out=(), **options):
            labels = torch.tensor(rng.ints(rows, 0, vocabulary - 1))
            labels[list(left_out)] = IGNORED
            watched = {"watched": True} if part == "memory" else {}
            return Case(
                name,
                {
                    "student_hidden": rng.randn(rows, width),
                    "student_weight": rng.randn(vocabulary, width, scale=0.6),
                    "teacher_hidden": rng.randn(rows, wide),
                    "teacher_weight": rng.randn(vocabulary, wide, scale=0.5),
                    "labels": labels,
                    "temperature": temperature,
                    "chunk": chunk,
                    **watched,
                },
                part,
                **options,
            )

        yield case("two equal chunks", "value", 8, 4)
        yield case("a shorter last chunk", "value", 10, 4, temperature=1.0)
        yield case("a last chunk of one row", "value", 9, 4, temperature=3.0)
        yield case("some rows do not count", "value", 12, 4, left_out=rng.shuffled(range(12))[:4])
        yield case("one row counts", "value", 7, 3, left_out=rng.shuffled(range(7))[:6])
        yield case("one chunk", "gradients", 6, 6)
        yield case("a chunk larger than the rows", "gradients", 5, 8, temperature=rng.choice([0.5, 1.5]))
        yield case("chunks of one row", "gradients", 4, 1, wide=3)
        yield case("unequal chunks, unequal padding", "gradients", 11, 4, left_out=(0, 1, 2, 5, 10))
        yield case("a chunk of padding alone", "gradients", 9, 3, left_out=(3, 4, 5, 7))
        yield case("nothing counts", "gradients", 5, 2, left_out=range(5))
        label_zero = case("the first token of the vocabulary", "gradients", 7, 3)
        label_zero.inputs["labels"][:3] = 0
        yield label_zero
        yield case("32 chunks", "memory", 256, 8, vocabulary=600, budget={"peak_bytes": 2.5})
        yield case(
            "a longer chunk, rows left out",
            "memory",
            230,
            25,
            vocabulary=500,
            width=4,
            left_out=range(40, 60),
            budget={"peak_bytes": 2.5},
        )
        yield case(
            "4,000 rows over 32,000 tokens",
            "memory",
            4_000,
            256,
            vocabulary=32_000,
            width=64,
            wide=128,
            left_out=range(3_000, 3_100),
            device="cuda",
            budget={"peak_bytes": 2.5},
            seconds=60.0,
        )

    def expected(self, inputs, variant):
        return self._whole(inputs, torch.float64)

    def _whole(self, inputs: Inputs, dtype: torch.dtype) -> dict:
        hidden, weight = (
            inputs[name].to(dtype, copy=True).requires_grad_() for name in ("student_hidden", "student_weight")
        )
        counts, temperature = inputs["labels"] != IGNORED, inputs["temperature"]
        with torch.enable_grad():
            log_q = (hidden @ weight.T / temperature).log_softmax(-1)
            log_p = inputs["teacher_hidden"].to(dtype) @ inputs["teacher_weight"].to(dtype).T
            kl = exact_kl((log_p / temperature).log_softmax(-1), log_q)
            loss = temperature**2 * kl[counts].sum() / counts.sum().clamp(min=1)
        loss.backward()
        told = {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}
        return {**told, "whole logits": False} if inputs.get("watched") else told

    def frugal(self, inputs, variant):
        temperature, counts = inputs["temperature"], inputs["labels"] != IGNORED
        to_hidden, to_weight = (torch.zeros_like(inputs[name]) for name in ("student_hidden", "student_weight"))
        for first in range(0, len(counts), inputs["chunk"]):
            rows = slice(first, first + inputs["chunk"])
            log_q = (inputs["student_hidden"][rows] @ inputs["student_weight"].T / temperature).log_softmax(-1)
            log_p = (inputs["teacher_hidden"][rows] @ inputs["teacher_weight"].T / temperature).log_softmax(-1)
            p = log_p.exp()
            (p * (log_p - log_q)).sum(-1)
            slope = (log_q.exp() - p) * counts[rows, None]
            to_hidden[rows] = slope @ inputs["student_weight"]
            to_weight += slope.T @ inputs["student_hidden"][rows]
        return to_hidden, to_weight

    def verify(self, inputs, outputs, expected, variant):
        words = {"loss": "your loss", "hidden": "the gradient of student_hidden", "weight": "that of student_weight"}
        found = all_near(outputs, expected, words)
        if found is None and outputs.get("whole logits"):
            rows, vocabulary = len(inputs["labels"]), len(inputs["student_weight"])
            found = Finding(f"the numbers are right, and you made a tensor of all {rows:,} x {vocabulary:,} logits")
        return found

    _Q = "F.log_softmax(student_hidden[rows] @ student_weight.T / temperature, dim=-1)"
    _P = "F.log_softmax(teacher_hidden[rows] @ teacher_weight.T / temperature, dim=-1)"
    mistakes = (
        Mistake(
            "means of chunks averaged",
            "You average the means of chunks: where the last is shorter, or more of one "
            "does not count, its rows weigh more. Sum, and divide once by all rows that count.",
            (
                edit("    share = 1 / counts.sum().clamp(min=1)\n", ""),
                edit(
                    "        log_q = F",
                    "        share = 1 / counts[rows].sum().clamp(min=1) / "
                    "math.ceil(len(labels) / chunk)\n        log_q = F",
                ),
            ),
        ),
        Mistake(
            "padding in the mean",
            "You divide by all rows: the mean is over those that count.",
            edit("counts.sum().clamp(min=1)", "len(labels)"),
        ),
        Mistake(
            "padding counted",
            "Rows whose label is -100 take part: they do not count.",
            edit("counts = labels != -100", "counts = torch.ones_like(labels, dtype=torch.bool)"),
        ),
        Mistake(
            "padding in the gradients",
            "Rows that do not count have a gradient: theirs is 0.",
            edit("(log_q.exp() - p) * counts[rows, None]", "(log_q.exp() - p)"),
        ),
        Mistake(
            "padding in the value", "The value has rows that do not count.", edit("kl[counts[rows]].sum()", "kl.sum()")
        ),
        Mistake(
            "nothing counts",
            "Where no row counts you divide by 0: loss and gradients are 0 then.",
            edit(".clamp(min=1)", ""),
        ),
        Mistake(
            "last chunk dropped",
            "The last chunk is left out where it is shorter than the others.",
            edit("range(0, len(labels), chunk)", "range(0, len(labels) - chunk + 1, chunk)"),
        ),
        Mistake(
            "weight's gradient of the last chunk",
            "The gradient of the weight is the last chunk's alone: every chunk adds to it.",
            edit("to_weight += ", "to_weight = "),
        ),
        Mistake(
            "hidden's gradients added up",
            "You write every chunk's gradient to the first rows: each chunk has rows of its own.",
            edit("to_hidden[rows] = ", "to_hidden[: len(slope)] += "),
        ),
        Mistake(
            "T squared missing",
            "The factor T² is missing, in the value and in the gradients.",
            (edit("temperature**2 * share * ", "share * "), edit("temperature * share * (", "share / temperature * (")),
        ),
        Mistake(
            "T squared missing in the gradients",
            "The value has the factor T² and the gradients have it not: T² "
            "times the 1 / T of the softened softmax leaves T.",
            edit("temperature * share * (", "share / temperature * ("),
        ),
        Mistake(
            "T squared whole in the gradients",
            "Your gradients have T²: the derivative of softmax(z / T) brings a 1 / T, which leaves T.",
            edit("temperature * share * (", "temperature**2 * share * ("),
        ),
        Mistake(
            "not softened in the gradients",
            "The factor T of the gradients is missing.",
            edit("temperature * share * (", "share * ("),
        ),
        Mistake(
            "sign",
            "Your gradients have the opposite sign: they are Q - P, for the loss falls where Q grows towards P.",
            edit("(log_q.exp() - p)", "(p - log_q.exp())"),
        ),
        Mistake(
            "not averaged gradients",
            "The gradients are those of the sum: divide them by the rows that count, too.",
            edit("temperature * share * (", "temperature * ("),
        ),
        Mistake(
            "arguments swapped",
            "Student and teacher are swapped in the divergence: that is reverse KL.",
            (
                edit("kl = (p * (log_p - log_q)).sum(-1)", "kl = (log_q.exp() * (log_q - log_p)).sum(-1)"),
                edit("(log_q.exp() - p)", "log_q.exp() * (log_q - log_p - kl[:, None])"),
            ),
        ),
        Mistake(
            "vocabulary",
            "You divide by the vocabulary as well: KL is a sum over it.",
            edit("clamp(min=1)", "clamp(min=1) / len(student_weight)"),
        ),
        Mistake(
            "teacher's weight",
            "The gradient goes through the student's weight and states, not the teacher's.",
            edit("slope @ student_weight", "slope @ teacher_weight[:, :student_weight.shape[1]]"),
        ),
        Mistake(
            "teacher not softened",
            "You soften the student alone: both distributions are at temperature T.",
            edit("teacher_hidden[rows] @ teacher_weight.T / temperature", "teacher_hidden[rows] @ teacher_weight.T"),
        ),
        Mistake(
            "whole logits",
            "You make the logits of all rows at once: make those of one chunk at a time, inside the loop.",
            (
                edit(
                    "    for first in",
                    "    all_q = F.log_softmax(student_hidden @ student_weight.T / temperature, "
                    "dim=-1)\n    for first in",
                ),
                edit(_Q, "all_q[rows]"),
            ),
        ),
    )


class Divergence(Reference):
    exercise = "divergence"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, kind, *shape, scale=1.5, **more):
            return Case(
                name,
                {
                    "student_logits": rng.randn(*shape, scale=scale),
                    "teacher_logits": rng.randn(*shape, scale=scale),
                    "kind": kind,
                    **more,
                },
                part,
            )

        def never(name, kind, student, teacher):
            """Logits of -inf: of the student and of the teacher at some tokens."""
            one = case(name, "never", kind, 3, 8, differentiate=False)
            one.inputs["student_logits"][:, student] = -math.inf
            one.inputs["teacher_logits"][:, teacher] = -math.inf
            return one

        yield case("forward", "forward and reverse", "forward", rng.int(4, 6), 9)
        yield case("reverse", "forward and reverse", "reverse", rng.int(4, 6), 9)
        yield case("forward, sequences", "forward and reverse", "forward", 2, 3, 7)
        yield case("reverse, one position", "forward and reverse", "reverse", 11)
        yield case("reverse, large logits", "forward and reverse", "reverse", 3, 6, scale=300.0, differentiate=False)
        yield case("forward, large logits", "forward and reverse", "forward", 3, 6, scale=300.0, differentiate=False)
        yield case("mixture", "mixture", "jsd", rng.int(4, 6), 9)
        yield case("mixture, sequences", "mixture", "jsd", 2, 3, 5)
        yield case("mixture, far apart", "mixture", "jsd", 4, 6, scale=30.0)
        yield never("forward, both never take a token", "forward", [2], [2])
        yield never("reverse, both never take a token", "reverse", [0, 5], [0, 5])
        yield never("mixture, both never take a token", "jsd", [7], [7])
        yield never("forward, the teacher never takes a token", "forward", [], [1])
        yield never("reverse, the teacher never takes a token", "reverse", [], [1])
        yield never("forward, the student never takes a token", "forward", [3], [])
        yield never("reverse, the student never takes a token", "reverse", [3], [])
        yield never("mixture, each never takes some", "jsd", [0, 3], [4, 6])

    def expected(self, inputs, variant):
        student = inputs["student_logits"].double().requires_grad_()
        teacher, beta = inputs["teacher_logits"].double(), float(variant["beta"])
        with torch.enable_grad():
            p, q = teacher.softmax(-1), student.softmax(-1)
            if inputs["kind"] == "jsd":
                m = beta * p + (1 - beta) * q
                values = beta * self._kl(p, m) + (1 - beta) * self._kl(q, m)
            else:
                log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
                log_a, log_b = (log_p, log_q) if inputs["kind"] == "forward" else (log_q, log_p)
                terms = log_a.exp() * (log_a - log_b)
                values = terms.masked_fill(log_a == -math.inf, 0.0).sum(-1)
        if not inputs.get("differentiate", True):
            return {"values": values.detach()}
        weighed_sum(values).backward()
        return {"values": values.detach(), "gradient": student.grad}

    @staticmethod
    def _kl(a: Tensor, b: Tensor) -> Tensor:
        """sum a log(a / b) from probabilities, by torch's xlogy."""
        return (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)

    def verify(self, inputs, outputs, expected, variant):
        words = {"values": "your divergence", "gradient": "the gradient of the student's logits"}
        floor = max(floor_of(inputs["student_logits"]), floor_of(inputs["teacher_logits"]))
        return all_near(outputs, expected, {name: words[name] for name in expected}, floor=floor)

    _KL = "torch.where(log_a == -math.inf, 0.0, log_a.exp() * (log_a - log_b)).sum(-1)"
    mistakes = (
        Mistake(
            "forward and reverse swapped",
            "You have swapped them: forward is KL(P || Q), weighed with the teacher's P; reverse is KL(Q || P).",
            (
                edit("return kl(log_p, log_q)", "return kl(log_q, log_p)  #"),
                edit(
                    'kind == "reverse":\n        return kl(log_q, log_p)',
                    'kind == "reverse":\n        return kl(log_p, log_q)',
                ),
            ),
        ),
        Mistake(
            "weighed with the other",
            "KL(A || B) weighs the logarithms' difference with A, and yours with B.",
            edit("log_a.exp() * (log_a - log_b)", "log_b.exp() * (log_a - log_b)"),
        ),
        Mistake(
            "0 log 0",
            "0 times log 0 is NaN in floating point: where the first distribution is 0 the term is 0.",
            edit(_KL, "(log_a.exp() * (log_a - log_b)).sum(-1)"),
        ),
        Mistake(
            "infinity hidden",
            "What the second distribution never takes, and the first does, makes KL infinite: you "
            "leave such tokens out.",
            edit("log_a == -math.inf", "(log_a == -math.inf) | (log_b == -math.inf)"),
        ),
        Mistake(
            "mean over the vocabulary",
            "KL is a sum over the vocabulary, and yours is a mean.",
            edit(".sum(-1)", ".mean(-1)"),
        ),
        Mistake(
            "mean over positions",
            "One number for each position is asked for, and you return their mean.",
            edit(
                '    if kind == "forward":\n        return kl(log_p, log_q)',
                "    one = kl\n    kl = lambda a, b: one(a, b).mean()  # noqa: E731\n"
                '    if kind == "forward":\n        return kl(log_p, log_q)',
            ),
        ),
        Mistake(
            "beta on the student",
            "Your beta weighs the student: it is the teacher's share, in the mixture and before "
            "the teacher's divergence.",
            edit("beta = 0.25", "beta = 0.75"),
        ),
        Mistake(
            "beta of one half",
            'You mix with one half: your beta is another, see effnlp_lab.variant("divergence").',
            edit("beta = 0.25", "beta = 0.5"),
        ),
        Mistake(
            "weights swapped outside",
            "The two divergences have each other's weight: beta goes with KL(P || M).",
            edit(
                "beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)",
                "(1 - beta) * kl(log_p, log_m) + beta * kl(log_q, log_m)",
            ),
        ),
        Mistake(
            "weights missing outside",
            "The two divergences are added without their weights.",
            edit("beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)", "kl(log_p, log_m) + kl(log_q, log_m)"),
        ),
        Mistake(
            "mixed logarithms",
            "You mix logarithms: M is a mixture of probabilities, and log M is its logarithm.",
            edit(
                "torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))",
                "beta * log_p + (1 - beta) * log_q",
            ),
        ),
        Mistake(
            "to the mixture swapped",
            "The mixture is the second argument: KL(P || M), so that it stays finite.",
            edit(
                "beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)",
                "beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)",
            ),
        ),
        Mistake(
            "logarithm of a softmax",
            "softmax(...).log() is log 0 where a probability underflows: use log_softmax.",
            edit("student_logits.log_softmax(-1)", "student_logits.softmax(-1).log()"),
        ),
        Mistake(
            "logits not normalised",
            "You take logits for logarithms of probabilities: log_softmax normalises them.",
            edit("student_logits.log_softmax(-1)", "student_logits"),
        ),
    )


class OnPolicyStep(Reference):
    exercise = "on_policy_step"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def model(vocabulary, width, scale):
            return {
                "table": rng.randn(vocabulary, width, scale=scale),
                "head": rng.randn(width, vocabulary, scale=scale),
            }

        def case(name, part, batch, length, new, vocabulary=7, scale=1.0):
            student, teacher = model(vocabulary, 5, scale), model(vocabulary, 5, scale)
            prompt = torch.tensor([rng.ints(length, 0, vocabulary - 1) for _ in range(batch)])
            return Case(
                name,
                {
                    "student": student,
                    "teacher": teacher,
                    "prompt": prompt,
                    "uniforms": self._clear(rng, student, prompt, new),
                },
                part,
            )

        yield case("one token", "tokens", 3, 4, 1)
        yield case("several tokens", "tokens", 4, 3, rng.int(4, 6))
        yield case("a prompt of one token", "tokens", 2, 1, 5)
        even = case("every token equally likely", "tokens", 2, 2, 4, vocabulary=4)
        even.inputs["student"]["head"].zero_()
        even.inputs["uniforms"].copy_(torch.tensor([[0.0, 0.25, 0.5, 0.75], [0.5, 0.75, 0.25, 0.0]]))
        yield even
        last = case("the largest uniform below 1", "tokens", 2, 2, 2, vocabulary=5, scale=0.3)
        last.inputs["uniforms"].fill_(1 - 2**-24)
        last.inputs["student"]["head"][:, -1] = 0.0
        yield last
        yield case("a long prompt", "loss", 2, 7, 3)
        yield case("a student that is sure", "loss", 3, 3, 4, scale=1.8)
        yield case("one sequence, one token", "loss", 1, rng.int(1, 3), 1)

    @staticmethod
    def _clear(rng: Rng, student, prompt: Tensor, new: int) -> Tensor:
        """Uniforms that lie clear of every boundary between two tokens, so that rounding cannot matter."""
        model = SmallModel({name: value.double() for name, value in student.items()})
        tokens, columns = prompt, []
        for _ in range(new):
            with torch.no_grad():
                cumulative = model(tokens)[:, -1].softmax(-1).cumsum(-1)
            column = torch.stack([_away_from(rng, row) for row in cumulative])
            token = (cumulative <= column[:, None].double()).sum(-1)
            tokens = torch.cat([tokens, token[:, None]], 1)
            columns.append(column)
        return torch.stack(columns, 1)

    def expected(self, inputs, variant):
        student, teacher = (
            SmallModel({name: value.double() for name, value in inputs[which].items()})
            for which in ("student", "teacher")
        )
        tokens, start = inputs["prompt"], inputs["prompt"].shape[1]
        for u in inputs["uniforms"].double().unbind(1):
            with torch.no_grad():
                cumulative = student(tokens)[:, -1].softmax(-1).cumsum(-1)
            token = torch.stack([torch.searchsorted(row, v, right=True) for row, v in zip(cumulative, u, strict=True)])
            tokens = torch.cat([tokens, token.clamp(max=cumulative.shape[-1] - 1)[:, None]], 1)
        with torch.enable_grad():
            log_q, log_p = (m(tokens)[:, start - 1 : -1].log_softmax(-1) for m in (student, teacher))
            loss = exact_kl(log_q, log_p.detach()).mean()
        loss.backward()
        return {
            "tokens": tokens,
            "loss": loss.detach(),
            "teacher learns": False,
            "gradients": {name: p.grad for name, p in student.named_parameters()},
        }

    def verify(self, inputs, outputs, expected, variant):
        found = compare(outputs["tokens"], expected["tokens"], path="your tokens")
        found = found or near(outputs["loss"], expected["loss"], "your loss")
        for name, want in expected["gradients"].items():
            found = found or near(outputs["gradients"][name], want, f"the gradient of the student's {name}", floor=1.0)
        if found is None and outputs["teacher learns"]:
            found = Finding("the numbers are right, and a gradient flows to the teacher: run it under torch.no_grad()")
        return found

    mistakes = (
        Mistake(
            "most likely token",
            "You take the most likely token: sample from the student, with the uniforms.",
            edit("(probabilities.cumsum(-1) <= u[:, None]).sum(-1)", "probabilities.argmax(-1)"),
        ),
        Mistake(
            "sampled from the teacher",
            "The tokens are the teacher's: on-policy means that the student writes.",
            edit("student(tokens)[:, -1]", "teacher(tokens)[:, -1]"),
        ),
        Mistake(
            "not above",
            "A token is taken when its cumulative probability exceeds the uniform: at equality it is the "
            "next one's turn.",
            edit("<= u[:, None]", "< u[:, None]"),
        ),
        Mistake(
            "one token too far",
            "Your tokens are one too high: count the tokens whose cumulative probability does not exceed the uniform.",
            edit(
                ").sum(-1)\n            tokens",
                ").sum(-1).add(1).clamp(max=probabilities.shape[-1] - 1)\n            tokens",
            ),
        ),
        Mistake(
            "same uniform for all",
            "Every sequence has uniforms of its own, one for each new token.",
            edit("<= u[:, None]", "<= u[0]"),
        ),
        Mistake(
            "prompt in the loss",
            "The prompt takes part in the loss: only positions whose next token the student wrote count.",
            edit("slice(prompt.shape[1] - 1, -1)", "slice(0, -1)"),
        ),
        Mistake(
            "one position late",
            "Your positions are one too late: the last token of the prompt predicts the first that the student wrote.",
            edit("slice(prompt.shape[1] - 1, -1)", "slice(prompt.shape[1], None)"),
        ),
        Mistake(
            "forward KL",
            "That is forward KL: on what the student writes, match by reverse KL, KL(Q || P).",
            edit("(log_q.exp() * (log_q - log_p))", "(log_p.exp() * (log_p - log_q))"),
        ),
        Mistake(
            "sampled tokens alone",
            "You take the sampled tokens' logarithms alone: sum over the whole vocabulary at each position.",
            edit(
                "(log_q.exp() * (log_q - log_p)).sum(-1).mean()",
                "(log_q - log_p).gather(-1, tokens[:, prompt.shape[1]:, None]).mean()",
            ),
        ),
        Mistake(
            "the weights not differentiated",
            "Q is differentiated inside the logarithm and not as a weight: only the tokens are constants.",
            edit("log_q.exp() *", "log_q.exp().detach() *"),
        ),
        Mistake(
            "the teacher learns",
            "A gradient flows to the teacher: run it under torch.no_grad().",
            edit(
                "    log_p = theirs[:, written].log_softmax(-1)",
                "    log_p = teacher(tokens)[:, written].log_softmax(-1)",
            ),
        ),
        Mistake(
            "summed over the tokens",
            "You add up the new tokens: the loss is the mean over all of them.",
            edit(".sum(-1).mean()", ".sum(-1).sum(-1).mean()"),
        ),
    )


def _away_from(rng: Rng, cumulative: Tensor) -> Tensor:
    while True:
        u = rng.uniform(1)[0]
        if (cumulative - u.double()).abs().min() > 2e-3:
            return u


class WidthMasks(Reference):
    exercise = "width_masks"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, layers, width, target, scale=2.0):
            return Case(
                name,
                {
                    "log_alpha": rng.randn(layers, width, scale=scale),
                    "uniforms": rng.uniform(layers, width).clamp(1e-3, 1 - 1e-3),
                    "target": target,
                    "linear": rng.randn(layers),
                    "square": rng.uniform(layers) * 5 + 0.5,
                },
                part,
            )

        yield case("one layer", "masks", 1, 24, 0.5)
        yield case("three layers", "masks", 3, rng.int(15, 20), 0.25)
        yield case("a wide spread", "masks", 2, 20, 0.5, scale=6.0)
        yield case("everything kept", "constraint", 2, 9, 1.0, scale=1.0)
        yield case("nothing to be kept", "constraint", 2, 9, 0.0)
        yield case("one entry", "constraint", 3, 1, rng.float(0.3, 0.7))
        yield case("four layers", "constraint", 4, 7, rng.float(0.3, 0.7))

    def expected(self, inputs, variant):
        given = {name: inputs[name].double().requires_grad_() for name in ("log_alpha", "linear", "square")}
        u, (beta, low, high) = inputs["uniforms"].double(), (2 / 3, -0.1, 1.1)
        with torch.enable_grad():
            stretched = torch.sigmoid((torch.logit(u) + given["log_alpha"]) / beta) * (high - low) + low
            mask = F.hardtanh(stretched, 0.0, 1.0)
            share = torch.sigmoid(given["log_alpha"] - beta * math.log(-low / high)).mean(1)
            apart = share - inputs["target"]
            constraint = (given["linear"] * apart + given["square"] * apart**2).sum()
        told = {"mask": mask.detach(), "constraint": constraint.detach()}
        for name, value in (("mask", weighed_sum(mask)), ("constraint", constraint)):
            gradients = torch.autograd.grad(value, list(given.values()), retain_graph=True, allow_unused=True)
            for parameter, x, gradient in zip(given, given.values(), gradients, strict=True):
                told[f"{name} by {parameter}"] = torch.zeros_like(x).detach() if gradient is None else gradient
        return told

    def verify(self, inputs, outputs, expected, variant):
        words = {"mask": "your mask", "constraint": "your constraint"}
        words |= {
            name: "the gradient of the {} with respect to {}".format(*name.split(" by "))
            for name in expected
            if " by " in name
        }
        return all_near(outputs, expected, words)

    _SHARE = "torch.sigmoid(log_alpha - temperature * math.log(-low / high)).mean(-1)"
    mistakes = (
        Mistake(
            "not stretched",
            "The mask is not stretched: without that it is never exactly 0 or 1.",
            edit("soft * (high - low) + low", "soft"),
        ),
        Mistake("not cut", "The stretched mask is to be cut to [0, 1].", edit(".clamp(0, 1)", "")),
        Mistake(
            "noise not a logit",
            "The noise is log u - log(1 - u), and yours is log u.",
            edit("torch.log(uniforms) - torch.log1p(-uniforms)", "torch.log(uniforms)"),
        ),
        Mistake(
            "noise the other way",
            "Your noise has the opposite sign: a uniform near 1 keeps.",
            edit("torch.log(uniforms) - torch.log1p(-uniforms)", "torch.log1p(-uniforms) - torch.log(uniforms)"),
        ),
        Mistake(
            "temperature missing",
            "The temperature 2/3 is missing: divide noise and log_alpha by it.",
            edit("(noise + log_alpha) / temperature", "(noise + log_alpha)"),
        ),
        Mistake(
            "temperature on the noise alone",
            "The temperature divides the sum of noise and log_alpha.",
            edit("(noise + log_alpha) / temperature", "noise / temperature + log_alpha"),
        ),
        Mistake(
            "shift missing",
            "The probability of not being 0 needs the shift by 2/3 log(0.1 / 1.1): the stretch moves "
            "part of the mask to 0.",
            edit(_SHARE, "torch.sigmoid(log_alpha).mean(-1)"),
        ),
        Mistake(
            "shift the other way",
            "The shift has the opposite sign.",
            edit("log_alpha - temperature * math", "log_alpha + temperature * math"),
        ),
        Mistake(
            "temperature in the probability",
            "In the probability the temperature multiplies the shift, and does not divide log_alpha.",
            edit(_SHARE, "torch.sigmoid(log_alpha / temperature - math.log(-low / high)).mean(-1)"),
        ),
        Mistake(
            "share of the drawn mask",
            "You take the mean of the drawn mask: the constraint is on the probability of "
            "not being 0, which is no matter of luck.",
            edit(_SHARE, "mask.mean(-1)"),
        ),
        Mistake(
            "one share for all layers",
            "Each layer has a share and multipliers of its own.",
            edit(".mean(-1)", ".mean()"),
        ),
        Mistake("linear term missing", "The linear term of the constraint is missing.", edit("linear * apart + ", "")),
        Mistake("square missing", "The second term has the square of the difference.", edit("apart**2", "apart")),
        Mistake(
            "squared multiplier",
            "phi multiplies the square, and is not squared itself.",
            edit("square * apart**2", "(square * apart) ** 2"),
        ),
        Mistake("mean of the layers", "The constraint is the sum over the layers.", edit(".sum()", ".mean()")),
        Mistake(
            "the other difference",
            "The difference is share minus target.",
            edit("apart = share - target", "apart = target - share"),
        ),
    )


def _soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """A right `soft_loss`, for the exercise that builds on it."""
    log_q, log_p = (
        x.flatten(0, -2).float().div(temperature).log_softmax(-1) for x in (student_logits, teacher_logits.detach())
    )
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


EARLIER = {"soft_loss": _soft_loss}
REFERENCES = {
    cls.exercise: cls()
    for cls in (SoftLoss, DistillationLoss, StudentWeights, ChunkedLoss, Divergence, OnPolicyStep, WidthMasks)
}
