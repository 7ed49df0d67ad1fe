"""Judges an answer that runs elsewhere: the trusted side of a check.

`judge` draws cases, sends each as bytes through `ask`, and compares what comes back with the reference. `ask` may call
the driver in this process, in another process, or in a sandbox: only the wire lies between, so that a verdict is the
same everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_leaves, tree_map

from effnlp_lab import exercises
from effnlp_lab.exercises.compare import brief, kind_of
from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng
from effnlp_lab.exercises.spec import Exercise, Variant
from effnlp_lab.notebook import wire
from effnlp_lab.notebook.driver import COMPILE_SECONDS, answer_case
from effnlp_lab.notebook.meter import measure

State = Literal["not attempted", "correct", "incorrect", "crashed", "timed out", "over budget", "not run here"]
Ask = Callable[[bytes], bytes]


@dataclass
class CaseResult:
    """What one case showed."""

    name: str
    part: str
    state: State
    sentence: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    usage: dict[str, int] | None = None


@dataclass
class Verdict:
    """What a check found: enough to show it, to grade it, and to run it again (seed, variant, device, versions)."""

    exercise: str
    lab: str
    state: State
    score: float
    points: float
    sentence: str
    seed: int
    variant: dict[str, str]
    device: str
    cases: list[CaseResult] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    twin: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def first_failure(self) -> CaseResult | None:
        """The case to look at: the first one in the most telling state."""
        failed = [c for c in self.cases if c.state not in ("correct", "not run here")]
        return min(failed, key=lambda c: _TELLING.index(c.state), default=None)


_TELLING: tuple[State, ...] = ("not attempted", "crashed", "timed out", "incorrect", "over budget")


def judge(
    exercise: Exercise,
    lab: str,
    ask: Ask,
    *,
    seed: int,
    variant: Variant | None = None,
    device: str = "cpu",
    budgets: bool = True,
    guarded: bool = False,
) -> Verdict:
    """Judge an answer on fresh cases drawn from `seed`; `ask` runs it on one case (driver.answer_case).

    `guarded` is for answers of which anything may come: what cannot be compared with the reference is wrong, in words.
    """
    variant = dict(variant if variant is not None else exercise.public_variant())
    verdict = Verdict(
        exercise.name, lab, "correct", 0.0, float(exercise.points), "", seed, variant, device, versions=versions()
    )
    started = time.perf_counter()
    unable = _why_not_here(exercise, device)
    if unable:
        verdict.state, verdict.sentence = "not run here", unable
        return verdict
    reference = exercises.reference_of(exercise.name)
    answered: list[_Answered] = []
    slow = 0
    for number, case in enumerate(reference.cases(Rng(seed), variant)):
        if case.device == "cuda" and device != "cuda":
            verdict.cases.append(CaseResult(case.name, case.part, "not run here", "to be graded on a GPU"))
            continue
        if slow == 2:
            verdict.cases.append(CaseResult(case.name, case.part, "timed out", "not run: two cases had timed out"))
            continue
        one = _ask_case(exercise, lab, reference, case, ask, seed, variant, device, budgets, number == 0, guarded)
        if one.result.state == "not attempted" and answered:  # a class with one method to go, say: the rest counts
            one.result.state, one.result.sentence = "incorrect", "A blank that this case needs is still there."
        answered.append(one)
        verdict.cases.append(one.result)
        verdict.notes += [n for n in one.notes if n not in verdict.notes]
        if one.result.state == "not attempted" or one.response["status"] == "forbidden":
            break
        slow += one.result.state == "timed out"
    _conclude(verdict, exercise)
    if verdict.state in ("incorrect", "crashed", "timed out"):
        with contextlib.suppress(*((Exception,) if guarded else ())):
            verdict.mistakes = name_mistakes(exercise, lab, reference, answered, variant, device)
    verdict.seconds = time.perf_counter() - started
    return verdict


@dataclass
class _Answered:
    case: Case
    request: bytes
    response: dict[str, Any]
    result: CaseResult
    notes: list[str]


def _why_not_here(exercise: Exercise, device: str) -> str:
    if exercise.needs_gpu and device != "cuda":
        return "This exercise needs a GPU: to be graded on a GPU."
    if exercise.needs_triton:
        from effnlp_lab.device import resolve

        if resolve(device).triton == "absent":
            return (
                "This exercise needs Triton, which is not installed here (it has Linux wheels only): "
                "solve its PyTorch twin for the same points, or open the lab in WSL, a dev container or Colab."
            )
    return ""


def _ask_case(
    exercise: Exercise,
    lab: str,
    reference: Reference,
    case: Case,
    ask: Ask,
    seed: int,
    variant: Variant,
    device: str,
    budgets: bool,
    first: bool,
    guarded: bool,
) -> _Answered:
    seconds = case.seconds or exercise.seconds
    inputs = dict(case.inputs)
    metered = bool(case.budget) and budgets
    request = make_request(
        exercise,
        lab,
        inputs,
        seed=seed,
        device=device,
        meter=metered,
        seconds=seconds + (COMPILE_SECONDS if first and exercise.needs_triton else 0.0),
    )
    started = time.perf_counter()
    try:
        response = read_response(ask(request))
    except wire.WireError as error:
        response = {
            "status": "raised",
            "outputs": None,
            "observed": {},
            "error": {"type": "WireError", "message": str(error), "where": ""},
        }
    result = CaseResult(
        case.name, case.part, "correct", seconds=time.perf_counter() - started, usage=response["observed"].get("usage")
    )
    notes = _notes(response["observed"])
    try:
        result.state, result.sentence, result.details = _judge_response(
            exercise, reference, case, inputs, response, variant, device, seconds, metered
        )
    except Exception as error:
        if not guarded:
            raise
        result.state = "incorrect"
        result.sentence = f"Your answer cannot be compared with the right one ({type(error).__name__}: {error})."[:500]
    if result.state in ("incorrect", "crashed", "timed out") and "forbidden" not in result.details:
        result.details |= {f"input {name}": _shown(value) for name, value in inputs.items()}
    return _Answered(case, request, response, result, notes)


def _shown(value: Any) -> str:
    """An input for the report: shape and dtype of a tensor, the start of anything else."""
    if isinstance(value, torch.Tensor):
        layout = "" if value.is_contiguous() else f", strides {tuple(value.stride())}"
        return f"{kind_of(value)}{layout}"
    return brief(value)


def make_request(
    exercise: Exercise,
    lab: str,
    inputs: Mapping[str, Any],
    *,
    seed: int,
    device: str,
    seconds: float,
    meter: bool = False,
    forbidden: tuple[str, ...] | None = None,
) -> bytes:
    """The bytes that ask a driver to run one case."""
    return wire.pack(
        {
            "exercise": exercise.name,
            "lab": lab,
            "inputs": wire.pack(dict(inputs)),
            "device": device,
            "seconds": float(seconds),
            "seed": seed,
            "meter": meter,
            "forbidden": list(exercise.forbidden if forbidden is None else forbidden),
        }
    )


def read_response(data: bytes) -> dict[str, Any]:
    """A driver's response, its form checked: it comes from where the student's code runs."""
    response = wire.unpack(data, limit=wire.MAX_BYTES)
    if (
        not isinstance(response, dict)
        or not isinstance(response.get("status"), str)
        or not isinstance(response.get("observed"), dict)
        or "outputs" not in response
    ):
        raise wire.WireError("a response without status, outputs and observed")
    _check_observed(response["observed"])
    error = response.get("error") or {}
    if not isinstance(error, dict) or not all(isinstance(v, str) for v in (*error, *error.values())):
        raise wire.WireError("a response whose error is not told in words")
    return response


_NAMES, _COUNT, _TEXT = ("forbidden", "changed", "aliases", "devices"), "_characters", ("stdout", "stderr")


def _check_observed(observed: dict[str, Any]) -> None:
    """Raise WireError where what a driver says that it observed has another form than a driver gives it."""
    usage = observed.get("usage")
    sound = (
        all(isinstance(observed.get(name, []), list) for name in _NAMES)
        and all(isinstance(item, str) for name in _NAMES for item in observed.get(name, []))
        and all(type(observed.get(name + _COUNT, 0)) is int for name in _TEXT)
        and all(isinstance(observed.get(name, ""), str) for name in _TEXT)
        and (usage is None or (isinstance(usage, dict) and all(type(n) is int and n >= 0 for n in usage.values())))
    )
    if not sound:
        raise wire.WireError("a response whose observations have another form than a driver gives them")


def _judge_response(
    exercise: Exercise,
    reference: Reference,
    case: Case,
    inputs: dict,
    response: dict,
    variant: Variant,
    device: str,
    seconds: float,
    metered: bool,
) -> tuple[State, str, dict]:
    """State, sentence and details of one case."""
    status, observed = response["status"], response["observed"]
    if status == "blank":
        return "not attempted", "The blank is still there.", {}
    if status == "forbidden":
        names = ", ".join(str(n) for n in observed.get("forbidden", []))
        return (
            "incorrect",
            f"Your answer uses {names}, which would answer for you: write it with plain operations.",
            {"forbidden": names},
        )
    if status == "timed out":
        return (
            "timed out",
            (
                f"Your answer had not finished after {seconds:g} s: "
                "look for a loop that never ends, or for work done again and again."
            ),
            {},
        )
    if status == "raised":
        error = response.get("error") or {}
        text = f"Your answer raised {error.get('type')}: {error.get('message')}".rstrip(": ")
        return "crashed", text, {"at": error.get("where")} if error.get("where") else {}
    if status == "died":
        return "crashed", _sentence(str((response.get("error") or {}).get("message") or "Its process ended")), {}
    if status != "ok":
        return "crashed", "Your answer gave no response that can be read.", {}
    changed = [n for n in observed.get("changed", []) if n not in exercise.may_modify]
    if changed:
        return (
            "incorrect",
            (
                f"Your answer changes its input `{changed[0]}`: callers do not expect that; "
                "work on a copy, or build a new value."
            ),
            {},
        )
    elsewhere = [d for d in observed.get("devices", []) if d != device]
    if elsewhere and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(inputs)):  # else it had none to follow
        return (
            "incorrect",
            (
                f"Your answer returned a tensor on {elsewhere[0]}, and its inputs are on {device}: "
                "make new tensors with device=x.device."
            ),
            {},
        )
    outputs = response["outputs"]
    on_card = case.device == "cuda" == device  # real sizes, in float64 too: the reference computes them there
    if on_card:
        inputs, outputs = on_device(inputs, device), on_device(outputs, device)
    over = None
    with _where(device) if on_card else contextlib.nullcontext():
        found = reference.verify(inputs, outputs, reference.expected(inputs, variant), variant)
        if metered and not found:
            over = _judge_budget(reference, case, inputs, variant, observed.get("usage") or {})
    if found:
        return "incorrect", _sentence(found.sentence), dict(found.details)
    aliases = observed.get("aliases", [])
    if exercise.fresh and aliases:
        return (
            "incorrect",
            (
                f"Your answer is a view of its input `{aliases[0]}`: "
                "a later change to one would change the other; return a copy."
            ),
            {},
        )
    return over or ("correct", "", {})


def response_verdict(
    exercise: Exercise, reference: Reference, case: Case, response: dict, variant: Variant
) -> tuple[State, str]:
    """State and sentence of one case on the CPU, from a driver's response as `read_response` gives it.

    What cannot be compared with the reference is wrong, in words.
    """
    try:
        return _judge_response(
            exercise, reference, case, dict(case.inputs), response, variant, "cpu", exercise.seconds, False
        )[:2]
    except Exception as error:
        return "incorrect", f"Your answer cannot be compared with the right one ({type(error).__name__})."


@contextlib.contextmanager
def _where(device: str) -> Iterator[None]:
    """Put what the reference makes on `device`; autograd's thread is not to remark on its first product there."""
    with torch.device(device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")
        yield


def on_device(values: Any, device: str) -> Any:
    """The same values with every tensor on `device`."""
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, values)


