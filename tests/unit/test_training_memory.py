"""The memory model beside what autograd really keeps (saved-tensor hooks) and a step really has live (the meter)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from effnlp_lab import training
from effnlp_lab.errors import UsageError
from effnlp_lab.notebook.meter import Meter
from effnlp_lab.training.activations import Precision, layer_activations, outer_activations
from effnlp_lab.training.memory_model import TrainingSetup

VOCABULARY = 2000


def opt(attention="sdpa", **changes):
    sizes = {"hidden_size": 96, "word_embed_proj_dim": 96, "ffn_dim": 320, "num_hidden_layers": 4, "dropout": 0.1}
    sizes |= {"vocab_size": VOCABULARY, "num_attention_heads": 4, "max_position_embeddings": 256}
    return OPTConfig(**sizes | changes, attn_implementation=attention)


def llama(attention="sdpa", **changes):
    sizes = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 4, "vocab_size": VOCABULARY}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LlamaConfig(**sizes | changes, attn_implementation=attention)


CONFIGS = {
    "opt": opt(),
    "opt without dropout": opt(dropout=0.0),
    "opt eager": opt("eager"),
    "llama": llama(),
    "llama eager": llama("eager"),
    "llama tied, as many KV heads": llama(tie_word_embeddings=True, num_key_value_heads=4),
    "llama with biases": llama(attention_bias=True, mlp_bias=True),
}


def make(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


def tokens(batch, length):
    return torch.randint(5, VOCABULARY, (batch, length))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_exactly(name):
    shape = training.ModelShape.from_config(CONFIGS[name])
    model = make(CONFIGS[name])
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert sorted(shape.tensors()) == sorted(tuple(p.shape) for p in model.parameters())


def kept_bytes(model, ids, context):
    """What the graph of a loss keeps, parameters apart, each storage once."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        training.causal_lm_loss(model, {"input_ids": ids})
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kept_tensor_is_in_the_table(name):
    config, batch, length = CONFIGS[name], 3, 70
    shape, precision = training.ModelShape.from_config(config), Precision(mask=4)
    attention = config._attn_implementation
    layer = sum(saved.bytes for saved in layer_activations(shape, batch, length, precision, attention))
    outer = sum(saved.bytes for saved in outer_activations(shape, batch, length, precision))
    found = kept_bytes(make(config), tokens(batch, length), torch.autocast("cpu", enabled=False))
    assert layer * shape.layers + outer == pytest.approx(found, abs=64)  # the sum's own few bytes


@pytest.mark.parametrize("name", ["opt without dropout", "opt eager", "llama", "llama eager"])
def test_every_kept_tensor_of_a_bfloat16_model(name):
    config, batch, length = CONFIGS[name], 3, 70
    shape, precision = training.ModelShape.from_config(config), Precision(2, 2, 2)
    attention = config._attn_implementation
    layer = sum(saved.bytes for saved in layer_activations(shape, batch, length, precision, attention))
    outer = sum(saved.bytes for saved in outer_activations(shape, batch, length, precision))
    found = kept_bytes(make(config).bfloat16(), tokens(batch, length), torch.autocast("cpu", enabled=False))
    assert layer * shape.layers + outer == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("name", ["opt without dropout", "opt eager", "llama", "llama eager"])
def test_every_kept_tensor_under_autocast_as_a_gpu_has_it(name, monkeypatch):
    """A CPU's autocast leaves layer norm in bfloat16 where a GPU's runs it in float32; the rest is the same."""
    norm = F.layer_norm

    def in_float32(x, shape, weight=None, bias=None, eps=1e-5):
        with torch.autocast("cpu", enabled=False):
            return norm(x.float(), shape, weight, bias, eps)

    monkeypatch.setattr(F, "layer_norm", in_float32)
    config, batch, length = CONFIGS[name], 3, 70
    shape = training.ModelShape.from_config(config)
    precision = Precision(stream=4, compute=2, mask=2)
    attention = config._attn_implementation
    layer = sum(saved.bytes for saved in layer_activations(shape, batch, length, precision, attention))
    outer = sum(saved.bytes for saved in outer_activations(shape, batch, length, precision))
    casts = 2 * (sum(map(math.prod, shape.linear_shapes())) * shape.layers + shape.vocabulary * shape.hidden)
    found = kept_bytes(make(config), tokens(batch, length), torch.autocast("cpu", dtype=torch.bfloat16))
    assert layer * shape.layers + outer + casts == pytest.approx(found, rel=0.02)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, foreach=True),
    "adafactor": training.Adafactor,
    "came": training.CAME,
    "lion": training.Lion,
}
SETUPS = [
    {"batch": 1, "length": 8},
    {"batch": 8, "length": 100},
    {"batch": 2, "length": 100, "accumulation": 3, "optimizer": "adamw_fused"},
    {"batch": 2, "length": 100, "accumulation": 3, "optimizer": "adamw_fused", "checkpointing": True},
    {"batch": 8, "length": 100, "optimizer": "sgd", "checkpointing": True},
    *({"batch": 1, "length": 8, "optimizer": name} for name in ("adamw_fused", "adafactor", "came", "lion")),
]


