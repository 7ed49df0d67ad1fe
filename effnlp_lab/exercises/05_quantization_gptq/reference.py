"""Cases, right outputs and known mistakes of lab 05.

Right codes are those of the definitions in float64: for GPTQ the inverse of what is left of the Hessian, worked out
anew for every column. Cases keep away from the points where rounding may go either way: of many random rows those are
taken whose numbers, in units of a step of the grid, stay furthest from a half. Inputs are correlated, since with a
diagonal Hessian most wrong updates are right.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.exercises.compare import Finding, compare
from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng, edit

Inputs = Mapping[str, Any]
Variant = Mapping[str, str]
SLACK = 1e-5  # of the largest number: float32 sums of a few hundred terms, in any order, stay within it


def near(outputs: Any, expected: Any, slack: float = SLACK, dtype: torch.dtype = torch.float32, **path) -> Any:
    """Compare a tensor with an exact one, letting it be off by `slack` of the largest number."""
    plain = expected + slack / 2 * expected.abs().max() if expected.numel() else expected
    return compare(outputs, expected, plain, dtype, **path)


def tensors(outputs: Any, names: tuple[str, ...]) -> Finding | None:
    """None where outputs are as many tensors as there are names."""
    if not isinstance(outputs, (list, tuple)) or len(outputs) != len(names):
        return Finding(f"{len(names)} tensors are asked for: {', '.join(names)}")
    return None


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point, as floats in the dtype of low and high."""
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round(-low / scale)


def nearest(weight: Tensor, bits: int, group_size: int, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point in the weight's dtype; of [..., rows, columns]."""
    groups = weight.unflatten(-1, (-1, group_size))
    zeros = torch.zeros_like(groups[..., :1])
    reach = torch.cat([groups, zeros], -1)
    scale, zero = grid(clip * reach.amin(-1), clip * reach.amax(-1), bits)
    codes = torch.clip(torch.round(groups / scale[..., None]) + zero[..., None], 0, 2**bits - 1)
    return codes.flatten(-2), scale, zero


def margin(steps: Tensor) -> Tensor:
    """How far numbers, in units of a step, are from where rounding changes."""
    return (steps - steps.floor() - 0.5).abs()


def grid_margin(weight: Tensor, bits: int, group_size: int, clip: float = 1.0) -> Tensor:
    """For every group of [..., rows, columns] the least margin of its zero point and its codes, in float64."""
    _, scale, zero = nearest(weight.double(), bits, group_size, clip)
    groups = weight.double().unflatten(-1, (-1, group_size))
    low = clip * groups.amin(-1).clamp(max=0)
    place = groups / scale[..., None]
    inside = (place + zero[..., None] > -1) & (place + zero[..., None] < 2**bits)
    each = torch.where(inside, margin(place), 0.5).amin(-1)
    return torch.minimum(each, margin(-low / scale))


class Int8Product(Reference):
    exercise = "int8_product"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, m, n, k, low=-128, high=127, zeros=False):
            def side(rows):
                codes = torch.randint(low, high + 1, (rows, k), generator=rng.torch).to(torch.int8)
                zero = torch.randint(-128, 128, (rows,), generator=rng.torch, dtype=torch.int32)
                return codes, zero if zeros else torch.zeros_like(zero), rng.uniform(rows) / 50 + 1e-3

            (a, zero_a, scale_a), (b, zero_b, scale_b) = side(m), side(n)
            if zeros == "far":  # as far from the codes as it gets
                zero_a, zero_b = torch.full_like(zero_a, high), torch.full_like(zero_b, high)
            return Case(name, {"a": a, "zero_a": zero_a, "scale_a": scale_a, "b": b, "zero_b": zero_b,
                               "scale_b": scale_b}, part)

        yield case("small codes", "short sums", 3, 4, 5, -3, 3)
        yield case("products of one code", "short sums", 4, 3, 1)
        yield case("all codes", "short sums", 5, 4, rng.int(20, 40))
        yield case("as many rows on both sides", "short sums", 6, 6, 16)
        yield case("sums beyond int16", "long sums", 3, 4, 200, 60, 127)
        yield case("sums beyond float32's whole numbers", "long sums", 5, 6, rng.int(2300, 2500), 64, 127)
        yield case("zero points", "zero points", 4, 5, rng.int(10, 30), zeros=True)
        yield case("zero points, square", "zero points", 5, 5, 12, zeros=True)
        yield case("codes far from their zero point", "zero points", 3, 4, 20, -128, -100, zeros="far")

    def expected(self, inputs, variant):
        rows = [(inputs[code].long() - inputs[zero].long()[:, None])
                for code, zero in (("a", "zero_a"), ("b", "zero_b"))]
        sums = torch.stack([(row * rows[1]).sum(1) for row in rows[0]])
        product = sums.double() * inputs["scale_a"].double()[:, None] * inputs["scale_b"].double()[None, :]
        return sums.to(torch.int32), product

    def verify(self, inputs, outputs, expected, variant):
        return (tensors(outputs, ("sums", "product")) or compare(outputs[0], expected[0], path="your tensor of sums")
                or near(outputs[1], expected[1], path="your product"))

    _SUM = "(wide_a[:, None, :] * wide_b[None, :, :]).sum(-1, dtype=torch.int32)"
    mistakes = (
        Mistake("products in int8", "Your products are int8, and 127 * 127 does not fit: they overflow without a word. "
                "Widen the codes to int32 before you multiply.",
                edit(_SUM, "(wide_a.to(torch.int8)[:, None, :] * wide_b.to(torch.int8)[None, :, :]).sum(-1)"
                     ".to(torch.int32)")),
        Mistake("sums in int8", "Your sums are int8 and overflow: sum in int32.",
                edit(_SUM, "(wide_a[:, None, :] * wide_b[None, :, :]).sum(-1).to(torch.int8).to(torch.int32)")),
        Mistake("sums in int16", "Your sums are int16, and three products of 127 * 127 overflow it: sum in int32.",
                edit(_SUM, "(wide_a[:, None, :] * wide_b[None, :, :]).sum(-1).to(torch.int16).to(torch.int32)")),
        Mistake("sums in float16", "Your sums are float16, which ends at 65,504 and loses whole numbers above 2,048: "
                "sum in int32.",
                edit(_SUM, "(wide_a[:, None, :] * wide_b[None, :, :]).sum(-1).half().clamp(-65504, 65504)"
                     ".to(torch.int32)")),
        Mistake("sums in bfloat16", "Your sums are bfloat16, which loses whole numbers above 256: sum in int32.",
                edit(_SUM, "(wide_a[:, None, :] * wide_b[None, :, :]).sum(-1).bfloat16().to(torch.int32)")),
        Mistake("sums in float32", "Your sums are float32, which loses whole numbers above 2^24 = 16,777,216: sum in "
                "int32.",
                edit(_SUM, "(wide_a[:, None, :] * wide_b[None, :, :]).sum(-1).float().to(torch.int32)")),
        Mistake("zero points subtracted in int8", "Code minus zero point needs 9 bits, and you subtract in int8: widen "
                "first.",
                (edit("a - zero_a[:, None]", "(a - zero_a[:, None].to(torch.int8)).to(torch.int32)"),
                 edit("b - zero_b[:, None]", "(b - zero_b[:, None].to(torch.int8)).to(torch.int32)"))),
        Mistake("zero points forgotten", "You multiply the codes as they are: subtract the zero points first.",
                (edit("a - zero_a[:, None]", "a.to(torch.int32)"), edit("b - zero_b[:, None]", "b.to(torch.int32)"))),
        Mistake("one zero point forgotten", "You subtract the zero points of one side alone: both matrices have them.",
                edit("b - zero_b[:, None]", "b.to(torch.int32)")),
        Mistake("last term forgotten", "Multiplied out, the product has four terms, and you leave out the last: k "
                "times the product of both zero points.",
                edit("    return sums", "    sums = sums - a.shape[1] * zero_a[:, None] * zero_b\n    return sums")),
        Mistake("zero points added", "A code q stands for scale * (q - zero): you add the zero point.",
                (edit("a - zero_a[:, None]", "a + zero_a[:, None]"),
                 edit("b - zero_b[:, None]", "b + zero_b[:, None]"))),
        Mistake("not scaled", "Your product is that of the codes: multiply by the scales of both sides.",
                edit("sums * scale_a[:, None] * scale_b", "sums.float()")),
        Mistake("scaled on one side", "You multiply by the scales of one side alone: both matrices have them.",
                edit("sums * scale_a[:, None] * scale_b", "sums * scale_a[:, None]")),
        Mistake("transposed", "Your product is transposed: row i of the result belongs to row i of a.",
                edit("return sums, sums * scale_a[:, None] * scale_b",
                     "return sums.T.contiguous(), (sums * scale_a[:, None] * scale_b).T.contiguous()")),
    )