_METERED = {
    "peak_bytes": "bytes at its peak",
    "bytes_moved": "bytes moved",
    "flops": "floating-point operations",
    "launches": "operations launched",
}


def _judge_budget(
    reference: Reference, case: Case, inputs: dict, variant: Variant, usage: Mapping[str, int]
) -> tuple[State, str, dict] | None:
    """None where the answer stays within the case's budget."""
    _, allowed = measure(reference.frugal, inputs, variant)
    for name, multiple in case.budget.items():
        limit, used = multiple * getattr(allowed, name), usage.get(name, 0)
        if used > limit:
            return (
                "over budget",
                (
                    f"The values are right, but your answer takes {used:,} {_METERED[name]}, and at most "
                    f"{int(limit):,} are allowed ({multiple:g} times what the reference takes)."
                ),
                {},
            )
    return None


def _notes(observed: Mapping[str, Any]) -> list[str]:
    notes = []
    printed = observed.get("stdout_characters", 0)
    if printed > 10_000:
        notes.append(f"Your answer printed {printed:,} characters, which are not shown: remove the prints.")
    elif printed:
        notes.append(f"Your answer printed: {str(observed.get('stdout', ''))[:300].strip()}")
    if observed.get("stderr_characters", 0):
        notes.append(f"Your answer wrote to stderr: {str(observed.get('stderr', ''))[:300].strip()}")
    for name in observed.get("aliases", [])[:1]:
        notes.append(
            f"What your answer returns shares memory with its input `{name}`: "
            "a later change to one would change the other."
        )
    return notes


