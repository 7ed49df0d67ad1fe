"""Lab 09: soft targets, the distillation loss, a student from layers, a chunked loss, forward and reverse KL."""

from effnlp_lab.exercises.spec import Exercise, Guess, Lab, Prediction, Written

LIBRARIES = ("effnlp_lab.distillation", "effnlp_lab.training", "liger_kernel", "transformers", "trl")

LAB = Lab(
    name="09_distillation",
    title="Distillation",
    hours=4.5,
    room="distillation",
    summary=(
        "A small model learns from a large one's distributions: what the loss is, where the student starts, how the "
        "logits of a large vocabulary are never whole, and what it all costs, teacher included."
    ),
    prerequisites="PyTorch modules and autograd; softmax and cross-entropy; what a decoder's layers are called",
    exercises=(
        Exercise(
            "soft_loss",
            points=1.5,
            minutes=30,
            difficulty=2,
            title="Soft targets and temperature",
            signature=(
                '(student_logits: Float[Tensor, "... vocabulary"], teacher_logits: Float[Tensor, "... vocabulary"],'
                ' temperature: float) -> Float32[Tensor, ""]'
            ),
            parts={"divergence": 0.5, "temperature": 0.25, "range": 0.25},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "distillation_loss",
            points=2.0,
            minutes=45,
            difficulty=3,
            title="The distillation loss",
            signature=(
                '(student_logits: Float32[Tensor, "batch length vocabulary"],'
                ' teacher_logits: Float32[Tensor, "batch length vocabulary"],'
                ' student_hidden: Float32[Tensor, "batch length hidden"],'
                ' teacher_hidden: Float32[Tensor, "batch length hidden"], labels: Int64[Tensor, "batch length"],'
                ' temperature: float, weights: tuple[float, float, float]) -> Float32[Tensor, ""]'
            ),
            parts={"terms": 0.5, "padding": 0.5},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "student_weights",
            points=1.5,
            minutes=30,
            difficulty=2,
            title="A student from alternate layers",
            signature="(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]",
            parts={"layers": 0.6, "names": 0.4},
            seconds=5.0,
            forbidden=LIBRARIES,
            variants={"layers": ("even", "odd")},
            variant_text={
                "even": "Your student keeps the EVEN layers of its teacher: 0, 2, 4, ...",
                "odd": "Your student keeps the ODD layers of its teacher: 1, 3, 5, ...",
            },
            fresh=True,
        ),
        Exercise(
            "chunked_loss",
            points=3.0,
            minutes=75,
            difficulty=4,
            title="A loss that never holds the logits",
            signature=(
                '(student_hidden: Float32[Tensor, "row width"], student_weight: Float32[Tensor, "vocabulary width"],'
                ' teacher_hidden: Float32[Tensor, "row wide"], teacher_weight: Float32[Tensor, "vocabulary wide"],'
                ' labels: Int64[Tensor, "row"], temperature: float, chunk: int)'
                " -> tuple[Tensor, Tensor, Tensor]"
            ),
            parts={"value": 0.3, "gradients": 0.4, "memory": 0.3},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "divergence",
            points=2.0,
            minutes=40,
            difficulty=3,
            title="Forward against reverse KL",
            signature=(
                '(student_logits: Float32[Tensor, "... vocabulary"], teacher_logits: Float32[Tensor, "... vocabulary"],'
                ' kind: str) -> Float32[Tensor, "..."]'
            ),
            parts={"forward and reverse": 0.4, "mixture": 0.35, "never": 0.25},
            seconds=5.0,
            forbidden=LIBRARIES,
            variants={"beta": ("0.25", "0.6", "0.35", "0.7")},
            variant_text={
                "0.25": "Your beta is 0.25: the mixture is a quarter teacher and three quarters student.",
                "0.6": "Your beta is 0.6: the mixture is three fifths teacher and two fifths student.",
                "0.35": "Your beta is 0.35: the mixture is 35% teacher and 65% student.",
                "0.7": "Your beta is 0.7: the mixture is 70% teacher and 30% student.",
            },
        ),
        Exercise(
            "on_policy_step",
            points=0.0,
            minutes=40,
            difficulty=4,
            title="On-policy distillation",
            signature=(
                "(student: Callable[[Tensor], Tensor], teacher: Callable[[Tensor], Tensor],"
                ' prompt: Int64[Tensor, "batch length"], uniforms: Float32[Tensor, "batch new"])'
                " -> tuple[Tensor, Tensor]"
            ),
            kind="stretch",
            parts={"tokens": 0.4, "loss": 0.6},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "width_masks",
            points=0.0,
            minutes=35,
            difficulty=3,
            title="Width pruning masks",
            signature=(
                '(log_alpha: Float32[Tensor, "layer width"], uniforms: Float32[Tensor, "layer width"], target: float,'
                ' linear: Float32[Tensor, "layer"], square: Float32[Tensor, "layer"]) -> tuple[Tensor, Tensor]'
            ),
            kind="stretch",
            parts={"masks": 0.5, "constraint": 0.5},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
    ),
    predictions=(
        Prediction(
            "untrained_half", (Guess("my_loss_of_the_untrained_half", 3.7, 4.7),), reach=2.5, scale="difference"
        ),
        Prediction("cost_of_a_step", (Guess("my_extra_cost_in_percent", 55.0, 61.0),), reach=3.0),
    ),
    written=(Written("worth_it"),),
)