class RoundToNearest(Reference):
    exercise = "round_to_nearest"
    NAMES = ("codes", "scale", "zero")

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, rows, columns, bits, size, clip=1.0, shape=lambda w: w, dtype=torch.float32, turn=False):
            tries = shape(rng.randn(12, rows, columns)).to(dtype)
            margins = grid_margin(tries, bits, size, clip)  # [tries, rows, groups]
            best = margins.argmax(0)[None, :, :, None]
            groups = tries.unflatten(-1, (-1, size)).gather(0, best.expand(1, -1, -1, size))
            weight = groups[0].flatten(1)
            if turn:
                weight = weight.T.contiguous().T
            return Case(name, {"weight": weight, "bits": bits, "group_size": size,
                               **({} if clip == 1.0 else {"clip": clip})}, part)

        def rising(w):  # rows, and groups within a row, of very different size
            return w * torch.logspace(-3, 2, w.shape[1])[:, None] * torch.logspace(0, 1, w.shape[2])

        yield case("one group", "groups", 1, 8, 4, 8)
        yield case("two groups a row", "groups", 3, 12, 3, 6)
        yield case("a square weight", "groups", 16, 16, 4, 4, shape=rising)
        yield case("8 bits", "groups", 2, rng.choice([24, 36]), 8, 12)
        yield case("2 bits, columns in memory order", "groups", 5, 24, 2, 8, turn=True)
        yield case("float16 weights", "groups", 4, 16, 3, 8, shape=lambda w: w * 3, dtype=torch.float16)
        yield case("bfloat16 weights", "groups", 3, 16, 4, 16, dtype=torch.bfloat16)
        yield case("positive weights", "one-sided groups", 4, 12, 3, 4, shape=lambda w: w.abs() + 1)
        yield case("negative weights", "one-sided groups", 4, 12, 3, 4, shape=lambda w: -w.abs() - 1)
        zeros = case("a group of zeros", "one-sided groups", 3, 16, 4, 8)
        zeros.inputs["weight"][1, 8:] = 0
        yield zeros
        flat = case("equal weights", "one-sided groups", 3, 8, 4, 4)
        flat.inputs["weight"][0, :4], flat.inputs["weight"][2] = rng.float(0.5, 2), -rng.float(0.5, 2)
        yield flat
        yield case("clipped to 0.7", "clipping", 6, 32, 3, 16, clip=0.7)
        yield case("clipped to a half, float16", "clipping", 5, 24, 2, 12, clip=0.5, dtype=torch.float16)

    def expected(self, inputs, variant):
        weight = inputs["weight"].double()
        codes, scale, zero = nearest(weight, inputs["bits"], inputs["group_size"], inputs.get("clip", 1.0))
        return codes.to(torch.uint8), scale, zero.to(torch.uint8)

    def verify(self, inputs, outputs, expected, variant):
        found = tensors(outputs, self.NAMES)
        if found:
            return found
        for name, got, want in zip(self.NAMES, outputs, expected, strict=True):
            path = "your tensor of codes" if name == "codes" else f"your {name}"
            found = (
                self._scales(got, want, path) if name == "scale" else compare(got, want, path=path)
            )  # codes and zero points are whole numbers
            if found:
                return found
        return None

    @staticmethod
    def _scales(got, want, path):
        """Each scale by itself: small groups have small ones."""
        found = near(got, want, path=path)
        if found or not want.numel():
            return found
        off = (got.double().cpu() - want.cpu()).abs() / want.cpu()
        if off.max() <= 1e-5:
            return None
        at = tuple((off == off.max()).nonzero()[0].tolist())
        return Finding(f"{path} is {got[at].item():.6g} at {at}, and {want[at].item():.6g} is right")

    def same_slip(self, outputs, wrong):
        """Codes and scales alone: a zero point outside of uint8 becomes one number on a CPU and another on a GPU."""
        both = [list(found[:2]) for found in (outputs, wrong) if isinstance(found, (list, tuple))]
        return len(both) == 2 and compare(both[0], both[1], rough=True) is None

    mistakes = (
        Mistake("groups of rows", "Your groups run down the rows: a group is a run of neighbouring columns of one row, "
                "because those are what a product adds up.",
                (edit("weight.float().reshape(rows, -1, group_size)",
                      "weight.float().T.reshape(rows, -1, group_size)"),
                 edit("return codes.reshape(rows, columns)", "return codes.reshape(columns, rows).T"))),
        Mistake("every few columns", "Your groups take every few columns: a group is a run of neighbours, column j "
                "belongs to group j // group_size.",
                (edit("weight.float().reshape(rows, -1, group_size)",
                      "weight.float().reshape(rows, group_size, -1).transpose(1, 2)"),
                 edit("return codes.reshape(rows, columns)", "return codes.transpose(1, 2).reshape(rows, columns)"))),
        Mistake("one grid a row", "All groups of a row have the same grid: each has its own.",
                (edit("groups.amin(-1)", "groups.amin((1, 2), keepdim=True)[:, :, 0].expand(groups.shape[:2])"),
                 edit("groups.amax(-1)", "groups.amax((1, 2), keepdim=True)[:, :, 0].expand(groups.shape[:2])"))),
        Mistake("one grid for all", "The whole weight has one grid: each group of each row has its own.",
                (edit("groups.amin(-1)", "groups.amin().expand(groups.shape[:2])"),
                 edit("groups.amax(-1)", "groups.amax().expand(groups.shape[:2])"))),
        Mistake("the grid lacks 0", "Your grid spans the weights and not 0: with all weights on one side the zero "
                "point then falls outside the codes.",
                (edit(".amin(-1).clamp(max=0)", ".amin(-1)"), edit(".amax(-1).clamp(min=0)", ".amax(-1)"))),
        Mistake("2^b steps", "2^b codes have 2^b - 1 steps between them: divide the range by 2**bits - 1.",
                edit("(high - low) / (2**bits - 1)", "(high - low) / 2**bits")),
        Mistake("symmetric grid", "Your grid is symmetric around 0: the range goes from the least to the largest "
                "weight, which wastes no codes.",
                (edit("    scale = (high - low)",
                      "    high = torch.maximum(high, -low)\n    low = -high\n    scale = (high - low)"),)),
        Mistake("rounded down", "You cut off what follows the point: round to the nearest.",
                edit("(groups / scale[:, :, None]).round()", "(groups / scale[:, :, None]).floor()")),
        Mistake("zero point rounded down", "You cut off what follows the zero point's point: round it to the nearest.",
                edit("(-low / scale).round()", "(-low / scale).floor()")),
        Mistake("zero point not rounded", "The zero point is a code, a whole number: round it before you add it.",
                (edit("(-low / scale).round()", "-low / scale"),
                 edit("(groups / scale[:, :, None]).round() + zero[:, :, None]",
                      "(groups / scale[:, :, None] + zero[:, :, None]).round()"))),
        Mistake("zero point forgotten", "You leave out the zero point: negative weights have no code then.",
                edit(" + zero[:, :, None]", "")),
        Mistake("zero point of the other sign", "The zero point stands for 0: it is -low / scale, and it is added.",
                edit("zero = (-low / scale).round()", "zero = (high / scale).round()")),
        Mistake("not clipped", "Codes beyond the grid are not clipped: turned into uint8, a 16 comes out as something "
                "else. Clip while they are floats.",
                edit(".clamp(0, 2**bits - 1)", ".to(torch.int64) & (2**bits - 1)")),
        Mistake("clip left out", "You leave out `clip`: the grid spans clip times the range.",
                (edit("clip * groups.amin", "groups.amin"), edit("clip * groups.amax", "groups.amax"))),
        Mistake("weights clipped first", "You clip the weights by a share of the largest magnitude; each end of the "
                "range is multiplied by clip by itself.",
                (edit("low = clip * groups.amin(-1).clamp(max=0)",
                      "low = -(clip * groups.abs().amax(-1)).minimum(-groups.amin(-1).clamp(max=0))"),
                 edit("high = clip * groups.amax(-1).clamp(min=0)",
                      "high = (clip * groups.abs().amax(-1)).minimum(groups.amax(-1).clamp(min=0))"))),
        Mistake("zeros divided", "A group of zeros has a range of 0, and you divide by it: its scale is 1.",
                edit("    scale = scale.masked_fill(scale == 0, 1.0)\n", "")),
        Mistake("zeros mended by adding", "You add a small number to every scale; only a group of zeros has its scale "
                "replaced, by 1.",
                edit("scale = scale.masked_fill(scale == 0, 1.0)", "scale = scale + 1e-3")),
        Mistake("half precision", "You compute scales in the weights' own half precision: work in float32.",
                edit("groups = weight.float()", "groups = weight")),
    )


