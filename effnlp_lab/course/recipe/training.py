"""The recipe's training stages: the base model on text, the draft on the base model's distributions.

The loop, its checkpoints and its evaluations are `effnlp_lab.training`'s, the batches `effnlp_lab.streaming`'s. What is
here makes a small model train fast: layers compiled one by one (one compilation serves all of them), no mask to look
at (so the host runs ahead of the GPU), and Muon.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from effnlp_lab.course.models import load_model
from effnlp_lab.course.recipe.data import CourseData, heldout_rows, mixture
from effnlp_lab.course.recipe.folder import read_json, write_json
from effnlp_lab.course.recipe.losses import acceptance, distillation
from effnlp_lab.course.recipe.muon import MuonAdamW, parameter_groups
from effnlp_lab.course.recipe.settings import END_OF_TEXT, ModelRecipe, Recipe
from effnlp_lab.device import Device
from effnlp_lab.errors import UsageError
from effnlp_lab.streaming import Prefetcher, StreamLoader
from effnlp_lab.training import Trainer, TrainingResult, warmup_stable_decay

IGNORED = -100
NAMES = {"base": "course-base", "draft": "course-draft"}
WARM_STEPS, TIMED_STEPS = 8, 60  # before the run, to find out how many steps fit in its time
Batch = Mapping[str, Tensor]


def make_base(recipe: Recipe, folder: Path, data: CourseData, device: Device) -> None:
    """Train course-base, unless it is there."""
    _make("base", recipe, folder, data, device, lambda: BaseLoss(data.pad))


def make_draft(recipe: Recipe, folder: Path, data: CourseData, device: Device) -> None:
    """Distil course-draft from course-base, unless it is there."""
    _make("draft", recipe, folder, data, device, partial(_draft_loss, recipe, folder, data, device))


def try_out(which: str, recipe: Recipe, folder: Path, data: CourseData, device: Device) -> dict[str, Any]:
    """Train a candidate from the start and keep nothing but its figures."""
    loss = BaseLoss(data.pad) if which == "base" else _draft_loss(recipe, folder, data, device)
    _, result, _ = _train(which, recipe, None, data, device, loss)
    said = _said(which, result.best_loss)
    return {
        "acceptance" if which == "draft" else "perplexity": _readable(which, result.best_loss),
        "steps": result.step, "best_step": result.best_step, "tokens_per_second": round(result.tokens_per_second),
        "said": f"{said} (step {result.best_step} of {result.step}, {result.tokens_per_second:,.0f} tokens/s)",
    }  # fmt: skip


def build_model(recipe: Recipe, shape: ModelRecipe, data: CourseData) -> LlamaForCausalLM:
    """A model with random weights, on the CPU, in float32; the same for the same seed."""
    torch.manual_seed(recipe.seed)
    special = data.tokenizer.special_tokens
    config = LlamaConfig(
        vocab_size=data.tokenizer.vocab_size, hidden_size=shape.hidden, intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=recipe.context, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
        bos_token_id=special[END_OF_TEXT], eos_token_id=special[END_OF_TEXT], pad_token_id=data.pad,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # what is added to the residual stream starts small: Radford et al. 2019, section 2.3
        for layer in model.model.layers:
            for added in (layer.self_attn.o_proj, layer.mlp.down_proj):
                added.weight.div_(math.sqrt(2 * shape.layers))
    return model


def hidden_states(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """What `model.model` computes for whole rows without padding: [rows, length] -> [rows, length, hidden].

    Its own forward looks at the positions to find packed sequences, and so makes the host wait for the GPU each time.
    """
    body = model.model
    hidden = body.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotations = body.rotary_emb(hidden, position_ids=positions)
    for layer in body.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotations)
    return body.norm(hidden)


class BaseLoss:
    """Cross-entropy of the next token: (model, {"input_ids": [rows, context + 1]}) -> (sum, count)."""

    def __init__(self, pad: int) -> None:
        self.pad, self.compiled = pad, False

    def at(self, share: float) -> None:
        """The loss is the same all along."""

    def __call__(self, model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"]
        targets = ids[:, 1:].masked_fill(ids[:, 1:] == self.pad, IGNORED)
        head = _compiled(_cross_entropy) if self.compiled else _cross_entropy
        return head(hidden_states(model, ids[:, :-1]), model.lm_head.weight, targets), (targets != IGNORED).sum()


class DraftLoss:
    """Distillation from `base` while training; evaluated, 1 - acceptance, which makes the best what is accepted most.

    The share of KL falls from 1 to 0 while the share of steps that are done rises to `kl_until`.
    """

    def __init__(self, base: LlamaForCausalLM, pad: int, kl_until: float) -> None:
        self.base, self.pad, self.kl_until, self.kl_share, self.compiled = base, pad, kl_until, 1.0, False

    def at(self, share: float) -> None:
        """`share` of the steps are done."""
        self.kl_share = max(0.0, 1 - share / self.kl_until) if self.kl_until else 0.0

    def __call__(self, model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"]
        counted = ids[:, 1:] != self.pad
        with torch.no_grad():
            known = hidden_states(self.base, ids[:, :-1])
        share = torch.full((), self.kl_share, device=ids.device)
        function = _distillation if model.training else _refusals
        head = _compiled(function) if self.compiled else function
        found = hidden_states(model, ids[:, :-1])
        return head(known, self.base.lm_head.weight, found, model.lm_head.weight, counted, share), counted.sum()


def _cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _distillation(known: Tensor, base: Tensor, found: Tensor, draft: Tensor, counted: Tensor, share: Tensor) -> Tensor:
    losses = distillation(F.linear(known, base), F.linear(found, draft), share)
    return (losses * counted).sum()


def _refusals(known: Tensor, base: Tensor, found: Tensor, draft: Tensor, counted: Tensor, _: Tensor) -> Tensor:
    return ((1 - acceptance(F.linear(known, base), F.linear(found, draft))) * counted).sum()


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def _draft_loss(recipe: Recipe, folder: Path, data: CourseData, device: Device) -> DraftLoss:
    base = load_model(folder / "weights" / NAMES["base"], device=device, attn_implementation="sdpa")
    return DraftLoss(base.requires_grad_(False), data.pad, recipe.draft.kl_until)


def _make(which: str, recipe: Recipe, folder: Path, data: CourseData, device: Device, loss: Callable[[], Any]) -> None:
    target = folder / "weights" / NAMES[which]
    if target.exists():
        return
    model, result, trainer = _train(which, recipe, folder / which, data, device, loss())
    trainer.load_best()
    curve = {
        "steps": result.step, "best_step": result.best_step, "training_seconds": round(result.seconds, 1),
        "tokens": result.tokens, "tokens_per_second": round(result.tokens_per_second),
        "loss": _thinned(result.losses),
        "held_out": {step: round(_readable(which, loss), 4) for step, loss in result.evaluations.items()},
        "held_out_is": "perplexity" if which == "base" else "acceptance",
    }  # fmt: skip
    write_json(folder / f"{which}.json", curve)
    save_model(model, target, folder / "tokenizer")  # last: where it is, all of this stage is
    print(f"{NAMES[which]}: {_said(which, result.best_loss)} at step {result.best_step} of {result.step}", flush=True)


def _train(
    which: str, recipe: Recipe, folder: Path | None, data: CourseData, device: Device, loss: BaseLoss | DraftLoss
) -> tuple[LlamaForCausalLM, TrainingResult, Trainer]:
    """Train one model to the end of its steps, from `folder`'s checkpoint where there is one."""
    shape: ModelRecipe = getattr(recipe, which)
    model = build_model(recipe, shape, data).to(device.torch)
    add_dropout(model, shape.dropout)
    if device.kind == "cuda" and recipe.compile:
        _compile(model, loss, recipe, shape, device.dtype)
    held_out = _batches_of(heldout_rows(data, recipe.context)[0], shape.rows, data.pad)
    loader = StreamLoader(mixture(recipe, data), shape.rows, seed=recipe.seed, remainder="drop")
    with closing(Prefetcher(loader, device.torch, depth=4)) as batches:
        start = batches.state_dict()
        arrange = partial(_trainer, which, recipe, model, batches, device, loss, held_out)
        steps = _steps(shape, folder, model, batches, arrange)
        batches.load_state_dict(start)
        torch.manual_seed(recipe.seed)
        trainer = arrange(steps, folder)
        result = trainer.run()
    return model, result, trainer


