"""Speculative decoding: a cheap drafter guesses several tokens, the target checks them in one pass, and nothing of the
target's distribution changes.

| file | what it holds |
|---|---|
| acceptance.py | accept or reject, the adjusted distribution, one step's outcome (Leviathan et al. 2023, algorithm 1) |
| analysis.py | expected tokens a step, speed-up, best gamma, the cost ratio that a speed-up implies |
| sampling.py | temperature, top-k, top-p as distributions; a token from a uniform |
| cached.py | a model with its cache behind a small interface; rollback on `transformers`' caches, also ragged |
| static_cached.py | the same on a cache of fixed size, which CUDA graphs can replay |
| paged_cached.py | the same on pages of the paged room |
| drafters.py | drafts from a model, from the model's own first layers, from n-grams of the text |
| state.py | a batch that is being generated, and what a step does to it, on the device alone |
| decoder.py | the loop: prompts to tokens, with CUDA graphs, uniforms, streaming |
| adaptive.py | gamma from the acceptance so far |
| statistics.py | acceptance rate, tokens a step, time |
| tree.py | several drafts at once as a tree of tokens |
| early_exit.py | leaving the network early where it is sure (CALM), and its threshold with a guarantee |

Names are loaded on first use.
"""

from effnlp_lab.lazy import lazily as _lazily

_HOMES = {
    "AdaptiveGamma": "adaptive",
    "CachedModel": "cached",
    "Draft": "drafters",
    "DraftModel": "drafters",
    "DynamicCachedModel": "cached",
    "EarlyExitDecoder": "early_exit",
    "Generation": "decoder",
    "PagedCachedModel": "paged_cached",
    "PromptLookup": "drafters",
    "Sampling": "sampling",
    "SpeculativeDecoder": "decoder",
    "StaticCachedModel": "static_cached",
    "Statistics": "statistics",
    "TokenTree": "tree",
    "TreeDecoder": "tree",
    "Verified": "acceptance",
    "adjusted_distribution": "acceptance",
    "best_gamma": "analysis",
    "calibrate_threshold": "early_exit",
    "early_exit_draft": "drafters",
    "expected_operations": "analysis",
    "expected_tokens": "analysis",
    "implied_cost_ratio": "analysis",
    "sample_from": "sampling",
    "speedup": "analysis",
    "verify_drafts": "acceptance",
    "verify_greedy": "acceptance",
}
__all__ = sorted(_HOMES)
__getattr__ = _lazily(__name__, _HOMES)
