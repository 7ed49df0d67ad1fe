"""Cases, right outputs and known mistakes of lab 00."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping

import torch

from effnlp_lab.exercises.compare import Finding, compare
from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng, edit


class MaskedMean(Reference):
    exercise = "masked_mean"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        yield Case("full sentences", self._inputs(rng, 3, 5, 8), part="without padding")
        yield Case("one sentence of one token", self._inputs(rng, 1, 1, 8), part="without padding")
        yield Case("padding on the right", self._inputs(rng, 3, 6, 8, lengths=[6, 2, 4]), part="with padding")
        scattered = self._inputs(rng, 4, 7, 8)
        scattered["real"] = torch.tensor(
            [
                [False, True, True, False, True, True, True],
                [True, False] * 3 + [True],
                [False] * 6 + [True],
                [True] + [False] * 6,
            ]
        )
        yield Case("padding anywhere", scattered, part="with padding")
        yield Case("a sentence without tokens", self._inputs(rng, 3, 5, 8, lengths=[5, 0, 2]), part="empty sentences")

    @staticmethod
    def _inputs(rng: Rng, sentences: int, length: int, width: int, lengths: list[int] | None = None) -> dict:
        ends = torch.tensor(lengths or [length] * sentences)
        return {
            "tokens": rng.randn(sentences, length, width) + 1.0,
            "real": torch.arange(length)[None, :] < ends[:, None],
        }

    def expected(self, inputs, variant):
        return self._mean(inputs["tokens"].double(), inputs["real"])

    def plain(self, inputs, variant):
        return self._mean(inputs["tokens"], inputs["real"])

    @staticmethod
    def _mean(tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [t[r].mean(dim=0) if r.any() else torch.zeros_like(t[0]) for t, r in zip(tokens, real, strict=True)]
        )

    mistakes = (
        Mistake(
            "padding counted",
            "Your mean runs over the padding too: leave out the tokens that are not real.",
            edit("return total / count", "return tokens.mean(dim=1)"),
        ),
        Mistake(
            "divided by the length",
            "The sum leaves the padding out, but it is divided by the whole length: divide "
            "by the number of real tokens of each sentence.",
            edit("return total / count", "return total / tokens.shape[1]"),
        ),
        Mistake(
            "one count for all",
            "You divide every sentence by one and the same count: each has its own number of real tokens.",
            edit("return total / count", "return total / real.sum()"),
        ),
        Mistake(
            "empty sentence",
            "A sentence without tokens gives 0/0, which is NaN: divide by at least 1 (clamp(min=1)).",
            edit(".clamp(min=1)", ""),
        ),
        Mistake(
            "wrong axis",
            "You average over the wrong axis: `dim=1` runs along a sentence, `dim=0` from one sentence to the next.",
            edit("return total / count", "return tokens.mean(dim=0)"),
        ),
    )


class AttentionScores(Reference):
    exercise = "attention_scores"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        yield Case("one head, 3 queries and 5 keys", self._inputs(rng, 1, 1, 3, 5, 7), part="one head")
        yield Case("one head, as many keys as queries", self._inputs(rng, 1, 1, 6, 6, 5), part="one head")
        yield Case("two sentences, three heads", self._inputs(rng, 2, 3, 4, 4, 5), part="batches and heads")
        yield Case("one query against many keys", self._inputs(rng, 2, 2, 1, 33, 8), part="batches and heads")

    @staticmethod
    def _inputs(rng: Rng, batch: int, heads: int, queries: int, keys: int, dim: int) -> dict:
        return {"queries": rng.randn(batch, heads, queries, dim), "keys": rng.randn(batch, heads, keys, dim)}

    def expected(self, inputs, variant):
        return self._scores(inputs["queries"].double(), inputs["keys"].double())

    def plain(self, inputs, variant):
        return self._scores(inputs["queries"], inputs["keys"])

    @staticmethod
    def _scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])

    mistakes = (
        Mistake(
            "not scaled",
            "Your scores are not scaled: divide them by the square root of the head dimension.",
            edit(" / math.sqrt(queries.shape[-1])", ""),
        ),
        Mistake(
            "divided by the dimension",
            "You divide by the head dimension, and its square root is right: the sum of "
            "d independent products has a standard deviation of sqrt(d).",
            edit("math.sqrt(queries.shape[-1])", "queries.shape[-1]"),
        ),
        Mistake(
            "scaled by the number of keys",
            "You scale by the number of keys: the square root is that of the head "
            "dimension, the axis that is summed over.",
            edit("queries.shape[-1]", "keys.shape[-2]"),
        ),
        Mistake(
            "queries and keys swapped",
            "Your rows are keys and your columns queries: row i holds the scores of "
            "query i, so end the einsum in `query key`.",
            edit('"bhqd,bhkd->bhqk"', '"bhqd,bhkd->bhkq"'),
        ),
        Mistake(
            "heads summed",
            "You sum over the heads: an axis that is missing after the arrow is summed away. "
            "Every head keeps scores of its own.",
            edit('"bhqd,bhkd->bhqk"', '"bhqd,bhkd->bqk"'),
        ),
    )


class SplitHeads(Reference):
    exercise = "split_heads"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        yield Case("one head", {"hidden": rng.randn(2, 3, 4), "heads": 1}, part="one head")
        yield Case("one token", {"hidden": rng.randn(1, 1, 6), "heads": 3}, part="several heads")
        yield Case("two heads of three", {"hidden": rng.randn(1, 4, 6), "heads": 2}, part="several heads")
        yield Case("as long as there are heads", {"hidden": rng.randn(2, 4, 12), "heads": 4}, part="several heads")
        yield Case("heads of one number", {"hidden": rng.randn(2, 3, 5), "heads": 5}, part="several heads")
        yield Case("not contiguous", {"hidden": rng.randn(5, 8, 2).transpose(0, 2), "heads": 1}, part="one head")
        yield Case(
            "not contiguous, several heads",
            {"hidden": rng.randn(6, 3, 2).transpose(0, 2), "heads": 3},
            part="several heads",
        )

    def expected(self, inputs, variant):
        hidden, heads = inputs["hidden"].double(), inputs["heads"]
        if variant["heads"] == "turns":
            return torch.stack([hidden[..., first::heads] for first in range(heads)], dim=1)
        return torch.stack(hidden.chunk(heads, dim=-1), dim=1)

    mistakes = (
        Mistake(
            "reshaped in one go",
            "A reshape alone does not move axes: it deals the numbers out in the order in which "
            "they lie, and mixes tokens into heads. Split the width first, then swap length and heads.",
            edit(
                "hidden.reshape(batch, length, heads, width // heads).transpose(1, 2)",
                "hidden.reshape(batch, heads, length, width // heads)",
            ),
        ),
        Mistake(
            "axes not swapped",
            "Your axes come as (batch, length, heads, dim): swap length and heads.",
            edit(".transpose(1, 2)", ""),
        ),
        Mistake(
            "heads interleaved",
            "A head is a run of neighbouring numbers, width/heads long; yours takes every "
            "`heads`-th number. Split the width into (heads, dim), in this order.",
            edit(
                "length, heads, width // heads).transpose(1, 2)", "length, width // heads, heads).permute(0, 3, 1, 2)"
            ),
        ),
    )


class Timed(Reference):
    exercise = "timed"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        base = rng.int(40, 90) * 1e-4
        yield Case("one run", self._inputs(rng, [base], 0, 1), part="waiting")
        yield Case("three equal runs", self._inputs(rng, [base], 0, 3), part="waiting")
        yield Case("the first call compiles", self._inputs(rng, [200 * base, base], 1, 3), part="warm-up")
        yield Case("warm-up still in the queue", self._inputs(rng, [50 * base, 30 * base, base], 2, 1), part="warm-up")
        slow_start = [base * f for f in (90, 70, 1, 1.5, 1.1)]
        yield Case("two slow calls, three to measure", self._inputs(rng, slow_start, 2, 3), part="warm-up")
        hiccup = [base * f for f in rng.shuffled([1.0, 1.2, 1.3, 1.7, 40.0])]
        yield Case("a hiccup among five", self._inputs(rng, hiccup, 0, 5), part="median")
        even = [base * f for f in rng.shuffled([1.0, 2.0, 3.0, 20.0])]
        yield Case("an even number of runs", self._inputs(rng, even, 0, 4), part="median")

    @staticmethod
    def _inputs(rng: Rng, durations: list[float], warmup: int, repeats: int) -> dict:
        return {"launch": rng.int(5, 15) * 1e-5, "durations": durations, "warmup": warmup, "repeats": repeats}

    def expected(self, inputs, variant):
        calls, durations = inputs["warmup"] + inputs["repeats"], list(inputs["durations"])
        durations += durations[-1:] * (calls - len(durations))
        median = statistics.median(durations[inputs["warmup"] : calls])
        return {"seconds": inputs["launch"] + median, "calls": calls}

    def verify(self, inputs, outputs, expected, variant):
        if not isinstance(outputs, Mapping) or outputs.get("calls") != expected["calls"]:
            return Finding(
                f"your function called work() {outputs['calls']} times, and {inputs['warmup']} + "
                f"{inputs['repeats']} calls are right: `warmup` calls before the first measured one"
            )
        return compare(outputs["seconds"], expected["seconds"], path="the time that you return")

    mistakes = (
        Mistake(
            "did not wait",
            "You read the clock before the device is done, so you time the launch alone: "
            "synchronize before you stop the clock.",
            edit("        synchronize()\n        times", "        times"),
        ),
        Mistake(
            "warm-up in the queue",
            "Your first measured run also waits for the warm-up, which is still in the "
            "device's queue: synchronize before you start the clock.",
            edit("        work()\n    synchronize()\n", "        work()\n"),
        ),
        Mistake(
            "no warm-up",
            "The first calls compile and allocate: run `warmup` calls that you do not measure.",
            edit("range(warmup)", "range(0)"),
        ),
        Mistake(
            "mean",
            "You return the mean, which one hiccup of the machine spoils: return the median.",
            edit("statistics.median", "statistics.mean"),
        ),
        Mistake(
            "minimum",
            "You return the shortest time, a matter of luck: return the median.",
            edit("statistics.median(times)", "min(times)"),
        ),
        Mistake(
            "lower median",
            "Of an even number of runs you return the lower middle one (torch.median does that): "
            "the median is the mean of the two middle ones (statistics.median).",
            edit("statistics.median", "statistics.median_low"),
        ),
        Mistake(
            "upper median",
            "Of an even number of runs you return the upper middle one: the median is the mean of "
            "the two middle ones (statistics.median).",
            edit("statistics.median", "statistics.median_high"),
        ),
        Mistake(
            "one stopwatch for all",
            "You divide the time of all the runs by their number, which is a mean: time "
            "every run by itself and return the median.",
            """
