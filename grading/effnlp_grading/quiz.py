"""Questions on somebody's own code: which change breaks it, on which input, and what happens then.

Every question is made from mutants of the code, run on cases of the exercise's reference. A question has one right
option, because all of its options were run: a change that is no right answer left the result on the input that is
shown right; an input that is no right answer gives a right result with the change; something that does not happen is
what another change does there. All options of a question are run once more, each in a fresh session, before it is kept.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch

from effnlp_lab import exercises
from effnlp_lab.exercises.reference import Case, Rng
from effnlp_lab.exercises.spec import Exercise
from effnlp_lab.mutation.make import Mutant, make
from effnlp_lab.notebook.judge import make_request, read_response, response_verdict

Kind = Literal["which change", "which input", "what happens"]
KINDS: tuple[Kind, ...] = ("which change", "which input", "what happens")
OPTIONS = 4
MUTANTS = 28  # tried of an exercise
CASES = 8
SLOWER = 10.0  # times one's own time that a changed answer may take
LEAST_SECONDS = 0.25
LONGEST_INPUT = 700  # characters of an input that is shown
LONGEST_RESULT = 260
CUT = "beginning with"
NUMBERS = 24  # of a tensor that are shown

FILLED = """
import torch

def _filled(make):
    def made(*arguments, **named):
        out = make(*arguments, **named)
        return out.fill_(float("nan") if out.is_floating_point() else 1)
    return made

torch.empty, torch.empty_like = _filled(torch.empty), _filled(torch.empty_like)
torch.Tensor.new_empty = _filled(torch.Tensor.new_empty)
"""  # new tensors that are not what happened to lie in memory: whoever reads them gives something else then


@dataclass(frozen=True)
class Accepted:
    """An exercise that was solved: the code of its cell, and the variant that it was judged under."""

    exercise: Exercise
    source: str
    variant: Mapping[str, str]


@dataclass(frozen=True)
class Outcome:
    """What code did on a case: whether that was right, what it was, and what the check says of it."""

    right: bool
    text: str
    why: str = ""


@dataclass(frozen=True)
class Option:
    """One option: what is read, and how it was checked: `source` run on the case `case`."""

    text: str
    source: str
    case: int


@dataclass
class Question:
    """One question. `case` and `change` are shown above the options where they are the same for all."""

    exercise: str
    kind: Kind
    code: str
    options: list[Option]
    right: int
    why: str
    case: str = ""
    shown: str = ""
    change: str = ""
    seed: int = 0
    variant: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Runner(Protocol):
    """Runs code in place of somebody's answer, where it can do no harm."""

    def run(self, source: str, requests: Sequence[tuple[bytes, float]], fresh: bool = False) -> list[bytes | str]:
        """The driver's responses to requests, each within its seconds; a str says how the process ended instead.

        After a case that does not come to an end there may be none.
        """
        ...


def make_quiz(lab: str, accepted: Sequence[Accepted], blanks: Mapping[str, str],
              runner_of: Callable[[Accepted], Runner], seed: int, count: int = 5,
              show: Callable[[str], None] = lambda name: None) -> list[Question]:
    """At most `count` questions, from as many exercises as there are; fewer where the code gives no more.

    blanks: the released cell of each exercise, whose lines are not changed. `show` is told each exercise's name.
    """
    draw = random.Random(seed)
    order = draw.sample(list(accepted), len(accepted))
    order.sort(key=lambda one: one.exercise.kind != "core" or one.exercise.needs_triton)  # quick ones first
    wanted, found, left = list(KINDS), [], {}
    for one in order:
        if len(found) >= count:
            break
        show(one.exercise.name)
        bench = _Bench(lab, one, blanks.get(one.exercise.name, ""), runner_of(one), draw)
        for kind in wanted[len(found) % len(wanted) :] + wanted[: len(found) % len(wanted)]:
            question = bench.question(kind)
            if question is not None:
                found.append(question)
                break
        left[one.exercise.name] = bench
    for bench in left.values():  # more of the same exercises
        for kind in KINDS * 2:
            if len(found) < count and (question := bench.question(kind)) is not None:
                found.append(question)
    return found


