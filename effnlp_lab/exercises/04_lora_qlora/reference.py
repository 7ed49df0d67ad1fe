"""Cases, right outputs and known mistakes of lab 04.

Right outputs of layers are worked out in float64 from the numbers that the layer was given. A quantizer is judged by
what it promises: the scales of the definition, and codes that stand for the nearest values; where two values are
equally near, either is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effnlp_lab.exercises.compare import Finding, compare, kind_of, leafwise
from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng, edit

from .drive import KINDS, weighed_sum

Inputs = Mapping[str, Any]
Variant = Mapping[str, str]
SLACK = {torch.float32: 2e-5, torch.float64: 1e-12}  # of the largest number, for sums of a few hundred terms
ROUNDINGS = 16  # of the sum of the terms' absolute values: what is left where large terms cancel


def near(outputs: Any, expected: Any, path: str, dtype: torch.dtype = torch.float32,
         terms: Any = None) -> Finding | None:  # fmt: skip
    """Compare with exact numbers, letting each tensor be off by `SLACK` of its largest number.

    terms: for numbers that are sums, the same sums of absolute values; where those cancel, `ROUNDINGS` of them count.
    """
    least = ROUNDINGS * torch.finfo(dtype).eps
    return compare(outputs, expected, shifted(expected, SLACK[dtype], terms, least), dtype, path=path)


def shifted(value: Any, slack: float, terms: Any = None, least: float = 0.0) -> Any:
    """`value` as a plain implementation would have it that is off by half of what is allowed."""
    def off_by(exact: Any, sums: Any) -> Any:
        if not isinstance(exact, Tensor) or not exact.is_floating_point() or not exact.numel():
            return exact
        off = slack * exact.abs().max()
        return exact + (off if sums is None else torch.maximum(off, least * sums.abs().max())) / 2

    return leafwise(off_by, value, terms)


def tensors_named(outputs: Any, names: tuple[str, ...]) -> Finding | None:
    """Whether the outputs are as many tensors as there are names."""
    if isinstance(outputs, (list, tuple)) and len(outputs) == len(names) and all(
        isinstance(x, Tensor) for x in outputs
    ):
        return None
    return Finding(f"return {len(names)} tensors, {', '.join(names)}, and not {kind_of(outputs)}")


def form_of(got: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Finding | None:
    """Shape and dtype of one output."""
    if tuple(got.shape) != tuple(shape):
        return Finding(f"{name} has shape {tuple(got.shape)}, and {tuple(shape)} is right")
    if got.dtype != dtype:
        return Finding(f"{name} has dtype {str(got.dtype)[6:]}, and {str(dtype)[6:]} is right")
    return None


class LoRALinear(Reference):
    exercise = "LoRALinear"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def layer(rows, inner, outer, r, alpha, bias=True, dtype=torch.float32):
            return {
                "weight": rng.randn(outer, inner, dtype=dtype, scale=0.5),
                "bias": rng.randn(outer, dtype=dtype) if bias else None,
                "x": rng.randn(*rows, inner, dtype=dtype), "r": r, "alpha": alpha,
            }

        def trained(rows, inner, outer, r, alpha, script, **more):
            inputs = layer(rows, inner, outer, r, alpha, **more)
            dtype = inputs["weight"].dtype
            return {**inputs, "a": rng.randn(r, inner, dtype=dtype), "b": rng.randn(outer, r, dtype=dtype),
                    "script": script}

        yield Case("a new layer", layer((5,), 64, 24, 16, 32.0), "start")
        yield Case("a new layer in float64, without a bias", layer((2, 3), 100, 31, 12, 6.0, False, torch.float64),
                   "start")
        alpha = float(rng.choice([10, 12, 24]))
        yield Case("a trained layer", trained((6,), 12, 9, 4, alpha, ["forward", "gradients"]), "forward")
        yield Case("alpha below r, no bias", trained((2, 3), 7, 10, 5, 2.0, ["forward", "gradients"], bias=False),
                   "forward")
        yield Case("rank 1, a single row", trained((1,), 8, 5, 1, 3.0, ["forward", "gradients"]), "forward")
        yield Case("one token, a wide layer", trained((1,), 96, 80, 4, 8.0, ["largest", "forward"]), "forward")
        yield Case("float64", trained((3,), 9, 8, 2, 5.0, ["forward"], dtype=torch.float64), "forward")
        for name, script in {
            "merged": "forward merge forward weight",
            "merged twice": "merge merge weight forward unmerge restored forward",
            "merged and unmerged": "merge unmerge restored forward",
            "unmerged too often": "unmerge restored merge unmerge unmerge restored forward",
            "disabled and enabled": "disable forward enable forward",
            "disabled while merged": "merge disable forward restored enable forward merge forward weight",
            "trained on between two merges": "merge unmerge train merge weight unmerge restored",
            "trained on while merged": "merge train unmerge restored forward",
        }.items():
            shape = ((4,), 11, 13, 3, float(rng.choice([5, 6, 8])))
            yield Case(name, trained(*shape, script.split()), "merge and disable")

    def expected(self, inputs, variant):
        if inputs.get("script") is None:
            return None
        return self._trace(inputs, variant)

    def _trace(self, inputs: Inputs, variant: Variant) -> list:
        weight, x, a, b = (inputs[name].double() for name in ("weight", "x", "a", "b"))
        bias = None if inputs["bias"] is None else inputs["bias"].double()
        scale = _scale(inputs, variant)
        merged = on = None
        seen: list[Any] = []
        for step in inputs["script"]:
            dense = weight if merged is None else weight + scale * merged @ a
            if step == "forward":
                own = merged is None and on is None
                seen.append(F.linear(x, dense, bias) + (scale * x @ a.T @ b.T if own else 0.0))
            elif step == "gradients":
                seen.append(_gradients(x, weight, bias, a, b, scale))
            elif step == "largest":
                seen.append(max(x.shape[:-1].numel() * max(weight.shape), a.numel(), b.numel()))
            elif step == "weight":
                seen.append(dense)
            elif step == "restored":
                seen.append(True)
            elif step == "train":
                b = -1.5 * b
            elif step == "merge":
                merged = b if merged is None else merged
            elif step == "unmerge":
                merged = None
            elif step == "disable":
                merged, on = None, False
            else:
                on = None
        return seen

    def verify(self, inputs, outputs, expected, variant):
        dtype = inputs["weight"].dtype
        if expected is None:
            return self._verify_start(inputs, outputs, variant)
        steps = [step for step in inputs["script"] if step in ("forward", "gradients", "largest", "weight", "restored")]
        done: list[str] = []
        seen = iter(zip(steps, outputs, expected, strict=True))
        for step in inputs["script"]:
            after = f" after {', '.join(done)}" if done else ""
            if step not in steps:
                done.append(step)
                continue
            _, got, want = next(seen)
            if step == "largest":
                if got >= inputs["weight"].numel():
                    return Finding(
                        f"for one token your forward makes a tensor of {got:,} numbers, as many as the weight has: "
                        "multiply x by a first, then by b, and never form B A",
                    )
            elif step == "restored":
                if got is not True:
                    return Finding(f"the base's weight{after} is not what it was before, bit for bit: adding and "
                                   "subtracting rounds twice, so keep a copy")
            else:
                path = {"forward": f"the output{after}", "gradients": "the gradients",
                        "weight": f"the base's weight{after}"}[step]
                terms = _terms(inputs, _scale(inputs, variant)) if step == "gradients" else None
                found = near(got, want, path, dtype, terms)
                if found:
                    return found
        return None

    def _verify_start(self, inputs: Inputs, outputs: Any, variant: Variant) -> Finding | None:
        weight, x, r = inputs["weight"], inputs["x"], inputs["r"]
        (outer, inner), dtype = weight.shape, weight.dtype
        missing = [name for name in ("a", "b") if name not in outputs["parameters"]]
        if missing:
            return Finding(f"your layer has no parameter {missing[0]!r}: assign an nn.Parameter to self.{missing[0]}",
                           {"parameters": sorted(outputs["parameters"])})
        a, b = outputs["parameters"]["a"], outputs["parameters"]["b"]
        found = form_of(a, (r, inner), dtype, "a") or form_of(b, (outer, r), dtype, "b")
        if found:
            return found
        if outputs["trained"] != ["a", "b"]:
            trained = ", ".join(outputs["trained"]) or "nothing"
            return Finding(f"{trained} is trained in a new layer, and a and b are right: freeze the base")
        if not a.any() and not b.any():
            return Finding("a and b are both zero: the gradient of each is a product with the other, and both vanish")
        bias = None if inputs["bias"] is None else inputs["bias"].double()
        found = near(outputs["output"], F.linear(x.double(), weight.double(), bias), "the output of a new layer", dtype)
        if found:
            return found
        if b.any():
            return Finding("b is zero in a new layer")
        if not a.any():
            return Finding("a is zero in a new layer, and it is to be random: nothing would ever reach b")
        bound = 1 / math.sqrt(inner)
        if a.abs().max() > bound * 1.0001:
            return Finding(f"a is drawn from a wider range than -{bound:.4g} to {bound:.4g}",
                           {"largest": a.abs().max().item()})
        spread = a.std().item() / (bound / math.sqrt(3))
        if not 0.85 < spread < 1.15 or abs(a.mean().item()) > 0.2 * bound:
            return Finding(f"a is not spread evenly from -{bound:.4g} to {bound:.4g}",
                           {"mean": a.mean().item(), "standard deviation": a.std().item()})
        gradients = _gradients(x.double(), weight.double(), bias, a.double(), b.double(), _scale(inputs, variant))
        for name in ("a", "b"):
            found = near(outputs["gradients"][name], gradients[name], f"the gradient of {name} at the start", dtype)
            if found:
                return found
        return None

    def same_slip(self, outputs, wrong):
        if isinstance(outputs, dict) and isinstance(wrong, dict):  # a new layer is random: compare what it shows of it
            return _alike(outputs, wrong)
        return super().same_slip(outputs, wrong)

    mistakes = (
        Mistake("both zero", "Both a and b start at zero, so both gradients vanish and nothing is ever learned: the "
                "gradient of a is a product with b, that of b a product with a. Draw a at random.",
                edit("nn.Parameter(base.weight.new_empty(r, base.in_features).uniform_(-bound, bound))",
                     "nn.Parameter(base.weight.new_zeros(r, base.in_features))")),
        Mistake("both random", "Both a and b are random, so that the update is not zero at the start and the model "
                "begins damaged: b starts at zero.",
                edit("base.weight.new_zeros(base.out_features, r)",
                     "base.weight.new_empty(base.out_features, r).uniform_(-bound, bound)")),
        Mistake("a zero, b random", "You start a at zero and b at random. That learns as well, but the specification "
                "is the paper's: a random, b zero.",
                (edit("nn.Parameter(base.weight.new_empty(r, base.in_features).uniform_(-bound, bound))",
                      "nn.Parameter(base.weight.new_zeros(r, base.in_features))"),
                 edit("base.weight.new_zeros(base.out_features, r)",
                      "base.weight.new_empty(base.out_features, r).uniform_(-bound, bound)"))),
        Mistake("a as from randn", "You draw a from a standard normal distribution, whatever the width of the layer: "
                "with in_features inputs that starts far too large. Use the range from -1/sqrt(in_features) to "
                "1/sqrt(in_features).",
                edit(".uniform_(-bound, bound)", ".normal_()")),
        Mistake("base not frozen", "The base's weight and bias are still trained: that is full fine-tuning with a "
                "low-rank update beside it. Freeze them.",
                edit("self.base = base.requires_grad_(False)", "self.base = base")),
        Mistake("alpha alone", "You scale by alpha, not by alpha divided as your variant says: the update would grow "
                "with r.", edit("alpha / r", "alpha")),
        Mistake("not scaled", "You leave out the scale: alpha has no effect.",
                edit("self.scaling = alpha / r", "self.scaling = 1.0")),
        Mistake("scale inverted", "Your scale is upside down: alpha goes above.",
                edit("alpha / r", "r / alpha")),
        Mistake("alpha / r^2", "You divide by r twice.", edit("alpha / r", "alpha / r**2")),
        Mistake("the other rule", "Your scale follows the other rule: see effnlp_lab.variant(\"LoRALinear\").",
                edit("alpha / r", "alpha / math.sqrt(r)")),
        Mistake("dense product", "You multiply B and A first. That is right, and costs as much as the layer itself, "
                "for each call: a [out, in] matrix that LoRA is there to avoid. Multiply x by a, then by b.",
                edit("self.scaling * (x @ self.a.T) @ self.b.T", "self.scaling * x @ (self.b @ self.a).T")),
        Mistake("base left out", "Your output is the update alone: it is added to what the base gives.",
                edit("out = out + self.scaling", "out = self.scaling")),
        Mistake("merged twice", "A second merge adds the update a second time: note that it is merged, and do "
                "nothing then.",
                (edit("        if self.kept is None:\n            self.kept = self.base.weight.clone()",
                      "        if True:\n            self.kept = self.base.weight.clone() if self.kept is None "
                      "else self.kept"),)),
        Mistake("merged and added", "After a merge the update is in the weight and your forward adds it once more.",
                edit("self.enabled and self.kept is None", "self.enabled")),
        Mistake("merged without the scale", "You merge B A without its scale.",
                edit("self.scaling * self.b @ self.a", "self.b @ self.a")),
        Mistake("merged in forward alone", "Your merge does not change the base's weight.",
                edit("            self.base.weight.add_(self.scaling * self.b @ self.a)\n", "")),
        Mistake("unmerged by subtraction", "You subtract the update again. W + D - D is not W in floating point, and "
                "wrong altogether if a or b were trained meanwhile: keep a copy of the weight.",
                edit("self.base.weight.copy_(self.kept)",
                     "self.base.weight.sub_(self.scaling * self.b @ self.a)")),
        Mistake("kept without a copy", "What you keep for unmerge is the weight itself, not a copy of it: it changes "
                "with the merge.", edit("self.base.weight.clone()", "self.base.weight.data")),
        Mistake("unmerge forgets", "After unmerge your layer still takes itself for merged, and leaves the update out.",
                edit("            self.kept = None\n", "            pass\n")),
        Mistake("unmerged unasked", "You unmerge a layer that is not merged: do nothing then.",
                edit("        if self.kept is not None:\n            self.base.weight.copy_(self.kept)",
                     "        if True:\n            self.base.weight.copy_(self.base.weight - self.scaling * self.b "
                     "@ self.a if self.kept is None else self.kept)")),
        Mistake("disabled while merged", "A merged layer that is disabled still has the update in its weight: take it "
                "out first.", edit("        self.unmerge()\n        self.enabled = False",
                                   "        self.enabled = False")),
        Mistake("not disabled", "disable has no effect on your forward.",
                edit("self.enabled and self.kept is None", "self.kept is None")),
    )


def _scale(inputs: Inputs, variant: Variant) -> float:
    return inputs["alpha"] / (inputs["r"] if variant["divisor"] == "r" else math.sqrt(inputs["r"]))


def _gradients(x, weight, bias, a, b, scale) -> dict[str, Tensor | None]:
    """Those of `weighed_sum` of the layer's output."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]
    x, a, b = leaves
    with torch.enable_grad():
        weighed_sum(F.linear(x, weight, bias) + scale * F.linear(F.linear(x, a), b)).backward()
    return {"x": x.grad, "a": a.grad, "b": b.grad, "base": None}