class CalibrationHessian(Reference):
    exercise = "calibration_hessian"
    HELD = 2

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        mix = rng.randn(12, 12)

        def inputs(*shape, shift=0.5, scale=1.0, dtype=torch.float32):
            columns = shape[-1]
            return (scale * (rng.randn(*shape) @ mix[:columns, :columns] + shift)).to(dtype)

        def case(name, part, *batches):
            return Case(name, {"batches": list(batches)}, part)

        yield case("five tokens", "one batch", inputs(5, 3))
        yield case("as many tokens as columns", "one batch", inputs(6, 6))
        yield case("one token", "one batch", inputs(1, 4))
        yield case("sequences", "one batch", inputs(3, rng.int(5, 9), 8))
        yield case("one column", "one batch", inputs(2, 2, 4, 1))
        turned = inputs(10, 7).T.contiguous().T
        yield case("columns in memory order", "one batch", turned)
        yield case("two of a size", "several batches", inputs(4, 5, 6), inputs(4, 5, 6, shift=2.0, scale=3.0))
        yield case("a long one and a short one", "several batches", inputs(40, 6), inputs(2, 6, shift=3.0, scale=4.0))
        yield case("sequences and single tokens", "several batches", inputs(2, 9, 5), inputs(3, 5, scale=5.0),
                   inputs(5, shift=9.0))
        yield case("six batches", "several batches", *(inputs(rng.int(2, 6), 8, 10, scale=i + 1.0) for i in range(6)))
        yield case("float16, large", "half precision", inputs(400, 6, scale=30.0, dtype=torch.float16),
                   inputs(200, 6, scale=30.0, dtype=torch.float16))
        yield case("bfloat16", "half precision", inputs(5, 40, 8, dtype=torch.bfloat16),
                   inputs(30, 8, shift=2.0, dtype=torch.bfloat16))

    def expected(self, inputs, variant):
        rows = torch.cat([batch.double().reshape(-1, batch.shape[-1]) for batch in inputs["batches"]])
        return 2 * torch.einsum("ni,nj->ij", rows, rows) / len(rows)

    def verify(self, inputs, outputs, expected, variant):
        got = outputs["hessian"]
        found = compare(got, expected, expected + expected.abs().max() * 1e9, torch.float32, path="your Hessian")
        if found:  # kind, shape, dtype, NaN and infinity; not yet the size
            return found
        if outputs["held"] > self.HELD:
            return Finding(f"your answer held {outputs['held']} batches at once, and there may be more of them than "
                           "fit into memory: add up what a batch has to say, and let it go")
        got = got.detach().cpu().double()
        trace = got.trace()
        if not trace > 0:
            return Finding(f"the diagonal of your Hessian adds up to {trace.item():.3g}, and squares are positive")
        return near((got * (expected.trace() / trace)).float(), expected,
                    path="your Hessian, brought to the right size,")

    def same_slip(self, outputs, wrong):
        if (outputs["held"] > self.HELD) != (wrong["held"] > self.HELD):
            return False
        both = [found["hessian"] for found in (outputs, wrong)]
        if not all(isinstance(h, Tensor) and h.ndim == 2 and h.shape[0] == h.shape[1] for h in both):
            return compare(both[0], both[1], rough=True) is None
        mine, theirs = (h.double().cpu() / h.double().trace().abs().clamp(min=1e-300).cpu() for h in both)
        return both[0].dtype == both[1].dtype and compare(mine, theirs, rough=True) is None

    mistakes = (
        Mistake("mean of means", "Each batch counts the same in your Hessian, however many tokens it has: every token "
                "counts the same. Divide once, at the end.",
                edit("total + x.T @ x", "total + x.T @ x / len(x)")),
        Mistake("last batch alone", "Your Hessian is that of the last batch: add to what there is.",
                edit("total = total + x.T @ x", "total = x.T @ x")),
        Mistake("first batch alone", "Your Hessian is that of the first batch: go on with the others.",
                edit("total = total + x.T @ x\n", "total = total + x.T @ x\n        break\n")),
        Mistake("tokens with tokens", "You multiply tokens with tokens: the Hessian has a row for each input column, "
                "X'X where tokens are the rows of X.",
                edit("x.T @ x", "x @ x.T")),
        Mistake("covariance", "You subtract the mean: the layer's error does not, so the Hessian is that of the inputs "
                "as they are.",
                edit("x = batch.reshape(-1, batch.shape[-1]).float()",
                     "x = batch.reshape(-1, batch.shape[-1]).float()\n        x = x - x.mean(0)")),
        Mistake("diagonal alone", "Your Hessian is diagonal: how inputs go together is what GPTQ lives on.",
                edit("return total", "return torch.diag(total.diagonal())")),
        Mistake("correlation", "You divide by the inputs' sizes: large inputs make a weight's error matter more, and "
                "the Hessian has to say so.",
                edit("return total",
                     "root = total.diagonal().sqrt()\n    return total / root[:, None] / root")),
        Mistake("square of the sum", "You add up the inputs before you multiply: it is the sum of the products x x', "
                "token by token.",
                edit("x.T @ x", "torch.outer(x.sum(0), x.sum(0))")),
        Mistake("first sequence alone", "You take the first sequence of a batch: all its dimensions but the last are "
                "tokens.",
                edit("batch.reshape(-1, batch.shape[-1])",
                     "batch.reshape(-1, *batch.shape[-2:])[0].reshape(-1, batch.shape[-1])")),
        Mistake("reshaped across columns", "You reshape tokens and columns into each other: the last dimension is the "
                "columns, and stays.",
                edit("batch.reshape(-1, batch.shape[-1])", "batch.reshape(batch.shape[-1], -1).T")),
        Mistake("sums in half precision", "You sum in half precision, which overflows and loses digits: turn the batch "
                "into float32 first.",
                (edit(".float()", ""), edit("total + x.T @ x", "total + (x.T @ x).float().clamp(-65504, 65504)"))),
        Mistake("all batches kept", "You keep all batches before you multiply: take one, add its part, let it go.",
                (edit("for batch in batches:", "for batch in list(batches):"),)),
    )


def correlated(rng: Rng, columns: int, damping: float = 0.02) -> Tensor:
    """2/n X'X of inputs that lie in a third of the directions, with some noise, damped; float64."""
    rank = max(1, columns // 3)
    inputs = rng.randn(3 * columns + 8, rank) @ rng.randn(rank, columns) / rank**0.5
    inputs = (inputs + 0.25 * rng.randn(*inputs.shape)).double() * torch.linspace(0.6, 1.6, columns).double()
    hessian = 2 * inputs.T @ inputs / len(inputs)
    return hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)


