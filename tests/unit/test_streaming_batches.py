"""Padding, packing and prefetching: beside torch's pad_sequence, a collator of transformers, and attention itself."""

from __future__ import annotations

import gc
import threading
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import effnlp_lab.streaming as room
from effnlp_lab.attention import standard_attention, standard_attention_varlen
from effnlp_lab.errors import UsageError
from effnlp_lab.streaming.packing import assemble

END = 7  # end-of-text, and the padding too
DOCUMENTS = [[1, 2, END], [3, END], [4, 5, 6, 1, END], [END]]


# -- padding


@settings(max_examples=50, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 9), max_size=7), min_size=1, max_size=6), multiple=st.integers(1, 8))
def test_padding_is_torchs_and_the_mask_comes_from_the_lengths(documents, multiple):
    rows = [torch.tensor(document, dtype=torch.int64) for document in documents]
    longest = max(map(len, rows))
    for side in ("right", "left"):
        batch = room.pad_batch(documents, END, side=side, multiple_of=multiple)
        width = batch["input_ids"].shape[1]
        assert width % multiple == 0 and longest <= width < longest + multiple
        spare = slice(0, longest) if side == "right" else slice(width - longest, width)
        for name, filled in (("input_ids", END), ("attention_mask", 0), ("labels", room.IGNORED)):
            wanted = [torch.ones_like(row) for row in rows] if name == "attention_mask" else rows
            expected = pad_sequence(wanted, batch_first=True, padding_value=filled, padding_side=side)
            assert torch.equal(batch[name][:, spare], expected) and batch[name].dtype == torch.int64
            assert (batch[name] == filled).sum() == (expected == filled).sum() + len(rows) * (width - longest)


def test_the_real_end_of_text_is_learned():
    batch = room.pad_batch(DOCUMENTS, pad_id=END, length=6)
    assert batch["labels"].eq(END).sum() == len(DOCUMENTS)
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 5, 1] and batch["input_ids"].shape == (4, 6)


@pytest.mark.parametrize(
    ("documents", "options", "words"),
    [
        ([], {}, "no documents to pad"),
        ([[1] * 9], {"length": 8}, "has 9 tokens, more than length=8"),
        ([[0.5]], {}, "Document 0 is no sequence of whole numbers"),
        ([[1]], {"side": "top"}, "Unknown side 'top'"),
        ([[1]], {"pad_id": None}, "pad_id is None"),
        ([[1]], {"multiple_of": 0}, "multiple_of is 0"),
    ],
)
def test_bad_padding_is_refused(documents, options, words):
    with pytest.raises(UsageError, match=words):
        room.pad_batch(documents, **{"pad_id": 0, **options})


def test_padding_waste_of_twelve_samples_in_batches_of_four():
    lengths = [3, 11, 5, 2, 9, 4, 12, 6, 1, 8, 10, 7]
    ways = {
        "normal": (range(12), 12),
        "dynamic": (range(12), None),
        "sorted": (sorted(range(12), key=lengths.__getitem__), None),
    }
    found = {}
    for name, (order, width) in ways.items():
        batches = list(room.batches_of(order, 4))
        found[name] = room.padding_waste(lengths, batches, width)
        padded = [room.pad_batch([[0] * lengths[i] for i in batch], 0, length=width) for batch in batches]
        slots = sum(batch["attention_mask"].numel() for batch in padded)
        real = sum(int(batch["attention_mask"].sum()) for batch in padded)
        assert (found[name].slots, found[name].tokens, found[name].padding) == (slots, real, slots - real)
    assert [found[name].slots for name in ways] == [144, 132, 96]
    assert str(found["sorted"]) == "18 of 96 slots are padding (18.8%)"
    with pytest.raises(UsageError, match="has 12 tokens, more than width=11"):
        room.padding_waste(lengths, [range(12)], 11)
    with pytest.raises(UsageError, match="length of item 1 is nan"):
        room.padding_waste([1, float("nan")], [[0]])


def test_uniform_length_batches_waste_less_and_lose_nothing(tmp_path):
    documents = [[1] * n for n in np.random.default_rng(0).integers(1, 200, 400)]
    view = room.Documents(room.write_shards(tmp_path / "s", documents, 10, shard_tokens=5000))
    wastes = {}
    for by_length in (None, 5, 50):
        loader = room.StreamLoader(view, 8, by_length=by_length, collate=lambda rows: room.pad_batch(rows, 0), seed=1)
        batches = list(loader)
        real = sum(int(batch["attention_mask"].sum()) for batch in batches)
        assert real == sum(map(len, documents))
        wastes[by_length] = 1 - real / sum(batch["attention_mask"].numel() for batch in batches)
    assert wastes[None] > 0.3 and wastes[5] < wastes[None] / 2 and wastes[50] < wastes[5] / 2


# -- packing

LISTS = st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=12).filter(any)


