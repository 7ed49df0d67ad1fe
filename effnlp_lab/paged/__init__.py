"""A paged key-value cache, and an engine that serves many requests from it.

| file | what it holds |
|---|---|
| sizes.py | the cache's size, and what each way of allocating wastes |
| blocks.py | the block manager: reference counts, the prefix cache, eviction |
| sequence.py | the block table of one sequence: append, truncate, fork with copy on write, rolling window |
| cache.py | the tensors that hold the pages |
| gathered.py | paged attention by its definition; float64 makes it the reference |
| attention.py | paged attention, and writing pages, in Triton |
| kernels.py, kernels_layer.py, tiles.py | its kernels, and how they are cut |
| sinks.py | attention sinks with a rolling window |
| model.py, batch.py | a `transformers` model on the cache, and the tokens of one pass through it |
| operations.py, fused.py | what lies between its matrix products, plain and fused |
| sampling.py | sampling parameters, distributions, one uniform number a token |
| requests.py | a request, its output, and the sentences for what cannot be served |
| scheduler.py | admit, read prompts in chunks, decode, preempt |
| runner.py, graphs.py | steps on the device, recorded as CUDA graphs |
| engine.py | the engine: generate, stream, cancel |

A page is what Kwon et al. call a block. Names are loaded on first use: everything but attention.py and fused.py works
where Triton is not installed.
"""

from effnlp_lab.lazy import lazily as _lazily

_HOMES = {
    "Batch": "batch",
    "BlockManager": "blocks",
    "CapturedStep": "graphs",
    "Engine": "engine",
    "EngineStats": "engine",
    "OutOfPages": "blocks",
    "Output": "requests",
    "PagedCache": "cache",
    "PagedModel": "model",
    "Request": "requests",
    "RequestError": "requests",
    "SamplingParams": "sampling",
    "Scheduler": "scheduler",
    "Sequence": "sequence",
    "Waste": "sizes",
    "bytes_per_token_of": "sizes",
    "cache_bytes_per_token": "sizes",
    "cache_position": "sinks",
    "chain_key": "blocks",
    "gathered_attention": "gathered",
    "gathered_attention_varlen": "gathered",
    "kept_tokens": "sinks",
    "paged_attention": "attention",
    "pages_for": "sizes",
    "probabilities": "sampling",
    "rotate_and_write": "attention",
    "sample": "sampling",
    "uniforms": "sampling",
    "waste": "sizes",
    "write_pages": "attention",
}
__all__ = sorted(_HOMES)
__getattr__ = _lazily(__name__, _HOMES)