def column_loop(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int,
                order: list[int] | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, in float64: after each column the inverse of the Hessian of what is left, worked out anew.

    Returns codes [rows, columns], and for each row the least margin of what was rounded.
    """
    work, hessian = weight.double().clone(), hessian.double()
    columns = work.shape[1]
    each = columns // scale.shape[1]
    left = list(range(columns)) if order is None else list(order)
    codes = torch.zeros(work.shape, dtype=torch.uint8, device=work.device)
    margins = torch.full((len(work),), 0.5, dtype=torch.float64, device=work.device)
    while left:
        j = left[0]
        s, z = scale[:, j // each].double(), zero[:, j // each].double()
        steps = work[:, j] / s
        inside = (steps + z > -1) & (steps + z < 2**bits)
        margins = torch.where(inside, torch.minimum(margins, margin(steps)), margins)
        code = torch.clip(torch.round(steps) + z, 0, 2**bits - 1)
        codes[:, j] = code.to(torch.uint8)
        gap = s * (code - z) - work[:, j]
        rest = hessian[left][:, left]
        first = torch.zeros(len(left), 1, dtype=torch.float64, device=work.device)
        first[0] = 1
        row = torch.linalg.solve(rest, first)[:, 0]  # the first row of the inverse
        work[:, left] += gap[:, None] * (row / row[0])[None, :]
        left = left[1:]
    return codes, margins


class Gptq(Reference):
    """What the exercises about GPTQ share: cases with room around every rounding, and codes that are right."""

    ordered = False

    def __init__(self) -> None:
        self.known: deque[tuple[Tensor, Tensor]] = deque(maxlen=16)  # a case's weight, and its codes

    def case(self, rng, name, part, rows, columns, bits, groups=1, tight=1.0, turn=False, extra=None):
        """`tight`: the grid spans so much of the weights' range; below 1 many codes are clipped."""
        hessian = correlated(rng, columns)
        if self.ordered:
            sizes = torch.logspace(0, 0.6, columns).double()[torch.tensor(rng.shuffled(range(columns)))]
            hessian = hessian * sizes[:, None] * sizes
        hessian = ((hessian + hessian.T) / 2).float()
        pool = rng.randn(2 * rows + 24, columns)
        pool *= torch.linspace(0.7, 1.5, columns) * torch.logspace(-1, 1, len(pool))[:, None]
        _, scale, zero = nearest(pool, bits, columns // groups, tight)
        zero = zero.to(torch.uint8)
        codes, margins = column_loop(pool, hessian, scale, zero, bits, self.order(hessian))
        best = margins.topk(rows).indices.sort().values
        weight = pool[best].T.contiguous().T if turn else pool[best]
        self.known.append((weight, codes[best]))
        inputs = {"weight": weight, "hessian": hessian, "scale": scale[best], "zero": zero[best], "bits": bits,
                  **(extra or {})}
        return Case(name, inputs, part)

    def order(self, hessian):
        return torch.argsort(hessian.diagonal(), descending=True).tolist() if self.ordered else None

    def expected(self, inputs, variant):
        for weight, codes in self.known:
            if weight is inputs["weight"]:
                return codes
        parts = [inputs[name] for name in ("weight", "hessian", "scale", "zero", "bits")]
        return column_loop(*parts, self.order(inputs["hessian"]))[0]

    def verify(self, inputs, outputs, expected, variant):
        return compare(outputs, expected, path="your tensor of codes")


ERROR = "error = (work[:, j] - s * (code - z)) / inverse[j, j]"
CODE = "code = ((work[:, j] / s).round() + z).clamp(0, 2**bits - 1)"


class GptqColumns(Gptq):
    exercise = "gptq_columns"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        yield self.case(rng, "two columns", "one grid a row", 8, 2, 4)
        yield self.case(rng, "one column", "one grid a row", 3, 1, 4)
        yield self.case(rng, "three columns, 2 bits", "one grid a row", 8, 3, 2)
        yield self.case(rng, "24 columns, 3 bits", "one grid a row", 8, 24, 3)
        yield self.case(rng, "one row, 4 bits", "one grid a row", 1, rng.int(18, 30), 4)
        yield self.case(rng, "columns in memory order", "one grid a row", 6, 12, 3, turn=True)
        yield self.case(rng, "two groups", "groups", 8, 12, 3, groups=2)
        yield self.case(rng, "as many groups as rows", "groups", 4, 24, 4, groups=4)
        yield self.case(rng, "a group for each column", "groups", 4, 9, 2, groups=9, tight=0.7)
        yield self.case(rng, "a grid that is too narrow", "clipping", 8, 16, 3, tight=0.4)
        yield self.case(rng, "a narrow grid in groups", "clipping", 8, 18, 2, groups=3, tight=0.4)

    mistakes = (
        Mistake("divided by the Hessian", "You divide the error by H_jj. It is divided by the diagonal of the inverse: "
                "[H^-1]_jj is not 1 / H_jj when inputs are correlated.",
                edit("/ inverse[j, j]\n        work", "/ hessian[j, j]\n        work")),
        Mistake("divided by 1 / H_jj", "You take 1 / H_jj for the diagonal of the inverse: the inverse of a matrix is "
                "not the inverse of its entries.",
                edit("/ inverse[j, j]\n        work", "* hessian[j, j]\n        work")),
        Mistake("inverse never conditioned", "You use the rows of the first inverse throughout. Once a column is "
                "rounded it can no longer move: eliminate it from the inverse.",
                edit("        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]\n", "")),
        Mistake("inverse never conditioned, done columns kept", "You use the rows of the first inverse, and keep done "
                "columns from moving. The inverse has to be that of the columns that are left: eliminate column j from "
                "it.",
                (edit("        work -= torch.outer(error, inverse[j])\n",
                      "        work[:, j:] = work[:, j:] - torch.outer(error, inverse[j, j:])\n"),
                 edit("        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]\n", ""))),
        Mistake("row struck out", "You strike column j out of the inverse. The inverse of what is left is another "
                "matrix: strike it out of H, or eliminate it.",
                edit("inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]",
                     "inverse[j] = inverse[:, j] = 0")),
        Mistake("the Hessian's row", "You move the other columns by a row of H: it is a row of its inverse that says "
                "how they make up for an error.",
                edit("torch.outer(error, inverse[j])", "torch.outer(error, hessian[j])")),
        Mistake("Hessian in place of the inverse", "You work with H where its inverse belongs.",
                edit("torch.linalg.inv(hessian)", "hessian.clone()")),
        Mistake("round to nearest", "No error is made up for: this is rounding to nearest. Move the columns to come.",
                edit("        work -= torch.outer(error, inverse[j])\n", "")),
        Mistake("wrong sign", "The other columns move the wrong way: with error = (w - rounded) / diagonal, the "
                "product is subtracted.",
                edit("work -= torch.outer(error", "work += torch.outer(error")),
        Mistake("original weights rounded", "You round the original weights: round the copy, as the columns before "
                "have left it.",
                (edit(CODE, CODE.replace("work", "weight")), edit(ERROR, ERROR.replace("work", "weight")))),
        Mistake("error from the original weights", "Your error is taken from the original weights: take it from the "
                "copy, as it is by then.",
                edit(ERROR, ERROR.replace("work", "weight"))),
        Mistake("error not divided", "You do not divide the error: without [H^-1]_jj the column does not end up on its "
                "grid, and the others move by the wrong amount.",
                edit(" / inverse[j, j]\n        work", "\n        work")),
        Mistake("error in codes", "Your error is in steps of the grid: what the code stands for is s * (code - z).",
                edit("work[:, j] - s * (code - z)", "work[:, j] / s - (code - z)")),
        Mistake("zero point forgotten", "What a code stands for is s * (code - z): you leave out the zero point.",
                edit("s * (code - z)", "s * code")),
        Mistake("elimination not divided", "The elimination divides by the diagonal: H^-1 minus column times row over "
                "[H^-1]_jj.",
                edit("torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]",
                     "torch.outer(inverse[:, j], inverse[j])")),
        Mistake("next column alone", "You move the next column alone: all columns to come make up for the error.",
                edit("torch.outer(error, inverse[j])",
                     "torch.outer(error, inverse[j] * torch.tensor([float(i in (j, j + 1)) for i in "
                     "range(len(inverse))], device=inverse.device))")),
        Mistake("groups in turns", "Column j belongs to group j // group_size: you give neighbours different grids.",
                (edit("scale[:, j // group_size]", "scale[:, j % scale.shape[1]]"),
                 edit("zero[:, j // group_size]", "zero[:, j % scale.shape[1]]"))),
        Mistake("first group's grid", "You use the first group's grid throughout: column j belongs to group "
                "j // group_size.",
                (edit("scale[:, j // group_size]", "scale[:, 0]"), edit("zero[:, j // group_size]", "zero[:, 0]"))),
        Mistake("grids of rows", "You take the grid along the wrong axis: scale is [rows, groups], a grid for each row "
                "and group, and a column of it belongs to column j of the weight.",
                (edit("scale[:, j // group_size]", "scale[j // group_size].repeat(len(scale))[: len(scale)]"),
                 edit("zero[:, j // group_size]", "zero[j // group_size].repeat(len(zero))[: len(zero)]"))),
        Mistake("not clipped", "Codes beyond the grid are not clipped: they go from 0 to 2**bits - 1.",
                (edit(".clamp(0, 2**bits - 1)", ""), edit("codes[:, j] = code", "codes[:, j] = code.long()"))),
        Mistake("not clipped, on a GPU", "Codes beyond the grid are not clipped: they go from 0 to 2**bits - 1.",
                (edit(".clamp(0, 2**bits - 1)", ""), edit("codes[:, j] = code", "codes[:, j] = code.clamp(0, 255)"))),
        Mistake("clipped after the error", "The error is taken before the code is clipped: a clipped weight is further "
                "off, and the others have more to make up for.",
                (edit("(work[:, j] - s * (code - z))", "(work[:, j] - s * (work[:, j] / s).round())"),)),
    )


BLOCK_ERROR = "error = (work[:, j] - s * (code - z)) / upper[j, j]"


class GptqBlocks(Gptq):
    exercise = "gptq_blocks"
    BLOCK = 8
    MOST_WIDE = 76  # 14 blocks, a handful for each, and the factorization; without blocks there are at least 96
    MOST = 60 * 112  # for each column what it takes to round it, and at most a few for each other one of its block

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, rows, columns, bits, block, **more):
            return self.case(rng, name, part, rows, columns, bits, extra={"block": block}, **more)

        yield case("two columns in one block", "codes", 8, 2, 4, 2)
        yield case("one block", "codes", 8, 16, 3, 16)
        yield case("four blocks", "codes", 8, 24, 3, 6)
        yield case("blocks of one column", "codes", 6, 8, 2, 1)
        yield case("columns in memory order", "codes", 6, 16, 3, 8, turn=True)
        yield case("a narrow grid", "codes", 8, 16, 3, 4, tight=0.4)
        yield case("a last block of one column", "ragged blocks", 8, 13, 3, 4)
        yield case("a block larger than the weight", "ragged blocks", 6, 10, 4, 128)
        yield case("groups that end inside blocks", "ragged blocks", 8, 30, 3, 8, groups=5)
        yield case("blocks that end inside groups", "ragged blocks", 8, 27, 4, rng.choice([4, 5, 7]), groups=3)
        yield self.case(rng, "112 columns, and what is written", "late updates", 12, 112, 4, groups=2,
                        extra={"block": self.BLOCK, "count_wide": True})

    def verify(self, inputs, outputs, expected, variant):
        found = compare(outputs["codes"], expected, path="your tensor of codes")
        if not found and outputs.get("wide", 0) > self.MOST_WIDE:
            return Finding(f"the codes are right, but {outputs['wide']} of your operations write more than two blocks "
                           "of columns, with 14 blocks in all: inside a block write to that block alone, and to the "
                           "columns behind it once, when the block is done")
        if not found and outputs.get("operations", 0) > self.MOST:
            return Finding(f"the codes are right, but {outputs['operations']:,} operations are more than 60 a column: "
                           "the columns behind a block hear of its errors by one product of matrices, not one by one")
        return found

    def same_slip(self, outputs, wrong):
        over = [(found.get("wide", 0) > self.MOST_WIDE, found.get("operations", 0) > self.MOST)
                for found in (outputs, wrong)]
        return over[0] == over[1] and compare(outputs["codes"], wrong["codes"], rough=True) is None

    mistakes = (
        Mistake("lower factor", "Your factor is lower triangular, so that row j has nothing to the right of column j: "
                "take the upper one (upper=True), whose rows are those of the inverses.",
                edit("torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)",
                     "torch.linalg.cholesky(torch.linalg.inv(hessian))")),
        Mistake("factor of the Hessian", "You factor H: it is the inverse of H that is factored.",
                edit("torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)",
                     "torch.linalg.cholesky(hessian, upper=True)")),
        Mistake("inverse of the factor", "You invert the Cholesky factor of H. That gives the inverse of H as upper "
                "times lower, and U'U is lower times upper: another factor. Invert H, then factor.",
                edit("torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)",
                     "torch.linalg.inv(torch.linalg.cholesky(hessian)).T.contiguous()")),
        Mistake("inverse in place of the factor", "You use the first inverse, whose rows are not those of what is "
                "left: the rows of its Cholesky factor are.",
                (edit("torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)", "torch.linalg.inv(hessian)"),)),
        Mistake("divided by the square", "You divide the error by U_jj squared and move the columns by U_j: with rows "
                "of U the error is divided by U_jj once.",
                edit("/ upper[j, j]\n", "/ upper[j, j] ** 2\n")),
        Mistake("divided by the Hessian", "You divide the error by H_jj: it is divided by the factor's diagonal.",
                edit("/ upper[j, j]\n", "/ hessian[j, j]\n")),
        Mistake("error not divided", "You do not divide the error by U_jj.", edit(" / upper[j, j]\n", "\n")),
        Mistake("blocks know nothing of each other", "The columns behind a block never hear of its errors: update them "
                "when the block is done.",
                edit("        work[:, end:] -= errors @ upper[start:end, end:]\n", "")),
        Mistake("undivided errors behind the block", "The errors that you keep for the columns behind the block are "
                "not divided by U_jj: keep the same ones.",
                edit("errors[:, j - start] = error", "errors[:, j - start] = error * upper[j, j]")),
        Mistake("no update inside the block", "Within a block the columns do not hear of each other's errors: update "
                "the block at every column.",
                edit("            work[:, j:end] -= torch.outer(error, upper[j, j:end])\n", "")),
        Mistake("told twice", "The columns behind the block hear of every error twice: inside the loop update the "
                "block alone.",
                edit("work[:, j:end] -= torch.outer(error, upper[j, j:end])",
                     "work[:, j:] -= torch.outer(error, upper[j, j:])")),
        Mistake("told in the loop", "You multiply the block's errors again at every column: tell the columns behind "
                "the block once, when it is done.",
                (edit("errors = torch.empty_like(work[:, start:end])", "errors = torch.zeros_like(work[:, start:end])"),
                 edit("        work[:, end:] -= errors @ upper[start:end, end:]\n",
                      "            work[:, end:] -= errors @ upper[start:end, end:]\n"))),
        Mistake("wrong sign behind the block", "The columns behind a block move the wrong way.",
                edit("work[:, end:] -= errors", "work[:, end:] += errors")),
        Mistake("wrong sign inside the block", "The columns of a block move the wrong way.",
                edit("work[:, j:end] -= torch", "work[:, j:end] += torch")),
        Mistake("no late update", "Every column tells all columns to its right: the codes are right, and the whole "
                "weight is written at every column. Update the block alone, and the columns behind it when it is done.",
                (edit("work[:, j:end] -= torch.outer(error, upper[j, j:end])",
                      "work[:, j:].addr_(error, upper[j, j:], alpha=-1)"),
                 edit("        work[:, end:] -= errors @ upper[start:end, end:]\n", ""))),
        Mistake("eliminated at every column", "You eliminate at every column, which rewrites the whole inverse: one "
                "Cholesky factor holds all the rows that you need.",
                (edit("torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)", "torch.linalg.inv(hessian)"),
                 edit("            work[:, j:end] -= torch.outer(error, upper[j, j:end])\n"
                      "            errors[:, j - start] = error\n"
                      "        work[:, end:] -= errors @ upper[start:end, end:]\n",
                      "            work = work - torch.outer(error, upper[j])\n"
                      "            upper = upper - torch.outer(upper[:, j], upper[j]) / upper[j, j]\n"))),
        Mistake("factor of each block", "You invert each block of H by itself: the inverse is that of the whole H, "
                "which knows how a block goes with the columns behind it.",
                edit("        errors = torch.empty_like(work[:, start:end])\n",
                     "        errors = torch.empty_like(work[:, start:end])\n"
                     "        inner = torch.linalg.inv(hessian[start:end, start:end])\n"
                     "        upper[start:end, start:end] = torch.linalg.cholesky(inner, upper=True)\n")),
        Mistake("ragged block dropped", "The last columns are left out when the block does not divide them.",
                (edit("codes = torch.empty(", "codes = torch.zeros("),
                 edit("range(0, columns, block)", "range(0, columns - block + 1, block)"))),
        Mistake("groups counted in the block", "Column j belongs to group j // group_size, counted from the weight's "
                "first column and not from the block's.",
                (edit("scale[:, j // group_size]", "scale[:, (j - start) // group_size]"),
                 edit("zero[:, j // group_size]", "zero[:, (j - start) // group_size]"))),
        Mistake("first group's grid", "You use the first group's grid throughout: column j belongs to group "
                "j // group_size.",
                (edit("scale[:, j // group_size]", "scale[:, 0]"), edit("zero[:, j // group_size]", "zero[:, 0]"))),
        Mistake("original weights rounded", "You round the original weights: round the copy, as the columns before "
                "have left it.",
                (edit(CODE, CODE.replace("work", "weight")),
                 edit(BLOCK_ERROR, BLOCK_ERROR.replace("work", "weight")))),
        Mistake("zero point forgotten", "What a code stands for is s * (code - z): you leave out the zero point.",
                edit("s * (code - z)", "s * code")),
        Mistake("not clipped", "Codes beyond the grid are not clipped: they go from 0 to 2**bits - 1.",
                (edit(".clamp(0, 2**bits - 1)", ""), edit("codes[:, j] = code", "codes[:, j] = code.long()"))),
        Mistake("not clipped, on a GPU", "Codes beyond the grid are not clipped: they go from 0 to 2**bits - 1.",
                (edit(".clamp(0, 2**bits - 1)", ""), edit("codes[:, j] = code", "codes[:, j] = code.clamp(0, 255)"))),
    )


def nibbles(codes: Tensor, layout: str) -> Tensor:
    """Two codes a byte by arithmetic, [rows, ceil(columns / 2)]: neighbours ("... first"), or the halves of a row."""
    rows, columns = codes.shape
    whole = torch.zeros(rows, columns + columns % 2, dtype=torch.int64, device=codes.device)
    whole[:, :columns] = codes
    first, second = whole.view(rows, -1, 2).unbind(-1) if "first" in layout else whole.chunk(2, dim=1)
    return (16 * first + second if "high" in layout else first + 16 * second).to(torch.uint8)


def weights_of(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """float64 weights, a group at a time."""
    parts = zip(codes.double().chunk(scale.shape[1], 1), scale.double().unbind(1), zero.double().unbind(1), strict=True)
    return torch.cat([s[:, None] * (part - z[:, None]) for part, s, z in parts], 1)


class Int4WeightReference(Reference):
    exercise = "Int4Weight"
    SLACK_BYTES = 256  # a table of shifts or the like

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, what, rows, columns, groups=1, x=None):
            codes = torch.randint(16, (rows, columns), generator=rng.torch, dtype=torch.uint8)
            zero = torch.randint(16, (rows, groups), generator=rng.torch, dtype=torch.uint8)
            scale = rng.uniform(rows, groups) * 0.1 + 0.02
            return Case(name, {"codes": codes, "scale": scale, "zero": zero, "what": what,
                               **({} if x is None else {"x": x})}, what)

        yield case("two columns", "pack", 3, 2)
        yield case("ten columns", "pack", 4, 10)
        yield case("an odd column", "pack", 3, rng.choice([5, 7, 9]))
        yield case("one column", "pack", 3, 1)
        yield case("a square weight", "pack", 8, 8, groups=2)
        yield case("six columns", "unpack", 4, 6)
        yield case("an odd column back", "unpack", 3, rng.choice([5, 7, 11]))
        yield case("what is kept", "unpack", 16, 128, groups=2)
        yield case("one row times a weight", "product", 5, 8, x=rng.randn(1, 8))
        yield case("in groups", "product", 6, 24, groups=4, x=rng.randn(5, 24))
        yield case("as many groups as half the columns", "product", 4, 6, groups=3, x=rng.randn(7, 6))
        yield case("a batch of sequences", "product", 8, 8, groups=2, x=rng.randn(2, 3, 8))
        yield case("an odd column, one vector", "product", 5, 9, x=rng.randn(9))
        yield case("float16 inputs", "product", 12, 32, groups=2, x=rng.randn(4, 32, dtype=torch.float16))

    def expected(self, inputs, variant):
        codes = inputs["codes"]
        if inputs["what"] == "pack":
            return {"packed": nibbles(codes, variant["nibbles"])}
        if inputs["what"] == "unpack":
            held = (codes.shape[1] + 1) // 2 * len(codes) + inputs["zero"].numel() + 4 * inputs["scale"].numel()
            return {"codes": codes, "held": held + self.SLACK_BYTES}
        weight = weights_of(codes, inputs["scale"], inputs["zero"])
        return {"product": torch.einsum("...c,rc->...r", inputs["x"].double(), weight)}

    def verify(self, inputs, outputs, expected, variant):
        what = inputs["what"]
        if what == "pack":
            return compare(outputs["packed"], expected["packed"], path="packed")
        if what == "unpack":
            found = compare(outputs["codes"], expected["codes"], path="codes()")
            if not found and outputs["held"] > expected["held"]:
                return Finding(f"the object keeps {outputs['held']:,} bytes, and packed, scale and zero are "
                               f"{expected['held'] - self.SLACK_BYTES:,}: keep no other copy of the codes")
            return found
        dtype = inputs["x"].dtype
        return near(outputs["product"], expected["product"], 1e-5 if dtype == torch.float32 else 4e-3, dtype,
                    path="matmul(x)")

    def same_slip(self, outputs, wrong):
        if "held" in outputs and "held" in wrong:
            return compare(outputs["codes"], wrong["codes"]) is None and outputs["held"] == wrong["held"]
        return compare(outputs, wrong, rough=True) is None

    _PACK, _UNPACK = "codes[:, ::2] | (codes[:, 1::2] << 4)", "[self.packed & 15, self.packed >> 4]"
    mistakes = (
        Mistake("halves the other way round", "Your two codes lie in the other halves of the byte: see "
                'effnlp_lab.variant("Int4Weight").',
                (edit(_PACK, "(codes[:, 0::2] << 4) | codes[:, 1::2]"),
                 edit(_UNPACK, "[self.packed >> 4, self.packed & 15]"))),
        Mistake("packed in the one order, unpacked in the other", "codes() takes the halves in another order than the "
                "one in which they were packed.",
                edit(_UNPACK, "[self.packed >> 4, self.packed & 15]")),
        Mistake("first half with second half", "You put column i beside column i + columns / 2: a byte holds two "
                "neighbours, 2i and 2i + 1.",
                (edit(_PACK, "codes[:, : codes.shape[1] // 2] | (codes[:, codes.shape[1] // 2 :] << 4)"),
                 edit("torch.stack([self.packed & 15, self.packed >> 4], dim=-1)\n        return pairs.flatten(1)",
                      "torch.cat([self.packed & 15, self.packed >> 4], dim=-1)\n        return pairs"))),
        Mistake("halves one after the other", "codes() gives all first codes and then all second ones: they take "
                "turns.",
                edit("torch.stack([self.packed & 15, self.packed >> 4], dim=-1)",
                     "torch.stack([self.packed & 15, self.packed >> 4], dim=1)")),
        Mistake("not shifted", "Both codes lie in the same half of the byte: shift one of them by 4.",
                edit(_PACK, "codes[:, 0::2] | codes[:, 1::2]")),
        Mistake("rows packed", "You pack two rows into one: neighbours in a row share a byte.",
                (edit("codes = torch.nn.functional.pad(codes, (0, self.columns % 2))",
                      "codes = torch.nn.functional.pad(codes, (0, 0, 0, len(codes) % 2)).T"),
                 edit("self.packed = codes[:, ::2] | (codes[:, 1::2] << 4)",
                      "self.packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).T.contiguous()"),
                 edit("torch.stack([self.packed & 15, self.packed >> 4], dim=-1)",
                      "torch.stack([self.packed & 15, self.packed >> 4], dim=1)"),
                 edit("pairs.flatten(1)[:, : self.columns]", "pairs.flatten(0, 1)[: len(self.scale)]"))),
        Mistake("odd column dropped", "The last of an odd number of columns is lost: pad with a column of zeros.",
                edit("codes = torch.nn.functional.pad(codes, (0, self.columns % 2))",
                     "codes = codes[:, : self.columns // 2 * 2]")),
        Mistake("always a column more", "You pad an even number of columns too.",
                edit("(0, self.columns % 2)", "(0, 2 - self.columns % 2)")),
        Mistake("padding returned", "codes() returns the padding too: there are as many columns as there were.",
                edit("pairs.flatten(1)[:, : self.columns]", "pairs.flatten(1)")),
        Mistake("not masked", "The low half still has the high half above it: keep four bits, `& 15`.",
                edit(_UNPACK, "[self.packed, self.packed >> 4]")),
        Mistake("codes kept", "The object keeps the codes a byte each: then packing has saved nothing. Unpack from "
                "`packed`.",
                (edit("        codes = torch.nn.functional.pad", "        self.all_codes = codes\n"
                      "        codes = torch.nn.functional.pad"),)),
        Mistake("codes multiplied", "You multiply by the codes: dequantize them first.",
                edit("dequantize(self.codes(), self.scale, self.zero)", "self.codes().float()")),
        Mistake("zero points forgotten", "A code stands for scale * (code - zero): you leave out the zero points.",
                edit("dequantize(self.codes(), self.scale, self.zero)",
                     "dequantize(self.codes(), self.scale, torch.zeros_like(self.zero))")),
        Mistake("subtracted in uint8", "You subtract the zero point in uint8, where 3 - 5 is 254: turn the codes into "
                "floats first.",
                edit("dequantize(self.codes(), self.scale, self.zero)",
                     "((self.codes().unflatten(1, (self.zero.shape[1], -1)) - self.zero[:, :, None]) "
                     "* self.scale[:, :, None]).flatten(1)")),
        Mistake("grids in turns", "Column j belongs to group j // group_size: your groups take turns (repeat in place "
                "of repeat_interleave).",
                edit("dequantize(self.codes(), self.scale, self.zero)",
                     "self.scale.repeat(1, self.columns // self.scale.shape[1]) * (self.codes().float() - "
                     "self.zero.float().repeat(1, self.columns // self.scale.shape[1]))")),
        Mistake("not transposed", "x times the weight needs the weight transposed: a row of it makes one output.",
                edit("weight.to(x.dtype).T", "weight.to(x.dtype)")),
        Mistake("always float32", "The product has to be in the dtype of x.",
                edit("x @ weight.to(x.dtype).T", "x.float() @ weight.T")),
    )


class ActOrder(Gptq):
    exercise = "act_order"
    ordered = True

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        yield self.case(rng, "three columns", "one grid a row", 8, 3, 3)
        yield self.case(rng, "one column", "one grid a row", 2, 1, 4)
        yield self.case(rng, "20 columns, 3 bits", "one grid a row", 8, 20, 3)
        yield self.case(rng, "as many rows as columns", "one grid a row", 12, 12, 2)
        yield self.case(rng, "two groups", "groups", 8, 12, 3, groups=2)
        yield self.case(rng, "six groups", "groups", 8, 24, 3, groups=6)
        yield self.case(rng, "a narrow grid in groups", "groups", 8, 18, 2, groups=3, tight=0.5)

    mistakes = (
        Mistake("permutation never undone", "Your codes stand in the order in which the columns were rounded: put each "
                "back where its weight stands.",
                edit("codes[:, torch.argsort(order)]", "codes")),
        Mistake("permuted twice", "You permute the codes once more by `order`: it takes the inverse permutation, "
                "torch.argsort(order), to undo it.",
                edit("codes[:, torch.argsort(order)]", "codes[:, order]")),
        Mistake("rising order", "You begin with the smallest inputs: the largest come first.",
                edit("torch.argsort(hessian.diagonal(), descending=True)", "torch.argsort(hessian.diagonal())")),
        Mistake("left to right", "The columns go from left to right: begin with the largest H_jj.",
                edit("order = torch.argsort(hessian.diagonal(), descending=True)",
                     "order = torch.arange(len(hessian), device=hessian.device)")),
        Mistake("Hessian not permuted", "The columns of the weight are permuted and the Hessian is not: it has a row "
                "and a column for each of them.",
                edit("hessian[order][:, order]", "hessian")),
        Mistake("Hessian permuted on one side", "You permute the Hessian's rows alone: its columns belong to the same "
                "inputs.",
                edit("hessian[order][:, order]", "hessian[order]")),
        Mistake("grids not permuted", "Each column keeps the grid of its own group: permute the grids with the "
                "columns.",
                edit("dim=1)[:, order]", "dim=1)")),
        Mistake("grids in turns", "Column j belongs to group j // group_size: repeat each scale for the columns of its "
                "group (repeat_interleave), then permute.",
                edit("part.repeat_interleave(group_size, dim=1)", "part.repeat(1, group_size)")),
        Mistake("grid of the new neighbours", "After the permutation you group the columns anew: each keeps the grid "
                "of the group in which its weight stands.",
                edit("each_scale, each_zero, bits)", "scale, zero, bits)")),
        Mistake("order of the inverse", "You order by the diagonal of the inverse: it is H_jj that says how large an "
                "input is.",
                edit("torch.argsort(hessian.diagonal(), descending=True)",
                     "torch.argsort(torch.linalg.inv(hessian).diagonal(), descending=True)")),
    )


class PackInt3(Reference):
    exercise = "pack_int3"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, rows, columns):
            codes = torch.randint(8, (rows, columns), generator=rng.torch, dtype=torch.uint8)
            return Case(name, {"codes": codes}, part)

        yield case("eight codes", "whole groups of eight", 1, 8)
        yield case("rows of eight", "whole groups of eight", 8, 8)
        yield case("rows of 24", "whole groups of eight", 5, 24)
        yield case("columns in memory order", "whole groups of eight", 4, 16)
        yield case("one code", "a rest", 3, 1)
        for columns in (2, 3, 5):
            yield case(f"{columns} codes", "a rest", 2, columns)
        yield case("more than eight", "a rest", 4, rng.choice([9, 13, 15, 22]))

    def expected(self, inputs, variant):
        rows = []
        high_first = variant["bits"] == "high first"
        for codes in inputs["codes"].tolist():
            bits = [code >> place & 1 for code in codes for place in ((2, 1, 0) if high_first else (0, 1, 2))]
            bits += [0] * (-len(bits) % 8)
            bytes_ = [bits[i : i + 8] for i in range(0, len(bits), 8)]
            rows.append([int("".join(map(str, eight if high_first else eight[::-1])), 2) for eight in bytes_])
        return torch.tensor(rows, dtype=torch.uint8)

    mistakes = (
        Mistake("the other order", 'Your stream fills bytes from the other end: see effnlp_lab.variant("pack_int3").',
                (edit("codes[:, :, None] >> places[:3]", "codes[:, :, None] >> places[:3].flip(0)"),
                 edit(" << places)", " << places.flip(0))"))),
        Mistake("bits of a code turned around", "The bits of each code come in the wrong order, and the bytes are "
                "filled in the right one.",
                edit("codes[:, :, None] >> places[:3]", "codes[:, :, None] >> places[:3].flip(0)")),
        Mistake("bytes filled from the other end", "The bits of each code come in the right order, and the bytes are "
                "filled from the wrong end.",
                edit(" << places)", " << places.flip(0))")),
        Mistake("two codes a byte", "You put two codes into a byte and leave two bits empty: a stream has no gaps.",
                """
def pack_int3(codes):
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] | (codes[:, 1::2] << 3)
"""),
        Mistake("four bits", "Your codes take four bits each: 0 to 7 needs three.",
                (edit("places[:3]", "places[:4]"),)),
        Mistake("planes", "Your stream holds all lowest bits, then all middle ones, then all high ones: the three bits "
                "of a code follow each other.",
                edit("((codes[:, :, None] >> places[:3]) & 1).flatten(1)",
                     "((codes[:, None, :] >> places[:3, None]) & 1).flatten(1)")),
        Mistake("rest dropped", "What is left over after the last whole byte is lost: pad with zero bits.",
                edit("torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8))",
                     "stream[:, : stream.shape[1] // 8 * 8]")),
        Mistake("columns padded to eight", "You pad the columns to a multiple of eight, and give more bytes than are "
                "needed: pad the bits to a multiple of eight.",
                edit("    stream = ((codes", "    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8))\n"
                     "    stream = ((codes")),
        Mistake("padded in front", "The empty bits stand at the beginning of the stream: they belong to its end.",
                edit("(0, -stream.shape[1] % 8)", "(-stream.shape[1] % 8, 0)")),
    )