@settings(max_examples=80, deadline=None)
@given(documents=LISTS, length=st.integers(1, 10), method=st.sampled_from(["next_fit", "best_fit"]))
def test_packing_loses_nothing_and_marks_every_piece(documents, length, method):
    batch = room.pack(documents, length, method=method)
    flat, positions, labels = (x.flatten().tolist() for x in (batch.input_ids, batch.position_ids, batch.labels))
    edges = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32 and edges[0] == 0 and edges[-1] == len(flat)
    pieces = {}
    for begin, end, document in zip(edges[:-1], edges[1:], batch.documents.tolist(), strict=True):
        assert 0 < end - begin <= batch.max_seqlen and begin // length == (end - 1) // length  # in one row
        assert positions[begin:end] == list(range(end - begin))
        assert labels[begin] == room.IGNORED
        if document < 0:
            assert labels[begin:end] == [room.IGNORED] * (end - begin) and flat[begin:end] == [0] * (end - begin)
        else:
            assert labels[begin + 1 : end] == flat[begin + 1 : end]
            pieces.setdefault(document, []).append(flat[begin:end])
    cut = {n: [d[i : i + length] for i in range(0, len(d), length)] for n, d in enumerate(documents) if d}
    assert {n: sorted(found) for n, found in pieces.items()} == {n: sorted(found) for n, found in cut.items()}
    if method == "next_fit":
        assert pieces == cut and list(pieces) == sorted(pieces)
    segments = batch.segment_ids.flatten().tolist()
    assert [s > 0 for s in segments] == [flat[i] > 0 for i in range(len(flat))]
    assert batch.waste == room.Waste(sum(map(len, documents)), len(flat))


