"""Lab 06: standard attention and its traffic, softmax in one pass, tiles, the kernel, and the backward pass."""

from effnlp_lab.exercises.spec import Exercise, Guess, Lab, Prediction, Written

FUSED = (
    "torch.nn.functional.scaled_dot_product_attention",
    "torch.nn.functional.multi_head_attention_forward",
    "torch.nn.MultiheadAttention",
    "torch.nn.attention.flex_attention",
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product",
    "aten::_flash_attention",
    "aten::_efficient_attention",
    "flash_attn",
    "xformers",
    "effnlp_lab.attention",
)
SOFTMAX = (
    "torch.softmax",
    "torch.log_softmax",
    "torch.logsumexp",
    "torch.Tensor.softmax",
    "torch.Tensor.log_softmax",
    "torch.Tensor.logsumexp",
    "torch.nn.Softmax",
    "torch.nn.functional.softmax",
    "torch.nn.functional.log_softmax",
    "torch.special.softmax",
    "torch.special.log_softmax",
    "torch.special.logsumexp",
    "aten::softmax",
    "aten::_softmax",
    "aten::_safe_softmax",
    "aten::_log_softmax",
    "aten::logsumexp",
)
KERNEL_PARTS = {"whole tiles": 0.3, "ragged edges": 0.25, "causal": 0.25, "heads and strides": 0.2}
BACKWARD_PARTS = {"gradients": 0.5, "ragged edges": 0.25, "causal": 0.25}
FORWARD_ARGUMENTS = (
    '(q: Float[Tensor, "heads query dim"], k: Float[Tensor, "kv_heads key dim"], v: Float[Tensor, "kv_heads key'
    ' dim"], out: Float[Tensor, "heads query dim"], lse: Float32[Tensor, "heads query"], causal: bool, block_q: int,'
    " block_k: int) -> None"
)
BACKWARD_ARGUMENTS = (
    '(q: Float[Tensor, "heads query dim"], k: Float[Tensor, "heads key dim"], v: Float[Tensor, "heads key dim"],'
    ' d_out: Float[Tensor, "heads query dim"], lse: Float32[Tensor, "heads query"],'
    ' delta: Float32[Tensor, "heads query"], dq: Float32[Tensor, "heads query dim"],'
    ' dk: Float[Tensor, "heads key dim"], dv: Float[Tensor, "heads key dim"],'
    " causal: bool, block_q: int, block_k: int) -> None"
)