def uneven_values(rng: Rng, signed: bool) -> Tensor:
    """256 ascending values with 0 and 1 among them, close together near 0; each time others."""
    count = 127 if signed else 254
    steps = torch.cumsum(0.2 + rng.uniform(count), 0)
    sizes = (steps / (steps[-1] + 0.7)) ** 3
    sizes = sizes.clamp(min=1e-6) + torch.linspace(0, 1e-4, count)
    sizes = sizes / sizes.max() * 0.97
    negative = [-sizes.flip(0) * 0.99] if signed else []
    return torch.cat([*negative, torch.zeros(1), sizes, torch.ones(1)]).float()


class BlockwiseState(Reference):
    exercise = "blockwise_state"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, shape, block, signed=True, spread=0.0, zeros=None, scale=1.0):
            values = uneven_values(rng, signed)
            x = rng.randn(*shape) * torch.exp(spread * rng.randn(*shape)) * scale
            x = x if signed else x.abs()
            if zeros is not None:
                x.view(-1)[zeros] = 0
            return Case(name, {"x": away_from_borders(x, values, block), "values": values, "block": block}, part)

        yield case("one block", "whole blocks", (16,), 16)
        yield case("four blocks", "whole blocks", (64,), 16, spread=1.0)
        yield case("blocks across rows", "whole blocks", (6, 10), 12)
        yield case("averages of squares", "whole blocks", (4, 64), 64, signed=False, spread=3.0, scale=1e-6)
        yield case("an outlier in one block", "whole blocks", (8, 16), 32, spread=2.0)
        yield case("a last block of one", "a short block", (17,), 8)
        yield case("less than a block", "a short block", (2, 3), 256)
        yield case("a ragged matrix", "a short block", (5, rng.choice([7, 9, 11])), 16, spread=1.0)
        yield case("zeros alone", "blocks of zeros", (16,), 8, zeros=slice(None))
        yield case("one block of zeros", "blocks of zeros", (3, 8), 8, zeros=slice(8, 16))
        yield case("zeros without a sign", "blocks of zeros", (24,), 8, signed=False, zeros=slice(0, 8))

    def expected(self, inputs, variant):
        flat = inputs["x"].double().flatten()
        values, block = inputs["values"].double(), inputs["block"]
        codes, largest = [], []
        for part in flat.split(block):
            absmax = part.abs().max()
            largest.append(absmax)
            shares = part / absmax if absmax > 0 else part
            codes.append((shares[:, None] - values).abs().argmin(1))
        return torch.cat(codes).to(torch.uint8).view(inputs["x"].shape), torch.stack(largest)

    def verify(self, inputs, outputs, expected, variant):
        return (tensors(outputs, ("codes", "absmax")) or compare(outputs[0], expected[0], path="your tensor of codes")
                or near(outputs[1], expected[1], 1e-6, path="your absmax"))

    mistakes = (
        Mistake("one block", "The whole tensor shares one largest magnitude: each block has its own.",
                (edit("absmax = flat.abs().amax(1)", "absmax = flat.abs().amax().expand(len(flat))"),)),
        Mistake("blocks of rows", "Your blocks begin anew with every row: they are neighbours in memory order, across "
                "rows too.", """
def blockwise_state(x, values, block):
    rows = x.reshape(-1, x.shape[-1])
    flat = torch.nn.functional.pad(rows, (0, -x.shape[-1] % block)).view(-1, block)
    absmax = flat.abs().amax(1)
    shares = flat / absmax.masked_fill(absmax == 0, 1.0)[:, None]
    codes = torch.bucketize(shares, (values[:-1] + values[1:]) / 2)
    return codes.view(len(rows), -1)[:, : x.shape[-1]].reshape(x.shape).to(torch.uint8), absmax
"""),
        Mistake("largest, not largest magnitude", "You take the largest number of a block: the largest magnitude may "
                "belong to a negative one.",
                edit("flat.abs().amax(1)", "flat.amax(1).abs()")),
        Mistake("not divided", "You code the numbers as they are: divide them by their block's largest magnitude.",
                edit("flat / absmax.masked_fill(absmax == 0, 1.0)[:, None]", "flat")),
        Mistake("next value below", "You take the next value below: take the nearest, whose borders are halfway "
                "between neighbours.",
                edit("torch.bucketize(shares, (values[:-1] + values[1:]) / 2)",
                     "torch.bucketize(shares, values[1:], right=True)")),
        Mistake("next value above", "You take the next value above: take the nearest, whose borders are halfway "
                "between neighbours.",
                edit("torch.bucketize(shares, (values[:-1] + values[1:]) / 2)",
                     "torch.bucketize(shares, values).clamp(max=255)")),
        Mistake("evenly spaced", "You code as if the values were evenly spaced: look for the nearest of `values`.",
                edit("torch.bucketize(shares, (values[:-1] + values[1:]) / 2)",
                     "((shares - values[0]) / (values[-1] - values[0]) * 255).round().clamp(0, 255)")),
        Mistake("short block dropped", "The last block is left out when it is short.",
                (edit("torch.nn.functional.pad(x.flatten(), (0, -x.numel() % block)).view(-1, block)",
                      "x.flatten()[: max(block, x.numel() // block * block)].view(-1, min(block, x.numel()))"),
                 edit("codes.flatten()[: x.numel()].view(x.shape)",
                      "torch.nn.functional.pad(codes.flatten(), (0, x.numel() - codes.numel())).view(x.shape)"))),
        Mistake("zeros divided by zero", "A block of zeros is divided by 0: its codes are that of 0.",
                edit("absmax.masked_fill(absmax == 0, 1.0)", "absmax"), seen_on="cpu"),
        Mistake("absmax of zeros", "The largest magnitude of a block of zeros is 0: you return what you divided by.",
                edit("    shares = flat / absmax.masked_fill(absmax == 0, 1.0)[:, None]",
                     "    absmax = absmax.masked_fill(absmax == 0, 1.0)\n    shares = flat / absmax[:, None]")),
        Mistake("small number added", "You add a small number to the divisor, which is not small beside small blocks: "
                "replace a divisor of 0 alone.",
                edit("absmax.masked_fill(absmax == 0, 1.0)[:, None]", "(absmax + 1e-6)[:, None]")),
    )