class _Bench:
    """The outcomes of one exercise's mutants on some cases, and the questions that they make."""

    def __init__(self, lab: str, one: Accepted, blank: str, runner: Runner, draw: random.Random) -> None:
        self.lab, self.one, self.runner, self.draw = lab, one, runner, draw
        self.seed = draw.randrange(1 << 31)
        self.reference = exercises.reference_of(one.exercise.name)
        self.used: set[str] = set()
        self._right: dict[int, Any] = {}
        self.seconds = LEAST_SECONDS
        self.cases = self._showable_cases()
        self.own: list[Outcome] | None = None  # of the code as it is, once it has run
        self.requests = [self._request(case) for case in self.cases]
        self.mutants: list[Mutant] = []
        self.table: dict[str, list[Outcome]] = {}
        if self.cases and self._own_outcomes():
            made = make(one.exercise.name, one.source, own_lines(one.source, blank))
            for mutant in draw.sample(made, min(MUTANTS, len(made))):
                row = self._outcomes(mutant.source)
                if row:
                    self.mutants.append(mutant)
                    self.table[mutant.id] = row

    def question(self, kind: Kind) -> Question | None:
        """One more question of a kind, checked; None where there is none."""
        makers = {"which change": self._which_change, "which input": self._which_input,
                  "what happens": self._what_happens}
        for question in makers[kind]():
            target = question.options[question.right].source if kind == "which change" else question.change
            if target not in self.used and self._holds(question):
                self.used.add(target)
                return question
        return None

    def _which_change(self) -> Iterator[Question]:
        for place in self._shuffled(range(len(self.cases))):
            broken = [m for m in self.mutants if not self.table[m.id][place].right]
            sound = [m for m in self.mutants if self.table[m.id][place].right]
            sound.sort(key=lambda m: all(o.right for o in self.table[m.id]))  # those that matter elsewhere come first
            for mutant in self._shuffled(broken):
                others = _distinct(sound, taken={told(mutant)})[: OPTIONS - 1]
                if len(others) == OPTIONS - 1:
                    why = f"{told(mutant)}: {self.table[mutant.id][place].why}"
                    yield self._question("which change", why, place, "", [(told(m), m.source, place)
                                                                          for m in (mutant, *others)])

    def _which_input(self) -> Iterator[Question]:
        for mutant in self._shuffled(self.mutants):
            row = self.table[mutant.id]
            broken = [p for p, outcome in enumerate(row) if not outcome.right]
            sound = self._shuffled([p for p, outcome in enumerate(row) if outcome.right])
            if broken and len(sound) >= OPTIONS - 1:
                place = self.draw.choice(broken)
                why = f"{self.cases[place].name}: {row[place].why}"
                yield self._question("which input", why, None, told(mutant), [
                    (self._input(p), mutant.source, p) for p in (place, *sound[: OPTIONS - 1])])

    def _what_happens(self) -> Iterator[Question]:
        readable = [place for place, own in enumerate(self.own or ()) if CUT not in own.text]
        for place in self._shuffled(readable):
            for mutant in self._shuffled([m for m in self.mutants if not self.table[m.id][place].right]):
                happens = self.table[mutant.id][place]
                others = {self.own[place].text: self.one.source}
                for other in self._shuffled(self.mutants):
                    others.setdefault(self.table[other.id][place].text, other.source)
                others.pop(happens.text, None)
                if len(others) >= OPTIONS - 1:
                    told_others = [(text, source, place) for text, source in list(others.items())[: OPTIONS - 1]]
                    yield self._question("what happens", happens.why, place, told(mutant),
                                         [(happens.text, mutant.source, place), *told_others])

    def _question(self, kind: Kind, why: str, place: int | None, change: str, options: list[tuple[str, str, int]]
                  ) -> Question:
        """The first option is the right one, and they are shuffled."""
        order = self._shuffled(range(len(options)))
        return Question(
            self.one.exercise.name, kind, self.one.source, [Option(*options[i]) for i in order], order.index(0), why,
            "" if place is None else self.cases[place].name, "" if place is None else shown(self.cases[place]), change,
            self.seed, dict(self.one.variant))

    def _holds(self, question: Question) -> bool:
        """Run every option in a session of its own; whether exactly one is right, and none is like another."""
        if len({option.text for option in question.options}) != OPTIONS:
            return False
        for number, option in enumerate(question.options):
            place = option.case
            texts = [option.source, *([FILLED + option.source] if "empty" in option.source else [])]
            outcomes = [self._fresh_outcome(place, text) for text in texts]
            outcome = outcomes[0]
            if outcome is None or outcomes[-1] != outcome:  # it reads memory that nobody wrote
                return False
            if question.kind == "what happens":
                if outcome.text != option.text:
                    return False
            elif outcome.right == (number == question.right):
                return False
        return True

    def _fresh_outcome(self, place: int, source: str) -> Outcome | None:
        responses = self.runner.run(source, [self.requests[place]], fresh=True)
        return self._outcome(place, responses[0]) if responses else None

    def _showable_cases(self) -> list[Case]:
        """Cases to show: those that can be read as a whole come first, long ones last. No two look alike."""
        found = {}
        for case in self.reference.cases(Rng(self.seed), dict(self.one.variant)):
            if case.device != "cuda":
                found.setdefault(shown(case), case)
        short = sorted(text for text in found if len(text) <= LONGEST_INPUT)
        whole = [text for text in short if CUT not in text]
        rest = sorted((text for text in found if len(text) > LONGEST_INPUT), key=len)
        order = [*self._shuffled(whole), *self._shuffled([text for text in short if CUT in text]), *rest]
        return [found[text] for text in order[:CASES]]

    def _own_outcomes(self) -> bool:
        """Run the code as it is, twice; keep the cases on which it is right and the same both times."""
        began = [self._outcomes(self.one.source) for _ in range(2)]
        if not all(began):
            return False
        keep = [place for place, pair in enumerate(zip(*began, strict=True))
                if all(o.right for o in pair) and pair[0].text == pair[1].text]
        self.own = [began[0][place] for place in keep]
        self.cases = [self.cases[place] for place in keep]
        slowest = max((self.took[place] for place in keep), default=0.0)
        self.seconds = min(self.one.exercise.seconds, max(LEAST_SECONDS, SLOWER * slowest))
        self.requests = [self._request(case) for case in self.cases]
        return bool(self.cases)

    def _request(self, case: Case) -> tuple[bytes, float]:
        seconds = self.one.exercise.seconds if self.own is None else self.seconds
        request = make_request(self.one.exercise, self.lab, case.inputs, seed=self.seed, device="cpu", seconds=seconds)
        return request, seconds

    def _outcomes(self, source: str) -> list[Outcome]:
        """What a text does on each case; nothing where it does not come to an end on one, which would take minutes."""
        responses = self.runner.run(source, self.requests)
        if not responses or no_end(responses[-1]):
            return []
        return [self._outcome(place, response) for place, response in enumerate(responses)]

    def _outcome(self, place: int, response: bytes | str) -> Outcome:
        if isinstance(response, str):
            return Outcome(False, f"It {response}.", f"Your answer {response}.")
        read = read_response(response)
        self.took[place] = float(read["observed"].get("seconds") or 0.0)
        reference = copy.copy(self.reference)
        reference.expected = lambda inputs, variant: self._expected(place)
        state, sentence = response_verdict(self.one.exercise, reference, self.cases[place], read, self.one.variant)
        status = read["status"]
        if status == "raised":
            error = read.get("error") or {}
            return Outcome(False, f"It raises {error.get('type')}: {error.get('message')}"[:LONGEST_RESULT], sentence)
        if status != "ok":
            text = "It does not come to an end." if status == "timed out" else "It gives nothing."
            return Outcome(False, text, sentence)
        changed = read["observed"].get("changed") or []
        text = f"It gives {value_text(read['outputs'])}" + (f", and changes its input {changed[0]}" if changed else "")
        return Outcome(state == "correct", text[:LONGEST_RESULT] + ".", sentence)

    @property
    def took(self) -> dict[int, float]:
        """Seconds that the code took on each case when it ran last."""
        return self.__dict__.setdefault("_took", {})

    def _expected(self, place: int) -> Any:
        """The right outputs of a case, computed once."""
        case = self.cases[place]
        if id(case) not in self._right:
            self._right[id(case)] = self.reference.expected(dict(case.inputs), self.one.variant)
        return self._right[id(case)]

    def _input(self, place: int) -> str:
        return f"{self.cases[place].name}: {shown(self.cases[place])}"

    def _shuffled(self, items: Sequence) -> list:
        return self.draw.sample(list(items), len(items))


