"""Reading tokens beside `datasets` streaming and a map-style DataLoader, memory while much is read, and padding waste.

All contestants read the same windows of 1,024 ids from disk (warm in the file cache, as after a first epoch),
shuffled, as int64 batches in this process; what each delivered is verified to be every window once. `datasets`
streams Parquet files of the windows and shuffles in a buffer (its fixed pause at the end of a stream is turned off);
the map-style data set cuts them from one memory-mapped file.

Memory: `EFFNLP_STREAMING_MB` names the sizes to read ("10,100,1000,10000"; by default "10,100"). One file of 10 MB is
read under many names (hard links): each has a map of its own, and the disk holds it once.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from effnlp_lab.device import Device
from effnlp_lab.notebook.bench import Comparison, compare
from effnlp_lab.streaming import (
    Documents,
    LengthOrder,
    Order,
    PackedDocuments,
    Prefetcher,
    Shards,
    StreamLoader,
    Windows,
    batches_of,
    best_fit,
    next_fit,
    pad_batch,
    padding_waste,
    write_shards,
)

LENGTH = 1024
BATCH = 8
VOCABULARY = 50_257
TEXTS = 5000
BATCH_SIZES = (1, 8, 64, 256)
SIZES_MB = "10,100"


def run(device: Device, folder: Path) -> list[Comparison]:
    """Every part (a sixteenth of the tokens where EFFNLP_FAST asks for small sizes)."""
    small = os.environ.get("EFFNLP_FAST", "").strip().lower() in ("1", "true")
    cpu = replace(device, kind="cpu")  # where all but the last part runs: timed by the clock
    with tempfile.TemporaryDirectory() as scratch:
        data = Data(Path(scratch), windows=512 if small else 8192)
        made = [_reading(data, workers, cpu) for workers in (0, 2)]
        made += [_padding(Path(scratch), cpu), _memory(Path(scratch), small)]
        if device.kind == "cuda":
            made.append(_feeding(data, device))
    return made


class Data:
    """The same random ids as shards, as one file of uint16, and as four Parquet files of windows."""

    def __init__(self, folder: Path, windows: int) -> None:
        import pyarrow
        import pyarrow.parquet

        self.ids = np.random.default_rng(0).integers(0, VOCABULARY, windows * LENGTH).astype(np.uint16)
        self.raw, self.parquet = folder / "ids.bin", [str(folder / f"{part}.parquet") for part in range(4)]
        self.shards = write_shards(folder / "shards", np.split(self.ids, windows // 2), VOCABULARY)
        self.ids.tofile(self.raw)
        for path, part in zip(self.parquet, np.split(self.ids, len(self.parquet)), strict=True):
            column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(part), LENGTH)
            pyarrow.parquet.write_table(pyarrow.table({"ids": column}), path, row_group_size=1000)


class MapStyle(Dataset):
    """What many write: windows cut from one memory-mapped file, a tensor an item."""

    def __init__(self, path: Path) -> None:
        self.ids = np.memmap(path, np.uint16, "r")

    def __len__(self) -> int:
        return len(self.ids) // LENGTH

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self.ids[number * LENGTH : (number + 1) * LENGTH].astype(np.int64))


def readers(data: Data, workers: int) -> dict[str, Callable[[], Iterable[torch.Tensor]]]:
    """Each gives the batches of one shuffled epoch, int64 [BATCH, LENGTH]."""
    import datasets

    datasets.disable_progress_bars()
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # it ends a shuffled stream with a pause of 5 seconds
    windows = Windows(Shards(data.shards.folder), LENGTH)
    options = {"num_workers": workers}

    # Loaded before the clock starts: without a network, looking for the hub takes seconds.
    rows = datasets.load_dataset("parquet", data_files=data.parquet, split="train", streaming=True)
    rows = rows.shuffle(seed=0, buffer_size=1000)

    def in_torch():
        for batch in DataLoader(rows.with_format("torch"), batch_size=BATCH, **options):
            yield batch["ids"].long()

    def in_arrow():
        for table in rows.with_format("arrow").iter(BATCH):
            ids = table["ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            yield torch.from_numpy(ids.astype(np.int64)).view(-1, LENGTH)

    found = {
        "StreamLoader": lambda: StreamLoader(windows, BATCH, **options),
        "map-style DataLoader": lambda: DataLoader(MapStyle(data.raw), BATCH, shuffle=True, **options),
        "datasets streaming": in_torch,
    }
    if not workers:
        found["datasets streaming, Arrow batches"] = in_arrow
    return found


def _reading(data: Data, workers: int, device: Device) -> Comparison:
    contestants = readers(data, workers)
    result = compare(
        f"Read {len(data.ids) / 1e6:.1f}M tokens, batches of {BATCH} x {LENGTH}, {workers or 'no'} worker processes",
        {name: partial(_read, make) for name, make in contestants.items()},
        ours="StreamLoader", peer="map-style DataLoader", repeats=3, warmup=1, device=device,
    )  # fmt: skip
    expected = window_sums(torch.from_numpy(data.ids.astype(np.int64)).view(-1, LENGTH))
    for name, make in contestants.items():
        found = torch.cat([window_sums(batch) for batch in make()])
        require(torch.equal(found.sort().values, expected.sort().values), f"{name} does not deliver every window once")
        require(not torch.equal(found, expected), f"{name} does not shuffle")
    result.checks.append("every contestant delivers every window once, and shuffled")
    rates = {name: len(data.ids) / result.median(name) / 1e6 for name in contestants}
    result.notes.append("Million tokens a second: " + ", ".join(f"{n} {rate:.1f}" for n, rate in rates.items()) + ".")
    if workers:
        result.notes.append("Starting and ending the worker processes is part of every time.")
    return result


def _padding(folder: Path, device: Device) -> Comparison:
    random = np.random.default_rng(1)
    ragged = np.clip(random.lognormal(4.6, 0.9, TEXTS), 1, 1024).astype(np.int64)
    uniform = random.integers(95, 106, TEXTS)
    view = Documents(write_shards(folder / "ragged", (random.integers(0, 9, n) for n in ragged), 10))
    texts = [torch.from_numpy(view[number].astype(np.int64)) for number in range(TEXTS)]

    def ours():
        return [b["attention_mask"].sum() for b in StreamLoader(view, 64, collate=partial(pad_batch, pad_id=0))]

    def torchs():
        def collate(rows):
            ids = pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

        return [b["attention_mask"].sum() for b in DataLoader(texts, 64, shuffle=True, collate_fn=collate)]

    result = compare(
        f"Pad {TEXTS:,} ragged texts ({ragged.sum():,} tokens) in batches of 64",
        {"StreamLoader from shards, pad_batch": ours, "DataLoader from memory, pad_sequence": torchs},
        ours="StreamLoader from shards, pad_batch", peer="DataLoader from memory, pad_sequence",
        repeats=3, warmup=1, device=device,
    )  # fmt: skip
    for made in (ours(), torchs()):
        require(int(sum(made)) == ragged.sum(), "the batches do not hold every token")
    result.checks.append("both deliver every token")
    result.notes += [ladder(name, lengths) for name, lengths in (("uniform", uniform), ("ragged", ragged))]
    shards = Shards(folder / "ragged")
    packed = {
        "from disk": PackedDocuments(shards, 2048).waste.share,
        **{fit.__name__: 1 - ragged.sum() / (len(fit(ragged, 2048)) * 2048) for fit in (next_fit, best_fit)},
    }
    result.notes.append(
        "Padding of the ragged texts packed into rows of 2,048: "
        + ", ".join(f"{name} {share:.2%}" for name, share in packed.items())
        + "."
    )
    return result


def ladder(name: str, lengths: np.ndarray) -> str:
    """The share of padding by batch size: to the longest text of all, to the batch's, and batched by length."""
    steps = []
    for size in BATCH_SIZES:
        order = Order(len(lengths), 0)
        by_length = LengthOrder(order, lengths, size, pool=50)
        orders = {"shuffled": order, "by length": by_length}
        shares = [
            padding_waste(lengths, batches_of(o.at(np.arange(len(lengths))), size), width).share
            for o, width in ((order, int(lengths.max())), *((o, None) for o in orders.values()))
        ]
        steps.append(f"batch {size}: " + " / ".join(f"{share:.1%}" for share in shares))
    return (
        f"Padding of the {name} texts ({lengths.min()} to {lengths.max()} tokens), to the longest of all / to the "
        f"batch / by length in pools of 50 batches: {'; '.join(steps)}."
    )