def _conclude(verdict: Verdict, exercise: Exercise) -> None:
    """State, score and sentence of the whole from its cases."""
    run = [c for c in verdict.cases if c.state != "not run here"]
    failure = verdict.first_failure
    if failure is None:
        verdict.state, verdict.score = "correct", float(exercise.points)
        verdict.sentence = f"All {len(run)} cases pass."
        return
    verdict.state = failure.state
    verdict.sentence = failure.sentence
    if failure.state == "not attempted" or "forbidden" in failure.details:
        return
    core = [c for c in run if c.part in exercise.parts]
    passed = {
        part: all(c.state == "correct" for c in core if c.part == part)
        for part in exercise.parts
        if any(c.part == part for c in core)
    }
    verdict.score = exercise.score(passed)


def name_mistakes(
    exercise: Exercise, lab: str, reference: Reference, answered: list[_Answered], variant: Variant, device: str
) -> list[str]:
    """Sentences of the known mistakes that give what the student's answer gave, on as many failing cases as can be."""
    failing = [a for a in answered if a.result.state in ("incorrect", "crashed", "timed out")]
    if not failing or any(a.response["status"] == "forbidden" for a in failing):
        return []
    public = exercise.public_variant()
    if dict(variant) != public and (told := _other_rule(exercise, reference, failing, variant)):
        return told  # first: the mistakes are slips of the published solution, and agree with it on some cases
    candidates = list(reference.mistakes)
    for one in failing[:4]:
        # every response is compared, the passing ones too, once a candidate remains
        matching = [m for m in candidates if _slips_alike(exercise, lab, reference, m, one, variant, device)]
        if matching:
            candidates = matching
        elif one is failing[0]:
            return _other_rule(exercise, reference, failing, variant) if dict(variant) == public else []
    if len(candidates) > 1:
        for one in [a for a in answered if a.result.state == "correct"][:4]:
            matching = [m for m in candidates if _slips_alike(exercise, lab, reference, m, one, variant, device)]
            candidates = matching or candidates
    return [m.sentence for m in candidates]


