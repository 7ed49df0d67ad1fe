"""Streaming data sets: token shards on disk, read lazily, in an order that any number of processes share.

| file | what it holds |
|---|---|
| shards.py | the format on disk, and memory-mapped reading |
| shard_writer.py | writing it, all at once or not at all |
| views.py | shards as items with random access: windows of tokens, documents |
| order.py | the order of an epoch as a pure function of (seed, epoch), and its split among ranks |
| batch_stream.py | the batches of one rank, made by any number of workers |
| stream.py | the loader that runs them epoch after epoch and can resume |
| shuffle_buffer.py | shuffling what has no random access, exactly resumable |
| batching.py | padding to the batch, uniform-length batching, padding waste |
| packing.py | documents packed into rows of fixed length that do not see one another |
| prefetch.py | batches made ahead in a thread and copied to the GPU on a stream of their own |
| sources.py | Parquet, JSON lines, text, and Hugging Face `datasets`, row by row |

From text to batches:

    with ShardWriter("shards", vocab_size=4096) as writer:
        for row in open_source("texts.jsonl", column="text"):
            writer.add(tokenizer.encode(row))
    loader = StreamLoader(Windows(Shards("shards"), length=1024), batch_size=8, seed=1, num_workers=2)
    for batch in Prefetcher(loader, "cuda"):
        ...

`loader.state_dict()` (with a prefetcher: the prefetcher's) is small and goes into JSON; `load_state_dict` continues the
stream exactly, with any number of ranks and workers. Names are loaded on first use.
"""

from effnlp_lab.lazy import lazily as _lazily

_HOMES = {
    "BatchStream": "batch_stream",
    "Documents": "views",
    "HubSource": "sources",
    "IGNORED": "batching",
    "JsonLinesSource": "sources",
    "LengthOrder": "order",
    "Order": "order",
    "PackedBatch": "packing",
    "PackedDocuments": "packing",
    "ParquetSource": "sources",
    "Prefetcher": "prefetch",
    "ShardWriter": "shard_writer",
    "Shards": "shards",
    "ShuffleBuffer": "shuffle_buffer",
    "Split": "order",
    "StreamLoader": "stream",
    "TextSource": "sources",
    "Waste": "batching",
    "Windows": "views",
    "batches_of": "batching",
    "best_fit": "packing",
    "load_state": "stream",
    "mix64": "order",
    "next_fit": "packing",
    "open_source": "sources",
    "pack": "packing",
    "pad_batch": "batching",
    "padding_waste": "batching",
    "save_state": "stream",
    "write_shards": "shard_writer",
}
__all__ = sorted(_HOMES)
__getattr__ = _lazily(__name__, _HOMES)
