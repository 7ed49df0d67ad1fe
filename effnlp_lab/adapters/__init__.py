"""Adapting a frozen model: LoRA, QLoRA and their peers behind one small interface.

| file | what it holds |
|---|---|
| interface.py | add, switch, enable, disable, merge, unmerge, remove; which parameters are trained |
| configurations.py | what each method is told: one frozen dataclass a method |
| adapter.py | what every method is: parameters, tensors to save, on and off, merged or not |
| injection.py | modules found by name, the nearest names for one that matches nothing |
| layerwise.py | methods that sit at a linear layer, and the layer that holds several of them |
| lora.py | low-rank updates |
| lora_product.py | a frozen linear layer and its update as one step of autograd, the weight dense or NF4 |
| ia3.py | learned factors |
| bottleneck.py | small networks after a block |
| virtual_tokens.py | prompt tuning and prefix tuning |
| selective.py | BitFit and top-k layers: some of the model's own parameters, exchanged |
| peft_format.py | saved and loaded as PEFT does it |
| stored.py | its files: whole or absent, checked when read |
| nf4.py | the NF4 code: levels, blocks, packing |
| double_quantization.py | 8-bit scales of the scales |
| nf4_layer.py | a linear layer whose weight stays in NF4, the base of QLoRA; which products use a kernel |
| kernels_nf4.py, launch_nf4.py | Triton kernels: dequantization, products of 1 to 64 rows; how they are launched |

Names are loaded on first use: everything works where Triton is not installed.
"""

from effnlp_lab.lazy import lazily as _lazily

_HOMES = {
    "Adapter": "adapter",
    "BitFitConfig": "configurations",
    "BottleneckConfig": "configurations",
    "DoubleQuantized": "double_quantization",
    "IA3Config": "configurations",
    "LoRAConfig": "configurations",
    "NF4Linear": "nf4_layer",
    "NF4Weight": "nf4",
    "PrefixTuningConfig": "configurations",
    "PromptTuningConfig": "configurations",
    "TopLayersConfig": "configurations",
    "add_adapter": "interface",
    "adapters_disabled": "interface",
    "count_parameters": "interface",
    "dequantize_nf4": "nf4_layer",
    "disable_adapters": "interface",
    "double_dequantize": "double_quantization",
    "double_quantize": "double_quantization",
    "enable_adapters": "interface",
    "load_adapter": "peft_format",
    "lora_linear": "lora_product",
    "merge_adapter": "interface",
    "nf4_levels": "nf4",
    "nf4_linear": "nf4_layer",
    "quantize_model": "nf4_layer",
    "quantize_nf4": "nf4",
    "remove_adapter": "interface",
    "save_adapter": "peft_format",
    "set_adapter": "interface",
    "trainable_parameters": "interface",
    "unmerge_adapter": "interface",
}
__all__ = sorted(_HOMES)
__getattr__ = _lazily(__name__, _HOMES)
