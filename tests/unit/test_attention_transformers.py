"""Our flash attention inside `transformers` models: the same numbers as with torch's own attention."""

from __future__ import annotations

import pytest
import torch

from effnlp_lab.attention import configurations, register_with_transformers

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(configurations, "INTERPRETED", configurations.Tile(16, 16, 1, 1))
    assert register_with_transformers() == "effnlp_attention"


def model(kind="Llama", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=49,
        attn_implementation="effnlp_attention", **changes,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def both(net, **inputs):
    net.set_attn_implementation("sdpa")
    wanted = net(**inputs).logits
    net.set_attn_implementation("effnlp_attention")
    return net(**inputs).logits, wanted


def tokens(*shape):
    return torch.randint(2, 49, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("padding", ("none", "left", "right"))
def test_logits_with_padding(padding):
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    if padding == "left":
        mask[0, :7] = 0
    if padding == "right":
        mask[0, 13:] = 0
    ours, wanted = both(model(), input_ids=ids, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], wanted[real], rtol=1e-4, atol=1e-5)


def test_gradients():
    net, ids = model(), tokens(2, 18)
    grads = {}
    for name in ("sdpa", "effnlp_attention"):
        net.set_attn_implementation(name)
        net.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        grads[name] = [p.grad.clone() for p in net.parameters()]
    for a, b in zip(grads["effnlp_attention"], grads["sdpa"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
def test_greedy_generation(cache):
    net, ids = model(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    texts = {}
    for name in ("sdpa", "effnlp_attention"):
        net.set_attn_implementation(name)
        texts[name] = net.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
        )
    assert torch.equal(texts["sdpa"], texts["effnlp_attention"])


def test_a_models_sliding_window_counts_as_ours():
    ours, wanted = both(model("Mistral", sliding_window=5), input_ids=tokens(1, 24))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_packed_sequences_do_not_see_each_other():
    positions = torch.tensor([[*range(7), *range(9), *range(4)]])
    ours, wanted = both(model(), input_ids=tokens(1, 20), position_ids=positions, use_cache=False)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_do_not_do_is_refused():
    net = model(attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="dropout"):
        net(input_ids=tokens(1, 8))
    with pytest.raises(ValueError, match="mask"):
        model()(input_ids=tokens(1, 8), attention_mask=torch.zeros(1, 1, 8, 8))
