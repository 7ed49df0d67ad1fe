"""Cases, right outputs and known mistakes of lab 03.

Right outputs are those of the plain thing, in float64: the whole batch at once for accumulation, the function without
checkpoints for checkpointing, the unscaled gradients for loss scaling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effnlp_lab.exercises.compare import Finding, compare, leafwise
from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng, edit

from .drive import run_piece, run_stack, steps_of_memory

Inputs = Mapping[str, Any]
Variant = Mapping[str, str]
SLACK = 2e-5  # of the largest number: float32 sums of a few hundred terms, in any order, stay within it
CALLS = 64  # that largest_batch may make


def near(outputs: Any, expected: Any, slack: float = SLACK, plain: Any = None) -> Finding | None:
    """Compare float32 outputs with exact ones, letting each tensor be off by `slack` of its largest number.

    plain: what PyTorch gives in float32. Where that is further off, because large terms leave a small sum, its error
    sets the tolerance.
    """
    return compare(outputs, expected, shifted(expected, slack, plain), torch.float32)


def shifted(value: Any, slack: float, plain: Any = None) -> Any:
    """`value` as a plain implementation would have it that is off by half of `slack`, or `plain` where it is more."""
    def off_by(exact: Any, found: Any) -> Any:
        if not isinstance(exact, Tensor) or not exact.is_floating_point() or not exact.numel():
            return exact
        off = slack / 2 * exact.abs().max()
        return found if found is not None and (found - exact).abs().max() > off else exact + off

    return leafwise(off_by, value, plain)


class TrainingMemory(Reference):
    exercise = "training_memory"
    STATES, HIDDEN = ["weights", "gradients", "optimizer"], ["hidden states"]

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, shape, batch, length, size, counts=None):
            wanted = self.STATES if part == "weights and states" else self.HIDDEN
            return Case(name, {"shape": shape, "batch": batch, "length": length, "size": size, "wanted": wanted,
                               "counts": counts}, part)

        opt = {"parameters": 1_315_758_080, "trainable": 1_315_758_080, "layers": 24, "hidden": 2048, "heads": 32}
        bert = {"parameters": 109_482_240, "trainable": 109_482_240, "layers": 12, "hidden": 768, "heads": 12}
        yield case("OPT-1.3B in 2 bytes", "weights and states", opt, 1, 512, 2)
        yield case("BERT-Base in 4 bytes", "weights and states", bert, 8, 128, 4)
        frozen = {**bert, "trainable": rng.int(1000, 900_000)}
        yield case("all but a few weights frozen", "weights and states", frozen, 3, 64, 2)
        yield case("one sample of OPT-1.3B", "hidden states", opt, 1, 512, 2)
        yield case("16 samples of BERT-Base", "hidden states", bert, 16, rng.int(100, 512), 4)
        yield case("one token", "hidden states", self._small(rng), 1, 1, 2)
        yield case("a small model", "hidden states", self._small(rng), rng.int(2, 9), rng.int(20, 99), 4)
        yield case("a block that keeps other amounts", "hidden states", self._small(rng), 3, rng.int(20, 99), 2,
                   {"per_token": rng.int(30, 40), "per_pair": rng.int(5, 9)})
        yield case("attention that keeps no pairs", "hidden states", self._small(rng), 2, 48, 4,
                   {"per_token": 17, "per_pair": 0})

    @staticmethod
    def _small(rng: Rng) -> dict[str, int]:
        heads = rng.int(2, 6)
        return {"parameters": rng.int(5000, 9000), "trainable": rng.int(100, 4000), "layers": rng.int(3, 9),
                "hidden": 16 * heads, "heads": heads}

    def expected(self, inputs, variant):
        shape, size, counts = inputs["shape"], inputs["size"], inputs["counts"] or {"per_token": 20, "per_pair": 3}
        length = inputs["length"]
        numbers = sum(
            inputs["batch"] * length * (counts["per_token"] * shape["hidden"] + counts["per_pair"] * head * length)
            for head in [shape["heads"]] for _ in range(shape["layers"])
        )
        width = 4 if variant["gradients"] == "float32" else size
        everything = {"weights": shape["parameters"] * size, "gradients": shape["trainable"] * width,
                      "optimizer": shape["trainable"] * size * 2, "hidden states": numbers * size}
        return {name: float(everything[name]) for name in inputs["wanted"]}

    def verify(self, inputs, outputs, expected, variant):
        found = compare(outputs, expected)
        if found and variant["gradients"] != "float32" and inputs["wanted"] == self.STATES:
            other = {"gradients": "float32"}
            if compare(outputs, self.expected(inputs, other)) is None:
                return Finding("your gradients are in float32, and they are as wide as the weights here: see "
                               'effnlp_lab.variant("training_memory")')
        return found

    mistakes = (
        Mistake("heads forgotten", "3 * length^2 lacks the heads, as the slide does: every head keeps score matrices "
                "of its own, so heads * length^2.", edit('per_pair * shape["heads"] * length**2',
                                                         "per_pair * length**2")),
        Mistake("length not squared", "The score matrices grow with the square of the length: every token attends to "
                "every token.", edit("length**2", "length")),
        Mistake("one layer", "The hidden states are those of one layer: backward needs those of all layers.",
                edit('shape["layers"] * per_layer', "per_layer")),
        Mistake("layers times the tokens alone", "The score matrices of every layer are kept too: layers multiplies "
                "both terms.", (edit('shape["layers"] * per_layer', "per_layer"),
                                edit('per_token * shape["hidden"]', 'shape["layers"] * per_token * shape["hidden"]'))),
        Mistake("one sample", "The hidden states are those of one sample: multiply by the batch.",
                edit('size * batch * shape["layers"]', 'size * shape["layers"]')),
        Mistake("hidden states in numbers", "You give the number of hidden states, and bytes are asked for: multiply "
                "by the size of a number.", edit('size * batch * shape["layers"]', 'batch * shape["layers"]')),
        Mistake("whole batch attends", "The batch is squared too: tokens attend within their own sample, so there are "
                "batch * length^2 pairs a head, not (batch * length)^2.",
                edit("length**2", "batch * length**2")),
        Mistake("one optimizer state", "AdamW keeps two numbers a weight: the averages of the gradient and of its "
                "square.", edit("2 * size * shape", "size * shape")),
        Mistake("gradients of frozen weights", "Frozen weights have no gradients: count trainable.",
                edit('"gradients": size * shape["trainable"]', '"gradients": size * shape["parameters"]')),
        Mistake("states of frozen weights", "The optimizer keeps state for what it trains alone: count trainable.",
                edit('2 * size * shape["trainable"]', '2 * size * shape["parameters"]')),
        Mistake("frozen weights left out", "Frozen weights are in memory too: count all parameters for the weights.",
                edit('"weights": size * shape["parameters"]', '"weights": size * shape["trainable"]')),
        Mistake("weights in numbers", "You give the number of weights, and bytes are asked for: multiply by the size "
                "of a number.", edit('"weights": size * shape', '"weights": shape')),
        Mistake("optimizer in float32", "You count 4 bytes for each optimizer state, and in this lab's formula, as in "
                "the lecture's, a state is as wide as a weight.", edit("2 * size * shape", "8 * shape")),
    )


class LargestBatch(Reference):
    exercise = "largest_batch"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def line(name, largest, left, part="largest", square=0):
            """A card with room for exactly `largest` samples, and `left` bytes besides."""
            curve = {"fixed": rng.int(100, 5000), "each": rng.int(200, 900), "square": square, "block": 1}
            return Case(name, {"curve": curve, "capacity": steps_of_memory(**curve)(largest) + left}, part)

        yield line("some batch", rng.int(5, 7), rng.int(1, 150))
        yield line("fits to the byte", rng.int(9, 15), 0)
        for n in (1, 2, 3, 8):
            yield line(f"room for {n}", n, rng.int(0, 150))
        yield line("a byte short of the next", rng.choice([17, 24, 31]), 0, square=3)
        curve = {"fixed": 9000, "each": 300, "square": 0, "block": 1}
        yield Case("not even one", {"curve": curve, "capacity": rng.int(2000, 9299)}, "largest")
        curve = {"fixed": 5000, "each": 777, "square": 0, "block": 4096}
        yield Case("memory in blocks", {"curve": curve, "capacity": rng.int(30_000, 90_000)}, "largest")
        yield line("a curve, not a line", rng.int(20, 60), rng.int(0, 150), square=5)
        yield line("thousands", rng.int(3000, 7000), rng.int(0, 150), "few calls")
        yield line("tens of millions", rng.int(20_000_000, 60_000_000), rng.int(0, 150), "few calls")

    def expected(self, inputs, variant):
        memory, capacity, low, high = steps_of_memory(**inputs["curve"]), inputs["capacity"], 0, 1 << 40
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if memory(middle) <= capacity else (low, middle)
        return low

    def verify(self, inputs, outputs, expected, variant):
        found = compare(outputs["largest"], expected)
        if found or outputs["calls"] <= CALLS:
            return found
        return Finding(f"your answer called memory {outputs['calls']:,} times, and every call may be a training step: "
                       f"at most {CALLS} are allowed, so double the batch and then halve the interval")

    def same_slip(self, outputs, wrong):
        same = compare(outputs["largest"], wrong["largest"], rough=True) is None
        return same and (outputs["calls"] > CALLS) == (wrong["calls"] > CALLS)

    mistakes = (
        Mistake("power of two", "You return the largest power of two that fits. Nothing says that a batch has to be "
                "one: search between it and the next.", edit("while high - low > 1:", "while False:")),
        Mistake("first that does not fit", "You return the smallest batch that does not fit: the one before it is the "
                "largest that does.", edit("return low", "return high")),
        Mistake("strictly less", "A step that takes exactly the capacity fits.",
                (edit("memory(high) <= capacity", "memory(high) < capacity"),
                 edit("memory(middle) <= capacity", "memory(middle) < capacity"))),
        Mistake("one by one", "You try every batch in turn, and each try may be a training step: double the batch "
                "until it does not fit, then halve the interval.", """
