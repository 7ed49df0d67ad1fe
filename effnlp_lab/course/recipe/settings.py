"""The recipe's settings: every number that decides what the course models become, and how one is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from effnlp_lab.errors import UsageError

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
FOLDER = Path("build/course-models")


@dataclass(frozen=True)
class ModelRecipe:
    """One model and its training. Shapes are Llama's; `warmup`, `decay` and `kl_until` are shares of all steps."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    seconds: float = 0.0  # of training, from which the steps are computed on the machine at hand; 0: see `steps`
    steps: int = 0
    rows: int = 64  # of `context` tokens, in one step
    optimizer: str = "muon"  # or "adamw"
    learning_rate: float = 6e-3
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    dropout: float = 0.0  # of what each attention and MLP adds
    warmup: float = 0.02
    decay: float = 0.5
    evaluations: int = 24  # on the held-out text; the best weights are kept
    kl_until: float = 0.7  # the draft's loss goes from KL to total variation until here


@dataclass(frozen=True)
class Recipe:
    """Every setting of `effnlp train-course-models`."""

    base: ModelRecipe
    draft: ModelRecipe
    vocabulary: int = 4096
    context: int = 1024
    library_repeats: int = 2  # how often the standard library comes in an epoch, where other packages come once
    text_bytes: int | None = None  # of training text; None: all of it
    heldout_bytes: int | None = None
    compile: bool = True  # on a GPU
    checkpoint_seconds: float = 30.0
    seed: int = 1
    special_tokens: tuple[str, ...] = field(default=(END_OF_TEXT, PAD))


FULL = Recipe(
    base=ModelRecipe(hidden=256, layers=8, heads=4, kv_heads=2, mlp=768, seconds=225, dropout=0.1),
    draft=ModelRecipe(hidden=128, layers=2, heads=4, kv_heads=2, mlp=640, seconds=105, learning_rate=8e-3),
)
TINY = Recipe(  # runs on any CPU in seconds: shows that all of it works, and teaches a model nothing
    base=ModelRecipe(hidden=64, layers=2, heads=2, kv_heads=1, mlp=128, steps=40, rows=8, evaluations=4),
    draft=ModelRecipe(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, steps=30, rows=8, evaluations=3),
    vocabulary=512, context=64, text_bytes=400_000, heldout_bytes=20_000, compile=False, checkpoint_seconds=0.5,
)  # fmt: skip
SIZES = {"full": FULL, "tiny": TINY}

# What `--sweep` tries, each for the same short time; the first is the recipe itself.
SWEEPS: dict[str, tuple[dict[str, Any], ...]] = {
    "base": (
        {},
        {"base.learning_rate": 1.2e-2},
        {"base.rows": 32},
        {"base.optimizer": "adamw", "base.learning_rate": 4e-3},
        {"base.dropout": 0.0},
    ),
    "draft": (
        {},
        {"draft.layers": 3, "draft.mlp": 384},
        {"draft.hidden": 160, "draft.heads": 5, "draft.kv_heads": 1, "draft.mlp": 384},
    ),
}
SWEEP_SECONDS = 40.0


def settle(size: str, settings: Sequence[str] = ()) -> Recipe:
    """The recipe of a size with `settings` ("base.rows=32", "context=512") in place of its own."""
    if size not in SIZES:
        raise UsageError(f"Unknown size {size!r}: choose one of {', '.join(SIZES)}.")
    recipe = SIZES[size]
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign:
            raise UsageError(f"{setting!r} sets nothing: write a name and a value, such as base.learning_rate=0.003.")
        recipe = with_setting(recipe, name.strip(), value.strip())
    return recipe


def with_setting(recipe: Recipe, name: str, value: Any) -> Recipe:
    """The recipe with one setting changed. A value given as text is read as the setting's own type."""
    part, _, inner = name.rpartition(".")
    owner = getattr(recipe, part) if part in ("base", "draft") else recipe
    kinds = get_type_hints(type(owner))
    if (part and owner is recipe) or inner not in kinds or inner in ("base", "draft", "special_tokens"):
        known = [f.name for f in dataclasses.fields(Recipe) if f.name not in ("base", "draft", "special_tokens")]
        inner_names = ", ".join(f.name for f in dataclasses.fields(ModelRecipe))
        raise UsageError(f"There is no setting {name!r}: there are {', '.join(known)}, and for base. and draft. "
                         f"{inner_names}.")  # fmt: skip
    changed = replace(owner, **{inner: _read(name, value, kinds[inner])})
    return replace(recipe, **{part: changed}) if part else changed


def with_seconds(recipe: Recipe, seconds: float | None) -> Recipe:
    """The recipe with so many seconds of training in all, split between the models as before."""
    if seconds is None:
        return recipe
    if not seconds > 0:
        raise UsageError(f"--seconds {seconds} is no time to train: give more than 0.")
    base, draft = recipe.base.seconds or recipe.base.steps, recipe.draft.seconds or recipe.draft.steps
    share = base / (base + draft)
    return replace(
        recipe,
        base=replace(recipe.base, seconds=seconds * share, steps=0),
        draft=replace(recipe.draft, seconds=seconds * (1 - share), steps=0),
    )


def _read(name: str, value: Any, kind: Any) -> Any:
    if not isinstance(value, str) or kind is str:
        return value
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if value.lower() == "none" and kind not in (int, float):
            return None
        return float(value) if kind is float else int(value)
    except (KeyError, ValueError):
        raise UsageError(f"{name} cannot be {value!r}: expected {getattr(kind, '__name__', kind)}.") from None