def timed(work, synchronize, clock, warmup, repeats):
    for _ in range(warmup):
        work()
    synchronize()
    start = clock()
    for _ in range(repeats):
        work()
    synchronize()
    return (clock() - start) / repeats
""",
        ),
    )


class BestMatch(Reference):
    exercise = "best_match"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        yield Case("two full blocks", self._inputs(rng, 8, 5, 6, 4), part="values")
        yield Case("a ragged last block", self._inputs(rng, 11, 7, 6, 4), part="values")
        yield Case("fewer queries than rows", self._inputs(rng, 3, 9, 5, 16), part="values")
        yield Case("one query, one document", self._inputs(rng, 1, 1, 4, 1), part="values")
        yield Case("nothing is alike", self._inputs(rng, 6, 5, 8, 4, alike=False), part="values")
        yield Case(
            "many queries, few rows at once",
            self._inputs(rng, 512, 512, 8, 16),
            part="memory",
            budget={"peak_bytes": 1.5},
        )
        yield Case(
            "ragged, and one row at once", self._inputs(rng, 101, 320, 4, 1), part="memory", budget={"peak_bytes": 8.0}
        )

    @staticmethod
    def _inputs(rng: Rng, queries: int, documents: int, dim: int, rows: int, alike: bool = True) -> dict:
        left, right = rng.randn(queries, dim), rng.randn(documents, dim)
        return {
            "queries": left if alike else left.abs() + 0.1,
            "documents": right if alike else -right.abs() - 0.1,
            "rows": rows,
        }

    def expected(self, inputs, variant):
        return (inputs["queries"].double() @ inputs["documents"].double().T).amax(dim=1)

    def plain(self, inputs, variant):
        return (inputs["queries"] @ inputs["documents"].T).amax(dim=1)

    def frugal(self, inputs, variant):
        """A loop that still holds the last block while it computes the next: what most people write."""
        queries, documents, rows = inputs["queries"], inputs["documents"], inputs["rows"]
        best = queries.new_empty(len(queries))
        for start in range(0, len(queries), rows):
            scores = queries[start : start + rows] @ documents.T
            best[start : start + rows] = scores.amax(dim=1)
        return best

    mistakes = (
        Mistake(
            "last block dropped",
            "The last block is ragged when `rows` does not divide the number of queries, and "
            "yours is left out: a slice may run past the end, so step through range(0, n, rows).",
            edit("queries.split(rows)", "queries.split(rows)[:max(1, len(queries) // rows)]"),
        ),
        Mistake(
            "wrong axis",
            "You take the maximum over the queries of a block: every query wants its best document (dim=1).",
            edit("amax(dim=1)", "amax(dim=0)"),
        ),
        Mistake(
            "starts at zero",
            "Your maximum starts at 0, so a query with no similar document gets 0: start at minus "
            "infinity, or take the maximum of a whole row.",
            edit("amax(dim=1)", "amax(dim=1).clamp(min=0)"),
        ),
        Mistake(
            "sign lost",
            "You take the largest absolute value: a similarity of -3 is worse than one of 1.",
            edit("(block @ documents.T)", "(block @ documents.T).abs()"),
        ),
        Mistake(
            "position",
            "You return where the best document is, and the similarity itself is asked for.",
            edit("amax(dim=1)", "argmax(dim=1)"),
        ),
    )


class Kernel(Reference):
    """Judges what `drive.run_kernel` reports, for a Triton launcher and for a twin."""

    twin = False

    def right(self, inputs: Mapping) -> torch.Tensor:
        """What belongs in `out`, in float64."""
        raise NotImplementedError

    def own(self, inputs: Mapping) -> torch.Tensor:
        """The same in plain PyTorch, in the dtype of `out`."""
        raise NotImplementedError

    def most(self, inputs: Mapping) -> int:
        """The most numbers that one PyTorch operation of a twin may compute with."""
        return inputs["block"]

    def expected(self, inputs, variant):
        return {
            "out": self.right(inputs),
            "outside": 0,
            "read outside": 0,
            "unwritten": 0,
            "inputs changed": False,
            "largest": 0,
            "operation": "",
        }

    def same_slip(self, outputs, wrong):
        """Wild reads are seen in the interpreter alone, and count for nothing here. Programs that write past their
        edges overwrite their neighbours' numbers, on a card in any order: then only how much they wrote is compared."""
        if outputs["outside"] and outputs["outside"] == wrong["outside"]:
            return True
        return super().same_slip({**outputs, "read outside": 0}, {**wrong, "read outside": 0})

    def verify(self, inputs, outputs, expected, variant):
        if outputs["inputs changed"]:
            return Finding("you wrote into an input: the result belongs in `out`")
        if outputs["outside"]:
            return Finding(
                f"you wrote {outputs['outside']} numbers outside `out`, into memory that is not yours: "
                "mask the store of the last tile"
            )
        if outputs["read outside"]:
            return Finding(
                f"you read {outputs['read outside']} numbers around your tensors, from memory that is not yours: "
                "mask the loads too, with other=0.0"
            )
        limit = self.most(inputs) if self.twin else 0
        if outputs["largest"] > limit:
            who = "a program of the kernel sees one tile" if self.twin else "the kernel is to do that"
            return Finding(
                f"PyTorch's {outputs['operation']} works on {outputs['largest']:,} numbers at once in your "
                f"answer: {who}" + (f", at most {limit:,} numbers" if self.twin else "")
            )
        out, right = outputs["out"], expected["out"]
        if outputs["unwritten"]:
            return Finding(
                f"you never wrote {outputs['unwritten']} of the {right.numel()} numbers of `out`: "
                "cover every tile, the ragged last one too"
            )
        if isinstance(out, torch.Tensor) and out.isnan().any():
            return Finding(
                f"`out` has NaN in {int(out.isnan().sum())} places: all that lies around the inputs is NaN, so "
                "you read past an edge; mask the load, with other=0.0"
            )
        own = self.own(inputs)
        return compare(out, right, own, own.dtype, path="`out`")