def largest_batch(memory, capacity):
    batch = 0
    while memory(batch + 1) <= capacity and batch < 9000:
        batch += 1
    return batch
"""),
        Mistake("straight line", "You take memory for a straight line through two points. It has steps and may "
                "bend: search with the values themselves.", """
def largest_batch(memory, capacity):
    first = memory(1)
    each = memory(2) - first
    if first > capacity:
        return 0
    return 1 + (capacity - first) // max(each, 1)
"""),
        Mistake("at least one", "Where not even one sample fits the answer is 0.",
                edit("return low", "return max(1, low)")),
        Mistake("search stops early", "Your search stops while there is still a batch between the two bounds: go on "
                "until they are neighbours.", edit("high - low > 1", "high - low > 2")),
        Mistake("fixed upper bound", "Your search begins below an upper bound of your own, and more may fit: double "
                "until it does not.", (edit("low, high = 0, 1", "low, high = 0, 2**20"),
                                 edit("while memory(high) <= capacity:", "while False:"))),
    )


class Accumulate(Reference):
    exercise = "accumulate"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, batches, frozen=(), stale=False, count_graphs=False):
            weights = {"embedding": rng.randn(11, 6), "hidden": rng.randn(6, 7, scale=0.5), "bias": rng.randn(7),
                       "output": rng.randn(7, 11, scale=0.5)}
            left = {name: rng.randn(*value.shape) for name, value in weights.items()} if stale else {}
            return Case(name, {"weights": weights, "micro_batches": batches, "frozen": list(frozen), "stale": left,
                               "count_graphs": count_graphs}, part)

        def batch(rows, length, lengths=None):
            """Tokens and targets; each row's targets end after its length, at -100."""
            tokens = torch.tensor(rng.ints(rows * length, 0, 10)).view(rows, length)
            targets = torch.tensor(rng.ints(rows * length, 0, 10)).view(rows, length)
            for row, end in enumerate(lengths or []):
                targets[row, end:] = -100
            return tokens, targets

        yield case("one micro-batch", "equal lengths", [batch(2, 5)])
        yield case("three alike", "equal lengths", [batch(2, 4) for _ in range(3)])
        yield case("gradients left from before", "equal lengths", [batch(3, 4) for _ in range(2)], stale=True)
        yield case("a frozen embedding", "equal lengths", [batch(2, 4) for _ in range(2)], frozen=["embedding"])
        yield case("one long, one short", "unequal lengths", [batch(2, 9), batch(2, 2)])
        yield case("as many rows, padded to one length", "unequal lengths",
                   [batch(3, 8, [8, 7, rng.int(5, 8)]), batch(3, 8, [1, rng.int(1, 3), 2])])
        yield case("unequal rows and lengths", "unequal lengths",
                   [batch(1, 7, [6]), batch(4, 3, [3, 1, 2, 3]), batch(2, rng.int(4, 6), [3, 4])])
        yield case("a micro-batch of padding alone", "unequal lengths",
                   [batch(2, 4, [4, 2]), batch(2, 3, [0, 0]), batch(1, 5, [3])])
        yield case("six micro-batches, one graph at a time", "memory", [batch(2, 3) for _ in range(6)],
                   count_graphs=True)

    def expected(self, inputs, variant):
        weights = {name: value.double().requires_grad_(name not in inputs["frozen"])
                   for name, value in inputs["weights"].items()}
        logits, targets = [], []
        for tokens, target in inputs["micro_batches"]:
            hidden = torch.tanh(weights["embedding"][tokens] @ weights["hidden"] + weights["bias"])
            logits.append((hidden @ weights["output"]).flatten(0, 1))
            targets.append(target.flatten())
        loss = F.cross_entropy(torch.cat(logits), torch.cat(targets))
        loss.backward()
        told = {"loss": loss.detach(), "gradients": {name: value.grad for name, value in weights.items()}}
        return {**told, "graphs": 1} if inputs["count_graphs"] else told

    def verify(self, inputs, outputs, expected, variant):
        want = {key: expected[key] for key in ("gradients", "loss")}
        found = near({key: outputs[key] for key in want}, want)
        if found:
            return Finding(found.sentence.replace("your answer['gradients']", "the gradient of ").replace(
                "your answer['loss']", "the loss that you return"), found.details)
        if inputs["count_graphs"] and outputs["graphs"] > 1:
            return Finding(f"the gradient is right, but {outputs['graphs']} graphs were alive at once: call backward "
                           "inside the loop, after each forward", {"graphs alive": outputs["graphs"]})
        return None

    mistakes = (
        Mistake("mean of means", "You take the mean of the micro-batches' means: short micro-batches weigh too much. "
                "Divide the sum of all losses by the number of all tokens. (At equal lengths the two are the same.)",
                (edit('reduction="sum"', 'reduction="mean"'), edit(" / tokens", " / len(micro_batches)"))),
        Mistake("sum of means", "You add the micro-batches' means: the gradient grows with their number.",
                (edit('reduction="sum"', 'reduction="mean"'), edit(" / tokens", ""))),
        Mistake("not divided", "You add the losses and do not divide by the number of tokens.",
                edit(" / tokens", "")),
        Mistake("backward once, after the loop", "You call backward once, after the loop, as two slides say: the "
                "gradient is "
                "right, but every graph stayed alive, and that is the memory which accumulation is there to save.",
                (edit("        loss.backward()\n        total += loss.item()\n", "        total = total + loss\n"),
                 edit("    return total", "    total.backward()\n    return total.item()"))),
        Mistake("zero_grad inside the loop", "You clear the gradients inside the loop: what is left is the gradient "
                "of the last micro-batch.", (edit("    model.zero_grad()\n", ""),
                                      edit("        loss.backward()",
                                           "        model.zero_grad()\n        loss.backward()"))),
        Mistake("gradients not cleared", "The gradients that were there before are still in the sum: clear them once, "
                "before the loop.", edit("    model.zero_grad()\n", "")),
        Mistake("padding counted", "You divide by the number of all positions, padding too: count the targets that "
                "are not -100.", edit("(targets != -100).sum().item()", "targets.numel()")),
        Mistake("padding learned", "Padding counts as a token to be learned: targets of -100 have no loss.",
                edit("targets.flatten(), reduction", "targets.flatten().clamp(min=0), reduction")),
        Mistake("weights inverted", "Your weight of a micro-batch is upside down, as on the slide: it is its tokens "
                "over those of the batch, not the batch's over its own.",
                (edit('reduction="sum"', 'reduction="mean"'),
                 edit(" / tokens", " * tokens / (targets != -100).sum()"))),
        Mistake("weighed by rows", "You weigh micro-batches by their sequences, and sequences differ in length: "
                "weigh by tokens.",
                (edit('reduction="sum"', 'reduction="mean"'),
                 edit(" / tokens", " * len(targets) / sum(len(t) for _, t in micro_batches)"))),
        Mistake("mean of nothing", "A micro-batch of padding alone has no mean: 0/0 is NaN, and NaN times 0 too. "
                "Sum its losses instead.",
                (edit('reduction="sum"', 'reduction="mean"'),
                 edit(" / tokens", " * (targets != -100).sum() / tokens"))),
        Mistake("loss of the last", "You return the loss of the last micro-batch: add them up.",
                edit("total += loss.item()", "total = loss.item()")),
        Mistake("mean of the losses", "Your gradients are right, and the loss that you return is divided once more.",
                edit("return total", "return total / (len(micro_batches) + (len(micro_batches) == 1))")),
    )


