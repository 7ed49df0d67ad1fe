"""Training on one device: what a step keeps in memory, and every usual way to keep less.

| file | what it holds |
|---|---|
| memory_model.py | the peak memory of a training step by component, and the largest batch that fits |
| shapes.py | the sizes of a model that it needs, from a `transformers` configuration |
| activations.py | its table of what autograd saves, operation by operation |
| accumulation.py | gradient accumulation that equals the full batch, also with ragged micro-batches |
| checkpointing.py | activation checkpointing as an autograd function; segments; a model's layers |
| loss_scaling.py | the dynamic loss scaler, and what autocast leaves in float32 |
| adafactor.py, came.py, lion.py | optimizers with smaller state |
| adamw8bit.py | AdamW with blockwise 8-bit state |
| blockwise.py, kernel_adamw8bit.py | its dynamic code and blocks; its fused kernel |
| schedule.py | learning rates: warm-up with cosine decay, warm-up-stable-decay |
| trainer.py | the training loop: accumulation, autocast, clipping, evaluation, exact resume |
| figures.py, interruption.py | its figures, read rarely; its Ctrl-C, between two steps |
| storage.py | its files: atomic checkpoints that are checked when read, and the log |
| stream.py | its batches: epochs, and the way back to a place in them |

Names are loaded on first use: everything works where Triton is not installed.
"""

from effnlp_lab.lazy import lazily as _lazily

_HOMES = {
    "Accumulated": "accumulation",
    "Adafactor": "adafactor",
    "AdamW8bit": "adamw8bit",
    "CAME": "came",
    "Lion": "lion",
    "LossScaler": "loss_scaling",
    "MemoryPrediction": "memory_model",
    "ModelShape": "shapes",
    "Trainer": "trainer",
    "TrainingResult": "figures",
    "TrainingSetup": "memory_model",
    "accumulate": "accumulation",
    "causal_lm_loss": "accumulation",
    "checkpoint": "checkpointing",
    "checkpoint_layers": "checkpointing",
    "checkpoint_sequential": "checkpointing",
    "constant_with_warmup": "schedule",
    "cosine_with_warmup": "schedule",
    "dequantize_blockwise": "blockwise",
    "divide_gradients": "accumulation",
    "dynamic_map": "blockwise",
    "full_precision_operations": "loss_scaling",
    "largest_batch": "memory_model",
    "optimizer_state_bytes": "memory_model",
    "predict_memory": "memory_model",
    "quantize_blockwise": "blockwise",
    "split_batch": "accumulation",
    "sqrt_segments": "checkpointing",
    "warmup_stable_decay": "schedule",
}
__all__ = sorted(_HOMES)
__getattr__ = _lazily(__name__, _HOMES)