class AddVectors(Kernel):
    exercise = "add_vectors"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        yield Case("three whole tiles", self._inputs(rng, 192, 64), part="whole tiles")
        yield Case("one whole tile", self._inputs(rng, 64, 64), part="whole tiles")
        yield Case(
            "a ragged last tile", self._inputs(rng, 64 * rng.int(2, 4) + rng.int(2, 60), 64), part="ragged edges"
        )
        yield Case("one number more than a tile", self._inputs(rng, 17, 16), part="ragged edges")
        yield Case("one number", self._inputs(rng, 1, 16), part="ragged edges")
        yield Case("float16, ragged", self._inputs(rng, 100, 32, torch.float16), part="ragged edges")
        yield Case(
            "a million numbers and seven, bfloat16",
            self._inputs(rng, (1 << 20) + 7, 1024, torch.bfloat16),
            device="cuda",
            part="gpu",
        )

    @staticmethod
    def _inputs(rng: Rng, count: int, block: int, dtype: torch.dtype = torch.float32) -> dict:
        return {"x": rng.randn(count, dtype=dtype), "y": rng.randn(count, dtype=dtype), "block": block}

    def right(self, inputs):
        return inputs["x"].double() + inputs["y"].double()

    def own(self, inputs):
        return inputs["x"] + inputs["y"]

    mistakes = (
        Mistake(
            "store not masked",
            "Your last tile runs past the end: `offsets < count` is the mask for both loads and for the store.",
            edit(", x + y, mask=inside", ", x + y"),
        ),
        Mistake(
            "loads not masked",
            "Your store is masked and your loads are not: the last tile reads past the end of x and y.",
            (
                edit("x_ptr + offsets, mask=inside", "x_ptr + offsets"),
                edit("y_ptr + offsets, mask=inside", "y_ptr + offsets"),
            ),
            seen_on="cpu",
        ),
        Mistake(
            "programs rounded down",
            "count // block programs leave the ragged last tile out: round up, with triton.cdiv(count, block).",
            edit("triton.cdiv(x.numel(), block)", "max(1, x.numel() // block)"),
        ),
        Mistake(
            "every program does the first tile",
            "All your programs work on the first tile: add tl.program_id(0) * BLOCK to the offsets.",
            edit("tl.program_id(0) * BLOCK + ", ""),
        ),
        Mistake(
            "tiles overlap",
            "Program i begins at number i, and the tile of program i begins at i * BLOCK.",
            edit("tl.program_id(0) * BLOCK", "tl.program_id(0)"),
        ),
    )