def _terms(inputs: Inputs, scale: float) -> dict[str, Tensor | None]:
    """The gradients of `_gradients` with every term positive: how large is what is added up."""
    x, weight, a, b = (inputs[name].double().abs() for name in ("x", "weight", "a", "b"))
    return _gradients(x, weight, None, a, b, scale)


def _alike(outputs: dict, wrong: dict) -> bool:
    """Whether two new layers, whose random numbers differ, show the same in all that is not random."""
    one, two = _marks(outputs), _marks(wrong)
    if len(one) != len(two):
        return False
    for (p, spread), (q, _) in zip(one, two, strict=True):
        close = isinstance(p, float) and isinstance(q, float) and math.isclose(p, q, rel_tol=0.25 if spread else 1e-3)
        if not close and p != q:
            return False
    return True


def _marks(outputs: dict) -> list[tuple[Any, bool]]:
    """What a new layer shows; with each whether it is a spread, which random numbers move a little."""
    marks: list[tuple[Any, bool]] = [(outputs["trained"], False), (bool(outputs["output"].any()), False),
                                     (outputs.get("scale"), False)]
    for name, value in sorted(outputs["parameters"].items()):
        gradient = outputs["gradients"][name]
        marks.append(((name, tuple(value.shape), value.dtype, bool(value.any())), False))
        marks.append((gradient is not None and bool(gradient.any()), False))
        marks.append((value.double().std().item() if value.numel() > 100 and value.any() else None, True))
    return marks


