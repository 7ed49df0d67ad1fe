"""The adapters beside float64 definitions, and their interface: switching, merging, freezing, refusing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from effnlp_lab import adapters
from effnlp_lab.adapters.layerwise import Adapted
from effnlp_lab.errors import UsageError

CONFIGS = {
    "lora": adapters.LoRAConfig(r=2, targets=("q_proj", "mlp.down_proj")),
    "ia3": adapters.IA3Config(),
    "bottleneck": adapters.BottleneckConfig(size=3),
    "prompt": adapters.PromptTuningConfig(3),
    "prefix": adapters.PrefixTuningConfig(3),
    "bitfit": adapters.BitFitConfig(),
    "top": adapters.TopLayersConfig(1),
}
MERGEABLE = ("lora", "ia3", "bitfit", "top")
IDS = torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def fresh():
    """Makes a tiny Llama in float64, with biases, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return lambda: copy.deepcopy(model)


def disturb(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.trainable_parameters(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("method", CONFIGS)
def test_only_the_adapter_is_trained_and_everything_of_it(method, fresh):
    model = fresh()
    base = {name: p.clone() for name, p in model.named_parameters()}
    adapter = adapters.add_adapter(model, CONFIGS[method])
    trained = adapters.trainable_parameters(model)
    assert {id(p) for p in trained.values()} == {id(p) for p in adapter.parameters()}
    assert adapters.count_parameters(model)["base"] == sum(p.numel() for p in base.values())
    disturb(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    torch.optim.SGD(list(trained.values()), lr=0.1).step()
    adapters.remove_adapter(model, "default")
    left = dict(model.named_parameters())
    assert left.keys() == base.keys() and all(torch.equal(left[name], base[name]) for name in base)


@pytest.mark.parametrize("method", ["lora", "ia3", "bottleneck", "bitfit", "top"])
def test_a_new_adapter_changes_nothing(method, fresh):
    model = fresh()
    before = logits(model)
    adapters.add_adapter(model, CONFIGS[method])
    torch.testing.assert_close(logits(model), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", MERGEABLE)
def test_merge_computes_the_same_and_unmerge_is_exact(method, fresh):
    model = fresh()
    plain = logits(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    adapter = adapters.add_adapter(model, CONFIGS[method])
    disturb(model)
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 1e-3
    adapters.merge_adapter(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-10, atol=1e-11)
    assert not adapters.trainable_parameters(model)
    with pytest.raises(UsageError, match="merged already"):
        adapters.merge_adapter(model)
    for act in (lambda: adapters.disable_adapters(model), lambda: adapters.add_adapter(model, CONFIGS["lora"], "b")):
        with pytest.raises(UsageError, match="unmerge it first"):
            act()
    adapters.unmerge_adapter(model)
    assert torch.equal(logits(model), adapted) and adapter.active
    with pytest.raises(UsageError, match="not merged"):
        adapters.unmerge_adapter(model)
    adapters.remove_adapter(model, "default")
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("method", ["bottleneck", "prompt", "prefix"])
def test_what_cannot_merge_says_so(method, fresh):
    model = fresh()
    adapters.add_adapter(model, CONFIGS[method])
    with pytest.raises(UsageError, match="cannot be merged"):
        adapters.merge_adapter(model)
    logits(model)


def test_switching_between_all_methods_on_one_base(fresh):
    model, expected = fresh(), {}
    plain = logits(model)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        alone = fresh()
        for target in (alone, model):
            torch.manual_seed(seed)
            adapters.add_adapter(target, config, name)
            disturb(target, seed)
        expected[name] = logits(alone)
    for name in (*CONFIGS, *reversed(CONFIGS)):
        adapters.set_adapter(model, name)
        assert torch.equal(logits(model), expected[name]), name
        with adapters.adapters_disabled(model):
            assert torch.equal(logits(model), plain), name
        assert torch.equal(logits(model), expected[name]), name
    for name in CONFIGS:
        adapters.remove_adapter(model, name)
    assert torch.equal(logits(model), plain) and not any(isinstance(m, Adapted) for m in model.modules())


@pytest.mark.parametrize("method", CONFIGS)
def test_a_copy_of_an_adapted_model_is_a_model_of_its_own(method, fresh):
    model = fresh()
    adapters.add_adapter(model, CONFIGS[method])
    disturb(model)
    adapted, copied = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(copied), adapted)
    disturb(copied)
    assert torch.equal(logits(model), adapted) and not torch.equal(logits(copied), adapted)
    adapters.remove_adapter(copied, "default")
    assert torch.equal(logits(model), adapted) and torch.equal(logits(copied), logits(fresh()))


@pytest.mark.parametrize("bias", [True, False])
def test_lora_beside_its_equation_and_finite_differences(bias):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=bias).double().requires_grad_(False)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, 6), (5, 2)))
    out = adapters.lora_linear(x, layer, a, b, 0.7)
    expected = F.linear(x, layer.weight + 0.7 * b @ a, layer.bias)
    torch.testing.assert_close(out, expected)
    for one, two in zip(
        torch.autograd.grad(out.sum(), (x, a, b)), torch.autograd.grad(expected.sum(), (x, a, b)), strict=True
    ):
        torch.testing.assert_close(one, two)
    assert torch.autograd.gradcheck(lambda *inputs: adapters.lora_linear(inputs[0], layer, *inputs[1:], 0.7), (x, a, b))