def _other_rule(exercise: Exercise, reference: Reference, failing: list[_Answered], variant: Variant) -> list[str]:
    """Whether the answer does what another variant asks for: the public one, or another student's."""
    if not exercise.variants or any(one.response["status"] != "ok" for one in failing):
        return []
    public = exercise.public_variant()
    for other in exercise.all_variants():
        if other != dict(variant) and all(_follows(reference, one, other) for one in failing):
            theirs = ", ".join(f"{name} = {value}" for name, value in other.items())
            whose = "is published" if other == public else "another student has"
            return [f"This is the answer to the variant that {whose} ({theirs}), and yours is another. "
                    f"{exercise.in_words(variant)}"]
    return []


def _follows(reference: Reference, one: _Answered, variant: Variant) -> bool:
    """Whether an answer's outputs on a case are right under a variant."""
    inputs = dict(one.case.inputs)
    return not reference.verify(inputs, one.response["outputs"], reference.expected(inputs, variant), variant)


def _slips_alike(
    exercise: Exercise, lab: str, reference: Reference, mistake: Mistake, one: _Answered, variant: Variant, device: str
) -> bool:
    """Whether the mistake, on the same device, gives what the student gave; devices round differently.

    One that does a case right explains no failure on it.
    """
    try:
        request = make_request(
            exercise,
            lab,
            one.case.inputs,
            seed=0,
            device=device,
            forbidden=(),
            seconds=min(2.0, exercise.seconds) if not exercise.needs_triton else exercise.seconds,
        )
        response = read_response(mistaken_response(lab, exercise.name, mistake.name, request))
        inputs = dict(one.case.inputs)
        judged = _judge_response(exercise, reference, one.case, inputs, response, variant, device, 0.0, False)
        if judged[0] == "correct" and one.result.state == "incorrect":
            return False
        if response["status"] != one.response["status"]:
            return False
        if response["status"] == "ok":
            same_changes = response["observed"].get("changed") == one.response["observed"].get("changed")
            return same_changes and reference.same_slip(one.response["outputs"], response["outputs"])
        if response["status"] == "raised":
            return (response.get("error") or {}).get("type") == (one.response.get("error") or {}).get("type")
    except Exception:  # of the mistake's, or of comparing it with what an answer gave: another slip, then
        return False
    return True


