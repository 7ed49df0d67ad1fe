"""Lab 05: integer products, rounding by group, the Hessian, GPTQ by columns and by blocks, four bits in memory."""

from effnlp_lab.exercises.spec import Exercise, Guess, Lab, Prediction, Written

LIBRARIES = ("effnlp_lab.quantization", "effnlp_lab.adapters", "effnlp_lab.training", "bitsandbytes", "torchao")
QUANTIZERS = (
    *LIBRARIES,
    "torch.ao.quantization",
    "torch.quantize_per_tensor",
    "torch.quantize_per_channel",
    "torch.fake_quantize_per_tensor_affine",
    "torch.fake_quantize_per_channel_affine",
    "aten::quantize_per",
    "aten::fake_quantize",
)
GPTQ_ARGUMENTS = (
    '(weight: Float32[Tensor, "rows columns"], hessian: Float32[Tensor, "columns columns"],'
    ' scale: Float32[Tensor, "rows groups"], zero: UInt8[Tensor, "rows groups"], bits: int'
)

LAB = Lab(
    name="05_quantization_gptq",
    title="Quantization and GPTQ",
    hours=5.0,
    room="quantization",
    summary=(
        "Weights in 8, 4, 3 and 2 bits: integer products, rounding by group, and GPTQ, which lets the weights that "
        "are still to be rounded make up for those that were."
    ),
    prerequisites="PyTorch modules; least squares and matrix inverses; perplexity of a language model",
    exercises=(
        Exercise(
            "int8_product",
            points=1.0,
            minutes=25,
            difficulty=2,
            title="Products of int8 codes",
            signature=(
                '(a: Int8[Tensor, "m k"], zero_a: Int32[Tensor, "m"], scale_a: Float32[Tensor, "m"],'
                ' b: Int8[Tensor, "n k"], zero_b: Int32[Tensor, "n"], scale_b: Float32[Tensor, "n"])'
                ' -> tuple[Int32[Tensor, "m n"], Float32[Tensor, "m n"]]'
            ),
            parts={"short sums": 0.4, "long sums": 0.3, "zero points": 0.3},
            seconds=5.0,
            forbidden=(*QUANTIZERS, "torch._int_mm", "aten::_int_mm"),
        ),
        Exercise(
            "round_to_nearest",
            points=1.5,
            minutes=40,
            difficulty=2,
            title="Round to nearest, by group",
            signature=(
                '(weight: Float[Tensor, "rows columns"], bits: int, group_size: int, clip: float = 1.0)'
                ' -> tuple[UInt8[Tensor, "rows columns"], Float32[Tensor, "rows groups"],'
                ' UInt8[Tensor, "rows groups"]]'
            ),
            parts={"groups": 0.5, "one-sided groups": 0.25, "clipping": 0.25},
            seconds=5.0,
            forbidden=QUANTIZERS,
        ),
        Exercise(
            "calibration_hessian",
            points=1.0,
            minutes=25,
            difficulty=2,
            title="The Hessian from calibration data",
            signature='(batches: Iterator[Float[Tensor, "*tokens columns"]]) -> Float32[Tensor, "columns columns"]',
            parts={"one batch": 0.4, "several batches": 0.35, "half precision": 0.25},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "gptq_columns",
            points=2.5,
            minutes=60,
            difficulty=4,
            title="GPTQ, column by column",
            signature=f'{GPTQ_ARGUMENTS}) -> UInt8[Tensor, "rows columns"]',
            parts={"one grid a row": 0.5, "groups": 0.3, "clipping": 0.2},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "gptq_blocks",
            points=2.5,
            minutes=60,
            difficulty=4,
            title="GPTQ in blocks, with a Cholesky factor",
            signature=f'{GPTQ_ARGUMENTS}, block: int) -> UInt8[Tensor, "rows columns"]',
            parts={"codes": 0.4, "ragged blocks": 0.3, "late updates": 0.3},
            seconds=10.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "Int4Weight",
            points=1.5,
            minutes=45,
            difficulty=3,
            title="Two codes in a byte",
            signature=(
                '(codes: UInt8[Tensor, "rows columns"], scale: Float32[Tensor, "rows groups"],'
                ' zero: UInt8[Tensor, "rows groups"]), with methods codes() -> UInt8[Tensor, "rows columns"] and'
                ' matmul(x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]'
            ),
            parts={"pack": 0.4, "unpack": 0.3, "product": 0.3},
            seconds=5.0,
            forbidden=QUANTIZERS,
            variants={"nibbles": ("low first", "high first", "low half", "high half")},
            variant_text={
                "low first": (
                    "Your bytes: column 0 is in the LOW four bits of byte 0, column 1 in its high four bits, and so on."
                ),
                "high first": (
                    "Your bytes: column 0 is in the HIGH four bits of byte 0, column 1 in its low four bits, and so on."
                ),
                "low half": (
                    "Your bytes: the first HALF of the columns (the longer one) is in the LOW four bits, one byte "
                    "after another, the second half in the high four bits."
                ),
                "high half": (
                    "Your bytes: the first HALF of the columns (the longer one) is in the HIGH four bits, one byte "
                    "after another, the second half in the low four bits."
                ),
            },
        ),
        Exercise(
            "act_order",
            points=0.0,
            minutes=30,
            difficulty=3,
            title="The order of the columns",
            kind="stretch",
            signature=f'{GPTQ_ARGUMENTS}) -> UInt8[Tensor, "rows columns"]',
            parts={"one grid a row": 0.5, "groups": 0.5},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "pack_int3",
            points=0.0,
            minutes=30,
            difficulty=3,
            title="Eight codes in three bytes",
            kind="stretch",
            signature='(codes: UInt8[Tensor, "rows columns"]) -> UInt8[Tensor, "rows bytes"]',
            parts={"whole groups of eight": 0.6, "a rest": 0.4},
            seconds=5.0,
            forbidden=LIBRARIES,
            variants={"bits": ("low first", "high first")},
            variant_text={
                "low first": (
                    "Your stream: the codes' bits one after another, each code from its LOWEST bit up, and every byte "
                    "is filled from its lowest bit up."
                ),
                "high first": (
                    "Your stream: the codes' bits one after another, each code from its HIGHEST bit down, and every "
                    "byte is filled from its highest bit down."
                ),
            },
        ),
        Exercise(
            "blockwise_state",
            points=0.0,
            minutes=30,
            difficulty=2,
            title="Optimizer state in 8 bits",
            kind="stretch",
            signature=(
                '(x: Float32[Tensor, "*shape"], values: Float32[Tensor, "256"], block: int)'
                ' -> tuple[UInt8[Tensor, "*shape"], Float32[Tensor, "blocks"]]'
            ),
            parts={"whole blocks": 0.5, "a short block": 0.25, "blocks of zeros": 0.25},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
        Exercise(
            "find_outliers",
            points=0.0,
            minutes=40,
            difficulty=4,
            title="SpQR's outliers",
            kind="stretch",
            signature=(
                '(weight: Float32[Tensor, "rows columns"], importance: Float32[Tensor, "columns"], bits: int,'
                ' group_size: int, count: int) -> Bool[Tensor, "rows columns"]'
            ),
            parts={"outliers": 0.5, "importance": 0.5},
            seconds=5.0,
            forbidden=LIBRARIES,
        ),
    ),
    predictions=(
        Prediction(
            "perplexity_by_bits",
            (
                Guess("my_perplexity[4]", 11.8, 12.8, full=(6.8, 7.8)),
                Guess("my_perplexity[3]", 12.8, 14.5, full=(7.3, 9.0)),
                Guess("my_perplexity[2]", 35.0, 65.0, full=(20.0, 65.0)),
            ),
        ),
        Prediction(
            "product_speedup",
            (
                Guess('my_speedup["one row"]', 0.1, 0.4, full=(2.0, 4.0)),
                Guess('my_speedup["many rows"]', 0.2, 0.6, full=(0.6, 1.1)),
            ),
        ),
    ),
    written=(Written("laptop_model"),),
)