class Inject(Reference):
    exercise = "inject"
    BLOCK = {"attn.q_proj": "linear", "attn.k_proj": "linear", "attn.v_proj": "linear", "norm": "norm",
             "mlp.up_proj": "linear", "mlp.down_proj": "linear"}

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, modules, *targets):
            return Case(name, {"modules": modules, "targets": [list(t) for t in targets]}, part)

        def model(layers):
            blocks = {f"layers.{i}.{name}": kind for i in layers for name, kind in self.BLOCK.items()}
            return {"embed": "embedding", **blocks, "norm": "norm", "head": "linear"}

        some = rng.shuffled(["q_proj", "v_proj", "up_proj", "down_proj"])
        yield case("two kinds of layers", "names", model(range(2)), ["q_proj", "v_proj"])
        yield case("no such layer", "refused", model(range(2)), ["query"])
        yield case("in the model's order", "names", model(range(3)), some)
        yield case("more than the last part", "names", model(range(2)), ["mlp.up_proj"])
        yield case("the whole name of one layer", "names", model([1, 11]), ["layers.1.attn.q_proj"])
        yield case("1 and 11", "names", model([1, 11, 21]), ["1.attn.k_proj"])
        alike = {"attn.proj": "linear", "attn.q_proj": "linear", "attn.proj_out": "linear", "proj.gate": "linear",
                 "proj.norm": "norm"}
        yield case("names that hold other names", "names", alike, ["proj"])
        yield case("at the top of the model", "names", {"up": "linear", "block.up": "linear", "down": "linear"}, ["up"])
        yield case("two targets, one layer", "names", model(range(2)), ["k_proj", "attn.k_proj"])
        yield case("a kind of linear layer", "names", {"a.out": "projection", "b.out": "linear", "c.norm": "norm"},
                   ["out"])
        yield case("linear layers alone", "names", {"a.out": "embedding", "b.out": "linear", "c.out": "norm"}, ["out"])
        yield case("what is trained", "frozen", model(range(rng.int(1, 3))), ["down_proj"])
        yield case("two calls", "frozen", model(range(2)), ["q_proj"], ["up_proj", "head"])
        yield case("one of two is not there", "refused", model(range(2)), ["q_proj", "value"])
        yield case("no linear layer", "refused", model(range(1)), ["norm"])
        yield case("a part of a name", "refused", model(range(1)), ["proj"])
        yield case("a block, not a layer", "refused", model(range(2)), ["q_proj", "mlp"])

    def expected(self, inputs, variant):
        modules = inputs["modules"]
        linear = [name for name, kind in modules.items() if kind in ("linear", "projection")]
        linear = sorted(linear, key=_depth_first(modules).index)
        names, refused, wrapped = [], None, []
        for targets in inputs["targets"]:
            hits = {t: [n for n in linear if n == t or n.endswith(f".{t}")] for t in targets}
            if all(hits.values()):
                names.append([n for n in linear if any(n in found for found in hits.values())])
                wrapped += names[-1]
            else:
                refused = {"unchanged": True, "named": [t for t in targets if not hits[t]]}
        trained = [f"{n}.gain" for n in names[-1]] if names else []
        if refused:
            trained = [f"{n}.{leaf}" for n, kind in modules.items() for leaf in _leaves(kind)]
        in_order = [n for n in linear if n in wrapped]
        return {"names": names, "refused": refused, "made": sorted(wrapped), "wrapped": in_order,
                "kept": [n for n in modules if n not in wrapped], "inside": in_order, "trained": sorted(trained)}

    def verify(self, inputs, outputs, expected, variant):
        if expected["refused"]:
            wrong = expected["refused"]["named"]
            if outputs["refused"] is None:
                return Finding(f"no linear layer is named {wrong[0]!r}: raise a ValueError, or the slip in the name "
                               "is found after the training")
            if not outputs["refused"]["unchanged"]:
                return Finding("the model was changed before the error: look at all targets first, then replace")
            if wrong[0] not in outputs["refused"]["named"]:
                return Finding(f"the message of your ValueError does not name {wrong[0]!r}")
            return None
        if outputs["refused"]:
            return Finding("you raise a ValueError, and every target names a linear layer")
        if outputs["wrapped"] != expected["wrapped"]:
            return Finding(f"replaced are {_listed(outputs['wrapped'])}, and {_listed(expected['wrapped'])} is right")
        if outputs["made"] != expected["made"]:
            return Finding(f"make was called with {_listed(outputs['made'])}, and once with each of "
                           f"{_listed(expected['made'])} is right")
        if outputs["inside"] != expected["inside"]:
            return Finding("a new layer does not stand where the layer is that it was made from")
        if sorted(outputs["kept"]) != sorted(expected["kept"]):
            lost = [name for name in expected["kept"] if name not in outputs["kept"]]
            return Finding(f"{_listed(lost)} was exchanged as well")
        if outputs["trained"] != expected["trained"]:
            return Finding(f"trained are {_listed(outputs['trained'])}, and {_listed(expected['trained'])} is right: "
                           "freeze the model first, then make new layers")
        return compare(outputs["names"], expected["names"], path="what you return")

    mistakes = (
        Mistake("part of a name", "You look for the target anywhere in the name: 'proj' is not the name of q_proj. "
                "Compare whole parts, between the dots.",
                edit('f".{name}".endswith(f".{target}")', "target in name")),
        Mistake("ending without a dot", "You look at the end of the name, and 'proj' ends q_proj too: what comes "
                "before the target has to be a dot or nothing.",
                edit('f".{name}".endswith(f".{target}")', "name.endswith(target)")),
        Mistake("last part alone", "You compare the last part of the name: targets may have several, as in "
                "'mlp.up_proj'.", edit('f".{name}".endswith(f".{target}")', 'name.split(".")[-1] == target')),
        Mistake("not at the top", "A layer at the top of the model has no dot before its name, and you miss it.",
                edit('f".{name}".endswith(f".{target}")', 'name.endswith("." + target)')),
        Mistake("children alone", "You look at the model's own children: layers lie deeper. named_modules walks the "
                "whole tree.", edit("model.named_modules()", "model.named_children()")),
        Mistake("set on the model", "You set the new layer on the model under its dotted name: it belongs to the "
                "module that holds the old one.",
                edit("setattr(model.get_submodule(parent), leaf, make(linear[name]))",
                     "model._modules[name] = make(linear[name])")),
        Mistake("every kind of layer", "You replace whatever has the name: only linear layers can be adapted.",
                edit(" if isinstance(module, nn.Linear)", " if name")),
        Mistake("exact type", "type(module) is nn.Linear leaves out its subclasses: use isinstance.",
                edit("isinstance(module, nn.Linear)", "type(module) is nn.Linear")),
        Mistake("nothing frozen", "The model's own weights are still trained: freeze them.",
                edit("    model.requires_grad_(False)\n", "")),
        Mistake("frozen afterwards", "You freeze after making the new layers, and freeze those too: nothing would be "
                "trained.",
                (edit("    model.requires_grad_(False)\n", ""),
                 edit("    return chosen", "    model.requires_grad_(False)\n    return chosen"))),
        Mistake("only the replaced frozen", "You freeze the layers that you replace; embedding, norms and all other "
                "layers are still trained.",
                (edit("    model.requires_grad_(False)\n", ""),
                 edit("make(linear[name])", "make(linear[name].requires_grad_(False))"))),
        Mistake("silence", "A target that names no layer has to be an error: otherwise a misspelt name trains "
                "nothing, and you learn of it at the end.",
                edit("        if not hits:\n            raise ValueError(f\"no linear layer is named {target!r}\")\n",
                     "")),
        Mistake("refused when all are missing", "You refuse when no target at all is found: one of several may be "
                "misspelt.",
                (edit("        if not hits:\n            raise ValueError(f\"no linear layer is named {target!r}\")\n",
                      ""),
                 edit("    model.requires_grad_(False)\n",
                      "    if not found:\n        raise ValueError(f\"no linear layer is named {targets}\")\n"
                      "    model.requires_grad_(False)\n"))),
        Mistake("refused too late", "You raise the error when the model is changed already: look at all targets "
                "first.",
                (edit("    model.requires_grad_(False)\n", ""),
                 edit("    found = set()\n", "    found = set()\n    model.requires_grad_(False)\n"))),
        Mistake("in the order of the targets", "You return the names target by target: the model's order is asked for.",
                (edit("    found = set()\n", "    found = {}\n"), edit("found.update(hits)",
                                                                      "found.update(dict.fromkeys(hits))"),
                 edit("[name for name in linear if name in found]", "list(found)"))),
        Mistake("wrapped twice", "A layer that two targets name is made twice.",
                (edit("    found = set()\n", "    found = []\n"), edit("found.update(hits)", "found += hits"),
                 edit("for name in linear if name in found]", "for name in linear for _ in range(found.count(name))]"),
                 edit("make(linear[name])", "make(model.get_submodule(name))"))),
        Mistake("names not returned", "You change the model, and do not return the names.",
                edit("    return chosen", "    return []")),
    )


