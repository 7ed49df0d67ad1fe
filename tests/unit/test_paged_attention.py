"""Paged attention on the CPU: the definition beside torch's own attention, the kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effnlp_lab import paged
from effnlp_lab.attention.configurations import Tile
from effnlp_lab.attention.standard import standard_attention
from effnlp_lab.paged import attention as kernels
from effnlp_lab.paged import tiles


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that a kernel should have written, and did not, holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in a small problem: pages smaller than a tile of keys, and rows of more than one tile."""
    monkeypatch.setattr(tiles, "INTERPRETED", Tile(16, 32, 1, 1))


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(lengths, queries=1, heads=4, kv_heads=2, dim=32, page=16, dtype=torch.float64, seed=0):
    """q, pages, tables, lengths, and the keys and values that are in the pages, one pair for each sequence.

    Everything in the pages that no sequence holds is NaN, and so is a page that unused columns of the tables name.
    """
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(seed)).int()
    tables = torch.full((len(lengths), max(counts) + 1), int(order[-1]), dtype=torch.int32)
    pages = [torch.full((len(order), kv_heads, page, dim), torch.nan, dtype=dtype) for _ in range(2)]
    held, used = [], 0
    for i, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[i, :count] = order[used : used + count]
        used += count
        held.append([draw(kv_heads, n, dim, dtype=dtype, seed=seed + 7 * i + s) for s in (1, 2)])
        for target, x in zip(pages, held[-1], strict=True):
            for t in range(n):
                target[tables[i, t // page], :, t % page] = x[:, t]
    q = draw(len(lengths), queries, heads, dim, dtype=dtype, seed=seed + 99)
    return q, *pages, tables, torch.tensor(lengths, dtype=torch.int32), held


def exact(q, held, dtype=torch.float64, **masks):
    """Standard attention of each sequence by itself, in a dtype."""
    each = []
    for row, kv in zip(q, held, strict=True):
        args = [row.transpose(0, 1)[None], *(x[None] for x in kv)]
        each.append(standard_attention(*(x.to(dtype) for x in args), causal=True, **masks)[0].transpose(0, 1))
    return torch.stack(each)


def close(ours, plain, right, what=""):
    """The kit's rule: twice plain PyTorch's error in the same dtype, the reference's rounding, one eps of its range."""
    assert ours.dtype == plain.dtype and ours.shape == right.shape and ours.isfinite().all(), what
    eps = torch.finfo(ours.dtype).eps
    error, allowed = (ours.double() - right).abs().max(), 2 * (plain.double() - right).abs().max()
    rounding = (right.to(ours.dtype).double() - right).abs().max()
    assert error <= allowed + rounding + eps * right.abs().max(), f"{what}: error {error:.1e}, allowed {allowed:.1e}"


# The definition.


@pytest.mark.parametrize("lengths,queries,masks", [
    ([1, 16, 37], 1, {}), ([20, 33], 3, {}), ([40, 50], 2, {"window": 9}), ([40, 5], 1, {"window": 20, "sinks": 4}),
])  # fmt: skip
def test_the_definition_is_attention_over_what_the_pages_hold(lengths, queries, masks):
    q, *paged_problem, held = problem(lengths, queries)
    ours = paged.gathered_attention(q, *paged_problem, **masks)
    sinks = {"global_tokens": masks["sinks"], "window": masks["window"]} if "sinks" in masks else masks
    torch.testing.assert_close(ours, exact(q, held, **sinks))


def test_the_definition_beside_torch():
    q, *paged_problem, held = problem([37], heads=8, kv_heads=2)
    k, v = (x[None] for x in held[0])
    wanted = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)
    torch.testing.assert_close(paged.gathered_attention(q, *paged_problem), wanted.transpose(1, 2))


# The kernel.


@pytest.mark.parametrize("lengths,queries,kwargs", [
    ([1, 16, 70], 1, {"heads": 8, "kv_heads": 2}),
    ([2, 64], 3, {"heads": 4, "kv_heads": 1, "dtype": torch.float16, "dim": 64}),
    ([45], 8, {"heads": 6, "kv_heads": 2, "page": 32, "dim": 48}),
])  # fmt: skip
@pytest.mark.parametrize("splits", [1, 3])
def test_the_kernel_is_the_definition(small_tiles, lengths, queries, kwargs, splits):
    """Heads that do not fill a tile or need several, a dimension that is no power of two, splits without keys."""
    dtype = kwargs.pop("dtype", torch.float32)
    q, *paged_problem, held = problem(lengths, queries, dtype=dtype, **kwargs)
    ours = paged.paged_attention(q, *paged_problem, splits=splits)
    close(ours, exact(q, held, dtype=dtype), exact(q, held), f"{lengths} {queries} {splits}")


@pytest.mark.parametrize("masks", [{"window": 9}, {"window": 40}, {"window": 11, "sinks": 4}])
@pytest.mark.parametrize("splits", [1, 3])
def test_windows_and_sinks(small_tiles, masks, splits):
    q, *paged_problem, held = problem([5, 90], 2, dtype=torch.float32)
    ours = paged.paged_attention(q, *paged_problem, **masks, splits=splits)
    standard = {"window": masks["window"], "global_tokens": masks.get("sinks", 0)}
    close(ours, exact(q, held, dtype=torch.float32, **standard), exact(q, held, **standard), str(masks))


def test_sinks_are_seen_from_another_position(small_tiles):
    q, *paged_problem, held = problem([5, 90], 2, dtype=torch.float32)
    masks = {"window": 11, "sinks": 4, "q_sink": draw(*q.shape, dtype=torch.float32, seed=5)}
    right = paged.gathered_attention(
        q.double(), *(x.double() for x in paged_problem[:2]), *paged_problem[2:],
        **masks | {"q_sink": masks["q_sink"].double()},
    )  # fmt: skip
    for splits in (1, 3):
        ours = paged.paged_attention(q, *paged_problem, **masks, splits=splits)
        close(ours, paged.gathered_attention(q, *paged_problem, **masks), right)


def test_ragged_queries_and_rows_of_a_larger_table(small_tiles):
    """Chunks of prompts beside decoding: 1, 20 and 7 queries laid end to end, their tables in other rows."""
    q, k_pages, v_pages, tables, lengths, held = problem([30, 40, 7], dtype=torch.float32)
    counts = [1, 20, 7]
    starts = torch.tensor([0, 1, 21, 28], dtype=torch.int32)
    q = draw(28, 4, 32, dtype=torch.float32, seed=3)
    rows = torch.tensor([4, 0, 2], dtype=torch.int32)
    larger = torch.zeros(5, tables.shape[1], dtype=torch.int32)
    larger[rows.long()] = tables
    ours = paged.paged_attention(
        q, k_pages, v_pages, larger, lengths, rows=rows, starts=starts, most_queries=20
    )  # fmt: skip
    definition = paged.gathered_attention_varlen(q, k_pages, v_pages, tables, lengths, starts)
    right = torch.cat([exact(part[None], [kv])[0] for part, kv in zip(q.split(counts), held, strict=True)])
    close(ours, definition, right)


@pytest.mark.parametrize("change", [
    {"q": torch.zeros(1, 1, 4, 32, dtype=torch.float64)}, {"q": torch.zeros(1, 4, 32)}, {"window": 0}, {"sinks": 3},
    {"q": torch.zeros(1, 1, 3, 32)}, {"k_pages": torch.zeros(2, 2, 24, 32), "v_pages": torch.zeros(2, 2, 24, 32)},
    {"block_tables": torch.zeros(1, 2)}, {"lengths": torch.ones(3, dtype=torch.int32)}, {"scale": -1.0},
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_sentence(change):
    good = {
        "q": torch.zeros(1, 1, 4, 32), "k_pages": torch.zeros(2, 2, 16, 32), "v_pages": torch.zeros(2, 2, 16, 32),
        "block_tables": torch.zeros(1, 2, dtype=torch.int32), "lengths": torch.ones(1, dtype=torch.int32),
    }  # fmt: skip
    assert paged.paged_attention(**good).shape == (1, 1, 4, 32)
    with pytest.raises((ValueError, TypeError), match=r"[.:]"):
        paged.paged_attention(**good | change)


# Writing, and what else is fused.


def test_keys_and_values_go_to_their_slots_and_nowhere_else():
    k, v = (draw(5, 3, 40, dtype=torch.float32, seed=s) for s in (1, 2))
    k_pages, v_pages = (torch.full((4, 3, 16, 40), 7.0) for _ in range(2))
    slots = torch.tensor([16, 63, -1, 0, 33])
    wanted = [x.clone() for x in (k_pages, v_pages)]
    for token, slot in enumerate(slots.tolist()):
        for target, x in zip(wanted, (k, v), strict=True):
            if slot >= 0:
                target[slot // 16, :, slot % 16] = x[token]
    paged.write_pages(k, v, k_pages, v_pages, slots)
    assert torch.equal(k_pages, wanted[0]) and torch.equal(v_pages, wanted[1])


def test_rotation_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    qkv = draw(5, 6 + 2 * 3, 32, dtype=torch.float32)  # as one product gives them: views that are not contiguous
    q, k, v = qkv.split((6, 3, 3), dim=1)
    angles = torch.arange(40)[:, None] * 0.5 ** torch.arange(16)
    cos, sin = angles.cos(), angles.sin()
    positions, slots = torch.tensor([3, 39, 0, 8, 21]), torch.tensor([5, 16, 17, 31, 2])
    k_pages, v_pages = torch.zeros(2, 3, 16, 32), torch.zeros(2, 3, 16, 32)
    rotated, sink = paged.rotate_and_write(q, k, v, k_pages, v_pages, slots, positions, cos, sin, 10)

    def wanted(at):
        return apply_rotary_pos_emb(q, k, cos[at].repeat(1, 2), sin[at].repeat(1, 2), unsqueeze_dim=1)

    torch.testing.assert_close(rotated, wanted(positions)[0])
    torch.testing.assert_close(sink, wanted(positions.clamp(max=10))[0])
    torch.testing.assert_close(k_pages[slots // 16, :, slots % 16], wanted(positions)[1])
    assert torch.equal(v_pages[slots // 16, :, slots % 16], v)


@pytest.mark.parametrize("columns", [32, 200])
def test_normalisation_and_activation_are_the_modules(columns):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, residual = (draw(3, columns, dtype=torch.float32, seed=s) for s in (1, 2))
    norm = LlamaRMSNorm(columns, eps=1e-6)
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(kernels.rms_norm(x, norm.weight.detach(), 1e-6), norm(x).detach())
    total = x + residual
    out = kernels.rms_norm(x, norm.weight.detach(), 1e-6, residual)
    torch.testing.assert_close(out, norm(total).detach())
    assert torch.equal(residual, total)
    gate, up = draw(3, 2 * columns, dtype=torch.float32).chunk(2, dim=1)
    torch.testing.assert_close(kernels.silu_and_multiply(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_greedy_token_is_the_first_of_the_largest_and_the_slots_newest(dtype):
    logits = draw(5, 20000, dtype=torch.float32, seed=3).to(dtype)
    logits[2] = logits[2].round()  # many are the largest
    logits[3], logits[4, :-1] = float("-inf"), -1e30
    newest, slots = torch.full((9,), -1), torch.tensor([3, 1, 8, 4, 0], dtype=torch.int32)
    assert torch.equal(kernels.greedy(logits, newest, slots), logits.argmax(-1))
    assert torch.equal(newest[slots.long()], logits.argmax(-1)) and (newest == -1).sum() == 4
    part = logits[:, 100:170]
    assert torch.equal(kernels.greedy(part, newest, slots), part.argmax(-1))


def test_splits_fill_the_card_and_stay_within_bounds(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    cuda, slots = torch.device("cuda", 0), 132 * tiles.PROGRAMS_PER_SM
    choose = tiles.choose_splits.__wrapped__
    for programs in (1, 8, 32, 264, 1024):
        for longest in (1, 100, 4096, 131072):
            splits = choose(programs, longest, 64, cuda)
            assert 1 <= splits <= min(tiles.MAX_SPLITS, -(-longest // 64))
    assert choose(8, 32768, 64, cuda, "prompt") == 8 and choose(300, 32768, 64, cuda, "prompt") == 1
    assert choose(8, 32768, 64, cuda) * 8 > 0.89 * slots and choose(1024, 4096, 64, cuda) == 1
    for programs in (16, 64, 256):  # as near to the wanted waves as whole shares come
        assert abs(choose(programs, 8192, 64, cuda, "ragged") * programs - tiles.RAGGED_WAVES * slots) <= programs / 2
    assert choose(2048, 4096, 64, cuda, "ragged") == 1  # eight waves as they are
    assert choose(256, 4096, 64, cuda) == 1 and choose(512, 4096, 64, cuda) == 2  # one wave, four instead of two
    assert choose(512, 1024, 64, cuda) == 1 and choose(128, 1024, 64, cuda) == 2  # too short; one wave of short ones
    assert choose(400, 64, 64, cuda) == 1  # a single tile of keys cannot be shared out
    assert tiles.merging(2, 64).warps == 1 and tiles.merging(128, 128).warps == 4