def _memory(folder: Path, small: bool) -> Comparison:
    """Seconds for each 10 MB, and the anonymous memory of a process that reads nothing else."""
    sizes = [int(word) for word in os.environ.get("EFFNLP_STREAMING_MB", SIZES_MB).split(",")]
    sizes = sizes[:2] if small else sizes
    ids = np.random.default_rng(2).integers(0, VOCABULARY, 5_000_000).astype(np.uint16)
    base = write_shards(folder / "base", np.split(ids, 5000), VOCABULARY).folder
    seconds, notes = {}, ["The same 10 MB under many names: maps and reads are of the size named."]
    for size in sizes:
        copies = max(1, size // 10)
        many = repeated(base, folder / f"{size}MB", copies)
        found = json.loads(_in_a_process_of_its_own(many))
        require(found["tokens"] == copies * len(ids) // LENGTH * LENGTH, "not all was read")
        seconds[f"{size:,} MB"] = [found["seconds"] / copies]
        notes.append(
            f"{size:,} MB: anonymous memory {found['before']:.1f} MB before, at most {found['most']:.1f} MB while "
            f"reading ({found['most'] - found['before']:+.1f}); mapped pages up to {found['mapped']:,.0f} MB, "
            f"{found['tokens'] / found['seconds'] / 1e6:.0f}M tokens a second."
        )
    names = list(seconds)
    return Comparison(
        "Read shards of growing size, shuffled: seconds for each 10 MB", seconds, ours=names[-1], peer=names[0],
        checks=["every size was read to its end"], notes=notes,
    )  # fmt: skip


def repeated(base: Path, folder: Path, copies: int) -> Path:
    """A folder of shards in which the one shard of `base` stands `copies` times, as hard links."""
    index = json.loads((base / "index.json").read_text())
    (shard,) = index["shards"]
    folder.mkdir()
    for number in range(copies):
        for kind in ("tokens", "ends"):
            os.link(base / f"{shard['name']}.{kind}", folder / f"{number:05d}.{kind}")
    totals = {key: index[key] * copies for key in ("tokens", "documents")}
    shards = [{**shard, "name": f"{number:05d}"} for number in range(copies)]
    (folder / "index.json").write_text(json.dumps({**index, **totals, "shards": shards}))
    return folder


def measure(folder: Path) -> dict[str, float]:
    """Read one shuffled epoch; megabytes of memory before and at most, tokens and seconds."""
    loader = StreamLoader(Windows(Shards(folder), LENGTH), 32, seed=1)
    stream = iter(loader)
    first = next(stream)
    before, most, mapped, tokens = resident("RssAnon"), 0.0, 0.0, first.numel()
    start = time.perf_counter()
    for number, batch in enumerate(stream):
        tokens += batch.numel()
        if number % 100 == 0:
            most, mapped = max(most, resident("RssAnon")), max(mapped, resident("RssFile"))
    seconds = time.perf_counter() - start
    most, mapped = max(most, resident("RssAnon")), max(mapped, resident("RssFile"))
    return {"before": before, "most": most, "mapped": mapped, "tokens": tokens, "seconds": seconds}


def resident(kind: str) -> float:
    """Megabytes of this process by kind: RssAnon is its own, RssFile are pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status names no {kind}: this figure needs Linux.")


def _in_a_process_of_its_own(folder: Path) -> str:
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command, environment = [sys.executable, __file__, str(folder)], {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def _feeding(data: Data, device: Device) -> Comparison:
    """Batches of 32 x 1,024 to a GPU that works on each for about as long as a small model would."""
    windows = Windows(Shards(data.shards.folder), LENGTH)
    left = torch.randn(4096, 4096, device=device.torch, dtype=device.dtype)
    found: dict[str, torch.Tensor] = {}

    def consume(name, make):
        total = torch.zeros((), dtype=torch.int64, device=device.torch)
        for batch in make():
            total += batch.to(device.torch, non_blocking=True).sum()
            for _ in range(8):
                left @ left
        found[name] = total

    def baseline(**options):
        return DataLoader(MapStyle(data.raw), 32, shuffle=True, **options)

    contestants = {
        "Prefetcher": lambda: Prefetcher(StreamLoader(windows, 32), device.torch),
        "StreamLoader alone": lambda: StreamLoader(windows, 32),
        "DataLoader": baseline,
        "DataLoader, 4 workers, pinned": lambda: baseline(num_workers=4, pin_memory=True),
        "no data": lambda: itertools.repeat(torch.zeros(1, dtype=torch.int64, device=device.torch), len(windows) // 32),
    }
    result = compare(
        f"Feed {len(data.ids) / 1e6:.1f}M tokens to a GPU that computes",
        {name: partial(consume, name, make) for name, make in contestants.items()},
        ours="Prefetcher", peer="DataLoader", repeats=5, warmup=1, device=device,
    )  # fmt: skip
    require(len({int(total) for name, total in found.items() if name != "no data"}) == 1, "the sums differ")
    result.checks.append("the ids that arrived have the same sum")
    result.notes.append('"no data" is the compute alone: what is above it was waited for.')
    return result


def window_sums(batch: torch.Tensor) -> torch.Tensor:
    """A number for each window [windows, LENGTH] that tells random windows apart."""
    return (batch * torch.arange(1, batch.shape[1] + 1)).sum(1)


def require(condition: bool, complaint: str) -> None:
    """A benchmark of unequal work is worth nothing: raise when `condition` does not hold."""
    if not condition:
        raise AssertionError(f"No figure: {complaint}.")


def _read(make: Callable[[], Iterable[torch.Tensor]]) -> int:
    batches = make()
    tokens = sum(batch.numel() for batch in batches)
    if isinstance(batches, StreamLoader):
        batches.close()
    return tokens


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