def _depth_first(modules: Mapping[str, str]) -> list[str]:
    """The names in the order in which a model that has them is walked: children in the order of their arrival."""
    tree: dict[str, Any] = {}
    for name in modules:
        node = tree
        for step in name.split("."):
            node = node.setdefault(step, {})

    def walk(node: dict[str, Any], prefix: str) -> Iterator[str]:
        for step, below in node.items():
            yield prefix + step
            yield from walk(below, f"{prefix}{step}.")

    return list(walk(tree, ""))


def _leaves(kind: str) -> list[str]:
    return [name for name, _ in KINDS[kind]().named_parameters()]


def _listed(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


class Bottleneck(Reference):
    exercise = "Bottleneck"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, rows, inner, outer, size, new=False, bias=True, dtype=torch.float32):
            shapes = {"down.weight": (size, outer), "down.bias": (size,), "up.weight": (outer, size),
                      "up.bias": (outer,)}
            trained = None if new else {name: rng.randn(*shape, dtype=dtype) for name, shape in shapes.items()}
            return Case(name, {
                "weight": rng.randn(outer, inner, dtype=dtype, scale=0.5),
                "bias": rng.randn(outer, dtype=dtype) if bias else None, "x": rng.randn(*rows, inner, dtype=dtype),
                "size": size, "trained": trained,
            }, part)

        yield case("a new adapter", "start", (9,), 10, 16, 12, new=True)
        yield case("a new adapter in float64", "start", (3, 4), 9, 12, 8, new=True, bias=False, dtype=torch.float64)
        yield case("a trained adapter", "forward", (6,), 7, 7, rng.int(3, 5))
        yield case("other sizes in and out", "forward", (2, 3), 9, 5, 4)
        yield case("one number between", "forward", (4,), 6, 8, 1, bias=False)
        yield case("a single row", "forward", (1,), 5, 5, 3)

    def expected(self, inputs, variant):
        if inputs["trained"] is None:
            return None
        x = inputs["x"].double().requires_grad_()
        with torch.enable_grad():
            h = self._base(inputs, x)
            p = {name: value.double() for name, value in inputs["trained"].items()}
            inner = F.linear(h, p["down.weight"], p["down.bias"])
            inner = inner.clamp(min=0) if variant["activation"] == "relu" else inner * torch.sigmoid(inner)
            out = h + F.linear(inner, p["up.weight"], p["up.bias"])
            weighed_sum(out).backward()
        return {"output": out.detach(), "gradient of x": x.grad}

    @staticmethod
    def _base(inputs: Inputs, x: Tensor) -> Tensor:
        bias = None if inputs["bias"] is None else inputs["bias"].double()
        return F.linear(x, inputs["weight"].double(), bias)

    def verify(self, inputs, outputs, expected, variant):
        dtype = inputs["weight"].dtype
        if expected is not None:
            for name in ("output", "gradient of x"):
                found = near(outputs[name], expected[name], f"the {name}", dtype)
                if found:
                    return found
            return None
        outer, size, found = inputs["weight"].shape[0], inputs["size"], outputs["parameters"]
        for name, shape in {"down.weight": (size, outer), "down.bias": (size,), "up.weight": (outer, size),
                            "up.bias": (outer,)}.items():
            if name not in found:
                return Finding(f"your adapter has no parameter {name}: down and up are nn.Linear, with their biases",
                               {"parameters": sorted(found)})
            wrong = form_of(found[name], shape, dtype, name)
            if wrong:
                return wrong
        if outputs["trained"] != ["down.bias", "down.weight", "up.bias", "up.weight"]:
            return Finding(f"trained are {_listed(outputs['trained'])}, and the four parameters of down and up are "
                           "right")
        wrong = near(outputs["output"], self._base(inputs, inputs["x"].double()), "the output of a new adapter", dtype)
        if wrong:
            return wrong
        if found["up.weight"].any() or found["up.bias"].any():
            return Finding("up is not zero in a new adapter")
        if not found["down.weight"].any():
            return Finding("down is zero in a new adapter as well: the gradient of each is a product with the other, "
                           "and both vanish")
        return None

    def same_slip(self, outputs, wrong):
        if "parameters" in outputs and "parameters" in wrong:
            return _alike(outputs, wrong)
        return super().same_slip(outputs, wrong)

    mistakes = (
        Mistake("no residual", "Your adapter replaces the layer's output: it is added to it.",
                edit("return h + self.up", "return self.up")),
        Mistake("up random", "up starts at random, so that the model begins damaged: zero its weight and its bias.",
                edit("        nn.init.zeros_(self.up.weight)\n        nn.init.zeros_(self.up.bias)\n", "")),
        Mistake("bias of up", "You zero the weight of up; its bias starts at random and shifts every output.",
                edit("        nn.init.zeros_(self.up.bias)\n", "")),
        Mistake("both zero", "down is zero too, so both gradients vanish: leave down as nn.Linear draws it.",
                edit("        nn.init.zeros_(self.up.bias)\n", "        nn.init.zeros_(self.up.bias)\n"
                     "        nn.init.zeros_(self.down.weight)\n")),
        Mistake("no activation", "Between down and up there is no activation: two linear maps in a row are one, and "
                "the adapter is a LoRA that cannot be merged.", edit("F.relu(self.down(h))", "self.down(h)")),
        Mistake("activation at the end", "The activation stands between down and up, not after up: there it would "
                "let an update only add.",
                edit("self.up(F.relu(self.down(h)))", "F.relu(self.up(self.down(h)))")),
        Mistake("on the layer's input", "Your adapter works on x, the layer's input: it takes the layer's output.",
                (edit("self.up(F.relu(self.down(h)))", "self.up(F.relu(self.down(x)))"),
                 edit("nn.Linear(base.out_features, size", "nn.Linear(base.in_features, size"))),
        Mistake("residual of the input", "You add the adapter's output to x: it is added to the layer's output.",
                edit("return h + self.up", "return x + self.up")),
        Mistake("float32 whatever the base", "Your adapter is in float32 whatever the base is in: give down and up "
                "the dtype and the device of base.weight.",
                edit('{"device": base.weight.device, "dtype": base.weight.dtype}', '{"device": base.weight.device}')),
        Mistake("no biases", "down and up have biases too.",
                (edit('"dtype": base.weight.dtype}', '"dtype": base.weight.dtype, "bias": False}'),
                 edit("        nn.init.zeros_(self.up.bias)\n", ""))),
    )


