"""The training loop: accumulation, autocast, clipping, evaluation, checkpoints, and exact resumption.

A run that is killed and started again goes on from its last checkpoint, and its losses are those of an undisturbed run,
bit for bit on the same machine: weights, optimizer, scaler, random states and the place in the data are all kept. The
loop reads nothing from the device between two log points.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effnlp_lab.errors import UsageError
from effnlp_lab.training.accumulation import LossFunction, accumulate, causal_lm_loss, divide_gradients
from effnlp_lab.training.figures import Figures, TrainingResult
from effnlp_lab.training.interruption import finish_the_step
from effnlp_lab.training.loss_scaling import LossScaler
from effnlp_lab.training.schedule import Schedule
from effnlp_lab.training.storage import RunFolder, check_same_model
from effnlp_lab.training.stream import BatchStream, check_batch, random_state, set_random_state, to_device


class Trainer:
    """Trains `model` in place. `Trainer(model, batches, optimizer, steps=1000, folder="runs/a").run()`.

    model: any nn.Module, on its device. batches: an iterable of dicts of tensors, one micro-batch each, read again when
    it ends (its `state_dict` / `load_state_dict` are used where it has both). optimizer: any torch.optim.Optimizer over
    the model's parameters; schedule: step -> factor of its learning rates (`cosine_with_warmup`). loss: (model, batch)
    -> (sum of losses, number of tokens).

    A step takes `accumulation` micro-batches. autocast: None, torch.bfloat16, or torch.float16, which scales the loss.
    clip_norm: the largest norm of the gradient, or None. compile: True, or the arguments of torch.compile. held_out:
    an iterable of batches, evaluated every `evaluate_every` steps and at the end; the best weights are kept. folder:
    where `checkpoint.json`, `best.json` and `log.jsonl` go; without one nothing is kept. A checkpoint is written every
    `checkpoint_every` steps or `checkpoint_seconds` seconds, at the end, and when interrupted. on_log: called with
    each line of the log.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        folder: str | Path | None = None,
        loss: LossFunction = causal_lm_loss,
        schedule: Schedule | None = None,
        accumulation: int = 1,
        autocast: torch.dtype | None = None,
        clip_norm: float | None = 1.0,
        compile: bool | Mapping[str, Any] = False,
        held_out: Iterable[Mapping[str, Any]] | None = None,
        evaluate_every: int | None = None,
        checkpoint_every: int | None = None,
        checkpoint_seconds: float | None = None,
        log_every: int = 10,
        progress: bool = True,
        on_log: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Raises UsageError for numbers below 1, an unknown autocast dtype, and parameters on several devices."""
        _check_numbers(
            steps=steps, accumulation=accumulation, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every,
            checkpoint_seconds=checkpoint_seconds, log_every=log_every, clip_norm=clip_norm,
        )  # fmt: skip
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise UsageError(f"autocast is {autocast}: expected None, torch.bfloat16 or torch.float16.")
        if evaluate_every is not None and held_out is None:
            raise UsageError("evaluate_every needs held_out: the batches to evaluate on.")
        if (checkpoint_every is not None or checkpoint_seconds is not None) and folder is None:
            raise UsageError("Checkpoints need a folder to be written to: pass folder=...")
        self.model, self.optimizer, self.loss, self.schedule = model, optimizer, loss, schedule
        self.device = _device_of(model)
        self.stream = BatchStream(batches, self.device)
        self.held_out, self.evaluate_every = held_out, evaluate_every
        self.steps, self.accumulation, self.autocast, self.clip_norm = steps, accumulation, autocast, clip_norm
        self.checkpoint_every, self.checkpoint_seconds, self.log_every = checkpoint_every, checkpoint_seconds, log_every
        self.folder = None if folder is None else RunFolder(folder)
        self.progress, self.on_log = progress, on_log
        self.scaler = LossScaler() if autocast == torch.float16 else None
        self.result = TrainingResult()
        self._forward = torch.compile(model, **({} if compile is True else dict(compile))) if compile else model
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            if schedule is not None and group["lr"] is None:
                raise UsageError("This optimizer sets its own learning rate (lr=None): give it one, or no schedule.")
            group.setdefault("initial_lr", group["lr"])  # what the schedule multiplies, as in torch's own
        self._figures = Figures(self.device)
        self._clock = self._last_save = time.perf_counter()

    def run(self, *, resume: bool = True) -> TrainingResult:
        """Train up to `steps`, from the folder's checkpoint where there is one and `resume` is true.

        On an interruption (Ctrl-C, the stop button) the running step is finished and saved, what to do is printed, and
        KeyboardInterrupt is raised; a second one stops at once. Raises UsageError for a loss that is not finite, empty
        batches, labels that are all masked, and a checkpoint that is damaged or of another model.
        """
        if self.folder is not None:
            if resume:
                self._resume()
            else:
                self.folder.clear()
        self._figures.clear()
        training = self.model.training
        self.model.train()
        self._clock = self._last_save = time.perf_counter()
        try:
            with finish_the_step() as stop, self._bar() as bar:
                while self.result.step < self.steps:
                    self._step()
                    bar.update(1)
                    self._after_step(bar, last=self.result.step == self.steps)
                    if stop.asked:
                        self._interrupted()
        finally:
            self.model.train(training)
        return self.result

    def evaluate(self, batches: Iterable[Mapping[str, Any]] | None = None) -> float:
        """The mean loss of a token over `held_out`, or other batches, without dropout. Random states are kept."""
        batches = self.held_out if batches is None else batches
        if batches is None:
            raise UsageError("There is nothing to evaluate on: pass batches, or held_out when the trainer is made.")
        if hasattr(batches, "__next__"):
            raise UsageError("held_out is an iterator and can be read only once: give a list or a DataLoader.")
        training, state = self.model.training, random_state()
        self.model.eval()
        total, count = 0.0, 0
        try:
            with torch.no_grad():
                for batch in batches:
                    batch = to_device(check_batch(batch), self.device)
                    loss_sum, tokens = self._loss_under_autocast(self._forward, batch)
                    total, count = total + loss_sum.float(), count + tokens
        finally:
            self.model.train(training)
            set_random_state(state)
        if int(count) == 0:
            raise UsageError("The held-out batches have no token to predict: are they empty, or all labels masked?")
        return float(total) / int(count)

    def load_best(self) -> int:
        """Load the weights with the lowest held-out loss into the model. Returns their step."""
        content = None if self.folder is None else self.folder.load("best")
        if content is None:
            raise UsageError("There are no best weights: they are kept when held_out and folder are given.")
        check_same_model(content["model"], self.model, self.folder.path / "best.json")
        self.model.load_state_dict(content["model"])
        return content["step"]

    # One step.

    def _step(self) -> None:
        step = self.result.step
        if self.schedule is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.schedule(step)
        self.optimizer.zero_grad(set_to_none=True)
        first = self.stream.next()
        micro_batches = chain([first], (self.stream.next() for _ in range(self.accumulation - 1)))
        expected = _size(first) * self.accumulation if self.scaler else 1.0  # keeps float16 gradients near their mean
        weight = (self.scaler.factor if self.scaler else 1.0) / expected
        totals = accumulate(self._forward, micro_batches, self._loss_under_autocast, weight=weight)
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        divide_gradients(self._parameters, totals.count.clamp(min=1) / expected)
        norm = None
        if self.clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.clip_norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.result.step += 1
        self._figures.add(self.result.step, totals, norm, self.optimizer.param_groups[0]["lr"])

    def _after_step(self, bar: Any, last: bool) -> None:
        """Log, evaluate and save, each when it is due."""
        step = self.result.step
        save = self.folder is not None and (last or self._due(step, self.checkpoint_every) or self._late())
        evaluate = self.held_out is not None and (last or self._due(step, self.evaluate_every))
        if save or evaluate or last or len(self._figures) >= self.log_every:
            self._flush(bar)
        if evaluate:
            self._evaluate_now()
        if save:
            self._save()
        if save or evaluate:
            self._clock = time.perf_counter()  # neither counts as training

    def _due(self, step: int, every: int | None) -> bool:
        return every is not None and step % every == 0

    def _late(self) -> bool:
        waited = time.perf_counter() - self._last_save
        return self.checkpoint_seconds is not None and waited >= self.checkpoint_seconds

    def _flush(self, bar: Any = None) -> None:
        """Read the figures of the steps since the last log point: the one place where the host waits for the device."""
        if not self._figures:
            return
        kept = self.folder.step_of("checkpoint") if self.folder else None
        lines = self._figures.read(f"the checkpoint of step {kept} is from before it" if kept else "nothing was saved")
        now = time.perf_counter()
        seconds, self._clock = max(now - self._clock, 1e-9), now
        tokens = sum(line["tokens"] for line in lines)
        lines[-1]["tokens_per_second"] = round(tokens / seconds, 1)
        self.result.losses |= {line["step"]: line["loss"] for line in lines}
        self.result.tokens += tokens
        self.result.seconds += seconds
        self._log(lines)
        if bar is not None:
            bar.set_postfix_str(f"loss {lines[-1]['loss']:.4f}, {tokens / seconds:,.0f} tokens/s")

    def _log(self, lines: list[dict[str, Any]]) -> None:
        if self.folder is not None:
            self.folder.append_log(lines)
        for line in lines if self.on_log is not None else ():
            self.on_log(line)

    def _evaluate_now(self) -> None:
        step, loss = self.result.step, self.evaluate()
        self.result.evaluations[step] = loss
        self._log([{"step": step, "held_out_loss": loss}])
        if loss < self.result.best_loss:
            self.result.best_loss, self.result.best_step = loss, step
            if self.folder is not None:
                self.folder.save("best", step, {"model": self.model.state_dict(), "step": step, "loss": loss})

    # Saving and going on.

    def _save(self) -> None:
        if not all(torch.stack([p.detach().isfinite().all() for p in self._parameters]).tolist()):
            raise UsageError(
                f"A parameter is not finite after step {self.result.step}, so no checkpoint was written: try a lower "
                "learning rate, a longer warm-up or clip_norm=1.0."
            )
        self.folder.save("checkpoint", self.result.step, {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": type(self.optimizer).__name__,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "stream": self.stream.state_dict(),
            "random": random_state(),
            "result": asdict(self.result),
        })  # fmt: skip
        self._last_save = time.perf_counter()

    def _resume(self) -> None:
        content = self.folder.load("checkpoint")
        if content is None:
            return
        where = self.folder.path / "checkpoint.json"
        check_same_model(content["model"], self.model, where)
        if content["optimizer_name"] != type(self.optimizer).__name__:
            raise UsageError(
                f"{where} was made with {content['optimizer_name']} and this run has {type(self.optimizer).__name__}: "
                "use the same optimizer, or another folder."
            )
        if (content["scaler"] is None) != (self.scaler is None):
            raise UsageError(f"{where} was made with another autocast dtype: use the same, or another folder.")
        self.model.load_state_dict(content["model"])
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except ValueError as error:
            raise UsageError(f"{where} has other parameter groups than this run's optimizer: {error}.") from None
        if self.scaler:
            self.scaler.load_state_dict(content["scaler"])
        self.stream.load_state_dict(content["stream"])
        set_random_state(content["random"])
        self.result = TrainingResult(**content["result"])
        self.folder.cut_log(self.result.step)

    def _interrupted(self) -> None:
        self._flush()
        if self.folder is None:
            said = "No folder was given, so nothing was saved; the model keeps its weights."
        else:
            if self.folder.step_of("checkpoint") != self.result.step:
                self._save()
            said = f"Saved in {self.folder.path}. Run the same again to go on from there."
        raise KeyboardInterrupt(f"Stopped after step {self.result.step} of {self.steps}. {said}")

    def _loss_under_autocast(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | int]:
        """The forward alone: backward repeats its dtypes by itself, and cast weights are let go with the context."""
        with torch.autocast(self.device.type, dtype=self.autocast) if self.autocast else nullcontext():
            return self.loss(model, batch)

    def _bar(self):
        from tqdm.auto import tqdm

        done = self.result.step
        return tqdm(total=self.steps, initial=done, disable=not self.progress, desc="training", unit="step")


def _check_numbers(**values: float | None) -> None:
    for name, value in values.items():
        least = 0 if name in ("checkpoint_seconds", "clip_norm") else 1
        whole = name not in ("checkpoint_seconds", "clip_norm")
        if value is None:
            continue
        if value < least or value != value or (whole and value != int(value)):
            raise UsageError(f"{name} is {value}: expected {'a whole number of at least 1' if whole else '0 or more'}.")


def _device_of(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "none: it has no parameter"
        raise UsageError(f"The model must be on one device; it is on {found}.")
    return devices.pop()


def _size(batch: Mapping[str, Any]) -> float:
    """About how many tokens a batch has, known without asking the device."""
    return float(next((x.numel() for x in batch.values() if isinstance(x, Tensor)), 1))