class Checkpoint(Reference):
    exercise = "checkpoint"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, inputs, tracked=(0,), form="tensor", device="any", **more):
            weights = {"first": rng.randn(5, 8, scale=0.6), "second": rng.randn(8, 5, scale=0.6)}
            if form == "ids":
                weights["table"] = rng.randn(9, 5)
            return Case(name, {"weights": weights, "inputs": inputs, "tracked": list(tracked), "form": form,
                               "seed": rng.int(0, 1 << 31), **more}, part, device=device)

        def x(rows=4):
            return rng.randn(rows, 5)

        yield case("one tensor in, one out", "recomputation", [x()])
        yield case("ids, and no input needs a gradient", "inputs and outputs", [torch.tensor(rng.ints(6, 0, 8))], (),
                   "ids")
        yield case("two inputs", "recomputation", [x(), x()], (0, 1), "two")
        yield case("one row", "recomputation", [x(1)])
        yield case("two calls in a row", "random state", [x()], twice=True)
        yield case("a larger mask", "random state", [x(rng.int(30, 40))])
        yield case("under no_grad", "recomputation", [x()], grad=False)
        yield case("the second input needs no gradient", "inputs and outputs", [x(), x()], (0,), "two")
        yield case("the first input needs no gradient", "inputs and outputs", [x(), x()], (1,), "two")
        yield case("a mask, a number, a flag and None", "inputs and outputs",
                   [x(), rng.uniform(4, 5) < 0.4, rng.float(0.5, 2.0), True, None], (0,), "extras")
        yield case("nested outputs", "inputs and outputs", [x()], (0,), "nested")
        yield case("an output that needs no gradient", "inputs and outputs", [x()], (0,), "constant")
        yield case("dropout of the GPU's own", "gpu", [rng.randn(64, 5)], (0,), "device dropout", device="cuda")

    def plain(self, inputs, variant, dtype=None):
        with torch.random.fork_rng(devices=[]):
            return run_piece(lambda function, *given: function(*given), inputs["weights"], inputs["inputs"],
                             inputs["tracked"], inputs["form"], inputs["seed"], inputs.get("twice", False),
                             inputs.get("grad", True), dtype=dtype)

    def expected(self, inputs, variant):
        told = self.plain(inputs, variant, torch.float64)
        calls = 2 if inputs.get("twice") else 1
        return {**told, "runs": [calls, 2 * calls if inputs.get("grad", True) else calls], "held": 0,
                "same masks": True}

    def verify(self, inputs, outputs, expected, variant):
        if inputs["form"] != "device dropout":
            plain = self.plain(inputs, variant)
            found = near({"your answer": outputs["outputs"]}, {"your answer": expected["outputs"]},
                         plain={"your answer": plain["outputs"]})
            if found:
                return Finding(_plainly(found.sentence), found.details)
        if not outputs["same masks"]:
            return Finding("the second run of the function drew another dropout mask than the first: it has to start "
                           "from the random state that the first run started from")
        if outputs["held"]:
            return Finding(f"after the forward pass {outputs['held']} tensors that the function made on its way were "
                           "still in memory: keep its inputs alone, and run it again in the backward pass")
        if outputs["runs"] != expected["runs"]:
            told = "{} times until the end of the forward pass and {} times until the end of the backward pass"
            return Finding(f"the function ran {told.format(*outputs['runs'])}, and {expected['runs'][0]} and "
                           f"{expected['runs'][1]} are right")
        if inputs["form"] == "device dropout":
            return None
        found = near({"gradients": outputs["gradients"]}, {"gradients": expected["gradients"]},
                     plain={"gradients": plain["gradients"]})
        if found:
            return Finding(found.sentence.replace("your answer['gradients']", "the gradient of "), found.details)
        if outputs["random state"] != expected["random state"]:
            return Finding("after the backward pass the random state is another than without checkpointing: put back "
                           "the state that you found there")
        return None

    mistakes = (
        Mistake("new mask", "The recomputation draws a new dropout mask, so that the gradient belongs to another "
                "forward pass: set the random state to what it was before the first run.",
                edit("        set_random_state(ctx.state)\n", "")),
        Mistake("state noted too late", "You note the random state after the first run: the recomputation then "
                "draws what would come next. Note it before.",
                edit("        return run(*inputs)", "        out = run(*inputs)\n        ctx.state = random_state()\n"
                     "        return out")),
        Mistake("state not put back", "After your backward the random state is that of the recomputation, so that "
                "later layers draw its numbers again: put back the state that you found.",
                edit("        set_random_state(now)\n", "")),
        Mistake("seeded anew", "You start the recomputation from a fixed seed: the first run did not start from it.",
                edit("set_random_state(ctx.state)", "torch.manual_seed(0)")),
        Mistake("not detached", "You recompute on the inputs themselves, so that backward runs on into the graph "
                "before the function: detach them, and let autograd go on from what you return.",
                edit("x.detach().requires_grad_(x.requires_grad)", "x")),
        Mistake("all inputs differentiated", "You ask for the gradient of every tensor, and whole numbers and masks "
                "have none: keep each input's own requires_grad.",
                edit("requires_grad_(x.requires_grad)", "requires_grad_()")),
        Mistake("recomputed without a graph", "Inside backward gradients are off: recompute under torch.enable_grad().",
                edit("torch.enable_grad()", "torch.no_grad()")),
        Mistake("called plainly", "You call the function as it is, and autograd keeps everything that it makes.", """
def checkpoint(function, *inputs):
    return function(*inputs)
"""),
        Mistake("graph kept", "You run the function with gradients on and keep its graph for the backward pass: "
                "that is what was to be saved.", """
class Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, anchor, *inputs):
        ctx.inputs = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
                      for x in inputs]
        with torch.enable_grad():
            ctx.outputs = run(*ctx.inputs)
        return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in ctx.outputs)

    @staticmethod
    def backward(ctx, *gradients):
        pairs = [(out, g) for out, g in zip(ctx.outputs, gradients)
                 if isinstance(out, torch.Tensor) and out.requires_grad]
        torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
        return None, None, *(x.grad if isinstance(x, torch.Tensor) else None for x in ctx.inputs)


def checkpoint(function, *inputs):
    nesting = []

    def run(*inputs):
        leaves, spec = tree_flatten(function(*inputs))
        nesting.append(spec)
        return tuple(leaves)

    leaves = Recompute.apply(run, torch.zeros((), requires_grad=True), *inputs)
    return tree_unflatten(leaves, nesting[0])
"""),
        Mistake("parameters left out", "You differentiate with respect to the inputs alone, and the function's own "
                "parameters get no gradient: torch.autograd.backward reaches both.",
                (edit("        torch.autograd.backward(", "        wanted = [x for x in inputs if isinstance(x, "
                "torch.Tensor) and x.requires_grad]\n        found = torch.autograd.grad("),
                 edit("[g for _, g in pairs])", "wanted, [g for _, g in pairs]) if wanted else []"),
                 edit("        return None, None, *(x.grad if", "        for x, g in zip(wanted, found):\n"
                      "            x.grad = g\n        return None, None, *(x.grad if"))),
        Mistake("no anchor", "Where no input requires a gradient autograd never calls your backward, and the "
                "function's parameters get none: give apply one more input that does.",
                edit("requires_grad=True)", "requires_grad=False)")),
        Mistake("nesting lost", "The outputs come back as a flat tuple: put them together as the function nested them.",
                edit("return tree_unflatten(leaves, nesting[0])", "return leaves")),
        Mistake("first output alone", "You send back the gradient of the first output alone.",
                edit("zip(outputs, gradients)\n", "list(zip(outputs, gradients))[:1]\n")),
        Mistake("gradients of constants", "An output that depends on nothing trainable has no graph: leave such "
                "outputs out of torch.autograd.backward.",
                edit("isinstance(out, torch.Tensor) and out.requires_grad", "isinstance(out, torch.Tensor) and g is "
                "not None")),
        Mistake("ones for gradients", "You start backward from ones instead of the gradients that arrived.",
                edit("[g for _, g in pairs]", "[torch.ones_like(out) for out, _ in pairs]")),
        Mistake("too few gradients", "backward returns one value for each argument of forward after ctx: None for the "
                "function and for the anchor too.", edit("return None, None, *(", "return None, *(")),
    )


