"""The recipe's last stage: what the finished models are worth, the model card, and the log of the training."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.course.models import WEIGHTS_FILE, load_model
from effnlp_lab.course.recipe.data import LIBRARY, CourseData, heldout_rows
from effnlp_lab.course.recipe.folder import read_json, write_json
from effnlp_lab.course.recipe.losses import acceptance, next_token_nll
from effnlp_lab.course.recipe.settings import END_OF_TEXT, PAD, ModelRecipe, Recipe
from effnlp_lab.course.recipe.training import NAMES
from effnlp_lab.course.text import load_text, text_version
from effnlp_lab.device import Device
from effnlp_lab.streaming.shards import write_atomically

LOG, CARD = "training.json", "README.md"
MEASURE_ROWS = 16
VERSIONS = ("torch", "transformers", "triton", "numpy")


@torch.no_grad()
def measure(recipe: Recipe, folder: Path, data: CourseData, device: Device) -> dict[str, Any]:
    """The held-out figures of the finished models, from their files, in float32.

    Perplexity: exp of the mean negative log-likelihood of a token, documents cut into rows as `heldout_rows` says. For
    course-base also in shorter rows, on the English text, and for each document, so that it can be measured again.
    """
    models = {which: load_model(folder / "weights" / name, device=device, dtype=torch.float32)
              for which, name in NAMES.items()}  # fmt: skip
    rows, owners = heldout_rows(data, recipe.context)
    nll: dict[str, list[float]] = {which: [] for which in models}
    accepted: list[float] = []
    agreed = 0.0
    for batch in rows.split(MEASURE_ROWS):
        ids, counted = batch.to(device.torch), (batch[:, 1:] != data.pad).to(device.torch)
        logits = {which: model(input_ids=ids[:, :-1]).logits for which, model in models.items()}
        for which, found in logits.items():
            nll[which] += row_nll(found, ids[:, 1:], data.pad)
        accepted += (acceptance(logits["base"], logits["draft"]).double() * counted).sum(1).tolist()
        agreed += float(((logits["base"].argmax(-1) == logits["draft"].argmax(-1)) * counted).sum())
    tokens = int((rows[:, 1:] != data.pad).sum())
    figures: dict[str, Any] = {
        "python": platform.python_version(), "text": text_version("course-heldout"), "context": recipe.context,
        "tokens": tokens, "bytes": data.heldout_bytes,
        "acceptance": sum(accepted) / tokens, "same_best_token": agreed / tokens,
    }  # fmt: skip
    for which, name in NAMES.items():
        total = sum(nll[which])
        figures[name] = {
            "parameters": sum(p.numel() for p in models[which].parameters()),
            "perplexity": math.exp(total / tokens), "bits_per_byte": total / math.log(2) / data.heldout_bytes,
        }  # fmt: skip
    base = figures[NAMES["base"]]
    base["perplexity_by_context"] = {
        context: _perplexity(models["base"], heldout_rows(data, context)[0], data.pad)
        for context in (recipe.context, recipe.context // 2, recipe.context // 4)
    }
    base["english_perplexity"] = _perplexity(models["base"], _english_rows(recipe, data), data.pad)
    figures["documents"] = _by_document(data, owners, nll=nll["base"], accepted=accepted)
    return figures


def row_nll(logits: Tensor, targets: Tensor, pad: int) -> list[float]:
    """The summed negative log-likelihood of each row in nats, <|pad|> left out. logits [rows, length, vocabulary]."""
    losses = next_token_nll(logits.flatten(0, 1), targets.flatten()).view(targets.shape)
    return (losses.double() * (targets != pad)).sum(1).tolist()


def write(
    recipe: Recipe, folder: Path, data: CourseData, device: Device, figures: dict[str, Any], times: dict[str, float]
) -> None:
    """Write the log, training.json, and the model card, README.md, beside the models."""
    weights = folder / "weights"
    shards = {"library": data.library, "packages": data.packages, "heldout": data.heldout}
    content = {
        "recipe": asdict(recipe), "text": text_version("course-train"), "sources": data.sources,
        "licences": {name: _licence(name) for name in data.sources},
        "tokens": {name: held.tokens for name, held in shards.items() if held is not None},
        "machine": machine(device), "seconds": times, "figures": figures,
        "curves": {which: read_json(folder / f"{which}.json") for which in NAMES},
        "sha256": {name: _sha256(weights / name / WEIGHTS_FILE) for name in NAMES.values()},
    }  # fmt: skip
    write_json(weights / LOG, content)
    write_atomically(weights / CARD, card(recipe, content))


def machine(device: Device) -> dict[str, Any]:
    """What the models were made on."""
    versions = {name: _version(name) for name in VERSIONS}
    return {"device": device.name, "python": platform.python_version(), **versions}


def summary(figures: dict[str, Any]) -> str:
    """The figures that matter, in one line."""
    base, draft = (figures[name] for name in NAMES.values())
    return (f"held-out perplexity {base['perplexity']:.2f} (base) and {draft['perplexity']:.2f} (draft), acceptance "
            f"{figures['acceptance']:.3f}, on Python {figures['python']}'s library")  # fmt: skip


def card(recipe: Recipe, log: dict[str, Any]) -> str:
    """The model card, from the log."""
    begin = "---\nlanguage: code\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-generation\n---"
    blocks = [
        begin, "# course-base and course-draft", *_introduction(recipe, log), "## Use", *_use(recipe),
        "## Data", *_data(recipe, log), "## Training", *_training(recipe, log),
        "## Held-out figures", *_held_out(recipe, log), "## Limits", _paragraph(LIMITS),
        "## Licence", _paragraph(LICENCE),
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


LIMITS = """The models continue Python source in the style of well-known packages, and may repeat passages of it. They
know
little English beyond comments, no other language, and no facts to rely on. What they write is not to be executed
unread.
They are made for teaching."""
LICENCE = """Apache-2.0, as far as the makers of the kit hold rights. The text that they were trained on is under the
licences named above; whoever uses passages that a model repeats is bound by those."""


def _introduction(recipe: Recipe, log: dict[str, Any]) -> list[str]:
    figures = log["figures"]
    base, draft = (figures[name] for name in NAMES.values())
    trial = "These were made by a small trial run of the recipe: they show that it works, and model nothing."
    return [
        _paragraph("""Two small causal language models of Python source, for the labs: large enough that quantization,
            adapters, speculative decoding and the rest show what they do, small enough for a laptop's CPU. Made by
            `effnlp
            train-course-models`."""),
        *([_paragraph(trial)] if recipe.vocabulary < 4096 else []),
        _table(
            ("", "course-base", "course-draft"),
            ("parameters", f"{base['parameters']:,}", f"{draft['parameters']:,}"),
            ("layers, hidden, heads (key-value heads), MLP", _shape(recipe.base), _shape(recipe.draft)),
            ("held-out perplexity of a token", f"{base['perplexity']:.2f}", f"{draft['perplexity']:.2f}"),
            ("held-out bits per byte", f"{base['bits_per_byte']:.3f}", f"{draft['bits_per_byte']:.3f}"),
            ("accepted by course-base at temperature 1", "", f"{figures['acceptance']:.3f}"),
            ("same most likely token as course-base", "", f"{figures['same_best_token']:.3f}"),
        ),
        _paragraph(f"""Architecture: Llama, with biases in attention and MLP and tied embeddings; context
            {recipe.context};
            bfloat16. The tokenizer, the same for both, is byte-level BPE with {recipe.vocabulary:,} tokens,
            `{END_OF_TEXT}` and `{PAD}` among them."""),
    ]  # fmt: skip


def _use(recipe: Recipe) -> list[str]:
    return [
        "    from effnlp_lab.course.models import load_model, load_tokenizer\n"
        '    model, tokenizer = load_model("course-base"), load_tokenizer("course-base")',
        _paragraph(f"""or `LlamaForCausalLM.from_pretrained(folder)` and `AutoTokenizer.from_pretrained(folder)`.
            Begin a text
            with `{END_OF_TEXT}`; the tokenizer does not add it."""),
    ]


def _data(recipe: Recipe, log: dict[str, Any]) -> list[str]:
    tokens = sum(count for name, count in log["tokens"].items() if name != "heldout")
    rows = ((name, f"{size:,}", log["licences"][name]) for name, size in log["sources"].items())
    return [
        _paragraph(f"""Python source that was installed on the machine that trained them, and nothing else:
            {log['text']}.
            In all {sum(log['sources'].values()):,} bytes, {tokens:,} tokens:"""),
        _table(("source", "bytes", "licence, as the package states it"), *rows),
        _paragraph(f"""An epoch has the packages once and the standard library {recipe.library_repeats} times. Left
            out: one
            module of the standard library in eight, by a hash of its name, as held-out text; and every training file
            that
            shares more than a tenth of its lines of 40 or more characters with held-out text, since packages carry
            copies of
            library modules."""),
    ]


def _training(recipe: Recipe, log: dict[str, Any]) -> list[str]:
    where, seconds = log["machine"], log["seconds"]
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return [
        _paragraph(f"course-base: {_run(recipe.base, log['curves']['base'], recipe)}"),
        _paragraph(f"""course-draft: distilled from course-base on the same text; the loss goes from the forward
            Kullback-Leibler divergence to the total variation over the first {recipe.draft.kl_until:.0%} of the steps.
            {_run(recipe.draft, log['curves']['draft'], recipe)}"""),
        _paragraph(f"""On {where['device']} with Python {where['python']}, torch {where['torch']}, transformers
            {where['transformers']}: {times}; {sum(seconds.values()):.0f} s in all. Every setting and the curves are in
            `{LOG}`."""),
    ]  # fmt: skip


def _held_out(recipe: Recipe, log: dict[str, Any]) -> list[str]:
    figures = log["figures"]
    base = figures[NAMES["base"]]
    contexts = ", ".join(f"{value:.2f} with rows of {name}" for name, value in base["perplexity_by_context"].items())
    return [
        _paragraph(f"""On Python {figures['python']}'s standard library: {figures['tokens']:,} tokens of
            {figures['bytes']:,} bytes, each document for itself, begun with `{END_OF_TEXT}` and cut into rows of
            {recipe.context} tokens that do not see each other; weights as stored, computed in float32. The library
            differs
            between Python versions, and so do figures."""),
        _paragraph(f"""course-base: perplexity {contexts}; on the English of Python's language reference, which it was
            not
            trained on, {base['english_perplexity']:.1f}."""),
        _paragraph(f"""The weights kept are the best of about {recipe.base.evaluations} evaluations on this same
            held-out
            text, so that the figures are slightly optimistic."""),
    ]


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)


def _table(*rows: tuple[str, ...]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _shape(shape: ModelRecipe) -> str:
    return f"{shape.layers}, {shape.hidden}, {shape.heads} ({shape.kv_heads}), {shape.mlp}"


def _run(shape: ModelRecipe, curve: dict[str, Any], recipe: Recipe) -> str:
    optimizer = "Muon (AdamW for embeddings, norms and biases)" if shape.optimizer == "muon" else "AdamW"
    return (
        f"{optimizer}, learning rate {shape.learning_rate:g}, weight decay {shape.weight_decay:g}, dropout "
        f"{shape.dropout:g}, {curve['steps']:,} steps of {shape.rows} rows of {recipe.context} tokens "
        f"({curve['tokens'] / 1e6:,.1f} million tokens in "
        f"{curve['training_seconds']:.0f} s), warm-up over {shape.warmup:.0%} and decay to zero over the last "
        f"{shape.decay:.0%} of the steps, best at step {curve['best_step']:,}."
    )


def _licence(source: str) -> str:
    """What a package's metadata say; one line."""
    if source == LIBRARY:
        return "PSF-2.0"
    try:
        found = importlib.metadata.metadata(source)
    except importlib.metadata.PackageNotFoundError:
        return "not stated"
    named = [line.rpartition(" :: ")[2] for line in found.get_all("Classifier") or () if line.startswith("License ::")]
    stated = found.get("License-Expression") or ", ".join(named) or found.get("License") or "not stated"
    return stated.strip().splitlines()[0][:80].replace("|", "/")


