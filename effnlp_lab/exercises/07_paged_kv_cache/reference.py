"""Cases, right outputs and known mistakes of lab 07.

What has state is driven by scripts, random ones among them, and compared with models that keep other books: pages as
objects with a set of holders, contents as plain rows. Right attention is attention over the gathered keys, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from effnlp_lab.exercises.compare import Finding, brief, compare
from effnlp_lab.exercises.reference import Case, Mistake, Reference, Rng, edit

Inputs = Mapping[str, Any]
Variant = Mapping[str, str]

ONE_PAGE_MORE = (
    "A sequence of exactly k pages takes k + 1 of yours: round length / page_size up, and a whole number stays as it "
    "is."
)


def up(length: int, page_size: int) -> int:
    """Pages that hold `length` tokens."""
    return math.ceil(length / page_size)


def told(step: list, number: int) -> str:
    """A step of a script in words."""
    what, *rest = step
    return f"step {number}, {what}({', '.join(brief(x, 40) for x in rest)})"


class CacheBytes(Reference):
    exercise = "cache_bytes"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, lengths, page_size, **changes):
            heads = rng.choice([4, 8, 32])
            model = {
                "layers": rng.int(3, 40), "heads": heads, "kv_heads": heads // rng.choice([2, 4]),
                "head_dim": rng.choice([48, 64, 128]), "itemsize": rng.choice([2, 4]), "max_length": rng.int(300, 900),
            }  # fmt: skip
            return Case(name, {"model": {**model, **changes}, "lengths": lengths, "page_size": page_size}, part)

        yield case("one sequence of one token", "one token", [1], 1)
        yield case("as many key heads as heads", "one token", [rng.int(2, 9)], 1, heads=6, kv_heads=6)
        yield case("some tokens", "one token", rng.ints(4, 1, 60), 1)
        yield case("mixed lengths", "allocators", rng.ints(rng.int(5, 9), 1, 290), 16)
        yield case("whole pages", "allocators", [16 * n for n in rng.ints(4, 1, 9)], 16)
        yield case("a token more and a token less", "allocators", [8 * rng.int(2, 9) + d for d in (-1, 0, 1)], 8)
        yield case("a sequence without tokens", "allocators", [rng.int(20, 50), 0, 7], 12)
        yield case("no sequences", "allocators", [], 16)
        yield case("pages longer than the sequences", "allocators", rng.ints(3, 1, 40), 64)

    def expected(self, inputs, variant):
        model, lengths = inputs["model"], inputs["lengths"]
        token = 2 * math.prod(model[name] for name in ("layers", "kv_heads", "head_dim", "itemsize"))
        slots = {"used": 0, "maximum": 0, "padded": 0, "paged": 0}
        for n in lengths:
            slots["used"] += n
            slots["maximum"] += model["max_length"]
            slots["padded"] += max(lengths)
            slots["paged"] += up(n, inputs["page_size"]) * inputs["page_size"]
        return {"token": token, **{name: count * token for name, count in slots.items()}}

    mistakes = (
        Mistake("keys alone", "A token keeps a key AND a value: twice as much.", edit("2 * model", "model")),
        Mistake(
            "query heads",
            "You count the query heads: keys and values are kept once for each KEY head.",
            edit('model["kv_heads"]', 'model["heads"]'),
        ),
        Mistake(
            "one layer",
            "You count one layer: every layer has keys and values of its own.",
            edit('model["layers"] * ', ""),
        ),
        Mistake(
            "numbers, not bytes",
            "You count numbers: times itemsize they are bytes.",
            edit(' * model["itemsize"]', ""),
        ),
        Mistake("k + 1 pages", ONE_PAGE_MORE, edit("-(-n // page_size)", "(n // page_size + 1)")),
        Mistake(
            "rounded down",
            "You round down: the tokens of a page that is not full need a page too.",
            edit("-(-n // page_size)", "(n // page_size)"),
        ),
        Mistake(
            "padded to the maximum",
            "You pad to max_length: a padded batch is as long as its longest sequence.",
            edit("max(lengths, default=0)", 'model["max_length"]'),
        ),
        Mistake(
            "pages, not tokens",
            "You count pages: each has page_size slots, whether they are filled or not.",
            edit("for n in lengths) * page_size", "for n in lengths)"),
        ),
        Mistake(
            "rounded once",
            "You round the sum of all lengths: a page belongs to one sequence, so each rounds up on its own.",
            edit("sum(-(-n // page_size) for n in lengths)", "-(-sum(lengths) // page_size)"),
        ),
    )


class Books:
    """Pages by number, when each became free, and how often each is held."""

    def __init__(self, pages: int, order: str) -> None:
        self.held = [0] * pages
        self.order, self.clock = order, 0
        self.since = [-page if order == "newest" else page - pages for page in range(pages)]  # page 0 comes first

    @property
    def free(self) -> list[int]:
        return [page for page, held in enumerate(self.held) if not held]

    def allocate(self, count: int) -> list[int] | None:
        if count > len(self.free):
            return None
        taken = []
        for _ in range(count):
            best = max if self.order in ("newest", "highest") else min
            page = best(self.free, key=self.since.__getitem__ if self.order in ("newest", "oldest") else None)
            self.held[page] = 1
            taken.append(page)
        return taken

    def change(self, page: int, by: int) -> bool:
        """One reference more or less; False for a page that is not in use."""
        if not 0 <= page < len(self.held) or not self.held[page]:
            return False
        self.held[page] += by
        if not self.held[page]:
            self.clock += 1
            self.since[page] = self.clock
        return True


class BlockManagerReference(Reference):
    exercise = "BlockManager"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, pages, script):
            return Case(name, {"pages": pages, "script": script}, part)

        count = rng.int(4, 7)
        yield case("one page after the other", "allocate and release", count,
                   [["allocate", f"a{i}", 1] for i in range(count)])  # fmt: skip
        yield case("several at once, none, and the rest", "allocate and release", 9,
                   [["allocate", "a", rng.int(2, 5)], ["allocate", "b", 0], ["allocate", "c", 4]])  # fmt: skip
        back = rng.shuffled(range(5))
        if back[-1] == 0 or back == sorted(back)[::-1]:
            back = [3, 0, 4, 1, 2]
        yield case("given back out of order, and allocated again", "allocate and release", 6,
                   [["allocate", "a", 5], *(["release", "a", i] for i in back), ["allocate", "b", 4],
                    ["allocate", "c", 2]])  # fmt: skip
        yield case("given back and taken in turns", "allocate and release", 4,
                   [["allocate", "a", 4], ["release", "a", 2], ["release", "a", 0], ["allocate", "b", 1],
                    ["release", "a", 3], ["allocate", "c", 2], ["release", "c", 0], ["allocate", "d", 1]])  # fmt: skip
        yield case("shared once", "sharing", 3,
                   [["allocate", "a", 2], ["share", "a", 0], ["release", "a", 0], ["allocate", "b", 1],
                    ["release", "a", 0], ["allocate", "c", 1]])  # fmt: skip
        yield case("shared several times", "sharing", 3,
                   [["allocate", "a", 3], *[["share", "a", 1]] * 3, *[["release", "a", 1]] * 4,
                    ["allocate", "b", 1], ["release", "b", 0]])  # fmt: skip
        yield case("random steps", "sharing", 8, self._random(rng, 8, 50))
        yield case("more than are free", "refusals", 5,
                   [["allocate", "a", 2], ["allocate", "b", 4], ["allocate", "c", 3], ["allocate", "d", 1],
                    ["allocate", "e", 0]])  # fmt: skip
        yield case("released twice", "refusals", 4,
                   [["allocate", "a", 3], ["release", "a", 1], ["release", "a", 1], ["allocate", "b", 2],
                    ["allocate", "c", 1]])  # fmt: skip
        yield case("a free page shared", "refusals", 4,
                   [["allocate", "a", 2], ["release", "a", 0], ["share", "a", 0], ["allocate", "b", 3],
                    ["share", "b", 2], ["release", "b", 2], ["release", "b", 2]])  # fmt: skip
        yield case("pages that there are not", "refusals", 3,
                   [["allocate", "a", 3], ["release", -1], ["share", 3], ["share", -3], ["release", 3],
                    ["release", "a", 2], ["share", 2], ["release", -1], ["allocate", "b", 1]])  # fmt: skip
        yield case("random steps, some of them refused", "refusals", 6, self._random(rng, 6, 50, refused=True))

    @staticmethod
    def _random(rng: Rng, pages: int, steps: int, refused: bool = False) -> list:
        """Allocations, releases and shares. Which page a name stands for depends on the order rule; whether it is in
        use does not, as a name is no longer used once its page is free."""
        script, held = [], {}  # the references of each page, by the name and index that it was given under
        for number in range(steps):
            what, free = rng.choice(["allocate", "share", "release", "release"]), pages - len(held)
            if what == "allocate" or not held:
                count = min(4, rng.int(0, free + (2 if refused else 0)))
                script.append(["allocate", f"x{number}", count])
                if count <= free:
                    held.update({(f"x{number}", i): 1 for i in range(count)})
            elif refused and rng.int(0, 4) == 0:
                script.append([what, rng.choice([-1, pages, pages + 3, -pages])])
            else:
                one = rng.choice(list(held))
                script.append([what, *one])
                held[one] += 1 if what == "share" else -1
                if not held[one]:
                    del held[one]
        script += [["release", *one] for one in rng.shuffled(list(held)) for _ in range(held[one])]
        return [*script, ["allocate", "all", pages]]

    def expected(self, inputs, variant):
        books, given, trace = Books(inputs["pages"], variant["order"]), {}, []
        for what, *which in inputs["script"]:
            line = {"raised": ""}
            if what == "allocate":
                taken = books.allocate(which[1])
                line = {"raised": "OutOfPages"} if taken is None else {**line, "pages": taken}
                given[which[0]] = taken or []
            else:
                page = which[0] if len(which) == 1 else given[which[0]][which[1]]
                line["raised"] = "" if books.change(page, 1 if what == "share" else -1) else "ValueError"
            trace.append({**line, "free": len(books.free), "references": list(books.held)})
        return trace

    def verify(self, inputs, outputs, expected, variant):
        words = {"free": "free_pages", "pages": "the pages that you hand out"}
        for number, (step, got, want) in enumerate(zip(inputs["script"], outputs, expected, strict=True), 1):
            found = _raised(told(step, number), got, want)
            for name in ("pages", "free", "references"):
                if found is None and name in want:
                    found = compare(got[name], want[name], path=f"after {told(step, number)}: {words.get(name, name)}")
            if found:
                return found
        return None

    mistakes = (
        Mistake(
            "freed while still referenced",
            "A page goes back while others still hold it: it is free when its LAST reference is released.",
            edit("if self.counts[page] == 0:", "if True:"),
        ),
        Mistake(
            "never freed",
            "Pages that nobody holds any more never come back: add them to the free ones.",
            edit("            self.free.append(page)\n", ""),
        ),
        Mistake(
            "some before none",
            "Where there are too few you hand out what is there: check first, then give all or nothing.",
            (edit("if count > len(self.free):", "if not self.free and count:"),
             edit("for _ in range(count)]", "for _ in range(min(count, len(self.free)))]")),
        ),
        Mistake(
            "taken before the refusal",
            "You hand out pages until there are none, and then refuse: those are lost. Check first.",
            (edit("if count > len(self.free):", "if count > len(self.free) and not self.free.clear():"),),
        ),
        Mistake(
            "the last page kept",
            "You refuse an allocation that takes every free page: it fits exactly.",
            edit("if count > len(self.free):", "if count >= len(self.free) and count:"),
        ),
        Mistake(
            "share is a new page",
            "Sharing counts a reference and takes no page.",
            edit("        self.counts[page] += 1\n",
                 "        self.counts[page] += 1\n        self.free = self.free[:-1]\n"),
        ),
        Mistake(
            "released twice",
            "A page that is free already can be released again: then it is in the free list twice, and two sequences "
            "get it. Raise ValueError.",
            edit('raise ValueError(f"page {page} is not in use: it cannot be released")',
                 "return self.free.append(page)"),
        ),
        Mistake(
            "a free page shared",
            "A free page can be shared: nobody holds its content. Raise ValueError.",
            (edit('raise ValueError(f"page {page} is not in use: it cannot be shared")', "self.counts[page] = 0"),),
        ),
        Mistake(
            "the first to become free",
            "You hand out the page that has been free longest: your order rule is another.",
            edit("self.free.pop()", "self.free.pop(0)"),
        ),
        Mistake(
            "backwards from the end",
            "You begin with the last page: at the beginning the pages come in the order 0, 1, 2, ...",
            edit("list(range(pages))[::-1]", "list(range(pages))"),
        ),
    )  # fmt: skip


def _raised(where: str, got: Mapping[str, Any], want: Mapping[str, Any]) -> Finding | None:
    """Whether a step raised what it was to raise."""
    if got["raised"] == want["raised"]:
        return None
    if not want["raised"]:
        return Finding(f"{where} raised {got['raised']}, and is possible")
    return Finding(f"{where} {'raised ' + got['raised'] if got['raised'] else 'was done'}, and is to raise "
                   f"{want['raised']}")  # fmt: skip


class Row:
    """A page of the model: who holds it."""

    def __init__(self, holder: str) -> None:
        self.holders = {holder}


class Shelf:
    """A model of sequences over `pages` pages: which rows each holds, and which pages, as objects."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size = pages, page_size
        self.rows: dict[str, list[int]] = {}
        self.tables: dict[str, list[Row]] = {}

    @property
    def free(self) -> int:
        return self.pages - len({id(page) for table in self.tables.values() for page in table})

    def append(self, name: str, rows: list[int]) -> bool:
        table, held = self.tables[name], len(self.rows[name])
        wanted = up(held + len(rows), self.page_size) - len(table)
        copied = bool(rows) and held % self.page_size > 0 and len(table[-1].holders) > 1
        if wanted + copied > self.free:
            return False
        if copied:
            table[-1].holders.discard(name)
            table[-1] = Row(name)
        table += [Row(name) for _ in range(wanted)]
        self.rows[name] = self.rows[name] + list(rows)
        return True

    def fork(self, name: str, child: str) -> None:
        self.rows[child], self.tables[child] = list(self.rows[name]), list(self.tables[name])
        for page in self.tables[child]:
            page.holders.add(child)

    def clear(self, name: str) -> None:
        for page in self.tables.get(name, []):
            page.holders.discard(name)
        self.rows[name], self.tables[name] = [], []