class AffineInt8(Reference):
    exercise = "affine_int8"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, x, block=None):
            return Case(name, {"x": x, "block": block or x.numel()}, part)

        yield case("below and above zero", "one block", rng.randn(8, 9) + 0.3)
        yield case("all positive", "one block", rng.uniform(50) + rng.float(1, 3))
        yield case("all negative", "one block", -rng.uniform(40) - rng.float(2, 4))
        yield case("after a ReLU", "one block", rng.randn(5, 4, 6).clamp(min=0))
        yield case("one number", "one block", torch.tensor([rng.float(0.5, 2)]))
        yield case("zeros", "one block", torch.zeros(6))
        yield case("small numbers", "one block", rng.randn(30, scale=1e-6))
        steps = torch.tensor([-1.5, 0.0, 1.0, 2.5, 253.5])  # scale 1: both ends lie between two codes
        yield case("ends between two codes", "one block", steps)
        low = torch.tensor([-0.50000006, 0.0, 3.25, 254.5])  # one rounding up, one down: a code below the first
        yield case("ends between two codes, the other way", "one block", low)
        lopsided = torch.cat([torch.tensor([-0.37, 254.63]), rng.uniform(20) * 200])
        yield case("an end near a code", "one block", lopsided)
        yield case("blocks of 8", "blocks", rng.randn(6, 8) * torch.tensor([1, 10, 0.1, 100, 3, 1])[:, None], 8)
        uneven = torch.cat([rng.uniform(16) + 1, -rng.uniform(16), rng.randn(16) * 9, rng.uniform(rng.int(3, 9)) + 5])
        yield case("a short last block", "blocks", uneven, 16)
        yield case("blocks across rows", "blocks", rng.randn(7, 5) * torch.linspace(1, 50, 7)[:, None], 4)
        yield case("columns of a larger tensor", "blocks", (rng.randn(6, 20) * torch.linspace(1, 9, 20))[:, ::2], 6)
        yield case("a block of zeros", "blocks", torch.cat([rng.randn(4), torch.zeros(4), rng.randn(4) + 3]), 4)
        yield case("a block longer than the tensor", "blocks", rng.randn(3, 4), 20)

    def expected(self, inputs, variant):
        first, last = (-128, 127) if variant["codes"] == "int8" else (0, 255)
        flat = inputs["x"].double().flatten()
        codes, scales, zeros = [], [], []
        for block in flat.split(inputs["block"]):
            low, high = min(block.min().item(), 0.0), max(block.max().item(), 0.0)
            scales.append((high - low) / 255 or 1.0)
            zeros.append(round(first - low / scales[-1]))
            codes.append((torch.round(block / scales[-1]) + zeros[-1]).clamp(first, last))
        dtype = torch.int8 if first else torch.uint8
        return (torch.cat(codes).to(dtype).view(inputs["x"].shape), torch.tensor(scales, dtype=torch.float64),
                torch.tensor(zeros))

    def verify(self, inputs, outputs, expected, variant):
        names = ("codes", "scales", "zero points")
        found = tensors_named(outputs, names)
        if found:
            return found
        codes, scales, zeros = outputs
        right_codes, right_scales, right_zeros = expected
        found = form_of(scales, right_scales.shape, torch.float32, "scales")
        if found:
            return found
        if tuple(zeros.shape) != tuple(right_zeros.shape):
            return Finding(f"zero points has shape {tuple(zeros.shape)}, and {tuple(right_zeros.shape)} is right")
        if zeros.is_floating_point() or zeros.dtype == torch.bool:
            return Finding(f"zero points has dtype {str(zeros.dtype)[6:]}: a code is a whole number; round it")
        if codes.dtype != right_codes.dtype:
            other = " (see effnlp_lab.variant(\"affine_int8\"))" if codes.dtype in (torch.int8, torch.uint8) else ""
            return Finding(f"codes has dtype {str(codes.dtype)[6:]}, and {str(right_codes.dtype)[6:]} is right{other}")
        found = form_of(codes, right_codes.shape, right_codes.dtype, "codes")
        if found:
            return found
        wrong = (scales.double() / right_scales - 1).abs().nan_to_num(math.inf)
        if wrong.max() > 2e-6:
            at = int(wrong.argmax())
            return Finding(f"the scale of block {at} is {scales[at].item():.6g}, and {right_scales[at].item():.6g} is "
                           "right")
        first, last = (-128, 127) if right_codes.dtype == torch.int8 else (0, 255)
        zeros = zeros.long()
        if zeros.min() < first or zeros.max() > last:
            return Finding(f"a zero point is {int(zeros[(zeros < first) | (zeros > last)][0])}, and codes go from "
                           f"{first} to {last}: zero has no code")
        blocks = list(inputs["x"].double().flatten().split(inputs["block"]))
        given = list(codes.flatten().split(inputs["block"]))
        for i, (block, own) in enumerate(zip(blocks, given, strict=True)):
            scale, zero = right_scales[i].item(), int(zeros[i])
            exact = first - min(block.min().item(), 0.0) / scale
            if abs(zero - exact) > 0.501:
                return Finding(f"the zero point of block {i} is {zero}, and {right_zeros[i].item()} is right: the "
                               "lowest number of the range gets the lowest code")
            wrong = (scale * (own.double() - zero) - block).abs() / scale
            if (own[block == 0] != zero).any():
                return Finding(f"zero in block {i} has another code than the zero point: it does not stay exact")
            if wrong.max() > 0.502:
                at = int(wrong.argmax())
                back = scale * (own[at].item() - zero)
                return Finding(f"number {at} of block {i} is {block[at].item():.6g}, and its code {own[at].item()} "
                               f"stands for {back:.6g}: off by {wrong[at].item():.2f} of a step, where half a step "
                               "is the most that rounding does")
        return None

    mistakes = (
        Mistake("range without 0", "Your range runs from the smallest number to the largest. Where all are on one "
                "side of zero, zero is off the grid: let the range hold 0, low = min(0, smallest), high = max(0, "
                "largest).", (edit(".clamp(max=0)", ""), edit(".clamp(min=0)", ""))),
        Mistake("symmetric range", "Your range is symmetric about zero, from -absmax to absmax: where the numbers are "
                "not, codes are wasted. Take the range that the numbers have.",
                (edit("low = blocks.amin(1).clamp(max=0)", "low = -blocks.abs().amax(1)"),
                 edit("high = blocks.amax(1).clamp(min=0)", "high = blocks.abs().amax(1)"))),
        Mistake("[-127, 127]", "You use the codes from -127 to 127. Those are 255 values and not 256, as the slide "
                "has it: int8 begins at -128, and 256 values have 255 steps between them.",
                (edit("scales = (high - low) / 255", "scales = (high - low) / 254"),
                 edit("torch.round(-128 - low / scales)", "torch.round(-127 - low / scales)"),
                 edit("codes.clamp(-128, 127)", "codes.clamp(-127, 127)"))),
        Mistake("256 steps", "256 values have 255 steps between them.",
                edit("scales = (high - low) / 255", "scales = (high - low) / 256")),
        Mistake("zero point not rounded", "You round once, at the end: zero then lies between two codes for most "
                "blocks. Round the zero point by itself, and x / scale by itself.",
                (edit("torch.round(-128 - low / scales)", "-128 - low / scales"),
                 edit("torch.round(blocks / scales[:, None]) + zeros[:, None]",
                      "torch.round(blocks / scales[:, None] + zeros[:, None])"),
                 edit("zeros.to(torch.int32)", "zeros.round().to(torch.int32)"))),
        Mistake("zero point left real", "Your zero point is no whole number: it is the code of zero.",
                edit("zeros.to(torch.int32)", "zeros")),
        Mistake("truncated", "You cut off the fraction instead of rounding: .to(torch.int8) rounds towards zero, and "
                "the error is twice as large.",
                edit("torch.round(blocks / scales[:, None])", "torch.trunc(blocks / scales[:, None])")),
        Mistake("zero point truncated", "You cut off the fraction of the zero point: round it.",
                edit("torch.round(-128 - low / scales)", "torch.trunc(-128 - low / scales)")),
        Mistake("not clamped", "A code beyond the last one wraps around to the other end: clamp before you convert.",
                edit("codes = codes.clamp(-128, 127).flatten()", "codes = codes.to(torch.int32).flatten()")),
        Mistake("zero point left out", "You leave out the zero point: x / scale alone has numbers below -128 or above "
                "127 wherever the range is not symmetric.", edit(" + zeros[:, None]", "")),
        Mistake("zero point subtracted", "The zero point is added to the codes; it is subtracted when they are turned "
                "back.", edit(" + zeros[:, None]", " - zeros[:, None]")),
        Mistake("codes from 0", "Your codes start at 0 and wrap around in int8: the lowest number gets -128. (Or see "
                "your variant.)", (edit("torch.round(-128 - low / scales)", "torch.round(-low / scales)"),
                                   edit("codes.clamp(-128, 127)", "codes.clamp(0, 255)"))),
        Mistake("one range for the tensor", "You take one range for the whole tensor: each block has its own, so that "
                "a large number spoils its own block alone.",
                (edit("low = blocks.amin(1)", "low = blocks.amin().expand(len(blocks))"),
                 edit("high = blocks.amax(1)", "high = blocks.amax().expand(len(blocks))"))),
        Mistake("blocks the other way", "Your blocks are not neighbours in memory: view(-1, block), not view(block, "
                "-1).", (edit(".view(-1, block)", ".view(block, -1).T"),
                         edit("codes.clamp(-128, 127).flatten()", "codes.clamp(-128, 127).T.flatten()"))),
        Mistake("division by zero", "In a block of zeros you divide by a scale of 0: give it the scale 1.",
                edit("    scales[scales == 0] = 1\n", "")),
    )


