"""The kernels compiled: products, the column loop, and whole models, with one layer on the card."""

from __future__ import annotations

import pytest
import torch
import transformers

from effnlp_lab import quantization as room
from effnlp_lab.quantization.launch_product import dequantize, product, workspace

HALVES = (torch.float16, torch.bfloat16)


def draw(rows, columns, bits, group_size, scale_dtype=torch.float16):
    weight = torch.randn(rows, columns, device="cuda") / columns**0.5
    quantized = room.round_to_nearest(weight, bits, group_size, scale_dtype=scale_dtype)
    return quantized, room.pack(quantized)


@pytest.mark.parametrize("dtype", (*HALVES, torch.float32))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_products_beside_float64(bits, dtype):
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        return
    for rows, columns, group_size in ((512, 1024, 128), (200, 1056, 1056), (77, 736, 32), (64, 240, 48)):
        quantized, packed = draw(rows, columns, bits, group_size)
        weight = quantized.dequantize(torch.float64)
        for inputs in (1, 4, 16, 17, 64, 128, 300):
            x = (torch.randn(inputs, columns, device="cuda") + 0.5).to(dtype)
            bias = torch.randn(rows, device="cuda").to(dtype)
            exact = x.double() @ weight.T + bias.double()
            limit = (32 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps * exact.abs().max()
            for split in (None, 1, packed.planes[-1].shape[0]):
                parts, counters = workspace(x.device, 1 << 20, 1 << 12)
                parts.fill_(float("nan"))
                ours = product(x, packed, bias, split=split)
                assert (ours.double() - exact).abs().max() <= limit, (rows, columns, inputs, split)
                assert torch.equal(ours, product(x, packed, bias, split=split))
                assert not counters.any()
            either = room.quantized_matmul(x, packed, bias)
            plain = torch.nn.functional.linear(x, weight.to(dtype), bias)
            slack = 2 * (plain.double() - exact).abs().max() + limit
            assert (either.double() - exact).abs().max() <= slack
        assert torch.equal(dequantize(packed, torch.float32), quantized.dequantize())


def test_products_in_a_cuda_graph_and_on_two_streams():
    quantized, packed = draw(4096, 4096, 4, 128)
    x = torch.randn(3, 4096, device="cuda").half()
    expected = product(x, packed)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        product(x, packed)
        product(x, packed)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = product(x, packed)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
    with torch.cuda.stream(stream):
        other = [product(x, packed) for _ in range(20)]
    ours = [product(x, packed) for _ in range(20)]
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in (*other, *ours))


def hessian_of(columns, rank):
    inputs = torch.randn(4096, rank, device="cuda", dtype=torch.float64) @ torch.randn(
        rank, columns, device="cuda", dtype=torch.float64
    )
    found = room.Hessian(columns)
    found.add(inputs + 0.1 * torch.randn_like(inputs))
    return found.matrix


@pytest.mark.parametrize("bits,group_size,options", (
    (4, 128, {}), (3, 32, {"symmetric": True}), (4, None, {}), (2, 256, {}), (4, 128, {"act_order": True}),
    (4, 128, {"scale_dtype": torch.float16}),
))  # fmt: skip
def test_the_fused_columns_agree_with_float64(bits, group_size, options):
    torch.manual_seed(bits)
    hessian, weight = hessian_of(1024, 300), torch.randn(512, 1024, device="cuda")
    exact = room.gptq_quantize(weight.double(), hessian, bits, group_size, **options)
    ours = room.gptq_quantize(weight, hessian.float(), bits, group_size, fused=True, **options)
    plain = room.gptq_quantize(weight, hessian.float(), bits, group_size, fused=False, **options)
    agreement = (ours.codes == exact.codes).float().mean().item()
    assert agreement >= 0.999, agreement
    errors = [room.layer_error(weight, q.dequantize(), hessian) for q in (ours, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_tf32_stays_out_of_gptq():
    hessian, weight = hessian_of(1024, 300).float(), torch.randn(256, 1024, device="cuda")
    expected = room.gptq_quantize(weight, hessian)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = room.gptq_quantize(weight, hessian)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.codes, expected.codes)


def test_half_precision_inputs_make_an_exact_hessian():
    for dtype in HALVES:
        x = torch.randn(5000, 256, device="cuda").to(dtype)
        ours = room.Hessian(256)
        for part in x.split(1234):
            ours.add(part)
        exact = 2 * x.double().T @ x.double() / 5000
        assert (ours.matrix.double() - exact).abs().max() < 1e-5 * exact.abs().max()


def test_spqr_and_llm_int8_on_the_card():
    hessian, weight = hessian_of(512, 100).float(), torch.randn(300, 512, device="cuda")
    ours = room.spqr_quantize(weight, hessian, 3, 16, outliers=0.01)
    x = torch.randn(40, 512, device="cuda").half()
    exact = x.double() @ ours.dequantize(torch.float64).T
    assert (ours.matmul(x).double() - exact).norm() < 2e-3 * exact.norm()
    from effnlp_lab.quantization.llm_int8 import quantize_int8_weight

    codes, absmax = quantize_int8_weight(weight)
    x[:, 7] *= 40
    for inputs in (x, x[:1], x[:, :509]):
        width = inputs.shape[1]
        exact = inputs.double() @ weight[:, :width].double().T
        found = room.llm_int8_linear(inputs, codes[:, :width].contiguous(), absmax, weight=weight[:, :width])
        assert (found.double() - exact).norm() < 0.03 * exact.norm()


def llama(hidden, layers):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def test_a_model_larger_than_the_cards_share_is_quantized_layer_by_layer(tmp_path):
    model, ids = llama(512, 60), torch.randint(0, 256, (8, 128))
    whole = sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    room.quantize_model(model, ids, group_size=128, device="cuda", folder=tmp_path / "model", progress=False)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.7 * whole, (peak, whole)  # half of it is the widest module's Hessian and its factor in float64
    assert next(model.parameters()).device.type == "cpu"
    again = room.load_quantized(tmp_path / "model", device="cuda")
    prompt = ids[:2, :16].cuda()
    texts = [m.to("cuda").generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0) for m in (model, again)]
    assert torch.equal(*texts) and texts[0].shape[1] == 28


def test_gptq_beats_rounding_on_course_base():
    from effnlp_lab.course.models import load_model, load_tokenizer
    from effnlp_lab.course.text import heldout_documents, train_documents

    def tokens(documents, count):
        found: list[int] = []
        for document in documents:
            found += load_tokenizer()(document.text, verbose=False).input_ids
            if len(found) >= count:
                return torch.tensor(found[:count])
        raise AssertionError("too little text")

    text, pieces = tokens(heldout_documents(), 100_000), tokens(train_documents(), 200_000)
    pieces = room.calibration_sequences(pieces, 64, 512)
    for bits in (4, 3, 2):
        found = {}
        for method in ("rtn", "gptq"):
            model = load_model(device="cuda")
            room.quantize_model(model, pieces, method=method, bits=bits, group_size=64, progress=False)
            found[method] = room.perplexity(model, text)
            errors = [entry["error_over_rtn"] for entry in model.quantization["modules"].values()]
            assert method == "rtn" or max(errors) < 1, errors
        assert found["gptq"] < found["rtn"], (bits, found)
