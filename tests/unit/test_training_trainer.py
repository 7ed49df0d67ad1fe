"""The trainer: exact resumption after SIGKILL and Ctrl-C, what it refuses, and its results beside a plain loop.

This file is also the program that is killed: `python test_training_trainer.py FOLDER WHEN`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from effnlp_lab import training
from effnlp_lab.errors import UsageError
from effnlp_lab.training import storage

ROOT = Path(__file__).parents[2]
STEPS = 14


class Small(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(30, width), nn.Dropout(0.2), nn.Linear(width, 30)

    def forward(self, input_ids):
        return self.head(self.drop(torch.tanh(self.embed(input_ids))))


class Stateful:
    """Batches with a state of their own, as a streaming data set has it: never the same twice."""

    def __init__(self):
        self.count = 0

    def __iter__(self):
        while True:
            self.count += 1
            yield rows(2, seed=self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def rows(count, seed=0, length=7):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 30, (count, length), generator=generator)}


def shuffled():
    """11 examples in batches of 2, shuffled by the global random state: epochs end in the middle of a step."""
    examples = [{"input_ids": row} for row in rows(11)["input_ids"]]
    return DataLoader(examples, batch_size=2, shuffle=True)


def make(folder=None, batches=None, steps=STEPS, optimizer=torch.optim.AdamW, model=None, **options):
    torch.manual_seed(0)
    model = model or Small()
    options = {"accumulation": 2, "log_every": 3, "progress": False} | options
    if folder is not None:
        options = {"checkpoint_every": 4} | options
    schedule = training.cosine_with_warmup(3, STEPS)
    options = {"held_out": [rows(3, seed=99)], "evaluate_every": 5, "schedule": schedule} | options
    batches = shuffled() if batches is None else batches
    return training.Trainer(
        model, batches, optimizer(model.parameters(), lr=0.05), steps=steps, folder=folder, **options
    )


def undisturbed(**options):
    trainer = make(**options)
    return trainer.run(), [p.detach().clone() for p in trainer.model.parameters()]


def assert_same(result, model, expected):
    their_result, their_parameters = expected
    assert result.losses == their_result.losses and len(result.losses) == STEPS
    assert result.evaluations == their_result.evaluations and result.tokens == their_result.tokens
    assert (result.best_step, result.best_loss) == (their_result.best_step, their_result.best_loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), their_parameters, strict=True))


def test_it_is_a_plain_loop_with_torch_alone():
    """Two epochs without shuffling, written out; accumulation against batches of both halves at once."""
    halves = [rows(2, seed=s) for s in range(8)]
    torch.manual_seed(0)
    model = Small()
    model.drop.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, training.cosine_with_warmup(3, STEPS))
    losses = []
    for step in range(STEPS):
        ids = torch.cat([halves[(2 * step + i) % 8]["input_ids"] for i in (0, 1)])
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    torch.manual_seed(0)
    ours = Small()
    ours.drop.p = 0.0
    result = make(model=ours, batches=halves, clip_norm=0.5).run()
    assert list(result.losses.values()) == pytest.approx(losses, rel=1e-4)
    assert result.tokens == STEPS * 4 * 6 and result.tokens_per_second > 0 and result.step == STEPS
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


OPTIMIZERS = {"adamw": torch.optim.AdamW, "8-bit": lambda p, lr: training.AdamW8bit(p, lr=lr, min_8bit_size=64)}


@pytest.mark.parametrize("batches", [shuffled, Stateful])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_in_pieces_is_the_whole(tmp_path, name, batches):
    """Stopped at steps that are no multiples of anything, in a process whose random state is another's."""
    expected = undisturbed(batches=batches(), optimizer=OPTIMIZERS[name])
    for steps in (3, 9, STEPS):
        trainer = make(tmp_path, batches(), steps, OPTIMIZERS[name])
        if steps > 3:
            torch.manual_seed(steps)
        result = trainer.run()
    for step in (3, 9):  # a piece ends with an evaluation of its own
        result.evaluations.pop(step)
    assert result.losses == expected[0].losses and result.evaluations == expected[0].evaluations
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), expected[1], strict=True))


