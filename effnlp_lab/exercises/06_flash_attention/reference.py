"""Cases, right outputs and known mistakes of lab 06.

Right outputs come from attention over the whole score matrix in float64, and right gradients from autograd through it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.exercises.compare import Finding, compare, leafwise
from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng, edit

from .drive import once

Inputs = Mapping[str, Any]
INFINITY = math.inf
EPS = torch.finfo(torch.float32).eps

NOT_SCALED = "Your scores are not scaled by 1/sqrt(d), d the head dimension."
DIVIDED_BY_DIM = "You divide by the head dimension d, and its square root is right."
NO_MAXIMUM = (
    "You take e^s without the maximum, as the slide on memory-efficient attention has it: from a score of 89 on it "
    "overflows float32, and from -104 down it is 0. Subtract the running maximum first."
)
MAXIMUM_FROM_ZERO = (
    "Your running maximum starts at 0, and never falls below it: where all scores lie below -104, every e^(s - 0) is "
    "0. Start at -inf."
)
SUM_NOT_RESCALED = (
    "The sum is not rescaled when the maximum grows: what was summed in units of e^old has to be multiplied by "
    "e^(old - new)."
)
OUTPUT_NOT_RESCALED = (
    "The output is not rescaled when the maximum grows: like the sum, it was added up in units of e^old and has to be "
    "multiplied by e^(old - new)."
)
NOTHING_RESCALED = (
    "Neither the sum nor the output is rescaled when the maximum grows: both were added up in units of e^old and have "
    "to be multiplied by e^(old - new)."
)
TOP_LEFT = (
    "Your causal mask is aligned top-left: the last query stands beside the last key, so query i sees keys 0 to "
    "i + keys - queries."
)
OWN_KEY = "Your causal mask hides the query's own key: a token sees itself."
MASKED_TO_ZERO = "You set hidden scores to 0, and exp(0) added 1 to the sum for each: a hidden score is -inf."
TAIL_SCORED_ZERO = (
    "The keys past the end were loaded as 0, so their score is 0 and exp(0) added 1 to the sum for each: give them the "
    "score -inf."
)
MINUS_INFINITY = (
    "Where all that was seen so far is hidden, the maximum is -inf, and -inf minus -inf is NaN: subtract 0 there "
    "instead."
)
ZERO_OVER_ZERO = "A query that sees no key has a sum of 0, and 0/0 is NaN: divide by 1 there."
LSE_WITHOUT_MAXIMUM = "Your log-sum-exp lacks the maximum: the sum was taken of e^(s - maximum), so add it again."
READ_PAST = (
    "You read past the end: there the memory holds NaN, and 0 times NaN is NaN. Mask the load, with other=0.0."
)
STORE_PAST = "Your store is not masked: the last tile writes past the end of the head, into the next one's memory."
FIRST_TILE = "All your programs work on the first tile: its first row is the program's number times the tile's height."
PROGRAMS_DOWN = "The ragged last tile has no program: round the number of tiles up."
HEADS_IN_TURNS = "Heads group by division: query head h reads key head h // (heads // kv_heads), and not h % kv_heads."
OWN_KEY_HEAD = "There are fewer key heads than query heads: query head h reads key head h // (heads // kv_heads)."
STRIDES = "You take the tensors for contiguous: a row begins where its strides say."
TF32 = (
    "Your products are rounded to TF32, which keeps 10 bits of a float32's fraction: ask tl.dot for "
    'input_precision="ieee".'
)
HALF_SUMS = (
    "You sum in float16, which keeps 11 bits: with every tile that is added the sum is rounded again. Keep running "
    "sums in float32, and convert once, at the end."
)
NO_DELTA = (
    "dS lacks -D: the gradient through the softmax is dS = P * (dP - D), with D the sum of d_out * out of the row."
)
GRADIENT_NOT_SCALED = "dQ and dK carry the factor 1/sqrt(d) as well: the scores were scaled."



def seen_keys(queries: int, keys: int, causal: bool, window: int | None = None) -> Tensor:
    """Which keys each query sees, the last query beside the last key."""
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance < window)


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in the inputs' dtype; zeros and -inf for a query that sees no key."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).masked_fill(~seen, -INFINITY)
    blind = ~seen.any(dim=1)[:, None]
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return weights @ v, torch.logsumexp(scores, dim=-1)


def attention_base_2(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The same in another order, as kernels do it: its rounding errors are as likely as those of `attention`."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    scores = ((q * (math.log2(math.e) / math.sqrt(q.shape[2]))) @ k.transpose(1, 2)).masked_fill(~seen, -INFINITY)
    peak = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
    weights = torch.exp2(scores - peak)
    total = weights.sum(dim=-1, keepdim=True)
    lse = (peak + torch.log2(total)) * math.log(2)
    return weights @ v / total.masked_fill(total == 0, 1.0), lse[..., 0]


def worst(candidates: list[Any], expected: Any) -> Any:
    """Of several plain implementations the output that is furthest off, tensor by tensor."""
    return leafwise(lambda want, *found: max(found, key=lambda one: _distance(one, want)), expected, *candidates)


def at_least(plain: Any, expected: Any, errors: Any) -> Any:
    """Plain outputs that are off by no less than `errors`: what rounding every score once brings. Without this floor a
    plain run that happens to be lucky would refuse right answers that are not."""
    return leafwise(
        lambda want, found, error: found if _distance(found, want) >= error else want.double() + error,
        expected, plain, errors,
    )  # fmt: skip


def _distance(found: Tensor, want: Tensor) -> float:
    """The largest difference, infinities aside."""
    return torch.nan_to_num((found.double() - want).abs(), nan=0.0, posinf=0.0).max().item()


def score_error(q: Tensor, k: Tensor) -> float:
    """How far a score may be off in float32, and with it the logarithm of its weight."""
    scores = q.double() @ k.double().repeat_interleave(q.shape[0] // k.shape[0], dim=0).transpose(1, 2)
    return EPS * (1 + scores.abs().max().item() / math.sqrt(q.shape[2]))


def forward_errors(inputs: Inputs) -> tuple[float, float]:
    """What rounded scores may do to the output and to the log-sum-exp."""
    error = score_error(inputs["q"], inputs["k"])
    return error * largest(inputs["v"]), error


def backward_errors(inputs: Inputs) -> dict[str, float]:
    """What rounded scores may do to dq, dk and dv."""
    q, k, v, d_out = doubled(inputs, "q", "k", "v", "d_out")
    error, scale = score_error(q, k), 1 / math.sqrt(q.shape[2])
    seen = seen_keys(q.shape[1], k.shape[1], inputs["causal"])
    _, lse = attention(q, k, v, seen)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -INFINITY)
    weights = torch.nan_to_num(torch.exp(scores - lse[..., None]), nan=0.0)  # rows that see nothing: -inf minus -inf
    seen_by = max(1.0, weights.sum(dim=1).max().item())
    d_weights = 2 * largest(d_out @ v.transpose(1, 2))
    return {"out": error * largest(v), "dq": error * d_weights * scale * largest(k),
            "dk": error * d_weights * scale * seen_by * largest(q), "dv": error * seen_by * largest(d_out)}


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def with_gradients(forward, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, d_out: Tensor) -> dict[str, Tensor]:
    """Output and the gradients of the inputs, by autograd."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, _ = forward(q, k, v, seen)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), d_out)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def doubled(inputs: Inputs, *names: str) -> list[Tensor]:
    return [inputs[name].double() for name in names]


def qkv(rng: Rng, heads: int, queries: int, keys: int, dim: int, dtype=torch.float32, kv_heads: int | None = None,
        scale: float = 1.0) -> dict[str, Tensor]:
    """Random queries, keys and values; the scores have a standard deviation of `scale` squared."""
    kv_heads = heads if kv_heads is None else kv_heads
    return {"q": rng.randn(heads, queries, dim, dtype=dtype, scale=scale),
            "k": rng.randn(kv_heads, keys, dim, dtype=dtype, scale=scale),
            "v": rng.randn(kv_heads, keys, dim, dtype=dtype)}