class AddVectorsTwin(AddVectors):
    exercise, twin = "add_vectors_twin", True

    mistakes = (
        Mistake(
            "tiles rounded down",
            "You leave the ragged last tile out: step through range(0, count, block); a slice "
            "stops at the end by itself.",
            edit("range(0, x.numel(), block)", "range(0, max(1, x.numel() // block) * block, block)"),
        ),
        Mistake(
            "all at once",
            "You add the whole vectors at once: a program of the kernel sees one tile, so loop over tiles.",
            edit("out[start:end] = x[start:end] + y[start:end]", "out.copy_(x + y)"),
        ),
    )


class RowSum(Kernel):
    exercise = "row_sum"

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        yield Case("rows of one tile", self._inputs(rng, 3, 32, 32), part="one tile a row")
        yield Case("rows shorter than a tile", self._inputs(rng, 4, rng.int(17, 31), 32), part="one tile a row")
        yield Case("one number", self._inputs(rng, 1, 1, 16), part="one tile a row")
        yield Case("rows of three whole tiles", self._inputs(rng, 2, 96, 32), part="several tiles")
        yield Case("a ragged last tile", self._inputs(rng, 3, 64 + rng.int(1, 31), 32), part="several tiles")
        yield Case("rows that do not touch", self._inputs(rng, 4, 40, 16, gap=5), part="strides and half precision")
        yield Case(
            "float16 that adds up to more than 2,048",
            self._inputs(rng, 2, 1000, 512, dtype=torch.float16, low=5),
            part="strides and half precision",
        )
        yield Case(
            "4,096 rows of 1,000, bfloat16",
            self._inputs(rng, 4096, 1000, 256, dtype=torch.bfloat16),
            device="cuda",
            part="gpu",
        )

    @staticmethod
    def _inputs(
        rng: Rng, rows: int, columns: int, block: int, gap: int = 0, dtype: torch.dtype = torch.float32, low: int = -9
    ) -> dict:
        """Whole numbers, whose sums are exact in float32 in whatever order they are taken."""
        x = torch.randint(low, 10, (rows, columns), generator=rng.torch)
        x[:, 0] += 20
        x[:, 0] += 1 - x.sum(dim=1) % 2  # odd sums: above 2,048 float16 has no odd number
        return {"x": x.to(dtype), "gap": gap, "block": block}

    def right(self, inputs):
        return inputs["x"].double().sum(dim=1)

    def own(self, inputs):
        return inputs["x"].float().sum(dim=1)

    mistakes = (
        Mistake(
            "nothing masked",
            "Your last tile runs past the end of the row: load it with the mask `offsets < columns` and other=0.0.",
            edit(", mask=offsets < columns, other=0.0", ""),
        ),
        Mistake(
            "first tile only",
            "You sum the first tile of every row: loop over all of its tiles.",
            edit("range(0, columns, BLOCK)", "range(0, BLOCK, BLOCK)"),
        ),
        Mistake(
            "tiles rounded down",
            "You leave the ragged last tile out: step through range(0, columns, BLOCK).",
            edit("range(0, columns, BLOCK)", "range(0, tl.maximum(columns // BLOCK, 1) * BLOCK, BLOCK)"),
        ),
        Mistake(
            "rows taken for neighbours",
            "You take the rows for neighbours in memory: row i begins at i times the "
            "stride of the rows, x.stride(0), which can be more than the number of columns.",
            edit("x.stride(0)", "x.shape[1]"),
        ),
        Mistake(
            "summed in half precision",
            "You sum in the inputs' dtype: float16 has 11 significant bits, so above "
            "2,048 it skips whole numbers. Keep the running sum in float32.",
            (edit("tl.zeros([BLOCK], tl.float32)", "tl.zeros([BLOCK], x_ptr.dtype.element_ty)"),),
        ),
    )