class SequenceReference(Reference):
    """Runs the script on the model. The driver uses up rows in the same order."""

    def _case(self, rng: Rng, name: str, part: str, pages: int, page_size: int, script: list, kv_heads: int = 2,
              dim: int = 4, dtype: torch.dtype = torch.float32) -> Case:  # fmt: skip
        rows = sum(step[2] for step in script if step[0] == "append")
        k, v = (rng.randn(kv_heads, rows, dim, dtype=dtype).transpose(0, 1) for _ in range(2))  # not contiguous
        return Case(name, {"order": rng.shuffled(range(pages)), "script": script, "k": k, "v": v,
                           "page_size": page_size}, part)  # fmt: skip

    def _random(self, rng: Rng, pages: int, page_size: int, steps: int, forks: bool) -> list:
        shelf, script, names = Shelf(pages, page_size), [], []
        for number in range(steps):
            what = rng.choice(["new", "append", "append", "append", "append", "free", *["fork"] * (3 * forks)])
            if what == "new" or not names:
                names.append(f"s{number}")
                script.append(["new", names[-1]])
                shelf.clear(names[-1])
                continue
            name = rng.choice(names)
            if what == "append":
                count = rng.int(0, 2 * page_size + 1)
                script.append(["append", name, count])
                shelf.append(name, [0] * count)
            elif what == "fork":
                names.append(f"s{number}")
                script.append(["fork", name, names[-1]])
                shelf.fork(name, names[-1])
            else:
                script.append(["free", name])
                shelf.clear(name)
            if len(names) > 4:
                gone = names.pop(0)
                script.append(["free", gone])
                shelf.clear(gone)
        return script

    def expected(self, inputs, variant):
        shelf, trace, used = Shelf(len(inputs["order"]), inputs["page_size"]), [], 0
        both = torch.stack([inputs["k"], inputs["v"]])
        for what, name, *rest in inputs["script"]:
            raised = ""
            if what in ("new", "free"):
                shelf.clear(name)
            elif what == "fork":
                shelf.fork(name, rest[0])
            else:
                raised = "" if shelf.append(name, list(range(used, used + rest[0]))) else "OutOfPages"
                used += rest[0]
            sizes = {one: [len(rows), len(shelf.tables[one])] for one, rows in shelf.rows.items()}
            held = both[:, [row for rows in shelf.rows.values() for row in rows]]
            trace.append({"raised": raised, "free": shelf.free, "stray": 0, "sizes": sizes, "held": held})
        return trace

    def verify(self, inputs, outputs, expected, variant):
        for number, (step, got, want) in enumerate(zip(inputs["script"], outputs, expected, strict=True), 1):
            where = told(step, number)
            found = _raised(where, got, want) or self._contents(step, where, got, want)
            if found is None and got["stray"]:
                found = Finding(f"{where} wrote into pages that the sequence does not hold")
            found = found or compare(got["free"], want["free"], path=f"after {where}: the number of free pages")
            if found:
                return found
        return None

    @staticmethod
    def _contents(step: list, where: str, got: Mapping[str, Any], want: Mapping[str, Any]) -> Finding | None:
        for name, right in want["sizes"].items():
            for what, mine, wanted in zip(("length", "number of pages"), got["sizes"][name], right, strict=True):
                found = compare(mine, wanted, path=f"after {where}: the {what} of {name}")
                if found:
                    return found
        off = got["held"].cpu() != want["held"].cpu()
        first = 0
        for name, (length, _) in want["sizes"].items():
            for what, wrong in zip(("key", "value"), off[:, first : first + length].flatten(2).any(2), strict=True):
                if wrong.any():
                    whose = "has changed" if name not in step[1:] else "is not what was appended"
                    return Finding(f"after {where}: {what} {wrong.nonzero()[0].item()} of {name} {whose}")
            first += length
        return None