def rising(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with keys that match better and better: the maximum grows in every tile."""
    q, k = inputs["q"], inputs["k"]
    towards = q.mean(dim=1, keepdim=True)
    towards = towards / towards.norm(dim=-1, keepdim=True)
    steps = torch.linspace(0, 8, k.shape[1], dtype=k.dtype)[None, :, None]
    return {**inputs, "q": q + 3 * towards, "k": k + steps * towards[: k.shape[0]]}


def sunken(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with keys that point away from every query: all scores lie far below 0."""
    away = 35 * torch.nn.functional.one_hot(torch.tensor(0), inputs["q"].shape[2])
    return {**inputs, "q": inputs["q"] + away, "k": inputs["k"] - away}


def token_major(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers as projections leave them: [token, head, dim] in memory, seen as [head, token, dim]."""
    return {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items()}


def named_parts(outputs: Any, expected: Any, plain: Any, dtype: torch.dtype, *names: str) -> Finding | None:
    """Compare a tuple of outputs, each called by its name."""
    if not isinstance(outputs, (tuple, list)) or len(outputs) != len(names):
        return compare(outputs, tuple(expected))
    for got, want, rough, name in zip(outputs, expected, plain, names, strict=True):
        found = compare(got, want, rough, dtype, path=f"your {name}")
        if found:
            return found
    return None


def named_outputs(outputs: Any, expected: Mapping, plain: Mapping, dtype: torch.dtype) -> Finding | None:
    """The same for a dict of outputs."""
    return named_parts([outputs[n] for n in expected], expected.values(), plain.values(), dtype, *expected)


def kernel_fault(outputs: Mapping, limit: int, twin: bool) -> Finding | None:
    """What a kernel or its twin did besides writing its outputs; see `drive.report`."""
    if outputs["inputs changed"]:
        return Finding("you wrote into an input: results belong in the outputs")
    for name, count in outputs["outside"].items():
        if count:
            return Finding(f"you wrote {count} numbers outside `{name}`, into memory that is not yours: mask the store "
                           "of the last tile")
    if outputs["largest"] > limit:
        who = "a program sees one tile at a time" if twin else "the kernel is to do that"
        return Finding(f"PyTorch's {outputs['operation']} works on {outputs['largest']:,} numbers at once in your "
                       f"answer: {who}" + (f", at most {limit:,} numbers" if twin else ""))
    for name, count in outputs["unwritten"].items():
        if count:
            return Finding(f"you never wrote {count} of the {outputs[name].numel()} numbers of `{name}`: cover every "
                           "tile of every head, the ragged last one too")
    return None


def same_marks(outputs: Any, wrong: Any) -> bool:
    """Whether two runs of kernels wrote the same, inside their outputs and outside.

    Programs that write past their edges overwrite their neighbours' numbers, on a card in any order: then only how much
    they wrote is compared.
    """
    if not isinstance(outputs, Mapping) or any(bool(outputs["outside"][n]) != bool(wrong["outside"][n])
                                               for n in wrong["outside"]):
        return False
    if any(outputs["outside"].values()) and outputs["outside"] == wrong["outside"]:
        return True
    return all(compare(outputs[n], wrong[n], rough=True) is None for n in wrong["unwritten"])


class CountedAttention(Reference):
    exercise = "counted_attention"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        yield self._case("bytes in float32", rng, "bytes", "bytes", 2, rng.int(3, 6), rng.int(7, 9), 5)
        yield self._case("one head, 3 queries and 5 keys", rng, "output", "attention", 1, 3, 5, 7)
        yield self._case("two heads, as many keys as queries", rng, "output", "attention", 2, 6, 6, 5)
        yield self._case("one query against 33 keys", rng, "output", "attention", 3, 1, 33, 8)
        yield self._case("float16", rng, "output", "attention", 2, 5, 9, 16, dtype=torch.float16)
        yield self._case("causal, square", rng, "output", "causal", 2, 6, 6, 4, causal=True)
        yield self._case("causal, the last 3 queries of 8 tokens", rng, "output", "causal", 2, 3, 8, 5, causal=True)
        yield self._case("causal, one query", rng, "output", "causal", 1, 1, 6, 4, causal=True)
        yield self._case("bytes in float16", rng, "bytes", "bytes", 3, 7, 4, 8, dtype=torch.float16)
        yield self._case("bytes with a causal mask", rng, "bytes", "bytes", 3, 5, 6, 4, causal=True)
        yield self._case("bytes of one query", rng, "bytes", "bytes", 1, 1, 50, 16)
        yield Case("length 2,048, bfloat16", {**qkv(rng, 4, 2048, 2048, 64, torch.bfloat16), "causal": True,
                                              "wanted": "output"}, device="cuda")

    @staticmethod
    def _case(name, rng, wanted, part, heads, queries, keys, dim, dtype=torch.float32, causal=False) -> Case:
        inputs = {**qkv(rng, heads, queries, keys, dim, dtype), "causal": causal, "wanted": wanted}
        return Case(name, inputs, part)

    def expected(self, inputs, variant):
        q, k, v = doubled(inputs, "q", "k", "v")
        if inputs["wanted"] == "output":
            return attention(q, k, v, seen_keys(q.shape[1], k.shape[1], inputs["causal"]))[0]
        heads, queries, dim = q.shape
        keys = k.shape[1]
        size = inputs["q"].element_size()
        square = 4 * heads * queries * keys * (4 if variant["scores"] == "float32" else size)
        return (2 * heads * queries * dim + 2 * heads * keys * dim) * size + square

    def plain(self, inputs, variant):
        if inputs["wanted"] == "bytes":
            return None
        seen = seen_keys(inputs["q"].shape[1], inputs["k"].shape[1], inputs["causal"])
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        expected = self.expected(inputs, variant)
        plain = worst([f(q, k, v, seen)[0] for f in (attention, attention_base_2)], expected)
        return at_least(plain, expected, forward_errors(inputs)[0])

    mistakes = (
        Mistake("not scaled", NOT_SCALED, edit(" / math.sqrt(q.shape[-1])", "")),
        Mistake("divided by the dimension", DIVIDED_BY_DIM, edit("math.sqrt(q.shape[-1])", "q.shape[-1]")),
        Mistake("softmax over the queries", "Your softmax runs over the queries: the weights of one query, over all "
                "keys, add up to 1 (dim=-1).", edit("softmax(scores, dim=-1)", "softmax(scores, dim=-2)")),
        Mistake("mask aligned top-left", "Your causal mask is aligned top-left: the last query stands beside the last "
                "key, so query i sees keys 0 to i + keys - queries.", edit(".tril(keys - queries)", ".tril()")),
        Mistake("own key hidden", "Your causal mask hides the query's own key: a token sees itself.",
                edit(".tril(keys - queries)", ".tril(keys - queries - 1)")),
        Mistake("one key too many", "Your causal mask shows the next key as well: a query sees the keys up to its own "
                "position.", edit(".tril(keys - queries)", ".tril(keys - queries + 1)")),
        Mistake("mask reversed", "Your mask is turned around: you hide the past and show the future.",
                edit("masked_fill(~visible", "masked_fill(visible")),
        Mistake("masked to zero", "You set hidden scores to 0, and exp(0) = 1 still counts: set them to -inf, before "
                "the softmax.", edit("-math.inf", "0.0")),
        Mistake("masked after the softmax", "You mask after the softmax, so the weights that are left no longer add up "
                "to 1: set hidden scores to -inf before it.",
                (edit("        scores = scores.masked_fill(~visible, -math.inf)\n", ""),
                 edit("softmax(scores, dim=-1)", "softmax(scores, dim=-1) * (visible if causal else 1)"))),
        Mistake("scores written once", "The scores and the weights cross memory four times: the scores are written, "
                "read by the softmax, the weights are written, and read again for the product with V.",
                edit("4 * scores.numel()", "scores.numel()")),
        Mistake("scores twice", "You count two of the four crossings: the scores are written and read, and the "
                "weights, as large again, are written and read too.", edit("4 * scores.numel()", "2 * scores.numel()")),
        Mistake("scores not counted", "You count Q, K, V and O alone: standard attention also writes and reads the "
                "scores and the weights, queries x keys numbers a head each.", edit(" + 4 * scores.numel()", "")),
        Mistake("output not counted", "You leave out the output, which is written once.",
                edit(" + out.numel()", "")),
        Mistake("elements, not bytes", "You count numbers, and bytes are asked for: multiply by the bytes of one "
                "number (element_size()).", edit("elements * q.element_size()", "elements")),
        Mistake("four bytes always", "You count 4 bytes a number: float16 has 2 (element_size()).",
                edit("q.element_size()", "4")),
        Mistake("one head only", "You count the scores of one head: each head has its own.",
                edit("4 * scores.numel()", "4 * scores[0].numel()")),
        Mistake("half for causal", "You count half the scores under a causal mask, and standard attention computes the "
                "whole square and then hides half of it.",
                edit("4 * scores.numel()", "(2 if causal else 4) * scores.numel()")),
    )


class OnlineSoftmax(Reference):
    exercise = "online_softmax"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        yield Case("one block", self._inputs(rng, 3, [5], 4), part="one pass")
        yield Case("two blocks", self._inputs(rng, 4, [6, 6], 3), part="one pass")
        yield Case("blocks of 1, 7 and 3 keys", self._inputs(rng, 2, [1, 7, 3], 5), part="one pass")
        climbing = self._inputs(rng, 3, [4, 4, 4], 6)
        climbing["scores"] += torch.linspace(-3, 3, 12)
        yield Case("the maximum grows in every block", climbing, part="one pass")
        falling = self._inputs(rng, 3, [4, 4, 4], 6)
        falling["scores"] -= torch.linspace(-3, 3, 12)
        yield Case("the maximum is in the first block", falling, part="one pass")
        yield Case("every block is gone once read", self._inputs(rng, 16, [32] * 24, 16), part="one pass",
                   budget={"peak_bytes": 3.0})
        large = self._inputs(rng, 4, [5, 5, 5], 4)
        large["scores"] = large["scores"] * 2 + 300 * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
        yield Case("scores around 300 and -300", large, part="large scores")
        spread = self._inputs(rng, 3, [4, 4], 4)
        spread["scores"] *= 60
        yield Case("scores that differ by hundreds", spread, part="large scores")
        some = self._inputs(rng, 4, [4, 4, 4], 5)
        some["scores"][rng.uniform(4, 12) < 0.4] = -INFINITY
        some["scores"][:, 5] = rng.randn(4)
        yield Case("some scores are -inf", some, part="masked scores")
        late = self._inputs(rng, 3, [4, 4, 2], 5)
        late["scores"][1, :4] = -INFINITY
        late["scores"][2, :8] = -INFINITY
        yield Case("a first block that is all -inf", late, part="masked scores")
        early = self._inputs(rng, 3, [4, 4], 5)
        early["scores"][1, 4:] = -INFINITY
        yield Case("a last block that is all -inf", early, part="masked scores")
        blind = self._inputs(rng, 3, [3, 3], 4)
        blind["scores"][1] = -INFINITY
        yield Case("a query that sees no key at all", blind, part="masked scores")

    @staticmethod
    def _inputs(rng: Rng, queries: int, sizes: list[int], dim: int) -> dict:
        return {"scores": rng.randn(queries, sum(sizes)), "values": rng.randn(sum(sizes), dim), "sizes": sizes}

    def expected(self, inputs, variant):
        scores, values = doubled(inputs, "scores", "values")
        blind = (scores == -INFINITY).all(dim=1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=1).masked_fill(blind, 0.0)
        return weights @ values, torch.logsumexp(scores, dim=1)

    def plain(self, inputs, variant):
        scores, values = inputs["scores"], inputs["values"]
        error = EPS * (1 + largest(scores[scores > -INFINITY]))
        return at_least(self.frugal(inputs, variant), self.expected(inputs, variant), (error * largest(values), error))

    def frugal(self, inputs, variant):
        scores, values = inputs["scores"], inputs["values"]
        peak = scores.new_full((len(scores),), -INFINITY)
        total = torch.zeros_like(peak)
        out = scores.new_zeros(len(scores), values.shape[1])
        for block, block_values in once(scores, values, inputs["sizes"]):
            higher = torch.maximum(peak, block.amax(dim=1))
            safe = higher.masked_fill(higher == -INFINITY, 0.0)
            weights = torch.exp(block - safe[:, None])
            shrink = torch.exp(peak - safe)
            total = total * shrink + weights.sum(dim=1)
            out = out * shrink[:, None] + weights @ block_values
            peak = higher
        return out / total.masked_fill(total == 0, 1.0)[:, None], peak + torch.log(total)

    mistakes = (
        Mistake("no maximum", NO_MAXIMUM, """
def online_softmax(blocks):
    total = out = 0
    for scores, values in blocks:
        weights = torch.exp(scores)
        total = total + weights.sum(dim=1)
        out = out + weights @ values
    return out / total.masked_fill(total == 0, 1.0)[:, None], torch.log(total)
"""),
        Mistake("sum not rescaled", SUM_NOT_RESCALED, edit("total * shrink +", "total +")),
        Mistake("output not rescaled", OUTPUT_NOT_RESCALED, edit("out * shrink[:, None] +", "out +")),
        Mistake("nothing rescaled", NOTHING_RESCALED,
                (edit("total * shrink +", "total +"), edit("out * shrink[:, None] +", "out +"))),
        Mistake("factor turned round", "Your factor is turned round: what was summed in units of e^old becomes smaller "
                "when the maximum grows, so it is e^(old - new).", edit("peak - safe", "safe - peak")),
        Mistake("blocks averaged", "You take the softmax of every block by itself and average the results: a block "
                "counts by its share of the whole sum.", """
def online_softmax(blocks):
    outputs, sums = [], []
    for scores, values in blocks:
        peak = scores.amax(dim=1, keepdim=True).clamp(min=-1e30)
        weights = torch.exp(scores - peak)
        total = weights.sum(dim=1, keepdim=True)
        outputs.append(weights @ values / total.clamp(min=1e-30))
        sums.append(peak + torch.log(total))
    sums = torch.cat(sums, dim=1)
    peak = sums.amax(dim=1).clamp(min=-1e30)
    return torch.stack(outputs).mean(dim=0), peak + torch.log(torch.exp(sums - peak[:, None]).sum(dim=1))
"""),
        Mistake("divided in every block", "You divide by the sum in every block, and then add to what is divided "
                "already: divide once, after the last block.",
                (edit("weights @ values\n", "weights @ values\n        out = out / total.masked_fill(total == 0, 1.0)"
                      "[:, None]\n"),
                 edit("    out = out / total.masked_fill(total == 0, 1.0)[:, None]\n    return", "    return"))),
        Mistake("maximum of the block", "You use the maximum of the block at hand: the running maximum never falls, so "
                "take the larger of the old one and the block's.",
                edit("torch.maximum(peak, scores.amax(dim=1))", "scores.amax(dim=1)")),
        Mistake("one maximum for all", "You take one maximum for all queries: a query whose scores lie far below it "
                "gets e^(s - maximum) = 0 everywhere. Every query has a maximum of its own.",
                edit("scores.amax(dim=1)", "scores.amax().expand(len(scores))")),
        Mistake("minus infinity", MINUS_INFINITY,
                edit("higher.masked_fill(higher == -math.inf, 0.0)", "higher")),
        Mistake("zero over zero", ZERO_OVER_ZERO, edit("total.masked_fill(total == 0, 1.0)", "total")),
        Mistake("log-sum-exp without the maximum",
                LSE_WITHOUT_MAXIMUM, edit("peak + torch.log(total)", "torch.log(total)")),
    )


class MergePartials(Reference):
    exercise = "merge_partials"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        yield Case("halves of one head", self._inputs(rng, 1, 3, 4, 6, 6), part="merge")
        yield Case("2 keys and 31 keys, two heads", self._inputs(rng, 2, 4, 5, 2, 31), part="merge")
        yield Case("one query, one key against many", self._inputs(rng, 3, 1, 8, 1, 40), part="merge")
        large = self._inputs(rng, 2, 4, 5, 6, 6)
        shift = torch.tensor([[400.0], [-400.0]])
        yield Case("log-sum-exps around 400 and -400", {**large, "lse_a": large["lse_a"] + shift,
                                                        "lse_b": large["lse_b"] + shift}, part="large scores")
        apart = self._inputs(rng, 1, 4, 5, 6, 6)
        apart["lse_a"] = apart["lse_a"] + torch.tensor([200.0, -200.0, 3.0, -3.0])
        yield Case("one half outweighs the other", apart, part="large scores")
        yield Case("the first half is empty", self._inputs(rng, 2, 3, 4, 0, 5), part="empty halves")
        yield Case("the second half is empty", self._inputs(rng, 1, 3, 4, 7, 0), part="empty halves")
        yield Case("both halves are empty", self._inputs(rng, 1, 2, 4, 0, 0), part="empty halves")
        mixed = self._inputs(rng, 1, 4, 4, 5, 5)
        for half, rows in (("a", [0, 2]), ("b", [1, 2])):
            mixed[f"out_{half}"][0, rows] = 0.0
            mixed[f"lse_{half}"][0, rows] = -INFINITY
        yield Case("empty for some queries", mixed, part="empty halves")

    @staticmethod
    def _inputs(rng: Rng, heads: int, queries: int, dim: int, keys_a: int, keys_b: int) -> dict:
        inputs = {}
        for half, keys in (("a", keys_a), ("b", keys_b)):
            scores, values = 2 * rng.randn(heads, queries, keys), rng.randn(heads, keys, dim)
            inputs[f"out_{half}"] = torch.softmax(scores, dim=2) @ values
            inputs[f"lse_{half}"] = torch.logsumexp(scores, dim=2)
        return inputs

    def expected(self, inputs, variant):
        outs = torch.stack(doubled(inputs, "out_a", "out_b"))
        sums = torch.stack(doubled(inputs, "lse_a", "lse_b"))
        return self._merged(outs, sums)

    def plain(self, inputs, variant):
        outs, sums = (torch.stack([inputs[f"{name}_a"], inputs[f"{name}_b"]]) for name in ("out", "lse"))
        error = EPS * (1 + largest(sums.clamp(min=-1e3)))
        return at_least(self._merged(outs, sums), self.expected(inputs, variant), (error * largest(outs), error))

    @staticmethod
    def _merged(outs: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        lse = torch.logsumexp(sums, dim=0)
        shares = torch.exp(sums - lse.masked_fill(lse == -INFINITY, 0.0))
        return (shares[..., None] * outs).sum(dim=0), lse

    mistakes = (
        Mistake("averaged", "You average the two outputs: each half counts by its share of the whole sum, e^lse.",
                edit("return out / total.masked_fill(total == 0, 1.0)[..., None]", "return (out_a + out_b) / 2")),
        Mistake("added", "You add the two outputs, and each is divided by its own sum already: weigh them by their "
                "shares of the whole sum.", edit("return out / total.masked_fill(total == 0, 1.0)[..., None]",
                                       "return out_a + out_b")),
        Mistake("not divided", "You weigh the outputs and do not divide by the whole sum.",
                edit("return out / total.masked_fill(total == 0, 1.0)[..., None]", "return out")),
        Mistake("shares swapped", "Your weights are swapped: the first output belongs to the first log-sum-exp.",
                (edit("share_a[..., None] * out_a", "share_b[..., None] * out_a"),
                 edit("share_b[..., None] * out_b", "share_a[..., None] * out_b"))),
        Mistake("weighed by the logarithm", "You weigh by the log-sum-exps themselves: the sums are e^lse.",
                (edit("torch.exp(lse_a - peak), torch.exp(lse_b - peak)", "lse_a, lse_b"),
                 edit("peak + torch.log(total)", "torch.logaddexp(lse_a, lse_b)"))),
        Mistake("no maximum", "You take e^lse without the maximum: from 89 on it overflows float32, and from -104 down "
                "it is 0. Subtract the larger of the two first.",
                edit("peak = torch.maximum(lse_a, lse_b)\n    peak = peak.masked_fill(peak == -math.inf, 0.0)",
                     "peak = torch.zeros_like(lse_a)")),
        Mistake("minus infinity", MINUS_INFINITY, edit("    peak = peak.masked_fill(peak == -math.inf, 0.0)\n", "")),
        Mistake("zero over zero", "Where both halves are empty you divide 0 by 0: divide by 1 there.",
                edit("total.masked_fill(total == 0, 1.0)", "total")),
        Mistake("log-sum-exps added", "You add the log-sum-exps, which multiplies the sums: the new one is "
                "log(e^lse_a + e^lse_b).", edit("peak + torch.log(total)", "lse_a + lse_b")),
        Mistake("larger log-sum-exp", "You return the larger of the two log-sum-exps: add the logarithm of the sum of "
                "shares.", edit("peak + torch.log(total)", "torch.maximum(lse_a, lse_b)")),
        Mistake("log-sum-exp without the maximum", "Your log-sum-exp is that of the shares, from which the maximum was "
                "subtracted: add it again.", edit("peak + torch.log(total)", "torch.log(total)")),
    )


class TiledForward(Reference):
    exercise = "tiled_forward"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        def case(name, part, inputs, causal, block_q, block_k, **limits):
            return Case(name, {**inputs, "causal": causal, "block_q": block_q, "block_k": block_k}, part, **limits)

        yield case("one tile", "tiles", qkv(rng, 2, 4, 4, 8), False, 4, 4)
        yield case("scores in the hundreds", "tiles", qkv(rng, 2, 6, 20, 16, scale=12.0), False, 4, 8)
        yield case("2 x 3 whole tiles", "tiles", rising(qkv(rng, 2, 8, 12, 8)), False, 4, 4)
        yield case("ragged tiles, blocks of 5 and 3", "tiles", qkv(rng, 3, rng.int(11, 14), 17, 6), False, 5, 3)
        yield case("one query against 50 keys", "tiles", qkv(rng, 2, 1, 50, 16), False, 16, 16)
        yield case("many queries, one key", "tiles", qkv(rng, 1, 9, 1, 4), False, 4, 4)
        yield case("all scores around -300", "tiles", sunken(qkv(rng, 2, 6, 20, 16)), False, 4, 8)
        yield case("float16", "tiles", qkv(rng, 2, 10, 21, 16, torch.float16), False, 8, 8)
        many = qkv(rng, 4, 3, 400, 16, torch.float16)
        many["v"] += 3
        yield case("float16, 400 keys in tiles of one", "tiles", many, False, 3, 1)
        yield case("token-major memory", "tiles", token_major(qkv(rng, 3, 7, 10, 8)), False, 4, 4)
        yield case("causal, square", "causal", qkv(rng, 2, 12, 12, 8), True, 4, 4)
        yield case("causal, ragged, wide tiles", "causal", qkv(rng, 2, 13, 13, 8), True, 4, 6)
        yield case("causal, the last 5 queries of 18 tokens", "causal", qkv(rng, 2, 5, 18, 8), True, 4, 4)
        yield case("causal, one query", "causal", qkv(rng, 1, 1, 7, 8), True, 2, 3)
        yield case("causal, 9 queries and 4 keys: five see nothing", "causal", qkv(rng, 2, 9, 4, 8), True, 4, 2)
        yield case("128 queries, 512 keys", "memory", qkv(rng, 1, 128, 512, 8), False, 32, 32,
                   budget={"peak_bytes": 3.0})
        yield case("256 causal tokens", "memory", qkv(rng, 1, 256, 256, 8), True, 32, 32, budget={"peak_bytes": 3.0})
        yield case("length 4,096, head dimension 64, bfloat16",
                   "gpu", qkv(rng, 1, 4096, 4096, 64, torch.bfloat16), True,
                   256, 256, device="cuda", budget={"peak_bytes": 3.0}, seconds=60.0)

    def expected(self, inputs, variant):
        q, k, v = doubled(inputs, "q", "k", "v")
        out, lse = attention(q, k, v, seen_keys(q.shape[1], k.shape[1], inputs["causal"]))
        return out, (lse / math.log(2) if variant["lse"] == "base 2" else lse).float()

    def plain(self, inputs, variant):
        seen = seen_keys(inputs["q"].shape[1], inputs["k"].shape[1], inputs["causal"])
        base = math.log(2) if variant["lse"] == "base 2" else 1.0
        results = [f(inputs["q"], inputs["k"], inputs["v"], seen) for f in (attention, attention_base_2)]
        expected, (out_error, lse_error) = self.expected(inputs, variant), forward_errors(inputs)
        plain = worst([(out, lse / base) for out, lse in results], expected)
        return at_least(plain, expected, (out_error, lse_error / base))

    def frugal(self, inputs, variant):
        q, k, v, block_q, block_k = (inputs[name] for name in ("q", "k", "v", "block_q", "block_k"))
        queries, keys = q.shape[1], k.shape[1]
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
        for i in range(0, queries, block_q):
            q_tile = q[:, i : i + block_q].float() / math.sqrt(q.shape[2])
            peak = torch.full(q_tile.shape[:2], -INFINITY)
            total, acc = torch.zeros_like(peak), torch.zeros_like(q_tile)
            for j in range(0, keys, block_k):
                scores = q_tile @ k[:, j : j + block_k].float().transpose(1, 2)
                if inputs["causal"]:
                    position = torch.arange(i, i + q_tile.shape[1])[:, None] + keys - queries
                    scores = scores.masked_fill(torch.arange(j, j + scores.shape[2]) > position, -INFINITY)
                higher = torch.maximum(peak, scores.amax(dim=2))
                weights = torch.exp(scores - higher[..., None])
                shrink = torch.exp(peak - higher)
                total = total * shrink + weights.sum(dim=2)
                acc = acc * shrink[..., None] + weights @ v[:, j : j + block_k].float()
                peak = higher
            out[:, i : i + block_q] = acc / total[..., None]
            lse[:, i : i + block_q] = peak + torch.log(total)
        return out, lse

    def verify(self, inputs, outputs, expected, variant):
        found = named_parts(outputs, expected, self.plain(inputs, variant), inputs["q"].dtype, "output", "log-sum-exp")
        other = {"base e": "base 2", "base 2": "base e"}[variant["lse"]]
        if found and "log-sum-exp" in found.sentence and "is off" in found.sentence:
            swapped = {"lse": other}
            if not named_parts(outputs, self.expected(inputs, swapped), self.plain(inputs, swapped), inputs["q"].dtype,
                               "output", "log-sum-exp"):
                return Finding(f"your log-sum-exp is in {other}, and {variant['lse']} is asked of you: "
                               'see effnlp_lab.variant("tiled_forward")')
        return found

    def same_slip(self, outputs, wrong):
        bases = (1.0, 1 / math.log(2))  # the known mistakes answer in base e
        return any(compare(outputs, (wrong[0], wrong[1] * base), rough=True) is None for base in bases)

    mistakes = (
        Mistake("not scaled", NOT_SCALED, edit(".float() / math.sqrt(dim)", ".float()")),
        Mistake("divided by the dimension", DIVIDED_BY_DIM, edit("math.sqrt(dim)", "dim")),
        Mistake("no maximum", NO_MAXIMUM,
                edit("torch.maximum(peak, scores.amax(dim=2))", "torch.zeros_like(peak)")),
        Mistake("maximum from zero", MAXIMUM_FROM_ZERO,
                edit("q_tile.new_full(q_tile.shape[:2], -math.inf)", "q_tile.new_zeros(q_tile.shape[:2])")),
        Mistake("sum not rescaled", SUM_NOT_RESCALED, edit("total * shrink +", "total +")),
        Mistake("output not rescaled", OUTPUT_NOT_RESCALED, edit("acc * shrink[..., None] +", "acc +")),
        Mistake("nothing rescaled", NOTHING_RESCALED,
                (edit("total * shrink +", "total +"), edit("acc * shrink[..., None] +", "acc +"))),
        Mistake("mask aligned top-left", TOP_LEFT,
                edit("q_tile.shape[1], device=q.device) + keys - queries", "q_tile.shape[1], device=q.device)")),
        Mistake("own key hidden", OWN_KEY, edit("key > position", "key >= position")),
        Mistake("mask within the tile", "Your causal mask counts from the beginning of the tile: row r of the tile at "
                "i is query i + r, and column c of the tile at j is key j + c.",
                (edit("torch.arange(i, i + q_tile.shape[1], device", "torch.arange(0, q_tile.shape[1], device"),
                 edit("torch.arange(j, j + k_tile.shape[1], device", "torch.arange(0, k_tile.shape[1], device"))),
        Mistake("masked to zero", MASKED_TO_ZERO, edit("key > position[:, None], -math.inf",
                                                       "key > position[:, None], 0.0")),
        Mistake("minus infinity", MINUS_INFINITY, edit("higher.masked_fill(higher == -math.inf, 0.0)", "higher")),
        Mistake("zero over zero", ZERO_OVER_ZERO, edit("total.masked_fill(total == 0, 1.0)", "total")),
        Mistake("tail dropped", "You leave out the last keys where block_k does not divide their number: step through "
                "range(0, keys, block_k); a slice stops at the end by itself.",
                edit("range(0, keys, block_k)", "range(0, max(1, keys // block_k) * block_k, block_k)")),
        Mistake("log-sum-exp without the maximum",
                LSE_WITHOUT_MAXIMUM, edit("peak + torch.log(total)", "torch.log(total)")),
        Mistake("sum for its logarithm", "You return the sum itself, and its logarithm (with the maximum added) is "
                                         "asked for.",
                edit("peak + torch.log(total)", "total")),
        Mistake("summed in float16", HALF_SUMS,
                (edit("q[:, i : i + block_q].float()", "q[:, i : i + block_q]"),
                 edit("k[:, j : j + block_k].float(), v[:, j : j + block_k].float()",
                      "k[:, j : j + block_k], v[:, j : j + block_k]"))),
        Mistake("states not begun anew", "The running maximum, sum and output go on from one query tile to the next: "
                "begin them anew for each.", (
                    edit("        peak = q_tile.new_full(q_tile.shape[:2], -math.inf)\n"
                         "        total, acc = torch.zeros_like(peak), torch.zeros_like(q_tile)\n",
                         "        if i == 0:\n"
                         "            peak = q_tile.new_full(q_tile.shape[:2], -math.inf)\n"
                         "            total, acc = torch.zeros_like(peak), torch.zeros_like(q_tile)\n"
                         "        n = q_tile.shape[1]\n"
                         "        peak, total, acc = peak[:, :n], total[:, :n], acc[:, :n]\n"),)),
    )


class FlashKernel(Reference):
    exercise, twin = "flash_kernel", False

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        def case(name, part, inputs, causal, block_q, block_k, **limits):
            return Case(name, {**inputs, "causal": causal, "block_q": block_q, "block_k": block_k}, part, **limits)

        yield case("one tile", "whole tiles", qkv(rng, 1, 16, 16, 16), False, 16, 16)
        yield case("causal, square", "causal", qkv(rng, 2, 32, 32, 16), True, 16, 16)
        yield case("scores in the hundreds", "whole tiles", qkv(rng, 1, 32, 32, 16, scale=12.0), False, 16, 16)
        yield case("2 heads, 2 x 3 whole tiles", "whole tiles", rising(qkv(rng, 2, 32, 48, 16)), False, 16, 16)
        yield case("tiles of 32 x 16", "whole tiles", qkv(rng, 1, 64, 32, 16), False, 32, 16)
        yield case("all scores around -300", "whole tiles", sunken(qkv(rng, 1, 16, 32, 16)), False, 16, 16)
        yield case("float16, head dimension 32", "whole tiles", qkv(rng, 2, 32, 32, 32, torch.float16), False, 16, 16)
        yield case("ragged: 21 queries, 37 keys", "ragged edges", qkv(rng, 2, 21, 37, 16), False, 16, 16)
        yield case("one query against 50 keys", "ragged edges", qkv(rng, 2, 1, 50, 16), False, 16, 32)
        yield case("lengths shorter than a tile", "ragged edges", qkv(rng, 2, 3, 5, 16), False, 16, 16)
        yield case("one key", "ragged edges", qkv(rng, 1, 17, 1, 16), False, 16, 16)
        yield case("causal, ragged, tiles of 16 x 32", "causal", qkv(rng, 1, 45, 45, 16), True, 16, 32)
        yield case("causal, the last 5 queries of 40 tokens", "causal", qkv(rng, 2, 5, 40, 16), True, 16, 16)
        yield case("causal, 40 queries and 20 keys: twenty see nothing",
                   "causal", qkv(rng, 1, 40, 20, 16), True, 16, 16)
        yield case("6 query heads share 2 key heads",
                   "heads and strides", qkv(rng, 6, 16, 20, 16, kv_heads=2), False, 16, 16)
        yield case("token-major memory", "heads and strides", token_major(qkv(rng, 4, 18, 18, 16, kv_heads=2)), True,
                   16, 16)
        yield case("one long row of q, k and v", "heads and strides", self._fused(rng, 3, 20, 16), False, 16, 16)
        yield case("every second number of each row", "heads and strides", self._spread(rng, 2, 20, 16), False, 16, 16)
        if self.twin:  # one tile after the other: nothing of real size
            yield case("length 300, head dimension 64, bfloat16", "gpu",
                       token_major(qkv(rng, 2, 300, 300, 64, torch.bfloat16)), True, 64, 64, device="cuda")
            return
        yield case("length 4,096, head dimension 64, bfloat16, causal", "gpu",
                   token_major(qkv(rng, 1, 4096, 4096, 64, torch.bfloat16)), True, 64, 64, device="cuda")
        yield case("length 2,048, head dimension 128, 4 heads on 2, bfloat16", "gpu",
                   qkv(rng, 4, 2048, 2048, 128, torch.bfloat16, kv_heads=2), False, 32, 32, device="cuda")
        yield case("length 1,000, head dimension 64, float32", "gpu", qkv(rng, 2, 1000, 1000, 64), True, 32, 32,
                   device="cuda")
        yield case("one query against 20,000 keys, bfloat16", "gpu", qkv(rng, 4, 1, 20_000, 64, torch.bfloat16,
                                                                         kv_heads=1), True, 16, 64, device="cuda")

    @staticmethod
    def _fused(rng: Rng, heads: int, length: int, dim: int) -> dict:
        """Three views of one projection's output, [token, 3, head, dim] in memory."""
        fused = rng.randn(length, 3, heads, dim).permute(1, 2, 0, 3)
        return dict(zip("qkv", fused.unbind(), strict=True))

    @staticmethod
    def _spread(rng: Rng, heads: int, length: int, dim: int) -> dict:
        return {name: rng.randn(heads, length, 2 * dim)[..., ::2] for name in "qkv"}

    def expected(self, inputs, variant):
        q, k, v = doubled(inputs, "q", "k", "v")
        out, lse = attention(q, k, v, seen_keys(q.shape[1], k.shape[1], inputs["causal"]))
        return {"out": out, "lse": lse.float()}

    def plain(self, inputs, variant):
        seen = seen_keys(inputs["q"].shape[1], inputs["k"].shape[1], inputs["causal"])
        results = [f(inputs["q"], inputs["k"], inputs["v"], seen) for f in (attention, attention_base_2)]
        expected = self.expected(inputs, variant)
        plain = worst([dict(zip(expected, result, strict=True)) for result in results], expected)
        return at_least(plain, expected, dict(zip(expected, forward_errors(inputs), strict=True)))

    def verify(self, inputs, outputs, expected, variant):
        dim, wide = inputs["q"].shape[2], max(inputs["block_q"], inputs["block_k"])
        limit = wide * max(wide, dim) if self.twin else 0
        return kernel_fault(outputs, limit, self.twin) or named_outputs(
            outputs, expected, self.plain(inputs, variant), inputs["q"].dtype)

    def same_slip(self, outputs, wrong):
        return same_marks(outputs, wrong)

    mistakes = (
        Mistake("not scaled", NOT_SCALED, edit('tl.dot(q, tl.trans(k), input_precision="ieee") * scale',
                                               'tl.dot(q, tl.trans(k), input_precision="ieee")')),
        Mistake("no maximum", NO_MAXIMUM, edit("tl.maximum(peak, tl.max(scores, 1))",
                                               "tl.zeros([BLOCK_Q], tl.float32)")),
        Mistake("maximum from zero", MAXIMUM_FROM_ZERO,
                edit('peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)', "peak = tl.zeros([BLOCK_Q], tl.float32)")),
        Mistake("sum not rescaled", SUM_NOT_RESCALED, edit("total * shrink +", "total +")),
        Mistake("output not rescaled", OUTPUT_NOT_RESCALED, edit("acc * shrink[:, None] +", "acc +")),
        Mistake("nothing rescaled", NOTHING_RESCALED,
                (edit("total * shrink +", "total +"), edit("acc * shrink[:, None] +", "acc +"))),
        Mistake("mask aligned top-left", TOP_LEFT, edit("row[:, None] + keys - queries", "row[:, None]")),
        Mistake("own key hidden", OWN_KEY, edit("(key[None, :] <= row", "(key[None, :] < row")),
        Mistake("tail scored zero", TAIL_SCORED_ZERO,
                edit("visible = key[None, :] < keys", "visible = key[None, :] >= 0")),
        Mistake("masked to zero", MASKED_TO_ZERO, edit('scores = tl.where(visible, scores, float("-inf"))',
                                                       "scores = tl.where(visible, scores, 0.0)")),
        Mistake("minus infinity", MINUS_INFINITY, edit('tl.where(higher == float("-inf"), 0.0, higher)', "higher")),
        Mistake("zero over zero", ZERO_OVER_ZERO, edit("    total = tl.where(total == 0.0, 1.0, total)\n", "")),
        Mistake("log-sum-exp without the maximum", LSE_WITHOUT_MAXIMUM, edit("peak + tl.log(total)", "tl.log(total)")),
        Mistake("values not masked", READ_PAST, edit("v = tl.load(v_at, mask=inside, other=0.0)", "v = tl.load(v_at)")),
        Mistake("store not masked", STORE_PAST, edit("acc / total[:, None], mask=row[:, None] < queries",
                                                     "acc / total[:, None]")),
        Mistake("log-sum-exp store not masked", "Your store of the log-sum-exp is not masked: the last tile writes "
                "past the end of the head, into the next one's.", edit("peak + tl.log(total), mask=row < queries",
                                                                  "peak + tl.log(total)")),
        Mistake("every program does the first tile", FIRST_TILE, edit("tile * BLOCK_Q + tl.arange", "tl.arange")),
        Mistake("programs rounded down", PROGRAMS_DOWN,
                edit("triton.cdiv(queries, block_q)", "max(1, queries // block_q)")),
        Mistake("heads dealt out in turns", HEADS_IN_TURNS,
                (edit("(head // group) * k_head", "(head % (tl.num_programs(1) // group)) * k_head"),
                 edit("(head // group) * v_head", "(head % (tl.num_programs(1) // group)) * v_head"))),
        Mistake("a key head for each query head", OWN_KEY_HEAD,
                (edit("(head // group) * k_head", "head * k_head"), edit("(head // group) * v_head", "head * v_head"))),
        Mistake("strides taken for granted", STRIDES,
                (edit("head * q_head + row[:, None] * q_row + dims[None, :] * q_dim",
                      "head * queries * DIM + row[:, None] * DIM + dims[None, :]"),
                 edit("(head // group) * k_head + key[:, None] * k_row + dims[None, :] * k_dim",
                      "(head // group) * keys * DIM + key[:, None] * DIM + dims[None, :]"),
                 edit("(head // group) * v_head + key[:, None] * v_row + dims[None, :] * v_dim",
                      "(head // group) * keys * DIM + key[:, None] * DIM + dims[None, :]"),
                 edit("head * out_head + row[:, None] * out_row + dims[None, :] * out_dim",
                      "head * queries * DIM + row[:, None] * DIM + dims[None, :]"))),
        Mistake("TF32", TF32, (edit('tl.dot(q, tl.trans(k), input_precision="ieee")', "tl.dot(q, tl.trans(k))"),
                               edit('v, input_precision="ieee")', "v)"))),
    )


class FlashKernelTwin(FlashKernel):
    exercise, twin = "flash_kernel_twin", True

    mistakes = (
        Mistake("not scaled", NOT_SCALED, edit(".float().T * scale", ".float().T")),
        Mistake("no maximum", NO_MAXIMUM, edit("torch.maximum(peak, scores.amax(dim=1))", "torch.zeros_like(peak)")),
        Mistake("maximum from zero", MAXIMUM_FROM_ZERO,
                edit("torch.full([block_q], -math.inf, device", "torch.full([block_q], 0.0, device")),
        Mistake("sum not rescaled", SUM_NOT_RESCALED, edit("total * shrink +", "total +")),
        Mistake("output not rescaled", OUTPUT_NOT_RESCALED, edit("acc * shrink[:, None] +", "acc +")),
        Mistake("nothing rescaled", NOTHING_RESCALED,
                (edit("total * shrink +", "total +"), edit("acc * shrink[:, None] +", "acc +"))),
        Mistake("mask aligned top-left", TOP_LEFT, edit("row[:, None] + keys - queries", "row[:, None]")),
        Mistake("own key hidden", OWN_KEY, edit("(key <= row", "(key < row")),
        Mistake("tail scored zero", TAIL_SCORED_ZERO, edit("visible = key < keys", "visible = key >= 0")),
        Mistake("masked to zero", MASKED_TO_ZERO, edit("torch.where(visible, scores, -math.inf)",
                                                       "torch.where(visible, scores, 0.0)")),
        Mistake("minus infinity", MINUS_INFINITY, edit("torch.where(higher == -math.inf, 0.0, higher)", "higher")),
        Mistake("zero over zero", ZERO_OVER_ZERO, edit("    total = torch.where(total == 0, 1.0, total)\n", "")),
        Mistake("log-sum-exp without the maximum",
                LSE_WITHOUT_MAXIMUM, edit("peak + torch.log(total)", "torch.log(total)")),
        Mistake("values not masked", READ_PAST, edit("load(v, v_at, inside)", "load(v, v_at, inside | True)")),
        Mistake("store not masked", STORE_PAST, edit("acc / total[:, None], row[:, None] < queries",
                                                     "acc / total[:, None], row[:, None] >= 0")),
        Mistake("log-sum-exp store not masked", "Your store of the log-sum-exp is not masked: the last tile writes "
                "past the end of the head, into the next one's.", edit("peak + torch.log(total), row < queries",
                                                                  "peak + torch.log(total), row >= 0")),
        Mistake("every program does the first tile", FIRST_TILE, edit("tile * block_q + torch.arange", "torch.arange")),
        Mistake("programs rounded down", PROGRAMS_DOWN,
                edit("-(-q.shape[1] // block_q)", "max(1, q.shape[1] // block_q)")),
        Mistake("heads dealt out in turns", HEADS_IN_TURNS,
                (edit("head // group * k.stride(0)", "head % k.shape[0] * k.stride(0)"),
                 edit("head // group * v.stride(0)", "head % k.shape[0] * v.stride(0)"))),
        Mistake("a key head for each query head", OWN_KEY_HEAD,
                (edit("head // group * k.stride(0)", "head * k.stride(0)"),
                 edit("head // group * v.stride(0)", "head * v.stride(0)"))),
        Mistake("strides taken for granted", STRIDES,
                (edit("head * q.stride(0) + row[:, None] * q.stride(1) + dims * q.stride(2)",
                      "(head * queries + row[:, None]) * dim + dims"),
                 edit("head // group * k.stride(0) + key[:, None] * k.stride(1) + dims * k.stride(2)",
                      "(head // group * keys + key[:, None]) * dim + dims"),
                 edit("head // group * v.stride(0) + key[:, None] * v.stride(1) + dims * v.stride(2)",
                      "(head // group * keys + key[:, None]) * dim + dims"),
                 edit("head * out.stride(0) + row[:, None] * out.stride(1) + dims * out.stride(2)",
                      "(head * queries + row[:, None]) * dim + dims"))),
    )


class FlashBackward(Reference):
    exercise = "flash_backward"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        def case(name, part, inputs, causal, block_q, block_k, **limits):
            return Case(name, {**self._forward(rng, inputs, causal), "causal": causal, "block_q": block_q,
                               "block_k": block_k}, part, **limits)

        yield case("one tile", "gradients", qkv(rng, 1, 4, 4, 8), False, 4, 4)
        yield case("2 heads, 2 x 3 whole tiles", "gradients", qkv(rng, 2, 8, 12, 8), False, 4, 4)
        yield case("ragged tiles, blocks of 5 and 3", "gradients", qkv(rng, 2, rng.int(11, 14), 17, 6), False, 5, 3)
        yield case("one query against 50 keys", "gradients", qkv(rng, 2, 1, 50, 16), False, 16, 16)
        yield case("scores around 60", "gradients", rising(qkv(rng, 1, 6, 20, 8, scale=2.0)), False, 4, 8)
        yield case("float16", "gradients", qkv(rng, 2, 10, 13, 16, torch.float16), False, 8, 8)
        many = qkv(rng, 4, 300, 3, 16, torch.float16)
        yield case("float16, 300 queries in tiles of one", "gradients", many, False, 1, 3)
        yield case("causal, square", "causal", qkv(rng, 2, 12, 12, 8), True, 4, 4)
        yield case("causal, ragged", "causal", qkv(rng, 2, 13, 13, 8), True, 4, 6)
        yield case("causal, the last 5 queries of 18 tokens", "causal", qkv(rng, 1, 5, 18, 8), True, 4, 4)
        yield case("causal, 9 queries and 4 keys: five see nothing", "causal", qkv(rng, 2, 9, 4, 8), True, 4, 2)
        yield case("128 queries, 384 keys", "memory", qkv(rng, 1, 128, 384, 4), False, 32, 32,
                   budget={"peak_bytes": 3.0})
        yield case("length 2,048, head dimension 64, bfloat16",
                   "gpu", qkv(rng, 1, 2048, 2048, 64, torch.bfloat16), True,
                   256, 256, device="cuda", budget={"peak_bytes": 3.0}, seconds=60.0)

    @staticmethod
    def _forward(rng: Rng, inputs: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
        q, k, v = doubled(inputs, "q", "k", "v")
        out, lse = attention(q, k, v, seen_keys(q.shape[1], k.shape[1], causal))
        return {**inputs, "out": out.to(inputs["q"].dtype), "lse": lse.float(),
                "d_out": rng.randn(*q.shape, dtype=inputs["q"].dtype)}

    def expected(self, inputs, variant):
        q, k, v, d_out = doubled(inputs, "q", "k", "v", "d_out")
        found = with_gradients(attention, q, k, v, seen_keys(q.shape[1], k.shape[1], inputs["causal"]), d_out)
        return found["dq"], found["dk"], found["dv"]

    def plain(self, inputs, variant):
        seen = seen_keys(inputs["q"].shape[1], inputs["k"].shape[1], inputs["causal"])
        results = [with_gradients(f, inputs["q"], inputs["k"], inputs["v"], seen, inputs["d_out"])
                   for f in (attention, attention_base_2)]
        triples = [tuple(r[name] for name in ("dq", "dk", "dv")) for r in results]
        expected, errors = self.expected(inputs, variant), backward_errors(inputs)
        plain = worst([*triples, self._recomputed(inputs, seen)], expected)
        return at_least(plain, expected, (errors["dq"], errors["dk"], errors["dv"]))

    @staticmethod
    def _recomputed(inputs: Inputs, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the log-sum-exp, all at once, in the inputs' dtype."""
        q, k, v, out, lse, d_out = (inputs[name] for name in ("q", "k", "v", "out", "lse", "d_out"))
        scale = 1 / math.sqrt(q.shape[2])
        weights = torch.exp(q @ k.transpose(1, 2) * scale - lse[..., None]).masked_fill(~seen, 0.0).to(q.dtype)
        d_scores = weights * (d_out @ v.transpose(1, 2) - (d_out * out).sum(dim=2, keepdim=True)) * scale
        return d_scores @ k, d_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ d_out

    def frugal(self, inputs, variant):
        q, k, v, out, lse, d_out = (inputs[name] for name in ("q", "k", "v", "out", "lse", "d_out"))
        block_q, block_k, scale = inputs["block_q"], inputs["block_k"], 1 / math.sqrt(q.shape[2])
        delta = (out.float() * d_out.float()).sum(dim=2)
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        for j in range(0, k.shape[1], block_k):
            columns = slice(j, j + block_k)
            for i in range(0, q.shape[1], block_q):
                rows = slice(i, i + block_q)
                scores = q[:, rows].float() @ k[:, columns].float().transpose(1, 2)
                weights = torch.exp(scores * scale - lse[:, rows, None])
                if inputs["causal"]:
                    key = torch.arange(j, j + weights.shape[2])
                    position = torch.arange(i, i + weights.shape[1])[:, None] + k.shape[1] - q.shape[1]
                    weights = weights.masked_fill(key > position, 0.0)
                d_weights = d_out[:, rows].float() @ v[:, columns].float().transpose(1, 2)
                d_scores = weights * (d_weights - delta[:, rows, None]) * scale
                dv[:, columns] += weights.transpose(1, 2) @ d_out[:, rows].float()
                dk[:, columns] += d_scores.transpose(1, 2) @ q[:, rows].float()
                dq[:, rows] += d_scores @ k[:, columns].float()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def verify(self, inputs, outputs, expected, variant):
        return named_parts(outputs, expected, self.plain(inputs, variant), inputs["q"].dtype, "dq", "dk", "dv")

    def same_slip(self, outputs, wrong):
        dtypes = [[x.dtype for x in parts if isinstance(x, Tensor)] for parts in (outputs, wrong)]
        return dtypes[0] == dtypes[1] and compare(outputs, wrong, rough=True) is None

    mistakes = (
        Mistake("D left out", NO_DELTA, edit("(d_weights - delta[:, rows, None])", "d_weights")),
        Mistake("D from the weights of one tile",
                "You take D over the tile at hand: D belongs to the whole row, the sum of "
                "d_out * out over the head dimension, computed once before the loop.",
                edit("(d_weights - delta[:, rows, None])",
                     "(d_weights - (weights * d_weights).sum(dim=2, keepdim=True))")),
        Mistake("scores not scaled", "Your recomputed scores are not scaled by 1/sqrt(d), and the log-sum-exp is that "
                "of scaled scores.", edit("k_tile.transpose(1, 2) * scale", "k_tile.transpose(1, 2)")),
        Mistake("gradient not scaled", GRADIENT_NOT_SCALED,
                edit("delta[:, rows, None]) * scale", "delta[:, rows, None])")),
        Mistake("softmax over the tile", "You take the softmax over the tile at hand: the weights are e^(s - lse), "
                "with the log-sum-exp of the whole row.",
                edit("torch.exp(q_tile @ k_tile.transpose(1, 2) * scale - lse[:, rows, None])",
                     "torch.softmax(q_tile @ k_tile.transpose(1, 2) * scale, dim=2)")),
        Mistake("softmax backward left out", "You send the gradient of the weights straight to the scores: through the "
                "softmax it becomes dS = P * (dP - D).",
                edit("weights * (d_weights - delta[:, rows, None])", "d_weights")),
        Mistake("weights left out of dS", "dS = P * (dP - D): you leave out the factor P.",
                edit("weights * (d_weights - delta[:, rows, None])", "(d_weights - delta[:, rows, None])")),
        Mistake("dV from dS", "dV = P^T dO: it takes the weights, and not dS.",
                edit("dv[:, columns] += weights.transpose(1, 2)", "dv[:, columns] += d_scores.transpose(1, 2)")),
        Mistake("mask left out", "You compute the weights again without the causal mask: a key that a query does not "
                "see has weight 0.", edit("masked_fill(key > position[:, None], 0.0)", "clone()")),
        Mistake("mask aligned top-left", TOP_LEFT, edit(" + keys - queries", "")),
        Mistake("own key hidden", OWN_KEY, edit("key > position", "key >= position")),
        Mistake("minus infinity", "A query that sees no key has score -inf and log-sum-exp -inf: -inf minus -inf is "
                "NaN. Set its weights to 0 after the exponential.",
                (edit("weights = torch.exp(q_tile @ k_tile.transpose(1, 2) * scale - lse[:, rows, None])",
                      "scores = q_tile @ k_tile.transpose(1, 2) * scale"),
                 edit("weights = weights.masked_fill(key > position[:, None], 0.0)",
                      "scores = scores.masked_fill(key > position[:, None], -math.inf)"),
                 edit("            d_weights = do_tile",
                      "            weights = torch.exp(scores - lse[:, rows, None])\n"
                      "            d_weights = do_tile"))),
        Mistake("dQ overwritten", "Every key tile adds a share to dQ: you overwrite it and keep the last one.",
                edit("dq[:, rows] += ", "dq[:, rows] = ")),
        Mistake("dK and dV overwritten", "Every query tile adds a share to dK and dV: you overwrite them and keep the "
                "last one.",
                (edit("dv[:, columns] += ", "dv[:, columns] = "), edit("dk[:, columns] += ", "dk[:, columns] = "))),
        Mistake("summed in float16", HALF_SUMS,
                edit("torch.zeros_like(x, dtype=torch.float32)", "torch.zeros_like(x)")),
        Mistake("gradients in float32", "The gradients come in the dtype of the inputs: convert once, at the end.",
                edit("dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)", "dq, dk, dv")),
    )


class TilePlan(Reference):
    exercise = "tile_plan"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        def case(name, part, queries, keys, block_q, block_k):
            return Case(name, {"queries": queries, "keys": keys, "block_q": block_q, "block_k": block_k}, part)

        yield case("four square tiles", "square", 64, 64, 16, 16)
        yield case("tiles twice as wide as high", "square", 64, 64, 8, 16)
        yield case("tiles twice as high as wide", "square", 64, 64, 16, 8)
        yield case("ragged last tiles", "square", 50, 50, 16, 16)
        yield case("one token", "square", 1, 1, 4, 4)
        yield case("tiles of one", "square", 5, 5, 1, 1)
        yield case("random square", "square", *([rng.int(20, 90)] * 2), rng.int(2, 9), rng.int(2, 9))
        yield case("one query against 100 keys", "other shapes", 1, 100, 16, 16)
        yield case("the last 5 queries of 37 tokens", "other shapes", 5, 37, 2, 8)
        yield case("more queries than keys", "other shapes", 40, 12, 8, 4)
        yield case("more queries than keys, tiles of one", "other shapes", 6, 3, 1, 1)
        yield case("random shape", "other shapes", rng.int(5, 40), rng.int(41, 90), rng.int(2, 9), rng.int(2, 9))

    def expected(self, inputs, variant):
        """By looking at every tile of the mask."""
        queries, keys, block_q, block_k = (inputs[n] for n in ("queries", "keys", "block_q", "block_k"))
        plan = []
        for rows in seen_keys(queries, keys, causal=True).split(block_q):
            tiles = rows.split(block_k, dim=1)
            full = sum(bool(t.all()) and t.shape[1] == block_k for t in tiles)
            plan.append((full, sum(bool(t.any()) for t in tiles)))
        return plan

    mistakes = (
        Mistake("everything visited", "You visit every key tile: a tile that lies wholly above the diagonal holds no "
                "key that the queries see.", edit("-(-one_sees // block_k)", "-(-keys // block_k)")),
        Mistake("mask aligned top-left", TOP_LEFT,
                (edit("first + keys - queries + 1", "first + 1"), edit("last + keys - queries + 1", "last + 1"))),
        Mistake("own key hidden", OWN_KEY, (edit("first + keys - queries + 1", "first + keys - queries"),
                                            edit("last + keys - queries + 1", "last + keys - queries"))),
        Mistake("rounded down", "The last tile that is visited may be seen in part: round up.",
                edit("-(-one_sees // block_k)", "one_sees // block_k")),
        Mistake("full for one query", "A tile is full when every query of the tile sees all of it: that is decided by "
                "the first query, and you ask the last one.", edit("all_see // block_k", "one_sees // block_k")),
        Mistake("first query decides both", "A tile is visited as soon as one query of the tile sees something in it: "
                "that is decided by the last query, and you ask the first one.", edit("-(-one_sees", "-(-all_see")),
        Mistake("ragged tile taken for whole", "The last query tile is ragged: its last query is number queries - 1, "
                "and you count past it.", edit("min(first + block_q, queries) - 1", "first + block_q - 1")),
        Mistake("negative counts", "Where there are more queries than keys the first queries see nothing: a count "
                "cannot fall below 0.", (edit("max(0, first + keys - queries + 1)", "first + keys - queries + 1"),
                                  edit("max(0, last + keys - queries + 1)", "last + keys - queries + 1"))),
    )


class WindowAttention(Reference):
    exercise = "window_attention"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        def case(name, part, inputs, window, block, **limits):
            return Case(name, {**inputs, "window": window, "block": block}, part, **limits)

        yield case("window 3, whole blocks", "window", qkv(rng, 2, 12, 12, 8), 3, 4)
        yield case("window 1: every query sees its own key", "window", qkv(rng, 1, 7, 7, 8), 1, 3)
        yield case("window wider than the text", "window", qkv(rng, 2, 9, 9, 8), 100, 4)
        yield case("ragged blocks", "window", qkv(rng, 2, 17, 17, 8), rng.int(4, 6), 5)
        yield case("the last 5 queries of 20 tokens", "window", qkv(rng, 2, 5, 20, 8), 4, 3)
        yield case("one query", "window", qkv(rng, 1, 1, 9, 8), 4, 8)
        yield case("1,024 tokens, window 32", "cost", qkv(rng, 1, 1024, 1024, 8), 32, 32,
                   budget={"peak_bytes": 3.0, "flops": 2.2})
        yield case("the last 64 queries of 1,024 tokens, window 16", "cost", qkv(rng, 1, 64, 1024, 8), 16, 16,
                   budget={"peak_bytes": 3.0, "flops": 2.2})
        yield case("length 4,096, window 128, head dimension 64", "gpu", qkv(rng, 1, 4096, 4096, 64), 128, 128,
                   device="cuda", budget={"peak_bytes": 3.0, "flops": 2.2})

    def expected(self, inputs, variant):
        return self._right(attention, *doubled(inputs, "q", "k", "v"), inputs["window"])

    def plain(self, inputs, variant):
        q, k, v, window = (inputs[name] for name in ("q", "k", "v", "window"))
        expected = self.expected(inputs, variant)
        plain = worst([self._right(f, q, k, v, window) for f in (attention, attention_base_2)], expected)
        return at_least(plain, expected, forward_errors(inputs)[0])

    @staticmethod
    def _right(forward, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return forward(q, k, v, seen_keys(q.shape[1], k.shape[1], True, window))[0]

    def frugal(self, inputs, variant):
        q, k, v, window, block = (inputs[name] for name in ("q", "k", "v", "window", "block"))
        out, offset = torch.empty_like(q), k.shape[1] - q.shape[1]
        for i in range(0, q.shape[1], block):
            q_tile = q[:, i : i + block]
            first, last = max(0, i + offset - window + 1), i + offset + q_tile.shape[1]
            seen = seen_keys(q_tile.shape[1], last - first, True, window)
            out[:, i : i + block] = attention(q_tile, k[:, first:last], v[:, first:last], seen)[0]
        return out

    mistakes = (
        Mistake("not scaled", NOT_SCALED, edit(" / math.sqrt(q.shape[2])", "")),
        Mistake("window one too wide", "Your window keeps W + 1 keys: the query's own key is one of the W, so the "
                "distance is at most W - 1. (flash-attn's `window_size=(W, 0)` counts as you do.)",
                (edit("offset - window + 1)", "offset - window)"), edit("distance >= window", "distance > window"))),
        Mistake("window one too narrow", "Your window keeps W - 1 keys: the query's own key is one of the W, and W - 1 "
                "before it are seen.", edit("distance >= window", "distance >= window - (window > 1)")),
        Mistake("no window", "Your queries see all the past: keys at a distance of W or more are hidden.",
                (edit("max(0, i + offset - window + 1)", "0"), edit(" | (distance >= window)", ""))),
        Mistake("window on both sides", "Your window reaches into the future: attention stays causal.",
                (edit("i + offset + q_tile.shape[1])", "i + offset + q_tile.shape[1] + window - 1)"),
                 edit("torch.arange(near.start, near.stop, device=q.device)",
                      "torch.arange(near.start, min(near.stop, k.shape[1]), device=q.device)"),
                 edit("(distance < 0)", "(-distance >= window)"))),
        Mistake("mask aligned top-left", TOP_LEFT, edit("offset = k.shape[1] - q.shape[1]", "offset = 0")),
        Mistake("masked to zero", MASKED_TO_ZERO, edit("-math.inf", "0.0")),
        Mistake("edge not masked", "Neighbouring queries of a block see different keys: mask the scores inside the "
                "slice as well.", edit("scores = scores.masked_fill((distance < 0) | (distance >= window), -math.inf)",
                                 "scores = scores.masked_fill(distance < 0, -math.inf)")),
    )


class ChunkedAttention(Reference):
    exercise = "chunked_attention"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        def case(name, part, inputs, causal, chunk, **limits):
            d_out = rng.randn(*inputs["q"].shape)
            return Case(name, {**inputs, "d_out": d_out, "causal": causal, "chunk": chunk}, part, **limits)

        yield case("one chunk", "gradients", qkv(rng, 1, 4, 6, 8), False, 4)
        yield case("a ragged last chunk", "gradients", qkv(rng, 2, 11, 13, 8), False, 4)
        yield case("scores in the hundreds", "gradients", qkv(rng, 1, 6, 9, 16, scale=12.0), False, 4)
        yield case("causal, chunks of 3", "gradients", qkv(rng, 2, 10, 10, 8), True, 3)
        yield case("causal, the last 5 queries of 18 tokens", "gradients", qkv(rng, 1, 5, 18, 8), True, 2)
        yield case("512 tokens, chunks of 16", "memory", qkv(rng, 1, 512, 512, 8), True, 16, budget={"peak_bytes": 2.0})
        yield case("length 2,048, head dimension 64", "gpu", qkv(rng, 1, 2048, 2048, 64), True, 128, device="cuda",
                   budget={"peak_bytes": 2.0})

    def expected(self, inputs, variant):
        q, k, v, d_out = doubled(inputs, "q", "k", "v", "d_out")
        return with_gradients(attention, q, k, v, seen_keys(q.shape[1], k.shape[1], inputs["causal"]), d_out)

    def plain(self, inputs, variant):
        seen = seen_keys(inputs["q"].shape[1], inputs["k"].shape[1], inputs["causal"])
        results = [with_gradients(f, inputs["q"], inputs["k"], inputs["v"], seen, inputs["d_out"])
                   for f in (attention, attention_base_2)]
        expected = self.expected(inputs, variant)
        return at_least(worst(results, expected), expected, backward_errors(inputs))

    def frugal(self, inputs, variant):
        from torch.utils.checkpoint import checkpoint

        q, k, v = (inputs[name].detach().clone().requires_grad_() for name in "qkv")
        offset = k.shape[1] - q.shape[1]

        def attend(chunk: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
            scores = chunk @ k.transpose(1, 2) / math.sqrt(q.shape[2])
            if inputs["causal"]:
                position = torch.arange(first, first + chunk.shape[1])[:, None] + offset
                scores = scores.masked_fill(torch.arange(k.shape[1]) > position, -INFINITY)
            return torch.softmax(scores, dim=-1) @ v

        starts = range(0, q.shape[1], inputs["chunk"])
        chunks = [checkpoint(attend, piece, k, v, first, use_reentrant=False)
                  for piece, first in zip(q.split(inputs["chunk"], dim=1), starts, strict=True)]
        out = torch.cat(chunks, dim=1)
        out.backward(inputs["d_out"])
        return out

    def verify(self, inputs, outputs, expected, variant):
        return named_outputs(outputs, expected, self.plain(inputs, variant), inputs["q"].dtype)

    mistakes = (
        Mistake("not scaled", NOT_SCALED, edit(" / math.sqrt(q_chunk.shape[2])", "")),
        Mistake("no maximum", NO_MAXIMUM,
                edit("return torch.softmax(scores, dim=2) @ v",
                     "return (torch.exp(scores) @ v) / torch.exp(scores).sum(2, keepdim=True)")),
        Mistake("mask aligned top-left", TOP_LEFT, edit(" + offset", "")),
        Mistake("own key hidden", OWN_KEY, edit("key > position", "key >= position + (position < 1)")),
        Mistake("mask within the chunk", "Your causal mask counts from the beginning of the chunk: row r of the chunk "
                "that begins at `first` is query first + r.",
                edit("torch.arange(first, first + q_chunk.shape[1], device",
                     "torch.arange(0, q_chunk.shape[1], device")),
        Mistake("tail dropped", "You leave out the last queries where `chunk` does not divide their number.",
                edit("range(0, q.shape[1], chunk)", "range(0, max(1, q.shape[1] // chunk) * chunk, chunk)")),
        Mistake("detached", "You cut the values off from autograd: their gradient is missing.",
                edit("checkpoint(attend, q[:, i : i + chunk], k, v, i,", "checkpoint(attend, q[:, i : i + chunk], k, "
                     "v.detach(), i,")),
    )


class BackwardKernel(Reference):
    exercise, twin = "backward_kernel", False

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        def case(name, part, inputs, causal, block_q, block_k, **limits):
            forward = FlashBackward._forward(rng, inputs, causal)
            out = forward.pop("out")
            delta = (out.double() * forward["d_out"].double()).sum(dim=2).float()
            inputs = {**forward, "delta": delta, "causal": causal, "block_q": block_q, "block_k": block_k}
            return Case(name, inputs, part, **limits)

        yield case("one tile", "gradients", qkv(rng, 1, 16, 16, 16), False, 16, 16)
        yield case("2 heads, 2 x 3 whole tiles", "gradients", qkv(rng, 2, 32, 48, 16), False, 16, 16)
        yield case("tiles of 32 x 16", "gradients", qkv(rng, 1, 64, 32, 16), False, 32, 16)
        yield case("float16", "gradients", qkv(rng, 1, 32, 32, 16, torch.float16), False, 16, 16)
        yield case("ragged: 21 queries, 37 keys", "ragged edges", qkv(rng, 2, 21, 37, 16), False, 16, 16)
        yield case("one query against 50 keys", "ragged edges", qkv(rng, 2, 1, 50, 16), False, 16, 32)
        yield case("causal, square", "causal", qkv(rng, 2, 32, 32, 16), True, 16, 16)
        yield case("causal, ragged", "causal", qkv(rng, 1, 45, 45, 16), True, 32, 16)
        yield case("causal, the last 5 queries of 40 tokens", "causal", qkv(rng, 1, 5, 40, 16), True, 16, 16)
        yield case("causal, 40 queries and 20 keys: twenty see nothing",
                   "causal", qkv(rng, 1, 40, 20, 16), True, 16, 16)
        length = 200 if self.twin else 2048
        yield case(f"length {length:,}, head dimension 64, bfloat16", "gpu",
                   qkv(rng, 1, length, length, 64, torch.bfloat16), True, 32, 32, device="cuda")

    def expected(self, inputs, variant):
        q, k, v, d_out = doubled(inputs, "q", "k", "v", "d_out")
        found = with_gradients(attention, q, k, v, seen_keys(q.shape[1], k.shape[1], inputs["causal"]), d_out)
        return {"dq": found["dq"].float(), "dk": found["dk"], "dv": found["dv"]}

    def plain(self, inputs, variant):
        seen = seen_keys(inputs["q"].shape[1], inputs["k"].shape[1], inputs["causal"])
        results = [with_gradients(f, inputs["q"], inputs["k"], inputs["v"], seen, inputs["d_out"])
                   for f in (attention, attention_base_2)]
        expected = self.expected(inputs, variant)
        plain = worst([{name: r[name] for name in expected} for r in results], expected)
        return at_least(plain, expected, backward_errors(inputs))

    def verify(self, inputs, outputs, expected, variant):
        dim, wide = inputs["q"].shape[2], max(inputs["block_q"], inputs["block_k"])
        limit = wide * max(wide, dim) if self.twin else 0
        return kernel_fault(outputs, limit, self.twin) or named_outputs(
            outputs, expected, self.plain(inputs, variant), inputs["q"].dtype)

    def same_slip(self, outputs, wrong):
        return same_marks(outputs, wrong)

    mistakes = (
        Mistake("D left out", NO_DELTA, edit("(d_weights - delta[:, None])", "d_weights")),
        Mistake("scores not scaled", "Your recomputed scores are not scaled by 1/sqrt(d), and the log-sum-exp is that "
                "of scaled scores.",
                edit('tl.trans(k), input_precision="ieee") * scale', 'tl.trans(k), input_precision="ieee")')),
        Mistake("gradient not scaled", GRADIENT_NOT_SCALED, edit("delta[:, None]) * scale)", "delta[:, None]))")),
        Mistake("mask left out", "You compute the weights again without the causal mask: a key that a query does not "
                "see has weight 0.", edit("visible = visible & (key[None, :] <= row[:, None] + keys - queries)",
                                      "visible = visible & (row[:, None] >= 0)")),
        Mistake("mask aligned top-left", TOP_LEFT, edit("row[:, None] + keys - queries", "row[:, None]")),
        Mistake("minus infinity", "A query that sees no key has score -inf and log-sum-exp -inf: -inf minus -inf is "
                "NaN. Set its weights to 0 after the exponential.",
                edit("weights = tl.where(visible, tl.exp(scores - lse[:, None]), 0.0)",
                     'weights = tl.exp(tl.where(visible, scores, float("-inf")) - lse[:, None])')),
        Mistake("dQ overwritten", "Programs of the same head add their shares to dq: you overwrite it, and the last "
                "one to write wins. Use tl.atomic_add.",
                edit("tl.atomic_add(dq_ptr + q_at", "tl.store(dq_ptr + q_at"), seen_on="cpu"),
        Mistake("dQ not masked", "Your additions to dq are not masked: the last tile adds to memory past the end.",
                edit('k, input_precision="ieee"), mask=row[:, None] < queries)', 'k, input_precision="ieee"))')),
        Mistake("dK not masked", "Your store of dk is not masked: the last tile writes past the end of the head.",
                edit("tl.store(dk_ptr + k_at, dk, mask=key[:, None] < keys)", "tl.store(dk_ptr + k_at, dk)")),
        Mistake("gradients of the outputs not masked", READ_PAST,
                edit("d_out = tl.load(d_out_ptr + q_at, mask=row[:, None] < queries, other=0.0)",
                     "d_out = tl.load(d_out_ptr + q_at)")),
        Mistake("programs rounded down", PROGRAMS_DOWN, edit("triton.cdiv(k.shape[1], block_k)",
                                                             "max(1, k.shape[1] // block_k)")),
        Mistake("TF32", TF32, (edit('tl.trans(k), input_precision="ieee")', "tl.trans(k))"),
                               edit('tl.trans(v), input_precision="ieee")', "tl.trans(v))"),
                               edit('d_out, input_precision="ieee")', "d_out)"),
                               edit('q, input_precision="ieee")', "q)"),
                               edit('k, input_precision="ieee")', "k)"))),
    )


class BackwardKernelTwin(BackwardKernel):
    exercise, twin = "backward_kernel_twin", True

    mistakes = (
        Mistake("D left out", NO_DELTA, edit("(do_tile @ v_tile.T - delta_tile)", "(do_tile @ v_tile.T)")),
        Mistake("scores not scaled", "Your recomputed scores are not scaled by 1/sqrt(d), and the log-sum-exp is that "
                "of scaled scores.", edit("k_tile.T * scale", "k_tile.T")),
        Mistake("gradient not scaled", GRADIENT_NOT_SCALED, edit("delta_tile) * scale", "delta_tile)")),
        Mistake("mask left out", "You compute the weights again without the causal mask: a key that a query does not "
                "see has weight 0.",
                edit("visible & (key <= row[:, None] + keys - queries)", "visible & (row[:, None] >= 0)")),
        Mistake("mask aligned top-left", TOP_LEFT, edit("row[:, None] + keys - queries", "row[:, None]")),
        Mistake("minus infinity", "A query that sees no key has score -inf and log-sum-exp -inf: -inf minus -inf is "
                "NaN. Set its weights to 0 after the exponential.",
                edit("torch.where(visible, torch.exp(q_tile @ k_tile.T * scale - lse_tile), 0.0)",
                     "torch.exp(torch.where(visible, q_tile @ k_tile.T * scale, -math.inf) - lse_tile)")),
        Mistake("dQ overwritten", "Programs of the same head add their shares to dq: you overwrite it, and the last "
                "one to write wins. Use `add`.", edit("add(dq, q_at", "store(dq, q_at")),
        Mistake("dQ not masked", "Your additions to dq are not masked: the last tile adds to memory past the end.",
                edit("d_scores @ k_tile, there)", "d_scores @ k_tile, there | True)")),
        Mistake("programs rounded down", PROGRAMS_DOWN,
                edit("-(-k.shape[1] // block_k)", "max(1, k.shape[1] // block_k)")),
    )


REFERENCES = {
    cls.exercise: cls()
    for cls in (
        CountedAttention, OnlineSoftmax, MergePartials, TiledForward, FlashKernel, FlashKernelTwin, FlashBackward,
        TilePlan, WindowAttention, ChunkedAttention, BackwardKernel, BackwardKernelTwin,
    )
}