class RowSumTwin(RowSum):
    exercise, twin = "row_sum_twin", True

    mistakes = (
        Mistake(
            "first tile only",
            "You sum the first tile of every row: loop over all of its tiles.",
            edit("range(0, columns, block)", "range(0, block, block)"),
        ),
        Mistake(
            "tiles rounded down",
            "You leave the ragged last tile out: step through range(0, columns, block); a "
            "slice stops at the end by itself.",
            edit("range(0, columns, block)", "range(0, max(columns // block, 1) * block, block)"),
        ),
        Mistake(
            "total not reset",
            "Your total runs on from row to row: set it to 0 at the beginning of each.",
            (
                edit(
                    "    for row in range(rows):\n        total = torch.zeros((), device=x.device)\n",
                    "    total = torch.zeros((), device=x.device)\n    for row in range(rows):\n",
                ),
            ),
        ),
        Mistake(
            "summed in half precision",
            "You sum in the inputs' dtype: float16 has 11 significant bits, so above "
            "2,048 it skips whole numbers. Keep the running sum in float32.",
            (
                edit("torch.zeros((), device=x.device)", "torch.zeros((), device=x.device, dtype=x.dtype)"),
                edit(".float()", ""),
            ),
        ),
        Mistake(
            "all at once",
            "You sum the whole matrix at once: a program of the kernel sees one tile of one row.",
            (edit("        out[row] = total", "    out.copy_(x.float().sum(dim=1))"),),
        ),
    )


