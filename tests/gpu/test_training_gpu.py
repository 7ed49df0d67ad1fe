"""8-bit AdamW compiled, beside float64 and bitsandbytes; the memory model beside a card; the rest of a step there."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from effnlp_lab import training
from effnlp_lab.notebook.meter import Meter
from effnlp_lab.training import adamw8bit
from effnlp_lab.training.blockwise import dynamic_map
from effnlp_lab.training.memory_model import TrainingSetup

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COUNTS = (4096, 5000, 2048 * 7, 300_001, 1 << 20)


def benchmark():
    """benchmarks/training.py, which measures a step."""
    spec = importlib.util.spec_from_file_location("benchmark_training", ROOT / "benchmarks" / "training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(dtype, counts=COUNTS, shift=0):
    """Parameters, each `shift` numbers into its storage: with 1 no address is a multiple of 16."""
    return [nn.Parameter(torch.randn(n + shift, device="cuda").to(dtype)[shift:]) for n in counts]


def give_gradients(parameters, seed, spread=2.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(2, parameter.numel(), device="cuda", generator=generator)
        parameter.grad = (noise[0] * torch.exp(spread * noise[1]) * 1e-3).to(parameter.dtype)


def assert_same_codes(ours, theirs, values, signed, what):
    """Equal codes, but where a value lies as near to one as to the other: the two divide by the maximum differently.

    And but for zero: bitsandbytes keeps the sign of what it encodes, so that -0.0 and what is nearest to zero from
    below get the code under zero's. values: what is encoded, float64; each block of 256 divided by its largest.
    """
    try:
        benchmark().differing(ours, theirs, values, signed, tie=1e-6)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error
    assert (ours != theirs).double().mean() < 0.01, what


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_beside_the_plain_update_and_float64(dtype, shift):
    """Six steps; each from the same state, so that a number beside a boundary does not lead the next step astray."""
    torch.manual_seed(0)
    parameters = tensors(DTYPES[dtype], shift=shift)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = training.AdamW8bit(parameters, **options)
    states = None
    for step in range(1, 7):
        give_gradients(parameters, step)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        if states is None:
            states = [
                {k: torch.zeros_like(v) for k, v in optimizer.state[p].items() if k != "step"} for p in parameters
            ]
        scalars = adamw8bit.step_scalars(options, step)
        for p, weight, state in zip(parameters, before, states, strict=True):
            exact = in_float64(weight, p.grad, state, scalars)
            adamw8bit.update_plain(weight, p.grad, state, scalars)
            rounding = torch.finfo(p.dtype).eps * exact.abs() + 1e-6 * (1 + exact.abs())
            assert ((p.detach().double() - exact).abs() <= rounding + 1e-5 * (exact - weight.double()).abs()).all()
            ours = optimizer.state[p]
            for name in ("absmax", "absmax_sq"):
                torch.testing.assert_close(ours[name], state[name], rtol=1e-5, atol=0)
            for name in ("exp_avg", "exp_avg_sq"):
                codes_beside(ours[name], state[name], name == "exp_avg")
                ours[name].copy_(state[name])


def empty_state(state):
    return {name: torch.zeros_like(value) for name, value in state.items() if name != "step"}


def codes_beside(ours, plain, signed):
    """Neighbours at most; further apart only where two terms cancel and rounding is all that is left."""
    values = dynamic_map(signed, ours.device)
    apart = (values[ours.int()] - values[plain.int()]).abs()
    assert (ours != plain).float().mean() < 2e-3
    assert ((ours.short() - plain.short()).abs().le(1) | apart.le(4e-6)).all()


def in_float64(weight, gradient, state, scalars):
    """The parameter after one exact step from decoded states."""
    g, p = gradient.double().flatten(), weight.double().flatten()
    m, v = (
        dynamic_map(signed, g.device).double()[state[name].flatten().int()]
        * state[scale].double().repeat_interleave(256)[: g.numel()]
        for name, scale, signed in (("exp_avg", "absmax", True), ("exp_avg_sq", "absmax_sq", False))
    )
    m = scalars["beta1"] * m + scalars["rest1"] * g
    v = scalars["beta2"] * v + scalars["rest2"] * g * g
    p = p * scalars["decay"] - scalars["step_size"] * m / (v.sqrt() * scalars["root2"] + scalars["eps"])
    return p.view(weight.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_bitsandbytes(dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    ours, theirs = tensors(DTYPES[dtype]), None
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 1e-3, "weight_decay": 0.01}
    mine, other = training.AdamW8bit(ours, **options), bitsandbytes.optim.AdamW8bit(theirs, **options)
    give_gradients(ours, 1, spread=0.5)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    mine.step(), other.step()
    for p, q in zip(ours, theirs, strict=True):
        state, their_state = mine.state[p], other.state[q]
        gradient = q.grad.double()
        assert_same_codes(state["exp_avg"], their_state["state1"], 0.1 * gradient, True, "first moment")
        assert_same_codes(state["exp_avg_sq"], their_state["state2"], 0.001 * gradient**2, False, "second moment")
        torch.testing.assert_close(state["absmax"], their_state["absmax1"], rtol=1e-4, atol=0)
        torch.testing.assert_close(state["absmax_sq"], their_state["absmax2"], rtol=1e-4, atol=0)
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(p.dtype).eps, atol=1e-5)


def test_many_tensors_take_two_launches_and_no_memory():
    parameters = tensors(torch.bfloat16, (40_000, 4096, 9_999) * 60)
    optimizer = training.AdamW8bit(parameters)
    give_gradients(parameters, 1)
    optimizer.step()
    give_gradients(parameters, 2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with Meter() as meter:
        optimizer.step()
    assert meter.usage.launches <= 12  # the kernel twice, and the table's way to the device
    assert torch.cuda.max_memory_allocated() - before < 2**20


def test_gradients_that_move_between_steps_are_found():
    """New gradients at new addresses every step, some missing: as a training loop has it that sets them to None."""
    torch.manual_seed(0)
    ours = tensors(torch.float32)
    twins = [nn.Parameter(p.detach().clone()) for p in ours]
    first, second = training.AdamW8bit(ours), training.AdamW8bit(twins)
    kept = []
    for step in range(6):
        give_gradients(ours, step)
        for p, q in zip(ours, twins, strict=True):
            q.grad = q.grad.copy_(p.grad) if q.grad is not None else p.grad.clone()  # stays where it is
        if step % 2:
            ours[1].grad = twins[1].grad = None
        kept.append([p.grad for p in ours])
        first.step(), second.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, twins, strict=True))


def test_a_saved_state_goes_on_exactly():
    torch.manual_seed(0)
    ours = tensors(torch.bfloat16)
    first = training.AdamW8bit(ours)
    for step in range(3):
        give_gradients(ours, step)
        first.step()
    twins = [nn.Parameter(p.detach().clone()) for p in ours]
    second = training.AdamW8bit(twins)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    give_gradients(ours, 9)
    give_gradients(twins, 9)
    first.step(), second.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, twins, strict=True))


# The memory model.


@pytest.mark.alone
@pytest.mark.parametrize("rung", ["vanilla", "+ accumulation", "+ checkpointing", "+ bf16 autocast", "+ 8-bit AdamW"])
def test_memory_of_opt_1_3b_is_within_a_tenth(rung):
    """With fused AdamW down the ladder. The card needs 48 GB."""
    bench = benchmark()
    changes = {"length": bench.LENGTH}
    for name, change in bench.LADDER.items():
        changes |= change
        if name == rung:
            break
    setup, config = TrainingSetup(**changes), bench.opt_shape()
    prediction = training.predict_memory(config, setup)
    peak, _ = bench.measure_step(config, setup, steps=1)
    assert prediction.peak == pytest.approx(peak, rel=0.1), bench.describe(rung, prediction, peak)


LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16}
LLAMA |= {"vocab_size": 32000, "tie_word_embeddings": False}
OTHERS = {
    "llama, bf16 autocast": (4, {"autocast": torch.bfloat16}),
    "llama, eager, bf16 autocast": (4, {"autocast": torch.bfloat16, "attention": "eager"}),
    "llama, bf16 weights": (4, {"weights": torch.bfloat16, "optimizer": "adamw8bit"}),
    "llama, bf16 weights, Lion": (4, {"weights": torch.bfloat16, "optimizer": "lion", "batch": 1}),
    "llama, float32, as many KV heads": (16, {}),
    "llama, float32, grouped": (4, {}),
    "llama, checkpointing": (4, {"autocast": torch.bfloat16, "checkpointing": True, "batch": 16}),
    "llama, foreach AdamW": (4, {"optimizer": "adamw", "batch": 1}),
    "llama, Adafactor": (4, {"optimizer": "adafactor", "batch": 1}),
    "llama, CAME": (4, {"optimizer": "came", "batch": 1}),
}


@pytest.mark.alone
@pytest.mark.parametrize("name", OTHERS)
def test_memory_of_a_llama_is_within_a_tenth(name):
    bench = benchmark()
    kv_heads, changes = OTHERS[name]
    setup = TrainingSetup(**{"batch": 8, "length": 512, "optimizer": "adamw_fused"} | changes)
    config = LlamaConfig(**LLAMA, num_key_value_heads=kv_heads, attn_implementation=setup.attention)
    prediction = training.predict_memory(config, setup)
    peak, _ = bench.measure_step(config, setup, steps=1)
    assert prediction.peak == pytest.approx(peak, rel=0.1), bench.describe(name, prediction, peak)


# Checkpointing, mixed precision, the trainer.


def small_opt():
    sizes = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 512, "num_hidden_layers": 4, "dropout": 0.2}
    config = OPTConfig(**sizes, num_attention_heads=4, vocab_size=500, max_position_embeddings=256)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).cuda().train()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_checkpointed_layers_give_bit_equal_gradients_with_dropout(autocast):
    plain = small_opt()
    ours = copy.deepcopy(plain)
    training.checkpoint_layers(ours)
    ids, found = torch.randint(5, 500, (4, 64), device="cuda"), []
    torch.use_deterministic_algorithms(True, warn_only=True)
    for model in (plain, ours):
        torch.manual_seed(1)
        with torch.autocast("cuda", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            total, _ = training.causal_lm_loss(model, {"input_ids": ids})
        total.backward()
        found.append([total.detach(), *(p.grad for p in model.parameters()), torch.rand(1, device="cuda")])
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_scaler_is_that_of_torch():
    torch.manual_seed(0)
    model = nn.Linear(64, 64).cuda()
    twin = copy.deepcopy(model)
    ours, theirs = training.LossScaler(growth_interval=4), torch.amp.GradScaler("cuda", growth_interval=4)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin)]
    for step in range(30):
        x = torch.randn(8, 64, device="cuda") * (1e4 if step % 5 == 2 else 1)
        for one, scaler, optimizer in zip((model, twin), (ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = one(x).float().square().mean() * 10
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert ours.factor == theirs.get_scale()
        torch.testing.assert_close(model.weight, twin.weight)
    assert ours.skipped > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_stays_in_float32(dtype):
    found = training.full_precision_operations("cuda", dtype)
    kept = {"softmax", "log_softmax", "layer_norm", "cross_entropy", "exp", "pow", "sum", "norm"}
    assert {name for name, full in found.items() if full} == kept


def make_trainer(folder, steps, model=None, **options):
    model = model or small_opt()
    batches = [{"input_ids": torch.randint(5, 500, (4, 64), device="cuda")} for _ in range(5)]
    optimizer = training.AdamW8bit(model.parameters(), lr=1e-3)
    options = {"accumulation": 2, "checkpoint_every": 4 if folder else None, "progress": False} | options
    return training.Trainer(model, batches, optimizer, steps=steps, folder=folder, **options)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_a_run_in_pieces_is_the_whole(tmp_path, autocast):
    torch.use_deterministic_algorithms(True, warn_only=True)
    whole = make_trainer(None, 12, autocast=autocast).run()
    for steps in (5, 12):
        trainer = make_trainer(tmp_path, steps, autocast=autocast)
        if steps > 5:
            torch.manual_seed(77)
        result = trainer.run()
    torch.use_deterministic_algorithms(False)
    assert result.losses == whole.losses


def test_a_step_never_waits_for_the_device():
    """Of the trainer's own: models of transformers look at their masks, so this one is plain."""
    model = nn.Sequential(nn.Embedding(500, 64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 500)).cuda()

    def loss(model, batch):
        logits, targets = model(batch["input_ids"][:, :-1]), batch["input_ids"][:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()

    trainer = make_trainer(None, 10, model=model, loss=loss, autocast=torch.bfloat16)
    trainer._step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer._flush()
    assert trainer.result.step == 4


def test_compiled_learns_the_same():
    model_losses = [make_trainer(None, 6, compile=on, autocast=torch.bfloat16).run().losses for on in (False, True)]
    plain, compiled = (list(losses.values()) for losses in model_losses)
    assert compiled == pytest.approx(plain, rel=0.05)  # other dropout masks, other order of sums
