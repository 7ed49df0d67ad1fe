"""A small lab that is nobody's: what the tests of the engine judge answers against."""

import functools
import types

import torch

from effnlp_lab import exercises
from effnlp_lab.exercises.reference import Case, Mistake, Reference
from effnlp_lab.exercises.spec import Exercise, Lab

SOFTMAX = Exercise(
    "softmax",
    points=4.0,
    minutes=10,
    difficulty=1,
    title="Softmax",
    signature="(x) -> Tensor",
    parts={"values": 0.75, "large": 0.25},
    seconds=1.0,
    forbidden=("torch.nn.functional.softmax", "torch.softmax", "torch.Tensor.softmax", "aten::_softmax", "scipy"),
)
COUNT = Exercise(
    "count",
    points=1.0,
    minutes=10,
    difficulty=1,
    title="Count",
    signature="(items) -> dict",
    seconds=1.0,
    variants={"zero": ("kept", "dropped")},
)
LAB = Lab("99_toy", "Toy", 1.0, (SOFTMAX, COUNT))


class Softmax(Reference):
    exercise = "softmax"
    mistakes = (
        Mistake("wrong axis", "Softmax runs over the last axis.", ""),
        Mistake("no maximum", "e^x overflows unless the maximum is taken off first.", ""),
    )

    def cases(self, rng, variant):
        yield Case("one value", {"x": rng.randn(1, 1)}, part="values")
        yield Case("some rows", {"x": rng.randn(rng.int(2, 4), 5)}, part="values")
        yield Case("a strided view", {"x": rng.randn(6, 3).t()}, part="values")
        yield Case("half precision", {"x": rng.randn(3, 7, dtype=torch.float16)}, part="values")
        yield Case("large values", {"x": rng.randn(3, 4, scale=1000.0)}, part="large")
        yield Case("many rows", {"x": rng.randn(64, 64)}, part="large", budget={"peak_bytes": 4.0})
        yield Case("real size", {"x": rng.randn(8, 8)}, device="cuda")

    def expected(self, inputs, variant):
        return torch.softmax(inputs["x"].double(), -1)

    def plain(self, inputs, variant):
        return torch.softmax(inputs["x"], -1)

    frugal = plain


class Count(Reference):
    exercise = "count"

    def cases(self, rng, variant):
        yield Case("a list", {"items": rng.ints(6, 0, 2) + [0]})

    def expected(self, inputs, variant):
        kept = [i for i in inputs["items"] if i or variant["zero"] == "kept"]
        return {i: kept.count(i) for i in kept}


GIVEN = "import torch\nimport time\nimport sys\nimport warnings\nimport os\n"
RIGHT = """
def softmax(x):
    e = (x - x.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)
"""
MISTAKES = {"wrong axis": RIGHT.replace("-1", "0"), "no maximum": RIGHT.replace(" - x.amax(-1, keepdim=True)", " * 1")}
SOURCES = {
    "given": GIVEN,
    "exercises": {"softmax": {"blank": "", "mistakes": MISTAKES}, "count": {"blank": "", "mistakes": {}}},
}


def install(monkeypatch):
    """Make the toy lab the only one."""
    references = types.SimpleNamespace(REFERENCES={"softmax": Softmax(), "count": Count()}, EARLIER={})
    monkeypatch.setattr(exercises, "lab_names", lambda: [LAB.name])
    monkeypatch.setattr(exercises, "lab", lambda name: LAB)
    monkeypatch.setattr(exercises, "find", lambda name: (LAB, LAB.exercise(name)))
    monkeypatch.setattr(exercises, "reference_module", lambda name: references)
    monkeypatch.setattr(exercises, "drive_module", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(exercises, "sources", functools.cache(lambda name: SOURCES))