class PagedSequenceReference(SequenceReference):
    exercise = "PagedSequence"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        size, bit = rng.choice([4, 8]), rng.int(1, 3)

        def case(name, part, pages, page_size, *script, **shape):
            return self._case(rng, name, part, pages, page_size, [["new", "a"], *script], **shape)

        yield case("a prompt of exactly one page", "pages", 4, size, ["append", "a", size])
        yield case("a prompt of exactly three pages", "pages", 6, size, ["append", "a", 3 * size])
        yield case("nothing, then a page, then nothing", "pages", 3, size, ["append", "a", 0], ["append", "a", size],
                   ["append", "a", 0])  # fmt: skip
        yield case("token by token over a border", "pages", 4, 3, *[["append", "a", 1]] * 7)
        yield case("pages of one token", "pages", 6, 1, ["append", "a", 3], ["append", "a", 1])
        yield case("given back, and filled again", "pages", 3, size, ["append", "a", size + bit], ["free", "a"],
                   ["append", "a", 2 * size + bit], ["free", "a"], ["free", "a"])  # fmt: skip
        yield case("two pages and a bit", "places", 5, size, ["append", "a", 2 * size + bit])
        yield case("from the middle of a page on", "places", 6, size, ["append", "a", bit], ["append", "a", size],
                   ["append", "a", 2 * size], kv_heads=3)  # fmt: skip
        yield case("two sequences in turns", "places", 8, 4, ["new", "b"], ["append", "a", 6], ["append", "b", 3],
                   ["append", "a", 3], ["append", "b", 5], ["free", "a"], ["append", "b", 5])  # fmt: skip
        yield case("half precision, one head", "places", 4, 4, ["append", "a", 5], ["append", "a", 4],
                   kv_heads=1, dim=6, dtype=torch.float16)  # fmt: skip
        yield case("a page too few", "refusals", 3, size, ["append", "a", 2 * size + bit], ["append", "a", size],
                   ["append", "a", size - bit], ["append", "a", 1])  # fmt: skip
        yield case("two sequences, and no room for one of them", "refusals", 4, 4, ["new", "b"], ["append", "a", 9],
                   ["append", "b", 7], ["append", "b", 4], ["append", "a", 3], ["append", "a", 1], ["free", "b"],
                   ["append", "a", 4])  # fmt: skip
        yield self._case(rng, "random steps", "refusals", 7, 3, self._random(rng, 7, 3, 16, forks=False))

    mistakes = (
        Mistake("k + 1 pages", ONE_PAGE_MORE, edit("-(-end // self.page_size)", "(end // self.page_size + 1)")),
        Mistake(
            "rounded down",
            "You round the number of pages down: the tokens of a page that is not full need a page too.",
            edit("-(-end // self.page_size)", "(end // self.page_size)"),
        ),
        Mistake(
            "pages for every append",
            "Every append takes pages of its own: fill the last page of the block table first.",
            edit("-(-end // self.page_size) - len(self.pages)", "-(-len(k) // self.page_size)"),
        ),
        Mistake(
            "without the block table",
            "You take the number of a page in the sequence for its number in the cache: the block table says where it "
            "is.",
            edit("page = self.pages[position // self.page_size]", "page = position // self.page_size"),
        ),
        Mistake(
            "from the beginning of the page",
            "You write to the beginning of the sequence again: the first new token is at position `length`.",
            edit("range(self.length, end)", "range(end - self.length)"),
        ),
        Mistake("values forgotten", "You write keys and no values.",
                edit("            self.v_pages[page, :, place] = v[row]\n", "")),
        Mistake("keys as values", "Your values are the keys.", edit("= v[row]", "= k[row]")),
        Mistake(
            "one page at a time",
            "Where pages run out you keep those that you got before: allocate all that are missing at once, so that a "
            "refusal changes nothing.",
            edit("        self.pages += self.manager.allocate(missing)\n",
                 "        for _ in range(missing):\n            self.pages += self.manager.allocate(1)\n"),
        ),
        Mistake(
            "length before pages",
            "The length has grown although there was no room: allocate first.",
            edit("        self.pages += self.manager.allocate(missing)\n",
                 "        start, self.length = self.length, end\n        self.pages += self.manager.allocate(missing)\n"
                 "        self.length = start\n"),
        ),
        Mistake("the length stays", "The length of the sequence does not grow.",
                edit("        self.length = end\n", "")),
        Mistake("pages not released", "`free` forgets the pages: release each of them.",
                edit("            self.manager.release(page)\n", "            pass\n")),
        Mistake("still in the table", "After `free` the pages are still in the block table: the sequence is empty.",
                edit("self.pages, self.length = [], 0", "self.length = 0")),
    )  # fmt: skip