def mistaken_response(lab: str, exercise: str, mistake: str, request: bytes) -> bytes:
    """What the driver says of a known mistake on a case."""
    return answer_case(request, mistaken_answer(lab, exercise, mistake))


def mistaken_answer(lab: str, exercise: str, mistake: str) -> Callable:
    """The known mistake as a callable, from the texts that `effnlp build` spelled out."""
    source = exercises.sources(lab)["exercises"][exercise]["mistakes"][mistake]
    return answer_from_source(lab, exercise, source)


def answer_from_source(lab: str, exercise: str, source: str) -> Callable:
    """Run the lab's given code, the known-right earlier functions and `source`; return the function it defines."""
    module = exercises.reference_module(lab)
    space: dict[str, Any] = {"__name__": f"_answer_{exercise}"}
    _run(exercises.sources(lab)["given"], f"<given {lab}>", space)
    space.update(getattr(module, "EARLIER", {}))
    _run(source, f"<answer {exercise} {abs(hash(source))}>", space)
    return space[exercise]


def _run(source: str, name: str, space: dict[str, Any]) -> None:
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # Triton reads kernels' source back
    exec(_compiled(source, name), space)


_compiled = functools.lru_cache(maxsize=512)(functools.partial(compile, mode="exec"))  # a lab's given code comes often


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else text + "."


def versions() -> dict[str, str]:
    """What a verdict depends on besides the answer."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(ImportError):
        from effnlp_lab import __version__

        found["effnlp_lab"] = __version__
    return found