def _perplexity(model: torch.nn.Module, rows: Tensor, pad: int) -> float:
    total = 0.0
    for batch in rows.split(MEASURE_ROWS):
        ids = batch.to(model.device)
        total += sum(row_nll(model(input_ids=ids[:, :-1]).logits, ids[:, 1:], pad))
    return math.exp(total / int((rows[:, 1:] != pad).sum()))


def _english_rows(recipe: Recipe, data: CourseData) -> Tensor:
    end, size = data.tokenizer.special_tokens[END_OF_TEXT], recipe.context
    ids = [end]
    for text in load_text("course-english", limit_bytes=recipe.heldout_bytes).texts():
        ids += [*data.tokenizer.encode(text, special=False), end]
    ids += [data.pad] * (-(len(ids) - 1) % size)
    return torch.tensor(ids).unfold(0, size + 1, size)


def _by_document(data: CourseData, owners: list[int], **sums: list[float]) -> list[dict[str, Any]]:
    """Name, SHA-256 and tokens of each held-out document (no SHA-256 where it was cut short), and its rows' sums."""
    texts = {document.name: document.text for document in load_text("course-heldout")}
    found = []
    for number, name in enumerate(data.heldout_names):
        ids = data.heldout.document(number)
        whole = data.tokenizer.decode(ids[1:-1]) == texts[name]
        digest = hashlib.sha256(texts[name].encode()).hexdigest() if whole else None
        totals = {kind: round(sum(value for value, owner in zip(values, owners, strict=True) if owner == number), 3)
                  for kind, values in sums.items()}  # fmt: skip
        found.append({"name": name, "sha256": digest, "tokens": len(ids) - 1, **totals})
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