def test_lora_where_the_base_is_trained_too_or_the_input_dropped():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    x = torch.randn(400, 6, dtype=torch.float64)
    a, b = (torch.randn(size, dtype=torch.float64) for size in ((2, 6), (5, 2)))
    adapters.lora_linear(x, layer, a, b, 1.0).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(5, 6))
    dropped = [adapters.lora_linear(x, layer, a, b, 1.0, dropout=0.5) - layer(x) for _ in range(2)]
    assert not torch.equal(*dropped)
    mean = torch.stack([adapters.lora_linear(x, layer, a, b, 1.0, dropout=0.5) for _ in range(300)]).mean(0)
    spread = (x @ a.T @ b.T).std()
    assert (mean - layer(x) - x @ a.T @ b.T).abs().mean() < 0.2 * spread


def test_lora_begins_as_the_paper_says_and_scales():
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 48)})
    adapter = adapters.add_adapter(model, adapters.LoRAConfig(targets=("q_proj",), r=4))
    a, b = adapter.tensors()["q_proj.lora_A.weight"], adapter.tensors()["q_proj.lora_B.weight"]
    assert a.shape == (4, 64) and b.shape == (48, 4) and not b.any() and a.abs().max() <= 1 / 8 and a.std() > 0.05
    assert adapters.LoRAConfig(r=4, alpha=6).scaling == 1.5
    assert adapters.LoRAConfig(r=4, alpha=6, rank_stabilized=True).scaling == 3