def _trainer(
    which: str, recipe: Recipe, model: LlamaForCausalLM, batches: Any, device: Device, loss: BaseLoss | DraftLoss,
    held_out: list[Batch], steps: int, folder: Path | None, timing: bool = False,
) -> Trainer:  # fmt: skip
    """`timing`: for a run that only finds out how long a step takes, and says nothing."""
    shape: ModelRecipe = getattr(recipe, which)
    warmup = min(steps // 2, max(1, round(shape.warmup * steps)))

    def measured(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss.at(trainer.result.step / steps)
        return loss(model, batch)

    def say(line: dict[str, Any]) -> None:
        if "held_out_loss" in line:
            print(f"{which}, step {line['step']} of {steps}: {_said(which, line['held_out_loss'])}", flush=True)

    trainer = Trainer(
        model, batches, _optimizer(model, shape), steps=steps, folder=folder, loss=measured,
        schedule=warmup_stable_decay(warmup, steps, min(steps - warmup, round(shape.decay * steps))),
        autocast=None if device.dtype == torch.float32 else device.dtype, clip_norm=shape.clip_norm,
        held_out=held_out, evaluate_every=None if timing else max(1, steps // shape.evaluations),
        checkpoint_seconds=None if folder is None else recipe.checkpoint_seconds,
        log_every=50, progress=not timing, on_log=None if timing else say,
    )  # fmt: skip
    return trainer


def _optimizer(model: LlamaForCausalLM, shape: ModelRecipe) -> torch.optim.Optimizer:
    if shape.optimizer not in ("muon", "adamw"):
        raise UsageError(f"Unknown optimizer {shape.optimizer!r}: expected 'muon' or 'adamw'.")
    groups = parameter_groups(model, muon=shape.optimizer == "muon")
    return MuonAdamW(groups, lr=shape.learning_rate, weight_decay=shape.weight_decay)


def _steps(
    shape: ModelRecipe, folder: Path | None, model: nn.Module, batches: Prefetcher, arrange: Callable[..., Trainer]
) -> int:
    """How many steps the run has: the recipe's, or as many as fit in its seconds here, kept for later calls."""
    if not shape.seconds:
        return shape.steps
    plan = None if folder is None else folder / "plan.json"
    if plan is not None and plan.exists():
        return read_json(plan)["steps"]
    untrained = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        arrange(WARM_STEPS, None, timing=True).run()  # compiles, the evaluation too
        batches.close()
        timed = arrange(TIMED_STEPS, None, timing=True).run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # there is nothing to save yet
    model.load_state_dict(untrained)
    rate = timed.step / timed.seconds
    steps = max(WARM_STEPS, round(shape.seconds * rate))
    if plan is not None:
        write_json(plan, {"steps": steps, "seconds": shape.seconds, "steps_per_second": round(rate, 2)})
    return steps


def add_dropout(model: LlamaForCausalLM, share: float) -> None:
    """Drop `share` of what attention and MLP add to the residual stream, in training (Llama's own code has none)."""
    if share:
        for layer in model.model.layers:
            for added in (layer.self_attn.o_proj, layer.mlp.down_proj):
                added.register_forward_hook(lambda module, _, out: F.dropout(out, share, module.training))


def _compile(
    model: LlamaForCausalLM, loss: BaseLoss | DraftLoss, recipe: Recipe, shape: ModelRecipe, dtype: torch.dtype
) -> None:
    """Compile the layers, alike as they are, once. Where the compiler does not work, say so and train without."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # several shapes and modes share the code of one layer
    models = [model, *([loss.base] if isinstance(loss, DraftLoss) else [])]
    layers = [layer for one in models for layer in one.model.layers]
    begin = time.perf_counter()
    for layer in layers:
        layer.compile(dynamic=False)
    loss.compiled = True
    ids = torch.zeros(shape.rows, recipe.context + 1, dtype=torch.long, device=model.device)
    try:
        with torch.autocast(model.device.type, dtype):
            loss(model.train(), {"input_ids": ids})[0].backward()
        print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    except Exception as error:  # a compiler that is missing or broken raises anything
        print(f"torch.compile does not work here ({type(error).__name__}): training without, about half as fast.")
        for layer in layers:
            layer._compiled_call_impl = None
        loss.compiled = False
    model.zero_grad(set_to_none=True)


def _batches_of(rows: Tensor, size: int, pad: int) -> list[Batch]:
    """Batches of `size` rows each; the last is filled up with rows of <|pad|>, which do not count."""
    missing = -len(rows) % size
    rows = torch.cat([rows, rows.new_full((missing, rows.shape[1]), pad)])
    return [{"input_ids": batch} for batch in rows.split(size)]


def save_model(model: LlamaForCausalLM, target: Path, tokenizer: Path) -> None:
    """Write weights in bfloat16, configuration and tokenizer to `target`, whole or not at all."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(part)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / file, part / file)
    os.replace(part, target)


def _readable(which: str, loss: float) -> float:
    """Perplexity of the base model, acceptance of the draft."""
    return math.exp(min(loss, 80.0)) if which == "base" else 1 - loss


def _said(which: str, loss: float) -> str:
    kind = "perplexity" if which == "base" else "acceptance"
    return f"held-out {kind} {_readable(which, loss):.3f}"


def _thinned(losses: Mapping[int, float], points: int = 200) -> dict[int, float]:
    """At most about `points` of the losses, each the mean of those since the point before."""
    steps = sorted(losses)
    every = max(1, len(steps) // points)
    chunks = [steps[i : i + every] for i in range(0, len(steps), every)]
    return {chunk[-1]: round(sum(losses[s] for s in chunk) / len(chunk), 4) for chunk in chunks}
