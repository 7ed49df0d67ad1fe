"""Judges the answers of lab 02: cases, right outputs from definitions written for clarity, and mistakes."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import torch

from effnlp_lab.exercises.compare import Finding, compare
from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng, edit

EARLIER: dict[str, Any] = {}  # no answer of this lab calls an earlier one
MOST = 65_535  # the largest token that two bytes hold


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """As the notebook gives it."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def some_documents(rng: Rng, count: int, longest: int, low: int = 0) -> list[list[int]]:
    return [rng.ints(rng.int(1, longest), low, MOST) for _ in range(count)]


def shards_of(documents: list[list[int]], shard_tokens: int) -> list[list[list[int]]]:
    """The documents of each shard: a shard is closed when the next document does not fit."""
    shards: list[list[list[int]]] = []
    for document in documents:
        if not shards or sum(map(len, shards[-1])) + len(document) > shard_tokens:
            shards.append([])
        shards[-1].append(document)
    return shards


def offsets_of(documents: list[list[int]]) -> list[int]:
    return [sum(map(len, documents[:n])) for n in range(len(documents) + 1)]


def shard_file(number: int) -> str:
    return f"shard_{number:05d}.bin"


class Told(Reference):
    """Says in its own words what is wrong (`finding`); outputs of another form than drive.py gives are told plainly."""

    def finding(self, inputs, outputs, expected, variant) -> Finding | None:
        raise NotImplementedError

    def verify(self, inputs, outputs, expected, variant):
        try:
            return self.finding(inputs, outputs, expected, variant)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return compare(outputs, expected) or Finding("what your answer gave cannot be read")


class Tables(Told):
    """Outputs that are lists of dicts of tensors, told by their place: "labels of batch 2"."""

    what: str

    def finding(self, inputs, outputs, expected, variant):
        if isinstance(outputs, list) and len(outputs) != len(expected):
            return Finding(f"{len(outputs)} {self.plural} came out, and {len(expected)} are right")
        return self._first_difference(outputs, expected)

    def same_slip(self, outputs, wrong):
        same = isinstance(outputs, list) and isinstance(wrong, list) and len(outputs) == len(wrong)
        return same and self._first_difference(outputs, wrong) is None

    @property
    def plural(self) -> str:
        return f"{self.what}es" if self.what.endswith("h") else f"{self.what}s"

    def _first_difference(self, outputs, expected) -> Finding | None:
        if not isinstance(outputs, list):
            return compare(outputs, expected)
        for number, (got, want) in enumerate(zip(outputs, expected, strict=True)):
            if not isinstance(got, dict) or set(got) != set(want):
                return compare(got, want, path=f"{self.what} {number}")
            for name, right in want.items():
                if found := compare(got[name], right, path=f"{name} of {self.what} {number}"):
                    given = got[name].tolist() if isinstance(got[name], torch.Tensor) else got[name]
                    return Finding(found.sentence, {**found.details, "expected": right.tolist(), "got": given})
        return None