def test_lora_keeps_small_steps_beside_16_bit_weights():
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8, dtype=torch.bfloat16)})
    adapter = adapters.add_adapter(model, adapters.LoRAConfig(targets=("q_proj",), r=2))
    out = model["q_proj"](torch.randn(3, 8, dtype=torch.bfloat16))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and all(p.dtype == p.grad.dtype == torch.float32 for p in adapter.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        adapters.add_adapter(model, adapters.LoRAConfig(targets=("q_proj",), r=2))
        assert model["q_proj"](torch.randn(3, 8)).dtype == torch.bfloat16


def test_the_bottleneck_is_its_equation(fresh):
    model = fresh()
    adapter = adapters.add_adapter(model, CONFIGS["bottleneck"])
    disturb(model)
    layer = model.model.layers[1].mlp.down_proj
    x = torch.randn(2, 48, dtype=torch.float64)
    t = {name.split("adapter_")[1]: p for name, p in adapter.tensors().items() if "layers.1.mlp" in name}
    h = x @ layer.base.weight.T + layer.base.bias
    inner = torch.clamp(h @ t["down.weight"].T + t["down.bias"], min=0)
    torch.testing.assert_close(layer(x), h + inner @ t["up.weight"].T + t["up.bias"])


@pytest.mark.parametrize("method", ["bitfit", "top"])
def test_selected_gradients_are_the_models_own(method, fresh):
    model, plain = fresh(), fresh()
    adapter = adapters.add_adapter(model, CONFIGS[method])
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    own = dict(plain.named_parameters())
    for name, parameter in adapter.tensors().items():
        torch.testing.assert_close(parameter.grad, own[name].grad)
    names = set(adapter.tensors())
    if method == "bitfit":
        assert names == {name for name in own if name.endswith("bias")}
    else:
        assert names == {name for name in own if "layers.2." in name} | {"model.norm.weight"}


@pytest.mark.parametrize("method", ["bottleneck", "bitfit", "top"])
def test_what_peft_lacks_is_saved_and_loaded_too(method, fresh, tmp_path):
    model, other = fresh(), fresh()
    adapters.add_adapter(model, CONFIGS[method])
    disturb(model)
    adapters.save_adapter(model, tmp_path)
    loaded = adapters.load_adapter(other, tmp_path, "again")
    assert torch.equal(logits(model), logits(other)) and loaded.config == CONFIGS[method]


@pytest.mark.parametrize(
    "act, words",
    [
        (
            lambda m: adapters.add_adapter(m, adapters.LoRAConfig(targets=("q_porj",))),
            "'q_porj': the nearest are 'q_proj'",
        ),
        (lambda m: adapters.add_adapter(m, adapters.LoRAConfig(targets=("mlp.down",))), "nearest are 'mlp.down_proj'"),
        (lambda m: adapters.add_adapter(m, adapters.LoRAConfig(targets=("norm",))), "LlamaRMSNorm: expected a linear"),
        (lambda m: adapters.add_adapter(m, adapters.LoRAConfig(r=33)), "choose r up to"),
        (lambda m: adapters.add_adapter(m, adapters.TopLayersConfig(4)), "choose at most 3"),
        (
            lambda m: adapters.add_adapter(m, adapters.BitFitConfig(("lm_head",))),
            "lm_head, a Linear: expected a module",
        ),
        (lambda m: adapters.add_adapter(m, CONFIGS["ia3"], "a.b"), "without dots"),
        (lambda m: adapters.set_adapter(m, "x"), "no adapter 'x'"),
        (lambda m: adapters.merge_adapter(m), "No adapter of this model is active"),
        (lambda m: adapters.add_adapter(m, {"r": 8}), "dict is no configuration"),
        (lambda m: adapters.LoRAConfig(r=0), "at least 1"),
        (lambda m: adapters.LoRAConfig(alpha=float("nan")), "alpha is nan"),
        (lambda m: adapters.LoRAConfig(targets=()), "expected the names of modules"),
        (lambda m: adapters.LoRAConfig(dropout=1.0), "dropout is 1.0"),
        (lambda m: adapters.BottleneckConfig(activation="mish"), "activation is 'mish'"),
    ],
)
def test_bad_input_gets_a_sentence_and_changes_nothing(act, words, fresh):
    model = fresh()
    before = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(UsageError, match=words) as caught:
        act(model)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before


def test_weights_with_nan_are_refused(fresh):
    model = fresh()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("inf")
    for config in (CONFIGS["lora"], adapters.TopLayersConfig(2)):
        with pytest.raises(UsageError, match="NaN or infinity in model.layers.1.self_attn.q_proj"):
            adapters.add_adapter(model, config)
    assert not any(isinstance(module, Adapted) for module in model.modules())


def test_names_may_be_a_regular_expression(fresh):
    model = fresh()
    adapter = adapters.add_adapter(model, adapters.LoRAConfig(targets=r".*\.[01]\.mlp\.(up|gate)_proj"))
    assert len(adapter.layers) == 4
    with pytest.raises(UsageError, match="is named"):
        adapters.add_adapter(model, adapters.LoRAConfig(targets=r".*nothing"), "other")