def _plainly(sentence: str) -> str:
    return sentence.replace("your answer['your answer']", "your answer")


class MixedLoss(Reference):
    exercise = "mixed_loss"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, dtype, tokens, scale=1.0, dim=32, vocabulary=40, zero_row=False):
            x = rng.randn(tokens, dim, scale=scale)
            if zero_row:
                x[0] = 0
            return Case(name, {"x": x.to(dtype), "gain": 1 + rng.randn(dim, scale=0.2),
                               "weight": rng.randn(vocabulary, dim, scale=2 / math.sqrt(dim)),
                               "targets": torch.tensor(rng.ints(tokens, 0, vocabulary - 1))}, part)

        yield case("float16", "fast product", torch.float16, rng.int(9, 16))
        yield case("bfloat16", "fast product", torch.bfloat16, rng.int(9, 16))
        yield case("one token", "fast product", torch.float16, 1)
        yield case("numbers beyond 256: their squares overflow float16", "safe sums", torch.float16, 8, scale=900.0)
        yield case("numbers below 0.0002: their squares vanish in float16", "safe sums", torch.float16, 8, scale=2e-2)
        yield case("a row of zeros", "safe sums", torch.float16, 5, zero_row=True)
        yield case("300 tokens", "safe sums", torch.float16, 300, vocabulary=rng.int(50, 60))

    def expected(self, inputs, variant):
        x, gain, weight = (inputs[name].double() for name in ("x", "gain", "weight"))
        normed = x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * gain
        logits = normed @ weight.T
        return {"loss": F.cross_entropy(logits, inputs["targets"]), "largest": logits.abs().max().item()}

    def verify(self, inputs, outputs, expected, variant):
        half = inputs["x"].dtype
        right, got = expected["loss"].item(), outputs["loss"].item()
        allowed = 2 * torch.finfo(half).eps * expected["largest"]
        if not abs(got - right) <= allowed:
            reason = ": something overflowed or divided by 0" if not math.isfinite(got) else ""
            return Finding(f"your loss is {got:.5g}, and {right:.5g} is right (allowed: {allowed:.2g}){reason}")
        if outputs["dtype"] != "float32":
            return Finding(f"your loss is in {outputs['dtype']}, and float32 is asked for")
        if outputs["products in"] != [str(half).removeprefix("torch.")]:
            told = " and ".join(outputs["products in"]) or "nothing: there was no matrix product"
            return Finding(f"your matrix product ran in {told}, and x is in {str(half).removeprefix('torch.')}: the "
                           "product is where half precision is fast")
        if outputs["in half precision"]:
            where = {"norm": "before the product, in the norm", "loss": "after the product, in the loss"}
            told = " and ".join(where[part] for part in outputs["in half precision"])
            return Finding(f"a sum, a power or an exponential was taken in half precision {told}: convert to float32 "
                           "first")
        return None

    def same_slip(self, outputs, wrong):
        return (compare(outputs["loss"], wrong["loss"], rough=True) is None
                and all(outputs[key] == wrong[key] for key in ("dtype", "products in", "in half precision")))

    mistakes = (
        Mistake("norm in half precision", "You take the norm in half precision: the square of 256 is beyond "
                "float16, and the square of 0.0001 is 0 there. Convert x to float32 first.",
                edit("wide = x.float()", "wide = x")),
        Mistake("loss in half precision", "You take the cross-entropy in half precision: its exponentials, their "
                "sum and the logarithm belong in float32. Convert the logits first.",
                edit("logits.float()", "logits")),
        Mistake("everything in half precision", "You take the norm and the loss in half precision: only the matrix "
                "product is safe there.", (edit("wide = x.float()", "wide = x"), edit("logits.float()", "logits"))),
        Mistake("product in float32", "Your matrix product runs in float32: right, and nothing is saved. Round both "
                "factors "
                "to the dtype of x.", (edit("normed.to(x.dtype)", "normed"), edit("weight.to(x.dtype)", "weight"))),
        Mistake("weight not converted", "One factor of the product is in half precision and the other in float32: "
                "autocast rounds both.", edit("weight.to(x.dtype)", "weight")),
        Mistake("no epsilon", "A row of zeros divides 0 by 0: add 1e-6 under the root.", edit(" + 1e-6", "")),
        Mistake("gain left out", "The gain is missing.", edit(" * gain", "")),
        Mistake("sum of the losses", "You return the sum of the losses, and their mean is asked for.",
                edit("F.cross_entropy(logits.float(), targets)",
                     'F.cross_entropy(logits.float(), targets, reduction="sum")')),
        Mistake("root left out", "You divide by the mean of the squares, and not by its root.",
                edit("torch.rsqrt(", "torch.reciprocal(")),
    )