class TiledMatmul(Kernel):
    exercise = "tiled_matmul"

    def most(self, inputs):
        return inputs["block"] ** 2

    def cases(self, rng: Rng, variant: Mapping[str, str]) -> Iterator[Case]:
        yield Case("one tile", self._inputs(rng, 16, 16, 16, 16), part="whole tiles")
        yield Case("2 x 4 x 3 whole tiles", self._inputs(rng, 32, 64, 48, 16), part="whole tiles")
        ragged = [16 * rng.int(1, 2) + rng.int(1, 15) for _ in range(3)]
        yield Case("nothing divides", self._inputs(rng, *ragged, 16), part="ragged edges")
        yield Case("a ragged inner dimension", self._inputs(rng, 16, 41, 32, 16), part="ragged edges")
        yield Case("an inner dimension of one", self._inputs(rng, 5, 1, 3, 16), part="ragged edges")
        yield Case(
            "transposed inputs", self._inputs(rng, 33, 20, 17, 16, transposed=True), part="strides and half precision"
        )
        yield Case("float16", self._inputs(rng, 20, 37, 18, 16, torch.float16), part="strides and half precision")
        yield Case("float16, a large tile and then small ones", self._swamped(rng), part="strides and half precision")
        yield Case("256 x 250 x 260, float32", self._inputs(rng, 256, 250, 260, 64), device="cuda", part="gpu")
        yield Case(
            "500 x 1,000 x 300, bfloat16",
            self._inputs(rng, 500, 1000, 300, 64, torch.bfloat16),
            device="cuda",
            part="gpu",
        )

    @staticmethod
    def _inputs(
        rng: Rng, m: int, k: int, n: int, block: int, dtype: torch.dtype = torch.float32, transposed: bool = False
    ) -> dict:
        return {
            "a": rng.randn(m, k, dtype=dtype),
            "b": rng.randn(k, n, dtype=dtype),
            "transposed": transposed,
            "block": block,
        }

    @staticmethod
    def _swamped(rng: Rng) -> dict:
        """The first tile gives 8,192, where float16 counts in steps of 8; each of 19 further ones adds 3."""
        a, b = torch.zeros(16, 320), torch.ones(320, 16)
        a[:, :16] = 512.0
        for start in range(16, 320, 16):
            a[:, start + rng.int(0, 15)] = 3.0
        return {"a": a.half(), "b": b.half(), "transposed": False, "block": 16}

    def right(self, inputs):
        return inputs["a"].double() @ inputs["b"].double()

    def own(self, inputs):
        """The worse of two plain ways: the library splits long sums, a kernel adds one product after the other."""
        a, b = inputs["a"], inputs["b"]
        in_turn = torch.zeros(a.shape[0], b.shape[1])
        for column, row in zip(a.float().T, b.float(), strict=True):
            in_turn.addr_(column, row)
        right = self.right(inputs)
        return max(a @ b, in_turn.to(a.dtype), key=lambda x: (x.double() - right).abs().max())

    _STORE = "        total,\n        mask=(rows[:, None] < m) & (columns[None, :] < n),\n"

    mistakes = (
        Mistake(
            "inner edge not masked",
            "The last tile along the inner dimension runs past its edge: mask both loads "
            "with `inner < k`, with other=0.0, because what is read there is added in.",
            (edit(" & (inner[None, :] < k)", ""), edit("(inner[:, None] < k) & ", "")),
        ),
        Mistake(
            "inner tiles rounded down",
            "You leave the ragged last tile of the inner dimension out: step through range(0, k, BLOCK).",
            edit("range(0, k, BLOCK)", "range(0, k // BLOCK * BLOCK, BLOCK)"),
        ),
        Mistake(
            "first inner tile only",
            "You multiply the first tiles alone: the sum runs over all the tiles of the inner dimension.",
            edit("range(0, k, BLOCK)", "range(0, BLOCK, BLOCK)"),
        ),
        Mistake(
            "not added up",
            "Each step of your loop replaces the total: a tile of the product is the sum over all inner tiles.",
            edit("total += tl.dot", "total = tl.dot"),
        ),
        Mistake(
            "store not masked",
            "Your loads are masked and your store is not: it writes past the edges of `out`.",
            edit(_STORE, "        total,\n"),
        ),
        Mistake(
            "programs rounded down",
            "You launch too few programs for ragged edges: round up, with triton.cdiv, in both directions.",
            (edit("triton.cdiv(m, block)", "max(1, m // block)"), edit("triton.cdiv(n, block)", "max(1, n // block)")),
        ),
        Mistake(
            "strides assumed",
            "You take the inputs for contiguous: a transposed matrix has a column stride other "
            "than 1. Pass a.stride(0), a.stride(1), b.stride(0) and b.stride(1).",
            edit("a.stride(0), a.stride(1), b.stride(0), b.stride(1)", "k, 1, n, 1"),
        ),
        Mistake(
            "summed in half precision",
            "You sum in the inputs' dtype, where a large total swallows small tiles: "
            "keep the total in float32, and round once, when you store it.",
            (
                edit("tl.zeros([BLOCK, BLOCK], tl.float32)", "tl.zeros([BLOCK, BLOCK], out_ptr.dtype.element_ty)"),
                edit(
                    'tl.dot(a, b, input_precision="ieee")',
                    'tl.dot(a, b, input_precision="ieee").to(out_ptr.dtype.element_ty)',
                ),
            ),
        ),
        # What a GPU does with float32 unless it is told otherwise, spelled out: the interpreter knows no TF32.
        Mistake(
            "TF32",
            "Your float32 product was rounded to TF32 (10 bits of mantissa): tl.dot does that on a GPU "
            'unless you ask for input_precision="ieee". In the interpreter on a CPU it does not show.',
            edit(
                "        total += tl.dot",
                "        if a_ptr.dtype.element_ty == tl.float32:\n"
                "            a = ((a.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)\n"
                "            b = ((b.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)\n"
                "        total += tl.dot",
            ),
        ),
    )


