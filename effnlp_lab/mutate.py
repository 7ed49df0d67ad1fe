"""`effnlp mutate`: changes the solutions in small ways and lists the changes that no check notices.

This measures whether checks pass wrong code: of all the mutants of a lab's solutions (`mutation/operators.py` has the
kinds), but for those that are listed as equivalent with a reason, at least 97% have to be rejected.
"""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from effnlp_lab import exercises
from effnlp_lab.build import ROOT
from effnlp_lab.device import resolve
from effnlp_lab.errors import EffnlpError, UsageError
from effnlp_lab.exercises.spec import Exercise, Lab
from effnlp_lab.master import Master, given_source, read_master, solution_source
from effnlp_lab.mutation.listing import Equivalent, read_listing, unfit
from effnlp_lab.mutation.make import Mutant, mutants_of
from effnlp_lab.mutation.trial import Outcome, Trial
from effnlp_lab.runner import usable_cores

REJECTED_SHARE = 0.97  # at least, of the mutants that are not equivalent
EQUIVALENT_SHARE = 0.15  # at most, of all mutants


@dataclass
class Count:
    """What became of the mutants of one exercise. Fewer are `tried` than `made` when a sample was drawn."""

    exercise: str
    made: int = 0
    equivalent: int = 0
    tried: int = 0
    rejected: int = 0
    survivors: list[dict[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    not_run: str = ""

    @property
    def share(self) -> float:
        """Rejected mutants as a share of those that ought to be."""
        rest = self.rejected + len(self.survivors)
        return self.rejected / rest if rest else 1.0


def main(
    lab: str,
    exercise: str | None = None,
    sample: int | None = None,
    jobs: int | None = None,
    *,
    root: Path = ROOT,
    json_path: Path | None = None,
) -> int:
    """Run the mutants of a lab, or of one exercise (a `sample` of each exercise's); return 0 when the checks are good.

    Raises EffnlpError for a lab that is not built or whose solution its own check rejects, and UsageError for a list
    of equivalents that cannot be read.
    """
    if resolve().kind == "cuda":  # Triton's mode is settled at import, and CUDA does not survive a fork
        return _on_cpu(lab, exercise, sample, jobs, root, json_path)
    spec = exercises.lab(lab)
    master = read_master(root / "solutions" / spec.name / f"{spec.notebook}.py")
    if exercises.sources(spec.name)["given"] != given_source(master):
        raise EffnlpError(f"{spec.name} is not built from its master as it is now: run `effnlp build {spec.name}`.")
    console = Console(soft_wrap=True)
    chosen = _chosen(spec, exercise)
    listed = read_listing(root / "tests" / "mutants" / f"{spec.name}.toml")
    mutants = {e.name: mutants_of(master.exercise_cell(e.name)) for e in chosen}
    wrong = unfit(listed, (m for made in mutants.values() for m in made), mutants, (e.name for e in spec.exercises))
    counts = _run(console, master, chosen, mutants, listed, sample, jobs or usable_cores())
    ok = report(console, counts, wrong)
    if json_path is not None:
        json_path.write_text(
            json.dumps({"lab": spec.name, "ok": ok, "unfit": wrong, "exercises": [asdict(c) for c in counts]}, indent=1)
            + "\n",
            "utf-8",
        )
    return 0 if ok else 1


def sampled(mutants: Sequence[Mutant], count: int | None, exercise: str) -> list[Mutant]:
    """At most `count` of the mutants, in order; the same ones at every run."""
    if count is None or count >= len(mutants):
        return list(mutants)
    kept = set(random.Random(exercise).sample(range(len(mutants)), max(count, 0)))
    return [mutant for i, mutant in enumerate(mutants) if i in kept]


def report(console: Console, counts: Sequence[Count], wrong: Sequence[str]) -> bool:
    """Print survivors, the table and the verdict; return whether all is well."""
    for count in counts:
        for one in count.survivors:
            console.print(
                f"survived  {one['id']}\n          {one['where']}\n          {one['change']}",
                markup=False,
                highlight=False,
            )
    wrong = [*wrong, *(sentence for count in counts for sentence in count.wrong)]
    sums = [sum(getattr(c, name) for c in counts) for name in ("made", "equivalent", "tried", "rejected")]
    total = Count("all", *sums, survivors=[one for count in counts for one in count.survivors])
    table = Table("exercise", "made", "equivalent", "tried", "rejected", "survived", "share")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for count in [*counts, total]:
        numbers = (count.made, count.equivalent, count.tried, count.rejected, len(count.survivors))
        share = f"{count.share:.1%}" if count.tried else "-"
        table.add_row(count.exercise, *map(str, numbers), count.not_run or share)
    console.print(table)
    if total.share < REJECTED_SHARE:
        wrong.append(
            f"{total.share:.1%} of the mutants are rejected, and at least {REJECTED_SHARE:.0%} have to be: "
            "add cases that tell the survivors from the solution."
        )
    if total.equivalent > EQUIVALENT_SHARE * total.made:
        wrong.append(
            f"{total.equivalent} of {total.made} mutants are listed as equivalent, and at most "
            f"{EQUIVALENT_SHARE:.0%} may be."
        )
    for sentence in wrong:
        console.print(sentence, markup=False, highlight=False)
    return not wrong


def _chosen(lab: Lab, exercise: str | None) -> list[Exercise]:
    if exercise is None:
        return list(lab.exercises)
    if exercise not in {e.name for e in lab.exercises}:
        raise UsageError(
            f"{lab.name} has no exercise {exercise!r}: expected one of {', '.join(e.name for e in lab.exercises)}."
        )
    return [lab.exercise(exercise)]


def _run(
    console: Console,
    master: Master,
    chosen: Sequence[Exercise],
    mutants: Mapping[str, list[Mutant]],
    listed: Mapping[str, Equivalent],
    sample: int | None,
    jobs: int,
) -> list[Count]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads do not survive a fork
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    counts = []
    gc.collect()
    gc.freeze()  # what is here now stays shared with the children: no collection of theirs touches it
    try:
        with (
            tempfile.TemporaryDirectory(prefix="effnlp-mutate-") as folder,
            Progress(*columns, console=console, auto_refresh=False) as progress,
        ):
            for exercise in chosen:
                made = mutants[exercise.name]
                count = Count(exercise.name, len(made), sum(m.id in listed for m in made), not_run=_unable(exercise))
                counts.append(count)
                if count.not_run:
                    continue
                tried = sampled(made, sample, exercise.name)
                task = progress.add_task(exercise.name, total=len(tried))
                solution = solution_source(master.exercise_cell(exercise.name))
                trial = Trial(master.lab.name, exercise, solution, jobs, Path(folder))
                for mutant, outcome in trial.run(tried, frozenset(listed)):
                    _tally(count, mutant, outcome, listed)
                    progress.update(task, advance=1, refresh=True)
                order = {mutant.id: place for place, mutant in enumerate(tried)}
                count.survivors.sort(key=lambda one: order[one["id"]])
                if not console.is_terminal:
                    console.print(f"{count.exercise}: {count.rejected} of {count.tried} rejected", highlight=False)
            return counts
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


def _unable(exercise: Exercise) -> str:
    if exercise.needs_gpu:
        return "needs a GPU"
    return "needs Triton" if exercise.needs_triton and resolve().triton == "absent" else ""


def _tally(count: Count, mutant: Mutant, outcome: Outcome, listed: Mapping[str, Equivalent]) -> None:
    count.tried += 1
    where = f" ({outcome.case})" if outcome.case else ""
    if outcome.broke:
        count.wrong.append(f"{mutant.id}{where}: {outcome.why}")
    if mutant.id in listed:
        if outcome.rejected:
            count.wrong.append(f"{mutant.id} is listed as equivalent, and the check rejects it{where}: {outcome.why}")
    elif outcome.rejected:
        count.rejected += 1
    else:
        count.survivors.append({"id": mutant.id, "where": solution_line(mutant), "change": mutant.change})


def solution_line(mutant: Mutant) -> str:
    """The changed line as the mutant has it."""
    return mutant.source.splitlines()[mutant.line - 1].strip()


def _on_cpu(
    lab: str, exercise: str | None, sample: int | None, jobs: int | None, root: Path, json_path: Path | None
) -> int:
    """The same in a new process that sees no GPU."""
    code = "import sys; from effnlp_lab import mutate; sys.exit(mutate.main_from_json(sys.argv[1]))"
    given = json.dumps([lab, exercise, sample, jobs, str(root), json_path and str(json_path)])
    settings = {**os.environ, "EFFNLP_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", code, given], env=settings, check=False).returncode


def main_from_json(text: str) -> int:
    """`main` with its arguments as JSON, and its exit code for the command line."""
    *given, root, json_path = json.loads(text)
    try:
        return main(*given, root=Path(root), json_path=json_path and Path(json_path))
    except EffnlpError as error:
        print(error, file=sys.stderr)
        return 2