class ScaledStep(Reference):
    exercise = "scaled_step"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        count, first_of_last = 18, 16  # numbers in all parameters, and before the last of them

        def case(name, part, steps, max_norm, scale=1024.0, groups=False, unused=None):
            return Case(name, {"start": rng.randn(count), "gradients": torch.stack(steps), "unused": unused,
                               "scale": scale, "max_norm": max_norm, "groups": groups}, part)

        def good(size=1.0):
            return rng.randn(count, scale=size)

        def bad(value=math.inf, first=0, last=count - 1):
            step = good()
            step[rng.int(first, last)] = value
            return step

        def goods(number):
            return [good() for _ in range(number)]

        interval = int(variant["growth_interval"])
        yield case("one step, nothing to clip", "unscale and clip", [good(0.1)], 100.0)
        yield case("one step, clipped", "unscale and clip", [good(2.0)], 1.0)
        yield case("small gradients, large scale: not clipped", "unscale and clip", [good(0.05), good(0.05)], 5.0,
                   scale=65536.0)
        yield case("clipped in several groups", "unscale and clip", [good(3.0), good(3.0)], 1.5, groups=True)
        yield case("a parameter without a gradient", "unscale and clip", [good()], 1.0, unused="bias")
        yield case("infinity", "overflow", [good(), bad()], 1.0)
        yield case("minus infinity in the last parameter", "overflow", [good(), bad(-math.inf, first_of_last), good()],
                   1.0)
        yield case("NaN in the first parameter", "overflow", [good(), bad(math.nan, 0, 11), good()], 50.0)
        yield case("infinity in the last of several groups", "overflow", [good(), bad(math.inf, first_of_last)], 1.0,
                   groups=True)
        yield case("two overflows in a row", "overflow", [bad(), bad(math.nan), good()], 1.0)
        yield case("good steps in a row", "scale", goods(2 * interval + 1), 1.0)
        yield case("an overflow between good steps", "scale", [*goods(2), bad(), *goods(interval + 1)], 1.0)
        yield case("an overflow just after the scale has grown", "scale", [*goods(interval), bad(), *goods(interval)],
                   1.0, scale=0.25)

    def expected(self, inputs, variant):
        weights, momentum = inputs["start"].double(), torch.zeros(18, dtype=torch.float64)
        scale, streak, interval = inputs["scale"], 0, int(variant["growth_interval"])
        stepped, scales, after = [], [], []
        for gradient in inputs["gradients"].double():
            used = torch.ones(18, dtype=torch.bool)
            used[12:16] = bool(after) or inputs["unused"] is None
            gradient = gradient * used
            fine = bool(gradient[used].isfinite().all())
            if fine:
                momentum = 0.9 * momentum + gradient * min(1.0, inputs["max_norm"] / (gradient.norm().item() + 1e-6))
                weights = weights - 0.5 * momentum
            streak = streak + 1 if fine else 0
            scale = scale if fine else scale / 2
            if streak == interval:
                scale, streak = 2 * scale, 0
            stepped.append(fine)
            scales.append(scale)
            after.append(weights)
        return {"parameters": torch.stack(after), "stepped": stepped, "scale": scales}

    def verify(self, inputs, outputs, expected, variant):
        for name, words in (("parameters", "the parameters after each step (row: step)"),
                            ("stepped", "what you return"), ("scale", "the scale after each step")):
            got, want = outputs[name], expected[name]
            found = compare(got, want, shifted(want, SLACK), torch.float32, path=words)
            if found:
                return found
        return None

    mistakes = (
        Mistake("clipped before unscaling", "You clip before unscaling: the norm is still multiplied by the scale, "
                "so that every gradient is cut to almost nothing. Unscale first.",
                (edit("    for p in parameters:\n        p.grad /= scaler.scale\n",
                      "    torch.nn.utils.clip_grad_norm_(parameters, max_norm)\n"
                      "    for p in parameters:\n        p.grad /= scaler.scale\n"),)),
        Mistake("not unscaled", "The gradients are still multiplied by the scale when the optimizer steps.",
                edit("        p.grad /= scaler.scale", "        pass")),
        Mistake("unscaled twice", "You divide by the scale twice.",
                edit("p.grad /= scaler.scale", "p.grad /= scaler.scale**2")),
        Mistake("not clipped", "The gradients are not clipped.",
                edit("    torch.nn.utils.clip_grad_norm_(parameters, max_norm)\n", "")),
        Mistake("clipped one by one", "You clip each parameter by its own norm: the norm is that of all gradients "
                "together.",
                edit("    torch.nn.utils.clip_grad_norm_(parameters, max_norm)\n",
                     "    for p in parameters:\n        torch.nn.utils.clip_grad_norm_([p], max_norm)\n")),
        Mistake("clipped by value", "You clip each number by itself, which turns the gradient: scale all of them by "
                "the same factor (clip_grad_norm_).",
                edit("clip_grad_norm_(parameters, max_norm)", "clip_grad_value_(parameters, max_norm)")),
        Mistake("not skipped", "After an overflow the optimizer must not step: infinity and NaN stay in the weights "
                "for good.",
                edit("        return False\n", "        optimizer.step()\n        return False\n")),
        Mistake("stepped with zeros", "You set what is not finite to 0 and step: momentum and the other numbers "
                "still move the weights. Skip the step.",
                (edit("        return False\n", "        for p in parameters:\n"
                      "            p.grad.nan_to_num_(0.0, 0.0, 0.0)\n"
                      "        torch.nn.utils.clip_grad_norm_(parameters, max_norm)\n"
                      "        optimizer.step()\n        return False\n"),)),
        Mistake("NaN not noticed", "You look for infinity and not for NaN: torch.isfinite sees both.",
                edit("not all(torch.isfinite(p.grad).all() for p in parameters)",
                     "any(torch.isinf(p.grad).any() for p in parameters)")),
        Mistake("infinity not noticed", "You look for NaN and not for infinity: torch.isfinite sees both.",
                edit("not all(torch.isfinite(p.grad).all() for p in parameters)",
                     "any(torch.isnan(p.grad).any() for p in parameters)")),
        Mistake("first parameter alone", "You look at the first parameter alone: an overflow may be in any.",
                edit("not all(torch.isfinite(p.grad).all() for p in parameters)",
                     "not torch.isfinite(parameters[0].grad).all()")),
        Mistake("first group alone", "You look at the first parameter group alone: an optimizer may have several.",
                edit("for group in optimizer.param_groups for p", "for group in optimizer.param_groups[:1] for p")),
        Mistake("scale not halved", "After an overflow the scale stays as it is, and the next step overflows again: "
                "halve it.",
                edit("        scaler.scale /= 2\n", "")),
        Mistake("count goes on", "The count of good steps goes on after an overflow: it counts steps in a row, so "
                "begin at 0.",
                edit("        scaler.scale /= 2\n        scaler.good_steps = 0\n", "        scaler.scale /= 2\n")),
        Mistake("count not begun anew", "After the scale has grown the count of good steps begins at 0 again.",
                edit("        scaler.scale *= 2\n        scaler.good_steps = 0\n", "        scaler.scale *= 2\n")),
        Mistake("grows one step late", "The scale grows one step late: it doubles in the last of the good steps "
                "itself.",
                edit("    scaler.good_steps += 1\n    if scaler.good_steps == 3:",
                     "    scaler.good_steps += 1\n    if scaler.good_steps > 3:")),
        Mistake("grows every step", "The scale grows after every good step: wait for the interval.",
                edit("scaler.good_steps == 3", "scaler.good_steps > 0")),
        Mistake("never grows", "The scale never grows: after the interval of good steps it doubles.",
                edit("        scaler.scale *= 2\n", "")),
    )


