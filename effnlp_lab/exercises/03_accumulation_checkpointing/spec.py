"""Lab 03: the memory of a training step, accumulation, checkpointing, and mixed precision."""

from effnlp_lab.exercises.spec import Exercise, Guess, Lab, Prediction, Written

LIBRARIES = ("effnlp_lab.training", "accelerate", "transformers")
CHECKPOINTS = (*LIBRARIES, "torch.utils.checkpoint")

LAB = Lab(
    name="03_accumulation_checkpointing",
    title="Accumulation and checkpointing",
    hours=4.5,
    room="training",
    summary=(
        "What a training step keeps in memory, and how to keep less: micro-batches, recomputation, half precision "
        "and smaller optimizer state, each measured by itself."
    ),
    prerequisites="PyTorch modules, optimizers and autograd; cross-entropy of a language model",
    exercises=(
        Exercise(
            "training_memory",
            points=1.5,
            minutes=25,
            difficulty=2,
            title="The memory of a training step",
            signature=(
                "(shape: dict[str, int], batch: int, length: int, size: int, per_token: int = 20, per_pair: int = 3)"
                " -> dict[str, int]"
            ),
            parts={"weights and states": 0.5, "hidden states": 0.5},
            seconds=5.0,
            forbidden=LIBRARIES,
            variants={"gradients": ("as the weights", "float32")},
            variant_text={
                "as the weights": "Your gradients: as wide as the weights, `size` bytes each.",
                "float32": "Your gradients: always kept in float32, 4 bytes each, whatever `size` is.",
            },
        ),
        Exercise(
            "largest_batch",
            points=1.0,
            minutes=25,
            difficulty=2,
            title="The largest batch that fits",
            signature="(memory: Callable[[int], int], capacity: int) -> int",
            parts={"largest": 0.7, "few calls": 0.3},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "accumulate",
            points=2.0,
            minutes=45,
            difficulty=3,
            title="Accumulate gradients",
            signature="(model: nn.Module, micro_batches: list[tuple[Tensor, Tensor]]) -> float",
            parts={"equal lengths": 0.3, "unequal lengths": 0.45, "memory": 0.25},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "checkpoint",
            points=2.5,
            minutes=70,
            difficulty=4,
            title="Checkpointing as an autograd function",
            signature="(function: Callable, *inputs: Any) -> Any",
            parts={"recomputation": 0.4, "random state": 0.25, "inputs and outputs": 0.35},
            seconds=5.0,
            forbidden=CHECKPOINTS,
        ),
        Exercise(
            "mixed_loss",
            points=1.0,
            minutes=25,
            difficulty=2,
            title="Half precision, where it is safe",
            signature=(
                '(x: Half[Tensor, "token dim"], gain: Float32[Tensor, "dim"],'
                ' weight: Float32[Tensor, "vocabulary dim"], targets: Int64[Tensor, "token"]) -> Float32[Tensor, ""]'
            ),
            parts={"fast product": 0.4, "safe sums": 0.6},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "scaled_step",
            points=2.0,
            minutes=45,
            difficulty=3,
            title="A step with a scaled loss",
            signature="(scaler: Scaler, optimizer: torch.optim.Optimizer, max_norm: float) -> bool",
            parts={"unscale and clip": 0.4, "overflow": 0.3, "scale": 0.3},
            seconds=5.0,
            forbidden=(*LIBRARIES, "torch.amp.GradScaler", "torch.cuda.amp"),
            variants={"growth_interval": ("3", "4", "5", "6")},
            variant_text={
                n: f"Your growth interval: the scale doubles after {n} good steps in a row." for n in "3456"
            },
        ),
        Exercise(
            "checkpoint_segments",
            points=0.0,
            minutes=30,
            difficulty=3,
            title="Segments of sqrt(L) layers",
            signature="(layers: list[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor",
            kind="stretch",
            parts={"segments": 0.6, "remainders": 0.4},
            seconds=5.0,
            forbidden=CHECKPOINTS,
            variants={"remainder": ("first", "last")},
            variant_text={
                "first": "Your remainder: the longer segments come FIRST.",
                "last": "Your remainder: the longer segments come LAST.",
            },
        ),
        Exercise(
            "factored_update",
            points=0.0,
            minutes=30,
            difficulty=3,
            title="Adafactor's factored second moment",
            signature=(
                '(gradient: Float[Tensor, "*stack rows columns"], row: Float[Tensor, "*stack rows"],'
                ' column: Float[Tensor, "*stack columns"], decay: float) -> tuple[Tensor, Tensor, Tensor]'
            ),
            kind="stretch",
            parts={"matrix": 0.6, "stacks": 0.4},
            seconds=5.0,
            forbidden=(*LIBRARIES, "torch.optim.Adafactor"),
        ),
    ),
    predictions=(
        Prediction("doubled_batch", (Guess("my_factor_from_4_to_8", 1.6, 1.9),), reach=1.3),
        Prediction("cost_of_savings", (Guess("my_cost_of_checkpointing", 1.2, 1.6, full=(1.05, 1.2)),), reach=2.0),
    ),
    written=(Written("first_savings"),),
)