@pytest.mark.parametrize("when", ["in a step", "while writing", "before the index"])
def test_killed_and_started_again(tmp_path, when):
    """SIGKILL: in the middle of a step, half way through writing a checkpoint, before it counts."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(Path(__file__).resolve()), str(tmp_path), when]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    expected = undisturbed()
    trainer = make(tmp_path)
    assert trainer.folder.step_of("checkpoint") == {"in a step": 8, "while writing": 4, "before the index": 4}[when]
    assert_same(trainer.run(), trainer.model, expected)
    steps = [line["step"] for line in trainer.folder.read_log() if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["checkpoint.json", "best.json", "log.jsonl", f"checkpoint-{STEPS:09d}.pt",
         f"best-{trainer.result.best_step:09d}.pt"]
    )  # fmt: skip
    assert make(tmp_path).run().losses == expected[0].losses  # a run that is over is over


def die(folder, when):
    """The program that is killed."""
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if calls == 10 * 2 + 1 + 2 and when == "in a step":  # one call is an evaluation's at step 5, one at step 10
            kill()
        return training.causal_lm_loss(model, batch)

    save, replace, saved = torch.save, os.replace, 0

    def save_half(content, file):
        nonlocal saved
        saved += "optimizer" in content
        save(content, file)
        if saved == 2 and when == "while writing":
            file.flush()
            os.truncate(file.name, 100)
            kill()

    def replace_or_die(source, target):
        if saved == 2 and when == "before the index" and str(target).endswith("checkpoint.json"):
            kill()
        replace(source, target)

    torch.save, os.replace = save_half, replace_or_die
    make(folder, loss=loss).run()


def test_an_interruption_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, capsys):
    expected = undisturbed()

    def interrupt(line):
        if line["step"] == 6 and "loss" in line:
            os.kill(os.getpid(), signal.SIGINT)

    trainer = make(tmp_path, on_log=interrupt, log_every=1)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"Stopped after step 6 of 14. Saved in .* Run the same again"):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is before
    assert "Stopping after this step" in capsys.readouterr().out
    trainer.on_log = None
    assert_same(trainer.run(), trainer.model, expected)  # the same trainer, as a notebook's cell run again
    again = make(tmp_path)
    assert again.run().losses == expected[0].losses


def test_without_a_folder_nothing_is_saved_and_the_run_goes_on_where_it_was():
    trainer = make(on_log=lambda line: os.kill(os.getpid(), signal.SIGINT) if line["step"] == 6 else None)
    with pytest.raises(KeyboardInterrupt, match="nothing was saved"):
        trainer.run()
    trainer.on_log = None
    assert trainer.run().losses == undisturbed()[0].losses


def test_it_runs_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(make().run()))
    thread.start()
    thread.join()
    assert results[0].losses == undisturbed()[0].losses


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast_learns_the_same_and_float16_scales(tmp_path, autocast):
    expected, _ = undisturbed()
    trainer = make(tmp_path, autocast=autocast)
    result = trainer.run()
    assert list(result.losses.values()) == pytest.approx(list(expected.losses.values()), rel=0.02)
    assert (trainer.scaler is not None) == (autocast == torch.float16)
    if trainer.scaler:
        assert trainer.scaler.skipped == 0
        with pytest.raises(UsageError, match="another autocast dtype"):
            make(tmp_path).run()


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    """Every two seconds, by a clock that moves on one second a step."""
    trainer, saved = make(tmp_path, checkpoint_every=None, checkpoint_seconds=2, held_out=None, evaluate_every=None), []
    monkeypatch.setattr("effnlp_lab.training.trainer.time.perf_counter", lambda: float(trainer.result.step))
    monkeypatch.setattr(trainer.folder, "save", lambda name, step, content: saved.append(step))
    assert trainer.run().step == STEPS
    assert saved == [2, 4, 6, 8, 10, 12, 14]


def test_a_state_that_could_not_be_read_again_is_refused_at_once(tmp_path):
    """Before half a night is lost: what has code in it is not loaded from a checkpoint."""

    class Odd(Stateful):
        def state_dict(self):
            return {"count": [1, {"where": Path("a")}]}

    with pytest.raises(UsageError, match=r"checkpoint.stream.own.count.1.where is a PosixPath"):
        make(tmp_path, batches=Odd()).run()


def test_the_best_weights_are_kept(tmp_path):
    trainer = make(tmp_path, batches=[rows(2)], evaluate_every=1)  # learns one batch by heart: held-out loss turns up
    result = trainer.run()
    assert result.best_loss == min(result.evaluations.values()) == result.evaluations[result.best_step]
    assert result.best_step < STEPS
    assert trainer.load_best() == result.best_step
    assert trainer.evaluate() == pytest.approx(result.best_loss, rel=1e-6)
    state = torch.get_rng_state()
    trainer.evaluate()
    assert torch.equal(state, torch.get_rng_state()) and trainer.model.training


def test_nothing_is_read_from_the_device_between_log_points(monkeypatch):
    """The loop itself must not wait for the device: no item(), no tolist(), no bool of a tensor."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        plain = getattr(torch.Tensor, name)

        def counted(self, *args, plain=plain, name=name):
            frame = sys._getframe(1)
            if "effnlp_lab/training" in frame.f_code.co_filename:
                reads.append((name, frame.f_code.co_name))
            return plain(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    trainer = make(steps=12, log_every=6)
    trainer.held_out = None
    trainer.run()
    assert reads == [("tolist", "read")] * 2


def test_compiled(monkeypatch):
    """torch.compile is asked with the given arguments, and what it returns is what runs."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: asked.append(options) or model)
    assert make(compile={"mode": "reduce-overhead"}).run().losses == undisturbed()[0].losses
    make(compile=True)
    assert asked == [{"mode": "reduce-overhead"}, {}]


# What it refuses.


class Bad(nn.Module):
    """The loss of this model is not finite from a step on."""

    def __init__(self, when):
        super().__init__()
        self.inner, self.calls, self.when = Small(), 0, when

    def forward(self, input_ids):
        self.calls += self.training
        return self.inner(input_ids) * (math.nan if self.calls > self.when else 1)


def test_a_loss_that_is_not_finite_says_the_step_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="The loss of step 6 is nan: try a lower.*the checkpoint of step 4 is from"):
        make(tmp_path, model=Bad(10), log_every=100).run()
    trainer = make(tmp_path, model=Bad(100))
    assert trainer.run().step == STEPS
    with pytest.raises(UsageError, match="The loss of step 1 is nan.*nothing was saved"):
        make(model=Bad(0)).run()


def test_a_parameter_that_is_not_finite_is_not_saved(tmp_path):
    class Poison(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.param_groups[0]["params"][0].data[0, 0] = math.inf

    with pytest.raises(UsageError, match="A parameter is not finite after step 4, so no checkpoint"):
        make(tmp_path, optimizer=Poison, batches=[{"input_ids": torch.ones(1, 4, dtype=torch.long)}]).run()
    assert not (tmp_path / "checkpoint.json").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    make(tmp_path, steps=2).run()
    with pytest.raises(UsageError, match=r"another model: 'embed.weight' is \(30, 16\) float32 and \(30, 8\) float32"):
        make(tmp_path, model=Small(8)).run()
    with pytest.raises(UsageError, match="the checkpoint lacks 'inner.embed.weight'"):
        make(tmp_path, model=Bad(1)).run()
    with pytest.raises(UsageError, match="made with AdamW and this run has SGD"):
        make(tmp_path, optimizer=torch.optim.SGD).run()
    with pytest.raises(UsageError, match="other parameter groups"):
        trainer = make(tmp_path)
        trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "initial_lr": 1.0})
        trainer.run()
    with pytest.raises(UsageError, match="only 3 now"):
        make(tmp_path, batches=[rows(2, seed=s) for s in range(3)]).run()
    with pytest.raises(UsageError, match="no state of the batches"):
        make(tmp_path, batches=Stateful()).run()
    assert make(tmp_path, steps=2, model=Small(8)).run(resume=False).step == 2


def test_a_damaged_checkpoint_is_refused(tmp_path):
    make(tmp_path, steps=2).run()
    (file,) = tmp_path.glob("checkpoint-*.pt")
    whole, index = file.read_bytes(), tmp_path / "checkpoint.json"
    file.write_bytes(whole[:-100])
    with pytest.raises(UsageError, match=f"has {len(whole) - 100:,} of {len(whole):,} bytes, so it was cut: restore"):
        make(tmp_path).run()
    file.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(UsageError, match="was changed after it was written"):
        make(tmp_path).run()
    file.unlink()
    with pytest.raises(UsageError, match="which is not there"):
        make(tmp_path).run()
    index.write_text(index.read_text()[:20])
    with pytest.raises(UsageError, match="checkpoint.json is damaged"):
        make(tmp_path).run()


def test_a_log_that_was_cut_by_a_kill_is_read(tmp_path):
    folder = storage.RunFolder(tmp_path)
    folder.append_log([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    with folder.log_path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in folder.read_log()] == [1, 2]
    folder.cut_log(1)
    assert json.loads(folder.log_path.read_text()) == {"step": 1, "loss": 2.0}


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "The batches are empty"),
        (iter([rows(2)] * 3), "ended after 3, and an iterator cannot be read again"),
        ([{"input_ids": torch.ones(0, 7, dtype=torch.long)}], r"A batch is empty: 'input_ids' has shape \(0, 7\)"),
        ([torch.ones(2, 3)], "must be a dict of tensors, not Tensor"),
        ([rows(2) | {"labels": torch.full((2, 7), -100)}], "All labels of step 1 are masked"),
        (3, "must be an iterable of dicts"),
    ],
)
def test_batches_that_cannot_be_trained_on_get_a_sentence(batches, said):
    with pytest.raises(UsageError, match=said):
        make(batches=batches).run()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps is 0: expected a whole number"),
        ({"accumulation": 1.5}, "accumulation is 1.5"),
        ({"log_every": 0}, "log_every is 0"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0: expected 0 or more"),
        ({"autocast": torch.float32}, "autocast is torch.float32"),
        ({"checkpoint_every": 5}, "need a folder"),
        ({"optimizer": lambda p, lr: training.Adafactor(p)}, "sets its own learning rate"),
        ({"model": nn.Identity(), "optimizer": lambda p, lr: torch.optim.SGD([torch.ones(1)])}, "no parameter"),
    ],
)
def test_options_that_cannot_be_get_a_sentence(options, said):
    with pytest.raises(UsageError, match=said):
        make(**options)


def test_what_is_missing_gets_a_sentence(tmp_path):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="evaluate_every needs held_out"):
        training.Trainer(model, [rows(2)], optimizer, steps=1, evaluate_every=1)
    trainer = training.Trainer(model, [rows(2)], optimizer, steps=1, progress=False, folder=tmp_path)
    with pytest.raises(UsageError, match="nothing to evaluate on"):
        trainer.evaluate()
    with pytest.raises(UsageError, match="can be read only once"):
        trainer.evaluate(iter([rows(2)]))
    with pytest.raises(UsageError, match="no token to predict"):
        trainer.evaluate([])
    with pytest.raises(UsageError, match="no best weights"):
        trainer.load_best()
    assert trainer.run().step == 1 and trainer.result.best_step is None


if __name__ == "__main__":
    die(Path(sys.argv[1]), sys.argv[2])
