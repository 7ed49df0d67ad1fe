"""Lab 04: adapting a frozen model, and keeping what is frozen in four bits."""

from effnlp_lab.exercises.spec import Exercise, Guess, Lab, Prediction, Written

LIBRARIES = ("effnlp_lab.adapters", "effnlp_lab.quantization", "peft", "bitsandbytes", "transformers")
QUANTIZERS = (
    *LIBRARIES,
    "torch.quantize_per_tensor",
    "torch.quantize_per_channel",
    "torch.fake_quantize_per_tensor_affine",
    "torch.fake_quantize_per_channel_affine",
)

LAB = Lab(
    name="04_lora_qlora",
    title="LoRA and QLoRA",
    hours=4.5,
    room="adapters",
    summary=(
        "A model learns a new domain while its weights stay frozen: low-rank updates, adapters and their peers, and a "
        "base in four bits, each measured by itself."
    ),
    prerequisites="PyTorch modules and autograd; what AdamW keeps for each weight (lab 03)",
    exercises=(
        Exercise(
            "LoRALinear",
            points=2.5,
            minutes=60,
            difficulty=3,
            title="A linear layer with a low-rank update",
            signature="(base: nn.Linear, r: int, alpha: float) -> nn.Module",
            parts={"start": 0.3, "forward": 0.3, "merge and disable": 0.4},
            seconds=5.0,
            forbidden=LIBRARIES,
            variants={"divisor": ("r", "sqrt(r)")},
            variant_text={
                "r": "Your scale: alpha / r, as in the paper of LoRA.",
                "sqrt(r)": "Your scale: alpha / sqrt(r), the rank-stabilized one (Kalajdzievski, 2023).",
            },
        ),
        Exercise(
            "inject",
            points=1.75,
            minutes=40,
            difficulty=3,
            title="Adapt layers by name",
            signature="(model: nn.Module, targets: list[str], make: Callable[[nn.Linear], nn.Module]) -> list[str]",
            parts={"names": 0.5, "frozen": 0.25, "refused": 0.25},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "Bottleneck",
            points=1.0,
            minutes=20,
            difficulty=2,
            title="A bottleneck adapter",
            signature="(base: nn.Linear, size: int) -> nn.Module",
            parts={"start": 0.5, "forward": 0.5},
            seconds=5.0,
            forbidden=LIBRARIES,
            variants={"activation": ("relu", "silu")},
            variant_text={
                "relu": "Your activation: relu.",
                "silu": "Your activation: silu.",
            },
        ),
        Exercise(
            "affine_int8",
            points=1.5,
            minutes=40,
            difficulty=3,
            title="Affine int8 with an exact zero",
            signature='(x: Float32[Tensor, "..."], block: int) -> tuple[Tensor, Tensor, Tensor]',
            parts={"one block": 0.6, "blocks": 0.4},
            seconds=5.0,
            forbidden=QUANTIZERS,
            variants={"codes": ("int8", "uint8")},
            variant_text={
                "int8": "Your codes: int8, from -128 to 127.",
                "uint8": "Your codes: uint8, from 0 to 255.",
            },
        ),
        Exercise(
            "NF4",
            points=2.0,
            minutes=50,
            difficulty=3,
            title="4-bit NormalFloat",
            signature=(
                "levels() -> Tensor; quantize(x, levels, block) -> tuple[Tensor, Tensor];"
                " dequantize(codes, absmax, levels, block) -> Tensor"
            ),
            parts={"levels": 0.4, "blocks": 0.6},
            seconds=5.0,
            forbidden=QUANTIZERS,
        ),
        Exercise(
            "double_quantize",
            points=1.25,
            minutes=30,
            difficulty=2,
            title="Double quantization",
            signature='(absmax: Float32[Tensor, "blocks"], group: int) -> tuple[Tensor, Tensor, Tensor]',
            parts={"one group": 0.6, "groups": 0.4},
            seconds=5.0,
            forbidden=QUANTIZERS,
        ),
        Exercise(
            "qlora_linear",
            points=0.0,
            minutes=40,
            difficulty=4,
            title="QLoRA: dequantize again in backward",
            signature=(
                '(x: Float[Tensor, "... in"], a: Float[Tensor, "r in"], b: Float[Tensor, "out r"], scaling: float,'
                ' dequantize: Callable[[], Float[Tensor, "out in"]]) -> Float[Tensor, "... out"]'
            ),
            kind="stretch",
            parts={"forward": 0.3, "backward": 0.4, "memory": 0.3},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "serve_adapters",
            points=0.0,
            minutes=25,
            difficulty=2,
            title="Many adapters, one base",
            signature=(
                '(x: Float[Tensor, "batch length in"], base: Callable[[Tensor], Tensor],'
                " adapters: dict[str, tuple[Tensor, Tensor, float]], names: list[str | None])"
                ' -> Float[Tensor, "batch length out"]'
            ),
            kind="stretch",
            parts={"switching": 0.6, "one product": 0.4},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "in_subspace",
            points=0.0,
            minutes=30,
            difficulty=3,
            title="The intrinsic dimension",
            signature=(
                '(start: dict[str, Tensor], directions: dict[str, Tensor], z: Float[Tensor, "d"]) -> dict[str, Tensor]'
            ),
            kind="stretch",
            parts={"point": 0.6, "gradient": 0.4},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
    ),
    predictions=(
        Prediction(
            "share_of_gain",
            (
                Guess("my_share_of_lora", 75.0, 105.0),
                Guess("my_share_of_prompt_tuning", 40.0, 100.0, full=(12.0, 30.0)),
            ),
            reach=40.0,
            scale="difference",
        ),
        Prediction(
            "level_errors",
            (Guess("my_factor_even_over_nf4", 1.15, 1.3), Guess("my_factor_whole_over_blocks", 12.0, 20.0)),
            reach=4.0,
        ),
    ),
    written=(Written("forty_wards"),),
)
