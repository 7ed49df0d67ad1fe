"""Lab 00: how a check speaks, shapes, honest timing, peak memory, three first kernels. Nothing here is graded."""

from effnlp_lab.exercises.spec import Exercise, Guess, Lab, Prediction, Written

_TILES = {"whole tiles": 0.5, "ragged edges": 0.5}

LAB = Lab(
    name="00_start_here",
    title="Start here",
    hours=2.0,
    graded=False,
    room=None,
    summary="How a check speaks; shapes and einsum; honest timing; peak memory; three Triton kernels and their twins.",
    prerequisites="Python and PyTorch tensors; what softmax attention computes",
    exercises=(
        Exercise(
            "masked_mean",
            points=1.0,
            minutes=8,
            difficulty=1,
            title="The mean of a sentence's tokens",
            signature='(tokens: Float[Tensor, "sentences length width"], real: Bool[Tensor, "sentences length"])'
            ' -> Float[Tensor, "sentences width"]',
            parts={"without padding": 0.4, "with padding": 0.4, "empty sentences": 0.2},
            seconds=10.0,
        ),
        Exercise(
            "attention_scores",
            points=1.0,
            minutes=8,
            difficulty=1,
            title="Attention scores by einsum",
            signature='(queries: Float[Tensor, "batch heads query dim"], keys: Float[Tensor, "batch heads key dim"])'
            ' -> Float[Tensor, "batch heads query key"]',
            parts={"one head": 0.5, "batches and heads": 0.5},
            seconds=10.0,
        ),
        Exercise(
            "split_heads",
            points=1.0,
            minutes=8,
            difficulty=2,
            title="Split a vector into heads",
            signature='(hidden: Float[Tensor, "batch length width"], heads: int)'
            ' -> Float[Tensor, "batch heads length width/heads"]',
            parts={"one head": 0.3, "several heads": 0.7},
            seconds=10.0,
            variants={"heads": ("runs", "turns")},
            variant_text={
                "runs": "Your heads: RUNS of neighbours, head 0 first, as in most models.",
                "turns": "Your heads: taken in TURNS, number 0 to head 0, number 1 to head 1, and so on.",
            },
        ),
        Exercise(
            "timed",
            points=1.0,
            minutes=15,
            difficulty=2,
            title="A stopwatch that tells the truth",
            signature="(work: Callable[[], Any], synchronize: Callable[[], None], clock: Callable[[], float],"
            " warmup: int, repeats: int) -> float",
            parts={"waiting": 0.4, "warm-up": 0.3, "median": 0.3},
            seconds=10.0,
        ),
        Exercise(
            "best_match",
            points=1.0,
            minutes=12,
            difficulty=2,
            title="Search without the big matrix",
            signature='(queries: Float[Tensor, "query dim"], documents: Float[Tensor, "document dim"], rows: int)'
            ' -> Float[Tensor, "query"]',
            parts={"values": 0.5, "memory": 0.5},
            seconds=10.0,
            fresh=True,
        ),
        Exercise(
            "add_vectors",
            points=1.0,
            minutes=12,
            difficulty=2,
            title="Kernel 1: add two vectors",
            signature='(x: Float[Tensor, "n"], y: Float[Tensor, "n"], out: Float[Tensor, "n"], block: int) -> None',
            parts=_TILES,
            seconds=20.0,
            needs_triton=True,
        ),
        Exercise(
            "add_vectors_twin",
            points=1.0,
            minutes=6,
            difficulty=1,
            title="Twin 1: add two vectors tile by tile",
            signature='(x: Float[Tensor, "n"], y: Float[Tensor, "n"], out: Float[Tensor, "n"], block: int) -> None',
            parts=_TILES,
            seconds=10.0,
            twin_of="add_vectors",
        ),
        Exercise(
            "row_sum",
            points=1.0,
            minutes=15,
            difficulty=3,
            title="Kernel 2: the sum of every row",
            signature='(x: Float[Tensor, "rows columns"], out: Float32[Tensor, "rows"], block: int) -> None',
            parts={"one tile a row": 0.4, "several tiles": 0.3, "strides and half precision": 0.3},
            seconds=20.0,
            needs_triton=True,
        ),
        Exercise(
            "row_sum_twin",
            points=1.0,
            minutes=8,
            difficulty=2,
            title="Twin 2: row sums tile by tile",
            signature='(x: Float[Tensor, "rows columns"], out: Float32[Tensor, "rows"], block: int) -> None',
            parts={"one tile a row": 0.4, "several tiles": 0.3, "strides and half precision": 0.3},
            seconds=10.0,
            twin_of="row_sum",
        ),
        Exercise(
            "tiled_matmul",
            points=1.0,
            minutes=25,
            difficulty=3,
            title="Kernel 3: a tiled matrix product",
            signature='(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], out: Float[Tensor, "m n"], block: int)'
            " -> None",
            parts={"whole tiles": 0.4, "ragged edges": 0.3, "strides and half precision": 0.3},
            seconds=20.0,
            needs_triton=True,
        ),
        Exercise(
            "tiled_matmul_twin",
            points=1.0,
            minutes=12,
            difficulty=2,
            title="Twin 3: a matrix product tile by tile",
            signature='(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], out: Float[Tensor, "m n"], block: int)'
            " -> None",
            parts={"whole tiles": 0.4, "ragged edges": 0.3, "strides and half precision": 0.3},
            seconds=10.0,
            twin_of="tiled_matmul",
        ),
    ),
    predictions=(
        Prediction("unsynchronized", (Guess("my_naive_milliseconds", 2.0, 2.0),)),
        Prediction(
            "peaks",
            (
                Guess('my_peaks_in_mib["chained"]', 32.0, 32.0),
                Guess('my_peaks_in_mib["named"]', 48.0, 48.0),
                Guess('my_peaks_in_mib["with gradients"]', 48.0, 48.0),
            ),
        ),
        Prediction(
            "lecture_cell", (Guess("my_first_run_in_gib", 12.0, 13.5), Guess("my_second_run_in_gib", 20.0, 22.5))
        ),
    ),
    written=(Written("stopwatch"),),
)
