"""Quantization: codes of 2 to 8 bits for a model's weights, and products that read them.

| file | what it holds |
|---|---|
| affine.py | int8 with scale and zero point, products with int32 sums |
| grid.py | the grid of a group of weights, round to nearest |
| hessian.py | the Hessian from calibration inputs, the factor of its inverse |
| gptq.py, kernel_gptq.py | GPTQ by blocks of columns, and its column loop in one Triton kernel |
| packing.py | dense streams of bits, and the words that the kernels read |
| product.py, launch_product.py, kernel_product.py | products of 16-bit inputs and weights of 2, 3, 4 and 8 bits |
| llm_int8.py | LLM.int8's decomposition: outlier columns in 16 bits |
| spqr.py | SpQR: a sparse matrix of sensitive weights beside low bits |
| linear.py | a linear layer with quantized weights |
| layers.py, calibration.py | a model's layers one at a time on the device, and what reaches them |
| quantize.py, checkpoint.py | a whole model: quantize layer by layer, resume, save, load |
| evaluation.py | perplexity of a model on a text |
| checks.py | what is accepted, and the sentences for what is not |

Names are loaded on first use: the PyTorch parts work where Triton is not installed.
"""

from effnlp_lab.lazy import lazily as _lazily

_HOMES = {
    "AffineInt8": "affine",
    "Hessian": "hessian",
    "PackedWeight": "packing",
    "QuantizedLinear": "linear",
    "QuantizedWeight": "grid",
    "SpqrWeight": "spqr",
    "affine_matmul": "affine",
    "affine_quantize": "affine",
    "calibration_sequences": "calibration",
    "dequantize_packed": "product",
    "find_grid": "grid",
    "gptq_quantize": "gptq",
    "int8_matmul": "affine",
    "inverse_factor": "hessian",
    "layer_error": "gptq",
    "llm_int8_linear": "llm_int8",
    "load_quantized": "checkpoint",
    "pack": "packing",
    "pack_bits": "packing",
    "perplexity": "evaluation",
    "quantize_model": "quantize",
    "quantized_matmul": "product",
    "round_to_nearest": "grid",
    "save_quantized": "checkpoint",
    "spqr_quantize": "spqr",
    "unpack_bits": "packing",
}
__all__ = sorted(_HOMES)
__getattr__ = _lazily(__name__, _HOMES)
