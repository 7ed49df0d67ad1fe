"""Lab 08: accept or reject, the adjusted distribution, a whole step, rolling the cache back, what it gives."""

from effnlp_lab.exercises.spec import Exercise, Guess, Lab, Prediction, Written

LIBRARIES = ("effnlp_lab.speculative", "transformers")

LAB = Lab(
    name="08_speculative_decoding",
    title="Speculative decoding",
    hours=4.5,
    room="speculative",
    summary=(
        "A small model guesses several tokens, the large one checks them in one pass, and the output keeps the large "
        "one's distribution exactly: why, how the cache follows, and when it pays."
    ),
    prerequisites="PyTorch tensors; softmax attention and its cache of keys and values; elementary probability",
    exercises=(
        Exercise(
            "accept_drafts",
            points=1.5,
            minutes=30,
            difficulty=2,
            title="Accept or reject",
            signature=(
                '(p: Float32[Tensor, "... gamma vocabulary"], q: Float32[Tensor, "... gamma vocabulary"],'
                ' drafts: Int64[Tensor, "... gamma"], uniforms: Float32[Tensor, "... gamma"])'
                ' -> tuple[Int64[Tensor, "..."], Int64[Tensor, "..."]]'
            ),
            parts={"accepted": 0.7, "tested": 0.3},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "adjusted_distribution",
            points=1.0,
            minutes=20,
            difficulty=2,
            title="The adjusted distribution",
            signature=(
                '(p: Float32[Tensor, "... vocabulary"], q: Float32[Tensor, "... vocabulary"])'
                ' -> Float32[Tensor, "... vocabulary"]'
            ),
            parts={"rest": 0.7, "nothing left": 0.3},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "sampling_distribution",
            points=2.0,
            minutes=40,
            difficulty=3,
            title="Temperature, top-k and top-p",
            signature=(
                '(logits: Float[Tensor, "... vocabulary"], temperature: float, top_k: int, top_p: float)'
                ' -> Float32[Tensor, "... vocabulary"]'
            ),
            parts={"temperature": 0.3, "top-k": 0.3, "top-p": 0.4},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "speculative_step",
            points=2.5,
            minutes=60,
            difficulty=4,
            title="One full step",
            signature=(
                "(target: Callable[[Tensor], Tensor], drafter: Callable[[Tensor], Tensor],"
                ' prefix: Int64[Tensor, "length"], gamma: int, uniforms: Float32[Tensor, "2*gamma+1"],'
                " temperature: float, top_k: int, top_p: float)"
                ' -> tuple[Int64[Tensor, "new"], Int64[Tensor, "gamma"], int]'
            ),
            parts={"accepted": 0.3, "rejected": 0.4, "sampling": 0.3},
            seconds=5.0,
            forbidden=LIBRARIES,
            variants={"draw_from": ("first", "last", "even", "odd")},
            variant_text={
                "first": "Your order of adding up: from the FIRST token, 0, upwards.",
                "last": "Your order of adding up: from the LAST token downwards.",
                "even": "Your order of adding up: the EVEN tokens 0, 2, 4, ... first, then 1, 3, 5, ...",
                "odd": "Your order of adding up: the ODD tokens 1, 3, 5, ... first, then 0, 2, 4, ...",
            },
        ),
        Exercise(
            "roll_back",
            points=1.5,
            minutes=40,
            difficulty=3,
            title="Roll the cache back",
            signature=(
                '(cache: list[tuple[Float[Tensor, "batch heads column dim"], Float[Tensor, "batch heads column dim"]]],'
                ' held: Bool[Tensor, "batch column"], accepted: Int64[Tensor, "batch"], gamma: int)'
                ' -> tuple[list[tuple[Tensor, Tensor]], Bool[Tensor, "batch kept"], Int64[Tensor, "batch"]]'
            ),
            parts={"one row": 0.4, "ragged": 0.6},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "SpeedModel",
            points=1.5,
            minutes=35,
            difficulty=2,
            title="What it gives, and the best gamma",
            signature="class: (alpha: float, cost_ratio: float)",
            parts={"tokens": 0.3, "speed-up": 0.4, "inverted": 0.3},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "lookup_draft",
            points=0.0,
            minutes=25,
            difficulty=2,
            title="Draft by n-gram lookup",
            signature='(tokens: Int64[Tensor, "length"], gamma: int, most: int) -> Int64[Tensor, "count"]',
            kind="stretch",
            parts={"found": 0.6, "choice": 0.4},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "early_exit",
            points=0.0,
            minutes=25,
            difficulty=2,
            title="Leave early by confidence",
            signature=(
                '(logits: Float32[Tensor, "layer ... vocabulary"], threshold: float, least: int)'
                ' -> tuple[Int64[Tensor, "..."], Int64[Tensor, "..."]]'
            ),
            kind="stretch",
            parts={"exits": 0.6, "limits": 0.4},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "DraftTree",
            points=0.0,
            minutes=40,
            difficulty=3,
            title="Several drafts as a tree",
            signature="class: (parents: list[int], tokens: list[int])",
            kind="stretch",
            parts={"mask": 0.5, "path": 0.5},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
    ),
    predictions=(
        Prediction(
            "acceptance",
            (Guess("my_acceptance_at_1", 0.54, 0.62, full=(0.59, 0.66)),),
            reach=0.3,
            scale="difference",
        ),
        Prediction("cost_ratio", (Guess("my_cost_ratio", 0.18, 0.35),), reach=3.0),
    ),
    written=(Written("when_it_pays"),),
)
