"""The stages in their order. `effnlp train-course-models`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from effnlp_lab.course.recipe.folder import claim, read_times, stage, write_json
from effnlp_lab.course.recipe.settings import (
    FOLDER,
    SWEEP_SECONDS,
    SWEEPS,
    Recipe,
    settle,
    with_seconds,
    with_setting,
)
from effnlp_lab.device import Device, resolve
from effnlp_lab.errors import UsageError


def main(
    device: str = "auto",
    folder: str | Path = FOLDER,
    size: str = "full",
    seconds: float | None = None,
    sweep: str | None = None,
    settings: Sequence[str] = (),
) -> int:
    """Make both models in `folder`, or go on where an earlier call stopped. Returns the exit code.

    seconds: of training, base and draft together, in place of the recipe's; with a sweep, of each candidate. settings:
    such as "base.learning_rate=0.003". Raises UsageError for what it does not know, and for a folder of another recipe.
    """
    recipe = settle(size, settings)
    if sweep is not None and sweep not in SWEEPS:
        raise UsageError(f"Unknown sweep {sweep!r}: choose one of {', '.join(SWEEPS)}.")
    try:
        if sweep is None:
            make_models(with_seconds(recipe, seconds), Path(folder), resolve(device))
        else:
            run_sweep(sweep, recipe, Path(folder), resolve(device), seconds)
    except KeyboardInterrupt as stop:
        print(stop if stop.args else "Stopped. The same command goes on from there.", flush=True)
        return 130
    return 0


def make_models(recipe: Recipe, folder: Path, device: Device) -> Path:
    """All stages. Returns the folder of the finished models, `folder`/weights."""
    from effnlp_lab.course.recipe import card, training
    from effnlp_lab.course.recipe import data as texts

    claim(folder, recipe)
    with stage(folder, "tokenizer"):
        texts.make_tokenizer(recipe, folder, device)
    with stage(folder, "shards"):
        data = texts.make_shards(recipe, folder)
    with stage(folder, "base"):
        training.make_base(recipe, folder, data, device)
    with stage(folder, "draft"):
        training.make_draft(recipe, folder, data, device)
    with stage(folder, "figures"):
        figures = card.measure(recipe, folder, data, device)
    card.write(recipe, folder, data, device, figures, read_times(folder))
    print(f"Done: {card.summary(figures)}. The models are in {folder / 'weights'}.", flush=True)
    return folder / "weights"


def run_sweep(which: str, recipe: Recipe, folder: Path, device: Device, seconds: float | None) -> list[dict[str, Any]]:
    """Train each candidate for a short time, print how well it did, and keep the list in `folder`/sweep.json.

    The draft's candidates need the base model, which is made first where it is not there yet.
    """
    from effnlp_lab.course.recipe import data as texts
    from effnlp_lab.course.recipe import training

    claim(folder, recipe)
    with stage(folder, "tokenizer"):
        texts.make_tokenizer(recipe, folder, device)
    with stage(folder, "shards"):
        data = texts.make_shards(recipe, folder)
    if which == "draft":
        with stage(folder, "base"):
            training.make_base(recipe, folder, data, device)
    found = []
    for changes in SWEEPS[which]:
        candidate = recipe
        for name, value in changes.items():
            candidate = with_setting(candidate, name, value)
        model = getattr(candidate, which)
        if seconds is not None or model.seconds:
            candidate = replace(candidate, **{which: replace(model, seconds=seconds or SWEEP_SECONDS, steps=0)})
        row = {"changes": changes, **training.try_out(which, candidate, folder, data, device)}
        found.append(row)
        said = ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                         for name, value in changes.items())  # fmt: skip
        print(f"{which}, {said or 'as in the recipe'}: {row['said']}", flush=True)
        write_json(folder / "sweep.json", found)
    return found