def no_end(response: bytes | str) -> bool:
    """Whether a response says that the code had not come to an end in time."""
    return not isinstance(response, str) and read_response(response)["status"] == "timed out"


def told(mutant: Mutant) -> str:
    """A change in words: line 5: `a + b` becomes `a - b`."""
    old, _, new = mutant.change.partition("  ->  ")
    new = "nothing" if new == "pass" else f"`{new}`"
    return f"Line {mutant.line}: `{old}` becomes {new}"


def _distinct(mutants: Sequence[Mutant], taken: set[str]) -> list[Mutant]:
    """Mutants whose words differ, one a line where there are enough lines."""
    first, second, lines = [], [], set()
    for mutant in mutants:
        if told(mutant) not in taken:
            taken = taken | {told(mutant)}
            (second if mutant.line in lines else first).append(mutant)
            lines.add(mutant.line)
    return [*first, *second]


def own_lines(source: str, blank: str) -> list[int]:
    """Lines of a cell (from 1) that its blank does not have."""
    given = {line.strip() for line in blank.splitlines()}
    return [n for n, line in enumerate(source.splitlines(), 1)
            if line.strip() and line.strip() not in given and not line.strip().startswith("#")]


def shown(case: Case) -> str:
    """A case's inputs, as they are read."""
    return "\n".join(f"{name} = {value_text(value)}" for name, value in case.inputs.items())


def value_text(value: Any) -> str:
    """A value as it is read: small tensors with their numbers, large ones by shape, dtype and their first numbers."""
    if isinstance(value, torch.Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        flat = value.detach().flatten()
        if flat.numel() <= NUMBERS:
            return f"tensor {kind}: {_numbers(value.tolist())}"
        return f"tensor {kind}, {CUT} {_numbers(flat[:6].tolist())}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{value_text(k)}: {value_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(value_text(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    return f"{value:.5g}" if isinstance(value, float) else repr(value)


def _numbers(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_numbers, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