class NF4(Reference):
    exercise = "NF4"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        table = torch.tensor(nf4_table(), dtype=torch.float32)
        even = torch.linspace(-1, 1, 16)
        few = torch.tensor([-1.0, -0.4, 0.0, 0.1, 1.0])

        def quantize(name, x, levels=table, block=8):
            return Case(name, {"what": "quantize", "x": x, "levels": levels, "block": block}, "blocks")

        def dequantize(name, count, block, levels=table):
            codes = torch.tensor(rng.ints(count, 0, len(levels) - 1), dtype=torch.uint8)
            absmax = rng.uniform(-(-count // block)) * 3 + 0.1
            return Case(name, {"what": "dequantize", "codes": codes, "absmax": absmax, "levels": levels,
                               "block": block}, "blocks")

        yield Case("the sixteen levels", {"what": "levels", "like": torch.zeros(1)}, "levels")
        yield quantize("one block", rng.randn(8))
        yield quantize("blocks of their own size", rng.randn(5, 16) * torch.tensor([1, 0.01, 10, 3, 100.0])[:, None],
                       block=16)
        yield quantize("the largest is negative", torch.tensor([0.5, -4.0, 1.0, 2.9, 0.0, -0.3, 1.1, 3.2]))
        yield quantize("a short last block", rng.randn(3, 9), block=8)
        yield quantize("a block of zeros", torch.cat([rng.randn(8), torch.zeros(8), rng.randn(8)]))
        yield quantize("blocks across rows", rng.randn(6, 5) * torch.linspace(1, 40, 6)[:, None], block=4)
        yield quantize("columns of a larger tensor", (rng.randn(8, 12) * torch.linspace(1, 9, 12))[:, ::2], block=8)
        yield quantize("evenly spaced levels", rng.randn(4, 8), levels=even)
        yield quantize("five levels", rng.randn(40), levels=few, block=10)
        yield quantize("one number a block", rng.randn(5), block=1)
        yield dequantize("codes and scales", 24, 8)
        yield dequantize("codes and scales of a short block", 8 * rng.int(1, 3) + rng.int(1, 7), 8)
        yield dequantize("five levels again", 15, 5, few)

    def expected(self, inputs, variant):
        if inputs["what"] == "levels":
            return torch.tensor(nf4_table(), dtype=torch.float64)
        levels, block = inputs["levels"].double(), inputs["block"]
        if inputs["what"] == "dequantize":
            parts = zip(inputs["codes"].split(block), inputs["absmax"].double(), strict=True)
            return torch.cat([levels[codes.long()] * scale for codes, scale in parts])
        blocks = inputs["x"].double().flatten().split(block)
        absmax = torch.stack([part.abs().max() for part in blocks])
        codes = [
            ((part / (scale if scale > 0 else 1.0))[:, None] - levels).abs().argmin(1)
            for part, scale in zip(blocks, absmax, strict=True)
        ]
        return torch.cat(codes).to(torch.uint8), absmax

    def verify(self, inputs, outputs, expected, variant):
        if inputs["what"] == "levels":
            return self._verify_levels(outputs, expected)
        if inputs["what"] == "dequantize":
            return compare(outputs, expected, None, torch.float32, path="the numbers")
        found = tensors_named(outputs, ("codes", "absmax"))
        if found:
            return found
        codes, absmax = outputs
        right, scales = expected
        found = form_of(absmax, scales.shape, torch.float32, "absmax") or compare(
            absmax, scales, None, torch.float32, path="absmax"
        ) or form_of(codes, right.shape, torch.uint8, "codes")
        if found:
            return found
        levels, block = inputs["levels"].double(), inputs["block"]
        if int(codes.max()) >= len(levels):
            return Finding(f"a code is {int(codes.max())}, and there are {len(levels)} levels, numbered from 0")
        each = scales.where(scales > 0, 1.0).repeat_interleave(block)[: len(codes)]
        scaled = inputs["x"].double().flatten() / each
        excess = (scaled - levels[codes.long()]).abs() - (scaled - levels[right.long()]).abs()
        if excess.max() > 1e-5:
            at = int(excess.argmax())
            return Finding(
                f"number {at} is {scaled[at].item():.4f} of its block's absmax, and its code {int(codes[at])} stands "
                f"for {levels[int(codes[at])].item():.4f}: {levels[int(right[at])].item():.4f}, code "
                f"{int(right[at])}, is nearer"
            )
        return None

    @staticmethod
    def _verify_levels(outputs: Any, expected: Tensor) -> Finding | None:
        if not isinstance(outputs, Tensor):
            return Finding(f"levels is {kind_of(outputs)}, and a tensor of 16 numbers is right")
        found = form_of(outputs, (16,), torch.float32, "levels")
        if found:
            return found
        if not torch.isfinite(outputs).all():
            return Finding("levels holds infinity or NaN: the quantile of 1 is infinite, begin a little below")
        if (outputs.diff() <= 0).any():
            return Finding("levels do not ascend from the first to the last")
        if not (outputs == 0).any():
            return Finding("no level is 0: a weight that is zero would not stay zero")
        wrong = (outputs.double() - expected).abs()
        if wrong.max() > 2e-6:
            at = int(wrong.argmax())
            return Finding(f"level {at} is {outputs[at].item():.7f}, and {expected[at].item():.7f} is right")
        return None

    mistakes = (
        Mistake("evenly spaced", "Your levels are evenly spaced, as a slide has them. NF4's are quantiles of the "
                "normal distribution, dense near zero where most weights are, with an exact zero.",
                edit("return levels / positive[0]", "return torch.linspace(-1, 1, 16)")),
        Mistake("sixteen symmetric quantiles", "Sixteen quantiles that are symmetric about zero have no zero among "
                "them: cut the positive side in eight and the negative in seven, and add the zero.",
                edit("levels = torch.cat([negative, torch.zeros(1), positive.flip(0)])",
                     "levels = torch.cat([-positive, positive.flip(0)])")),
        Mistake("eight negative", "You have eight negative levels and seven positive ones: it is the other way round.",
                (edit("positive = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9)[:8])",
                      "positive = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8)[:7])"),
                 edit("negative = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8)[:7])",
                      "negative = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9)[:8])"))),
        Mistake("quantiles as they are", "Your levels go beyond 1: divide them by the largest, so that they run from "
                "-1 to 1, as the numbers of a block do.",
                edit("return levels / positive[0]", "return levels")),
        Mistake("from probability 1", "The quantile of 1 is infinite: the outermost probability is OUTERMOST.",
                edit("positive = torch.special.ndtri(torch.linspace(OUTERMOST",
                     "positive = torch.special.ndtri(torch.linspace(1.0")),
        Mistake("probabilities as levels", "Your levels are the probabilities: the levels are the quantiles there.",
                (edit("positive = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 9)[:8])",
                      "positive = torch.linspace(OUTERMOST, 0.5, 9)[:8] - 0.5"),
                 edit("negative = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, 8)[:7])",
                      "negative = 0.5 - torch.linspace(OUTERMOST, 0.5, 8)[:7]"))),
        Mistake("descending", "Your levels descend: code 0 is the lowest.",
                edit("return levels / positive[0]", "return (levels / positive[0]).flip(0)")),
        Mistake("one absmax for the tensor", "You take one absmax for the whole tensor: each block has its own, so "
                "that a large weight spoils its own block alone.",
                edit("absmax = blocks.abs().amax(1)", "absmax = blocks.abs().amax().expand(len(blocks)).clone()")),
        Mistake("maximum without the sign", "You divide by the largest number, and the largest magnitude may be that "
                "of a negative one: take the absolute value first.",
                edit("blocks.abs().amax(1)", "blocks.amax(1)")),
        Mistake("division by zero", "In a block of zeros you divide 0 by 0: its codes are those of the level 0.",
                edit("torch.nan_to_num(blocks / absmax[:, None])", "blocks / absmax[:, None]")),
        Mistake("as integers", "You round to integers from -8 to 7: the code is the number of the nearest level.",
                edit("torch.bucketize(scaled, middles)", "torch.round(scaled * 7 + 8).clamp(0, 15)")),
        Mistake("next level below", "You take the next level below, and the nearest is asked for: the border between "
                "two codes is the middle of their levels.",
                edit("middles = (levels[1:] + levels[:-1]) / 2", "middles = levels[1:].clone()")),
        Mistake("next level above", "You take the next level above, and the nearest is asked for: the border between "
                "two codes is the middle of their levels.",
                edit("middles = (levels[1:] + levels[:-1]) / 2", "middles = levels[:-1].clone()")),
        Mistake("blocks the other way", "Your blocks are not neighbours in memory: view(-1, block), not view(block, "
                "-1).", (edit(".view(-1, block)", ".view(block, -1).T"),
                         edit("codes.flatten()[: len(flat)]", "codes.T.flatten()[: len(flat)]"))),
        Mistake("not scaled back", "You give the levels as they are: multiply by the absmax of the block.",
                edit(" * absmax.repeat_interleave(block)[: len(codes)]", "")),
        Mistake("scales in turn", "The scales repeat as a whole, and each belongs to `block` neighbours: "
                "repeat_interleave, not repeat.",
                edit("absmax.repeat_interleave(block)", "absmax.repeat(block)")),
    )


def nf4_table() -> list[float]:
    """The definition (Dettmers et al. 2023, appendix E), in Python's own numbers."""
    quantile, outermost = NormalDist().inv_cdf, 0.9677083
    largest = quantile(outermost)
    positive = [quantile(outermost + (0.5 - outermost) * i / 8) / largest for i in range(8)]
    negative = [-quantile(outermost + (0.5 - outermost) * i / 7) / largest for i in range(7)]
    return sorted([*negative, 0.0, *positive])


class DoubleQuantize(Reference):
    exercise = "double_quantize"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, absmax, group=None):
            return Case(name, {"absmax": absmax, "group": group or len(absmax)}, part)

        yield case("one group", "one group", rng.uniform(32) + 0.5)
        yield case("close together", "one group", rng.uniform(20) * 0.2 + 2)
        yield case("one large", "one group", torch.cat([rng.uniform(15), torch.tensor([rng.float(6, 9)])]))
        yield case("one small", "one group", torch.cat([rng.uniform(15) * 0.3 + 5, torch.tensor([0.5])]))
        yield case("a single block", "one group", torch.tensor([1.5]))
        yield case("all alike", "one group", torch.full((8,), 0.75))
        spread = torch.tensor([0.1, 1, 0.5, 2, 0.2])[:, None]
        yield case("groups of 8", "groups", (rng.randn(5, 8) * spread + 9).flatten(), 8)
        yield case("groups about other means", "groups",
                   torch.cat([rng.uniform(16) + 1, rng.uniform(16) + 4, rng.uniform(16) * 2 + 7]), 16)
        yield case("a short last group", "groups", torch.cat([rng.uniform(16) * 3, rng.uniform(rng.int(2, 7)) + 2]), 8)
        even = torch.tensor([1.0, 3.0] * 4)
        yield case("a group that is the mean throughout", "groups", torch.cat([even, torch.full((8,), 2.0), even]), 8)
        yield case("a group longer than what there is", "groups", rng.uniform(10) + 1, 64)

    def expected(self, inputs, variant):
        absmax = inputs["absmax"].double()
        rest = absmax - absmax.mean()
        groups = rest.split(inputs["group"])
        magnitudes = torch.stack([part.abs().max() for part in groups])
        codes = [torch.round(part / (m if m > 0 else 1.0) * 127) for part, m in zip(groups, magnitudes, strict=True)]
        return torch.cat(codes).to(torch.int8), magnitudes, absmax.mean()

    def verify(self, inputs, outputs, expected, variant):
        nan, outputs = outputs["NaN became a number"], outputs["told"]
        found = tensors_named(outputs, ("codes", "magnitudes", "mean"))
        if found:
            return found
        codes, magnitudes, mean = outputs
        right_codes, right_magnitudes, right_mean = expected
        slack = 1e-6 * inputs["absmax"].abs().max().item()
        found = (
            form_of(mean, (), torch.float32, "mean")
            or form_of(magnitudes, right_magnitudes.shape, torch.float32, "magnitudes")
            or form_of(codes, right_codes.shape, torch.int8, "codes")
        )
        if found:
            return found
        if not abs(mean.item() - right_mean.item()) <= slack:
            return Finding(f"the mean is {mean.item():.6g}, and {right_mean.item():.6g} is right")
        wrong = (magnitudes.double() - right_magnitudes).abs()
        if not (wrong <= 2 * slack).all():
            at = int(wrong.nan_to_num(math.inf).argmax())
            return Finding(f"the magnitude of group {at} is {magnitudes[at].item():.6g}, and "
                           f"{right_magnitudes[at].item():.6g} is right: the largest distance from the mean in that "
                           "group")
        each = right_magnitudes.repeat_interleave(inputs["group"])[: len(codes)]
        back = codes.double() / 127 * each + right_mean
        wrong = (back - inputs["absmax"]).abs()
        allowed = 0.5 / 127 * each * 1.002 + 3 * slack
        if (wrong > allowed).any():
            at = int((wrong - allowed).argmax())
            return Finding(f"number {at} is {inputs['absmax'][at].item():.6g}, and its code {int(codes[at])} stands "
                           f"for {back[at].item():.6g}: the code {int(right_codes[at])} is nearer")
        if codes[each == 0].any():
            return Finding("a group without any distance from the mean has the codes 0")
        if nan:
            return Finding("you convert NaN to a whole number, and what that gives depends on the machine: look for "
                           "0/0")
        return None

    mistakes = (
        Mistake("not centred", "You do not take the mean away first. Absmax values are positive and close together: "
                "half of the signed codes would never be used.",
                (edit("mean = absmax.mean()", "mean = absmax.new_zeros(())"),)),
        Mistake("mean told, not taken away", "You return the mean and do not take it away before you quantize.",
                edit("rest = absmax - mean", "rest = absmax")),
        Mistake("a mean for each group", "You take a mean for each group: one mean for all is asked for, the groups "
                "have their magnitudes.",
                edit("rest = absmax - mean",
                     "rest = torch.cat([part - part.mean() for part in absmax.split(group)])")),
        Mistake("median", "You take the median away, and the mean is asked for.",
                edit("mean = absmax.mean()", "mean = absmax.median()")),
        Mistake("one magnitude", "You take one magnitude for all groups: each has its own.",
                edit("magnitudes = groups.abs().amax(1)", "magnitudes = groups.abs().amax().expand(len(groups))")),
        Mistake("maximum without the sign", "The largest distance from the mean may be below it: take the absolute "
                "value first.", edit("groups.abs().amax(1)", "groups.amax(1)")),
        Mistake("128", "You multiply by 128, and +128 is no int8: it wraps around to -128. Symmetric codes go from "
                "-127 to 127.", edit("127 * scaled", "128 * scaled")),
        Mistake("truncated", "You cut off the fraction instead of rounding: .to(torch.int8) rounds towards zero.",
                edit("torch.round(127 * scaled)", "(127 * scaled)")),
        Mistake("division by zero", "A group that lies on the mean has the magnitude 0, and 0/0 is NaN: its codes "
                "are 0.", edit("torch.nan_to_num(groups / magnitudes[:, None])", "groups / magnitudes[:, None]")),
        Mistake("padding before the mean", "You pad before you take the mean away: the padding becomes a number far "
                "from the mean, and spoils the last group.",
                (edit("    rest = absmax - mean\n", "    rest = absmax\n"),
                 edit("-len(rest) % group)).view(-1, group)", "-len(rest) % group)).view(-1, group) - mean"))),
        Mistake("a step as magnitude", "You return the step, magnitude / 127: the magnitude itself is asked for.",
                edit("torch.int8), magnitudes, mean", "torch.int8), magnitudes / 127, mean")),
        Mistake("groups the other way", "Your groups are not neighbours: view(-1, group), not view(group, -1).",
                (edit(".view(-1, group)", ".view(group, -1).T"),
                 edit("torch.round(127 * scaled).flatten()", "torch.round(127 * scaled).T.flatten()"))),
    )


class QLoRALinear(Reference):
    exercise = "qlora_linear"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, rows, inner, outer, r, learns=("x", "a", "b"), scaling=None):
            return Case(name, {
                "weight": rng.randn(outer, inner), "x": rng.randn(*rows, inner), "a": rng.randn(r, inner),
                "b": rng.randn(outer, r), "scaling": scaling or rng.float(0.3, 0.8), "learns": list(learns),
            }, part)

        yield case("a few rows", "forward", (5,), 6, 7, 2, scaling=2.5)
        yield case("batch and length", "forward", (2, 3), 8, 5, 3)
        yield case("batch and length, backward", "backward", (2, 4), 5, 6, 2, scaling=0.25)
        yield case("square", "backward", (6,), 6, 6, 2, scaling=3.0)
        yield case("the first layer: x learns nothing", "backward", (4,), 5, 7, 3, learns=("a", "b"))
        yield case("one row", "backward", (1,), 4, 3, 1)
        yield case("nothing dense is kept", "memory", (3,), 40, 30, 2)

    def expected(self, inputs, variant):
        x, a, b = (inputs[n].double().requires_grad_(n in inputs["learns"]) for n in ("x", "a", "b"))
        with torch.enable_grad():
            out = x @ inputs["weight"].double().T + inputs["scaling"] * (x @ a.T) @ b.T
            weighed_sum(out).backward()
        return {"output": out.detach(), "gradients": {"x": x.grad, "a": a.grad, "b": b.grad}}

    def verify(self, inputs, outputs, expected, variant):
        found = near(outputs["output"], expected["output"], "the output")
        if found:
            return found
        if outputs["held"]:
            return Finding("after the forward pass the dense weight was still in memory: drop it, and call "
                           "dequantize() again in the backward pass", {"dense weights": outputs["held"]})
        first, last = outputs["calls"]
        if first != 1 or last > 2:
            return Finding(f"dequantize was called {first} times forward and {last - first} times backward: once each "
                           "is enough")
        terms = _terms(inputs, inputs["scaling"])
        for name in ("x", "a", "b"):
            found = near(outputs["gradients"][name], expected["gradients"][name], f"the gradient of {name}",
                         terms=terms[name])
            if found:
                return found
        return None

    mistakes = (
        Mistake("dense weight kept", "The dense weight is kept for the backward pass, by you or by autograd: every "
                "layer's would be in memory at once, and four bits would save nothing. Call dequantize() again.",
                """
def qlora_linear(x, a, b, scaling, dequantize):
    return x @ dequantize().T + scaling * (x @ a.T) @ b.T
"""),
        Mistake("gradient of the adapter alone", "The gradient of x lacks the way through the frozen weight: frozen "
                "weights learn nothing, and pass gradients on all the same.",
                edit("gradient @ ctx.dequantize() + low @ a", "low @ a")),
        Mistake("gradient of the base alone", "The gradient of x lacks the way through the adapter.",
                edit("gradient @ ctx.dequantize() + low @ a", "gradient @ ctx.dequantize()")),
        Mistake("weight transposed", "In the backward pass the weight is not transposed: y = x W^T, so dx = g W.",
                edit("gradient @ ctx.dequantize()", "gradient @ ctx.dequantize().T")),
        Mistake("scale left out of b", "The gradient of b lacks the scale.",
                edit("ctx.scaling * rows(gradient).T", "rows(gradient).T")),
        Mistake("scale left out of a", "The gradients of a and x lack the scale.",
                edit("low = ctx.scaling * gradient @ b", "low = gradient @ b")),
        Mistake("update not scaled", "The update in the forward pass lacks the scale.",
                edit("scaling * (x @ a.T) @ b.T", "(x @ a.T) @ b.T")),
        Mistake("means", "You take the mean over the tokens: a gradient is the sum of what each token gives.",
                (edit("rows(low).T @ rows(x)", "rows(low).T @ rows(x) / len(rows(x))"),
                 edit("ctx.scaling * rows(gradient).T", "ctx.scaling / len(rows(x)) * rows(gradient).T"))),
    )