class TiledMatmulTwin(TiledMatmul):
    exercise, twin = "tiled_matmul_twin", True

    mistakes = (
        Mistake(
            "inner tiles rounded down",
            "You leave the ragged last tile of the inner dimension out: step through range(0, k, block).",
            edit("range(0, k, block)", "range(0, k // block * block, block)"),
        ),
        Mistake(
            "first inner tile only",
            "You multiply the first tiles alone: the sum runs over all the tiles of the inner dimension.",
            edit("range(0, k, block)", "range(0, block, block)"),
        ),
        Mistake(
            "not added up",
            "Each step of your loop replaces the total: a tile of the product is the sum over all inner tiles.",
            edit("total = total + ", "total = "),
        ),
        Mistake(
            "tiles rounded down",
            "You leave the ragged tiles at the edges of `out` out: step through "
            "range(0, m, block) and range(0, n, block).",
            (
                edit("range(0, m, block)", "range(0, max(1, m // block) * block, block)"),
                edit("range(0, n, block)", "range(0, max(1, n // block) * block, block)"),
            ),
        ),
        Mistake(
            "summed in half precision",
            "You sum in the inputs' dtype, where a large total swallows small tiles: "
            "keep the total in float32, and round once, when you store it.",
            (
                edit("total = 0.0", "total = torch.zeros((), dtype=a.dtype, device=a.device)"),
                edit("left.float() @ right.float()", "left @ right"),
            ),
        ),
        Mistake(
            "all at once",
            "You multiply the whole matrices at once: a program of the kernel sees one tile of each.",
            edit("            out[i : i + block, j : j + block] = total", "            out.copy_(a @ b)"),
        ),
    )


REFERENCES = {
    cls.exercise: cls()
    for cls in (
        MaskedMean,
        AttentionScores,
        SplitHeads,
        Timed,
        BestMatch,
        AddVectors,
        AddVectorsTwin,
        RowSum,
        RowSumTwin,
        TiledMatmul,
        TiledMatmulTwin,
    )
}
EARLIER: dict = {}