class WriteShards(Told):
    exercise = "write_shards"
    mistakes = (
        Mistake(
            "everything held",
            "Nothing was on disk when the stream broke off: write a shard as soon as the next document does not fit, "
            "and do not hold the whole stream.",
            edit("    index = []", "    documents = list(documents)\n    index = []"),
        ),
        Mistake(
            "cut anywhere",
            "A document lies in one shard as a whole: close the shard before a document that does not fit.",
            """
def write_shards(documents, folder, shard_tokens):
    index, tokens, offsets = [], [], [0]
    for document in documents:
        while document:
            room = shard_tokens - len(tokens)
            tokens, document = tokens + document[:room], document[room:]
            offsets = offsets + [len(tokens)]
            if len(tokens) == shard_tokens:
                np.array(tokens, dtype="<u2").tofile(folder / shard_name(len(index)))
                index, tokens, offsets = index + [offsets], [], [0]
    if tokens:
        np.array(tokens, dtype="<u2").tofile(folder / shard_name(len(index)))
        index = index + [offsets]
    return index
""",
        ),
        Mistake(
            "overfull",
            "Look before you add: this shard has more than shard_tokens tokens, and more than one document.",
            edit("tokens and len(tokens) + len(document) > shard_tokens", "len(tokens) > shard_tokens"),
        ),
        Mistake(
            "full too early",
            "A shard may be exactly full: close it when the next document would take it over shard_tokens, not to it.",
            edit("len(document) > shard_tokens", "len(document) >= shard_tokens"),
        ),
        Mistake(
            "an empty shard first",
            "A document longer than shard_tokens gets a shard of its own, and no empty shard comes before it.",
            edit("tokens and len(tokens)", "len(tokens)"),
        ),
        Mistake(
            "last shard lost",
            "The last shard is missing: when the documents end, what you hold still has to be written.",
            edit("    if tokens:\n        close()", "    pass"),
        ),
        Mistake(
            "offsets over all",
            "Offsets count from the beginning of their own shard: every shard's list begins with 0.",
            edit("index.append(offsets)", "index.append([(index[-1][-1] if index else 0) + one for one in offsets])"),
        ),
        Mistake(
            "lengths for offsets",
            "Those are lengths: an offset says where a document begins, so it is the sum of the lengths before it.",
            edit("offsets.append(len(tokens))", "offsets.append(len(document))"),
        ),
        Mistake(
            "no end",
            "The last offset is missing: n documents have n + 1 offsets, and the last one is the end of the shard.",
            edit("index.append(offsets)", "index.append(offsets[:-1])"),
        ),
        Mistake(
            "eight bytes",
            'A token takes two bytes on disk: give the array the dtype "<u2"; the default takes eight.',
            edit(', dtype="<u2"', ""),
        ),
        Mistake(
            "big end first",
            'The bytes of each token are swapped: "<u2" has the little end first, ">u2" the big end.',
            edit('"<u2"', '">u2"'),
        ),
        Mistake(
            "one file",
            "Every shard goes to a file of its own: shard_name(0), shard_name(1), and so on.",
            edit("shard_name(len(index))", "shard_name(0)"),
        ),
    )

    def cases(self, rng, variant):
        documents = some_documents(rng, 3, 5, low=256)
        size = sum(map(len, documents))
        yield self._case("one shard", documents, size + rng.int(1, 5))
        yield self._case("exactly full", [*documents, *some_documents(rng, 2, 4)], size)
        yield self._case("one token too many", documents, size - 1)
        yield self._case("a document for each shard", [rng.ints(4, 0, MOST) for _ in range(3)], 5)
        yield self._case("a long document first", [rng.ints(9, 0, MOST), rng.ints(2, 0, MOST)], 5)
        short = [rng.ints(rng.int(1, 3), 0, MOST) for _ in range(3)]
        yield self._case("a long document between", [short[0], rng.ints(12, 0, MOST), *short[1:]], 5)
        yield self._case("the smallest and the largest token", [[0, MOST], [256, 255]], 3)
        yield self._case("one document", [rng.ints(3, 0, MOST)], 3)
        yield self._case("no documents", [], 4)
        yield self._case("many documents", some_documents(rng, 40, 9), rng.int(12, 30))
        for name, count, size in (("cut off in the third shard", 9, 6), ("cut off later", 30, 12)):
            documents = [rng.ints(3, 0, MOST) for _ in range(count)]
            after = rng.int(count // 2 + 1, count - 1)  # documents drawn before the stream ends
            full = len(shards_of(documents[:after], size)) - 1
            yield Case(
                name,
                {"documents": documents, "shard_tokens": size, "interrupted_after": after, "full": full},
                part="stream",
            )

    @staticmethod
    def _case(name: str, documents: list[list[int]], shard_tokens: int) -> Case:
        return Case(name, {"documents": documents, "shard_tokens": shard_tokens}, part="shards")

    def expected(self, inputs, variant):
        shards = shards_of(inputs["documents"], inputs["shard_tokens"])
        files = {shard_file(n): sum(shard, []) for n, shard in enumerate(shards)}
        if "full" in inputs:
            return {"files": dict(list(files.items())[: inputs["full"]])}
        return {"index": [offsets_of(shard) for shard in shards], "files": files}

    def finding(self, inputs, outputs, expected, variant):
        got, want = outputs.get("files", {}), expected["files"]
        if "full" in inputs and got != want:
            drawn = inputs["interrupted_after"]
            return Finding(
                f"the stream of documents broke off after {drawn}, when {len(want)} shards were complete, and not all "
                "of them are on disk",
                {"expected": {name: len(t) for name, t in want.items()}, "got": {n: len(t) for n, t in got.items()}},
            )
        if set(got) != set(want):
            return Finding(
                f"the folder holds {', '.join(got) or 'no shard'}, and {', '.join(want) or 'no shard'} is right"
            )
        for name, tokens in want.items():
            if found := compare(got[name], tokens, path=f"{name}, read as two bytes a token,"):
                return found
        return None if "full" in inputs else compare(outputs["index"], expected["index"], path="the index")


class ReadDocument(Told):
    exercise = "read_document"
    mistakes = (
        Mistake(
            "the whole shard",
            "You read the whole shard to get one document: map the file, and take only the slice.",
            edit('np.memmap(folder / shard_name(shard), dtype="<u2", mode="r")',
                 'np.fromfile(folder / shard_name(shard), dtype="<u2")'),
        ),
        Mistake(
            "the whole shard, converted",
            "You convert the whole shard before you slice, and conversion copies: slice first, then convert.",
            edit("tokens[first:last].astype(np.int64)", "tokens.astype(np.int64)[first:last]"),
        ),
        Mistake(
            "all shards",
            "You open shards that the document is not in: find its shard in the index, and open that one alone.",
            """
def read_document(folder, index, number):
    documents = []
    for shard, offsets in enumerate(index):
        tokens = np.memmap(folder / shard_name(shard), dtype="<u2", mode="r")
        documents += [tokens[a:b] for a, b in zip(offsets, offsets[1:])]
    return torch.from_numpy(documents[number].astype(np.int64))
""",
        ),
        Mistake(
            "signed",
            "Tokens from 32,768 on come out negative: the bytes are unsigned, so the dtype is \"<u2\".",
            edit('"<u2"', '"<i2"'),
        ),
        Mistake(
            "one short",
            "The last token is missing: a slice ends before its second number, so do not subtract 1.",
            edit("first:last]", "first : last - 1]"),
        ),
        Mistake(
            "offsets counted as documents",
            "A shard with n + 1 offsets holds n documents: your count of the documents before a shard is too high.",
            (
                edit("while number >= len(index[shard]) - 1:", "while number >= len(index[shard]):"),
                edit("number -= len(index[shard]) - 1", "number -= len(index[shard])"),
            ),
        ),
        Mistake(
            "boundary late",
            "The first document of a shard is not in the shard before: a shard of n documents holds 0 to n - 1.",
            edit("number >= len(index[shard]) - 1", "number > len(index[shard]) - 1"),
        ),
        Mistake(
            "always the first shard",
            "Documents are numbered over all shards: subtract the documents of the shards before yours.",
            """
def read_document(folder, index, number):
    shard = 0
    number = number % (len(index[0]) - 1)
    first, last = index[shard][number], index[shard][number + 1]
    tokens = np.memmap(folder / shard_name(shard), dtype="<u2", mode="r")
    return torch.from_numpy(tokens[first:last].astype(np.int64))
""",
        ),
        Mistake(
            "bytes for tokens",
            "An offset counts tokens, and a token takes two bytes: seek to 2 * offset.",
            """
def read_document(folder, index, number):
    shard = 0
    while number >= len(index[shard]) - 1:
        number -= len(index[shard]) - 1
        shard += 1
    first, last = index[shard][number], index[shard][number + 1]
    with open(folder / shard_name(shard), "rb") as file:
        file.seek(first)
        tokens = np.frombuffer(file.read(2 * (last - first)), dtype="<u2")
    return torch.from_numpy(tokens.astype(np.int64))
""",
        ),
        Mistake(
            "two bytes in the model",
            "Embeddings want int64: convert the slice with astype(np.int64).",
            edit("astype(np.int64)", "astype(np.int32)"),
        ),
    )

    def cases(self, rng, variant):
        first, second, third = (some_documents(rng, n, 6, low=1) for n in (3, 1, 4))
        first[0], first[2] = rng.ints(3, 1, MOST), rng.ints(2, 1, MOST)
        yield self._case("one shard", [first], [0, 1, 2])
        yield self._case("the first documents of three shards", [first, second, third], [0, 3, 4])
        yield self._case("the last documents of three shards", [first, second, third], [2, 3, 7])
        yield self._case("the first document of the third shard", [first, second, third], [4])
        yield self._case("large tokens", [[[1, MOST], [32_768, 32_767, 40_000]]], [1, 0])
        yield self._case("shards of one document", [[one] for one in first], [1, 2, 0])
        many = [some_documents(rng, rng.int(1, 5), 8) for _ in range(6)]
        numbers = rng.shuffled(range(sum(map(len, many))))[:6]
        yield self._case("many shards, any order", many, numbers)
        yield self._case("two shards are elsewhere", [first, second, third], [3, 3], absent=[0, 2])
        gap = 4_000_000 + rng.int(0, 99)
        runs = [some_documents(rng, 1, 5)[0], rng.ints(4, 1, MOST)]
        offsets = [0, len(runs[0]), len(runs[0]) + gap, len(runs[0]) + gap + len(runs[1])]
        inputs = {"shards": [runs], "index": [offsets], "numbers": [0, 2], "gap": gap}
        yield Case("four million tokens between two documents", inputs, part="lazy")

    @staticmethod
    def _case(name: str, shards: list[list[list[int]]], numbers: list[int], absent: list[int] | None = None) -> Case:
        inputs = {
            "shards": [[sum(shard, [])] for shard in shards],
            "index": [offsets_of(shard) for shard in shards],
            "numbers": numbers,
        }
        return Case(name, inputs | ({"absent": absent} if absent else {}), part="lazy" if absent else "documents")

    def expected(self, inputs, variant):
        places = [(n, a, b) for n, offsets in enumerate(inputs["index"]) for a, b in pairwise(offsets)]
        found = []
        for number in inputs["numbers"]:
            shard, first, last = places[number]
            runs, gap = inputs["shards"][shard], inputs.get("gap", 0)
            if gap:  # the documents asked for lie at the two ends of the hole
                found.append(torch.tensor(runs[0] if number == 0 else runs[-1]))
            else:
                found.append(torch.tensor(sum(runs, [])[first:last]))
        return {"documents": found, "memory": "small"}

    def finding(self, inputs, outputs, expected, variant):
        for number, got, want in zip(inputs["numbers"], outputs["documents"], expected["documents"], strict=True):
            if found := compare(got, want, path=f"document {number}"):
                return found
        if outputs["memory"] != "small":
            return Finding(
                f"document {inputs['numbers'][-1]} has {len(expected['documents'][-1])} tokens, and to read it your "
                f"answer took as much memory as {outputs['memory']}",
                {"tokens in the shard": inputs["index"][-1][-1]},
            )
        return None


class WorkerBatches(Told):
    exercise = "worker_batches"
    mistakes = (
        Mistake(
            "every worker",
            "Samples appear once per worker: worker w of a rank takes the steps w, w + workers, w + 2 workers, "
            "and leaves the others to the others.",
            edit("range(worker * global_batch, count, workers * global_batch)", "range(0, count, global_batch)"),
        ),
        Mistake(
            "every rank",
            "Samples appear once per rank: of each global batch a rank takes its own piece alone.",
            edit("batch[first : first + size + (rank < extra)]", "batch"),
        ),
        Mistake(
            "shuffled per rank",
            "Slices overlap: every rank has shuffled differently. Shuffle by (seed, epoch), then slice.",
            edit("order = epoch_order(count, seed, epoch)", "order = epoch_order(count, seed + rank, epoch)"),
        ),
        Mistake(
            "shuffled per worker",
            "Slices overlap: every worker has shuffled differently. Shuffle by (seed, epoch), then slice.",
            edit("order = epoch_order(count, seed, epoch)", "order = epoch_order(count, seed + worker, epoch)"),
        ),
        Mistake(
            "one order for all epochs",
            "Every epoch comes in the same order: the order depends on the seed and on the epoch.",
            edit("order = epoch_order(count, seed, epoch)", "order = epoch_order(count, seed, 0)"),
        ),
        Mistake(
            "not shuffled",
            "The samples come in their order on disk: take the numbers from epoch_order(count, seed, epoch).",
            edit("order = epoch_order(count, seed, epoch)", "order = list(range(count))"),
        ),
        Mistake(
            "short batch dropped",
            "The last batch is short, and still holds samples: they are lost.",
            edit("worker * global_batch, count, workers", "worker * global_batch, count - global_batch + 1, workers"),
        ),
        Mistake(
            "remainder dropped",
            "A batch that does not divide among the ranks loses its remainder: some ranks get one sample more.",
            edit("batch[first : first + size + (rank < extra)]", "batch[rank * size : (rank + 1) * size]"),
        ),
        Mistake(
            "remainder to one rank",
            "One rank gets the whole remainder: pieces differ by at most one sample.",
            edit(
                "batch[first : first + size + (rank < extra)]",
                "batch[rank * size : (rank + 1) * size if rank + 1 < ranks else len(batch)]",
            ),
        ),
        Mistake(
            "remainder to the last ranks",
            "The remainder goes to the first ranks, one sample each, and you gave it to the last.",
            (
                edit("rank * size + min(rank, extra)", "rank * size + max(0, rank - (ranks - extra))"),
                edit("(rank < extra)", "(rank >= ranks - extra)"),
            ),
        ),
        Mistake(
            "pieces rounded up",
            "Pieces rounded up leave too little to the last ranks: their lengths differ by more than one.",
            edit(
                "batch[first : first + size + (rank < extra)]",
                "batch[rank * -(-len(batch) // ranks) : (rank + 1) * -(-len(batch) // ranks)]",
            ),
        ),
        Mistake(
            "every n-th sample",
            "A rank's piece is a run of neighbours in the global batch, and not every n-th sample of it.",
            edit("batch[first : first + size + (rank < extra)]", "batch[rank::ranks]"),
        ),
        Mistake(
            "runs of steps",
            "DataLoader asks its workers in turn: steps go round the workers, and are not dealt out in runs.",
            edit(
                "range(worker * global_batch, count, workers * global_batch)",
                "range(0, count, global_batch)[worker * -(-(-(-count // global_batch)) // workers) :"
                "(worker + 1) * -(-(-(-count // global_batch)) // workers)]",
            ),
        ),
        Mistake(
            "empty pieces skipped",
            "Where a batch has fewer samples than there are ranks, a rank without any delivers an empty list: all "
            "ranks make the same number of steps.",
            edit("    return batches", "    return [batch for batch in batches if batch]"),
        ),
        Mistake(
            "batches of a rank",
            "global_batch counts the samples of all ranks together, and not of each.",
            (
                edit("    order =", "    global_batch = global_batch * ranks\n    order ="),
            ),
        ),
    )

    def cases(self, rng, variant):
        for name, count, batch, ranks, workers, part in (
            ("one rank, one worker", 12, 4, 1, 1, "even"),
            ("one rank, three workers", 24, 4, 1, 3, "even"),
            ("two ranks", 16, 4, 2, 1, "even"),
            ("two ranks of two workers", 36, 6, 2, 2, "even"),
            ("four ranks of three workers", 96, 8, 4, 3, "even"),
            ("more workers than steps", 8, 4, 2, 3, "even"),
            ("a short last batch", 19, 4, 1, 2, "remainders"),
            ("ranks that do not divide the batch", 24, 8, 3, 1, "remainders"),
            ("a remainder of two", 33, 11, 3, 2, "remainders"),
            ("a remainder of three", 21, 7, 4, 2, "remainders"),
            ("a remainder of one", 27, 9, 4, 2, "remainders"),
            ("nothing divides", 41, 11, 4, 3, "remainders"),
            ("fewer samples than ranks at the end", 17, 5, 5, 2, "remainders"),
            ("one sample", 1, 3, 2, 2, "remainders"),
        ):
            yield self._case(rng, name, count, batch, ranks, workers, part)
        yield self._case(rng, "no samples", 0, 4, 2, 2, "even")
        yield self._case(
            rng, "any numbers", rng.int(30, 90), rng.int(5, 13), rng.int(2, 5), rng.int(1, 4), "remainders"
        )

    @staticmethod
    def _case(rng: Rng, name: str, count: int, batch: int, ranks: int, workers: int, part: str) -> Case:
        inputs = {"count": count, "global_batch": batch, "seed": rng.int(0, 999), "epoch": rng.int(1, 99),
                  "ranks": ranks, "workers": workers}
        return Case(name, inputs, part=part)

    def expected(self, inputs, variant):
        order, size = epoch_order(inputs["count"], inputs["seed"], inputs["epoch"]), inputs["global_batch"]
        ranks, workers = inputs["ranks"], inputs["workers"]
        steps = [order[begin : begin + size] for begin in range(0, inputs["count"], size)]
        mine: list[list[list[int]]] = [[] for _ in range(ranks)]
        for batch in steps:
            begin = 0
            for rank in range(ranks):
                extra = len(batch) % ranks
                longer = rank < extra if variant["remainder"] == "first" else rank >= ranks - extra
                end = begin + len(batch) // ranks + longer
                mine[rank].append(batch[begin:end])
                begin = end
        return [[mine[rank][worker::workers] for worker in range(workers)] for rank in range(ranks)]

    def finding(self, inputs, outputs, expected, variant):
        try:
            seen = Counter(n for rank in outputs for worker in rank for batch in worker for n in batch)
        except TypeError:
            seen = None
        if seen is not None and all(type(n) is int for n in seen):
            twice = sorted(n for n, times in seen.items() if times > 1)
            lost = [n for n in range(inputs["count"]) if n not in seen]
            told = []
            if twice:
                told.append(f"{len(twice)} samples come more than once (sample {twice[0]}: {seen[twice[0]]} times)")
            if lost:
                told.append(f"{len(lost)} samples come nowhere (sample {lost[0]}, for one)")
            if told:
                return Finding(
                    f"over all {inputs['ranks']} ranks and {inputs['workers']} workers, " + " and ".join(told),
                    {"rank 0, worker 0 should deliver": expected[0][0], "and delivers": outputs[0][0]},
                )
        for rank, (gots, wants) in enumerate(zip(outputs, expected, strict=True)):
            for worker, (got, want) in enumerate(zip(gots, wants, strict=True)):
                if found := compare(got, want, path=f"the list of batches of rank {rank}, worker {worker}"):
                    return found
        return None


CHUNKS = """
def shuffle_buffer(stream, size, uniforms):
    buffer = []
    for item in stream:
        buffer.append(item)
        if len(buffer) == size:
            while buffer:
                yield buffer.pop(int(next(uniforms) * len(buffer)))
    while buffer:
        yield buffer.pop(int(next(uniforms) * len(buffer)))
"""
ALL_FIRST = """
def shuffle_buffer(stream, size, uniforms):
    items = list(stream)
    buffer, rest = items[:size], items[size:]
    for item in rest:
        place = int(next(uniforms) * size)
        yield buffer[place]
        buffer[place] = item
    while buffer:
        yield buffer.pop(int(next(uniforms) * len(buffer)))
"""
ONE_TOO_MANY = """
def shuffle_buffer(stream, size, uniforms):
    buffer = []
    for item in stream:
        buffer.append(item)
        if len(buffer) > size:
            place = int(next(uniforms) * len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            yield buffer.pop()
    while buffer:
        yield buffer.pop(int(next(uniforms) * len(buffer)))
"""


class ShuffleBuffer(Told):
    exercise = "shuffle_buffer"
    mistakes = (
        Mistake(
            "buffer never emptied",
            "The last items are lost: when the stream ends, the buffer still holds `size` of them.",
            edit("    while buffer:\n        yield buffer.pop(int(next(uniforms) * len(buffer)))", "    pass"),
        ),
        Mistake(
            "emptied in order",
            "The items left in the buffer come out in order: choose among them too, one uniform each.",
            edit("    while buffer:\n        yield buffer.pop(int(next(uniforms) * len(buffer)))",
                 "    yield from buffer"),
        ),
        Mistake(
            "chunks",
            "You empty the buffer and fill it anew: items never leave their chunk. Deliver one item, take in one item.",
            CHUNKS,
        ),
        Mistake(
            "everything first",
            "You read the whole stream first, which may not fit into memory: hold at most `size` items.",
            ALL_FIRST,
        ),
        Mistake(
            "one too many",
            "The buffer holds one item too many: choose among the `size` items in it, before the new one comes in.",
            ONE_TOO_MANY,
        ),
        Mistake(
            "one too few",
            "The buffer holds one item too few: deliver nothing before it holds `size` items.",
            (
                edit("if len(buffer) < size:", "if len(buffer) < max(1, size - 1):"),
                edit("next(uniforms) * size", "next(uniforms) * len(buffer)"),
            ),
        ),
        Mistake(
            "rounded",
            "int(u * n) gives 0 to n - 1, each equally often; round(u * n) gives n too, which is no place.",
            edit("int(next(uniforms) * size)", "min(size - 1, round(next(uniforms) * size))"),
        ),
        Mistake(
            "new item at the end",
            "The new item takes the place of the delivered one: a pop moves the others, so the next choice differs.",
            (
                edit("yield buffer[place]", "yield buffer.pop(place)"),
                edit("buffer[place] = item", "buffer.append(item)"),
            ),
        ),
        Mistake(
            "last moved up",
            "At the end the items behind the delivered one shift up by one place; you moved the last one there.",
            edit(
                "        yield buffer.pop(int(next(uniforms) * len(buffer)))",
                "        place = int(next(uniforms) * len(buffer))\n"
                "        buffer[place], buffer[-1] = buffer[-1], buffer[place]\n"
                "        yield buffer.pop()",
            ),
        ),
        Mistake(
            "always over size",
            "At the end the buffer has fewer than `size` items: multiply the uniform by what is left.",
            edit(
                "buffer.pop(int(next(uniforms) * len(buffer)))",
                "buffer.pop(min(len(buffer) - 1, int(next(uniforms) * size)))",
            ),
        ),
        Mistake(
            "the new item delivered",
            "You deliver the item that has just come, in order, and keep the chosen one: deliver the chosen one.",
            (
                edit("yield buffer[place]", "yield item"),
                edit("buffer[place] = item", "pass"),
            ),
        ),
    )

    def cases(self, rng, variant):
        yield self._case(rng, "a long stream", 40, 8, "order")
        yield self._case(rng, "a buffer of two", 12, 2, "order")
        yield self._case(rng, "a buffer of one", 6, 1, "order")
        yield self._case(rng, "a buffer as long as the stream", 7, 7, "order")
        yield self._case(rng, "one item more than the buffer", 9, 8, "order")
        yield self._case(rng, "a buffer longer than the stream", 5, 9, "order")
        yield self._case(rng, "one item", 1, 3, "order")
        yield self._case(rng, "no items", 0, 3, "order")
        yield self._case(rng, "equal items", 20, 4, "order", items=[rng.int(0, 3) for _ in range(20)])
        ends = self._case(rng, "uniforms at the ends of their range", 12, 4, "order")
        ends.inputs["uniforms"][:] = [rng.choice([0.0, 0.999999, 0.5]) for _ in ends.inputs["uniforms"]]
        yield ends
        yield self._case(rng, "much longer than the buffer", 200, rng.int(5, 20), "lazy")

    @staticmethod
    def _case(rng: Rng, name: str, count: int, size: int, part: str, items: list[int] | None = None) -> Case:
        uniforms = [rng.float() for _ in range(count + size + 2)]
        items = items or [100 + n for n in range(count)]
        return Case(name, {"stream": items[:count], "size": size, "uniforms": uniforms}, part=part)

    def expected(self, inputs, variant):
        waiting, uniforms = list(inputs["stream"]), list(inputs["uniforms"])
        size, out = inputs["size"], []
        buffer, waiting = waiting[:size], waiting[size:]
        while buffer:
            place = int(uniforms.pop(0) * len(buffer))
            out.append(buffer[place])
            if waiting:
                buffer[place] = waiting.pop(0)
            elif variant["drain"] == "shift":
                del buffer[place]
            else:
                buffer[place] = buffer[-1]
                del buffer[-1]
        return {"delivered": out, "held_at_most_size": True}

    def finding(self, inputs, outputs, expected, variant):
        got, want = outputs["delivered"], expected["delivered"]
        if not outputs["held_at_most_size"]:
            return Finding(
                f"your answer held more than {inputs['size']} items at once: it drew from the stream before it had "
                "delivered what it held",
                {"expected": want, "got": got},
            )
        if len(got) != len(want):
            return Finding(f"{len(got)} items came out, and {len(want)} went in", {"expected": want, "got": got})
        return compare(got, want, path="what is delivered")


class Resumable(Told):
    exercise = "ResumableStream"
    mistakes = (
        Mistake(
            "prefetched counted",
            "Resume skips what you never received: the state counts what was delivered, not what was prefetched.",
            edit('{"samples": self.samples}', '{"samples": self.samples + len(self.queue) * self.ranks}'),
        ),
        Mistake(
            "queue kept",
            "What had been prefetched before load_state_dict is still delivered: empty the queue when you load.",
            edit("\n        self.queue.clear()", ""),
        ),
        Mistake(
            "own samples counted",
            "Your state counts the samples of one rank: on another number of ranks that is another place. Count the "
            "samples of the whole job.",
            (
                edit('{"samples": self.samples}', '{"samples": self.samples // self.ranks}'),
                edit('state["samples"]', 'state["samples"] * self.ranks'),
            ),
        ),
        Mistake(
            "place of the rank",
            "Your state differs from rank to rank, and any rank may load it: leave the rank out of it.",
            edit('{"samples": self.samples}', '{"samples": self.samples + self.rank}'),
        ),
        Mistake(
            "epoch forgotten",
            "The state has the place in the epoch, not the epoch: after a resume the first epoch's order comes again.",
            edit('{"samples": self.samples}', '{"samples": self.samples % self.count}'),
        ),
        Mistake(
            "epoch begun again",
            "The state has the epoch and not the place in it: what was delivered comes a second time.",
            edit('{"samples": self.samples}', '{"samples": self.samples - self.samples % self.count}'),
        ),
        Mistake(
            "state not used",
            "After load_state_dict the stream begins at the beginning: take the place from the state.",
            edit('self.samples = state["samples"]', "self.samples = 0"),
        ),
        Mistake(
            "replayed",
            "Resume fetches all that was delivered before: after a week of training that takes a week. Compute the "
            "place instead.",
            edit(
                'self.samples = state["samples"]',
                'self.samples = state["samples"] % self.ranks\n'
                "        self.queue.clear()\n"
                '        for _ in range(state["samples"] // self.ranks):\n'
                "            next(self)",
            ),
        ),
        Mistake(
            "one order for all epochs",
            "Every epoch comes in the same order: divmod(position, count) gives the epoch too.",
            edit("epoch_order(self.count, self.seed, epoch)", "epoch_order(self.count, self.seed, 0)"),
        ),
        Mistake(
            "rank ignored",
            "Every rank delivers the same samples: rank r takes position r of each step.",
            edit("len(self.queue) * self.ranks + self.rank", "len(self.queue) * self.ranks"),
        ),
        Mistake(
            "queue forgotten",
            "The same sample is fetched again and again: the next position lies behind those in the queue.",
            edit("self.samples + len(self.queue) * self.ranks + self.rank", "self.samples + self.rank"),
        ),
        Mistake(
            "own steps for positions",
            "Positions count over the whole job: one step of a rank moves its position by `ranks`.",
            (
                edit("self.samples + len(self.queue) * self.ranks + self.rank",
                     "self.samples + len(self.queue) + self.rank"),
                edit("self.samples += self.ranks", "self.samples += 1"),
            ),
        ),
        Mistake(
            "nothing fetched ahead",
            "Nothing waits in the queue: after each delivery `prefetch` samples are fetched and not yet delivered.",
            edit("while len(self.queue) <= self.prefetch:", "while not self.queue:"),
        ),
        Mistake(
            "one short in the queue",
            "After a delivery the queue is one sample short: fill it to prefetch + 1, then deliver one.",
            edit("len(self.queue) <= self.prefetch", "len(self.queue) < max(1, self.prefetch)"),
        ),
        Mistake(
            "number for sample",
            "You deliver the number of the sample: deliver what fetch(number) returns.",
            edit(
                "self.queue.append(self.fetch(epoch_order(self.count, self.seed, epoch)[place]))",
                "self.fetch(epoch_order(self.count, self.seed, epoch)[place])\n"
                "            self.queue.append(epoch_order(self.count, self.seed, epoch)[place])",
            ),
        ),
    )

    def cases(self, rng, variant):
        yield self._case(rng, "one epoch", "stream", 9, [["new", "a", 0, 1, 0], ["next", ["a"], 9]])
        yield self._case(rng, "fetched ahead", "stream", 12, [["new", "a", 0, 1, 3], ["next", ["a"], 6]])
        yield self._case(rng, "three epochs", "stream", 5, [["new", "a", 0, 1, 2], ["next", ["a"], 15]])
        yield self._case(
            rng, "three ranks", "stream", 7, [*(["new", n, r, 3, r] for r, n in enumerate("abc")), ["next", "abc", 6]]
        )
        yield self._case(rng, "one sample an epoch", "stream", 1, [["new", "a", 0, 1, 1], ["next", ["a"], 3]])
        for name, count, before, ahead, after in (
            ("in the middle", 20, rng.int(3, 9), 0, 14),
            ("with samples in the queue", 20, rng.int(3, 9), 4, 14),
            ("in the second epoch", 11, rng.int(13, 19), 3, 12),
            ("at the end of an epoch", 8, 8, 3, 9),
            ("across an end that is only prefetched", 8, 7, 3, 6),
            ("before the first sample", 6, 0, 2, 4),
        ):
            script = [["new", "a", 0, 1, ahead], ["next", ["a"], before], ["save", "a", "s"], ["next", ["a"], 2]]
            script += [["new", "b", 0, 1, ahead], ["load", "b", "s"], ["next", ["b"], after]]
            yield self._case(rng, name, "resume", count, script)
        script = [["new", "a", 0, 1, 3], ["next", ["a"], 4], ["save", "a", "s"], ["next", ["a"], 5], ["load", "a", "s"]]
        script += [["next", ["a"], 6], ["save", "a", "t"], ["new", "b", 0, 1, 2], ["load", "b", "t"], ["next", "b", 9]]
        yield self._case(rng, "back, and on, and on", "resume", 13, script)
        for name, before, steps, after in (
            ("from two ranks to two", 2, 5, 2),
            ("from one rank to three", 1, rng.int(4, 8), 3),
            ("from three ranks to two", 3, rng.int(3, 6), 2),
            ("from four ranks to one", 4, rng.int(2, 9), 1),
        ):
            old, new = "abcd"[:before], "wxyz"[:after]
            script = [["new", n, r, before, rng.int(0, 3)] for r, n in enumerate(old)]
            script += [["next", old, steps], ["save", old[-1], "s"]]
            script += [["new", n, r, after, rng.int(0, 3)] for r, n in enumerate(new)]
            script += [["load", n, "s"] for n in new] + [["next", new, 6]]
            yield self._case(rng, name, "elastic", rng.int(14, 17), script)

    @staticmethod
    def _case(rng: Rng, name: str, part: str, count: int, script: list) -> Case:
        script = [[what, list(who) if what == "next" else who, *rest] for what, who, *rest in script]
        return Case(name, {"count": count, "seed": rng.int(0, 999), "script": script}, part=part)

    def expected(self, inputs, variant):
        count, seed = inputs["count"], inputs["seed"]
        streams: dict[str, dict[str, int]] = {}
        states: dict[str, int] = {}
        trace: list[dict[str, Any]] = []
        for what, name, *rest in inputs["script"]:
            if what == "new":
                streams[name] = {"rank": rest[0], "ranks": rest[1], "prefetch": rest[2], "at": 0}
            elif what == "save":
                states[rest[0]] = streams[name]["at"]
                trace.append({"small_state": True})
            elif what == "load":
                streams[name]["at"] = states[rest[0]]
            else:
                line: dict[str, Any] = {"came": [], "waiting": []}
                for _ in range(rest[0]):
                    for one in (streams[n] for n in name):
                        epoch, place = divmod(one["at"] + one["rank"], count)
                        line["came"].append(f"sample {epoch_order(count, seed, epoch)[place]}")
                        line["waiting"].append(one["prefetch"])
                        one["at"] += one["ranks"]
                trace.append(line)
        return trace

    def finding(self, inputs, outputs, expected, variant):
        told = [step for step in inputs["script"] if step[0] in ("next", "save")]
        for (what, name, *_), got, want in zip(told, outputs, expected, strict=True):
            who = f"stream {name}" if what == "save" else f"stream{'s' * (len(name) > 1)} {', '.join(name)}"
            if what == "save":
                if not got.get("small_state"):
                    return Finding(f"the state of {who} is long: a place takes a number or two, and not a list")
                continue
            if found := compare(got["came"], want["came"], path=f"what {who} delivered"):
                return Finding(found.sentence, {"script": _spelled(inputs["script"]), **found.details})
            for number, (waits, right) in enumerate(zip(got["waiting"], want["waiting"], strict=True), 1):
                if waits != right:
                    return Finding(
                        f"{who}: after delivery {number}, {waits} samples were fetched and not yet delivered, and "
                        f"{right} are right",
                        {"script": _spelled(inputs["script"])},
                    )
        return None


def _spelled(script: list) -> str:
    """A script as a line: new a (rank 0 of 1, prefetch 3); next a 6 times; ..."""
    words = []
    for what, name, *rest in script:
        if what == "new":
            words.append(f"new {name} (rank {rest[0]} of {rest[1]}, prefetch {rest[2]})")
        elif what == "next":
            words.append(f"next {', '.join(name)} {rest[0]} times")
        else:
            words.append(f"{what} {name} {rest[0]}")
    return "; ".join(words)


class PaddedBatches(Tables):
    exercise = "padded_batches"
    what = "batch"
    mistakes = (
        Mistake(
            "mask by value",
            "You masked the real end-of-text: its id is the padding's as well. Mask by length, not by id.",
            (
                edit("mask[row, : len(sample)] = 1", "mask[row] = (ids[row] != pad_id).long()"),
            ),
        ),
        Mistake(
            "labels by value",
            "The real end-of-text is no label any more: its id is the padding's too. Take -100 where the mask is 0.",
            edit("mask == 0, -100", "ids == pad_id, -100"),
        ),
        Mistake(
            "padding learned",
            "The model would learn to predict padding: labels are -100 there.",
            edit("ids.masked_fill(mask == 0, -100)", "ids.clone()"),
        ),
        Mistake(
            "zero for a label",
            "0 is a token, and would be learned: the label that the loss ignores is -100.",
            edit("mask == 0, -100", "mask == 0, 0"),
        ),
        Mistake(
            "labels moved",
            "The model moves the labels itself: here label i belongs to token i.",
            edit(
                "labels = ids.masked_fill(mask == 0, -100)",
                "labels = torch.full_like(ids, -100)\n"
                "            labels[:, :-1] = ids.masked_fill(mask == 0, -100)[:, 1:]",
            ),
        ),
        Mistake(
            "to the longest of all",
            "You pad to the longest sample of all: pad each batch to the longest in it.",
            edit("longest = max(map(len, rows))", "longest = max(map(len, samples))"),
        ),
        Mistake(
            "to the longest of the window",
            "You pad to the longest sample of the window: pad each batch to the longest in it.",
            edit("longest = max(map(len, rows))", "longest = max(map(len, pool))"),
        ),
        Mistake(
            "padded on the left",
            "The padding is on the left: here it goes to the right, behind the sample.",
            (
                edit("ids[row, : len(sample)]", "ids[row, longest - len(sample) :]"),
                edit("mask[row, : len(sample)]", "mask[row, longest - len(sample) :]"),
            ),
        ),
        Mistake(
            "not sorted",
            "The samples come in the order of arrival: sort each window by length before you cut batches.",
            edit("sorted(samples[begin : begin + window], key=len)", "samples[begin : begin + window]"),
        ),
        Mistake(
            "all sorted",
            "You sort all samples at once: sort within each window of `window` samples.",
            edit("for begin in range(0, len(samples), window):",
                 "samples = sorted(samples, key=len)\n    for begin in range(0, len(samples), window):"),
        ),
        Mistake(
            "sorted by tokens",
            "You sort by the tokens themselves: give sorted() the key len.",
            edit(", key=len)", ")"),
        ),
        Mistake(
            "ties turned round",
            "Of samples of equal length the earlier one comes first: reversing a sorted list turns them round.",
            edit(
                "sorted(samples[begin : begin + window], key=len)",
                "sorted(samples[begin : begin + window][::-1], key=len)",
            ),
        ),
        Mistake(
            "longest first",
            "Inside a window the shortest samples come first.",
            edit(", key=len)", ", key=len, reverse=True)"),
        ),
        Mistake(
            "short batch dropped",
            "The last batch of a window may be short: its samples are lost.",
            edit("range(0, len(pool), batch_size)", "range(0, len(pool) - batch_size + 1, batch_size)"),
        ),
        Mistake(
            "batches across windows",
            "A batch never takes samples from two windows: cut each window by itself.",
            """
def padded_batches(samples, batch_size, window, pad_id):
    pool = []
    for begin in range(0, len(samples), window):
        pool += sorted(samples[begin : begin + window], key=len)
    batches = []
    for first in range(0, len(pool), batch_size):
        rows = pool[first : first + batch_size]
        ids = torch.full((len(rows), max(map(len, rows))), pad_id)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(rows):
            ids[row, : len(sample)] = torch.tensor(sample)
            mask[row, : len(sample)] = 1
        labels = ids.masked_fill(mask == 0, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches
""",
        ),
        Mistake(
            "zero for padding",
            "You pad with 0: pad with pad_id.",
            edit("torch.full((len(rows), longest), pad_id)", "torch.full((len(rows), longest), 0)"),
        ),
    )

    def cases(self, rng, variant):
        end = rng.int(300, 4095)

        def text(length: int, last: int | None = None) -> list[int]:
            return rng.ints(length - (last is not None), 1, 255) + ([last] if last is not None else [])

        up = sorted if variant["order"] == "shortest" else (lambda lengths: sorted(lengths, reverse=True))
        yield self._case("one sample", [text(rng.int(2, 6))], 4, 4, end, "padding")
        yield self._case("equal lengths", [text(3) for _ in range(4)], 2, 4, end, "padding")
        yield self._case("two lengths", [text(n) for n in up([2, 5])], 2, 2, end, "padding")
        yield self._case("padding is end-of-text", [text(n, end) for n in up([3, 4, 7])], 3, 3, end, "padding")
        inside = [end, *text(2), end, *text(1, end)]
        yield self._case("end-of-text inside", [text(2, end), inside][:: 1 if up([1, 2])[0] == 1 else -1], 2, 2, end,
                         "padding")
        yield self._case("padding with token 0", [[5, 0, 7, 0], [0, 3]][:: -1 if up([1, 2])[0] == 1 else 1], 2, 2, 0,
                         "padding")
        lengths = up([1, 2, 3, 5, 6, 9])
        yield self._case("each batch its own longest", [text(n, end) for n in lengths], 2, 6, end, "padding")
        # the order of arrival is not that of length
        yield self._case("one window", [text(n) for n in (7, 2, 5, 3)], 2, 4, end, "lengths")
        yield self._case("two windows", [text(n) for n in (4, 8, 2, 3, 6, 1, 5, 3)], 2, 4, end, "lengths")
        yield self._case("short last window", [text(n) for n in (4, 6, 3, 8, 5, 2)], 2, 4, end, "lengths")
        ten = [text(n) for n in (6, 2, 9, 4, 3, 7, 1, 8, 2, 5)]
        yield self._case("windows that batches do not divide", ten, 2, 5, end, "lengths")
        yield self._case("ties", [[n, *text(rng.choice([1, 2]))] for n in range(250, 240, -1)], 3, 10, end, "lengths")
        yield self._case("a window longer than all", [text(rng.int(1, 9)) for _ in range(5)], 2, 40, end, "lengths")
        yield self._case("no samples", [], 2, 4, end, "lengths")
        picture = [6, 2, 9, 3, 12, 4, 1, 10, 5, 8, 2, 7]
        yield self._case("twelve samples", [text(n, end) for n in rng.shuffled(picture)], 4, 12, end, "lengths")
        count, size = rng.int(20, 30), rng.int(3, 5)
        many = [text(rng.int(1, 12), rng.choice([None, end])) for _ in range(count)]
        many = [one or [end] for one in many]
        yield self._case("many samples", many, size, size * rng.int(2, 3), end, "lengths")

    @staticmethod
    def _case(name: str, samples: list[list[int]], size: int, window: int, pad: int, part: str) -> Case:
        return Case(name, {"samples": samples, "batch_size": size, "window": window, "pad_id": pad}, part=part)

    def expected(self, inputs, variant):
        samples, size, window, pad = (inputs[n] for n in ("samples", "batch_size", "window", "pad_id"))
        sign = 1 if variant["order"] == "shortest" else -1
        batches = []
        for begin in range(0, len(samples), window):
            places = range(begin, min(begin + window, len(samples)))
            pool = [samples[n] for n in sorted(places, key=lambda n: (sign * len(samples[n]), n))]
            for rows in (pool[first : first + size] for first in range(0, len(pool), size)):
                wide = max(len(row) for row in rows)
                gaps = [wide - len(row) for row in rows]
                pairs = list(zip(rows, gaps, strict=True))
                batches.append({
                    "input_ids": torch.tensor([row + [pad] * gap for row, gap in pairs]),
                    "attention_mask": torch.tensor([[1] * len(row) + [0] * gap for row, gap in pairs]),
                    "labels": torch.tensor([row + [-100] * gap for row, gap in pairs]),
                })
        return batches


class PackDocuments(Tables):
    exercise = "pack_documents"
    what = "row"
    mistakes = (
        Mistake(
            "positions run on",
            "Positions run on into the next document: they begin at 0 in every document.",
            edit("torch.arange(len(ids)) - starts[owner]", "torch.arange(len(ids))"),
        ),
        Mistake(
            "attention runs on",
            "Attention runs on into the document before: a token sees its own document alone.",
            edit('"mask": same & causal', '"mask": causal'),
        ),
        Mistake(
            "later tokens seen",
            "A token sees later tokens of its document: the mask is causal as well.",
            edit('"mask": same & causal', '"mask": same'),
        ),
        Mistake(
            "first token learned",
            "The first token of a document would be predicted from the document before: its label is -100.",
            edit("ids.masked_fill(positions == 0, -100)", "ids.clone()"),
        ),
        Mistake(
            "only the row's first",
            "Every document in a row has a first token without a predecessor, not the row's first document alone.",
            edit("ids.masked_fill(positions == 0, -100)", "ids.masked_fill(torch.arange(len(ids)) == 0, -100)"),
        ),
        Mistake(
            "no zero in cu_seqlens",
            "cu_seqlens begins with 0: n documents have n + 1 boundaries.",
            edit('"cu_seqlens": starts', '"cu_seqlens": starts[1:]'),
        ),
        Mistake(
            "no end in cu_seqlens",
            "cu_seqlens ends with the length of the row: n documents have n + 1 boundaries.",
            edit('"cu_seqlens": starts', '"cu_seqlens": starts[:-1]'),
        ),
        Mistake(
            "cu_seqlens of int64",
            "Attention kernels take cu_seqlens as int32.",
            edit(", dtype=torch.int32", ""),
        ),
        Mistake(
            "row overfull",
            "A row holds at most `length` tokens: a document that does not fit begins the next row.",
            edit("if sum(map(len, rows[-1])) + len(piece) > length:", "if sum(map(len, rows[-1])) >= length:"),
        ),
        Mistake(
            "row closed early",
            "A row may be exactly full: begin the next one only when the document does not fit.",
            edit("len(piece) > length:", "len(piece) >= length and rows[-1]:"),
        ),
        Mistake(
            "cut at the row's end",
            "You cut documents to fill the row: only a document longer than `length` is cut.",
            """
def pack_documents(documents, length):
    rows = [[]]
    for document in documents:
        while document:
            room = length - sum(map(len, rows[-1]))
            if room == 0:
                rows.append([])
                room = length
            rows[-1].append(document[:room])
            document = document[room:]
    packed = []
    for row in rows:
        ids = torch.tensor([token for piece in row for token in piece])
        starts = torch.tensor([0, *itertools.accumulate(map(len, row))], dtype=torch.int32)
        owner = torch.arange(len(row)).repeat_interleave(starts.diff())
        positions = torch.arange(len(ids)) - starts[owner]
        same = owner[:, None] == owner
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        labels = ids.masked_fill(positions == 0, -100)
        packed.append({"input_ids": ids, "position_ids": positions, "cu_seqlens": starts, "labels": labels,
                       "mask": same & causal})
    return packed
""",
        ),
        Mistake(
            "rest dropped",
            "What is beyond `length` tokens of a long document is lost: it becomes a document of its own.",
            edit("range(0, len(document), length)", "range(0, 1)"),
        ),
        Mistake(
            "first row that fits",
            "Documents stay in order: only the last row is open, and an earlier row is not filled up later.",
            edit(
                "            if sum(map(len, rows[-1])) + len(piece) > length:\n"
                "                rows.append([])\n"
                "            rows[-1].append(piece)",
                "            for row in rows:\n"
                "                if sum(map(len, row)) + len(piece) <= length:\n"
                "                    row.append(piece)\n"
                "                    break\n"
                "            else:\n"
                "                rows.append([piece])",
            ),
        ),
    )

    def cases(self, rng, variant):
        def docs(*lengths: int) -> list[list[int]]:
            return [rng.ints(n, 1, 4095) for n in lengths]

        yield Case("one document", {"documents": docs(4), "length": 6}, part="rows")
        yield Case("one document, exactly a row", {"documents": docs(6), "length": 6}, part="rows")
        yield Case("a long document", {"documents": docs(11), "length": 4}, part="rows")
        yield Case("rows of one token", {"documents": docs(2, 1), "length": 1}, part="rows")
        yield Case("one document a row", {"documents": docs(4, 5, 3, 4), "length": 6}, part="rows")
        yield Case("two documents fill a row", {"documents": docs(2, 4, 3), "length": 6}, part="boundaries")
        yield Case("three in a row", {"documents": docs(1, 3, 2, 5), "length": 7}, part="boundaries")
        yield Case("room in an earlier row", {"documents": docs(3, 5, 2, 2), "length": 6}, part="boundaries")
        yield Case("a long one between", {"documents": docs(2, 9, 2, 3), "length": 5}, part="boundaries")
        many = docs(*(rng.int(1, 8) for _ in range(14)))
        yield Case("many documents", {"documents": many, "length": rng.int(9, 14)}, part="boundaries")

    def expected(self, inputs, variant):
        length = inputs["length"]
        pieces = [d[a : a + length] for d in inputs["documents"] for a in range(0, len(d), length)]
        return [self._row(row) for row in shards_of(pieces, length)]

    @staticmethod
    def _row(row: list[list[int]]) -> dict[str, torch.Tensor]:
        ids = sum(row, [])
        mask = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        bounds = offsets_of(row)
        for first, last in pairwise(bounds):
            for query in range(first, last):
                mask[query, first : query + 1] = True
        return {
            "input_ids": torch.tensor(ids),
            "position_ids": torch.tensor([place for piece in row for place in range(len(piece))]),
            "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
            "labels": torch.tensor([label for piece in row for label in [-100, *piece[1:]]]),
            "mask": mask,
        }


class Prefetch(Told):
    exercise = "prefetch"
    mistakes = (
        Mistake(
            "no thread",
            "The source is read in your own thread, so that nothing overlaps: read it in a thread of its own.",
            """
def prefetch(source, depth):
    held = deque()
    for item in source:
        held.append(item)
        if len(held) > depth:
            yield held.popleft()
    yield from held
""",
        ),
        Mistake(
            "no bound",
            "The source is read without a bound, and a fast disk fills the memory: let the queue hold at most `depth`.",
            edit("queue.Queue(depth)", "queue.Queue()"),
        ),
        Mistake(
            "exception lost",
            "An error in the source is lost, and the stream just ends: hand the exception over, and raise it in the "
            "consumer.",
            edit("box.put((END, error))", "box.put((END, None))"),
        ),
        Mistake(
            "error before its time",
            "An error in the source arrives before the items that came ahead of it: hand it over in the same queue.",
            """
def prefetch(source, depth):
    box, failed = queue.Queue(depth), []

    def work():
        try:
            for item in source:
                box.put((item, None))
        except Exception as error:
            failed.append(error)
        box.put((END, None))

    threading.Thread(target=work, daemon=True).start()
    while True:
        item, _ = box.get()
        if failed:
            raise failed[0]
        if item is END:
            return
        yield item
""",
        ),
        Mistake(
            "None for the end",
            "None may be an item: mark the end with an object that no source can yield, such as END.",
            (
                edit("box.put((END, None))", "box.put((None, None))"),
                edit("if item is END:", "if item is None:"),
                edit("box.put((END, error))", "box.put((None, error))"),
            ),
        ),
        Mistake(
            "no daemon",
            "A program that leaves the loop early would never end, because the thread still waits: start it with "
            "daemon=True.",
            edit("target=work, daemon=True", "target=work"),
        ),
        Mistake(
            "one at a time",
            "The thread waits until each item is taken: a queue of `depth` items lets it run ahead.",
            edit("queue.Queue(depth)", "queue.Queue(1)"),
        ),
    )

    def cases(self, rng, variant):
        items = rng.ints(rng.int(8, 12), 0, 999)
        yield Case("in order", {"items": items, "depth": 3}, part="order")
        yield Case("no items", {"items": [], "depth": 2}, part="order")
        yield Case("one item", {"items": [rng.int(0, 9)], "depth": 2}, part="order")
        yield Case("None among the items", {"items": [1, None, 0, None, 2], "depth": 5}, part="order")
        yield Case("an error at the end", {"items": items[:4], "depth": 6, "fails": True}, part="order")
        yield Case("an error at once", {"items": [], "depth": 2, "fails": True}, part="order")
        yield Case("ahead by four", {"items": rng.ints(20, 0, 999), "depth": 4, "watched": True}, part="ahead")
        yield Case("ahead by seven", {"items": rng.ints(16, 0, 999), "depth": 7, "watched": True}, part="ahead")

    def expected(self, inputs, variant):
        return {
            "delivered": inputs["items"],
            "raised": "the disk is gone" if inputs.get("fails") else None,
            "in_a_thread": True,
            "ends_with_the_program": True,
            "runs_ahead": True,
            "stops_ahead": True,
        }

    def finding(self, inputs, outputs, expected, variant):
        if found := compare(outputs["delivered"], expected["delivered"], path="what is delivered"):
            return found
        if outputs["raised"] != expected["raised"]:
            return Finding("the source raised an error, and your answer ended as if nothing had happened")
        depth = inputs["depth"]
        for what, sentence in (
            ("in_a_thread", "the source was read in the thread that asks for items"),
            ("ends_with_the_program", "the thread that reads the source is no daemon"),
            ("runs_ahead", f"after the first item, fewer than {depth} further ones were read ahead"),
            ("stops_ahead", f"after the first item, more than {depth + 1} further ones were read ahead"),
        ):
            if not outputs[what]:
                return Finding(sentence)
        return None


REFERENCES = {
    cls.exercise: cls()
    for cls in (
        WriteShards,
        ReadDocument,
        WorkerBatches,
        ShuffleBuffer,
        Resumable,
        PaddedBatches,
        PackDocuments,
        Prefetch,
    )
}