def away_from_borders(x: Tensor, values: Tensor, block: int) -> Tensor:
    """x with what lies near a border between two values moved onto the nearer of them."""
    moved = x.flatten().clone()
    borders = (values[:-1].double() + values[1:].double()) / 2
    for part in moved.split(block):
        absmax = part.abs().max()
        if absmax == 0:
            continue
        shares = (part / absmax).double()
        code = (shares[:, None] - values.double()).abs().argmin(1)
        gap = (shares[:, None] - borders).abs().amin(1)
        width = torch.stack([(values[1:] - values[:-1])[(code - side).clamp(0, 254)] for side in (0, 1)]).amin(0)
        close = (gap < 1e-3 * width + 1e-6) & (part.abs() < absmax)
        part[close] = values[code[close]] * absmax
    return moved.view(x.shape)


class FindOutliers(Reference):
    exercise = "find_outliers"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, rows, columns, bits, size, count, spread=0.0, heavy=True):
            for _ in range(40):
                weight = rng.randn(rows, columns)
                if heavy:
                    far = torch.tensor(rng.shuffled(range(weight.numel()))[: max(1, weight.numel() // 12)])
                    weight.view(-1)[far] *= 1 + 3 * rng.uniform(len(far))
                importance = torch.exp(spread * rng.randn(columns)) + 0.05
                exact = gains(weight.double(), importance.double(), bits, size).flatten().sort(descending=True).values
                single = gains(weight, importance, bits, size).double().flatten().sort(descending=True).values
                room = (exact[count - 1] - exact[count]) / exact[0]
                if room > 1e-3 and (single - exact).abs().max() < 1e-4 * exact[0]:
                    break
            return Case(name, {"weight": weight, "importance": importance, "bits": bits, "group_size": size,
                               "count": count}, part)

        yield case("one group, one outlier", "outliers", 1, 8, 3, 8, 1)
        yield case("groups of four", "outliers", 4, 12, 2, 4, 3)
        yield case("a square weight", "outliers", 8, 8, 3, 4, rng.int(3, 6))
        yield case("more than one a group", "outliers", 2, 16, 3, 16, 5)
        yield case("unequal columns", "importance", 6, 16, 3, 8, 4, spread=1.5)
        yield case("very unequal columns", "importance", 5, 24, 2, 6, rng.int(3, 6), spread=2.5)
        yield case("no heavy weights", "importance", 6, 32, 3, 16, 5, spread=1.0, heavy=False)

    def expected(self, inputs, variant):
        gain = gains(inputs["weight"].double(), inputs["importance"].double(), inputs["bits"], inputs["group_size"])
        mask = torch.zeros(gain.numel(), dtype=torch.bool)
        mask[gain.flatten().argsort(descending=True)[: inputs["count"]]] = True
        return mask.view(gain.shape)

    def verify(self, inputs, outputs, expected, variant):
        found = compare(outputs, expected, path="your answer")
        if not found or not isinstance(outputs, Tensor) or outputs.shape != expected.shape:
            return found
        if outputs.dtype != torch.bool:
            return found
        if outputs.sum() != expected.sum():
            return Finding(f"you mark {int(outputs.sum())} weights, and {inputs['count']} are asked for")
        return Finding(f"{int((outputs.cpu() & ~expected).sum())} of the {inputs['count']} weights that you mark are "
                       "not among those with the largest gain",
                       {"right": expected.nonzero().tolist(), "yours": outputs.nonzero().tolist()})

    mistakes = (
        Mistake("largest weights", "You take the largest weights. Those are often outliers and not always: what counts "
                "is how much the error of the group falls.", """
def find_outliers(weight, importance, bits, group_size, count):
    outliers = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    outliers[weight.abs().flatten().topk(count).indices] = True
    return outliers.view(weight.shape)
"""),
        Mistake("largest errors", "You take the weights with the largest error of their own. The gain is that of the "
                "whole group, whose grid gets finer without the weight.", """
def find_outliers(weight, importance, bits, group_size, count):
    restored = dequantize(*round_to_nearest(weight, bits, group_size))
    gain = (weight - restored) ** 2 * importance
    outliers = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    outliers[gain.flatten().topk(count).indices] = True
    return outliers.view(weight.shape)
"""),
        Mistake("importance forgotten", "You leave out what an error in a column costs: multiply squares by "
                "importance.",
                edit("(kept - restored) ** 2 * importance", "(kept - restored) ** 2")),
        Mistake("importance inverted", "You divide by the importance: a large one makes an error count more.",
                edit("** 2 * importance", "** 2 / importance")),
        Mistake("grid not found anew", "You leave the grid as it was: without the weight the group gets a finer one.",
                edit("        without = weight.clone()\n        without[:, place::group_size] = 0\n"
                     "        gain[:, place::group_size] = error(weight) - error(without)\n",
                     "        restored = dequantize(*round_to_nearest(weight, bits, group_size))\n"
                     "        each = (weight - restored) ** 2 * importance\n"
                     "        gain[:, place::group_size] = each[:, place::group_size] + each[:, :1] * 0\n")),
        Mistake("error measured against the weight", "The error without a weight still counts that weight, as if its "
                "code were 0: it is kept in 16 bits and has no error.",
                (edit("def error(kept: Tensor)", "def error(kept: Tensor, whole: Tensor)"),
                 edit("((kept - restored)", "((whole - restored)"),
                 edit("error(weight) - error(without)", "error(weight, weight) - error(without, weight)"))),
        Mistake("smallest gain", "You take the weights with the smallest gain.",
                edit("gain.flatten().topk(count)", "(-gain).flatten().topk(count)")),
        Mistake("gain not squared", "The error of a weight is squared.",
                edit("(kept - restored) ** 2", "(kept - restored).abs()")),
        Mistake("as many a row", "You take the same number in every row: outliers are counted over the whole weight.",
                (edit("    outliers = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)\n",
                      "    outliers = torch.zeros_like(weight, dtype=torch.bool)\n"),
                 edit("    outliers[gain.flatten().topk(count).indices] = True\n",
                      "    outliers.scatter_(1, gain.topk(max(1, count // len(weight)), dim=1).indices, True)\n"))),
    )


def gains(weight: Tensor, importance: Tensor, bits: int, group_size: int) -> Tensor:
    """How much the error of its group falls without each weight, [rows, columns], in the weight's dtype."""
    groups, costs = weight.unflatten(1, (-1, group_size)), importance.unflatten(0, (-1, group_size))

    def error(groups: Tensor) -> Tensor:
        codes, scale, zero = nearest(groups.flatten(1), bits, group_size)
        restored = scale[..., None] * (codes.unflatten(1, (-1, group_size)) - zero[..., None])
        return ((groups - restored).square() * costs).sum(-1)

    whole, found = error(groups), []
    for place in range(group_size):
        keep = torch.ones(group_size, dtype=weight.dtype, device=weight.device)
        keep[place] = 0
        found.append(whole - error(groups * keep))
    return torch.stack(found, -1).flatten(1)


def _round_to_nearest(weight, bits, group_size, clip=1.0):
    codes, scale, zero = nearest(weight.float(), bits, group_size, clip)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def _gptq_columns(weight, hessian, scale, zero, bits):
    """Right codes in the weight's own precision, by elimination."""
    work, inverse, codes = weight.clone(), torch.linalg.inv(hessian), torch.zeros_like(weight, dtype=torch.uint8)
    each = weight.shape[1] // scale.shape[1]
    for j in range(weight.shape[1]):
        s, z = scale[:, j // each], zero[:, j // each].float()
        code = torch.clip(torch.round(work[:, j] / s) + z, 0, 2**bits - 1)
        codes[:, j] = code.to(torch.uint8)
        work -= ((work[:, j] - s * (code - z)) / inverse[j, j])[:, None] * inverse[j][None, :]
        inverse = inverse - inverse[:, j : j + 1] * inverse[j : j + 1] / inverse[j, j]
    return codes


EARLIER = {"round_to_nearest": _round_to_nearest, "gptq_columns": _gptq_columns}
REFERENCES = {
    cls.exercise: cls()
    for cls in (Int8Product, RoundToNearest, CalibrationHessian, GptqColumns, GptqBlocks, Int4WeightReference,
                ActOrder, PackInt3, BlockwiseState, FindOutliers)
}