class ServeAdapters(Reference):
    exercise = "serve_adapters"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, names, ranks, length=3, bias=True):
            inner, outer = 6, 5
            adapters = {
                key: (rng.randn(r, inner), rng.randn(outer, r), rng.float(0.5, 2.0)) for key, r in ranks.items()
            }
            return Case(name, {
                "x": rng.randn(len(names), length, inner), "weight": rng.randn(outer, inner),
                "bias": rng.randn(outer) if bias else None, "adapters": adapters, "names": names,
            }, part)

        both = {"law": 2, "code": 3}
        yield case("one adapter", "switching", ["law"], {"law": 2})
        yield case("two adapters", "switching", ["law", "code"], both)
        yield case("some without", "switching", [None, "code", None, "law"], both)
        yield case("nobody has one", "switching", [None, None], both)
        yield case("the first has none", "switching", [None, "law", "law"], {"law": 4}, length=1)
        order = rng.shuffled(["law", "code", "law", "poems", None, "code", "law"])
        yield case("mixed", "one product", order, {**both, "poems": 1}, length=2, bias=False)
        yield case("many of one", "one product", ["code"] * 5, both)

    def expected(self, inputs, variant):
        bias = None if inputs["bias"] is None else inputs["bias"].double()
        rows = []
        for x, name in zip(inputs["x"].double(), inputs["names"], strict=True):
            weight = inputs["weight"].double()
            if name is not None:
                a, b, scaling = inputs["adapters"][name]
                weight = weight + scaling * b.double() @ a.double()
            rows.append(F.linear(x, weight, bias))
        return {"output": torch.stack(rows), "calls of base": 1}

    def verify(self, inputs, outputs, expected, variant):
        found = near(outputs["output"], expected["output"], "the output")
        if not found and outputs["calls of base"] != 1:
            return Finding(f"the base was called {outputs['calls of base']} times: one product with the large weight "
                           "serves the whole batch, whatever adapters it asks for")
        return found

    mistakes = (
        Mistake("base for each", "You call the base for each sample or adapter: one product serves the whole batch.",
                """
def serve_adapters(x, base, adapters, names):
    rows = []
    for sample, name in zip(x, names):
        out = base(sample)
        if name is not None:
            a, b, scaling = adapters[name]
            out = out + scaling * (sample @ a.T) @ b.T
        rows.append(out)
    return torch.stack(rows)
"""),
        Mistake("one for all", "You give every sample the adapter of one of them.",
                edit("rows = [i for i, own in enumerate(names) if own == name]", "rows = list(range(len(names)))")),
        Mistake("None gets one", "A sample without an adapter gets the output of the base alone.",
                (edit("for name in set(names) - {None}:", "for name in sorted(set(names) - {None}):"),
                 edit("own == name]", "own in (name, None)]"))),
        Mistake("not scaled", "You leave out the scale of the adapter.",
                edit("scaling * (x[rows] @ a.T)", "(x[rows] @ a.T)")),
        Mistake("base left out", "Your output is the update alone: it is added to what the base gives.",
                edit("out[rows] += ", "out[rows] = ")),
        Mistake("first sample alone", "An adapter is applied to the first sample that asks for it, and not to the "
                "others.", edit("own == name]", "own == name][:1]")),
    )


