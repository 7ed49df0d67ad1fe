"""Lab 07: the cache's size, pages with reference counts, block tables, copy on write, attention over pages."""

from effnlp_lab.exercises.spec import Exercise, Guess, Lab, Prediction, Written

LIBRARIES = ("effnlp_lab.paged", "transformers", "vllm", "flash_attn")
FUSED = (
    "torch.nn.functional.scaled_dot_product_attention",
    "torch.nn.functional.multi_head_attention_forward",
    "torch.nn.MultiheadAttention",
    "torch.nn.attention.flex_attention",
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product",
    "aten::_flash_attention",
    "aten::_efficient_attention",
    "effnlp_lab.attention",
)

LAB = Lab(
    name="07_paged_kv_cache",
    title="Paged KV cache",
    hours=4.5,
    room="paged",
    summary=(
        "Serve many requests from one key-value cache: what reserving wastes, pages with reference counts, block "
        "tables, copy on write, attention over scattered pages, and the scheduler on top."
    ),
    prerequisites="softmax attention and its online form (lab 06); Python classes; what a key-value cache is for",
    exercises=(
        Exercise(
            "cache_bytes",
            points=1.0,
            minutes=25,
            difficulty=1,
            title="The cache's size, and what is wasted",
            signature="(model: dict[str, int], lengths: list[int], page_size: int) -> dict[str, int]",
            parts={"one token": 0.4, "allocators": 0.6},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "BlockManager",
            points=2.0,
            minutes=45,
            difficulty=2,
            title="Pages with reference counts",
            signature="(pages: int)",
            parts={"allocate and release": 0.4, "sharing": 0.3, "refusals": 0.3},
            seconds=5.0,
            forbidden=LIBRARIES,
            variants={"order": ("newest", "lowest", "highest", "oldest")},
            variant_text={
                "newest": (
                    "Your order rule: NEWEST first. The page that became free last is handed out first; at the "
                    "beginning the pages come in the order 0, 1, 2, ..."
                ),
                "lowest": (
                    "Your order rule: LOWEST first. Of all free pages the one with the lowest number is handed out "
                    "first, whenever it became free."
                ),
                "highest": (
                    "Your order rule: HIGHEST first. Of all free pages the one with the highest number is handed out "
                    "first, whenever it became free."
                ),
                "oldest": (
                    "Your order rule: OLDEST first. The page that has been free longest is handed out first; at the "
                    "beginning the pages come in the order 0, 1, 2, ..."
                ),
            },
        ),
        Exercise(
            "PagedSequence",
            points=2.0,
            minutes=40,
            difficulty=3,
            title="Append through the block table",
            signature=(
                '(manager: BlockManager, k_pages: Float[Tensor, "page kv_head place dim"],'
                ' v_pages: Float[Tensor, "page kv_head place dim"])'
            ),
            parts={"pages": 0.35, "places": 0.35, "refusals": 0.3},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "SharedSequence",
            points=2.5,
            minutes=55,
            difficulty=4,
            title="Fork, with copy on write",
            signature=(
                '(manager: BlockManager, k_pages: Float[Tensor, "page kv_head place dim"],'
                ' v_pages: Float[Tensor, "page kv_head place dim"])'
            ),
            parts={"fork": 0.3, "copy on write": 0.4, "refusals": 0.3},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "paged_attention",
            points=2.5,
            minutes=55,
            difficulty=4,
            title="Attention over pages, for one query",
            signature=(
                '(q: Float[Tensor, "heads dim"], k_pages: Float[Tensor, "page kv_heads place dim"],'
                ' v_pages: Float[Tensor, "page kv_heads place dim"], block_table: Int64[Tensor, "column"],'
                ' length: int) -> Float[Tensor, "heads dim"]'
            ),
            parts={"attention": 0.35, "ragged": 0.2, "heads": 0.2, "memory": 0.25},
            seconds=5.0,
            forbidden=(*LIBRARIES, *FUSED),
        ),
        Exercise(
            "PrefixCache",
            points=0.0,
            minutes=35,
            difficulty=3,
            title="Share the beginnings of prompts",
            kind="stretch",
            signature="(page_size: int)",
            parts={"match": 0.5, "forget": 0.5},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "Scheduler",
            points=0.0,
            minutes=50,
            difficulty=4,
            title="Admit, run, preempt",
            kind="stretch",
            signature="(pages: int, page_size: int, max_batch: int)",
            parts={"admit and run": 0.5, "preempt": 0.5},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "sink_attention",
            points=0.0,
            minutes=35,
            difficulty=3,
            title="Sinks with a rolling window",
            kind="stretch",
            signature=(
                '(q: Float32[Tensor, "heads dim"], k: Float32[Tensor, "heads length dim"],'
                ' v: Float32[Tensor, "heads length dim"], window: int, sinks: int) -> Float32[Tensor, "heads dim"]'
            ),
            parts={"short texts": 0.4, "long texts": 0.6},
            seconds=5.0,
            forbidden=(*LIBRARIES, *FUSED),
        ),
    ),
    predictions=(
        Prediction("requests_that_fit", (
            Guess("my_requests_with_reservations", 64, 64), Guess("my_requests_with_pages", 300, 380),
        ), reach=2.5),
        Prediction("times_padded", (Guess("my_times_faster_than_padded", 1.0, 2.5, full=(6.0, 12.0)),), reach=3.0),
    ),
    written=(Written("page_size"),),
)
