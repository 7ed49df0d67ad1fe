"""Attention: the standard definition, and flash attention in PyTorch and in Triton.

| file | what it holds |
|---|---|
| standard.py | the definition, with every mask of this room; float64 makes it the reference |
| online_softmax.py | softmax in one pass, and the merge of two partial attentions |
| tiled.py | flash attention in PyTorch, forward and backward: the twin of the kernels |
| chunked.py | memory-efficient attention of Rabe and Staats |
| flash.py | flash attention in Triton, as one autograd function, for equal and for ragged lengths |
| kernels_forward.py, kernels_backward.py, kernels_common.py | its kernels |
| configurations.py | tile shapes per architecture |
| inputs.py | what is accepted, and the sentences for what is not |
| patterns.py | sliding windows with global tokens, dilated windows |
| decoding.py | split-KV decoding |
| linear.py | linear attention |
| integration.py | flash attention inside `transformers` models |

Names are loaded on first use: the PyTorch parts work where Triton is not installed.
"""

from effnlp_lab.lazy import lazily as _lazily

_HOMES = {
    "chunked_attention": "chunked",
    "dilated_window_attention": "patterns",
    "flash_attention": "flash",
    "flash_attention_varlen": "flash",
    "flash_decode": "decoding",
    "linear_attention": "linear",
    "linear_attention_step": "linear",
    "merge_partials": "online_softmax",
    "one_pass_softmax": "online_softmax",
    "register_with_transformers": "integration",
    "sliding_window_attention": "patterns",
    "standard_attention": "standard",
    "standard_attention_bytes": "standard",
    "standard_attention_varlen": "standard",
    "tiled_backward": "tiled",
    "tiled_forward": "tiled",
    "visible": "standard",
}
__all__ = sorted(_HOMES)
__getattr__ = _lazily(__name__, _HOMES)