class InSubspace(Reference):
    exercise = "in_subspace"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, d, shapes, far=1.0):
            return Case(name, {
                "start": {name: rng.randn(*shape) for name, shape in shapes.items()},
                "directions": {name: rng.randn(d, *shape, scale=far) for name, shape in shapes.items()},
                "z": rng.randn(d),
            }, part)

        matrix, mixed = {"w": (3, 4)}, {"w": (3, 4), "b": (5,), "stack": (2, 2, 3)}
        yield case("one direction, one matrix", "point", 1, matrix, far=3.0)
        yield case("several directions", "point", rng.int(3, 6), matrix)
        yield case("tensors of all sizes", "point", 4, mixed, far=0.2)
        start = case("z = 0", "point", 3, mixed)
        start.inputs["z"].zero_()
        yield start
        yield case("more directions than numbers", "gradient", 15, {"w": (2, 3), "b": (2,)})
        yield case("the gradient of z", "gradient", rng.int(2, 5), mixed, far=2.0)

    def expected(self, inputs, variant):
        z = inputs["z"].double().requires_grad_()
        names, flat = sorted(inputs["start"]), self._directions(inputs)
        sizes = [inputs["start"][name].numel() for name in names]
        with torch.enable_grad():
            moves = (z @ flat).split(sizes)
            point = {name: inputs["start"][name].double() + move.view(inputs["start"][name].shape)
                     for name, move in zip(names, moves, strict=True)}
            sum(weighed_sum(torch.sin(point[name])) for name in names).backward()
        return {"point": {name: point[name].detach() for name in inputs["start"]}, "gradient": z.grad}

    def _directions(self, inputs: Inputs) -> Tensor:
        """Of length 1, [d, numbers]."""
        parts = [inputs["directions"][name].double().flatten(1) for name in sorted(inputs["start"])]
        return F.normalize(torch.cat(parts, dim=1), dim=1, eps=0.0)

    def verify(self, inputs, outputs, expected, variant):
        if list(sorted(outputs["point"])) != sorted(expected["point"]):
            return Finding(f"the tensors that you return are {_listed(sorted(outputs['point']))}, and "
                           f"{_listed(sorted(expected['point']))} is right")
        for name, want in expected["point"].items():
            found = near(outputs["point"][name], want, f"the tensor {name!r}")
            if found:
                return found
        if outputs["gradient"] is None:
            return Finding("no gradient reaches z: leave out detach, .data and no_grad")
        terms = self._directions(inputs).abs().sum(1)  # what each number of it adds up, by slopes of about 1
        return near(outputs["gradient"], expected["gradient"], "the gradient of z", terms=terms)

    mistakes = (
        Mistake("directions as they are", "You do not divide the directions by their lengths: a step in z would be "
                "the longer, the more weights there are.", edit("z / length", "z")),
        Mistake("lengths by tensor", "You give each tensor's part of a direction the length 1: it is the direction "
                "as a whole, over all tensors, that has it.",
                (edit("    return {name: value + torch.tensordot(z / length, directions[name], 1)",
                      "    return {name: value + torch.tensordot(z / directions[name].flatten(1).norm(dim=1), "
                      "directions[name], 1)"),)),
        Mistake("one length for all", "You divide by one length for all directions: each has its own.",
                edit(".flatten(1).square().sum(1)", ".square().sum()")),
        Mistake("squared lengths", "You divide by the squares of the lengths: take the root.",
                edit("squares.sqrt()", "squares")),
        Mistake("start left out", "You return the step alone: it is added to the weights at the start.",
                edit("value + torch.tensordot", "torch.tensordot")),
        Mistake("detached", "You cut z off from its graph: it is what is trained.",
                edit("z / length", "z.detach() / length")),
    )


REFERENCES = {
    cls.exercise: cls()
    for cls in (LoRALinear, Inject, Bottleneck, AffineInt8, NF4, DoubleQuantize, QLoRALinear, ServeAdapters, InSubspace)
}