class SharedSequenceReference(SequenceReference):
    exercise = "SharedSequence"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        size, bit = rng.choice([4, 5]), rng.int(1, 3)

        def case(name, part, pages, page_size, *script, **shape):
            return self._case(rng, name, part, pages, page_size, [["new", "a"], *script], **shape)

        some = ["append", "a", size + bit]
        yield case("a fork takes no page", "fork", 4, size, some, ["fork", "a", "b"], ["fork", "b", "c"])
        yield case("the parent goes first", "fork", 4, size, some, ["fork", "a", "b"], ["free", "a"], ["free", "b"])
        yield case("the child goes first", "fork", 4, size, some, ["fork", "a", "b"], ["free", "b"], ["free", "a"])
        yield case("a fork of nothing", "fork", 4, size, ["fork", "a", "b"], ["append", "b", bit],
                   ["append", "a", size])  # fmt: skip
        yield case("after whole pages each goes on alone", "fork", 6, size, ["append", "a", 2 * size],
                   ["fork", "a", "b"], ["append", "b", bit], ["append", "a", 1])  # fmt: skip
        yield case("the child writes", "copy on write", 5, size, some, ["fork", "a", "b"], ["append", "b", 1],
                   ["append", "a", 1], kv_heads=3)  # fmt: skip
        yield case("the parent writes", "copy on write", 5, size, some, ["fork", "a", "b"], ["append", "a", 1],
                   ["append", "b", 1], ["append", "a", 1])  # fmt: skip
        yield case("the last holder writes in place", "copy on write", 2, size, some, ["fork", "a", "b"],
                   ["free", "a"], ["append", "b", 1])  # fmt: skip
        yield case("three of one", "copy on write", 8, size, some, ["fork", "a", "b"], ["fork", "a", "c"],
                   ["append", "b", 1], ["append", "c", 1], ["append", "a", 1], ["append", "c", size])  # fmt: skip
        yield case("nothing is written", "copy on write", 4, size, some, ["fork", "a", "b"], ["append", "b", 0],
                   ["append", "a", 0])  # fmt: skip
        yield case("more than a page at once", "copy on write", 9, size, some, ["fork", "a", "b"],
                   ["append", "b", 2 * size], ["append", "a", 2 * size], dtype=torch.float16)  # fmt: skip
        yield case("no page for the copy", "refusals", 2, size, some, ["fork", "a", "b"], ["append", "b", 1],
                   ["free", "a"], ["append", "b", 1])  # fmt: skip
        yield case("a page for the copy, and none for the rest", "refusals", 3, size, some, ["fork", "a", "b"],
                   ["append", "b", size], ["append", "b", size - bit], ["append", "b", 1], ["append", "a", 1],
                   ["append", "a", size])  # fmt: skip
        yield case("after whole pages, and none is left", "refusals", 3, size, ["append", "a", 2 * size],
                   ["fork", "a", "b"], ["append", "b", size + 1], ["append", "b", size],
                   ["append", "a", 1])  # fmt: skip
        yield self._case(rng, "random steps", "copy on write", 14, 3, self._random(rng, 14, 3, 18, forks=True))
        yield self._case(rng, "random steps with few pages", "refusals", 6, 3, self._random(rng, 6, 3, 18, forks=True))

    mistakes = (
        Mistake(
            "writing into a shared page",
            "You write into a page that others hold too: the sibling's history changed. Copy it first.",
            edit("self.manager.references(self.pages[-1]) > 1", "False"),
        ),
        Mistake(
            "references not counted",
            "The child's pages are not shared with the manager: they are freed while the sibling still reads them.",
            edit("            self.manager.share(page)\n", "            pass\n"),
        ),
        Mistake(
            "one block table for both",
            "Parent and child have the same list as their block table: what one appends the other has too. Copy the "
            "list.",
            edit("list(self.pages)", "self.pages"),
        ),
        Mistake("length forgotten", "The child does not know how many tokens it has.",
                edit("child.pages, child.length = list(self.pages), self.length", "child.pages = list(self.pages)")),
        Mistake(
            "an empty copy",
            "The new page does not hold what the old one held: copy the tokens that are there, keys and values.",
            (edit("            self.k_pages[fresh[0]] = self.k_pages[old]\n", ""),
             edit("            self.v_pages[fresh[0]] = self.v_pages[old]\n", "")),
        ),
        Mistake("keys alone", "You copy the page's keys and not its values.",
                edit("            self.v_pages[fresh[0]] = self.v_pages[old]\n", "")),
        Mistake("the old page kept", "After the copy you still count as a holder of the old page: release it.",
                edit("            self.manager.release(old)\n", "")),
        Mistake(
            "copied although alone",
            "You copy a page that nobody else holds: with one reference, write in place.",
            edit("self.manager.references(self.pages[-1]) > 1", "self.manager.references(self.pages[-1]) > 0"),
        ),
        Mistake(
            "a full page copied",
            "You copy a page that is full: nothing is written into it any more, so it stays shared.",
            edit("self.length % self.page_size and", "self.pages and"),
        ),
        Mistake(
            "copied for nothing",
            "You copy a page when no token is appended: nothing is written.",
            edit("if len(k) and ", "if "),
        ),
        Mistake(
            "the copy before the room",
            "Where the pages suffice for the copy and not for the rest, you have copied already: ask for all of them "
            "at once, so that a refusal changes nothing.",
            edit("missing = -(-end // self.page_size) - len(self.pages) + 1", "missing = 1"),
        ),
        Mistake(
            "copied at the fork",
            "You copy pages at the fork: share them all, and copy one when it is written into.",
            (edit("            self.manager.share(page)\n", "            pass\n"),
             edit("child.pages, child.length = list(self.pages), self.length",
                  "child.pages, child.length = self.manager.allocate(len(self.pages)), self.length\n"
                  "        child.k_pages[child.pages] = self.k_pages[self.pages]\n"
                  "        child.v_pages[child.pages] = self.v_pages[self.pages]")),
        ),
    )  # fmt: skip


EPS = torch.finfo(torch.float32).eps


