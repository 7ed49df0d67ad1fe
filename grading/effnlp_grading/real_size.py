"""Cases at which quadratic memory exceeds the sandbox: what no meter in the student's process can be talked out of.

A budget that is only counted where the answer runs can be forged there. So the proctor asks once more, at a size where
the matrix that the answer must not build is larger than all that the session may allocate, and looks at some rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from effnlp_lab import exercises
from effnlp_lab.exercises.compare import Finding, compare
from effnlp_lab.exercises.reference import Rng
from effnlp_lab.exercises.spec import Exercise, Variant
from effnlp_lab.notebook.judge import CaseResult, State, Verdict, make_request, read_response

if TYPE_CHECKING:
    from effnlp_grading.connection import Connection

MEMORY = 96 << 20  # what the session may allocate; each of the matrices below is larger
ROWS = 64  # how many of the answer's last rows are looked at


@dataclass(frozen=True)
class RealSize:
    """One case: its inputs, the part whose points it decides, its seconds, and what is wrong with outputs, if anything.

    `reference` is the exercise's own; `check` takes it, the inputs, the outputs and the variant.
    """

    inputs: dict[str, Any]
    part: str
    check: Callable[[Any, dict[str, Any], Any, Variant], Finding | None]
    seconds: float = 20.0
    name: str = "at real size, in little memory"
    memory: int = MEMORY


def case_of(lab: str, exercise: str, seed: int) -> RealSize | None:
    """The case of an exercise at real size; None where it has none."""
    make = _CASES.get((lab, exercise))
    return make(Rng(seed ^ 0x5EED)) if make is not None else None


def ask(case: RealSize, session: Connection, spec: Exercise, lab: str, seed: int, variant: Variant) -> CaseResult:
    """What the answer in `session` makes of the case."""
    from effnlp_grading.connection import Ended

    request = make_request(spec, lab, case.inputs, seed=seed, device="cpu", seconds=case.seconds)
    try:
        response = read_response(session.case(spec.name, request, case.seconds))
    except Ended as end:
        late = end.status == "timed out"
        return _result(case, "timed out" if late else "over budget", f"At real size your answer {end}.")
    error = response.get("error") or {}
    if response["status"] == "ok":
        reference = exercises.reference_of(spec.name)
        try:
            found = case.check(reference, case.inputs, response["outputs"], variant)
        except Exception as odd:  # outputs of another form than those of the small cases
            found = Finding(f"your answer cannot be compared with the right one ({type(odd).__name__})")
        return _result(case, "incorrect" if found else "correct", f"At real size {found.sentence}." if found else "")
    if response["status"] == "timed out":
        return _result(case, "timed out", f"At real size your answer had not finished after {case.seconds:g} s.")
    told = f"{error.get('type', '')} {error.get('message', '')}".strip()
    if any(word in told.lower() for word in ("memory", "alloc")):
        return _result(case, "over budget", "")
    return _result(case, "crashed", f"At real size your answer raised {told}.")


def apply(result: CaseResult, spec: Exercise, verdict: Verdict) -> None:
    """Add the case to a verdict, and take the points of its part where it failed."""
    verdict.cases.append(result)
    if result.state == "correct":
        return
    passed = {part: part != result.part and part_passed(verdict, part) for part in spec.parts}
    verdict.score = spec.score(passed)
    if verdict.state == "correct":
        verdict.state, verdict.sentence = result.state, result.sentence


def part_passed(verdict: Verdict, part: str) -> bool:
    """Whether every case of a part that was run is correct, and there is one."""
    states = [case.state for case in verdict.cases if case.part == part and case.state != "not run here"]
    return bool(states) and all(state == "correct" for state in states)


def _result(case: RealSize, state: State, sentence: str) -> CaseResult:
    if state == "over budget":
        sentence = (f"The values are right at small sizes, but at real size your answer does not fit into "
                    f"{case.memory >> 20} MiB, where one that keeps to its budget takes a fraction of that.")
    return CaseResult(case.name, case.part, state, sentence)


def _best_match(rng: Rng) -> RealSize:
    inputs = {"queries": rng.randn(4096, 8), "documents": rng.randn(16384, 8), "rows": 64}  # the matrix: 256 MiB

    def check(reference, inputs, outputs, variant):
        last = {**inputs, "queries": inputs["queries"][-ROWS:]}
        return compare(outputs[-ROWS:], reference.expected(last, variant), None, None, rough=True)

    return RealSize(inputs, "memory", check)


def _attention(rng: Rng, queries: int, keys: int, dim: int) -> dict[str, torch.Tensor]:
    return {"q": rng.randn(1, queries, dim), "k": rng.randn(1, keys, dim), "v": rng.randn(1, keys, dim)}


def _tiled_forward(rng: Rng) -> RealSize:
    inputs = {**_attention(rng, 2048, 16384, 16), "causal": False, "block_q": 512, "block_k": 1024}  # scores: 128 MiB

    def check(reference, inputs, outputs, variant):
        out, lse = reference.expected({**inputs, "q": inputs["q"][:, -ROWS:]}, variant)
        return compare((outputs[0][:, -ROWS:], outputs[1][:, -ROWS:]), (out, lse), None, None, rough=True)

    return RealSize(inputs, "memory", check)


def _window_attention(rng: Rng) -> RealSize:
    inputs = {**_attention(rng, 6144, 6144, 8), "window": 64, "block": 128}  # scores: 144 MiB

    def check(reference, inputs, outputs, variant):
        right = reference.expected({**inputs, "q": inputs["q"][:, -ROWS:]}, variant)
        return compare(outputs[:, -ROWS:], right, None, None, rough=True)

    return RealSize(inputs, "cost", check)


def _flash_backward(rng: Rng) -> RealSize:
    inputs = _attention(rng, 1536, 16384, 8)  # weights and their gradients: 96 MiB each
    scores = inputs["q"] @ inputs["k"].transpose(1, 2) / math.sqrt(8)
    lse = scores.logsumexp(dim=2)
    inputs |= {"out": torch.softmax(scores, dim=2) @ inputs["v"], "lse": lse, "d_out": rng.randn(1, 1536, 8),
               "causal": False, "block_q": 512, "block_k": 1024}

    def check(reference, inputs, outputs, variant):
        rows = {name: inputs[name][:, -ROWS:] for name in ("q", "out", "lse", "d_out")}
        right = reference.expected({**inputs, **rows}, variant)[0]
        return compare(outputs[0][:, -ROWS:], right, None, None, rough=True)

    return RealSize(inputs, "memory", check)


_CASES: dict[tuple[str, str], Callable[[Rng], RealSize]] = {
    ("00_start_here", "best_match"): _best_match,
    ("06_flash_attention", "tiled_forward"): _tiled_forward,
    ("06_flash_attention", "window_attention"): _window_attention,
    ("06_flash_attention", "flash_backward"): _flash_backward,
}