class CheckpointSegments(Reference):
    exercise = "checkpoint_segments"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        for count, part in ((1, "segments"), (4, "segments"), (9, "segments"), (2, "segments"), (3, "remainders"),
                            (rng.choice([7, 10]), "remainders"), (8, "remainders"), (14, "remainders")):
            yield Case(f"{count} layers", {"weights": [rng.randn(4, 4, scale=0.7) for _ in range(count)],
                                           "x": rng.randn(3, 4)}, part)

    def plain(self, inputs, variant, dtype=torch.float32):
        def through(layers, x):
            for layer in layers:
                x = layer(x)
            return x

        return run_stack(through, [w.to(dtype) for w in inputs["weights"]], inputs["x"].to(dtype))

    def expected(self, inputs, variant):
        told = self.plain(inputs, variant, torch.float64)
        count = len(inputs["weights"])
        segments = round(math.sqrt(count))
        sizes = [count // segments] * segments
        for i in range(count % segments):
            sizes[i if variant["remainder"] == "first" else -1 - i] += 1
        ends = [sum(sizes[: i + 1]) - 1 for i in range(segments)]
        return {**told, "runs": [2] * count, "held": ends}

    def verify(self, inputs, outputs, expected, variant):
        plain = self.plain(inputs, variant)
        found = near({"out": outputs["out"]}, {"out": expected["out"]}, plain={"out": plain["out"]})
        if found:
            return Finding(found.sentence.replace("your answer['out']", "your answer"), found.details)
        if outputs["held"] != expected["held"]:
            return Finding(f"after the forward pass the outputs of layers {outputs['held']} were held (counted from "
                           "0), and "
                           f"{expected['held']} are right, the last of each segment")
        if outputs["runs"] != expected["runs"]:
            return Finding(f"the layers ran {outputs['runs']} times, and twice each is right")
        found = near({"gradients": outputs["gradients"]}, {"gradients": expected["gradients"]},
                     plain={"gradients": plain["gradients"]})
        return found and Finding(found.sentence.replace("your answer['gradients']", "the gradients: "), found.details)

    mistakes = (
        Mistake("late binding", "Your function looks up its layers when it is run again, and by then the loop has "
                "moved on to the last segment: bind them at once, `def run(x, part=part)`.",
                edit("def run(x, part=part):", "def run(x):")),
        Mistake("every layer", "Every layer is a segment of its own: then all L inputs are kept. Make sqrt(L) "
                "segments.",
                edit("round(math.sqrt(len(layers)))", "len(layers)")),
        Mistake("one segment", "All layers are one segment: then the backward pass holds all of them at once. Make "
                "sqrt(L) segments.", edit("round(math.sqrt(len(layers)))", "1")),
        Mistake("root rounded down", "You round sqrt(L) down: round to the nearest.",
                edit("round(math.sqrt(len(layers)))", "int(math.sqrt(len(layers)))")),
        Mistake("remainder in one", "The segments differ by more than one layer: give one layer more to as many as "
                "remain.",
                edit("part = layers[first : first + size + (segment < longer)]",
                     "part = layers[first : first + size + longer * (segment == 0)]")),
        Mistake("remainder at the other end", "The longer segments stand at the wrong end: see "
                'effnlp_lab.variant("checkpoint_segments").',
                edit("(segment < longer)", "(segment >= count - longer)")),
        Mistake("remainder dropped", "The layers that remain are left out.", edit(" + (segment < longer)", "")),
        Mistake("not checkpointed", "The segments are called plainly, and autograd keeps every layer.",
                edit("x = checkpoint(run, x)", "x = run(x)")),
    )


class FactoredUpdate(Reference):
    exercise = "factored_update"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, *shape, first=False, scale=1.0, decay=None):
            gradient = rng.randn(*shape, scale=scale)
            row, column = rng.uniform(*shape[:-1]) * scale**2, rng.uniform(*shape[:-2], shape[-1]) * scale**2
            if first:
                row, column = torch.zeros_like(row), torch.zeros_like(column)
            decay = rng.float(0.5, 0.95) if decay is None else decay
            return Case(name, {"gradient": gradient, "row": row, "column": column, "decay": decay}, part)

        yield case("a matrix", "matrix", 4, 7)
        yield case("the first step", "matrix", 5, 3, first=True, decay=0.0)
        yield case("small gradients", "matrix", 6, 4, scale=1e-5)
        yield case("tiny gradients", "matrix", 5, 4, scale=1e-12)
        yield case("one row", "matrix", 1, 5)
        zeros = case("gradients of zero", "matrix", 3, 4, first=True, decay=0.5)
        zeros.inputs["gradient"].zero_()
        yield zeros
        yield case("a stack of matrices", "stacks", 3, 4, rng.int(5, 6))
        yield case("a stack of stacks", "stacks", 2, 3, 4, 2)

    def expected(self, inputs, variant):
        gradient, row, column = (inputs[name].double() for name in ("gradient", "row", "column"))
        keep = inputs["decay"]
        squared = gradient.square() + 1e-30
        row = keep * row + (1 - keep) * squared.mean(-1)
        column = keep * column + (1 - keep) * squared.mean(-2)
        share = row / row.mean(-1, keepdim=True)
        return row, column, gradient * share.rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)

    def verify(self, inputs, outputs, expected, variant):
        if not isinstance(outputs, (list, tuple)) or len(outputs) != 3:
            return Finding("three tensors are asked for: row, column and the update")
        for name, got, want in zip(("your row", "your column", "your update"), outputs, expected, strict=True):
            found = compare(got, want, shifted(want, 1e-4), torch.float32, path=name)
            if found:
                return found
        return None

    mistakes = (
        Mistake("rows and columns swapped", "Rows and columns are swapped: `row` has one number a row, the mean "
                "over its columns.", (edit("squared.mean(-1)", "squared.mean(-2)"),
                             edit("(1 - decay) * squared.mean(-2)\n    share",
                                  "(1 - decay) * squared.mean(-1)\n    share"))),
        Mistake("sums", "You keep sums, and means are asked for.",
                (edit("squared.mean(-1)", "squared.sum(-1)"), edit("squared.mean(-2)", "squared.sum(-2)"))),
        Mistake("not divided by the mean", "The product of row and column is divided by the mean of the rows: both "
                "hold the size of the gradients, and it would count twice.",
                edit("share = row / row.mean(-1, keepdim=True)", "share = row")),
        Mistake("multiplied first", "You multiply row and column before dividing by the mean: where both are near "
                "1e-30 the product is 0 in float32. Divide first.",
                (edit("share = row / row.mean(-1, keepdim=True)", "share = row"),
                 edit("share[..., :, None] * column[..., None, :]",
                      "share[..., :, None] * column[..., None, :] / row.mean(-1)[..., None, None]"))),
        Mistake("root left out", "You divide by the second moment, and not by its root.",
                edit("second.sqrt()", "second")),
        Mistake("decay inverted", "decay is the share of the old average that stays.",
                (edit("decay * row + (1 - decay)", "(1 - decay) * row + decay"),
                 edit("decay * column + (1 - decay)", "(1 - decay) * column + decay"))),
        Mistake("not averaged", "You leave out the old averages.",
                (edit("decay * row + (1 - decay) * ", ""), edit("decay * column + (1 - decay) * ", ""))),
        Mistake("not squared", "The averages are those of the squared gradient.",
                edit("gradient**2 + 1e-30", "gradient + 1e-30")),
        Mistake("mean over the whole stack", "Each matrix of a stack has a mean of its own.",
                edit("row.mean(-1, keepdim=True)", "row.mean()")),
        Mistake("no epsilon", "Where a gradient is 0 you divide 0 by 0: add 1e-30 to the squares.",
                edit("gradient**2 + 1e-30", "gradient**2")),
        Mistake("old averages used", "The update divides by the averages from before this step: bring them up to "
                "date first.",
                (edit("    row = decay * row", "    old_row, old_column = row, column\n    row = decay * row"),
                 edit("share = row / row.mean(-1, keepdim=True)", "share = old_row / old_row.mean(-1, keepdim=True)"),
                 edit("* column[..., None, :]", "* old_column[..., None, :]"))),
    )


class _Again(torch.autograd.Function):
    """A right `checkpoint` for what the solution uses of it: one tensor in, one tensor out."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        out.backward(gradient)
        return None, x.grad


def _checkpoint(function, *inputs):
    return _Again.apply(function, *inputs)


EARLIER = {"checkpoint": _checkpoint}
REFERENCES = {
    cls.exercise: cls()
    for cls in (TrainingMemory, LargestBatch, Accumulate, Checkpoint, MixedLoss, ScaledStep, CheckpointSegments,
                FactoredUpdate)
}