def measured(config, setup):
    """The peak of the second step: what is there before it, and what the meter counts on top."""
    model = make(config)
    optimizer = OPTIMIZERS[setup.optimizer](model.parameters())
    if setup.checkpointing:
        training.checkpoint_layers(model)
    batches = [{"input_ids": tokens(setup.batch, setup.length)} for _ in range(setup.accumulation)]

    def step():
        training.accumulate(model, batches)
        optimizer.step()

    step()
    optimizer.zero_grad()
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    before = sum(t.numel() * t.element_size() for t in [*model.parameters(), *state])
    with Meter() as meter:
        step()
    return before + meter.usage.peak_bytes, sum(t.numel() * t.element_size() for t in state if t.ndim)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda s: ", ".join(f"{k} {v}" for k, v in s.items()))
@pytest.mark.parametrize("name", ["opt", "llama eager"])
def test_the_peak_is_within_a_tenth(name, setup):
    config = CONFIGS[name]
    setup = TrainingSetup(device="cpu", attention=config._attn_implementation, **setup)
    prediction = training.predict_memory(config, setup)
    peak, state = measured(config, setup)
    assert prediction.peak == pytest.approx(peak, rel=0.1), prediction.table()
    assert sum(prediction.components.values()) == prediction.peak
    assert prediction.components["optimizer state"] == pytest.approx(state, rel=0.001)


def test_eight_bit_state_is_counted_exactly():
    model = make(opt())
    optimizer = training.AdamW8bit(model.parameters())
    training.accumulate(model, [{"input_ids": tokens(1, 8)}])
    optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    assert training.optimizer_state_bytes(opt(), "adamw8bit") == sum(t.numel() * t.element_size() for t in state)


def test_the_lectures_figures_for_three_billion_parameters():
    """AdamW 24 GB, Adafactor 12 and 8-bit 6 for a model of 3B: Adafactor's own state is far less than was said."""
    shape = training.ModelShape("llama", 26, 3200, 32, 8640, 32000, 32, 100, tied=False)
    assert shape.parameters == pytest.approx(3.4e9, rel=0.05)
    states = {
        name: training.optimizer_state_bytes(shape, name) / shape.parameters for name in OPTIMIZERS | {"adamw8bit": 0}
    }
    assert states["adamw"] == 8 and states["lion"] == 4 and states["sgd"] == 0
    assert states["adamw8bit"] == pytest.approx(2, rel=0.03) and states["adafactor"] < 0.01


def test_each_saving_saves():
    """Down the ladder for the shape of OPT-1.3B, with fused AdamW, 16 rows of 512 tokens a step."""
    config = opt(hidden_size=2048, word_embed_proj_dim=2048, ffn_dim=8192, num_hidden_layers=24, vocab_size=50272,
                 num_attention_heads=32, max_position_embeddings=2048)  # fmt: skip
    setup = {"length": 512, "batch": 16, "optimizer": "adamw_fused"}
    peaks = [training.predict_memory(config, **setup).peak]
    for change in ({"batch": 4, "accumulation": 4}, {"checkpointing": True}, {"optimizer": "adamw8bit"}):
        setup |= change
        peaks.append(training.predict_memory(config, **setup).peak)
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 2.5 * peaks[-1]


@pytest.mark.parametrize("changes", [{}, {"checkpointing": True}, {"attention": "eager"}])
def test_the_largest_batch_fits_and_one_more_does_not(changes):
    budget = 2 * 10**9
    batch = training.largest_batch(opt(), budget, length=128, **changes)
    room = budget * 0.95 - training.predict_memory(opt(), length=128).context
    assert training.predict_memory(opt(), batch=batch, length=128, **changes).peak <= room
    assert training.predict_memory(opt(), batch=batch + 1, length=128, **changes).peak > room
    assert training.largest_batch(opt(), 10**8, length=128, **changes) == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: training.predict_memory(GPT2Config()), "covers OPT and Llama"),
        (lambda: training.predict_memory(opt(word_embed_proj_dim=32)), "projected embeddings"),
        (lambda: training.predict_memory(opt(), batch=0), "batch is 0"),
        (lambda: training.predict_memory(opt(), optimizer="adam9"), "Unknown optimizer 'adam9'"),
        (lambda: training.predict_memory(opt(), attention="flash9"), "Unknown attention 'flash9'"),
        (lambda: training.largest_batch(opt(), 0), "budget_bytes is 0"),
    ],
)
def test_bad_input_gets_a_sentence(call, said):
    with pytest.raises(UsageError, match=said):
        call()
