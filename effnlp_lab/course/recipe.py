"""How the course models are made: every setting, and the stages in their order. `effnlp train-course-models`.

    tokenizer -> shards -> course-base -> course-draft -> figures and model card

Each stage leaves its product in the folder, whole or not at all, and is not done again; training goes on from its last
checkpoint. So the command can be stopped at any moment, and given again.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from effnlp_lab.course.text import text_version
from effnlp_lab.device import Device, resolve
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
FREE = ("compile", "checkpoint_seconds")  # settings that change no product
OF_THE_BASE = ("base", "library_repeats", "seed")  # settings that no earlier stage depends on

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


def make_models(recipe: Recipe, folder: Path, device: Device) -> Path:
    """All stages. Returns the folder of the finished models, `folder`/weights."""
    from effnlp_lab.course import recipe_card, recipe_data, recipe_training

    claim(folder, recipe)
    with stage(folder, "tokenizer"):
        recipe_data.make_tokenizer(recipe, folder, device)
    with stage(folder, "shards"):
        data = recipe_data.make_shards(recipe, folder)
    with stage(folder, "base"):
        recipe_training.make_base(recipe, folder, data, device)
    with stage(folder, "draft"):
        recipe_training.make_draft(recipe, folder, data, device)
    with stage(folder, "figures"):
        figures = recipe_card.measure(recipe, folder, data, device)
    recipe_card.write(recipe, folder, data, device, figures, read_times(folder))
    print(f"Done: {recipe_card.summary(figures)}. The models are in {folder / 'weights'}.", flush=True)
    return folder / "weights"


def run_sweep(which: str, recipe: Recipe, folder: Path, device: Device, seconds: float | None) -> list[dict[str, Any]]:
    """Train each candidate for a short time, print how well it did, and keep the list in `folder`/sweep.json.

    The draft's candidates need the base model, which is made first where it is not there yet.
    """
    from effnlp_lab.course import recipe_data, recipe_training

    claim(folder, recipe)
    with stage(folder, "tokenizer"):
        recipe_data.make_tokenizer(recipe, folder, device)
    with stage(folder, "shards"):
        data = recipe_data.make_shards(recipe, folder)
    if which == "draft":
        with stage(folder, "base"):
            recipe_training.make_base(recipe, folder, data, device)
    found = []
    for changes in SWEEPS[which]:
        candidate = recipe
        for name, value in changes.items():
            candidate = with_setting(candidate, name, value)
        model = getattr(candidate, which)
        if seconds is not None or model.seconds:
            candidate = replace(candidate, **{which: replace(model, seconds=seconds or SWEEP_SECONDS, steps=0)})
        row = {"changes": changes, **recipe_training.try_out(which, candidate, folder, data, device)}
        found.append(row)
        said = ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                         for name, value in changes.items())  # fmt: skip
        print(f"{which}, {said or 'as in the recipe'}: {row['said']}", flush=True)
        write_json(folder / "sweep.json", found)
    return found


def claim(folder: Path, recipe: Recipe) -> None:
    """Note in the folder what it is for. Raises UsageError when it holds products of other settings, or of other text.

    Settings of a stage that has not begun may still change: `recipe.json` follows.
    """
    wanted = {"recipe": json.loads(json.dumps(asdict(recipe))), "text": text_version("course-train")}
    path = folder / "recipe.json"
    if path.exists():
        held = read_json(path)
        for name, value in wanted["recipe"].items():
            if held["recipe"].get(name) != value and _begun(folder, name):
                raise UsageError(
                    f"{folder} was begun with other settings ({name} differs): give the same ones to go on, or another "
                    "--folder to start anew."
                )
        if held["text"] != wanted["text"]:
            raise UsageError(
                f"{folder} was begun on other text ({held['text']}; here it is {wanted['text']}): go on there, or give "
                "another --folder."
            )
    write_json(path, wanted)


def _begun(folder: Path, setting: str) -> bool:
    """Whether a stage that depends on this setting has begun."""
    if setting in FREE:
        return False
    if setting == "draft":
        return (folder / "draft").exists() or (folder / "draft.json").exists()
    return setting not in OF_THE_BASE or (folder / "base").exists() or (folder / "base.json").exists()


@contextmanager
def stage(folder: Path, name: str) -> Iterator[None]:
    """Say which stage runs, and add its time to `times.json`, also when it is interrupted."""
    print(f"{name} ...", flush=True)
    begin = time.perf_counter()
    try:
        yield
    finally:
        times = read_times(folder)
        times[name] = round(times.get(name, 0.0) + time.perf_counter() - begin, 2)
        write_json(folder / "times.json", times)
    print(f"{name}: {times[name]:.1f} s so far", flush=True)


def read_times(folder: Path) -> dict[str, float]:
    """Wall-clock seconds of each stage, all calls together."""
    path = folder / "times.json"
    return read_json(path) if path.exists() else {}


def read_json(path: Path) -> Any:
    """Raises UsageError for a file that is missing or holds no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing: bring the whole folder, or give another to start anew.") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}): remove the folder to start anew.") from None


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    from effnlp_lab.streaming.shards import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")


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