def naive_best_fit(lengths, size):
    """Best-fit decreasing by looking at every row."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        best = min((r for r in rooms if r >= length), default=None)
        if best is None:
            rooms.append(size - length)
        else:
            rooms[rooms.index(best)] -= length
    return sorted(rooms)


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), max_size=40))
def test_best_fit_is_best_fit_decreasing(lengths):
    rows = room.best_fit(lengths, 20)
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    assert sorted(20 - sum(lengths[i] for i in row) for row in rows) == naive_best_fit(lengths, 20)


def test_one_row_is_what_transformers_flattens():
    from transformers import DataCollatorWithFlattening

    documents = [[5, 6, 7], [8], [9, 1, 2, 3]]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    theirs = collate([{"input_ids": document} for document in documents])
    ours = room.pack(documents, 8)
    assert torch.equal(ours.input_ids, theirs["input_ids"]) and torch.equal(ours.labels, theirs["labels"])
    assert torch.equal(ours.position_ids, theirs["position_ids"])
    assert torch.equal(ours.cu_seqlens, theirs["cu_seq_lens_q"]) and ours.max_seqlen == theirs["max_length_q"]


def test_packed_documents_attend_to_themselves_alone():
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(1, 50, (n,), generator=generator) for n in (5, 9, 3, 1, 12, 20, 4)]
    batch = room.pack(documents, 16, method="best_fit")
    table = torch.randn(3, 50, 2, 8, generator=generator, dtype=torch.float64)
    q, k, v = (part[batch.input_ids.flatten()] for part in table)
    packed = standard_attention_varlen(q, k, v, batch.cu_seqlens, batch.cu_seqlens, causal=True)
    segments = batch.segment_ids
    block = (segments[:, :, None] == segments[:, None, :]) & torch.ones(16, 16).tril().bool()
    rows = (x.view(-1, 16, 2, 8).transpose(1, 2) for x in (q, k, v))
    masked = F.scaled_dot_product_attention(*rows, attn_mask=block[:, None]).transpose(1, 2).reshape(-1, 2, 8)
    torch.testing.assert_close(packed, masked)
    edges = batch.cu_seqlens.tolist()
    for number, document in enumerate(documents):
        for piece, place in zip(document.split(16), (batch.documents == number).nonzero().flatten(), strict=True):
            alone = standard_attention(*(part[piece].transpose(0, 1)[None] for part in table), causal=True)
            torch.testing.assert_close(packed[edges[place] : edges[place + 1]], alone[0].transpose(0, 1))


def test_a_model_gives_packed_documents_the_losses_of_separate_ones():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    documents = [torch.randint(1, 30, (n,)) for n in (6, 4, 9, 2, 1)]
    batch = room.pack(documents, 12)
    block = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
    mask = (block & torch.ones(12, 12).tril().bool())[:, None]
    with torch.no_grad():
        packed = model(batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, labels=batch.labels).loss
        alone = [model(d[None]).logits[0, :-1] for d in documents]
    separate = F.cross_entropy(torch.cat(alone), torch.cat([d[1:] for d in documents]))
    torch.testing.assert_close(packed, separate.float())  # transformers takes the loss in float32


@settings(max_examples=40, deadline=None)
@given(documents=LISTS, length=st.integers(1, 9), shard_tokens=st.integers(1, 40))
def test_packed_shards_are_packed_documents(tmp_path_factory, documents, length, shard_tokens):
    shards = room.write_shards(tmp_path_factory.mktemp("p") / "s", documents, 10, shard_tokens)
    packed = room.PackedDocuments(shards, length)
    rows, first = [], 0
    for shard in shards.shards:
        inside = range(first, first + shard["documents"])
        first += shard["documents"]
        if shard["tokens"]:
            batch = room.pack([documents[i] for i in inside], length)
            batch.documents[batch.documents >= 0] += inside[0]
            rows.append(batch)
    ours = packed.batch(range(len(packed)))
    for name in ("input_ids", "labels", "position_ids", "segment_ids", "documents"):
        assert torch.equal(getattr(ours, name), torch.cat([getattr(row, name) for row in rows])), name
    assert packed.waste == ours.waste
    last = packed[len(packed) - 1]
    assert torch.equal(last.input_ids[0], ours.input_ids[-1]) and int(last.cu_seqlens[-1]) == length


def test_what_becomes_of_long_documents():
    documents = [[1, 2, 3, 4, 5], [6]]
    assert room.pack(documents, 3).input_ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert room.pack(documents, 3).labels.tolist() == [[-100, 2, 3], [-100, 5, -100]]
    assert room.pack(documents, 3, long="truncate").input_ids.tolist() == [[1, 2, 3], [6, 0, 0]]
    with pytest.raises(UsageError, match="Document 0 has 5 tokens, and a row has 3: give a longer row"):
        room.pack(documents, 3, long="refuse")
    with pytest.raises(UsageError, match="An item of 5 tokens fits no row of 3"):
        room.best_fit([5, 1], 3)
    for bad, words in (([], "nothing to pack"), ([[]], "nothing to pack"), ([[0.1]], "no sequence of whole numbers")):
        with pytest.raises(UsageError, match=words):
            room.pack(bad, 3)
    with pytest.raises(UsageError, match="Unknown method 'worst_fit'"):
        room.pack(documents, 3, method="worst_fit")


# -- prefetching (on the CPU)

Pair = namedtuple("Pair", "ids name")


@dataclass
class Named:
    ids: torch.Tensor
    name: str


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetcher"]


def test_a_prefetcher_gives_the_same_batches_of_any_structure():
    x = torch.arange(3)
    batches = [
        x,
        {"a": x, "n": 3},
        (x, [x, "s"]),
        Pair(x, "p"),
        Named(x, "d"),
        assemble([[(0, np.arange(2))]], 2),
        None,
    ]
    with room.Prefetcher(batches) as prefetcher:
        for _ in range(2):
            found = list(prefetcher)
            assert all(a is b for a, b in zip(found, batches, strict=True)) and not threads()
    assert len(prefetcher) == len(batches)


def test_an_error_comes_after_the_batches_before_it():
    def broken():
        yield from range(5)
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for number in room.Prefetcher(broken(), depth=3):
            seen.append(number)
    assert seen == list(range(5)) and not threads()


def test_batches_are_made_while_the_loop_works():
    made = [threading.Event() for _ in range(6)]

    def batches():
        for number in range(6):
            made[number].set()
            yield number

    for number in room.Prefetcher(batches(), depth=1):
        assert all(event.wait(10) for event in made[: number + 2])  # the next is there before this one is done


def test_leaving_a_loop_ends_the_thread():
    made = []

    def endless():
        while True:
            made.append(len(made))
            yield len(made)

    prefetcher = room.Prefetcher(endless(), depth=2)
    for number in prefetcher:
        if number == 3:
            break
    gc.collect()
    assert not threads() and len(made) <= 3 + 2 + 1
    loop = iter(prefetcher)
    next(loop)
    newer = iter(prefetcher)
    next(newer)
    assert len(threads()) == 1
    prefetcher.close()
    assert not threads()
    for ended in (loop, newer):
        with pytest.raises(UsageError, match="This loop was ended by close"):
            next(ended)
    with pytest.raises(UsageError, match="has no state"):
        prefetcher.state_dict()


def test_a_prefetched_loader_keeps_its_place_over_epochs_and_errors(tmp_path):
    shards = room.write_shards(tmp_path / "s", [range(100)], 100)
    plain = room.StreamLoader(room.Windows(shards, 5), 3, seed=1)
    expected = [[batch.tolist() for batch in plain] for _ in range(3)]
    loader = room.Prefetcher(room.StreamLoader(room.Windows(shards, 5), 3, seed=1), depth=4)
    assert [batch.tolist() for batch in loader] == expected[0]
    assert loader.state_dict()["epoch"] == 1
    with pytest.raises(KeyboardInterrupt):
        for number, batch in enumerate(loader):
            assert batch.tolist() == expected[1][number]
            if number == 2:
                state = loader.state_dict()
                raise KeyboardInterrupt
    assert [batch.tolist() for batch in loader] == expected[1][3:]
    assert [batch.tolist() for batch in loader] == expected[2]
    loader.load_state_dict(state)
    assert [batch.tolist() for batch in loader] == expected[1][3:]


def test_unknown_devices_are_refused():
    for device in ("gpu", "meta") + (() if torch.cuda.is_available() else ("cuda",)):
        with pytest.raises(UsageError, match="device"):
            room.Prefetcher([], device)
    with pytest.raises(UsageError, match="depth is 0"):
        room.Prefetcher([], depth=0)