class PagedAttention(Reference):
    exercise = "paged_attention"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, length, page_size=4, heads=2, kv_heads=2, dim=8, scale=1.0, dtype=torch.float32,
                 spare=3, left_over=math.nan, offset=0.0, rising=0.0, sunk=0.0, allowed=None):  # fmt: skip
            used = up(length, page_size)
            shape = used + spare, kv_heads, page_size, dim
            k_pages, v_pages = (torch.full(shape, left_over, dtype=dtype) for _ in range(2))
            table = torch.tensor(rng.shuffled(range(used + spare))[:used] + [-1, used + spare])  # says nothing there
            q = rng.randn(heads, dim, dtype=dtype, scale=scale) + offset
            k = rng.randn(length, kv_heads, dim, dtype=dtype, scale=scale) + offset
            q[:, 0] += sunk
            k[..., 0] -= sunk
            k = k + rising * torch.arange(length, dtype=dtype)[:, None, None] * q[:kv_heads] / q[:kv_heads].norm()
            v = rng.randn(length, kv_heads, dim, dtype=dtype)
            for t in range(length):
                page, place = table[t // page_size], t % page_size
                k_pages[page, :, place], v_pages[page, :, place] = k[t], v[t]
            inputs = {"q": q, "k_pages": k_pages, "v_pages": v_pages, "block_table": table, "length": length}
            return Case(name, inputs | ({} if allowed is None else {"allowed": allowed}), part)

        yield case("one page", "attention", 4)
        yield case("some pages", "attention", 4 * rng.int(3, 6))
        yield case("one key", "attention", 1, page_size=1)
        yield case("large scores", "attention", 24, scale=16.0)
        yield case("keys that match better and better", "attention", 32, page_size=8, rising=0.3)
        yield case("scores far below 0", "attention", 12, sunk=35.0)
        yield case("half precision", "attention", 40, page_size=8, dim=16, scale=0.25, offset=7.8, dtype=torch.float16)
        yield case("old numbers behind the end", "ragged", 8 + rng.int(1, 5), page_size=8, left_over=1.5)
        yield case("anything behind the end", "ragged", 4 * rng.int(1, 4) + rng.int(1, 3))
        yield case("one token in a page", "ragged", 1, page_size=8)
        yield case("one token in the last page", "ragged", 17, page_size=8)
        yield case("8 query heads on 2", "heads", rng.int(9, 15), heads=8, kv_heads=2)
        yield case("6 query heads on 3", "heads", rng.int(9, 15), heads=6, kv_heads=3)
        yield case("6 query heads on 1", "heads", rng.int(5, 9), heads=6, kv_heads=1)
        yield case("a long cache", "memory", 101, heads=4, kv_heads=2, dim=16, spare=9, allowed=4 * 4 * 4 * 16)

    def expected(self, inputs, variant):
        q, length, size = inputs["q"].double(), inputs["length"], inputs["k_pages"].shape[2]
        positions = torch.arange(length)
        pages, places = inputs["block_table"][positions // size], positions % size
        k, v = (inputs[name][pages, :, places].double() for name in ("k_pages", "v_pages"))
        group = len(q) // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [length, heads, dim]
        scores = torch.einsum("hd,khd->hk", q, k) / math.sqrt(q.shape[1])
        out = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
        error = EPS * (1 + scores.abs().max().item()) * v.abs().max().item()  # what scores rounded in float32 do
        return {"out": out, "large": False, "error": error}

    def verify(self, inputs, outputs, expected, variant):
        want = expected["out"]
        found = compare(outputs["out"], want, want + 2 * expected["error"], inputs["q"].dtype, path="your output")
        if found is None and outputs["large"]:
            found = Finding(
                "the values are right, but you hold much of the cache at once: go through it page by page, with a "
                f"running maximum and sum (a tensor of more than {inputs['allowed']} numbers was made)"
            )
        return found

    _LOADS = "k_pages[page, :, :filled].float(), v_pages[page, :, :filled].float()"
    mistakes = (
        Mistake(
            "heads in turns",
            "Heads group by division: query head h reads key head h // (heads // kv_heads), and not h % kv_heads.",
            (edit("q.float().reshape(kv_heads, heads // kv_heads, dim)",
                  "q.float().reshape(heads // kv_heads, kv_heads, dim).transpose(0, 1)"),
             edit("(out / total).reshape", "(out / total).transpose(0, 1).reshape")),
        ),
        Mistake("not scaled", "Your scores are not scaled by 1/sqrt(d), d the head dimension.",
                edit(" / math.sqrt(dim)", "")),
        Mistake("divided by d", "You divide by the head dimension d, and its square root is right.",
                edit("/ math.sqrt(dim)", "/ dim")),
        Mistake(
            "without the block table",
            "You take the number of a page in the sequence for its number in the cache: the block table says where it "
            "is.",
            edit("block_table[start // page_size]", "start // page_size"),
        ),
        Mistake(
            "beyond the end",
            "You read the last page to its end: behind `length` it holds what somebody else left there.",
            edit("min(page_size, length - start)", "page_size"),
        ),
        Mistake(
            "zero times anything",
            "You give what lies behind the end a weight of 0 and multiply all the same: 0 times NaN is NaN. Leave it "
            "out.",
            (edit("min(page_size, length - start)", "page_size"),
             edit("        higher =",
                  "        beyond = start + torch.arange(page_size, device=q.device) >= length\n"
                  "        scores = scores.masked_fill(beyond, -math.inf)\n        higher =")),
        ),
        Mistake(
            "the last page left out",
            "The last page is missing where it is not full: round the number of pages up.",
            edit("range(0, length, page_size)", "range(0, length // page_size * page_size, page_size)"),
        ),
        Mistake(
            "without the newest token",
            "The newest token is missing: its key is in the cache already, and a token sees itself.",
            (edit("range(0, length, page_size)", "range(0, max(length - 1, 1), page_size)"),
             edit("min(page_size, length - start)", "max(min(page_size, length - 1 - start), 1)")),
        ),
        Mistake(
            "sum not rescaled",
            "The sum is not rescaled when the maximum grows: what was summed in units of e^old has to be multiplied by "
            "e^(old - new).",
            edit("total = total * shrink", "total = total"),
        ),
        Mistake(
            "output not rescaled",
            "The output is not rescaled when the maximum grows: like the sum, it is to be multiplied by e^(old - new).",
            edit("out = out * shrink", "out = out"),
        ),
        Mistake(
            "nothing rescaled",
            "Neither the sum nor the output is rescaled when the maximum grows: both were added up in units of e^old.",
            (edit("total = total * shrink", "total = total"), edit("out = out * shrink", "out = out")),
        ),
        Mistake(
            "a softmax of each page",
            "You take a softmax of every page and the mean of the pages: a page's share is the sum of its e^s, not the "
            "same for all.",
            (edit("higher = torch.maximum(peak, scores.amax(-1, keepdim=True))",
                  "higher = torch.zeros_like(peak)"),
             edit("weights, shrink = torch.exp(scores - higher), torch.exp(peak - higher)",
                  "weights, shrink = scores.softmax(-1), 1.0")),
        ),
        Mistake(
            "without the maximum",
            "You take e^s without the maximum: from a score of 89 on it overflows float32, and from -104 down it is 0.",
            (edit("higher = torch.maximum(peak, scores.amax(-1, keepdim=True))", "higher = torch.zeros_like(peak)"),),
        ),
        Mistake(
            "maximum from 0",
            "Your running maximum starts at 0, and never falls below it: where all scores lie below -104, every "
            "e^(s - 0) is 0. Start at -inf.",
            edit("1), -math.inf,", "1), 0.0,"),
        ),
        Mistake(
            "in half precision",
            "You compute in float16, which keeps 11 bits: a score of 240 is off by as much as 0.06. Convert to float32 "
            "first, and back at the end.",
            (edit("q.float().reshape", "q.reshape"),
             edit("-math.inf, device=q.device)", "-math.inf, device=q.device, dtype=q.dtype)"),
             edit(_LOADS, "k_pages[page, :, :filled], v_pages[page, :, :filled]")),
        ),
        Mistake("float32 handed back", "The output is to have q's dtype.", edit(".to(q.dtype)", ".float()")),
        Mistake(
            "gathered",
            "You gather the whole cache of the sequence: it is read, written, and read again. Go through it page by "
            "page.",
            edit("    return (out / total)",
                 "    filled = -(-length // page_size)\n"
                 "    k, v = k_pages[block_table[:filled]], v_pages[block_table[:filled]]\n"
                 "    return (out / total)"),
        ),
    )  # fmt: skip


def tokens_of(rng: Rng, count: int) -> list[int]:
    return rng.ints(count, 0, 5)


class PrefixCacheReference(Reference):
    exercise = "PrefixCache"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        size, other = rng.int(2, 4), [7, 8, 9, 7, 8, 9, 7, 8, 9, 7, 8, 9]
        text = tokens_of(rng, 3 * size + 1)

        def case(name, part, *script, page_size=size):
            return Case(name, {"page_size": page_size, "script": list(script)}, part)

        yield case("nothing is known", "match", ["match", text], ["match", text[:1]])
        yield case("the same beginning", "match", ["commit", text, [5, 3, 8, 1]], ["match", [*text[: 2 * size], 9, 9]],
                   ["match", [*text[: 2 * size - 1], 9, 9]], ["match", text])  # fmt: skip
        yield case("the whole prompt is known", "match", ["commit", text, [5, 3, 8, 1]], ["match", text[: 2 * size]],
                   ["match", text[: size]], ["match", text[: 2 * size + 1]])  # fmt: skip
        yield case("a page that is not full", "match", ["commit", text[: 2 * size - 1], [4, 2]],
                   ["match", text], ["match", text[: 2 * size]], ["commit", text[: 2 * size], [4, 2]],
                   ["match", text])  # fmt: skip
        yield case("the same tokens after another beginning", "match",
                   ["commit", [*other[:size], *text[size:]], [6, 2, 0, 4]], ["match", text],
                   ["commit", text, [7, 1, 9, 3]], ["match", text], ["match", [*other[:size], *text[size:]]],
                   ["match", [*text[size : 2 * size], *text[size:]]])  # fmt: skip
        turned = [*text[:size], *[t + 10 for t in text[size : 2 * size]], *text[2 * size :]]
        yield case("the same tokens again, two pages on", "match", ["commit", turned, [1, 2, 3, 4]], ["match", text],
                   ["commit", text, [1, 6, 7, 8]], ["match", text], ["match", turned])  # fmt: skip
        again = tokens_of(rng, size)
        yield case("one page's tokens over and over", "match", ["commit", again * 3, [1, 4, 2]],
                   ["match", again * 4], ["match", again * 2])  # fmt: skip
        numbers = [12, 3, 1, 23] if size % 2 == 0 else [12, 3, 4, 1, 23, 4]
        yield case("12, 3 is not 1, 23", "match", ["commit", numbers[: len(numbers) // 2], [3]],
                   ["match", [*numbers[len(numbers) // 2 :], 0]], page_size=len(numbers) // 2)  # fmt: skip
        yield case("pages of one token", "match", ["commit", [4, 4, 2], [0, 1, 2]], ["match", [4, 4, 2]],
                   ["match", [4, 2, 2]], ["match", [4, 4, 2, 2]], page_size=1)  # fmt: skip
        yield case("forgotten in the middle", "forget", ["commit", text, [5, 3, 8, 1]], ["forget", 3],
                   ["match", text], ["commit", text[: 2 * size], [5, 6]], ["match", text])  # fmt: skip
        yield case("forgotten first and last", "forget", ["commit", text, [5, 3, 8, 1]], ["forget", 8],
                   ["match", text], ["forget", 5], ["match", text], ["forget", 5], ["match", text])  # fmt: skip
        yield case("a page that was never filed", "forget", ["commit", text, [0, 3, 8, 1]], ["forget", 4],
                   ["forget", 1], ["match", text])  # fmt: skip
        yield case("the first stays filed", "forget", ["commit", text, [5, 3, 8, 1]], ["commit", text, [2, 4, 6, 9]],
                   ["match", text], ["forget", 4], ["match", text], ["forget", 3], ["match", text])  # fmt: skip
        yield case("another content afterwards", "forget", ["commit", text, [5, 3, 8, 1]], ["forget", 5],
                   ["commit", [*other[:size], 1], [5, 0]], ["match", [*other[:size], 0]], ["match", text],
                   ["forget", 5], ["match", [*other[:size], 0]])  # fmt: skip
        yield case("random steps", "forget", *self._random(rng, size))

    @staticmethod
    def _random(rng: Rng, size: int) -> list:
        """Prompts over two tokens, many with beginnings in common; a page is forgotten before it is filed anew."""
        script, free, filed = [], list(range(40)), []
        for _ in range(25):
            tokens = rng.ints(rng.int(1, 4 * size), 0, 1)
            what = rng.choice(["commit", "match", "match", "forget"])
            if what == "commit" and len(free) >= 4:
                pages = [free.pop(rng.int(0, len(free) - 1)) for _ in range(up(len(tokens), size))]
                filed += pages
                script.append(["commit", tokens, pages])
            elif what == "forget" and filed:
                page = filed.pop(rng.int(0, len(filed) - 1))
                free.append(page)
                script.append(["forget", page])
            else:
                script.append(["match", [*tokens, 0]])
        return script

    def expected(self, inputs, variant):
        size, known, trace = inputs["page_size"], {}, []  # whole beginnings, as tuples, to their last pages
        for what, one, *rest in inputs["script"]:
            if what == "forget":
                known = {beginning: page for beginning, page in known.items() if page != one}
                continue
            beginnings = [tuple(one[:end]) for end in range(size, len(one) + (what == "commit"), size)]
            if what == "commit":
                for beginning, page in zip(beginnings, rest[0], strict=False):
                    known.setdefault(beginning, page)
            else:
                first = next((i for i, b in enumerate(beginnings) if b not in known), len(beginnings))
                trace.append([known[b] for b in beginnings[:first]])
        return trace

    def verify(self, inputs, outputs, expected, variant):
        steps = [(n, step) for n, step in enumerate(inputs["script"], 1) if step[0] == "match"]
        for (number, step), got, want in zip(steps, outputs, expected, strict=True):
            found = compare(got, want, path=told(step, number))
            if found:
                return found
        return None

    mistakes = (
        Mistake(
            "not chained",
            "Your key of a page depends on its own tokens alone: the same tokens after another beginning are not the "
            "same keys and values. Chain it to the key of the page before.",
            edit("page_key(key, tokens[end - self.page_size : end])",
                 'page_key(b"", tokens[end - self.page_size : end])'),
        ),
        Mistake(
            "chained to the page before alone",
            "Your key depends on a page and on the tokens of the one before it: what comes before those counts as "
            "well. Chain keys, not tokens.",
            edit("page_key(key, tokens[end - self.page_size : end])",
                 "page_key(b'', tokens[max(0, end - 2 * self.page_size) : end])"),
        ),
        Mistake(
            "nothing left to compute",
            "Where the whole prompt is known you hand out all of it: the last token is computed, for its logits are "
            "needed.",
            edit("self._keys(prompt[:-1])", "self._keys(prompt)"),
        ),
        Mistake(
            "a page that is not full",
            "You file a page that is not full: its content still changes.",
            edit("len(tokens) + 1, self.page_size)", "len(tokens) + self.page_size, self.page_size)"),
        ),
        Mistake("the last page missing", "You leave out a page that ends with the last token: it is full.",
                edit("len(tokens) + 1, self.page_size)", "len(tokens), self.page_size)")),
        Mistake(
            "past a gap",
            "You go on behind a page that is not known: a beginning ends there.",
            edit("                break\n", "                continue\n"),
        ),
        Mistake(
            "the newest is filed",
            "The same content is filed again, under another page: the first one stays.",
            edit("            if key not in self.page_of:\n                self.page_of[key], ",
                 "            if True:\n                self.page_of[key], "),
        ),
        Mistake(
            "never forgotten",
            "A page whose content changed is still found: forget its key.",
            edit("            del self.page_of[self.key_of.pop(page)]", "            pass"),
        ),
        Mistake(
            "forgotten with all behind it",
            "With a page you forget what was filed behind it: those pages still hold what they held, and are found "
            "again once the beginning is filed.",
            edit("            del self.page_of[self.key_of.pop(page)]",
                 "            del self.page_of[self.key_of.pop(page)]\n            self.page_of.clear()\n"
                 "            self.key_of.clear()"),
        ),
    )  # fmt: skip


class SchedulerReference(Reference):
    exercise = "Scheduler"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        size = rng.int(3, 5)

        def case(name, part, pages, max_batch, *script, page_size=size):
            steps = [step for one in script for step in (one if isinstance(one[0], list) else [one])]
            return Case(name, {"pages": pages, "page_size": page_size, "max_batch": max_batch, "script": steps}, part)

        def steps(count):
            return [["step"]] * count

        yield case("nothing to do", "admit and run", 3, 2, ["step"], ["submit", "a", 2, 1], ["step"], ["step"])
        yield case("one request", "admit and run", 4, 2, ["submit", "a", 2, size + 2], steps(size + 3))
        yield case("a prompt of whole pages", "admit and run", 2, 2, ["submit", "a", 2 * size, 1], steps(2))
        yield case("more requests than fit in the batch", "admit and run", 20, 2,
                   *(["submit", name, rng.int(1, 6), rng.int(1, 3)] for name in "abcde"), steps(9))  # fmt: skip
        yield case("one comes later", "admit and run", 20, 4, ["submit", "a", 2, 5], ["step"],
                   ["submit", "b", 3, 2], steps(5))  # fmt: skip
        yield case("first come, first served", "admit and run", 5, 4, ["submit", "a", 3 * size, 3],
                   ["submit", "b", 3 * size, 1], ["submit", "c", 1, 1], steps(6))  # fmt: skip
        yield case("pages taken as they are needed", "admit and run", 4, 4, ["submit", "a", 1, 2 * size],
                   ["submit", "b", 1, 2 * size], steps(2 * size + 1))  # fmt: skip
        yield case("too long even alone", "admit and run", 3, 2, ["submit", "a", 3 * size, 1],
                   ["submit", "b", 3 * size, 2], ["submit", "c", 1, 3 * size + 1], ["submit", "d", 1, 3 * size],
                   ["submit", "e", 3 * size + 1, 1], steps(3))  # fmt: skip
        yield case("the latest is preempted", "preempt", 3, 4, ["submit", "a", size - 1, size + 2],
                   ["submit", "b", size, 2], ["submit", "c", 1, 2], steps(size + 8))  # fmt: skip
        yield case("preempted ones come back first", "preempt", 4, 4, ["submit", "a", size - 1, size + 1],
                   ["submit", "b", size - 1, size + 1], ["submit", "c", size, 3], ["submit", "d", size, 2],
                   ["submit", "e", 1, 1], steps(4 * size + 10))  # fmt: skip
        yield case("the one that grows is the latest", "preempt", 3, 4, ["submit", "a", 2 * size - 1, 3],
                   ["submit", "b", size, 3], steps(9))  # fmt: skip
        yield case("two at once", "preempt", 4, 4, ["submit", "a", size, 2 * size], ["submit", "b", size, size],
                   ["submit", "c", size, 2], ["submit", "d", size, 2], steps(5 * size + 8))  # fmt: skip
        yield case("the newcomer waits for those that grow", "preempt", 3, 4, ["submit", "a", size, 3], ["step"],
                   ["submit", "b", 2 * size, 1], steps(5))  # fmt: skip
        yield case("what came out stays", "preempt", 3, 2, ["submit", "a", size, 2 * size],
                   ["submit", "b", 2, 2 * size], steps(5 * size))  # fmt: skip
        yield case("random requests", "preempt", 7, 3, self._random(rng, 7 * size))
        yield case("random requests, few pages", "preempt", 4, 5, self._random(rng, 4 * size))

    @staticmethod
    def _random(rng: Rng, most: int) -> list:
        script = []
        for number in range(10):
            prompt = rng.int(1, most // 2)
            script.append(["submit", f"r{number}", prompt, rng.int(1, max(1, most - prompt) // 2 + 1)])
            script += [["step"]] * rng.int(0, 4)
        return script + [["step"]] * 40

    def expected(self, inputs, variant):
        """Requests as [name, tokens, left, pages] in one list, in order of arrival; those with pages run."""
        pages, size = inputs["pages"], inputs["page_size"]
        queue: list[list] = []
        trace, preemptions = [], 0
        for what, *arguments in inputs["script"]:
            line: dict[str, Any] = {"raised": ""}
            if what == "submit":
                name, prompt, new = arguments
                if up(prompt + new - 1, size) > pages:
                    line = {"raised": "ValueError"}
                else:
                    queue.append([name, prompt, new, 0])
            else:
                preemptions += self._make_room(queue, pages, size)
                self._admit(queue, pages, size, inputs["max_batch"])
                line["ran"] = [one[0] for one in queue if one[3]]
                for one in queue:
                    if one[3]:
                        one[1], one[2] = one[1] + 1, one[2] - 1
                queue[:] = [one for one in queue if one[2]]
            trace.append({**line, "free": pages - sum(one[3] for one in queue), "preemptions": preemptions})
        return trace

    @staticmethod
    def _make_room(queue: list[list], pages: int, size: int) -> int:
        """Each of those that run, in order of arrival, gets its next page; the latest give theirs back for it.

        Returns how many gave theirs back.
        """
        running = [one for one in queue if one[3]]
        for one in running:
            while one[3] and up(one[1], size) > one[3]:
                if sum(other[3] for other in queue) < pages:
                    one[3] += 1
                else:
                    max((other for other in running if other[3]), key=running.index)[3] = 0
        return sum(not one[3] for one in running)

    @staticmethod
    def _admit(queue: list[list], pages: int, size: int, max_batch: int) -> None:
        for one in queue:
            if one[3]:
                continue
            needed = up(one[1], size)
            if sum(bool(other[3]) for other in queue) == max_batch or needed > pages - sum(o[3] for o in queue):
                return
            one[3] = needed

    def verify(self, inputs, outputs, expected, variant):
        for number, (step, got, want) in enumerate(zip(inputs["script"], outputs, expected, strict=True), 1):
            where = told(step, number)
            found = _raised(where, got, want)
            if found is None and "ran" in want:
                found = compare(got["ran"], want["ran"], path=f"{where}: what ran")
            found = found or compare(got["free"], want["free"], path=f"after {where}: the number of free pages")
            found = found or compare(got["preemptions"], want["preemptions"], path=f"after {where}: preemptions")
            if found:
                return found
        return None

    mistakes = (
        Mistake(
            "the first preempted",
            "You preempt the request that came first: the latest gives way, so that the first is sure to end.",
            edit("self._preempt(self.running[-1])", "self._preempt(self.running[0])"),
        ),
        Mistake(
            "to the end of the queue",
            "A preempted request goes to the FRONT of the queue: it came before all that wait.",
            edit("self.waiting.appendleft(request)", "self.waiting.append(request)"),
        ),
        Mistake(
            "pages of the preempted kept",
            "A preempted request keeps its pages: giving them back is what it is preempted for.",
            edit("        self._give_back(request)\n        self.running.remove(request)\n        self.waiting",
                 "        self.running.remove(request)\n        self.waiting"),
        ),
        Mistake(
            "overtaken",
            "A small request overtakes one that does not fit: first come, first served, or large ones may wait for "
            "ever.",
            edit("        while self.waiting and len(self.running) < self.max_batch and self._grow(self.waiting[0]):\n"
                 "            self.running.append(self.waiting.popleft())\n",
                 "        for request in list(self.waiting):\n"
                 "            if len(self.running) < self.max_batch and self._grow(request):\n"
                 "                self.waiting.remove(request)\n                self.running.append(request)\n"),
        ),
        Mistake(
            "the batch too large",
            "More requests run than max_batch allows.",
            edit("len(self.running) < self.max_batch and", "len(self.running) <= self.max_batch and"),
        ),
        Mistake(
            "one request a step",
            "You admit one request a step: admit as long as the next one fits.",
            edit("        while self.waiting and", "        if self.waiting and"),
        ),
        Mistake(
            "admitted before the others grow",
            "You admit before those that run have their pages: then they preempt what has just come.",
            (edit("        for request in list(self.running):\n            while request in self.running and not "
                  "self._grow(request):\n                self._preempt(self.running[-1])\n", ""),
             edit("            self.running.append(self.waiting.popleft())\n",
                  "            self.running.append(self.waiting.popleft())\n"
                  "        for request in list(self.running):\n            while request in self.running and not "
                  "self._grow(request):\n                self._preempt(self.running[-1])\n")),
        ),
        Mistake("k + 1 pages", ONE_PAGE_MORE, edit("-(-request.tokens // self.page_size)",
                                                   "(request.tokens // self.page_size + 1)")),
        Mistake(
            "reserved in advance",
            "You take the pages of all tokens that a request may grow to: take them as they are needed.",
            edit("-(-request.tokens // self.page_size)",
                 "-(-(request.tokens + request.left - 1) // self.page_size)"),
        ),
        Mistake("pages of the finished kept", "A request that has ended keeps its pages: give them back.",
                edit("            if request.left == 0:\n                self._give_back(request)\n",
                     "            if request.left == 0:\n")),
        Mistake(
            "one token too many",
            "A request runs once more than it has tokens to come.",
            edit("if request.left == 0:", "if request.left < 0:"),
        ),
        Mistake(
            "what came out is lost",
            "A preempted request begins again from its prompt: what it has written stays, and is read again with the "
            "prompt.",
            (edit("        self.waiting.append(Request(name, prompt, new))",
                  "        self.waiting.append(Request(name, prompt, new))\n"
                  "        self.waiting[-1].asked = prompt, new"),
             edit("        self.waiting.appendleft(request)",
                  "        request.tokens, request.left = request.asked\n        self.waiting.appendleft(request)")),
        ),
    )  # fmt: skip


class SinkAttention(Reference):
    exercise = "sink_attention"

    def cases(self, rng: Rng, variant: Variant) -> Iterator[Case]:
        def case(name, part, length, window, sinks, heads=2, dim=8, scale=1.5):
            q = rng.randn(heads, dim, scale=scale)
            k, v = rng.randn(heads, length, dim, scale=scale), rng.randn(heads, length, dim)
            return Case(name, {"q": q, "k": k, "v": v, "window": window, "sinks": sinks}, part)

        yield case("everything is kept", "short texts", 7, 20, 4)
        yield case("a first token", "short texts", 1, 3, 2)
        yield case("fewer tokens than sinks", "short texts", 3, 1, 5)
        yield case("the cache is just full", "short texts", 9, 6, 3)
        yield case("one token more", "long texts", 10, 6, 3)
        yield case("a long text", "long texts", rng.int(60, 120), 8, 4)
        yield case("no sinks", "long texts", rng.int(20, 40), 7, 0)
        yield case("one sink, and the newest token", "long texts", rng.int(20, 40), 1, 1)
        yield case("three heads", "long texts", rng.int(30, 50), 10, 2, heads=3, dim=16)

    def expected(self, inputs, variant):
        q, k, v = (inputs[name].double() for name in "qkv")
        length, window, sinks = k.shape[1], inputs["window"], inputs["sinks"]
        seen = [t for t in range(length) if t < sinks or t >= length - window]
        places = torch.arange(len(seen))
        keys, query = turned(k[:, seen], places), turned(q[:, None], places[-1:])
        scores = (query @ keys.transpose(1, 2)) / math.sqrt(q.shape[1])
        return (scores.softmax(-1) @ v[:, seen])[:, 0]

    def verify(self, inputs, outputs, expected, variant):
        reach = inputs["q"].norm(dim=-1).max() * inputs["k"].norm(dim=-1).max() / math.sqrt(inputs["q"].shape[1])
        angle = len(inputs["k"][0]) * EPS  # what a rotation by so many radians is off in float32
        error = (4 * EPS + angle) * (1 + reach.item()) * inputs["v"].abs().max().item()
        return compare(outputs, expected, expected + error, torch.float32, path="your output")

    _KEPT = "[*range(min(sinks, length)), *range(max(sinks, length - window), length)]"
    mistakes = (
        Mistake(
            "text positions",
            "Your positions are those in the text: a token's position is its place in the cache.",
            edit("places = torch.arange(len(kept), device=q.device)",
                 "places = torch.tensor(kept, device=q.device)"),
        ),
        Mistake(
            "the query at its text position",
            "The query stands at its position in the text: it is the last one in the cache.",
            edit("rotate(q[:, None], places[-1:])", "rotate(q[:, None], places[-1:] * 0 + length - 1)"),
        ),
        Mistake(
            "the query behind the cache",
            "The query stands one place too far: its own key is in the cache, at the last place.",
            edit("rotate(q[:, None], places[-1:])", "rotate(q[:, None], places[-1:] + 1)"),
        ),
        Mistake(
            "without sinks",
            "The first tokens are gone: they take the weight that no other token wants, and have to stay.",
            edit(_KEPT, "list(range(max(0, length - window), length))"),
        ),
        Mistake(
            "sinks inside the window",
            "The sinks count as part of your window: it is the newest `window` tokens, and the sinks come on top.",
            edit("length - window)", "length - window + sinks)"),
        ),
        Mistake(
            "window one short",
            "Your window is one token short: it counts the newest token too, which is in the cache.",
            edit("length - window)", "length - window + 1)"),
        ),
        Mistake("window one long", "Your window is one token too long.",
                edit("length - window)", "length - window - 1)")),
        Mistake(
            "twice in the cache",
            "While the text is short, first tokens are in your cache twice: as sinks and in the window.",
            edit("range(max(sinks, length - window), length)", "range(max(0, length - window), length)"),
        ),
        Mistake("values of the wrong tokens", "Keys and values are of different tokens.",
                edit("v[:, kept]", "v[:, -len(kept):]")),
        Mistake("not scaled", "Your scores are not scaled by 1/sqrt(d), d the head dimension.",
                edit(" / math.sqrt(q.shape[1])", "")),
    )  # fmt: skip


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of [..., length, dim] by complex numbers: the two halves of a head are its parts."""
    half = x.shape[-1] // 2
    angles = positions.to(x.dtype)[:, None] * 10_000.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], dim=-1)


class _PagedSequence:
    """A right `PagedSequence`, for the exercise that builds on it."""

    def __init__(self, manager, k_pages: Tensor, v_pages: Tensor) -> None:
        self.manager, self.k_pages, self.v_pages = manager, k_pages, v_pages
        self.page_size = k_pages.shape[2]
        self.pages: list[int] = []
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        positions = range(self.length, self.length + len(k))
        self.pages += self.manager.allocate(up(positions.stop, self.page_size) - len(self.pages))
        for row, position in enumerate(positions):
            page, place = self.pages[position // self.page_size], position % self.page_size
            self.k_pages[page, :, place], self.v_pages[page, :, place] = k[row], v[row]
        self.length = positions.stop

    def free(self) -> None:
        while self.pages:
            self.manager.release(self.pages.pop())
        self.length = 0


EARLIER = {"PagedSequence": _PagedSequence}
REFERENCES = {
    cls.exercise: cls()
    for cls in (
        CacheBytes,
        BlockManagerReference,
        PagedSequenceReference,
        SharedSequenceReference,
        PagedAttention,
        PrefixCacheReference,
        SchedulerReference,
        SinkAttention,
    )
}