LAB = Lab(
    name="06_flash_attention",
    title="Flash attention",
    hours=5.0,
    room="attention",
    summary=(
        "Exact attention without the score matrix: count the traffic, take softmax in one pass, work in tiles, "
        "write the kernel and the backward pass."
    ),
    prerequisites="PyTorch tensors and autograd, softmax attention; lab 00's first kernels for the Triton exercise",
    exercises=(
        Exercise(
            "counted_attention",
            points=1.5,
            minutes=25,
            difficulty=2,
            title="Standard attention and its bytes",
            signature=(
                '(q: Float[Tensor, "heads query dim"], k: Float[Tensor, "heads key dim"],'
                ' v: Float[Tensor, "heads key dim"], causal: bool) -> tuple[Float[Tensor, "heads query dim"], int]'
            ),
            parts={"attention": 0.4, "causal": 0.3, "bytes": 0.3},
            seconds=5.0,
            forbidden=FUSED,
            variants={"scores": ("as the inputs", "float32")},
            variant_text={
                "as the inputs": "Your count: scores and weights cross memory in the dtype of the inputs.",
                "float32": (
                    "Your count: scores and weights cross memory in float32, 4 bytes each, whatever the inputs are."
                ),
            },
        ),
        Exercise(
            "online_softmax",
            points=1.5,
            minutes=40,
            difficulty=3,
            title="Softmax in one pass",
            signature=(
                '(blocks: Iterator[tuple[Float[Tensor, "query some_keys"], Float[Tensor, "some_keys dim"]]])'
                ' -> tuple[Float[Tensor, "query dim"], Float[Tensor, "query"]]'
            ),
            parts={"one pass": 0.5, "large scores": 0.25, "masked scores": 0.25},
            seconds=5.0,
            forbidden=FUSED + SOFTMAX,
        ),
        Exercise(
            "merge_partials",
            points=1.0,
            minutes=20,
            difficulty=2,
            title="Merge two partial softmaxes",
            signature=(
                '(out_a: Float[Tensor, "heads query dim"], lse_a: Float[Tensor, "heads query"],'
                ' out_b: Float[Tensor, "heads query dim"], lse_b: Float[Tensor, "heads query"])'
                ' -> tuple[Float[Tensor, "heads query dim"], Float[Tensor, "heads query"]]'
            ),
            parts={"merge": 0.5, "large scores": 0.25, "empty halves": 0.25},
            seconds=5.0,
            forbidden=FUSED + SOFTMAX,
        ),
        Exercise(
            "tiled_forward",
            points=2.0,
            minutes=50,
            difficulty=3,
            title="The forward pass in tiles",
            signature=(
                '(q: Float[Tensor, "heads query dim"], k: Float[Tensor, "heads key dim"],'
                ' v: Float[Tensor, "heads key dim"], causal: bool, block_q: int, block_k: int)'
                ' -> tuple[Float[Tensor, "heads query dim"], Float32[Tensor, "heads query"]]'
            ),
            parts={"tiles": 0.45, "causal": 0.3, "memory": 0.25},
            seconds=10.0,
            forbidden=FUSED,
            variants={"lse": ("base e", "base 2")},
            variant_text={
                "base e": "Your log-sum-exp: in base e, ln of the sum of e^s over the keys.",
                "base 2": (
                    "Your log-sum-exp: in base 2, log2 of the sum of e^s over the keys (divide the natural "
                    "logarithm by ln 2)."
                ),
            },
        ),
        Exercise(
            "flash_kernel",
            points=2.0,
            minutes=70,
            difficulty=4,
            title="The same as a Triton kernel",
            signature=FORWARD_ARGUMENTS,
            parts=KERNEL_PARTS,
            seconds=20.0,
            forbidden=FUSED,
            needs_triton=True,
        ),
        Exercise(
            "flash_kernel_twin",
            points=2.0,
            minutes=60,
            difficulty=4,
            title="The kernel's PyTorch twin",
            signature=FORWARD_ARGUMENTS,
            parts=KERNEL_PARTS,
            seconds=20.0,
            forbidden=FUSED,
            twin_of="flash_kernel",
        ),
        Exercise(
            "flash_backward",
            points=2.0,
            minutes=60,
            difficulty=4,
            title="The backward pass by recomputation",
            signature=(
                '(q: Float[Tensor, "heads query dim"], k: Float[Tensor, "heads key dim"],'
                ' v: Float[Tensor, "heads key dim"], out: Float[Tensor, "heads query dim"],'
                ' lse: Float32[Tensor, "heads query"], d_out: Float[Tensor, "heads query dim"],'
                " causal: bool, block_q: int, block_k: int)"
                ' -> tuple[Float[Tensor, "heads query dim"], Float[Tensor, "heads key dim"],'
                ' Float[Tensor, "heads key dim"]]'
            ),
            parts={"gradients": 0.5, "causal": 0.25, "memory": 0.25},
            seconds=10.0,
            forbidden=FUSED,
        ),
        Exercise(
            "tile_plan",
            points=0.0,
            minutes=20,
            difficulty=2,
            title="Skip what the causal mask hides",
            kind="stretch",
            signature="(queries: int, keys: int, block_q: int, block_k: int) -> list[tuple[int, int]]",
            parts={"square": 0.5, "other shapes": 0.5},
            seconds=5.0,
        ),
        Exercise(
            "window_attention",
            points=0.0,
            minutes=35,
            difficulty=3,
            title="A sliding window",
            kind="stretch",
            signature=(
                '(q: Float[Tensor, "heads query dim"], k: Float[Tensor, "heads key dim"],'
                ' v: Float[Tensor, "heads key dim"], window: int, block: int) -> Float[Tensor, "heads query dim"]'
            ),
            parts={"window": 0.6, "cost": 0.4},
            seconds=10.0,
            forbidden=FUSED,
        ),
        Exercise(
            "chunked_attention",
            points=0.0,
            minutes=30,
            difficulty=3,
            title="Memory-efficient attention by checkpoints",
            kind="stretch",
            signature=(
                '(q: Float[Tensor, "heads query dim"], k: Float[Tensor, "heads key dim"],'
                ' v: Float[Tensor, "heads key dim"], causal: bool, chunk: int) -> Float[Tensor, "heads query dim"]'
            ),
            parts={"gradients": 0.5, "memory": 0.5},
            seconds=20.0,
            forbidden=FUSED,
        ),
        Exercise(
            "backward_kernel",
            points=0.0,
            minutes=75,
            difficulty=5,
            title="The backward pass as a Triton kernel",
            kind="stretch",
            signature=BACKWARD_ARGUMENTS,
            parts=BACKWARD_PARTS,
            seconds=20.0,
            forbidden=FUSED,
            needs_triton=True,
        ),
        Exercise(
            "backward_kernel_twin",
            points=0.0,
            minutes=60,
            difficulty=5,
            title="The backward kernel's PyTorch twin",
            kind="stretch",
            signature=BACKWARD_ARGUMENTS,
            parts=BACKWARD_PARTS,
            seconds=20.0,
            forbidden=FUSED,
            twin_of="backward_kernel",
        ),
    ),
    predictions=(
        Prediction("wasted_traffic", (Guess("my_times_too_many", 64.0, 66.0),), reach=6.0),
        Prediction(
            "memory_growth_by_length",
            (Guess('my_growth["standard"]', 3.8, 4.1), Guess('my_growth["tiled"]', 1.7, 2.1)),
            reach=2.0,
        ),
    ),
    written=(Written("more_operations"),),
)
